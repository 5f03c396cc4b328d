"""A sweep's findings as one self-contained page, as Markdown, or as JSON.

============  =========================================================================
``charts``    pictures as SVG, written by hand: they follow the page's colours
``sections``  a summary -> what the page shows
``page``      the template, the style and the script put together; the same as Markdown
============  =========================================================================
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from embedcache.errors import SweepError
from embedcache.journal import commit
from embedcache.report.page import to_html, to_markdown
from embedcache.sweep.summary import read_summary

Form = Literal["html", "markdown", "json"]


def report(sweep: Path | str, output: Path | str | None = None, form: Form = "html") -> str:
    """Return the report of a sweep's folder, and write it to ``output`` where that is given.

    Raises ``SweepError`` for a folder that is not a sweep or has no finished summary, and when ``output`` cannot be
    written; ``MissingExtraError`` without jinja2, for HTML.
    """
    summary, written = read_summary(Path(sweep))
    if not summary.leaderboard:
        raise SweepError(f"{sweep} has no head that could be trained: see {sweep}/results.jsonl for the reasons")
    if form == "html":
        text = to_html(summary)
    elif form == "markdown":
        text = to_markdown(summary)
    else:
        text = json.dumps(written, indent=2, ensure_ascii=False) + "\n"
    # Half of a surrogate pair, which JSON can hold and UTF-8 cannot, is written as JSON's own escape.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    if output is not None:
        commit(Path(output), text.encode("utf-8"), SweepError)
    return text


__all__ = ["Form", "report", "to_html", "to_markdown"]
