"""Heads that scikit-learn fits: from features to one matrix, or to an estimator where it is none.

Whatever is linear becomes a weight [C, D] and a bias [C] with the standardisation, and any projection, folded in. What
such a head says are logits, and their softmax (their sigmoid for each label) is its probability. For logistic
regression and LDA that is the estimator's own ``predict_proba``. Of two classes scikit-learn has one decision value z;
it becomes the logits (-z/2, z/2), whose softmax is sigmoid(z). A support vector machine and ridge classification know
no probabilities: theirs are a softmax of decision values, right in their order, and worth something only at the
temperature that is fitted on validation.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedcache.errors import EmbedcacheError, FeatureError, SpecError, TrainingError
from embedcache.heads.registry import checked_kind
from embedcache.heads.sklearn_io import load_estimator, save_estimator
from embedcache.heads.sklearn_kinds import Kind, Setting
from embedcache.heads.sklearn_outputs import outputs
from embedcache.spec import HeadSpec, TaskName
from embedcache.train.data import rounding

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Matrix = tuple[Floats, Floats]

NEVER = -1e4
"""The logit of a class that training never saw: its probability is 0, at any temperature there may be."""


@dataclass(frozen=True, eq=False)
class FittedSklearn:
    """What scikit-learn made of the features.

    Attributes:
        task: what it was fitted to.
        classes: how many outputs it has.
        linear: weight float64 [C, D] and bias float64 [C], for raw features; None where the head is not linear.
        estimator: the fitted pipeline where it is not, for ``save_estimator``.
        notes: what people should know: no convergence, labels that never change.
    """

    task: TaskName
    classes: int
    linear: Matrix | None
    estimator: Any
    notes: tuple[str, ...]

    def outputs(self, x: Array) -> Floats:
        """Return uncalibrated probabilities float64 [N, C], or values [N, R], for features [N, D]."""
        if self.linear is None:
            return outputs(self.estimator, x, self.task, self.classes)
        weight, bias = self.linear
        logits = np.asarray(x, np.float64) @ weight.T + bias
        if self.task == "regression":
            return np.asarray(logits)
        if self.task == "multilabel":
            return np.asarray(0.5 * (1 + np.tanh(0.5 * logits)))
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(p / p.sum(axis=1, keepdims=True))


def fit_sklearn(
    head: HeadSpec,
    x: Array,
    y: Array,
    *,
    task: TaskName,
    classes: int,
    seed: int = 0,
    standardize: bool = True,
    class_weight: str | Array | None = None,
    sample_weight: Array | None = None,
    l2: float = 1.0,
) -> FittedSklearn:
    """Fit a head. The same arguments give the same bits.

    Args:
        head: kind and options, see ``embedcache.heads.sklearn_kinds``.
        x: features float32 [N, D]; what is linear is fitted in float64.
        y: int64 [N], uint8 [N, C] or float64 [N, R], without unlabelled rows.
        classes: C, or R.
        standardize: whether features get mean 0 and variance 1 first.
        class_weight: ``balanced``, or float [C]: the weight of each class, for several labels of each that is on.
        sample_weight: float [N].
        l2: strength of the penalty of linear heads, ``l2 / 2 ||W||^2`` beside the sum of losses.

    Raises ``SpecError`` for a kind, option or weight that cannot be, ``FeatureError`` for features of another shape or
    that are not finite, ``TrainingError`` for labels from which nothing can be learnt.
    """
    kind, options = checked_kind(head, task)
    x = _features(head.kind, x)
    y = _targets(y, len(x), task, classes)
    if task == "classification" and head.kind != "majority" and len(np.unique(y)) < 2:
        raise TrainingError("every training row is of the same class: a head needs rows of two or more")
    rows, labels = _weights(head.kind, kind, y, task, classes, class_weight, sample_weight)
    setting = Setting(task, float(l2), seed, len(x), x.shape[1])
    if head.kind == "majority":
        return FittedSklearn(task, classes, _majority(y, task, classes, x.shape[1], rows, labels), None, ())

    def build() -> Any:
        return kind.build(setting, options)

    notes: list[str] = []
    linear, estimator = None, None
    with _heard(notes):
        if kind.linear:
            linear = _linear(build, x, y, task, classes, standardize, rows, labels, notes, sample_weight)
        else:
            scaled = standardize and kind.scaled
            estimator = _estimator(build, x, y, task, classes, scaled, rows, labels, sample_weight)
    if head.kind == "knn" and options["n_neighbors"] > len(x):
        notes.append(f"knn asks for {options['n_neighbors']} neighbours and has {len(x)} rows: it uses them all")
    return FittedSklearn(task, classes, linear, estimator, tuple(dict.fromkeys(notes)))


@contextmanager
def _heard(notes: list[str]) -> Iterator[None]:
    """Turn the warnings of scikit-learn into notes, one line each."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        yield
    for warning in heard:
        text = str(warning.message).strip()
        if warning.category.__name__ == "ConvergenceWarning":
            first = text.splitlines()[0].split(". ")[0].rstrip(".")
            text = f"the solver did not converge ({first}): raise max_iter, or standardize the features"
        elif text.startswith("Only one sample available"):
            text = "a class has a single training row, from which its spread cannot be estimated: it is taken for 0"
        notes.append(" ".join(text.split()))


