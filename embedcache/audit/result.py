"""What an audit found: a row of a table for each finding, a summary for pages and terminals."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from embedcache.decoding import from_json, to_json
from embedcache.errors import AuditError
from embedcache.fingerprint import read_json
from embedcache.journal import commit, make_output, refuse_foreign
from embedcache.wording import cell, counted, shortened, shown, table

if TYPE_CHECKING:
    from embedcache.audit.probabilities import OutOfFold

FORMAT, VERSION = "embedcache-audit", 1
SUMMARY, FINDINGS, PAGE = "audit.json", "findings.csv", "report.html"

Kind = Literal["label", "leak", "duplicate", "outlier", "confused", "next"]
KINDS: Mapping[Kind, str] = {
    "label": "labels that are probably wrong",
    "leak": "rows that nearly repeat a row of an earlier split",
    "duplicate": "rows that nearly repeat a row of their split",
    "outlier": "rows far from all others",
    "confused": "pairs of classes that are confused",
    "next": "rows to label next",
}
"""The kinds of findings, and what they are."""


@dataclass(frozen=True)
class Finding:
    """One finding, a line of ``findings.csv``.

    ``row`` is the row's number in the cache, ``id`` its id, ``key`` its row key in hexadecimal; None for classes that
    are confused, where ``label`` and ``suggested`` are the two. ``suggested`` is the likelier label, ``other`` the id
    of the row that this one repeats, ``other_row`` its number. ``score`` rises with how bad it is, or how useful a
    label would be:

    =========  ==========================================================================================
    label      1 less the out-of-fold probability of the label; of a regression the error in robust deviations
    leak       the cosine of the two rows' features
    duplicate  the same
    outlier    robust deviations of the distance to the nearest class, squared, above the median of the class
    confused   the share of the rows with one label that speak for the other
    next       how unsure the head is, from 0 to 1; how typical the row is where no head can say
    =========  ==========================================================================================
    """

    kind: Kind
    score: float
    reason: str
    row: int | None = None
    id: str | None = None
    key: str | None = None
    split: str | None = None
    label: str | None = None
    suggested: str | None = None
    other: str | None = None
    other_row: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"there is no kind {shortened(self.kind)}")


@dataclass(frozen=True)
class Content:
    """What is shown of a row: a text, or a small picture as a data: URI."""

    text: str | None = None
    image: str | None = None


@dataclass(frozen=True)
class Shown:
    """A finding with what its row holds, and the row that it repeats."""

    finding: Finding
    content: Content
    of_other: Content


@dataclass(frozen=True)
class Point:
    """A vector on the map: its place, the number of its class (-1: none) and the kinds of its findings."""

    x: float
    y: float
    group: int
    kinds: tuple[str, ...] = ()
    title: str = ""


@dataclass(frozen=True)
class Map:
    """Rows in two dimensions; ``explained`` is the share of the variance that each axis of a PCA has."""

    kind: str
    points: tuple[Point, ...]
    explained: tuple[float, float] | None = None


@dataclass(frozen=True)
class ClassFacts:
    """How a class fares: its rows with a label, those whose label is in doubt, those that are far from all others."""

    name: str
    rows: int
    doubted: int
    outliers: int


@dataclass(frozen=True)
class Settings:
    """What was asked for; see ``audit_cache``. ``sweep`` says whether labels were judged by a sweep's head."""

    duplicates: float
    neighbours: int
    label_next: int
    map: Literal["pca", "umap", "none"]
    seed: int
    sweep: bool


@dataclass(frozen=True)
class Summary:
    """Everything but the full list of findings: ``audit.json``.

    ``labels`` says which probabilities labels were judged by, None where there was nothing to judge. ``wrong`` is the
    share of labels that confident learning estimates to be wrong, None where it was not asked, ``agreed`` the share
    that is the likeliest class by those probabilities, of a classification alone.
    """

    name: str
    rows: Mapping[str, int]
    vectors: int
    feature: str
    task: str | None
    labelled: int
    labels: str | None
    settings: Settings
    counts: Mapping[str, int]
    wrong: float | None
    classes: tuple[ClassFacts, ...]
    map: Map | None
    shown: tuple[Shown, ...]
    notes: tuple[str, ...]
    cache_spec: str
    dataset: str
    agreed: float | None = None

    @property
    def trust(self) -> str | None:
        """How far to trust the labels that are named, in a sentence; None where none is, or nothing is known of it."""
        if self.agreed is None or not self.counts.get("label"):
            return None
        return (
            f"out of fold these agree with {100 * self.agreed:.1f} % of the labels: the fewer, the more right labels "
            "are among those named, so look at them from the highest score down"
        )


@dataclass(frozen=True)
class _File:
    format: str
    version: int
    summary: Summary


