"""Reading a cache: splits, targets, ids, and features as arrays, memory-mapped where they lie together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedcache.arguments import checks_arguments
from embedcache.cache import manifest as manifests
from embedcache.cache.fetch import advising, local_folder
from embedcache.cache.files import PATIENCE, StoredShard, check_all, dataset_arrays, identity, stored_keys, verify
from embedcache.cache.gather import Keys, RowIndex, Rows, take, take_tokens
from embedcache.dataset import Dataset, IdColumn, Packed, Whole
from embedcache.errors import CorruptCacheError, FeatureError, IncompleteCacheError, InputError, warn
from embedcache.features import Dense, InMemory, Ragged, Stored
from embedcache.memory import uncollected
from embedcache.notebook import Table, panel
from embedcache.numerics import Difference, Probe, difference
from embedcache.shard import Array, FeatureSet
from embedcache.spec import ExtractionSpec, feature_name, find_name, plain_name, split_name
from embedcache.task import task_named
from embedcache.wording import counted

if TYPE_CHECKING:
    from torch.utils.data import Dataset as TorchDataset

    from embedcache.cache.torch_data import Item


_SHOWN_CLASSES = 12
"""Classes that a notebook shows."""


class FeatureCache:
    """A cache on disk, opened for reading. Made by ``FeatureCache.open``; never writes.

    Example::

        cache = FeatureCache.open("reviews.cache")
        X, y = cache.arrays("train")
    """

    def __init__(self, path: Path, manifest: manifests.Manifest) -> None:
        self.path = path
        # What extract or relabel noted about the rows, which no file keeps.
        self.notes: tuple[str, ...] = ()
        self._manifest = manifest
        self.spec = ExtractionSpec(manifest.spec)
        self.spec_hash = manifest.spec_hash
        self.feature_sets = {feature.name: feature for feature in manifest.feature_sets}
        assert manifest.examples is not None
        self._entry = manifest.examples
        self.task = self._entry.task
        self.class_names, self.split_names = self._entry.class_names, self._entry.split_names
        self.n_rows = self._entry.rows
        self._shards = StoredShard.all_of(path, manifest)
        self._starts = np.concatenate([[0], np.cumsum([shard.rows for shard in manifest.shards], dtype=np.int64)])
        self.n_stored = int(self._starts[-1])
        self._columns = dataset_arrays(path / "examples" / self._entry.file.name, self._entry, self.n_stored)
        self._row, self._split = np.asarray(self._columns["row"]), np.asarray(self._columns["split"])

    @classmethod
    @checks_arguments()
    def open(cls, path: Path | str, *, verify: bool = True) -> FeatureCache:
        """Open a cache: a folder, or a URL such as ``s3://bucket/reviews.cache``, of which ``local_folder`` has a copy.

        Names, sizes and the manifest's own hash are always checked, and the sha256 of every file once per process;
        ``verify=False`` leaves a feature shard's sha256 for when its features are first read. While the cache is
        being extended, or after an extension was interrupted, this is the dataset as it was last completed, and a
        ``EmbedcacheWarning`` says so.

        Raises:
            CacheNotFoundError: there is no cache.
            IncompleteCacheError: its first extraction has not been finished.
            CorruptCacheError: a byte is not what was committed.
            CacheError, MissingExtraError: a URL that cannot be read.
        """
        with advising(path):
            return cls._open(local_folder(path), verify)

    @classmethod
    def _open(cls, directory: Path, verify: bool) -> FeatureCache:
        for attempt in range(PATIENCE):
            manifest = manifests.read(directory)
            if manifest.examples is None:
                raise IncompleteCacheError(
                    f"{directory} holds {counted(manifest.rows, 'row')} of an extraction that was not finished: "
                    "run the same extract command again to go on"
                )
            try:
                with uncollected():
                    cache = cls(directory, manifest)
                break
            except CorruptCacheError:
                # Readers never wait: a writer may have replaced the dataset since its name was read.
                if attempt == PATIENCE - 1 or manifests.read(directory).examples == manifest.examples:
                    raise
        features = str(directory / "features")
        for entry in manifest.shards:  # of text: a Path for each of 100,000 takes as long as the system's answer
            identity(f"{features}/{entry.file.name}", entry.file)
        if verify:
            check_all(cache._shards)
        if not manifest.complete:
            message = (
                f"{directory} is being extended, or was interrupted while it was: this is the dataset before that; "
                "run the same extract command again to finish"
            )
            warn([message])
        return cache

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {rows:,}" for name, rows in self.split_sizes().items())
        return f"FeatureCache({str(self.path)!r}: {sizes}; {', '.join(self.plain_sets)}; task {self.task})"

    def _repr_html_(self) -> str:
        task = None if self.task is None else task_named(self.task)
        rows: list[list[object]] = []
        for name, size in self.split_sizes().items():
            counts = None if task is None else task.counts(self.targets(name), len(self.class_names))
            each = [] if counts is None else counts.tolist()[:_SHOWN_CLASSES]
            rows.append([name, f"{size:,}", *(f"{count:,}" for count in each)])
        labels = self.class_names[: len(rows[0]) - 2] if rows else ()
        more = len(self.class_names) - len(labels) if labels else 0
        sets = [
            [feature.name, feature.kind, " x ".join(map(str, feature.row_shape)), feature.dtype]
            for feature in self.feature_sets.values()
        ]
        facts = {
            "rows": f"{self.n_rows:,}", "task": self.task or "no labels",
            "model": self.provenance()[-1].get("model") if self._manifest.shards else None,
            "on disk": f"{sum(file.bytes for _, file in self._manifest.files()) / 1e6:,.1f} MB",
        }  # fmt: skip
        tables = [
            Table(["split", "rows", *labels], rows, range(1, 2 + len(labels))),
            Table(["feature set", "kind", "shape", "stored as"], sets),
        ]
        notes = [f"and {counted(more, 'more class')}"] if more else []
        return panel("FeatureCache", facts, tables, notes, more=str(self.path))

    def __len__(self) -> int:
        return self.n_rows

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The manifest as JSON values."""
        return self._manifest.to_json()

    @property
    def probe(self) -> Probe | None:
        """What the machine that made the cache computes: see ``numerics``; None where that was not recorded."""
        return self._manifest.probe

    @property
    def common_probe(self) -> Probe | None:
        """What the machines of all rows compute, None where some have other bits, or no probe."""
        return self._manifest.common_probe

    def numerics(self) -> list[dict[str, object]]:
        """Return the kinds of machine that computed rows: each one's probe by its hash, and how it differs."""
        return [
            {
                "probe": None if kind.probe is None else kind.probe.hash,
                "prepared_by": {} if kind.probe is None else dict(kind.probe.versions),
                "accepted": kind.accepted,
                **difference(self.probe, kind.probe).to_json(),
            }
            for kind in self._manifest.numerics
        ]

    def numerics_of(self, probe: Probe | None) -> Difference:
        """Return how a machine with this probe differs from those that computed the rows: from the one farthest off."""
        by_kind = [difference(kind.probe, probe) for kind in self._manifest.kinds]
        return max(by_kind, key=lambda kind: (not kind.same_bits, kind.largest), default=difference(None, probe))

    @cached_property
    def dataset(self) -> Dataset:
        """The rows of the cache as a value: keys, splits, targets and ids; reads the keys of all shards."""
        entry, columns = self._entry, self._columns
        whole = None
        if entry.whole_rows is not None:
            whole = Whole(np.asarray(columns["number"]), entry.whole_rows, entry.whole_hash)
        given = Packed(columns["id.values"], columns["id.offsets"]) if entry.has_ids else None
        return Dataset(
            keys=self.keys(),
            split=self._split,
            split_names=self.split_names,
            task=self.task,
            targets=None if self.task is None else self.targets(),
            class_names=self.class_names,
            ids=IdColumn(self.n_rows, given, None if whole is None else whole.numbers),
            whole=whole,
        )

    @cached_property
    def n_unique(self) -> int:
        """How many different contents the dataset has."""
        return len(np.unique(self._row))

    def rows(self, split: str | None = None) -> Rows:
        """Return the dataset row numbers of a split, int64, in the order of the input; None for all rows."""
        if split is None:
            return np.arange(self.n_rows)
        return np.flatnonzero(self._split == self.split_names.index(self.split(split)))

    def split(self, written: str) -> str:
        """Return the name of a split that is here, however it is written: ``val`` for ``validation``.

        Raises ``InputError`` for a split that is not here.
        """
        name = find_name(written, self.split_names, split_name)
        if name is None:
            raise InputError(f"{self.path} has no split {written!r}: it has {', '.join(self.split_names)}")
        return name

    def split_codes(self) -> npt.NDArray[np.uint8]:
        """Return each row's split, u1 [N], an index into ``split_names``."""
        return self._split

    def split_sizes(self) -> dict[str, int]:
        """Return how many rows each split has."""
        counts = np.bincount(self._split, minlength=len(self.split_names))
        return dict(zip(self.split_names, counts.tolist(), strict=True))

    def targets(self, split: str | None = None) -> Array:
        """Return the targets: int64 [N], uint8 [N, C] or float64 [N, R] by task.

        Raises ``InputError`` without labels.
        """
        if self.task is None:
            raise InputError(f"{self.path} has no labels: give it some with embedcache relabel {self.path} INPUT")
        return np.asarray(self._columns["target"])[self._selected(split)]

    def _selected(self, split: str | None) -> Rows | slice:
        """Return the rows of a split, as a slice where they follow one another."""
        rows = self.rows(split)
        if len(rows) and int(rows[-1]) - int(rows[0]) + 1 == len(rows):
            return slice(int(rows[0]), int(rows[-1]) + 1)
        return rows

    def keys(self, split: str | None = None) -> Keys:
        """Return the row keys, u1 [N, 16]."""
        keys: Keys = self.stored_keys()[self.places(split)]
        return keys

    def ids(self, split: str | None = None) -> list[str]:
        """Return the rows' ids."""
        rows = self.rows(split)
        if self._entry.has_ids:
            packed = Packed(self._columns["id.values"], self._columns["id.offsets"], rows)
            try:
                return [name.decode("utf-8") for name in packed]
            except UnicodeDecodeError:
                raise CorruptCacheError(f"{self.path}: an id is not UTF-8: embedcache did not write this") from None
        return [str(number) for number in self.numbers()[rows]]

    def numbers(self) -> Rows:
        """Return the row numbers, int64 [N], in the input; those of the whole for a part of a larger dataset."""
        return np.asarray(self._columns["number"]) if "number" in self._columns else np.arange(self.n_rows)

    def inputs(self, split: str | None = None) -> Packed | None:
        """Return the rows' contents, where they were kept (``keep_inputs``), else None."""
        if not self._entry.has_inputs:
            return None
        return Packed(self._columns["input.values"], self._columns["input.offsets"], self.rows(split))

    def arrays(self, split: str | None = None, feature: str | None = None) -> tuple[Array, Array]:
        """Return features and targets of a split.

        Features are float32 [N, D] or [N, L, D]: a read-only memory map where the rows lie together in one shard and
        are stored as float32, otherwise read into memory. Targets are as ``targets`` gives them.
        """
        return self.features(split, feature), self.targets(split)

    def features(self, split: str | None = None, feature: str | None = None) -> Array:
        """Return the features of a split, as ``arrays`` does, labels or not."""
        return self.take(self.places(split), feature)

    @property
    def plain_sets(self) -> dict[str, FeatureSet]:
        """The feature sets by name, without those of views, which heads are trained on beside the plain ones."""
        return {name: feature for name, feature in self.feature_sets.items() if self._plain(name) == name}

    def views(self, feature: FeatureSet) -> list[FeatureSet]:
        """Return the sets of the views of a feature set, in order, from view 1 on: ``mean:view1``, ..."""
        found = [other for name, other in self.feature_sets.items() if self._plain(name) == feature.name != name]
        return sorted(found, key=lambda other: plain_name(other.name)[1])

    def _plain(self, name: str) -> str:
        plain = plain_name(name)[0]
        return plain if plain in self.feature_sets else name

    def feature(self, name: str | None = None) -> FeatureSet:
        """Return a feature set by name, in any form that ``extract`` takes; None for the first."""
        if name is None:
            return next(iter(self.feature_sets.values()))
        stored = find_name(name, self.feature_sets, feature_name)
        if stored is None:
            raise FeatureError(f"{self.path} has no feature set {name!r}: it has {', '.join(self.plain_sets)}")
        return self.feature_sets[stored]

    def places(self, split: str | None = None) -> Rows:
        """Return where in the shards each row of a split is, int64 [N]; see ``take``."""
        return self._row[self._selected(split)]

    def lookup(self, keys: Keys) -> Rows:
        """Return where in the shards each key [n, 16] is, int64 [n], -1 for a key that is not there; see ``take``."""
        return RowIndex(self.stored_keys()).lookup(keys)

    def take(self, places: Rows, feature: str | None = None) -> Array:
        """Return the features at ``places`` in the shards [n], as float32 [n, D] or [n, L, D]; see ``lookup``."""
        chosen = self.feature(feature)
        if chosen.kind == "tokens":
            raise FeatureError(
                f"{chosen.name} is a token-level set, one vector per token: "
                "use ragged() or another set, or train a head such as attention"
            )
        return take(
            chosen, self._starts, lambda shard: self._shards[shard].piece(chosen.name), np.asarray(places, np.int64)
        )

    def ragged(self, split: str | None = None, feature: str | None = None) -> Ragged:
        """Return a token-level set of a split; a memory map where its rows lie together in one shard.

        Without a name it is the first there is, ``states@`` last.
        """
        sets = sorted(self.feature_sets.values(), key=lambda feature: feature.for_blocks)
        names = [feature.name for feature in sets if feature.kind == "tokens"]
        chosen = self.feature(feature if feature is not None else (names[0] if names else "tokens"))
        if chosen.kind != "tokens":
            raise FeatureError(
                f"{chosen.name} is not a token-level set: use arrays(); "
                f"token-level sets here: {', '.join(names) or 'none'}"
            )
        return self._tokens(self.places(split), chosen)

    def of_rows(self, rows: Rows, feature: FeatureSet) -> InMemory:
        """Return a feature set of some rows of the dataset, int64 [n]: in memory, a map where they lie together."""
        places = self._row[rows]
        if feature.kind == "tokens":
            return self._tokens(places, feature)
        return Dense(self.take(places, feature.name), feature)

    def vectors(self, feature: FeatureSet) -> Rows:
        """Return how many vectors each row of the dataset has in a token-level set, int64 [N]."""
        counts = [np.diff(shard.tokens(feature)[1]) for shard in self._shards]
        vectors: Rows = np.concatenate([np.zeros(0, np.int64), *counts])[self._row].astype(np.int64)
        return vectors

    def _tokens(self, places: Rows, feature: FeatureSet) -> Ragged:
        return take_tokens(feature, self._starts, lambda shard: self._shards[shard].tokens(feature), places)

    def torch_dataset(self, split: str | None = None, feature: str | None = None) -> TorchDataset[Item]:
        """Return a torch ``Dataset`` of ``(x, y)`` with fast whole batches; token-level sets give ``x`` [T, D]."""
        from embedcache.cache.torch_data import CachedDataset

        x = self.of_rows(self.rows(split), self.feature(feature))
        return CachedDataset(x, self.targets(split) if self.task is not None else None)

    def provenance(self) -> list[dict[str, Any]]:
        """Return what ran the shards, each different answer once."""
        seen: list[dict[str, Any]] = []
        for shard in self._manifest.shards:
            ran = {name: value for name, value in shard.provenance.items() if name != manifests.SET_ASIDE}
            if ran not in seen:
                seen.append(ran)
        return seen

    def describe(self) -> dict[str, object]:
        """Return what is in the cache, as JSON values."""
        splits: dict[str, dict[str, object]] = {}
        for name, rows in self.split_sizes().items():
            splits[name] = {"rows": rows}
            if self.task is not None:
                counts = task_named(self.task).counts(self.targets(name), len(self.class_names))
                splits[name] |= {} if counts is None else {"classes": counts.tolist()}
        return {
            "path": str(self.path),
            "rows": self.n_rows,
            "unique": self.n_unique,
            "bytes": sum(file.bytes for _, file in self._manifest.files()),
            "shards": len(self._manifest.shards),
            "task": self.task,
            "class_names": list(self.class_names),
            "splits": splits,
            "feature_sets": [asdict(feature) for feature in self.feature_sets.values()],
            "spec": self.spec,
            "spec_hash": self.spec_hash,
            "provenance": self.provenance(),
            "numerics": self.numerics(),
            "complete": self._manifest.complete,
        }

    def verify(self) -> list[str]:
        """Hash every file again and return what is wrong, one line each; an empty list means sound."""
        return verify(self.path)

    def stored_keys(self) -> Keys:
        """Return the keys of every row in every shard, u1 [N, 16], in order, whether the dataset has it or not."""
        return stored_keys(self._shards)

    def shard(self, number: int, rows: Rows) -> tuple[Keys, dict[str, Stored]]:
        """Return some rows, int64 increasing, of one shard as they are stored: keys, and what ``append`` takes."""
        shard = self._shards[number]
        stored = {}
        for name, feature in self.feature_sets.items():
            if feature.kind == "tokens":
                ragged = Ragged(*shard.tokens(feature), feature).take(rows)
                stored[name] = Stored(feature, ragged.values, ragged.offsets)
            else:
                stored[name] = Stored(feature, shard.piece(name).map()[rows])
        return np.asarray(shard.piece("row_key").map()[rows]), stored
