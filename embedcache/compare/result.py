"""Measurements -> the comparison: means, paired differences, the break-even; as text, Markdown and JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    with_interval,
)
from embedcache.compare.measurements import Extraction, Training
from embedcache.decoding import to_json
from embedcache.errors import MissingExtraError
from embedcache.notebook import Table, panel
from embedcache.task import Array, Floats, task_named
from embedcache.train.metrics import percentile_interval, resampled_scores, score
from embedcache.wording import counted, markdown_table, shown, table


@dataclass(frozen=True)
class Comparison:
    """What was found.

    ``rows`` has one for each fraction and approach, means over the seeds; ``break_even`` one for each fraction and
    each approach that the cache is held against. ``extraction`` is of all rows, and so are those of ``states``, by the
    number of last blocks. ``folder`` is where it lies, None where
    nothing was kept.
    """

    facts: Facts
    extraction: Extraction
    rows: Sequence[Row]
    break_even: Sequence[BreakEven]
    folder: Path | None = None
    states: Mapping[int, Extraction] = field(default_factory=dict)

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
            "states": to_json(self.states),
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
        """Return the break-even and the ratios, and how far the last blocks are from full fine-tuning."""
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
        full = {row.fraction: row for row in self.rows if row.approach == "full"}
        for row in self.rows:
            if row.from_full is not None:
                where = f"{counted(row.train_rows, 'training row')}: " if len(self.facts.fractions) > 1 else ""
                share = row.total_seconds / full[row.fraction].total_seconds
                sentences.append(
                    f"{where}{row.title}: {share:.0%} of the time of full fine-tuning, extraction included, and "
                    f"{with_interval(row.from_full, row.from_full_interval, '+')} of its {self.facts.metric}"
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
        if self.states:
            seconds = ", ".join(seconds_text(each.seconds) for each in self.states.values())
            notes.append(
                f"Extraction of all rows with the states of the last {', '.join(map(str, self.states))} blocks took "
                f"{seconds}; their rows are charged for it, and for the training of the head that they start from."
            )
        notes += [f"{APPROACHES[name].title}: left out, as {reason}." for name, reason in facts.left_out.items()]
        if facts.adjusted:
            notes.append(
                "The extraction was interrupted and gone on with: its time is that of the rest, in proportion."
            )
        return notes

    def to_text(self) -> str:
        """Lay it out for a terminal."""
        lines = [*table(self.header(), self.cells()), "", *self.sentences(), "", *self.notes]
        return "\n".join(map(shown, lines))

    def _repr_html_(self) -> str:
        table = Table(self.header(), self.cells(), range(1, len(self.header())))
        return panel("Comparison", {}, [table], [*self.sentences(), *self.notes])

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
    facts: Facts, extractions: Mapping[int, Extraction], runs: Mapping[Unit, Training],
    outputs: Mapping[Unit, Array], y: Array, folder: Path | None,
) -> Comparison:  # fmt: skip
    """Put measurements together.

    ``extractions`` are by the number of last blocks whose states they keep, ``y`` the targets of the test rows, and
    ``outputs`` what each run says of these. The bootstrap draws the same rows for every run, so differences are paired;
    over several seeds it is of the mean.
    """
    whole = {
        blocks: replace(extraction, seconds=extraction.seconds_per_content * extraction.unique)
        for blocks, extraction in extractions.items()
    }

    def scores(units: Sequence[Unit]) -> _Scores:
        task = task_named(facts.task)
        means = [score(facts.metric, task, y, outputs[unit]) for unit in units]
        drawn = [resampled_scores(task, y, outputs[unit], facts.metric) for unit in units]
        return _Scores(statistics.fmean(means), np.mean(drawn, axis=0))

    rows = []
    for fraction in facts.fractions:
        units = {name: [(fraction, name, seed) for seed in facts.seeds] for name in facts.approaches}
        scored = {name: scores(of_name) for name, of_name in units.items()}
        for name, of_name in units.items():
            extraction = extractions[APPROACHES[name].blocks]
            rows.append(_row(name, fraction, [runs[unit] for unit in of_name], extraction, scored))
    plain = whole.pop(0)
    return Comparison(facts, plain, rows, _break_evens(rows), folder, whole)


def _row(
    name: str, fraction: float, runs: Sequence[Training], extraction: Extraction, scored: Mapping[str, _Scores]
) -> Row:  # fmt: skip
    def mean(number: Callable[[Training], float | None]) -> float:
        return statistics.fmean(float(number(run) or 0.0) for run in runs)

    blocks, first = APPROACHES[name].blocks, runs[0]
    uses_cache = bool(blocks) or name in ("cached", "lp-ft")
    charged = extraction.seconds_per_content * mean(lambda run: run.charged) if uses_cache else None
    probe, training = mean(lambda run: run.probe_seconds), mean(lambda run: run.seconds)
    own, cached = scored[name], scored.get("cached") if name != "cached" else None
    full = scored.get("full") if blocks else None
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
        probe_seconds=probe if blocks or name == "lp-ft" else None,
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
        test=own.mean,
        test_interval=own.interval(),
        difference=None if cached is None else own.mean - cached.mean,
        difference_interval=None if cached is None else own.interval(cached),
        from_full=None if full is None else own.mean - full.mean,
        from_full_interval=None if full is None else own.interval(full),
        disk=extraction.disk if uses_cache else None,
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
