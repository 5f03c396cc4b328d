"""The convex solver reaches scikit-learn's optimum: alone, along a path, fold by fold, and on awkward data."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_info, threadpool_limits

from embedcache.errors import FeatureError, InputError, SpecError, TrainingError
from embedcache.task import CLASSIFICATION, MULTILABEL, REGRESSION, Task
from embedcache.threads import Workers
from embedcache.train.convex import NEVER, Solution, path, path_folds, solve, walk_folds
from embedcache.train.convex import descent as descent_module
from embedcache.train.convex.curvature import Curvature
from embedcache.train.convex.descent import Objective, Pairs, Walk
from embedcache.train.convex.design import design, segments

Array = np.ndarray[Any, Any]
N, D = 211, 7


def rows(classes: int, *, n: int = N, d: int = D, seed: int = 0, noise: float = 2.0) -> tuple[Array, Array]:
    """Features of different sizes that overlap, float32 [n, d], and classes, each of which has a row."""
    generator = np.random.default_rng(seed)
    mix = generator.standard_normal((d, d)) * np.logspace(0, -1, d)
    x = (generator.standard_normal((n, d)) @ mix + generator.standard_normal(d)).astype(np.float32)
    said = x @ generator.standard_normal((d, classes)) + noise * generator.standard_normal((n, classes))
    y = said.argmax(axis=1)
    y[:classes] = np.arange(classes)
    return x, y


def objective(
    found: Solution, x: Array, y: Array, l2: float, task: Task, weight: Array | None = None, on: Array | None = None
) -> float:
    """The objective, written out again in the plainest way."""
    z = x.astype(np.float64) @ found.weight.T + found.bias
    w = found.weight
    if task == CLASSIFICATION:
        loss = np.logaddexp.reduce(z, axis=1) - z[np.arange(len(y)), y]
        w = w[1:] - w[:1] if len(w) == 2 else w
    elif task == MULTILABEL:
        loss = ((np.logaddexp(0, z) - y * z) * (1 if on is None else np.where(y == 1, on, 1))).sum(axis=1)
    else:
        loss = 0.5 * np.square(z - y).sum(axis=1)
    return float((loss * (1.0 if weight is None else weight)).sum() + l2 / 2 * np.square(w).sum())


def moved(found: Solution, by: Array) -> Solution:
    """The same head with its numbers moved by [C, D + 1]; of two classes the rows stay opposite."""
    if len(by) == 2:
        by = np.stack([-by[1], by[1]])
    return dataclasses.replace(found, weight=found.weight + by[:, :-1], bias=found.bias + by[:, -1])


def same(a: Solution, b: Solution, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(a.weight, b.weight, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(a.bias, b.bias, rtol=tolerance, atol=tolerance)


def of_sklearn(peer: Any, like: Solution) -> Solution:
    weight, bias = np.asarray(peer.coef_, np.float64), np.asarray(peer.intercept_, np.float64)
    if len(weight) == 1 and len(like.weight) == 2:
        weight, bias = np.vstack([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return dataclasses.replace(like, weight=weight, bias=bias)


@pytest.mark.parametrize("classes", [2, 3, 11])
@pytest.mark.parametrize("weights", ["equal", "rows", "classes", "balanced", "both"])
def test_the_optimum_is_that_of_logistic_regression(classes: int, weights: str) -> None:
    x, y = rows(classes)
    generator = np.random.default_rng(1)
    by_row = generator.integers(0, 4, N).astype(float) if weights in ("rows", "both") else None
    by_class: Any = {"classes": generator.uniform(0.2, 3, classes), "balanced": "balanced", "both": "balanced"}
    by_class = by_class.get(weights)
    l2 = 0.3
    found = solve(
        x, y, task=CLASSIFICATION, outputs=classes, l2=l2, sample_weight=by_row, class_weight=by_class,
        tolerance=1e-12,
    )  # fmt: skip
    given = dict(enumerate(by_class)) if isinstance(by_class, np.ndarray) else by_class
    peer = LogisticRegression(C=1 / l2, class_weight=given, tol=1e-10, max_iter=10_000, solver="newton-cg")
    peer.fit(x.astype(np.float64), y, sample_weight=by_row)
    same(found, of_sklearn(peer, found))
    assert (np.argmax(x @ found.weight.T + found.bias, axis=1) == peer.predict(x)).all()
    assert found.converged
    if weights in ("equal", "rows"):
        ours, theirs = (objective(s, x, y, l2, CLASSIFICATION, by_row) for s in (found, of_sklearn(peer, found)))
        assert abs(ours - theirs) < 1e-8 * theirs
        assert found.loss == pytest.approx(ours, rel=1e-6)


def test_labels_are_as_many_logistic_regressions() -> None:
    x, y = rows(5)
    y = (np.random.default_rng(2).uniform(size=(N, 3)) < 1 / (1 + np.exp(-x[:, :3]))).astype(np.uint8)
    weight, on = np.linspace(0.5, 2, N), np.array([1.0, 3.0, 0.5])
    found = solve(x, y, task=MULTILABEL, outputs=3, l2=2.0, sample_weight=weight, class_weight=on, tolerance=1e-12)
    for label in range(3):
        peer = LogisticRegression(C=0.5, tol=1e-10, max_iter=10_000, class_weight={0: 1, 1: on[label]})
        peer.fit(x.astype(np.float64), y[:, label], sample_weight=weight)
        np.testing.assert_allclose(found.weight[label], peer.coef_[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.bias[label], peer.intercept_[0], rtol=1e-4, atol=1e-5)
    assert found.loss == pytest.approx(objective(found, x, y, 2.0, MULTILABEL, weight, on), rel=1e-6)


@pytest.mark.parametrize("standardize", [False, True])
def test_values_are_ridge_regression(standardize: bool) -> None:
    x, _ = rows(2)
    y = x[:, :3] @ np.ones((3, 5)) + np.random.default_rng(3).standard_normal((N, 5)) + 7
    weight = np.linspace(0.5, 2, N)
    for given_weight in (None, weight):
        found = solve(
            x, y, task=REGRESSION, outputs=5, l2=3.0, sample_weight=given_weight, standardize=standardize
        )  # fmt: skip
        scaler = StandardScaler().fit(x.astype(np.float64), sample_weight=given_weight)
        inner = scaler.transform(x.astype(np.float64)) if standardize else x.astype(np.float64)
        peer = Ridge(alpha=3.0, solver="svd").fit(inner, y, sample_weight=given_weight)
        np.testing.assert_allclose(x @ found.weight.T + found.bias, peer.predict(inner), rtol=1e-5, atol=1e-5)
        if not standardize:
            assert found.loss == pytest.approx(objective(found, x, y, 3.0, REGRESSION, given_weight), rel=1e-9)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("l2", [0.0, 3.0])
def test_more_features_than_rows_have_the_same_ridge_regression(
    standardize: bool, l2: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are many, it comes from inner products of rows."""
    generator = np.random.default_rng(4)
    x = (generator.standard_normal((23, 61)) * generator.uniform(0.1, 3, 61) + 2).astype(np.float32)
    y = generator.standard_normal((23, 2)) + 5
    folds = np.arange(23) % 3
    for weight in (None, np.linspace(0, 2, 23)):
        given: dict[str, Any] = {
            "task": REGRESSION,
            "outputs": 2,
            "sample_weight": weight,
            "standardize": standardize,
        }
        found = []
        for threshold in (1024, 60):
            monkeypatch.setattr("embedcache.train.convex.solver._WIDE", threshold)
            (on_folds,) = path_folds(x, y, [l2], folds, **given)
            found.append([solve(x, y, l2=l2, **given), *on_folds])
        for narrow, wide in zip(*found, strict=True):
            same(narrow, wide, 1e-6)
            assert narrow.loss == pytest.approx(wide.loss, rel=1e-6, abs=1e-9)
    constant = solve(np.ones((5, 70), np.float32), y[:5], l2=l2, **given | {"sample_weight": None})
    np.testing.assert_allclose(constant.weight, 0)
    np.testing.assert_allclose(constant.bias, y[:5].mean(axis=0))


