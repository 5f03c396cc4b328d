"""Nearest neighbours: the votes against the formula in plain NumPy, the search against sorting all distances."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.errors import BundleError, SpecError
from embedcache.heads import TrainedHead, neighbours
from embedcache.heads.neighbours import FEATURES, SCALE, TARGETS, TrainingRows, Vote
from embedcache.heads.trained import logits_of_each
from embedcache.spec import HeadSpec, TrainSpec
from embedcache.task import CLASSIFICATION, MULTILABEL, REGRESSION, Task
from embedcache.train import train_head

N, D, C, Q = 61, 13, 5, 23
generator = np.random.default_rng(0)
X = (generator.normal(size=(N, D)) + 2).astype(np.float32)
X[41], X[42] = X[7], X[7]  # three rows that are equally near to any other
NEW = (generator.normal(size=(Q, D)) + 2).astype(np.float32)
NEW[5], NEW[6] = X[7], 3 * X[11]
Y = {
    CLASSIFICATION: generator.integers(0, C, N),
    MULTILABEL: generator.integers(0, 2, (N, C)).astype(np.uint8),
    REGRESSION: 50 * generator.normal(size=(N, C)),
}


def fitted(task: Task = CLASSIFICATION, standardize: bool = False, x: Any = X, **options: Any) -> TrainedHead:
    rows = {"task": task.name, "class_names": [*"abcde"], "progress": False}
    head = HeadSpec("knn", "sklearn", options)
    return train_head(x, Y[task], head=head, spec=TrainSpec(standardize=standardize), **rows).head


def reference(task: Task, k: int, temperature: float, x: Any = X, new: Any = NEW) -> Any:
    """DINO's votes, straight from the formula: cosines, the k largest, exp(cosine / T), summed by class."""
    a, b = (np.asarray(v, np.float64) for v in (new, x))
    similarity = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
    out = np.zeros((len(a), C))
    for row, own in enumerate(similarity):
        nearest = sorted(range(len(b)), key=lambda place: (-round(own[place], 9), place))[:k]
        weight = np.exp(own[nearest] / temperature)
        y = np.eye(C)[Y[task][nearest]] if task is CLASSIFICATION else Y[task][nearest]
        out[row] = weight @ y / weight.sum()
    return out


@pytest.mark.parametrize("task", [CLASSIFICATION, MULTILABEL, REGRESSION])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (2, 0.07), (20, 0.07), (20, 0.5), (200, 0.1)])
@pytest.mark.filterwarnings("ignore:knn asks for 200 neighbours and has 61 rows")
def test_the_votes_are_the_formulas(task: Task, k: int, temperature: float) -> None:
    head = fitted(task, n_neighbors=k, weights="softmax", temperature=temperature)
    np.testing.assert_allclose(head.probabilities(NEW), reference(task, k, temperature), rtol=1e-5, atol=1e-9)
    if (k, temperature) == (20, 0.07):
        np.testing.assert_array_equal(fitted(task, n_neighbors=k, weights="softmax").logits(NEW), head.logits(NEW))


def test_standardised_features_are_compared_and_any_temperature_is_a_number() -> None:
    z = (X - X.mean(axis=0)) / X.std(axis=0)
    new = (NEW - X.mean(axis=0)) / X.std(axis=0)
    head = fitted(standardize=True, n_neighbors=7, weights="softmax")
    np.testing.assert_allclose(head.probabilities(NEW), reference(CLASSIFICATION, 7, 0.07, z, new), atol=1e-5)
    cold = fitted(n_neighbors=7, weights="softmax", temperature=1e-300)
    nearest = fitted(n_neighbors=1).predict(NEW)
    assert (cold.predict(NEW) == nearest)[np.arange(Q) != 5].all()  # row 5 has three that are equally near


