"""``python tests/journeys.py``: the files of the package that five everyday calls pass through, for ARCHITECTURE.md.

A file counts when one of its functions is called. A journey that grows is a sign that two rooms do one thing.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import embedcache as ec
from embedcache.cli import run

PACKAGE = Path(ec.__file__).parent
SAMPLE = Path(__file__).resolve().parents[1] / "data" / "sample.csv"


def passed(journey: Callable[[], object]) -> set[str]:
    """The files, relative to the package, whose functions ``journey`` calls in this process."""
    files = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            files.add(frame.f_code.co_filename)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            journey()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    prefix = f"{PACKAGE}{os.sep}"
    return {file.removeprefix(prefix) for file in files if file.startswith(prefix)}


def main() -> None:
    """Take the journeys in their order, each from what the one before has left."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(SAMPLE, folder)
        os.chdir(folder)
        journeys: dict[str, Callable[[], object]] = {
            "extract": lambda: run(["extract", "sample.csv", "-o", "c", "--split", "60/20/20"]),
            "train": lambda: run(["train", "c", "-o", "run"]),
            "sweep": lambda: run(["sweep", "c", "-o", "sweep", "--head", "linear", "--head", "mlp", "--folds", "3"]),
            "check": lambda: run(["check", "c", "sample.csv", "--split", "60/20/20"]),
            "HeadClassifier.fit": lambda: ec.HeadClassifier().fit(*features),
        }
        for name, journey in journeys.items():
            features = ec.FeatureCache.open("c").arrays("train") if Path("c").exists() else ()
            files = passed(journey)
            print(f"{name}: {len(files)} files\n  {' '.join(sorted(files))}")


if __name__ == "__main__":
    main()
