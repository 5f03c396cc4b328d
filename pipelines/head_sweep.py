"""Which head, how much regularisation, and is the difference real? Many heads on one cache, compared honestly.

    python pipelines/head_sweep.py [INPUT.csv] [WORK_FOLDER]

Without INPUT it takes the sample that lies in data/. Run it again and nothing is computed twice.
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
    parser.add_argument("work", nargs="?", type=Path, default=Path("head_sweep_work"), metavar="WORK_FOLDER")
    arguments = parser.parse_args()
    work: Path = arguments.work

    # Once, and on the machine that has the GPU: the backbone runs over every text.
    cache = ec.extract(arguments.source, output_dir=work / "texts.cache", split="80/10/10", keep_inputs=True)
    print(cache)

    # As often as you like, on a laptop. A list is a choice of values; seeds are repetitions, not choices.
    grid = {
        "heads": [
            "majority",
            {"head": "linear", "solver": "convex", "l2": {"log": [0.1, 1000], "steps": 9}},
            {"head": "linear", "learning_rate": [0.003, 0.01], "weight_decay": [0.0, 0.1], "seeds": [0, 1]},
            {"head": "mlp", "hidden": [64, [256, 64]], "dropout": [0.1, 0.5]},
        ]
    }
    # Heads are compared on folds of train and validation; the test split is looked at once, with the chosen one.
    results = ec.sweep(cache, grid, output_dir=work / "sweep", folds=3)
    # `=` marks those that the data cannot tell from the winner; choose="simplest" would keep the simplest of them.
    print(results.to_text())
    for note in results.summary["notes"]:
        print(f"note: {note}")

    # One row a head and fold, for whatever you want to know beyond the table.
    results.to_csv(work / "results.csv")

    # The chosen head is a bundle like any other.
    predictor = ec.Predictor.load(work / "sweep" / "best")
    for text in ("I would watch it again tomorrow.", "Two hours of my life that nobody gives back."):
        (prediction,) = predictor([text])
        print(f"{prediction.label}  {text}")


if __name__ == "__main__":
    sys.exit(reported(main))
