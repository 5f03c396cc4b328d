"""Heads that scikit-learn fits: which there are, what they can do, their options, and what their estimators say.

==========================  ==================================================================================
``logistic-regression``     multinomial; one-vs-rest for several labels; ridge regression for numbers
``linear``                  the same by another name
``linear-svm``              squared hinge, one-vs-rest
``ridge``                   squared error, of +1 and -1 for classes
``lda``                     linear discriminant analysis, shrunk by Ledoit and Wolf's rule
``knn``                     nearest neighbours, brute force
``mlp``                     scikit-learn's multi-layer perceptron, Adam
``hist-gradient-boosting``  histogram gradient boosting, one model a label
``majority``                how often each class is in training, whatever the features; the mean for numbers
``random-projection``       logistic or ridge regression on a Gaussian projection of the features to 8 dimensions
==========================  ==================================================================================

The last two are baselines: the first shows what is won without features, the second how little of them does. All that
are linear become two arrays (see ``embedcache.train.sklearn_engine``); the others are saved by skops (``sklearn_io``).

Importing this loads neither scikit-learn nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedcache.errors import BundleError, FeatureError, SpecError
from embedcache.heads.registry import refuse_unknown_options
from embedcache.heads.sklearn_io import dump_estimator, load_estimator, save_estimator
from embedcache.spec import TASKS, HeadSpec, TaskName

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Option:
    """One option of a head: its default, which values there may be, and the same in words."""

    default: Any
    allowed: Callable[[Any], bool]
    expected: str


@dataclass(frozen=True)
class Setting:
    """What an estimator is built for: the task, strength of the penalty, seed, training rows and features."""

    task: TaskName
    l2: float
    seed: int
    rows: int
    dim: int


Build = Callable[[Setting, Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Kind:
    """A kind of head.

    Attributes:
        tasks: what it can do.
        linear: whether it comes to one matrix; ``build`` then makes the estimator of one label, or of all classes.
        weights: whether rows can weigh differently; ``estimator`` if that depends on the version of scikit-learn.
        scaled: whether standardising the features changes what it learns.
        options: by name.
        build: makes the estimator, not yet fitted.
    """

    tasks: tuple[TaskName, ...]
    linear: bool
    options: Mapping[str, Option]
    build: Build
    weights: bool = True
    scaled: bool = True


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _positive(default: float | None) -> Option:
    return Option(
        default, lambda value: (value is None and default is None) or (_is_number(value) and value > 0), "above 0"
    )


def _not_negative(default: float | None) -> Option:
    return Option(
        default, lambda value: (value is None and default is None) or (_is_number(value) and value >= 0), "0 or above"
    )


def _count(default: int | None, least: int = 1) -> Option:
    def allowed(value: Any) -> bool:
        return (value is None and default is None) or (_is_number(value) and value == int(value) and value >= least)

    return Option(default, allowed, f"a whole number of at least {least}")


def _choice(default: Any, *others: Any) -> Option:
    values = (default, *others)
    return Option(default, lambda value: isinstance(value, str) and value in values, " or ".join(values))


def _widths(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(_count(1).allowed(each) for each in value)


def _shrinkage(value: Any) -> bool:
    return value is None or value == "auto" or (_is_number(value) and 0 <= value <= 1)


def _penalty(setting: Setting, options: Mapping[str, Any]) -> float:
    """Return the strength of the penalty: ``alpha``, or 1 / ``C``, or the ``l2`` of training."""
    if options.get("alpha") is not None:
        return float(options["alpha"])
    return 1 / float(options["C"]) if options.get("C") is not None else setting.l2


def _logistic(setting: Setting, options: Mapping[str, Any]) -> Any:
    penalty = _penalty(setting, options)
    if setting.task == "regression":
        return _ridge_regression(penalty)
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(
        C=1 / penalty if penalty else math.inf, max_iter=int(options["max_iter"]), tol=float(options["tol"])
    )


def _ridge_regression(penalty: float, **options: Any) -> Any:
    from sklearn.linear_model import Ridge

    return Ridge(alpha=penalty, **options)


def _svm(setting: Setting, options: Mapping[str, Any]) -> Any:
    from sklearn.svm import LinearSVC

    penalty = _penalty(setting, options)
    if not penalty:
        raise SpecError("linear-svm needs a penalty: expected an l2 above 0")
    return LinearSVC(
        C=1 / penalty,
        dual="auto",
        max_iter=int(options["max_iter"]),
        tol=float(options["tol"]),
        random_state=setting.seed,
    )


def _ridge(setting: Setting, options: Mapping[str, Any]) -> Any:
    from sklearn.linear_model import RidgeClassifier

    penalty = _penalty(setting, options)
    if setting.task == "regression":
        return _ridge_regression(penalty, solver=options["solver"])
    return RidgeClassifier(alpha=penalty, solver=options["solver"])


def _lda(setting: Setting, options: Mapping[str, Any]) -> Any:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    svd = options["solver"] == "svd"
    if svd and options["shrinkage"] not in (None, "auto"):
        raise SpecError("lda: the solver svd cannot shrink: leave shrinkage out, or use lsqr or eigen")
    return LinearDiscriminantAnalysis(solver=options["solver"], shrinkage=None if svd else options["shrinkage"])


def _knn(setting: Setting, options: Mapping[str, Any]) -> Any:
    from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

    # Brute force: in hundreds of dimensions no tree helps, and a tree in a file would have to be trusted.
    made = KNeighborsRegressor if setting.task == "regression" else KNeighborsClassifier
    return made(
        n_neighbors=min(int(options["n_neighbors"]), setting.rows),
        weights=options["weights"],
        metric=options["metric"],
        algorithm="brute",
    )


def _mlp(setting: Setting, options: Mapping[str, Any]) -> Any:
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    keywords: dict[str, Any] = {
        "hidden_layer_sizes": tuple(int(width) for width in options["hidden"]),
        "activation": options["activation"],
        "alpha": float(options["alpha"]),
        "learning_rate_init": float(options["learning_rate"]),
        "max_iter": int(options["max_iter"]),
        "random_state": setting.seed,
    }
    if setting.task != "regression":
        return MLPClassifier(**keywords)
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.preprocessing import StandardScaler

    # Adam with one learning rate for all cannot reach targets of any size.
    return TransformedTargetRegressor(MLPRegressor(**keywords), transformer=StandardScaler())


def _boosting(setting: Setting, options: Mapping[str, Any]) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    whole = ("max_iter", "max_leaf_nodes", "max_depth", "min_samples_leaf")
    keywords = {name: int(value) if name in whole and value is not None else value for name, value in options.items()}
    made = HistGradientBoostingRegressor if setting.task == "regression" else HistGradientBoostingClassifier
    return made(early_stopping=False, random_state=setting.seed, categorical_features=None, **keywords)


def _projection(setting: Setting, options: Mapping[str, Any]) -> Any:
    from sklearn.pipeline import Pipeline
    from sklearn.random_projection import GaussianRandomProjection

    projection = GaussianRandomProjection(min(int(options["dims"]), setting.dim), random_state=setting.seed)
    return Pipeline([("project", projection), ("head", _logistic(setting, options))])


def _majority(setting: Setting, options: Mapping[str, Any]) -> Any:
    return None  # counted by the engine: there is nothing to fit


_CLASSES: tuple[TaskName, ...] = ("classification", "multilabel")
_SOLVED = {"C": _positive(None), "max_iter": _count(1000), "tol": _positive(1e-4)}

KINDS: Mapping[str, Kind] = {
    "linear": Kind(TASKS, True, _SOLVED, _logistic),
    "logistic-regression": Kind(TASKS, True, _SOLVED, _logistic),
    "linear-svm": Kind(
        _CLASSES, True, {"C": _positive(None), "max_iter": _count(10_000), "tol": _positive(1e-4)}, _svm
    ),
    "ridge": Kind(
        TASKS, True, {"alpha": _not_negative(None), "solver": _choice("auto", "svd", "cholesky", "lsqr")}, _ridge
    ),
    "lda": Kind(
        _CLASSES,
        True,
        {
            "solver": _choice("lsqr", "eigen", "svd"),
            "shrinkage": Option("auto", _shrinkage, "auto, null or a number in [0, 1]"),
        },
        _lda,
        weights=False,
    ),
    "knn": Kind(
        TASKS,
        False,
        {
            "n_neighbors": _count(10),
            "weights": _choice("uniform", "distance"),
            "metric": _choice("cosine", "euclidean", "manhattan"),
        },
        _knn,
        weights=False,
    ),
    "mlp": Kind(
        TASKS,
        False,
        {
            "hidden": Option((100,), _widths, "a list of widths such as [100]"),
            "activation": _choice("relu", "tanh", "logistic"),
            "alpha": _not_negative(1e-4),
            "learning_rate": _positive(1e-3),
            "max_iter": _count(200),
        },
        _mlp,
    ),
    "hist-gradient-boosting": Kind(
        TASKS,
        False,
        {
            "learning_rate": _positive(0.1),
            "max_iter": _count(100),
            "max_leaf_nodes": _count(31, 2),
            "max_depth": _count(None),
            "min_samples_leaf": _count(20),
            "l2_regularization": _not_negative(0.0),
        },
        _boosting,
        scaled=False,
    ),
    "majority": Kind(TASKS, True, {}, _majority, scaled=False),
    "random-projection": Kind(TASKS, True, {"dims": _count(8), **_SOLVED}, _projection),
}
"""Every kind of head that scikit-learn fits; a new one is a line here and a function that builds its estimator.

