"""Features and targets as training takes them: checked, unlabelled rows dropped, standardised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedcache.errors import FeatureError, InputError, SpecError, TrainingError
from embedcache.heads.trained import checked_features, count, refuse_non_finite
from embedcache.shard import FeatureSet
from embedcache.spec import TaskName, TrainSpec
from embedcache.wording import counted, shortened

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Data:
    """Labelled rows. ``x`` is float32 [N, D] or [N, L, D], (values, offsets), or a reader of rows on disk."""

    x: Any
    y: Array
    weight: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.y)

    @property
    def on_disk(self) -> bool:
        """Whether the features are read as they are needed."""
        return hasattr(self.x, "read")


LARGEST_TARGET = 1e100
"""The largest target: sums of its squares are still numbers."""
_SMALLEST = 1e-37
"""The smallest deviation that has an inverse in float32."""


def checked_data(
    x: Any, y: Any, feature: FeatureSet, task: TaskName, *, weight: Any = None, where: str = "training",
    outputs: int | None = None,
) -> Data:  # fmt: skip
    """Return checked, labelled rows. ``outputs`` is how many classes, labels or targets there are to be.

    Raises ``FeatureError`` for features that do not fit or are not finite (naming the row), ``InputError`` for targets
    that do not fit the task.
    """
    on_disk = hasattr(x, "read")
    rows = x if on_disk else checked_features(x, feature, where=where)
    y = np.asarray(y)
    if y.ndim == 0:
        raise InputError(f"{where}: the targets are {shortened(y.item())}: expected one for each row")
    n = len(rows) if on_disk else count(rows)
    if len(y) != n:
        raise InputError(f"{where}: {counted(n, 'row')} of features and {len(y)} of targets")
    if task == "classification":
        if y.ndim != 1 or y.dtype.kind not in "iu":
            raise InputError(f"{where}: classification targets are int64 [N], got {y.dtype} {y.shape}")
        kept = y >= 0
        beyond = (y < -1) | (y >= outputs if outputs is not None else False)
        if beyond.any():
            row = int(np.flatnonzero(beyond)[0])
            most = "" if outputs is None else f" to {outputs - 1}"
            raise InputError(
                f"{where}: row {row} has the class {int(y[row])}: expected 0{most}, or -1 for a row without label"
            )
        y = y.astype(np.int64)
    elif task == "multilabel":
        if y.ndim != 2:
            raise InputError(f"{where}: multi-label targets are [N, C], got {y.shape}")
        known = (y == 0) | (y == 1)
        kept = ~(y == 255).all(axis=1)
        if not known[kept].all():
            row = int(np.flatnonzero(kept & ~known.all(axis=1))[0])
            raise InputError(
                f"{where}: row {row} has labels other than 0 and 1: a row without labels is 255 throughout"
            )
    else:
        y = y.astype(np.float64)
        y = y[:, None] if y.ndim == 1 else y
        if (huge := (np.abs(y) > LARGEST_TARGET).any(axis=1)).any():
            row = int(np.flatnonzero(huge)[0])
            what = (
                "an infinite target" if np.isinf(y[row]).any() else f"a target beyond {LARGEST_TARGET:g}: scale it down"
            )
            raise InputError(f"{where}: row {row} has {what}")
        kept = ~np.isnan(y).any(axis=1)
        if np.isnan(y[~kept]).any() and not np.isnan(y[~kept]).all():
            bad = int(np.flatnonzero(np.isnan(y).any(axis=1) & ~np.isnan(y).all(axis=1))[0])
            raise InputError(f"{where}: row {bad} has a target that is NaN: give it a number, or leave the row out")
    if outputs is not None and y.ndim == 2 and y.shape[1] != outputs:
        raise InputError(f"{where}: targets are {y.shape[1]} wide, and there are {outputs} names for them")
    if weight is not None:
        try:
            weight = np.asarray(weight, np.float32)
        except (TypeError, ValueError):
            raise InputError(f"{where}: sample weights are {shortened(weight)}: expected {n} numbers") from None
        if weight.shape != (n,) or not np.isfinite(weight).all() or (weight < 0).any():
            raise InputError(f"{where}: sample weights must be {n} finite numbers of 0 or more")
        if n and not weight.any():
            raise InputError(f"{where}: every sample weight is 0: expected one above 0")
    if not kept.all():
        at = np.flatnonzero(kept)
        rows, y = choose(rows, at), y[at]
        weight = None if weight is None else weight[at]
    return Data(rows, y, weight)


def checked_names(names: Sequence[Any]) -> tuple[str, ...]:
    """Return class names as text, whole numbers as their digits. Raises ``SpecError`` for others, and for one twice."""
    if isinstance(names, str):
        raise SpecError(f"class_names is {names!r}: expected a list of names")
    found = []
    for name in names:
        if not isinstance(name, (str, int, np.integer)) or isinstance(name, bool):
            raise SpecError(f"class_names holds {name!r} of type {type(name).__name__}: expected texts")
        found.append(str(name))
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise SpecError(f"class_names holds {twice!r} twice: expected each class once")
    return tuple(found)


def choose(x: Any, rows: npt.NDArray[np.int64]) -> Any:
    """Return some rows of features, as the same sort of thing."""
    if isinstance(x, tuple):
        values, offsets = x
        lengths = (offsets[1:] - offsets[:-1])[rows]
        ends = np.concatenate([[0], np.cumsum(lengths)])
        starts = np.repeat(offsets[:-1][rows] - ends[:-1], lengths)
        return values[np.arange(int(ends[-1])) + starts], ends
    if hasattr(x, "read"):
        return _Chosen(x, rows)
    return x[rows]


class _Chosen:
    """Some rows of a reader."""

    def __init__(self, reader: Any, rows: npt.NDArray[np.int64]) -> None:
        self._reader, self._rows = reader, rows
        self.row_shape = reader.row_shape

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, rows: npt.NDArray[np.int64]) -> Any:
        return self._reader.read(self._rows[rows])


def refuse_untrainable(data: Data, task: TaskName, class_names: Sequence[str]) -> list[str]:
    """Return what is worth saying of the training rows.

    Raises ``TrainingError`` for no rows, one class only, or fewer rows than classes.
    """
    if not len(data):
        raise TrainingError("there is no labelled row to train on")
    if task == "classification":
        present = np.unique(data.y)
        if len(present) < 2:
            only = class_names[int(present[0])]
            raise TrainingError(f"all {len(data)} training rows have the class {only!r}: expected at least two classes")
        if len(data) < len(class_names):
            raise TrainingError(f"there are {len(data)} training rows for {len(class_names)} classes: add rows")
        absent = [name for at, name in enumerate(class_names) if at not in set(present.tolist())]
        return [f"no training row has the class {', '.join(map(repr, absent))}"] if absent else []
    if task == "multilabel":
        never = [name for name, on in zip(class_names, (data.y == 1).any(axis=0), strict=True) if not on]
        if len(never) == len(class_names):
            raise TrainingError("no training row has any label: expected at least one")
        return [f"no training row has the label {', '.join(map(repr, never))}"] if never else []
    if len(data) < 2:
        raise TrainingError("there is one training row: expected at least two")
    return []


def moments(
    x: Any, feature: FeatureSet, weight: Array | None = None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the mean and 1 / standard deviation of each feature, float32 [D]; constant features get a scale of 1.

    Constant is what varies by no more than ``rounding``.
    ``weight`` [N] are weights of the rows: a row of weight 2 counts as two. Raises ``FeatureError`` where features on
    disk are not finite.
    """
    mean, scale = exact_moments(x, feature, weight)
    return mean.astype(np.float32), scale.astype(np.float32)


