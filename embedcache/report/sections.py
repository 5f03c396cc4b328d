"""The values that the page shows, made from a summary: formatted numbers, and charts as finished markup."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

from embedcache.report import charts
from embedcache.report.charts import Point
from embedcache.sweep.result import published_lines
from embedcache.sweep.summary import (
    Confusion,
    FewShot,
    LeaderboardRow,
    LearningCurve,
    Mistake,
    Mistakes,
    Summary,
    TestResult,
    defined,
)
from embedcache.task import REGRESSION
from embedcache.wording import counted

MOST_COLUMNS = 12
"""More words than this do not fit side by side."""
MOST_CLASSES = 80
"""A confusion matrix of more classes is no picture any more; its most frequent confusions are listed instead."""
_PICTURE = re.compile(r"data:image/(?:png|jpeg);base64,[A-Za-z0-9+/]+={0,2}")


def page_values(summary: Summary) -> dict[str, object]:
    """Return everything that the template needs."""
    rows, metric = summary.leaderboard, summary.metric.name
    chosen = summary.chosen.id if summary.chosen else None
    return {
        "summary": summary,
        "regression": summary.task == REGRESSION.name,
        "metric": metric,
        "alpha": summary.protocol.alpha,
        "percent": f"{100 * (1 - summary.protocol.alpha):g} %",
        "rows": leaderboard(rows, chosen),
        "group": len(summary.group),
        "domain": domain_of(rows),
        "settings": setting_charts(rows, metric, chosen),
        "cost": cost_chart(rows, metric, chosen),
        "layers": layer_chart(rows, metric, summary.metric.greater_is_better),
        "curves": curve_chart(summary.learning_curve, metric),
        "curve_names": [curve.label for curve in summary.learning_curve if len(_series(curve)) > 1],
        "few_shot": summary.few_shot,
        "few_shot_svg": few_shot_chart(summary.few_shot, metric),
        "test": summary.test,
        "pictures": None if summary.test is None else pictures_of(summary.test),
        "mistakes": mistakes_with_safe_pictures(summary.mistakes),
        "published": published_lines(summary),
        "facts": facts(summary),
        "number": show,
    }


def show(value: object, digits: int = 4) -> str:
    """Write a value for people."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(show(item, digits) for item in value)
    return str(value)


def p_value(value: float | None) -> str:
    """Write a p value."""
    return "-" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def style_of(row: LeaderboardRow, chosen: str | None) -> str:
    """Return how a head is drawn: chosen, in the winner's group, or other."""
    return "chosen" if row.id == chosen else "other" if row.distinguishable else "group"


def domain_of(rows: Sequence[LeaderboardRow]) -> charts.Pair:
    """Return the range that the leaderboard's bars share, without letting one hopeless head squeeze the rest."""
    scores = [row.score for row in defined(rows)]
    if not scores:
        return 0.0, 1.0
    ends = [end for row in defined(rows) for end in (row.interval or ())]
    return charts.padded(charts.without_outliers(scores, ends or scores), 0.02)


@dataclass(frozen=True)
class TableRow:
    """A row of the leaderboard's table: a head, how it is drawn, the bar of its interval, its score where it exists."""

    head: LeaderboardRow
    style: str
    bar: str
    score: float | None
    p: str


def leaderboard(rows: Sequence[LeaderboardRow], chosen: str | None) -> list[TableRow]:
    """Return the table's rows."""
    domain, scored = domain_of(rows), {row.id for row in defined(rows)}
    table = []
    for row in rows:
        style = style_of(row, chosen)
        bar = charts.interval_bar(row.score, row.interval, domain, style) if row.id in scored else ""
        table.append(TableRow(row, style, bar, row.score if row.id in scored else None, p_value(row.p_adjusted)))
    return table


def _point(row: LeaderboardRow, x: float, chosen: str | None) -> Point:
    return Point(x, row.score, row.interval, f"{row.label}: {row.score:.4f}", style_of(row, chosen))


@dataclass(frozen=True)
class NamedChart:
    """A chart of one setting or target."""

    name: str
    svg: str


