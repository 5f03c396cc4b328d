"""The report as a page of its own, and as Markdown."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from embedcache.audit.result import KINDS
from embedcache.audit.result import Summary as Audit
from embedcache.errors import MissingExtraError
from embedcache.heads.record import plain
from embedcache.report.audits import audit_values
from embedcache.report.audits import facts as audit_facts
from embedcache.report.sections import facts, p_value, page_values, show
from embedcache.sweep.result import published_lines
from embedcache.sweep.summary import LeaderboardRow, Summary
from embedcache.wording import counted, markdown_table

if TYPE_CHECKING:
    from jinja2 import Template


# The report as Markdown, for a pull request or a terminal.


def audit_to_markdown(audit: Audit, most: int = 10) -> str:
    """Return an audit as Markdown: counts, and the worst of each kind."""
    lines = [f"# Audit of {plain(audit.name)}", ""]
    lines += markdown_table(["found", "", ""], [[str(audit.counts[kind]), kind, what] for kind, what in KINDS.items()])
    lines += ["", *(f"- {plain(note)}" for note in audit.notes)]
    for kind, what in KINDS.items():
        shown = [each for each in audit.shown if each.finding.kind == kind][:most]
        if shown:
            lines += ["", f"## {what[:1].upper()}{what[1:]}", ""]
            lines += markdown_table(
                ["score", "row", "split", "label", "suggested", "why", "text"],
                [
                    [show(each.finding.score, 3), *(
                        plain(cell or "") for cell in (
                            each.finding.id, each.finding.split, each.finding.label, each.finding.suggested,
                            each.finding.reason, (each.content.text or "")[:200],
                        )
                    )]
                    for each in shown
                ],
            )  # fmt: skip
    return "\n".join(lines) + "\n"


def to_markdown(summary: Summary, most: int = 30) -> str:
    """Return the findings as Markdown: leaderboard, test, classes, mistakes, what was run."""
    rows, metric = summary.leaderboard, summary.metric.name
    percent = f"{100 * (1 - summary.protocol.alpha):g} %"
    lines = [f"# {counted(len(rows), 'head')} on {plain(summary.data.name)}", ""]
    if not summary.complete:
        lines += ["**Not finished: this is a part.**", ""]
    if (test := summary.test) is not None:
        ends = f" ({percent} interval {show(test.interval)})" if test.interval else ""
        score = f"**{plain(test.label)}**: {metric} {show(test.score)}{ends}"
        lines += [f"{score} on {counted(test.rows, 'row')} of {plain(test.split)}.", ""]
    for name, choice in (("chosen", summary.chosen), ("recommended", summary.recommended)):
        if choice is not None:
            lines.append(f"- {name}: {plain(choice.label)} ({plain(choice.why)})")
    lines += [f"- {plain(note)}" for note in summary.notes]
    if summary.published is not None:
        lines += ["", f"## Protocol {summary.published.name}", ""]
        lines += markdown_table(["", ""], [[plain(name), plain(text)] for name, text in published_lines(summary)])
    header = ["rank", "head", metric, f"{percent} interval", "p (Holm)", "from the best", "parameters", "seconds"]
    chosen = summary.chosen.id if summary.chosen else None
    lines += ["", "## Leaderboard", ""]
    lines += markdown_table(header, [_cells(row, row.id == chosen) for row in rows[:most]])
    if len(rows) > most:
        lines += ["", f"{len(rows) - most} more are in `results.jsonl`."]
    if test is not None and test.per_class:
        columns = list(test.per_class[0])
        lines += ["", f"## By {columns[0]}", ""]
        lines += markdown_table(columns, [[plain(show(row[name])) for name in columns] for row in test.per_class])
    if summary.mistakes is not None and summary.mistakes.shown:
        lines += ["", "## The most confident mistakes", ""]
        lines += markdown_table(
            ["row", "true", "predicted", "probability", "text"],
            [
                [plain(wrong.id), plain(show(wrong.true)), plain(show(wrong.predicted)), show(wrong.probability, 3),
                 plain((wrong.text or "")[:200])]
                for wrong in summary.mistakes.shown[:10]
            ],
        )  # fmt: skip
    ran = [[name, plain(value)] for name, value in facts(summary)]
    lines += ["", "## What was run", "", *markdown_table(["", ""], ran)]
    return "\n".join(lines) + "\n"


def _cells(row: LeaderboardRow, chosen: bool) -> list[str]:
    return [
        str(row.rank),
        plain(row.label) + (" **chosen**" if chosen else ""),
        show(row.score),
        show(row.interval),
        p_value(row.p_adjusted),
        "" if row.distinguishable else "not distinguishable",
        f"{row.parameters:,}",
        f"{row.seconds:.2f}",
    ]


_HERE = Path(__file__).parent


def source_hash(text: str) -> str:
    """Return what a content security policy calls an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def to_html(summary: Summary, audit: Audit | None = None) -> str:
    """Return a summary as one self-contained HTML page, with a section about an audit where one is given.

    jinja2 escapes all values. Only the charts, whose texts are escaped when they are drawn, and the page's own style
    and script are inserted unescaped; the policy in the page's head allows no other style or script.

    Raises ``MissingExtraError`` without jinja2.
    """
    values = {**page_values(summary), "audit": None if audit is None else audit_values(audit)}
    return _rendered("page.html.j2", values)


def audit_to_html(audit: Audit) -> str:
    """Return an audit as a page of its own. Raises ``MissingExtraError`` without jinja2."""
    return _rendered("audit_page.html.j2", {"audit": audit_values(audit), "facts": audit_facts(audit), "number": show})


def _rendered(name: str, values: Mapping[str, object]) -> str:
    try:
        from markupsafe import Markup

        template = _template(name)
    except ImportError:
        raise MissingExtraError("the report's page", "jinja2", "report") from None
    style, script = ((_HERE / name).read_text("utf-8") for name in ("style.css", "sort.js"))
    # Neither file of our own holds anything from data.
    return template.render(
        **values,
        style=Markup(style),
        script=Markup(script),
        style_hash=Markup(source_hash(style)),
        script_hash=Markup(source_hash(script)),
    )


@functools.cache
def _template(name: str) -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(_HERE)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True).get_template(name)
