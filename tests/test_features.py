"""Features as values: dense, ragged and on disk say the same of the same rows, and are looked through once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_caches import SETS, store

import embedcache.features as module
from embedcache.errors import FeatureError
from embedcache.features import Dense, MappedRows, OnDisk, Ragged, Stored, features_of
from embedcache.shard import FeatureSet

N, L, D = 11, 3, 5
POOLED = FeatureSet("mean", "pooled", D, 1, "float32")
LAYERS = FeatureSet("mean@all", "layers", D, L, "float32")
TOKENS = FeatureSet("tokens", "tokens", D, 1, "float32")
LENGTHS = np.array([2, 1, 7, 3, 1, 5, 2, 2, 13, 1, 4])


def dense(shape: tuple[int, ...] = (N, D)) -> Any:
    return np.random.default_rng(7).normal(size=shape).astype(np.float32)


def ragged() -> tuple[Any, Any]:
    return dense((int(LENGTHS.sum()), D)), np.concatenate([[0], np.cumsum(LENGTHS)])


EVERY = [(dense(), POOLED), (dense((N, L, D)), LAYERS), (ragged(), TOKENS), (MappedRows(dense((N, L, D))), LAYERS)]


@pytest.mark.parametrize(("x", "feature"), EVERY)
def test_every_sort_has_rows_blocks_and_vectors(x: Any, feature: FeatureSet) -> None:
    features = features_of(x, feature)
    assert len(features) == N
    assert features.feature == feature
    assert features.in_memory == (not isinstance(features, OnDisk))
    assert sum(len(block) for block in features.blocks(7)) == N
    vectors = np.concatenate(list(features.vectors()))
    weights = features.of_vectors(np.arange(N))
    assert len(vectors) == len(weights)
    several = {"pooled": 1, "layers": L}.get(feature.kind)
    expected = LENGTHS if several is None else np.full(N, several)
    np.testing.assert_array_equal(weights, np.repeat(np.arange(N), expected))
    assert features_of(features, feature) is features, "what was checked is not checked again"


@pytest.mark.parametrize(("x", "feature"), EVERY)
@given(st.lists(st.integers(0, N - 1), max_size=17))
def test_rows_taken_are_those_rows(x: Any, feature: FeatureSet, rows: list[int]) -> None:
    features = features_of(x, feature)
    taken = features.take(np.array(rows, np.int64))
    assert type(taken) is type(features)
    assert len(taken) == len(rows)
    one_by_one = [vector for row in rows for vector in features.take(np.array([row])).vectors()]
    whole = [np.zeros((0, D), np.float32), *taken.vectors()]
    np.testing.assert_array_equal(np.concatenate(whole), np.concatenate([whole[0], *one_by_one]))
    again = taken.take(np.arange(len(rows))[::-1])
    assert len(again) == len(rows)


def test_rows_on_disk_are_read_in_blocks_of_a_multiple(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_BYTES", 4 * 4 * D)
    features = features_of(MappedRows(dense()))
    assert [len(block) for block in features.blocks()] == [4, 4, 3]
    assert [len(block) for block in features.blocks(3)] == [3, 3, 3, 2]
    assert isinstance(features, OnDisk)
    np.testing.assert_array_equal(features.whole().values, dense())
    chosen = features.take(np.array([7, 2, 5]))
    np.testing.assert_array_equal(chosen.read(np.array([2, 0])), dense()[[5, 7]])


def test_a_bad_row_on_disk_is_named_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_BYTES", 4 * 4 * D)
    x = dense()
    x[9, 2] = np.nan
    features = features_of(MappedRows(x), POOLED)
    for read in (lambda: list(features.blocks()), lambda: list(features.vectors())):
        with pytest.raises(FeatureError, match="mean: row 9 holds NaN or infinity"):
            read()


def test_what_has_no_name_goes_by_its_shape() -> None:
    assert features_of(dense()).feature == FeatureSet("features", "pooled", D, 1, "float32")
    assert features_of(dense((N, L, D)).tolist()).feature == FeatureSet("features", "layers", D, L, "float32")
    assert features_of(ragged()).feature == FeatureSet("features", "tokens", D, 1, "float32")
    assert features_of(MappedRows(dense())).feature.kind == "pooled"
    for x in (np.zeros(N), np.zeros((N, 0)), (dense(),), 3):
        with pytest.raises(FeatureError, match="features"):
            features_of(x)


def test_rows_on_disk_of_another_shape_are_refused() -> None:
    with pytest.raises(FeatureError, match=r"mean of test: got rows on disk of shape \(3, 5\), expected \[N, 5\]"):
        features_of(MappedRows(dense((N, L, D))), POOLED, where="test")
    with pytest.raises(FeatureError, match="expected values and offsets in memory"):
        features_of(MappedRows(dense()), TOKENS)


def test_what_was_not_looked_through_is_looked_through() -> None:
    x = dense()
    x[7, 1] = np.inf
    trusting = Dense(x, POOLED)
    assert not trusting.checked
    with pytest.raises(FeatureError, match="row 7"):
        features_of(trusting, POOLED)
    assert features_of(dense(), POOLED).take(np.arange(3)).checked  # type: ignore[attr-defined]


def test_a_ragged_row_is_its_vectors() -> None:
    features = features_of(ragged(), TOKENS)
    assert isinstance(features, Ragged)
    values, offsets = ragged()
    for row in range(-N, N):
        np.testing.assert_array_equal(features[row], values[offsets[row % N] : offsets[row % N + 1]])
    with pytest.raises(IndexError):
        features[N]
    x, mask = features.padded(np.array([2, 0]), (3, 8))
    assert x.shape == (3, 8, D)
    assert mask.sum(axis=1).tolist() == [7, 2, 1]
    np.testing.assert_array_equal(x[0, :7], features[2])


@given(
    each=st.sampled_from(SETS),
    lengths=st.lists(st.integers(0, 3), min_size=1, max_size=7),
    at=st.integers(0, 100),
    wrong=st.sampled_from([None, np.nan, np.inf, -np.inf]),
)
def test_the_first_row_that_is_not_finite(each: FeatureSet, lengths: list[int], at: int, wrong: float | None) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    count = int(offsets[-1]) if each.kind == "tokens" else len(lengths)
    decoded = np.full((count, *each.row_shape), 3.0, np.float32)
    planted = wrong is not None and decoded.size > 0
    if planted:
        decoded.reshape(-1)[at % decoded.size :: 5] = wrong
    naive = None
    for row in range(len(lengths)):
        mine = decoded[offsets[row] : offsets[row + 1]] if each.kind == "tokens" else decoded[row]
        if naive is None and not np.isfinite(mine).all():
            naive = row
    assert (naive is not None) == planted
    assert Stored(each, store(each, decoded), offsets if each.kind == "tokens" else None).first_non_finite() == naive
