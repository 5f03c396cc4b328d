"""What a comparison found: the table, the break-even, as text, Markdown and JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedcache.compare.approaches import APPROACHES
from embedcache.errors import MissingExtraError
from embedcache.spec import TaskName
from embedcache.train.metrics import resampled_scores, score
from embedcache.wording import counted, shown

Array = npt.NDArray[Any]
Row = dict[str, Any]

MIB = 1 << 20


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


@dataclass(frozen=True)
class Comparison:
    """What was found.

    ``rows`` has a dict for each fraction and approach, means over the seeds; ``break_even`` one for each fraction and
    each approach that the cache is held against. ``facts`` says what was compared on what. ``folder`` is where it lies,
    None where nothing was kept.
    """

    facts: Mapping[str, Any]
    extraction: Mapping[str, Any]
    rows: Sequence[Row]
    break_even: Sequence[Row]
    folder: Path | None = None

    def row(self, approach: str, fraction: float = 1.0) -> Row:
        """Return the row of an approach. Raises ``KeyError`` where there is none."""
        for each in self.rows:
            if each["approach"] == approach and each["fraction"] == fraction:
                return each
        raise KeyError(f"{approach} at {fraction}")

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "format": "embedcache-comparison",
            "version": 1,
            "facts": dict(self.facts),
            "extraction": dict(self.extraction),
            "rows": list(self.rows),
            "break_even": list(self.break_even),
        }

    def header(self) -> list[str]:
        """Return the names of the columns of ``cells``."""
        metric = self.facts["metric"]
        return [
            "approach", "rows", "extraction", "per epoch", "total", "peak memory", "trainable", "parameters",
            "best epoch", f"validation {metric}", f"test {metric} [95 %]", "against cached [95 %]",
        ]  # fmt: skip

    def cells(self) -> list[list[str]]:
        """Return the table as people read it."""
        return [
            [
                each["title"],
                f"{each['train_rows']:,}",
                seconds_text(each["extraction_seconds"]),
                seconds_text(each["epoch_seconds"]),
                seconds_text(each["total_seconds"]),
                _memory(each),
                f"{each['trainable']:,}",
                f"{each['parameters']:,}",
                f"{each['best_epoch']:g} of {self.facts['epochs']}",
                f"{each['validation']:.3f}",
                _with_interval(each["test"], each["test_interval"]),
                _with_interval(each["difference"], each["difference_interval"], "+"),
            ]
            for each in self.rows
        ]

    def sentences(self) -> list[str]:
        """Return the break-even and the ratios, a sentence each."""
        said = []
        for each in self.break_even:
            against = APPROACHES[each["against"]].title
            where = f"{counted(each['train_rows'], 'training row')}: " if len(self.facts["fractions"]) > 1 else ""
            if each["heads"] is None:
                even = "the cache never pays for itself"
            else:
                even = f"the extraction has paid for itself with head number {each['heads']}"
            said.append(
                f"{where}against {against}, {even}; {counted(self.facts['epochs'], 'epoch')}, extraction included, are "
                f"{ratio_text(each['first'])} as fast, each further head {ratio_text(each['further'])}"
            )
        return said

    @property
    def notes(self) -> list[str]:
        """Return what one has to know to read the table."""
        facts = self.facts
        splits = ", ".join(f"{rows:,} {name}" for name, rows in facts["splits"].items())
        on_gpu = any(each["memory"]["device"] is not None for each in self.rows)
        what = "memory on the GPU" if on_gpu else "resident memory, less that of Python and its libraries"
        said = [
            f"{counted(facts['rows'], 'row')} ({counted(facts['unique'], 'different text')}): {splits}; "
            f"{facts['task']}, {facts['outputs']} outputs; {facts['model']}; head {facts['head']}; {facts['device']}, "
            f"{facts['threads']} threads; seeds {', '.join(map(str, facts['seeds']))}.",
            f"Extraction of all rows took {seconds_text(self.extraction['seconds'])}; a row of the table is charged "
            "for its training and validation texts. Loading the model and judging the test rows are charged to nobody.",
            f"An epoch includes its validation pass. Each measurement ran in a process of its own; peak memory is "
            f"{what}.",
            f"The best epoch is the one of the best validation {facts['metric']}; its weights are judged on test. "
            "Intervals are 95 % bootstrap intervals over the test rows, paired for differences.",
        ]
        head = self._head_memory()
        if head is not None:
            said.append(f"The cached way's peak is that of its extraction; a head on the cache takes {_mib(head)}.")
        if facts["adjusted"]:
            said.append("The extraction was interrupted and gone on with: its time is that of the rest, in proportion.")
        return said

    def _head_memory(self) -> int | None:
        found = [each["head_memory"] for each in self.rows if each["approach"] == "cached"]
        return max(found) if found else None

    def to_text(self, table: Callable[[list[list[str]], list[str]], str]) -> str:
        """Lay it out for a terminal, by a function (rows, header) -> text."""
        said = [*self.sentences(), "", *self.notes]
        return "\n".join([table(self.cells(), self.header()), "", *map(shown, said)])

    def to_markdown(self) -> str:
        """Lay it out as Markdown, with the recipes."""
        header = self.header()
        lines = ["# Cached features against training with the backbone in the loop", ""]
        lines += ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
        lines += ["| " + " | ".join(cells) + " |" for cells in self.cells()]
        lines += ["", *(f"- {each}." for each in self.sentences()), "", *(f"{each}\n" for each in self.notes)]
        lines += ["## Recipes", ""]
        used = [name for name in APPROACHES if any(each["approach"] == name for each in self.rows)]
        lines += [f"- **{APPROACHES[name].title}.** {APPROACHES[name].recipe}" for name in used]
        return "\n".join(lines) + "\n"

    def plot(self, file: Path | str) -> None:
        """Draw time and test metric into an SVG or PNG file. Raises ``MissingExtraError`` without matplotlib."""
        try:
            from embedcache.compare.plot import draw
        except ImportError:
            raise MissingExtraError("the plot", "matplotlib", "report") from None
        draw(self, Path(file))


def assemble(
    facts: Mapping[str, Any],
    extraction: Mapping[str, Any],
    runs: Mapping[tuple[float, str, int], Mapping[str, Any]],
    outputs: Mapping[tuple[float, str, int], Array],
    y: Array,
    folder: Path | None,
) -> Comparison:
    """Put measurements together.

    ``runs`` and ``outputs`` are by fraction, approach and seed; ``y`` are the targets of the test rows. The bootstrap
    draws the same rows for every run, so differences are paired; over several seeds it is of the mean.
    """
    task, metric = facts["task"], facts["metric"]
    per_text = float(extraction["seconds"]) / max(int(extraction["extracted"]), 1)
    whole = {name: value for name, value in extraction.items() if name not in ("key", "approach")}
    whole |= {"seconds": per_text * int(extraction["unique"])}
    scored = {key: (score(metric, task, y, each), _draws(task, y, each, metric)) for key, each in outputs.items()}
    rows: list[Row] = []
    for fraction in facts["fractions"]:
        for name in facts["approaches"]:
            keys = [(fraction, name, seed) for seed in facts["seeds"]]
            mine = [runs[key] for key in keys]
            row = _row(name, fraction, mine, per_text, int(extraction["parameters"]), whole)
            row["test"], drawn = _mean(keys, scored)
            row["test_interval"] = _interval(drawn)
            base = [(fraction, "cached", seed) for seed in facts["seeds"]]
            row["difference"], row["difference_interval"] = None, None
            if name != "cached" and base[0] in scored:
                cached, drawn_cached = _mean(base, scored)
                row["difference"] = row["test"] - cached
                row["difference_interval"] = _interval(drawn - drawn_cached)
            rows.append(row)
    return Comparison(facts, whole, rows, _break_evens(rows), folder)


def _row(
    name: str, fraction: float, runs: Sequence[Mapping[str, Any]], per_text: float, backbone: int, whole: Row
) -> Row:
    def mean(field: str) -> float:
        return statistics.fmean(float(each[field] or 0.0) for each in runs)

    uses_cache = name in ("cached", "lp-ft")
    extraction = per_text * mean("charged") if uses_cache else None
    held = [max(each["memory"]["peak"] - each["memory"]["baseline"], 0) for each in runs]
    extracting = max(whole["memory"]["peak"] - whole["memory"]["baseline"], 0)
    devices = [each["memory"]["device"] for each in runs] + ([whole["memory"]["device"]] if uses_cache else [])
    trainable = int(runs[0]["trainable"])
    return {
        "approach": name,
        "title": APPROACHES[name].title,
        "fraction": fraction,
        "train_rows": round(mean("train_rows")),
        "seeds": len(runs),
        "extraction_seconds": extraction,
        "probe_seconds": mean("probe_seconds") if name == "lp-ft" else None,
        "training_seconds": mean("seconds"),
        "epoch_seconds": mean("epoch_seconds"),
        "total_seconds": (extraction or 0.0) + mean("probe_seconds") + mean("seconds"),
        "memory": {
            "resident": max([*held, extracting] if uses_cache else held),
            "device": max((each for each in devices if each is not None), default=None),
        },
        "head_memory": max(held) if name == "cached" else None,
        "trainable": trainable,
        "parameters": backbone + trainable if name == "cached" else int(runs[0]["total"]),
        "best_epoch": mean("best_epoch"),
        "validation": mean("validation"),
        "validation_rows": int(runs[0]["validation_rows"]),
        "test_rows": int(runs[0]["test_rows"]),
    }


def _break_evens(rows: Sequence[Row]) -> list[Row]:
    found = []
    for cached in (each for each in rows if each["approach"] == "cached"):
        for other in rows:
            if other["fraction"] != cached["fraction"] or other["approach"] not in ("frozen", "full"):
                continue
            extraction, head = cached["extraction_seconds"], cached["training_seconds"]
            theirs = other["training_seconds"]
            found.append(
                {
                    "fraction": cached["fraction"],
                    "train_rows": cached["train_rows"],
                    "against": other["approach"],
                    "extraction_seconds": extraction,
                    "head_seconds": head,
                    "other_seconds": theirs,
                    "heads": break_even(extraction, head, theirs),
                    "first": theirs / (extraction + head),
                    "further": theirs / head,
                }
            )
    return found


def _draws(task: TaskName, y: Array, outputs: Array, metric: str) -> npt.NDArray[np.float64]:
    return resampled_scores(task, y, outputs, metric)


def _mean(keys: Sequence[Any], scored: Mapping[Any, tuple[float, Any]]) -> tuple[float, Any]:
    return statistics.fmean(scored[key][0] for key in keys), np.mean([scored[key][1] for key in keys], axis=0)


def _interval(drawn: npt.NDArray[np.float64]) -> list[float] | None:
    drawn = drawn[np.isfinite(drawn)]
    return [float(each) for each in np.quantile(drawn, [0.025, 0.975])] if len(drawn) else None


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


def _mib(value: int | None) -> str:
    return "-" if value is None else f"{value / MIB:,.0f} MiB"


def _memory(row: Row) -> str:
    memory = row["memory"]
    return _mib(memory["device"] if memory["device"] is not None else memory["resident"])


def _with_interval(value: float | None, interval: Sequence[float] | None, sign: str = "") -> str:
    if value is None:
        return "-"
    within = "" if interval is None else f" [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"
    return f"{value:{sign}.3f}{within}"
