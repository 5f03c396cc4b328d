"""Features that other tools made -> cache.

==========  ================================================================================================
``arrays``  files of features, read block by block: NumPy, Parquet, HDF5, folders of them
``rows``    what is known of the rows, by their ids: a table, a list, or nothing
``run``     both together into a cache, committed as an extraction commits
==========  ================================================================================================
"""

from __future__ import annotations

from embedcache.importing.arrays import Arrays, open_arrays
from embedcache.importing.rows import rows_of
from embedcache.importing.run import ImportReport, import_features, run

__all__ = ["Arrays", "ImportReport", "import_features", "open_arrays", "rows_of", "run"]
