"""Started with closed streams, a command does its work and says what it can."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_caches import SETS, write

from embedcache.heads import TrainedHead


@pytest.mark.parametrize(
    ("closed", "head"),
    # Only the loading of torch, which takes seconds, takes the number of a closed stderr for itself.
    [("0<&-", "linear"), ("1>&-", "linear"), ("2>&-", "mlp --epochs 2"), ("0<&- 1>&- 2>&-", "mlp --epochs 2")],
)
def test_closed_streams(tmp_path: Path, closed: str, head: str) -> None:
    split = (np.arange(60) % 5 == 0).astype(np.uint8)
    write(tmp_path / "c", 60, 60, SETS[:1], split=split, split_names=("train", "validation"))
    train = f"{sys.executable} -m embedcache train c -o r --head {head} {closed}"
    done = subprocess.run(train, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, "error" in done.stderr) == (0, False)
    assert ("saved in r" in done.stdout) == ("1>&-" not in closed)
    assert TrainedHead.from_pretrained(tmp_path / "r").class_names == ("a", "b", "c")


def test_a_closed_standard_input_is_an_empty_one(tmp_path: Path) -> None:
    extract = f"{sys.executable} -m embedcache extract - -o c 0<&-"
    done = subprocess.run(extract, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: standard input is empty\n")
