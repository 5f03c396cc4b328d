"""Fitted scikit-learn estimators: written to files, read back without pickle, and applied to features.

skops lets its caller name trusted types, but always trusts all of scikit-learn, functions of NumPy and SciPy, and more.
Here the list is closed: ``TRUSTED`` names every node that the heads of this package consist of, and a file with any
other is refused before a single object is made. Types say nothing about values, so values that compiled code would
follow blindly are checked afterwards: child and feature numbers in the trees of boosting; nearest neighbours are fitted
again.
"""

from __future__ import annotations

import sys
import warnings
import zipfile
from collections.abc import Iterator
from importlib import import_module
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from embedcache.errors import BundleError, FeatureError, MissingExtraError
from embedcache.fingerprint import strict_json
from embedcache.task import CLASSIFICATION, REGRESSION, Array, Floats, Task

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator


_SKLEARN = {
    "compose._target.TransformedTargetRegressor",
    "dummy.DummyClassifier",
    "ensemble._hist_gradient_boosting.binning._BinMapper",
    "ensemble._hist_gradient_boosting.gradient_boosting.HistGradientBoostingClassifier",
    "ensemble._hist_gradient_boosting.gradient_boosting.HistGradientBoostingRegressor",
    "ensemble._hist_gradient_boosting.predictor.TreePredictor",
    "multioutput.MultiOutputClassifier",
    "multioutput.MultiOutputRegressor",
    "neighbors._classification.KNeighborsClassifier",
    "neighbors._regression.KNeighborsRegressor",
    "neural_network._multilayer_perceptron.MLPClassifier",
    "neural_network._multilayer_perceptron.MLPRegressor",
    "pipeline.Pipeline",
    "preprocessing._data.StandardScaler",
    "preprocessing._label.LabelBinarizer",
    "preprocessing._label.LabelEncoder",
    "_loss.link.IdentityLink",
    "_loss.link.Interval",
    "_loss.link.LogitLink",
    "_loss.link.MultinomialLogit",
    "_loss.loss.HalfBinomialLoss",
    "_loss.loss.HalfMultinomialLoss",
    "_loss.loss.HalfSquaredError",
}
_LOSSES = {"CyHalfBinomialLoss", "CyHalfMultinomialLoss", "CyHalfSquaredError"}
_NUMBERS = {"bool", "bool_", "float32", "float64", "int32", "int64", "uint8", "uint32", "uint64"}

TRUSTED: frozenset[tuple[str, str]] = frozenset(
    {
        ("DictNode", "builtins.dict"),
        ("JsonNode", "builtins.str"),
        ("ListNode", "builtins.list"),
        ("TupleNode", "builtins.tuple"),
        ("TypeNode", "builtins.str"),
        ("NdArrayNode", "numpy.ndarray"),
        *(("NdArrayNode", f"numpy.{name}") for name in _NUMBERS),
        *(("ObjectNode", f"sklearn.{name}") for name in _SKLEARN),
        *(("LossNode", f"sklearn._loss._loss.{name}") for name in _LOSSES),
    }
)
"""Every node that a file may hold: how skops loads it, and its type."""

_PROTOCOL = 2
_STEPS = ("scale", "head")


def dump_estimator(path: Path, estimator: BaseEstimator) -> bytes:
    """Return the bytes of a file for a fitted estimator; ``path`` names it in messages.

    Raises ``BundleError`` for one that could not be read back, ``MissingExtraError`` without skops.
    """
    skops = _skops("saving this head")
    data: bytes = skops.dumps(estimator)
    with zipfile.ZipFile(BytesIO(data)) as file:
        _refuse_untrusted(path, file)
    return data


def load_estimator(path: Path, data: bytes) -> BaseEstimator:
    """Return a fitted estimator from the bytes of its file, which ``path`` names in messages.

    Raises ``BundleError`` for a file that cannot be read or holds a type that no head is made of, naming it, and
    ``MissingExtraError`` without skops.
    """
    skops = _skops("loading this head")
    try:
        with zipfile.ZipFile(BytesIO(data)) as file:
            _refuse_untrusted(path, file)
        estimator = skops.loads(data, trusted=[name for node, name in sorted(TRUSTED) if node == "ObjectNode"])
        return _checked(estimator)
    except (BundleError, MissingExtraError):
        raise
    except (OSError, MemoryError, RecursionError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path} cannot be read: {str(error)[:200] or type(error).__name__}") from None
    except Exception as error:  # a hostile file can make skops and scikit-learn raise anything
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise BundleError(f"{path} is not a head as this version writes them ({what}): train it again") from error


