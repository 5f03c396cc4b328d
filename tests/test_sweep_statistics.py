"""Intervals and tests: numbers worked out by hand, what they promise under simulation, and faults that must show."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import small_summaries
from hypothesis import given
from hypothesis import strategies as st

from embedcache.decoding import from_json
from embedcache.sweep import statistics as stats
from embedcache.sweep.comparison import simplest
from embedcache.sweep.summary import LeaderboardRow
from embedcache.train.metrics import percentile_interval, wilson


def test_resampled_t_by_hand() -> None:
    # .78 .79 .80 .81 .82 have the mean .8 and s^2 = .00025
    mean, error, freedom = stats.resampled_t([0.78, 0.79, 0.80, 0.81, 0.82], 80, 20)
    assert mean == pytest.approx(0.8)
    assert error == pytest.approx(math.sqrt((1 / 5 + 1 / 4) * 0.00025))
    assert freedom == 4
    low, high = stats.resampled_t_interval([0.78, 0.79, 0.80, 0.81, 0.82], 80, 20) or (0, 0)
    assert high - mean == pytest.approx(2.7764451 * 0.010606602, rel=1e-6)  # t(.975, 4)
    assert mean - low == pytest.approx(high - mean)
    assert stats.resampled_t_interval([0.8], 80, 20) is None
    assert stats.resampled_t_test([0.1], 80, 20) is None


def test_resampled_t_test_by_hand() -> None:
    # differences with mean .01 and s^2 = .00025: t = .01 / .0106066 = .942809, p(4) two-sided
    p = stats.resampled_t_test([-0.01, 0.0, 0.01, 0.02, 0.03], 80, 20)
    assert p == pytest.approx(0.399, abs=5e-4)
    assert stats.resampled_t_test([0.0, 0.0, 0.0], 80, 20) == 1.0
    assert stats.resampled_t_test([0.1, 0.1, 0.1], 80, 20) == pytest.approx(0.0)


def test_mcnemar_by_hand() -> None:
    a = np.array([1] * 9 + [0] * 1 + [1] * 30, bool)
    b = np.array([0] * 9 + [1] * 1 + [1] * 30, bool)
    # 9 against 1 of 10: 2 * (C(10,0) + C(10,1)) / 2^10
    assert stats.mcnemar(a, b) == pytest.approx(22 / 1024)
    assert stats.mcnemar(b, a) == stats.mcnemar(a, b)
    assert stats.mcnemar(a, a) == 1.0


def test_wilson_by_hand() -> None:
    low, high = wilson(20, 20)
    assert high == 1.0
    assert low == pytest.approx(20 / (20 + 1.959964**2), rel=1e-6)
    assert wilson(0, 20) == (0.0, pytest.approx(1 - low))


def test_holm_by_hand() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_is_between_no_correction_and_bonferroni_and_keeps_the_order(p: list[float]) -> None:
    adjusted = stats.holm(p)
    for raw, each in zip(p, adjusted, strict=True):
        assert raw <= each <= min(1.0, len(p) * raw) + 1e-15
    order = sorted(range(len(p)), key=lambda at: p[at])
    assert all(adjusted[a] <= adjusted[b] for a, b in pairwise(order))


def test_resamples_draw_whole_groups() -> None:
    groups = np.array([0, 1, 0, 2, 3, 1])
    (times,) = stats.resamples(groups, 500, seed=5)
    assert times.shape == (500, 6)
    assert (times[:, 0] == times[:, 2]).all()
    assert (times[:, 1] == times[:, 5]).all()
    assert (times[:, [0, 1, 3, 4]].sum(1) == 4).all()
    again = np.concatenate(list(stats.resamples(groups, 500, seed=5)))
    assert np.array_equal(times, again)
    assert abs(float(times[:, 3].mean()) - 1) < 0.15


def test_bootstrap_error_is_that_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(size=997)
    means = np.concatenate([times @ values / 997 for times in stats.resamples(np.arange(997), 2000)])
    assert means.std() == pytest.approx(values.std() / math.sqrt(997), rel=0.06)
    low, high = percentile_interval(means) or (0, 0)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / math.sqrt(997), rel=0.1)
    assert percentile_interval(np.array([np.nan])) is None


def test_duplicates_are_one_observation() -> None:
    """A planted fault: rows repeated ten times must not make the interval narrower, which drawing rows would."""
    values = np.repeat(np.random.default_rng(1).normal(size=101), 10)
    groups = np.repeat(np.arange(101), 10)
    whole = np.concatenate([times @ values / times.sum(1) for times in stats.resamples(groups, 1000)])
    naive = np.concatenate([times @ values / 1010 for times in stats.resamples(np.arange(1010), 1000)])
    assert whole.std() > 2.5 * naive.std()


def test_bootstrap_test_has_no_floor() -> None:
    resampled = np.random.default_rng(2).normal(0.1, 0.01, 1000)
    assert stats.bootstrap_test(0.1, resampled, 1000) < 1e-15
    assert stats.bootstrap_test(0.0, resampled, 1000) == 1.0
    assert stats.bootstrap_test(0.1, np.full(5, np.nan), 1000) == 1.0
    assert stats.bootstrap_test(0.02, np.random.default_rng(3).normal(0.02, 0.01, 4000), 5000) == pytest.approx(
        0.0455, abs=0.01
    )


def test_mcnemar_rejects_a_true_null_no_more_often_than_it_says() -> None:
    generator = np.random.default_rng(4)
    rejected = 0
    for _ in range(400):
        a, b = generator.random((2, 211)) < 0.8
        rejected += stats.mcnemar(a, b) < 0.05
    assert rejected / 400 < 0.07


def test_the_corrected_interval_covers_where_the_plain_one_does_not() -> None:
    """Scores over folds whose training sets overlap, so that they share an error: correlation 1 / k as in the paper."""
    generator = np.random.default_rng(5)
    plain = corrected = 0
    for _ in range(600):
        shared, own = generator.normal(size=1), generator.normal(size=5)
        scores = math.sqrt(0.2) * shared + math.sqrt(0.8) * own  # variance 1, correlation 0.2 = 20 / (80 + 20)
        low, high = stats.resampled_t_interval(scores.tolist(), 80, 20) or (0, 0)
        corrected += low <= 0 <= high
        half = 2.776 * scores.std(ddof=1) / math.sqrt(5)
        plain += abs(scores.mean()) <= half
    assert corrected / 600 == pytest.approx(0.95, abs=0.03)
    assert plain / 600 < 0.88


@pytest.mark.parametrize("heads", [2, 10])
def test_the_group_keeps_a_best_head(heads: int) -> None:
    """All heads equally good: the first, truly best like the others, is in the group 95 times in 100 or more."""
    generator = np.random.default_rng(6)
    kept = 0
    for _ in range(200):
        right = generator.random((heads, 307)) < 0.75
        best = int(right.sum(1).argmax())
        p = [stats.mcnemar(right[at], right[best]) for at in range(heads) if at != best]
        adjusted: list[float | None] = list(stats.holm(p))
        adjusted.insert(best, None)
        kept += stats.not_distinguishable(adjusted)[0]
    assert kept / 200 >= 0.93


def test_a_clearly_worse_head_is_told_apart_and_the_winner_never_is() -> None:
    generator = np.random.default_rng(7)
    good, bad = generator.random(1009) < 0.9, generator.random(1009) < 0.7
    assert stats.not_distinguishable([None, *stats.holm([stats.mcnemar(bad, good)])]) == [True, False]


def row(kind: str, parameters: int, score: float) -> LeaderboardRow:
    head = {"kind": kind, "engine": "torch", "options": {}}
    return from_json(LeaderboardRow, small_summaries.row(1, score, head=head, parameters=parameters))


def test_the_simplest_has_fewest_parameters_then_the_plainer_kind_then_the_better_score() -> None:
    small, large = row("linear", 100, 0.8), row("mlp", 900, 0.9)
    assert simplest([large, small], True) is small
    assert simplest([row("ridge", 100, 0.9), small, row("mine", 100, 0.95)], True) is small
    worse = row("linear", 100, 0.7)
    assert simplest([worse, small], True) is small
    assert simplest([worse, small], False) is worse