@pytest.mark.parametrize("weights", ["uniform", "distance"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean", "manhattan"])
@pytest.mark.parametrize("task", [CLASSIFICATION, MULTILABEL, REGRESSION])
def test_the_others_are_scikit_learns(task: Task, metric: str, weights: str) -> None:
    from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

    theirs = (KNeighborsRegressor if task is REGRESSION else KNeighborsClassifier)(
        6, weights=weights, metric=metric, algorithm="brute"
    )
    x = np.random.default_rng(2).normal(size=(N, D)).astype(np.float32)  # without ties, where theirs takes any
    x[7] = NEW[5]
    theirs.fit(x.astype(np.float64), Y[task])
    expected = theirs.predict(NEW) if task is REGRESSION else theirs.predict_proba(NEW)
    expected = np.stack([label[:, 1] for label in expected], axis=1) if task is MULTILABEL else expected
    found = fitted(task, x=x, n_neighbors=6, metric=metric, weights=weights).probabilities(NEW)
    if (metric, weights) == ("cosine", "distance"):  # where the angle is 0, theirs is what is left of rounding
        np.testing.assert_allclose(np.delete(found, 5, 0), np.delete(expected, 5, 0), rtol=1e-5, atol=1e-12)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@given(
    seed=st.integers(0, 2**16), rows=st.integers(1, 40), dim=st.integers(1, 9), k=st.integers(1, 50),
    metric=st.sampled_from(["cosine", "euclidean", "manhattan"]), coarse=st.booleans(), far=st.sampled_from([0, 1e3]),
)  # fmt: skip
def test_the_search_is_sorting_all_distances(
    seed: int, rows: int, dim: int, k: int, metric: str, coarse: bool, far: float
) -> None:
    """In tiles smaller than the rows, with many ties: of equally near rows the first come first."""
    generator = np.random.default_rng(seed)
    a, b = (generator.integers(-1, 2, (n, dim)) if coarse else generator.normal(size=(n, dim)) for n in (17, rows))
    a, b = a + far, b + far
    if metric == "cosine":  # a vector of zeros is as near to any as rounding has it
        a[~a.any(axis=1)] = b[~b.any(axis=1)] = 1
    with pytest.MonkeyPatch.context() as patched:
        for name, value in (("_PART", 3), ("_TILE", 7), ("_CHUNK", 8), ("_PAIRS", 11)):
            patched.setattr(neighbours, name, value)
        found = list(TrainingRows({FEATURES: b, TARGETS: np.zeros(rows, int)}, metric).search(a, k))
    row, distance = np.concatenate([f.row for f in found]), np.concatenate([f.distance for f in found])
    if metric == "cosine":
        a, b = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-300) for v in (a, b))
        every = 1 - a @ b.T
    else:
        every = np.linalg.norm(a[:, None] - b, axis=2, ord=1 if metric == "manhattan" else 2)
    order = np.argsort(every.round(6), axis=1, kind="stable")[:, :k]
    if coarse and metric != "cosine":  # cosines that are equal on paper differ by how lengths are rounded
        np.testing.assert_array_equal(row, order)
    np.testing.assert_allclose(distance, np.take_along_axis(every, order, axis=1), atol=2e-6)


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "manhattan"])
def test_a_row_gets_its_bits_alone_and_in_any_company(metric: str) -> None:
    """Whatever its place and its neighbours in a batch, and however a product of matrices adds up."""
    generator = np.random.default_rng(1)
    x, new = (generator.normal(size=(n, 385)).astype(np.float32) for n in (701, 523))
    weights = "softmax" if metric == "cosine" else "distance"
    rows = TrainingRows({FEATURES: x, TARGETS: generator.integers(0, C, 701)}, metric)
    vote = [Vote(19, weights, 0.07)]
    (whole,) = rows.voted(new, vote, CLASSIFICATION, C)
    for part in (slice(3, 4), slice(100, 401), slice(257, 521, 3)):
        np.testing.assert_array_equal(rows.voted(new[part], vote, CLASSIFICATION, C)[0], whole[part])
    if metric == "cosine":  # the product is exact: a loop that adds up in another order gives the same
        a, b = rows._vectors(new[:5]).values, rows._vectors(x[:7]).values
        backwards = np.zeros((5, 7))
        for column in range(384, -1, -1):
            backwards += a[:, column, None] * b[None, :, column]
        np.testing.assert_array_equal(a @ b.T, backwards)


def test_a_vector_of_zeros_has_no_direction() -> None:
    x = X.copy()
    x[3] = 0
    rows = TrainingRows({FEATURES: x, TARGETS: Y[CLASSIFICATION]}, "cosine")
    (found,) = rows.search(np.concatenate([-NEW, 0 * NEW[:1]]), N)
    assert (found.row[:-1, 0] == 3).all()  # all others lie behind
    np.testing.assert_allclose(found.distance[:-1, 0], 1, atol=1e-8)
    np.testing.assert_allclose(found.distance[-1], 1, atol=1e-8)