def setting_charts(rows: Sequence[LeaderboardRow], metric: str, chosen: str | None) -> list[NamedChart]:
    """Return a chart of the score against each setting that varied; numbers on an axis, words side by side."""
    drawn: list[NamedChart] = []
    rows = defined(rows)
    kinds = sorted({row.head.kind for row in rows})
    if 1 < len(kinds) <= MOST_COLUMNS:
        points = [_point(row, float(kinds.index(row.head.kind)), chosen) for row in rows]
        drawn.append(NamedChart("head", charts.scatter(points, "head", metric, f"{metric} by head", names=kinds)))
    for name in sorted({name for row in rows for name in row.varied}):
        varied = [(row, row.varied[name]) for row in rows if name in row.varied]
        values = [value for _, value in varied]
        if len({json.dumps(value) for value in values}) < 2:
            continue
        title = f"{metric} against {name}"
        numbers = [float(value) for value in values if _is_number(value)]
        if len(numbers) == len(values):
            log = min(numbers) > 0 and max(numbers) / min(numbers) >= 20
            points = [_point(row, number, chosen) for (row, _), number in zip(varied, numbers, strict=True)]
            drawn.append(NamedChart(name, charts.scatter(points, name, metric, title, log=log)))
            continue
        words = list(dict.fromkeys(_word(value) for value in sorted(values, key=_word_order)))
        if len(words) <= MOST_COLUMNS:
            points = [_point(row, float(words.index(_word(value))), chosen) for row, value in varied]
            drawn.append(NamedChart(name, charts.scatter(points, name, metric, title, names=words)))
    return drawn


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _word(value: object) -> str:
    if isinstance(value, list) and value:
        return "-".join(map(_word, value))
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value, ensure_ascii=False)


def _word_order(value: object) -> tuple[int, float, str]:
    if _is_number(value):
        return 1, float(value), _word(value)
    return 0 if value is None else 2, 0.0, _word(value)


def cost_chart(rows: Sequence[LeaderboardRow], metric: str, chosen: str | None) -> str | None:
    """Return the score against the seconds of training, on a logarithmic axis."""
    timed = [row for row in defined(rows) if row.seconds > 0]
    if len(timed) < 2:
        return None
    points = [_point(row, row.seconds, chosen) for row in timed]
    return charts.scatter(points, "seconds of training", metric, f"{metric} against training time", log=True)


def layer_chart(rows: Sequence[LeaderboardRow], metric: str, greater_is_better: bool) -> str | None:
    """Return the best score of each pooling at each layer, where more than one feature set was tried."""
    best: dict[tuple[str, str], float] = {}
    for row in defined(rows):
        key = f"l2:{row.pooling}" if row.normalize else row.pooling, str(row.layers)
        if key not in best or (row.score > best[key]) == greater_is_better:
            best[key] = row.score
    poolings, layers = sorted({key[0] for key in best}), sorted({key[1] for key in best}, key=_layer_order)
    if len(best) < 2:
        return None
    worst, most = min(best.values()), max(best.values())
    if not greater_is_better:
        worst, most = most, worst
    values = [[best.get((pooling, layer)) for layer in layers] for pooling in poolings]
    shares = [[None if value is None else (value - worst) / ((most - worst) or 1.0) for value in line]
              for line in values]  # fmt: skip
    words = {"-1": "last layer", "all": "all layers"}
    across = [words.get(layer, f"layer {layer}") for layer in layers]
    return charts.grid(values, poolings, across, f"best {metric} by pooling and layer", shares=shares)


def _layer_order(layer: str) -> tuple[int, float, str]:
    """Order layers from the input to the output: numbers from the front, then numbers from the end, then words."""
    try:
        parts = [int(part) for part in layer.split("+")]
    except ValueError:
        return 2, 0.0, layer
    return int(parts[0] < 0), sum(parts) / len(parts), layer


def _series(curve: LearningCurve) -> list[Point]:
    return [
        Point(
            float(point.rows), point.score, point.interval,
            f"{curve.label}, {counted(point.rows, 'row')}: {point.score:.4f}",
        )
        for point in curve.points if math.isfinite(point.score)
    ]  # fmt: skip


def curve_chart(curves: Sequence[LearningCurve], metric: str) -> str | None:
    """Return the score against the number of training rows."""
    lines = [(curve.label, series) for curve in curves if len(series := _series(curve)) > 1]
    if not lines:
        return None
    return charts.scatter([], "training rows", metric, f"{metric} against training rows", log=True, lines=lines)


