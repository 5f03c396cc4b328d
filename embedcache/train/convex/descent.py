"""Losses of K convex problems over the same rows, and limited-memory BFGS that moves them in lock-step.

Products are in the dtype given, sums over rows of losses in float64. Five folds of twenty classes are one product with
a hundred columns, which runs at twice the speed of five with twenty; the rows that a fold holds out ride along with a
weight of 0.

Nocedal and Wright (2006), algorithm 7.4, with the inverse of ``curvature``, scaled, as the first matrix. The line
search uses that along a line a convex function's slope only grows, so slopes alone bracket the step. A step is taken
where it meets Wolfe's conditions or, near the optimum where losses differ by less than their rounding, the approximate
ones of Hager and Zhang (2005), equation 4.1. It ends where half the squared Newton decrement (Boyd and Vandenberghe
2004, section 9.5.1), which estimates the distance to the optimum, is within the tolerance of the loss.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from embedcache.task import Array, Floats
from embedcache.threads import Workers, blocks
from embedcache.train.convex.curvature import Curvature, Inverse
from embedcache.train.convex.design import Design, Segment, segments

Ordered = tuple[Array, Array, Floats | None, list[Segment]]
"""What ``segments`` returns."""
Places = npt.NDArray[np.intp]
_Part = tuple[slice, Places, Array, Array, Array | None]

# Losses and gradients of K problems over the same rows: one matrix product there, one back.


_SAFE = 60.0  # exp of logits within this range neither overflows nor vanishes in float32, so no maximum is subtracted


class Objective:
    """``sum_i w_i loss_i + l2 / 2 ||W||^2`` of each problem, and its gradient."""

    def __init__(
        self, design: Design, dtype: type[np.floating], workers: Workers, ordered: Ordered | None = None
    ) -> None:
        self.design = design
        self._workers = workers
        self._dtype = np.dtype(dtype)
        x, self._y, self._weight, self._segments = ordered or segments(design)
        self._x = x if dtype is np.float64 else np.ascontiguousarray(x, dtype)
        self._masses: dict[tuple[int, ...], Array] = {}

    def __call__(
        self, points: Sequence[Floats], problems: Sequence[int], strengths: Sequence[float]
    ) -> list[tuple[float, Floats]]:
        """Return loss and gradient [D + 1, C] at a point [D + 1, C] of each of the problems."""
        design = self.design
        scales = [design.scale_of(problem)[:, None] for problem in problems]
        weights = [point[:-1] / scale for point, scale in zip(points, scales, strict=True)]
        stacked = np.hstack(weights)
        bias = np.concatenate([point[-1] for point in points]) - design.shift @ stacked
        losses, back, sums = self._pass(stacked.astype(self._dtype), bias.astype(self._dtype), tuple(problems))
        results = []
        for place, (point, l2) in enumerate(zip(points, strengths, strict=True)):
            own = slice(place * design.columns, (place + 1) * design.columns)
            gradient = np.empty(design.shape)
            gradient[:-1] = (back[:, own] - np.outer(design.shift, sums[own])) / scales[place] + l2 * point[:-1]
            gradient[-1] = sums[own]
            results.append((float(losses[place]) + l2 / 2 * float(np.vdot(point[:-1], point[:-1])), gradient))
        return results

    def _pass(self, weight: Array, bias: Array, problems: tuple[int, ...]) -> tuple[Floats, Floats, Floats]:
        """Return losses [K], and the residuals' product with the rows [D, K C] and with ones [K C]."""
        classes = self.design.columns
        mass = self._mass(problems)
        act = self._softmax if self.design.softmax else self._sigmoid
        parts = []
        for segment in self._segments:
            places = np.flatnonzero(segment.inside[list(problems)])
            if not len(places):
                continue
            every = len(places) == len(problems)
            columns = (places[:, None] * classes + np.arange(classes)).reshape(-1)
            own = (weight, bias) if every else (np.ascontiguousarray(weight[:, columns]), bias[columns])
            own_mass = None if segment.plain or mass is None else mass if every else mass[:, places]
            start = segment.rows.start
            for block in blocks(segment.rows.stop - start, max(weight.shape)):
                parts.append((slice(start + block.start, start + block.stop), places, *own, own_mass))

        def part(piece: _Part) -> tuple[Places, Floats, Array, Array]:
            block, places, weight, bias, mass = piece
            rows = np.ascontiguousarray(self._x[block], self._dtype)
            logits = rows @ weight
            logits += bias
            losses = act(logits, self._y[block], None if mass is None else mass[block])
            return places, losses, rows.T @ logits, np.ones(len(rows), self._dtype) @ logits

        losses, sums, back = np.zeros(len(problems)), np.zeros(weight.shape[1]), np.zeros(weight.shape)
        for places, loss, product, total in self._workers.run(parts, part):
            losses[places] += loss
            for number, place in enumerate(places):
                to, of = (slice(at * classes, (at + 1) * classes) for at in (place, number))
                back[:, to] += product[:, of]
                sums[to] += total[of]
        return losses, back, sums

    def _mass(self, problems: tuple[int, ...]) -> Array | None:
        """Return the weight of each row in each of the problems [N, K]; None where all are 0 or 1 and known."""
        if self._weight is None or all(segment.plain for segment in self._segments):
            return None
        if problems not in self._masses:
            self._masses = {problems: np.ascontiguousarray(self._weight[list(problems)].T, self._dtype)}
        return self._masses[problems]

    def _softmax(self, logits: Array, y: Array, mass: Array | None) -> Floats:
        """Turn logits [n, K C] into residuals in place, and return the loss of each problem [K]."""
        classes = self.design.columns
        own = logits.reshape(-1, classes)
        flat = logits.reshape(-1)
        problems = logits.shape[1] // classes
        label = np.arange(0, flat.size, classes) + np.repeat(y, problems)
        if own.max() > _SAFE or own.min() < -_SAFE:
            own -= own.max(axis=1, keepdims=True)
        of_label = flat[label]
        np.exp(own, out=own)
        # A matrix product adds short rows faster than sum(axis=1). Here the flag of an invalid operation was raised
        # once, on a loaded machine, and never again in trying; a total that is not finite makes a loss that is not, and
        # such a step is refused (``Walk.judge``).
        with np.errstate(invalid="ignore"):
            total = own @ np.ones(classes, own.dtype)
        losses = (np.log(total) - of_label).reshape(len(y), problems)
        share = np.reciprocal(total) if mass is None else mass.reshape(-1) / total
        own *= share[:, None]
        flat[label] -= own.dtype.type(1) if mass is None else mass.reshape(-1)
        return _weighed(losses, mass)

    def _sigmoid(self, logits: Array, y: Array, mass: Array | None) -> Floats:
        classes = self.design.columns
        z = logits.reshape(len(y), -1, classes)
        on = y.astype(logits.dtype)[:, None, :]
        small = np.exp(-np.abs(z))  # of the absolute value, so that nothing overflows
        losses = np.log1p(small) + np.maximum(z, 0) - on * z
        p = np.where(z >= 0, 1, small) / (1 + small)
        np.subtract(p, on, out=z)
        if self.design.on is not None:
            weight = 1 + on * (self.design.on - 1).astype(logits.dtype)
            losses *= weight
            z *= weight
        if mass is not None:
            z *= mass[:, :, None]
        return _weighed(losses.sum(axis=2), mass)


