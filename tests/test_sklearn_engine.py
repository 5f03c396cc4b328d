"""scikit-learn heads: one matrix that says what the pipeline says, estimators in and out of files, hostile files."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skops.io
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor, NearestCentroid
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils.class_weight import compute_class_weight

from embedcache.errors import (
    BundleError,
    EmbedcacheError,
    FeatureError,
    InputError,
    MissingExtraError,
    SpecError,
    TrainingError,
)
from embedcache.heads import sklearn_io
from embedcache.heads.registry import checked_kind, option_names
from embedcache.heads.sklearn_io import outputs
from embedcache.heads.sklearn_kinds import KINDS, Setting
from embedcache.spec import HeadSpec, TrainSpec
from embedcache.task import CLASSIFICATION, MULTILABEL, REGRESSION, Task
from embedcache.train import sklearn_engine
from embedcache.train.data import labelled_rows_of
from embedcache.train.sklearn_engine import NEVER

N, D, C, R = 97, 7, 5, 3
QUICK = {"mlp": {"max_iter": 3, "hidden": [11]}, "hist-gradient-boosting": {"max_iter": 3, "min_samples_leaf": 5}}
LINEAR = [kind for kind, each in KINDS.items() if each.linear]
OTHER = [kind for kind in KINDS if kind not in (*LINEAR, "knn")]  # which is in test_neighbours
EVERY = [(kind, task) for kind, each in KINDS.items() if kind != "knn" for task in each.tasks]
FITTED = [kind for kind in LINEAR if kind not in ("majority", "nearest-centroid")]


def data(task: Task, seed: int = 0, rows: int = N, dim: int = D) -> tuple[Any, Any, int]:
    """Features far from standard, and targets that depend on them."""
    generator = np.random.default_rng(seed)
    x = (generator.normal(size=(rows, dim)) * generator.uniform(0.1, 9, dim) + 5).astype(np.float32)
    score = (x - x.mean(0)) / x.std(0) @ generator.normal(size=(dim, C)) + generator.normal(size=(rows, C))
    if task == CLASSIFICATION:
        return x, score.argmax(axis=1), C
    if task == MULTILABEL:
        return x, (score > 0.3).astype(np.uint8), C
    return x, 100 * score[:, :R] + 7, R


@dataclass(frozen=True)
class FittedSklearn:
    """What an engine's result amounts to: a matrix (weight [C, D], bias [C]) or an estimator, and their outputs."""

    task: Any
    classes: int
    linear: Any
    estimator: Any
    notes: tuple[str, ...] = ()

    def outputs(self, x: Any) -> Any:
        """Uncalibrated probabilities float64 [N, C], or values [N, R]."""
        if self.linear is None:
            return outputs(self.estimator, x, self.task, self.classes)
        weight, bias = self.linear
        return self.task.probabilities(np.asarray(x, np.float64) @ weight.T + bias)


def fit_sklearn(
    head: HeadSpec, x: Any, y: Any, *, task: Any, classes: int, class_weight: Any = None, sample_weight: Any = None,
    **settings: Any,
) -> FittedSklearn:  # fmt: skip
    """Fit a head on labelled rows whose C classes or R targets have numbers for names."""
    names = [str(number) for number in range(classes)]
    if isinstance(class_weight, np.ndarray):
        class_weight = {str(number): weight for number, weight in enumerate(class_weight.tolist())}
    rows = labelled_rows_of(x, y, task, names, weight=sample_weight)
    fitted = sklearn_engine.fit_sklearn(rows, head, TrainSpec(class_weight=class_weight, **settings))
    linear = (fitted.state["output.weight"], fitted.state["output.bias"]) if "output.bias" in fitted.state else None
    return FittedSklearn(task, classes, linear, fitted.estimator, fitted.notes)


def save_estimator(path: Path, estimator: Any) -> None:
    path.write_bytes(sklearn_io.dump_estimator(path, estimator))


def load_estimator(path: Path) -> Any:
    return sklearn_io.load_estimator(path, path.read_bytes())


def head(kind: str, **options: Any) -> HeadSpec:
    return HeadSpec(kind, "sklearn", {**QUICK.get(kind, {}), **options})


def fit(kind: str, task: Task, *, seed: int = 0, options: Any = None, **keywords: Any) -> FittedSklearn:
    x, y, classes = data(task)
    return fit_sklearn(head(kind, **(options or {})), x, y, task=task, classes=classes, seed=seed, **keywords)


def decisions(fitted: FittedSklearn, x: Any) -> Any:
    assert fitted.linear is not None
    weight, bias = fitted.linear
    assert weight.dtype == bias.dtype == np.float64
    return x.astype(np.float64) @ weight.T + bias


