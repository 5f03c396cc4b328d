"""The report as Markdown, for a pull request or a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from embedcache.report.sections import facts, p_value, show
from embedcache.wording import counted, shown


def to_markdown(summary: Mapping[str, Any], most: int = 30) -> str:
    """Return the findings as Markdown: leaderboard, test, classes, mistakes, what was run."""
    rows, metric = summary["leaderboard"], summary["metric"]["name"]
    percent = f"{100 * (1 - summary['protocol']['alpha']):g} %"
    lines = [f"# {counted(len(rows), 'head')} on {plain(summary['data']['name'])}", ""]
    if not summary["complete"]:
        lines += ["**Not finished: this is a part.**", ""]
    test = summary.get("test")
    if test is not None:
        ends = f" ({percent} interval {show(test['interval'])})" if test["interval"] else ""
        said = f"**{plain(test['label'])}**: {metric} {show(test['score'])}{ends} on {counted(test['rows'], 'row')} of"
        lines += [f"{said} {plain(test['split'])}.", ""]
    for name in ("chosen", "recommended"):
        if summary.get(name):
            lines.append(f"- {name}: {plain(summary[name]['label'])} ({plain(summary[name]['why'])})")
    lines += [f"- {plain(note)}" for note in summary["notes"]]
    chosen = (summary.get("chosen") or {}).get("id")
    table = [
        [
            str(row["rank"]),
            plain(row["label"]) + (" **chosen**" if row["id"] == chosen else ""),
            show(row["score"]),
            show(row["interval"]),
            p_value(row["p_adjusted"]),
            "" if row["distinguishable"] else "not distinguishable",
            f"{row['parameters']:,}",
            f"{row['seconds']:.2f}",
        ]
        for row in rows[:most]
    ]
    header = ["rank", "head", metric, f"{percent} interval", "p (Holm)", "from the best", "parameters", "seconds"]
    lines += ["", "## Leaderboard", "", *_table(header, table)]
    if len(rows) > most:
        lines += ["", f"{len(rows) - most} more are in `results.jsonl`."]
    if test is not None and test.get("per_class"):
        columns = list(test["per_class"][0])
        lines += ["", f"## By {columns[0]}", ""]
        lines += _table(columns, [[plain(show(row[name])) for name in columns] for row in test["per_class"]])
    mistakes = summary.get("mistakes")
    if mistakes and mistakes.get("shown"):
        lines += ["", "## The most confident mistakes", ""]
        lines += _table(
            ["row", "is", "said", "probability", "text"],
            [
                [plain(each["id"]), plain(show(each["true"])), plain(show(each["predicted"])),
                 show(each["probability"], 3), plain((each.get("text") or "")[:200])]
                for each in mistakes["shown"][:10]
            ],
        )  # fmt: skip
    lines += ["", "## What was run", "", *_table(["", ""], [[name, plain(value)] for name, value in facts(summary)])]
    return "\n".join(lines) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_line(header), _line(["---"] * len(header)), *(_line(row) for row in rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plain(value: object) -> str:
    """Make a text from data harmless in Markdown."""
    text = shown(" ".join(str(value).split()))
    for mark in "\\|<>`[]*_#":
        text = text.replace(mark, "\\" + mark)
    return text.replace("&", "&amp;")