def _skops(what: str) -> ModuleType:
    # On its first import skops walks through all of scikit-learn, and that through every array library it can speak
    # to: seconds of importing torch, for a head that was promised to do without.
    libraries = [f"sklearn.externals.array_api_compat.{name}" for name in ("torch", "cupy", "dask")]
    kept_out: list[str] = [] if "skops.io" in sys.modules else [name for name in libraries if name not in sys.modules]
    try:
        sys.modules.update(dict.fromkeys(kept_out))  # type: ignore[arg-type]  # None: the import fails, and is skipped
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated corners of scikit-learn
            return import_module("skops.io")
    except ImportError:
        raise MissingExtraError(what, "skops", "sklearn-io") from None
    finally:
        for name in kept_out:
            sys.modules.pop(name, None)


def _refuse_untrusted(path: Path, file: zipfile.ZipFile) -> None:
    names = [entry.filename for entry in file.infolist()]
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist())
    if packed or len(set(names)) != len(names) or "schema.json" not in names:
        raise BundleError(f"{path} is not packed as this version packs heads: train the head again")
    schema = strict_json(file.read("schema.json"), most=20_000_000)
    if not isinstance(schema, dict) or schema.get("protocol") != _PROTOCOL:
        raise BundleError(f"{path} is not of skops protocol {_PROTOCOL}: train the head again")
    for node, name in _nodes(schema):
        if (node, name) not in TRUSTED:
            raise BundleError(f"{path} holds {name} (as {node}), which no head is made of: it was not read")


def _nodes(schema: object) -> Iterator[tuple[str, str]]:
    """Yield loader and type of every node; whatever looks half like one is yielded too, and so refused."""
    waiting = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            if value.keys() & {"__loader__", "__class__", "__module__"}:
                yield str(value.get("__loader__")), f"{value.get('__module__')}.{value.get('__class__')}"
            waiting += value.values()


def _checked(pipeline: BaseEstimator) -> BaseEstimator:
    """Return the estimator after looking at what types do not say. Raises ``ValueError`` or anything else."""
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.dummy import DummyClassifier
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.multioutput import MultiOutputClassifier, MultiOutputRegressor
    from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    if type(pipeline) is not Pipeline or tuple(name for name, _ in pipeline.steps) not in (_STEPS, _STEPS[1:]):
        raise ValueError(f"it is not a pipeline of {' and '.join(_STEPS)}")
    for _, step in pipeline.steps[:-1]:
        _refuse_unless(step, StandardScaler)
    head = pipeline.steps[-1][1]
    if type(head) is TransformedTargetRegressor:
        _refuse_unless(head.transformer_, StandardScaler)
        _refuse_unless(head.regressor_, MLPRegressor)
        return pipeline
    several = type(head) in (MultiOutputClassifier, MultiOutputRegressor)
    boosting = (HistGradientBoostingClassifier, HistGradientBoostingRegressor)
    neighbours = (KNeighborsClassifier, KNeighborsRegressor)
    for estimator in head.estimators_ if several else [head]:
        _refuse_unless(estimator, *boosting, *neighbours, MLPClassifier, DummyClassifier)
        if type(estimator) in boosting:
            _refuse_wild_trees(estimator)
        elif type(estimator) in neighbours:
            _fit_again(estimator)
    return pipeline


def _refuse_unless(step: object, *types: type) -> None:
    if type(step) not in types:
        raise ValueError(f"{type(step).__name__} stands where {types[0].__name__} is expected")


