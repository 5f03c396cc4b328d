"""What one should know of a sweep's results before believing them."""

from __future__ import annotations

from collections.abc import Sequence

from embedcache.sweep.problem import Problem
from embedcache.sweep.summary import LeaderboardRow
from embedcache.wording import counted


def notes_on(problem: Problem, rows: Sequence[LeaderboardRow]) -> list[str]:
    """Return what one should know of the results on a problem, a line each."""
    notes = []
    duplicates = len(problem) - problem.strata.groups
    if duplicates:
        what = "row of train and validation has" if duplicates == 1 else "rows of train and validation have"
        notes.append(f"{duplicates:,} {what} the content of another, and its fold")
    if not len(problem.test_rows):
        notes.append(
            "the cache has no labelled test split: nothing here was measured on rows that no choice was made by"
        )
    notes += _edges(rows)
    if any(row.head.kind == "majority" and not row.distinguishable for row in rows) and len(rows) > 1:
        notes.append("these rows cannot tell the best head from one that always says the same: more rows are needed")
    if problem.task == "classification" and (unseen := sorted({*problem.test_y.tolist()} - {*problem.y.tolist()})):
        names = ", ".join(problem.class_names[label] for label in unseen[:5])
        notes.append(f"the test split has classes that no other row has, so no head can know them: {names}")
    looked = sum(row.looked_at_test for row in rows)
    if looked > 1:
        notes.append(
            f"the test split has been looked at with {counted(looked, 'head')}: "
            "the best of their scores there is flattered"
        )
    if problem.protocol.shots is None and problem.protocol.folds == 1:
        notes.append("one split only: its rows decide everything, and the spread over training sets is not seen")
    return notes


def _edges(rows: Sequence[LeaderboardRow]) -> list[str]:
    """Say which settings of the winner lie at the end of what was tried: the best may lie beyond."""
    best = rows[0]
    alike = [
        row for row in rows
        if (row.head.kind, row.head.engine) == (best.head.kind, best.head.engine)
        and row.train.get("solver") == best.train.get("solver")
    ]  # fmt: skip
    notes = []
    for name, value in best.varied.items():
        tried = sorted(tried for row in alike if isinstance(tried := row.varied.get(name), (int, float)))
        if isinstance(value, (int, float)) and len({*tried}) >= 3 and value in (tried[0], tried[-1]) and value != 0:
            end = "largest" if value == tried[-1] else "smallest"
            notes.append(f"the winner's {name} is the {end} tried ({value:g}): the best may lie beyond")
    return notes
