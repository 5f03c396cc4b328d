"""Names in a stranger's cache, file and head reach the terminal as text: nothing is obeyed, no line is forged."""

from __future__ import annotations

import csv
import io
import os
import pty
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from small_caches import SETS, write

from embedcache.cli import run
from embedcache.cli.predictions import _destination
from embedcache.heads import TrainedHead
from embedcache.predict import Prediction, text_table
from embedcache.shard import FeatureSet
from embedcache.spec import HeadSpec

EVIL = "a\nforged: all is well\x1b[2J\x9b5m\r\u202e"
NAMES = (EVIL, "=1+1", "b")


def harmless(text: str) -> None:
    assert all(line.isprintable() for line in text.split("\n")), text
    assert not any(line.startswith("forged") for line in text.split("\n")), text


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sets = (FeatureSet("mean", "pooled", 5, 1, "float32"),)
    split = (np.arange(60) % 5 == 0).astype(np.uint8) + (np.arange(60) % 7 == 0) * 2
    spec = {"backbone": {"architecture": EVIL, "weights": {}}, "compute_dtype": EVIL, "execution": EVIL}
    return write(
        tmp_path_factory.mktemp("shown") / f"c{EVIL}", 60, 60, sets, spec=spec, class_names=NAMES,
        split=np.minimum(split, 2), split_names=("train", "validation", EVIL),
    )  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        "info C", "info C --json", "verify C", "train C -o R", "train C -o R --json", "evaluate R C --split E",
        "evaluate R C --split E --json", "evaluate R C --split E --record", "evaluate R C --split none",
        "sweep C -o S --head majority --head linear --folds 2", "report S --format markdown", "report S --format json",
        "train E -o R2", "predict R --text E", "extract E.csv -o X", "extract I -o X", "extract I -o X --text-column E",
        "relabel C I", "merge C E -o M", "check C I --feature E", "--version E", "E", "train C --head E -o R3",
    ],
)  # fmt: skip
def test_no_command_prints_what_a_terminal_obeys(
    command: str, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cache.parent)
    (cache / f"stray{EVIL}").touch()
    Path(f"in{EVIL}.csv").write_text(f'"{EVIL}","{EVIL}2"\nx,y\nx,z\n')
    words = {"C": str(cache), "E": EVIL, "I": f"in{EVIL}.csv", "E.csv": f"{EVIL}.csv"}
    run([words.get(each, each) for each in command.split()])
    said = capsys.readouterr()
    harmless(said.out)
    harmless(said.err)
    assert said.out + said.err


def head() -> TrainedHead:
    return TrainedHead(HeadSpec(), "classification", NAMES, FeatureSet("mean", "pooled", 5, 1, "float32"))


def test_predictions_on_a_terminal_and_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prediction = Prediction("=1+1", 0.5, dict.fromkeys(NAMES, -0.25))
    kept = io.StringIO()
    text_table("csv", kept, head()).write("@row", prediction)
    header, row = csv.reader(io.StringIO(kept.getvalue()))
    assert header == ["id", "label", "confidence", "margin", EVIL, "'=1+1", "b"], "a file keeps names, but no formulas"
    assert row == ["'@row", "'=1+1", "0.5", "", "-0.25", "-0.25", "-0.25"], "numbers stay numbers"
    reader, writer = pty.openpty()
    with open(writer, "w", newline="") as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        for form in ("csv", "jsonl"):
            with _destination(None, form, Mock(head=head(), nearest=None)) as table:
                table.write(EVIL, prediction)
    said = os.read(reader, 1 << 16).decode().replace("\r\n", "\n")
    assert not set(said) & set("\x1b\x9b\r\u202e")


def test_the_cache_is_as_hostile_as_it_looks() -> None:
    with pytest.raises(AssertionError):
        harmless(f"class {EVIL}")
    assert SETS
