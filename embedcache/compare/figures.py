"""The approaches that are compared, and the figures of a comparison: its rows, and when the cache pays for itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from embedcache.errors import SpecError
from embedcache.spec import TUNING, TUNING_DECAY, TUNING_RATE, TaskName, TrainSpec
from embedcache.wording import counted, did_you_mean

# The approaches that are compared, each with a recipe that somebody published.


@dataclass(frozen=True)
class Approach:
    """A way of training. ``title`` is what tables call it, ``recipe`` how it is done and after whom.

    ``spec`` says how it is trained but for epochs, seed and metric; ``backbone_rate`` is the learning rate of the
    backbone, None where it is frozen. ``blocks`` is how many of the last blocks are trained from cached states, 0 where
    the approach reads none. It has ``most`` epochs at most.
    """

    name: str
    title: str
    recipe: str
    spec: TrainSpec
    backbone_rate: float | None = None
    blocks: int = 0
    most: int | None = None

    def epochs(self, asked: int) -> int:
        """Return how many epochs it has where so many are asked for."""
        return asked if self.most is None else min(asked, self.most)

    def train_spec(self, epochs: int, seed: int, metric: str) -> TrainSpec:
        """Return the settings of one run."""
        return replace(self.spec, epochs=self.epochs(epochs), seed=seed, metric=metric)


# No patience anywhere: every approach runs all its epochs and no more, and keeps the weights of its best one.
_PROBE = TrainSpec(
    min_steps=0, batch_size=32, learning_rate=3e-3, weight_decay=0.01, schedule="cosine", warmup=0.05, patience=0
)
_TUNE = TrainSpec(
    min_steps=0,
    batch_size=16,
    learning_rate=1e-3,
    weight_decay=0.01,
    schedule="linear",
    warmup=0.1,
    patience=0,
    standardize=False,
)
_BACKBONE_RATE = 5e-5


def _last(blocks: int) -> Approach:
    what = "last block" if blocks == 1 else f"last {blocks} blocks"
    return Approach(
        f"last-{blocks}",
        f"{what}, cached states",
        f"The hidden states that enter the {what} are cached too; the head is trained first, on the cache, then it and "
        f"the {what} by the steps of full fine-tuning, but without dropout, with a decay of {TUNING.weight_decay:g}, "
        f"in {counted(TUNING.epochs, 'epoch')} at most, the last block at {TUNING_RATE:g}, each before it at "
        f"{TUNING_DECAY:g} of that (Howard & Ruder 2018). Where validation went better before, that is kept (epoch 0).",
        TUNING,
        TUNING_RATE,
        blocks,
        TUNING.epochs,
    )


APPROACHES: dict[str, Approach] = {
    approach.name: approach
    for approach in (
        Approach(
            "cached",
            "cached features + head",
            "The backbone runs once; the head learns on standardised features (He et al. 2022, linear probing) with "
            "AdamW at 3e-3, batches of 32, cosine decay (Loshchilov & Hutter 2017, 2019).",
            _PROBE,
        ),
        Approach(
            "frozen",
            "frozen, end to end",
            "The same training of the same head, with the frozen backbone inside every step and every validation "
            "pass; batches padded to their longest text. The standardisation is a gift of the cache and not charged.",
            _PROBE,
        ),
        *(_last(blocks) for blocks in (1, 2, 3)),
        Approach(
            "full",
            "full fine-tuning",
            "Backbone and head together: AdamW at 5e-5, batches of 16 rows of similar length, decay of 0.01 off biases "
            "and gains, linear decay to 0 (Devlin et al. 2019), 10 % of the steps warming up, bias correction (Mosbach "
            "et al. 2021), gradients clipped at 1; the new head learns faster, at 1e-3 (Howard & Ruder 2018).",
            _TUNE,
            _BACKBONE_RATE,
        ),
        Approach(
            "lp-ft",
            "LP-FT",
            "The head is trained first, on the cache, and full fine-tuning starts from it, one rate of 5e-5 for all "
            "(Kumar et al. 2022). Where validation went better before, that is kept (epoch 0).",
            replace(_TUNE, learning_rate=_BACKBONE_RATE),
            _BACKBONE_RATE,
        ),
    )
}
"""Name -> approach, in the order in which they are run and shown."""


def chosen(names: Sequence[str]) -> list[Approach]:
    """Return the approaches of these names, in their own order. Raises ``SpecError`` for a name there is not."""
    for name in names:
        if name not in APPROACHES:
            hint = did_you_mean(name, APPROACHES)
            raise SpecError(f"there is no approach {name!r}{hint}: expected some of {', '.join(APPROACHES)}")
    if not names:
        raise SpecError(f"no approach was named: expected some of {', '.join(APPROACHES)}")
    return [approach for name, approach in APPROACHES.items() if name in names]


Interval = tuple[float, float]

MIB = 1 << 20


@dataclass(frozen=True)
class Facts:
    """What was compared on what.

    ``unique`` counts different contents, ``splits`` rows by name. ``outputs`` are classes, labels or targets.
    ``adjusted`` says that the extraction was interrupted and gone on with. ``left_out`` has approaches that could not
    be had, with the reason. ``device``, ``threads`` and ``torch`` are
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
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RowMemory:
    """Bytes at most: ``resident`` beyond Python and its libraries, ``device`` on the GPU, None without one."""

    resident: int
    device: int | None


@dataclass(frozen=True)
class Row:
    """One approach on one fraction of the training rows; times and metrics are means over the seeds.

    ``extraction_seconds`` and ``disk`` (bytes) are what an approach on the cache is charged, None for the others;
    ``probe_seconds`` is the first head, where there is one. ``head_memory`` is what training on the cache takes without
    the extraction. ``difference`` is of the test metric, against ``cached``; ``from_full`` that of the last blocks
    against ``full``. Intervals are 95 % bootstrap intervals.
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
    disk: int | None = None
    from_full: float | None = None
    from_full_interval: Interval | None = None

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
            "-" if self.disk is None else memory_text(self.disk),
            f"{self.trainable:,}",
            f"{self.parameters:,}",
            f"{self.best_epoch:g} of {APPROACHES[self.approach].epochs(epochs)}",
            f"{self.validation:.3f}",
            with_interval(self.test, self.test_interval),
            with_interval(self.difference, self.difference_interval, "+"),
        ]


def header(metric: str) -> list[str]:
    """Return the names of the columns of a row's ``cells``."""
    return [
        "approach", "rows", "extraction", "per epoch", "total", "peak memory", "disk", "trainable", "parameters",
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


def break_even(extraction: float, head: float, without: float) -> int | None:
    """Return after how many heads extraction has paid for itself, None for never.

    With the cache n heads cost ``extraction + n * head`` seconds, without it ``n * without``: the answer is the
    smallest n for which the first is at most the second.

    >>> break_even(extraction=30.0, head=1.0, without=11.0)
    3
    """
    if without <= head:
        return None
    return max(1, math.ceil(extraction / (without - head)))


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


def with_interval(value: float | None, interval: Interval | None, sign: str = "") -> str:
    """Say a number with its interval: ``0.912 [0.866, 0.948]``; ``-`` for None."""
    if value is None:
        return "-"
    within = "" if interval is None else f" [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"
    return f"{value:{sign}.3f}{within}"
