"""One HDF5 file of plain arrays: build its bytes, commit them atomically, check them, map them.

A shard is immutable. Its bytes are built in memory, hashed, and only then put on disk, so that nothing that can go
wrong with a disk or a process can leave half of one under its final name. Reading never trusts libhdf5 with bytes
whose hash has not been compared first. ``FORMAT.md`` specifies the layout.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from embedcache.errors import CacheError, CorruptCacheError
from embedcache.fingerprint import sha256_bytes, sha256_file

Array = npt.NDArray[Any]
Kind = Literal["pooled", "layers", "tokens"]

ALIGNMENT = 4096
STORED = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}
FILE_NAME = re.compile(r"\d{6}-[0-9a-f]{16}\.h5")
_ALLOWED = ("<f4", "<f2", "<f8", "<u2", "|u1", "<i8")


@dataclass(frozen=True)
class FeatureSet:
    """One feature set of a cache. ``layers`` is 1 unless ``kind`` is ``layers``; ``dtype`` is what is stored."""

    name: str
    kind: Kind
    dim: int
    layers: int
    dtype: str

    def datasets(self, rows: int) -> dict[str, tuple[tuple[int | None, ...], np.dtype[Any]]]:
        """Return the datasets that hold ``rows`` rows of the set: name -> (shape, dtype); None is any length."""
        stored = STORED[self.dtype]
        if self.kind == "tokens":
            return {f"{self.name}.values": ((None, self.dim), stored), f"{self.name}.offsets": ((rows + 1,), np.dtype("<i8"))}
        shape = (rows, self.layers, self.dim) if self.kind == "layers" else (rows, self.dim)
        return {self.name: (shape, stored)}


@dataclass(frozen=True)
class ShardFile:
    """A committed file: its name in its directory, its size and its hash."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Placed:
    """Where an array lies in a file."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    def map(self, path: Path) -> Array:
        """Map the array, read-only."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(path, self.dtype, "r", self.offset, self.shape)


def build(arrays: Mapping[str, Array]) -> bytes:
    """Return the bytes of one HDF5 file: equal arrays, equal bytes.

    Root-level, contiguous, uncompressed, little-endian, each array's data at a multiple of 4,096 bytes.
    """
    import h5py

    file_access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    file_access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", alignment_threshold=ALIGNMENT, alignment_interval=ALIGNMENT, track_order=False) as file:
        for name, array in arrays.items():
            little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            # Late allocation would let libhdf5 leave an empty array without a place.
            layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            layout.set_layout(h5py.h5d.CONTIGUOUS)
            layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            layout.set_obj_track_times(False)
            dataset = h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(little.dtype), h5py.h5s.create_simple(little.shape), layout)
            if little.size:
                dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, little)
    return buffer.getvalue()


def publish(directory: Path, stem: str, data: bytes) -> ShardFile:
    """Commit ``data`` as ``STEM-<sha16>.h5`` in ``directory``; see ``commit``."""
    digest = sha256_bytes(data)
    name = f"{stem}-{digest[:16]}.h5"
    commit(directory / name, data)
    return ShardFile(name, len(data), digest)


