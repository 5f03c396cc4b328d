"""What a notebook shows: values as small pieces of HTML, and whether a progress bar has anybody to look at it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from embedcache.wording import shown

# Only attributes, as stylesheets are taken away where notebooks are shown to others; and no colours but a grey that is
# seen through, so that it reads as well on black as on white.
_LINE = "border-bottom:1px solid rgba(128,128,128,.4)"
_CELL = "padding:2px 10px 2px 0;text-align:{};vertical-align:top"
_MUTED = "opacity:.7"


def panel(
    title: str, facts: Mapping[str, object], tables: Iterable[Table] = (), notes: Iterable[str] = (), *, more: str = ""
) -> str:
    """Return a title, facts, tables and notes as HTML that needs nothing else. Every text is escaped.

    ``more`` stands behind the title, less loud.
    """
    head = f'<strong>{_text(title)}</strong> <span style="{_MUTED}">{_text(more)}</span>'
    rows = [
        f'<tr><td style="{_CELL.format("left")};{_MUTED}">{_text(name)}</td>'
        f'<td style="{_CELL.format("left")}">{_text(value)}</td></tr>'
        for name, value in facts.items()
        if value not in (None, "")
    ]
    parts = [head, _table(rows) if rows else "", *(table.to_html() for table in tables)]
    parts += [f'<div style="{_MUTED}">{_text(note)}</div>' for note in notes]
    return f'<div style="font-size:90%;line-height:1.5">{"".join(part for part in parts if part)}</div>'


class Table:
    """A table of texts; the columns in ``numbers`` are aligned on the right, the rows in ``strong`` stand out."""

    def __init__(
        self,
        header: Sequence[str],
        rows: Iterable[Sequence[object]],
        numbers: Iterable[int] = (),
        strong: Iterable[int] = (),
    ) -> None:
        self._header, self._rows = header, list(rows)
        self._numbers, self._strong = frozenset(numbers), frozenset(strong)

    def to_html(self) -> str:
        """Return it as HTML."""
        lines = [self._line(self._header, "th", f"{_LINE};font-weight:600")]
        lines += [
            self._line(row, "td", "font-weight:600" if place in self._strong else "")
            for place, row in enumerate(self._rows)
        ]
        return _table(lines)

    def _line(self, cells: Sequence[object], tag: str, style: str) -> str:
        aligned = [_CELL.format("right" if column in self._numbers else "left") for column in range(len(cells))]
        made = (
            f'<{tag} style="{where};{style}">{_text(cell)}</{tag}>' for cell, where in zip(cells, aligned, strict=True)
        )
        return f"<tr>{''.join(made)}</tr>"


def _table(rows: Sequence[str]) -> str:
    style = "border-collapse:collapse;margin:4px 0;background:none"
    return f'<table style="{style}"><tbody>{"".join(rows)}</tbody></table>'


def _text(value: object) -> str:
    return escape(shown(value))


def shows_bars() -> bool:
    """Return whether stderr is a terminal or a notebook: elsewhere a bar would fill a log."""
    return sys.stderr.isatty() or in_notebook()


def in_notebook() -> bool:
    """Return whether this process runs the cells of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return getattr(shell, "kernel", None) is not None
