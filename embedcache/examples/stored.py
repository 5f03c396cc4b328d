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
from typing import IO, Any, cast

from embedcache.errors import EmbedcacheError, InputError, InputNotFoundError
from embedcache.examples.source import Kind, kind_of

BLOCK_BYTES = 1 << 20


class StoredFile:
    """A regular file, gzipped or not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            raise InputNotFoundError(f"{path}: no such file") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read: {_reason(error)}") from None
        if stat.S_ISDIR(mode):
            raise InputError(f"{path}: is a directory: expected a file")
        if not stat.S_ISREG(mode):
            raise InputError(f"{path}: is no regular file, and the input is read twice: save it to a file, or pass -")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty")

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open for reading bytes; whatever goes wrong while the file is read becomes one ``InputError``."""
        try:
            with open(self.path, "rb") as file:
                if self.path.suffix.lower() == ".gz":
                    with io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=file)), 1 << 16) as unpacked:
                        yield unpacked
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
        self._spool = tempfile.NamedTemporaryFile(prefix="embedcache-stdin-")  # noqa: SIM115 - lives as long as the source
        shutil.copyfileobj(sys.stdin.buffer, self._spool)
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
