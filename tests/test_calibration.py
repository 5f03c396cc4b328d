"""Temperatures and thresholds: closed cases, brute force, and that the loss never gets worse."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import f1_score

from embedcache.errors import SpecError, TrainingError
from embedcache.train.run import fit_temperature, fit_thresholds

N, C = 97, 5


def loss(logits: Any, y: Any, temperature: float = 1.0) -> float:
    return float(-log_softmax(logits / temperature, axis=1)[np.arange(len(y)), y].mean())


def sample(seed: int, rows: int, classes: int, temperature: float) -> tuple[Any, Any]:
    """Logits whose labels are drawn from ``softmax(logits / temperature)``."""
    generator = np.random.default_rng(seed)
    logits = 3 * temperature * generator.normal(size=(rows, classes))
    return logits, (logits / temperature + generator.gumbel(size=logits.shape)).argmax(axis=1)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0, 11.0])
def test_the_temperature_that_made_the_labels_is_found(temperature: float) -> None:
    logits, y = sample(0, 20_011, C, temperature)
    assert fit_temperature(logits, y) == pytest.approx(temperature, rel=0.03)
    assert fit_temperature(logits.astype(np.float32), y) == pytest.approx(temperature, rel=0.03)


@pytest.mark.parametrize(("right", "gap"), [(7, 2.0), (9, 0.7), (6, 5.0), (9, 0.2)])
def test_closed_case(right: int, gap: float) -> None:
    """All rows have the same two logits: the best temperature makes the confidence the share that is right."""
    logits = np.tile([[gap, 0.0]], (30, 1))
    y = np.array(([0] * right + [1] * (10 - right)) * 3)
    share = right / 10
    assert fit_temperature(logits, y) == pytest.approx(gap / np.log(share / (1 - share)), rel=1e-9)


def test_the_bounds_hold() -> None:
    logits = np.tile([[50.0, 0.0]], (30, 1))
    assert fit_temperature(logits, np.array([0, 1] * 15)) == pytest.approx(20.0)  # no confidence is too little
    assert fit_temperature(logits[:, ::-1], np.zeros(30, int)) == pytest.approx(20.0)  # always wrong
    assert fit_temperature(logits * 1e-9, np.array([0, 0, 1] * 10)) == pytest.approx(0.05)


def test_all_right_is_not_certainty() -> None:
    """Where every row is right, confidence is that of Platt's targets and not 1; more rows give more of it."""
    found = []
    for rows in (10, 100, 1000):
        logits = np.tile([[2.0, 0.0]], (rows, 1))
        temperature = fit_temperature(logits, np.zeros(rows, int))
        confidence = 1 / (1 + np.exp(-2 / temperature))
        assert confidence == pytest.approx(1 - 1 / (rows + 2) / 2, rel=1e-9)
        found.append(temperature)
    assert found == sorted(found, reverse=True)
    # More confidence than so many rows can tell is left as it is: less of it would be a higher loss on them.
    assert fit_temperature(np.tile([[50.0, 0.0]], (30, 1)), np.zeros(30, int)) == 1.0


