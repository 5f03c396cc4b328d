"""Damaged files are set aside and computed again, and only they are; a stranger's cache meets a child process first."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import damage
import forge
import hdf5
import numpy as np
import pytest
import small_caches
from fakes import CountingBackbone

from embedcache.cache import CacheWriter, FeatureCache, untrusted, verify
from embedcache.cache.files import repair
from embedcache.cli import run as cli
from embedcache.errors import CacheLockedError, CacheNotFoundError, CorruptCacheError, IncompleteCacheError
from embedcache.examples import load_examples
from embedcache.extract import run as extract

ROWS = [{"text": f"text number {row} " + "x" * (row % 17), "label": "ab"[row % 2]} for row in range(29)]
OTHERS = ("manifest", "linked_features", "shard_of_another", "swapped", "removed_features", "removed_examples")
OF_FILES = [name for name in damage.ATTACKS if not any(word in name for word in OTHERS)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("repair") / "c"
    extract(load_examples(ROWS), CountingBackbone(tokens=True), path, rows_per_shard=11)
    return path


@pytest.fixture
def cache(tmp_path: Path, sound: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "c"))


@pytest.mark.parametrize("attack", [*OF_FILES, "swapped_shards", "offsets"])
def test_what_was_damaged_is_computed_again_and_nothing_else(cache: Path, sound: Path, attack: str) -> None:
    if attack == "offsets":
        arrays = forge.stored(forge.first_shard(cache))
        arrays["tokens.offsets"][3] = 2**40
        forge.put(cache, "features", hdf5.forged(arrays))
    else:
        damage.ATTACKS[attack](cache)
    broken = small_caches.files(cache)
    done = repair(cache)
    assert done.problems
    assert done.rows + done.lost == 29
    aside = small_caches.files(done.aside)
    assert broken["manifest.json"] == aside["manifest.json"], "nothing is thrown away"
    assert aside.items() - {("manifest.json", aside["manifest.json"])} <= broken.items()
    assert verify(cache) == []
    with pytest.raises(IncompleteCacheError, match="run the same extract command again"):
        FeatureCache.open(cache)
    backbone = CountingBackbone(tokens=True)
    extract(load_examples(ROWS), backbone, cache, rows_per_shard=11)
    assert len(set(backbone.rows_seen)) == done.lost
    assert done.lost in (0, 11, 22, 29 - 22), "whole shards"
    whole, repaired = FeatureCache.open(sound), FeatureCache.open(cache)
    assert np.array_equal(repaired.features(), whole.features())
    assert np.array_equal(repaired.ragged().values, whole.ragged().values)
    assert repaired.ids() == whole.ids()
    assert np.array_equal(repaired.targets(), whole.targets())
    assert verify(cache) == []
    assert repair(cache).aside is None


def test_repair_killed_at_any_step_can_be_run_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage.ATTACKS["truncated_shard"](cache)
    replace = os.replace

    def die(*names: object) -> None:
        raise KeyboardInterrupt

    for survive in range(5):
        left = [survive]

        def count(source: object, target: object, left: list[int] = left) -> None:
            left[0] -= 1
            die() if left[0] < 0 else replace(source, target)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "replace", count)
        try:
            repair(cache)
            break
        except KeyboardInterrupt:
            monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "replace", replace)
    extract(load_examples(ROWS), CountingBackbone(tokens=True), cache, rows_per_shard=11)
    assert len(FeatureCache.open(cache)) == 29


def test_what_cannot_be_repaired(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(CacheNotFoundError):
        repair(tmp_path / "nowhere")
    manifest = FeatureCache.open(cache)._manifest
    with CacheWriter(cache, manifest.spec, manifest.feature_sets), pytest.raises(CacheLockedError):
        repair(cache)
    damage.ATTACKS["half_a_manifest"](cache)
    with pytest.raises(CorruptCacheError):
        repair(cache)


def test_repair_on_the_command_line(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["verify", str(cache), "--repair"]) == 0
    assert "is sound" in capsys.readouterr().out
    damage.ATTACKS["flipped_bit_in_a_feature"](cache)
    assert cli(["verify", str(cache), "--repair"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "its sha256 differs" in said[0]
    assert said[1].endswith("(rows: 11)")


# A stranger's cache.


@pytest.mark.parametrize(
    ("attack", "said"),
    [(None, []), ("flipped_bit_in_a_feature", ["its sha256 differs"]), ("half_a_manifest", ["is damaged"])],
)
def test_a_child_says_what_verify_says(cache: Path, attack: str | None, said: list[str]) -> None:
    if attack is not None:
        damage.ATTACKS[attack](cache)
    found = untrusted.examine(cache)
    assert found == verify(cache)
    assert len(found) == len(said)
    assert all(word in problem for word, problem in zip(said, found, strict=True))


@pytest.mark.parametrize(
    ("deed", "why"),
    [
        ("import os; os.kill(os.getpid(), 11)", f"signal {int(signal.SIGSEGV)}"),
        ("while True: pass", r"signal \d+"),
        ("held = bytearray(3 << 30)", "status 1"),
        ("open('written', 'w').write('x' * 10); import os; os._exit(7)", r"(signal|status) \d+"),
        ("print('no answer')", "status 0"),
    ],
)
def test_a_child_that_dies_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch, deed: str, why: str) -> None:
    """What libhdf5 might be made to do, done by the child in place of its work."""
    monkeypatch.setattr(untrusted, "SECONDS", 1)
    monkeypatch.chdir(cache.parent)
    limited = "import sys, json; sys.path[:] = json.loads(sys.argv[3])\nfrom embedcache.cache import untrusted\n"
    monkeypatch.setattr(untrusted, "_CODE", f"{limited}untrusted._limit(1)\n{deed}\n")
    with pytest.raises(CorruptCacheError, match=rf"died \(({why}); it had 2 GB") as caught:
        untrusted.examine(cache)
    assert "\n" not in str(caught.value)
    assert not (cache.parent / "written").exists() or not (cache.parent / "written").read_bytes()


def test_the_working_directory_has_no_say(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json.py", "numpy.py", "sitecustomize.py"):
        (cache.parent / name).write_text("raise SystemExit(3)")
    monkeypatch.chdir(cache.parent)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert untrusted.examine(cache) == []


@pytest.mark.parametrize(
    "command", ["info C", "verify C", "train C -o r", "evaluate r C", "sweep C -o s", "merge C -o m", "check C x.csv"]
)
def test_every_command_that_reads_a_cache_can_be_careful(
    cache: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(untrusted, "examine", lambda path: asked.append(path) or ["it is damaged"])
    assert cli([str(cache) if word == "C" else word for word in [*command.split(), "--untrusted"]]) == 1
    said = capsys.readouterr()
    assert "it is damaged" in said.out + said.err
    assert asked == [str(cache)]


def test_untrusted_and_sound(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["info", str(cache), "--untrusted", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 29
