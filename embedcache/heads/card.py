"""The model card of a head bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from embedcache import __version__

if TYPE_CHECKING:
    from embedcache.heads.trained import TrainedHead


def model_card(head: TrainedHead, metrics: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Return the card as Markdown: what it is, what it was trained on, how good it is, how to use it."""
    spec = head.extraction
    backbone = head.model or spec.get("backbone", {}).get("architecture") or "unknown"
    options = ", ".join(f"{name}={json.dumps(value)}" for name, value in head.spec.options.items()) or "defaults"
    names = [_plain(name) for name in head.class_names]
    lines = [
        "---",
        "library_name: embedcache",
        f"tags: [frozen-backbone, {head.task}]",
        "---",
        "",
        f"# {head.spec.kind} head on {_plain(backbone)}",
        "",
        f"A {head.spec.kind} head ({head.spec.engine}; {options}) on the features of a frozen backbone.",
        "",
        "| | |",
        "|---|---|",
        f"| task | {head.task} |",
        f"| outputs | {len(names)}: {', '.join(names[:20])}{' ...' if len(names) > 20 else ''} |",
        f"| backbone | {_plain(backbone)}{f' @ {head.revision}' if head.revision else ''}, frozen |",
        f"| features | {head.feature.name} ({head.feature.kind}, {head.feature.dim} wide) |",
        f"| parameters | {head.parameters:,} |" if head.state else "| parameters | a scikit-learn estimator |",
    ]
    if head.calibration:
        lines.append(f"| calibration | {_plain(json.dumps(dict(head.calibration))[:200])} |")
    lines += [f"| {_plain(name)} | {_plain(value)} |" for name, value in facts.items()]
    splits = [split for split, values in metrics.items() if isinstance(values, Mapping)]
    if splits:
        scalars = [name for name, value in metrics[splits[0]].items() if isinstance(value, (int, float))]
        lines += ["", "## Metrics", "", f"| metric | {' | '.join(splits)} |", f"|---|{'---|' * len(splits)}"]
        lines += [f"| {name} | {' | '.join(_number(metrics[each].get(name)) for each in splits)} |" for name in scalars]
        for split in splits:
            for name, bounds in (metrics[split].get("intervals") or {}).items():
                lines.append(f"\n{split} {name}: 95 % interval {_number(bounds[0])} to {_number(bounds[1])}.")
            if missing := metrics[split].get("missing_classes"):
                lines.append(f"\nNot in {split}: {', '.join(_plain(name) for name in missing)}.")
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "from embedcache import Predictor",
        "",
        'Predictor.load("this folder")(["a text"])',
        "```",
        "",
        "The head is only good for the features of the very backbone, tokenizer and settings in `config.json`; loading",
        "checks that.",
        "",
        f"Written by embedcache {__version__}.",
        "",
    ]
    return "\n".join(lines)


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _plain(value: object) -> str:
    """Make a text from data harmless in a Markdown table."""
    text = " ".join(str(value).split())
    for mark in "\\|<>`[]*_":
        text = text.replace(mark, "\\" + mark)
    return text
