"""Units of work: what one worker is given at a time, and how a window is put together again from what they gave.

A unit is a window; or, where there are more workers than windows, the rows of some of its canonical batches. Cut
anyhow, each part would fill up a batch of every length with dummies: of 10,605 snippets in one window, 1.09 positions
are computed for each real one; in eight parts of as many rows 1.31, and in units of whole batches 1.09 again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import cast

import numpy as np

from embedcache.backbone import Backbone
from embedcache.batching import plan
from embedcache.extract.windows import Rows, Window
from embedcache.extract.work import Computed
from embedcache.features import InMemory, Ragged, Stored

UNITS_EACH = 4
"""Units for each worker, where there are fewer windows than that: what is cut finer is balanced better."""


@dataclass(eq=False)
class Whole:
    """A window whose units come back in any order; ``bytes`` are those of its contents and features."""

    window: Window
    bytes: int = 0
    waiting: int = 0
    lost: list[int] = field(default_factory=list)
    error: Exception | None = None
    _parts: list[tuple[Rows, Computed]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether nothing more is to come."""
        return self.error is not None or not self.waiting

    def put(self, places: Rows, computed: Computed) -> None:
        """Take what was made of the rows at some places."""
        self._parts.append((places, computed))
        self._one_less()

    def lose(self, place: int) -> None:
        """Leave out the row at a place."""
        self.lost.append(place)
        self._one_less()

    def _one_less(self) -> None:
        self.waiting -= 1
        if not self.waiting:  # nothing is to be computed again
            self.window = Window(self.window.rows, ())

    def computed(self) -> Computed:
        """Return the window's features in the order of its rows, without those that workers were lost over.

        Raises what a worker raised.
        """
        if self.error is not None:
            raise self.error
        lost = self.window.rows[np.array(sorted(self.lost), np.int64)]
        if len(self._parts) == 1 and not self.lost:
            return self._parts[0][1]
        rows = np.setdiff1d(self.window.rows, lost)
        if not self._parts:
            return Computed(rows, {}, lost=lost)
        places = np.concatenate([places for places, _ in self._parts])
        parts = [computed for _, computed in self._parts]
        features = {
            name: _in_order([part.features[name] for part in parts], np.argsort(places)) for name in parts[0].features
        }
        costs = reduce(add, (part.costs for part in parts))
        return Computed(rows, features, replace(costs, shards=1), lost)


def _in_order(parts: Sequence[Stored], order: Rows) -> Stored:
    """Join the features of some rows and put them in an order, in the type they are stored in."""
    values = np.concatenate([part.values for part in parts])
    if any(part.offsets is None for part in parts):
        return Stored(parts[0].feature, values[order])
    counts = np.concatenate([np.diff(cast("Rows", part.offsets)) for part in parts])
    whole: InMemory = Ragged(values, np.concatenate([[0], np.cumsum(counts)]), parts[0].feature)
    taken = cast("Ragged", whole.take(order))
    return Stored(parts[0].feature, taken.values, taken.offsets)


@dataclass(eq=False)
class Unit:
    """Rows of a window, at ``places`` in it, int64 [n]; ``losses`` is how many workers were lost over them.

    One that is ``alone`` is handed out while nothing else is. One that ``lacks`` was handed to a worker without a
    backbone, which comes with it the next time.
    """

    whole: Whole
    places: Rows
    losses: int = 0
    alone: bool = False
    lacks: bool = False

    @classmethod
    def all_of(cls, window: Window) -> Unit:
        """Return a window as one unit."""
        # Prepared rows are for the cutting; they are prepared again where they are computed.
        return cls(Whole(Window(window.rows, window.contents), waiting=1), np.arange(len(window)))

    @property
    def window(self) -> Window:
        """The rows as a window of their own."""
        whole = self.whole.window
        if len(self.places) == len(whole):
            return whole
        return Window(whole.rows[self.places], [whole.contents[place] for place in self.places.tolist()])

    def cut(self, parts: Sequence[Rows], losses: int = 0) -> list[Unit]:
        """Return units in the place of this one: of its rows, by their number in it."""
        self.whole.waiting += len(parts) - 1
        return [Unit(self.whole, self.places[part], losses) for part in parts]


def units_of(window: Window, backbone: Backbone, workers: int, windows: int) -> list[Unit]:
    """Cut a window for ``workers``, of about so many ``windows``: not at all where these are enough for all."""
    unit, shares = Unit.all_of(window), -(-UNITS_EACH * workers // max(windows, 1))
    if shares < 2:
        return [unit]
    if backbone.policy.max_length == 1:  # pictures, and rows of an encoder
        lengths = np.ones(len(window), np.int64)
    else:
        lengths = (window.prepared or backbone.prepare(window.contents)).lengths
    batches = plan(lengths, backbone.policy).batches
    ends = np.cumsum([batch.positions for batch in batches])
    firsts = np.unique(np.searchsorted(ends, ends[-1] * np.arange(shares) / shares, side="right"))
    return unit.cut([
        np.sort(np.concatenate([batch.indices for batch in batches[first:end]]))
        for first, end in zip(firsts.tolist(), [*firsts[1:].tolist(), len(batches)], strict=True)
    ])  # fmt: skip
