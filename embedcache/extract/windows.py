"""Which rows are new, and how they are cut into windows: by their content alone, so that resuming cuts them alike."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from embedcache.backbone import Backbone, Prepared, rows_at_once, vectors_of, views_of
from embedcache.dataset import Dataset, Examples, key_values
from embedcache.errors import SpecError
from embedcache.shard import STORED, FeatureSet

SHARD_ROWS = 16384
SHARD_BYTES = 64 << 20
CONTENT_BYTES = 64 << 20
RAGGED_BYTES = 256 << 20
"""Token-level windows may be larger than a pooled shard: small ones have too few rows of a length to fill batches."""

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """Consecutive new rows that are computed and committed together, as one shard.

    ``contents`` are there until the rows are ``prepared``, which may be done anywhere.
    """

    rows: Rows
    contents: Sequence[bytes]
    prepared: Prepared | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def ready(self, backbone: Backbone) -> Window:
        """Return the window with its rows prepared; their contents need no memory any more."""
        prepared = backbone.prepare(self.contents) if self.prepared is None else self.prepared
        return replace(self, contents=(), prepared=prepared)


def new_rows(dataset: Dataset, known: Rows) -> Rows:
    """Return the rows whose content is not in the cache yet, each content once, in the order of the input.

    ``known`` [N] holds each row's place in the cache, -1 for none.
    """
    missing = np.flatnonzero(known < 0)
    _, first = np.unique(key_values(dataset.keys[missing]), return_index=True)
    first.sort()
    return missing[first]


def row_bytes_of(feature: FeatureSet) -> int:
    """Return the bytes of one row of a feature set, or of one token's vector."""
    return int(np.prod(feature.row_shape)) * STORED[feature.dtype].itemsize


def shard_rows(feature_sets: Sequence[FeatureSet], asked: int | None = None) -> int:
    """Return rows per shard: ``asked``, else 16,384 or fewer so that a shard of pooled features is at most 64 MB.

    A multiple of 1,024 rows makes every set's bytes a multiple of a memory page.
    """
    if asked is not None:
        if asked < 1:
            raise SpecError(f"rows per shard is {asked}: expected at least 1")
        return asked
    row_bytes = sum(row_bytes_of(feature) for feature in feature_sets if feature.kind != "tokens")
    return max(1024, min(SHARD_ROWS, SHARD_BYTES // max(row_bytes, 1) // 1024 * 1024))


def bytes_of(window: Window, backbone: Backbone) -> int:
    """Return how many bytes a window's contents and features have, and at most, where nobody has counted tokens."""
    of_row, of_vector = (
        sum(row_bytes_of(feature) for feature in backbone.feature_sets if (feature.kind == "tokens") is tokens)
        for tokens in (False, True)
    )
    size = sum(len(content) for content in window.contents) + len(window) * of_row
    if of_vector and window.prepared is None:
        return size + RAGGED_BYTES
    return size + (int(_vectors(window).sum()) * of_vector if of_vector else 0)


def _vectors(window: Window) -> Rows:
    """Return how many vectors a token-level set has of each row of a window that is ready."""
    assert window.prepared is not None
    return vectors_of(window.prepared)[:: views_of(window.prepared) + 1]


def windows(examples: Examples, rows: Rows, backbone: Backbone, most: int) -> Iterator[Window]:
    """Read ``rows`` (increasing) window by window, of ``most`` rows each or fewer.

    Fewer where their contents, their prepared rows (pictures: whole batches of them) or their token-level vectors are
    large. Where a window ends depends only on the rows from its start on, so a run resumed at a window's start cuts the
    rest exactly as the interrupted one would have. Rows are prepared here only where a token-level set must be
    measured.
    """
    most = min(most, rows_at_once(backbone) or most)
    vector_bytes = sum(row_bytes_of(feature) for feature in backbone.feature_sets if feature.kind == "tokens")
    contents = examples.contents(rows)
    waiting: deque[bytes] = deque()
    start = 0
    while start < len(rows):
        size = sum(len(content) for content in waiting)
        while len(waiting) < min(most, len(rows) - start) and (not waiting or size <= CONTENT_BYTES):
            waiting.append(next(contents))
            size += len(waiting[-1])
        count = _fitting(np.fromiter((len(content) for content in waiting), np.int64, len(waiting)), CONTENT_BYTES)
        window = Window(rows[start : start + count], [waiting[place] for place in range(count)])
        if vector_bytes:
            whole = window.ready(backbone)
            count = min(count, _fitting(_vectors(whole) * vector_bytes, RAGGED_BYTES))
            # What works elsewhere prepares the rows there, of their contents.
            whole = replace(whole, contents=window.contents)
            window = whole if count == len(whole) else Window(window.rows[:count], window.contents[:count])
        for _ in range(count):
            waiting.popleft()
        yield window
        start += count


def _fitting(sizes: Rows, limit: int) -> int:
    """Return how many of ``sizes`` from the start fit in ``limit``, at least 1."""
    return max(1, int(np.searchsorted(np.cumsum(sizes), limit, side="right")))
