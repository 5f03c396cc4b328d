"""What a task is: its targets, its losses, its probabilities, its decisions and its metrics.

There are three, ``CLASSIFICATION``, ``MULTILABEL`` and ``REGRESSION``. JSON, the command line and public arguments name
them by a word; ``task_named`` turns the word into the object, once, where it comes in.

===============  =========================  ===================  ==========  ================================
task             targets                    a row without label  logits to   a decision
===============  =========================  ===================  ==========  ================================
classification   int64 [N], the class       -1                   softmax     the class of highest probability
multilabel       uint8 [N, C], 0 or 1       255 throughout       sigmoid     labels at or above a threshold
regression       float64 [N, R], values     NaN throughout       themselves  the values
===============  =========================  ===================  ==========  ================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from embedcache.errors import InputError, SpecError
from embedcache.spec import TASKS, TaskName
from embedcache.wording import shortened

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Named = str | tuple[str, ...] | tuple[float, ...]
"""A target or a decision for people and JSON: a class, the labels that are on, or the values."""

EPSILON = float(np.finfo(np.float64).eps)
"""Probabilities are kept this far from 0 and 1 before their logarithm is taken."""

LARGEST_TARGET = 1e100
"""The largest target of a regression: sums of its squares are still numbers."""


class Task(ABC):
    """One of the three tasks. There is one object of each, also after pickling: compare with ``is``.

    Attributes:
        name: the word for it.
        dtype: of its targets, as they are stored.
        unlabelled: the target of a row without label.
        link: how logits become outputs.
        loss: what training makes small.
        default_metric: what training is judged by when nobody says. Log loss and the root mean squared error are smooth
            and proper: on a few hundred validation rows accuracy moves in steps, stands still for epochs in which the
            head still learns, and ties half the epochs with one another.
        headline_metric: what people are shown first.
        interval_metrics: the metrics that are given with bootstrap intervals.
        outputs_are: what the outputs of a head are called, in the plural.
    """

    name: ClassVar[TaskName]
    dtype: ClassVar[np.dtype[Any]]
    unlabelled: ClassVar[float]
    link: ClassVar[Literal["softmax", "sigmoid", "identity"]]
    loss: ClassVar[Literal["cross_entropy", "binary_cross_entropy", "squared_error"]]
    default_metric: ClassVar[str]
    headline_metric: ClassVar[str]
    interval_metrics: ClassVar[tuple[str, ...]]
    outputs_are: ClassVar[Literal["classes", "labels", "targets"]]

    def __repr__(self) -> str:
        return self.name.upper()

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[object, ...]:
        return task_named, (self.name,)

    @property
    def has_probabilities(self) -> bool:
        """Whether outputs are probabilities: every task but regression."""
        return self.link != "identity"

    def target_shape(self, rows: int, outputs: int) -> tuple[int, ...]:
        """Return the shape of the targets of so many rows, for C classes or labels or R targets."""
        return (rows, outputs)

    @abstractmethod
    def labelled(self, y: Array) -> Flags:
        """Return which rows have a label, bool [N]."""

    @abstractmethod
    def checked_targets(self, y: Array, where: str, outputs: int | None) -> tuple[Array, Flags]:
        """Return targets as training takes them, and which rows are labelled, bool [N].

        ``where`` names the rows in messages, ``outputs`` says how many classes, labels or targets there are to be.
        Raises ``InputError`` for targets of another shape or type, or with values that cannot be, naming the row.
        """

    @abstractmethod
    def stored_fault(self, y: Array, outputs: int) -> str | None:
        """Return what is impossible in targets as they are stored, with the values expected; None where all is well."""

    @abstractmethod
    def named(self, target: Array, names: Sequence[str]) -> Named:
        """Return the target of one labelled row, or the decision about it, by the names of classes or labels."""

    def counts(self, y: Array, outputs: int) -> npt.NDArray[np.int64] | None:
        """Return how many rows have each of C classes or labels, int64 [C]; None for a regression."""
        return None

    def probabilities(self, logits: Array) -> Floats:
        """Return what logits [N, C] amount to, float64 [N, C]: probabilities, or the values of a regression."""
        return np.asarray(logits, np.float64)

    def decide(self, outputs: Array, thresholds: Array | float = 0.5) -> Array:
        """Return the decisions: int64 [..., N], bool [..., N, C], or the values of a regression as they are."""
        return outputs

    def margin(self, outputs: Array, thresholds: Array | float = 0.5) -> float | None:
        """Return by how much the decision about one row, of probabilities [C], stands; None for a regression.

        Of classes it is the lead of the most probable over the next, of labels the distance of the closest from its
        threshold.
        """
        return None

    def right(self, y: Array, decided: Array) -> Floats:
        """Return which rows are wholly right, float64 [..., N]."""
        return np.asarray((decided == y).all(axis=-1), np.float64)

    def row_loss(self, y: Array, outputs: Array) -> Floats:
        """Return each row's -log of the probability of what is true, float64 [..., N]; over labels the mean of it.

        ``outputs`` are probabilities [..., N, C]. Raises ``SpecError`` for a regression.
        """
        raise SpecError(f"{self.name} has no probabilities, and so no log loss")

    def positive(self, y: Array, column: int) -> Flags:
        """Return which rows have a class, or a label on, bool [N]."""
        return np.asarray(y[:, column] == 1)


class _Classification(Task):
    name = "classification"
    dtype = np.dtype("<i8")
    unlabelled = -1
    link = "softmax"
    loss = "cross_entropy"
    default_metric = "log_loss"
    headline_metric = "accuracy"
    interval_metrics = ("accuracy", "f1_macro")
    outputs_are = "classes"

    def target_shape(self, rows: int, outputs: int) -> tuple[int, ...]:
        return (rows,)

    def labelled(self, y: Array) -> Flags:
        return np.asarray(y != -1)

    def checked_targets(self, y: Array, where: str, outputs: int | None) -> tuple[Array, Flags]:
        if y.ndim != 1 or y.dtype.kind not in "iu":
            raise InputError(f"{where}: classification targets are int64 [N], got {y.dtype} {y.shape}")
        beyond = (y < -1) | (y >= outputs if outputs is not None else False)
        if beyond.any():
            row = int(np.flatnonzero(beyond)[0])
            most = "" if outputs is None else f" to {outputs - 1}"
            raise InputError(
                f"{where}: row {row} has the class {int(y[row])}: expected 0{most}, or -1 for a row without label"
            )
        return y.astype(np.int64), np.asarray(y >= 0)

    def stored_fault(self, y: Array, outputs: int) -> str | None:
        if not len(y) or -1 <= int(y.min()) <= int(y.max()) < outputs:
            return None
        return f"{y.min()} to {y.max()}, expected at least -1 and below {outputs}"

    def named(self, target: Array, names: Sequence[str]) -> str:
        return names[int(target)]

    def counts(self, y: Array, outputs: int) -> npt.NDArray[np.int64]:
        return np.bincount(y[y >= 0], minlength=outputs)

    def probabilities(self, logits: Array) -> Floats:
        z = np.asarray(logits, np.float64)
        z = np.exp(z - z.max(axis=1, keepdims=True))
        return np.asarray(z / z.sum(axis=1, keepdims=True))

    def decide(self, outputs: Array, thresholds: Array | float = 0.5) -> Array:
        return np.asarray(outputs.argmax(axis=-1))

    def margin(self, outputs: Array, thresholds: Array | float = 0.5) -> float | None:
        if len(outputs) < 2:
            return None
        second, first = np.partition(outputs, -2)[-2:].tolist()
        return float(first - second)

    def right(self, y: Array, decided: Array) -> Floats:
        return np.asarray(decided == y, np.float64)

    def row_loss(self, y: Array, outputs: Array) -> Floats:
        p = outputs[..., np.arange(len(y)), y].astype(np.float64)
        return np.ascontiguousarray(-np.log(np.clip(p, EPSILON, 1 - EPSILON)))

    def positive(self, y: Array, column: int) -> Flags:
        return np.asarray(y == column)


class _Multilabel(Task):
    name = "multilabel"
    dtype = np.dtype("u1")
    unlabelled = 255
    link = "sigmoid"
    loss = "binary_cross_entropy"
    default_metric = "log_loss"
    headline_metric = "f1_macro"
    interval_metrics = ("subset_accuracy", "f1_macro")
    outputs_are = "labels"

    def labelled(self, y: Array) -> Flags:
        return np.asarray((y != 255).all(axis=1))

    def checked_targets(self, y: Array, where: str, outputs: int | None) -> tuple[Array, Flags]:
        if y.ndim != 2:
            raise InputError(f"{where}: multi-label targets are [N, C], got {y.shape}")
        known = (y == 0) | (y == 1)
        kept = ~(y == 255).all(axis=1)
        if not known[kept].all():
            row = int(np.flatnonzero(kept & ~known.all(axis=1))[0])
            raise InputError(
                f"{where}: row {row} has labels other than 0 and 1: a row without labels is 255 throughout"
            )
        _refuse_other_width(y, where, outputs)
        return y, np.asarray(kept)

    def stored_fault(self, y: Array, outputs: int) -> str | None:
        return None if np.isin(y, (0, 1, 255)).all() else "something other than 0, 1 and 255"

    def named(self, target: Array, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name, on in zip(names, target.tolist(), strict=True) if on == 1)

    def counts(self, y: Array, outputs: int) -> npt.NDArray[np.int64]:
        return np.asarray((y == 1).sum(axis=0))

    def probabilities(self, logits: Array) -> Floats:
        return np.asarray(0.5 * (1 + np.tanh(0.5 * np.asarray(logits, np.float64))))

    def decide(self, outputs: Array, thresholds: Array | float = 0.5) -> Array:
        return np.asarray(outputs >= thresholds)

    def margin(self, outputs: Array, thresholds: Array | float = 0.5) -> float | None:
        return float(np.abs(outputs - thresholds).min())

    def row_loss(self, y: Array, outputs: Array) -> Floats:
        p = outputs.astype(np.float64)
        p = np.clip(np.where(y == 1, p, 1 - p), EPSILON, 1 - EPSILON)
        return np.asarray(-np.log(p).mean(axis=-1))


class _Regression(Task):
    name = "regression"
    dtype = np.dtype("<f8")
    unlabelled = float("nan")
    link = "identity"
    loss = "squared_error"
    default_metric = "rmse"
    headline_metric = "rmse"
    interval_metrics = ("rmse", "r2")
    outputs_are = "targets"

    def labelled(self, y: Array) -> Flags:
        return np.asarray(~np.isnan(y).any(axis=1))

    def checked_targets(self, y: Array, where: str, outputs: int | None) -> tuple[Array, Flags]:
        y = y.astype(np.float64)
        y = y[:, None] if y.ndim == 1 else y
        if (huge := (np.abs(y) > LARGEST_TARGET).any(axis=1)).any():
            row = int(np.flatnonzero(huge)[0])
            infinite = np.isinf(y[row]).any()
            what = "an infinite target" if infinite else f"a target beyond {LARGEST_TARGET:g}: scale it down"
            raise InputError(f"{where}: row {row} has {what}")
        missing = np.isnan(y)
        kept = ~missing.any(axis=1)
        if (partly := ~kept & ~missing.all(axis=1)).any():
            row = int(np.flatnonzero(partly)[0])
            raise InputError(f"{where}: row {row} has a target that is NaN: give it a number, or leave the row out")
        _refuse_other_width(y, where, outputs)
        return y, np.asarray(kept)

    def stored_fault(self, y: Array, outputs: int) -> str | None:
        return "infinity" if np.isinf(y).any() else None

    def named(self, target: Array, names: Sequence[str]) -> tuple[float, ...]:
        return tuple(map(float, target))


def _refuse_other_width(y: Array, where: str, outputs: int | None) -> None:
    if outputs is not None and y.shape[1] != outputs:
        raise InputError(f"{where}: targets are {y.shape[1]} wide, and there are {outputs} names for them")


CLASSIFICATION: Task = _Classification()
"""One class a row."""
MULTILABEL: Task = _Multilabel()
"""Any number of labels a row."""
REGRESSION: Task = _Regression()
"""One or several numbers a row."""

_BY_NAME: Mapping[object, Task] = {task.name: task for task in (CLASSIFICATION, MULTILABEL, REGRESSION)}


def task_named(name: TaskName | Task) -> Task:
    """Return a task by its word; a task is returned as it is. Raises ``SpecError`` for any other word."""
    if isinstance(name, Task):
        return name
    if not isinstance(name, str) or name not in _BY_NAME:
        raise SpecError(f"unknown task {shortened(name)}: expected one of {', '.join(TASKS)}")
    return _BY_NAME[name]