def _weighed(losses: Array, mass: Array | None) -> Floats:
    """Return the sum over rows [K] of losses [n, K], in float64."""
    if mass is None:
        return np.asarray(losses.sum(axis=0, dtype=np.float64))
    return np.asarray(np.einsum("nk,nk->k", losses.astype(np.float64), mass.astype(np.float64)))


_MEMORY = 20
_SCALES = 3  # the last alone costs up to a fifth more evaluations; the first of twenty were of another place


class Pairs:
    """The last steps and what they changed of the gradient, and the direction that they and a first inverse give.

    The two loops of the algorithm are written as four products with all steps and changes: one vector after the other
    they read and write the memory seven times as often, which for five folds of 77 classes took longer than the
    products with the rows.
    """

    def __init__(self, shape: tuple[int, ...], dtype: type[np.floating]) -> None:
        self._dtype, self._shape, self._count = dtype, shape, 0
        self._scales: deque[float] = deque(maxlen=_SCALES)
        self._steps = self._changes = np.empty((0, math.prod(shape)), dtype)
        self._cross = np.empty((0, 0))  # of steps and changes, [m, m]

    def add(self, step: Floats, change: Floats) -> None:
        """Remember one more, and forget the oldest of more than there is room for."""
        if not len(self._steps):
            self._steps, self._changes = np.empty((2, _MEMORY, math.prod(self._shape)), self._dtype)
            self._cross = np.zeros((_MEMORY, _MEMORY))
        if self._count == _MEMORY:
            self._steps[:-1], self._changes[:-1] = self._steps[1:], self._changes[1:]
            self._cross[:-1, :-1] = self._cross[1:, 1:]
            self._count -= 1
        last = self._count
        self._count += 1
        self._steps[last], self._changes[last] = step.reshape(-1), change.reshape(-1)
        steps, changes = self._steps[: self._count], self._changes[: self._count]
        self._cross[last, : self._count] = changes @ steps[last]
        self._cross[: self._count, last] = steps @ changes[last]

    def clear(self) -> None:
        self._count = 0
        self._scales.clear()

    def scale(self, inverse: Inverse, last: int = 1) -> None:
        """Measure by how much the inverse is too large, by the ``last`` changes and steps.

        As a product of sums it misses curvature where sure and unsure rows differ: of 77 classes that separate, its
        steps were 2 to 4 times too long, so that nearly every one was tried twice. Shanno and Phua (1978).
        """
        for place in range(max(0, self._count - last), self._count):
            change = self._changes[place].astype(np.float64)
            met = float(np.vdot(change, inverse(change.reshape(self._shape))))
            if met > 0:
                self._scales.append(float(self._cross[place, place]) / met)

    def stiffen(self, l2: float, columns: int) -> None:
        """Correct the changes for a penalty that is stronger by ``l2``; the bias, the last ``columns``, has none."""
        if not self._count:
            return
        steps, changes = self._steps[: self._count], self._changes[: self._count]
        changes[:, :-columns] += self._dtype(l2) * steps[:, :-columns]
        cross = steps @ changes.T
        kept = np.flatnonzero(np.diag(cross) > 0)
        self._count = len(kept)
        self._steps[: self._count], self._changes[: self._count] = steps[kept], changes[kept]
        self._cross[: self._count, : self._count] = cross[np.ix_(kept, kept)]

    def direction(self, gradient: Floats, inverse: Inverse) -> Floats:
        """Return the quasi-Newton direction, uphill."""
        count = self._count
        if not count:
            return inverse(gradient)
        steps, changes, cross = self._steps[:count], self._changes[:count], self._cross[:count, :count]
        met = (steps @ gradient.reshape(-1).astype(self._dtype)).astype(np.float64)
        shares = np.zeros(count)
        for place in reversed(range(count)):
            shares[place] = (met[place] - cross[place] @ shares) / cross[place, place]
        wanted = inverse(gradient - (shares.astype(self._dtype) @ changes).reshape(gradient.shape))
        if self._scales:
            wanted = wanted * math.exp(sum(map(math.log, self._scales)) / len(self._scales))
        met = (changes @ wanted.reshape(-1).astype(self._dtype)).astype(np.float64)
        left = np.zeros(count)
        for place in range(count):
            left[place] = shares[place] - (met[place] + left @ cross[:, place]) / cross[place, place]
        return np.asarray(wanted + (left.astype(self._dtype) @ steps).reshape(gradient.shape))