def test_one_search_serves_many_votes_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    first = fitted(n_neighbors=3)
    specs = [{"n_neighbors": 1}, {"n_neighbors": 17, "weights": "distance"}, {"n_neighbors": 50, "weights": "softmax"}]
    heads = [first, *(replace(first, spec=HeadSpec("knn", "sklearn", options)) for options in specs)]
    alone = [head.logits(NEW) for head in heads]
    searched: list[int] = []
    real = TrainingRows.search
    monkeypatch.setattr(TrainingRows, "search", lambda self, x, k: searched.append(k) or real(self, x, k))
    for found, own in zip(logits_of_each(heads, NEW), alone, strict=True):
        np.testing.assert_array_equal(found, own)
    assert searched == [50]
    equal = fitted(n_neighbors=3)
    searched.clear()
    logits_of_each([first, equal], NEW)  # rows that are equal, and not the same arrays
    assert searched == [3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.1}, "knn: temperature goes with weights=softmax"),
        ({"weights": "softmax", "metric": "manhattan"}, "knn: weights=softmax is of cosines, and the metric is manhat"),
        ({"weights": "softmax", "temperature": 0}, "knn: temperature is 0, expected above 0"),
    ],
)
def test_votes_that_cannot_be_are_refused(options: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        fitted(**options)


@pytest.mark.parametrize("task", [CLASSIFICATION, MULTILABEL, REGRESSION])
def test_a_bundle_is_arrays(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = fitted(task, standardize=True, n_neighbors=9)
    head.save_pretrained(tmp_path / "run")
    monkeypatch.setitem(__import__("sys").modules, "skops.io", None)
    again = TrainedHead.from_pretrained(tmp_path / "run")
    np.testing.assert_array_equal(again.logits(NEW), head.logits(NEW))
    assert "the training rows" in (tmp_path / "run" / "README.md").read_text()
    with pytest.raises(SpecError, match="the head knn is training rows: it has no torch module"):
        _ = again.module


def other(**arrays: Any) -> Any:
    return lambda state: {**state, **{f"neighbours.{name}": value for name, value in arrays.items()}}


HOSTILE: list[tuple[Task, Any, str]] = [
    (CLASSIFICATION, other(targets=np.full(N, C)), "targets is not that of labelled rows (5 to 5, expected"),
    (CLASSIFICATION, other(targets=np.full(N, -1)), "targets is not that of labelled rows (a row has none)"),
    (CLASSIFICATION, other(targets=np.zeros(N - 1, np.int64)), "targets is int64 [60], expected int64 [61]"),
    (CLASSIFICATION, other(targets=np.zeros(N, np.float32)), "targets is float32 [61], expected int64 [61]"),
    (MULTILABEL, other(targets=np.full((N, C), 7, np.uint8)), "something other than 0, 1"),
    (MULTILABEL, other(targets=np.full((N, C), 255, np.uint8)), "a row has none"),
    (REGRESSION, other(targets=np.full((N, C), np.inf)), "infinity"),
    (REGRESSION, other(targets=np.full((N, C), np.nan)), "a row has none"),
    (CLASSIFICATION, other(features=np.full((N, D), np.nan, np.float32)), "features holds NaN"),
    (CLASSIFICATION, other(features=np.full((N, D), 1e33, np.float32)), "features holds 1e+33, expected 1e+30"),
    (CLASSIFICATION, other(features=np.zeros((N, D + 1), np.float32)), "features has the shape (61, 14), expected"),
    (CLASSIFICATION, other(features=np.zeros((N, D), np.int64)), "features is of type int64"),
    (CLASSIFICATION, other(features=np.zeros((0, D), np.float32), targets=np.zeros(0, np.int64)), "a row at least"),
    (CLASSIFICATION, other(features=np.zeros(N, np.float32)), "features has the shape (61,), expected (61, 13)"),
    (CLASSIFICATION, other(scale=np.ones(D, np.float32)), "lacks the array neighbours.mean"),
    (CLASSIFICATION, other(more=np.ones(D, np.float32)), "holds an array 'neighbours.more'"),
    (CLASSIFICATION, lambda state: {TARGETS: state[TARGETS]}, "lacks the array neighbours.features"),
    (CLASSIFICATION, lambda state: {"output.weight": np.zeros((C, D)), "output.bias": np.zeros(C)}, "lacks the array"),
]


@pytest.mark.parametrize(("task", "forge", "message"), HOSTILE, ids=range(len(HOSTILE)))
def test_rows_that_cannot_be_are_refused(task: Task, forge: Any, message: str, tmp_path: Path) -> None:
    head = fitted(task)
    replace(head, state=forge(head.state)).save_pretrained(tmp_path / "run")
    with pytest.raises(BundleError, match=re.escape(message)) as caught:
        TrainedHead.from_pretrained(tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert SCALE not in head.state
