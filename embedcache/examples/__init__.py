"""Rows in: content, label, split and id from CSV, TSV, JSONL, Parquet, DataFrames, Datasets and lists of dicts.

``load_examples`` opens and reads the input once and checks every row. It keeps compact columns (row keys, targets,
splits) and the contents, in memory as long as they are few, else in a temporary file.

=================  ====================================================================================
``options``        what the caller asks for, checked once
``inputs``         what the caller passes -> sources, each with the split it was given for
``formats``        paths -> sources, by format: ``delimited`` (CSV, TSV), ``lines`` (JSONL, text), ``parquet``
``file_source``    a file on disk or standard input, gzipped or not, opened once
``objects``        lists of dicts, DataFrames, Datasets -> sources
``source``         what a source is: blocks of records
``columns``        which column is what; what is guessed becomes a note
``cells``          what is missing, what cannot be written; the judged cells of a column
``content``        a cell -> the canonical bytes of a row; the only place that knows about text
``labels``         label cells -> targets: classes and numbers
``class_sets``     label cells that hold several classes
``splits``         split names, and the split by content hash
``ids``            the ids of rows
``packing``        byte strings of many rows, in memory or in a temporary file
``quarantine``     the file that bad rows are set aside in
``findings``       leaks between splits, contradicting labels, classes that a split lacks
``load``           the pass over the input that puts these together into ``Examples``
=================  ====================================================================================
"""

from embedcache.dataset import Examples, IdColumn
from embedcache.examples.content import CONTENTS
from embedcache.examples.load import load_examples
from embedcache.examples.splits import assign_splits, parse_split

__all__ = ["CONTENTS", "Examples", "IdColumn", "assign_splits", "load_examples", "parse_split"]
