"""Features that other tools made, and what is known of their rows, into a cache: streamed, committed, resumed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arguments import checks_arguments
from embedcache.cache import CacheWriter, FeatureCache, read_spec
from embedcache.dataset import Examples
from embedcache.errors import FeatureError, InputError, Interrupted, SpecError, warn
from embedcache.examples import load_examples
from embedcache.extract import Bar, Progress
from embedcache.extract.windows import Rows, new_rows, shard_rows
from embedcache.features import Stored
from embedcache.importing.arrays import Arrays, open_arrays
from embedcache.importing.rows import rows_of
from embedcache.shard import STORED, Array, FeatureSet, encoded, rounded
from embedcache.spec import DTYPES, ExtractionSpec, Origin, checked_identity
from embedcache.wording import counted, shown

FEATURES = "features"
"""The name of the feature set where none is given."""


@dataclass(frozen=True)
class ImportReport:
    """What an import did: rows of the input, those whose features were new, and those that were compared instead."""

    rows: int
    imported: int
    compared: int
    shards: int
    seconds: float
    identity: Mapping[str, object]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON values."""
        return asdict(self)

    def to_text(self, where: Path | str) -> str:
        """Say it in two lines."""
        there = f", {self.compared:,} already there, with the same features" if self.compared else ""
        said = ", ".join(f"{name} {value}" for name, value in self.identity.items())
        return (
            f"{counted(self.rows, 'row')} in {shown(where)}: {self.imported:,} imported{there}; "
            f"{counted(self.shards, 'new shard')}, {self.seconds:.1f} s\nidentity: {shown(said)}"
        )


@checks_arguments(load_examples)
def import_features(
    inputs: Any,
    ids: Any = None,
    *,
    output_dir: Path | str,
    identity: Mapping[str, Any] | None = None,
    array: str | None = None,
    feature: str = FEATURES,
    storage_dtype: str | None = None,
    rows_per_shard: int | None = None,
    progress: Progress | None = None,
    **reading: Any,
) -> FeatureCache:
    """Put features that another tool made into a cache, and return it.

    Args:
        inputs: an array [N, D], or [N, L, D] of L layers; or a ``.npy``, ``.npz``, Parquet or HDF5 file, or a folder of
            them, also as clip-retrieval writes it.
        ids: what is known of the rows, in their order: a CSV, Parquet or other table with ids, labels and splits, or a
            list of ids. None for the tables beside the features, else for the rows' numbers.
        output_dir: the cache to make, to go on with or to extend.
        identity: what made the features, such as ``{"model": "ViT-B-32", "weights": "laion2b"}``: features go into one
            cache where it is the same. None for the hash of the files, with which no others can join.
        array: which array of several, or which columns of a Parquet file.
        feature: the name of the feature set.
        storage_dtype: None for float16 where that is what the input has, else float32.
        rows_per_shard, progress: as in ``extract``.
        reading: ``id_column``, ``label_column``, ``split_column``, ``split`` and other settings of ``load_examples``.

    Rows that the cache has already are compared with what it holds, and only new ones are added.

    Raises:
        InputError: a file that cannot be read, another number of ids than rows, two rows with one id.
        FeatureError: NaN or infinity, or other features than the cache has of a row; names the row.
        SpecMismatchError: the cache there holds features from elsewhere.

    Example::

        ids = [f"product {row}" for row in range(len(X))]
        import_features(X, ids, output_dir="shop.cache", identity={"model": "ViT-B-32", "weights": "laion2b"})
    """
    arrays = open_arrays(inputs, array)
    examples = rows_of(arrays, ids, **reading)
    report = run(
        arrays, examples, output_dir, identity=identity, feature=feature, storage_dtype=storage_dtype,
        rows_per_shard=rows_per_shard, progress=progress,
    )  # fmt: skip
    cache = FeatureCache.open(output_dir)
    cache.notes = (*examples.notes, *report.notes)
    return cache


def run(
    arrays: Arrays,
    examples: Examples,
    output_dir: Path | str,
    *,
    identity: Mapping[str, Any] | None = None,
    feature: str = FEATURES,
    storage_dtype: str | None = None,
    rows_per_shard: int | None = None,
    progress: Progress | None = None,
) -> ImportReport:
    """Bring a cache up to date with ``arrays``, whose rows ``examples`` are; see ``import_features``."""
    start = time.perf_counter()
    described = _feature_set(arrays, feature, storage_dtype)
    digest = arrays.digest()
    said = _identity(identity, digest, output_dir)
    spec = ExtractionSpec(
        source=Origin("import", said, "id").to_json(), storage_dtype=described.dtype, features={described.name: {}}
    )
    provenance = {"source": arrays.source, "sha256": digest}
    with (
        CacheWriter(Path(output_dir), spec, [described]) as writer,
        contextlib.closing(Bar("import") if progress is None else progress) as display,
    ):
        known = writer.lookup(examples.keys)
        todo = new_rows(examples, known)
        display.expect(arrays.rows)
        most = min(shard_rows([described], rows_per_shard), arrays.rows)
        pending = _Pending(writer, examples, described, most, provenance)
        try:
            for rows, block in _blocks(arrays):
                stored = _stored(block, described, rows, examples)
                _refuse_other(writer, stored, rows, known[rows], examples)
                pending.add(rows[known[rows] < 0], stored.values[known[rows] < 0])
                display.advance(len(rows), len(rows))
            pending.finish()
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted: {pending.committed:,} of {len(todo):,} new rows are committed in {output_dir} and stay; "
                "run the same command again to go on from there"
            ) from None
        notes = writer.dropped(examples)
        writer.commit_dataset(examples)
    warn(notes)
    return ImportReport(
        arrays.rows, len(todo), arrays.rows - len(todo), pending.shards, time.perf_counter() - start, said, tuple(notes)
    )


