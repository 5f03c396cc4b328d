"""Files as they lie on disk: opened, unpacked, and what goes wrong said in one line."""

from __future__ import annotations

import gzip
import io
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from embedcache.errors import EmbedcacheError, InputError, InputNotFoundError
from embedcache.examples.source import Kind, kind_of

BLOCK_BYTES = 1 << 20
LONGEST = 1 << 24
"""Bytes of a line and characters of a cell, far above any real one: what an endless line or an unclosed quote takes."""
_MOST_TIMES, _AFTER = 150, 1 << 22
"""A packed file that has unpacked to more than 4 MB and 150 times its size: zeros reach 1,030, real text 20."""


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
            raise InputError(f"{self._name}: a line is longer than {LONGEST:,} bytes: this is no text file")
        if self._packed is not None and self._total > max(_AFTER, _MOST_TIMES * self._packed.tell()):
            raise InputError(
                f"{self._name}: it unpacks to more than {_MOST_TIMES} times its size, which no real text does: "
                "unpack it yourself if you trust it"
            )
        return count


class StoredFile:
    """A regular file, gzipped or not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        try:
            status = path.stat()
            mode = status.st_mode
        except FileNotFoundError:
            raise InputNotFoundError(f"{path}: no such file") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read: {_reason(error)}") from None
        if stat.S_ISDIR(mode):
            raise InputError(f"{path}: is a directory: expected a file")
        if not stat.S_ISREG(mode):
            raise InputError(f"{path}: is no regular file, and the input is read twice: save it to a file, or pass -")
        if status.st_size == 0:
            raise InputError(f"{path}: the file is empty")

    @contextmanager
    def open(self, *, lines: bool = True) -> Iterator[IO[bytes]]:
        """Open for reading bytes; whatever goes wrong while the file is read becomes one ``InputError``.

        ``lines``: it is text, whose lines have an end.
        """
        try:
            with open(self.path, "rb") as file:
                if self.path.suffix.lower() == ".gz":
                    with io.BufferedReader(_Guarded(self.name, gzip.GzipFile(fileobj=file), file), 1 << 16) as unpacked:
                        yield unpacked
                elif lines:
                    with io.BufferedReader(_Guarded(self.name, file), 1 << 18) as guarded:
                        yield guarded
                else:
                    yield file
        except EmbedcacheError:
            raise
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{self.name}: broken gzip file: {_reason(error)}") from None
        except OSError as error:
            raise InputError(f"{self.name}: cannot be read: {_reason(error)}") from None


class SpooledFile(StoredFile):
    """Standard input, copied to a temporary file because contents are read again later."""

    def __init__(self) -> None:
        if sys.stdin is None:
            raise InputError("standard input is closed: name a file, or pipe the rows into this command")
        self._spool = tempfile.NamedTemporaryFile(prefix="embedcache-stdin-")  # noqa: SIM115 - lives as long as the source
        shutil.copyfileobj(_Guarded("<stdin>", sys.stdin.buffer), self._spool)
        self._spool.flush()
        try:
            super().__init__(Path(self._spool.name))
        except InputError:
            raise InputError("standard input is empty") from None
        self.name = "<stdin>"


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def refuse_foreign(file: StoredFile, format: str) -> None:
    with file.open() as binary:
        start = binary.read(8)
    if not start:
        raise InputError(f"{file.name}: the file is empty")
    for magic, what in (
        (b"\x1f\x8b", "a gzip file: add .gz to its name"),
        (b"PK\x03\x04", "a zip or spreadsheet file: export it as CSV"),
        (b"PAR1", "a Parquet file: name it .parquet"),
        (b"\x89HDF", "an HDF5 file"),
        (b"\xff\xfe", "UTF-16 text: save it as UTF-8"),
        (b"\xfe\xff", "UTF-16 text: save it as UTF-8"),
    ):
        if start.startswith(magic):
            raise InputError(f"{file.name}: expected {format} in UTF-8, but this is {what}")


class FileSource:
    """What the sources of text files share."""

    columns: tuple[str, ...]
    sample: dict[str, list[Any]]

    def __init__(self, file: StoredFile) -> None:
        self.file = file
        self.name = file.name

    @property
    def path(self) -> Path:
        """The file that is read."""
        return self.file.path

    def where(self, line: int) -> str:
        return f"{self.name}:{line}"

    def kind(self, column: str) -> Kind:
        return kind_of(self.sample[column], numbers_in_text=True)

    def not_text(self, column: str) -> str | None:
        return None

    def class_names(self, column: str) -> tuple[str, ...] | None:
        return None
