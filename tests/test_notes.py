"""What is to be known reaches whoever runs it: a warning where Python was called, a line of the command, ``notes``."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_caches
import tiny_models
from fakes import CountingBackbone

from embedcache import (
    EmbedcacheWarning,
    FeatureCache,
    HeadClassifier,
    HeadSpec,
    TrainSpec,
    extract,
    load_examples,
    relabel,
    sweep,
    train_head,
    train_on_cache,
)
from embedcache.cli import run as run_cli

ROWS = [
    {"text": f"row {row}", "label": "ab"[row % 2], "split": ("train", "validation", "test")[row % 3]}
    for row in range(12)
]
WITHOUT_SPLIT = [{"text": row["text"], "label": row["label"]} for row in ROWS]
LEAK = [*ROWS, {"text": "row 0", "label": "b", "split": "test"}]


def cache_of(folder: Path, rows: Any = ROWS, **options: Any) -> FeatureCache:
    return extract(rows, output_dir=folder, backbone=CountingBackbone(), **options)


def quietly(folder: Path, *rows: Any) -> FeatureCache:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EmbedcacheWarning)
        return cache_of(folder, *rows)


def guessed(_: Path) -> Any:
    return load_examples(ROWS)


def leaking(folder: Path) -> Any:
    return cache_of(folder, LEAK)


def fewer(folder: Path) -> Any:
    quietly(folder)
    return cache_of(folder, ROWS[:9])


def unsplit(folder: Path) -> Any:
    quietly(folder)
    return cache_of(folder, WITHOUT_SPLIT)


def unlabelled(folder: Path) -> Any:
    quietly(folder)
    return cache_of(folder, ROWS, labels="none", text_column="text", split_column="split")


def relabelled(folder: Path) -> Any:
    quietly(folder)
    return relabel(folder, load_examples(ROWS[:9]))


def no_neighbours(folder: Path) -> Any:
    return train_on_cache(quietly(folder), HeadSpec("knn", "sklearn"))


def lost_class(_: Path) -> Any:
    x = np.random.default_rng(7).normal(size=(13, 5)).astype(np.float32)
    return train_head(x, np.arange(13) % 2, class_names=("a", "b", "c"))


def estimator(_: Path) -> Any:
    x = np.random.default_rng(7).normal(size=(7, 5))
    return HeadClassifier("knn", engine="sklearn").fit(x, np.arange(7) % 2)


def swept(folder: Path) -> Any:
    return sweep(quietly(folder, WITHOUT_SPLIT), ["majority"], folds=2, progress=False)


@pytest.mark.parametrize(
    ("door", "note"),
    [
        (guessed, "label column: 'label' (guessed)"),
        (leaking, "1 different content occurs in both train and test"),
        (leaking, "with different labels"),
        (fewer, "this input lacks 3 rows of the 12 in CACHE, which leave its dataset"),
        (relabelled, "this input lacks 3 rows of the 12 in CACHE, which leave its dataset"),
        (unsplit, "CACHE loses the splits 'validation' (4 rows), 'test' (4 rows)"),
        (unlabelled, "CACHE loses its labels"),
        (no_neighbours, "knn asks for 10 neighbours and has 4 rows"),
        (lost_class, "no training row has the class 'c'"),
        (estimator, "knn asks for 10 neighbours and has 7 rows"),
        (swept, "no labelled test split"),
    ],
)
def test_python_is_warned_where_it_called_and_can_read_it_again(
    tmp_path: Path, door: Callable[[Path], Any], note: str
) -> None:
    note = note.replace("CACHE", str(tmp_path / "c"))
    with pytest.warns(EmbedcacheWarning) as caught:
        result = door(tmp_path / "c")
    said = [str(each.message) for each in caught]
    assert [each for each in said if note in each], said
    assert len(said) == len(set(said)), "said twice"
    assert {each.filename for each in caught} == {__file__}
    assert set(said) <= set(getattr(result, "notes_", None) or result.notes)


def test_a_first_extract_and_one_that_adds_rows_drop_nothing(tmp_path: Path) -> None:
    more = [*ROWS, {"text": "row 12", "label": "a", "split": "test"}]
    for rows in (ROWS, more, more):
        cache = cache_of(tmp_path / "c", rows)
        assert not [note for note in cache.notes if "lose" in note or "leave" in note]


def test_a_cache_that_is_being_extended_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = small_caches.write(tmp_path / "c")
    del writer
    with small_caches.CacheWriter(tmp_path / "c", small_caches.SPEC, small_caches.SETS) as again:
        again.append(small_caches.keys([99]), small_caches.arrays(small_caches.SETS, [99]), {})
    with pytest.warns(EmbedcacheWarning, match="is being extended") as caught:
        FeatureCache.open(tmp_path / "c")
    assert caught[0].filename == __file__
    assert run_cli(["info", str(tmp_path / "c")]) == 0
    assert capsys.readouterr().err.startswith("note: ")


def test_the_command_line_prints_each_once(tmp_path: Path) -> None:
    """In a process of its own, as Python's warnings have their own way of being printed once."""
    folder = tiny_models.build("bert", tmp_path / "model")
    lines = ["text,label,split", *(",".join(row.values()) for row in LEAK)]
    (tmp_path / "all.csv").write_text("\n".join(lines))
    (tmp_path / "few.csv").write_text("\n".join(lines[:-3]))

    commands = (
        f"extract all.csv -o c --model {folder}", f"extract few.csv -o c --model {folder}",
        "train c -o r --head knn --engine sklearn", "sweep c -o s --head majority --head knn --folds 2",
    )  # fmt: skip
    code = "\n".join(
        [
            "import sys",
            "from embedcache.cli import run",
            *(f"print({command!r}, file=sys.stderr); assert run({command.split()!r}) == 0" for command in commands),
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    said: dict[str, list[str]] = {}
    for line in done.stderr.splitlines():
        said.setdefault(line, []) if line in commands else said[list(said)[-1]].append(line)
    for lines in said.values():
        assert all(line.startswith("note: ") for line in lines if not line.startswith("2 heads on 2 folds: ")), lines
        assert len(lines) == len(set(lines)), lines
    expected = (
        "occurs in both train and test",
        "note: this input lacks 2 rows of the 13 in c",
        "knn asks for 10 neighbours",
    )
    for lines, note in zip(said.values(), expected, strict=False):
        assert [line for line in lines if note in line], lines


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ("80/10/10", None),
        ("0.8/.2", None),
        ("80/10/1", "taken as proportions, train 87.9 %, validation 11 %, test 1.1 %"),
        ("3/1", "train 75 %, test 25 %"),
    ],
)
def test_a_split_that_does_not_add_up_is_remarked(split: str, said: str | None) -> None:
    notes = [note for note in load_examples(WITHOUT_SPLIT, split=split).notes if "does not add up to 100" in note]
    assert len(notes) == (said is not None)
    assert said is None or said in notes[0]


@pytest.mark.parametrize("spec", [TrainSpec(), TrainSpec(standardize=False)])
def test_features_that_vary_and_are_taken_for_constants_are_counted(spec: TrainSpec) -> None:
    x = np.random.default_rng(7).normal(size=(23, 5)) * [1e6, 1e6, 1e-6, 0, 1e6] + [0, 0, 0, 11, 0]
    notes = train_head(x, np.arange(23) % 2, spec=spec, class_names=("a", "b")).notes
    assert [note for note in notes if "taken for constant: 1 feature of 5" in note] == [
        note for note in notes if spec.standardize and "constant" in note
    ]
    assert bool([note for note in notes if "constant" in note]) == spec.standardize
