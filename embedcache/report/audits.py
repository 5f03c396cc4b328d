"""An audit as a page of its own, and as a section of a sweep's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from embedcache.audit.result import KINDS, ClassFacts, Content, Finding, Map, Settings, Shown, Summary
from embedcache.report import charts
from embedcache.report.sections import safe_picture, show

_COLOURS = 5
"""Classes that can be told by their colours."""


@dataclass(frozen=True)
class KindValues:
    """What is shown of one kind of finding."""

    name: str
    what: str
    number: int
    shown: Sequence[Shown]

    @property
    def title(self) -> str:
        """The heading."""
        return self.what[:1].upper() + self.what[1:]


@dataclass(frozen=True)
class AuditValues:
    """What the template shows of an audit; see ``Summary``."""

    name: str
    rows: Mapping[str, int]
    labelled: int
    vectors: int
    feature: str
    task: str | None
    wrong: float | None
    notes: Sequence[str]
    labels: str | None
    trust: str | None
    kinds: Sequence[KindValues]
    confused: Sequence[Finding]
    classes: Sequence[ClassFacts]
    map: str | None
    groups: Sequence[str]
    caption: str
    settings: Settings


def audit_values(audit: Summary) -> AuditValues:
    """Return what the template shows of an audit."""
    shown = [replace(each, content=_safe(each.content), of_other=_safe(each.of_other)) for each in audit.shown]
    kinds = [
        KindValues(kind, what, audit.counts.get(kind, 0), [
            each for each in shown if each.finding.kind == kind and kind != "confused"
        ])
        for kind, what in KINDS.items()
    ]  # fmt: skip
    largest = sorted(range(len(audit.classes)), key=lambda number: -audit.classes[number].rows)[:_COLOURS]
    return AuditValues(
        name=audit.name, rows=audit.rows, labelled=audit.labelled, vectors=audit.vectors, feature=audit.feature,
        task=audit.task, wrong=audit.wrong, notes=audit.notes, labels=audit.labels, trust=audit.trust, kinds=kinds,
        confused=[each.finding for each in shown if each.finding.kind == "confused"], classes=audit.classes,
        map=None if audit.map is None else map_chart(audit.map, largest),
        groups=[audit.classes[number].name for number in largest],
        caption="" if audit.map is None else _caption(audit.map), settings=audit.settings,
    )  # fmt: skip


def _safe(content: Content) -> Content:
    return replace(content, image=safe_picture(content.image))


def map_chart(drawn: Map, coloured: Sequence[int]) -> str | None:
    """Return the map: a dot for each vector, in colour those of some classes, and a ring about what was found."""
    if not drawn.points:
        return None
    dots = []
    for point in drawn.points:
        style = f"s{coloured.index(point.group)}" if point.group in coloured else "other"
        dots.append(charts.Spot(point.x, point.y, style, point.kinds, ", ".join([point.title, *point.kinds])))
    return charts.cloud(dots, "the rows in two dimensions")


def _caption(drawn: Map) -> str:
    if drawn.kind == "umap":
        return "UMAP of the centred features; rings mark what was found"
    shares = "" if drawn.explained is None else f", which hold {100 * sum(drawn.explained):.0f} % of the variance"
    return f"the first two principal components of the centred features{shares}; rings mark what was found"


def facts(audit: Summary) -> list[tuple[str, str]]:
    """Return what was looked at, line by line."""
    return [
        ("data", f"{audit.name}: " + ", ".join(f"{split} {rows:,}" for split, rows in audit.rows.items())),
        *((name.replace("_", " "), show(value, 2)) for name, value in vars(audit.settings).items()),
        ("cache's spec", audit.cache_spec),
        ("dataset", audit.dataset),
    ]
