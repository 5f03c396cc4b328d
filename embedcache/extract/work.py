"""The work of an extraction: a window's contents -> its features. Who does it, and where, changes no bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Protocol

from embedcache.backbone import Backbone, Prepared, StoredSets, kept_for, probe_of, replicas_of, run_plan, workers
from embedcache.backbone import threads as torch_threads
from embedcache.batching import Plan, plan, prefetch
from embedcache.errors import SpecError
from embedcache.extract.progress import Watch
from embedcache.extract.windows import Rows, Window
from embedcache.numerics import Probe

PROCESS_ROWS = 8192
"""New rows from which on more processes, each of which loads the model, are worth starting."""

RunPlan = Callable[[Prepared, Plan, Callable[[int, int], None] | None], StoredSets]


@dataclass(frozen=True)
class Costs:
    """What windows took. ``tokens`` are real positions, ``computed`` includes padding and dummy rows."""

    extracted: int = 0
    truncated: int = 0
    batches: int = 0
    tokens: int = 0
    computed: int = 0
    shards: int = 0

    def __add__(self, other: Costs) -> Costs:
        return Costs(*(here + there for here, there in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Computed:
    """The features of a window's rows, as they are stored."""

    rows: Rows
    features: StoredSets
    costs: Costs


def work(
    backbone: Backbone, window: Window, watch: Watch | None = None, run_batches: RunPlan | None = None
) -> Computed:
    """Compute a window's features: they depend on its contents and the backbone alone.

    ``run_batches`` runs the planned batches somewhere else than in this process.
    """
    prepared = window.ready(backbone).prepared
    assert prepared is not None
    batches = plan(prepared.lengths, backbone.policy)
    if watch is not None:
        watch.planned(len(window), batches.real)
    run = partial(run_plan, backbone) if run_batches is None else run_batches
    features = run(prepared, batches, None if watch is None else watch.advance)
    costs = Costs(len(window), prepared.truncated, len(batches), batches.real, batches.computed, shards=1)
    return Computed(window.rows, features, costs)


class Engine(Protocol):
    """Who maps ``work`` over the windows: this process, others beside it, or machines elsewhere."""

    def probe(self, backbone: Backbone) -> Probe | None:
        """Return what the machines that will work compute of the backbone's built-in rows."""
        ...

    def map(self, backbone: Backbone, windows: Iterator[Window], watch: Watch) -> Generator[Computed, None, None]:
        """Do the work of every window, in whatever order, and give what was computed in the order of the windows.

        Closing the generator stops the work.
        """
        ...


@dataclass(frozen=True)
class Here:
    """The engine that is this machine: passes side by side on ``threads`` CPU threads, None for all that torch has.

    With ``processes``, passes are run in processes of their own where one does not keep all cores busy and the new
    rows are many; the running program is then imported again in each. Of several ``devices`` each gets a copy of the
    backbone, which is on the first of them, and takes batches as it gets free.
    """

    threads: int | None = None
    processes: bool = False
    devices: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise SpecError(f"threads is {self.threads}: expected at least 1")

    def probe(self, backbone: Backbone) -> Probe | None:
        """Run the backbone's built-in rows."""
        with torch_threads(self.threads):
            return probe_of(backbone)

    def map(self, backbone: Backbone, windows: Iterator[Window], watch: Watch) -> Generator[Computed, None, None]:
        """Read and prepare the next window while the passes of this one run."""
        with torch_threads(self.threads), contextlib.ExitStack() as stack:
            run_batches: RunPlan | None = None
            if self.processes and watch.total >= PROCESS_ROWS and len(self.devices) < 2:
                others = stack.enter_context(workers(backbone, backbone.side_by_side(watch.total)))
                run_batches = None if others is None else others.run_plan  # type: ignore[assignment]  # rows to take
            elif len(self.devices) > 1 and watch.total:
                run_batches = replicas_of(backbone, self.devices).run_plan  # type: ignore[arg-type]  # it is loaded
            stack.enter_context(kept_for(backbone))
            ready = stack.enter_context(contextlib.closing(prefetch(_ready(backbone, windows))))
            for window in ready:
                yield work(backbone, window, watch, run_batches)


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
