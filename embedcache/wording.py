"""Words for people: texts from data as they can stand in a terminal, plurals, durations, tables, nearest names."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence

_JOINERS = "\u200c\u200d"  # Persian is written with them, and so are emoji
_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's controls, invisible formats (which turn the direction of a text), surrogates, line and paragraph breaks."""

# Spreadsheets know the wide signs too.
_FORMULA = re.compile("'*[=+@\\t\\r\\n\uff1d\uff0b\uff0d\uff20-]")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,4})?", re.ASCII)
_SIZE = re.compile(r"([\d.,-]*\d[ %xMGKiB]*)?")


def shown(text: object) -> str:
    """Return a text on one line in which nothing moves the cursor: ``\\n``, ``\\x1b`` and their like are escaped.

    Names of files, columns, classes and splits come from strangers. One that holds a line break would forge a line
    of ours, one that holds an escape sequence would have the terminal obey it.
    """
    line = str(text)
    if line.isprintable():
        return line
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _ESCAPED and character not in _JOINERS
        else character
        for character in line
    )


def counted(number: int, noun: str) -> str:
    """Return ``1 row``, ``2,000 rows``, ``3 classes``."""
    hissing = noun.endswith(("s", "sh", "ch", "x")) and not noun.endswith("epoch")
    plural = noun + ("es" if hissing else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def duration(seconds: float) -> str:
    """Return a rough time: ``a second``, ``45 s``, ``12 min``, ``1.5 h``, ``3 days``."""
    if seconds < 1:
        return "a second"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:,.0f} days"


def listed(names: Iterable[str], most: int, total: int | None = None) -> str:
    """Return ``a, b and 7 more``: at most so many names, of those given or of ``total``."""
    names = list(names)
    more = (len(names) if total is None else total) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def did_you_mean(name: object, names: Iterable[str], *more: str) -> str:
    """Return `` (did you mean linear?)`` for a name that is close to one of some, else nothing; ends a phrase.

    Case does not count. ``more`` are near in another way.
    """
    from difflib import get_close_matches  # not before somebody mistypes: the command line starts with this room

    there = {known.lower(): known for known in names}
    near = dict.fromkeys([*more, *(there[known] for known in get_close_matches(str(name).lower(), there, 1))])
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[int] | None = None) -> list[str]:
    """Return the lines of a table; the columns in ``numbers`` are aligned on the right, None for those that look so.

    Without a header there is no line below it either. Cells are ``shown``.
    """
    rows = [list(map(shown, row)) for row in rows]
    lines = [list(map(shown, header)), *rows] if header else rows
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if numbers is None:
        numbers = [column for column in range(len(widths)) if all(_SIZE.fullmatch(row[column]) for row in rows)]
    aligned = [
        [
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    if header:
        aligned.insert(1, ["-" * width for width in widths])
    return ["  ".join(cells).rstrip() for cells in aligned]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[int] = ()) -> list[str]:
    """Return the lines of a table in Markdown; what comes from data must have been made harmless before.

    The columns in ``numbers`` are aligned on the right.
    """
    line = ["---:" if column in numbers else "---" for column in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in (header, line, *rows)]


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
        text = "".join(letter if letter.isascii() else json.dumps(letter)[1:-1] for letter in text)
    return text if text.isprintable() else "".join(letter if letter == "\n" else _in_json(letter) for letter in text)


def _in_json(character: str) -> str:
    return character if shown(character) == character else json.dumps(character)[1:-1]


def cell(text: str) -> str:
    """Return a cell of a CSV file that no spreadsheet runs as a formula.

    A cell that begins with ``= + - @``, a tab or a line break, and is not a number, gets ``'`` in front. So does one
    that begins like that after one or more ``'``: taking one ``'`` from every cell that matches
    ``'+[-=+@\\t\\r\\n]`` gives back the original.
    """
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def page(text: str) -> str:
    """Return a text of several lines of our own: as ``shown``, but its line breaks stay."""
    return "\n".join(map(shown, text.split("\n")))
