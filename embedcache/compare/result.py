"""Measurements -> the comparison: means, paired differences, the break-even; as text, Markdown and JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from embedcache.compare.figures import (
    APPROACHES,
    BreakEven,
    Facts,
    Interval,
    Row,
    RowMemory,
    break_even,
    header,
    memory_text,
    ratio_text,
    seconds_text,
)
from embedcache.compare.measurements import Extraction, Training
from embedcache.decoding import to_json
from embedcache.errors import MissingExtraError
from embedcache.task import Array, Floats, task_named
from embedcache.train.metrics import percentile_interval, resampled_scores, score
from embedcache.wording import counted, markdown_table, shown, table


@dataclass(frozen=True)
class Comparison:
    """What was found.

    ``rows`` has one for each fraction and approach, means over the seeds; ``break_even`` one for each fraction and
    each approach that the cache is held against. ``extraction`` is of all rows. ``folder`` is where it lies, None where
    nothing was kept.
    """

    facts: Facts
    extraction: Extraction
    rows: Sequence[Row]
    break_even: Sequence[BreakEven]
    folder: Path | None = None

    def row(self, approach: str, fraction: float = 1.0) -> Row:
        """Return the row of an approach. Raises ``KeyError`` where there is none."""
        for row in self.rows:
            if (row.approach, row.fraction) == (approach, fraction):
                return row
        raise KeyError(f"{approach} at {fraction}")

    def to_json(self) -> dict[str, object]:
        """Return everything as JSON values."""
        return {
            "format": "embedcache-comparison",
            "version": 1,
            "facts": to_json(self.facts),
            "extraction": to_json(self.extraction),
            "rows": to_json(self.rows),
            "break_even": to_json(self.break_even),
        }

    def header(self) -> list[str]:
        """Return the names of the columns of ``cells``."""
        return header(self.facts.metric)

    def cells(self) -> list[list[str]]:
        """Return the table as people read it."""
        return [row.cells(self.facts.epochs) for row in self.rows]

    def sentences(self) -> list[str]:
        """Return the break-even and the ratios, a sentence each."""
        sentences = []
        for even in self.break_even:
            against = APPROACHES[even.against].title
            where = f"{counted(even.train_rows, 'training row')}: " if len(self.facts.fractions) > 1 else ""
            paid = (
                "the cache never pays for itself" if even.heads is None
                else f"the extraction has paid for itself with head number {even.heads}"
            )  # fmt: skip
            sentences.append(
                f"{where}against {against}, {paid}; {counted(self.facts.epochs, 'epoch')}, extraction included, are "
                f"{ratio_text(even.first)} as fast, each further head {ratio_text(even.further)}"
            )
        return sentences

    @property
    def notes(self) -> list[str]:
        """Return what one has to know to read the table."""
        facts = self.facts
        splits = ", ".join(f"{rows:,} {name}" for name, rows in facts.splits.items())
        on_gpu = any(row.memory.device is not None for row in self.rows)
        memory = "memory on the GPU" if on_gpu else "resident memory, less that of Python and its libraries"
        notes = [
            f"{counted(facts.rows, 'row')} ({counted(facts.unique, 'different content')}): {splits}; "
            f"{facts.task}, {facts.outputs} outputs; {facts.model}; head {facts.head}; {facts.device}, "
            f"{facts.threads} threads; seeds {', '.join(map(str, facts.seeds))}.",
            f"Extraction of all rows took {seconds_text(self.extraction.seconds)}; a row of the table is charged "
            "for its training and validation rows. Loading the model and judging the test rows are charged to nobody.",
            f"An epoch includes its validation pass. Each measurement ran in a process of its own; peak memory is "
            f"{memory}.",
            f"The best epoch is the one of the best validation {facts.metric}; its weights are judged on test. "
            "Intervals are 95 % bootstrap intervals over the test rows, paired for differences.",
        ]
        heads = [row.head_memory for row in self.rows if row.head_memory is not None]
        if heads:
            peak = memory_text(max(heads))
            notes.append(f"The cached way's peak is that of its extraction; a head on the cache takes {peak}.")
        if facts.adjusted:
            notes.append(
                "The extraction was interrupted and gone on with: its time is that of the rest, in proportion."
            )
        return notes

    def to_text(self) -> str:
        """Lay it out for a terminal."""
        lines = [*table(self.header(), self.cells()), "", *self.sentences(), "", *self.notes]
        return "\n".join(map(shown, lines))

    def to_markdown(self) -> str:
        """Lay it out as Markdown, with the recipes."""
        lines = ["# Cached features against training with the backbone in the loop", ""]
        lines += markdown_table(self.header(), self.cells(), range(1, len(self.header())))
        lines += ["", *(f"- {sentence}." for sentence in self.sentences()), "", *(f"{note}\n" for note in self.notes)]
        used = {row.approach for row in self.rows}
        recipes = [f"- **{way.title}.** {way.recipe}" for name, way in APPROACHES.items() if name in used]
        return "\n".join([*lines, "## Recipes", "", *recipes]) + "\n"

    def plot(self, file: Path | str) -> None:
        """Draw time and test metric into an SVG or PNG file. Raises ``MissingExtraError`` without matplotlib."""
        try:
            from embedcache.compare.plot import draw
        except ImportError:
            raise MissingExtraError("the plot", "matplotlib", "report") from None
        draw(self.facts, self.rows, Path(file))


# Measurements -> the comparison: means over seeds, who is charged for what, paired differences, the break-even.


Unit = tuple[float, str, int]
"""What is measured once: a fraction, an approach and a seed."""


@dataclass(frozen=True)
class _Scores:
    """The test metric of an approach, mean over the seeds, and of bootstrap draws of the test rows [draws]."""

    mean: float
    drawn: Floats

    def interval(self, base: _Scores | None = None) -> Interval | None:
        """Return the 95 % interval, of the difference from ``base`` where there is one; None without any number."""
        return percentile_interval(self.drawn if base is None else self.drawn - base.drawn)


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
        task = task_named(facts.task)
        means = [score(facts.metric, task, y, outputs[unit]) for unit in units]
        drawn = [resampled_scores(task, y, outputs[unit], facts.metric) for unit in units]
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
        _break_even(cached, live)
        for cached in rows if cached.approach == "cached"
        for live in rows if live.fraction == cached.fraction and live.approach in ("frozen", "full")
    ]  # fmt: skip


def _break_even(cached: Row, live: Row) -> BreakEven:
    extraction, head, seconds = cached.extraction_seconds or 0.0, cached.training_seconds, live.training_seconds
    return BreakEven(
        fraction=cached.fraction,
        train_rows=cached.train_rows,
        against=live.approach,
        extraction_seconds=extraction,
        head_seconds=head,
        other_seconds=seconds,
        heads=break_even(extraction, head, seconds),
        first=seconds / (extraction + head),
        further=seconds / head,
    )
