"""What is wrong with the files of a cache."""

from __future__ import annotations

from pathlib import Path

from embedcache.cache import manifest as manifests
from embedcache.cache.files import StoredShard, dataset_arrays
from embedcache.cache.manifest import Manifest
from embedcache.errors import CacheError, CorruptCacheError
from embedcache.journal import exists, explained, is_locked
from embedcache.wording import shown

PATIENCE = 100
"""How often a writer may replace the dataset just after its name was read."""


def verify(path: Path | str) -> list[str]:
    """Hash every file of a cache again and return what is wrong, one line each, left-over files included.

    While another process writes to the cache, its temporary files are not left-overs, and a dataset that it replaced
    meanwhile is looked at in its new form.

    Raises ``CacheNotFoundError`` when there is no cache.
    """
    directory = Path(path)
    known: dict[str, str | None] = {}  # shards never change, and are looked at once
    for _ in range(PATIENCE):
        try:
            manifest = manifests.read(directory)
        except CorruptCacheError as error:
            return [str(error)]
        damaged_dataset = dataset_damage(directory, manifest)  # first, as a writer may remove it
        for shard in StoredShard.all_of(directory, manifest):
            if shard.path.name not in known:
                known[shard.path.name] = shard.damage()
        every = [*(known[shard.file.name] for shard in manifest.shards), damaged_dataset]
        problems = [problem for problem in every if problem is not None]
        if not problems or manifests.read(directory).examples == manifest.examples:
            break
    with explained(f"cannot read {directory}"):
        return problems + [
            shown(f"{file} is left over: the manifest does not name it, so it is never read")
            for file in _left_over(directory)
        ]


def dataset_damage(directory: Path, manifest: Manifest) -> str | None:
    """Hash the current dataset again and look into it; return what is wrong, None for nothing."""
    dataset = manifest.examples
    if dataset is not None:
        try:
            dataset_arrays(directory / "examples" / dataset.file.name, dataset, manifest.rows, again=True)
        except CacheError as error:
            return str(error)
    return None


def _left_over(directory: Path) -> list[Path]:
    """Return what no manifest names, unless a writer is at work, which may have made it."""
    if is_locked(directory):
        return []
    named = {Path(folder, file.name) for folder, file in manifests.read(directory).files()} | {Path(manifests.NAME)}
    left = []
    for file in sorted(directory.rglob("*")):
        inside = file.relative_to(directory)
        is_folder = str(inside) in manifests.FOLDERS and file.is_dir()
        if not is_folder and inside not in named:
            left.append(file)
    # What a writer made since, or has removed again, is not left over.
    return [] if is_locked(directory) else [file for file in left if exists(file)]
