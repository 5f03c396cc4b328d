"""Every error is one readable line, a builtin's subclass, and drawn in the tree."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from embedcache import errors
from embedcache.errors import (
    BadRowsError,
    CacheError,
    CorruptCacheError,
    EmbedcacheError,
    MissingExtraError,
    SpecError,
    SpecMismatchError,
)
from embedcache.fingerprint import ABSENT

CLASSES = {
    name: each
    for name, each in vars(errors).items()
    if inspect.isclass(each) and issubclass(each, Exception) and each.__module__ == errors.__name__
}


def tree(docstring: str) -> dict[str, tuple[str, str | None]]:
    """What is drawn: each name's parent, and the builtin in brackets."""
    drawn: dict[str, tuple[str, str | None]] = {}
    above: list[tuple[int, str]] = []
    for line in docstring.splitlines():
        match = re.match(r"    (?P<lines>[│├└─ ]*)(?P<name>[A-Z]\w+)(?: \((?P<builtin>\w+)\))?", line)
        if match is None:
            continue
        depth = len(match["lines"])
        while above and above[-1][0] >= depth:
            above.pop()
        drawn[match["name"]] = (above[-1][1] if above else "Exception", match["builtin"])
        above.append((depth, match["name"]))
    return drawn


def faults(drawn: dict[str, tuple[str, str | None]]) -> list[str]:
    """Where the drawing and the code differ."""
    found = [f"{name} is not drawn" for name in CLASSES.keys() - drawn.keys()]
    found += [f"{name} is drawn and not there" for name in drawn.keys() - CLASSES.keys()]
    for name in drawn.keys() & CLASSES.keys():
        parent, builtin = drawn[name]
        bases = [base.__name__ for base in CLASSES[name].__bases__]
        if bases != [parent] * (name != "EmbedcacheWarning") + ([builtin] if builtin else []):
            found.append(f"{name} has the bases {bases}, drawn are {parent} and {builtin}")
    return sorted(found)


def test_the_tree_in_the_docstring_is_the_code() -> None:
    assert len(CLASSES) > 15
    assert faults(tree(errors.__doc__ or "")) == []


def test_a_wrong_drawing_would_be_seen() -> None:
    drawn = tree(errors.__doc__ or "")
    del drawn["SpecError"]
    drawn["Other"] = ("EmbedcacheError", None)
    drawn["CacheError"] = ("InputError", "OSError")
    assert len(faults(drawn)) == 3


ERRORS = {name: each for name, each in CLASSES.items() if not issubclass(each, Warning)}


@pytest.mark.parametrize("each", ERRORS.values(), ids=ERRORS)
def test_each_is_ours_and_has_an_exit_code(each: type[EmbedcacheError]) -> None:
    assert issubclass(each, EmbedcacheError)
    assert each.exit_code in (1, 2)
    assert (each.__doc__ or "").strip()


def test_usage_exits_with_2_and_everything_else_with_1() -> None:
    assert [name for name, each in ERRORS.items() if each.exit_code == 2] == ["SpecError", "SweepSpecError"]


def test_builtins_catch_them() -> None:
    with pytest.raises(ValueError, match="x"):
        raise SpecError("x")
    for error in (CorruptCacheError("damaged"), CacheError("y")):
        with pytest.raises(OSError, match=str(error)):
            raise error


def test_messages_are_whole() -> None:
    assert str(CorruptCacheError("one line")) == "one line"
    assert str(SpecMismatchError("c", [("a.b", 1, None)])) == (
        "c holds features made another way (a.b: cache has 1, asked for None). "
        "Choose another output directory, or drop the options that differ"
    )
    assert SpecMismatchError("c", [("a", 1, 2)]).differences == (("a", 1, 2),)
    assert "pip install 'embedcache[vision]'" in str(MissingExtraError("images", "pillow", "vision"))
    one = BadRowsError([("f:3", "empty text")], 1)
    many = BadRowsError([("f:3", "empty text")] * 10, 12)
    assert str(one).startswith("1 bad row: f:3: empty text. Correct")
    assert str(many).startswith("12 bad rows (first 10 of 12): f:3: empty text; f:3")
    assert (len(many.rows), many.total) == (10, 12)


@pytest.mark.parametrize(
    "error",
    [
        CorruptCacheError("damaged"),
        SpecMismatchError("c", [("a", 1, ABSENT)]),
        MissingExtraError("images", "pillow", "vision"),
        BadRowsError([("f:3", "empty")], 4),
    ],
)
def test_errors_cross_processes(error: EmbedcacheError) -> None:
    """A worker's error is pickled on its way to its parent, and must arrive as what it was."""
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)
