"""The file that bad rows are set aside in."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from embedcache.errors import InputError, SpecError
from embedcache.examples.source import BadRow, Source
from embedcache.fingerprint import strict_json


class Quarantine:
    """The file that bad rows are set aside in: written beside its place, put there when the pass is over."""

    def __init__(self, path: Path, sources: Sequence[Source]) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        for source in sources:
            used = getattr(source, "path", None)
            if used is not None and path.exists() and os.path.samefile(used, path):
                raise SpecError(f"the quarantine file {path} is an input file: name another one")
        if path.exists() and not self._is_ours():
            raise SpecError(f"the quarantine file {path} exists and was not written by embedcache: name another one")

    def _is_ours(self) -> bool:
        try:
            with open(self.path, "rb") as file:
                line = file.readline(1 << 24)
            return not line or list(strict_json(line)) == ["file", "line", "reason", "raw"]
        except (OSError, ValueError, TypeError):
            return False

    def __enter__(self) -> Quarantine:
        try:
            with suppress(FileNotFoundError):
                os.unlink(self._partial)
            self._file = open(self._partial, "x", encoding="ascii")  # never through a link that waits there
        except OSError as error:
            raise InputError(f"the quarantine file {self.path} cannot be written: {error.strerror}") from None
        return self

    def add(self, name: str, row: BadRow) -> None:
        """Write one row. ASCII only, so that bytes that are not UTF-8 come back by ``surrogateescape``."""
        record = {"file": name, "line": row.line, "reason": row.reason, "raw": row.raw}
        self._write(json.dumps(record, default=repr) + "\n")

    def _write(self, text: str) -> None:
        try:
            self._file.write(text)
        except OSError as error:
            raise InputError(f"the quarantine file {self.path} cannot be written: {error.strerror}") from None

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if error is not None:
            self._file.close()
            self._partial.unlink(missing_ok=True)
            return
        try:
            self._file.close()
            if self._partial.stat().st_size or self.path.exists():
                os.replace(self._partial, self.path)
            else:
                self._partial.unlink()
        except OSError as problem:
            raise InputError(f"the quarantine file {self.path} cannot be written: {problem.strerror}") from None