def test_no_penalty_is_least_squares_and_is_refused_for_classes() -> None:
    x, y = rows(3)
    x = np.hstack([x, x[:, :1]])  # duplicated: many solutions, and least squares takes that of least norm
    values = x[:, 0] + np.random.default_rng(4).standard_normal(N)
    found = solve(x, values, task=REGRESSION, outputs=1, l2=0)
    centred = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    wanted = np.linalg.lstsq(centred, values - values.mean(), rcond=None)[0]
    np.testing.assert_allclose(found.weight[0], wanted, atol=1e-6)
    with pytest.raises(SpecError, match="l2 is 0: a logistic loss"):
        solve(x, y, task=CLASSIFICATION, outputs=3, l2=0)


@given(
    classes=st.integers(2, 5), n=st.integers(11, 97), d=st.integers(1, 13), seed=st.integers(0, 2**31),
    l2=st.floats(1e-3, 1e3), standardize=st.booleans(), double=st.booleans(),
)  # fmt: skip
def test_no_step_from_the_solution_is_better(
    classes: int, n: int, d: int, seed: int, l2: float, standardize: bool, double: bool
) -> None:
    x, y = rows(classes, n=n, d=d, seed=seed)
    x = x.astype(np.float64 if double else np.float32)
    found = solve(x, y, task=CLASSIFICATION, outputs=classes, l2=l2, standardize=standardize, tolerance=1e-12)
    assert found.converged
    scale = StandardScaler().fit(x.astype(np.float64)).scale_ if standardize else np.ones(d)
    inner = x.astype(np.float64) / scale
    within = dataclasses.replace(found, weight=found.weight * scale)
    best = objective(within, inner, y, l2, CLASSIFICATION)
    assert found.loss == pytest.approx(best, rel=1e-6)
    # The gradient bounds how much better any head can be: by its squared norm over twice the penalty, biases aside.
    assert found.gradient_norm <= 1e-3 * max(1.0, np.abs(inner).sum())
    generator = np.random.default_rng(seed)
    for size in (1e-4, 1e-2, 1.0):
        step = generator.standard_normal((classes, d + 1)) * size
        assert objective(moved(within, step), inner, y, l2, CLASSIFICATION) >= best * (1 - 1e-9)