def pipeline(kind: str, task: Task, x: Any, standardize: bool, l2: float = 1.0) -> Any:
    """The same estimator in scikit-learn's own pipeline, not fitted."""
    found, options = checked_kind(head(kind), task)
    estimator = found.build(Setting(task, l2, 0, x.shape[1]), options)
    estimator = OneVsRestClassifier(estimator) if task == MULTILABEL else estimator
    return make_pipeline(StandardScaler(), estimator) if standardize else make_pipeline(estimator)


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize(("kind", "task"), [(kind, task) for kind, task in EVERY if kind in FITTED])
def test_a_matrix_says_what_the_pipeline_says(kind: str, task: Task, standardize: bool) -> None:
    """Decision values to 1e-6 of the pipeline's own, standardisation and projection folded in."""
    x, y, classes = data(task)
    fitted = fit_sklearn(head(kind), x, y, task=task, classes=classes, standardize=standardize, l2=0.3)
    assert fitted.estimator is None
    theirs = pipeline(kind, task, x, standardize, 0.3).fit(x.astype(np.float64), y)
    x = x.astype(np.float64)
    expected = theirs.predict(x) if task == REGRESSION else theirs.decision_function(x)
    np.testing.assert_allclose(decisions(fitted, x), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    if kind in ("linear", "logistic-regression", "lda", "random-projection") and task == CLASSIFICATION:
        np.testing.assert_allclose(fitted.outputs(x), theirs.predict_proba(x), atol=1e-9)
    if task == MULTILABEL and hasattr(theirs, "predict_proba"):
        np.testing.assert_allclose(fitted.outputs(x), theirs.predict_proba(x), atol=1e-9)


# scikit-learn says of its own fit, beside ours, that a class has a single row.
@pytest.mark.filterwarnings("ignore:Only one sample available")
@example(seed=2596, rows=23, dim=4, classes=5, extra=0, constant=False, kind="lda")
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(23, 61),
    dim=st.integers(1, 13),
    classes=st.integers(2, 5),
    extra=st.integers(0, 3),
    constant=st.booleans(),
    kind=st.sampled_from(FITTED),
)
def test_folding_holds_for_any_features(
    seed: int, rows: int, dim: int, classes: int, extra: int, constant: bool, kind: str
) -> None:
    """Whatever the scales, with a feature that never changes, and with classes that training lacks."""
    generator = np.random.default_rng(seed)
    x = (generator.normal(size=(rows, dim)) * 10.0 ** generator.uniform(-3, 3, dim)).astype(np.float32)
    x += generator.normal(size=dim).astype(np.float32)
    if constant and dim > 1:
        x[:, 0] = 0.1
    y = np.concatenate([np.arange(classes), generator.integers(0, classes, rows - classes)])
    shuffled = generator.permutation(classes + extra)[:classes]  # which of all the classes are there
    fitted = fit_sklearn(head(kind), x, shuffled[y], task=CLASSIFICATION, classes=classes + extra)
    theirs = pipeline(kind, CLASSIFICATION, x, True).fit(x.astype(np.float64), shuffled[y])
    expected = theirs.decision_function(x.astype(np.float64))
    found = decisions(fitted, x)
    tolerance = {"rtol": 1e-6, "atol": 1e-6 * max(1.0, float(np.abs(expected).max()))}
    if classes == 2:
        first, second = sorted(shuffled)
        np.testing.assert_allclose(found[:, second] - found[:, first], expected, **tolerance)
        np.testing.assert_allclose(found[:, second], expected / 2, **tolerance)
    else:
        np.testing.assert_allclose(found[:, np.sort(shuffled)], expected, **tolerance)
    p = fitted.outputs(x)
    missing = np.setdiff1d(np.arange(classes + extra), shuffled)
    assert (p[:, missing] == 0).all()
    np.testing.assert_allclose(p.sum(axis=1), 1)
    assert (theirs.classes_[expected.argmax(1)] if classes > 2 else theirs.predict(x)).tolist() == p.argmax(1).tolist()


def test_a_class_of_one_row_is_a_note_in_our_words() -> None:
    x = np.random.default_rng(3).normal(size=(23, 4)).astype(np.float32)
    fitted = fit_sklearn(head("lda"), x, np.minimum(np.arange(23), 2), task=CLASSIFICATION, classes=3)
    assert any("a class has a single training row" in note for note in fitted.notes)


def test_a_planted_fault_in_folding_would_be_seen() -> None:
    x, y, classes = data(CLASSIFICATION)
    theirs = pipeline("linear", CLASSIFICATION, x, True).fit(x.astype(np.float64), y)
    unfolded = theirs[-1].coef_, theirs[-1].intercept_
    wrong = FittedSklearn(CLASSIFICATION, classes, unfolded, None, ())
    assert np.abs(decisions(wrong, x) - theirs.decision_function(x.astype(np.float64))).max() > 1


def test_l2_is_one_over_c_and_options_overrule_it() -> None:
    x, y, _ = data(CLASSIFICATION)
    x = x.astype(np.float64)
    own = make_pipeline(StandardScaler(), LogisticRegression(C=4.0, max_iter=1000)).fit(x, y)
    for keywords in ({"l2": 0.25}, {"l2": 9.0, "options": {"C": 4.0}}):
        np.testing.assert_allclose(
            fit("linear", CLASSIFICATION, **keywords).outputs(x), own.predict_proba(x), atol=1e-9
        )
    strong, weak = (np.abs(fit("ridge", REGRESSION, options={"alpha": a}).linear[0]).sum() for a in (1e4, 1.0))
    assert strong < 0.1 * weak
    free = fit("linear", CLASSIFICATION, l2=0.0)
    assert np.abs(free.linear[0]).sum() > np.abs(fit("linear", CLASSIFICATION).linear[0]).sum()
    with pytest.raises(SpecError, match="linear-svm needs a penalty"):
        fit("linear-svm", CLASSIFICATION, l2=0.0)


@pytest.mark.parametrize("weights", [None, "w"])
def test_majority_equals_the_dummies(weights: str | None) -> None:
    generator = np.random.default_rng(0)
    rows = None if weights is None else generator.random(N).astype(np.float32).astype(float)
    for task, dummy in ((CLASSIFICATION, DummyClassifier(strategy="prior")), (REGRESSION, DummyRegressor())):
        x, y, classes = data(task)
        y = np.where(y == 3, 2, y) if task == CLASSIFICATION else y
        fitted = fit_sklearn(head("majority"), x, y, task=task, classes=classes, sample_weight=rows)
        theirs = dummy.fit(x, y, sample_weight=rows)
        found = fitted.outputs(x)
        if task == CLASSIFICATION:
            assert (found[:, 3] == 0).all()
            np.testing.assert_allclose(np.delete(found, 3, axis=1), theirs.predict_proba(x), rtol=1e-9)
        else:
            np.testing.assert_allclose(found, theirs.predict(x), rtol=1e-9)
    x, y, classes = data(MULTILABEL)
    y[:, 1], y[:, 2] = 0, 1
    found = fit_sklearn(head("majority"), x, y, task=MULTILABEL, classes=C, sample_weight=rows).outputs(x)
    share = np.average(y, axis=0, weights=rows)
    np.testing.assert_allclose(found[0, [0, 3, 4]], share[[0, 3, 4]], rtol=1e-9)
    assert 0 < found[0, 1] < 0.05
    assert 0.95 < found[0, 2] < 1


