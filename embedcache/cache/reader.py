"""Reading a cache: splits, targets, ids, and features as arrays, memory-mapped where they lie together."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedcache.cache import manifest as manifests
from embedcache.cache.files import check_all, checked, dataset_arrays, shard_arrays
from embedcache.cache.index import Keys, RowIndex, Rows
from embedcache.errors import CorruptCacheError, FeatureError, IncompleteCacheError, InputError
from embedcache.shard import FeatureSet, Placed, check
from embedcache.spec import Task

if TYPE_CHECKING:
    from torch.utils.data import Dataset as TorchDataset

Array = npt.NDArray[Any]
_READERS = 4
_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class Ragged:
    """Vectors of rows of different lengths: row i has ``values[offsets[i]:offsets[i + 1]]``.

    ``values`` is float32 [sum T, D], ``offsets`` int64 [n + 1].
    """

    values: Array
    offsets: Rows

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Array:
        return self.values[self.offsets[row] : self.offsets[row + 1]]


class Packed(Sequence[bytes]):
    """Byte strings in one buffer: ``data[offsets[i]:offsets[i + 1]]``, seen through a choice of rows."""

    def __init__(self, data: Array, offsets: Array, rows: Rows) -> None:
        self._data, self._offsets, self._rows = data, offsets, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[at] for at in range(*place.indices(len(self)))]
        row = int(self._rows[place])
        return self._data[int(self._offsets[row]) : int(self._offsets[row + 1])].tobytes()


class FeatureCache:
    """A cache on disk, opened for reading. Made by ``FeatureCache.open``; never writes.

    Example::

        cache = FeatureCache.open("reviews.cache")
        X, y = cache.arrays("train")
    """

    def __init__(self, path: Path, manifest: manifests.Manifest) -> None:
        self.path = path
        self._manifest = manifest
        self.spec: dict[str, Any] = dict(manifest.spec)
        self.spec_hash = manifest.spec_hash
        self.feature_sets: dict[str, FeatureSet] = {each.name: each for each in manifest.feature_sets}
        assert manifest.examples is not None
        dataset = self._dataset = manifest.examples
        self.task: Task | None = dataset.task  # type: ignore[assignment]  # checked where the manifest is parsed
        self.class_names, self.split_names, self.n_rows = dataset.class_names, dataset.split_names, dataset.rows
        self._starts = np.concatenate([[0], np.cumsum([shard.rows for shard in manifest.shards], dtype=np.int64)])
        self.n_stored = int(self._starts[-1])
        place = checked(path / "examples" / dataset.file.name, dataset.file, dataset_arrays(dataset))
        self._columns = {name: each.map(path / "examples" / dataset.file.name) for name, each in place.items()}
        self._row = np.asarray(self._columns["row"])
        if self.n_rows and not (0 <= int(self._row.min()) and int(self._row.max()) < self.n_stored):
            raise CorruptCacheError(f"{path}: the dataset points at rows that no shard holds: restore the cache from a copy")
        self._split = np.asarray(self._columns["split"])
        if self.n_rows and int(self._split.max()) >= len(self.split_names):
            raise CorruptCacheError(f"{path}: the dataset has a split that the manifest does not name: restore the cache from a copy")

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> FeatureCache:
        """Open a cache.

        Names, sizes and the manifest's own hash are always checked, and the sha256 of every file once per process;
        ``verify=False`` leaves a feature shard's hash for when its features are first read.

        Raises:
            CacheNotFoundError: there is no cache.
            IncompleteCacheError: its first extraction has not been finished.
            CorruptCacheError: a byte is not what was committed.
        """
        directory = Path(path)
        for attempt in range(5):
            manifest = manifests.read(directory)
            if manifest.examples is None:
                raise IncompleteCacheError(
                    f"{directory} holds {sum(shard.rows for shard in manifest.shards):,} rows of an extraction that was not "
                    "finished: run the same extract command again to go on"
                )
            try:
                cache = cls(directory, manifest)
                break
            except CorruptCacheError:
                # A writer may have replaced the dataset since its name was read.
                if attempt == 4 or manifests.read(directory).examples == manifest.examples:
                    raise
        if verify:
            check_all(directory, manifest)
        if not manifest.complete:
            warnings.warn(
                f"{directory} is being extended, or was interrupted while it was: this is the dataset before that; "
                "run the same extract command again to finish",
                UserWarning, stacklevel=2,
            )  # fmt: skip
        return cache

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {rows:,}" for name, rows in self.split_sizes().items())
        return f"FeatureCache({str(self.path)!r}: {sizes}; {', '.join(self.feature_sets)}; task {self.task})"

    def __len__(self) -> int:
        return self.n_rows

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The manifest as it stands on disk."""
        return self._manifest.to_json()

    @cached_property
    def n_unique(self) -> int:
        """How many different contents the dataset has."""
        return len(np.unique(self._row))

    def rows(self, split: str | None = None) -> Rows:
        """Return the dataset row numbers of a split, int64, in the order of the input; None for all rows."""
        if split is None:
            return np.arange(self.n_rows)
        if split not in self.split_names:
            raise InputError(f"{self.path} has no split {split!r}: it has {', '.join(self.split_names)}")
        return np.flatnonzero(self._split == self.split_names.index(split))

    def split_sizes(self) -> dict[str, int]:
        """Return how many rows each split has."""
        counts = np.bincount(self._split, minlength=len(self.split_names))
        return dict(zip(self.split_names, counts.tolist(), strict=True))

    def targets(self, split: str | None = None) -> Array:
        """Return the targets: int64 [N], uint8 [N, C] or float64 [N, R] by task. Raises ``InputError`` without labels."""
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
        return self._stored_keys()[self._row[self._selected(split)]]

    def ids(self, split: str | None = None) -> list[str]:
        """Return the rows' ids."""
        rows = self.rows(split)
        if self._dataset.has_ids:
            packed = Packed(self._columns["id.values"], self._columns["id.offsets"], rows)
            return [each.decode("utf-8") for each in packed]
        return [str(number) for number in (self._columns["number"][rows] if self._dataset.part else rows)]

    def inputs(self, split: str | None = None) -> Sequence[bytes] | None:
        """Return the rows' contents, where they were kept (``keep_inputs``), else None."""
        if not self._dataset.has_inputs:
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
        each = self.feature(feature)
        if each.kind == "tokens":
            raise FeatureError(f"{each.name} is a token-level set, one vector per token: use ragged(), or train a head such as attention")
        return self.take(self._row[self._selected(split)], each.name)

    def feature(self, name: str | None = None) -> FeatureSet:
        """Return a feature set by name; None for the first."""
        if name is None:
            return next(iter(self.feature_sets.values()))
        if name not in self.feature_sets:
            raise FeatureError(f"{self.path} has no feature set {name!r}: it has {', '.join(self.feature_sets)}")
        return self.feature_sets[name]

    def lookup(self, keys: Keys) -> Rows:
        """Return where in the shards each key [n, 16] is, int64 [n], -1 for a key that is not there; see ``take``."""
        return RowIndex(self._stored_keys()).lookup(keys)

    def take(self, places: Rows, feature: str | None = None) -> Array:
        """Return the features at ``places`` in the shards [n], as float32 [n, D] or [n, L, D]."""
        each = self.feature(feature)
        shape = (each.layers, each.dim) if each.kind == "layers" else (each.dim,)
        if not len(places):
            return np.zeros((0, *shape), np.float32)
        shards = np.searchsorted(self._starts, places, side="right") - 1
        together = int(places[-1]) - int(places[0]) + 1 == len(places) and bool((np.diff(places) == 1).all())
        if together and each.dtype == "float32" and shards[0] == shards[-1]:
            start = int(places[0] - self._starts[shards[0]])
            return self._map(int(shards[0]), each.name)[start : start + len(places)]
        out = np.empty((len(places), *shape), np.float32)
        if together:
            self._read_runs(out, int(places[0]), each)
            return out
        for shard in np.unique(shards).tolist():
            mine = shards == shard
            out[mine] = decoded(self._map(shard, each.name)[places[mine] - self._starts[shard]], each.dtype)
        return out

    def _read_runs(self, out: Array, start: int, feature: FeatureSet) -> None:
        """Read rows that follow one another across shards, several shards at a time."""
        stop = start + len(out)
        first, last = (int(np.searchsorted(self._starts, row, side="right")) - 1 for row in (start, stop - 1))

        def read(shard: int) -> None:
            begin, end = max(start, int(self._starts[shard])), min(stop, int(self._starts[shard + 1]))
            into = out[begin - start : end - start]
            inside = slice(begin - int(self._starts[shard]), end - int(self._starts[shard]))
            if feature.dtype != "float32":
                into[...] = decoded(self._map(shard, feature.name)[inside], feature.dtype)
                return
            placed = self._place(shard)[feature.name]
            row_bytes = into.nbytes // len(into)
            view = memoryview(into.reshape(-1)).cast("B")
            descriptor = os.open(self._shard_path(shard), os.O_RDONLY)
            try:  # reading into the result is cheaper than mapping, which faults on every page
                at = 0
                while at < len(view):
                    got = os.preadv(descriptor, [view[at : at + _READ_BYTES]], placed.offset + inside.start * row_bytes + at)
                    if not got:
                        raise CorruptCacheError(f"{self._shard_path(shard)} ends early: restore the cache from a copy")
                    at += got
            finally:
                os.close(descriptor)

        with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as pool:
            list(pool.map(read, range(first, last + 1)))

    def ragged(self, split: str | None = None, feature: str | None = None) -> Ragged:
        """Return a token-level set of a split; a memory map where its rows lie together in one shard."""
        names = [each.name for each in self.feature_sets.values() if each.kind == "tokens"]
        each = self.feature(feature if feature is not None else (names[0] if names else "tokens"))
        if each.kind != "tokens":
            raise FeatureError(f"{each.name} is not a token-level set: use arrays(); token-level sets here: {', '.join(names) or 'none'}")
        places = self._row[self._selected(split)]
        shards = np.searchsorted(self._starts, places, side="right") - 1
        pieces: list[Array] = []
        lengths = np.zeros(len(places), np.int64)
        together = len(places) > 0 and shards[0] == shards[-1] and bool((np.diff(places) == 1).all())
        if together:
            offsets = self._map(int(shards[0]), f"{each.name}.offsets")
            begin = int(places[0] - self._starts[shards[0]])
            mine = np.asarray(offsets[begin : begin + len(places) + 1])
            values = self._map(int(shards[0]), f"{each.name}.values")[int(mine[0]) : int(mine[-1])]
            return Ragged(decoded(values, each.dtype), mine - mine[0])
        for place, shard in zip(places.tolist(), shards.tolist(), strict=True):
            offsets = self._map(shard, f"{each.name}.offsets")
            at = place - int(self._starts[shard])
            pieces.append(self._map(shard, f"{each.name}.values")[int(offsets[at]) : int(offsets[at + 1])])
        lengths = np.fromiter((len(piece) for piece in pieces), np.int64, len(pieces))
        values = np.empty((int(lengths.sum()), each.dim), np.float32)
        ends = np.cumsum(lengths)
        for piece, end in zip(pieces, ends.tolist(), strict=True):
            values[end - len(piece) : end] = decoded(piece, each.dtype)
        return Ragged(values, np.concatenate([[0], ends]))

    def torch_dataset(self, split: str | None = None, feature: str | None = None) -> TorchDataset[Any]:
        """Return a torch ``Dataset`` of ``(x, y)`` with fast whole batches; token-level sets give ``x`` [T, D]."""
        from embedcache.cache.torch_data import CachedDataset

        each = self.feature(feature)
        x = self.ragged(split, each.name) if each.kind == "tokens" else self.features(split, each.name)
        return CachedDataset(x, self.targets(split) if self.task is not None else None)

    def provenance(self) -> list[dict[str, Any]]:
        """Return what ran the shards, each different answer once."""
        seen: list[dict[str, Any]] = []
        for shard in self._manifest.shards:
            if dict(shard.provenance) not in seen:
                seen.append(dict(shard.provenance))
        return seen

    def describe(self) -> dict[str, Any]:
        """Return what is in the cache, as JSON values."""
        splits: dict[str, Any] = {}
        for name, rows in self.split_sizes().items():
            splits[name] = {"rows": rows}
            if self.task == "classification":
                targets = self.targets(name)
                splits[name]["classes"] = np.bincount(targets[targets >= 0], minlength=len(self.class_names)).tolist()
            elif self.task == "multilabel":
                splits[name]["classes"] = (self.targets(name) == 1).sum(axis=0).tolist()
        return {
            "path": str(self.path),
            "rows": self.n_rows,
            "unique": self.n_unique,
            "bytes": sum(file.bytes for _, file in self._manifest.files()),
            "shards": len(self._manifest.shards),
            "task": self.task,
            "class_names": list(self.class_names),
            "splits": splits,
            "feature_sets": [asdict(each) for each in self.feature_sets.values()],
            "spec": self.spec,
            "spec_hash": self.spec_hash,
            "provenance": self.provenance(),
            "complete": self._manifest.complete,
        }

    def verify(self) -> list[str]:
        """Hash every file again and return what is wrong, one line each; an empty list means sound."""
        return verify(self.path)

    def _shard_path(self, shard: int) -> Path:
        return self.path / "features" / self._manifest.shards[shard].file.name

    def _place(self, shard: int) -> dict[str, Placed]:
        entry = self._manifest.shards[shard]
        return checked(self._shard_path(shard), entry.file, shard_arrays(self._manifest.feature_sets, entry.rows))

    def _map(self, shard: int, name: str) -> Array:
        return self._place(shard)[name].map(self._shard_path(shard))

    def _stored_keys(self) -> Keys:
        return stored_keys(self.path, self._manifest)


