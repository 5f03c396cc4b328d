"""Where workers come from: processes of this machine, or whoever stands behind an executor that was given."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, ProcessPoolExecutor, TimeoutError
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from embedcache.backbone import choose_device, choose_devices
from embedcache.errors import BackboneError, EmbedcacheError, SpecError
from embedcache.extract import worker
from embedcache.extract.worker import Job

MOST_LOSSES = 3
"""Workers that may be lost over one unit before it is looked into."""
IDLE_SECONDS = 600.0
"""After how long without work a worker that outlives the extraction lets go of the backbone, where it was not told."""
START_SECONDS = 900.0
"""How long nobody may have proved, or come back, before that is an error."""

T = TypeVar("T")


def answer(executor: Executor, question: Callable[..., T], *about: object) -> T:
    """Return what a worker answers. Raises ``BackboneError`` where none takes the question, or none answers."""
    try:
        return executor.submit(question, *about).result(START_SECONDS)
    except EmbedcacheError:
        raise
    except TimeoutError:
        raise BackboneError(
            f"no worker has started in {START_SECONDS / 60:.0f} minutes: see what holds them up"
        ) from None
    except Exception as error:
        told = str(error) or type(error).__name__
        raise BackboneError(f"the executor takes no work ({told}): make a new one") from None


class Crew(Protocol):
    """Workers, each behind an executor; or behind one executor all of them.

    ``size`` is how many there are; an executor is handed ``ahead`` units at a time. Where they are ``ours``, each has
    an executor of its own, and one that is lost is replaced.
    """

    @property
    def size(self) -> int: ...

    @property
    def ahead(self) -> int: ...

    @property
    def ours(self) -> bool: ...

    def device(self, asked: str) -> str:
        """Return the kind of device that the workers have, such as ``cuda``, where ``asked`` is ``auto``."""
        ...

    def start(self, number: int) -> Executor:
        """Start a worker, or return the executor that stands for all; the same one until it has ended."""
        ...

    def job(self, job: Job, number: int) -> Job:
        """Return the job as that worker does it: on which device, with how many threads."""
        ...

    def losses(self, error: BaseException) -> int:
        """Return how many workers were lost if a future raised this; 0 where a worker raised it."""
        ...

    def waits(self) -> str:
        """Return what workers wait for that cannot even begin, and what to do about it; nothing for none of them."""
        ...

    def end(self, number: int) -> None:
        """Let go of a worker, whatever it is at: it holds nothing that is not computed again."""
        ...

    def close(self) -> None:
        """Let go of what there is besides workers."""
        ...


class Processes:
    """Processes of this machine, each with its copy of the backbone.

    On a CPU they share ``threads``, None for all that torch has; of several GPUs, or of the ``devices`` named, each
    gets one. The program that runs must be one that can be imported again (``if __name__ == "__main__"``).
    """

    ahead, ours = 2, True

    def __init__(self, size: int, threads: int | None = None, devices: Sequence[str] = ()) -> None:
        if size < 1:
            raise SpecError(f"workers is {size}: expected at least 1")
        self.size, self._threads, self._devices = size, threads, tuple(devices)
        self._pools: dict[int, ProcessPoolExecutor] = {}

    def device(self, asked: str) -> str:
        """Return the device that is asked for, or the first one named."""
        return choose_device(self._devices[0] if self._devices else asked)

    def start(self, number: int) -> Executor:
        """Start a process."""
        if number not in self._pools:
            spawn = multiprocessing.get_context("spawn")
            self._pools[number] = ProcessPoolExecutor(1, spawn, worker.begin)
        return self._pools[number]

    def job(self, job: Job, number: int) -> Job:
        """Give a process its device and its share of the threads."""
        import torch

        devices = self._devices or (choose_devices("all") if job.device == "cuda" else (job.device,))
        threads = max(1, (self._threads or torch.get_num_threads()) // self.size)
        return replace(job, device=devices[number % len(devices)], threads=threads)

    def losses(self, error: BaseException) -> int:
        """Whether a process has died."""
        return int(isinstance(error, BrokenExecutor))

    def waits(self) -> str:
        """There is room for any number."""
        return ""

    def end(self, number: int) -> None:
        """Kill a process."""
        pool = self._pools.pop(number)
        processes = list((getattr(pool, "_processes", None) or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(1)
            if process.is_alive():
                process.kill()

    def close(self) -> None:
        """There is nothing besides."""


@dataclass(frozen=True)
class Given:
    """Whoever works for an executor that is not ours, ``workers`` of them; None asks the executor.

    Raises ``SpecError`` for a pool that would fork this process.
    """

    executor: Executor
    workers: int | None = None
    threads: int | None = None

    ours = False

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise SpecError(f"workers is {self.workers}: expected at least 1")
        context = getattr(self.executor, "_mp_context", None)
        if isinstance(context, multiprocessing.context.BaseContext) and context.get_start_method() == "fork":
            raise SpecError(
                "executor would fork this process, and what torch has begun in it would hang in the fork: make it with "
                "ProcessPoolExecutor(N, mp_context=multiprocessing.get_context('spawn'))"
            )

    @property
    def size(self) -> int:
        """As many as the executor says, else as many as this machine has cores."""
        if self.workers is not None:
            return self.workers
        if isinstance(most := getattr(self.executor, "_max_workers", None), int):
            return most
        if (client := getattr(self.executor, "_client", None)) is not None:  # of dask.distributed
            return max(1, int(sum(client.nthreads().values())))
        return os.cpu_count() or 1

    @property
    def ahead(self) -> int:
        """Two units for each."""
        return 2 * self.size

    def device(self, asked: str) -> str:
        """Ask a worker what it has."""
        return answer(self.executor, worker.device_of, asked)

    def start(self, number: int) -> Executor:
        """Return the executor."""
        return self.executor

    def job(self, job: Job, number: int) -> Job:
        """Leave the number of threads to the workers, unless it was asked for; they are still there afterwards."""
        return replace(job, threads=self.threads, idle=IDLE_SECONDS)

    def losses(self, error: BaseException) -> int:
        """Whether a process has died, or Dask says that a unit has been the death of several workers."""
        gone = isinstance(error, BrokenExecutor | CancelledError)
        return MOST_LOSSES if type(error).__name__ == "KilledWorker" else int(gone)

    def waits(self) -> str:
        """Nobody tells."""
        return ""

    def end(self, number: int) -> None:
        """Leave the executor to whom it belongs."""

    def close(self) -> None:
        """There is nothing besides."""
