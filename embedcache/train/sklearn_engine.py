"""Heads that scikit-learn fits: from features to one matrix or, where the head is not linear, an estimator.

Nearest neighbours are not fitted at all: they are the training rows (``embedcache.heads.neighbours``). Nearest
centroids are the means of classes (``centroids``).

A linear head becomes a weight [C, D] and a bias [C], with standardisation and projection folded in. Its outputs are
logits; probabilities are their softmax, or their sigmoid for each label. For logistic regression and LDA these are the
estimator's own ``predict_proba``. For two classes scikit-learn has one decision value z; it becomes the logits
(-z/2, z/2), whose softmax is sigmoid(z). Support vector machines and ridge classification have no probabilities: the
softmax of their decision values has the right order, but means little before a temperature is fitted on validation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from embedcache.errors import EmbedcacheError, SpecError, TrainingError
from embedcache.heads.neighbours import FEATURES, MEAN, SCALE, TARGETS
from embedcache.heads.registry import checked_kind
from embedcache.heads.sklearn_kinds import Kind, Options, Setting
from embedcache.spec import HeadSpec, TrainSpec
from embedcache.task import CLASSIFICATION, MULTILABEL, REGRESSION, Array, Floats
from embedcache.train.data import LabelledRows, class_weights, moments, rounding
from embedcache.train.result import Fitted

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator

Matrix = tuple[Floats, Floats]

NEVER = -1e4
"""The logit of a class that training never saw: its probability is 0, at any temperature there may be."""


def fit_sklearn(rows: LabelledRows, head: HeadSpec, spec: TrainSpec) -> Fitted:
    """Fit a head that scikit-learn has. The same arguments give the same bits.

    ``head`` is a kind and its options, see ``embedcache.heads.sklearn_kinds``; of ``spec`` it reads ``seed``,
    ``standardize``, ``class_weight`` and ``l2``. What is linear is fitted in float64, or in the ``dtype`` among its
    options, and becomes a weight [C, D] and a bias [C] for raw features.

    Raises ``SpecError`` for a kind, option or weight that cannot be, ``FeatureError`` for features with several vectors
    a row, ``TrainingError`` for labels from which nothing can be learned.
    """
    kind, options = checked_kind(head, rows.task)
    problem = _Problem(head.kind, rows, np.asarray(rows.y, np.float64 if rows.task is REGRESSION else np.int64))
    if rows.task is CLASSIFICATION and head.kind != "majority" and len(np.unique(problem.y)) < 2:
        raise TrainingError("every training row is of the same class: a head needs rows of two or more")
    weights = _weights(problem, kind, spec)
    if head.kind == "majority" and rows.feature.kind == "pooled":  # which reads no feature
        weight, bias = _majority(problem, rows.feature.dim, weights)
        return Fitted({"output.weight": weight, "output.bias": bias})
    x = rows.matrix(head.kind)
    if head.kind == "knn":
        return _training_rows(problem, x, options, spec.standardize)
    if head.kind == "nearest-centroid":
        return _nearest_centroids(problem, x, str(options["metric"]), spec.standardize)
    setting = Setting(rows.task, float(spec.l2), spec.seed, x.shape[1])
    fitting = _Fitting(problem, weights, lambda: kind.build(setting, options), spec.standardize and kind.scaled)
    with _heard(fitting.notes):
        if kind.linear:
            weight, bias = fitting.linear(x, spec.standardize, str(options.get("dtype", "float64")))
            fitted = Fitted({"output.weight": weight, "output.bias": bias})
        else:
            fitted = Fitted(estimator=fitting.estimator(x))
    return replace(fitted, notes=tuple(dict.fromkeys(fitting.notes)))


@dataclass(frozen=True, eq=False)
class _Problem:
    """What is to be fitted: the name of the head, the rows, and their targets as scikit-learn takes them."""

    head: str
    rows: LabelledRows
    y: Array

    @property
    def outputs(self) -> int:
        """How many classes, labels or targets there are."""
        return self.rows.outputs


@dataclass(frozen=True, eq=False)
class _Weights:
    """Weights of rows [N], with those of their classes; and of labels that are on [C]. None for 1."""

    rows: Floats | None
    labels: Floats | None

    def of_label(self, label: int, on: Array) -> Floats | None:
        """Return the weights of rows [N] for one label, given where it is on (0 or 1, [N])."""
        if self.labels is None:
            return self.rows
        return np.where(on == 1, self.labels[label], 1.0) * (1.0 if self.rows is None else self.rows)


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


def _weights(problem: _Problem, kind: Kind, spec: TrainSpec) -> _Weights:
    """Return the weights of rows and labels. Raises ``SpecError`` where the head cannot weigh them."""
    given, task, y = problem.rows, problem.rows.task, problem.y
    rows = None if given.weight is None else np.asarray(given.weight, np.float64)
    by_class = class_weights([spec], given.y, task, given.class_names)
    labels = None if by_class is None else np.asarray(by_class[0], np.float64)
    if labels is not None and task is CLASSIFICATION:
        own, labels = labels[y], None
        rows = own if rows is None else own * rows
        if not rows.any():
            raise TrainingError("class_weight leaves no row with a weight: give some class a weight above 0")
    if rows is not None and (rows == rows[0]).all() and (rows[0] == 1 or not kind.weights):
        rows = None  # equal weights are no weights: a head that cannot weigh takes them
    if (rows is not None or labels is not None) and not kind.weights:
        raise SpecError(f"{problem.head} cannot weigh rows or classes: drop class_weight and sample weights")
    if labels is not None and problem.head == "mlp" and problem.outputs > 1:
        raise SpecError("mlp of scikit-learn cannot weigh labels: drop class_weight, or use the engine torch")
    return _Weights(rows, labels)


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Raise ``TrainingError`` for what scikit-learn cannot fit."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, EmbedcacheError):
            raise
        reason = " ".join(str(error).split())
        if "least populated class" in reason:  # heads that hold rows out for their own early stopping
            reason = (
                "a class has a single row, and early_stopping holds some of each class out: "
                "add rows of it, or leave early_stopping out"
            )
        raise TrainingError(reason) from None


def _fit(estimator: BaseEstimator, x: Array, y: Array, rows: Floats | None) -> BaseEstimator:
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


@dataclass(eq=False)
class _Fitting:
    """One head being fitted: ``build`` makes an estimator, ``scaled`` says whether its features are scaled first."""

    problem: _Problem
    weights: _Weights
    build: Callable[[], BaseEstimator]
    scaled: bool
    notes: list[str] = field(default_factory=list)

    def linear(self, x: Array, standardize: bool, dtype: str) -> Matrix:
        """Fit a linear head and return its matrix for raw features, in float64."""
        problem, rows = self.problem, self.problem.rows
        stored, x = x.dtype, x.astype(dtype)
        dim = x.shape[1]
        mean, scale = np.zeros(dim), np.ones(dim)
        if standardize:
            scaler = _scaler(x, rows.weight, stored, copy=False)
            mean, scale = scaler.mean_, scaler.scale_
            x = scaler.transform(x)
        if rows.task is CLASSIFICATION:
            weight, bias = _one_of(self.build(), x, problem.y, problem.outputs, self.weights.rows)
        elif rows.task is REGRESSION:
            weight, bias = _matrix(_fit(self.build(), x, problem.y, self.weights.rows), problem.outputs)
        else:
            weight, bias = np.zeros((problem.outputs, dim)), np.zeros(problem.outputs)
            constant = []
            for label in range(problem.outputs):
                on = problem.y[:, label]
                if on.min() == on.max():
                    constant.append(label)
                    bias[label] = _log_odds(float(on.sum()), float(len(on)))
                    continue
                fitted = _fit(self.build(), x, on, self.weights.of_label(label, on))
                (weight[label],), (bias[label],) = _matrix(fitted, 1)
            if constant:
                self.notes.append(
                    f"{len(constant)} of {problem.outputs} labels are the same in every training row: nothing is learnt"
                )
        weight = weight / scale
        return weight, bias - weight @ mean

    def estimator(self, x: Array) -> BaseEstimator:
        """Fit a head that is not linear and return its pipeline."""
        from sklearn.pipeline import Pipeline

        task, y, rows = self.problem.rows.task, self.problem.y, self.weights.rows
        steps: list[tuple[str, BaseEstimator]] = []
        if self.scaled:
            scaler = _scaler(x, self.problem.rows.weight, x.dtype, copy=True)
            steps, x = [("scale", scaler)], scaler.transform(x)
        head = self.build()
        one_output_only = type(head).__name__.startswith("HistGradientBoosting")
        if self.problem.outputs == 1 and task is not CLASSIFICATION:
            y = y[:, 0]
            rows = self.weights.of_label(0, y)
            if task is MULTILABEL and y.min() == y.max():
                raise TrainingError("the only label is the same in every training row: nothing can be learnt")
        if one_output_only and y.ndim == 2:
            head = self._one_by_one(x)
        else:
            _fit(head, x, y, rows)
        _forget_training(head)
        return Pipeline([*steps, ("head", head)])

    def _one_by_one(self, x: Array) -> BaseEstimator:
        """Fit one estimator to each column of targets; a label that never changes gets a constant."""
        from sklearn.dummy import DummyClassifier
        from sklearn.multioutput import MultiOutputClassifier, MultiOutputRegressor

        task, y = self.problem.rows.task, self.problem.y
        several = (MultiOutputRegressor if task is REGRESSION else MultiOutputClassifier)(self.build())
        several.estimators_ = []
        for label in range(y.shape[1]):
            on = y[:, label]
            if task is MULTILABEL and on.min() == on.max():
                several.estimators_.append(DummyClassifier().fit(x, on))
                continue
            fitted = _fit(self.build(), x, on, self.weights.of_label(label, on))
            _forget_training(fitted)
            several.estimators_.append(fitted)
        several.n_features_in_ = x.shape[1]
        if task is MULTILABEL:
            several.classes_ = [fitted.classes_ for fitted in several.estimators_]
        return several


def _one_of(estimator: BaseEstimator, x: Array, y: Array, classes: int, rows: Floats | None) -> Matrix:
    """Fit a linear classifier to the classes that occur; the others get the bias ``NEVER``."""
    present = np.unique(y)
    solved, constant = _matrix(
        _fit(estimator, x, np.searchsorted(present, y), rows), 1 if len(present) == 2 else len(present)
    )
    if len(present) == 2:
        solved, constant = np.vstack([-solved / 2, solved / 2]), np.concatenate([-constant / 2, constant / 2])
    weight, bias = np.zeros((classes, x.shape[1])), np.full(classes, NEVER)
    weight[present], bias[present] = solved, constant
    return weight, bias


def _matrix(estimator: BaseEstimator, outputs: int) -> Matrix:
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


def _majority(problem: _Problem, dim: int, weights: _Weights) -> Matrix:
    """Return a head that reads no feature: log shares of classes, log odds of labels, means of targets."""
    y, task, outputs = problem.y, problem.rows.task, problem.outputs
    mass = np.ones(len(y)) if weights.rows is None else weights.rows
    if task is REGRESSION:
        bias = mass @ y / mass.sum()
    elif task is CLASSIFICATION:
        share = np.bincount(y, mass, outputs) / mass.sum()
        bias = np.where(share > 0, np.log(np.maximum(share, 1e-300)), NEVER)
    else:
        label_weight = np.ones(outputs) if weights.labels is None else weights.labels
        on, off = (mass @ y) * label_weight, mass @ (1 - y)
        bias = np.array([_log_odds(float(a), float(a + b)) for a, b in zip(on, off, strict=True)])
    return np.zeros((outputs, dim)), np.asarray(bias, np.float64)


def _training_rows(problem: _Problem, x: Array, options: Options, standardize: bool) -> Fitted:
    """Return nearest neighbours: the rows themselves."""
    state: dict[str, Array] = {FEATURES: np.array(x), TARGETS: problem.y.astype(problem.rows.task.dtype)}
    if standardize:
        state[MEAN], state[SCALE] = moments(problem.rows.x, problem.rows.weight)
    asked = options.whole("n_neighbors")
    short = f"knn asks for {asked} neighbours and has {len(x)} rows: it uses them all"
    return Fitted(state, notes=(short,) if asked > len(x) else ())


def _nearest_centroids(problem: _Problem, x: Array, metric: str, standardize: bool) -> Fitted:
    """Return the centroids of classes as a matrix; standardisation is kept beside it, for classes that are added."""
    scaled: dict[str, Array] = {}
    if standardize:
        scaled["output.mean"], scaled["output.scale"] = moments(problem.rows.x, problem.rows.weight)
    weight, bias = centroids(x, problem.y, problem.outputs, metric, scaled)
    return Fitted({"output.weight": weight, "output.bias": bias, **scaled})


def centroids(x: Array, y: Array, classes: int, metric: str, scaled: Mapping[str, Array]) -> Matrix:
    """Return weight [C, D] and bias [C] by which the nearest centroid has the highest logit, for scaled features.

    By ``euclidean`` distance a class has the mean c of its rows: c x - c c / 2 is highest where x - c is shortest. By
    ``cosine`` it has the direction of the mean of its rows at length 1; a logit is then the cosine times the length of
    x. A softmax of either has the right order, and is a probability once a temperature is fitted on validation. Each
    class is computed from its own rows alone.
    """
    weight, bias = np.zeros((classes, x.shape[1])), np.full(classes, NEVER)
    order = np.argsort(y, kind="stable")
    first = np.searchsorted(y[order], np.arange(classes + 1))
    for number in np.unique(y).tolist():
        own = x[order[first[number] : first[number + 1]]].astype(np.float64)
        if scaled:
            own = (own - scaled["output.mean"]) * scaled["output.scale"]
        if metric == "cosine":
            weight[number], bias[number] = _unit(_unit(own).mean(axis=0)), 0.0
        else:
            weight[number] = own.mean(axis=0)
            bias[number] = -np.square(weight[number]).sum() / 2
    return weight, bias


def _unit(vectors: Floats) -> Floats:
    """Return vectors of length 1; those of zeros stay."""
    length = np.sqrt(np.square(vectors).sum(axis=-1, keepdims=True))
    return np.asarray(np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0))


def _scaler(x: Array, weight: Array | None, stored: npt.DTypeLike, *, copy: bool) -> BaseEstimator:
    """Return a fitted ``StandardScaler`` that does not scale features which vary only by the rounding of ``stored``."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler(copy=copy).fit(x, sample_weight=weight)
    deviation = np.sqrt(scaler.var_)
    scaler.scale_[deviation <= rounding(scaler.mean_, deviation, stored)] = 1.0
    return scaler


_ONLY_FOR_TRAINING = (
    "_optimizer", "_random_state", "_best_coefs", "_best_intercepts", "loss_curve_", "validation_scores_",
    "_feature_subsample_rng",
)  # fmt: skip


def _forget_training(estimator: BaseEstimator) -> None:
    """Drop what only training needs: Adam's moments are twice the size of the weights, and would go into the file."""
    for part in (estimator, getattr(estimator, "regressor_", None)):
        for name in _ONLY_FOR_TRAINING:
            if part is not None and name in vars(part):
                delattr(part, name)
