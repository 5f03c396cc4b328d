"""The picture of a comparison: what each approach costs, and how well it does with how many rows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure

from embedcache.compare.approaches import APPROACHES
from embedcache.compare.result import seconds_text
from embedcache.errors import InputError
from embedcache.journal import commit

if TYPE_CHECKING:
    from embedcache.compare.result import Comparison

COLOURS = dict(zip(APPROACHES, ("#0072B2", "#56B4E9", "#D55E00", "#CC79A7"), strict=True))
"""Told apart by people who see fewer colours, too (Okabe & Ito 2008)."""


def draw(comparison: Comparison, file: Path) -> None:
    """Draw into an SVG or PNG file, by its ending; equal comparisons make equal SVGs."""
    with matplotlib.rc_context({"svg.hashsalt": "embedcache", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        times, metrics = figure.subplots(1, 2)
        _times(times, comparison)
        _metrics(metrics, comparison)
        metadata = {"Date": None} if file.suffix == ".svg" else None
        picture = io.BytesIO()
        figure.savefig(picture, metadata=metadata, dpi=150, format=file.suffix[1:] or None)
        commit(file, picture.getvalue(), InputError)


def _times(axes: Any, comparison: Comparison) -> None:
    largest = max(comparison.facts["fractions"])
    rows = [each for each in comparison.rows if each["fraction"] == largest][::-1]
    labelled = True
    for place, row in enumerate(rows):
        extraction = row["extraction_seconds"] or 0.0
        axes.barh(place, row["total_seconds"], color=COLOURS[row["approach"]])
        if extraction:
            axes.barh(place, extraction, color="#999999", label="extraction" if labelled else None)
            labelled = False
        axes.annotate(
            f" {seconds_text(row['total_seconds'])}", (row["total_seconds"], place), va="center", annotation_clip=False
        )
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes.margins(x=0.15)
    axes.set_xlabel(f"seconds for {comparison.facts['epochs']} epochs of {rows[0]['train_rows']:,} rows")
    if not labelled:
        axes.legend(loc="upper right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _metrics(axes: Any, comparison: Comparison) -> None:
    fractions, names = comparison.facts["fractions"], comparison.facts["approaches"]
    curve = len(fractions) > 1
    for number, name in enumerate(names):
        rows = [each for each in comparison.rows if each["approach"] == name]
        # Beside one another: frozen and cached say the same, and one would hide the other.
        beside = 1.04 ** (number - (len(names) - 1) / 2)
        x = [each["train_rows"] * beside for each in rows] if curve else [number]
        y = [each["test"] for each in rows]
        bounds = [each["test_interval"] or [each["test"]] * 2 for each in rows]
        below = [max(value - low, 0.0) for value, (low, _) in zip(y, bounds, strict=True)]
        above = [max(high - value, 0.0) for value, (_, high) in zip(y, bounds, strict=True)]
        axes.errorbar(
            x, y, yerr=[below, above], color=COLOURS[name], marker="o", capsize=3, label=APPROACHES[name].title
        )
    if curve:
        counts = sorted({each["train_rows"] for each in comparison.rows})
        axes.set_xscale("log")
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("training rows")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=2, frameon=False)
    else:
        axes.set_xticks(range(len(names)), [APPROACHES[name].title.replace(" + ", "\n+ ") for name in names])
        axes.tick_params(axis="x", rotation=20)
        axes.margins(x=0.2)
    axes.set_ylabel(f"test {comparison.facts['metric']}, 95 % interval")
    axes.spines[["top", "right"]].set_visible(False)
