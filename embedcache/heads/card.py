"""The model card of a head bundle."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from embedcache.heads.record import HeadRecord
from embedcache.version import __version__

_MOST = 20
"""Classes that are listed; nobody reads a hundred rows of a card."""


def model_card(head: HeadRecord, metrics: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Return the card as Markdown: what it is, what it was trained on, how good it is, how to use it.

    Whatever comes from data, class names above all, is escaped: it can neither break a table nor become a link.
    """
    spec = head.extraction
    backbone = head.model or spec.get("backbone", {}).get("architecture") or "unknown"
    kind = plain(head.spec.kind)
    options = ", ".join(f"{name}={json.dumps(value)}" for name, value in head.spec.options.items()) or "defaults"
    names = [plain(name) for name in head.class_names]
    shown = ", ".join(names[:_MOST]) + (" ..." if len(names) > _MOST else "")
    what = "targets" if head.task == "regression" else "classes" if head.task == "classification" else "labels"
    lines = [
        "---",
        "library_name: embedcache",
        f"tags: [frozen-backbone, {head.task}]",
        "---",
        "",
        f"# {kind} head on {plain(backbone)}",
        "",
        f"A {kind} head ({head.spec.engine}; {plain(options)}) on the features of a frozen backbone.",
        "",
        "| | |",
        "|---|---|",
        f"| task | {head.task} |",
        f"| {what} | {len(names)}: {shown} |",
        f"| backbone | {plain(backbone)}{f' @ {plain(head.revision)}' if head.revision else ''}, frozen |",
        f"| features | {plain(head.feature.name)} ({head.feature.kind}, {head.feature.dim} wide) |",
        f"| parameters | {head.parameters:,} |" if head.state else "| parameters | a scikit-learn estimator |",
    ]
    if head.calibration:
        lines.append(f"| calibration | {plain(_calibration(head))} |")
    lines += [f"| {plain(name)} | {plain(value)} |" for name, value in facts.items()]
    lines += ["", "## Training", "", *_training(head)]
    splits = {plain(split): values for split, values in metrics.items() if isinstance(values, Mapping)}
    if splits:
        lines += ["", "## Metrics", "", *_metrics(splits)]
    lines += ["", "## Use", "", "```python", *_use(head), "```", ""]
    lines += [
        "```",
        'embedcache predict RUN --text "..."',
        "```",
        "",
        "The head is only good for the features of the very backbone, tokenizer and settings in `config.json`; loading",
        "checks that.",
        "",
        f"Written by embedcache {__version__}.",
        "",
    ]
    return "\n".join(lines)


def _calibration(head: HeadRecord) -> str:
    if "temperature" in head.calibration:
        return f"temperature {head.calibration['temperature']:.4g}"
    return "thresholds " + ", ".join(f"{each:.3g}" for each in head.thresholds[:_MOST])


def _training(head: HeadRecord) -> list[str]:
    settings = {name: value for name, value in head.training.items() if value is not None}
    return [plain(", ".join(f"{name} {json.dumps(value)}" for name, value in settings.items()) or "unknown") + "."]


def _use(head: HeadRecord) -> list[str]:
    if "preprocessing" in head.extraction:
        return ["from embedcache import Predictor", "", 'Predictor.load("RUN")(["a text"])']
    return ["from embedcache import TrainedHead", "", 'TrainedHead.from_pretrained("RUN").predict(features)']


def _metrics(splits: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    names = dict.fromkeys(
        name for values in splits.values() for name, value in values.items() if _is_number(value) or value is None
    )
    yield f"| metric | {' | '.join(splits)} |"
    yield f"|---|{'---:|' * len(splits)}"
    for name in names:
        yield f"| {plain(name)} | {' | '.join(_number(values.get(name)) for values in splits.values())} |"
    for split, values in splits.items():
        for name, bounds in (values.get("intervals") or {}).items():
            low, high = (_number(each) for each in bounds)
            chosen = "; these rows chose the epoch and the calibration too" if split == "validation" else ""
            yield f"\n{split} {plain(name)}: {low} to {high} (95 % interval, over rows{chosen})."
        if missing := values.get("missing_classes"):
            yield f"\nNot in {split}: {', '.join(plain(name) for name in missing[:_MOST])}."
    last, values = list(splits.items())[-1]
    for what in ("per_class", "per_target"):
        if rows := values.get(what):
            columns = list(rows[0])
            yield f"\nBy {what[4:]}, on {last}:\n"
            yield f"| {' | '.join(columns)} |"
            yield f"|---|{'---:|' * (len(columns) - 1)}"
            for row in rows[:_MOST]:
                yield f"| {plain(row[columns[0]])} | {' | '.join(_number(row[name]) for name in columns[1:])} |"
            if len(rows) > _MOST:
                yield f"\n{len(rows) - _MOST} more are in `metrics.json`."


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any) -> str:
    if not _is_number(value):
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def plain(value: object) -> str:
    """Return a text from data on one line, harmless in Markdown: no table, link, HTML, formula or mention in it."""
    text = " ".join("".join(each if each.isprintable() or each.isspace() else "\ufffd" for each in str(value)).split())
    for mark in "\\|<>`[]*_~$&#!@":
        text = text.replace(mark, "\\" + mark)
    return text.replace("://", ":\\//").replace("www.", "www\\.")