def _features(kind: str, x: Any) -> Array:
    shape = getattr(x, "shape", None)
    if isinstance(x, tuple) or hasattr(x, "offsets") or (shape is not None and len(shape) != 2):
        what = f"an array {list(shape)}" if shape is not None else "tokens"
        raise FeatureError(
            f"{kind} of scikit-learn reads one vector a row [N, D], and got {what}: choose a feature set such as mean, "
            "or the head attention or attention-pooling"
        )
    rows: Array = np.asarray(x)
    if not len(rows):
        raise TrainingError("there is no training row")
    if rows.dtype not in (np.float32, np.float64):
        rows = rows.astype(np.float32)
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise FeatureError(f"features are NaN or infinite in row {int(finite.argmin())}: extract them again")
    return rows


def _targets(given: Any, rows: int, task: TaskName, classes: int) -> Array:
    y: Array = np.asarray(given)
    y = y[:, None] if task == "regression" and y.ndim == 1 else y
    expected = (rows,) if task == "classification" else (rows, classes)
    if y.shape != expected:
        raise SpecError(f"y has the shape {list(y.shape)}, expected {list(expected)} for {task}")
    if task == "regression":
        y = y.astype(np.float64)
        if not np.isfinite(y).all():
            raise TrainingError(f"row {int((~np.isfinite(y)).any(axis=1).argmax())} has no finite target")
        return y
    y = y.astype(np.int64)
    if y.min() < 0 or y.max() >= (classes if task == "classification" else 2):
        raise TrainingError(f"labels go from {y.min()} to {y.max()}: leave rows without label out")
    return y


def _weights(
    name: str, kind: Kind, y: Array, task: TaskName, classes: int, class_weight: str | Array | None, rows: Array | None
) -> tuple[Floats | None, Floats | None]:
    """Return the weight of each row [N], and of several labels that of each that is on [C]; None for equal ones."""
    if rows is not None:
        rows = np.asarray(rows, np.float64)
        if rows.shape != y.shape[:1] or not np.isfinite(rows).all() or rows.min() < 0 or not rows.any():
            raise SpecError(f"sample_weight: expected {len(y)} numbers of 0 or more, and one above 0")
    labels: Floats | None = None
    if class_weight is not None:
        if task == "regression":
            raise SpecError("class_weight is for classes, and this is a regression: drop it")
        labels = _class_weights(y, task, classes, class_weight, rows)
        if task == "classification":
            own, labels = labels[y], None
            rows = own if rows is None else own * rows
            if not rows.any():
                raise TrainingError("class_weight leaves no row with a weight: give some class a weight above 0")
    if rows is not None and (rows == rows[0]).all() and (rows[0] == 1 or not kind.weights):
        rows = None
    if (rows is not None or labels is not None) and not kind.weights:
        raise SpecError(f"{name} cannot weigh rows or classes: drop class_weight and sample weights")
    if labels is not None and name == "mlp" and classes > 1:
        raise SpecError("mlp of scikit-learn cannot weigh labels: drop class_weight, or use the engine torch")
    return rows, labels


