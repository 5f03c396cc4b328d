"""Rows in: content, label, split and id from CSV, TSV, JSONL, Parquet, folders, tar files, and objects in memory.

``load_examples`` opens and reads the input once and checks every row. It keeps compact columns (row keys, targets,
splits) and the contents, in memory as long as they are few, else in a temporary file; of pictures in files the paths.

==============  ============================================================================================
``load``        ``load_examples``: the pass over the input that puts the others together into ``Examples``
``inputs``      what the caller passes -> sources, each with the split it was given for
``formats``     paths -> sources: CSV, TSV, JSONL, text; ``parquet`` and ``folders`` for the others
``folders``     pictures in folders, one a class, and in tar files
``parquet``     Parquet files, a row group at a time
``source``      what a source is: blocks of records, of a file opened once or of objects; what a cell can be
``columns``     which column is what; what is guessed becomes a note
``content``     a cell -> the canonical bytes of a row; the only place that knows about text and pictures
``labels``      label cells -> targets: classes and numbers
``class_sets``  label cells that hold several classes
``splits``      split names, and the split by content hash
``packing``     byte strings of many rows, in memory or in a temporary file; the ids of rows
``findings``    leaks between splits, contradicting labels, classes that a split lacks
==============  ============================================================================================
"""

from embedcache.dataset import Examples, IdColumn
from embedcache.examples.columns import quarantine_file
from embedcache.examples.content import CONTENTS, Content, content_of
from embedcache.examples.load import examples_of, load_examples, set_aside
from embedcache.examples.splits import assign_splits, parse_split

__all__ = [
    "CONTENTS",
    "Content",
    "Examples",
    "IdColumn",
    "assign_splits",
    "content_of",
    "examples_of",
    "load_examples",
    "parse_split",
    "quarantine_file",
    "set_aside",
]