_DECREASE, _SLOPE, _FLAT = 1e-4, 0.9, 1e-6
_TRIALS = 30
_NONE = (math.inf, math.inf)
_RENEW = frozenset({12, 24, 48, 96, 192, 384, 768})
"""Turns at which the curvature is taken anew: ever more rarely, for it changes less and costs an eigendecomposition."""


class Walk:
    """One problem on its way to the optimum."""

    def __init__(self, problem: int, point: Floats, l2: float, tolerance: float, enough: float, floor: float) -> None:
        """Begin at a point [D + 1, C].

        It ends where the gap is below ``tolerance`` times the loss, or below ``enough``; where no step is left, a gap
        below ``floor`` is none.
        """
        self.problem, self.point, self.l2, self.tolerance = problem, point, l2, tolerance
        self.enough, self.floor = enough, floor
        self.loss, self.gradient = math.inf, np.zeros_like(point)
        self.iterations = 0
        self.converged = self.stuck = False
        # Who wants few digits of the optimum needs few of the direction, and float32 halves what is read for it.
        self._pairs = Pairs(point.shape, np.float32 if enough > 0 else np.float64)
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
        self._pairs.scale(inverse, _SCALES)

    def reconsider(self) -> None:
        """Forget steps taken where the curvature was another, and ask again whether this is the optimum."""
        self._pairs.clear()
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
        self._pairs.stiffen(l2 - self.l2, self.point.shape[1])
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
            # Wolfe's second condition, his first, and the approximate first one of Hager and Zhang.
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
        # A pair whose curvature is lost in rounding would spoil every direction that is computed from it.
        if inner > 1e-12 * float(np.vdot(step, step)) ** 0.5 * float(np.vdot(change, change)) ** 0.5:
            self._pairs.add(step, change)
            self._pairs.scale(self._inverse)
        self._aim()

    def _aim(self) -> None:
        """Choose the direction, or end."""
        self._direction = -self._pairs.direction(self.gradient, self._inverse)
        self._first = float(np.vdot(self.gradient, self._direction))
        self._step, self._tried = 1.0, 0
        self._low, self._high = (0.0, self._first), _NONE
        if -self._first / 2 <= max(self.tolerance * abs(self.loss), self.enough):
            # Rounding may make the slope positive, but only where there is nothing left to gain.
            self.converged = True

    def _next(self) -> float:
        """Return the step where the slope would be zero if it were linear, kept within the bracket."""
        (low, slope_low), (high, slope_high) = self._low, self._high
        if math.isinf(high):
            gained = slope_low - self._first
            guess = low * self._first / -gained if gained > 0 else 4 * low
            return min(max(guess, 2 * low), 10 * low)  # never far beyond what was seen
        if math.isinf(slope_high):
            return low + 0.5 * (high - low)
        guess = low + (high - low) * slope_low / (slope_low - slope_high) if slope_high > slope_low else 0.0
        margin = 0.1 * (high - low)
        return min(max(guess, low + margin), high - margin)


def descend(
    objective: Objective,
    curvature: Curvature,
    walks: Sequence[Walk],
    most: int,
    workers: Workers,
    *,
    renew: bool = True,
) -> None:
    """Walk until every problem has ended, or has taken ``most`` steps; ``renew`` the curvature at the start as well."""

    def look(of: Sequence[Walk]) -> None:
        inverses = curvature.at([walk.point for walk in of], [walk.problem for walk in of], [walk.l2 for walk in of])
        for walk, inverse in zip(of, inverses, strict=True):
            walk.renew(inverse)

    def values(of: Sequence[Walk], points: list[Floats]) -> list[tuple[float, Floats]]:
        return objective(points, [walk.problem for walk in of], [walk.l2 for walk in of])

    if renew:
        look(walks)
    first = zip(walks, values(walks, [walk.point for walk in walks]), strict=True)
    deque(workers.run(first, lambda at: at[0].enter(*at[1])), maxlen=0)
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
        results = values(active, [walk.trial() for walk in active])
        # Each walk by itself is vectors of all weights, which would leave all threads but one waiting.
        deque(workers.run(zip(active, results, strict=True), lambda at: at[0].judge(*at[1])), maxlen=0)
