"""How far an extraction is."""

from __future__ import annotations

import sys
import time
from typing import Protocol


class Progress(Protocol):
    """What a progress display must do; ``Bar`` draws one with tqdm, tests count with one."""

    def expect(self, tokens: int) -> None:
        """Say how many real positions the whole run is now thought to have."""

    def advance(self, rows: int, tokens: int) -> None:
        """Say that a batch is done."""

    def close(self) -> None:
        """Say that no more is coming."""


class Bar:
    """A tqdm bar on stderr, only on a terminal: tokens done of tokens expected, tokens/s, time left, rows/s."""

    def __init__(self, title: str = "extract") -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            desc=title, unit="tok", unit_scale=True, disable=None if sys.stderr.isatty() else True, mininterval=0.2
        )
        self._rows = 0
        self._start = time.perf_counter()

    def expect(self, tokens: int) -> None:
        """Correct the expected total."""
        self._bar.total = tokens

    def advance(self, rows: int, tokens: int) -> None:
        """Move the bar."""
        self._rows += rows
        if not self._bar.disable:
            self._bar.set_postfix_str(
                f"{self._rows / max(time.perf_counter() - self._start, 1e-9):,.0f} rows/s", refresh=False
            )
            self._bar.update(tokens)

    def close(self) -> None:
        """Leave the finished bar on its line."""
        self._bar.close()


class Watch:
    """Tells a display how far a run of ``total`` rows is, from the windows seen so far."""

    def __init__(self, display: Progress, total: int) -> None:
        self.total = total
        self.advance = display.advance
        self._display, self._rows, self._tokens = display, 0, 0

    def planned(self, rows: int, tokens: int) -> None:
        """Take the next window into account: its rows, and their real positions."""
        self._rows += rows
        self._tokens += tokens
        self._display.expect(round(self._tokens / self._rows * self.total))
