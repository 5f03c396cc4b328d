"""What the equivalence check found: a table of comparisons, findings that name causes, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from embedcache.equivalence.bits import Array, Difference
from embedcache.errors import NotEqualError
from embedcache.numerics import Difference as Numerics
from embedcache.wording import shown, table

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

    def to_json(self) -> dict[str, object]:
        """Return the comparison as JSON values."""
        found = self.difference
        return {
            "reference": self.reference,
            "what": self.what,
            "values": found.values,
            "identical": found.identical,
            "largest_absolute_difference": found.largest if math.isfinite(found.largest) else None,
            "largest_ulp_distance": found.ulps,
            "where": self.where or None,
            "tolerance": self.tolerance,
            "rule": self.rule or ("bit for bit" if self.tolerance is None else "tolerance"),
            "verdict": self.verdict,
        }

    def cells(self) -> list[str]:
        """Return the row of the table as people read it; see ``HEADER``."""
        found = self.difference
        return [
            self.reference,
            self.what,
            f"{found.values:,}",
            f"{found.identical:,}",
            "0" if found.same else f"{found.largest:.2e}",
            f"{found.ulps:,}",
            self.rule or ("bit for bit" if self.tolerance is None else f"{self.tolerance:.1e}"),
            self.where,
            self.verdict,
        ]


HEADER = ("reference", "what", "values", "identical", "largest diff", "ulps", "tolerance", "where", "verdict")
_NUMBERS = range(2, 7)
"""The columns from ``values`` to ``tolerance``."""


def judged(reference: str, what: str, found: Difference, where: str = "", tolerance: float | None = None) -> Comparison:
    """Return a comparison with its verdict: identical, or within the tolerance where there is one, or different."""
    if found.same:
        verdict: Verdict = "identical"
    elif tolerance is not None and found.largest <= tolerance:
        verdict = "within tolerance"
    else:
        verdict = "different"
    return Comparison(reference, what, found, "" if found.same else where, tolerance, verdict)


def judged_by_component(
    reference: str, what: str, found: Difference, where: str, tolerance: Array, within: bool
) -> Comparison:
    """Return a comparison whose tolerance [...] is each component's own; ``within`` says whether all keep to theirs."""
    row = judged(reference, what, found, where)
    largest = float(tolerance.max())
    verdict: Verdict = "within tolerance" if row.verdict == "different" and within else row.verdict
    return replace(row, verdict=verdict, tolerance=largest, rule=f"up to {largest:.1e}")


def cost(what: str, found: Difference, where: str) -> Comparison:
    """Return a comparison of the cache with what it would hold unrounded: reported, not judged."""
    return Comparison("unrounded", what, found, where, None, "cost", "-")


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
