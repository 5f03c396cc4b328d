"""A summary for a terminal."""

from __future__ import annotations

from embedcache.sweep.summary import Interval, LeaderboardRow, Summary
from embedcache.wording import counted, shown, table

_NUMBERS = (1, 3, 5, 6, 7)
"""Columns that are aligned on the right."""
_MOST_FAILURES = 12


def to_text(summary: Summary, most: int = 12) -> str:
    """Lay out a leaderboard. ``=`` marks heads that cannot be told from the winner, ``*`` the chosen one."""
    rows, failures, alpha = summary.leaderboard, summary.failures, summary.protocol.alpha
    if not rows:
        reasons = [f"  {failure.label}: {failure.error}" for failure in failures[:_MOST_FAILURES]]
        return "\n".join(map(shown, ["no head could be trained", *reasons]))
    # The recommended head and a baseline belong in every table, however far down they are.
    named = {choice.id for choice in (summary.chosen, summary.recommended) if choice is not None}
    listed = [*rows[:most], *(row for row in rows[most:] if row.id in named or row.head.kind == "majority")]
    metric = summary.metric.name
    header = ["", "rank", "head", metric, f"{100 * (1 - alpha):g}% interval", "p (Holm)", "parameters", "seconds"]
    chosen = summary.chosen.id if summary.chosen else None
    lines = table(header, [_cells(row, row.id == chosen) for row in listed], _NUMBERS)
    lines += [
        "",
        f"{counted(len(rows), 'head')}; {summary.protocol.text}",
        f"= {len(summary.group)} of them cannot be told from the winner (p >= {alpha:g} after Holm's correction)",
    ]
    if summary.recommended is not None:
        lines.append(f"recommended: {summary.recommended.label} ({summary.recommended.why})")
    if failures:
        lines.append(f"{len(failures)} could not be trained, such as {failures[0].label}: {failures[0].error}")
    if (test := summary.test) is not None:
        lines.append(
            f"* {test.label}: {metric} {test.score:.4f} {_ends(test.interval)} "
            f"on {counted(test.rows, 'row')} of {test.split}"
        )
    return "\n".join(map(shown, lines))


def _cells(row: LeaderboardRow, chosen: bool) -> list[str]:
    p = row.p_adjusted
    return [
        ("*" if chosen else " ") + (" " if row.distinguishable else "="),
        str(row.rank),
        row.label,
        f"{row.score:.4f}",
        _ends(row.interval),
        "-" if p is None else (f"{p:.3f}" if p >= 0.001 else "<0.001"),
        f"{row.parameters:,}",
        f"{row.seconds:.2f}",
    ]


def _ends(interval: Interval | None) -> str:
    return "-" if interval is None else f"[{interval[0]:.4f}, {interval[1]:.4f}]"
