"""A summary -> what the page shows: numbers written out, and charts as finished markup."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from embedcache.report import charts
from embedcache.report.charts import Point
from embedcache.wording import counted

Row = Mapping[str, Any]
MOST_CLASSES = 80
"""A confusion matrix of more classes is no picture any more; its most frequent confusions are listed instead."""
_PICTURE = re.compile(r"data:image/(?:png|jpeg);base64,[A-Za-z0-9+/]+={0,2}")


def page_values(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that the template needs."""
    rows: Sequence[Row] = summary["leaderboard"]
    chosen = summary.get("chosen") or {}
    metric, better = summary["metric"]["name"], summary["metric"]["greater_is_better"]
    return {
        "summary": summary,
        "metric": metric,
        "alpha": summary["protocol"]["alpha"],
        "percent": f"{100 * (1 - summary['protocol']['alpha']):g} %",
        "rows": leaderboard(rows, chosen.get("id")),
        "group": sum(not row["distinguishable"] for row in rows),
        "domain": domain_of(rows),
        "settings": setting_charts(rows, metric, chosen.get("id")),
        "cost": cost_chart(rows, metric, chosen.get("id")),
        "layers": layer_chart(rows, metric, better),
        "curves": curve_chart(summary.get("learning_curve") or [], metric),
        "test": test_values(summary),
        "curve_names": [curve["label"] for curve in summary.get("learning_curve") or [] if len(_series(curve)) > 1],
        "few_shot": few_shot_values(summary.get("few_shot"), metric),
        "mistakes": mistake_values(summary),
        "facts": facts(summary),
        "number": show,
    }


def show(value: Any, digits: int = 4) -> str:
    """Write a value for people."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(show(each, digits) for each in value)
    return str(value)


def p_value(value: float | None) -> str:
    """Write a p value."""
    return "-" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def style_of(row: Row, chosen: str | None) -> str:
    """Return how a head is drawn: chosen, in the winner's group, or other."""
    return "chosen" if row["id"] == chosen else "other" if row["distinguishable"] else "group"


def scored(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that have a score; a metric that does not exist on some fold leaves null."""
    return [row for row in rows if row["score"] is not None]


def domain_of(rows: Sequence[Row]) -> charts.Pair:
    """Return the range that the leaderboard's bars share, without letting one hopeless head squeeze the rest."""
    scores = [row["score"] for row in scored(rows)]
    if not scores:
        return 0.0, 1.0
    ends = [end for row in scored(rows) for end in (row["interval"] or ())]
    return charts.padded(charts.without_outliers(scores, ends or scores), 0.02)


def leaderboard(rows: Sequence[Row], chosen: str | None) -> list[dict[str, Any]]:
    """Return the table's rows, each cell with what it shows and what it is sorted by."""
    domain = domain_of(rows)
    return [
        {
            "rank": row["rank"],
            "label": row["label"],
            "kind": f"{row['head']['engine']} {row['head']['kind']}",
            "style": style_of(row, chosen),
            "score": row["score"],
            "interval": row["interval"],
            "bar": ""
            if row["score"] is None
            else charts.interval_bar(row["score"], row["interval"], domain, style_of(row, chosen)),
            "difference": (row.get("difference") or {}).get("value"),
            "p": p_value(row["p_adjusted"]),
            "p_sort": 2.0 if row["p_adjusted"] is None else row["p_adjusted"],
            "same": not row["distinguishable"],
            "parameters": row["parameters"],
            "seconds": row["seconds"],
            "looked": row.get("looked_at_test", False),
            "test": row.get("test"),
        }
        for row in rows
    ]


def _point(row: Row, x: float, chosen: str | None) -> Point:
    interval = None if row["interval"] is None else (row["interval"][0], row["interval"][1])
    return Point(x, row["score"], interval, f"{row['label']}: {row['score']:.4f}", style_of(row, chosen))


def setting_charts(rows: Sequence[Row], metric: str, chosen: str | None) -> list[dict[str, str]]:
    """Return a chart of the score against each setting that varied; numbers on an axis, words side by side."""
    made: list[dict[str, str]] = []
    rows = scored(rows)
    for name in sorted({name for row in rows for name in row["varied"]}):
        mine = [row for row in rows if name in row["varied"]]
        values = [row["varied"][name] for row in mine]
        if len({json.dumps(value) for value in values}) < 2:
            continue
        title = f"{metric} against {name}"
        numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        if numeric:
            log = min(values) > 0 and max(values) / min(values) >= 20
            points = [_point(row, float(row["varied"][name]), chosen) for row in mine]
            made.append({"name": name, "svg": charts.scatter(points, name, metric, title, log=log)})
            continue
        names = [_word(value) for value in sorted(values, key=_word_order)]
        names = list(dict.fromkeys(names))
        if len(names) > 12:
            continue
        points = [_point(row, float(names.index(_word(row["varied"][name]))), chosen) for row in mine]
        made.append({"name": name, "svg": charts.scatter(points, name, metric, title, names=names)})
    kinds = sorted({f"{row['head']['kind']}" for row in rows})
    if 1 < len(kinds) <= 12:
        points = [_point(row, float(kinds.index(row["head"]["kind"])), chosen) for row in rows]
        made.insert(
            0, {"name": "head", "svg": charts.scatter(points, "head", metric, f"{metric} by head", names=kinds)}
        )
    return made


def _word(value: Any) -> str:
    if isinstance(value, list) and value:
        return "-".join(map(_word, value))
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value, ensure_ascii=False)


def _word_order(value: Any) -> tuple[int, float, str]:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (0 if value is None else 1 if number else 2), float(value) if number else 0.0, _word(value)


def cost_chart(rows: Sequence[Row], metric: str, chosen: str | None) -> str | None:
    """Return the score against the seconds of training, on a logarithmic axis."""
    mine = [row for row in scored(rows) if row["seconds"] and row["seconds"] > 0]
    if len(mine) < 2:
        return None
    points = [_point(row, row["seconds"], chosen) for row in mine]
    return charts.scatter(points, "seconds of training", metric, f"{metric} against training time", log=True)


def layer_chart(rows: Sequence[Row], metric: str, greater_is_better: bool) -> str | None:
    """Return the best score of each pooling at each layer, where more than one feature set was tried."""
    best: dict[tuple[str, str], float] = {}
    for row in scored(rows):
        if row.get("pooling") is None:
            continue
        key = (f"l2:{row['pooling']}" if row["normalize"] else row["pooling"], str(row["layers"]))
        if key not in best or (row["score"] > best[key]) == greater_is_better:
            best[key] = row["score"]
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
        parts = [int(each) for each in layer.split("+")]
    except ValueError:
        return 2, 0.0, layer
    return int(parts[0] < 0), sum(parts) / len(parts), layer


def _series(curve: Row) -> list[Point]:
    return [
        Point(
            float(point["rows"]), point["score"], tuple(point["interval"]) if point.get("interval") else None,
            f"{curve['label']}, {counted(point['rows'], 'row')}: {point['score']:.4f}",
        )
        for point in curve["points"] if point["score"] is not None
    ]  # fmt: skip


def curve_chart(curves: Sequence[Row], metric: str) -> str | None:
    """Return the score against the number of training rows."""
    lines = [(curve["label"], series) for curve in curves if len(series := _series(curve)) > 1]
    if not lines:
        return None
    return charts.scatter([], "training rows", metric, f"{metric} against training rows", log=True, lines=lines)


def few_shot_values(found: Row | None, metric: str) -> dict[str, Any] | None:
    """Return the few-shot draws, with a chart of them."""
    if not found:
        return None
    points = [
        Point(float(at + 1), score, None, f"draw {at + 1}: {score:.4f}", "group")
        for at, score in enumerate(found["scores"]) if score is not None
    ]  # fmt: skip
    title = f"{metric} of each draw of {found['shots']} rows a class"
    return {**found, "svg": charts.scatter(points, "draw", metric, title) if len(points) > 1 else None}


