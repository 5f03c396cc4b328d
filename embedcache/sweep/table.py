"""A summary for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from embedcache.wording import counted, shown

_RIGHT = (1, 3, 5, 6, 7)  # columns of numbers


def to_text(summary: Mapping[str, Any], most: int = 12) -> str:
    """Lay out a leaderboard. ``=`` marks heads that cannot be told from the winner, ``*`` the chosen one."""
    rows, failures, alpha = summary["leaderboard"], summary["failures"], summary["protocol"]["alpha"]
    if not rows:
        return "\n".join(
            ["no head could be trained", *(shown(f"  {each['label']}: {each['error']}") for each in failures[:12])]
        )
    chosen, simple, test = (summary.get(name) for name in ("chosen", "recommended", "test"))
    listed = list(rows[:most])
    # The recommended head and a baseline belong in every table, however far down they are.
    named = {each["id"] for each in (chosen, simple) if each is not None}
    listed += [row for row in rows[most:] if row["id"] in named or row["head"]["kind"] == "majority"]
    name = summary["metric"]["name"]
    header = ["", "rank", "head", name, f"{100 * (1 - alpha):g}% interval", "p (Holm)", "parameters", "seconds"]
    lines = _columns(header, [_line(row, chosen is not None and row["id"] == chosen["id"]) for row in listed])
    group = sum(not row["distinguishable"] for row in rows)
    lines += [
        "",
        f"{counted(len(rows), 'head')}; {summary['protocol']['text']}",
        f"= {group} of them cannot be told from the winner (p >= {alpha:g} after Holm's correction)",
    ]
    if simple is not None:
        lines.append(f"recommended: {simple['label']} ({simple['why']})")
    if failures:
        lines.append(f"{len(failures)} could not be trained, such as {failures[0]['label']}: {failures[0]['error']}")
    if test is not None:
        interval = _interval(test["interval"])
        lines.append(
            f"* {test['label']}: {name} {test['score']:.4f} {interval} "
            f"on {counted(test['rows'], 'row')} of {test['split']}"
        )
    return "\n".join(map(shown, lines))


def _line(row: Mapping[str, Any], chosen: bool) -> list[str]:
    p = row["p_adjusted"]
    return [
        ("*" if chosen else " ") + (" " if row["distinguishable"] else "="),
        str(row["rank"]),
        row["label"],
        f"{row['score']:.4f}",
        _interval(row["interval"]),
        "-" if p is None else (f"{p:.3f}" if p >= 0.001 else "<0.001"),
        f"{row['parameters']:,}",
        f"{row['seconds']:.2f}",
    ]


def _interval(ends: Sequence[float] | None) -> str:
    return "-" if ends is None else f"[{ends[0]:.4f}, {ends[1]:.4f}]"


def _columns(header: list[str], rows: list[list[str]]) -> list[str]:
    whole = [header, *rows]
    widths = [max(len(row[at]) for row in whole) for at in range(len(header))]
    lines = []
    for row in whole:
        cells = zip(row, widths, strict=True)
        lines.append(
            "  ".join(
                c.rjust(width) if at in _RIGHT else c.ljust(width) for at, (c, width) in enumerate(cells)
            ).rstrip()
        )
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines
