"""Rows in: content, label, split and id from CSV, TSV, JSONL, Parquet, DataFrames, Datasets and lists of dicts.

``load_examples`` reads the input once, checks every row and keeps compact columns (row keys, targets, splits);
``Examples.contents`` reads it again and hands out the contents, so memory never holds the data set.

================  =====================================================================================
``inputs``        what the caller passes -> sources, each with the split it was given for
``files``         paths -> sources, by format: ``delimited`` (CSV, TSV), ``lines`` (JSONL, text), ``parquet``
``stored``        a file on disk or standard input, gzipped or not
``objects``       lists of dicts, DataFrames, Datasets -> sources
``source``        what a source is: blocks of records, the same every time
``columns``       which column is what, said aloud when guessed
``content``       a cell -> the canonical bytes of a row; the only place that knows about text
``labels``        label cells -> targets: classes and numbers
``class_sets``    label cells that hold several classes
``splits``        split names, and the split by content hash
``ids``           the ids of rows, packed
``quarantine``    the file that bad rows are set aside in
``findings``      leaks between splits, contradicting labels, classes that a split lacks
``load``          the pass over the input that puts these together
``dataset``       the result, ``Examples``
================  =====================================================================================
"""

from embedcache.examples.dataset import Examples
from embedcache.examples.ids import IdColumn
from embedcache.examples.load import load_examples
from embedcache.examples.splits import assign_splits, parse_split

__all__ = ["Examples", "IdColumn", "assign_splits", "load_examples", "parse_split"]