Options that are None by default follow the training settings: ``C`` is 1 / ``l2``, ``alpha`` is ``l2``, and the
squared error of ridge regression is not halved, as scikit-learn has it.
"""


def option_names(kind: str) -> tuple[str, ...]:
    """Return the names of the options of a kind. Raises ``SpecError`` for a kind there is not."""
    return tuple(_kind(kind).options)


def _kind(name: str) -> Kind:
    from embedcache.heads.registry import engine_of

    if name not in KINDS and engine_of(name) == "torch":
        raise SpecError(f"the head {name} is torch's: expected one of {', '.join(KINDS)}, or the engine torch")
    return KINDS[name]


def checked_kind(head: HeadSpec, task: TaskName) -> tuple[Kind, dict[str, Any]]:
    """Return a head's kind, and all its options, given or by default.

    Raises ``SpecError`` for a kind there is not, a task it cannot do, an option it has not, or an impossible value.
    """
    kind = _kind(head.kind)
    if task not in kind.tasks:
        able = ", ".join(name for name, each in KINDS.items() if task in each.tasks)
        raise SpecError(f"the head {head.kind} cannot do {task}: expected one of {able}")
    refuse_unknown_options(head, tuple(kind.options))
    options = {}
    for name, option in kind.options.items():
        options[name] = value = head.options.get(name, option.default)
        if not option.allowed(value):
            raise SpecError(f"{head.kind}: {name} is {value!r}, expected {option.expected}")
    return kind, options


def outputs(estimator: Any, x: Array, task: TaskName, classes: int) -> Floats:
    """Return what a fitted estimator says of features ``x`` [N, D]: probabilities [N, C], or values [N, R].

    A class that training did not have gets a column of zeros; a label that was the same in every row of training gets
    that, 0 or 1. Raises ``FeatureError`` for features of another shape, ``BundleError`` for an estimator that does
    not fit the task.
    """
    x = np.asarray(x)
    expected = getattr(estimator, "n_features_in_", None)
    if x.ndim != 2 or x.shape[1] != expected:
        raise FeatureError(f"got features of shape {x.shape}, expected [N, {expected}]")
    try:
        if not len(x):
            return np.zeros((0, classes))
        if task == "regression":
            values = np.asarray(estimator.predict(x), np.float64).reshape(len(x), -1)
        elif task == "classification":
            values = _spread(estimator.predict_proba(x), estimator.classes_, classes)
        else:
            values = _labels(estimator, x, classes)
    except (ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise BundleError(f"the estimator does not fit {task} with {classes} outputs: {str(error)[:200]}") from error
    if values.shape != (len(x), classes):
        raise BundleError(f"the estimator has {values.shape[1]} outputs, expected {classes}")
    return values


def _spread(p: Array, present: Array, classes: int) -> Floats:
    present = np.asarray(present, np.int64)
    if len(np.unique(present)) != p.shape[1] or not ((present >= 0) & (present < classes)).all():
        raise ValueError(f"its classes are {present.tolist()}")
    spread = np.zeros((len(p), classes))
    spread[:, present] = p
    return spread


def _labels(estimator: Any, x: Array, classes: int) -> Floats:
    """Return probabilities [N, C] from what scikit-learn gives: one array, or one [N, 1 or 2] for each label."""
    p = estimator.predict_proba(x)
    present = estimator.classes_
    if not isinstance(p, list):
        if classes > 1:
            return np.asarray(p, np.float64)
        p, present = [p], [present]
    return np.stack([_spread(each, own, 2)[:, 1] for each, own in zip(p, present, strict=True)], axis=1)


__all__ = [
    "KINDS",
    "Kind",
    "Option",
    "Setting",
    "checked_kind",
    "dump_estimator",
    "load_estimator",
    "option_names",
    "outputs",
    "save_estimator",
]