def commit(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` so that after a crash either all of it is there or nothing is.

    Temporary in the same directory (``O_EXCL``) -> write -> fsync -> replace -> fsync(directory). A failed fsync is
    never retried: the kernel may have dropped the pages, and a second call would report success.

    Raises ``CacheError`` when the disk is full, read-only or broken; the temporary is then removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            view = memoryview(data)
            while len(view):
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CacheError(f"cannot write {path}: {explain(error)}") from error


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explain(error: OSError) -> str:
    """Say what an operating system's error means and what to do."""
    advice = {
        errno.ENOSPC: "the disk is full: free some space and run the same command again; what was committed is kept",
        errno.EDQUOT: "your disk quota is used up: free some space and run the same command again; what was committed is kept",
        errno.EFBIG: "the file is larger than this file system or its limit allows: use a smaller --shard-rows",
        errno.EACCES: "permission denied: choose a directory that you may write to",
        errno.EPERM: "permission denied: choose a directory that you may write to",
        errno.EROFS: "the file system is read-only: choose another directory",
        errno.ENOTDIR: "a part of the path is a file, not a directory: choose another one",
        errno.EIO: "the disk reports an error: check it, then run the same command again; what was committed is kept",
    }
    return advice.get(error.errno or 0, error.strerror or str(error))


def check(path: Path, entry: ShardFile) -> None:
    """Hash a committed file. Raises ``CorruptCacheError`` when it is missing, of another size, or changed."""
    check_size(path, entry)
    if sha256_file(path) != entry.sha256:
        raise CorruptCacheError(f"{path} is not what was committed (its sha256 differs): restore it from a copy, or extract again")


def check_size(path: Path, entry: ShardFile) -> None:
    """Compare a file's presence, type and size with what was committed."""
    if path.is_symlink() or not path.is_file():
        state = "is a link, not a file" if path.is_symlink() else "is missing"
        raise CorruptCacheError(f"{path} {state}: restore it from a copy, or extract again")
    size = path.stat().st_size
    if size != entry.bytes:
        raise CorruptCacheError(f"{path} has {size:,} bytes, {entry.bytes:,} were committed: restore it from a copy, or extract again")


def place(path: Path, expected: Mapping[str, tuple[tuple[int | None, ...], np.dtype[Any]]]) -> dict[str, Placed]:
    """Find each array of a file whose hash has been compared, refusing whatever a plain array is not.

    ``expected`` maps a name to its shape (None: any length) and dtype. Nothing else may be in the file.

    Raises ``CorruptCacheError`` for groups, soft and external links, virtual, chunked, compact or filtered layouts,
    external storage, attributes, other names, shapes, types or byte orders, and space that was never written.
    """
    import h5py

    def refuse(reason: str) -> CorruptCacheError:
        return CorruptCacheError(f"{path}: {reason}: this file was not written by embedcache; do not use the cache")

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise refuse(f"not a readable HDF5 file ({error})") from None
    with file:
        names = [name.decode("utf-8", "replace") for name in file.id]
        if set(names) != set(expected):
            raise refuse(f"holds {sorted(names)}, expected {sorted(expected)}")
        if len(file.attrs):
            raise refuse("has attributes")
        size = path.stat().st_size
        found = {}
        for name, (shape, dtype) in expected.items():
            link = file.id.links.get_info(name.encode())
            if link.type != h5py.h5l.TYPE_HARD:
                raise refuse(f"{name} is a link to somewhere else")
            if h5py.h5o.get_info(file.id, name.encode()).type != h5py.h5o.TYPE_DATASET:
                raise refuse(f"{name} is not an array")
            dataset = h5py.h5d.open(file.id, name.encode())
            layout = dataset.get_create_plist()
            if layout.get_layout() != h5py.h5d.CONTIGUOUS or layout.get_nfilters() or layout.get_external_count():
                raise refuse(f"{name} is not stored as one plain run of numbers")
            if h5py.h5a.get_num_attrs(dataset):
                raise refuse(f"{name} has attributes")
            stored = dataset.get_type()
            if not isinstance(stored, (h5py.h5t.TypeIntegerID, h5py.h5t.TypeFloatID)) or stored.dtype.str not in _ALLOWED or stored.dtype != dtype:
                raise refuse(f"{name} is not of type {dtype.str}")
            there = tuple(int(length) for length in dataset.shape)
            if len(there) != len(shape) or any(want is not None and want != have for want, have in zip(shape, there, strict=True)):
                raise refuse(f"{name} has shape {there}, expected {shape}")
            count = int(np.prod(there, dtype=object))
            offset = dataset.get_offset()
            if count and (offset is None or dataset.get_storage_size() != count * dtype.itemsize or offset + count * dtype.itemsize > size):
                raise refuse(f"{name} does not lie whole inside the file")
            found[name] = Placed(int(offset or 0), there, dtype.str)
    return found
