"""The result of a sweep: its folder as an object, and its table for a terminal."""

from __future__ import annotations

import io
import shutil
import weakref
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from embedcache.errors import SweepError
from embedcache.journal import commit
from embedcache.notebook import Table, panel
from embedcache.sweep.store import Result, read_results
from embedcache.sweep.summary import Interval, LeaderboardRow, Summary, read_summary
from embedcache.wording import counted, shown, table

if TYPE_CHECKING:
    import pandas

    from embedcache.heads import TrainedHead


# A summary for a terminal.


_NUMBERS = (1, 3, 5, 6, 7)
"""Columns that are aligned on the right."""
_MOST_FAILURES = 12


def to_text(summary: Summary, most: int = 12) -> str:
    """Lay out a leaderboard. ``=`` marks heads that cannot be told from the best, ``*`` the one in ``best/``."""
    rows, failures, alpha = summary.leaderboard, summary.failures, summary.protocol.alpha
    if not rows:
        reasons = [f"  {failure.label}: {failure.error}" for failure in failures[:_MOST_FAILURES]]
        return "\n".join(map(shown, ["no head could be trained", *reasons]))
    metric = summary.metric.name
    header, cells, _ = _table(summary, most)
    lines = table(header, cells, _NUMBERS)
    lines += [
        "",
        f"{counted(len(rows), 'head')}; {summary.protocol.text}",
    ]
    if len(rows) > 1:
        lines.append(
            f"= {len(summary.group)} of them cannot be told from the best (p >= {alpha:g} after Holm's correction)"
        )
    if summary.recommended is not None:
        lines.append(f"recommended: {summary.recommended.label} ({summary.recommended.why})")
    if failures:
        lines.append(f"{len(failures)} could not be trained, such as {failures[0].label}: {failures[0].error}")
    if summary.published is not None:
        lines += [f"{name}: {text}" for name, text in published_lines(summary)]
    elif (test := summary.test) is not None:
        lines.append(
            f"* {test.label}: {metric} {test.score:.4f} {_ends(test.interval)} "
            f"on {counted(test.rows, 'row')} of {test.split}"
        )
    return "\n".join(map(shown, lines))


def published_lines(summary: Summary) -> list[tuple[str, str]]:
    """Return the figures that a table of the same protocol prints, and what it fixed: name and text; [] without one."""
    published, lines = summary.published, []
    if published is None:
        return []
    for figure in published.figures:
        draws = counted(len(figure.scores), "draw")
        spread = "" if figure.sd is None else f", standard deviation {figure.sd:.4f} over {draws}"
        beside = "".join(f", {name} {value:.4f}" for name, value in figure.beside.items() if value is not None)
        value = f"{summary.metric.name} {figure.score:.4f}{spread}{beside}, on {counted(figure.rows, 'row')} of test"
        lines.append((f"{published.name}, {figure.label}", value))
    return [*published.fixed.items(), *lines]


def _table(summary: Summary, most: int) -> tuple[list[str], list[list[str]], list[int]]:
    """Return header and cells of a leaderboard, and the places of the chosen head."""
    rows, alpha = summary.leaderboard, summary.protocol.alpha
    # The recommended head and a baseline belong in every table, however far down they are.
    named = {choice.id for choice in (summary.chosen, summary.recommended) if choice is not None}
    listed = [*rows[:most], *(row for row in rows[most:] if row.id in named or row.head.kind == "majority")]
    interval = f"{100 * (1 - alpha):g}% interval"
    header = ["", "rank", "head", summary.metric.name, interval, "p (Holm)", "parameters", "seconds"]
    chosen = summary.chosen.id if summary.chosen else None
    places = [place for place, row in enumerate(listed) if row.id == chosen]
    return header, [_cells(row, row.id == chosen) for row in listed], places


def _cells(row: LeaderboardRow, chosen: bool) -> list[str]:
    p = row.p_adjusted
    return [
        ("*" if chosen else " ") + (" " if row.distinguishable else "="),
        str(row.rank),
        row.label,
        f"{row.score:.4f}",
        _ends(row.interval),
        "-" if p is None else (f"{p:.3f}" if p >= 0.001 else "<0.001"),
        f"{row.parameters:,}",
        f"{row.seconds:.2f}",
    ]


def _ends(interval: Interval | None) -> str:
    return "-" if interval is None else f"[{interval[0]:.4f}, {interval[1]:.4f}]"


