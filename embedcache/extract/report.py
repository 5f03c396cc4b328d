"""What one extraction did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from embedcache.numerics import Difference
from embedcache.wording import counted, shown


@dataclass(frozen=True)
class ExtractionReport:
    """What one extraction did. ``tokens`` are real positions, ``computed`` includes padding and dummy rows.

    ``numerics`` says how the new rows' machine differs from that of the rows that were there; None where either is not.
    ``notes`` say what of the cache's former dataset the new one does not have.
    """

    rows: int
    unique: int
    reused: int
    extracted: int
    truncated: int
    batches: int
    tokens: int
    computed: int
    shards: int
    seconds: float
    numerics: Difference | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON values."""
        return {**asdict(self), "numerics": None if self.numerics is None else self.numerics.to_json()}

    def to_text(self, where: Path | str) -> str:
        """Say it in a few lines."""
        lines = [
            f"{counted(self.rows, 'row')} ({self.unique:,} unique) in {shown(where)}: "
            f"{self.extracted:,} extracted, {self.reused:,} already there"
        ]
        if self.extracted:
            rate = f"{self.extracted / self.seconds:,.0f} rows/s, {self.tokens / self.seconds:,.0f} tokens/s"
            padding = f"{self.computed / max(self.tokens, 1):.3f} positions computed for each real one"
            lines.append(
                f"{self.seconds:.1f} s, {rate}; {counted(self.batches, 'forward pass')}, {padding}; "
                f"{counted(self.shards, 'new shard')}"
            )
        if self.truncated:
            lines.append(f"{self.truncated:,} rows were longer than the model reads and were cut")
        if self.numerics is not None and self.numerics.status != "same":
            lines.append(f"numerics of the new rows, against those that were there: {self.numerics.to_text()}")
        return "\n".join(lines)
