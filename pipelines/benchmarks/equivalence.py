"""Cached against end-to-end training: bits that differ after 100 steps, what rounding explains, what a check takes."""

from __future__ import annotations

import csv
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.extraction import snippets
from benchmarks.table import row, seconds

from embedcache.equivalence import EquivalenceResult, check_equivalence
from embedcache.extract import extract

STEPS = 100
HEADS = {
    "linear": "l2:mean", "mlp": "l2:mean", "residual": "l2:mean", "attention": "tokens", "attention-pooling": "tokens",
}  # fmt: skip


def equivalence() -> None:
    """Every kind of head on MiniLM, float32 and bfloat16 compute: differing values, cached against live, 100 steps."""
    rows = [{**each, "split": "validation" if at % 5 == 4 else "train"} for at, each in enumerate(snippets(400))]
    standard: dict[str, EquivalenceResult] = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16"):
            # Small canonical batches: a step of 32 rows has ten canonical lengths, and each is a batch of its own.
            options: dict[str, Any] = {"compute_dtype": dtype, "positions": 256, "pooling": ["l2:mean", "tokens"]}
            cache = extract(rows, output_dir=Path(folder) / dtype, **options)
            for head, feature in HEADS.items():
                found = check_equivalence(
                    cache, rows, head=head, feature=feature, steps=STEPS, progress=False,
                    reference="both" if head == "mlp" else "canonical",
                )  # fmt: skip
                bits = [each.difference for each in found.comparisons if each.reference == "canonical"]
                differing = sum(each.values - each.identical for each in bits)
                values = sum(each.values for each in bits)
                row(
                    f"values that differ in any bit, cached vs live backbone, {STEPS} steps, {head}, {dtype}",
                    f"{differing:,} of {values:,}",
                    "0",
                )
                if head == "mlp":
                    standard[dtype] = found
    for dtype, found in standard.items():
        for each in found.comparisons:
            if (
                each.reference == "standard"
                and each.tolerance
                and each.what in ("features l2:mean", "losses", "logits")
            ):
                row(
                    f"cached vs plain transformers and torch, {STEPS} steps, mlp, {dtype}: {each.what}",
                    f"{each.difference.largest:.1e}",
                    f"{each.tolerance:.1e}, derived",
                )


def checking() -> None:
    """The default check of a cache of 10,000 snippets by the command line."""
    records = snippets(10_000)
    with tempfile.TemporaryDirectory() as folder:
        source, cache = Path(folder) / "rows.csv", Path(folder) / "c"
        with open(source, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(records)
        extracted = seconds(lambda: extract(source, output_dir=cache, split="80/10/10"))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "embedcache", "check", cache, source]
        taken = seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        row(
            "check of 10,000 snippets, MiniLM, float32, the default",
            f"{taken:.0f} s ({cpu:.0f} s of CPU; its extraction took {extracted:.0f} s)",
            "60 s",
        )


SECTIONS = (equivalence, checking)
