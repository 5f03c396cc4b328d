"""Passes in processes of their own, for machines with more cores than one Python process keeps busy.

Each process loads the backbone itself, proves by its probe that it computes the same bits, and is then handed prepared
rows. Which process computes a row changes nothing: every pass has the threads that the shape policy says.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol

import numpy as np

from embedcache.backbone.compute import Backbone, Collected, Done, Numbers, Prepared, StoredSets, probe_of, run_plan
from embedcache.backbone.device import MOST_PASSES
from embedcache.backbone.model import Recipe
from embedcache.batching import Batch, Plan
from embedcache.errors import BackboneError
from embedcache.numerics import Probe, difference

_PASSES = 3
"""Passes, for each that a process runs at a time, that it is handed at once at most."""


class Takeable(Prepared, Protocol):
    """Prepared rows of which some can be taken, to be sent to another process."""

    def take(self, rows: Numbers) -> Prepared:
        """Return some of the rows, in the order asked for."""
        ...


class Workers:
    """Processes that run one backbone's passes; made by ``workers``."""

    def __init__(self, backbone: Backbone, recipe: Recipe, processes: int, passes: int) -> None:
        import torch.multiprocessing

        self._backbone, self._passes = backbone, passes
        self._processes, self._ahead = processes, processes + 1
        self._pool = ProcessPoolExecutor(
            processes, torch.multiprocessing.get_context("spawn"), _start,
            (recipe, dict(backbone.identity), probe_of(backbone), passes * backbone.policy.pass_threads),
        )  # fmt: skip

    def run_plan(self, prepared: Takeable, batches: Plan, done: Done | None = None) -> StoredSets:
        """Do what ``compute.run_plan`` does, in the processes.

        Raises ``BackboneError`` when a process dies, or does not compute what this one does.
        """
        collected = Collected(self._backbone, prepared, done)
        # A window of pictures is few batches: they are for all of the processes, not for the first of them.
        size = max(1, min(_PASSES * self._passes, -(-len(batches) // self._processes)))
        running: deque[tuple[Batch, Future[StoredSets]]] = deque()

        def collect() -> None:
            whole, future = running.popleft()
            collected.put(whole, future.result())

        try:
            for start in range(0, len(batches), size):
                some = batches.batches[start : start + size]
                rows = np.concatenate([batch.indices for batch in some])
                running.append((Batch(0, 0, rows), self._pool.submit(_run, prepared.take(rows), _renumbered(some))))
                if len(running) > self._ahead:
                    collect()
            while running:
                collect()
        except BrokenProcessPool:
            raise BackboneError(
                "a process that ran the backbone has died, perhaps for want of memory: "
                f"try again with fewer threads, such as extract --threads {MOST_PASSES}"
            ) from None
        return collected.finished()

    def close(self) -> None:
        """End the processes, whatever they are at: they hold nothing that is not computed again."""
        running = list((getattr(self._pool, "_processes", None) or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.terminate()
        for process in running:
            process.join(1)
            if process.is_alive():
                process.kill()


@contextlib.contextmanager
def workers(backbone: Backbone, passes: int) -> Iterator[Workers | None]:
    """Start the processes that ``passes`` at a time need, of ``MOST_PASSES`` each; None where this process is enough.

    The program that runs must be one that can be imported again (``if __name__ == "__main__"``).
    """
    processes = -(-passes // MOST_PASSES)
    recipe: Recipe | None = getattr(backbone, "recipe", None)
    if processes < 2 or recipe is None:
        yield None
        return
    made = Workers(backbone, recipe, processes, -(-passes // processes))
    try:
        yield made
    finally:
        made.close()


def _renumbered(batches: tuple[Batch, ...]) -> Plan:
    """Return the plan of just these batches, for rows that come in their order."""
    ends = np.cumsum([len(batch.indices) for batch in batches])
    made = tuple(
        Batch(batch.length, batch.rows, np.arange(end - len(batch.indices), end))
        for batch, end in zip(batches, ends.tolist(), strict=True)
    )
    return Plan(made, 0)


_backbone: Backbone | None = None
_reason: str | None = None


def _start(recipe: Recipe, identity: dict[str, object], probe: Probe | None, threads: int) -> None:
    """Load the backbone in a new process; what is wrong is said when it is asked to work, for it to be heard."""
    global _backbone, _reason
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    if (parent := multiprocessing.parent_process()) is not None:  # one that was killed can tell nobody to stop
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    import torch

    from embedcache.backbone.load import load_backbone

    torch.set_num_threads(threads)
    try:
        _backbone = load_backbone(**recipe.source.arguments(), **recipe.settings.arguments())
        if dict(_backbone.identity) != identity:
            _reason = f"the files of {recipe.source.model} have changed since they were loaded: start again"
        elif not (changed := difference(probe, probe_of(_backbone))).same_bits and probe is not None:
            _reason = (
                f"a process of its own computes otherwise than this one ({changed.to_text()}): extract --threads 1"
            )
    except Exception as error:  # what is raised here would only be told as a broken pool
        _reason = str(error)


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _run(prepared: Prepared, batches: Plan) -> StoredSets:
    if _reason is not None or _backbone is None:
        raise BackboneError(str(_reason))
    return run_plan(_backbone, prepared, batches)
