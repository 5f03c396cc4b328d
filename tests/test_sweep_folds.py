"""Folds: stratified, by content, whatever the order of the rows; draws and subsets likewise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.errors import SweepError
from embedcache.fingerprint import row_key
from embedcache.sweep.problem import Fold, Strata, given_split, k_folds, shots, strata, subset
from embedcache.task import CLASSIFICATION, MULTILABEL, REGRESSION


def keys_of(contents: list[int]) -> np.ndarray:
    return np.array([list(row_key(str(each).encode())) for each in contents], np.uint8).reshape(-1, 16)


def classes(contents: list[int], y: list[int], count: int = 3) -> Strata:
    return strata(keys_of(contents), np.array(y, np.int64), CLASSIFICATION, [f"c{at}" for at in range(count)])


def check(fold: Fold, of: Strata) -> None:
    """No row, and no content, on two sides."""
    sides = [set(of.group[mask].tolist()) for mask in (fold.train, fold.stopping, fold.score)]
    assert sides[0].isdisjoint(sides[1] | sides[2])
    assert sides[1].isdisjoint(sides[2])


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2)), min_size=30, max_size=120), st.integers(2, 5))
def test_folds_cover_every_row_once_and_never_part_duplicates(rows: list[tuple[int, int]], folds: int) -> None:
    contents = [content for content, _ in rows] + list(range(100, 115))
    y = [label for _, label in rows] + [at % 3 for at in range(15)]
    of = classes(contents, y)
    made = k_folds(of, folds, 2, exact=False)
    for repeat in range(2):
        mine = [fold for fold in made if fold.repeat == repeat]
        assert (np.sum([fold.score for fold in mine], 0) == 1).all()
    for fold in made:
        check(fold, of)
        assert ((fold.train | fold.stopping) == ~fold.score).all()


@given(st.randoms(use_true_random=False), st.integers(0, 7))
def test_the_order_of_rows_changes_no_fold(random: object, seed: int) -> None:
    contents = [*range(53), 0, 0, 7]
    y = [content % 3 for content in contents]
    order = list(range(len(contents)))
    random.shuffle(order)  # type: ignore[attr-defined]
    plain, of = (
        k_folds(classes(contents, y), 5, seed=seed),
        classes([contents[at] for at in order], [y[at] for at in order]),
    )
    for one, other in zip(plain, k_folds(of, 5, seed=seed), strict=True):
        for a, b in ((one.train, other.train), (one.stopping, other.stopping), (one.score, other.score)):
            assert np.array_equal(a[order], b)


def test_folds_are_even_in_every_class() -> None:
    y = [0] * 53 + [1] * 29 + [2] * 7
    of = classes(list(range(len(y))), y)
    made = k_folds(of, 5)
    for label, low in ((0, 10), (1, 5), (2, 1)):
        counts = [int((fold.score & (np.array(y) == label)).sum()) for fold in made]
        assert min(counts) >= low
        assert max(counts) <= low + 1
    sizes = [int(fold.score.sum()) for fold in made]
    assert max(sizes) - min(sizes) <= 1


def test_a_large_group_is_balanced_by_single_rows() -> None:
    of = classes([0] * 11 + list(range(1, 34)), [0] * 44, 1)
    assert [int(fold.score.sum()) for fold in k_folds(of, 4)] == [11, 11, 11, 11]


def test_another_seed_is_another_division_and_repeats_differ() -> None:
    of = classes(list(range(97)), [at % 3 for at in range(97)])
    one, two = k_folds(of, 5, seed=1)[0].score, k_folds(of, 5, seed=2)[0].score
    assert (one != two).any()
    first, second = (k_folds(of, 5, 2)[at].score for at in (0, 5))
    assert (first != second).any()
    # and unrelated: about a fifth of a fold is shared by chance
    assert (first & second).sum() < 12


def test_more_folds_than_rows_of_a_class_names_it() -> None:
    of = classes([*range(20), 20, 20, 20, 21], [0] * 20 + [2] * 4)
    with pytest.raises(SweepError, match=r"5 folds, but the class 'c2' has 2 different rows .* --folds 2"):
        k_folds(of, 5)
    with pytest.raises(SweepError, match="'c1' has 1 different row"):
        k_folds(classes(list(range(8)), [0] * 7 + [1]), 2)
    with pytest.raises(SweepError, match="at least 2"):
        k_folds(of, 1)
    with pytest.raises(SweepError, match="at most 3"):
        k_folds(classes([0, 1, 2], [0, 0, 0]), 5)


def test_the_stopping_share_is_taken_from_every_class_rounded_down() -> None:
    y = np.array([0] * 200 + [1] * 50 + [2] * 10)
    of = classes(list(range(260)), y.tolist())
    for fold in k_folds(of, 5, stopping=0.1):
        assert [int((fold.stopping & (y == label)).sum()) for label in range(3)] == [16, 4, 0]
        check(fold, of)


def test_given_split_leaves_out_twins_of_validation() -> None:
    of = classes([1, 2, 3, 3, 4], [0, 1, 0, 0, 1])
    train = np.array([True, True, True, False, False])
    (fold,) = given_split(of, train, ~train, stopping=0.0)
    assert fold.train.tolist() == [True, True, False, False, False]
    with pytest.raises(SweepError, match="--folds 1 needs rows"):
        given_split(of, train, np.zeros(5, bool))


def test_shots_draws_different_contents_of_every_class_and_scores_the_rest() -> None:
    contents = [*range(60), 5, 6]
    y = np.array([content % 3 for content in contents])
    of = classes(contents, y.tolist())
    made = shots(of, 7, 5, seed=3)
    assert len(made) == 5
    for fold in made:
        check(fold, of)
        assert np.bincount(y[fold.train]).tolist() == [7, 7, 7]
    assert len({fold.train.tobytes() for fold in made}) == 5
    again = shots(of, 7, 2, seed=3)
    assert np.array_equal(again[1].train, made[1].train)  # more draws keep the earlier ones
    with pytest.raises(SweepError, match=r"'c0' has 20 different rows .* --shots 19 at most"):
        shots(of, 20, 2)


def test_subsets_are_nested_and_hold_every_class() -> None:
    y = np.array([0] * 100 + [1] * 11)
    of = classes(list(range(111)), y.tolist(), 2)
    fold = k_folds(of, 5)[0]
    small, large = (subset(of, fold, share) for share in (0.05, 0.3))
    both = [each.train | each.stopping for each in (small, large)]
    assert (both[0] <= both[1]).all()
    assert set(y[small.train]) == {0, 1}
    assert (small.score == fold.score).all()
    check(small, of)


def test_multilabel_and_regression_are_stratified_too() -> None:
    y = np.zeros((60, 3), np.uint8)
    y[:, 0] = 1
    y[:12, 2] = 1
    of = strata(keys_of(list(range(60))), y, MULTILABEL, ["a", "b", "c"])
    assert [int((fold.score & (y[:, 2] == 1)).sum()) for fold in k_folds(of, 4)] == [3, 3, 3, 3]
    values = np.linspace(0, 1, 50)[:, None]
    made = k_folds(strata(keys_of(list(range(50))), values, REGRESSION, ["v"]), 5)
    means = [float(values[fold.score].mean()) for fold in made]
    assert max(means) - min(means) < 0.12


def test_a_planted_leak_is_found() -> None:
    of = classes([0, 0, 1, 2], [0, 0, 0, 0], 1)
    leaking = Fold(np.array([True, False, False, True]), np.zeros(4, bool), np.array([False, True, True, False]))
    with pytest.raises(AssertionError):
        check(leaking, of)
