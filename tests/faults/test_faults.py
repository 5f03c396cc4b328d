"""Every attack and every damage is refused in one clear line before anything of it is used."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import damage
import forge
import h5py
import hdf5
import manifests
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_caches import SETS, values, write

from embedcache.cache import FeatureCache, files, manifest
from embedcache.cache import reader as reading
from embedcache.errors import CacheError, CorruptCacheError
from embedcache.shard import Placed

Spoil = Callable[[Path], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sound") / "c")


@pytest.fixture
def cache(tmp_path: Path, sound: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "c"))


def same(cache: FeatureCache) -> bool:
    """Whether a cache gives what the sound one gives."""
    rows = [each for each in SETS if each.kind == "tokens"]
    return all(
        np.array_equal(cache.features(None, each.name), np.stack([values(each, row) for row in range(23)]))
        for each in SETS
        if each.kind != "tokens"
    ) and all(
        np.array_equal(cache.ragged(None, each.name)[row], values(each, row)) for each in rows for row in range(23)
    )


def refused(cache: Path, said: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Opening must fail in one line, before a feature is mapped; so must verify; writing repairs, or refuses too."""
    mapped: list[Path] = []
    place = Placed.map
    with monkeypatch.context() as patch:
        patch.setattr(Placed, "map", lambda self, path, *file: mapped.append(path) or place(self, path, *file))
        with pytest.raises(CacheError, match=said) as caught:
            FeatureCache.open(cache)
    assert not [path for path in mapped if path.parent.name == "features"]
    assert "\n" not in str(caught.value)
    assert str(cache) in str(caught.value)
    with contextlib.suppress(CacheError):
        assert reading.verify(cache)
    try:
        write(cache)
    except CacheError as error:
        assert "\n" not in str(error)  # noqa: PT017 - it may also succeed
    else:
        assert same(FeatureCache.open(cache)), "what was repaired is whole again"
    assert not damage.exploded(cache).exists()
    return str(caught.value)


def test_the_sound_cache_is_sound(cache: Path) -> None:
    assert same(FeatureCache.open(cache))
    assert reading.verify(cache) == []


