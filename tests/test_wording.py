"""A text from data stands in one line of a terminal, and nothing in it is obeyed."""

from __future__ import annotations

import json
import pickle
import re
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.errors import BadRowsError, CorruptCacheError, SpecMismatchError
from embedcache.wording import cell, json_shown, page, shown

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
