"""A backbone that says which processes run it, for them to be killed, and a row that kills them by itself.

Workers import this, so it stands on the PYTHONPATH of every process of ``tests/engines``.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from fakes import CountingBackbone

POISON = b"poison"


class Doomed(CountingBackbone):
    """Each process that runs a pass of it leaves its number in ``folder``; one that meets ``POISON`` dies.

    ``nudge`` is added to features.
    """

    def __init__(self, folder: Path | None = None, nudge: float = 0.0, **options: Any) -> None:
        super().__init__(tokens=True, **options)
        self.folder, self.nudge, self.probe_rows = folder, nudge, (b"a row", b"another row")

    def vector(self, content: bytes) -> np.ndarray:
        return super().vector(content) + np.float32(self.nudge)

    def forward(self, prepared: Any, batch: Any) -> dict[str, Any]:
        if self.folder is not None:
            (self.folder / str(os.getpid())).touch()
            if any(POISON in prepared.contents[row] for row in batch.indices):
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(prepared, batch)


class Killer:
    """Kills processes that have left their number in a folder, at random moments, as often as ``most``."""

    def __init__(self, folder: Path, most: int, seed: int, pause: float = 0.5) -> None:
        self.killed = 0
        self._folder, self._most, self._chance, self._pause = folder, most, random.Random(seed), pause
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while self.killed < self._most and not self._stop.is_set():
            running = sorted(int(each.name) for each in self._folder.iterdir() if int(each.name) != os.getpid())
            if not running:
                time.sleep(0.01)
                continue
            self._stop.wait(self._chance.random() * self._pause)
            number = self._chance.choice(running)
            (self._folder / str(number)).unlink()
            try:
                os.kill(number, signal.SIGKILL)
                self.killed += 1
            except ProcessLookupError:
                continue


def words(count: int, poison: int | None = None) -> list[dict[str, str]]:
    """Rows of several lengths, one of them the end of whoever computes it."""
    texts = [f"row {number} " + "x" * (number * 7 % 41) for number in range(count)]
    if poison is not None:
        texts[poison] = POISON.decode()
    return [{"text": text, "label": "ab"[number % 2]} for number, text in enumerate(texts)]


def files(path: Path) -> dict[str, bytes]:
    """The bytes of every file of a cache."""
    return {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*") if each.is_file()}