@pytest.mark.parametrize(("task", "outputs"), [(CLASSIFICATION, 2), (CLASSIFICATION, 5), (MULTILABEL, 3)])
def test_gradients_are_differences_of_losses(task: Any, outputs: int) -> None:
    x, y = rows(outputs)
    target = y if task == CLASSIFICATION else (y[:, None] == np.arange(outputs)).astype(np.uint8)
    masks = np.stack([np.arange(N) % 3 != 0, np.arange(N) % 5 != 1])
    made = design(
        x.astype(np.float64), target, task=task, outputs=outputs, masks=masks, standardize=True,
        sample_weight=np.linspace(0, 2, N), class_weight=np.linspace(1, 2, outputs),
    )  # fmt: skip
    value = Objective(made, np.float64, Workers())
    generator = np.random.default_rng(0)
    points = [generator.standard_normal(made.shape) for _ in range(2)]
    at = value(points, [0, 1], [0.7, 1.3])
    for problem, l2 in ((0, 0.7), (1, 1.3)):
        step = generator.standard_normal(made.shape)
        ahead, back = (
            value([points[problem] + sign * 1e-5 * step], [problem], [l2])[0][0] for sign in (1, -1)
        )  # fmt: skip
        assert (ahead - back) / 2e-5 == pytest.approx(float(np.vdot(at[problem][1], step)), rel=1e-6)


@pytest.mark.parametrize("classes", [2, 5])
def test_the_inverse_is_that_of_the_hessian_for_one_logit_and_near_it_for_more(classes: int) -> None:
    x, y = rows(classes)
    made = design(x.astype(np.float64), y, task=CLASSIFICATION, outputs=classes)
    value, point = Objective(made, np.float64, Workers()), made.start(0)
    inverse = Curvature(made, Workers()).at([point], [0], [0.7])[0]
    step = np.random.default_rng(0).standard_normal(made.shape)
    if classes > 2:
        step -= step.mean(axis=1, keepdims=True)  # the direction that moves only the penalty
    ahead, back = (value([point + sign * 1e-4 * step], [0], [0.7])[0][1] for sign in (1, -1))
    again = inverse((ahead - back) / 2e-4)
    # At the start all rows have the same probabilities, so the product of sums is exact but for the even share.
    np.testing.assert_allclose(again, step, rtol=2e-3, atol=2e-3)


