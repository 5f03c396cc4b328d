"""The file that bad rows are set aside in."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO

from embedcache.errors import InputError, SpecError
from embedcache.examples.source import BadRow, Source
from embedcache.fingerprint import strict_json
from embedcache.journal import commit, explained, replacing


class Quarantine:
    """The file that bad rows are set aside in: written beside its place, put there when the pass is over."""

    def __init__(self, path: Path, sources: Sequence[Source]) -> None:
        self.path = path
        self._stack = ExitStack()
        self._file: IO[bytes] | None = None
        with explained(f"cannot read {path}", InputError):
            self._there = path.exists()
            for source in sources:
                if source.path is not None and self._there and os.path.samefile(source.path, path):
                    raise SpecError(f"the quarantine file {path} is an input file: name another one")
        if self._there and not self._is_ours():
            raise SpecError(f"the quarantine file {path} exists and was not written by embedcache: name another one")

    def _is_ours(self) -> bool:
        try:
            with open(self.path, "rb") as file:
                line = file.readline(1 << 24)
            return not line or list(strict_json(line)) == ["file", "line", "reason", "raw"]
        except (OSError, ValueError, TypeError):
            return False

    def __enter__(self) -> Quarantine:
        return self

    def add(self, name: str, row: BadRow) -> None:
        """Write one row. ASCII only, so that bytes that are not UTF-8 come back by ``surrogateescape``."""
        if self._file is None:
            self._file = self._stack.enter_context(replacing(self.path, InputError))
        record = {"file": name, "line": row.line, "reason": row.reason, "raw": row.raw}
        self._file.write((json.dumps(record, default=repr) + "\n").encode("ascii"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is None and kind is None and self._there:
            commit(self.path, b"", InputError)  # of an earlier run, which had bad rows
        self._stack.__exit__(kind, error, traceback)
