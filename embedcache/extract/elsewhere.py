"""The engine that has others work: it cuts windows into units, hands them out, and gives them back in order.

Workers may be lost at any moment: the units they had are done again, by others or by those that take their place. A
unit over which workers are lost again and again is cut in halves until it is one row, which is then left out.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.backbone import Backbone, Recipe, choose_device
from embedcache.batching import prefetch
from embedcache.errors import BackboneError, WorkerRefusedError, warn
from embedcache.extract import worker
from embedcache.extract.crew import MOST_LOSSES, START_SECONDS, Crew, answer
from embedcache.extract.progress import Watch
from embedcache.extract.units import Unit, Whole, units_of
from embedcache.extract.windows import Window, bytes_of
from embedcache.extract.work import Computed, Proof
from embedcache.extract.worker import Job
from embedcache.fingerprint import hash_json
from embedcache.numerics import Probe, difference
from embedcache.spec import BackboneSettings, ModelSource
from embedcache.wording import counted

MOST_STARTS = 3
"""Times that a worker may be lost before it has proved; then nobody takes its place."""
TELL_SECONDS = 10.0
"""After how long it is told what workers wait for that have not started."""
GRACE_SECONDS = 30.0
"""How long the first workers wait for others at least, where none of them computes as the cache has it."""
WINDOWS_EACH = 2
"""Windows for each worker that are held at most."""
HELD_BYTES = 1 << 30
"""Bytes of contents and features that are held at most, of windows handed out and of those that wait for their turn."""
MOST_IN_A_ROW = 40
"""Workers that may be lost in a row over whatever units: one bad row of 16,384 takes 19 until it stands alone."""


@dataclass(eq=False)
class Desk:
    """A worker as it is seen from here: what it was handed, the oldest first; its proof is None once it has proved.

    ``brought`` is how often the backbone was handed over with it.
    """

    number: int
    executor: Executor
    proof: Future[Proof] | None
    brought: int = 0
    running: dict[Future[Computed | None], Unit] = field(default_factory=dict)


class Elsewhere:
    """The engine of a crew of workers; see ``Engine``. ``device`` is that of the workers, None for the backbone's."""

    def __init__(self, crew: Crew, device: str | None = None) -> None:
        self.crew, self.device = crew, device
        self.notes: list[str] = []
        self._job: Job | None = None
        self._desks: list[Desk] = []
        self._starts: dict[int, int] = {}
        self._first: list[tuple[Desk, Proof]] = []
        self._in_a_row = 0
        self._again: deque[Unit] = deque()

    def prove(self, backbone: Backbone, recorded: Probe | None = None) -> Proof:
        """Start the workers, and return what the first of them computes of the built-in rows.

        Of workers that differ, it is one that computes as ``recorded`` if there is one. The others get no work.
        """
        recipe: Recipe | None = getattr(backbone, "recipe", None)
        if recipe is not None:  # a worker may be in another folder
            recipe = replace(recipe, source=replace(recipe.source, model=Path(str(recipe.source.model)).absolute()))
        asked = {name: backbone.provenance.get(name) for name in ("model", "revision")}
        named = ModelSource(trust_remote_code=recipe is not None and recipe.source.trust_remote_code)
        device = self.device or str(getattr(backbone, "device", "cpu"))
        self._job = Job(
            uuid.uuid4().hex, backbone if recipe is None else recipe, hash_json(backbone.identity),
            named.or_else(**asked), device,
        )  # fmt: skip
        for number in range(self.crew.size if self.crew.ours else 1):
            self._start(number)
        chosen = self._first_of(recorded)
        self._job = replace(self._job, probe=chosen.probe)
        for desk, proof in self._first:
            if desk in self._desks:
                self._admit(desk, proof)
        # Workers load from where the files are; the cache tells what was asked for, as that of one process does.
        told = {name: backbone.provenance[name] for name in ("model", "revision") if name in backbone.provenance}
        return replace(chosen, provenance={**chosen.provenance, **told})

    def settled(self, source: ModelSource, asked: BackboneSettings) -> tuple[ModelSource, BackboneSettings]:
        """Return whence and how the model is loaded here, to be what the workers have.

        Their kind of device decides the canonical shapes. Where this machine has none of it, a worker is asked for
        them, and the model is loaded on the CPU.
        """
        self.device = self.crew.device(source.device)
        try:
            return replace(source, device=choose_device(self.device)), asked
        except BackboneError:
            model = Path(str(source.model))  # a worker may be in another folder
            there = replace(source, device=self.device, model=model.absolute() if model.is_dir() else source.model)
            settings = answer(self.crew.start(0), worker.decide, there, asked)
            return replace(source, device="cpu"), settings

    def _first_of(self, recorded: Probe | None) -> Proof:
        """Wait for the proof that all must agree with.

        If none that is there computes as ``recorded``, wait for the others as long again as the first took, and more:
        who has no place yet may never get one.
        """
        begun, deadline, look = time.monotonic(), START_SECONDS, TELL_SECONDS
        while True:
            waited = time.monotonic() - begun
            if self._first:
                deadline = min(deadline, max(GRACE_SECONDS, 3 * waited))
            if (chosen := self._chosen(recorded, late=waited >= deadline)) is not None:
                return chosen
            if waited >= deadline:
                raise self._nobody()
            if waited >= look:
                look = START_SECONDS  # told once
                if reason := self.crew.waits():
                    warn([f"{len(self._first)} of {counted(self.crew.size, 'worker')} started: {reason}"])
            self._wait(seconds=max(0.0, min(deadline, look) - waited))

    def _nobody(self) -> BackboneError:
        reason = self.crew.waits() or "see what holds them up"
        return BackboneError(f"no worker has started in {START_SECONDS / 60:.0f} minutes: {reason}")

    def _chosen(self, recorded: Probe | None, late: bool) -> Proof | None:
        """Return the proof that all must agree with, once it is there; of those there are, if it is ``late``."""
        proofs = [proof for _, proof in self._first]
        if recorded is not None:
            alike = [proof for proof in proofs if difference(recorded, proof.probe).same_bits]
            proofs = alike or (proofs if late or all(desk.proof is None for desk in self._desks) else [])
        return proofs[0] if proofs else None

    def map(self, backbone: Backbone, windows: Iterator[Window], watch: Watch) -> Generator[Computed, None, None]:
        """Hand the windows out, and give what became of them in their order.

        At most twice as many as workers are handed out or wait for their turn, and no more than ``HELD_BYTES`` of them;
        another one or two are being read.
        """
        order: deque[Whole] = deque()
        with contextlib.closing(prefetch(self._cut(backbone, windows, watch.total))) as source:
            more = watch.total > 0
            while more or order:
                for ahead in range(self.crew.ahead):  # one for everybody before anybody gets a second
                    for desk in self._desks:
                        while more and not self._again and self._has_room(order):
                            units = next(source, [])
                            more = bool(units)
                            order.extend(unit.whole for unit in units[:1])
                            self._again.extend(units)
                            del units
                        if self._again and desk.proof is None and len(desk.running) <= ahead and self._apart(desk):
                            self._hand(desk, self._again.popleft())
                while order and order[0].finished:
                    yield order.popleft().computed()
                if order:
                    self._wait(watch)

    def _cut(self, backbone: Backbone, windows: Iterator[Window], rows: int) -> Iterator[list[Unit]]:
        for window in windows:
            size = bytes_of(window, backbone)
            # Where few windows fit, they are cut as if there were no more, for all workers to have something.
            held, there = max(1, HELD_BYTES // size), -(-rows // len(window))
            units = units_of(
                window, backbone, self.crew.size, there if held >= WINDOWS_EACH * self.crew.size else min(held, there)
            )
            units[0].whole.bytes = size
            yield units

    def _has_room(self, order: Sequence[Whole]) -> bool:
        """Whether one more window, as large as the largest, may be held besides those of ``order``."""
        if not order:
            return True
        sizes = [whole.bytes for whole in order]
        return len(order) < WINDOWS_EACH * self.crew.size and sum(sizes) + max(sizes) <= HELD_BYTES

    def close(self) -> None:
        """Let go of the workers, and have those that stay let go of the backbone."""
        for desk in self._desks:
            for future in desk.running:
                future.cancel()
            if not self.crew.ours and self._job is not None:
                with contextlib.suppress(Exception):  # it may be broken; and who is not reached lets go by itself
                    for _ in range(self.crew.size):
                        desk.executor.submit(worker.release, self._job.token)
            self.crew.end(desk.number)
        self._desks = []
        self.crew.close()

    # Workers

    def _start(self, number: int) -> None:
        assert self._job is not None
        executor = self.crew.start(number)
        try:
            proof = executor.submit(worker.prove, self.crew.job(self._job, number))
        except RuntimeError as error:
            raise BackboneError(f"the executor takes no work ({error}): make a new one") from None
        self._desks.append(Desk(number, executor, proof, brought=1))

    def _hand(self, desk: Desk, unit: Unit) -> None:
        assert self._job is not None
        job = self.crew.job(self._job, desk.number)
        # Once for each worker; behind an executor that stands for all, one that got none says so.
        if unit.lacks or desk.brought < (1 if self.crew.ours else self.crew.size):
            unit.lacks, desk.brought = False, desk.brought + 1
        elif not isinstance(job.backbone, Recipe):
            job = replace(job, backbone=None)
        try:
            future = desk.executor.submit(worker.compute, job, unit.window)
        except Exception as error:  # it was lost since, which its other futures tell too
            if not self.crew.losses(error):
                raise
            future = Future()
            future.set_exception(error)
        desk.running[future] = unit

    def _apart(self, desk: Desk) -> bool:
        """Whether the next unit may go there now: one that is to be ``alone`` goes where nothing else is."""
        alone = self._again[0].alone or any(unit.alone for unit in desk.running.values())
        return not (alone and desk.running)

    def _wait(self, watch: Watch | None = None, seconds: float | None = None) -> None:
        """Wait for something to happen, and see to it; no longer than ``seconds``, if they are given."""
        waited: dict[Future[Any], Desk] = {future: desk for desk in self._desks for future in desk.running}
        waited |= {desk.proof: desk for desk in self._desks if desk.proof is not None}
        done, _ = wait(waited, timeout=START_SECONDS if seconds is None else seconds, return_when=FIRST_COMPLETED)
        if not done and seconds is None and not any(desk.running for desk in self._desks):
            raise self._nobody()
        # In the order in which they were handed out, results before losses.
        happened = [future for future in waited if future in done]
        for future in sorted(happened, key=lambda each: each.cancelled() or each.exception() is not None):
            if waited[future] in self._desks:
                self._take(waited[future], future, watch)

    def _take(self, desk: Desk, future: Future[Any], watch: Watch | None) -> None:
        """See what became of a future of a worker."""
        try:
            outcome = future.result()
        except WorkerRefusedError as error:
            return self._dismiss(desk, error)
        except Exception as error:
            if (losses := self.crew.losses(error)) == 1:
                return self._lose(desk, error)
            unit = desk.running.pop(future, None)
            if unit is None:
                raise BackboneError(f"a worker cannot start: {type(error).__name__}: {error}") from error
            if losses:
                self._retry(unit, losses)
            else:
                unit.whole.error = error
            return
        if isinstance(outcome, Proof):
            return self._admit(desk, outcome)
        self._in_a_row = 0
        unit = desk.running.pop(future)
        if outcome is None:
            unit.lacks = True
            return self._again.appendleft(unit)
        unit.whole.put(unit.places, outcome)
        if watch is not None:
            watch.planned(outcome.costs.extracted, outcome.costs.tokens)
            watch.advance(outcome.costs.extracted, outcome.costs.tokens)

    def _admit(self, desk: Desk, proof: Proof) -> None:
        """Let a worker work if it computes what the others do; before that is known, keep its proof."""
        assert self._job is not None
        desk.proof, self._starts[desk.number] = None, 0
        if self._job.probe is None and (desk, proof) not in self._first:
            self._first.append((desk, proof))
        elif self._job.probe is not None and not (other := difference(self._job.probe, proof.probe)).same_bits:
            told = f"the worker {proof.worker} computes otherwise than the first ({other.to_text()})"
            self._dismiss(desk, WorkerRefusedError(told))

    def _dismiss(self, desk: Desk, error: WorkerRefusedError) -> None:
        """Send a worker away. Raises why, where nobody else is left."""
        self._desks.remove(desk)
        self._again.extendleft(reversed(desk.running.values()))
        self.crew.end(desk.number)
        if not self._desks:
            raise error
        self.notes.append(f"{error}: it gets no work")

    def _lose(self, desk: Desk, error: BaseException) -> None:
        """See to what a worker had that is no more: the oldest unit was its end, the others only waited for it."""
        if not self.crew.ours:
            raise BackboneError(
                f"the executor has lost a worker and takes no more work ({error}): make a new one and extract again, "
                "to go on from what is committed"
            ) from None
        self._desks.remove(desk)
        self.crew.end(desk.number)
        units = list(desk.running.values())
        self._again.extendleft(reversed(units[1:]))
        if units:
            self._in_a_row += 1
            self._retry(units[0], 1)
        elif desk.proof is not None:
            self._starts[desk.number] = self._starts.get(desk.number, 0) + 1
        if self._in_a_row >= MOST_IN_A_ROW:
            raise BackboneError(f"{self._in_a_row} workers were lost, one after the other, and none did its work")
        if self._starts.get(desk.number, 0) < MOST_STARTS:
            self._start(desk.number)
        else:
            told = (
                f"worker {desk.number + 1} was lost {counted(MOST_STARTS, 'time')} while it loaded the backbone "
                f"({error}), perhaps for want of memory, or as the running program has no if __name__ == '__main__'"
            )
            self.notes.append(told)
            if not self._desks:
                raise BackboneError(told)

    def _retry(self, unit: Unit, losses: int) -> None:
        """Have a unit done again, in halves where too many workers were lost over it, or leave its one row out."""
        unit.losses += losses
        if unit.losses < MOST_LOSSES:
            self._again.appendleft(unit)
        elif len(unit.places) == 1 and not self.crew.ours and not unit.alone:
            # Dask blames whatever its worker had, also what only waited there.
            unit.alone, unit.losses = True, 0
            self._again.appendleft(unit)
        elif len(unit.places) == 1:
            unit.whole.lose(int(unit.places[0]))
        else:
            halves = unit.cut(np.array_split(np.arange(len(unit.places)), 2), MOST_LOSSES - 1)
            for half in halves:
                half.losses *= len(half.places) > 1  # a row is left out only for what it does alone
            self._again.extendleft(reversed(halves))
