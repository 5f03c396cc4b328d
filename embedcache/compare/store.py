"""A comparison's folder: results as they come, so that a killed comparison goes on and nothing is measured twice.

::

    DIR/
    ├── results.jsonl              one line a measurement, appended and synced; ``key`` hashes all that decides it
    ├── outputs/KEY.npy            what the approach said of the test rows, float32 [N, C]
    ├── caches/KEY.cache           the features
    ├── comparison.json, .md, .svg what was found

A key holds the data, the backbone's weights, the recipe, the seed and the kind of machine. A line whose key nobody
asks for is left alone, so a folder may hold several comparisons.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedcache.errors import InputError
from embedcache.fingerprint import canonical_json, strict_json
from embedcache.journal import (
    LOCK,
    append,
    commit,
    exists,
    explained,
    lock,
    make_folder,
    make_output,
    read,
    recover,
    refuse_link,
    remove_temporaries,
)

Result = dict[str, Any]


class Folder:
    """A comparison's folder, opened by one process at a time, as a context manager.

    Raises ``InputError`` for a path that cannot be one, and for a damaged line, naming it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._found: dict[str, Result] = {}
        self._lock: contextlib.ExitStack | None = None

    def __enter__(self) -> Folder:
        self._refuse_foreign()
        make_output(self.path, InputError, fresh=not exists(self.path / "results.jsonl", InputError))
        for name in ("outputs", "caches"):
            make_folder(self.path / name, InputError)
        self._lock = lock(self.path)
        try:
            for folder in (self.path, self.path / "outputs"):
                remove_temporaries(folder, InputError)
            self._found = self._read()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _refuse_foreign(self) -> None:
        if not exists(self.path, InputError):
            return
        if not self.path.is_dir():
            raise InputError(f"{self.path} is a file: choose a new or an empty directory")
        if not exists(self.path / "results.jsonl", InputError):
            with explained(f"cannot read {self.path}", InputError):
                strangers = [name for name in os.listdir(self.path) if name not in ("outputs", "caches", LOCK)]
            if strangers:
                raise InputError(
                    f"{self.path} exists and is no comparison (it holds {strangers[0]}): "
                    "choose a new or an empty directory"
                )

    def _read(self) -> dict[str, Result]:
        file = self.path / "results.jsonl"
        data, _ = recover(file, InputError)
        found: dict[str, Result] = {}
        for number, line in enumerate(data.splitlines(), 1):
            try:
                result = strict_json(line)
                key = result["key"]
                if not isinstance(key, str) or not isinstance(result["approach"], str):
                    raise ValueError("its key or its approach is no text")
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(
                    f"{file}, line {number} is damaged ({error}): delete that line, and it is measured again"
                ) from None
            found[key] = result
        return found

    def get(self, key: str) -> Result | None:
        """Return a measurement that is there already, with what it said where it says anything."""
        result = self._found.get(key)
        if result is None or (result["approach"] != "extraction" and self.outputs(key) is None):
            return None
        return result

    def add(self, result: Result) -> Result:
        """Keep a measurement, and return it as it will be read again."""
        line = (canonical_json(result) + "\n").encode("ascii")
        append(self.path / "results.jsonl", line, InputError)
        kept: Result = strict_json(line)
        self._found[kept["key"]] = kept
        return kept

    def cache_path(self, key: str) -> Path:
        """Return where the features are. Raises ``InputError`` for a link: what is written would go elsewhere."""
        path = self.path / "caches" / f"{key[:16]}.cache"
        refuse_link(path, InputError)
        return path

    def output_path(self, key: str) -> Path:
        """Return where the outputs of a measurement are."""
        return self.path / "outputs" / f"{key[:32]}.npy"

    def outputs(self, key: str) -> npt.NDArray[np.float32] | None:
        """Return what an approach said of the test rows, None where the file is gone or damaged."""
        data = read(self.output_path(key), InputError)
        try:
            found = np.load(io.BytesIO(data or b""), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return found if found.ndim == 2 and found.dtype == np.float32 else None

    def write(self, name: str, text: str) -> None:
        """Replace a file of the folder, atomically."""
        commit(self.path / name, text.encode("utf-8"), InputError)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Replace a JSON file of the folder, atomically."""
        self.write(name, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
