"""Out into other tools: features as files, heads as models of other libraries.

============  ==================================================================================================
``features``  a cache -> Parquet, or NumPy files with a table beside them
============  ==================================================================================================
"""

from __future__ import annotations

from embedcache.export.features import export_features

__all__ = ["export_features"]
