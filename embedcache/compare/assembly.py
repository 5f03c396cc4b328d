"""Measurements -> the comparison: means over seeds, who is charged for what, paired differences, the break-even."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedcache.compare.approaches import APPROACHES
from embedcache.compare.figures import BreakEven, Facts, Interval, Row, RowMemory, break_even
from embedcache.compare.measurements import Extraction, Training
from embedcache.compare.result import Comparison
from embedcache.train.metrics import resampled_scores, score

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Unit = tuple[float, str, int]
"""What is measured once: a fraction, an approach and a seed."""


@dataclass(frozen=True)
class _Scores:
    """The test metric of an approach, mean over the seeds, and of bootstrap draws of the test rows [draws]."""

    mean: float
    drawn: Floats

    def interval(self, base: _Scores | None = None) -> Interval | None:
        """Return the 95 % interval, of the difference from ``base`` where there is one; None without any number."""
        drawn = self.drawn if base is None else self.drawn - base.drawn
        drawn = drawn[np.isfinite(drawn)]
        if not len(drawn):
            return None
        low, high = np.quantile(drawn, [0.025, 0.975])
        return float(low), float(high)


def assemble(
    facts: Facts, extraction: Extraction, runs: Mapping[Unit, Training], outputs: Mapping[Unit, Array], y: Array,
    folder: Path | None,
) -> Comparison:  # fmt: skip
    """Put measurements together.

    ``y`` are the targets of the test rows, ``outputs`` what each run says of them. The bootstrap draws the same rows
    for every run, so differences are paired; over several seeds it is of the mean.
    """
    whole = replace(extraction, seconds=extraction.seconds_per_content * extraction.unique)

    def scores(units: Sequence[Unit]) -> _Scores:
        means = [score(facts.metric, facts.task, y, outputs[unit]) for unit in units]
        drawn = [resampled_scores(facts.task, y, outputs[unit], facts.metric) for unit in units]
        return _Scores(statistics.fmean(means), np.mean(drawn, axis=0))

    rows = []
    for fraction in facts.fractions:
        cached: _Scores | None = None
        # The cached way comes first: the others are held against it.
        for name in facts.approaches:
            units = [(fraction, name, seed) for seed in facts.seeds]
            scored = scores(units)
            rows.append(_row(name, fraction, [runs[unit] for unit in units], extraction, scored, cached))
            cached = scored if name == "cached" else cached
    return Comparison(facts, whole, rows, _break_evens(rows), folder)


def _row(
    name: str, fraction: float, runs: Sequence[Training], extraction: Extraction, scored: _Scores,
    cached: _Scores | None,
) -> Row:  # fmt: skip
    def mean(number: Callable[[Training], float | None]) -> float:
        return statistics.fmean(float(number(run) or 0.0) for run in runs)

    uses_cache, first = name in ("cached", "lp-ft"), runs[0]
    charged = extraction.seconds_per_content * mean(lambda run: run.charged) if uses_cache else None
    probe, training = mean(lambda run: run.probe_seconds), mean(lambda run: run.seconds)
    memories = [run.memory for run in runs]
    held = max(memory.held for memory in memories)
    if uses_cache:
        memories.append(extraction.memory)
    return Row(
        approach=name,
        title=APPROACHES[name].title,
        fraction=fraction,
        train_rows=round(mean(lambda run: run.train_rows)),
        seeds=len(runs),
        extraction_seconds=charged,
        probe_seconds=probe if name == "lp-ft" else None,
        training_seconds=training,
        epoch_seconds=mean(lambda run: run.epoch_seconds),
        total_seconds=(charged or 0.0) + probe + training,
        memory=RowMemory(
            max(memory.held for memory in memories),
            max((memory.device for memory in memories if memory.device is not None), default=None),
        ),
        head_memory=held if name == "cached" else None,
        trainable=first.trainable,
        parameters=extraction.parameters + first.trainable if first.total is None else first.total,
        best_epoch=mean(lambda run: run.best_epoch),
        validation=mean(lambda run: run.validation),
        validation_rows=first.validation_rows,
        test_rows=first.test_rows,
        test=scored.mean,
        test_interval=scored.interval(),
        difference=None if cached is None else scored.mean - cached.mean,
        difference_interval=None if cached is None else scored.interval(cached),
    )


def _break_evens(rows: Sequence[Row]) -> list[BreakEven]:
    return [
        _break_even(cached, other)
        for cached in rows if cached.approach == "cached"
        for other in rows if other.fraction == cached.fraction and other.approach in ("frozen", "full")
    ]  # fmt: skip


def _break_even(cached: Row, other: Row) -> BreakEven:
    extraction, head, seconds = cached.extraction_seconds or 0.0, cached.training_seconds, other.training_seconds
    return BreakEven(
        fraction=cached.fraction,
        train_rows=cached.train_rows,
        against=other.approach,
        extraction_seconds=extraction,
        head_seconds=head,
        other_seconds=seconds,
        heads=break_even(extraction, head, seconds),
        first=seconds / (extraction + head),
        further=seconds / head,
    )