@pytest.mark.parametrize("attack", damage.ATTACKS)
def test_damage(cache: Path, attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    damage.ATTACKS[attack](cache)
    refused(cache, damage.SAID.get(attack, "."), monkeypatch)


@pytest.mark.parametrize("attack", manifests.ATTACKS)
def test_hostile_manifests(cache: Path, attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests.ATTACKS[attack](cache)
    said = refused(cache, manifests.SAID.get(attack, "."), monkeypatch)
    signed = "edit" in manifests.ATTACKS[attack].__qualname__
    assert not (signed and "its own hash differs" in said), "refused for another reason than the attack"


@pytest.mark.parametrize("attack", hdf5.ATTACKS)
def test_hostile_shards(cache: Path, attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said, spoil = hdf5.ATTACKS[attack]
    spoil(cache)
    refused(cache, said, monkeypatch)


@pytest.mark.parametrize("attack", hdf5.DATASETS)
def test_hostile_datasets(cache: Path, attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said, spoil = hdf5.DATASETS[attack]
    spoil(cache)
    refused(cache, said, monkeypatch)


@pytest.mark.parametrize("attack", hdf5.OFFSETS)
def test_hostile_offsets_are_refused_when_the_set_is_read(cache: Path, attack: str) -> None:
    hdf5.OFFSETS[attack](cache)
    opened = FeatureCache.open(cache)
    with pytest.raises(CorruptCacheError, match=r"tokens\.offsets do not rise from 0 to 12"):
        opened.ragged(None, "tokens")
    with pytest.raises(CorruptCacheError, match=r"tokens\.offsets do not rise"):
        opened.shard(0, np.arange(3))
    assert np.array_equal(opened.ragged("test", "tokens")[0], values(SETS[5], 16)), "other shards are as good as ever"


def test_an_id_that_is_no_text(tmp_path: Path) -> None:
    ids = (np.array([255], np.uint8), np.array([0, 1]))
    with pytest.raises(CorruptCacheError, match="an id is not UTF-8"):
        FeatureCache.open(write(tmp_path / "c", 1, 1, SETS[:1], ids=ids)).ids()


# The forgers are good: what they leave unchanged is accepted, so what is refused is refused for the attack.


@pytest.mark.parametrize("options", [{}, {"libver": "latest"}, {"userblock_size": 1024}])
def test_honest_files_written_by_others_are_read(cache: Path, options: dict[str, object]) -> None:
    for at in range(4):
        file = cache / "features" / forge.body(cache)["shards"][at]["name"]
        forge.put(cache, "features", hdf5.forged(forge.stored(file), **options), at)
    forge.put(cache, "examples", hdf5.forged(forge.stored(forge.dataset_file(cache)), **options))
    assert same(FeatureCache.open(cache))


def test_a_manifest_that_is_signed_again_is_read(cache: Path) -> None:
    before = (cache / "manifest.json").read_bytes()
    forge.sign(cache, forge.body(cache))
    assert (cache / "manifest.json").read_bytes() == before
    forge.edit(lambda body: body["examples"].update(class_names=["x", "y", "z"]))(cache)
    assert FeatureCache.open(cache).class_names == ("x", "y", "z")


def test_fields_of_a_newer_minor_version_are_no_attack(cache: Path) -> None:
    forge.edit(lambda body: body.update(version="1.7", colour="blue"))(cache)
    assert same(FeatureCache.open(cache))


def test_h5py_would_have_read_the_secret(cache: Path) -> None:
    for attack in ("external_link", "external_storage", "virtual_dataset"):
        hdf5.ATTACKS[attack][1](cache)
        with h5py.File(forge.first_shard(cache), "r") as file:
            read = file[hdf5.NAME][()].tobytes()
        assert read in hdf5.secret(cache).read_bytes() or (np.frombuffer(read, np.float32) == 42).all()


# Left-over files are no damage, and are said.


def test_a_left_over_file_is_reported_and_never_read(cache: Path) -> None:
    left = cache / "features" / "000099-0123456789abcdef.h5"
    left.write_bytes(b"anything")
    assert same(FeatureCache.open(cache))
    assert reading.verify(cache) == [f"{left} is left over: the manifest does not name it, so it is never read"]


def test_a_complete_old_state_is_a_state(cache: Path) -> None:
    """A manifest from before an extension is the truth of that time, and every file that it names is there."""
    stale = (cache / "manifest.json").read_bytes()
    examples = forge.dataset_file(cache)
    kept = examples.read_bytes()
    write(cache, 30)
    (cache / "manifest.json").write_bytes(stale)
    with pytest.raises(CorruptCacheError, match="is missing"):
        FeatureCache.open(cache)
    examples.write_bytes(kept)
    assert same(FeatureCache.open(cache))
    assert len(reading.verify(cache)) == 2, "the newer shard and dataset are left over"


# One bit, anywhere.


def test_a_flipped_bit_anywhere_in_any_file_is_noticed(cache: Path) -> None:
    """Every byte; the check is the one that opening a cache makes."""
    rng = random.Random(0)
    entries = manifest.read(cache).files()
    assert len(entries) == 5
    for folder, file in entries:
        path = cache / folder / file.name
        files.check(path, file)
        data = bytearray(path.read_bytes())
        with open(path, "r+b", buffering=0) as stream:
            for at in range(len(data)):
                os.pwrite(stream.fileno(), bytes([data[at] ^ 1 << rng.randrange(8)]), at)
                with pytest.raises(CorruptCacheError, match="is not what was committed"):
                    files.check(path, file)
                os.pwrite(stream.fileno(), data[at : at + 1], at)
        files.check(path, file)


def test_a_flipped_bit_anywhere_in_the_manifest_is_noticed(sound: Path) -> None:
    data = (sound / "manifest.json").read_bytes()
    manifest.parse(data)
    for at in range(len(data)):
        for bit in (0, 5, 7) if at % 8 else range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            with pytest.raises((ValueError, TypeError, KeyError, AttributeError, RecursionError)):
                manifest.parse(bytes(changed))


@given(st.data())
def test_a_flipped_bit_is_refused_on_opening(
    tmp_path_factory: pytest.TempPathFactory, sound: Path, data: st.DataObject
) -> None:
    copy = Path(shutil.copytree(sound, tmp_path_factory.mktemp("flip") / "c"))
    FeatureCache.open(copy)
    file = data.draw(st.sampled_from(sorted(path for path in copy.rglob("*") if path.is_file())))
    damage.flip(file, data.draw(st.integers(0, file.stat().st_size - 1)), data.draw(st.integers(0, 7)))
    with pytest.raises(CacheError):
        FeatureCache.open(copy)
    assert reading.verify(copy)


@given(st.data())
def test_a_truncated_file_is_refused_on_opening(
    tmp_path_factory: pytest.TempPathFactory, sound: Path, data: st.DataObject
) -> None:
    copy = Path(shutil.copytree(sound, tmp_path_factory.mktemp("cut") / "c"))
    file = data.draw(st.sampled_from(sorted(path for path in copy.rglob("*") if path.is_file())))
    os.truncate(file, data.draw(st.integers(0, file.stat().st_size - 1)))
    with pytest.raises(CacheError):
        FeatureCache.open(copy)


# The programs.


@pytest.mark.parametrize("program", ["damage.py", "manifests.py", "hdf5.py"])
def test_the_attacks_are_programs(tmp_path: Path, program: str) -> None:
    script = Path(__file__).parent / program
    listed = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout.split()
    assert len(listed) > 20
    subprocess.run([sys.executable, script, listed[0], tmp_path / "spoilt"], check=True)
    with pytest.raises(CacheError):
        FeatureCache.open(tmp_path / "spoilt")


def test_a_writer_never_opens_a_published_file_for_writing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = os.open

    def spy(path: object, flags: int, *args: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            opened.append(os.path.basename(str(path)))
        return real(path, flags, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", spy)
    write(cache, 30)
    assert opened
    assert all(name.startswith(".") and name.endswith(".tmp") for name in opened)


def test_the_bomb_is_one(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(damage.Bomb(damage.exploded(tmp_path / "c"))))
    assert damage.exploded(tmp_path / "c").exists()


@pytest.mark.parametrize(
    "attack", ["set_dim_other", "set_dtype_other", "set_name_up", "set_more", "set_fewer", "rows_one_less"]
)
def test_what_was_found_for_one_manifest_is_not_believed_for_another(cache: Path, attack: str) -> None:
    """The shards are the very files that this process has hashed and looked into before."""
    FeatureCache.open(cache)
    manifests.ATTACKS[attack](cache)
    with pytest.raises(CorruptCacheError):
        FeatureCache.open(cache)
