"""One HDF5 file of plain arrays: build its bytes, commit them atomically, find the arrays in it again.

A shard is immutable. Its bytes are built in memory, hashed, and only then put on disk, so that nothing that can go
wrong with a disk or a process can leave half of one under its final name. ``place`` is for files whose hash has been
compared already: libhdf5 can hang on damaged metadata. ``FORMAT.md`` specifies the layout.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import math
import mmap
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from embedcache.errors import CacheError, CorruptCacheError, SpecError
from embedcache.journal import explain, explained
from embedcache.wording import counted, listed

Array = npt.NDArray[Any]
Kind = Literal["pooled", "layers", "tokens"]

ALIGNMENT = 4096
_MAP_FIXED = 0x10
_PIECE = 1 << 20
STORED: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}
# "." is not a name in HDF5 but the group itself, so a name starts with a letter or a digit.
_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9@:+._-]{0,99}")


@dataclass(frozen=True)
class Column:
    """What one array of a file must be. A length of None is any length."""

    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]
    attributes: Mapping[str, str] = field(default_factory=dict)

    def fits(self, array: Placed) -> bool:
        """Whether an array in a file is of this type and shape."""
        return array.dtype == self.dtype.str and self.has_shape(array.shape)

    def has_shape(self, shape: tuple[int, ...]) -> bool:
        """Whether a shape is this one."""
        return len(shape) == len(self.shape) and all(
            expected in (None, length) for expected, length in zip(self.shape, shape, strict=True)
        )


@dataclass(frozen=True)
class FeatureSet:
    """One feature set of a cache.

    ``kind`` is ``pooled`` ([n, dim]), ``layers`` ([n, layers, dim]) or ``tokens`` ([sum T, dim], rows of different
    lengths); ``layers`` is 1 unless ``kind`` says so; ``dtype`` is what is stored: float32, float16 or bfloat16.

    Raises ``SpecError`` for values that no set can have.
    """

    name: str
    kind: Kind
    dim: int
    layers: int
    dtype: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _SET_NAME.fullmatch(self.name):
            raise SpecError(f"feature set name {self.name!r}: expected at most 100 letters, digits and @ : + . _ -")
        if self.kind not in get_args(Kind) or self.dtype not in STORED:
            raise SpecError(f"feature set {self.name}: no kind {self.kind!r} stored as {self.dtype!r}")
        for count in (self.dim, self.layers):
            if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count < 2**31:
                raise SpecError(f"feature set {self.name}: dim {self.dim!r}, layers {self.layers!r}: expected numbers")
        if self.layers != 1 and self.kind != "layers":
            raise SpecError(f"feature set {self.name}: {counted(self.layers, 'layer')}, but its kind is {self.kind}")

    @property
    def for_blocks(self) -> bool:
        """Whether these are hidden states that the last blocks are trained from, which heads read only by name."""
        return self.kind == "tokens" and self.name.removeprefix("l2:").startswith("states@")

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row, or of one token's vector."""
        return (self.layers, self.dim) if self.kind == "layers" else (self.dim,)

    def columns(self, rows: int) -> dict[str, Column]:
        """Return the arrays that hold ``rows`` rows of the set, by name."""
        attributes = {"dtype": "bfloat16"} if self.dtype == "bfloat16" else {}
        if self.kind == "tokens":
            return {
                f"{self.name}.values": Column((None, self.dim), STORED[self.dtype], attributes),
                f"{self.name}.offsets": Column((rows + 1,), np.dtype("<i8")),
            }
        return {self.name: Column((rows, *self.row_shape), STORED[self.dtype], attributes)}


