"""Blocks of rows on several threads, each with products of one BLAS thread: the same bits however many there are.

Where BLAS splits one product over its threads they wait for each other inside it, which on shared cores costs several
times the product; and logits of 20,000 rows leave the cache between one step and the next. Small blocks of rows stay in
it: 20,000 x 384 with 100 columns take 40 ms of CPU time there and back, and 57 in one piece with two BLAS threads. Of
10,000 rows blocks of 2,048 would be five, of which two threads have three and two; so they are of 1,024.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

R = TypeVar("R")
T = TypeVar("T")

_ROWS = 1024
_NUMBERS = 1 << 22


class Workers:
    """Runs work on blocks of rows and returns what it gives in the order of the blocks."""

    def __init__(self, pool: ThreadPoolExecutor | None = None, ahead: int = 1) -> None:
        self._pool, self._ahead = pool, ahead

    def each(self, rows: int, width: int, work: Callable[[slice], R]) -> Iterator[R]:
        """Yield ``work(block)`` of each block; ``width`` is how many numbers it makes of a row."""
        return self.run(blocks(rows, width), work)

    def run(self, items: Iterable[T], work: Callable[[T], R]) -> Iterator[R]:
        """Yield ``work(item)`` of each item, in their order."""
        waiting: deque[Future[R]] = deque()
        for item in items:
            if self._pool is None:
                yield work(item)
                continue
            waiting.append(self._pool.submit(work, item))
            if len(waiting) > self._ahead:  # results of a million rows at once would be a million rows in memory
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Return slices of rows, the same on every machine."""
    step = max(64, min(_ROWS, _NUMBERS // max(width, 1)))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


@contextmanager
def workers() -> Iterator[Workers]:
    """Use as many threads as BLAS would, and let BLAS use one: ``OMP_NUM_THREADS`` and joblib's limits hold."""
    import scipy.linalg  # noqa: F401  # it brings a BLAS of its own, which must be there to be told
    from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

    controller = ThreadpoolController().select(user_api="blas")
    count = max((library["num_threads"] for library in controller.info()), default=1)
    with controller.limit(limits=1):
        if count == 1:
            yield Workers()
            return
        with ThreadPoolExecutor(count) as pool:
            yield Workers(pool, 4 * count)