def rounding(mean: Floats, deviation: Floats, dtype: npt.DTypeLike = np.float32) -> float:
    """Return how far a feature may vary by rounding alone, in rows of ``dtype`` with these moments [D].

    That is the unit in the last place of the length of a row whose components are all as large as the ninth decile of
    those there are: one column with time stamps does not make constants of the others.

    A dead unit of a backbone varies by 1e-8 where others vary by 0.05. Scaled to unit variance it would be noise with
    a weight of millions: another machine's rounding, or a step of fine-tuning, would turn predictions over.
    """
    size = np.sort(np.hypot(mean, deviation))
    return max(float(np.finfo(dtype).eps * size[int(0.9 * (len(size) - 1))] * np.sqrt(len(size))), _SMALLEST)


def exact_moments(x: Any, feature: FeatureSet, weight: Array | None = None) -> tuple[Floats, Floats]:
    """Return what ``moments`` does before it is rounded, float64 [D]: one pass in blocks, whatever the size."""
    mean, deviation = _mean_and_deviation(x, feature, weight)
    constant = _constant(mean, deviation)
    return mean, np.where(constant, 1.0, 1.0 / np.where(constant, 1.0, deviation))


def constants_note(x: Any, feature: FeatureSet) -> str | None:
    """Return a line about features that do vary, and yet are taken for constants; None where there are none."""
    mean, deviation = _mean_and_deviation(x, feature, None)
    number = int((_constant(mean, deviation) & (deviation > 0)).sum())
    if not number:
        return None
    return (
        f"taken for constant: {counted(number, 'feature')} of {feature.dim:,} in {feature.name}, as beside the others "
        "they vary by no more than rounding; if that is a signal, scale them first"
    )