class Audit:
    """The result of an audit.

    Attributes:
        findings: every one, worst first within its kind.
        summary: counts, classes, the map, and the worst of each kind with their contents.
        out_of_fold: the outputs that labels were judged by; None where there were none.

    Example::

        audit = ec.audit_cache("reviews.cache")
        print(audit.to_text())
        wrong = [finding.id for finding in audit.findings if finding.kind == "label"]
    """

    def __init__(self, findings: Sequence[Finding], summary: Summary, out_of_fold: OutOfFold | None = None) -> None:
        self.findings, self.out_of_fold = list(findings), out_of_fold
        self.summary = summary

    def __repr__(self) -> str:
        found = ", ".join(f"{number:,} {kind}" for kind, number in self.summary.counts.items() if number)
        return f"Audit({self.summary.name!r}: {found or 'nothing found'})"

    @property
    def notes(self) -> tuple[str, ...]:
        """What limits the findings, a line each."""
        return self.summary.notes

    def to_json(self) -> dict[str, object]:
        """Return the findings and the summary, without map and contents, as JSON values."""
        body = {name: to_json(value) for name, value in vars(self.summary).items() if name not in ("map", "shown")}
        return {**body, "findings": [to_json(asdict(finding)) for finding in self.findings]}

    def to_csv(self, path: Path | str) -> None:
        """Write a line for each finding; what a spreadsheet would run gets ``'`` in front, see ``wording.cell``."""
        names = [field.name for field in fields(Finding) if field.name not in ("row", "other_row")]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        for finding in self.findings:
            values = [getattr(finding, name) for name in names]
            writer.writerow([_written(value) for value in values])
        commit(Path(path), text.getvalue().encode("utf-8", "backslashreplace"), AuditError)

    def save(self, folder: Path | str) -> None:
        """Write ``findings.csv`` and ``audit.json`` into a folder of their own, replacing those of an earlier audit.

        Raises ``AuditError`` for a folder of something else.
        """
        path = Path(folder)
        refuse_other(path)
        make_output(path, AuditError, fresh=True)
        self.to_csv(path / FINDINGS)
        body = to_json(_File(FORMAT, VERSION, self.summary))
        text = json.dumps(body, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        commit(path / SUMMARY, text.encode("utf-8", "backslashreplace"), AuditError)

    def to_text(self, most: int = 5) -> str:
        """Return counts and the worst of each kind, for a terminal."""
        summary = self.summary
        rows = ", ".join(f"{name} {number:,}" for name, number in summary.rows.items())
        lines = [f"{summary.name}: {rows}; {counted(summary.vectors, 'different vector')} of {summary.feature}", ""]
        lines += table(["found", "kind", ""], [[f"{summary.counts[kind]:,}", kind, KINDS[kind]] for kind in KINDS], [0])
        if summary.labels is not None:
            lines += ["", f"labels were judged by {summary.labels}"]
        if summary.trust is not None:
            lines.append(summary.trust)
        if summary.wrong is not None:
            lines.append(f"about {100 * summary.wrong:.1f} % of the labels are wrong, as confident learning estimates")
        for kind in KINDS:
            found = [finding for finding in self.findings if finding.kind == kind][:most]
            if found:
                header = ["score", "id", "split", "label", "suggested", f"{kind}: why"]
                lines += ["", *table(header, [_cells(finding) for finding in found], [0])]
        return "\n".join(map(shown, lines))


def _cells(finding: Finding) -> list[str]:
    named = (finding.id, finding.split, finding.label, finding.suggested)
    return [f"{finding.score:.3f}", *(_short(name) for name in named), finding.reason]


def _short(text: str | None, most: int = 24) -> str:
    return "" if text is None else text if len(text) <= most else f"{text[: most - 1]}…"


def _written(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else cell(shown(value))


def refuse_other(folder: Path) -> None:
    """Raise ``AuditError`` for a folder of something else than an audit."""
    refuse_foreign(folder, "an audit", SUMMARY, [FINDINGS, PAGE], AuditError)


def is_audit(folder: Path) -> bool:
    """Whether a folder holds an audit."""
    return (folder / SUMMARY).is_file()


def read_audit(folder: Path | str) -> Summary:
    """Read and check an audit's ``audit.json``. Raises ``AuditError`` saying what is missing or damaged."""
    path = Path(folder) / SUMMARY
    if not path.is_file():
        raise AuditError(f"{folder} is not an audit's folder: make one with embedcache audit CACHE -o {folder}")
    try:
        value = read_json(path, largest=256 << 20, most=8_000_000)
        file = from_json(_File, value)
    except (ValueError, OSError) as error:
        raise AuditError(f"{path} is damaged ({str(error)[:120]}): run the same audit command again") from None
    if file.format != FORMAT or file.version != VERSION:
        raise AuditError(f"{path} is not of this version of embedcache: run the same audit command again")
    return file.summary


def by_kind(findings: Iterable[Finding]) -> dict[str, int]:
    """Count findings of every kind."""
    counts = dict.fromkeys(KINDS, 0)
    for finding in findings:
        counts[finding.kind] += 1
    return {str(kind): number for kind, number in counts.items()}
