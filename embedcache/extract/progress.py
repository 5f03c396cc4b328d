"""How far an extraction is, and what it did."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from embedcache.notebook import shows_bars
from embedcache.numerics import Difference
from embedcache.wording import counted, shown


class Progress(Protocol):
    """What a progress display must do; ``Bar`` draws one with tqdm, tests count with one."""

    def expect(self, tokens: int) -> None:
        """Say how many real positions the whole run is now thought to have."""

    def advance(self, rows: int, tokens: int) -> None:
        """Say that a batch is done."""

    def close(self) -> None:
        """Say that no more is coming."""


class Bar:
    """A tqdm bar on stderr, only on a terminal: tokens done of tokens expected, tokens/s, time left, rows/s.

    Of ``pictures``, each of which is one position, it counts these and no rows: a row may have views.
    """

    def __init__(self, title: str = "extract", *, pictures: bool = False) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(
            desc=title, unit=" pictures" if pictures else "tok", unit_scale=not pictures,
            disable=not shows_bars(), mininterval=0.2,
        )  # fmt: skip
        self._pictures = pictures
        self._rows = 0
        self._start = time.perf_counter()

    def expect(self, tokens: int) -> None:
        """Correct the expected total."""
        self._bar.total = tokens

    def advance(self, rows: int, tokens: int) -> None:
        """Move the bar."""
        self._rows += rows
        if not self._bar.disable:
            if not self._pictures:
                self._bar.unit = "row" if rows == tokens else "tok"  # a backbone of one's own may read one position
                rate = self._rows / max(time.perf_counter() - self._start, 1e-9)
                self._bar.set_postfix_str(f"{rate:,.0f} rows/s", refresh=False)
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


# What one extraction did.


@dataclass(frozen=True)
class ExtractionReport:
    """What one extraction did. ``tokens`` are real positions, ``computed`` includes padding and dummy rows.

    ``numerics`` says how the new rows' machine differs from that of the rows that were there; None where either is not.
    ``notes`` say what of the cache's former dataset the new one does not have. ``views`` are of each picture.
    """

    rows: int
    unique: int
    reused: int
    extracted: int
    truncated: int
    batches: int
    tokens: int
    computed: int
    shards: int
    seconds: float
    numerics: Difference | None = None
    notes: tuple[str, ...] = ()
    views: int = 0

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON values."""
        return {**asdict(self), "numerics": None if self.numerics is None else self.numerics.to_json()}

    def to_text(self, where: Path | str) -> str:
        """Say it in a few lines."""
        lines = [
            f"{counted(self.rows, 'row')} ({self.unique:,} unique) in {shown(where)}: "
            f"{self.extracted:,} extracted, {self.reused:,} already there"
        ]
        if self.extracted:
            rate = f"{self.extracted / self.seconds:,.0f} rows/s"
            if self.views:
                rate += f" of {self.views + 1} pictures each"
            elif self.tokens != self.extracted:  # a picture is one position
                rate += f", {self.tokens / self.seconds:,.0f} tokens/s"
            padding = f"{self.computed / max(self.tokens, 1):.3f} positions computed for each real one"
            lines.append(
                f"{self.seconds:.1f} s, {rate}; {counted(self.batches, 'forward pass')}, {padding}; "
                f"{counted(self.shards, 'new shard')}"
            )
        if self.truncated:
            lines.append(f"{self.truncated:,} rows were longer than the model reads and were cut")
        if self.numerics is not None and self.numerics.status != "same":
            lines.append(f"numerics of the new rows, against those that were there: {self.numerics.to_text()}")
        return "\n".join(lines)
