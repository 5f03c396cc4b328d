"""Workers in threads, which are lost when a test says so: what processes and machines do, in milliseconds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from fakes import CountingBackbone

from embedcache.extract import Window
from embedcache.extract.worker import Job, compute

Dies = Callable[[Window | None], bool]
"""Whether a worker is lost over a window, or over the proof, which is None."""


class Mortal(Executor):
    """One worker: does what it is handed in a thread, until it dies, with all that it still has."""

    def __init__(self, dies: Dies) -> None:
        self.dies, self.dead, self.done = dies, False, 0
        self.pool = ThreadPoolExecutor(1)

    def submit(self, function: Any, /, *arguments: Any, **_: Any) -> Future[Any]:
        if self.dead:
            raise BrokenExecutor("gone")
        future: Future[Any] = Future()

        def run() -> None:
            self.dead |= self.dies(arguments[1] if function is compute else None)
            try:
                if self.dead:
                    raise BrokenExecutor("gone")
                future.set_result(function(*arguments))
                self.done += 1
            except BaseException as error:
                future.set_exception(error)

        self.pool.submit(run)
        return future


class Crew:
    """As many workers; ``backbones`` has those of workers that differ from the driver, by number."""

    ahead, ours = 2, True

    def __init__(self, size: int, dies: Dies = lambda _: False, backbones: dict[int, CountingBackbone] | None = None):
        self.size, self.dies, self.backbones = size, dies, backbones or {}
        self.started: list[Mortal] = []
        self.there: dict[int, Mortal] = {}
        self.kind = "cpu"
        self._tokens = itertools.count()

    def device(self, asked: str) -> str:
        return self.kind

    def start(self, number: int) -> Executor:
        if number not in self.there:
            self.there[number] = Mortal(self.dies)
            self.started.append(self.there[number])
        return self.there[number]

    def job(self, job: Job, number: int) -> Job:
        # All are in one process, where each finds what another has loaded: to be another's, it needs another token.
        token = f"{job.token}{number}" if number in self.backbones else job.token
        return replace(job, token=token, backbone=self.backbones.get(number, job.backbone), threads=1)

    def losses(self, error: BaseException) -> int:
        return int(isinstance(error, BrokenExecutor))

    def waits(self) -> str:
        return "there is no room"

    def end(self, number: int) -> None:
        self.there.pop(number).pool.shutdown(wait=False)

    def close(self) -> None:
        pass
