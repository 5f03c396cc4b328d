"""Out into other tools: features as files, heads as models of other libraries.

==============  ================================================================================================
``features``    a cache -> Parquet, or NumPy files with a table beside them
``head``        a run -> another tool's model: the call that does it all
``source``      the run, its backbone, and the rows that the export is tried on
``modules``     head, and backbone, pooling and head, as torch modules
``graph``       ONNX, and torch's exported programs
``dense``       a folder for sentence-transformers
``checkpoint``  a checkpoint for transformers
``proof``       the other tool's answers against the head's
==============  ================================================================================================
"""

from __future__ import annotations

from embedcache.export.features import export_features
from embedcache.export.head import export_head

__all__ = ["export_features", "export_head"]
