"""What the equivalence check found: a table of comparisons, findings that name causes, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from embedcache.equivalence.bits import Difference
from embedcache.errors import NotEqualError
from embedcache.numerics import Difference as Numerics
from embedcache.wording import shown

Verdict = Literal["identical", "within tolerance", "different", "cost"]


@dataclass(frozen=True)
class Comparison:
    """One row of the table: ``what`` of ``reference`` against the cache.

    ``where`` says in words where the largest difference is. ``tolerance`` is None where every bit must agree. The
    verdict ``cost`` is of what rounding to a smaller storage type costs, which is told and not judged. ``rule`` says in
    words by what it was judged, where that is no number.
    """

    reference: str
    what: str
    difference: Difference
    where: str
    tolerance: float | None
    verdict: Verdict
    rule: str = ""

    def to_json(self) -> dict[str, Any]:
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


def judged_by_component(
    reference: str, what: str, found: Difference, where: str, tolerance: Any, within: bool
) -> Comparison:
    """Return a comparison whose tolerance [...] is each component's own; ``within`` says whether all keep to theirs."""
    row = judged(reference, what, found, where)
    largest = float(tolerance.max())
    verdict: Verdict = "within tolerance" if row.verdict == "different" and within else row.verdict
    return replace(row, verdict=verdict, tolerance=largest, rule=f"up to {largest:.1e}")


def judged(reference: str, what: str, found: Difference, where: str = "", tolerance: float | None = None) -> Comparison:
    """Return a comparison with its verdict: identical, or within the tolerance where there is one, or different."""
    if found.same:
        verdict: Verdict = "identical"
    elif tolerance is not None and found.largest <= tolerance:
        verdict = "within tolerance"
    else:
        verdict = "different"
    return Comparison(reference, what, found, "" if found.same else where, tolerance, verdict)


@dataclass(frozen=True)
class EquivalenceResult:
    """What a check found.

    ``equal`` is the verdict: every comparison agrees and nothing was found. ``findings`` name what is wrong, most
    telling first; ``notes`` are worth knowing and no fault; ``sampled`` says how much was compared; ``costs`` what
    rounding to the storage type costs; ``environment`` has the fields in which this machine differs from the one that
    made the cache, as (field, there, here); ``numerics`` is how its probe differs from the cache's.
    """

    comparisons: Sequence[Comparison]
    findings: Sequence[str] = ()
    notes: Sequence[str] = ()
    sampled: Mapping[str, Any] = field(default_factory=dict)
    costs: Mapping[str, Any] = field(default_factory=dict)
    environment: Sequence[tuple[str, Any, Any]] = ()
    seconds: float = 0.0
    numerics: Numerics = field(default_factory=lambda: Numerics("unknown"))

    @property
    def equal(self) -> bool:
        """Whether the cache is what the backbone gives, and training on it what training end to end is."""
        return not self.findings and all(each.verdict != "different" for each in self.comparisons)

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
        worst = next(each for each in self.comparisons if each.verdict == "different")
        return f"{worst.what} differ from the {worst.reference} reference by up to {worst.difference.largest:.3g}"

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "equal": self.equal,
            "findings": list(self.findings),
            "notes": list(self.notes),
            "sampled": dict(self.sampled),
            "comparisons": [each.to_json() for each in self.comparisons],
            "storage_costs": dict(self.costs),
            "environment_differs": [
                {"field": name, "cache": there, "here": here} for name, there, here in self.environment
            ],
            "numerics": self.numerics.to_json(),
            "seconds": self.seconds,
        }

    def to_text(self) -> str:
        """Lay the result out as a table, with findings and notes below it."""
        header = ["reference", "what", "values", "identical", "largest diff", "ulps", "tolerance", "where", "verdict"]
        rows = [header, *(_cells(each) for each in self.comparisons)]
        widths = [max(len(row[at]) for row in rows) for at in range(len(header))]
        lines = ["  ".join(_aligned(cell, width, at) for at, (cell, width) in enumerate(zip(row, widths, strict=True)))
                 for row in rows]  # fmt: skip
        lines.insert(1, "  ".join("-" * width for width in widths))
        said = [f"sampled: {', '.join(f'{name} {value}' for name, value in self.sampled.items())}"]
        said += [f"storage costs: {name} {value}" for name, value in self.costs.items()]
        said += [f"numerics: {self.numerics.to_text()}"]
        said += [f"note: {note}" for note in self.notes]
        said += [f"DIFFERENT: {finding}" for finding in self.findings]
        if not self.equal and not self.findings:
            said.append(f"DIFFERENT: {self.reason}")
        verdict = "equal" if self.equal else "different"
        return "\n".join(
            [shown(line.rstrip()) for line in lines]
            + ["", *map(shown, said), f"verdict: {verdict} ({self.seconds:.0f} s)"]
        )


def _cells(each: Comparison) -> list[str]:
    found = each.difference
    return [
        each.reference,
        each.what,
        f"{found.values:,}",
        f"{found.identical:,}",
        "0" if found.same else f"{found.largest:.2e}",
        f"{found.ulps:,}",
        each.rule or ("bit for bit" if each.tolerance is None else f"{each.tolerance:.1e}"),
        each.where,
        each.verdict,
    ]


def _aligned(cell: str, width: int, at: int) -> str:
    return cell.rjust(width) if 2 <= at <= 6 else cell.ljust(width)