def _feature_set(arrays: Arrays, name: str, storage_dtype: str | None) -> FeatureSet:
    if storage_dtype not in (None, *DTYPES):
        raise SpecError(f"storage_dtype is {storage_dtype!r}: expected one of {', '.join(DTYPES)}")
    dtype = storage_dtype or ("float16" if arrays.dtype == np.float16 else "float32")
    *layers, dim = arrays.row_shape
    return FeatureSet(name, "layers" if layers else "pooled", dim, layers[0] if layers else 1, dtype)


def _identity(given: Mapping[str, Any] | None, digest: str, output_dir: Path | str) -> dict[str, Any]:
    """Return what the user says of the features, else the hash of the files.

    Raises ``InputError`` where the cache there holds others: nothing says that these were made alike.
    """
    if given is not None:
        return checked_identity(given)
    recorded = read_spec(output_dir)
    origin = None if recorded is None or not recorded[1] else recorded[0].origin
    if origin is not None and origin.kind == "import" and origin.identity != {"sha256": digest}:
        hashed = {*origin.identity} == {"sha256"}
        raise InputError(
            f"{output_dir} holds features "
            + ("of other files, of which nothing was said" if hashed else f"with an identity ({origin.to_text()})")
            + ": to say that these were made alike, import "
            + ("all of them into a new cache with one" if hashed else "them with the same")
            + " --identity NAME=VALUE (identity=...)"
        )
    return {"sha256": digest}


def _blocks(arrays: Arrays) -> Iterator[tuple[Rows, Array]]:
    start = 0
    for block in arrays.blocks():
        yield np.arange(start, start + len(block)), block
        start += len(block)


def _stored(block: Array, feature: FeatureSet, rows: Rows, examples: Examples) -> Stored:
    """Return a block as it is stored. Raises ``FeatureError`` for a value that cannot be, naming its row."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.ascontiguousarray(block, np.float32)
        stored = Stored(feature, encoded(rounded(values, feature.dtype), feature.dtype))
    if (row := stored.first_non_finite()) is not None:
        given = "NaN or infinity" if not np.isfinite(block[row]).all() else f"a value too large for {feature.dtype}"
        place = int(rows[row])
        raise FeatureError(
            f"row {place} (id {examples.ids[place]!r}) holds {given}, which no head can use: mend or leave out the "
            "row; what was committed is kept"
        )
    return stored


def _refuse_other(writer: CacheWriter, stored: Stored, rows: Rows, known: Rows, examples: Examples) -> None:
    """Raise ``FeatureError`` for the first row that differs from what is stored at its place ``known``, -1: new."""
    here = np.flatnonzero(known >= 0)
    if not len(here):
        return
    there = writer.take(known[here], stored.feature)
    differs = (Stored(stored.feature, stored.values[here]).decoded().values != there).reshape(len(here), -1).any(axis=1)
    if differs.any():
        place = int(rows[here[int(np.flatnonzero(differs)[0])]])
        raise FeatureError(
            f"row {place} (id {examples.ids[place]!r}) has other features than {writer.path} holds of that id: "
            "import into another cache, or give the row another id"
        )


@dataclass
class _Pending:
    """New rows until they fill a shard. Where one ends depends on the rows from its start on alone."""

    writer: CacheWriter
    examples: Examples
    feature: FeatureSet
    most: int
    provenance: Mapping[str, object]
    committed: int = 0
    shards: int = 0
    _count: int = 0

    def __post_init__(self) -> None:
        # One array for all shards: what is not written to takes no memory.
        self._rows = np.empty(self.most, np.int64)
        self._values = np.empty((self.most, *self.feature.row_shape), STORED[self.feature.dtype])

    def add(self, rows: Rows, values: Array) -> None:
        """Take rows, int64 [n], and their features as they are stored; commit what fills shards."""
        while len(rows):
            room = self.most - self._count
            end = self._count + len(rows[:room])
            self._rows[self._count : end], self._values[self._count : end] = rows[:room], values[:room]
            rows, values, self._count = rows[room:], values[room:], end
            if self._count == self.most:
                self.finish()

    def finish(self) -> None:
        """Commit what there is as a shard."""
        if not self._count:
            return
        features = {self.feature.name: Stored(self.feature, self._values[: self._count])}
        self.writer.append(self.examples.keys[self._rows[: self._count]], features, self.provenance)
        self.committed, self.shards, self._count = self.committed + self._count, self.shards + 1, 0
