"""What is measured and what it took: jobs, results, and the folder that keeps them.

All of them are values: jobs and results travel between processes, results are lines of the folder's journal too.

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
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedcache.decoding import from_json, to_json
from embedcache.errors import InputError
from embedcache.fingerprint import canonical_json, require, strict_json
from embedcache.journal import Journal, commit, exists, read, refuse_foreign, refuse_link, writing
from embedcache.spec import HeadSpec, ModelSource

Json = Mapping[str, Any]

EXTRACTION = "extraction"
"""Stands where a training has the name of its approach."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a process held: ``baseline`` before the work, ``peak`` at most; ``device`` on the GPU, if any."""

    baseline: int
    device: int | None
    peak: int

    @property
    def held(self) -> int:
        """How much the work took."""
        return max(self.peak - self.baseline, 0)


@dataclass(frozen=True)
class Extraction:
    """What extraction took. ``extracted`` of the ``unique`` contents were computed, the others were there before.

    ``disk`` is what the features of all rows take there, in bytes; None in a line that another version wrote.
    """

    extracted: int
    memory: Memory
    parameters: int
    rows: int
    seconds: float
    setup_seconds: float
    tokens: int
    unique: int
    disk: int | None = None

    @property
    def seconds_per_content(self) -> float:
        """How long one content took."""
        return self.seconds / max(self.extracted, 1)

    @property
    def adjusted(self) -> bool:
        """Whether it was interrupted and gone on with, so that its time is that of the rest, in proportion."""
        return self.extracted < self.unique


@dataclass(frozen=True)
class Training:
    """What one training took and how validation went.

    ``charged`` counts the different contents whose features it needs. ``probe_seconds`` is what training the head took
    from which other training went on, None elsewhere; ``total`` counts all parameters, None where the backbone was not
    loaded. ``best_epoch`` counts from 1, and 0 is what training started from; ``history`` has
    numbers by name for each epoch.
    """

    train_rows: int
    validation_rows: int
    test_rows: int
    charged: int
    best_epoch: int
    validation: float
    epoch_seconds: float
    history: tuple[Mapping[str, float], ...]
    seconds: float
    probe_seconds: float | None
    setup_seconds: float
    memory: Memory
    trainable: int
    total: int | None = None


@dataclass(frozen=True)
class ExtractionJob:
    """Run the backbone once over the rows of a file; see ``rows.write_rows``.

    With ``blocks`` the hidden states that enter the last so many blocks are kept beside the features.
    """

    cache: Path
    rows: Path
    source: ModelSource
    pooling: str
    progress: bool
    blocks: int = 0
    approach: str = EXTRACTION


@dataclass(frozen=True)
class TrainingJob:
    """Train by one approach on a fraction of a cache's training rows, and write what it says of the test rows.

    The model is that of the cache; ``source`` says on which device it runs.
    """

    approach: str
    fraction: float
    seed: int
    epochs: int
    metric: str
    head: HeadSpec
    cache: Path
    source: ModelSource
    outputs: Path
    progress: bool


Job = ExtractionJob | TrainingJob


# How much memory a process held at most, above what Python and its libraries take.


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Watches from where it is made; ``read`` says what was held at most since.

    On Linux by ``VmHWM`` of the process: ``ru_maxrss`` would count what the parent held when it started this one,
    because the kernel carries the peak over ``exec``. Elsewhere by ``ru_maxrss``.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._cuda = device if device.startswith("cuda") else None
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")  # forget the peak of the imports
        self.baseline = _status("VmRSS") or _most()
        if self._cuda is not None:
            import torch

            torch.cuda.reset_peak_memory_stats(self._cuda)

    def read(self) -> Memory:
        """Return what was held until now."""
        device = None
        if self._cuda is not None:
            import torch

            device = int(torch.cuda.max_memory_allocated(self._cuda))
        return Memory(baseline=self.baseline, device=device, peak=max(_status("VmHWM") or _most(), self.baseline))


def _status(name: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _most() -> int:
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


# A comparison's folder: results as they come, so that a killed comparison goes on and nothing is measured twice.


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
        return None if line is None else from_json(Extraction, line)

    def training(self, key: str) -> Training | None:
        """Return a training that was measured already and whose outputs are there."""
        line = self._lines.get(key)
        return None if line is None or self.outputs(key) is None else from_json(Training, line)

    def add(self, key: str, result: Extraction | Training, **described: object) -> None:
        """Keep a measurement; ``described`` is for people who read the file."""
        line = {"key": key, **described, **to_json(result)}
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
            outputs = np.load(io.BytesIO(data or b""), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return outputs if outputs.ndim == 2 and outputs.dtype == np.float32 else None

    def write(self, name: str, text: str) -> None:
        """Replace a file of the folder, atomically."""
        commit(self.path / name, text.encode("utf-8"), InputError)


def _parsed(data: bytes) -> Json:
    """Read a line of the journal. Raises ``ValueError``, ``TypeError`` or ``KeyError`` for one that is damaged."""
    line: Json = strict_json(data)
    require(isinstance(line["key"], str), "its key")
    require(isinstance(line["approach"], str), "its approach")
    # Whole, also where nobody asks for it: what is missing is then said of the line, not in the midst of a comparison.
    from_json(Extraction if line["approach"] == EXTRACTION else Training, line)
    return line
