"""Heads with scikit-learn's interface."""

from __future__ import annotations

import textwrap
from collections.abc import Hashable, Mapping
from dataclasses import KW_ONLY, dataclass, fields
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.model_selection import train_test_split
from sklearn.utils import Tags, check_random_state
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, column_or_1d, validate_data

from embedcache.errors import InputError, SpecError, TrainingError
from embedcache.heads import head_named
from embedcache.spec import HeadSpec, TrainSpec, declared
from embedcache.task import CLASSIFICATION, MULTILABEL, REGRESSION, Array, Floats, Task
from embedcache.train import train_head
from embedcache.wording import shortened

_DTYPES = (np.float64, np.float32)


E = TypeVar("E", bound="_HeadEstimator")


def _documented(estimator: type[E]) -> type[E]:
    """Say in the docstring what each setting is, as ``HeadSpec``, ``TrainSpec`` and the command line do."""
    head, training = declared(HeadSpec), declared(TrainSpec)
    texts = {"head": head["kind"].described(HeadSpec.kind), "engine": head["engine"].described(HeadSpec.engine)}
    texts["options"] = f'{head["options"].help} Such as {{"hidden": [256]}}.'
    defaults = {setting.name: setting.default for setting in fields(estimator)}
    texts |= {name: training[name].described(default) for name, default in defaults.items() if name in training}
    lines = [
        textwrap.fill(
            f"{name}: {text}", 112, initial_indent=" " * 8, subsequent_indent=" " * 12, break_on_hyphens=False
        )
        for name, text in texts.items()
    ]
    estimator.__doc__ = (estimator.__doc__ or "").replace("        SETTINGS", "\n".join(lines))
    return estimator


