"""Objects as sources: lists of dicts, pandas DataFrames and Hugging Face Datasets, without importing either library."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from embedcache.errors import InputError
from embedcache.examples.source import (
    BLOCK_ROWS,
    SAMPLE_ROWS,
    BadRow,
    Block,
    Kind,
    Source,
    kind_of,
    named,
    row_of,
    unique_columns,
)


def is_table(value: Any) -> bool:
    """Whether ``value`` is an object that ``open_object`` understands (a list of paths is not)."""
    if _is_from("pandas", value) or _is_from("datasets", value):
        return not isinstance(value, Mapping)
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and not _names_files(value)


def _names_files(value: Sequence[Any]) -> bool:
    return any(isinstance(item, str) or hasattr(item, "__fspath__") or is_table(item) for item in value[:1])


def _is_from(package: str, value: Any) -> bool:
    return type(value).__module__.split(".")[0] == package


def open_object(value: Any, name: str) -> Source:
    """Return the source for an object. ``name`` is what messages call it. Raises ``InputError`` when it has no rows."""
    if _is_from("pandas", value):
        if not hasattr(value, "columns"):
            raise InputError(f"{name}: got a pandas {type(value).__name__}, expected a DataFrame with a text column")
        return FrameSource(value, name)
    if _is_from("datasets", value):
        if not hasattr(value, "__len__") or not hasattr(value, "select_columns"):
            raise InputError(f"{name}: got a {type(value).__name__}, expected a Dataset: load it without streaming")
        return DatasetSource(value, name)
    return RecordsSource(value, name)


class _ObjectSource:
    name: str
    columns: tuple[str, ...]
    sample: dict[str, list[Any]]

    def where(self, line: int) -> str:
        return f"{self.name}, row {line}"

    def kind(self, column: str) -> Kind:
        return kind_of(self.sample[column], numbers_in_text=False)

    def not_text(self, column: str) -> str | None:
        return None

    def class_names(self, column: str) -> tuple[str, ...] | None:
        return None


class RecordsSource(_ObjectSource):
    """Mappings, one a row, from anything that can be walked more than once."""

    def __init__(self, records: Iterable[Any], name: str) -> None:
        if iter(records) is records:
            raise InputError(f"{name}: a generator can be read only once, and the input is read twice: pass a list")
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
            lines: Sequence[int] = range(start, start + len(block))
            start += len(block)
            bad: list[BadRow] = []
            if not all(isinstance(record, Mapping) for record in block):
                good = [place for place, record in enumerate(block) if isinstance(record, Mapping)]
                for place, record in enumerate(block):
                    if not isinstance(record, Mapping):
                        bad.append(BadRow(lines[place], f"a {type(record).__name__}, expected a dict", record))
                block, lines = [block[place] for place in good], [lines[place] for place in good]
            yield Block([[record.get(column) for record in block] for column in columns], lines, block.__getitem__, bad)


class _SlicedSource(_ObjectSource):
    """A table that can be cut by row number."""

    _rows: int

    def _slice(self, columns: Sequence[str], start: int, stop: int) -> list[list[Any]]:
        raise NotImplementedError

    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
        for start in range(0, self._rows, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, self._rows)
            values = self._slice(columns, start, stop)
            yield Block(values, range(start, stop), row_of(columns, values))

    def _prepare(self) -> None:
        if not self._rows:
            raise InputError(f"{self.name}: there are no rows")
        stop = min(SAMPLE_ROWS, self._rows)
        self.sample = dict(zip(self.columns, self._slice(self.columns, 0, stop), strict=True))


class FrameSource(_SlicedSource):
    """A pandas DataFrame; its index is not used."""

    def __init__(self, frame: Any, name: str) -> None:
        self.name = name
        self.columns = unique_columns(name, [str(column) for column in frame.columns])
        self._frame = frame
        self._rows = len(frame)
        self._prepare()

    def _slice(self, columns: Sequence[str], start: int, stop: int) -> list[list[Any]]:
        return [self._frame.iloc[start:stop, self.columns.index(column)].tolist() for column in columns]

    def not_text(self, column: str) -> str | None:
        dtype = self._frame.dtypes.iloc[self.columns.index(column)]
        return str(dtype) if getattr(dtype, "kind", "O") in "biufcmM" else None


class DatasetSource(_SlicedSource):
    """A Hugging Face ``Dataset``; the names of its ``ClassLabel`` columns are kept, -1 there means no label."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.name = name
        self.columns = unique_columns(name, list(dataset.column_names))
        self._dataset = dataset.with_format(None)
        self._rows = len(dataset)
        self._prepare()

    def _prepare(self) -> None:
        self._views: dict[tuple[str, ...], Any] = {}
        if not self._rows:
            raise InputError(f"{self.name}: there are no rows")
        plain = tuple(column for column in self.columns if not self._is_media(column))
        stop = min(SAMPLE_ROWS, self._rows)
        self.sample = {column: [] for column in self.columns}  # never decode images or sound just to guess
        self.sample.update(zip(plain, self._slice(plain, 0, stop), strict=True))

    def _is_media(self, column: str) -> bool:
        return hasattr(self._dataset.features[column], "decode_example")

    def _slice(self, columns: Sequence[str], start: int, stop: int) -> list[list[Any]]:
        wanted = tuple(columns)
        if wanted not in self._views:
            self._views[wanted] = self._dataset.select_columns(list(wanted))
        cells = self._views[wanted][start:stop]
        return [named(self.name, column, cells[column], self.class_names(column)) for column in wanted]

    def kind(self, column: str) -> Kind:
        dtype = getattr(self._dataset.features[column], "dtype", None)
        if self.class_names(column) is not None:
            return "number"
        if dtype in ("string", "large_string"):
            return "text"
        return "number" if isinstance(dtype, str) and dtype.startswith(("int", "uint", "float", "bool")) else "other"

    def not_text(self, column: str) -> str | None:
        return None if self.kind(column) == "text" else str(self._dataset.features[column])

    def class_names(self, column: str) -> tuple[str, ...] | None:
        feature = self._dataset.features[column]
        if isinstance(feature, list):
            feature = feature[0]
        feature = getattr(feature, "feature", feature)
        return tuple(feature.names) if type(feature).__name__ == "ClassLabel" else None
