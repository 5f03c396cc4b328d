"""Parquet, through pyarrow."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from embedcache.errors import InputError, MissingExtraError
from embedcache.examples.source import BLOCK_ROWS, SAMPLE_ROWS, Block, Kind, named, row_of, unique_columns
from embedcache.examples.stored import FileSource, StoredFile
from embedcache.fingerprint import strict_json


def _class_names(feature: Any) -> tuple[str, ...] | None:
    """Return the names of a ``ClassLabel``, or of a list of them in any form that ``datasets`` wrote."""
    while isinstance(feature, list) or (isinstance(feature, dict) and "feature" in feature):
        feature = feature[0] if isinstance(feature, list) else feature["feature"]
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return None
    names = feature["names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        raise ValueError("the names of a ClassLabel are not a list of different texts")
    return tuple(names)


class ParquetSource(FileSource):
    """A Parquet file, read a few row groups' worth of the wanted columns at a time."""

    def __init__(self, file: StoredFile) -> None:
        super().__init__(file)
        try:
            self._arrow = importlib.import_module("pyarrow")
            self._parquet = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise MissingExtraError(f"reading {self.name}", "pyarrow", "parquet") from None
        with self._opened() as table:
            self._schema = table.schema_arrow
            self.columns = unique_columns(self.name, self._schema.names)
            self._features = self._declared_features()
            if table.metadata.num_rows == 0:
                raise InputError(f"{self.name}: there are columns but no rows")
        first = next(self.blocks(self.columns))
        self.sample = {column: cells[:SAMPLE_ROWS] for column, cells in zip(self.columns, first.values, strict=True)}

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with self.file.open(lines=False) as binary:
                yield self._parquet.ParquetFile(binary)
        except (
            self._arrow.ArrowException,
            KeyError,
        ) as error:  # KeyError: a column is gone
            raise InputError(f"{self.name}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None

    def _declared_features(self) -> Mapping[str, tuple[str, ...] | None]:
        """Return what the library ``datasets`` wrote about the columns, empty where another library wrote the file."""
        written = (self._schema.metadata or {}).get(b"huggingface")
        if written is None:
            return {}
        try:
            features = strict_json(written)["info"]["features"]
            return {column: _class_names(features.get(column)) for column in self.columns}
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise InputError(f"{self.name}: what datasets wrote about its columns cannot be read: {error!r}") from None

    def class_names(self, column: str) -> tuple[str, ...] | None:
        return self._features.get(column)

    def where(self, line: int) -> str:
        return f"{self.name}, row {line}"

    def kind(self, column: str) -> Kind:
        kind = self._schema.field(column).type
        types = self._arrow.types
        if types.is_dictionary(kind):
            kind = kind.value_type
        if types.is_string(kind) or types.is_large_string(kind) or str(kind) == "string_view":
            return "text"
        return "number" if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) else "other"

    def not_text(self, column: str) -> str | None:
        return None if self.kind(column) == "text" else str(self._schema.field(column).type)

    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
        first = 0
        with self._opened() as table:
            for batch in table.iter_batches(batch_size=BLOCK_ROWS // 4, columns=list(columns)):
                values = [
                    named(self.name, column, self._cells(batch.column(column)), self.class_names(column))
                    for column in columns
                ]
                lines = range(first, first + batch.num_rows)
                yield Block(values, lines, row_of(columns, values))
                first += batch.num_rows

    def _cells(self, column: Any) -> list[Any]:
        try:
            return cast("list[Any]", column.to_pylist())
        except UnicodeDecodeError:  # Arrow does not check that its strings are UTF-8
            values = column.cast(self._arrow.large_string()).cast(self._arrow.large_binary()).to_pylist()
            return [value if value is None else value.decode("utf-8", "surrogateescape") for value in values]
