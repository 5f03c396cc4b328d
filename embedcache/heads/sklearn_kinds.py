"""Heads that scikit-learn fits: which there are, what they can do, and their options.

==========================  ==================================================================================
``logistic-regression``     multinomial; one-vs-rest for several labels; ridge regression for numbers
``linear``                  the same by another name
``linear-svm``              squared hinge, one-vs-rest
``ridge``                   squared error, of +1 and -1 for classes
``lda``                     linear discriminant analysis, shrunk by Ledoit and Wolf's rule
``knn``                     the votes of the nearest training rows, which are the head: see ``neighbours``
``nearest-centroid``        the mean of each class, which is one matrix: no training, and classes can be added
``mlp``                     scikit-learn's multi-layer perceptron, Adam
``hist-gradient-boosting``  histogram gradient boosting, one model a label
``majority``                how often each class is in training, whatever the features; the mean for numbers
``random-projection``       logistic or ridge regression on a Gaussian projection of the features to 8 dimensions
==========================  ==================================================================================

The last two are baselines: they show what is reached without features, and with very little of them. Linear heads
become two arrays (see ``embedcache.train.sklearn_engine``), nearest neighbours are the training rows; the others are
saved by skops (``sklearn_io``).

Importing this loads neither scikit-learn nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from embedcache.errors import SpecError
from embedcache.fingerprint import is_number
from embedcache.task import CLASSIFICATION, MULTILABEL, REGRESSION, Task

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator


@dataclass(frozen=True)
class Option:
    """One option of a head: its default, which values there may be, and the same in words."""

    default: object
    allowed: Callable[[object], bool]
    expected: str


class Options(dict[str, object]):
    """All options of a head by name, given or by default, with values that were checked."""

    def number(self, name: str) -> float:
        """Return an option that is a number."""
        value = self[name]
        assert is_number(value)
        return float(value)

    def whole(self, name: str) -> int:
        """Return an option that is a whole number; a grid may have written it as 3.0."""
        return int(self.number(name))

    def widths(self, name: str) -> tuple[int, ...]:
        """Return an option that is a list of whole numbers."""
        values = self[name]
        assert isinstance(values, (list, tuple))
        return tuple(int(value) for value in values)


@dataclass(frozen=True)
class Setting:
    """What an estimator is built for: the task, strength of the penalty, seed, number of features."""

    task: Task
    l2: float
    seed: int
    dim: int

    @property
    def regression(self) -> bool:
        """Whether numbers are to be predicted."""
        return self.task is REGRESSION


Build = Callable[[Setting, Options], "BaseEstimator"]
Fault = Callable[[Mapping[str, object], Options], "str | None"]


@dataclass(frozen=True)
class Kind:
    """A kind of head that scikit-learn fits.

    Attributes:
        tasks: what it can do.
        linear: whether it comes to one matrix; ``build`` then makes the estimator of one label, or of all classes.
        weights: whether rows can weigh differently; ``estimator`` if that depends on the version of scikit-learn.
        scaled: whether standardising the features changes what it learns.
        options: by name.
        build: makes the estimator, not yet fitted; None where there is none.
        fault: what is wrong with options that are each possible, given those that were asked for and all of them.
    """

    tasks: tuple[Task, ...]
    linear: bool
    options: Mapping[str, Option]
    build: Build
    weights: bool = True
    scaled: bool = True
    fault: Fault = lambda asked, options: None


def _in_range(default: float | None, above: Callable[[float], bool], expected: str) -> Option:
    """Return an option that is a finite number in a range, or None where that is the default."""

    def allowed(value: object) -> bool:
        if value is None:
            return default is None
        return is_number(value) and math.isfinite(value) and above(value)

    return Option(default, allowed, expected)


def _positive(default: float | None) -> Option:
    return _in_range(default, lambda value: value > 0, "above 0")


def _not_negative(default: float | None) -> Option:
    return _in_range(default, lambda value: value >= 0, "0 or above")


def _count(default: int | None, least: int = 1) -> Option:
    expected = f"a whole number of at least {least}"
    return _in_range(default, lambda value: value == int(value) and value >= least, expected)


def _choice(default: str, *others: str) -> Option:
    values = (default, *others)
    return Option(default, lambda value: isinstance(value, str) and value in values, " or ".join(values))


def _are_widths(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(_count(1).allowed(width) for width in value)


def _is_shrinkage(value: object) -> bool:
    return value is None or value == "auto" or (is_number(value) and 0 <= value <= 1)


def _penalty(setting: Setting, options: Options) -> float:
    """Return the strength of the penalty: ``alpha``, or 1 / ``C``, or the ``l2`` of training."""
    if options.get("alpha") is not None:
        return options.number("alpha")
    return 1 / options.number("C") if options.get("C") is not None else setting.l2


def _logistic(setting: Setting, options: Options) -> BaseEstimator:
    penalty = _penalty(setting, options)
    if setting.regression:
        from sklearn.linear_model import Ridge

        return Ridge(alpha=penalty)
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(
        C=1 / penalty if penalty else math.inf, max_iter=options.whole("max_iter"), tol=options.number("tol")
    )


def _svm(setting: Setting, options: Options) -> BaseEstimator:
    from sklearn.svm import LinearSVC

    penalty = _penalty(setting, options)
    if not penalty:
        raise SpecError("linear-svm needs a penalty: expected an l2 above 0")
    return LinearSVC(
        C=1 / penalty,
        dual="auto",
        max_iter=options.whole("max_iter"),
        tol=options.number("tol"),
        random_state=setting.seed,
    )


def _ridge(setting: Setting, options: Options) -> BaseEstimator:
    from sklearn.linear_model import Ridge, RidgeClassifier

    estimator = Ridge if setting.regression else RidgeClassifier
    return estimator(alpha=_penalty(setting, options), solver=options["solver"])


def _lda(setting: Setting, options: Options) -> BaseEstimator:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    svd = options["solver"] == "svd"
    if svd and options["shrinkage"] not in (None, "auto"):
        raise SpecError("lda: the solver svd cannot shrink: leave shrinkage out, or use lsqr or eigen")
    return LinearDiscriminantAnalysis(solver=options["solver"], shrinkage=None if svd else options["shrinkage"])


def _no_softmax(asked: Mapping[str, object], options: Options) -> str | None:
    """Return what is wrong with the options of nearest neighbours: a temperature is that of a softmax of cosines."""
    if options["weights"] != "softmax":
        return (
            None if "temperature" not in asked else "temperature goes with weights=softmax: leave it out, or add that"
        )
    metric = options["metric"]
    return None if metric == "cosine" else f"weights=softmax is of cosines, and the metric is {metric}: leave it out"


def _mlp(setting: Setting, options: Options) -> BaseEstimator:
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    network = (MLPRegressor if setting.regression else MLPClassifier)(
        hidden_layer_sizes=options.widths("hidden"),
        activation=options["activation"],
        alpha=options.number("alpha"),
        learning_rate_init=options.number("learning_rate"),
        max_iter=options.whole("max_iter"),
        random_state=setting.seed,
    )
    if not setting.regression:
        return network
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.preprocessing import StandardScaler

    # Adam with one learning rate for all cannot reach targets of any size.
    return TransformedTargetRegressor(network, transformer=StandardScaler())


def _boosting(setting: Setting, options: Options) -> BaseEstimator:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    counts = ("max_iter", "max_leaf_nodes", "max_depth", "min_samples_leaf")
    whole = {name: options.whole(name) for name in counts if options[name] is not None}
    estimator = HistGradientBoostingRegressor if setting.regression else HistGradientBoostingClassifier
    return estimator(early_stopping=False, random_state=setting.seed, categorical_features=None, **{**options, **whole})


def _projection(setting: Setting, options: Options) -> BaseEstimator:
    from sklearn.pipeline import Pipeline
    from sklearn.random_projection import GaussianRandomProjection

    projection = GaussianRandomProjection(min(options.whole("dims"), setting.dim), random_state=setting.seed)
    return Pipeline([("project", projection), ("head", _logistic(setting, options))])


def _nothing(setting: Setting, options: Options) -> None:
    return None  # there is nothing to fit: the engine counts, takes means, or keeps the rows


_CLASSES = (CLASSIFICATION, MULTILABEL)
_TASKS = (*_CLASSES, REGRESSION)
_SOLVED = {"C": _positive(None), "max_iter": _count(1000), "tol": _positive(1e-4)}
_LOGISTIC = {**_SOLVED, "dtype": _choice("float64", "float32")}

KINDS: Mapping[str, Kind] = {
    "linear": Kind(_TASKS, True, _LOGISTIC, _logistic),
    "logistic-regression": Kind(_TASKS, True, _LOGISTIC, _logistic),
    "linear-svm": Kind(
        _CLASSES, True, {"C": _positive(None), "max_iter": _count(10_000), "tol": _positive(1e-4)}, _svm
    ),
    "ridge": Kind(
        _TASKS, True, {"alpha": _not_negative(None), "solver": _choice("auto", "svd", "cholesky", "lsqr")}, _ridge
    ),
    "lda": Kind(
        _CLASSES,
        True,
        {
            "solver": _choice("lsqr", "eigen", "svd"),
            "shrinkage": Option("auto", _is_shrinkage, "auto, null or a number in [0, 1]"),
        },
        _lda,
        weights=False,
    ),
    "knn": Kind(
        _TASKS,
        False,
        {
            "n_neighbors": _count(10),
            "weights": _choice("uniform", "distance", "softmax"),
            "temperature": _positive(0.07),
            "metric": _choice("cosine", "euclidean", "manhattan"),
        },
        _nothing,
        weights=False,
        fault=_no_softmax,
    ),
    "nearest-centroid": Kind(
        (CLASSIFICATION,), True, {"metric": _choice("euclidean", "cosine")}, _nothing, weights=False
    ),
    "mlp": Kind(
        _TASKS,
        False,
        {
            "hidden": Option((100,), _are_widths, "a list of widths such as [100]"),
            "activation": _choice("relu", "tanh", "logistic"),
            "alpha": _not_negative(1e-4),
            "learning_rate": _positive(1e-3),
            "max_iter": _count(200),
        },
        _mlp,
    ),
    "hist-gradient-boosting": Kind(
        _TASKS,
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
    "majority": Kind(_TASKS, True, {}, _nothing, scaled=False),
    "random-projection": Kind(_TASKS, True, {"dims": _count(8), **_SOLVED}, _projection),
}
"""Every kind of head that scikit-learn fits; a new one is a line here and a function that builds its estimator.

Options that are None by default follow the training settings: ``C`` is 1 / ``l2``, ``alpha`` is ``l2``, and the
squared error of ridge regression is not halved, as scikit-learn has it. ``dtype`` is the precision of the solver:
float32 is what a script has that hands scikit-learn the features as they come.
"""
