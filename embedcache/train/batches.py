"""Where training batches come from: features in memory, on disk, ragged, or computed on the fly by a live backbone.

The order of the rows depends on (rows, seed, epoch) alone, so cached and live training see the same batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sized
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from embedcache.batching import prefetch
from embedcache.dataset import mixed
from embedcache.features import Array, OnDisk, Ragged, Rows
from embedcache.heads.modules import draw_kept
from embedcache.spec import TrainSpec

BLOCK_ROWS, BLOCK_BYTES = 64, 96 << 10
"""Rows that block shuffling keeps together on disk, fewer where they are wide; a disk reads them as one."""
WINDOW_BYTES = 8 << 20
"""How much of the features block shuffling holds at once, three times: one window trains, one waits, one is read.

85 blocks mix well; and memory of this size is used again, where more is fetched from the system each time.
"""


@dataclass(frozen=True)
class FeatureBatch:
    """Features of some rows: ``x`` [B, D], [B, L, D] or, with a ``mask`` [B, T], [B, T, D]."""

    x: Tensor
    mask: Tensor | None
    rows: Tensor


class RowsOfBatch(Protocol):
    """What the loop needs of any batch: its rows."""

    @property
    def rows(self) -> Tensor:
        """Which training rows it has, int64 [B]."""
        ...


B_co = TypeVar("B_co", bound=RowsOfBatch, covariant=True)


class BatchSource(Protocol[B_co]):
    """A source of training batches over N rows, B at a time: of features, or of what a live model is given."""

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        ...

    def epoch(self, number: int) -> Iterator[B_co]:
        """Yield the batches of one epoch, each row in one of them; the last may be smaller."""
        ...


Batches = BatchSource[FeatureBatch]
"""A source of features."""


def order(rows: int, seed: int, epoch: int) -> Rows:
    """Return the order in which an epoch sees the rows: a permutation, int64 [N]."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)


def drawn_views(rows: int, views: int, seed: int, epoch: int) -> Rows:
    """Return which view each row has in an epoch: int64 [N], from 0 (the plain picture) to ``views``, uniformly.

    A row's draw depends on (seed, epoch, row) alone: it is the same whatever else is trained on, and in which batch.
    """
    step = 0x9E3779B97F4A7C15
    start = int(mixed(np.array([(seed * step + epoch * 0xD1B54A32D192ED03 + 1) % 2**64], np.uint64))[0])
    numbers = mixed(np.arange(1, rows + 1, dtype=np.uint64) * np.uint64(step) + np.uint64(start))
    drawn: Rows = ((numbers >> np.uint64(32)) * np.uint64(views + 1) >> np.uint64(32)).astype(np.int64)
    return drawn


GROUPED = 32
"""Batches whose rows are sorted by length together: many enough that rows of a batch are about as long, and few enough
that which rows meet in a batch is still drawn anew in each epoch."""


def grouped_order(lengths: Rows, batch_size: int, seed: int, epoch: int) -> Rows:
    """Return an ``order`` in which the rows of a batch are of similar length, so that little of it is padding.

    Of every ``GROUPED`` batches the rows are sorted by length, and the batches then come in a drawn order; the last
    batch of the epoch, which may be smaller, stays the last. Rows of one length keep their order.
    """
    rows = order(len(lengths), seed, epoch)
    if not len(rows) or lengths.min() == lengths.max():
        return rows
    generator = np.random.Generator(np.random.PCG64([seed, epoch, 2]))
    whole = len(rows) // batch_size * batch_size
    parts = []
    for start in range(0, whole, GROUPED * batch_size):
        group = rows[start : min(start + GROUPED * batch_size, whole)]
        batches = group[np.argsort(lengths[group], kind="stable")].reshape(-1, batch_size)
        parts.append(batches[generator.permutation(len(batches))].ravel())
    return np.concatenate([*parts, rows[whole:]])


