"""New labels for old features, and parts joined into one cache; neither runs a backbone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from pathlib import Path

import numpy as np

from embedcache.arguments import checks_arguments
from embedcache.cache import manifest as manifests
from embedcache.cache.fetch import local_folder
from embedcache.cache.gather import Keys, RowIndex, Rows
from embedcache.cache.manifest import Manifest
from embedcache.cache.reader import FeatureCache
from embedcache.cache.writer import CacheWriter
from embedcache.dataset import Behind, Dataset, Examples, IdColumn, Packed, key_values, renumbered
from embedcache.errors import CacheError, IncompleteCacheError, InputError, warn
from embedcache.fingerprint import KEY_BYTES
from embedcache.journal import explained
from embedcache.spec import SPLITS
from embedcache.task import CLASSIFICATION
from embedcache.wording import counted

_INTEGER = re.compile(r"-?[1-9]\d{0,17}|0")


@checks_arguments()
def relabel(path: Path | str, examples: Examples, *, keep_inputs: bool | None = None) -> FeatureCache:
    """Give a cache another dataset of rows it already holds: labels, splits, ids, order. No forward pass.

    ``keep_inputs`` stores the contents too; None keeps them where the cache does already.

    Rows, splits or labels that the cache had and ``examples`` lacks are an ``EmbedcacheWarning`` each, and in the
    ``notes`` of what is returned.

    Raises ``InputError`` saying how many rows are not in the cache; nothing is then changed.
    """
    manifest = manifests.read(Path(path))
    if keep_inputs is None:
        keep_inputs = manifest.examples is not None and manifest.examples.has_inputs
    with CacheWriter(path, manifest.spec, manifest.feature_sets) as writer:
        notes = writer.dropped(examples)
        writer.commit_dataset(examples, examples.packed_contents if keep_inputs else None)
    warn(notes)
    opened = FeatureCache.open(path)
    opened.notes = (*examples.notes, *notes)
    return opened


@checks_arguments()
def merge(parts: Sequence[Path | str], output_dir: Path | str, *, accept_numerics: bool = False) -> FeatureCache:
    """Join caches of the same spec, one shard in memory at a time.

    Parts made with ``--part`` give back the dataset in its original order; other caches are put one after the other.
    A row that several parts hold is kept once. Rows that workers did not survive stay left out: how many a note says,
    and a later ``extract`` does not try them again. An interrupted merge goes on where it stopped. ``accept_numerics``
    joins parts whose machines computed other last bits, and records that.

    Raises:
        SpecMismatchError: parts made another way.
        NumericsMismatchError: parts whose machines computed other bits, by their probes.
        InputError: parts that do not fit together, or do not make a whole.
        IncompleteCacheError: a part whose extraction is not finished.
    """
    if not parts:
        raise InputError("there is nothing to merge: name at least one cache")
    parts = [local_folder(part) for part in parts]
    with explained(f"cannot read {output_dir}"):
        if Path(output_dir).exists() and any(Path(output_dir).resolve() == Path(part).resolve() for part in parts):
            raise CacheError(f"{output_dir} is one of the parts: choose another output directory")
    part_manifests = [manifests.read(Path(part)) for part in parts]
    first = part_manifests[0]
    for part, manifest in zip(parts, part_manifests, strict=True):
        if not manifest.complete:
            raise IncompleteCacheError(f"{part} is not finished: run the same extract command again, then merge")
        manifest.refuse_other_spec(str(part), first.spec, first.feature_sets)
    together = Manifest(first.spec, first.feature_sets)  # refused before anything is made
    for part, manifest in zip(parts, part_manifests, strict=True):
        together = replace(together.with_kinds(str(part), manifest.kinds, accept_numerics), shards=first.shards)
    caches = [FeatureCache.open(part) for part in parts]
    # A content and its duplicates are of one part; caches that had another input before may both tell of it.
    set_aside = reduce(or_, (Counter(manifest.set_aside) for manifest in part_manifests))
    dataset, order, left_out = _joined([cache.dataset for cache in caches], set_aside)
    inputs = None
    if any(manifest.examples is not None and manifest.examples.has_ids for manifest in part_manifests):
        ids = [name for cache in caches for name in cache.ids()]
        given = Packed.of(ids[row].encode("utf-8") for row in order.tolist())
        dataset = replace(dataset, ids=IdColumn(len(dataset), given))
    if all(manifest.examples is not None and manifest.examples.has_inputs for manifest in part_manifests):
        inputs = Behind([kept for cache in caches if (kept := cache.inputs()) is not None], order)
    with CacheWriter(output_dir, first.spec, first.feature_sets) as writer:
        writer.admit_kinds(together.kinds, accept=accept_numerics)
        for lacking in _missing(part_manifests, [cache.stored_keys() for cache in caches], writer):
            keys, features = caches[lacking.part].shard(lacking.shard, lacking.rows)
            writer.append(keys, features, part_manifests[lacking.part].shards[lacking.shard].provenance)
        writer.commit_dataset(dataset, inputs, [*set_aside.elements()])
    notes = [f"{counted(left_out, 'row')} left out: workers did not survive them in the parts"] if left_out else []
    warn(notes)
    merged = FeatureCache.open(output_dir)
    merged.notes = tuple(notes)
    return merged


@dataclass(frozen=True)
class _Lacking:
    """Rows of one shard of one part, int64 increasing, that the merged cache lacks."""

    part: int
    shard: int
    rows: Rows


def _missing(part_manifests: Sequence[Manifest], keys: Sequence[Keys], writer: CacheWriter) -> Iterator[_Lacking]:
    """Yield what is to be copied, in the order of the parts; of several rows with one key, the first."""
    every = np.concatenate(keys)
    wanted = (RowIndex(every).lookup(every) == np.arange(len(every))) & (writer.lookup(every) < 0)
    start = 0
    for part, manifest in enumerate(part_manifests):
        for shard, entry in enumerate(manifest.shards):
            rows = np.flatnonzero(wanted[start : start + entry.rows])
            start += entry.rows
            if len(rows):
                yield _Lacking(part, shard, rows)


def _joined(datasets: Sequence[Dataset], set_aside: Counter[str]) -> tuple[Dataset, Rows, int]:
    """Return the joined dataset, the order that its rows have among those of all parts, int64 [N], and how many lack.

    ``set_aside`` says how many rows with a key, in hexadecimal, parts have left out; only these may lack in a whole.

    Raises ``InputError`` where the parts do not fit together.
    """
    tasks = {part.task for part in datasets}
    if len(tasks) > 1:
        raise InputError(
            f"the parts have different tasks ({', '.join(sorted(map(str, tasks)))}): relabel them alike first"
        )
    task = tasks.pop()
    wholes = [part.whole for part in datasets if part.whole is not None]
    if len({(whole.rows, whole.hash) for whole in wholes}) > 1 or len(wholes) not in (0, len(datasets)):
        raise InputError(
            "these caches are parts of different datasets, or some are not parts: "
            "merge the parts of one dataset, or none"
        )
    exact = bool(wholes) or task not in (None, CLASSIFICATION.name)
    if exact and len({(part.class_names, part.split_names) for part in datasets}) > 1:
        named = " / ".join(", ".join((*part.class_names, *part.split_names)) for part in datasets)
        raise InputError(f"the parts have different classes or splits ({named}): relabel them alike first")
    class_names = _union([part.class_names for part in datasets])
    split_names = _union([part.split_names for part in datasets])
    keys = np.concatenate([part.keys for part in datasets])
    order, lacking = np.arange(len(keys)), 0
    if wholes:
        numbers, rows = np.concatenate([whole.numbers for whole in wholes]), wholes[0].rows
        order = np.argsort(numbers, kind="stable")
        there = len(np.unique(numbers))
        lacking = rows - there
        left_out = _left_out(set_aside, keys) if lacking else 0
        if there != len(numbers) or lacking != left_out:
            besides = f", and left out {left_out:,}" if left_out else ""
            raise InputError(
                f"these parts have {there:,} of the {rows:,} rows of their dataset{besides}: "
                "a part is missing or given twice"
            )
    targets = [np.zeros(0) if part.targets is None else part.targets for part in datasets]
    if task == CLASSIFICATION.name:
        pairs = zip(targets, datasets, strict=True)
        targets = [renumbered(classes, part.class_names, class_names) for classes, part in pairs]
    splits = [renumbered(part.split, part.split_names, split_names) for part in datasets]
    joined = Dataset(
        keys=keys[order],
        targets=None if task is None else np.concatenate(targets)[order],
        task=task,
        class_names=class_names,
        split=np.concatenate(splits)[order],
        split_names=split_names,
    )
    return joined, order, lacking


def _left_out(set_aside: Counter[str], keys: Keys) -> int:
    """Return how many rows with a key that was set aside are in no dataset, whose rows have ``keys``, u1 [N, 16]."""
    given = np.frombuffer(bytes.fromhex("".join(set_aside)), np.uint8).reshape(-1, KEY_BYTES)
    counts = np.fromiter(set_aside.values(), np.int64, len(set_aside))
    return int(counts[~np.isin(key_values(given), key_values(keys))].sum())


def _union(names: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return all names in their common order, or where parts differ in which they have, as a fresh pass sorts them."""
    if all(tuple(own) == tuple(names[0]) for own in names):
        return tuple(names[0])
    every = {name for own in names for name in own}
    if every <= set(SPLITS):
        return tuple(name for name in SPLITS if name in every)
    if all(_INTEGER.fullmatch(name) for name in every):
        return tuple(sorted(every, key=int))
    return tuple(sorted(every))
