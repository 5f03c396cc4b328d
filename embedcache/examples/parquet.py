"""Parquet, through pyarrow."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from embedcache.errors import InputError, MissingExtraError
from embedcache.examples.source import BLOCK_ROWS, SAMPLE_ROWS, Block, Kind, row_of, unique_columns
from embedcache.examples.stored import FileSource, StoredFile


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
                values = [self._cells(batch.column(column)) for column in columns]
                lines = range(first, first + batch.num_rows)
                yield Block(values, lines, row_of(columns, values))
                first += batch.num_rows

    def _cells(self, column: Any) -> list[Any]:
        try:
            return cast("list[Any]", column.to_pylist())
        except UnicodeDecodeError:  # Arrow does not check that its strings are UTF-8
            values = column.cast(self._arrow.large_string()).cast(self._arrow.large_binary()).to_pylist()
            return [value if value is None else value.decode("utf-8", "surrogateescape") for value in values]
