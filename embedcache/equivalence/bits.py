"""Two arrays compared bit by bit: how many values are the same, how far apart the others are, and where."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]
DIGITS = {"float32": 24, "float16": 11, "bfloat16": 8}
"""The binary digits of a type's significand."""


@dataclass(frozen=True)
class Difference:
    """What two arrays differ in.

    ``largest`` is the largest absolute difference (infinite where one has no such value, or is NaN), ``ulps`` the
    largest distance in units of the last place of the type they are stored in, None where two values are further apart
    than a factor of two, as those of other signs are: such a count would say how near to zero they lie, not how wrong
    they are. ``where`` is the index [n] of the value that ``largest`` belongs to, or of the first that differs, None
    where nothing does.
    """

    values: int = 0
    identical: int = 0
    largest: float = 0.0
    ulps: int | None = 0
    where: tuple[int, ...] | None = None

    @property
    def same(self) -> bool:
        """Whether no bit differs."""
        return self.values == self.identical

    def joined(self, other: Difference, first: int) -> Difference:
        """Add what was found in another part, whose rows begin at ``first``."""
        where = self.where
        if other.where is not None and (where is None or other.largest > self.largest):
            where = (other.where[0] + first, *other.where[1:])
        return Difference(
            self.values + other.values,
            self.identical + other.identical,
            max(self.largest, other.largest),
            None if self.ulps is None or other.ulps is None else max(self.ulps, other.ulps),
            where,
        )


def ordered_bits(values: Array, dtype: str) -> npt.NDArray[np.int64]:
    """Return where each value stands among all numbers of a type: neighbours are 1 apart, and -0.0 is 0.0's own place.

    ``values`` are float32 that the type (float32, float16 or bfloat16) holds exactly.
    """
    if dtype == "float16":
        bits = values.astype(np.float16).view(np.int16).astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFF), bits)
    wide = np.ascontiguousarray(values, np.float32).view(np.int32).astype(np.int64)
    places = np.where(wide < 0, -(wide & 0x7FFFFFFF), wide)
    return places >> 16 if dtype == "bfloat16" else places


def difference(a: Array, b: Array, dtype: str = "float32") -> Difference:
    """Compare two arrays of one shape; integers and booleans count as numbers, floats are compared by their bits."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        values = max(a.size, b.size)
        return Difference(values, 0, math.inf, None, (0,) * max(a.ndim, 1) if values else None)
    if not a.size:
        return Difference()
    if a.dtype.kind != "f":
        apart = np.abs(a.astype(np.float64) - b.astype(np.float64))
        return _summed(a != b, apart, np.full(a.shape, math.inf), 0)
    if a.dtype == np.float64:
        differs = a.view(np.int64) != b.view(np.int64)
        ulps = np.abs(a - b) / np.spacing(np.maximum(np.abs(a), np.abs(b)))
        return _summed(differs, np.abs(a - b), ulps, 52)  # in units of the larger value
    a, b = np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)
    differs = a.view(np.int32) != b.view(np.int32)
    if not differs.any():
        return Difference(a.size, a.size)
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(a.astype(np.float64) - b.astype(np.float64))
    apart = np.where(differs & np.isnan(apart), math.inf, np.nan_to_num(apart, nan=0.0, posinf=math.inf))
    return _summed(differs, apart, np.abs(ordered_bits(a, dtype) - ordered_bits(b, dtype)), DIGITS[dtype])


def _summed(differs: Array, apart: Array, ulps: Array, digits: int) -> Difference:
    count = int(differs.sum())
    if not count:
        return Difference(differs.size, differs.size)
    apart = np.where(differs, apart, -1.0)
    place = np.unravel_index(int(apart.argmax()), apart.shape) if apart.ndim else ()
    where = tuple(map(int, place)) or (0,)
    largest, furthest = float(apart.max()), float(np.where(differs, ulps, 0).max())
    near = math.isfinite(largest) and furthest <= 2.0 ** (digits - 1)
    return Difference(differs.size, differs.size - count, largest, round(furthest) if near else None, where)
