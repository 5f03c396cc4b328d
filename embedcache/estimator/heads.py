"""Heads with scikit-learn's interface."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, column_or_1d, validate_data

from embedcache.errors import InputError, SpecError, TrainingError
from embedcache.heads import TrainedHead, head_named
from embedcache.spec import HeadSpec, TaskName, TrainSpec, declared
from embedcache.task import Array, Floats
from embedcache.train import train_head
from embedcache.wording import shortened

_DTYPES = (np.float64, np.float32)
_DEFAULTS = TrainSpec()


def _documented(estimator: type[Any]) -> type[Any]:
    """Say in the docstring what each setting is, as ``HeadSpec``, ``TrainSpec`` and the command line do."""
    head, training = declared(HeadSpec), declared(TrainSpec)
    said = {"head": head["kind"].described(HeadSpec.kind), "engine": head["engine"].described(HeadSpec.engine)}
    said |= {"options": f'{head["options"].help} Such as {{"hidden": [256]}}.'}
    parameters = inspect.signature(estimator).parameters
    said |= {name: training[name].described(parameters[name].default) for name in parameters if name in training}
    lines = [
        textwrap.fill(
            f"{name}: {text}", 112, initial_indent=" " * 8, subsequent_indent=" " * 12, break_on_hyphens=False
        )
        for name, text in said.items()
    ]
    estimator.__doc__ = (estimator.__doc__ or "").replace("        SETTINGS", "\n".join(lines))
    return estimator


class _HeadEstimator(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """What both estimators share: the settings of ``TrainSpec`` as parameters, and the training."""

    head_: TrainedHead

    def __init__(
        self,
        head: str = HeadSpec.kind,
        *,
        engine: str | None = None,
        options: Mapping[str, Any] | None = None,
        solver: str = _DEFAULTS.solver,
        epochs: int = _DEFAULTS.epochs,
        min_steps: int | None = _DEFAULTS.min_steps,
        batch_size: int = _DEFAULTS.batch_size,
        optimizer: str = _DEFAULTS.optimizer,
        learning_rate: float = _DEFAULTS.learning_rate,
        weight_decay: float = _DEFAULTS.weight_decay,
        momentum: float = _DEFAULTS.momentum,
        schedule: str = _DEFAULTS.schedule,
        warmup: float = _DEFAULTS.warmup,
        clip: float = _DEFAULTS.clip,
        standardize: bool = _DEFAULTS.standardize,
        l2: float = _DEFAULTS.l2,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        patience: int = _DEFAULTS.patience,
        metric: str | None = _DEFAULTS.metric,
        random_state: Any = 0,
        device: str = "cpu",
        verbose: bool = False,
    ) -> None:
        self.head = head
        self.engine = engine
        self.options = options
        self.solver = solver
        self.epochs = epochs
        self.min_steps = min_steps
        self.batch_size = batch_size
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.momentum = momentum
        self.schedule = schedule
        self.warmup = warmup
        self.clip = clip
        self.standardize = standardize
        self.l2 = l2
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.metric = metric
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    @property
    def _several(self) -> bool:
        """Whether the head reads several vectors a row, [N, L, D]."""
        return isinstance(self.head, str) and self.head.startswith("attention")

    def _rows(self, X: Any) -> Any:
        return validate_data(self, X, reset=False, **self._shape)

    def _labelled_rows(self, X: Any, y: Any, **options: Any) -> Any:
        more = {} if y is None else {"multi_output": True}  # without y scikit-learn says itself that it is missing
        return validate_data(self, X, y, ensure_min_samples=2, **self._shape, **more, **options)

    @property
    def _shape(self) -> dict[str, Any]:
        return {"dtype": _DTYPES, "allow_nd": self._several, "ensure_2d": not self._several}

    def _fitted(
        self, X: Any, y: Any, sample_weight: Any, task: TaskName, names: list[str], **settings: Any
    ) -> _HeadEstimator:
        spec = head_named(self.head, self.engine, _plain(self.options or {}))
        seed = _seed(self.random_state)
        values = {name: _plain(getattr(self, name)) for name in declared(TrainSpec) if hasattr(self, name)} | settings
        # What is at its default was not asked for: TrainSpec chooses the solver by what was.
        asked = {name: value for name, value in values.items() if value != getattr(_DEFAULTS, name)}
        training = TrainSpec(seed=seed, **asked)
        x_eval = y_eval = None
        if self.early_stopping:
            rows = np.arange(len(X))
            stratify = y if task == "classification" else None
            if stratify is not None and (alone := np.flatnonzero(np.bincount(y) == 1)).size:
                raise TrainingError(
                    f"early_stopping holds out rows of each class, and {names[alone[0]]!r} has a single one: "
                    "give it more rows, leave it out, or early_stopping"
                )
            try:
                mine, held = train_test_split(
                    rows, test_size=self.validation_fraction, random_state=seed, stratify=stratify
                )
            except ValueError as error:
                fraction = f"validation_fraction {self.validation_fraction!r}"
                raise TrainingError(f"early_stopping cannot hold out rows by {fraction}: {error}") from None
            x_eval, y_eval, X, y = X[held], y[held], X[mine], y[mine]
            sample_weight = None if sample_weight is None else sample_weight[mine]
        result = train_head(
            X, y, x_eval, y_eval, spec, training, task=task, class_names=names, sample_weight=sample_weight,
            device=self.device, progress=bool(self.verbose), intervals=False,
        )  # fmt: skip
        self.head_ = result.head
        self.history_ = list(result.history)
        self.notes_ = list(result.notes)
        self.n_iter_ = max(1, int(result.history[-1]["epoch"])) if result.history else 1
        if result.interrupted:  # whoever runs many fits wants to stop them all
            raise KeyboardInterrupt
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = self._several
        return tags


@_documented
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
    bundle), ``history_`` has a dict for each epoch and ``notes_`` what training had to say.

    Example::

        cross_val_score(HeadClassifier("mlp", options={"hidden": [64]}), X, y)
    """

    def __init__(
        self,
        head: str = HeadSpec.kind,
        *,
        engine: str | None = None,
        options: Mapping[str, Any] | None = None,
        solver: str = _DEFAULTS.solver,
        epochs: int = _DEFAULTS.epochs,
        min_steps: int | None = _DEFAULTS.min_steps,
        batch_size: int = _DEFAULTS.batch_size,
        optimizer: str = _DEFAULTS.optimizer,
        learning_rate: float = _DEFAULTS.learning_rate,
        weight_decay: float = _DEFAULTS.weight_decay,
        momentum: float = _DEFAULTS.momentum,
        schedule: str = _DEFAULTS.schedule,
        warmup: float = _DEFAULTS.warmup,
        clip: float = _DEFAULTS.clip,
        standardize: bool = _DEFAULTS.standardize,
        l2: float = _DEFAULTS.l2,
        label_smoothing: float = _DEFAULTS.label_smoothing,
        class_weight: Any = _DEFAULTS.class_weight,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        patience: int = _DEFAULTS.patience,
        metric: str | None = _DEFAULTS.metric,
        random_state: Any = 0,
        device: str = "cpu",
        verbose: bool = False,
    ) -> None:
        super().__init__(
            head,
            engine=engine,
            options=options,
            solver=solver,
            epochs=epochs,
            min_steps=min_steps,
            batch_size=batch_size,
            optimizer=optimizer,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            momentum=momentum,
            schedule=schedule,
            warmup=warmup,
            clip=clip,
            standardize=standardize,
            l2=l2,
            early_stopping=early_stopping,
            validation_fraction=validation_fraction,
            patience=patience,
            metric=metric,
            random_state=random_state,
            device=device,
            verbose=verbose,
        )
        self.label_smoothing = label_smoothing
        self.class_weight = class_weight

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> HeadClassifier:
        """Train the head on features ``X`` [N, D] and labels ``y`` [N], or a 0/1 indicator [N, C].

        Heads that attend take several vectors a row, [N, L, D]. Rows of weight 0 are left out.
        """
        X, y = self._labelled_rows(X, y)
        y = y.toarray() if hasattr(y, "toarray") else y
        check_classification_targets(y)
        several = type_of_target(y) == "multilabel-indicator"
        if not several:
            y = column_or_1d(y, warn=True)
        X, y, sample_weight = _weighted(X, y, sample_weight)
        if several:
            self.classes_ = np.arange(y.shape[1])
            targets, task = y.astype(np.uint8), "multilabel"
        else:
            self.classes_, targets = np.unique(y, return_inverse=True)
            targets, task = targets.astype(np.int64), "classification"
        self._label_dtype = y.dtype
        names = [str(label) for label in self.classes_.tolist()]
        weights = self.class_weight
        if isinstance(weights, Mapping):  # a fold may lack a class
            named = dict(zip(self.classes_.tolist(), names, strict=True))
            weights = {named[label]: float(weight) for label, weight in weights.items() if label in named}
        self._fitted(
            X, targets, sample_weight, task, names,  # type: ignore[arg-type]
            label_smoothing=self.label_smoothing, class_weight=weights,
        )  # fmt: skip
        return self

    def decision_function(self, X: Any) -> Array:
        """Return logits [N, C], of two classes the difference [N]."""
        logits = self._said(X)
        binary = self.head_.task == "classification" and logits.shape[1] == 2
        return np.asarray(logits[:, 1] - logits[:, 0]) if binary else logits

    def predict_proba(self, X: Any) -> Floats:
        """Return probabilities [N, C], calibrated where rows were held out for it."""
        said = self._said(X)
        return self.head_.calibrated(said)

    def predict(self, X: Any) -> Array:
        """Return the label of each row [N], or a 0/1 indicator [N, C]."""
        said = self._said(X)
        if self.head_.task == "classification":
            return np.asarray(self.classes_[said.argmax(axis=1)])
        return self.head_.decide(self.head_.calibrated(said)).astype(self._label_dtype)

    def _said(self, X: Any) -> Array:
        check_is_fitted(self)
        return self.head_.logits(self._rows(X))

    def __sklearn_tags__(self) -> Any:
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

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> HeadRegressor:
        """Train the head on features ``X`` [N, D] and numbers ``y`` [N] or [N, R]; rows of weight 0 are left out."""
        X, y = self._labelled_rows(X, y, y_numeric=True)
        y = column_or_1d(y, warn=True) if y.ndim == 2 and y.shape[1] == 1 else y
        X, y, sample_weight = _weighted(X, y, sample_weight)
        self._flat = y.ndim == 1
        targets = np.asarray(y, np.float64).reshape(len(y), -1)
        names = [f"target{at}" for at in range(targets.shape[1])]
        self._fitted(X, targets, sample_weight, "regression", names)
        return self

    def predict(self, X: Any) -> Floats:
        """Return the values of each row, float64 [N] or [N, R]."""
        check_is_fitted(self)
        values = np.asarray(self.head_.logits(self._rows(X)), np.float64)
        return values[:, 0] if self._flat else values

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _weighted(X: Array, y: Array, sample_weight: Any) -> tuple[Array, Array, npt.NDArray[np.float64] | None]:
    """Return the rows that have a weight, and their weights."""
    if sample_weight is None:
        return X, y, None
    weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
    kept = weights > 0
    if not kept.any():
        raise InputError("every sample weight is zero: expected at least one above 0")
    if kept.sum() < 2:
        raise TrainingError("sample_weight leaves one sample: expected at least two, of two classes or more")
    return (X, y, weights) if kept.all() else (X[kept], y[kept], weights[kept])


def _seed(random_state: Any) -> int:
    if isinstance(random_state, (int, np.integer)) and not isinstance(random_state, bool):
        return int(random_state)
    try:
        return int(check_random_state(random_state).randint(2**31 - 1))
    except ValueError:
        expected = "a whole number from 0 to 4,294,967,295, or a RandomState"
        raise SpecError(f"random_state is {shortened(random_state)}: expected {expected}") from None


def _plain(value: Any) -> Any:
    """Return a setting as JSON would have it: grids give numpy's numbers."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(each) for each in value]
    return value.item() if isinstance(value, np.generic) else value


__all__ = ["HeadClassifier", "HeadRegressor"]
