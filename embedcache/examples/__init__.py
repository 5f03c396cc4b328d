"""Rows in: content, label, split and id from CSV, TSV, JSONL, Parquet, DataFrames, Datasets and lists of dicts.

``load_examples`` reads the input once, checks every row and keeps compact columns (row keys, targets, splits);
``Examples.contents`` reads it again and hands out the contents, so memory never holds the data set.

==============  ======================================================================
``files``       CSV, TSV, JSONL, plain lines, Parquet: bytes on disk -> blocks of records
``objects``     lists of dicts, DataFrames, Datasets -> the same blocks
``columns``     which column is what, said aloud when guessed
``content``     a cell -> the canonical bytes of a row; the only place that knows about text
``labels``      label cells -> targets of one of the three tasks
``splits``      split names, and the split by content hash
``findings``    leaks between splits, contradicting labels, classes that a split lacks
``load``        the pass itself, bad rows and the quarantine file
==============  ======================================================================
"""

from embedcache.examples.load import Examples, IdColumn, load_examples
from embedcache.examples.splits import assign_splits, parse_split

__all__ = ["Examples", "IdColumn", "assign_splits", "load_examples", "parse_split"]