def _class_weights(y: Array, task: TaskName, classes: int, given: str | Array, rows: Floats | None) -> Floats:
    if isinstance(given, str):
        if given != "balanced":
            raise SpecError(f"class_weight is {given!r}: expected balanced, or a weight for each class")
        one = np.ones(len(y)) if rows is None else rows
        if task == "multilabel":
            on = one @ y
            return np.asarray((one.sum() - on) / np.where(on > 0, on, 1))
        mass = np.bincount(y, one, classes)
        return np.asarray(mass.sum() / ((mass > 0).sum() * np.where(mass > 0, mass, 1)))
    weights = np.asarray(given, np.float64)
    if weights.shape != (classes,) or not np.isfinite(weights).all() or weights.min() < 0:
        raise SpecError(f"class_weight: expected {classes} numbers of 0 or more")
    return weights


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Raise ``TrainingError`` for what scikit-learn cannot fit."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, EmbedcacheError):
            raise
        said = " ".join(str(error).split())
        if "least populated class" in said:  # heads that hold rows out for their own early stopping
            said = (
                "a class has a single row, and early_stopping holds some of each class out: "
                "add rows of it, or leave early_stopping out"
            )
        raise TrainingError(said) from None


def _fit(estimator: Any, x: Array, y: Array, rows: Floats | None) -> Any:
    """Fit an estimator, its last step with the weights of rows if there are any."""
    if rows is None:
        with _in_one_line():
            return estimator.fit(x, y)
    name = "sample_weight"
    if hasattr(estimator, "steps"):
        name = f"{estimator.steps[-1][0]}__{name}"
    try:
        with _in_one_line():
            return estimator.fit(x, y, **{name: rows})
    except TypeError as error:
        if "sample_weight" not in str(error):
            raise
        raise SpecError("this version of scikit-learn cannot weigh rows for that head: upgrade it") from None


def _linear(
    build: Any, x: Array, y: Array, task: TaskName, classes: int, standardize: bool, rows: Floats | None,
    labels: Floats | None, notes: list[str], sample_weight: Array | None,
) -> Matrix:  # fmt: skip
    stored, x = x.dtype, x.astype(np.float64)
    dim = x.shape[1]
    mean, scale = np.zeros(dim), np.ones(dim)
    if standardize:
        scaler = _scaler(x, sample_weight, stored, copy=False)
        mean, scale = scaler.mean_, scaler.scale_
        x = scaler.transform(x)
    if task == "classification":
        weight, bias = _one_of(build(), x, y, classes, rows)
    elif task == "regression":
        weight, bias = _matrix(_fit(build(), x, y, rows), classes)
    else:
        weight, bias = np.zeros((classes, dim)), np.zeros(classes)
        constant = []
        for label in range(classes):
            on = y[:, label]
            if on.min() == on.max():
                constant.append(label)
                bias[label] = _log_odds(float(on.sum()), float(len(on)))
                continue
            mine = rows
            if labels is not None:
                mine = np.where(on == 1, labels[label], 1.0) * (1.0 if rows is None else rows)
            (weight[label],), (bias[label],) = _matrix(_fit(build(), x, on, mine), 1)
        if constant:
            notes.append(f"{len(constant)} of {classes} labels are the same in every training row: nothing is learnt")
    weight = weight / scale
    return weight, bias - weight @ mean


def _one_of(estimator: Any, x: Array, y: Array, classes: int, rows: Floats | None) -> Matrix:
    """Fit one of the classes that are there; the others get ``NEVER``."""
    present = np.unique(y)
    found, constant = _matrix(
        _fit(estimator, x, np.searchsorted(present, y), rows), 1 if len(present) == 2 else len(present)
    )
    if len(present) == 2:
        found, constant = np.vstack([-found / 2, found / 2]), np.concatenate([-constant / 2, constant / 2])
    weight, bias = np.zeros((classes, x.shape[1])), np.full(classes, NEVER)
    weight[present], bias[present] = found, constant
    return weight, bias


def _matrix(estimator: Any, outputs: int) -> Matrix:
    """Return the weights and biases of a fitted linear estimator, a projection before it folded in."""
    projection = None
    if hasattr(estimator, "steps"):
        projection, estimator = estimator.steps[0][1].components_, estimator.steps[-1][1]
    weight = np.asarray(estimator.coef_, np.float64).reshape(outputs, -1)
    bias = np.broadcast_to(np.asarray(estimator.intercept_, np.float64).ravel(), outputs)
    return weight if projection is None else weight @ projection, np.array(bias)


