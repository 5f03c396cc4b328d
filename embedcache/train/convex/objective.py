"""Losses and gradients of K problems over the same rows: one matrix product there, one back.

Products are in the dtype given, sums over rows of losses in float64. Five folds of twenty classes are one product with
a hundred columns, which runs at twice the speed of five with twenty; the rows that a fold holds out ride along with a
weight of 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from embedcache.task import Array, Floats
from embedcache.train.convex.design import Design
from embedcache.train.convex.workers import Workers

_SAFE = 60.0  # exp of logits within this range neither overflows nor vanishes in float32, so no maximum is subtracted


class Objective:
    """``sum_i w_i loss_i + l2 / 2 ||W||^2`` of each problem, and its gradient."""

    def __init__(self, design: Design, dtype: type[np.floating], workers: Workers) -> None:
        self.design = design
        self._workers = workers
        self._dtype = np.dtype(dtype)
        self._x = design.x if dtype is np.float64 else np.ascontiguousarray(design.x, dtype)
        self._masses: dict[tuple[int, ...], Array] = {}
        self.evaluations = 0

    def __call__(
        self, points: Sequence[Floats], problems: Sequence[int], strengths: Sequence[float]
    ) -> list[tuple[float, Floats]]:
        """Return loss and gradient [D + 1, C] at a point [D + 1, C] of each of the problems."""
        design = self.design
        self.evaluations += len(points)
        scales = [design.scale_of(problem)[:, None] for problem in problems]
        weights = [point[:-1] / scale for point, scale in zip(points, scales, strict=True)]
        stacked = np.hstack(weights)
        bias = np.concatenate([point[-1] for point in points]) - design.shift @ stacked
        losses, back, sums = self._pass(stacked.astype(self._dtype), bias.astype(self._dtype), tuple(problems))
        found = []
        for at, (point, l2) in enumerate(zip(points, strengths, strict=True)):
            own = slice(at * design.columns, (at + 1) * design.columns)
            gradient = np.empty(design.shape)
            gradient[:-1] = (back[:, own] - np.outer(design.shift, sums[own])) / scales[at] + l2 * point[:-1]
            gradient[-1] = sums[own]
            found.append((float(losses[at]) + l2 / 2 * float(np.vdot(point[:-1], point[:-1])), gradient))
        return found

    def _pass(self, weight: Array, bias: Array, problems: tuple[int, ...]) -> tuple[Floats, Floats, Floats]:
        """Return losses [K], and the residuals' product with the rows [D, K C] and with ones [K C]."""
        n, width = len(self._x), weight.shape[1]
        mass = self._mass(problems)
        act = self._softmax if self.design.softmax else self._sigmoid

        def part(block: slice) -> tuple[Floats, Array, Array]:
            rows = np.ascontiguousarray(self._x[block], self._dtype)
            logits = rows @ weight
            logits += bias
            losses = act(logits, self.design.y[block], None if mass is None else mass[block])
            return losses, rows.T @ logits, np.ones(len(rows), self._dtype) @ logits

        losses, sums, back = np.zeros(len(problems)), np.zeros(width), np.zeros((len(weight), width))
        for loss, product, total in self._workers.each(n, max(weight.shape), part):
            losses += loss
            back += product
            sums += total
        return losses, back, sums

    def _mass(self, problems: tuple[int, ...]) -> Array | None:
        """Return the weight of each row in each of the problems [N, K]; None where all are 1."""
        if self.design.weight is None:
            return None
        if problems not in self._masses:
            self._masses = {problems: np.ascontiguousarray(self.design.weight[list(problems)].T, self._dtype)}
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
        small = np.exp(-np.abs(z))
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
