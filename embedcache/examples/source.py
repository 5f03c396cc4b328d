"""What every source of records is, whatever it reads from: files opened once, and cells that may be missing."""

from __future__ import annotations

import gzip
import io
import re
import shutil
import stat
import sys
import tempfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Generic, Literal, NamedTuple, TypeVar

from embedcache.errors import EmbedcacheError, InputError, InputNotFoundError

# Cells of the input: what is missing, what cannot be written, and the judged cells of one column of a block.


Value = TypeVar("Value")

NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
"""A number as text."""

Kind = Literal["text", "number", "image", "other"]
"""What a column of the input holds, as far as its source declares or shows it."""

Faults = dict[int, str]
"""Why records of a block cannot be used: position in the block -> reason."""


class Parsed(NamedTuple):
    """The cells of one column of a block, judged.

    ``add`` adds the values of the rows that turned out usable, by their positions in the block; None adds all. So a
    row that is set aside for another column's sake leaves no trace: it never creates a class.
    """

    faults: Faults
    add: Callable[[list[int] | None], None]


def parsed(values: Sequence[Value], faults: Faults, append: Callable[[Sequence[Value]], None]) -> Parsed:
    """Return judged cells, one of ``values`` for each row, of which ``append`` adds some."""
    return Parsed(faults, lambda keep: append(values if keep is None else [values[place] for place in keep]))


def is_missing(value: object) -> bool:
    """Whether ``value`` is None, NaN, pandas' NA or NaT."""
    if isinstance(value, float):
        return value != value
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def unicode_fault(column: str, value: str) -> str | None:
    """Return why ``value`` cannot be written as UTF-8, or None when it can."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        where = f"at character {error.start + 1} of {column!r}"
        if 0xDC80 <= code <= 0xDCFF:  # how errors="surrogateescape" carries a byte that is not UTF-8
            return f"undecodable byte 0x{code - 0xDC00:02x} {where}, expected UTF-8"
        return f"lone surrogate U+{code:04X} {where}"
    return None


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
    folder: Path | None = None
    """Where relative paths in its cells begin; None for an object, whose paths begin in the current directory."""
    rows: int | None = None
    """How many records there are; None where they have to be read to be counted."""
    columns: tuple[str, ...]
    sample: dict[str, list[object]]
    content_kind: str | None = None
    """The kind of content that the whole source is made for; None where its columns must be looked at."""
    id_column: str | None = None
    """The column that names its rows unless another one is asked for; None where they have nothing but numbers."""
    notes: tuple[str, ...] = ()
    """What was left out, as notes on the input."""
    names_roles = False
    """Whether the names of the columns are ours and say what they hold, as those of a folder: nothing is guessed."""
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
    if present and all(map(_is_picture, present)):
        return "image"
    if len(texts) < len(present):
        return "number" if all(isinstance(value, (str, int, float)) for value in present) else "other"
    written = [text for text in texts if text.strip()]
    if numbers_are_written and written and all(NUMBER.fullmatch(text) for text in written):
        return "number"
    return "text"


def _is_picture(value: object) -> bool:
    """Whether a value is an image file's bytes, alone or with its path, a PIL image or an array of its shape."""
    if isinstance(value, Mapping):
        return {*value} == {"bytes", "path"}
    shape = getattr(value, "shape", ())
    pixels = len(shape) in (2, 3) and str(getattr(value, "dtype", "")) == "uint8"
    return isinstance(value, (bytes, bytearray)) or pixels or type(value).__module__.partition(".")[0] == "PIL"


def row_of(columns: Sequence[str], values: list[list[object]]) -> Callable[[int], dict[str, object]]:
    """Return a function that shows one record of a columnar block as a dict."""
    return lambda position: {column: cells[position] for column, cells in zip(columns, values, strict=True)}


# Files and standard input: opened once, unpacked, and what goes wrong said in one line.


RawBlock = TypeVar("RawBlock")