def test_one_class_is_enough_for_the_majority_and_for_nothing_else() -> None:
    x = data(CLASSIFICATION)[0]
    y = np.full(N, 2)
    assert fit_sklearn(head("majority"), x, y, task=CLASSIFICATION, classes=C).outputs(x)[:, 2].min() == 1
    for kind in KINDS.keys() - {"majority"}:
        with pytest.raises(TrainingError, match="of the same class"):
            fit_sklearn(head(kind), x, y, task=CLASSIFICATION, classes=C)


@pytest.mark.parametrize("standardize", [True, False])
def test_nearest_centroids_are_scikit_learns(standardize: bool) -> None:
    x, y, _ = data(CLASSIFICATION)
    y = np.array([1, 1, 4, 6, 6])[y]
    arguments = {"task": CLASSIFICATION, "classes": 8, "standardize": standardize}
    rows = labelled_rows_of(x, y, CLASSIFICATION, [*"abcdefgh"])
    state = sklearn_engine.fit_sklearn(rows, head("nearest-centroid"), TrainSpec(standardize=standardize)).state
    z = (x - x.mean(axis=0)) / x.std(axis=0) if standardize else x.astype(float)
    theirs = NearestCentroid().fit(z, y)
    np.testing.assert_allclose(state["output.weight"][[1, 4, 6]], theirs.centroids_, atol=1e-5)
    logits = z @ state["output.weight"].T + state["output.bias"]
    assert (logits.argmax(axis=1) == theirs.predict(z)).all()
    assert (
        {"output.mean", "output.scale"} <= set(state) if standardize else set(state) == {"output.weight", "output.bias"}
    )
    assert (state["output.bias"][[0, 2, 3, 5, 7]] == NEVER).all()
    weight, bias = fit_sklearn(head("nearest-centroid", metric="cosine"), x, y, **arguments).linear
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    means = np.stack([unit[y == label].mean(axis=0) for label in (1, 4, 6)])
    cosines = unit @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    assert (np.array([1, 4, 6])[cosines.argmax(axis=1)] == (z @ weight.T + bias).argmax(axis=1)).all()
    np.testing.assert_allclose(np.linalg.norm(weight[[1, 4, 6]], axis=1), 1)


def test_a_random_projection_keeps_few_dimensions() -> None:
    x, y, classes = data(CLASSIFICATION, dim=23)
    for dims in (8, 2):
        options = {} if dims == 8 else {"dims": dims}
        weight = fit_sklearn(head("random-projection", **options), x, y, task=CLASSIFICATION, classes=classes).linear[0]
        assert weight.shape == (classes, 23)
        assert np.linalg.matrix_rank(weight) == min(dims, classes - 1)
    assert fit("random-projection", CLASSIFICATION, options={"dims": 100}).linear[0].shape == (C, D)


@pytest.mark.parametrize("kind", [kind for kind in FITTED if MULTILABEL in KINDS[kind].tasks])
def test_labels_that_never_change_are_learnt_by_counting(kind: str) -> None:
    x, y, _ = data(MULTILABEL)
    y[:, 1], y[:, 4] = 0, 1
    fitted = fit_sklearn(head(kind), x, y, task=MULTILABEL, classes=C)
    assert fitted.notes == ("2 of 5 labels are the same in every training row: nothing is learnt",)
    p = fitted.outputs(x)
    np.testing.assert_allclose(p[:, 1], 1 / (N + 2))
    np.testing.assert_allclose(p[:, 4], 1 - 1 / (N + 2))
    alone = fit_sklearn(head(kind), x, y[:, :1], task=MULTILABEL, classes=1).outputs(x)
    np.testing.assert_allclose(alone[:, 0], p[:, 0], rtol=1e-6)


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize(("kind", "task"), [(kind, task) for kind, task in EVERY if kind in OTHER])
def test_estimators_say_what_they_say_alone(kind: str, task: Task, standardize: bool) -> None:
    x, y, classes = data(task)
    fitted = fit_sklearn(head(kind), x, y, task=task, classes=classes, standardize=standardize)
    assert fitted.linear is None
    found, options = checked_kind(head(kind), task)
    scaler = StandardScaler().fit(x)
    z = scaler.transform(x) if standardize and kind != "hist-gradient-boosting" else x
    estimator = found.build(Setting(task, 1.0, 0, D), options)
    if kind == "hist-gradient-boosting" and task != CLASSIFICATION:
        columns = [clone(estimator).fit(z, y[:, c]) for c in range(classes)]
        parts = [each.predict(z) if task == REGRESSION else each.predict_proba(z)[:, 1] for each in columns]
        expected = np.stack(parts, axis=1)
    else:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            estimator.fit(z, y)
        expected = estimator.predict(z) if task == REGRESSION else estimator.predict_proba(z)
        if isinstance(expected, list):
            expected = np.stack([each[:, 1] for each in expected], axis=1)
    np.testing.assert_allclose(fitted.outputs(x), expected, rtol=1e-6)
    assert fitted.outputs(x[:0]).shape == (0, classes)