@given(
    classes=st.integers(2, 4), seed=st.integers(0, 2**31), standardize=st.booleans(),
    l2s=st.lists(st.sampled_from([1e-2, 0.1, 1.0, 10.0, 300.0]), min_size=1, max_size=4),
)  # fmt: skip
def test_a_path_is_as_many_solutions(classes: int, seed: int, standardize: bool, l2s: list[float]) -> None:
    x, y = rows(classes, n=61, seed=seed)
    whole = path(x, y, l2s, task=CLASSIFICATION, outputs=classes, standardize=standardize, tolerance=1e-11)
    assert [each.l2 for each in whole] == l2s
    for l2, each in zip(l2s, whole, strict=True):
        alone = solve(x, y, task=CLASSIFICATION, outputs=classes, l2=l2, standardize=standardize, tolerance=1e-11)
        assert each.loss == pytest.approx(alone.loss, rel=1e-7)
        same(each, alone, 1e-3)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_folds_are_scaled_and_solved_like_pipelines_of_their_own(classes: int, class_weight: str | None) -> None:
    x, y = rows(classes)
    x[:, 3] *= 50
    folds = np.random.default_rng(5).integers(0, 3, N)
    folds[:4] = -1  # every fold trains on these
    l2s = [0.1, 10.0]
    found = path_folds(
        x, y, l2s, folds, task=CLASSIFICATION, outputs=classes, standardize=True, tolerance=1e-11,
        class_weight=class_weight,
    )  # fmt: skip
    for at, l2 in enumerate(l2s):
        assert len(found[at]) == 3
        for fold, ours in enumerate(found[at]):
            kept = folds != fold
            peer = make_pipeline(
                StandardScaler(), LogisticRegression(C=1 / l2, tol=1e-9, max_iter=10_000, class_weight=class_weight)
            ).fit(x[kept].astype(np.float64), y[kept])
            wanted = peer.predict_proba(x.astype(np.float64))
            z = x @ ours.weight.T + ours.bias
            z = np.exp(z - z.max(axis=1, keepdims=True))
            np.testing.assert_allclose(z / z.sum(axis=1, keepdims=True), wanted, atol=1e-4)


@pytest.mark.parametrize("task", [CLASSIFICATION, MULTILABEL, REGRESSION])
@pytest.mark.parametrize("standardize", [False, True])
def test_folds_are_as_many_solutions(task: Any, standardize: bool) -> None:
    x, y = rows(3)
    target: Array = {MULTILABEL: (y[:, None] == np.arange(3)), REGRESSION: np.eye(3)[y] * 5}.get(task, y)
    target = target.astype(np.uint8) if task == MULTILABEL else target
    weight = np.linspace(0.1, 3, N)
    masks = np.random.default_rng(6).uniform(size=(2, N)) < 0.7
    found = path_folds(
        x, target, [5.0, 0.5], masks, task=task, outputs=3, sample_weight=weight, standardize=standardize,
        tolerance=1e-12,
    )  # fmt: skip
    for at, l2 in enumerate((5.0, 0.5)):
        for fold, mask in enumerate(masks):
            alone = solve(
                x[mask], target[mask], task=task, outputs=3, l2=l2, sample_weight=weight[mask], standardize=standardize,
                tolerance=1e-12,
            )  # fmt: skip
            same(found[at][fold], alone)
            assert found[at][fold].loss == pytest.approx(alone.loss, rel=1e-7)