# scikit-learn reads the settings from the signature of __init__, and wants each kept as it is given, unchecked, in an
# attribute of its name. That is what a dataclass is: what has an annotation and a default is an argument.
@dataclass(eq=False, repr=False)
class _HeadEstimator(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """What both estimators share: the settings of ``TrainSpec`` as parameters, and the training."""

    head: str = HeadSpec.kind
    _: KW_ONLY
    engine: str | None = None
    options: Mapping[str, object] | None = None
    solver: str = TrainSpec.solver
    epochs: int = TrainSpec.epochs
    min_steps: int | None = TrainSpec.min_steps
    batch_size: int = TrainSpec.batch_size
    optimizer: str = TrainSpec.optimizer
    learning_rate: float = TrainSpec.learning_rate
    weight_decay: float = TrainSpec.weight_decay
    momentum: float = TrainSpec.momentum
    schedule: str = TrainSpec.schedule
    warmup: float = TrainSpec.warmup
    clip: float = TrainSpec.clip
    input_noise: float = TrainSpec.input_noise
    input_dropout: float = TrainSpec.input_dropout
    standardize: bool = TrainSpec.standardize
    l2: float = TrainSpec.l2
    early_stopping: bool = False
    validation_fraction: float = 0.1
    patience: int = TrainSpec.patience
    metric: str | None = TrainSpec.metric
    random_state: int | np.random.RandomState | None = 0
    device: str = "cpu"
    verbose: bool = False

    @property
    def _several(self) -> bool:
        """Whether the head reads several vectors a row, [N, L, D]."""
        return isinstance(self.head, str) and self.head.startswith("attention")

    def _rows(self, X: npt.ArrayLike) -> Array:
        return np.asarray(validate_data(self, X, reset=False, **self._shape))

    def _labelled_rows(self, X: npt.ArrayLike, y: npt.ArrayLike, **options: bool) -> tuple[Array, Array]:
        more = {} if y is None else {"multi_output": True}  # without y scikit-learn says itself that it is missing
        x, targets = validate_data(self, X, y, ensure_min_samples=2, **self._shape, **more, **options)
        return x, targets.toarray() if hasattr(targets, "toarray") else targets

    @property
    def _shape(self) -> dict[str, object]:
        return {"dtype": _DTYPES, "allow_nd": self._several, "ensure_2d": not self._several}

    def _fit_head(
        self, x: Array, y: Array, weights: Floats | None, task: Task, names: list[str], **settings: object
    ) -> None:
        """Train ``head_``; ``settings`` stand for those that are parameters too, and are written otherwise there."""
        head = head_named(self.head, self.engine, _plain(self.options or {}))  # type: ignore[arg-type]  # it checks
        seed = _seed(self.random_state)
        values = {name: _plain(getattr(self, name)) for name in declared(TrainSpec) if hasattr(self, name)} | settings
        # What is at its default was not asked for: TrainSpec chooses the solver by what was.
        asked = {name: value for name, value in values.items() if value != getattr(TrainSpec, name)}
        spec = TrainSpec.of({"seed": seed, **asked})
        x_eval = y_eval = None
        if self.early_stopping:
            kept, held_out = self._split(y, task, names, seed)
            x_eval, y_eval, x, y = x[held_out], y[held_out], x[kept], y[kept]
            weights = None if weights is None else weights[kept]
        result = train_head(
            x, y, x_eval, y_eval, head, spec, task=task.name, class_names=names, sample_weight=weights,
            device=self.device, progress=bool(self.verbose), intervals=False,
        )  # fmt: skip
        self.head_ = result.head
        self.history_ = list(result.history)
        self.notes_ = list(result.notes)
        self.n_iter_ = max(1, int(result.history[-1]["epoch"])) if result.history else 1
        if result.interrupted:  # Ctrl-C is meant for all fits of a grid search, not only this one
            raise KeyboardInterrupt

    def _split(self, y: Array, task: Task, names: list[str], seed: int) -> tuple[Array, Array]:
        """Return the rows that are trained on, and those that are held out for early stopping."""
        stratify = y if task is CLASSIFICATION else None
        if stratify is not None and (alone := np.flatnonzero(np.bincount(y) == 1)).size:
            raise TrainingError(
                f"early_stopping holds out rows of each class, and {names[alone[0]]!r} has a single one: "
                "give it more rows, leave it out, or early_stopping"
            )
        try:
            kept, held_out = train_test_split(
                np.arange(len(y)), test_size=self.validation_fraction, random_state=seed, stratify=stratify
            )
        except ValueError as error:
            fraction = f"validation_fraction {self.validation_fraction!r}"
            raise TrainingError(f"early_stopping cannot hold out rows by {fraction}: {error}") from None
        return kept, held_out

    def _logits(self, X: npt.ArrayLike) -> Array:
        check_is_fitted(self)
        return self.head_.logits(self._rows(X))

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = self._several
        return tags


@_documented
@dataclass(eq=False, repr=False)
class HeadClassifier(ClassifierMixin, _HeadEstimator):  # type: ignore[misc]
    """A head that fits on features, as scikit-learn has its classifiers: one class a row, or several labels.

    Args:
        SETTINGS
        early_stopping: hold out ``validation_fraction`` of the rows, stop when ``metric`` has not become better on
            them for ``patience`` epochs, and calibrate on them.
        random_state: decides initial weights, dropout, the order of rows and what is held out.

    A setting at its default counts as not given: a grid over settings of minibatches for the head ``linear`` should
    say ``solver="minibatch"``. A mapping of ``class_weight`` has the labels as they are in ``y``.

    After ``fit``, ``classes_`` are the classes, ``head_`` is the ``TrainedHead`` (``head_.save_pretrained`` makes it a
    bundle), ``history_`` has a dict for each epoch and ``notes_`` the notes of training.

    Example::

        cross_val_score(HeadClassifier("mlp", options={"hidden": [64]}), X, y)
    """

    _: KW_ONLY
    label_smoothing: float = TrainSpec.label_smoothing
    class_weight: str | Mapping[Hashable, float] | None = None

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike, sample_weight: npt.ArrayLike | None = None) -> HeadClassifier:
        """Train the head on features ``X`` [N, D] and labels ``y`` [N], or a 0/1 indicator [N, C].

        Heads that attend take several vectors a row, [N, L, D]. Rows of weight 0 are left out.
        """
        x, labels = self._labelled_rows(X, y)
        check_classification_targets(labels)
        multilabel = type_of_target(labels) == "multilabel-indicator"
        labels = labels if multilabel else column_or_1d(labels, warn=True)
        x, labels, weights = _weighted(x, labels, sample_weight)
        self._label_dtype = labels.dtype
        if multilabel:
            self.classes_ = np.arange(labels.shape[1])
            targets, task = labels.astype(MULTILABEL.dtype), MULTILABEL
        else:
            self.classes_, targets = np.unique(labels, return_inverse=True)
            targets, task = targets.astype(CLASSIFICATION.dtype), CLASSIFICATION
        names = [str(label) for label in self.classes_.tolist()]
        class_weight = self.class_weight
        if isinstance(class_weight, Mapping):  # a fold may lack a class
            named = dict(zip(self.classes_.tolist(), names, strict=True))
            class_weight = {named[label]: float(weight) for label, weight in class_weight.items() if label in named}
        self._fit_head(x, targets, weights, task, names, class_weight=class_weight)
        return self

    def decision_function(self, X: npt.ArrayLike) -> Array:
        """Return logits [N, C], of two classes the difference [N]."""
        logits = self._logits(X)
        binary = self.head_.task == CLASSIFICATION.name and logits.shape[1] == 2
        return np.asarray(logits[:, 1] - logits[:, 0]) if binary else logits

    def predict_proba(self, X: npt.ArrayLike) -> Floats:
        """Return probabilities [N, C], calibrated where rows were held out for it."""
        logits = self._logits(X)  # before head_ is asked for: there is none until fit was called
        return self.head_.calibrated(logits)

    def predict(self, X: npt.ArrayLike) -> Array:
        """Return the label of each row [N], or a 0/1 indicator [N, C]."""
        logits = self._logits(X)
        if self.head_.task == CLASSIFICATION.name:
            return np.asarray(self.classes_[logits.argmax(axis=1)])
        return self.head_.decide(self.head_.calibrated(logits)).astype(self._label_dtype)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