@pytest.mark.parametrize("kind", OTHER)
def test_estimators_with_classes_that_are_not_there(kind: str) -> None:
    x, y, _ = data(CLASSIFICATION)
    y = np.array([1, 1, 4, 6, 6])[y]
    p = fit_sklearn(head(kind), x, y, task=CLASSIFICATION, classes=8).outputs(x)
    assert p.shape == (N, 8)
    assert (p[:, [0, 2, 3, 5, 7]] == 0).all()
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-5)
    two = fit_sklearn(head(kind), x, np.where(y == 1, 1, 4), task=CLASSIFICATION, classes=8).outputs(x)
    assert (two[:, [1, 4]].max(axis=0) > 0).all()


@pytest.mark.parametrize("kind", OTHER)
def test_estimators_with_labels_that_never_change_or_stand_alone(kind: str) -> None:
    x, y, _ = data(MULTILABEL)
    y[:, 1], y[:, 4] = 0, 1
    p = fit_sklearn(head(kind), x, y, task=MULTILABEL, classes=C).outputs(x)
    if kind == "mlp":  # one network for all labels: it learns what is constant like anything else
        assert p.shape == (N, C)
    else:
        assert (p[:, 1] == 0).all()
        assert (p[:, 4] == 1).all()
    one = fit_sklearn(head(kind), x, y[:, :1], task=MULTILABEL, classes=1).outputs(x)
    assert one.shape == (N, 1)
    assert one[y[:, 0] == 1].mean() > one[y[:, 0] == 0].mean()
    single = fit_sklearn(head(kind), x, data(REGRESSION)[1][:, 0], task=REGRESSION, classes=1)
    assert single.outputs(x).shape == (N, 1)


def test_targets_of_any_size_are_reached_by_the_network() -> None:
    x, y, _ = data(REGRESSION)
    fitted = fit_sklearn(HeadSpec("mlp", "sklearn", {"max_iter": 300}), x, 1e6 + 1e5 * y, task=REGRESSION, classes=R)
    said = fitted.outputs(x)
    assert (1 - np.square(said - 1e6 - 1e5 * y).sum(0) / np.square(1e5 * (y - y.mean(0))).sum(0)).min() > 0.8


@pytest.mark.parametrize(("kind", "task"), EVERY)
def test_the_same_seed_gives_the_same_bits(kind: str, task: Task) -> None:
    x = data(task)[0]
    first, again = fit(kind, task, seed=3), fit(kind, task, seed=3)
    np.testing.assert_array_equal(first.outputs(x), again.outputs(x))
    if kind in ("mlp", "random-projection"):
        assert np.abs(first.outputs(x) - fit(kind, task, seed=4).outputs(x)).max() > 1e-6


@pytest.mark.parametrize("kind", ["linear", "ridge", "hist-gradient-boosting"])
def test_class_weights_are_scikit_learns(kind: str) -> None:
    """The weight of a row is that of its class, in every one-vs-rest too: LinearSVC leaves the rest unweighted."""
    x, y, classes = data(CLASSIFICATION)
    y = np.where(np.arange(N) < 60, 0, y)
    scale = kind != "hist-gradient-boosting"
    balanced = compute_class_weight("balanced", classes=np.unique(y), y=y)
    for mine, theirs in (
        ("balanced", dict(enumerate(balanced.astype(np.float32).astype(float)))),  # weights are float32
        (np.array([1, 2, 3, 0.5, 0.125]), dict(enumerate([1, 2, 3, 0.5, 0.125]))),
    ):
        found = fit_sklearn(head(kind), x, y, task=CLASSIFICATION, classes=classes, class_weight=mine)
        own = pipeline(kind, CLASSIFICATION, x, scale)
        own[-1].set_params(class_weight=theirs)
        own.fit(x.astype(np.float64), y)
        if found.linear is None:
            np.testing.assert_allclose(found.outputs(x), own.predict_proba(x), rtol=1e-6)
        else:
            np.testing.assert_allclose(decisions(found, x), own.decision_function(x.astype(np.float64)), atol=1e-4)


# Not the MLP: minibatches are drawn by rows, so that two rows are not one of twice the weight.
@pytest.mark.parametrize("kind", ["linear", "ridge", "majority", "hist-gradient-boosting", "random-projection"])
@pytest.mark.parametrize("task", [CLASSIFICATION, MULTILABEL, REGRESSION])
def test_a_row_of_weight_two_is_two_rows(kind: str, task: Task) -> None:
    x, y, classes = data(task)
    rows = np.random.default_rng(5).integers(1, 3, N)
    arguments = {"task": task, "classes": classes, "standardize": False}
    options = {} if kind in ("ridge", "majority", "hist-gradient-boosting") else {"tol": 1e-10}
    if kind == "hist-gradient-boosting":  # without this, a leaf's least number of rows would count
        options = {"min_samples_leaf": 1, "max_leaf_nodes": 3}
    weighted = fit_sklearn(head(kind, **options), x, y, sample_weight=rows, **arguments)
    repeated = fit_sklearn(head(kind, **options), np.repeat(x, rows, 0), np.repeat(y, rows, 0), **arguments)
    plain = fit_sklearn(head(kind, **options), x, y, **arguments)
    np.testing.assert_allclose(weighted.outputs(x), repeated.outputs(x), rtol=2e-4, atol=1e-6)
    assert np.abs(weighted.outputs(x) - plain.outputs(x)).max() > 1e-4


def test_weights_of_rows_and_of_classes_multiply() -> None:
    x, y, _ = data(CLASSIFICATION)
    rows, classes = np.random.default_rng(1).integers(1, 9, N), np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    found = fit_sklearn(
        head("majority"), x, y, task=CLASSIFICATION, classes=C, sample_weight=rows, class_weight=classes
    )
    np.testing.assert_allclose(found.outputs(x)[0], np.bincount(y, rows * classes[y]) / (rows * classes[y]).sum())
    even = fit_sklearn(head("majority"), x, y, task=CLASSIFICATION, classes=C, class_weight="balanced")
    np.testing.assert_allclose(even.outputs(x), 1 / C)