def test_a_start_is_where_it_goes_on() -> None:
    for classes in (2, 5):
        x, y = rows(classes)
        cold = solve(x, y, task=CLASSIFICATION, outputs=classes, l2=0.5, standardize=True, tolerance=1e-10)
        warm = solve(x, y, task=CLASSIFICATION, outputs=classes, l2=0.5, standardize=True, start=cold)
        assert cold.iterations > 2
        assert warm.iterations <= 1
        same(cold, warm, 1e-4)
    with pytest.raises(SpecError, match="start has a weight"):
        solve(x[:, 1:], y, task=CLASSIFICATION, outputs=5, l2=1, start=cold)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda x: np.hstack([x, np.zeros((N, 1))]), id="a feature of zeros"),
        pytest.param(lambda x: np.hstack([x, np.full((N, 1), 3e4)]), id="a large constant"),
        pytest.param(lambda x: np.hstack([x, x[:, :1]]), id="a duplicate"),
        pytest.param(lambda x: x + 1e4, id="an offset that float32 hardly holds"),
        pytest.param(lambda x: x * np.logspace(-4, 3, D), id="features of very different sizes"),
    ],
)
@pytest.mark.parametrize("standardize", [False, True])
def test_awkward_features(spoil: Callable[[Array], Array], standardize: bool) -> None:
    x, y = rows(3)
    x = spoil(x.astype(np.float64)).astype(np.float32)
    found = solve(x, y, task=CLASSIFICATION, outputs=3, l2=0.1, standardize=standardize)
    scaler = StandardScaler(with_std=standardize).fit(x.astype(np.float64))
    inner = scaler.transform(x.astype(np.float64))
    peer = LogisticRegression(C=10, tol=1e-9, max_iter=20_000, solver="newton-cholesky").fit(inner, y)
    z = x.astype(np.float64) @ found.weight.T + found.bias
    p = np.exp(z - z.max(axis=1, keepdims=True))
    np.testing.assert_allclose(p / p.sum(axis=1, keepdims=True), peer.predict_proba(inner), atol=2e-4)
    assert found.converged


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("l2", [1e-6, 1e-10])
def test_separable_classes_and_hardly_a_penalty(classes: int, l2: float) -> None:
    y = np.arange(N) % classes
    x = (np.eye(classes)[y] * 5 + np.random.default_rng(0).uniform(-1, 1, (N, classes))).astype(np.float32)
    found = solve(x, y, task=CLASSIFICATION, outputs=classes, l2=l2)
    assert found.converged
    assert (np.argmax(x @ found.weight.T + found.bias, axis=1) == y).all()
    assert found.loss == pytest.approx(objective(found, x, y, l2, CLASSIFICATION), rel=1e-3, abs=1e-15 * N)
    peer = LogisticRegression(C=1 / l2, tol=1e-14, max_iter=10_000, solver="newton-cholesky")
    best = objective(of_sklearn(peer.fit(x.astype(np.float64), y), found), x, y, l2, CLASSIFICATION)
    assert found.loss <= best * (1 + 1e-4) + 1e-16 * N


def test_more_features_than_rows() -> None:
    x, y = rows(3, n=23, d=97)
    found = solve(x, y, task=CLASSIFICATION, outputs=3, l2=0.5)
    peer = LogisticRegression(C=2, tol=1e-9, max_iter=10_000).fit(x.astype(np.float64), y)
    same(found, of_sklearn(peer, found), 1e-3)
    assert found.iterations < 40


def test_features_by_the_thousand_are_seen_through_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedcache.train.convex.curvature._MOST_FEATURES", 38)
    x, y = rows(3, d=43)
    found = solve(x, y, task=CLASSIFICATION, outputs=3, l2=0.5)
    peer = LogisticRegression(C=2, tol=1e-9, max_iter=10_000).fit(x.astype(np.float64), y)
    same(found, of_sklearn(peer, found), 1e-3)


def test_a_class_without_rows_is_never_said() -> None:
    x, y = rows(5)
    y[y == 3] = 1
    found = solve(x, y, task=CLASSIFICATION, outputs=5, l2=1.0, tolerance=1e-12)
    peer = LogisticRegression(C=1, tol=1e-10, max_iter=10_000).fit(x.astype(np.float64), y)
    kept = [0, 1, 2, 4]
    np.testing.assert_allclose(found.weight[kept], peer.coef_, rtol=1e-4, atol=1e-5)
    assert found.bias[3] == NEVER
    assert not found.weight[3].any()
    # In one fold only, and going on from a solution that has the class.
    folds = np.where(y == 4, 0, np.arange(N) % 2)
    first, second = path_folds(x, y, [1.0], folds, task=CLASSIFICATION, outputs=5)[0]
    assert first.bias[[3, 4]].tolist() == [NEVER, NEVER]
    assert (second.bias == NEVER).tolist() == [False, False, False, True, False]
    assert first.converged
    assert second.converged
    again = solve(x, y, task=CLASSIFICATION, outputs=5, l2=1.0, start=found)
    same(again, found, 1e-5)
    on = np.stack([y == 0, np.zeros(N, bool), np.ones(N, bool)], axis=1).astype(np.uint8)
    labels = solve(x, on, task=MULTILABEL, outputs=3, l2=1.0)
    assert labels.bias[1] < -50 < 50 < labels.bias[2]
    assert labels.converged


