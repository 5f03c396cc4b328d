"""Cached features against training with the backbone in the loop: what 5 epochs cost, and every further head."""

from __future__ import annotations

from benchmarks.extraction import snippets
from benchmarks.table import SETTINGS, row

import embedcache as ec

EPOCHS = 5
MOST = 1000
"""Rows: full fine-tuning costs a minute on two cores for each thousand of them, and ratios do not depend on them."""


def comparison() -> None:
    """Total time of 5 epochs, extraction included, and of every further head, against frozen and full training."""
    rows = min(SETTINGS["rows"], MOST)
    found = ec.compare_training_approaches(
        snippets(rows), split="80/10/10", approaches=("cached", "frozen", "full"), epochs=EPOCHS
    )
    evens = {even.against: even for even in found.break_even}
    for against, name, bar in (("frozen", "frozen end to end", "4x"), ("full", "full fine-tuning", "10x")):
        heads = evens[against].heads
        row(
            f"{EPOCHS} epochs on {rows:,} rows from cached features, extraction included, vs {name}",
            f"{evens[against].first:.1f}x (paid for with head number {heads})",
            bar,
        )
    row("the 2nd and every further head vs frozen end to end", f"{evens['frozen'].further:,.0f}x", "100x")
    held = {each.approach: each.memory.resident / 2**20 for each in found.rows}
    head = found.row("cached").head_memory / 2**20
    row(
        "peak memory above Python's own: extraction, a head on the cache, frozen, full",
        f"{held['cached']:,.0f}, {head:,.0f}, {held['frozen']:,.0f}, {held['full']:,.0f} MiB",
    )


SECTIONS = (comparison,)
