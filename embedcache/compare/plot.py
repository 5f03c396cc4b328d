"""The picture of a comparison: what each approach costs, and how well it does with how many rows."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from embedcache.compare.figures import APPROACHES, Facts, Row, seconds_text
from embedcache.errors import InputError
from embedcache.journal import commit

_GREENS = ("#8FD4B4", "#009E73", "#00583F")
COLOURS = dict(zip(APPROACHES, ("#0072B2", "#56B4E9", *_GREENS, "#D55E00", "#CC79A7"), strict=True))
"""Told apart by people who see fewer colours, too (Okabe & Ito 2008)."""


def draw(facts: Facts, rows: Sequence[Row], file: Path) -> None:
    """Draw into an SVG or PNG file, by its ending; equal comparisons make equal SVGs."""
    with matplotlib.rc_context({"svg.hashsalt": "embedcache", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9, 3.4 + 0.2 * max(0, len(facts.approaches) - 4)), layout="constrained")
        times, metrics = figure.subplots(1, 2)
        _times(times, facts, rows)
        _metrics(metrics, facts, rows)
        metadata = {"Date": None} if file.suffix == ".svg" else None
        picture = io.BytesIO()
        figure.savefig(picture, metadata=metadata, dpi=150, format=file.suffix[1:] or None)
        commit(file, picture.getvalue(), InputError)


def _times(axes: Axes, facts: Facts, rows: Sequence[Row]) -> None:
    largest = max(facts.fractions)
    rows = [row for row in rows if row.fraction == largest][::-1]
    labelled = True
    for place, row in enumerate(rows):
        axes.barh(place, row.total_seconds, color=COLOURS[row.approach])
        if row.extraction_seconds:
            axes.barh(place, row.extraction_seconds, color="#999999", label="extraction" if labelled else None)
            labelled = False
        axes.annotate(
            f" {seconds_text(row.total_seconds)}", (row.total_seconds, place), va="center", annotation_clip=False
        )
    axes.set_yticks(range(len(rows)), [row.title for row in rows])
    axes.margins(x=0.15)
    axes.set_xlabel(f"seconds for {facts.epochs} epochs of {rows[0].train_rows:,} rows")
    if not labelled:
        axes.legend(loc="upper right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _metrics(axes: Axes, facts: Facts, rows: Sequence[Row]) -> None:
    names = facts.approaches
    curve = len(facts.fractions) > 1
    for number, name in enumerate(names):
        own = [row for row in rows if row.approach == name]
        # Beside one another: frozen and cached say the same, and one would hide the other.
        beside = 1.04 ** (number - (len(names) - 1) / 2)
        x = [row.train_rows * beside for row in own] if curve else [number]
        bounds = [row.test_interval or (row.test, row.test) for row in own]
        below = [max(row.test - low, 0.0) for row, (low, _) in zip(own, bounds, strict=True)]
        above = [max(high - row.test, 0.0) for row, (_, high) in zip(own, bounds, strict=True)]
        axes.errorbar(
            x, [row.test for row in own], yerr=[below, above], color=COLOURS[name], marker="o", capsize=3,
            label=APPROACHES[name].title,
        )  # fmt: skip
    if curve:
        counts = sorted({row.train_rows for row in rows})
        axes.set_xscale("log")
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("training rows")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=2, frameon=False)
    else:
        titles = [APPROACHES[name].title.replace(" + ", "\n+ ").replace(", ", ",\n") for name in names]
        axes.set_xticks(range(len(names)), titles)
        axes.tick_params(axis="x", rotation=40 if len(names) > 4 else 20)
        axes.margins(x=0.2)
    axes.set_ylabel(f"test {facts.metric}, 95 % interval")
    axes.spines[["top", "right"]].set_visible(False)