def test_the_same_input_gives_the_same_bits() -> None:
    x, y = rows(5)
    folds = np.arange(N) % 5
    for _ in range(2):
        one, two = (solve(x, y, task=CLASSIFICATION, outputs=5, l2=0.1, standardize=True) for _ in range(2))
        assert one.weight.tobytes() == two.weight.tobytes()
        assert one.bias.tobytes() == two.bias.tobytes()
        one, two = (path_folds(x, y, [1, 0.1], folds, task=CLASSIFICATION, outputs=5)[1][3] for _ in range(2))
        assert one.weight.tobytes() == two.weight.tobytes()


@pytest.mark.parametrize("task", [CLASSIFICATION, REGRESSION])
def test_threads_change_no_bit(task: Any) -> None:
    x, y = rows(5, n=10_007)
    target = y if task == CLASSIFICATION else np.eye(5)[y]
    found = []
    for threads in (1, 2, 3):
        with threadpool_limits(threads, user_api="blas"):
            seen = threadpool_info()
            found.append(solve(x, target, task=task, outputs=5, l2=0.1, standardize=True))
            assert threadpool_info() == seen  # as many as before
    assert len({each.weight.tobytes() + each.bias.tobytes() for each in found}) == 1


def test_a_fault_on_a_thread_is_raised_and_blas_has_its_threads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rows(3, n=4099)
    monkeypatch.setattr(Objective, "_softmax", lambda *_: 1 / 0)
    with threadpool_limits(2, user_api="blas"):
        seen = threadpool_info()
        with pytest.raises(ZeroDivisionError):
            solve(x, y, task=CLASSIFICATION, outputs=3, l2=1.0)
        assert threadpool_info() == seen


def test_blocks_of_rows_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rows(3, n=1009)
    whole = solve(x.astype(np.float64), y, task=CLASSIFICATION, outputs=3, l2=0.1, standardize=True)
    monkeypatch.setattr("embedcache.threads._ROWS", 67)
    same(whole, solve(x.astype(np.float64), y, task=CLASSIFICATION, outputs=3, l2=0.1, standardize=True), 1e-6)


def test_too_few_iterations_are_said() -> None:
    x, y = rows(3)
    found = solve(x, y, task=CLASSIFICATION, outputs=3, l2=0.01, max_iterations=2)
    assert found.iterations == 2
    assert not found.converged


def bad(x: Array, row: int, value: float) -> Array:
    x = x.copy()
    x[row, 2] = value
    return x


X, Y = rows(3)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (FeatureError, "row 17 has the value nan in feature 2", {"x": bad(X, 17, np.nan)}),
        (FeatureError, "row 5 has the value -inf in feature 2", {"x": bad(X, 5, -np.inf)}),
        (FeatureError, "one vector a row", {"x": X[:, None]}),
        (FeatureError, "expected numbers", {"x": X.astype(str)}),
        (TrainingError, "no training row", {"x": X[:0], "y": Y[:0]}),
        (TrainingError, "every training row is of class 1", {"y": np.ones(N, int)}),
        (TrainingError, "every training row is of class 2", {"sample_weight": (Y == 2).astype(float)}),
        (InputError, "whole numbers from 0 to 2", {"y": Y + 1}),
        (InputError, "whole numbers from 0 to 2", {"y": Y.astype(float)}),
        (InputError, r"got \[210\]", {"y": Y[1:]}),
        (InputError, "row 0 has a target that is not finite", {"task": REGRESSION, "y": np.full((N, 3), np.nan)}),
        (SpecError, "two classes or more", {"outputs": 1}),
        (SpecError, "expected a positive number", {"l2": -1.0}),
        (SpecError, "expected a positive number", {"l2": float("nan")}),
        (SpecError, "sample_weight", {"sample_weight": -np.ones(N)}),
        (SpecError, "class_weight: expected 3", {"class_weight": [1, 2]}),
        (SpecError, "class_weight is 'even'", {"class_weight": "even"}),
        (SpecError, "this is a regression", {"task": REGRESSION, "y": np.ones((N, 3)), "class_weight": [1, 1, 1]}),
        (SpecError, "expected positive numbers", {"tolerance": 0.0}),
        (SpecError, "expected positive numbers", {"max_iterations": 0}),
    ],
)
def test_bad_input_is_named(error: type[Exception], match: str, change: dict[str, Any]) -> None:
    good = {"x": X, "y": Y, "task": CLASSIFICATION, "outputs": 3, "l2": 1.0} | change
    with pytest.raises(error, match=match):
        solve(good.pop("x"), good.pop("y"), **good)


