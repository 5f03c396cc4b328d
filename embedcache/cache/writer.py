"""Writing a cache: one writer at a time, shards and datasets committed one after the other."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from embedcache.cache import manifest as manifests
from embedcache.cache.files import StoredShard, check, dataset_arrays, find_fault, stored_keys
from embedcache.cache.gather import Keys, RowIndex, Rows, take
from embedcache.cache.manifest import (
    FILE_NAME,
    DatasetEntry,
    Hashed,
    Manifest,
    Numerics,
    Shard,
    ShardFile,
    file_of,
)
from embedcache.dataset import Contents, Dataset
from embedcache.errors import (
    CacheError,
    CacheNotFoundError,
    CorruptCacheError,
    FeatureError,
    InputError,
)
from embedcache.features import Stored
from embedcache.fingerprint import KEY_BYTES, canonical_json
from embedcache.journal import commit, explained, refuse_foreign, replacing, writing
from embedcache.numerics import Difference, Probe, difference
from embedcache.shard import Array, FeatureSet, build, pieces, stand_in
from embedcache.spec import ExtractionSpec
from embedcache.wording import counted


class CacheWriter:
    """A cache opened for writing, as a context manager: made if it is not there, refused if it is made another way.

    Raises:
        SpecMismatchError: features there were made by another spec; the message names each field that differs.
        CacheLockedError: another process is writing.
        CacheError: the directory cannot be written.
    """

    def __init__(self, path: Path | str, spec: Mapping[str, object], feature_sets: Sequence[FeatureSet]) -> None:
        self.path = Path(path)
        self._spec, self._sets = ExtractionSpec(spec), tuple(feature_sets)
        self._lock: contextlib.ExitStack | None = None
        self._manifest = Manifest(self._spec, self._sets)
        self._keys: list[Keys] = []
        self._index: RowIndex | None = None
        self._failed = False

    def __enter__(self) -> CacheWriter:
        with explained(f"cannot read {self.path}"):
            # Refuses another spec or a directory of something else before writing anything.
            fresh = self._read() is None
        with contextlib.ExitStack() as opening:
            opening.enter_context(writing(self.path, parts=manifests.FOLDERS, fresh=fresh))
            with explained(f"cannot read {self.path}"):
                existing = self._read()
                self._manifest = existing or self._manifest
                self._remove_strays()
            if existing is None:
                self._commit(self._manifest)
            self._keys = [stored_keys(StoredShard.all_of(self.path, self._manifest))]
            self._lock = opening.pop_all()
        return self

    def _read(self) -> Manifest | None:
        """Return the manifest to go on from, None for a fresh start. Raises ``SpecMismatchError``."""
        try:
            manifest = manifests.read(self.path)
        except CacheNotFoundError:
            self._refuse_foreign()
            return None
        if manifest.newer is not None:
            raise CacheError(f"{self.path} was written in format {manifest.newer}: upgrade embedcache to write to it")
        if not manifest.shards and (manifest.spec != self._spec or manifest.feature_sets != self._sets):
            return None  # no row was ever committed, so there is nothing to mix up
        manifest.refuse_other_spec(str(self.path), self._spec, self._sets)
        return manifest

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def lookup(self, keys: Keys) -> Rows:
        """Return the place of each row key [n, 16] in the cache, int64 [n], -1 for none."""
        if self._index is None:
            self._keys = [np.concatenate(self._keys)] if self._keys else [np.zeros((0, 16), np.uint8)]
            self._index = RowIndex(self._keys[0])
        return self._index.lookup(keys)

    def take(self, places: Rows, feature: FeatureSet) -> Array:
        """Return features that are committed, at ``places`` [n] from ``lookup``, as ``FeatureCache.take`` does."""
        shards = StoredShard.all_of(self.path, self._manifest)
        starts = np.concatenate([[0], np.cumsum([shard.entry.rows for shard in shards], dtype=np.int64)])
        return take(feature, starts, lambda shard: shards[shard].piece(feature.name), places)

    @property
    def set_aside(self) -> Keys:
        """Return the keys, u1 [n, 16], of rows that were left out of the shards there, as their provenance tells."""
        return np.frombuffer(bytes.fromhex("".join(self._manifest.set_aside)), np.uint8).reshape(-1, KEY_BYTES)

    @property
    def probe(self) -> Probe | None:
        """What the machine computes that made the rows there; None where there are none, or that is not known."""
        return self._manifest.probe if self._manifest.shards else None

    def admit(self, probe: Probe | None, *, accept: bool = False) -> Difference | None:
        """Say what the machine computes whose rows are appended from now on; None for a backbone without a probe.

        Returns how that differs from what made the rows there, None where there are none. Other numerics are recorded
        with the next shard.

        Raises ``NumericsMismatchError`` when bits differ and that is not to be accepted; nothing is then changed.
        """
        has_rows = bool(self._manifest.shards)
        from_first = difference(self._manifest.probe, probe) if has_rows else None
        self._manifest = self._manifest.with_kinds(str(self.path), [Numerics(probe)], accept)
        return from_first

    def admit_kinds(self, kinds: Iterable[Numerics], *, accept: bool = False) -> None:
        """Do what ``admit`` does for rows of another cache, which may be of several kinds already."""
        self._manifest = self._manifest.with_kinds(str(self.path), kinds, accept)

    def append(self, keys: Keys, features: Mapping[str, Stored], provenance: Mapping[str, object]) -> None:
        """Commit one shard of rows that are not in the cache yet.

        ``keys`` is u1 [n, 16]; ``features`` has the n rows of each feature set. ``provenance`` says what ran it.

        Raises:
            FeatureError: other sets or numbers of rows, NaN or infinity; nothing is written.
            CacheError: the disk is full or broken; what was committed before is kept.
        """
        self._refuse_closed()
        if not len(keys):
            return
        expected = {feature.name: feature for feature in self._sets}
        if {name: stored.feature for name, stored in features.items()} != expected:
            given = ", ".join(str(stored.feature) for stored in features.values())
            raise FeatureError(f"got {given or 'no features'}, expected {', '.join(map(str, self._sets))}")
        if keys.shape[1:] != (16,) or keys.dtype != np.uint8:
            raise FeatureError(f"row_key: got {keys.dtype} {list(keys.shape)}, expected uint8 [N, 16]")
        canonical_json(dict(provenance))  # what JSON cannot hold is refused here, not after the shard is on disk
        contents: dict[str, Array] = {"row_key": keys}
        attributes: dict[str, Mapping[str, str]] = {}
        for feature in self._sets:
            stored = features[feature.name]
            if len(stored) != len(keys):
                raise FeatureError(f"{feature.name}: got {len(stored)} rows, expected {len(keys)}")
            columns = feature.columns(len(keys))
            contents |= zip(columns, stored.arrays, strict=True)
            attributes |= {name: column.attributes for name, column in columns.items()}
            if (row := stored.first_non_finite()) is not None:
                raise FeatureError(f"{feature.name}: row {row} holds NaN or infinity, which no head can use")
        data = build(contents, attributes)
        file = file_of(len(self._manifest.shards), data)
        self._publish("features", file, data)
        self._commit(self._manifest.with_shard(Shard(file, len(keys), dict(provenance))))
        self._keys.append(np.array(keys))
        self._index = None

    def dropped(self, dataset: Dataset) -> list[str]:
        """Return a note for each thing of the current dataset that ``dataset``, in its place, would not have."""
        former = self._manifest.examples
        if former is None:
            return []
        try:
            columns = dataset_arrays(self.path / "examples" / former.file.name, former, self._manifest.rows)
        except CorruptCacheError:
            return []
        gone = np.setdiff1d(columns["row"], self.lookup(dataset.keys))
        notes = []
        if rows := int(np.isin(columns["row"], gone).sum()):
            notes.append(
                f"this input lacks {counted(rows, 'row')} of the {former.rows:,} in {self.path}, which leave its "
                "dataset (their features stay): give old and new rows together to have both"
            )
        sizes = np.bincount(columns["split"], minlength=len(former.split_names)).tolist()
        kept = {dataset.split_names[code] for code in np.unique(dataset.split).tolist()}
        lost = [
            f"{name!r} ({counted(size, 'row')})"
            for name, size in zip(former.split_names, sizes, strict=True)
            if size and name not in kept
        ]
        if lost:
            notes.append(f"{self.path} loses {'the split' if len(lost) == 1 else 'the splits'} {', '.join(lost)}")
        if former.task is not None and dataset.task is None:
            notes.append(f"{self.path} loses its labels: this input has none")
        return notes

    def commit_dataset(self, dataset: Dataset, inputs: Contents | None = None, set_aside: Sequence[str] = ()) -> None:
        """Commit a dataset whose rows are all in the cache, in place of the one before.

        ``inputs`` are the contents of its rows, to be stored too. ``set_aside`` are keys, in hexadecimal, of rows that
        were left out, one for each; those that no shard tells of are recorded with the last. A dataset equal to the
        current one changes no byte but for these.

        Raises ``InputError`` when rows are not in the cache.
        """
        self._refuse_closed()
        rows = self.lookup(dataset.keys)
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            raise InputError(
                f"{len(missing):,} of {len(rows):,} rows are not in {self.path} (the first is row {int(missing[0])}): "
                f"extract them first with embedcache extract INPUT -o {self.path}"
            )
        if inputs is not None and len(inputs) != len(rows):
            raise InputError(f"the column input has length {len(inputs)}, expected {len(rows)}")
        contents: dict[str, Array] = {"row": rows, "split": dataset.split}
        if dataset.targets is not None:
            contents["target"] = dataset.targets
        given_ids = None if dataset.ids is None else dataset.ids.given
        if given_ids is not None:
            contents["id.values"], contents["id.offsets"] = given_ids.columns()
        if inputs is not None:
            ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(inputs.lengths())])
            contents["input.values"], contents["input.offsets"] = stand_in(int(ends[-1])), ends
        whole = dataset.whole
        if whole is not None:
            contents["number"] = whole.numbers
        # A second generation is numbered by how many there were, so that a resumed run names its file alike.
        number = self._manifest.generation
        # A name and a hash until the bytes are written, which decide both.
        unwritten = replace(file_of(number, b"-"), bytes=1 + sum(column.nbytes for column in contents.values()))
        entry = DatasetEntry(
            file=unwritten,
            rows=len(rows),
            task=dataset.task,
            class_names=dataset.class_names,
            split_names=dataset.split_names,
            targets=0 if dataset.targets is None or dataset.targets.ndim == 1 else dataset.targets.shape[1],
            has_ids=given_ids is not None,
            has_inputs=inputs is not None,
            whole_rows=None if whole is None else whole.rows,
            whole_hash=None if whole is None else whole.hash,
        )
        if fault := find_fault(entry, contents, len(self._keys[0])):
            raise InputError(fault)
        untold = Counter(set_aside) - Counter(self._manifest.set_aside)
        manifest = self._manifest.with_set_aside([*untold.elements()])
        former = manifest.examples
        # Rows first: the file of a few cannot be said to hold many.
        known = former if self._manifest.complete and former is not None and former.rows == entry.rows else None
        same = known is not None and known == replace(entry, file=known.file)
        if known is not None and same and known.file.sha256 == _hash(_pieces(contents, inputs)):
            with contextlib.suppress(CorruptCacheError):  # damaged since: a new one takes its place
                check(self.path / "examples" / known.file.name, known.file)
                if manifest is not self._manifest:
                    self._commit(manifest)
                return
        entry = replace(entry, file=self._publish_dataset(number, _pieces(contents, inputs)))
        self._commit(replace(manifest, examples=entry, complete=True, generation=number + 1))
        if former is not None and former.file.name != entry.file.name:
            with contextlib.suppress(OSError):  # a reader that still maps it keeps its pages
                os.unlink(self.path / "examples" / former.file.name)

    def _publish(self, folder: str, file: ShardFile, data: bytes) -> None:
        with self._fatal():
            commit(self.path / folder / file.name, data)

    def _publish_dataset(self, number: int, pieces: Iterator[bytes]) -> ShardFile:
        """Publish an examples file, whose name its bytes decide: they are hashed as they are written."""
        hashed = Hashed(number)
        unnamed = self.path / "examples" / f"{number:06d}.h5"
        with self._fatal(), replacing(unnamed, named=lambda: hashed.file().name) as file:
            for piece in pieces:
                file.write(hashed.add(piece))
        return hashed.file()

    def _commit(self, manifest: Manifest) -> None:
        with self._fatal():
            manifest.write(self.path)
        self._manifest = manifest

    @contextlib.contextmanager
    def _fatal(self) -> Iterator[None]:
        """Once a commit has failed, what is on disk is for the next writer to find out."""
        try:
            yield
        except BaseException:
            self._failed = True
            raise

    def _refuse_closed(self) -> None:
        if self._failed:
            raise CacheError(
                f"writing to {self.path} failed before: run the same command again; what was committed is kept"
            )
        if self._lock is None:
            raise CacheError(f"{self.path} is not open for writing: use the writer in a with block")

    def _remove_strays(self) -> None:
        """Remove what a killed writer has published but did not come to name.

        Anything else that the manifest does not name is left alone: it may be what is left of a better manifest.
        """
        named = {(folder, file.name) for folder, file in self._manifest.files()}
        for folder in manifests.FOLDERS:
            for path in (self.path / folder).iterdir():
                stray = FILE_NAME.fullmatch(path.name) and (folder, path.name) not in named
                if stray and folder == "features":
                    stray = int(path.name.split("-")[0]) == len(self._manifest.shards)
                if stray and not path.is_dir():
                    with contextlib.suppress(OSError):
                        os.unlink(path)

    def _refuse_foreign(self) -> None:
        """Raise ``CacheError`` unless a path without a manifest may become a cache: empty, or of a killed first run."""
        refuse_foreign(self.path, "a feature cache", manifests.NAME, manifests.FOLDERS)
        for folder in manifests.FOLDERS:
            inside = self.path / folder
            if inside.is_dir() and any(FILE_NAME.fullmatch(file.name) for file in inside.iterdir()):
                raise CacheError(
                    f"{self.path} holds {folder} but no {manifests.NAME}: "
                    "restore that from a copy, or choose another directory"
                )


def _pieces(columns: Mapping[str, Array], inputs: Contents | None) -> Iterator[bytes]:
    """Yield the bytes of an examples file. Contents come one after the other: they may be more than memory holds."""
    return iter([build(columns)]) if inputs is None else pieces(columns, "input.values", inputs)


def _hash(pieces: Iterator[bytes]) -> str:
    digest = sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def known_rows(
    path: Path | str | None, spec: Mapping[str, object], feature_sets: Sequence[FeatureSet], keys: Keys
) -> Rows:
    """Return what ``CacheWriter.lookup`` would, without a lock and without writing; all -1 where there is no cache."""
    if path is None:
        return np.full(len(keys), -1, np.int64)
    try:
        manifest = manifests.read(Path(path))
    except CacheNotFoundError:
        return np.full(len(keys), -1, np.int64)
    manifest.refuse_other_spec(str(path), spec, feature_sets)
    return RowIndex(stored_keys(StoredShard.all_of(Path(path), manifest))).lookup(keys)


def read_spec(path: Path | str) -> tuple[ExtractionSpec, Mapping[str, object]] | None:
    """Return the spec of a cache and what ran its last shard, complete or not; None where there is no cache."""
    try:
        manifest = manifests.read(Path(path))
    except CacheNotFoundError:
        return None
    spec = manifest.spec.only([feature.name for feature in manifest.feature_sets])  # JSON on disk has sorted keys
    return spec, manifest.shards[-1].provenance if manifest.shards else {}
