"""The work of an extraction: a window's contents -> its features. Who does it, and where, changes no bit."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

from embedcache.backbone import Backbone, Prepared, StoredSets, run_plan
from embedcache.batching import Plan, plan
from embedcache.extract.progress import Watch
from embedcache.extract.windows import Rows, Window
from embedcache.numerics import Probe

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
    """The features of a window's rows, as they are stored; ``lost`` are those of its rows that workers died over."""

    rows: Rows
    features: StoredSets
    costs: Costs = field(default_factory=Costs)
    lost: Rows = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True)
class Proof:
    """What whoever works computes of a backbone's built-in rows, what runs it, and what it is called in messages."""

    probe: Probe | None
    provenance: Mapping[str, object]
    worker: str = ""


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

    @property
    def notes(self) -> Sequence[str]:
        """What is to be told of the workers."""
        ...

    def prove(self, backbone: Backbone, recorded: Probe | None = None) -> Proof:
        """Return what those who will work compute of the backbone's built-in rows: as ``recorded``, if any of them."""
        ...

    def map(self, backbone: Backbone, windows: Iterator[Window], watch: Watch) -> Generator[Computed, None, None]:
        """Do the work of every window, in whatever order, and give what was computed in the order of the windows.

        Closing the generator stops the work.
        """
        ...

    def close(self) -> None:
        """Let go of whoever was to work."""