BLOCK_BYTES = 1 << 20
LONGEST = 1 << 24
"""Bytes of a line and characters of a cell, far above any real one: what an endless line or an unclosed quote takes."""
_MOST_TIMES, _AFTER = 150, 1 << 22
"""A packed file that has unpacked to more than 4 MB and 150 times its size: zeros reach 1,030, real text 20."""
_FOREIGN = (
    (b"\x1f\x8b", "a gzip file: add .gz to its name"),
    (b"PK\x03\x04", "a zip or spreadsheet file: export it as CSV"),
    (b"PAR1", "a Parquet file: name it .parquet"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\xff\xfe", "UTF-16 text: save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text: save it as UTF-8"),
)
"""How files begin that are not text in UTF-8, and what to do about them."""


class _Guarded(io.RawIOBase):
    """Bytes of a file, read until a line is longer than any real one, or a packed file larger."""

    def __init__(self, name: str, file: Any, packed: IO[bytes] | None = None) -> None:
        self._name, self._file, self._packed = name, file, packed
        self._total = self._line = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._file.readinto(buffer)
        self._total += count
        last = bytes(buffer[:count]).rfind(b"\n")
        self._line = self._line + count if last < 0 else count - last - 1
        if self._line > LONGEST:
            raise InputError(f"{self._name}: a line is longer than {LONGEST:,} bytes: this is not a text file")
        if self._packed is not None and self._total > max(_AFTER, _MOST_TIMES * self._packed.tell()):
            raise InputError(
                f"{self._name}: it unpacks to more than {_MOST_TIMES} times its size, which no real text does: "
                "unpack it yourself if you trust it"
            )
        return count


class InputFile:
    """A regular file, gzipped or not. ``name`` is what messages call it."""

    def __init__(self, path: Path) -> None:
        self.path: Path | None = path
        self.folder = path.parent
        self.name = str(path)
        self._empty = f"{path}: the file is empty"
        try:
            status = path.stat()
        except FileNotFoundError:
            raise InputNotFoundError(f"{path}: no such file") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read: {_reason(error)}") from None
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{path}: is a directory: expected a file")
        if not stat.S_ISREG(status.st_mode):  # a pipe may keep its reader waiting for ever
            raise InputError(f"{path}: is not a regular file: save what it holds to a file, or pipe it in and pass -")
        if status.st_size == 0:
            raise InputError(self._empty)

    @contextmanager
    def open_text(self, format: str) -> Iterator[io.BufferedReader[_Guarded]]:
        """Open for reading lines, as bytes. ``format`` is what messages say was expected.

        Whatever goes wrong until the block ends becomes one ``InputError``.
        """
        with self._explained(), self._opened() as guarded, io.BufferedReader(guarded, 1 << 18) as file:
            start = file.peek(8)[:8]
            if not start:
                raise InputError(self._empty)
            for magic, what in _FOREIGN:
                if start.startswith(magic):
                    raise InputError(f"{self.name}: expected {format} in UTF-8, but this is {what}")
            yield file

    @contextmanager
    def _opened(self) -> Iterator[_Guarded]:
        assert self.path is not None
        with open(self.path, "rb") as file:
            packed = self.path.suffix.lower() == ".gz"
            yield _Guarded(self.name, gzip.GzipFile(fileobj=file), file) if packed else _Guarded(self.name, file)

    @contextmanager
    def open_binary(self) -> Iterator[IO[bytes]]:
        """Open for reading anywhere in the file, as it is. Errors are those of ``open_text``."""
        assert self.path is not None
        with self._explained(), open(self.path, "rb") as file:
            yield file

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except EmbedcacheError:
            raise
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{self.name}: broken gzip file: {_reason(error)}") from None
        except OSError as error:
            raise InputError(f"{self.name}: cannot be read: {_reason(error)}") from None


class StandardInput(InputFile):
    """What is piped into the command; it can be opened once."""

    def __init__(self) -> None:
        if sys.stdin is None:
            raise InputError("standard input is closed: name a file, or pipe the rows into this command")
        self.path = None
        self.folder = Path()
        self.name = "<stdin>"
        self._empty = "standard input is empty"

    @contextmanager
    def _opened(self) -> Iterator[_Guarded]:
        yield _Guarded(self.name, sys.stdin.buffer)

    @contextmanager
    def open_binary(self) -> Iterator[IO[bytes]]:
        with self._explained(), tempfile.TemporaryFile(prefix="embedcache-stdin-") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
            if not file.tell():
                raise InputError(self._empty)
            yield file


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


class TextSource(Source, Generic[RawBlock]):
    """What the sources of text files share: a first look at what is read, which reading then goes on from."""

    def __init__(self, file: InputFile) -> None:
        self.file = file
        self.name = file.name
        self.path = file.path
        self.folder = file.folder
        self._reading: Iterator[RawBlock] | None = None
        self._seen: list[RawBlock] = []

    @abstractmethod
    def _read(self) -> Iterator[RawBlock]:
        """Open the file and read it, in blocks of whatever form the format has."""

    def _look_ahead(self) -> Iterator[RawBlock]:
        """Read the first blocks, which ``_read_all`` then begins with."""
        self._reading = self._read()
        for block in self._reading:
            self._seen.append(block)
            yield block

    def _read_all(self) -> Iterator[RawBlock]:
        reading, seen = self._reading or self._read(), self._seen
        self._reading, self._seen = None, []
        seen.reverse()
        while seen:
            yield seen.pop()  # not held any longer than it is needed
        yield from reading

    def close(self) -> None:
        if self._reading is not None:
            self._reading.close()  # type: ignore[attr-defined]  # a generator, which closes the file it is reading
        self._reading, self._seen = None, []

    def where(self, line: int) -> str:
        return f"{self.name}:{line}"
