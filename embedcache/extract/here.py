"""The engine that is this machine: this process, its GPUs, and processes beside it where there are many cores."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

from embedcache.backbone import MOST_PASSES, Backbone, kept_for, probe_of, replicas_of
from embedcache.backbone import threads as torch_threads
from embedcache.batching import prefetch
from embedcache.errors import BackboneError, SpecError
from embedcache.extract.crew import Processes
from embedcache.extract.elsewhere import Elsewhere
from embedcache.extract.progress import Watch
from embedcache.extract.windows import Window
from embedcache.extract.work import Computed, Proof, RunPlan, work
from embedcache.numerics import Probe, difference

PROCESS_ROWS = 8192
"""New rows from which on more processes, each of which loads the model, are worth starting."""


@dataclass(frozen=True)
class Here:
    """The engine that is this machine: passes side by side on ``threads`` CPU threads, None for all that torch has.

    With ``processes``, work is done in processes of their own where one does not keep all cores busy and the new rows
    are many; the running program is then imported again in each. Of several ``devices`` each gets a copy of the
    backbone, which is on the first of them, and takes batches as it gets free.
    """

    threads: int | None = None
    processes: bool = False
    devices: Sequence[str] = ()
    notes: list[str] = field(default_factory=list, compare=False)

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise SpecError(f"threads is {self.threads}: expected at least 1")

    def prove(self, backbone: Backbone, recorded: Probe | None = None) -> Proof:
        """Run the backbone's built-in rows."""
        with torch_threads(self.threads):
            return Proof(probe_of(backbone), backbone.provenance)

    def map(self, backbone: Backbone, windows: Iterator[Window], watch: Watch) -> Generator[Computed, None, None]:
        """Read and prepare the next window while the passes of this one run."""
        with torch_threads(self.threads), contextlib.ExitStack() as stack:
            passes = backbone.side_by_side(watch.total)
            if self.processes and watch.total >= PROCESS_ROWS and len(self.devices) < 2 and passes > MOST_PASSES:
                yield from self._in_processes(-(-passes // MOST_PASSES), backbone, windows, watch)
                return
            run_batches: RunPlan | None = None
            if len(self.devices) > 1 and watch.total:
                run_batches = replicas_of(backbone, self.devices).run_plan  # type: ignore[arg-type]  # it is loaded
            stack.enter_context(kept_for(backbone))
            ready = stack.enter_context(contextlib.closing(prefetch(_ready(backbone, windows))))
            for window in ready:
                yield work(backbone, window, watch, run_batches)

    def _in_processes(
        self, count: int, backbone: Backbone, windows: Iterator[Window], watch: Watch
    ) -> Generator[Computed, None, None]:
        own = probe_of(backbone)
        with contextlib.closing(Elsewhere(Processes(count, self.threads))) as engine:
            other = difference(own, engine.prove(backbone, own).probe)
            if own is not None and not other.same_bits:
                raise BackboneError(
                    f"a process of its own computes otherwise than this one ({other.to_text()}): extract --threads 1"
                )
            yield from engine.map(backbone, windows, watch)
            self.notes.extend(engine.notes)  # which of the processes were of no use, and why

    def close(self) -> None:
        """Nobody else works."""


def _ready(backbone: Backbone, windows: Iterator[Window]) -> Iterator[Window]:
    """Prepare window after window. What is prepared bit by bit is handed over at once, and ended before the next."""
    for window in windows:
        ready = window.ready(backbone)
        wait: Callable[[], None] | None = getattr(ready.prepared, "wait", None)
        yield ready
        del window, ready
        if wait is not None:
            wait()
        del wait
