"""Predictions beside the truth, and what is computed row by row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from embedcache.errors import SpecError
from embedcache.spec import TaskName
from embedcache.task import CLASSIFICATION, REGRESSION, Array, Floats, Task, task_named
from embedcache.wording import counted

KEEP = 1 << 23
"""Up to how many outputs the order of the rows is remembered, class by class."""


class Predictions:
    """The outputs of a head beside the targets, unlabelled rows left out.

    Attributes:
        task: what the targets mean.
        y: int64 [N], uint8 [N, C] or float64 [N, R].
        outputs: probabilities [N, C], or values [N, R].
        thresholds: [C], from which probability on a label of a multi-label row is on.
    """

    def __init__(
        self,
        task: Task | TaskName,
        y: npt.ArrayLike,
        outputs: npt.ArrayLike,
        thresholds: Sequence[float] | Array | None = None,
    ) -> None:
        task, y, outputs = task_named(task), np.asarray(y), np.asarray(outputs)
        if task is REGRESSION:
            outputs = outputs[:, None] if outputs.ndim == 1 else outputs
            y = y[:, None] if y.ndim == 1 else y
        if outputs.ndim != 2 or y.shape != task.target_shape(*outputs.shape):
            raise SpecError(f"{task}: y {y.shape} does not fit outputs {outputs.shape}: expected one row for each")
        labelled = task.labelled(y)
        if not labelled.all():
            y, outputs = y[labelled], outputs[labelled]
        if task is CLASSIFICATION:
            y = y.astype(np.int64, copy=False)
            if len(y) and (int(y.min()) < 0 or int(y.max()) >= outputs.shape[1]):
                raise SpecError(f"a class is {int(y.max())} or {int(y.min())}, outputs have {outputs.shape[1]} columns")
        self.task = task
        self.y = y
        self.outputs = outputs
        self.thresholds = np.full(outputs.shape[1], 0.5) if thresholds is None else np.asarray(thresholds, np.float64)
        if self.thresholds.shape != outputs.shape[1:]:
            raise SpecError(f"{len(self.thresholds)} thresholds for {counted(outputs.shape[1], 'class')}")
        self._ranked: dict[int, Ranked] = {}
        self._areas: dict[int, tuple[float, float]] = {}

    @cached_property
    def finite(self) -> bool:
        """Whether every output is a number."""
        return bool(np.isfinite(self.outputs).all())

    @cached_property
    def predicted(self) -> Array:
        """The class of each row int64 [N], the labels bool [N, C], or the values."""
        return self.task.decide(self.outputs, self.thresholds)

    @cached_property
    def right(self) -> Array:
        """Which rows are classified rightly, float64 [N]."""
        return self.task.right(self.y, self.predicted)

    def areas(self, column: int) -> tuple[float, float]:
        """Return ROC-AUC and average precision of one class, each row counting once."""
        if column not in self._areas:
            self._areas[column] = areas(self.task.positive(self.y, column), self.outputs[:, column])
        return self._areas[column]

    def ranked(self, column: int) -> Ranked:
        """Return the rows in the order of their output for one class."""
        if column not in self._ranked:
            made = Ranked(self.task.positive(self.y, column), self.outputs[:, column])
            if self.outputs.size > KEEP:
                return made
            self._ranked[column] = made
        return self._ranked[column]


def weighted_mean(values: Floats, weights: Floats) -> Floats:
    """Return the mean over rows of values [..., N] under weights [..., N]; NaN where no row has any."""
    total = weights.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((values * weights).sum(axis=-1) / total)


def areas(positive: npt.NDArray[np.bool_], score: Array) -> tuple[float, float]:
    """Return ROC-AUC and average precision where all rows weigh the same, NaN as in ``Ranked``.

    Only the two sides are sorted, and only the positives looked up: ten times as fast as ranking every row.
    """
    on, off = np.sort(score[positive]), np.sort(score[~positive])
    if not len(on):
        return float("nan"), float("nan")
    below, upto = np.searchsorted(off, on, "left"), np.searchsorted(off, on, "right")
    auc = float(below.sum() + upto.sum()) / (2 * len(on) * len(off)) if len(off) else float("nan")
    hits, falls = len(on) - np.searchsorted(on, on, "left"), len(off) - below
    return auc, float((hits / (hits + falls)).mean())


class Ranked:
    """Rows by falling score, so that the curves of any weights need no further sorting."""

    def __init__(self, positive: npt.NDArray[np.bool_], score: Array) -> None:
        self._order = np.argsort(-score)
        score = score[self._order]
        self._positive = positive[self._order]
        self._ends = np.flatnonzero(np.append(score[1:] != score[:-1], True))

    def _curve(self, weights: Floats) -> tuple[Floats, Floats]:
        """Return the true and the false positives at every distinct score, from the highest down."""
        falling = weights[self._order]
        hits = np.cumsum(falling * self._positive)
        return hits[self._ends], (np.cumsum(falling) - hits)[self._ends]

    def roc_auc(self, weights: Floats) -> float:
        """Return the area under the ROC curve, NaN where one side has no weight."""
        hits, falls = self._curve(weights)
        if hits[-1] <= 0 or falls[-1] <= 0:
            return float("nan")
        before = np.concatenate([[0.0], hits[:-1]])
        return float(np.diff(falls, prepend=0.0) @ (hits + before) / (2 * hits[-1] * falls[-1]))

    def average_precision(self, weights: Floats) -> float:
        """Return the mean precision over the steps of recall, NaN without positives."""
        hits, falls = self._curve(weights)
        if hits[-1] <= 0:
            return float("nan")
        precision = hits / np.maximum(hits + falls, 1e-300)
        return float(np.diff(hits, prepend=0.0) @ precision / hits[-1])
