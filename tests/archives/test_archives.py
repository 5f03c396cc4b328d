"""Caches frozen at each released version of the format are read as they were when they were written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import build
import numpy as np
import pytest
import small_caches

from embedcache.cache import CacheWriter, FeatureCache, relabel
from embedcache.shard import FeatureSet

HERE = Path(__file__).parent
ARCHIVES = sorted(path for path in HERE.glob("v*/*") if path.is_dir())
VERSION_1 = [path for path in ARCHIVES if path.parent.name == "v1"]


def test_they_are_there() -> None:
    assert {
        path.name: tuple(sorted(each.name for each in path.iterdir() if each.is_dir())) for path in HERE.glob("v*")
    } == (build.VERSIONS)
    assert sum(file.stat().st_size for file in (HERE / "v1").rglob("*") if file.is_file()) < 100_000


@pytest.mark.parametrize("path", ARCHIVES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_is_read_is_what_was_written(path: Path) -> None:
    cache = FeatureCache.open(path)
    expected = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    found = json.loads(json.dumps(build.read(cache)))
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name
    assert cache.verify() == []


def test_a_wrong_expectation_would_be_seen() -> None:
    path = HERE / "v1" / "classification"
    expected = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    for name, each in expected["features"].items():
        made = FeatureSet(name, each["kind"], each["dim"], each["layers"], each["dtype"])
        assert each["row 1"] == small_caches.values(made, 1).tolist()
    assert expected["features"].keys() == {each.name for each in small_caches.SETS}
    assert expected["ids"][3] == "review 3 é"
    assert expected["inputs"][0] == "Setup took three minutes and everything simply worked."
    assert expected["class_names"] == ["negative", "neutral", "positive"]


@pytest.mark.parametrize("path", ARCHIVES, ids=lambda path: path.name)
def test_the_same_bytes_are_written_today(path: Path, tmp_path: Path) -> None:
    """As long as this is the format that is written, another byte is another format."""
    build.write(tmp_path / path.name, build.inputs()[path.name], *build.LAYOUTS[path.name])
    assert small_caches.files(tmp_path / path.name) == small_caches.files(path)


def test_old_caches_are_extended_and_relabelled(tmp_path: Path) -> None:
    path = Path(shutil.copytree(HERE / "v1" / "regression", tmp_path / "c"))
    sets: Any = small_caches.SETS[2:3]
    with CacheWriter(path, build.SPEC, sets) as writer:
        writer.append(small_caches.keys([100]), small_caches.arrays(sets, [100]), {})
    cache = relabel(path, build.inputs()["regression"])
    assert cache.n_stored == 38
    assert np.array_equal(cache.features()[3], small_caches.values(sets[0], 3))
