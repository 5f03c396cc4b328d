"""What every source of records looks like, whatever it reads from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from embedcache.errors import InputError
from embedcache.examples.cells import NUMBER, Kind, is_missing

BLOCK_ROWS = 4096
SAMPLE_ROWS = 100


class BadRow(NamedTuple):
    """A row that cannot be used: its line (or row number), why, and what it held."""

    line: int
    reason: str
    raw: object


class DeclaredType(NamedTuple):
    """What a source says its column holds: one of our kinds, and the type by its name there."""

    kind: Kind
    name: str


@dataclass
class Block:
    """Some consecutive records: one list of cells per column asked for, and what could not be read as a record."""

    values: list[list[object]]
    lines: Sequence[int]
    raw: Callable[[int], object]
    bad: list[BadRow] = field(default_factory=list)


class Source(ABC):
    """Records that are read once, a block at a time.

    ``name`` is what messages call it; ``columns`` are its columns, and ``sample`` has the first cells of each, to guess
    from. Reading the sample opens a file, ``blocks`` goes on with the file that is open, ``close`` closes it.
    """

    name: str
    path: Path | None = None
    """The file that is read; None for an object, and for standard input, which cannot be opened again."""
    columns: tuple[str, ...]
    sample: dict[str, list[object]]
    numbers_are_written = False
    """Whether a number is a text in this format, as in CSV."""

    @abstractmethod
    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
        """Read all records."""

    def close(self) -> None:  # noqa: B027  # an object has nothing to close
        """Close what is open. What is read afterwards is opened again and read from the start."""

    def where(self, line: int) -> str:
        """Return the place of a record for a message."""
        return f"{self.name}, row {line}"

    def kind(self, column: str) -> Kind:
        """Return what the column seems to hold."""
        declared = self.declared_type(column)
        return kind_of(self.sample[column], self.numbers_are_written) if declared is None else declared.kind

    def declared_type(self, column: str) -> DeclaredType | None:
        """Return the type that the source declares for a column, None where it declares none."""
        return None

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Return the class names that the source declares for the column, in their order."""
        return None


def unique_columns(name: str, columns: Sequence[str]) -> tuple[str, ...]:
    """Return the columns as a tuple. Raises ``InputError`` when one occurs twice."""
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise InputError(f"{name}: the column {', '.join(map(repr, twice))} occurs more than once: rename one of them")
    return tuple(columns)


def named(source: str, column: str, values: Sequence[object], names: Sequence[str] | None) -> list[object]:
    """Return the cells of a ``ClassLabel`` column as names, also inside lists; -1 there means no label.

    Raises ``InputError`` for a number that has no name.
    """
    if names is None:
        return list(values)

    def name(value: object) -> object:
        if isinstance(value, list):
            return [name(item) for item in value]
        if value is None or value == -1:
            return None
        if not isinstance(value, int) or not 0 <= value < len(names):
            raise InputError(
                f"{source}: the column {column!r} has the class {value!r}, expected 0 to {len(names) - 1}, or -1"
            )
        return names[value]

    return [name(value) for value in values]


def kind_of(values: Sequence[object], numbers_are_written: bool) -> Kind:
    """Return what a column holds, going by some of its values."""
    present = [value for value in values if not is_missing(value)]
    texts = [value for value in present if isinstance(value, str)]
    if len(texts) < len(present):
        return "number" if all(isinstance(value, (str, int, float)) for value in present) else "other"
    written = [text for text in texts if text.strip()]
    if numbers_are_written and written and all(NUMBER.fullmatch(text) for text in written):
        return "number"
    return "text"


def row_of(columns: Sequence[str], values: list[list[object]]) -> Callable[[int], dict[str, object]]:
    """Return a function that shows one record of a columnar block as a dict."""
    return lambda position: {column: cells[position] for column, cells in zip(columns, values, strict=True)}