def _refuse_wild_trees(boosting: BaseEstimator) -> None:
    """Raise ``ValueError`` for a tree that prediction, which checks nothing, would follow out of its arrays."""
    from sklearn.ensemble._hist_gradient_boosting.predictor import PREDICTOR_RECORD_DTYPE, TreePredictor

    features = boosting.n_features_in_
    if not isinstance(features, int) or np.any(boosting._bin_mapper.is_categorical_):
        raise ValueError("the number of features is not a number, or some features are categories")
    for trees in boosting._predictors:
        if len(trees) != boosting.n_trees_per_iteration_:
            raise ValueError("a round has too many trees or too few")
        for tree in trees:
            nodes = tree.nodes
            if type(tree) is not TreePredictor or nodes.dtype != PREDICTOR_RECORD_DTYPE or nodes.ndim != 1:
                raise ValueError("what stands for a tree is not one")
            places = np.flatnonzero(nodes["is_leaf"] == 0)
            inner = nodes[places]
            # Children come after their parent, so that following them ends.
            fine = [(inner[side] > places) & (inner[side] < len(nodes)) for side in ("left", "right")]
            fine += [(inner["feature_idx"] >= 0) & (inner["feature_idx"] < features), inner["is_categorical"] == 0]
            if not len(nodes) or not np.all(fine):
                raise ValueError("a tree points outside of itself")


def _fit_again(neighbours: BaseEstimator) -> None:
    """Fit nearest neighbours on their own rows, so that what search relies on is true."""
    x, y = neighbours._fit_X, neighbours._y
    if hasattr(neighbours, "classes_"):
        classes = neighbours.classes_
        if isinstance(classes, list):  # several labels, each with its own two classes
            y = np.stack([names[y[:, label]] for label, names in enumerate(classes)], axis=1)
        else:
            y = classes[y]
    neighbours.algorithm = "brute"
    neighbours.fit(np.asarray(x), np.asarray(y))


# What a fitted scikit-learn estimator gives for features: probabilities or values, in the columns of the task.


_CERTAIN = 1e-15
"""Probabilities are kept this far from 0 and 1, so that their logits are finite."""


def outputs(estimator: BaseEstimator, x: Array, task: Task, classes: int) -> Floats:
    """Return what a fitted estimator gives for features ``x`` [N, D]: probabilities [N, C], or values [N, R].

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
        if task is REGRESSION:
            values = np.asarray(estimator.predict(x), np.float64).reshape(len(x), -1)
        elif task is CLASSIFICATION:
            values = _spread(estimator.predict_proba(x), estimator.classes_, classes)
        else:
            values = _label_probabilities(estimator, x, classes)
    except (ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise BundleError(f"the estimator does not fit {task} with {classes} outputs: {str(error)[:200]}") from error
    if values.shape != (len(x), classes):
        raise BundleError(f"the estimator has {values.shape[1]} outputs, expected {classes}")
    return values


def logits_of(values: Floats, task: Task) -> Floats:
    """Return logits [N, C], whose softmax or sigmoid are the probabilities ``values``; a regression's values stay."""
    if task is REGRESSION:
        return values
    kept = np.clip(values, _CERTAIN, 1.0 - _CERTAIN)
    return np.asarray(np.log(kept) if task is CLASSIFICATION else np.log(kept) - np.log1p(-kept))


def _spread(probabilities: Array, present: Array, classes: int) -> Floats:
    """Put the probabilities of the classes that training had into the columns of all classes."""
    present = np.asarray(present, np.int64)
    if len(np.unique(present)) != probabilities.shape[1] or not ((present >= 0) & (present < classes)).all():
        raise ValueError(f"its classes are {present.tolist()}")
    spread = np.zeros((len(probabilities), classes))
    spread[:, present] = probabilities
    return spread


def _label_probabilities(estimator: BaseEstimator, x: Array, classes: int) -> Floats:
    """Return probabilities [N, C] from what scikit-learn gives: one array, or one [N, 1 or 2] for each label."""
    probabilities = estimator.predict_proba(x)
    present = estimator.classes_
    if not isinstance(probabilities, list):
        if classes > 1:
            return np.asarray(probabilities, np.float64)
        probabilities, present = [probabilities], [present]
    pairs = zip(probabilities, present, strict=True)
    return np.stack([_spread(label, label_classes, 2)[:, 1] for label, label_classes in pairs], axis=1)
