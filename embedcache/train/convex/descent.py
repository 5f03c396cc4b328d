"""Limited-memory BFGS for several convex problems in lock-step, each with its own steps, memory and end.

Nocedal and Wright (2006), algorithm 7.4, with the inverse of ``curvature`` as the first matrix. The line search uses
that along a line a convex function's slope only grows, so slopes alone bracket the step. A step is taken where it meets
Wolfe's conditions or, near the optimum where losses differ by less than their rounding, the approximate ones of Hager
and Zhang (2005), equation 4.1. It ends where half the squared Newton decrement (Boyd and Vandenberghe 2004, section
9.5.1), which estimates the distance to the optimum, is within the tolerance of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from embedcache.task import Floats
from embedcache.train.convex.curvature import Curvature, Inverse
from embedcache.train.convex.objective import Objective

_MEMORY = 20
_DECREASE, _SLOPE, _FLAT = 1e-4, 0.9, 1e-6
_TRIALS = 30
_NONE = (math.inf, math.inf)
_RENEW = frozenset({12, 24, 48, 96, 192, 384, 768})


class Walk:
    """One problem on its way to the optimum."""

    def __init__(self, problem: int, point: Floats, l2: float, tolerance: float, floor: float) -> None:
        """Begin at a point [D + 1, C]; where no step is left, a gap below ``floor`` is none."""
        self.problem, self.point, self.l2, self.tolerance, self.floor = problem, point, l2, tolerance, floor
        self.loss, self.gradient = math.inf, np.zeros_like(point)
        self.iterations = 0
        self.converged = self.stuck = False
        self._pairs: list[tuple[Floats, Floats, float]] = []
        self._before: tuple[float, Floats] | None = None  # the penalty before this one, and its optimum
        self._inverse: Inverse = np.copy
        self._seen: float | None = None  # the loss where the inverse is of
        self._direction = np.zeros_like(point)
        self._first = 0.0  # the slope where the line begins
        self._step, self._tried = 1.0, 0
        self._low, self._high = (0.0, 0.0), _NONE  # steps and slopes on both sides of the best one

    @property
    def ended(self) -> bool:
        return self.converged or self.stuck

    @property
    def doubtful(self) -> bool:
        """Whether it ended by a curvature of where the loss was ten times what it is, and the curvature with it."""
        return self.converged and self._seen is not None and self.loss < 0.1 * self._seen

    def renew(self, inverse: Inverse) -> None:
        """Take another inverse, of about where the walk is."""
        self._inverse, self._seen = inverse, None

    def reconsider(self) -> None:
        """Forget steps taken where the curvature was another, and ask again whether this is the optimum."""
        self._pairs = []
        self.enter(self.loss, self.gradient)

    def enter(self, loss: float, gradient: Floats) -> None:
        """Begin, or go on, where loss and gradient are these."""
        self.loss, self.gradient = loss, gradient
        self.converged = self.stuck = False
        self._seen = loss if self._seen is None else self._seen
        self._aim()

    def again(self, l2: float) -> None:
        """Go on with another penalty, from where the last two optima point to.

        What was learnt of the curvature is corrected, not forgotten. Going on from the last optimum itself costs 101
        products for 16 penalties and 5 folds where this costs 86.
        """
        if l2 == self.l2:
            return
        here = self.point
        if self._before is not None:
            gone = math.log(l2 / self.l2) / math.log(self.l2 / self._before[0])
            self.point = here + min(gone, 1.5) * (here - self._before[1])
        self._before = (self.l2, here)
        for step, change, _ in self._pairs:
            change[:-1] += (l2 - self.l2) * step[:-1]
        self._pairs = [(step, change, float(np.vdot(step, change))) for step, change, _ in self._pairs]
        self._pairs = [pair for pair in self._pairs if pair[2] > 0]
        self.l2 = l2
        self.iterations = 0

    def trial(self) -> Floats:
        """Return the point to look at next."""
        return np.asarray(self.point + self._step * self._direction)

    def judge(self, loss: float, gradient: Floats) -> bool:
        """Take the trial or shorten or lengthen the step; returns whether it was taken."""
        self._tried += 1
        slope = float(np.vdot(gradient, self._direction))
        if not (math.isfinite(loss) and math.isfinite(slope)):
            self._high = (self._step, math.inf)
            self._step = self._low[0] + 0.1 * (self._step - self._low[0])
        else:
            first = self._first
            far = slope >= _SLOPE * first
            lower = loss <= self.loss + _DECREASE * self._step * first
            level = slope <= (2 * _DECREASE - 1) * first and loss <= self.loss + _FLAT * abs(self.loss)
            if far and (lower or level):
                self._take(loss, gradient)
                return True
            if far:
                self._high = (self._step, slope)
            else:
                self._low = (self._step, slope)
            self._step = self._next()
        if self._tried >= _TRIALS:
            self.stuck = True
            self.converged = -self._first / 2 <= self.floor
        return False

    def _take(self, loss: float, gradient: Floats) -> None:
        step, change = self._step * self._direction, gradient - self.gradient
        self.point = self.point + step
        self.loss, self.gradient = loss, gradient
        self.iterations += 1
        self._seen = loss if self._seen is None else self._seen
        inner = float(np.vdot(step, change))
        if inner > 1e-12 * float(np.vdot(step, step)) ** 0.5 * float(np.vdot(change, change)) ** 0.5:
            self._pairs = [*self._pairs[-(_MEMORY - 1) :], (step, change, inner)]
        self._aim()

    def _aim(self) -> None:
        """Choose the direction, or end."""
        wanted = self.gradient.copy()
        shares = []
        for step, change, inner in reversed(self._pairs):
            share = float(np.vdot(step, wanted)) / inner
            shares.append(share)
            wanted -= share * change
        wanted = self._inverse(wanted)
        for (step, change, inner), share in zip(self._pairs, reversed(shares), strict=True):
            wanted += (share - float(np.vdot(change, wanted)) / inner) * step
        self._direction = -wanted
        self._first = float(np.vdot(self.gradient, self._direction))
        self._step, self._tried = 1.0, 0
        self._low, self._high = (0.0, self._first), _NONE
        if -self._first / 2 <= self.tolerance * abs(self.loss):
            # Rounding may make the slope positive, but only where there is nothing left to gain.
            self.converged = True

    def _next(self) -> float:
        """Return the step where the slope would be zero if it were linear, kept within the bracket."""
        (low, slope_low), (high, slope_high) = self._low, self._high
        if math.isinf(high):
            gained = slope_low - self._first
            guess = low * self._first / -gained if gained > 0 else 4 * low
            return min(max(guess, 2 * low), 10 * low)
        if math.isinf(slope_high):
            return low + 0.5 * (high - low)
        guess = low + (high - low) * slope_low / (slope_low - slope_high) if slope_high > slope_low else 0.0
        margin = 0.1 * (high - low)
        return min(max(guess, low + margin), high - margin)


def descend(
    objective: Objective, curvature: Curvature, walks: Sequence[Walk], most: int, *, renew: bool = True
) -> None:
    """Walk until every problem has ended, or has taken ``most`` steps; ``renew`` the curvature at the start as well."""

    def look(of: Sequence[Walk]) -> None:
        found = curvature.at([walk.point for walk in of], [walk.problem for walk in of], [walk.l2 for walk in of])
        for walk, inverse in zip(of, found, strict=True):
            walk.renew(inverse)

    def values(of: Sequence[Walk], points: list[Floats]) -> list[tuple[float, Floats]]:
        return objective(points, [walk.problem for walk in of], [walk.l2 for walk in of])

    if renew:
        look(walks)
    for walk, (loss, gradient) in zip(walks, values(walks, [walk.point for walk in walks]), strict=True):
        walk.enter(loss, gradient)
    for turn in range(1, 3 * most + 1):
        if doubtful := [walk for walk in walks if walk.doubtful]:
            look(doubtful)
            for walk in doubtful:
                walk.reconsider()
        active = [walk for walk in walks if not walk.ended and walk.iterations < most]
        if not active:
            return
        if turn in _RENEW:
            curvature.widen(turn)
            look(active)
        found = values(active, [walk.trial() for walk in active])
        for walk, (loss, gradient) in zip(active, found, strict=True):
            walk.judge(loss, gradient)
