"""The programs in pipelines/: what a user does wrong costs one line and a status, as on the command line."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from planted import planted_cache, planted_rows

import embedcache as ec

PIPELINES = Path(__file__).resolve().parents[1] / "pipelines"

Start = Callable[..., tuple[object, list[str]]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Start:
    """Return a function that runs a program with some arguments and gives its status and what stands on stderr."""

    def run(name: str, *arguments: object) -> tuple[object, list[str]]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(PIPELINES / f"{name}.py"), run_name="__main__")
        return ended.value.code, capsys.readouterr().err.strip().splitlines()

    return run


def test_a_folder_that_holds_another_sweep(tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, other = (planted_cache(tmp_path / str(rows), planted_rows(rows, test=10)) for rows in (60, 70))
    ec.sweep(other, {"heads": ["majority"]}, output_dir=tmp_path / "work" / "sweep", folds=3, progress=False)
    monkeypatch.setattr(ec, "extract", lambda *_, **__: cache)
    code, lines = start("head_sweep", "rows.csv", tmp_path / "work")
    assert (code, len(lines)) == (1, 1)
    assert lines[0].startswith("error: ")
    assert str(tmp_path / "work" / "sweep") in lines[0]


@pytest.mark.parametrize(
    ("name", "arguments", "code", "last"),
    [
        ("head_sweep", ["nowhere.csv", "work"], 1, "error: nowhere.csv: no such file"),
        ("compare_with_finetuning", ["nowhere.csv", "work"], 1, "error: nowhere.csv: no such file"),
        ("compare_with_finetuning", ["nowhere.csv", "work", "many"], 2, "invalid int value: 'many'"),
        ("image_classification", ["nowhere", "--work", "work", "--model", "m"], 1, "error: nowhere: no such file"),
        ("image_classification", ["nowhere", "--work", "file", "--model", "m"], 1, "error: file: File exists"),
    ],
)
def test_what_is_not_there_or_in_the_way(
    tmp_path: Path,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    arguments: list[str],
    code: int,
    last: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    ended, lines = start(name, *arguments)
    assert ended == code
    assert last in lines[-1]
    assert code == 2 or len(lines) == 1


@pytest.mark.parametrize("name", ["head_sweep", "text_classification", "image_classification"])
def test_ctrl_c(tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    for taken in ("extract", "load_examples", "TextClassificationPipeline"):
        monkeypatch.setattr(ec, taken, interrupted)
    code, lines = start(name, *(["a", "--model", "m"] if name == "image_classification" else []))
    assert (code, lines) == (1, ["interrupted: what was finished is kept; run the same command again to go on"])
