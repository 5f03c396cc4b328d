"""Words for people: a text from data as it can stand in a line of a terminal."""

from __future__ import annotations

import unicodedata

_JOINERS = "\u200c\u200d"  # Persian is written with them, and so are emoji
_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's controls, invisible formats (which turn the direction of a text), surrogates, line and paragraph breaks."""


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


def page(text: str) -> str:
    """Return a text of several lines of our own: as ``shown``, but its line breaks stay."""
    return "\n".join(map(shown, text.split("\n")))
