"""What the equivalence check found: comparisons, the causes that the pattern of a difference names, a verdict."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from embedcache.equivalence.bits import Array, Difference
from embedcache.equivalence.features import Recomputed, SetReport
from embedcache.errors import NotEqualError
from embedcache.numerics import Difference as Numerics
from embedcache.wording import counted, listed, shown, table

Verdict = Literal["identical", "within tolerance", "different", "cost"]


@dataclass(frozen=True)
class Comparison:
    """One row of the table: ``what`` of ``reference`` against the cache.

    ``where`` says in words where the largest difference is. ``tolerance`` is None where every bit must agree. The
    verdict ``cost`` is for what rounding to a smaller storage type costs, which is reported and not judged. ``rule``
    says in words what the verdict follows, where that is not one number.
    """

    reference: str
    what: str
    difference: Difference
    where: str
    tolerance: float | None
    verdict: Verdict
    rule: str = ""

    @property
    def ulps(self) -> int | None:
        """The largest distance in units of the last place, where bits are compared; a tolerance is of absolute size."""
        return self.difference.ulps if self.tolerance is None or self.difference.same else None

    def to_json(self) -> dict[str, object]:
        """Return the comparison as JSON values."""
        gap = self.difference
        return {
            "reference": self.reference,
            "what": self.what,
            "values": gap.values,
            "identical": gap.identical,
            "largest_absolute_difference": gap.largest if math.isfinite(gap.largest) else None,
            "largest_ulp_distance": self.ulps,
            "where": self.where or None,
            "tolerance": self.tolerance,
            "rule": self.rule or ("bit for bit" if self.tolerance is None else "tolerance"),
            "verdict": self.verdict,
        }

    def cells(self) -> list[str]:
        """Return the row of the table as people read it; see ``HEADER``."""
        gap = self.difference
        return [
            self.reference,
            self.what,
            f"{gap.values:,}",
            f"{gap.identical:,}",
            "0" if gap.same else f"{gap.largest:.2e}",
            "-" if self.ulps is None else f"{self.ulps:,}",
            self.rule or ("bit for bit" if self.tolerance is None else f"{self.tolerance:.1e}"),
            self.where,
            self.verdict,
        ]


HEADER = ("reference", "what", "values", "identical", "largest diff", "ulps", "tolerance", "where", "verdict")
_NUMBERS = range(2, 7)
"""The columns from ``values`` to ``tolerance``."""


def judged(reference: str, what: str, gap: Difference, where: str = "", tolerance: float | None = None) -> Comparison:
    """Return a comparison with its verdict: identical, or within the tolerance where there is one, or different."""
    if gap.same:
        verdict: Verdict = "identical"
    elif tolerance is not None and gap.largest <= tolerance:
        verdict = "within tolerance"
    else:
        verdict = "different"
    return Comparison(reference, what, gap, "" if gap.same else where, tolerance, verdict)


def judged_by_component(
    reference: str, what: str, gap: Difference, where: str, tolerance: Array, within: bool
) -> Comparison:
    """Return a comparison whose tolerance [...] is each component's own; ``within`` says whether all keep to theirs."""
    row = judged(reference, what, gap, where)
    largest = float(tolerance.max())
    verdict: Verdict = "within tolerance" if row.verdict == "different" and within else row.verdict
    return replace(row, verdict=verdict, tolerance=largest, rule=f"up to {largest:.1e}")


def cost(what: str, gap: Difference, where: str) -> Comparison:
    """Return a comparison of the cache with what it would hold unrounded: reported, not judged."""
    return Comparison("unrounded", what, gap, where, None, "cost", "-")


