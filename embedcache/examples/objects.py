"""Objects as sources: lists of dicts, pandas DataFrames and Hugging Face Datasets, without importing either library."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from embedcache.errors import InputError
from embedcache.examples.cells import Kind
from embedcache.examples.source import (
    BLOCK_ROWS,
    SAMPLE_ROWS,
    BadRow,
    Block,
    DeclaredType,
    Source,
    named,
    row_of,
    unique_columns,
)


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


class _SlicedSource(Source):
    """A table that can be cut by row number."""

    _rows: int

    @abstractmethod
    def _slice(self, columns: Sequence[str], start: int, stop: int) -> list[list[object]]:
        """Return the cells of some rows, a list a column."""

    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
        for start in range(0, self._rows, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, self._rows)
            values = self._slice(columns, start, stop)
            yield Block(values, range(start, stop), row_of(columns, values))

    def _take_sample(self, columns: Sequence[str]) -> None:
        if not self._rows:
            raise InputError(f"{self.name}: there are no rows")
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
        # Images and sound are not decoded just to guess what a column is.
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
        return DeclaredType(kind, str(feature))

    def class_names(self, column: str) -> tuple[str, ...] | None:
        feature = self._dataset.features[column]
        if isinstance(feature, list):
            feature = feature[0]
        feature = getattr(feature, "feature", feature)
        return tuple(feature.names) if type(feature).__name__ == "ClassLabel" else None
