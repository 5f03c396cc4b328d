"""The figures of a comparison: what was compared on what, the rows of the table, and when the cache pays for itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from embedcache.spec import TaskName

Interval = tuple[float, float]

MIB = 1 << 20


@dataclass(frozen=True)
class Facts:
    """What was compared on what.

    ``unique`` counts different contents, ``splits`` rows by name. ``outputs`` are classes, labels or targets.
    ``adjusted`` says that the extraction was interrupted and gone on with. ``device``, ``threads`` and ``torch`` are
    the machine that times were taken on.
    """

    rows: int
    unique: int
    splits: Mapping[str, int]
    task: TaskName
    outputs: int
    model: str
    pooling: str
    head: str
    approaches: Sequence[str]
    fractions: Sequence[float]
    seeds: Sequence[int]
    epochs: int
    metric: str
    adjusted: bool
    device: str
    threads: int
    torch: str


@dataclass(frozen=True)
class RowMemory:
    """Bytes at most: ``resident`` beyond Python and its libraries, ``device`` on the GPU, None without one."""

    resident: int
    device: int | None


@dataclass(frozen=True)
class Row:
    """One approach on one fraction of the training rows; times and metrics are means over the seeds.

    ``extraction_seconds`` is what an approach on the cache is charged, None for the others; ``probe_seconds`` is the
    first head of LP-FT. ``head_memory`` is what training on the cache takes without the extraction. ``difference`` is
    of the test metric, against ``cached``. Intervals are 95 % bootstrap intervals.
    """

    approach: str
    title: str
    fraction: float
    train_rows: int
    seeds: int
    extraction_seconds: float | None
    probe_seconds: float | None
    training_seconds: float
    epoch_seconds: float
    total_seconds: float
    memory: RowMemory
    head_memory: int | None
    trainable: int
    parameters: int
    best_epoch: float
    validation: float
    validation_rows: int
    test_rows: int
    test: float
    test_interval: Interval | None
    difference: float | None
    difference_interval: Interval | None

    def cells(self, epochs: int) -> list[str]:
        """Return the row as people read it; see ``header``."""
        memory = self.memory.resident if self.memory.device is None else self.memory.device
        return [
            self.title,
            f"{self.train_rows:,}",
            seconds_text(self.extraction_seconds),
            seconds_text(self.epoch_seconds),
            seconds_text(self.total_seconds),
            memory_text(memory),
            f"{self.trainable:,}",
            f"{self.parameters:,}",
            f"{self.best_epoch:g} of {epochs}",
            f"{self.validation:.3f}",
            _with_interval(self.test, self.test_interval),
            _with_interval(self.difference, self.difference_interval, "+"),
        ]


def header(metric: str) -> list[str]:
    """Return the names of the columns of a row's ``cells``."""
    return [
        "approach", "rows", "extraction", "per epoch", "total", "peak memory", "trainable", "parameters",
        "best epoch", f"validation {metric}", f"test {metric} [95 %]", "against cached [95 %]",
    ]  # fmt: skip


@dataclass(frozen=True)
class BreakEven:
    """The cached way against another approach: after how many ``heads`` it has paid for itself, None for never.

    ``first`` and ``further`` are how many times as fast the first head is, extraction included, and each further one.
    """

    fraction: float
    train_rows: int
    against: str
    extraction_seconds: float
    head_seconds: float
    other_seconds: float
    heads: int | None
    first: float
    further: float


def break_even(extraction: float, head: float, other: float) -> int | None:
    """Return after how many heads extraction has paid for itself, None for never.

    With the cache n heads cost ``extraction + n * head`` seconds, without it ``n * other``; the answer is the smallest
    n for which the first is no more than the second.

    >>> break_even(extraction=30.0, head=1.0, other=11.0)
    3
    """
    if other <= head:
        return None
    return max(1, math.ceil(extraction / (other - head)))


def seconds_text(value: float | None) -> str:
    """Say a time: ``12 ms``, ``3.4 s``, ``5 min 20 s``; ``-`` for None."""
    if value is None:
        return "-"
    if value < 0.9995:
        return f"{value * 1000:.3g} ms"
    if value < 120:
        return f"{value:.1f} s"
    return f"{int(value) // 60} min {int(value) % 60:02} s"


def ratio_text(value: float) -> str:
    """Say a ratio: ``0.83x``, ``4.2x``, ``340x``."""
    return f"{value:.2f}x" if value < 2 else f"{value:.1f}x" if value < 20 else f"{value:,.0f}x"


def memory_text(size: int) -> str:
    """Say a size in bytes: ``120 MiB``."""
    return f"{size / MIB:,.0f} MiB"


def _with_interval(value: float | None, interval: Interval | None, sign: str = "") -> str:
    if value is None:
        return "-"
    within = "" if interval is None else f" [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"
    return f"{value:{sign}.3f}{within}"
