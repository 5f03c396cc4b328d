"""Labelled rows as training takes them: checked once, unlabelled rows dropped; moments, class weights, memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from embedcache.errors import FeatureError, InputError, SpecError, TrainingError
from embedcache.features import Features, OnDisk, Rows, features_of
from embedcache.shard import FeatureSet
from embedcache.spec import TrainSpec
from embedcache.task import CLASSIFICATION, MULTILABEL, REGRESSION, Array, Flags, Floats, Task
from embedcache.train.parts import Parts
from embedcache.wording import counted, shortened

# Whether features fit in the memory that is free.


def fits_in_memory(size: int) -> bool:
    """Whether features of ``size`` bytes may be read whole: a quarter of the memory that is free now.

    ``EMBEDCACHE_MEMORY`` (bytes) overrides the detected free memory.
    """
    given = os.environ.get("EMBEDCACHE_MEMORY", "")
    free = int(given) if given.isdecimal() else available_memory()
    return free is None or size <= free // 4


def available_memory() -> int | None:
    """Return how much memory is free, in bytes, within a container's limit; None where the system does not say."""
    limits = []
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            limits += [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        pass
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = int(file.read())
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as file:
            limits.append(max(0, limit - int(file.read())))
    except (OSError, ValueError):
        pass
    try:
        import resource

        soft = resource.getrlimit(resource.RLIMIT_DATA)[0]
        if soft != resource.RLIM_INFINITY:
            limits.append(soft)
    except (ImportError, ValueError, OSError):
        pass
    return min(limits) if limits else None


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """Features, targets and weights of N rows, every one labelled, and what the targets mean.

    Attributes:
        x: the features.
        y: int64 [N], uint8 [N, C] or float64 [N, R]; see ``embedcache.task``.
        task: what is to be learned.
        class_names: the C classes or labels, or the names of the R targets.
        weight: float32 [N], how much each row counts; None for equal.
        views: features of the rows and, behind them, of their views, one view after the other: (V + 1) N rows. None
            where there are no views. Whatever trains reads these, whatever judges reads ``x``.
        repeats: how many of the N rows stand for one, as ``every_view`` makes them.
    """

    x: Features
    y: Array
    task: Task
    class_names: tuple[str, ...]
    weight: npt.NDArray[np.float32] | None = None
    views: Features | None = None
    repeats: int = 1

    def __len__(self) -> int:
        return len(self.y)

    @property
    def feature(self) -> FeatureSet:
        """The feature set that the features are of."""
        return self.x.feature

    @property
    def outputs(self) -> int:
        """How many classes, labels or targets there are: C or R."""
        return len(self.class_names)

    def take(self, rows: Rows) -> LabelledRows:
        """Return some rows, int64 [n]."""
        weight = None if self.weight is None else self.weight[rows]
        views = None
        if self.views is not None:
            views = self.views.take(np.concatenate([rows + view * len(self) for view in range(self.of_views + 1)]))
        return replace(self, x=self.x.take(rows), y=self.y[rows], weight=weight, views=views)

    @property
    def of_views(self) -> int:
        """How many views each row has."""
        return 0 if self.views is None else len(self.views) // len(self) - 1

    @property
    def trained(self) -> Features:
        """The features that are trained on: of the rows, and of their views behind them."""
        return self.x if self.views is None else self.views

    @property
    def trained_weight(self) -> npt.NDArray[np.float32] | None:
        """The weights of ``trained``."""
        return None if self.weight is None else np.tile(self.weight, self.of_views + 1)

    def every_view(self) -> LabelledRows:
        """Return rows and views as so many rows, each with its share of the row's weight.

        Training that reads all rows at once has these: what drawing a view in each epoch comes to in the mean.
        """
        times = self.of_views + 1
        if self.views is None:
            return self
        weight = np.tile(np.ones(len(self), np.float32) if self.weight is None else self.weight, times) / times
        y = np.tile(self.y, (times, *(1,) * (self.y.ndim - 1)))
        return replace(self, x=self.views, y=y, weight=weight.astype(np.float32), views=None, repeats=times)

    def spread(self, most: int) -> LabelledRows:
        """Return at most this many rows, spread evenly."""
        return self if len(self) <= most else self.take(np.linspace(0, len(self) - 1, most).astype(np.int64))

    def matrix(self, what: str) -> Array:
        """Return the features as one array [N, D] in memory, for ``what`` needs them so.

        Raises ``FeatureError`` for a feature set with several vectors a row.
        """
        if self.feature.kind != "pooled":
            raise FeatureError(
                f"{what} reads one vector a row, and the feature set {self.feature.name} has several: "
                "choose another feature set, or the head attention or attention-pooling"
            )
        return (self.x.whole() if isinstance(self.x, OnDisk) else next(iter(self.x.blocks()))).values


_SMALLEST = 1e-37
"""The smallest deviation that has an inverse in float32."""


def labelled_rows_of(
    x: object, y: npt.ArrayLike, task: Task, class_names: Sequence[str], *,
    feature: FeatureSet | None = None, weight: npt.ArrayLike | None = None, where: str = "training",
    views: Sequence[object] = (),
) -> LabelledRows:  # fmt: skip
    """Check features and targets, and return the rows that have a label. ``views`` are features of the same rows.

    Raises ``FeatureError`` for features that do not fit or are not finite (naming the row), ``InputError`` for targets
    or weights that do not fit the task or the rows.
    """
    features = features_of(x, feature, where=where)
    names = tuple(class_names)
    targets, kept = checked_targets(y, len(features), task, where=where, outputs=len(names))
    weights = None if weight is None else _checked_weights(weight, len(features), where)
    together: Features | None = None
    if views:
        parts = [features_of(view, features.feature, where=where) for view in views]
        if wrong := [len(part) for part in parts if len(part) != len(features) or type(part) is not type(features)]:
            raise InputError(f"{where}: {counted(len(features), 'row')} of features, and {wrong[0]} of a view of them")
        together = Parts.of([features, *parts])
    rows = LabelledRows(features, targets, task, names, weights, together)
    return rows if kept.all() else rows.take(np.flatnonzero(kept))


def checked_targets(
    y: npt.ArrayLike, rows: int, task: Task, *, where: str, outputs: int | None = None
) -> tuple[Array, Flags]:
    """Return targets as training takes them, and which of the rows have a label, bool [N].

    Raises ``InputError`` for targets that do not fit the task or the number of rows.
    """
    targets = np.asarray(y)
    if targets.ndim == 0:
        raise InputError(f"{where}: the targets are {shortened(targets.item())}: expected one for each row")
    if len(targets) != rows:
        raise InputError(f"{where}: {counted(rows, 'row')} of features and {len(targets)} of targets")
    return task.checked_targets(targets, where, outputs)


def _checked_weights(weight: npt.ArrayLike, rows: int, where: str) -> npt.NDArray[np.float32]:
    try:
        weights = np.asarray(weight, np.float32)
    except (TypeError, ValueError):
        raise InputError(f"{where}: sample weights are {shortened(weight)}: expected {rows} numbers") from None
    if weights.shape != (rows,) or not np.isfinite(weights).all() or (weights < 0).any():
        raise InputError(f"{where}: sample weights must be {rows} finite numbers of 0 or more")
    if rows and not weights.any():
        raise InputError(f"{where}: every sample weight is 0: expected one above 0")
    return weights


def checked_names(names: Sequence[object]) -> tuple[str, ...]:
    """Return class names as text, whole numbers as their digits. Raises ``SpecError`` for others, and for one twice."""
    if isinstance(names, str):
        raise SpecError(f"class_names is {names!r}: expected a list of names")
    texts = []
    for name in names:
        if not isinstance(name, (str, int, np.integer)) or isinstance(name, bool):
            raise SpecError(f"class_names holds {name!r} of type {type(name).__name__}: expected texts")
        texts.append(str(name))
    if len(set(texts)) < len(texts):
        twice = next(name for name in texts if texts.count(name) > 1)
        raise SpecError(f"class_names holds {twice!r} twice: expected each class once")
    return tuple(texts)


def refuse_untrainable(y: Array, task: Task, class_names: Sequence[str]) -> list[str]:
    """Return notes about labelled targets, such as classes without a row.

    Raises ``TrainingError`` for no rows, one class only, or fewer rows than classes.
    """
    if not len(y):
        raise TrainingError("there is no labelled row to train on")
    if task is CLASSIFICATION:
        present = np.unique(y)
        if len(present) < 2:
            only = class_names[int(present[0])]
            raise TrainingError(f"all {len(y)} training rows have the class {only!r}: expected at least two classes")
        if len(y) < len(class_names):
            raise TrainingError(f"there are {len(y)} training rows for {len(class_names)} classes: add rows")
        absent = [name for number, name in enumerate(class_names) if number not in set(present.tolist())]
        return [f"no training row has the class {', '.join(map(repr, absent))}"] if absent else []
    if task is MULTILABEL:
        never = [name for name, on in zip(class_names, (y == 1).any(axis=0), strict=True) if not on]
        if len(never) == len(class_names):
            raise TrainingError("no training row has any label: expected at least one")
        return [f"no training row has the label {', '.join(map(repr, never))}"] if never else []
    if len(y) < 2:
        raise TrainingError("there is one training row: expected at least two")
    return []


def moments(x: Features, weight: Array | None = None) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the mean and 1 / standard deviation of each feature, float32 [D]; constant features get a scale of 1.

    Constant is what varies by no more than ``rounding``. One pass in blocks, whatever the size.
    ``weight`` [N] are weights of the rows: a row of weight 2 counts as two. Raises ``FeatureError`` where features on
    disk are not finite.
    """
    mean, deviation = _mean_and_deviation(x, weight)
    constant = _constant(mean, deviation)
    scale = np.where(constant, 1.0, 1.0 / np.where(constant, 1.0, deviation))
    return mean.astype(np.float32), scale.astype(np.float32)


def target_moments(y: Array, task: Task) -> tuple[Floats, Floats]:
    """Return mean and standard deviation of each target of a regression, [R]; 0 and 1 for other tasks.

    Targets are trained on with mean 0 and deviation 1, so that one learning rate fits euros and cents.
    """
    if task is not REGRESSION:
        return np.zeros(1), np.ones(1)
    deviation = y.std(axis=0)
    return y.mean(axis=0), np.where(deviation > 0, deviation, 1.0)


def rounding(mean: Floats, deviation: Floats, dtype: npt.DTypeLike = np.float32) -> float:
    """Return how far a feature may vary by rounding alone, in rows of ``dtype`` with these moments [D].

    That is the rounding unit times the length of a row whose components are all as large as the ninth decile of the
    features. A decile, not the maximum: one column of time stamps must not make the other features count as constant.

    A dead unit of a backbone varies by 1e-8 where others vary by 0.05. Scaled to unit variance it would be noise with
    a weight of millions, and the rounding of another machine, or a step of fine-tuning, would overturn predictions.
    """
    size = np.sort(np.hypot(mean, deviation))
    return max(float(np.finfo(dtype).eps * size[int(0.9 * (len(size) - 1))] * np.sqrt(len(size))), _SMALLEST)


def constants_note(x: Features) -> str | None:
    """Return a note on features that vary and are still taken for constant; None where there are none."""
    mean, deviation = _mean_and_deviation(x, None)
    number = int((_constant(mean, deviation) & (deviation > 0)).sum())
    if not number:
        return None
    return (
        f"taken for constant: {counted(number, 'feature')} of {x.feature.dim:,} in {x.feature.name}, as beside the "
        "others they vary by no more than rounding; if that is a signal, scale them first"
    )


def _constant(mean: Floats, deviation: Floats) -> Flags:
    return np.asarray(deviation <= np.maximum(1e-6 * np.abs(mean), rounding(mean, deviation)))


def _mean_and_deviation(x: Features, weight: Array | None) -> tuple[Floats, Floats]:
    dim = x.feature.dim
    total, squares, mass, seen = np.zeros(dim), np.zeros(dim), 0.0, 0
    weights = None if weight is None else x.of_vectors(weight)
    shift: Floats | None = None
    for vectors in x.vectors():
        if shift is None:  # shifted, so that a large mean costs no digits
            shift = vectors[:1].astype(np.float64)
        centred = vectors - shift.astype(np.float32)
        if weights is None:
            total += centred.sum(axis=0, dtype=np.float64)
            squares += np.einsum("nd,nd->d", centred, centred, dtype=np.float64, casting="unsafe")
            mass += len(vectors)
        else:
            own = weights[seen : seen + len(vectors)]
            total += own @ centred.astype(np.float64)
            squares += own @ np.square(centred, dtype=np.float64)
            mass += float(own.sum())
        seen += len(vectors)
    if shift is None:
        raise FeatureError("there are no features to standardise")
    mean = total / mass
    deviation = np.sqrt(np.maximum(squares / mass - mean**2, 0.0))
    return mean + shift[0], deviation


def class_weights(
    specs: Sequence[TrainSpec], y: Array, task: Task, class_names: Sequence[str]
) -> npt.NDArray[np.float32] | None:
    """Return the class weights of K heads, float32 [K, C], or None where no head has any.

    ``balanced`` weighs a class by N / (C * its rows) as scikit-learn does, a label of a multi-label task by how many
    rows lack it for each that has it. Raises ``SpecError`` for names that are not classes or for a regression.
    """
    if all(spec.class_weight is None for spec in specs):
        return None
    if task is REGRESSION:
        raise SpecError("class_weight is for classes, and this is a regression: drop it")
    return np.stack([_weights(spec.class_weight, y, task, class_names) for spec in specs]).astype(np.float32)


def _weights(given: str | Mapping[str, float] | None, y: Array, task: Task, names: Sequence[str]) -> Floats:
    if given is None:
        return np.ones(len(names))
    if isinstance(given, str):
        if task is MULTILABEL:
            on = (y == 1).sum(axis=0)
            return np.asarray((len(y) - on) / np.maximum(on, 1))
        rows = np.bincount(y, minlength=len(names))
        present = int((rows > 0).sum())
        return np.where(rows > 0, rows.sum() / (present * np.maximum(rows, 1)), 1.0)
    if unknown := sorted(set(given) - set(names)):
        known = ", ".join(map(repr, names[:20]))
        raise SpecError(f"class_weight names {unknown[0]!r}, which is not a class: the classes are {known}")
    weights = np.array([float(given.get(name, 1.0)) for name in names])
    for name, weight in zip(names, weights.tolist(), strict=True):
        if not 0 <= weight < np.inf:
            raise SpecError(f"class_weight is {weight:g} for {name!r}: expected a finite number of 0 or more")
    if task is CLASSIFICATION and not weights[np.unique(y)].any():
        raise TrainingError("class_weight leaves no row with a weight: give some class a weight above 0")
    return weights
