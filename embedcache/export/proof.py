"""An export is not finished before the other tool has said, of some rows, what the head says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from embedcache.errors import NotEqualError
from embedcache.task import REGRESSION, task_named
from embedcache.wording import counted

if TYPE_CHECKING:
    from embedcache.heads import TrainedHead
    from embedcache.shard import Array

TOLERANCE = 1e-5
"""How far a probability may be from ours; of a regression, a value, in units of 1 or of its own size if larger."""


@dataclass(frozen=True)
class Proof:
    """That the other tool gave the same of so many rows: ``apart`` is the largest difference, all labels agree."""

    tool: str
    rows: int
    apart: float

    def to_json(self) -> dict[str, object]:
        """Return it as JSON values."""
        return {"tool": self.tool, "rows": self.rows, "largest_difference": self.apart, "labels_differ": 0}

    def to_text(self) -> str:
        """Say it in one line."""
        rows = counted(self.rows, "row")
        return f"{self.tool} was run on {rows}: outputs differ by at most {self.apart:.1e}, no label does"


def prove(head: TrainedHead, tool: str, expected: Array, given: Array) -> Proof:
    """Compare what another tool gives with what the head gives, float [n, C] each.

    Raises ``NotEqualError`` where an output differs by more than ``TOLERANCE``, or a label does.
    """
    if given.shape != expected.shape:
        raise NotEqualError(f"{tool} gave {list(given.shape)} of {list(expected.shape)}: nothing was exported")
    apart = np.abs(np.asarray(given, np.float64) - expected)
    task, thresholds = task_named(head.task), np.asarray(head.thresholds)
    if task is REGRESSION:
        apart = apart / np.maximum(1.0, np.abs(expected))
    if not np.isfinite(apart).all() or apart.max(initial=0.0) > TOLERANCE:
        row = int(np.nan_to_num(apart, nan=np.inf).max(axis=1).argmax())
        raise NotEqualError(
            f"{tool} gives other outputs than the head: by {apart[row].max():.2g} in row {row}, and {TOLERANCE:g} is "
            "allowed: nothing was exported"
        )
    if task is not REGRESSION:
        differ = np.atleast_1d(
            task.decide(np.asarray(given, np.float64), thresholds) != task.decide(expected, thresholds)
        )
        if differ.any():
            raise NotEqualError(
                f"{tool} gives another label than the head in {counted(int(differ.sum()), 'place')}, though outputs "
                f"differ by {apart.max():.1e} at most: nothing was exported"
            )
    return Proof(tool, len(expected), float(apart.max(initial=0.0)))


def batches(rows: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Yield ``size`` rows at a time."""
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])
