"""Features as values that were checked once: dense, ragged, or on disk.

=========  ==========================================================  ======================================
type       what it holds                                               where it comes from
=========  ==========================================================  ======================================
`Dense`    one array, float32 or float64 [N, D] or [N, L, D]           pooled and multi-layer feature sets
`Ragged`   values [sum T, D] and offsets [N + 1]                       token-level feature sets
`OnDisk`   a reader that gives rows when it is asked for them          features that do not fit in memory
=========  ==========================================================  ======================================

``features_of`` makes one of them of whatever came in from outside, and is the only place that looks at what that is.
`Stored` are dense or ragged rows in the type that a shard holds, between the backbone and the cache.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from embedcache.errors import FeatureError, InputError
from embedcache.shard import STORED, FeatureSet, decoded, rises

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

LARGEST = 1e30
"""The largest feature: what training makes of it is still a number in float32."""

READ_BYTES = 16 << 20
"""How much is read from disk at once where rows are read in their order."""
_VECTOR_BYTES = 4 << 20
_CHECK_BYTES = 16 << 20


@runtime_checkable
class Reader(Protocol):
    """Features that are read when they are needed, by row."""

    def __len__(self) -> int: ...
    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row: (D,) or (L, D)."""
        ...

    def read(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Return some rows (int64, in any order), float32 [n, ...]."""
        ...


class Features(ABC):
    """Features of N rows. What is common to ``Dense``, ``Ragged`` and ``OnDisk``."""

    feature: FeatureSet

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, rows: Rows) -> Features:
        """Return some rows, int64 [n] in any order, as features of the same type."""

    @abstractmethod
    def blocks(self, multiple: int = 1) -> Iterator[InMemory]:
        """Yield all rows in their order, in parts that are in memory; what is in memory already is one part.

        A part that is read has a multiple of so many rows, but for the last.
        """

    @abstractmethod
    def vectors(self) -> Iterator[Array]:
        """Yield all vectors in their order, [n, D], in parts of a few megabytes."""

    @abstractmethod
    def of_vectors(self, weight: Array) -> Floats:
        """Return the weight of each vector, given that of each row [N]: a row's vectors all have the row's."""

    @property
    def in_memory(self) -> bool:
        """Whether nothing has to be read."""
        return True


@dataclass(frozen=True, eq=False)
class Dense(Features):
    """One array ``values``, float32 or float64 [N, D] or [N, L, D].

    ``checked`` says that every value has been seen to be one that heads can use.
    """

    values: Array
    feature: FeatureSet
    checked: bool = False

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int) -> Array:
        vectors: Array = self.values[row]
        return vectors

    def take(self, rows: Rows) -> Dense:
        """Return some rows, copied."""
        return replace(self, values=self.values[rows])

    def blocks(self, multiple: int = 1) -> Iterator[Dense]:
        """Yield all of it."""
        yield self

    def vectors(self) -> Iterator[Array]:
        """Yield the vectors, [n, D]."""
        for part in _slices(self.values):
            yield part.reshape(-1, self.feature.dim)

    def of_vectors(self, weight: Array) -> Floats:
        """Return the weight of each vector."""
        return np.repeat(np.asarray(weight, np.float64), self.feature.layers)


@dataclass(frozen=True, eq=False)
class Ragged(Features):
    """Vectors of rows of different lengths: row i has ``values[offsets[i]:offsets[i + 1]]``.

    ``values`` is float32 [sum T, D], ``offsets`` int64 [N + 1]. ``checked`` says that every value has been seen to be
    one that heads can use.
    """

    values: Array
    offsets: Rows
    feature: FeatureSet
    checked: bool = False

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Array:
        row = range(len(self))[row]
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> Rows:
        """How many vectors each row has, int64 [N]."""
        return np.diff(self.offsets)

    def take(self, rows: Rows) -> Ragged:
        """Return some rows, copied."""
        lengths = self.lengths[rows]
        ends = np.concatenate([[0], np.cumsum(lengths)])
        # Where each vector comes from: its place among those taken, moved by how far its row is moved.
        moved = np.repeat(self.offsets[:-1][rows] - ends[:-1], lengths)
        return replace(self, values=self.values[np.arange(int(ends[-1])) + moved], offsets=ends)

    def blocks(self, multiple: int = 1) -> Iterator[Ragged]:
        """Yield all of it."""
        yield self

    def vectors(self) -> Iterator[Array]:
        """Yield the vectors, [n, D]."""
        return _slices(self.values)

    def of_vectors(self, weight: Array) -> Floats:
        """Return the weight of each vector."""
        return np.repeat(np.asarray(weight, np.float64), self.lengths)

    def padded(
        self, rows: Rows, shape: tuple[int, int] | None = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Lay some rows out as [B, T, D] with a mask [B, T], True = real.

        ``shape`` is (B, T); without it B is the number of rows and T the longest of them. Rows beyond the given ones
        are zeros with one token, as attention over no token is not a number.
        """
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        if len(rows) and int(lengths.min()) < 1:
            raise InputError(f"row {int(rows[int(lengths.argmin())])} has no tokens")
        count, longest = shape or (len(rows), int(lengths.max()) if len(rows) else 1)
        mask = np.arange(longest) < np.concatenate([lengths, np.ones(count - len(rows), np.int64)])[:, None]
        x = np.zeros((count, longest, self.values.shape[1]), np.float32)
        if len(rows):
            x[: len(rows)][mask[: len(rows)]] = np.concatenate(
                [self.values[self.offsets[row] : self.offsets[row + 1]] for row in rows.tolist()]
            )
        return x, mask


@dataclass(frozen=True, eq=False)
class OnDisk(Features):
    """Rows of a ``reader``, read when they are asked for; ``rows`` int64 [N] says which, None all of them.

    What is read block by block is checked as it comes.
    """

    reader: Reader
    feature: FeatureSet
    rows: Rows | None = None

    def __len__(self) -> int:
        return len(self.reader) if self.rows is None else len(self.rows)

    @property
    def in_memory(self) -> bool:
        """Whether nothing has to be read: no."""
        return False

    @property
    def row_bytes(self) -> int:
        """How large one row is in memory."""
        return 4 * int(np.prod(self.feature.row_shape))

    def take(self, rows: Rows) -> OnDisk:
        """Return some rows; nothing is read yet."""
        return replace(self, rows=rows if self.rows is None else self.rows[rows])

    def read(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Return some rows, float32 [n, ...], not checked: training reads them again in every epoch."""
        return np.asarray(self.reader.read(rows if self.rows is None else self.rows[rows]), np.float32)

    def blocks(self, multiple: int = 1) -> Iterator[Dense]:
        """Read all rows, checked, about ``READ_BYTES`` at once. Raises ``FeatureError`` naming the row."""
        size = max(1, READ_BYTES // (multiple * self.row_bytes)) * multiple
        for start in range(0, len(self), size):
            yield self._checked(start, min(start + size, len(self)))

    def vectors(self) -> Iterator[Array]:
        """Read all vectors, [n, D]; see ``blocks``."""
        for part in self.blocks():
            yield part.values.reshape(-1, self.feature.dim)

    def of_vectors(self, weight: Array) -> Floats:
        """Return the weight of each vector."""
        return np.repeat(np.asarray(weight, np.float64), self.feature.layers)

    def mapped(self) -> Dense:
        """Return everything as a map of a temporary file in ``TMPDIR``, which is gone when nobody has it any more.

        Raises ``FeatureError`` as ``blocks`` does, and where the file has no room.
        """
        try:
            with tempfile.TemporaryFile(prefix="embedcache-") as file:
                for block in self.blocks():
                    file.write(np.ascontiguousarray(block.values, np.float32).data)
                file.flush()
                values = np.memmap(file, np.float32, "r", shape=(len(self), *self.feature.row_shape))
        except OSError as error:
            size = len(self) * self.row_bytes / 1e9
            raise FeatureError(
                f"{self.feature.name}: no temporary file of {size:.1f} GB in {tempfile.gettempdir()} "
                f"({error.strerror or error}), where features are kept that memory does not hold: set TMPDIR"
            ) from None
        return Dense(np.asarray(values), self.feature, checked=True)

    def whole(self) -> Dense:
        """Read everything at once. Raises ``FeatureError`` as ``blocks`` does."""
        return self._checked(0, len(self))

    def _checked(self, start: int, stop: int) -> Dense:
        values = self.read(np.arange(start, stop))
        refuse_non_finite(values, self.feature.name, first=start)
        return Dense(values, self.feature, checked=True)


InMemory = Dense | Ragged


@dataclass(frozen=True, eq=False)
class Stored:
    """Rows of a feature set in the type that is stored: float32, float16, or uint16 for the bits of bfloat16.

    ``values`` is [N, D] or [N, L, D]; of a token-level set [sum T, D] with ``offsets`` int64 [N + 1].

    Raises ``FeatureError`` for arrays of another shape or type than the set has, and for offsets that do not rise.
    """

    feature: FeatureSet
    values: Array
    offsets: Rows | None = None

    def __post_init__(self) -> None:
        feature, values, offsets, dtype = self.feature, self.values, self.offsets, STORED[self.feature.dtype]
        if values.shape[1:] != feature.row_shape or values.dtype != dtype:
            shape = ", ".join(map(str, ("N", *feature.row_shape)))
            raise FeatureError(f"{feature.name}: got {values.dtype} {list(values.shape)}, expected {dtype} [{shape}]")
        if (offsets is None) == (feature.kind == "tokens"):
            raise FeatureError(f"{feature.name}: {'no' if offsets is None else 'got'} offsets, of a {feature.kind} set")
        if offsets is not None and (offsets.dtype != np.int64 or offsets.ndim != 1 or not rises(offsets, len(values))):
            raise FeatureError(f"{feature.name}: offsets must be int64 and rise from 0 to {len(values)}")

    def __len__(self) -> int:
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays in the order of ``FeatureSet.columns``."""
        return (self.values,) if self.offsets is None else (self.values, self.offsets)

    def decoded(self) -> InMemory:
        """Return the rows in float32, exactly."""
        values = decoded(self.values)
        return Dense(values, self.feature) if self.offsets is None else Ragged(values, self.offsets, self.feature)

    def first_non_finite(self) -> int | None:
        """Return the first row that holds NaN or infinity, or None."""
        bits = self.feature.dtype == "bfloat16"
        wrong = (self.values & 0x7F80) == 0x7F80 if bits else ~np.isfinite(self.values)
        if not wrong.any():
            return None
        first = int(np.flatnonzero(wrong.reshape(len(self.values), -1).any(axis=1))[0])
        return first if self.offsets is None else int(np.searchsorted(self.offsets, first, side="right")) - 1


class MappedRows:
    """Rows of an array that is not to be read whole, such as a memory map; see ``Reader``."""

    def __init__(self, x: Array) -> None:
        self._x = x
        self.row_shape = tuple(x.shape[1:])

    def __len__(self) -> int:
        return len(self._x)

    def read(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Return some rows."""
        return np.asarray(np.asarray(self._x).take(rows, axis=0), np.float32)


class _JoinedRows:
    """Rows of several features on disk, one behind the other; see ``Reader``."""

    def __init__(self, parts: Sequence[OnDisk]) -> None:
        self._parts, self._rows = parts, len(parts[0])
        self.row_shape = parts[0].feature.row_shape

    def __len__(self) -> int:
        return self._rows * len(self._parts)

    def read(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Return some rows."""
        out = np.empty((len(rows), *self.row_shape), np.float32)
        for number, part in enumerate(self._parts):
            places = np.flatnonzero(rows // self._rows == number)
            if len(places):
                out[places] = part.read(rows[places] % self._rows)
        return out


def joined(parts: Sequence[Features]) -> Features:
    """Return features, one behind the other, as one of the type that all of them have; on disk of equally many rows."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Dense):
        return replace(first, values=np.concatenate([part.values for part in parts]))  # type: ignore[attr-defined]
    if isinstance(first, OnDisk):
        return OnDisk(_JoinedRows(parts), first.feature)  # type: ignore[arg-type]
    ragged = [part for part in parts if isinstance(part, Ragged)]
    ends = np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in ragged]))]).astype(np.int64)
    checked = all(part.checked for part in ragged)
    return Ragged(np.concatenate([part.values for part in ragged]), ends, first.feature, checked)


def features_of(x: object, feature: FeatureSet | None = None, *, where: str = "") -> Features:
    """Return features as a value, refusing what does not fit ``feature``; None goes by the shape.

    ``x`` is an array [N, D] or [N, L, D] of numbers, a pair (values [sum T, D], offsets [N + 1]), a ``Reader`` of rows
    on disk, or ``Features``, which are not looked through twice. ``where`` names the rows in messages.

    Raises ``FeatureError`` saying what was expected, or which row holds NaN or infinity.
    """
    feature = feature or _feature_of(x)
    of = f"{feature.name} of {where}" if where else feature.name
    if isinstance(x, OnDisk) or (not isinstance(x, Features) and isinstance(x, Reader)):
        reader = x.reader if isinstance(x, OnDisk) else x
        if feature.kind == "tokens" or tuple(reader.row_shape) != feature.row_shape:
            raise FeatureError(
                f"{of}: got rows on disk of shape {tuple(reader.row_shape)}, expected {_expected(feature)}"
            )
        return x if isinstance(x, OnDisk) else OnDisk(x, feature)
    if isinstance(x, InMemory) and x.checked and _same_shape(x.feature, feature):
        return x
    if feature.kind == "tokens":
        ragged = _ragged(x, feature, of)
        refuse_non_finite(ragged.values, of, ragged.offsets)
        return replace(ragged, checked=True)
    if isinstance(x, tuple | Ragged):
        raise FeatureError(f"{of}: got ragged features, expected one array {_expected(feature)}")
    rows = np.asarray(x.values if isinstance(x, Dense) else x)
    if rows.dtype not in (np.float32, np.float64):
        if rows.dtype.kind not in "fiub":
            raise FeatureError(f"{of}: got features of type {rows.dtype}, expected float32")
        rows = rows.astype(np.float32)
    if rows.ndim != len(feature.row_shape) + 1 or rows.shape[1:] != feature.row_shape:
        raise FeatureError(f"{of}: got features of shape {rows.shape}, expected {_expected(feature)}")
    refuse_non_finite(rows, of)
    return Dense(rows, feature, checked=True)


def _ragged(x: object, feature: FeatureSet, of: str) -> Ragged:
    pair = (x.values, x.offsets) if isinstance(x, Ragged) else x
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise FeatureError(f"{of} is a token-level set: expected values [sum T, D] and offsets [N + 1]")
    values, offsets = np.asarray(pair[0], np.float32), np.asarray(pair[1], np.int64)
    fits = values.ndim == 2 and values.shape[1] == feature.dim and offsets.ndim == 1
    if not fits or not rises(offsets, len(values)):
        raise FeatureError(
            f"{of}: got values {values.shape} and offsets {offsets.shape}, expected [sum T, {feature.dim}] and "
            "ascending offsets from 0 to sum T"
        )
    return Ragged(values, offsets, feature)


def _feature_of(x: object) -> FeatureSet:
    """Return the feature set that bare features amount to. Raises ``FeatureError`` for what are no features."""
    if isinstance(x, Features):
        return x.feature
    if isinstance(x, tuple):
        width = np.shape(x[0])[1:] if len(x) == 2 else ()
        if len(width) != 1:
            raise FeatureError("ragged features are a pair: values [sum T, D] and offsets [N + 1]")
        return FeatureSet("features", "tokens", int(width[0]), 1, "float32")
    shape = (len(x), *x.row_shape) if isinstance(x, Reader) else np.asarray(x).shape
    if len(shape) == 2 and shape[1]:
        return FeatureSet("features", "pooled", int(shape[1]), 1, "float32")
    if len(shape) == 3 and shape[1] and shape[2]:
        return FeatureSet("features", "layers", int(shape[2]), int(shape[1]), "float32")
    raise FeatureError(f"features have the shape {list(shape)}: expected [N, D], or [N, L, D]")


def refuse_non_finite(values: Array, name: str, offsets: Rows | None = None, *, first: int = 0) -> None:
    """Raise ``FeatureError`` naming the first row that holds NaN, infinity or what may become that when it is squared.

    Works block by block. ``offsets`` are those of ragged rows; ``first`` is the number of the first row there is.
    """
    block = max(1, _CHECK_BYTES // max(1, values[:1].nbytes))
    for start in range(0, len(values), block):
        part = values[start : start + block]
        # Passes without a temporary; a NaN survives them, and is in no order with a number.
        if not part.size or (part.min() >= -LARGEST and part.max() <= LARGEST):
            continue
        flat = part.reshape(len(part), -1)
        wrong = int(np.flatnonzero(~(np.abs(flat) <= LARGEST).all(axis=1))[0])
        row = start + wrong
        row = first + (row if offsets is None else int(np.searchsorted(offsets, row, side="right")) - 1)
        if np.isfinite(flat[wrong]).all():
            raise FeatureError(
                f"{name}: row {row} holds a value beyond {LARGEST:g}, which no head can use: scale the features"
            )
        raise FeatureError(f"{name}: row {row} holds NaN or infinity, which no head can use: extract it again")


def slice_rows(values: Array) -> int:
    """Return how many rows of an array are looked at in one piece."""
    return max(1, _VECTOR_BYTES // max(1, values[:1].nbytes))


def _slices(values: Array) -> Iterator[Array]:
    size = slice_rows(values)
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _same_shape(a: FeatureSet, b: FeatureSet) -> bool:
    return (a.kind, a.dim, a.layers) == (b.kind, b.dim, b.layers)


def _expected(feature: FeatureSet) -> str:
    named = ", ".join(str(length) for length in ("N", *feature.row_shape))
    return f"[{named}]" if feature.kind != "tokens" else "values and offsets in memory"
