"""Writing a cache: one writer at a time, shards and datasets committed one after the other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedcache.cache import manifest as manifests
from embedcache.cache.index import Keys, RowIndex, Rows
from embedcache.cache.manifest import Dataset, Manifest, Shard
from embedcache.cache.reader import stored_keys
from embedcache.errors import CacheError, CacheLockedError, CacheNotFoundError, FeatureError, InputError
from embedcache.shard import FeatureSet, build, explain, publish

if TYPE_CHECKING:
    from embedcache.examples import Examples

try:
    import fcntl
except ImportError:  # Windows: the lock is left out, and FORMAT.md says so
    fcntl = None  # type: ignore[assignment]


class CacheWriter:
    """A cache opened for writing, as a context manager: made if it is not there, refused if it is made another way.

    Raises:
        SpecMismatchError: features there were made by another spec; the message names each field that differs.
        CacheLockedError: another process is writing.
        CacheError: the directory cannot be written.
    """

    def __init__(self, path: Path | str, spec: Mapping[str, Any], feature_sets: Sequence[FeatureSet]) -> None:
        self.path = Path(path)
        self._spec, self._sets = dict(spec), tuple(feature_sets)
        self._lock: int | None = None
        self._manifest = Manifest(self._spec, self._sets)
        self._index: RowIndex | None = None
        self._rows = 0

    def __enter__(self) -> CacheWriter:
        if self.path.exists() and not (self.path / manifests.NAME).exists() and not _is_ours(self.path):
            raise CacheError(f"{self.path} exists and is no feature cache: choose a new or an empty directory")
        self._read()  # refuses another spec before anything is written
        try:
            for folder in (self.path, self.path / "features", self.path / "examples"):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"cannot make {self.path}: {explain(error)}") from None
        self._lock = lock(self.path)
        try:
            self._manifest = self._read() or self._manifest
            self._sweep()
            if not self._manifest.shards:
                self._commit(self._manifest)
            self._rows = sum(shard.rows for shard in self._manifest.shards)
            self._index = RowIndex(stored_keys(self.path, self._manifest))
        except BaseException:
            self.__exit__()
            raise
        return self

    def _read(self) -> Manifest | None:
        """Return the manifest there is, None where no row was ever committed. Raises ``SpecMismatchError``."""
        try:
            found = manifests.read(self.path)
        except CacheNotFoundError:
            return None
        if not found.shards:
            return None
        found.refuse_other_spec(str(self.path), self._spec, self._sets)
        return found

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def lookup(self, keys: Keys) -> Rows:
        """Return the place of each row key [n, 16] in the cache, int64 [n], -1 for none."""
        if self._index is None:
            self._index = RowIndex(stored_keys(self.path, self._manifest))
        return self._index.lookup(keys)

    def append(self, keys: Keys, arrays: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        """Commit one shard: ``keys`` [n, 16], and for each feature set [n, D], [n, L, D] or (values, offsets).

        Raises ``FeatureError`` for a wrong shape, a wrong type, NaN or infinity.
        """
        contents: dict[str, npt.NDArray[Any]] = {"row_key": np.ascontiguousarray(keys, np.uint8)}
        for each in self._sets:
            value = arrays[each.name]
            parts = value if isinstance(value, tuple) else (value,)
            for (name, (shape, dtype)), array in zip(each.datasets(len(keys)).items(), parts, strict=True):
                refuse_misfit(name, array, shape, dtype)
                contents[name] = array
            refuse_non_finite(each, parts[0])
            if len(parts) == 2 and (parts[1][0] != 0 or parts[1][-1] != len(parts[0]) or (np.diff(parts[1]) < 0).any()):
                raise FeatureError(f"{each.name}: offsets must rise from 0 to {len(parts[0])}")
        file = publish(self.path / "features", f"{len(self._manifest.shards):06d}", build(contents))
        self._commit(self._manifest.with_shard(Shard(file, len(keys), dict(provenance))))
        self._rows += len(keys)
        self._index = None

    def finish(self, examples: Examples, *, keep_inputs: bool = False) -> None:
        """Commit a dataset whose rows are all in the cache, in place of the one before.

        A dataset equal to the current one changes no byte. Raises ``InputError`` when rows are not in the cache.
        """
        inputs = _packed(examples.contents()) if keep_inputs else None
        numbers = getattr(examples, "numbers", None)
        self.commit_dataset(
            examples.keys, examples.targets, examples.task, examples.class_names, examples.split, examples.split_names,
            ids=None if examples.ids.data is None else (examples.ids.data, examples.ids.offsets),
            inputs=inputs, numbers=numbers,
        )  # fmt: skip

    def commit_dataset(
        self,
        keys: Keys,
        targets: npt.NDArray[Any] | None,
        task: str | None,
        class_names: Sequence[str],
        split: npt.NDArray[np.uint8],
        split_names: Sequence[str],
        *,
        ids: tuple[Any, Any] | None = None,
        inputs: tuple[Any, Any] | None = None,
        numbers: Rows | None = None,
    ) -> None:
        """Commit a dataset given by its columns; see ``finish``. ``numbers`` marks a part, to be merged later."""
        rows = self.lookup(keys)
        missing = int((rows < 0).sum())
        if missing:
            first = int(np.flatnonzero(rows < 0)[0])
            raise InputError(
                f"{missing:,} of {len(keys):,} rows are not in {self.path} (the first is row {first}): "
                f"extract them first with embedcache extract INPUT -o {self.path}"
            )
        contents: dict[str, npt.NDArray[Any]] = {"row": rows, "split": np.asarray(split, np.uint8)}
        if task is not None and targets is not None:
            contents["target"] = np.asarray(targets, {"classification": "<i8", "multilabel": "u1", "regression": "<f8"}[task])
        for name, packed in (("id", ids), ("input", inputs)):
            if packed is not None:
                contents[f"{name}.values"], contents[f"{name}.offsets"] = np.asarray(packed[0], np.uint8), np.asarray(packed[1], np.int64)
        if numbers is not None:
            contents["number"] = np.asarray(numbers, np.int64)
        columns = contents["target"].shape[1] if "target" in contents and contents["target"].ndim == 2 else 0
        data = build(contents)
        former = self._manifest.examples
        facts = (len(keys), task if "target" in contents else None, tuple(class_names), tuple(split_names), columns, ids is not None, inputs is not None, numbers is not None)
        if former is not None and self._manifest.complete:
            from embedcache.fingerprint import sha256_bytes

            if former == Dataset(replace(former.file, bytes=len(data), sha256=sha256_bytes(data)), *facts):
                return
        # A second generation is numbered by how many there were, so that a resumed run names its file alike.
        file = publish(self.path / "examples", f"{self._manifest.generation:06d}", data)
        self._commit(replace(self._manifest, examples=Dataset(file, *facts), complete=True, generation=self._manifest.generation + 1))
        if former is not None and former.file.name != file.name:
            with contextlib.suppress(OSError):  # a reader that still maps it keeps its pages
                (self.path / "examples" / former.file.name).unlink()

    def _commit(self, manifest: Manifest) -> None:
        manifest.write(self.path)
        self._manifest = manifest

    def _sweep(self) -> None:
        """Remove what a killed writer left: temporaries, and files that were published but never named."""
        named = {(folder, file.name) for folder, file in self._manifest.files()}
        for folder in ("", "features", "examples"):
            for found in (self.path / folder).iterdir():
                ours = found.name.endswith(".tmp") and found.name.startswith(".")
                stray = folder != "" and found.suffix == ".h5" and (folder, found.name) not in named
                if (ours or stray) and found.is_file():
                    found.unlink()


def lock(path: Path) -> int:
    """Take the writer's lock on a cache directory. Raises ``CacheLockedError`` at once when another process has it."""
    descriptor = os.open(path, os.O_RDONLY)
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise CacheLockedError(f"another process is writing to {path}: wait for it, or stop it") from None
    return descriptor


