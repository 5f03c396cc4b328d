"""New labels for old features, and parts joined into one cache; neither runs a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedcache.cache import manifest as manifests
from embedcache.cache.files import checked, shard_arrays
from embedcache.cache.reader import FeatureCache
from embedcache.cache.writer import CacheWriter
from embedcache.errors import CacheError, InputError

if TYPE_CHECKING:
    from embedcache.examples import Examples


def relabel(path: Path | str, examples: Examples, *, keep_inputs: bool = False) -> FeatureCache:
    """Give a cache another dataset of rows it already holds: labels, splits, ids, order. No forward pass.

    Raises ``InputError`` saying how many rows are not in the cache; nothing is then changed.
    """
    manifest = manifests.read(Path(path))
    with CacheWriter(path, manifest.spec, manifest.feature_sets) as writer:
        writer.finish(examples, keep_inputs=keep_inputs)
    return FeatureCache.open(path)


def merge(parts: Sequence[Path | str], output_dir: Path | str) -> FeatureCache:
    """Join caches of the same spec, one shard at a time.

    Parts made with ``--part`` give back the dataset in its original order; other caches are put one after the other.
    A row that several parts hold is kept once.

    Raises ``SpecMismatchError`` for parts made another way, ``InputError`` for parts that do not fit together.
    """
    if not parts:
        raise InputError("there is nothing to merge: name at least one cache")
    if Path(output_dir).exists() and any(Path(output_dir).resolve() == Path(part).resolve() for part in parts):
        raise CacheError(f"{output_dir} is one of the parts: choose another output directory")
    caches = [FeatureCache.open(part) for part in parts]
    first = manifests.read(caches[0].path)
    for cache in caches[1:]:
        manifests.read(cache.path).refuse_other_spec(str(cache.path), first.spec, first.feature_sets)
    columns = _joined(caches)
    with CacheWriter(output_dir, first.spec, first.feature_sets) as writer:
        for cache in caches:
            _copy_shards(cache, writer)
        writer.commit_dataset(**columns)
    return FeatureCache.open(output_dir)


def _copy_shards(cache: FeatureCache, writer: CacheWriter) -> None:
    manifest = manifests.read(cache.path)
    for shard in manifest.shards:
        path = cache.path / "features" / shard.file.name
        placed = checked(path, shard.file, shard_arrays(manifest.feature_sets, shard.rows))
        keys = np.asarray(placed["row_key"].map(path))
        new = np.flatnonzero(writer.lookup(keys) < 0)
        if not len(new):
            continue
        arrays: dict[str, Any] = {}
        for each in manifest.feature_sets:
            if each.kind != "tokens":
                arrays[each.name] = placed[each.name].map(path)[new]
                continue
            values, offsets = (placed[f"{each.name}.{part}"].map(path) for part in ("values", "offsets"))
            lengths = np.diff(offsets)[new]
            kept = [values[offsets[row] : offsets[row + 1]] for row in new.tolist()]
            arrays[each.name] = (np.concatenate(kept), np.concatenate([[0], np.cumsum(lengths)]))
        writer.append(keys[new], arrays, shard.provenance)


def _joined(caches: Sequence[FeatureCache]) -> dict[str, Any]:
    """Return the columns of the joined dataset. Raises ``InputError`` where the parts' tasks or splits do not fit."""
    tasks = {cache.task for cache in caches}
    if len(tasks) > 1:
        raise InputError(f"the parts have different tasks ({', '.join(sorted(map(str, tasks)))}): relabel them alike first")
    task = tasks.pop()
    as_parts = {cache._dataset.part for cache in caches}
    if len(as_parts) > 1:
        raise InputError("some of these caches were made with --part and some were not: merge either kind alone")
    names = _union([cache.class_names for cache in caches])
    if task in ("multilabel", "regression") and any(cache.class_names != names for cache in caches):
        raise InputError(f"the parts have different targets ({' / '.join(', '.join(cache.class_names) for cache in caches)})")
    splits = _union([cache.split_names for cache in caches])
    targets = None
    if task is not None:
        targets = np.concatenate([_renamed(cache.targets(), cache.class_names, names, task) for cache in caches])
    split = np.concatenate([_codes(cache._split, cache.split_names, splits) for cache in caches]).astype(np.uint8)
    keys = np.concatenate([cache.keys() for cache in caches])
    ids = [each for cache in caches for each in cache.ids()] if any(cache._dataset.has_ids for cache in caches) else None
    order = np.arange(len(keys))
    if as_parts == {True}:
        numbers = np.concatenate([np.asarray(cache._columns["number"]) for cache in caches])
        order = np.argsort(numbers, kind="stable")
        if len(np.unique(numbers)) != len(numbers) or not np.array_equal(numbers[order], np.arange(len(numbers))):
            raise InputError("these parts do not make a whole: a part is missing, given twice, or of another input")
    inputs = None
    if all(cache._dataset.has_inputs for cache in caches):
        contents = [each for cache in caches for each in (cache.inputs() or ())]
        inputs = _pack([contents[at] for at in order.tolist()])
    return {
        "keys": keys[order],
        "targets": None if targets is None else targets[order],
        "task": task,
        "class_names": names,
        "split": split[order],
        "split_names": splits,
        "ids": None if ids is None else _pack([ids[at].encode("utf-8") for at in order.tolist()]),
        "inputs": inputs,
    }


def _pack(items: Sequence[bytes]) -> tuple[Any, Any]:
    ends = np.concatenate([[0], np.cumsum(np.fromiter((len(item) for item in items), np.int64, len(items)))])
    return np.frombuffer(b"".join(items), np.uint8), ends.astype(np.int64)


def _union(names: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return all names: in their common order, or where parts differ in which they have, sorted as a fresh pass sorts."""
    if all(tuple(each) == tuple(names[0]) for each in names):
        return tuple(names[0])
    every = {name for each in names for name in each}
    if every <= {"train", "validation", "test"}:
        return tuple(name for name in ("train", "validation", "test") if name in every)
    if all(name.lstrip("-").isdigit() for name in every):
        return tuple(sorted(every, key=int))
    return tuple(sorted(every))


def _codes(codes: Any, own: Sequence[str], names: Sequence[str]) -> Any:
    table = np.array([names.index(name) for name in own], np.int64)
    return table[codes] if len(own) else codes


def _renamed(targets: Any, own: Sequence[str], names: Sequence[str], task: str) -> Any:
    if task != "classification":
        return targets
    return np.where(targets < 0, -1, _codes(np.maximum(targets, 0), own, names))
