"""A summary is checked once, when it is read: what a damaged file lacks is named, wherever it is."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_summaries import EVERY, full

from embedcache.decoding import from_json, to_json
from embedcache.errors import SweepError
from embedcache.report import report
from embedcache.sweep import SweepResult
from embedcache.sweep.summary import Summary, defined, read_summary


@pytest.mark.parametrize("name", EVERY)
def test_what_is_read_is_written_again(name: str) -> None:
    written = EVERY[name]()
    again = to_json(from_json(Summary, written))
    assert again == written
    assert (list(again), [*again["leaderboard"][0]]) == (list(written), [*written["leaderboard"][0]])  # type: ignore[index]


def test_keys_that_a_later_version_adds_are_left_out() -> None:
    later = full()
    later["leaderboard"][1]["carbon"] = later["new"] = 3
    assert from_json(Summary, later) == from_json(Summary, full())


FREE = ("options", "train", "varied", "metrics", "classes", "machine", "versions", "rows", "points")
"""Mappings whose keys are data."""


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to every key that a sweep always writes."""
    if isinstance(value, dict):
        if not (way and way[-1] in FREE):
            yield from ((*way, name) for name in value)
            for name, held in value.items():
                yield from places(held, (*way, name))
    elif isinstance(value, list) and value:
        yield from places(value[-1], (*way, len(value) - 1))


def small() -> dict[str, Any]:
    made = full()
    return {**made, "leaderboard": [made["leaderboard"][0], made["leaderboard"][-1]]}


SMALL = small()


def changed(way: tuple[Any, ...], spoil: Any) -> dict[str, Any]:
    made = copy.deepcopy(SMALL)
    inner: Any = made
    for step in way[:-1]:
        inner = inner[step]
    spoil(inner, way[-1])
    return made


MAY_BE_MISSING = {"looked_at_test", "test", "state"}


@pytest.mark.parametrize("way", [*places(SMALL)], ids=lambda way: ".".join(map(str, way)))
def test_a_key_that_is_not_there_is_refused_in_one_line(way: tuple[Any, ...], tmp_path: Path) -> None:
    """``protocol.text``, ``chosen.why``, ``chosen.label`` and ``recommended.label`` once ended in a ``KeyError``."""
    summary = changed(way, lambda inner, name: inner.pop(name))
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    if way[0] == "leaderboard" and way[-1] in MAY_BE_MISSING and len(way) == 3:
        assert SweepResult(tmp_path).leaderboard[-1].test is None
        return
    for read in (SweepResult, report):
        with pytest.raises(SweepError) as caught:
            read(tmp_path)
        named = {"format": "is not the summary", "version": "version None"}.get(way[-1], way[-1])
        assert ("different columns" if "per_class" in way[:-1] else named) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_place_of_damage_is_named() -> None:
    for way, expected in (
        (("leaderboard", 1, "interval"), r"leaderboard\[1\].interval is of type int: expected a list"),
        (("chosen", "label"), "chosen.label is of type int: expected a text"),
        (("test", "calibration", "bins", 2, "rows"), None),
        (("test", "confusion", "labels"), "test.confusion.labels is of type int: expected a list"),
    ):
        made = changed(way, lambda inner, name: inner.__setitem__(name, 7))
        if expected is None:
            from_json(Summary, made)
            continue
        with pytest.raises(ValueError, match=f"^{expected}$"):
            from_json(Summary, made)


def test_what_belongs_together_has_one_shape() -> None:
    made = full()
    made["test"]["confusion"]["matrix"][2].pop()
    with pytest.raises(ValueError, match=r"^test.confusion is impossible: not a square of 5 classes$"):
        from_json(Summary, made)
    made = full()
    made["test"]["per_class"][1]["f2"] = made["test"]["per_class"][1].pop("f1")
    with pytest.raises(ValueError, match=r"^test is impossible: rows by class with different columns$"):
        from_json(Summary, made)


def test_a_score_that_does_not_exist_is_null_on_disk_and_nan_inside() -> None:
    made = full()
    made["leaderboard"][5]["score"] = None
    summary = from_json(Summary, made)
    assert math.isnan(summary.leaderboard[5].score)
    assert len(defined(summary.leaderboard)) == 43
    assert to_json(summary)["leaderboard"][5]["score"] is None  # type: ignore[index]


def test_a_folder_without_a_summary_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="is not there: make a sweep"):
        read_summary(tmp_path / "nowhere")
    with pytest.raises(SweepError, match="is not a sweep's folder"):
        read_summary(tmp_path)
    (tmp_path / "sweep.json").touch()
    with pytest.raises(SweepError, match="has no results yet: run the same sweep command again"):
        read_summary(tmp_path)


@dataclass(frozen=True)
class Inner:
    name: str
    ends: tuple[float, float] | None


@dataclass(frozen=True)
class Outer:
    counts: Mapping[str, int] | None
    parts: tuple[Inner, ...]
    share: float
    anything: object
    late: str | None = field(default=None, metadata={"omitted": True})


numbers = st.floats(allow_nan=False, allow_infinity=False)
INNER = st.builds(Inner, st.text(), st.none() | st.tuples(numbers, numbers))
COUNTS = st.none() | st.dictionaries(st.text(), st.integers())
ANY = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers())


@given(st.builds(Outer, COUNTS, st.lists(INNER).map(tuple), numbers, ANY, st.none() | st.text()))
def test_values_come_back(value: Outer) -> None:
    written = json.loads(json.dumps(to_json(value), allow_nan=False))
    assert from_json(Outer, written) == value
    assert ("late" in written) == (value.late is not None)


def test_numbers_that_json_does_not_have() -> None:
    made = to_json({"a": [np.float32(0.5), np.int64(3), math.inf, np.float64("nan")], "b": (True, None)})
    assert made == {"a": [0.5, 3, None, None], "b": [True, None]}
    assert type(made["a"][0]) is float  # type: ignore[index]
