"""A text from data stands in one line of a terminal, and nothing in it is obeyed."""

from __future__ import annotations

import pickle
import sys
import unicodedata

import pytest

from embedcache.errors import BadRowsError, CorruptCacheError, SpecMismatchError
from embedcache.wording import page, shown

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
