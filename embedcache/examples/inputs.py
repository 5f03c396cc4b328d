"""Whatever the caller passes -> sources: files, lists of dicts, DataFrames, Datasets."""

from __future__ import annotations

import itertools
import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from embedcache.errors import InputError, SpecError
from embedcache.examples.columns import ReadingOptions
from embedcache.examples.content import PICTURE_SUFFIXES
from embedcache.examples.folders import FilesSource
from embedcache.examples.formats import open_folder, open_path
from embedcache.examples.source import (
    BLOCK_ROWS,
    SAMPLE_ROWS,
    BadRow,
    Block,
    DeclaredType,
    Kind,
    Source,
    named,
    row_of,
    unique_columns,
)
from embedcache.spec import split_name

# Objects as sources: lists of dicts, pandas DataFrames and Hugging Face Datasets, without importing either library.


def is_table(value: object) -> bool:
    """Whether ``value`` is an object that ``open_object`` understands (a list of paths is not)."""
    if _is_from("pandas", value) or _is_from("datasets", value):
        return not isinstance(value, Mapping)
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and not _names_files(value)


def _names_files(value: Sequence[object]) -> bool:
    return any(isinstance(item, str) or hasattr(item, "__fspath__") or is_table(item) for item in value[:1])


def _is_from(package: str, value: object) -> bool:
    return type(value).__module__.split(".")[0] == package


def open_object(value: Any, name: str) -> Source:
    """Return the source for an object. ``name`` is what messages call it. Raises ``InputError`` when it has no rows."""
    if _is_from("pandas", value):
        if not hasattr(value, "columns"):
            raise InputError(f"{name}: got a pandas {type(value).__name__}, expected a DataFrame")
        return FrameSource(value, name)
    if _is_from("datasets", value):
        if not hasattr(value, "__len__") or not hasattr(value, "select_columns"):
            raise InputError(f"{name}: got a {type(value).__name__}, expected a Dataset: load it without streaming")
        return DatasetSource(value, name)
    return RecordsSource(value, name)


class RecordsSource(Source):
    """Mappings, one a row, from anything that can be walked more than once."""

    def __init__(self, records: Iterable[object], name: str) -> None:
        if iter(records) is records:
            raise InputError(
                f"{name}: a generator can be read only once, and its first rows are read twice: pass a list"
            )
        self.name = name
        self.rows = len(records) if isinstance(records, Sized) else None
        self._records = records
        first = [record for record in itertools.islice(records, SAMPLE_ROWS) if isinstance(record, Mapping)]
        if not first:
            for record in records:
                raise InputError(f"{name}: rows are of type {type(record).__name__}, expected a dict for every row")
            raise InputError(f"{name}: there are no rows")
        self.columns = tuple(dict.fromkeys(str(key) for record in first for key in record))
        self.sample = {column: [record.get(column) for record in first] for column in self.columns}

    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
        rows = iter(self._records)
        start = 0
        while block := list(itertools.islice(rows, BLOCK_ROWS)):
            lines = range(start, start + len(block))
            start += len(block)
            records = [record for record in block if isinstance(record, Mapping)]
            good: Sequence[int] = lines
            bad: list[BadRow] = []
            if len(records) < len(block):
                good = [line for line, record in zip(lines, block, strict=True) if isinstance(record, Mapping)]
                bad = [
                    BadRow(line, f"a {type(record).__name__}, expected a dict", record)
                    for line, record in zip(lines, block, strict=True)
                    if not isinstance(record, Mapping)
                ]
            values = [[record.get(column) for record in records] for column in columns]
            yield Block(values, good, records.__getitem__, bad)


_ROWS_OF_PICTURES = 64
"""Rows of a table that are copied at once where they may hold pictures."""


class _SlicedSource(Source):
    """A table that can be cut by row number."""

    _rows: int
    _block_rows = BLOCK_ROWS

    @abstractmethod
    def _slice(self, columns: Sequence[str], start: int, stop: int) -> list[list[object]]:
        """Return the cells of some rows, a list a column."""

    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
        for start in range(0, self._rows, self._block_rows):
            stop = min(start + self._block_rows, self._rows)
            values = self._slice(columns, start, stop)
            yield Block(values, range(start, stop), row_of(columns, values))

    def _take_sample(self, columns: Sequence[str]) -> None:
        if not self._rows:
            raise InputError(f"{self.name}: there are no rows")
        self.rows = self._rows
        self.sample = {column: [] for column in self.columns}
        self.sample |= zip(columns, self._slice(columns, 0, min(SAMPLE_ROWS, self._rows)), strict=True)


class FrameSource(_SlicedSource):
    """A pandas DataFrame; its index is not used."""

    def __init__(self, frame: Any, name: str) -> None:
        self.name = name
        self.columns = unique_columns(name, [str(column) for column in frame.columns])
        self._frame = frame
        self._rows = len(frame)
        self._take_sample(self.columns)

    def _slice(self, columns: Sequence[str], start: int, stop: int) -> list[list[object]]:
        return [self._frame.iloc[start:stop, self.columns.index(column)].tolist() for column in columns]

    def declared_type(self, column: str) -> DeclaredType | None:
        dtype = self._frame.dtypes.iloc[self.columns.index(column)]
        letter = getattr(dtype, "kind", "O")
        kind: Kind = "number" if letter in "biufc" else "other"
        return DeclaredType(kind, str(dtype)) if letter in "biufcmM" else None


