"""The findings of a sweep or an audit as one self-contained page, as Markdown, or as JSON.

============  =========================================================================
``charts``    pictures as SVG, written by hand: they follow the page's colours
``sections``  a summary -> what the page shows
``audits``    the same of an audit
``page``      the template, the style and the script put together; the same as Markdown
============  =========================================================================
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from embedcache.audit.result import is_audit, read_audit
from embedcache.decoding import to_json
from embedcache.errors import SpecError, SweepError
from embedcache.journal import commit
from embedcache.report.page import audit_to_html, audit_to_markdown, to_html, to_markdown
from embedcache.sweep.summary import read_summary

Form = Literal["html", "markdown", "json"]


def report(
    folder: Path | str, output: Path | str | None = None, form: Form = "html", audit: Path | str | None = None
) -> str:
    """Return the report of a folder of a sweep or an audit, and write it to ``output`` where that is given.

    With ``audit``, an audit's folder, the page of a sweep has a section about it.

    Raises ``SweepError`` for a folder that is neither or has no finished summary, and when ``output`` cannot be
    written; ``AuditError`` for an audit that is damaged; ``MissingExtraError`` without jinja2, for HTML.
    """
    if audit is not None and form != "html":
        raise SpecError(f"an audit goes into the HTML page of a sweep: report {audit} alone as {form}")
    text = _of_audit(Path(folder), form) if is_audit(Path(folder)) else _of_sweep(Path(folder), form, audit)
    # Half of a surrogate pair, which JSON can hold and UTF-8 cannot, is written as JSON's own escape.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    if output is not None:
        commit(Path(output), text.encode("utf-8"), SweepError)
    return text


def _of_sweep(folder: Path, form: Form, audit: Path | str | None) -> str:
    summary, written = read_summary(folder)
    if not summary.leaderboard:
        raise SweepError(f"{folder} has no head that could be trained: see {folder}/results.jsonl for the reasons")
    if form == "html":
        return to_html(summary, None if audit is None else read_audit(audit))
    return to_markdown(summary) if form == "markdown" else json.dumps(written, indent=2, ensure_ascii=False) + "\n"


def _of_audit(folder: Path, form: Form) -> str:
    summary = read_audit(folder)
    if form == "html":
        return audit_to_html(summary)
    if form == "markdown":
        return audit_to_markdown(summary)
    return json.dumps(to_json(summary), indent=2, ensure_ascii=False) + "\n"


__all__ = ["Form", "audit_to_html", "audit_to_markdown", "report", "to_html", "to_markdown"]
