"""Rows between the input and the cache: packed strings, ids, and columns that fit one another."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.dataset import (
    Behind,
    Dataset,
    Examples,
    IdColumn,
    Packed,
    Whole,
    evenly_spread,
    key_values,
    mixed,
    renumbered,
)
from embedcache.errors import InputError

STRINGS = st.lists(st.binary(max_size=7), max_size=13)


@given(STRINGS, st.data())
def test_packed_strings_are_a_sequence(strings: list[bytes], data: st.DataObject) -> None:
    packed = Packed.of(strings)
    assert list(packed) == strings
    assert len(packed) == len(strings)
    assert [packed[place] for place in range(-len(strings), 0)] == strings
    assert packed[1:5:2] == strings[1:5:2]
    for place in (len(strings), -len(strings) - 1):
        with pytest.raises(IndexError):
            packed[place]
    rows = data.draw(st.lists(st.integers(0, max(len(strings) - 1, 0)), max_size=5 if strings else 0))
    some = packed.select(np.array(rows, np.int64))
    again = data.draw(st.lists(st.integers(0, max(len(rows) - 1, 0)), max_size=5 if rows else 0))
    for chosen, wanted in ((some, rows), (some.select(np.array(again, np.int64)), [rows[row] for row in again])):
        assert list(chosen) == [chosen[place] for place in range(len(wanted))] == [strings[row] for row in wanted]
        assert chosen.lengths().tolist() == [len(strings[row]) for row in wanted]
        values, offsets = chosen.columns()
        assert list(Packed(values, offsets)) == [strings[row] for row in wanted]
        assert (values.dtype, offsets.dtype, len(values)) == (np.uint8, np.int64, offsets[-1])


@given(st.lists(st.lists(st.binary(max_size=5), max_size=3), min_size=1, max_size=3), st.data())
def test_contents_behind_one_another_are_those_of_each(parts: list[list[bytes]], data: st.DataObject) -> None:
    every = [content for part in parts for content in part]
    whole = Behind([Packed.of(part) for part in parts])
    rows = data.draw(st.lists(st.integers(0, len(every) - 1), max_size=5)) if every else []
    some = whole.select(np.array(rows, np.int64))
    for chosen, wanted in ((whole, every), (some, [every[row] for row in rows])):
        assert list(chosen) == [chosen[place] for place in range(len(chosen))] == wanted
        assert chosen.lengths().tolist() == [len(content) for content in wanted]


def test_iterating_goes_over_the_edges_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedcache.dataset._BLOCK_ROWS", 3)
    strings = [b"x" * length for length in (2, 0, 5, 3, 0, 0, 7, 1, 11, 0, 13)]
    assert list(Packed.of(strings)) == strings
    assert list(Packed.of(strings).select(np.array([10, 1, 8, 2, 2]))) == [strings[row] for row in (10, 1, 8, 2, 2)]


def test_ids_are_given_or_run() -> None:
    ids = IdColumn(5)
    assert list(ids) == ["0", "1", "2", "3", "4"]
    assert ids[-2] == "3"
    assert list(ids.select(np.array([1, 3, 4])).select(np.array([0, 2]))) == ["1", "4"]
    given_ids = IdColumn(3, Packed.of(["é".encode(), b"", b"b"]))
    assert list(given_ids) == ["é", "", "b"]
    assert given_ids[1:] == ["", "b"]
    assert list(given_ids.select(np.array([2, 0]))) == ["b", "é"]
    with pytest.raises(IndexError):
        ids[5]


def dataset(**columns: Any) -> Dataset:
    """Three rows, with other columns."""
    facts: dict[str, Any] = {
        "keys": np.arange(48, dtype=np.uint8).reshape(3, 16),
        "split": np.array([0, 1, 0], np.uint8),
        "split_names": ("train", "test"),
    }
    return Dataset(**(facts | columns))


@pytest.mark.parametrize(
    ("task", "targets", "names", "labelled"),
    [
        (None, None, (), [False, False, False]),
        ("classification", [1, -1, 0], ("a", "b"), [True, False, True]),
        ("multilabel", [[0, 0], [255, 255], [1, 1]], ("a", "b"), [True, False, True]),
        ("regression", [[0.5, np.nan], [np.nan, np.nan], [-1e300, 0]], ("a", "b"), [False, False, True]),
    ],
)
def test_what_is_labelled(task: Any, targets: Any, names: tuple[str, ...], labelled: list[bool]) -> None:
    rows = dataset(task=task, targets=None if targets is None else np.array(targets), class_names=names)
    assert rows.labelled().tolist() == labelled
    assert rows.split_sizes() == {"train": 2, "test": 1}
    assert rows.targets is None or rows.targets.dtype == {"c": np.int64, "m": np.uint8, "r": np.float64}[task[0]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"split": np.zeros(2, np.uint8)}, "the column split has length 2, expected 3"),
        ({"split": np.array([0, 1, 256])}, "the column split does not fit into uint8"),
        ({"ids": IdColumn(2)}, "the column id has length 2, expected 3"),
        ({"ids": IdColumn(3, Packed.of([b"a"]))}, "the column id has length 1, expected 3"),
        ({"whole": Whole(np.arange(5), 7)}, "the column number has length 5, expected 3"),
        ({"task": "classification", "targets": np.array([0.5, 0, 1])}, "the column target does not fit into int64"),
        ({"task": "regression", "targets": np.zeros((3, 2))}, "there are 2 targets and 0 names"),
        ({"split_names": ("a", "a")}, "two splits have the same name: a, a"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataset(**columns)


def test_the_hash_sees_every_row_its_split_and_its_label() -> None:
    labels = {"task": "classification", "targets": np.array([0, 1, 0]), "class_names": ("a", "b")}
    hashes = {
        rows.hash()
        for rows in (
            dataset(),
            dataset(keys=np.arange(1, 49, dtype=np.uint8).reshape(3, 16)),
            dataset(split=np.array([1, 1, 0], np.uint8)),
            dataset(**labels),
            dataset(**(labels | {"targets": np.array([0, 1, 1])})),
        )
    }
    assert len(hashes) == 5
    assert dataset().hash() in hashes


def test_a_selection_knows_the_whole_it_is_of() -> None:
    texts = [b"zero", b"one", b"two", b"one", b"four"]
    examples = Examples(
        keys=np.array([[len(text)] * 16 for text in texts], np.uint8),
        split=np.array([0, 0, 1, 1, 0], np.uint8),
        split_names=("train", "test"),
        task="classification",
        targets=np.array([0, 1, 2, 1, 0]),
        class_names=("a", "b", "c"),
        ids=IdColumn(5),
        kind="text",
        packed_contents=Packed.of(texts),
        n_unique=2,
    )
    some = pickle.loads(pickle.dumps(examples.select(np.array([1, 2, 4])))).select(np.array([0, 2]))
    assert list(some.contents()) == [b"one", b"four"]
    assert list(some.contents([1])) == [b"four"]
    assert list(some.ids) == ["1", "4"]
    assert some.targets is not None
    assert some.targets.tolist() == [1, 0]
    assert some.n_unique == 2
    assert some.whole is not None
    assert (some.whole.numbers.tolist(), some.whole.rows, some.whole.hash) == ([1, 4], 5, examples.hash())
    assert repr(examples) == "Examples(5 rows: train 3, test 2; task classification, 3 classes)"


@given(st.lists(st.binary(min_size=16, max_size=16) | st.sampled_from([bytes(16), b"\1" + bytes(15)]), max_size=13))
def test_key_values_are_equal_where_all_sixteen_bytes_are(keys: list[bytes]) -> None:
    array = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
    for given_keys in (array, np.asfortranarray(array), np.repeat(array, 2, axis=1)[:, ::2]):
        assert [value.tobytes() for value in key_values(given_keys)] == keys
        assert len(np.unique(key_values(given_keys))) == len(set(keys))


def test_classes_are_numbered_by_other_names() -> None:
    codes = np.array([2, -1, 0, 1, 2])
    assert renumbered(codes, ["b", "c", "a"], ["a", "b", "c", "d"]).tolist() == [0, -1, 1, 2, 0]
    assert renumbered(np.array([-1, -1]), [], ["a"]).tolist() == [-1, -1]
    assert renumbered(np.zeros(0, np.uint8), [], []).tolist() == []


@given(st.lists(st.integers(0, 2**64 - 1), max_size=7))
def test_numbers_are_mixed_as_splitmix64_does(numbers: list[int]) -> None:
    def reference(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    assert mixed(np.array(numbers, np.uint64)).tolist() == [reference(x) for x in numbers]
    assert mixed(np.array([0x9E3779B97F4A7C15], np.uint64)).tolist() == [0xE220A8397B1DCDAF]  # its first for the seed 0


@given(st.integers(0, 1000), st.integers(1, 100))
def test_places_are_spread_evenly(count: int, most: int) -> None:
    places = evenly_spread(count, most).tolist()
    assert places == sorted(set(places))
    assert len(places) == min(count, most)
    if len(places) > 1:
        steps = np.diff(places)
        assert (places[0], places[-1]) == (0, count - 1)
        assert steps.max() - steps.min() <= 1