def _constant(mean: Floats, deviation: Floats) -> npt.NDArray[np.bool_]:
    return np.asarray(deviation <= np.maximum(1e-6 * np.abs(mean), rounding(mean, deviation)))


def _mean_and_deviation(x: Any, feature: FeatureSet, weight: Array | None) -> tuple[Floats, Floats]:
    dim = feature.dim
    total, squares, rows, seen = np.zeros(dim), np.zeros(dim), 0.0, 0
    weights = None if weight is None else _vector_weights(x, feature, weight)
    shift: Array | None = None
    for part in _parts(x):
        flat = part.reshape(-1, dim)
        if hasattr(x, "read"):
            refuse_non_finite(flat, feature.name)
        if shift is None:  # shifted, so that a large mean costs no digits
            shift = flat[:1].astype(np.float64)
        centred = flat - shift.astype(np.float32)
        if weights is None:
            total += centred.sum(axis=0, dtype=np.float64)
            squares += np.einsum("nd,nd->d", centred, centred, dtype=np.float64, casting="unsafe")
            rows += len(flat)
        else:
            mine = weights[seen : seen + len(flat)]
            total += mine @ centred.astype(np.float64)
            squares += mine @ np.square(centred, dtype=np.float64)
            rows += float(mine.sum())
        seen += len(flat)
    if shift is None:
        raise FeatureError("there are no features to standardise")
    mean = total / rows
    deviation = np.sqrt(np.maximum(squares / rows - mean**2, 0.0))
    return mean + shift[0], deviation


def _vector_weights(x: Any, feature: FeatureSet, weight: Array) -> Floats:
    """Return the weight of each vector: that of its row."""
    return np.repeat(np.asarray(weight, np.float64), np.diff(x[1]) if isinstance(x, tuple) else feature.layers)


def _parts(x: Any) -> Any:
    if hasattr(x, "read"):
        size = max(1, (16 << 20) // (4 * int(np.prod(x.row_shape))))
        for start in range(0, len(x), size):
            yield x.read(np.arange(start, min(start + size, len(x))))
        return
    values = x[0] if isinstance(x, tuple) else x
    size = max(1, (4 << 20) // max(1, values[:1].nbytes))
    for start in range(0, len(values), size):
        yield values[start : start + size]


def class_weights(
    specs: Sequence[TrainSpec], y: npt.NDArray[Any], task: TaskName, class_names: Sequence[str]
) -> npt.NDArray[np.float32] | None:
    """Return the class weights of K heads, float32 [K, C], or None where no head has any.

    ``balanced`` weighs a class by N / (C * its rows) as scikit-learn does, a label of a multi-label task by how many
    rows lack it for each that has it. Raises ``SpecError`` for names that are no classes or for a regression.
    """
    if all(spec.class_weight is None for spec in specs):
        return None
    if task == "regression":
        raise SpecError("class_weight is for classes, and this is a regression: drop it")
    return np.stack([_weights(spec.class_weight, y, task, class_names) for spec in specs]).astype(np.float32)


def _weights(given: str | Mapping[str, float] | None, y: Any, task: TaskName, names: Sequence[str]) -> Any:
    if given is None:
        return np.ones(len(names))
    if isinstance(given, str):
        if task == "multilabel":
            on = (y == 1).sum(axis=0)
            return (len(y) - on) / np.maximum(on, 1)
        rows = np.bincount(y, minlength=len(names))
        present = int((rows > 0).sum())
        return np.where(rows > 0, rows.sum() / (present * np.maximum(rows, 1)), 1.0)
    if unknown := sorted(set(given) - set(names)):
        known = ", ".join(map(repr, names[:20]))
        raise SpecError(f"class_weight names {unknown[0]!r}, which is no class: the classes are {known}")
    weights = np.array([float(given.get(name, 1.0)) for name in names])
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise SpecError("class_weight holds a value that is no weight: expected numbers of 0 or more")
    if task == "classification" and not weights[np.unique(y)].any():
        raise TrainingError("class_weight leaves no row with a weight: give some class a weight above 0")
    return weights