@_documented
class HeadRegressor(RegressorMixin, _HeadEstimator):  # type: ignore[misc]
    """A head that fits on features, as scikit-learn has its regressors: one target, or several.

    Args:
        SETTINGS
        early_stopping, validation_fraction, random_state: as in ``HeadClassifier``.

    Example::

        HeadRegressor("mlp", early_stopping=True).fit(X, y).score(X_test, y_test)
    """

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike, sample_weight: npt.ArrayLike | None = None) -> HeadRegressor:
        """Train the head on features ``X`` [N, D] and numbers ``y`` [N] or [N, R]; rows of weight 0 are left out."""
        x, values = self._labelled_rows(X, y, y_numeric=True)
        values = column_or_1d(values, warn=True) if values.ndim == 2 and values.shape[1] == 1 else values
        x, values, weights = _weighted(x, values, sample_weight)
        self._flat = values.ndim == 1
        targets = np.asarray(values, np.float64).reshape(len(values), -1)
        names = [f"target{number}" for number in range(targets.shape[1])]
        self._fit_head(x, targets, weights, REGRESSION, names)
        return self

    def predict(self, X: npt.ArrayLike) -> Floats:
        """Return the values of each row, float64 [N] or [N, R]."""
        values = np.asarray(self._logits(X), np.float64)
        return values[:, 0] if self._flat else values

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _weighted(x: Array, y: Array, sample_weight: npt.ArrayLike | None) -> tuple[Array, Array, Floats | None]:
    """Return the rows that have a weight, and their weights."""
    if sample_weight is None:
        return x, y, None
    weights = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
    kept = weights > 0
    if not kept.any():
        raise InputError("every sample weight is zero: expected at least one above 0")
    if kept.sum() < 2:
        raise TrainingError("sample_weight leaves one sample: expected at least two, of two classes or more")
    return (x, y, weights) if kept.all() else (x[kept], y[kept], weights[kept])


def _seed(random_state: object) -> int:
    if isinstance(random_state, (int, np.integer)) and not isinstance(random_state, bool):
        return int(random_state)
    try:
        return int(check_random_state(random_state).randint(2**31 - 1))
    except ValueError:
        expected = "a whole number from 0 to 4,294,967,295, or a RandomState"
        raise SpecError(f"random_state is {shortened(random_state)}: expected {expected}") from None


def _plain(value: object) -> object:
    """Return a setting as JSON would have it: grids give numpy's numbers."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


__all__ = ["HeadClassifier", "HeadRegressor"]