def test_bad_folds_are_named() -> None:
    given = {"task": CLASSIFICATION, "outputs": 3}
    for folds in (np.zeros(N - 1, int), np.zeros(N), np.where(np.arange(N) % 2, 0, 2), np.full(N, -1)):
        with pytest.raises(SpecError, match="folds: expected"):
            path_folds(X, Y, [1.0], folds, **given)
    with pytest.raises(TrainingError, match="there is no training row with a weight above 0"):
        path_folds(X, Y, [1.0], np.zeros(N, int), **given)
    with pytest.raises(TrainingError, match="fold 1: every training row is of class 0"):
        path_folds(X, Y, [1.0], np.stack([Y > 0, Y == 0]), **given)
    with pytest.raises(SpecError, match="at least one l2"):
        path(X, Y, [], **given)


def forgetful(*arguments: Any, **options: Any) -> Any:
    """A design whose heads forget that features were centred."""
    right = design(*arguments, **options)
    return dataclasses.replace(right, mean=np.zeros_like(right.mean))


@pytest.mark.parametrize("fault", ["penalty", "bias", "half", "early", "shift"])
def test_planted_faults_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rows(3)
    peer = LogisticRegression(C=1 / 0.3, tol=1e-10, max_iter=10_000).fit(x.astype(np.float64), y)
    right = Objective.__call__

    def wrong(self: Objective, points: Any, problems: Any, strengths: Any) -> Any:
        found = right(self, points, problems, strengths)
        for point, (_, gradient), l2 in zip(points, found, strengths, strict=True):
            if fault == "penalty":
                gradient[:-1] -= 0.1 * l2 * point[:-1]
            elif fault == "bias":
                gradient[-1] = 0
            elif fault == "half":
                gradient[:, 0] += 0.01
        return found

    monkeypatch.setattr(Objective, "__call__", wrong)
    tolerance = 1e-2 if fault == "early" else 1e-9
    if fault == "shift":
        monkeypatch.setattr("embedcache.train.convex.solver.design", forgetful)
    found = solve(x, y, task=CLASSIFICATION, outputs=3, l2=0.3, tolerance=tolerance)
    with pytest.raises(AssertionError):
        same(found, of_sklearn(peer, found))


def chosen(x: Array, y: Array, folds: Array, **how: Any) -> tuple[float, float, int]:
    """The penalty of least log loss out of fold, how far the losses are from the optimum's at most, and the steps."""
    given: Any = {"task": CLASSIFICATION, "outputs": 5, "standardize": True}
    l2s = list(np.logspace(1, -2, 7))

    def losses(solved: list[list[Solution]]) -> Array:
        out = np.zeros((len(l2s), len(y)))
        for place, by_fold in enumerate(solved):
            for fold, found in enumerate(by_fold):
                held = folds == fold
                z = x[held] @ found.weight.T + found.bias
                out[place, held] = np.logaddexp.reduce(z, axis=1) - z[np.arange(len(z)), y[held]]
        return out.mean(axis=1)

    tight, found = (path_folds(x, y, l2s, folds, **given, **options) for options in ({"tolerance": 1e-9}, how))
    exact, loose = losses(tight), losses(found)
    assert how or loose.argmin() == exact.argmin()
    return (
        l2s[int(loose.argmin())],
        float(np.abs(loose - exact).max()),
        sum(s.iterations for each in found for s in each),
    )


