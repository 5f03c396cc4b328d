"""What does freezing cost me, and what does it save? Four ways of training on the same rows, measured.

    python pipelines/compare_with_finetuning.py [INPUT.csv] [FOLDER] [MAX_ROWS]

Without INPUT it takes the sample that lies in data/, which shows the way and proves nothing. Stop it and run it again:
it goes on after the last measurement.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import embedcache as ec
from embedcache.cli import reported

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "sample.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default=str(SAMPLE), metavar="INPUT.csv")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("comparison"), metavar="FOLDER")
    parser.add_argument("max_rows", nargs="?", type=int, metavar="MAX_ROWS")
    arguments = parser.parse_args()
    found = ec.compare_training_approaches(
        arguments.source,
        arguments.folder,
        split="80/10/10",
        max_rows=arguments.max_rows,
        approaches=("cached", "frozen", "last-2", "full"),
        fractions=(0.25, 1.0),
        epochs=3,
    )
    # The table, what it says in sentences, and the recipes; the folder has it as comparison.md, .json and .svg too.
    print(found.to_markdown())

    # Every number of the table is a value as well.
    cached, full = found.row("cached"), found.row("full")
    print(f"full fine-tuning takes {full.total_seconds / cached.total_seconds:.1f} times as long as the cached way")
    low, high = full.difference_interval
    print(f"and differs from it by {full.difference:+.3f} on test, 95 % interval [{low:+.3f}, {high:+.3f}]")


if __name__ == "__main__":
    sys.exit(reported(main))
