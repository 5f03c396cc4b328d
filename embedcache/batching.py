"""Canonical shapes: lengths -> a plan of batches, a pure value; and what comes next made in a thread.

A transformer's kernels choose how to add up numbers by the *shape* they are given and by the *number of threads* they
have. With both fixed, each row's bits depend on that row alone; otherwise the same row may come out differently in the
last bit. So every forward pass here runs at a canonical shape: a row is padded to the smallest canonical length that
holds it, a canonical length always comes with the same number of rows, the last batch being filled up with dummy rows,
and every pass has the same number of threads. Order, sharding, resuming, appending and the number of workers then
cannot change a bit.

"Length" is whatever the backbone counts: tokens for text, 1 for an image of a fixed size.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from embedcache.errors import SpecError

T = TypeVar("T")
Lengths = npt.NDArray[np.int64]

VECTOR = 16
"""Positions that a batch is a multiple of, where there is room: whole vectors at any width divisible by 8."""

MOST_THREADS = 1024
"""More threads in one pass are no machine's."""


@dataclass(frozen=True)
class ShapePolicy:
    """Which canonical shapes there are. Part of a cache's identity.

    ``positions`` is about how many positions (rows x length) one batch holds; ``step`` the distance between short
    canonical lengths, which doubles with each doubling of the length past 16 steps, so that padding stays under
    about 6 %; ``max_length`` the longest row; ``spare`` rows of each batch are always dummies (see
    ``needs_spare_row`` in ``backbone``); ``threads`` is how many threads one pass has on a CPU, None in caches of
    format 1.0, which did not fix it.
    """

    positions: int = 1024
    step: int = 4
    max_length: int = 512
    spare: int = 0
    threads: int | None = 1

    def __post_init__(self) -> None:
        for name in ("positions", "step", "max_length", "threads"):
            value = getattr(self, name)
            if name == "threads" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SpecError(f"{name} is {value!r}: expected a whole number of at least 1")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise SpecError(f"threads is {self.threads}: expected at most {MOST_THREADS:,}")
        if not isinstance(self.spare, int) or self.spare < 0:
            raise SpecError(f"spare is {self.spare}: expected 0 or more")

    def canonical(self, lengths: npt.ArrayLike) -> Lengths:
        """Return the smallest canonical length that holds each length. Raises ``SpecError`` past ``max_length``."""
        lengths = np.maximum(np.asarray(lengths, dtype=np.int64), 1)
        if lengths.size and int(lengths.max()) > self.max_length:
            raise SpecError(f"a row of length {int(lengths.max())} is longer than max_length {self.max_length}")
        # Lengths in (16, 32] steps go up by 2 steps, in (32, 64] by 4: the exponent of the smallest power of two
        # at or above the length, in units of 16 steps.
        doublings = np.ceil(np.log2(np.maximum(lengths / (16.0 * self.step), 1.0))).astype(np.int64)
        steps = self.step << doublings
        canonical: Lengths = np.minimum((lengths + steps - 1) // steps * steps, self.max_length)
        return canonical

    def rows(self, length: int) -> int:
        """Return how many rows, dummies included, a batch of this canonical length has."""
        # Elementwise kernels split a tensor into vectors and a rest, and for some functions (SiLU, tanh-GELU) the rest
        # comes out differently in the last bit: no row may lie in it, nor in that of a second thread's half.
        unit = VECTOR // math.gcd(VECTOR, length)
        rows = max(1, self.positions // length)
        return (max(1, round(rows / unit)) * unit if rows >= unit else rows) + self.spare

    def lengths(self) -> tuple[int, ...]:
        """Return every canonical length, shortest first."""
        return tuple(int(length) for length in np.unique(self.canonical(np.arange(1, self.max_length + 1))))

    @property
    def pass_threads(self) -> int:
        """Threads that one pass has on a CPU. Rows added to a cache of format 1.0 get 1, as all rows have since."""
        return 1 if self.threads is None else self.threads

    def to_json(self) -> dict[str, int]:
        """Return the policy as it stands in a cache's spec; one of format 1.0 says nothing of threads."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ShapePolicy:
        """Read what ``to_json`` gave, or a cache of format 1.0."""
        if unknown := sorted(set(fields) - {setting.name for setting in dataclass_fields(cls)}):
            raise SpecError(f"a shape policy has no field {unknown[0]!r}: a newer version may have made it")
        return cls(**{"threads": None, **fields})


@dataclass(frozen=True)
class Batch:
    """One forward pass: ``indices`` (at most ``rows``) are real, the rest of the ``rows`` x ``length`` are dummies."""

    length: int
    rows: int
    indices: Lengths

    @property
    def positions(self) -> int:
        """How many positions the pass computes."""
        return self.length * self.rows


@dataclass(frozen=True)
class Plan:
    """Every forward pass for some rows, longest first so that running out of memory shows at once."""

    batches: tuple[Batch, ...]
    real: int

    @property
    def computed(self) -> int:
        """Positions computed, padding and dummy rows included."""
        return sum(batch.positions for batch in self.batches)

    @property
    def overhead(self) -> float:
        """Positions computed for each real one; 1.0 is no padding at all."""
        return self.computed / self.real if self.real else 1.0

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def plan(lengths: npt.ArrayLike, policy: ShapePolicy) -> Plan:
    """Sort rows of the given ``lengths`` [n] into canonical batches; each row is in exactly one batch."""
    lengths = np.asarray(lengths, dtype=np.int64)
    canonical = policy.canonical(lengths)
    batches: list[Batch] = []
    for length in np.unique(canonical)[::-1].tolist():
        rows = policy.rows(length)
        capacity = rows - policy.spare
        members = np.flatnonzero(canonical == length)
        starts = range(0, len(members), capacity)
        batches += [Batch(length, rows, members[start : start + capacity]) for start in starts]
    return Plan(tuple(batches), int(lengths.sum()))


def prefetch(source: Iterator[T]) -> Generator[T, None, None]:
    """Run an iterator in a thread: one item waits while another is made. Its errors are raised here; closing stops it.

    No name keeps an item longer than whoever asked for it does: items may be large.
    """
    ready: queue.Queue[T | BaseException | None] = queue.Queue(maxsize=1)
    stop = threading.Event()

    def put(item: T | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            while not stop.is_set():
                put(next(source))
        except StopIteration:
            put(None)
        except BaseException as error:  # handed over to the thread that can act on it
            put(error)

    thread = threading.Thread(target=produce, name="embedcache-read", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
            del item
    finally:
        stop.set()
        thread.join()