def test_values(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the chosen head did on the test split."""
    test = summary.get("test")
    if test is None:
        return None
    confusion = None
    found = test.get("confusion")
    if found and len(found["labels"]) <= MOST_CLASSES:
        confusion = charts.grid(
            found["matrix"], found["labels"], found["labels"], "confusion matrix: truth down, prediction across",
            shares=found["normalized"], digits=0,
        )  # fmt: skip
    calibration = None
    if test.get("calibration"):
        bins = [
            (each["low"], each["high"], each["confidence"], each["accuracy"], each["rows"])
            for each in test["calibration"]["bins"]
        ]
        calibration = charts.reliability(bins, "calibration: how often the head is right against how sure it is")
    scalars = {name: value for name, value in test["metrics"].items() if isinstance(value, float)}
    points = []
    for name, pairs in (test.get("points") or {}).items():
        dots = [Point(pair[0], pair[1]) for pair in pairs]
        if dots:
            title = f"{name}: predicted against true"
            svg = charts.scatter(dots, f"true {name}", f"predicted {name}", title, even=True)
            points.append({"name": name, "svg": svg})
    return {
        **test,
        "confusion_svg": confusion,
        "calibration_svg": calibration,
        "points_svg": points,
        "scalars": scalars,
        "columns": list(test["per_class"][0]) if test.get("per_class") else [],
        "confused": most_confused(found) if found else [],
    }


def most_confused(found: Row, most: int = 12) -> list[dict[str, Any]]:
    """Return the pairs of classes that are taken for one another most often, where there are many classes."""
    labels = found["labels"]
    if len(labels) <= 12:
        return []
    wrong = [
        (count, -row, -column)
        for row, line in enumerate(found["matrix"]) for column, count in enumerate(line) if count and row != column
    ]  # fmt: skip
    return [
        {"true": labels[-row], "predicted": labels[-column], "rows": count, "share": found["normalized"][-row][-column]}
        for count, row, column in sorted(wrong, reverse=True)[:most]
    ]


def mistake_values(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the most confident mistakes, ready to show. Pictures are only ever data: URIs of PNG or JPEG."""
    found = summary.get("mistakes")
    if not found or not found.get("shown"):
        return None
    shown = []
    for each in found["shown"]:
        image = each.get("image")
        safe = isinstance(image, str) and _PICTURE.fullmatch(image)
        shown.append({**each, "image": image if safe else None})
    return {**found, "shown": shown}


def facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what was run on what, line by line."""
    data, ran, protocol = summary["data"], summary["ran"], summary["protocol"]
    lines = [
        ("data", f"{data['name']}: " + ", ".join(f"{split} {rows:,}" for split, rows in data["rows"].items())),
        ("backbone", show(data.get("model"))),
        (
            "feature sets",
            ", ".join(f"{each['name']} ({each['kind']}, {each['dim']} wide)" for each in data["feature_sets"]),
        ),
        ("protocol", protocol["text"]),
        ("seed", show(protocol.get("seed"))),
        (
            "configurations",
            f"{show(ran.get('configurations'))}, {show(ran.get('fits'))} fits in {ran.get('seconds') or 0:.1f} s",
        ),
        ("started, finished", f"{show(ran.get('started'))}, {show(ran.get('finished'))}"),
        ("machine", show([f"{key} {value}" for key, value in (ran.get("machine") or {}).items()])),
        ("versions", show([f"{key} {value}" for key, value in (ran.get("versions") or {}).items()])),
        ("cache's spec", show(ran.get("cache_spec"))),
        ("dataset", show(ran.get("dataset"))),
        ("sweep", show(ran.get("sweep"))),
    ]
    if ran.get("command"):
        lines.insert(0, ("command", ran["command"]))
    return lines
