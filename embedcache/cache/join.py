"""New labels for old features, and parts joined into one cache; neither runs a backbone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arguments import checks_arguments
from embedcache.cache import manifest as manifests
from embedcache.cache.index import Keys, RowIndex, Rows
from embedcache.cache.manifest import Manifest
from embedcache.cache.reader import FeatureCache
from embedcache.cache.writer import CacheWriter, Labelled, packed
from embedcache.errors import CacheError, IncompleteCacheError, InputError, warn
from embedcache.journal import explained

_INTEGER = re.compile(r"-?[1-9]\d{0,17}|0")


@checks_arguments()
def relabel(path: Path | str, examples: Labelled, *, keep_inputs: bool | None = None) -> FeatureCache:
    """Give a cache another dataset of rows it already holds: labels, splits, ids, order. No forward pass.

    ``keep_inputs`` stores the contents too; None keeps them where the cache does already.

    Rows, splits or labels that the cache had and ``examples`` has not are an ``EmbedcacheWarning`` each, and in the
    ``notes`` of what is returned.

    Raises ``InputError`` saying how many rows are not in the cache; nothing is then changed.
    """
    manifest = manifests.read(Path(path))
    if keep_inputs is None:
        keep_inputs = manifest.examples is not None and manifest.examples.has_inputs
    with CacheWriter(path, manifest.spec, manifest.feature_sets) as writer:
        notes = writer.dropped(examples)
        writer.finish(examples, keep_inputs=keep_inputs)
    warn(notes)
    opened = FeatureCache.open(path)
    opened.notes = (*getattr(examples, "notes", ()), *notes)
    return opened


@checks_arguments()
def merge(parts: Sequence[Path | str], output_dir: Path | str, *, accept_numerics: bool = False) -> FeatureCache:
    """Join caches of the same spec, one shard in memory at a time.

    Parts made with ``--part`` give back the dataset in its original order; other caches are put one after the other.
    A row that several parts hold is kept once. An interrupted merge goes on where it stopped. ``accept_numerics``
    joins parts whose machines computed other last bits, and records that.

    Raises:
        SpecMismatchError: parts made another way.
        NumericsMismatchError: parts whose machines computed other bits, by their probes.
        InputError: parts that do not fit together, or do not make a whole.
        IncompleteCacheError: a part whose extraction is not finished.
    """
    if not parts:
        raise InputError("there is nothing to merge: name at least one cache")
    with explained(f"cannot read {output_dir}"):
        if Path(output_dir).exists() and any(Path(output_dir).resolve() == Path(part).resolve() for part in parts):
            raise CacheError(f"{output_dir} is one of the parts: choose another output directory")
    found = [manifests.read(Path(part)) for part in parts]
    for part, manifest in zip(parts, found, strict=True):
        if not manifest.complete:
            raise IncompleteCacheError(f"{part} is not finished: run the same extract command again, then merge")
        manifest.refuse_other_spec(str(part), found[0].spec, found[0].feature_sets)
    together = Manifest(found[0].spec, found[0].feature_sets)  # refused before anything is made
    for part, manifest in zip(parts, found, strict=True):
        together = replace(together.with_kinds(str(part), manifest.kinds, accept_numerics), shards=found[0].shards)
    caches = [FeatureCache.open(part) for part in parts]
    columns = _joined(caches)
    with CacheWriter(output_dir, found[0].spec, found[0].feature_sets) as writer:
        writer.admit_kinds(together.kinds, accept=accept_numerics)
        for each in _missing(found, [cache.stored_keys() for cache in caches], writer):
            keys, arrays = caches[each.part].shard(each.shard, each.rows)
            writer.append(keys, arrays, found[each.part].shards[each.shard].provenance)
        writer.commit_dataset(**columns)
    return FeatureCache.open(output_dir)


@dataclass(frozen=True)
class _Wanted:
    """Rows of one shard of one part, int64 increasing, that the merged cache lacks."""

    part: int
    shard: int
    rows: Rows


def _missing(found: Sequence[Manifest], keys: Sequence[Keys], writer: CacheWriter) -> Iterator[_Wanted]:
    """Yield what is to be copied, in the order of the parts; of several rows with one key, the first."""
    every = np.concatenate(keys)
    wanted = (RowIndex(every).lookup(every) == np.arange(len(every))) & (writer.lookup(every) < 0)
    start = 0
    for part, manifest in enumerate(found):
        for shard, entry in enumerate(manifest.shards):
            rows = np.flatnonzero(wanted[start : start + entry.rows])
            start += entry.rows
            if len(rows):
                yield _Wanted(part, shard, rows)


def _joined(caches: Sequence[FeatureCache]) -> dict[str, Any]:
    """Return the columns of the joined dataset. Raises ``InputError`` where the parts do not fit together."""
    datasets = [cache.dataset for cache in caches]
    tasks = {each.task for each in datasets}
    if len(tasks) > 1:
        raise InputError(
            f"the parts have different tasks ({', '.join(sorted(map(str, tasks)))}): relabel them alike first"
        )
    task = tasks.pop()
    wholes = {(each.whole_rows, each.whole_hash) for each in datasets}
    if len(wholes) > 1:
        raise InputError(
            "these caches are parts of different datasets, or some are no parts: "
            "merge the parts of one dataset, or none"
        )
    whole, _ = wholes.pop()
    exact = whole is not None or task in ("multilabel", "regression")
    if exact and len({(each.class_names, each.split_names) for each in datasets}) > 1:
        named = " / ".join(", ".join((*each.class_names, *each.split_names)) for each in datasets)
        raise InputError(f"the parts have different classes or splits ({named}): relabel them alike first")
    names, splits = (_union([getattr(each, field) for each in datasets]) for field in ("class_names", "split_names"))
    targets = None
    if task is not None:
        targets = np.concatenate([_renamed(cache.targets(), cache.class_names, names, task) for cache in caches])
    split = np.concatenate([_codes(cache.split_codes(), cache.split_names, splits) for cache in caches])
    keys = np.concatenate([cache.keys() for cache in caches])
    order = np.arange(len(keys))
    if whole is not None:
        numbers = np.concatenate([cache.numbers() for cache in caches])
        order = np.argsort(numbers, kind="stable")
        if len(numbers) != whole or not np.array_equal(numbers[order], np.arange(whole)):
            raise InputError(
                f"these parts have {len(np.unique(numbers)):,} of the {whole:,} rows of their dataset: "
                "a part is missing or given twice"
            )
    ids = inputs = None
    if any(each.has_ids for each in datasets):
        names_of_rows = [each for cache in caches for each in cache.ids()]
        ids = packed(names_of_rows[at].encode("utf-8") for at in order.tolist())
    if all(each.has_inputs for each in datasets):
        contents = [each for cache in caches for each in (cache.inputs() or ())]
        inputs = packed(contents[at] for at in order.tolist())
    return {
        "keys": keys[order],
        "targets": None if targets is None else targets[order],
        "task": task,
        "class_names": names,
        "split": split[order],
        "split_names": splits,
        "ids": ids,
        "inputs": inputs,
    }


def _union(names: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return all names in their common order, or where parts differ in which they have, as a fresh pass sorts them."""
    if all(tuple(each) == tuple(names[0]) for each in names):
        return tuple(names[0])
    every = {name for each in names for name in each}
    if every <= {"train", "validation", "test"}:
        return tuple(name for name in ("train", "validation", "test") if name in every)
    if all(_INTEGER.fullmatch(name) for name in every):
        return tuple(sorted(every, key=int))
    return tuple(sorted(every))


def _codes(codes: Any, own: Sequence[str], names: Sequence[str]) -> Any:
    table = np.array([names.index(name) for name in own], np.int64)
    return table[codes] if len(own) else codes


def _renamed(targets: Any, own: Sequence[str], names: Sequence[str], task: str) -> Any:
    if task != "classification":
        return targets
    return np.where(targets < 0, -1, _codes(np.maximum(targets, 0), own, names))