@dataclass(frozen=True)
class Outcome:
    """What one step of a check found. Outcomes add up, in the order of the steps.

    ``findings`` say what is wrong, ``notes`` what is worth knowing and not a fault, ``costs`` what rounding to the
    storage type costs.
    """

    comparisons: tuple[Comparison, ...] = ()
    findings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    costs: Mapping[str, str] = field(default_factory=dict)

    def __add__(self, later: Outcome) -> Outcome:
        return Outcome(
            self.comparisons + later.comparisons,
            self.findings + later.findings,
            self.notes + later.notes,
            {**self.costs, **later.costs},
        )

    @property
    def agrees(self) -> bool:
        """Whether no comparison is different."""
        return all(row.verdict != "different" for row in self.comparisons)


@dataclass(frozen=True)
class EquivalenceResult:
    """What a check found.

    ``equal`` is the verdict: every comparison agrees and nothing was found. ``findings`` name what is wrong, most
    telling first; ``notes`` are worth knowing and not a fault; ``sampled`` says how much was compared; ``costs`` what
    rounding to the storage type costs; ``environment`` has the fields in which this machine differs from the one that
    made the cache, as (field, there, here); ``numerics`` is how its probe differs from the cache's.
    """

    comparisons: Sequence[Comparison]
    findings: Sequence[str] = ()
    notes: Sequence[str] = ()
    sampled: Mapping[str, str] = field(default_factory=dict)
    costs: Mapping[str, str] = field(default_factory=dict)
    environment: Sequence[tuple[str, object, object]] = ()
    seconds: float = 0.0
    numerics: Numerics = field(default_factory=lambda: Numerics("unknown"))

    @property
    def equal(self) -> bool:
        """Whether the cache is what the backbone gives, and training on it what training end to end is."""
        return not self.findings and all(row.verdict != "different" for row in self.comparisons)

    def raise_if_different(self) -> EquivalenceResult:
        """Return the result itself, or raise ``NotEqualError`` with the causes on one line."""
        if not self.equal:
            raise NotEqualError(self.reason)
        return self

    @property
    def reason(self) -> str:
        """Why the verdict is different, on one line; empty where it is not."""
        if self.equal:
            return ""
        if self.findings:
            return "; ".join(self.findings)
        worst = next(row for row in self.comparisons if row.verdict == "different")
        return f"{worst.what} differ from the {worst.reference} reference by up to {worst.difference.largest:.3g}"

    def to_json(self) -> dict[str, object]:
        """Return the result as JSON values."""
        return {
            "equal": self.equal,
            "findings": list(self.findings),
            "notes": list(self.notes),
            "sampled": dict(self.sampled),
            "comparisons": [row.to_json() for row in self.comparisons],
            "storage_costs": dict(self.costs),
            "environment_differs": [
                {"field": name, "cache": there, "here": here} for name, there, here in self.environment
            ],
            "numerics": self.numerics.to_json(),
            "seconds": self.seconds,
        }

    def to_text(self) -> str:
        """Lay the result out as a table, with findings and notes below it."""
        below = [f"sampled: {', '.join(f'{name} {value}' for name, value in self.sampled.items())}"]
        below += [f"storage costs: {name} {value}" for name, value in self.costs.items()]
        below += [f"numerics: {self.numerics.to_text()}"]
        below += [f"note: {note}" for note in self.notes]
        below += [f"DIFFERENT: {finding}" for finding in self.findings]
        if not self.equal and not self.findings:
            below.append(f"DIFFERENT: {self.reason}")
        verdict = "equal" if self.equal else "different"
        lines = table(HEADER, [row.cells() for row in self.comparisons], _NUMBERS)
        return "\n".join([*map(shown, [*lines, "", *below]), f"verdict: {verdict} ({self.seconds:.0f} s)"])


# What is behind a difference: findings in words, from the pattern of what differs.


Recompute = Callable[[Sequence[bytes]], Mapping[str, Array]]
"""Makes features of some rows by every pooling that the model has, by name."""
Prepare = Callable[[Sequence[bytes], str], Mapping[str, Array]]
"""Makes one feature set of some rows that are prepared in every other way that is known, by what it is in words."""