class SweepResult:
    """The findings of a sweep, opened from its folder.

    ``leaderboard`` has a ``LeaderboardRow`` for each head, best first. ``summary`` is everything that was found, as the
    JSON of ``summary.json``; ``embedcache.sweep.summary`` says what it holds.

    Example::

        result = ec.sweep(cache)
        print(result.to_text())
        result.best.predict(X)
        result.to_dataframe().groupby("label").score.mean()
    """

    def __init__(self, path: Path | str, *, temporary: bool = False) -> None:
        """Open a folder; a ``temporary`` one is removed together with this object.

        Raises ``SweepError`` when it is not a sweep, or no part of one is finished.
        """
        self.path = Path(path)
        if temporary:
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        self._findings, self.summary = read_summary(self.path)

    def __repr__(self) -> str:
        rows = self.leaderboard
        best = f"; best {rows[0].label}: {rows[0].score:.4f}" if rows else ""
        return f"SweepResult({str(self.path)!r}: {counted(len(rows), 'head')}{best})"

    def _repr_html_(self) -> str:
        found, most = self._findings, 12
        header, rows, chosen = _table(found, most)
        test, metric = found.test, found.metric.name
        facts = {
            "data": found.data.name, "compared by": f"{metric}; {found.protocol.text}",
            found.kept_as: found.chosen and f"{found.chosen.label} ({found.chosen.why})",
            "recommended": found.recommended and f"{found.recommended.label} ({found.recommended.why})",
            test.split if test is not None else "test":
                test and f"{metric} {test.score:.4f} {_ends(test.interval)} on {counted(test.rows, 'row')}",
        }  # fmt: skip
        facts |= dict(published_lines(found))
        heads = counted(len(found.leaderboard), "head")
        more = f"{heads}; = cannot be told from the best, * is the {found.kept_as} one"
        return panel("SweepResult", facts, [Table(header, rows, _NUMBERS, chosen)], found.notes, more=more)

    @property
    def leaderboard(self) -> list[LeaderboardRow]:
        """The rows of the leaderboard, best first."""
        return list(self._findings.leaderboard)

    @property
    def chooses(self) -> bool:
        """Whether the head in ``best/`` was chosen; a protocol that scores all heads on test only keeps one."""
        return self._findings.kept_as == "chosen"

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on how far to trust the result, a line each."""
        return self._findings.notes

    @cached_property
    def best(self) -> TrainedHead:
        """The chosen head, trained on train and validation. Raises ``BundleError`` when the sweep kept none."""
        from embedcache.heads import TrainedHead

        return TrainedHead.from_pretrained(self.path / "best")

    @cached_property
    def results(self) -> list[Result]:
        """One for each configuration and fold, in the order in which they came."""
        return read_results(self.path)

    def rows(self) -> list[dict[str, object]]:
        """Return one flat dict for each configuration and fold: head, options and settings as ``name: value``."""
        labels = {row.id: row.label for row in self.leaderboard}
        return [_flat(result, labels.get(result.candidate)) for result in self.results]

    def to_dataframe(self) -> pandas.DataFrame:
        """Return ``rows`` as a DataFrame. Raises ``ImportError`` without pandas."""
        import pandas

        return pandas.DataFrame(self.rows())

    def to_csv(self, path: Path | str) -> None:
        """Write ``rows`` as CSV."""
        import csv

        rows = self.rows()
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        commit(Path(path), text.getvalue().encode("utf-8"), SweepError)

    def to_jsonl(self, path: Path | str) -> None:
        """Write ``rows`` as JSON lines."""
        import json

        lines = (json.dumps(row, ensure_ascii=False) for row in self.rows())
        commit(Path(path), "".join(f"{line}\n" for line in lines).encode("utf-8"), SweepError)

    def to_text(self, rows: int = 12) -> str:
        """Return the leaderboard and what follows from it, for a terminal."""
        return to_text(self._findings, rows)


def _flat(result: Result, label: str | None) -> dict[str, object]:
    body = asdict(result)
    head, train, metrics = body.pop("head"), body.pop("train"), body.pop("metrics")
    first = {name: body.pop(name) for name in ("id", "candidate", "fold", "repeat", "feature")}
    return {
        **first, "label": label, "head": head["kind"], "engine": head["engine"], **head["options"],
        **{name: value for name, value in train.items() if name not in head["options"]}, **body,
        **{f"metric_{name}": value for name, value in metrics.items()},
    }  # fmt: skip