@dataclass(frozen=True)
class Placed:
    """Where an array lies in a file."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    def map(self, path: Path, file: IO[bytes] | None = None) -> Array:
        """Map the array, read-only, out of ``file`` where it is open already; the map keeps no file open.

        Raises ``CorruptCacheError`` where the file is too short, ``CacheError`` where it cannot be read.
        """
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        with contextlib.ExitStack() as stack, explained(f"cannot read {path}"):
            opened = file if file is not None else stack.enter_context(open(path, "rb", buffering=0))
            length = math.prod(self.shape) * np.dtype(self.dtype).itemsize
            if os.fstat(opened.fileno()).st_size < self.offset + length:
                raise CorruptCacheError(f"{path} ends early: restore it from a copy")
            before = self.offset % mmap.PAGESIZE
            pages = Pages.reserve(before + length)
            if pages is None or not pages.lay(0, before + length, opened.fileno(), self.offset - before):
                return np.memmap(opened, self.dtype, "r", self.offset, self.shape)
            array: Array = np.ndarray.__new__(np.memmap, self.shape, self.dtype, pages.buffer, before)
            # What numpy's own maps have, by which a worker process maps the same file instead of getting a copy.
            vars(array).update(filename=Path(path).resolve(), offset=self.offset, mode="r", _mmap=pages.buffer)
            return array


@dataclass(frozen=True)
class Pages:
    """Memory that files are laid into, read-only. Python unmaps all of it when the last array goes.

    Python's own maps each keep a file open, and a process may have 1,024: a cache may have more shards.
    """

    buffer: mmap.mmap
    address: int

    @classmethod
    def reserve(cls, size: int) -> Pages | None:
        """Return room for ``size`` bytes; None where the system has no such thing: not 64-bit Linux."""
        if sys.platform != "linux" or sys.maxsize <= 2**32:
            return None
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        try:
            buffer = mmap.mmap(-1, size, flags=flags, prot=mmap.PROT_READ)
            return cls(buffer, np.frombuffer(buffer, np.uint8).__array_interface__["data"][0])
        except (ValueError, OSError):
            return None

    def lay(self, start: int, size: int, descriptor: int, offset: int) -> bool:
        """Put ``size`` bytes of a file from ``offset``, whole pages, at ``start``. False where that fails."""
        call = ctypes.CDLL(None, use_errno=True).mmap
        call.restype = ctypes.c_void_p
        call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
        flags = mmap.MAP_SHARED | _MAP_FIXED
        return bool(call(self.address + start, size, mmap.PROT_READ, flags, descriptor, offset) == self.address + start)


def decoded(values: Array, out: Array | None = None) -> Array:
    """Return stored values as float32, exactly; uint16 are the bits of bfloat16.

    They are written into ``out``, float32 of the same shape, where it is given; float32 alone are themselves.
    """
    if out is None and values.dtype == np.float32:
        return values
    if out is None:
        out = np.empty(values.shape, np.float32)
    if values.dtype == np.uint16:  # the upper half of a float32
        np.left_shift(values, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        out[...] = values
    return out


def rises(offsets: Array, length: int) -> bool:
    """Whether offsets rise from 0 to ``length``."""
    # Compared, not subtracted: a difference of hostile numbers wraps around.
    if not len(offsets) or int(offsets[0]) != 0 or int(offsets[-1]) != length:
        return False
    return not bool((offsets[1:] < offsets[:-1]).any())


def encoded(values: Array, dtype: str) -> Array:
    """Return float32 values that a storage type holds exactly, in that type."""
    if dtype == "bfloat16":
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(STORED[dtype])
    return values.astype(STORED[dtype])


def rounded(values: Array, dtype: str) -> npt.NDArray[np.float32]:
    """Return float32 values as a storage type holds them, in float32: to nearest, ties to even."""
    if dtype == "float32":
        return np.asarray(values, np.float32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    # Half of what is cut off, or a little less where the last bit kept is even: adding it carries as rounding does.
    carried = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32)
    return np.where(np.isfinite(values), carried.view(np.float32), values).astype(np.float32)


def refuse_colliding(sets: Sequence[FeatureSet]) -> None:
    """Raise ``SpecError`` unless there is a set and all arrays have names of their own."""
    names = ["row_key", *(name for feature in sets for name in feature.columns(1))]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not sets:
        raise SpecError(f"two feature sets would both be stored as {twice[0]}" if twice else "there is no feature set")


def build(arrays: Mapping[str, Array], attributes: Mapping[str, Mapping[str, str]] | None = None) -> bytes:
    """Return the bytes of one HDF5 file: equal arrays, equal bytes.

    Root-level, contiguous, uncompressed, little-endian, in the order given; an array of 4,096 bytes or more starts at
    a multiple of 4,096. ``attributes`` are ASCII strings by array and name.
    """
    buffer = io.BytesIO()
    _write(buffer, arrays, attributes or {})
    return buffer.getvalue()


def pieces(arrays: Mapping[str, Array], large: str, contents: Iterable[bytes]) -> Iterator[bytes]:
    """Yield what ``build`` returns piece by piece, for an array of bytes that need not fit in memory.

    ``arrays`` has it by the name ``large`` as nothing but its shape (see ``stand_in``); its bytes are those of
    ``contents``, one behind the other.
    """
    length = len(arrays[large])
    # What HDF5 writes around the array, with a hole in its place, which takes no room.
    with explained(f"cannot write in {tempfile.gettempdir()}"), tempfile.TemporaryFile(prefix="embedcache-") as file:
        start = _write(file, arrays, {}, large)
        file.seek(0)
        before = file.read(start)
        file.seek(start + length)
        behind = file.read()
    yield before
    piece, left = bytearray(), length
    for content in contents:
        piece += content
        if len(piece) >= _PIECE:
            left -= len(piece)
            yield bytes(piece)
            piece.clear()
    if left != len(piece):
        raise ValueError(f"{large} has {length - left + len(piece)} bytes, expected {length}")
    yield bytes(piece)
    yield behind


def stand_in(length: int) -> Array:
    """Return an array u1 [length] that takes no memory."""
    return np.broadcast_to(np.uint8(0), (length,))


def _write(
    into: IO[bytes], arrays: Mapping[str, Array], attributes: Mapping[str, Mapping[str, str]], hole: str | None = None
) -> int:
    """Write an HDF5 file, but for the values of the array ``hole``, and return where these begin, 0 for none."""
    import h5py

    start = 0
    with h5py.File(into, "w", alignment_threshold=ALIGNMENT, alignment_interval=ALIGNMENT) as file:
        for name, array in arrays.items():
            kind = array.dtype.newbyteorder("<")
            layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            layout.set_layout(h5py.h5d.CONTIGUOUS)
            layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            layout.set_obj_track_times(False)  # a time would make equal arrays different bytes
            space = h5py.h5s.create_simple(array.shape)
            dataset = h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(kind), space, layout)
            if name == hole:
                start = int(dataset.get_offset() or 0)
            elif array.size:
                dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ascontiguousarray(array, kind))
            for key, value in attributes.get(name, {}).items():
                text = h5py.h5t.C_S1.copy()
                text.set_size(len(value))
                text.set_strpad(h5py.h5t.STR_NULLPAD)
                attribute = h5py.h5a.create(dataset, key.encode(), text, h5py.h5s.create(h5py.h5s.SCALAR))
                attribute.write(np.array(value.encode("ascii")), mtype=text)
    return start


def place(path: Path, expected: Mapping[str, Column], file: IO[bytes] | None = None) -> dict[str, Placed]:
    """Find each array of a file whose hash has been compared, refusing whatever is not a plain array.

    Exactly the arrays of ``expected`` may be in the file. ``file`` is the file where it is open already: its name may
    be gone by now.

    Raises ``CorruptCacheError`` for groups, soft and external links, virtual, chunked, compact or filtered layouts,
    external storage, attributes, other names, shapes, types or byte orders, and space outside the file.
    """
    import h5py

    try:
        # Published files never change, so libhdf5 needs no lock of its own, which some network file systems lack.
        with h5py.File(file or path, "r", **({} if file else {"locking": False})) as opened:
            return _find(opened.id, os.fstat(file.fileno()).st_size if file else path.stat().st_size, expected)
    except _Foreign as reason:
        raise CorruptCacheError(f"{path}: {reason}: {_FOREIGN}") from None
    # h5py has all of them for HDF5's own errors.
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, ArithmeticError, SystemError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno:
            raise CacheError(f"cannot read {path}: {explain(error)}") from error
        message = " ".join(str(error).split())
        raise CorruptCacheError(f"{path}: HDF5 cannot read it ({message}): {_FOREIGN}") from None


_FOREIGN = "embedcache did not write this file; do not use the cache"


class _Foreign(Exception):
    """Why embedcache did not write a file."""


def _find(file: Any, size: int, expected: Mapping[str, Column]) -> dict[str, Placed]:
    """Find the arrays of an open file of ``size`` bytes; see ``place``."""
    import h5py

    names = [name.decode("utf-8", "replace") for name in file]
    if set(names) != set(expected):
        there, wanted = (listed(map(repr, sorted(every)), 12) for every in (names, expected))
        raise _Foreign(f"it holds {there or 'nothing'}, expected {wanted}")
    if h5py.h5a.get_num_attrs(file):
        raise _Foreign("it has attributes")
    placed = {}
    for name, column in expected.items():
        # The link is looked at before it is followed: following is what would read another file.
        if file.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
            raise _Foreign(f"{name} is a link to somewhere else")
        if h5py.h5o.get_info(file, name.encode()).type != h5py.h5o.TYPE_DATASET:
            raise _Foreign(f"{name} is not an array")
        dataset = h5py.h5d.open(file, name.encode())
        layout = dataset.get_create_plist()
        if layout.get_layout() != h5py.h5d.CONTIGUOUS or layout.get_nfilters() or layout.get_external_count():
            raise _Foreign(f"{name} is not stored as one plain run of numbers")
        if _attributes(dataset) != dict(column.attributes):
            raise _Foreign(f"{name} has other attributes than {dict(column.attributes)}")
        if not dataset.get_type().equal(h5py.h5t.py_create(column.dtype)):
            raise _Foreign(f"{name} is not of type {column.dtype.str}")
        if dataset.shape is None:
            raise _Foreign(f"{name} has no shape")
        shape = tuple(int(length) for length in dataset.shape)
        if not column.has_shape(shape):
            raise _Foreign(f"{name} has the shape {shape}, expected {column.shape}")
        length = math.prod(shape) * column.dtype.itemsize
        offset = dataset.get_offset()
        if length and (offset is None or dataset.get_storage_size() != length or offset + length > size):
            raise _Foreign(f"{name} does not lie whole inside the file")
        placed[name] = Placed(int(offset or 0), shape, column.dtype.str)
    return placed


def _attributes(dataset: Any) -> dict[str, str] | None:
    """Return the short fixed-length strings an array is annotated with, or None when there is anything else."""
    import h5py

    attributes = {}
    for index in range(h5py.h5a.get_num_attrs(dataset)):
        attribute = h5py.h5a.open(dataset, index=index)
        kind = attribute.get_type()
        plain = isinstance(kind, h5py.h5t.TypeStringID) and not kind.is_variable_str() and kind.get_size() <= 64
        if not plain or attribute.get_space().get_simple_extent_type() != h5py.h5s.SCALAR:
            return None
        value = np.zeros((), f"S{kind.get_size()}")
        attribute.read(value, mtype=kind)
        attributes[attribute.name.decode("utf-8", "replace")] = value.item().decode("utf-8", "replace")
    return attributes
