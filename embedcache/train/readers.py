"""Features that stay on disk until they are asked for, and whether they have to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from embedcache.cache import FeatureCache

Rows = npt.NDArray[np.int64]


class Reader(Protocol):
    """Features on disk, by row."""

    def __len__(self) -> int: ...
    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        ...

    def read(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Return some rows (int64, in any order), float32 [n, ...]."""
        ...


class CachedRows:
    """The rows of a split of a cache, read when they are asked for; see ``Reader``."""

    def __init__(self, cache: FeatureCache, split: Rows, feature: str) -> None:
        self._cache, self._places, self._feature = cache, cache.places()[split], feature

    def __len__(self) -> int:
        return len(self._places)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        return self._cache.feature(self._feature).row_shape

    def read(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Return some rows."""
        return self._cache.take(self._places[rows], self._feature)


class MappedRows:
    """Rows of an array, such as a memory map; see ``Reader``."""

    def __init__(self, x: Any) -> None:
        self._x = x
        self.row_shape = tuple(x.shape[1:])

    def __len__(self) -> int:
        return len(self._x)

    def read(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Return some rows."""
        return np.asarray(np.asarray(self._x).take(rows, axis=0), np.float32)


def fits_in_memory(size: int) -> bool:
    """Whether features of ``size`` bytes may be read whole: a quarter of the memory that is free now.

    ``EMBEDCACHE_MEMORY`` (bytes) stands in for what is free, for machines that lie about it.
    """
    given = os.environ.get("EMBEDCACHE_MEMORY", "")
    free = int(given) if given.isdecimal() else available_memory()
    return free is None or size <= free // 4


def available_memory() -> int | None:
    """Return how much memory is free, in bytes, the limit of a container counted in; None where nothing says."""
    found = []
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found += [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        pass
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = int(file.read())
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as file:
            found.append(max(0, limit - int(file.read())))
    except (OSError, ValueError):
        pass
    try:
        import resource

        soft = resource.getrlimit(resource.RLIMIT_DATA)[0]
        if soft != resource.RLIM_INFINITY:
            found.append(soft)
    except (ImportError, ValueError, OSError):
        pass
    return min(found) if found else None
