"""Files and standard input: opened once, unpacked, and what goes wrong said in one line."""

from __future__ import annotations

import gzip
import io
import shutil
import stat
import sys
import tempfile
import zlib
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from embedcache.errors import EmbedcacheError, InputError, InputNotFoundError
from embedcache.examples.source import Source

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