def few_shot_chart(few: FewShot | None, metric: str) -> str | None:
    """Return the score of each few-shot draw."""
    if few is None:
        return None
    points = [
        Point(float(draw), score, None, f"draw {draw}: {score:.4f}", "group")
        for draw, score in enumerate(few.scores, 1) if math.isfinite(score)
    ]  # fmt: skip
    title = f"{metric} of each draw of {few.shots} rows a class"
    return charts.scatter(points, "draw", metric, title) if len(points) > 1 else None


@dataclass(frozen=True)
class TestPictures:
    """What is shown of the chosen head on the test split besides its table by class."""

    __test__ = False  # not a test of pytest's

    confusion: str | None
    confused: list[ConfusedPair]
    calibration: str | None
    targets: list[NamedChart]
    scalars: Mapping[str, float]


@dataclass(frozen=True)
class ConfusedPair:
    """A class that is predicted for another: in how many rows, and in what share of the true class."""

    true: str
    predicted: str
    rows: int
    share: float


def pictures_of(test: TestResult) -> TestPictures:
    """Return the pictures of the chosen head on the test split."""
    confusion, calibration = None, None
    if test.confusion is not None and len(test.confusion.labels) <= MOST_CLASSES:
        names = test.confusion.labels
        confusion = charts.grid(
            test.confusion.matrix, names, names, "confusion matrix: truth down, prediction across",
            shares=test.confusion.normalized, digits=0,
        )  # fmt: skip
    if test.calibration is not None:
        title = "calibration: how often the head is right against how sure it is"
        calibration = charts.reliability(test.calibration.bins, title)
    targets = [
        NamedChart(
            name,
            charts.scatter(
                [Point(true, predicted) for true, predicted in pairs], f"true {name}", f"predicted {name}",
                f"{name}: predicted against true", even=True,
            ),
        )
        for name, pairs in (test.points or {}).items() if pairs
    ]  # fmt: skip
    scalars = {name: value for name, value in test.metrics.items() if isinstance(value, float)}
    return TestPictures(confusion, most_confused(test.confusion), calibration, targets, scalars)


def most_confused(confusion: Confusion | None, most: int = 12) -> list[ConfusedPair]:
    """Return the most frequent confusions, where there are too many classes for a matrix."""
    if confusion is None or len(confusion.labels) <= 12:
        return []
    wrong = [
        (-count, row, column)
        for row, line in enumerate(confusion.matrix) for column, count in enumerate(line) if count and row != column
    ]  # fmt: skip
    return [
        ConfusedPair(confusion.labels[row], confusion.labels[column], -count, confusion.normalized[row][column])
        for count, row, column in sorted(wrong)[:most]
    ]


def mistakes_with_safe_pictures(mistakes: Mistakes | None) -> Mistakes | None:
    """Return the mistakes, ready to show. Pictures are only ever data: URIs of PNG or JPEG."""

    def safe(mistake: Mistake) -> Mistake:
        return replace(mistake, image=safe_picture(mistake.image))

    return replace(mistakes, shown=tuple(map(safe, mistakes.shown))) if mistakes and mistakes.shown else None


def safe_picture(image: str | None) -> str | None:
    """Return a data: URI of a PNG or JPEG as it is, and None for anything else."""
    return image if image and _PICTURE.fullmatch(image) else None


def facts(summary: Summary) -> list[tuple[str, str]]:
    """Return what was run on what, line by line."""
    data, ran, protocol = summary.data, summary.ran, summary.protocol
    sets = ", ".join(f"{feature.name} ({feature.kind}, {feature.dim} wide)" for feature in data.feature_sets)
    lines = [
        ("data", f"{data.name}: " + ", ".join(f"{split} {rows:,}" for split, rows in data.rows.items())),
        ("backbone", show(data.model)),
        ("feature sets", sets),
        ("protocol", protocol.text),
        ("seed", show(protocol.seed)),
        ("configurations", f"{show(ran.configurations)}, {show(ran.fits)} fits in {ran.seconds:.1f} s"),
        ("started, finished", f"{ran.started}, {ran.finished}"),
        ("machine", ", ".join(f"{name} {value}" for name, value in ran.machine.items())),
        ("versions", ", ".join(f"{name} {version}" for name, version in ran.versions.items())),
        ("cache's spec", ran.cache_spec),
        ("dataset", ran.dataset),
        ("sweep", ran.sweep),
    ]
    return [("command", ran.command), *lines] if ran.command else lines
