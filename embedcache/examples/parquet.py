"""Parquet, through pyarrow."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from embedcache.errors import InputError, MissingExtraError
from embedcache.examples.source import (
    BLOCK_ROWS,
    SAMPLE_ROWS,
    Block,
    DeclaredType,
    InputFile,
    Kind,
    Source,
    named,
    row_of,
    unique_columns,
)
from embedcache.fingerprint import strict_json

_BLOCK_BYTES = 32 << 20
"""Bytes of the rows that are read at once, as far as rows are of one size."""


def _holds_bytes(types: Any, kind: Any) -> bool:
    """Whether a type of Arrow is bytes, or bytes with a path as the library datasets has pictures."""
    if types.is_struct(kind):
        return {kind.field(number).name for number in range(kind.num_fields)} == {"bytes", "path"}
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or str(kind) == "binary_view")


def _class_names(feature: object) -> tuple[str, ...] | None:
    """Return the names of a ``ClassLabel``, or of a list of them in any form that ``datasets`` wrote."""
    while isinstance(feature, list) or (isinstance(feature, dict) and "feature" in feature):
        feature = feature[0] if isinstance(feature, list) else feature["feature"]
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return None
    names = feature["names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        raise ValueError("the names of a ClassLabel are not a list of different texts")
    return tuple(names)


class ParquetSource(Source):
    """A Parquet file, read a few row groups' worth of the wanted columns at a time."""

    def __init__(self, file: InputFile) -> None:
        self.name, self.path, self.folder = file.name, file.path, file.folder
        self._file = file
        self._open = ExitStack()
        self._table: Any = None
        try:
            self._arrow = importlib.import_module("pyarrow")
            self._parquet = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise MissingExtraError(f"reading {self.name}", "pyarrow", "parquet") from None
        with self._explained():
            table = self._opened()
            self._schema = table.schema_arrow
            self.columns = unique_columns(self.name, self._schema.names)
            self._features = self._declared_features()
            self.rows = table.metadata.num_rows
            if not self.rows:
                raise InputError(f"{self.name}: there are columns but no rows")
        small = [column for column in self.columns if self.declared_type(column).kind != "image"]
        self.sample = {column: [] for column in self.columns}
        if small:
            first = next(self._read(small, SAMPLE_ROWS))
            self.sample |= {column: cells[:SAMPLE_ROWS] for column, cells in zip(small, first.values, strict=True)}

    def _opened(self) -> Any:
        if self._table is None:
            self._table = self._parquet.ParquetFile(self._open.enter_context(self._file.open_binary()))
        return self._table

    def close(self) -> None:
        self._table = None
        self._open.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (self._arrow.ArrowException, KeyError) as error:  # KeyError: a column is gone
            raise InputError(f"{self.name}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None
        except OSError as error:
            raise InputError(f"{self.name}: cannot be read: {error.strerror or error}") from None

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

    def declared_type(self, column: str) -> DeclaredType:
        declared = self._schema.field(column).type
        types = self._arrow.types
        inner = declared.value_type if types.is_dictionary(declared) else declared
        kind: Kind = "other"
        if types.is_string(inner) or types.is_large_string(inner) or str(inner) == "string_view":
            kind = "text"
        elif types.is_integer(inner) or types.is_floating(inner) or types.is_boolean(inner):
            kind = "number"
        elif _holds_bytes(types, inner):
            kind = "image"
        return DeclaredType(kind, str(declared))

    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
        with self._explained():
            groups = self._opened().metadata
            row_bytes = max(
                groups.row_group(number).total_byte_size // max(groups.row_group(number).num_rows, 1)
                for number in range(groups.num_row_groups)
            )
        return self._read(columns, max(1, min(BLOCK_ROWS // 4, _BLOCK_BYTES // max(row_bytes, 1))))

    def _read(self, columns: Sequence[str], rows: int) -> Iterator[Block]:
        first = 0
        with self._explained():
            for batch in self._opened().iter_batches(batch_size=rows, columns=list(columns)):
                values = [
                    named(self.name, column, self._cells(batch.column(column)), self.class_names(column))
                    for column in columns
                ]
                lines = range(first, first + batch.num_rows)
                yield Block(values, lines, row_of(columns, values))
                first += batch.num_rows

    def _cells(self, column: Any) -> list[object]:
        try:
            return cast("list[object]", column.to_pylist())
        except UnicodeDecodeError:  # Arrow does not check that its strings are UTF-8
            values = column.cast(self._arrow.large_string()).cast(self._arrow.large_binary()).to_pylist()
            return [value if value is None else value.decode("utf-8", "surrogateescape") for value in values]
