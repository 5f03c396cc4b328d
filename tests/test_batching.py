"""Canonical shapes: which there are, that a plan holds each row once, and what padding costs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.batching import VECTOR, ShapePolicy, plan, prefetch
from embedcache.errors import SpecError

policies = st.builds(
    ShapePolicy,
    positions=st.integers(1, 5000),
    step=st.integers(1, 17),
    max_length=st.integers(1, 700),
    spare=st.integers(0, 2),
)


@given(policy=policies)
def test_canonical_lengths(policy: ShapePolicy) -> None:
    """Every length fits in its canonical one, which is its own, grows with it, and is at most an eighth too long."""
    lengths = np.arange(1, policy.max_length + 1)
    canonical = policy.canonical(lengths)
    assert (canonical >= lengths).all()
    assert (np.diff(canonical) >= 0).all()
    assert canonical.max() == policy.max_length
    assert np.array_equal(policy.canonical(canonical), canonical)
    assert policy.lengths() == tuple(np.unique(canonical).tolist())
    long = lengths > 16 * policy.step
    assert ((canonical - lengths)[long] * 8 <= lengths[long]).all()
    assert ((canonical - lengths)[~long] < policy.step).all()


def test_canonical_by_hand() -> None:
    policy = ShapePolicy(positions=1024, step=4, max_length=510)
    given = [0, 1, 4, 5, 63, 64, 65, 72, 127, 128, 129, 144, 256, 257, 500, 510]
    assert policy.canonical(given).tolist() == [4, 4, 4, 8, 64, 64, 72, 72, 128, 128, 144, 144, 256, 288, 510, 510]
    assert [policy.rows(length) for length in (4, 12, 44, 64, 144, 256, 510)] == [256, 84, 24, 16, 7, 4, 2]


@given(policy=policies)
def test_batches_are_whole_vectors_where_there_is_room(policy: ShapePolicy) -> None:
    for length in policy.lengths():
        rows = policy.rows(length) - policy.spare
        assert rows >= 1
        assert rows * length <= max(length, 1.5 * policy.positions)
        if policy.positions // length >= VECTOR:
            assert rows * length % VECTOR == 0
            assert rows * length >= policy.positions / 2


@given(policy=policies, seed=st.integers(0, 2**16), count=st.integers(0, 300))
def test_a_plan_holds_each_row_once_at_its_canonical_shape(policy: ShapePolicy, seed: int, count: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, policy.max_length + 1, count)
    canonical = policy.canonical(lengths)
    batches = plan(lengths, policy)
    held = [index for batch in batches for index in batch.indices.tolist()]
    assert sorted(held) == list(range(count))
    assert [batch.length for batch in batches] == sorted((batch.length for batch in batches), reverse=True)
    for batch in batches:
        assert batch.rows == policy.rows(batch.length)
        assert 1 <= len(batch.indices) <= batch.rows - policy.spare
        assert (canonical[batch.indices] == batch.length).all()
    assert batches.real == lengths.sum()
    assert batches.computed == sum(batch.rows * batch.length for batch in batches)


@given(policy=policies, seed=st.integers(0, 2**16), count=st.integers(1, 300))
def test_order_changes_no_shape(policy: ShapePolicy, seed: int, count: int) -> None:
    """Permuted rows are permuted in the plan: the same passes, and each row in one of its own shape."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, policy.max_length + 1, count)
    order = generator.permutation(count)
    here, there = plan(lengths, policy), plan(lengths[order], policy)
    assert [(batch.length, batch.rows, len(batch.indices)) for batch in here] == [
        (batch.length, batch.rows, len(batch.indices)) for batch in there
    ]
    assert here.overhead == there.overhead
    shape = {index: batch.length for batch in here for index in batch.indices.tolist()}
    assert all(shape[int(order[index])] == batch.length for batch in there for index in batch.indices.tolist())


def test_nothing_to_do() -> None:
    nothing = plan([], ShapePolicy())
    assert (len(nothing), nothing.computed, nothing.overhead) == (0, 0, 1.0)


def test_an_image_is_one_position() -> None:
    batches = plan(np.ones(37, np.int64), ShapePolicy(positions=16, step=1, max_length=1))
    assert [len(batch.indices) for batch in batches] == [16, 16, 5]
    assert {(batch.rows, batch.length) for batch in batches} == {(16, 1)}


def test_padding_of_short_texts() -> None:
    """Snippets of about the length of a review's sentence: at most 1.12 positions for each real one."""
    lengths = np.clip(np.random.default_rng(7).lognormal(3.2, 0.45, 10_007), 3, 256).astype(np.int64)
    assert plan(lengths, ShapePolicy(max_length=256)).overhead <= 1.12
    assert plan(lengths, ShapePolicy(positions=65536, max_length=256)).overhead > 1.12  # dummy rows are counted


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"positions": 0}, "positions is 0"),
        ({"step": 0}, "step is 0"),
        ({"max_length": -1}, "max_length is -1"),
        ({"spare": -1}, "spare is -1"),
    ],
)
def test_impossible_policies(settings: dict[str, int], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        ShapePolicy(**settings)


def test_too_long_a_row() -> None:
    with pytest.raises(SpecError, match="a row of length 65 is longer than max_length 64"):
        plan([3, 65], ShapePolicy(max_length=64))


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "embedcache-read"]


@given(st.lists(st.integers(), max_size=13))
def test_what_is_made_ahead_comes_in_its_order(items: list[int]) -> None:
    assert list(prefetch(iter(items))) == items
    assert not readers()


def test_an_error_ahead_is_raised_where_it_can_be_acted_on() -> None:
    def source() -> Iterator[int]:
        yield 2
        raise KeyError("three")

    ahead = prefetch(source())
    assert next(ahead) == 2
    with pytest.raises(KeyError, match="three"):
        next(ahead)
    assert not readers()


def test_closing_stops_what_is_made_ahead_and_no_more_than_three_items_are_ever_held() -> None:
    class Item:
        pass

    held: weakref.WeakSet[Item] = weakref.WeakSet()
    most = 0

    def source() -> Iterator[Item]:
        nonlocal most
        while True:
            made = Item()
            held.add(made)
            most = max(most, len(held))
            yield made
            del made

    ahead = prefetch(source())
    for _ in range(100):
        item = next(ahead)
        assert isinstance(item, Item)
        del item
    ahead.close()
    assert not readers()
    assert most <= 3
    assert not held