def _log_odds(on: float, rows: float) -> float:
    """Return the log odds of a label, by the rule of succession where it never changes."""
    if on in (0.0, rows):
        on, rows = on + 1, rows + 2
    return float(np.log(on) - np.log(rows - on))


def _majority(y: Array, task: TaskName, classes: int, dim: int, rows: Floats | None, labels: Floats | None) -> Matrix:
    one = np.ones(len(y)) if rows is None else rows
    if task == "regression":
        bias = one @ y / one.sum()
    elif task == "classification":
        share = np.bincount(y, one, classes) / one.sum()
        bias = np.where(share > 0, np.log(np.maximum(share, 1e-300)), NEVER)
    else:
        weight = np.ones(classes) if labels is None else labels
        on, off = (one @ y) * weight, one @ (1 - y)
        bias = np.array([_log_odds(float(a), float(a + b)) for a, b in zip(on, off, strict=True)])
    return np.zeros((classes, dim)), np.asarray(bias, np.float64)


def _scaler(x: Array, weight: Array | None, stored: npt.DTypeLike, *, copy: bool) -> Any:
    """Return a fitted ``StandardScaler`` that leaves alone what varies by the rounding of ``stored`` only."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler(copy=copy).fit(x, sample_weight=weight)
    deviation = np.sqrt(scaler.var_)
    scaler.scale_[deviation <= rounding(scaler.mean_, deviation, stored)] = 1.0
    return scaler


def _estimator(
    build: Any, x: Array, y: Array, task: TaskName, classes: int, standardize: bool, rows: Floats | None,
    labels: Floats | None, sample_weight: Array | None,
) -> Any:  # fmt: skip
    from sklearn.pipeline import Pipeline

    steps: list[tuple[str, Any]] = []
    if standardize:
        scaler = _scaler(x, sample_weight, x.dtype, copy=True)
        steps, x = [("scale", scaler)], scaler.transform(x)
    head = build()
    alone = type(head).__name__.startswith("HistGradientBoosting")
    if classes == 1 and task != "classification":
        y = y[:, 0]
        rows = rows if labels is None else np.where(y == 1, labels[0], 1.0) * (1.0 if rows is None else rows)
        if task == "multilabel" and y.min() == y.max():
            raise TrainingError("the only label is the same in every training row: nothing can be learnt")
    if alone and y.ndim == 2:
        head = _one_by_one(build, x, y, task, rows, labels)
    else:
        _fit(head, x, y, rows)
    _forget_training(head)
    return Pipeline([*steps, ("head", head)])


def _one_by_one(build: Any, x: Array, y: Array, task: TaskName, rows: Floats | None, labels: Floats | None) -> Any:
    """Fit an estimator that has one output to each column of ``y``; a label that never changes gets a constant."""
    from sklearn.dummy import DummyClassifier
    from sklearn.multioutput import MultiOutputClassifier, MultiOutputRegressor

    several = (MultiOutputRegressor if task == "regression" else MultiOutputClassifier)(build())
    several.estimators_ = []
    for label in range(y.shape[1]):
        mine, weights = y[:, label], rows
        if labels is not None:
            weights = np.where(mine == 1, labels[label], 1.0) * (1.0 if rows is None else rows)
        if task == "multilabel" and mine.min() == mine.max():
            several.estimators_.append(DummyClassifier().fit(x, mine))
            continue
        one = _fit(build(), x, mine, weights)
        _forget_training(one)
        several.estimators_.append(one)
    several.n_features_in_ = x.shape[1]
    if task == "multilabel":
        several.classes_ = [each.classes_ for each in several.estimators_]
    return several


_ONLY_FOR_TRAINING = (
    "_optimizer", "_random_state", "_best_coefs", "_best_intercepts", "loss_curve_", "validation_scores_",
    "_feature_subsample_rng",
)  # fmt: skip


def _forget_training(estimator: Any) -> None:
    """Drop what only training needs: Adam's moments are twice the size of the weights, and would go into the file."""
    for each in (estimator, getattr(estimator, "regressor_", None)):
        for name in _ONLY_FOR_TRAINING:
            if each is not None and name in vars(each):
                delattr(each, name)


__all__ = ["NEVER", "FittedSklearn", "fit_sklearn", "load_estimator", "outputs", "save_estimator"]