@dataclass(frozen=True)
class ViewPlaces:
    """Where the features of N rows are among those of all their views, which stand one view after the other."""

    rows: int
    views: int
    seed: int

    @classmethod
    def of(cls, x: Sized, views: int, seed: int) -> ViewPlaces:
        """Return the places for features ``x`` of rows with so many views each."""
        return cls(len(x) // (views + 1), views, seed)

    def of_epoch(self, number: int) -> Rows:
        """Return each row's place in an epoch, int64 [N]."""
        places = np.arange(self.rows)
        return places + self.rows * drawn_views(self.rows, self.views, self.seed, number) if self.views else places


def block_order(rows: int, seed: int, epoch: int, window: int, block: int) -> Iterator[tuple[Rows, Rows]]:
    """Yield the rows of an epoch window by window: blocks drawn at random, ascending, and the order to train in.

    Reading costs what sequential reading costs, and every window is a random sample of blocks.
    """
    generator = np.random.Generator(np.random.PCG64([seed, epoch, 1]))
    blocks = generator.permutation(-(-rows // block))
    per_window = max(1, window // block)
    for start in range(0, len(blocks), per_window):
        first = np.sort(blocks[start : start + per_window]) * block
        inside = (first[:, None] + np.arange(block)).ravel()
        inside = inside[inside < rows]
        yield inside, generator.permutation(len(inside))


class _Lent:
    """An array that claims to be writable: torch warns of others, and a warning cannot be silenced for one thread."""

    def __init__(self, x: Array) -> None:
        self.x = x  # kept as long as the tensor is
        self.__array_interface__ = {**x.__array_interface__, "data": (x.__array_interface__["data"][0], False)}


def lent(x: Array) -> Tensor:
    """Return an array as a tensor without a copy. It may be a read-only map: features are never written to."""
    return torch.from_numpy(x if x.flags.writeable else np.asarray(_Lent(x)))


class TensorBatches:
    """Features in memory as one tensor [N, ...], or with ``views`` [(V + 1) N, ...], rows picked out by index."""

    def __init__(self, x: Tensor, batch_size: int, seed: int, views: int = 0) -> None:
        self._x, self._size, self._seed = x, batch_size, seed
        self._places = ViewPlaces.of(x, views, seed)
        self.steps = -(-self._places.rows // batch_size)

    def epoch(self, number: int) -> Iterator[FeatureBatch]:
        """Yield the batches of one epoch."""
        ordered = order(self._places.rows, self._seed, number)
        shuffled = torch.from_numpy(ordered).to(self._x.device)
        places = shuffled
        if self._places.views:
            places = torch.from_numpy(self._places.of_epoch(number)[ordered]).to(self._x.device)
        for start in range(0, len(shuffled), self._size):
            part = slice(start, start + self._size)
            yield FeatureBatch(self._x.index_select(0, places[part]), None, shuffled[part])


class RaggedBatches:
    """Token-level features in memory, padded batch by batch."""

    def __init__(self, x: Ragged, batch_size: int, seed: int, device: str, views: int = 0) -> None:
        self._x, self._size, self._seed, self._device = x, batch_size, seed, device
        self._places = ViewPlaces.of(x, views, seed)
        self.steps = -(-self._places.rows // batch_size)

    def epoch(self, number: int) -> Iterator[FeatureBatch]:
        """Yield the batches of one epoch."""
        shuffled, places = order(self._places.rows, self._seed, number), self._places.of_epoch(number)
        for start in range(0, len(shuffled), self._size):
            rows = shuffled[start : start + self._size]
            x, mask = (torch.from_numpy(part).to(self._device) for part in self._x.padded(places[rows]))
            yield FeatureBatch(x, mask, torch.from_numpy(rows).to(self._device))


class DiskBatches:
    """Features that stay on disk: block-shuffled windows, one trained on while the next is read."""

    def __init__(
        self, x: OnDisk, batch_size: int, seed: int, device: str = "cpu", views: int = 0, *,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:  # fmt: skip
        self._x, self._size, self._seed, self._device = x, batch_size, seed, device
        self._block = max(1, min(BLOCK_ROWS, BLOCK_BYTES // x.row_bytes))
        self._window = max(1, window_bytes // x.row_bytes // self._block) * self._block
        self._places = ViewPlaces.of(x, views, seed)
        self.steps = -(-self._places.rows // batch_size)

    def epoch(self, number: int) -> Iterator[FeatureBatch]:
        """Yield the batches of one epoch."""
        order_of_rows = block_order(self._places.rows, self._seed, number, self._window, self._block)
        places_of = self._places.of_epoch(number)
        read = ((rows, shuffled, lent(self._x.read(places_of[rows]))) for rows, shuffled in order_of_rows)
        left: tuple[Rows, Tensor] | None = None
        with contextlib.closing(prefetch(read)) as windows:
            for rows, shuffled, x in windows:
                rows, places = rows[shuffled], torch.from_numpy(shuffled)
                start = 0
                if left is not None:  # what did not fill a batch goes in front of the next window
                    start = self._size - len(left[0])
                    both = np.concatenate([left[0], rows[:start]]), torch.cat([left[1], x[places[:start]]])
                    left = None
                    if len(both[0]) < self._size:
                        left, start = both, len(rows)
                    else:
                        yield self._batch(*both)
                full = start + (len(rows) - start) // self._size * self._size
                for first in range(start, full, self._size):
                    yield self._batch(rows[first : first + self._size], x[places[first : first + self._size]])
                if full < len(rows):
                    left = rows[full:], x[places[full:]]
                del x  # while the next window is waited for
            if left is not None:
                yield self._batch(*left)

    def _batch(self, rows: Rows, x: Tensor) -> FeatureBatch:
        return FeatureBatch(x.to(self._device), None, torch.from_numpy(rows).to(self._device))


class DisturbedBatches:
    """Batches whose features are disturbed: some are dropped, and noise is added, drawn anew for every batch.

    That makes of cached features what augmentation makes of inputs, for the price of the draws. A feature x with mean m
    and deviation s becomes ``m + k (x - m) + n s e``: k is 0 for a share ``input_dropout`` of the values and
    1 / (1 - input_dropout) for the others, n is ``input_noise`` and e standard normal. The draws depend on (seed,
    epoch) and the shapes of the batches alone: they are the same for cached and live features, and for all heads of a
    stack.
    """

    def __init__(self, source: Batches, spec: TrainSpec, mean: Tensor | float, deviation: Tensor | float) -> None:
        self._source, self._spec = source, spec
        self._mean, self._deviation = mean, deviation

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return self._source.steps

    def epoch(self, number: int) -> Iterator[FeatureBatch]:
        """Yield the batches of one epoch."""
        (seed,) = np.random.SeedSequence([self._spec.order_seed, number, 2]).generate_state(1, np.uint64)
        generator: torch.Generator | None = None
        for batch in self._source.epoch(number):
            if generator is None:
                generator = torch.Generator(batch.x.device).manual_seed(int(seed >> np.uint64(1)))
            yield replace(batch, x=self._disturbed(batch.x, generator))

    def _disturbed(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if self._spec.input_dropout:
            kept = draw_kept(torch.empty_like(x), self._spec.input_dropout, generator)
            x = (x - self._mean).mul_(kept).add_(self._mean)
        if self._spec.input_noise:
            noise = torch.empty_like(x).normal_(generator=generator)
            x = noise.mul_(self._deviation).mul_(self._spec.input_noise).add_(x)
        return x