@pytest.mark.parametrize("kind", ["linear", "majority", "hist-gradient-boosting"])
def test_labels_that_are_on_can_weigh_more(kind: str) -> None:
    x, y, _ = data(MULTILABEL)
    plain, heavy = (
        fit_sklearn(head(kind), x, y, task=MULTILABEL, classes=C, class_weight=each).outputs(x)
        for each in (None, np.array([1.0, 5.0, 1.0, 1.0, 1.0]))
    )
    assert heavy[:, 1].mean() > plain[:, 1].mean() + 0.05
    np.testing.assert_allclose(np.delete(heavy, 1, axis=1), np.delete(plain, 1, axis=1), rtol=1e-6)
    even = fit_sklearn(head("majority"), x, y, task=MULTILABEL, classes=C, class_weight="balanced").outputs(x)
    np.testing.assert_allclose(even, 0.5)


def test_warnings_become_notes() -> None:
    assert fit("linear", CLASSIFICATION).notes == ()
    (note,) = fit("linear", CLASSIFICATION, options={"max_iter": 1}).notes
    assert note.startswith("the solver did not converge")
    assert note.endswith("raise max_iter, or standardize the features")
    assert "\n" not in note
    assert "hasn't converged" in fit("mlp", MULTILABEL).notes[0]
    x, y, _ = data(CLASSIFICATION, rows=7)
    (note,) = fit_sklearn(head("knn"), x, y, task=CLASSIFICATION, classes=C).notes
    assert note == "knn asks for 10 neighbours and has 7 rows: it uses them all"


def former_neighbours(x: Any, y: Any, task: Task) -> Pipeline:
    """Nearest neighbours as former versions saved them: scikit-learn's."""
    scaler = StandardScaler().fit(x)
    kind = KNeighborsRegressor if task == REGRESSION else KNeighborsClassifier
    neighbours = kind(10, metric="euclidean", algorithm="brute").fit(scaler.transform(x), y)
    return Pipeline([("scale", scaler), ("head", neighbours)])


def nodes_of(path: Path) -> set[tuple[str, str]]:
    with zipfile.ZipFile(path) as file:
        return set(sklearn_io._nodes(json.loads(file.read("schema.json"))))


def test_every_estimator_comes_back_and_the_list_holds_nothing_else(tmp_path: Path) -> None:
    """The same bits after a file, for every kind and task; and no type is trusted that none of them needs."""
    seen = set()
    for kind in (*OTHER, "knn"):
        for task in KINDS[kind].tasks:
            for two in (False, True):
                x, y, classes = data(task)
                if two:
                    y, classes = (y % 2, 2) if task == CLASSIFICATION else (y[:, :2].copy(), 2)
                    if task == MULTILABEL:
                        y[:, 1] = 1
                if kind == "knn":
                    estimator = former_neighbours(x, y, task)
                else:
                    estimator = fit_sklearn(head(kind), x, y, task=task, classes=classes).estimator
                path = tmp_path / "model.skops"
                save_estimator(path, estimator)
                seen |= nodes_of(path)
                again = load_estimator(path)
                expected = outputs(estimator, x, task, classes)
                np.testing.assert_array_equal(outputs(again, x, task, classes), expected)
                twice = tmp_path / "again.skops"
                save_estimator(twice, again)
                np.testing.assert_array_equal(outputs(load_estimator(twice), x, task, classes), expected)
    numbers = {node for node in sklearn_io.TRUSTED if node[0] == "NdArrayNode"}
    assert sklearn_io.TRUSTED - numbers == seen - numbers


@pytest.fixture(scope="module")
def boosted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("boosted") / "model.skops"
    save_estimator(path, fit("hist-gradient-boosting", CLASSIFICATION).estimator)
    return path


def test_what_is_for_training_only_is_not_saved(tmp_path: Path) -> None:
    fitted = fit("mlp", CLASSIFICATION, options={"hidden": [101]})
    save_estimator(tmp_path / "model.skops", fitted.estimator)
    with zipfile.ZipFile(tmp_path / "model.skops") as file:
        arrays = sum(each.file_size for each in file.infolist() if each.filename.endswith(".npy"))
    assert arrays < 1.5 * 4 * (D * 101 + 101 + 101 * C + C) + 128 * 20


def harmful() -> Any:  # a function of ours in a file must not be found
    raise AssertionError("this must not run")


HOSTILE: list[tuple[str, Callable[[], Any], str]] = [
    ("another estimator", lambda: RandomForestClassifier(2), "RandomForestClassifier"),
    ("a function of NumPy", lambda: Pipeline([("scale", FunctionTransformer(np.exp)), ("head", None)]), "Function"),
    ("our function", lambda: Pipeline([("head", FunctionTransformer(harmful))]), "Function"),
    ("a bare type", lambda: {"a": RandomForestClassifier}, "RandomForestClassifier"),
    ("a method", lambda: [StandardScaler().fit], "MethodNode"),
    ("random numbers", lambda: np.random.default_rng(0), "Generator"),
    ("no pipeline", lambda: StandardScaler(), "not a pipeline of scale and head"),
    ("a list", lambda: [1, 2], "not a pipeline"),
    ("other steps", lambda: Pipeline([("a", StandardScaler()), ("head", StandardScaler())]), "not a pipeline"),
    ("a head that is none", lambda: Pipeline([("head", StandardScaler())]), "StandardScaler stands where"),
]


@pytest.mark.parametrize(("what", "make", "message"), HOSTILE, ids=[what for what, _, _ in HOSTILE])
def test_files_with_anything_else_are_refused(tmp_path: Path, what: str, make: Any, message: str) -> None:
    path = tmp_path / "model.skops"
    path.write_bytes(skops.io.dumps(make()))
    with pytest.raises(BundleError, match=message):
        load_estimator(path)