def _is_ours(path: Path) -> bool:
    """Whether a directory without a manifest may become a cache: it is empty, or a killed first run's."""
    return path.is_dir() and all(
        found.name in ("features", "examples") or (found.name.startswith(".manifest.json.") and found.name.endswith(".tmp"))
        for found in path.iterdir()
    )


def refuse_misfit(name: str, array: Any, shape: tuple[int | None, ...], dtype: np.dtype[Any]) -> None:
    """Raise ``FeatureError`` unless an array has the shape (None: any length) and type its feature set declares."""
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    if not fits or array.dtype != dtype:
        raise FeatureError(f"{name}: got {array.dtype} {array.shape}, expected {dtype} {shape}")


def refuse_non_finite(feature: FeatureSet, values: npt.NDArray[Any]) -> None:
    """Raise ``FeatureError`` naming the set and the first row that holds NaN or infinity."""
    wrong = (values & 0x7F80) == 0x7F80 if feature.dtype == "bfloat16" else ~np.isfinite(values)
    if wrong.any():
        row = int(np.flatnonzero(wrong.reshape(len(values), -1).any(axis=1))[0])
        raise FeatureError(f"{feature.name}: row {row} holds NaN or infinity, which no head can use")


def _packed(contents: Iterator[bytes]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    data = bytearray()
    ends = [0]
    for content in contents:
        data += content
        ends.append(len(data))
    return np.frombuffer(data, np.uint8), np.array(ends, np.int64)


def known_rows(path: Path | str | None, spec: Mapping[str, Any], feature_sets: Sequence[FeatureSet], keys: Keys) -> Rows:
    """Return what ``CacheWriter.lookup`` would, without a lock and without writing; all -1 where there is no cache."""
    if path is None:
        return np.full(len(keys), -1, np.int64)
    try:
        manifest = manifests.read(Path(path))
    except CacheNotFoundError:
        return np.full(len(keys), -1, np.int64)
    manifest.refuse_other_spec(str(path), spec, feature_sets)
    return RowIndex(stored_keys(Path(path), manifest)).lookup(keys)


def read_spec(path: Path | str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the spec of a cache and what ran its last shard, complete or not; None where there is no cache."""
    try:
        manifest = manifests.read(Path(path))
    except CacheNotFoundError:
        return None
    return dict(manifest.spec), dict(manifest.shards[-1].provenance) if manifest.shards else {}


