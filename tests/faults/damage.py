"""What disks, people and half-finished copies do to a cache. Each function spoils the cache it is given."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import forge


def flip(file: Path, at: int, bit: int = 0) -> None:
    """Flip one bit of a file, in place."""
    with open(file, "r+b") as stream:
        stream.seek(at)
        (byte,) = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte ^ 1 << bit]))


def _shards(cache: Path) -> list[Path]:
    return sorted((cache / "features").iterdir())


def flipped_bit_in_a_feature(cache: Path) -> None:
    file = _shards(cache)[1]
    flip(file, file.stat().st_size - 1, 6)


def flipped_bit_in_the_metadata(cache: Path) -> None:
    flip(_shards(cache)[1], 40)


def flipped_bit_in_the_dataset(cache: Path) -> None:
    file = forge.dataset_file(cache)
    flip(file, file.stat().st_size - 1)


def flipped_bit_in_the_manifest(cache: Path) -> None:
    data = (cache / "manifest.json").read_bytes()
    flip(cache / "manifest.json", data.index(b'"rows": ') + 8)


def flipped_bit_that_keeps_all_times(cache: Path) -> None:
    file = _shards(cache)[0]
    status = file.stat()
    flip(file, file.stat().st_size - 3)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def truncated_shard(cache: Path) -> None:
    file = _shards(cache)[1]
    os.truncate(file, file.stat().st_size - 1)


def emptied_shard(cache: Path) -> None:
    os.truncate(_shards(cache)[1], 0)


def zeroed_shard(cache: Path) -> None:
    file = _shards(cache)[1]
    file.write_bytes(bytes(file.stat().st_size))


def longer_shard(cache: Path) -> None:
    with open(_shards(cache)[1], "ab") as stream:
        stream.write(b"\0")


def swapped_shards(cache: Path) -> None:
    one, two = _shards(cache)[:2]
    one.rename(cache / "aside")
    two.rename(one)
    (cache / "aside").rename(two)


def removed_shard(cache: Path) -> None:
    _shards(cache)[1].unlink()


def removed_dataset(cache: Path) -> None:
    forge.dataset_file(cache).unlink()


def removed_features(cache: Path) -> None:
    shutil.rmtree(cache / "features")


def removed_examples(cache: Path) -> None:
    shutil.rmtree(cache / "examples")


def directory_in_place_of_a_shard(cache: Path) -> None:
    file = _shards(cache)[1]
    file.unlink()
    file.mkdir()


def pipe_in_place_of_a_shard(cache: Path) -> None:
    file = _shards(cache)[1]
    file.unlink()
    os.mkfifo(file)


def linked_shard(cache: Path) -> None:
    file = _shards(cache)[1]
    elsewhere = cache.parent / f"{cache.name} elsewhere.h5"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def linked_dataset(cache: Path) -> None:
    file = forge.dataset_file(cache)
    elsewhere = cache.parent / f"{cache.name} elsewhere.h5"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def linked_features(cache: Path) -> None:
    elsewhere = cache.parent / f"{cache.name} features"
    (cache / "features").rename(elsewhere)
    (cache / "features").symlink_to(elsewhere)


def linked_manifest(cache: Path) -> None:
    elsewhere = cache.parent / f"{cache.name} manifest"
    (cache / "manifest.json").rename(elsewhere)
    (cache / "manifest.json").symlink_to(elsewhere)


def pipe_in_place_of_the_manifest(cache: Path) -> None:
    (cache / "manifest.json").unlink()
    os.mkfifo(cache / "manifest.json")


def directory_in_place_of_the_manifest(cache: Path) -> None:
    (cache / "manifest.json").unlink()
    (cache / "manifest.json").mkdir()


def empty_manifest(cache: Path) -> None:
    (cache / "manifest.json").write_bytes(b"")


def half_a_manifest(cache: Path) -> None:
    data = (cache / "manifest.json").read_bytes()
    (cache / "manifest.json").write_bytes(data[: len(data) // 2])


def manifest_of_another_cache(cache: Path) -> None:
    from small_caches import write

    other = write(cache.parent / f"{cache.name} other", 11, 4)
    shutil.copy(other / "manifest.json", cache)


def manifest_from_before_a_new_dataset(cache: Path) -> None:
    from small_caches import write

    stale = (cache / "manifest.json").read_bytes()
    write(cache, class_names=("x", "y", "z"))
    (cache / "manifest.json").write_bytes(stale)


def shard_of_another_cache(cache: Path) -> None:
    from small_caches import SPEC, write

    other = write(cache.parent / f"{cache.name} other", rows=23, per_shard=11, spec={**SPEC, "prompt": "x"})
    shutil.copy(_shards(other)[0], _shards(cache)[0])


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.file}'",)


def exploded(cache: Path) -> Path:
    """The file that an unpickled bomb leaves."""
    return cache.parent / "exploded"


def pickle_in_place_of_a_shard(cache: Path) -> None:
    _shards(cache)[0].write_bytes(pickle.dumps(Bomb(exploded(cache))))


def signed_pickle_in_place_of_a_shard(cache: Path) -> None:
    forge.put(cache, "features", pickle.dumps(Bomb(exploded(cache))) + bytes(1000))


def signed_pickle_in_place_of_the_dataset(cache: Path) -> None:
    forge.put(cache, "examples", pickle.dumps(Bomb(exploded(cache))) + bytes(1000))


def pickle_in_place_of_the_manifest(cache: Path) -> None:
    (cache / "manifest.json").write_bytes(pickle.dumps(Bomb(exploded(cache))))


# What is said, beside the path, where one reason could hide another.
SAID = {
    "flipped_bit_in_a_feature": "its sha256 differs",
    "flipped_bit_in_the_metadata": "its sha256 differs",
    "flipped_bit_in_the_dataset": "its sha256 differs",
    "flipped_bit_in_the_manifest": "its own hash differs",
    "flipped_bit_that_keeps_all_times": "its sha256 differs",
    "truncated_shard": "were committed: restore it",
    "zeroed_shard": "its sha256 differs",
    "longer_shard": "were committed: restore it",
    "removed_shard": "is missing",
    "removed_dataset": "is missing",
    "directory_in_place_of_a_shard": "not a plain file",
    "pipe_in_place_of_a_shard": "not a plain file",
    "linked_shard": "not a plain file",
    "linked_dataset": "not a plain file",
    "linked_features": "is a link: a cache must not depend on what lies elsewhere",
    "linked_manifest": "is a link: a cache must not depend on what lies elsewhere",
    "pipe_in_place_of_the_manifest": "is not a plain file",
    "directory_in_place_of_the_manifest": "is not a plain file",
    "signed_pickle_in_place_of_a_shard": "HDF5 cannot read it",
    "signed_pickle_in_place_of_the_dataset": "HDF5 cannot read it",
}
HELPERS = ("flip", "exploded", "Callable")
ATTACKS: dict[str, Callable[[Path], None]] = {
    name: function
    for name, function in list(globals().items())
    if callable(function) and name[0].islower() and name not in HELPERS
}

if __name__ == "__main__":
    forge.main(ATTACKS)