def rewritten(path: Path, target: Path, change: Callable[[dict[str, Any]], None], packing: int = 0) -> Path:
    """Copy a skops file with its schema changed."""
    with zipfile.ZipFile(path) as file, zipfile.ZipFile(target, "w", packing) as out:
        for name in file.namelist():
            content = file.read(name)
            if name == "schema.json":
                schema = json.loads(content)
                change(schema)
                content = json.dumps(schema).encode()
            out.writestr(name, content)
    return target


def first_node(schema: Any, ending: str) -> dict[str, Any]:
    if isinstance(schema, dict):
        if str(schema.get("__class__")).endswith(ending):
            return schema
        schema = list(schema.values())
    for each in schema if isinstance(schema, list) else ():
        if found := first_node(each, ending):
            return found
    return {}


def test_a_schema_that_was_tampered_with_is_refused(boosted: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.skops"

    def relabel(schema: dict[str, Any]) -> None:
        first_node(schema, "_BinMapper").update(__class__="system", __module__="os")

    def reload(schema: dict[str, Any]) -> None:
        first_node(schema, "_BinMapper").update(__loader__="FunctionNode")

    def downgrade(schema: dict[str, Any]) -> None:
        schema["protocol"] = 0

    def hide(schema: dict[str, Any]) -> None:
        first_node(schema, "_BinMapper").pop("__class__")

    def lose(schema: dict[str, Any]) -> None:
        first_node(schema, "_BinMapper").pop("content")

    def nest(schema: dict[str, Any]) -> None:
        inner = schema["content"]
        for _ in range(20_000):
            inner = {"x": inner}
        schema["content"] = {"x": 0}

    for change, message in (
        (relabel, r"holds os.system \(as ObjectNode\)"),
        (reload, r"holds sklearn.*_BinMapper \(as FunctionNode\)"),
        (downgrade, "not of skops protocol 2"),
        (hide, "holds sklearn.*None"),
        (lose, "not a head as this version writes them"),
        (nest, "not a head as this version writes them|cannot be read"),
    ):
        with pytest.raises(BundleError, match=message):
            load_estimator(rewritten(boosted, target, change))
    assert load_estimator(rewritten(boosted, target, lambda schema: None))
    with pytest.raises(BundleError, match="not packed as this version packs"):
        load_estimator(rewritten(boosted, target, lambda schema: None, zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04K\x01.", b"PK\x03\x04" + bytes(100), b"[" * 100_000],
    ids=["empty", "pickle", "half a zip", "json"],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.skops"
    path.write_bytes(content)
    with pytest.raises(BundleError, match="cannot be read"):
        load_estimator(path)
    deep = tmp_path / "deep.skops"
    with zipfile.ZipFile(deep, "w") as file:
        file.writestr("schema.json", "[" * 100_000)
    with pytest.raises(BundleError, match=r"cannot be read|not a head"):
        load_estimator(deep)


def test_a_file_that_was_cut_or_bent_is_refused(boosted: Path, tmp_path: Path) -> None:
    """Every cut is an error of ours; a flipped bit is one too, or gives an estimator that predicts without harm."""
    whole = boosted.read_bytes()
    path = tmp_path / "model.skops"
    x = data(CLASSIFICATION)[0]
    for at in range(0, len(whole), len(whole) // 23):
        path.write_bytes(whole[:at])
        with pytest.raises(BundleError):
            load_estimator(path)
        bent = bytearray(whole)
        bent[at] ^= 0x10
        path.write_bytes(bent)
        with contextlib.suppress(EmbedcacheError):
            outputs(load_estimator(path), x, CLASSIFICATION, C)


def saved_as_it_is(path: Path, pipeline: Any) -> Path:
    path.write_bytes(skops.io.dumps(pipeline))
    return path


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("left", 10**6), ("right", 10**6), ("left", 0), ("right", 0), ("feature_idx", D), ("feature_idx", -1),
        ("feature_idx", 2**40), ("is_categorical", 1),
    ],
)  # fmt: skip
def test_a_tree_that_points_outside_is_refused(boosted: Path, tmp_path: Path, field: str, value: int) -> None:
    """scikit-learn follows these numbers without looking: a crafted file would read other memory, or never end."""
    pipeline = load_estimator(boosted)
    nodes = pipeline[-1]._predictors[1][2].nodes
    nodes[field][int(np.flatnonzero(nodes["is_leaf"] == 0)[-1])] = value
    with pytest.raises(BundleError, match="a tree points outside of itself"):
        load_estimator(saved_as_it_is(tmp_path / "model.skops", pipeline))


def test_boosting_cannot_hide_in_another_step(boosted: Path, tmp_path: Path) -> None:
    wild = load_estimator(boosted)[-1]
    path = tmp_path / "model.skops"
    network = fit("mlp", REGRESSION).estimator
    network[-1].regressor_ = wild
    with pytest.raises(BundleError, match="HistGradientBoostingClassifier stands where MLPRegressor"):
        load_estimator(saved_as_it_is(path, network))
    scaled = fit("mlp", CLASSIFICATION).estimator
    scaled.steps[0] = ("scale", wild)
    with pytest.raises(BundleError, match="stands where StandardScaler"):
        load_estimator(saved_as_it_is(path, scaled))
    several = fit("hist-gradient-boosting", MULTILABEL).estimator
    several[-1].estimators_[0] = fit("hist-gradient-boosting", MULTILABEL).estimator[-1]
    with pytest.raises(BundleError, match="MultiOutputClassifier stands where"):
        load_estimator(saved_as_it_is(path, several))
    counted = load_estimator(boosted)
    counted[-1].n_features_in_ = float(D)
    with pytest.raises(BundleError, match="the number of features is not a number"):
        load_estimator(saved_as_it_is(path, counted))
    rounds = load_estimator(boosted)
    rounds[-1]._predictors[0].append(rounds[-1]._predictors[0][0])
    with pytest.raises(BundleError, match="too many trees"):
        load_estimator(saved_as_it_is(path, rounds))


def test_neighbours_are_fitted_on_what_is_there(tmp_path: Path) -> None:
    """Search relies on as many labels as rows; a file may say otherwise."""
    path = tmp_path / "model.skops"
    for wrong in (np.zeros(3, int), np.full(N, 10**9)):
        pipeline = former_neighbours(*data(CLASSIFICATION)[:2], CLASSIFICATION)
        pipeline[-1]._y = wrong
        with pytest.raises(BundleError, match="not a head as this version writes them"):
            load_estimator(saved_as_it_is(path, pipeline))


def test_saving_what_could_not_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="RandomForestClassifier"):
        save_estimator(tmp_path / "model.skops", Pipeline([("head", RandomForestClassifier(2))]))
    assert not list(tmp_path.iterdir())


def test_without_skops_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, boosted: Path) -> None:
    monkeypatch.setitem(sys.modules, "skops.io", None)
    with pytest.raises(MissingExtraError, match=r"skops.*pip install 'embedcache\[sklearn-io\]'"):
        load_estimator(boosted)
    with pytest.raises(MissingExtraError, match="saving this head"):
        save_estimator(tmp_path / "model.skops", None)


def test_an_estimator_of_another_task_is_refused(boosted: Path) -> None:
    estimator, x = load_estimator(boosted), data(CLASSIFICATION)[0]
    with pytest.raises(BundleError, match="its classes are"):
        outputs(estimator, x, CLASSIFICATION, C - 1)
    with pytest.raises(BundleError, match="does not fit multilabel"):
        outputs(estimator, x, MULTILABEL, 1)
    with pytest.raises(BundleError, match="5 outputs, expected 3"):
        outputs(estimator, x, MULTILABEL, 3)
    with pytest.raises(BundleError, match="1 outputs, expected 3"):
        outputs(estimator, x, REGRESSION, 3)
    for bad in (x[:, :3], x[0], x[:, :, None]):
        with pytest.raises(FeatureError, match=r"expected \[N, 7\]"):
            outputs(estimator, bad, CLASSIFICATION, C)


@pytest.mark.parametrize(
    ("kind", "task", "options", "message"),
    [
        ("linear", CLASSIFICATION, {"c": 1}, r"the head linear has no option 'c'"),
        ("knn", CLASSIFICATION, {"neighbors": 3}, r"no option 'neighbors' \(did you mean n_neighbors\?\)"),
        ("majority", CLASSIFICATION, {"x": 1}, "it has none"),
        ("linear", CLASSIFICATION, {"C": -1}, "linear: C is -1, expected above 0"),
        ("linear", CLASSIFICATION, {"C": True}, "C is True"),
        ("linear", CLASSIFICATION, {"max_iter": 1.5}, "max_iter is 1.5, expected a whole number of at least 1"),
        ("linear", CLASSIFICATION, {"tol": math.nan}, "tol is nan"),
        ("ridge", REGRESSION, {"solver": "best"}, "solver is 'best', expected auto or svd or cholesky or lsqr"),
        ("knn", REGRESSION, {"n_neighbors": 0}, "n_neighbors is 0"),
        ("knn", REGRESSION, {"metric": ["cosine"]}, "metric is"),
        ("mlp", REGRESSION, {"hidden": []}, "hidden is "),
        ("mlp", REGRESSION, {"hidden": 100}, "hidden is 100, expected a list of widths"),
        ("lda", CLASSIFICATION, {"shrinkage": 2}, "shrinkage is 2"),
        ("lda", CLASSIFICATION, {"solver": "svd", "shrinkage": 0.5}, "the solver svd cannot shrink"),
        ("hist-gradient-boosting", CLASSIFICATION, {"max_leaf_nodes": 1}, "max_leaf_nodes is 1"),
        (
            "lda",
            REGRESSION,
            {},
            "the head lda cannot do regression: expected one of linear, logistic-regression, ridge",
        ),
        ("linear-svm", REGRESSION, {}, "cannot do regression"),
        ("residual", CLASSIFICATION, {}, "the head residual is torch's"),
        ("lineer", CLASSIFICATION, {}, "there is no head 'lineer'"),
    ],
)
def test_what_cannot_be_is_said(kind: str, task: Task, options: Any, message: str) -> None:
    x, y, classes = data(task)
    with pytest.raises(SpecError, match=message):
        fit_sklearn(HeadSpec(kind, "sklearn", options), x, y, task=task, classes=classes)


@pytest.mark.parametrize("x", [np.ones((N, 3, D)), (np.ones((2 * N, D)), 2 * np.arange(N + 1))])
def test_several_vectors_a_row_need_attention(x: Any) -> None:
    with pytest.raises(FeatureError, match=r"reads one vector a row,.* or the head attention or attention-pooling"):
        fit_sklearn(head("linear"), x, data(CLASSIFICATION)[1], task=CLASSIFICATION, classes=C)
    with pytest.raises(FeatureError, match=r"shape \[97\]: expected \[N, D\]"):
        fit_sklearn(head("linear"), np.ones(N), data(CLASSIFICATION)[1], task=CLASSIFICATION, classes=C)


def test_bad_data_is_refused() -> None:
    x, y, classes = data(CLASSIFICATION)
    bad = x.copy()
    bad[13, 2] = np.nan
    lost = y.copy()
    lost[3] = -2
    many, several = data(REGRESSION)[1].copy(), data(MULTILABEL)[1].copy()
    many[5, 1] = np.inf
    several[2, 1] = 255

    def with_weights(kind: str, **weights: Any) -> Callable[[], Any]:
        return lambda: fit_sklearn(head(kind), x, y, task=CLASSIFICATION, classes=classes, **weights)

    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (FeatureError, "row 13", lambda: fit_sklearn(head("linear"), bad, y, task=CLASSIFICATION, classes=C)),
        (InputError, "row 3 has the class -2", lambda: fit_sklearn(
            head("linear"), x, lost, task=CLASSIFICATION, classes=C)),
        (InputError, "expected 0 to 3", lambda: fit_sklearn(head("linear"), x, y, task=CLASSIFICATION, classes=4)),
        (InputError, "row 2 has labels other than 0 and 1", lambda: fit_sklearn(
            head("linear"), x, several, task=MULTILABEL, classes=C)),
        (InputError, "row 5 has an infinite target", lambda: fit_sklearn(
            head("ridge"), x, many, task=REGRESSION, classes=R)),
        (InputError, "targets are 3 wide, and there are 4 names", lambda: fit_sklearn(
            head("ridge"), x, data(REGRESSION)[1], task=REGRESSION, classes=4)),
        (InputError, "5 rows of features and 97 of targets", lambda: fit_sklearn(
            head("linear"), x[:5], y, task=CLASSIFICATION, classes=C)),
        (SpecError, "lda cannot weigh", with_weights("lda", sample_weight=np.arange(N))),
        (SpecError, "nearest-centroid cannot weigh", with_weights("nearest-centroid", class_weight="balanced")),
        (SpecError, "the head nearest-centroid cannot do regression", lambda: fit("nearest-centroid", REGRESSION)),
        (SpecError, "knn cannot weigh", with_weights("knn", class_weight="balanced")),
        (InputError, "sample weights must be 97", with_weights("linear", sample_weight=np.ones(3))),
        (InputError, "of 0 or more", with_weights("linear", sample_weight=-np.ones(N))),
        (InputError, "every sample weight is 0", with_weights("linear", sample_weight=np.zeros(N))),
        (SpecError, "class_weight is 'even'", with_weights("linear", class_weight="even")),
        (SpecError, "names '5', which is", with_weights("linear", class_weight=np.ones(6))),
        (TrainingError, "leaves no row", with_weights("linear", class_weight=np.zeros(C))),
        (SpecError, "this is a regression", lambda: fit("ridge", REGRESSION, class_weight="balanced")),
        (SpecError, "cannot weigh labels", lambda: fit("mlp", MULTILABEL, class_weight="balanced")),
        (TrainingError, "the only label", lambda: fit_sklearn(
            head("mlp"), x, np.ones((N, 1), np.uint8), task=MULTILABEL, classes=1)),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    # Equal weights are no weights: a head that cannot weigh takes them.
    with_weights("knn", sample_weight=np.full(N, 2.0))()


def test_options_are_read_as_what_they_are() -> None:
    given = {"hidden": [7, 5.0], "max_iter": 3.0, "alpha": 2}
    _, options = checked_kind(HeadSpec("mlp", "sklearn", given), CLASSIFICATION)
    assert options.widths("hidden") == (7, 5)
    assert (options.whole("max_iter"), type(options.whole("max_iter"))) == (3, int)
    assert (options.number("alpha"), type(options.number("alpha"))) == (2.0, float)
    assert options["activation"] == "relu"  # by default
    with pytest.raises(AssertionError):
        options.number("activation")


def test_option_names_are_what_the_kinds_have() -> None:
    assert option_names("knn", "sklearn") == ("n_neighbors", "weights", "temperature", "metric")
    assert option_names("majority", "sklearn") == ()
    with pytest.raises(SpecError, match="there is no head 'kn'"):
        option_names("kn", "sklearn")
    for kind in KINDS:
        checked_kind(HeadSpec(kind, "sklearn"), CLASSIFICATION)  # its own defaults are allowed


def test_a_class_that_training_never_saw_stays_at_zero_at_any_temperature() -> None:
    assert math.exp(NEVER / 20 + 100) == pytest.approx(0, abs=1e-170)


def test_neither_torch_nor_scikit_learn_comes_in_unasked() -> None:
    code = """
import sys, numpy as np
import embedcache.heads, embedcache.train.sklearn_engine as engine
from embedcache.heads.registry import option_names
from embedcache.heads.sklearn_kinds import KINDS
print([option_names(kind, 'sklearn') for kind in KINDS] and 'sklearn' in sys.modules, 'torch' in sys.modules)
from pathlib import Path
from embedcache.heads.sklearn_io import dump_estimator, load_estimator
from embedcache.heads.sklearn_io import outputs
from embedcache.spec import HeadSpec, TrainSpec
from embedcache.task import CLASSIFICATION
from embedcache.train.data import labelled_rows_of
x = np.random.default_rng(0).normal(size=(20, 3)).astype('f4')
for kind in ('linear', 'hist-gradient-boosting'):
    rows = labelled_rows_of(x, np.arange(20) % 2, CLASSIFICATION, ['a', 'b'])
    fitted = engine.fit_sklearn(rows, HeadSpec(kind, 'sklearn'), TrainSpec())
print('torch' in sys.modules, 'skops' in sys.modules)
data = dump_estimator(Path('model.skops'), fitted.estimator)
outputs(load_estimator(Path('model.skops'), data), x, CLASSIFICATION, 2)
print('torch' in sys.modules)
print('sklearn.externals.array_api_compat.torch' in sys.modules)  # kept out for a moment, not for good
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"] * 6


def test_skops_alone_would_take_what_is_refused_here() -> None:
    """So that the closed list is needed: skops trusts all of scikit-learn, and NumPy's functions."""
    for make in (lambda: Pipeline([("head", RandomForestClassifier(2))]), lambda: FunctionTransformer(np.exp)):
        assert skops.io.get_untrusted_types(data=skops.io.dumps(make())) == []