@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(10, 61),
    classes=st.integers(2, 7),
    scale=st.floats(-6, 6),
    noise=st.floats(0, 1),
)
def test_the_loss_is_least_and_never_worse(seed: int, rows: int, classes: int, scale: float, noise: float) -> None:
    """Never worse than T = 1, and as low as a bounded search over 1 / T finds wherever some row is wrong."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, classes, rows)
    logits = 10.0**scale * (generator.normal(size=(rows, classes)) + 2 * (1 - noise) * np.eye(classes)[y])
    temperature = fit_temperature(logits, y)
    assert 0.05 * (1 - 1e-9) <= temperature <= 20 * (1 + 1e-9)
    found, before = loss(logits, y, temperature), loss(logits, y)
    assert found <= before * (1 + 1e-12) + 1e-12
    if (logits.argmax(axis=1) != y).any():
        search = minimize_scalar(
            lambda log: loss(logits, y, np.exp(log)), bounds=(np.log(0.05), np.log(20)), method="bounded"
        )
        assert found <= search.fun * (1 + 1e-9) + 1e-9


@given(seed=st.integers(0, 2**16), shift=st.floats(-1e3, 1e3), factor=st.floats(0.5, 2))
def test_shifts_change_nothing_and_scales_scale(seed: int, shift: float, factor: float) -> None:
    logits, y = sample(seed, 101, C, 1.5)
    temperature = fit_temperature(logits, y)
    assert fit_temperature(logits + shift * np.arange(101)[:, None] / 101, y) == pytest.approx(temperature, rel=1e-6)
    assert fit_temperature(logits * factor, y) == pytest.approx(temperature * factor, rel=1e-6)


def test_too_few_rows_are_left_alone() -> None:
    logits, y = sample(1, 40, C, 5.0)
    assert fit_temperature(logits[:9], y[:9]) == 1.0
    assert fit_temperature(logits[:10], y[:10]) != 1.0
    assert fit_temperature(logits, np.where(np.arange(40) < 9, y, -1)) == 1.0
    assert fit_temperature(logits[:0], y[:0]) == 1.0
    assert fit_temperature(np.ones((40, 1)), np.zeros(40, int)) == 1.0
    unlabelled = np.concatenate([y, np.full(7, -1)])
    assert fit_temperature(np.concatenate([logits, 9 * np.ones((7, C))]), unlabelled) == fit_temperature(logits, y)


def test_a_class_that_training_never_saw_does_not_spoil_it() -> None:
    logits, y = sample(2, 199, C, 2.0)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    own = logits.argmax(axis=1)
    for never in (-1e4, np.log(1e-15)):  # the bias of a linear head, the probability 0 of an estimator
        wide = np.hstack([logits, np.full((199, 2), never)])
        assert fit_temperature(wide, y) == pytest.approx(fit_temperature(logits, y), rel=1e-6)
        lost = y.copy()
        lost[:11] = C
        assert fit_temperature(wide, lost) == pytest.approx(fit_temperature(logits[11:], y[11:]), rel=1e-6)
        assert fit_temperature(wide, own) == pytest.approx(fit_temperature(logits, own), rel=1e-6)
        assert fit_temperature(wide, np.full(199, C)) == 1.0
    seen = np.hstack([logits, np.full((199, 1), -1e4)])
    seen[0, C] = 0.0  # not the same in every row, so that it was seen: its rows are wrong ones, and count
    assert fit_temperature(seen, lost) > 5


@pytest.mark.parametrize(
    ("logits", "y", "error", "message"),
    [
        (np.ones((3, 2)), np.zeros(2, int), SpecError, "does not fit"),
        (np.ones(3), np.zeros(3, int), SpecError, "does not fit"),
        (np.ones((3, 2)), np.array([0, 1, 2]), SpecError, "logits have 2 columns"),
        (np.array([[np.nan, 0.0]]), np.array([0]), TrainingError, "not finite"),
    ],
)
def test_bad_input_is_refused(logits: Any, y: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit_temperature(logits, y)


def best_f1(p: Any, y: Any) -> float:
    """The highest F1 over every cut that is possible, by brute force."""
    cuts = np.concatenate([np.unique(p), [2.0]])
    return max(f1_score(y, p >= cut, zero_division=0) for cut in cuts)


@given(seed=st.integers(0, 2**16), rows=st.integers(1, 23), steps=st.integers(1, 17), share=st.floats(0.05, 0.95))
def test_thresholds_are_the_best_there_are(seed: int, rows: int, steps: int, share: float) -> None:
    generator = np.random.default_rng(seed)
    y = (generator.random((rows, 3)) < share).astype(np.uint8)
    p = np.round(np.clip(generator.random((rows, 3)) + 0.2 * y, 0, 1) * steps) / steps
    thresholds = fit_thresholds(p, y)
    assert thresholds.dtype == np.float64
    for column in range(3):
        if y[:, column].any():
            found = f1_score(y[:, column], p[:, column] >= thresholds[column], zero_division=0)
            assert found == pytest.approx(best_f1(p[:, column], y[:, column]), rel=1e-12)
        else:
            assert thresholds[column] == 0.5


def test_thresholds_by_hand() -> None:
    p = np.array([[0.9, 0.1, 0.3], [0.2, 0.2, 0.3], [0.4, 0.7, 0.3], [0.1, 0.8, 0.3]])
    y = np.array([[1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 1, 0]], np.uint8)
    # Half-way between 0.4 and 0.2; 0.5 kept, being as good as anything; 0.5 for want of positives.
    np.testing.assert_allclose(fit_thresholds(p, y), [0.3, 0.5, 0.5], rtol=1e-12)
    everything = np.ones((4, 3), np.uint8)
    assert (p >= fit_thresholds(p, everything)).all()
    unknown = np.vstack([y, [[255, 1, 1]]])
    np.testing.assert_array_equal(fit_thresholds(np.vstack([p, [[0.0, 0.0, 0.0]]]), unknown), fit_thresholds(p, y))


@pytest.mark.parametrize("low", [0.0, 5e-324, 0.1, np.nextafter(1.0, 0)])
def test_neighbouring_floats_stay_apart(low: float) -> None:
    high = np.nextafter(low, 2)
    p = np.array([[low], [high], [low], [high]])
    y = np.array([[0], [1], [0], [1]], np.uint8)
    assert ((p >= fit_thresholds(p, y)) == y).all()
    assert (p[1::2] >= fit_thresholds(p, np.ones_like(y))).all()
    assert (p[::2] >= fit_thresholds(p, np.ones_like(y))).all()


def test_equal_thresholds_go_to_the_nearest_to_a_half() -> None:
    # At 0.5 nothing is taken, so that every cut is a better one; some labels make several equally good.
    p = np.array([[0.45], [0.35], [0.25], [0.15]])
    for labels in itertools.product([0, 1], repeat=4):
        y = np.array(labels, np.uint8)[:, None]
        if not y.any():
            continue
        cuts = {cut: f1_score(y[:, 0], p[:, 0] >= cut, zero_division=0) for cut in (0.4, 0.3, 0.2, 0.075)}
        best = max(cuts.values())
        expected = max(cut for cut, value in cuts.items() if value == pytest.approx(best))
        assert fit_thresholds(p, y)[0] == pytest.approx(expected)


def test_bad_probabilities_are_refused() -> None:
    with pytest.raises(SpecError, match="does not fit"):
        fit_thresholds(np.ones((3, 2)), np.ones((2, 3), np.uint8))
    with pytest.raises(TrainingError, match="not finite"):
        fit_thresholds(np.full((3, 2), np.nan), np.ones((3, 2), np.uint8))
    assert fit_thresholds(np.ones((0, 2)), np.ones((0, 2), np.uint8)).tolist() == [0.5, 0.5]