def test_folds_stop_where_a_choice_can_no_longer_change_and_a_looser_gap_is_seen() -> None:
    x, y = rows(5, noise=0.3)  # weak penalties separate them, and the loss goes to zero
    folds = np.arange(N) % 3
    _, off, steps = chosen(x, y, folds, gap=1e-6)
    assert off < 5e-3  # nats, of a loss whose own interval is ten times as wide
    _, _, tight = chosen(x, y, folds, tolerance=1e-7)
    assert steps < 0.9 * tight
    _, wrong, _ = chosen(x, y, folds, gap=1e-2)
    assert wrong > 5e-3


def test_a_walk_gives_each_penalty_as_it_is_solved_and_rows_of_no_problem_cost_nothing() -> None:
    x, y = rows(5)
    folds = np.arange(N) % 3
    given: Any = {"task": CLASSIFICATION, "outputs": 5}
    walked = list(walk_folds(x, y, [0.1, 3.0, 1.0], folds, **given))
    assert [l2 for l2, _ in walked] == [3.0, 1.0, 0.1]
    whole = path_folds(x, y, [0.1, 3.0, 1.0], folds, **given)
    for l2, solutions in walked:
        np.testing.assert_array_equal(solutions[1].weight, whole[[0.1, 3.0, 1.0].index(l2)][1].weight)
    masks = folds[None] != np.arange(3)[:, None]
    ordered = segments(design(x, y, masks=masks, **given))
    assert [segment.inside.sum() for segment in ordered[3]] == [2, 2, 2]
    assert all(segment.plain for segment in ordered[3])
    weighed = segments(design(x, y, masks=masks, class_weight=[1, 2, 3, 4, 5], **given))
    assert not any(segment.plain for segment in weighed[3])


def test_a_wrong_inverse_costs_steps_and_not_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rows(3)
    right = solve(x, y, task=CLASSIFICATION, outputs=3, l2=0.3)
    monkeypatch.setattr(Curvature, "at", lambda self, points, *_, **__: [lambda gradient: gradient / 30] * len(points))
    slow = solve(x, y, task=CLASSIFICATION, outputs=3, l2=0.3, tolerance=1e-11)
    same(right, slow, 1e-3)
    assert slow.iterations > 1.5 * right.iterations
    assert descent_module._MEMORY > 3


def test_every_blas_has_one_thread_while_blocks_are_worked_on() -> None:
    # scipy's own BLAS, were it loaded later, would keep its threads: ten times the seconds on shared cores.
    code = (
        "from embedcache.threads import workers\n"
        "with workers():\n"
        "    import scipy.linalg\n"
        "    from threadpoolctl import threadpool_info\n"
        "    found = [each['num_threads'] for each in threadpool_info() if each['user_api'] == 'blas']\n"
        "    assert found and set(found) == {1}, found"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_torch_is_not_needed() -> None:
    code = (
        "import sys, numpy as np\nfrom embedcache.task import CLASSIFICATION\n"
        "from embedcache.train.convex import solve\n"
        "x = np.random.default_rng(0).standard_normal((20, 3)).astype('f4')\n"
        "solve(x, np.arange(20) % 3, task=CLASSIFICATION, outputs=3, l2=1.0)\n"
        "assert not {'torch', 'transformers', 'h5py'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_steps_fit_problems_of_many_classes_that_separate_and_unscaled_ones_are_tried_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = rows(30, n=1000, d=24, noise=0.3)
    taken: list[bool] = []
    judge = Walk.judge

    def judged(walk: Walk, loss: float, gradient: Array) -> bool:
        taken.append(judge(walk, loss, gradient))
        return taken[-1]

    monkeypatch.setattr(Walk, "judge", judged)
    solve(x, y, task=CLASSIFICATION, outputs=30, l2=0.1, standardize=True)
    scaled, steps = len(taken), sum(taken)
    assert scaled <= 1.1 * steps
    taken.clear()
    monkeypatch.setattr(Pairs, "scale", lambda *_: None)
    solve(x, y, task=CLASSIFICATION, outputs=30, l2=0.1, standardize=True)
    assert len(taken) > 1.5 * scaled
    assert len(taken) > 1.5 * sum(taken)