def stored_keys(path: Path, manifest: manifests.Manifest) -> Keys:
    """Return the keys of every row in every shard, u1 [N, 16], in order."""
    keys = np.empty((sum(shard.rows for shard in manifest.shards), 16), np.uint8)
    at = 0
    for shard in manifest.shards:
        file = path / "features" / shard.file.name
        keys[at : at + shard.rows] = checked(file, shard.file, shard_arrays(manifest.feature_sets, shard.rows))["row_key"].map(file)
        at += shard.rows
    return keys


def decoded(values: Array, dtype: str) -> Array:
    """Return stored values as float32; exact for every storage type."""
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32, copy=False)


def verify(path: Path | str) -> list[str]:
    """Hash every file of a cache again and return what is wrong, one line each, left-over files included."""
    directory = Path(path)
    try:
        manifest = manifests.read(directory)
    except CorruptCacheError as error:
        return [str(error)]
    problems = []
    for folder, file in manifest.files():
        try:
            check(directory / folder / file.name, file)
        except (CorruptCacheError, OSError) as error:
            problems.append(str(error))
    named = {(folder, file.name) for folder, file in manifest.files()}
    problems += [f"{found}: no manifest names this file; the next extraction removes or adopts it" for found in _strays(directory, named)]
    return problems


def _strays(directory: Path, named: set[tuple[str, str]]) -> Iterator[Path]:
    for found in sorted(directory.rglob("*")):
        inside = found.relative_to(directory)
        if found.is_dir() and str(inside) in ("features", "examples"):
            continue
        if str(inside) != manifests.NAME and (str(inside.parent), inside.name) not in named:
            yield found
