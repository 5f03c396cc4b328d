"""Squared errors with a penalty, ``sum_i w_i ||y_i - W x_i - b||^2 / 2 + l2 / 2 ||W||^2``, in closed form and float64.

One eigendecomposition of the centred moments of each problem serves every penalty (Hastie, Tibshirani and Friedman
2009, equation 3.47). The moments of a fold's training rows are those of all rows less those of the rows it holds out.
Of features more than rows it is the rows' inner products that are decomposed: the same eigenvectors, but for those that
no row has a part in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedcache.task import Floats
from embedcache.train.convex.design import Design, Solution
from embedcache.train.convex.workers import Workers

_WIDE = 1024
"""Features from which on the inner products of fewer rows are decomposed: nobody could wait for those of 50,000."""


@dataclass(frozen=True, eq=False)
class Squares:
    """The problem in the eigenvectors of its own moments."""

    design: Design
    problem: int
    mass: float
    centre: Floats  # [D + R], of features and targets, about the design's mean
    values: Floats  # [E], D of them or, of fewer rows, N
    vectors: Floats  # [D, E]
    cross: Floats  # [E, R], moments of eigenvectors and targets
    total: float  # the squared error of the mean

    def solve(self, l2: float) -> Solution:
        """Return the optimum; the solution of least norm where ``l2`` is 0 and there are several."""
        width = len(self.vectors)
        below = self.values + l2
        small = below <= max(len(self.design.x), width) * np.finfo(np.float64).eps * max(self.values.max(initial=0), l2)
        turned = np.where(small, 0.0, 1 / np.where(small, 1.0, below))[:, None] * self.cross
        gradient = self.values[:, None] * turned - self.cross + l2 * turned
        point = np.empty(self.design.shape)
        point[:-1] = self.vectors @ turned
        scaled = self.centre[:width] / self.design.scale_of(self.problem)
        point[-1] = self.centre[width:] - scaled @ point[:-1]
        weight, bias = self.design.to_head(point, self.problem)
        error = self.total - 2 * np.vdot(turned, self.cross) + np.vdot(turned, self.values[:, None] * turned)
        loss = max(0.0, float(error)) / 2 + l2 / 2 * float(np.vdot(turned, turned))
        return Solution(weight, bias, l2, loss, float(np.linalg.norm(gradient[~small])), 1, True)


def squares(design: Design, workers: Workers) -> list[Squares]:
    """Return each problem, its moments taken in one reading of the rows."""
    masses = np.ones((1, len(design.x))) if design.weight is None else design.weight
    width = design.x.shape[1]
    if width > max(_WIDE, len(design.x)):
        return [_wide(design, problem, mass) for problem, mass in enumerate(masses)]
    held = None
    if len(masses) > 1:
        # Few rows are held out: moments of those, to be subtracted, cost less than moments of those that are not.
        whole = masses.max(axis=0)
        held = [np.flatnonzero(mass != whole) for mass in masses]
        masses = np.vstack([whole[None], [whole - mass for mass in masses]])

    def moments(mass: Floats, rows: npt.NDArray[np.intp]) -> Floats:
        def part(block: slice) -> Floats:
            own = rows[block]
            x = design.x[own].astype(np.float64) - design.shift
            values = np.hstack([x, design.y[own], np.ones((len(own), 1))])
            return np.asarray((values * mass[own, None]).T @ values)

        total = np.zeros((width + design.columns + 1,) * 2)
        for each in workers.each(len(rows), width, part):
            total += each
        return total

    every = np.arange(len(design.x))
    sums = [moments(mass, every if held is None or not at else held[at - 1]) for at, mass in enumerate(masses)]
    if held is not None:
        sums = [sums[0] - each for each in sums[1:]]
    return [_squares(design, problem, moments) for problem, moments in enumerate(sums)]


def _squares(design: Design, problem: int, moments: Floats) -> Squares:
    width, mass = design.x.shape[1], float(moments[-1, -1])
    centre = moments[-1, :-1] / mass
    inner = moments[:-1, :-1] - mass * np.outer(centre, centre)
    scale = design.scale_of(problem)
    values, vectors = np.linalg.eigh(inner[:width, :width] / np.outer(scale, scale))
    cross = vectors.T @ (inner[:width, width:] / scale[:, None])
    total = float(np.trace(inner[width:, width:]))
    return Squares(design, problem, mass, centre, np.maximum(values, 0), vectors, cross, total)


def _wide(design: Design, problem: int, masses: Floats) -> Squares:
    rows = np.flatnonzero(masses)
    own = masses[rows, None]
    mass = float(own.sum())
    x, y = design.x[rows].astype(np.float64) - design.shift, np.asarray(design.y[rows], np.float64)
    centre = np.concatenate([(own * x).sum(axis=0), (own * y).sum(axis=0)]) / mass
    x = (x - centre[: x.shape[1]]) / design.scale_of(problem) * np.sqrt(own)
    y = (y - centre[x.shape[1] :]) * np.sqrt(own)
    values, vectors = np.linalg.eigh(x @ x.T)
    there = values > len(rows) * np.finfo(np.float64).eps * values.max(initial=0)
    values, vectors = values[there], vectors[:, there]
    roots = np.sqrt(values)
    cross = roots[:, None] * (vectors.T @ y)
    return Squares(design, problem, mass, centre, values, x.T @ (vectors / roots), cross, float(np.vdot(y, y)))
