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
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedcache.compare.measurements import EXTRACTION, Extraction, Json, Training
from embedcache.errors import InputError
from embedcache.fingerprint import canonical_json, require, strict_json
from embedcache.journal import Journal, commit, exists, read, refuse_foreign, refuse_link, writing

MARKER = "results.jsonl"
PARTS = ("outputs", "caches")


class Folder:
    """A comparison's folder, opened by one process at a time, as a context manager.

    Raises ``InputError`` for a path that cannot be one, and for a damaged line, naming it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._journal = Journal(self.path / MARKER, _parsed, canonical_json, InputError, "it is measured again")
        self._lines: dict[str, Json] = {}
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Folder:
        refuse_foreign(self.path, "a comparison", MARKER, PARTS, InputError)
        with contextlib.ExitStack() as opening:
            fresh = not exists(self.path / MARKER, InputError)
            opening.enter_context(writing(self.path, InputError, parts=PARTS, fresh=fresh))
            lines, _ = self._journal.recover()
            self._lines = {line["key"]: line for line in lines}
            self._open = opening.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def extraction(self, key: str) -> Extraction | None:
        """Return an extraction that was measured already."""
        line = self._lines.get(key)
        return None if line is None else Extraction.from_json(line)

    def training(self, key: str) -> Training | None:
        """Return a training that was measured already and whose outputs are there."""
        line = self._lines.get(key)
        return None if line is None or self.outputs(key) is None else Training.from_json(line)

    def add(self, key: str, result: Extraction | Training, **described: object) -> None:
        """Keep a measurement; ``described`` is for people who read the file."""
        line = {"key": key, **described, **result.to_json()}
        self._journal.append([line])
        self._lines[key] = line

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

    def write_json(self, name: str, value: Mapping[str, object]) -> None:
        """Replace a JSON file of the folder, atomically."""
        self.write(name, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def _parsed(data: bytes) -> Json:
    """Read a line of the journal. Raises ``ValueError``, ``TypeError`` or ``KeyError`` for one that is damaged."""
    line: Json = strict_json(data)
    require(isinstance(line["key"], str), "its key")
    require(isinstance(line["approach"], str), "its approach")
    # Whole, also where nobody asks for it: what is missing is then said of the line, not in the midst of a comparison.
    (Extraction if line["approach"] == EXTRACTION else Training).from_json(line)
    return line
