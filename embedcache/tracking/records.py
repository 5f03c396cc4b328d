"""What a tracker is told: a folder of a run or a sweep as settings, curves, metrics and a page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from embedcache.errors import BundleError, MissingExtraError, SweepError
from embedcache.fingerprint import read_json, strict_json
from embedcache.heads import TrainedHead
from embedcache.heads.bundle import METRICS
from embedcache.heads.folder import CARD, HISTORY
from embedcache.report import report
from embedcache.sweep.summary import SUMMARY, LeaderboardRow, Summary, read_summary

Setting = str | int | float | bool
Values = Mapping[str, float]

MOST_PARTS = 100
"""Candidates of a sweep that are sent one by one, the best first; the page has all."""
_LONGEST = 250
"""Characters of a setting: the least that a tracker takes."""


@dataclass(frozen=True)
class Record:
    """One head: its ``settings``, ``curves`` as (step, values), final ``metrics`` by ``SPLIT/METRIC``."""

    name: str
    settings: Mapping[str, Setting]
    curves: tuple[tuple[int, Values], ...]
    metrics: Values


@dataclass(frozen=True)
class Experiment:
    """A folder: the ``whole``, of a sweep the ``parts`` too, and a ``page`` to read, with its text as ``markdown``."""

    folder: Path
    whole: Record
    parts: tuple[Record, ...]
    page: Path
    markdown: str

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.resolve().name


def experiment_in(folder: Path) -> Experiment:
    """Read a run or a sweep; the page of a sweep is written beside its results.

    Raises ``BundleError`` or ``SweepError`` for a folder that is neither, or damaged.
    """
    return _sweep(folder) if (folder / SUMMARY).is_file() else _run(folder)


def _run(folder: Path) -> Experiment:
    head = TrainedHead.from_pretrained(folder)
    try:
        history = [strict_json(line) for line in (folder / HISTORY).read_bytes().splitlines()]
        measured = read_json(folder / METRICS)
        card = (folder / CARD).read_text("utf-8")
    except (ValueError, OSError) as error:
        raise BundleError(f"{folder} is not a whole run ({error}): train it again") from None
    settings = {
        "head": head.spec.kind, "engine": head.spec.engine, **head.spec.options, "feature": head.feature.name,
        "task": head.task, "outputs": len(head.class_names), "model": head.model, "parameters": head.parameters,
        **head.training,
    }  # fmt: skip
    epochs = [epoch for epoch in history if isinstance(epoch, dict)]
    splits = measured.items() if isinstance(measured, dict) else ()
    metrics = {
        f"{split}/{name}": value
        for split, values in splits
        if isinstance(values, dict)
        for name, value in numbers(values.items()).items()
    }
    whole = Record(folder.resolve().name, _settings(settings), _curves(epochs), metrics)
    return Experiment(folder, whole, (), folder / CARD, re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL))


def _curves(epochs: Iterable[Mapping[str, object]]) -> tuple[tuple[int, Values], ...]:
    curves = []
    for place, epoch in enumerate(epochs, 1):
        step = epoch.get("epoch", place)
        values = numbers((name, value) for name, value in epoch.items() if name != "epoch")
        curves.append((step if isinstance(step, int) else place, values))
    return tuple(curves)


def _sweep(folder: Path) -> Experiment:
    summary, _ = read_summary(folder)
    markdown, page = report(folder, form="markdown"), folder / "report.html"
    try:
        report(folder, page)
    except MissingExtraError:  # jinja2, which only the page needs
        page = folder / "report.md"
        report(folder, page, "markdown")
    best = next((row for row in summary.leaderboard if summary.chosen and row.id == summary.chosen.id), None)
    if best is None:
        raise SweepError(f"{folder} has no chosen head yet: run the same sweep command again to go on")
    metrics = _metrics(summary, best)
    if summary.test is not None:
        metrics = {**metrics, f"{summary.test.split}/{summary.metric.name}": summary.test.score}
    protocol = summary.protocol
    settings = {
        "data": summary.data.name, "model": summary.data.model, "task": summary.task, "metric": summary.metric.name,
        "protocol": protocol.text, "seed": protocol.seed, "heads": len(summary.leaderboard), "chosen": best.label,
    }  # fmt: skip
    whole = Record(folder.resolve().name, _settings(settings), (), metrics)
    parts = tuple(_part(summary, row) for row in summary.leaderboard[:MOST_PARTS])
    return Experiment(folder, whole, parts, page, markdown)


def _part(summary: Summary, row: LeaderboardRow) -> Record:
    settings = {
        "head": row.head.kind, "engine": row.head.engine, "feature": row.feature, **row.head.options, **row.train,
    }  # fmt: skip
    curves = tuple((fold, {f"fold/{summary.metric.name}": score}) for fold, score in enumerate(row.fold_scores))
    finite = tuple((fold, values) for fold, values in curves if all(map(math.isfinite, values.values())))
    return Record(f"{row.rank:03d} {row.label}", _settings(settings), finite, _metrics(summary, row))


def _metrics(summary: Summary, row: LeaderboardRow) -> Values:
    values = {f"validation/{summary.metric.name}": row.score, "parameters": row.parameters, "seconds": row.seconds}
    if row.test is not None:
        values["test/" + summary.metric.name] = row.test.score
    return numbers(values.items())


def numbers(values: Iterable[tuple[str, object]]) -> dict[str, float]:
    """Return those values that are numbers: a metric may not exist."""
    return {
        name: value
        for name, value in values
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def _settings(values: Mapping[str, object]) -> dict[str, Setting]:
    """Return settings as every tracker takes them; one that was not given is left out."""
    return {name: _setting(value) for name, value in values.items() if value is not None}


def _setting(value: object) -> Setting:
    if isinstance(value, (bool, int, float)):
        return value
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
