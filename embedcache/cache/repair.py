"""Damaged files set aside, so that the next extraction computes what they held and nothing else."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from embedcache.cache import manifest as manifests
from embedcache.cache.damage import dataset_damage
from embedcache.cache.files import StoredShard
from embedcache.errors import CacheError
from embedcache.journal import commit, exists, explained, lock, make_folder, sync_directory


@dataclass(frozen=True)
class Repair:
    """What was done: ``problems`` one line each, ``aside`` where the files are now, and how many rows are left.

    ``aside`` is None where nothing was damaged, and nothing has changed.
    """

    problems: tuple[str, ...]
    aside: Path | None
    rows: int
    lost: int


def repair(path: Path | str) -> Repair:
    """Take every damaged shard out of a cache, and the dataset, which points into all of them.

    The files, and the manifest that named them, are moved into a folder beside the cache. The same ``extract`` command
    then computes the rows that are missing, and only those, and makes the dataset again; so does ``relabel``, where no
    shard was damaged.

    Raises:
        CacheNotFoundError: there is no cache.
        CorruptCacheError: the manifest is damaged, which nothing can replace.
        CacheError: another process is writing to it, or it cannot be written.
    """
    directory = Path(path)
    manifests.read(directory)
    with lock(directory):
        manifest = manifests.read(directory)
        if manifest.newer is not None:
            raise CacheError(f"{path} was written in format {manifest.newer}: upgrade embedcache to repair it")
        damage = [(shard.entry, shard.damage()) for shard in StoredShard.all_of(directory, manifest)]
        damaged = [shard for shard, problem in damage if problem is not None]
        every = [*(problem for _, problem in damage), dataset_damage(directory, manifest)]
        problems = tuple(problem for problem in every if problem is not None)
        if not problems:
            return Repair((), None, manifest.rows, 0)
        aside = _new_folder(directory)
        with explained(f"cannot write {aside}"):
            commit(aside / manifests.NAME, (directory / manifests.NAME).read_bytes())
        kept = tuple(shard for shard in manifest.shards if shard not in damaged)
        # First the manifest that no longer names them: from then on they are left-over files, and nothing reads them.
        changed = replace(manifest, shards=kept, examples=None, complete=False)
        changed.write(directory)
        moved = [("features", shard.file.name) for shard in damaged]
        moved += [] if manifest.examples is None else [("examples", manifest.examples.file.name)]
        for folder, name in moved:
            if exists(directory / folder / name):
                make_folder(aside / folder)
                with explained(f"cannot move {directory / folder / name}"):
                    os.replace(directory / folder / name, aside / folder / name)
                    sync_directory(aside / folder)
        return Repair(problems, aside, changed.rows, manifest.rows - changed.rows)


def _new_folder(directory: Path) -> Path:
    """Make a folder beside a cache."""
    for number in range(1, 10_000):
        aside = directory.resolve().with_name(f"{directory.resolve().name}.damaged{'' if number == 1 else number}")
        if not exists(aside):
            make_folder(aside)
            return aside
    raise CacheError(f"cannot make a folder beside {directory}: too many are there")
