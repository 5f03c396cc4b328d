"""A sweep's folder: nothing kept is lost, nothing damaged is used, nothing of something else is touched."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.errors import CacheLockedError, SweepError
from embedcache.sweep.store import Result, SweepFolder, read_identity, read_results

IDENTITY = {"cache": {"spec": "a", "dataset": "b"}, "protocol": {"folds": 5}}


def result(name: str = "0" * 16, fold: int = 0) -> Result:
    return Result(
        name, "c" * 16, fold, 0, 80, 20, 0.5, {"accuracy": 0.5, "ece": None}, "mean", {"kind": "linear"}, {"seed": 0},
        24, 0.25, 10.0,
    )  # fmt: skip


def outputs(rows: int = 20) -> np.ndarray:
    return np.full((rows, 3), 1 / 3, np.float32)


def test_results_come_back_with_their_predictions(tmp_path: Path) -> None:
    with SweepFolder(tmp_path / "s", IDENTITY) as folder:
        folder.add([result(fold=0)], {"0" * 16: {0: outputs()}})
        folder.add([result(fold=1)], {"0" * 16: {1: outputs(7)}})
    with SweepFolder(tmp_path / "s", IDENTITY) as folder:
        assert list(folder.results.values()) == [result(fold=0), result(fold=1)]
        kept = folder.predictions("0" * 16)
        assert {fold: value.shape for fold, value in kept.items()} == {0: (20, 3), 1: (7, 3)}
        assert folder.done("0" * 16, {0: 20, 1: 7, 2: 7}, 3) == {0, 1}
        assert folder.notes == []


def test_a_result_without_whole_predictions_does_not_count(tmp_path: Path) -> None:
    with SweepFolder(tmp_path / "s", IDENTITY) as folder:
        folder.add([result(), result(fold=1)], {"0" * 16: {0: outputs(), 1: outputs()}})
        file = tmp_path / "s/predictions" / f"{'0' * 16}.safetensors"
        whole = file.read_bytes()
        assert folder.done("0" * 16, {0: 20, 1: 21}, 3) == {0}
        for damaged in (whole[:-5], b"", whole[:3], b"x" * 100):
            file.write_bytes(damaged)
            assert folder.done("0" * 16, {0: 20, 1: 20}, 3) == set()
        file.unlink()
        assert folder.done("0" * 16, {0: 20}, 3) == set()
        # What failed has no predictions, and is not tried again.
        folder.add([replace(result("1" * 16), score=None, error="diverged")])
        assert folder.done("1" * 16, {0: 20, 1: 20}, 3) == {0}


@given(cut=st.integers(1, 400))
def test_a_half_written_last_line_is_dropped_and_said(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("s") / "s"
    with SweepFolder(path, IDENTITY) as folder:
        folder.add([result(fold=0)])
        folder.add([result(fold=1)])
    file = path / "results.jsonl"
    whole = file.read_bytes()
    length = len(whole) // 2
    file.write_bytes(whole[: length + min(cut, length - 1)])
    assert [each.fold for each in read_results(path)] == [0]
    with SweepFolder(path, IDENTITY) as folder:
        assert [each.fold for each in folder.results.values()] == [0]
        assert "half written" in folder.notes[0]
        folder.add([result(fold=1)])
    assert file.read_bytes() == whole


def test_a_damaged_line_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with SweepFolder(path, IDENTITY) as folder:
        folder.add([result(fold=fold) for fold in range(5)])
    file = path / "results.jsonl"
    lines = file.read_text().splitlines()
    others = [json.dumps({**json.loads(lines[2]), "fold": value}) for value in ("two", -1, True, None)]
    for damage in (
        "{not json",
        "[]",
        lines[2][:-10],
        *others,
        lines[2].replace('"fold":2', '"fold":2,"fold":3'),
        "\0\0",
    ):
        file.write_text("\n".join([*lines[:2], damage, *lines[3:]]) + "\n")
        before = file.read_bytes()
        with (
            pytest.raises(SweepError, match=r"results.jsonl, line 3 is damaged .*delete that line"),
            SweepFolder(path, IDENTITY),
        ):
            pass
        assert file.read_bytes() == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with SweepFolder(tmp_path / "s", IDENTITY):
        pass
    other = {"cache": {"spec": "a", "dataset": "other"}, "protocol": {"folds": 4}}
    match = r"cache.dataset: the folder has 'b', now 'other'; protocol.folds: the folder has 5, now 4"
    with pytest.raises(SweepError, match=match), SweepFolder(tmp_path / "s", other):
        pass
    (tmp_path / "x").mkdir()
    (tmp_path / "x/thesis.tex").touch()
    with (
        pytest.raises(SweepError, match=r"not a sweep \(it holds thesis.tex\)"),
        SweepFolder(tmp_path / "x", IDENTITY),
    ):
        pass
    (tmp_path / "f").touch()
    with pytest.raises(SweepError, match="is a file"), SweepFolder(tmp_path / "f", IDENTITY):
        pass
    for text, message in [
        ("", "is damaged"), ('{"format": "x", "version": 1, "identity": {}}', "is not a sweep's"),
        ('{"format": "embedcache-sweep", "version": 9, "identity": {}}', "has version 9"),
    ]:  # fmt: skip
        (tmp_path / "s/sweep.json").write_text(text)
        with pytest.raises(SweepError, match=message):
            read_identity(tmp_path / "s")
    with pytest.raises(SweepError, match="is not a sweep"):
        read_identity(tmp_path)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        SweepFolder(tmp_path / "s", IDENTITY),
        pytest.raises(CacheLockedError, match="another process"),
        SweepFolder(tmp_path / "s", IDENTITY),
    ):
        pass


def test_an_empty_folder_and_one_of_a_killed_start_are_taken(tmp_path: Path) -> None:
    (tmp_path / "s/predictions").mkdir(parents=True)
    with SweepFolder(tmp_path / "s", IDENTITY) as folder:
        assert folder.results == {}
    assert read_identity(tmp_path / "s") == IDENTITY


def test_a_link_in_place_of_the_best_head_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with SweepFolder(tmp_path / "s", IDENTITY):
        pass
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "s" / "best").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SweepError, match=r"best: a link or a special file stands there, .*: remove it"):
        SweepFolder(tmp_path / "s", IDENTITY).__enter__()