class DatasetSource(_SlicedSource):
    """A Hugging Face ``Dataset``; the names of its ``ClassLabel`` columns are kept, -1 there means no label."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.name = name
        self.columns = unique_columns(name, list(dataset.column_names))
        self._dataset = self._view = dataset.with_format(None)
        self._rows = len(dataset)
        for column, feature in dataset.features.items():
            if type(feature).__name__ == "Image":  # the bytes of its files, not what they were decoded to
                self._block_rows = _ROWS_OF_PICTURES
                self._dataset = self._view = self._dataset.cast_column(column, type(feature)(decode=False))
        # Sound is not decoded just to guess what a column is.
        self._take_sample([name for name in self.columns if not hasattr(dataset.features[name], "decode_example")])

    def _slice(self, columns: Sequence[str], start: int, stop: int) -> list[list[object]]:
        if self._view.column_names != list(columns):  # a view of some columns takes long to make, to cut it does not
            self._view = self._dataset.select_columns(list(columns))
        cells = self._view[start:stop]
        return [named(self.name, column, cells[column], self.class_names(column)) for column in columns]

    def declared_type(self, column: str) -> DeclaredType:
        feature = self._dataset.features[column]
        dtype = getattr(feature, "dtype", None)
        kind: Kind = "other"
        if dtype in ("string", "large_string"):
            kind = "text"
        elif isinstance(dtype, str) and dtype.startswith(("int", "uint", "float", "bool")):  # a ClassLabel is an int64
            kind = "number"
        elif type(feature).__name__ == "Image" or dtype in ("binary", "large_binary"):
            kind = "image"
        return DeclaredType(kind, str(feature))

    def class_names(self, column: str) -> tuple[str, ...] | None:
        feature = self._dataset.features[column]
        if isinstance(feature, list):
            feature = feature[0]
        feature = getattr(feature, "feature", feature)
        return tuple(feature.names) if type(feature).__name__ == "ClassLabel" else None


class GivenSource(NamedTuple):
    """A source, and the name of the split it was given for; None when no splits were given by inputs."""

    split: str | None
    source: Source


def open_inputs(inputs: object, by_split: Mapping[str, object], options: ReadingOptions) -> Iterator[GivenSource]:
    """Open every source, in order.

    ``inputs`` and the values of ``by_split`` are as in ``load_examples``. Raises ``InputError`` for what cannot be
    read, ``SpecError`` when a split is given twice.
    """
    given: list[tuple[str | None, object]] = []
    splits = {name: value for name, value in by_split.items() if value is not None}
    if isinstance(inputs, Mapping):
        if not inputs:
            raise InputError("the input is an empty mapping: expected split names and their rows")
        for name, value in inputs.items():
            if _holds_cells(value):
                raise InputError(
                    f"the input maps {name!r} to cells, expected rows: pass a list of dicts or a DataFrame"
                )
            given.append((split_name(str(name)), value))
        if splits:
            raise SpecError(f"the input maps splits already: drop {', '.join(splits)}")
    elif inputs is not None:
        if "train" in splits:
            raise SpecError("both inputs and train were given: pass the training rows once")
        given.append(("train" if splits else None, inputs))
    given += splits.items()
    if not given:
        raise InputError("there is no input: pass a file, a list of dicts, a DataFrame or a Dataset")
    from_files = [name for name, _ in given if name is not None]
    if from_files and (options.split is not None or options.split_column is not None):
        option = "split" if options.split is not None else "split_column"
        named = ", ".join(dict.fromkeys(from_files))
        raise SpecError(f"splits were given both as inputs ({named}) and by {option}: choose one")
    for split, value in given:
        for own_split, source in _sources(split or "input", value, options):
            yield GivenSource(split or own_split, source)


def _holds_cells(value: object) -> bool:
    # A dict of columns rather than of splits: its values are lists of numbers, or of strings that are not file names.
    if not isinstance(value, (list, tuple)) or not value or not isinstance(value[0], (str, int, float)):
        return False
    return not all(isinstance(item, str) and Path(item).suffix for item in value[:3])


def _sources(label: str, value: object, options: ReadingOptions) -> Iterator[tuple[str | None, Source]]:
    """Yield the sources of a value, each with the split that its own folder names."""
    if isinstance(value, (str, os.PathLike)):
        yield from _of_path(value, options)
    elif is_table(value):
        yield None, open_object(value, label)
    elif isinstance(value, Sequence):
        files = [os.fspath(item) for item in value if _is_picture_file(item)]
        if files:
            yield None, FilesSource(files)
        for number, item in enumerate(value):
            if _is_picture_file(item):
                continue
            if isinstance(item, (str, os.PathLike)):
                yield from _of_path(item, options)
            elif is_table(item):
                yield None, open_object(item, f"{label} {number}")
            else:
                kind = type(item).__name__
                raise InputError(f"{label}: item {number} is a {kind}, expected a path, a table or a list of dicts")
    else:
        raise InputError(
            f"{label}: got a {type(value).__name__}, expected a path, a list of dicts, a DataFrame or a Dataset"
        )


def _is_picture_file(value: object) -> TypeGuard[str | os.PathLike[str]]:
    if not isinstance(value, (str, os.PathLike)):
        return False
    path = os.fsdecode(value)
    return path.lower().endswith(PICTURE_SUFFIXES) and not os.path.isdir(path)


def _of_path(value: str | os.PathLike[str], options: ReadingOptions) -> Iterator[tuple[str | None, Source]]:
    path = os.fspath(value)
    if os.path.isdir(path):
        yield from open_folder(Path(path))
    elif _is_picture_file(path):
        yield None, FilesSource([path])
    else:
        yield None, open_path(path, options.format, options.quoting)
