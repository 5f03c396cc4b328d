"""A text from data stands in one line of a terminal, and nothing in it is obeyed."""

from __future__ import annotations

import ast
import json
import pickle
import re
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import embedcache
from embedcache.errors import BadRowsError, CorruptCacheError, SpecMismatchError
from embedcache.wording import (
    cell,
    counted,
    did_you_mean,
    duration,
    json_shown,
    listed,
    markdown_table,
    page,
    shown,
    table,
)

HOSTILE = "a\nerror: \x1b[2J\x9b31m\rb\u202e\u2028\ud800"


@pytest.mark.parametrize(
    "text", ["plain", "crème brûlée", "空\u3000白", "m\u200cx", "👩\u200d👩\u200d👧", "50\u00a0%", ""]
)
def test_what_people_write_stays(text: str) -> None:
    assert shown(text) == text


def test_nothing_moves_the_cursor() -> None:
    assert shown(HOSTILE) == r"a\nerror: \x1b[2J\x9b31m\rb\u202e\u2028\ud800"
    assert page("a\tb\nc\r\n") == "a\\tb\nc\\r\n"
    for code in range(sys.maxunicode + 1):
        each = chr(code)
        if unicodedata.category(each) in ("Cc", "Zl", "Zp", "Cs") or each.splitlines() != [each]:
            assert shown(each).isprintable(), hex(code)


@pytest.mark.parametrize(
    "error",
    [
        CorruptCacheError(HOSTILE),
        BadRowsError([(HOSTILE, "x")], 1),
        SpecMismatchError(HOSTILE, [(HOSTILE, 1, HOSTILE)]),
    ],
)
def test_an_error_is_one_line_whatever_it_names(error: Exception) -> None:
    assert "[2J" in str(error)
    assert str(error).isprintable()
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@given(st.text(st.sampled_from("'=+-@\t\r\nax1.")))
def test_a_cell_is_no_formula_and_comes_back(text: str) -> None:
    safe = cell(text)
    if not re.fullmatch(r"[+-]?[\d.]+", safe):
        assert not re.match(r"[-=+@\t\r\n]", safe)
    assert re.sub(r"^'(?='*[-=+@\t\r\n])", "", safe) == text


@pytest.mark.parametrize("number", ["-1", "+2.5", "-.5e-10", "0", "-3.", "+1E9"])
def test_numbers_stay_numbers(number: str) -> None:
    assert cell(number) == number
    assert cell(f"{number}+cmd|' /C calc'!A0").startswith("'") == (number[0] in "+-")


@given(st.text())
def test_shown_json_means_the_same(text: str) -> None:
    for indent in (None, 1):
        safe = json_shown(json.dumps({"a": text}, ensure_ascii=False, indent=indent))
        assert json.loads(safe) == {"a": text}
        assert page(safe) == safe


# What there is often one of. Where a verb follows, or another "of", the sentence is of several by what it says.
_COUNTED = re.compile(r"\{\} (heads|fits|epochs|shards|draws|parts)\b(?! (are|were|have|do|that|in|of \{))")


def test_whatever_is_counted_is_singular_where_there_is_one() -> None:
    found = []
    for file in sorted(Path(embedcache.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(each.value) if isinstance(each, ast.Constant) else "{}" for each in node.values)
                found += [f"{file.name}:{node.lineno}: {text}"] if _COUNTED.search(text) else []
    assert not found, "\n".join(found)


def test_counted() -> None:
    assert [counted(each, "row") for each in (0, 1, 2000)] == ["0 rows", "1 row", "2,000 rows"]
    assert [counted(2, noun) for noun in ("class", "forward pass", "batch", "bad row")] == [
        "2 classes", "2 forward passes", "2 batches", "2 bad rows",
    ]  # fmt: skip


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.2, 1, 89.4, 90, 5399, 5400, 172_799, 172_800, 864_000_000)] == [
        "a second", "1 s", "89 s", "2 min", "90 min", "1.5 h", "48.0 h", "2 days", "10,000 days",
    ]  # fmt: skip


def test_some_names_of_many() -> None:
    assert listed([], 3) == ""
    assert listed(iter("abc"), 3) == "a, b, c"
    assert listed("abcd", 3) == "a, b, c and 1 more"
    assert listed(["a"], 1, 2001) == "a and 2,000 more"


def test_the_nearest_name() -> None:
    assert did_you_mean("liner", ["mlp", "linear"]) == " (did you mean linear?)"
    assert did_you_mean("xyz", ["mlp", "linear"]) == ""
    assert did_you_mean(7, {"seven": 7}) == ""
    assert did_you_mean("LINEAR", ["mlp", "Linear"]) == " (did you mean Linear?)"
    assert did_you_mean("f1", ["f1_macro", "f11"], "f1_macro") == " (did you mean f1_macro or f11?)"


def test_tables() -> None:
    lines = table(["head", "rows"], [["mlp", "7"], ["linear", "1,000"]], [1])
    assert lines == ["head     rows", "------  -----", "mlp         7", "linear  1,000"]
    assert table(["a", "b"], []) == ["a  b", "-  -"]
    assert table(["a", ""], [["b", ""]]) == ["a", "-", "b"]
    sizes = [["\n", "1,000", "7 MiB", "-"], ["mlp", "", "-70 %", "0.5"]]
    assert table([], sizes) == ["\\n   1,000  7 MiB  -", "mlp         -70 %  0.5"], "the right aligned by their looks"
    assert table(["a", "b"], [["1", "xyz"]], []) == ["a  b", "-  ---", "1  xyz"]
    assert markdown_table(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
    assert markdown_table(["a", "b"], [], [1])[1] == "| --- | ---: |"