def of_features(
    recomputed: Recomputed, ids: Sequence[str], tolerances: Mapping[str, Array] | None, other_poolings: Recompute,
    other_preparations: Prepare,
) -> list[str]:  # fmt: skip
    """Return a finding for each feature set that differs by more than the tolerances, if there are any."""
    findings = []
    for name, report in recomputed.reports.items():
        if report.total.same or (tolerances is not None and report.within(tolerances[name])):
            continue
        rows = np.flatnonzero(report.differing)
        shown = listed((ids[int(report.rows[row])] for row in rows.tolist()), 3)
        what = f"features {name}: {len(rows):,} of {len(report.rows):,} rows differ (row {shown})"
        findings.append(f"{what}: {_pattern(report, recomputed, ids, other_poolings, other_preparations)}")
    return findings


def _pattern(
    report: SetReport, recomputed: Recomputed, ids: Sequence[str], other_poolings: Recompute,
    other_preparations: Prepare,
) -> str:  # fmt: skip
    differs, contents, texts = report.differing > 0, recomputed.contents, recomputed.kind == "text"
    if swapped := _swapped(report, ids):
        return swapped
    if cut := _cut(report):
        return cut
    if report.other_lengths:
        row, (there, here) = next(iter(report.other_lengths.items()))
        return f"row {ids[row]} has {there} tokens there and {here} here: another tokenizer, prompt or maximum length"
    if not texts and (other := _another_preparation(report, contents, other_preparations)):
        return other
    if texts and not differs.all() and (word := _word(report, contents)):
        return word
    if differs.sum() <= max(1, len(differs) // 10):
        values = int(report.differing.sum())
        ulps, largest = report.total.ulps, report.total.largest
        return (
            f"{counted(values, 'value')} by up to {f'{largest:.2g}' if ulps is None else f'{ulps:,} ULP'}, "
            "and all other rows agree to the bit: what is stored was changed, not the model"
        )
    if explanation := _another_pooling(report, contents, other_poolings, texts):
        return explanation
    if report.relative < 1e-2:
        return (
            f"by {report.relative:.1e} of their size: the arithmetic or the weights differ a little "
            "(a weight changed, another kernel or precision)"
        )
    return f"by {report.relative:.0%} of their size: another model, pooling or way of preparing {recomputed.kind}s"


def _swapped(report: SetReport, ids: Sequence[str]) -> str | None:
    stored_at = {value.tobytes(): place for place, value in report.there.items()}
    moved = {place: stored_at.get(value.tobytes(), place) for place, value in report.here.items()}
    moved = {place: source for place, source in moved.items() if place != source}
    if not moved or len(moved) < len(report.here) // 2:
        return None
    row, source = (ids[int(report.rows[place])] for place in next(iter(moved.items())))
    return f"what belongs to row {row} is stored at row {source} ({len(moved)} such rows): rows were swapped"


def _cut(report: SetReport) -> str | None:
    differs = report.differing > 0
    if differs.all():
        return None
    shortest, longest = int(report.lengths[differs].min()), int(report.lengths[~differs].max())
    if shortest <= longest or differs.sum() < 2:
        return None
    return f"those of {shortest} and more tokens, none of {longest} or fewer: another maximum length or truncation side"


def _word(report: SetReport, contents: Mapping[int, bytes]) -> str | None:
    """Return what all texts that differ have and no other has: upper case, or a word."""
    known = [place for place, row in enumerate(report.rows.tolist()) if row in contents]
    texts = {place: contents[int(report.rows[place])].decode("utf-8", "replace") for place in known}
    wrong = [texts[place] for place in known if report.differing[place]]
    right = [texts[place] for place in known if not report.differing[place]]
    if len(wrong) < 2 or not right:
        return None
    if all(text != text.lower() for text in wrong) and all(text == text.lower() for text in right):
        return "those with upper-case letters and no others: lower-casing differs"
    common = set.intersection(*(set(re.findall(r"\w+", text)) for text in wrong))
    common -= set().union(*(re.findall(r"\w+", text) for text in right))
    if common:
        word = max(sorted(common), key=len)
        return f"those with the word {word!r} and no others: the tokenizer reads it as something else"
    return None


def _differing(report: SetReport, contents: Mapping[int, bytes]) -> tuple[list[bytes], Callable[[Array], bool]]:
    """Return the contents of a few rows that differ, and what tells whether features of them are those in the cache."""
    places = [place for place in report.there if int(report.rows[place]) in contents][:8]

    def is_stored(values: Array) -> bool:
        made = [np.asarray(value, np.float32).tobytes() for value in values]
        return made == [report.there[place].tobytes() for place in places]

    return [contents[int(report.rows[place])] for place in places], is_stored


def _another_preparation(report: SetReport, contents: Mapping[int, bytes], prepare: Prepare) -> str | None:
    """Try what else may be done to an image: another filter, other constants, channels in another order."""
    rows, is_stored = _differing(report, contents)
    others = prepare(rows, report.feature.name) if rows and report.feature.kind != "tokens" else {}
    what = next((what for what, values in others.items() if is_stored(values)), None)
    return f"the cache holds the features of images {what}" if what else None


def _another_pooling(
    report: SetReport, contents: Mapping[int, bytes], other_poolings: Recompute, texts: bool
) -> str | None:
    """Try other poolings of the same model, and of texts lower-casing."""
    rows, is_stored = _differing(report, contents)
    if not rows or report.feature.kind == "tokens":
        return None
    others = other_poolings(rows)
    for name, values in others.items():
        if is_stored(values):
            return f"the cache holds what the pooling {name} gives: another pooling"
    if not others or not texts:
        return None
    lowered = other_poolings([row.decode("utf-8").lower().encode() for row in rows])
    if report.feature.name in lowered and is_stored(lowered[report.feature.name]):
        return "the cache holds the features of lower-cased texts: lower-casing differs"
    return None


TRAINING = {
    "initial head": "the head starts from other weights: another seed, other targets, class weights or smoothing",
    "batch order": "batches hold other rows: another seed of the order, or other rows",
    "standardisation": "features are standardised by another mean or scale",
    "dropout draws": "dropout is drawn from another seed or another number of times",
    "losses": "the same features, weights and batches give other losses: labels, loss or dropout differ",
    "gradient norms": "the same losses give other gradients",
    "steps": "the first steps agree, then one moved another way: learning rate, decay, momentum, clipping or schedule",
    "final parameters": "the same gradients give other parameters: the optimizer differs",
    "optimizer: first": "the optimizer's state differs",
    "optimizer: second": "the optimizer's state differs",
    "logits": "the same head gives other logits: it reads features another way in evaluation",
    "labels": "the same logits give other labels",
}
"""What it means that this part differs and none before it."""


def of_training(comparisons: Sequence[Comparison], reference: str, features_agree: bool) -> list[str]:
    """Return the first part of training that differs, where the features are not to blame."""
    wrong = [row for row in comparisons if row.reference == reference and row.verdict == "different"]
    if not wrong or (not features_agree and wrong[0].what not in ("initial head", "batch order")):
        return []
    first = next((row for row in wrong if row.what in TRAINING), None)
    if first is None:
        return []
    place = f" at {first.where}" if first.where else ""
    later = first.what == "losses" and not first.where.startswith("step 0 ")
    meaning = TRAINING["steps" if later and _gradients_agree_at_first(wrong) else first.what]
    return [f"training, {reference} reference: {first.what} differ{place}: {meaning}"]


def _gradients_agree_at_first(wrong: Sequence[Comparison]) -> bool:
    norms = [row for row in wrong if row.what == "gradient norms"]
    return not norms or not norms[0].where.startswith("step 0 ")
