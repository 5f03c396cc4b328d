"""Words for people: a text from data as it can stand in a line of a terminal."""

from __future__ import annotations

import json
import re
import unicodedata

_JOINERS = "\u200c\u200d"  # Persian is written with them, and so are emoji
_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's controls, invisible formats (which turn the direction of a text), surrogates, line and paragraph breaks."""

# Spreadsheets know the wide signs too.
_FORMULA = re.compile("'*[=+@\\t\\r\\n\uff1d\uff0b\uff0d\uff20-]")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,4})?", re.ASCII)


def shown(text: object) -> str:
    """Return a text on one line in which nothing moves the cursor: ``\\n``, ``\\x1b`` and their like are escaped.

    Names of files, columns, classes and splits come from strangers. One that holds a line break would forge a line
    of ours, one that holds an escape sequence would have the terminal obey it.
    """
    said = str(text)
    if said.isprintable():
        return said
    return "".join(
        each.encode("unicode_escape").decode()
        if unicodedata.category(each) in _ESCAPED and each not in _JOINERS
        else each
        for each in said
    )


def counted(number: int, noun: str) -> str:
    """Return ``1 row``, ``2,000 rows``, ``3 classes``."""
    hissing = noun.endswith(("s", "sh", "ch", "x")) and not noun.endswith("epoch")
    plural = noun + ("es" if hissing else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def shortened(value: object, most: int = 40) -> str:
    """Return a value as Python writes it, on one line and not longer than a message can bear."""
    try:
        written = repr(value)
    except Exception as error:  # somebody else's code
        written = f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"
    written = shown(" ".join(written[: 4 * most].split()))
    return written if len(written) <= most else f"{written[: most - 3]}..."


def json_shown(text: str, encoding: str | None = "utf-8") -> str:
    """Return JSON that means the same, in which nothing moves the cursor either, and which an ``encoding`` can hold."""
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        text = "".join(each if each.isascii() else json.dumps(each)[1:-1] for each in text)
    return text if text.isprintable() else "".join(each if each == "\n" else _in_json(each) for each in text)


def _in_json(character: str) -> str:
    return character if shown(character) == character else json.dumps(character)[1:-1]


def cell(text: str) -> str:
    """Return a cell of a CSV file that no spreadsheet runs as a formula.

    What begins with ``= + - @``, a tab or a line break, and is no number, gets ``'`` in front, and so does what begins
    like that after one or more ``'``: taking one ``'`` from every cell that matches ``'+[-=+@\\t\\r\\n]`` gives
    back the original.
    """
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def page(text: str) -> str:
    """Return a text of several lines of our own: as ``shown``, but its line breaks stay."""
    return "\n".join(map(shown, text.split("\n")))
