"""An approximate inverse Hessian that every penalty, class and fold shares the dear part of.

The Hessian of row i is ``L_i (x) x_i x_i^T`` with ``L_i = diag(p_i) - p_i p_i^T``. Boehning (1992) bounds every ``L_i``
by one matrix, so that one factorisation of ``X^T X`` serves all iterations. Here the sum of Kronecker products is
approximated by a product of sums instead, as K-FAC does (Martens and Grosse 2015): ``B (x) G`` with ``B = sum_i L_i``
and ``G`` the mean of ``x x^T`` weighted by ``tr L_i``, both at the point where the solver is. For one logit it is the
Hessian itself, up to the rows that are sampled for ``G``; for many classes it follows the shrinking probabilities,
where a fixed bound is loose by a factor of their number. With ``G = U diag(g) U^T`` and ``B = Q diag(b) Q^T``,

    (B (x) G + l2 I)^-1 V = U [ (U^T V Q) / (g b^T + l2) ] Q^T

for any ``l2``: a path of penalties needs no new factorisation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from embedcache.task import Array, Floats
from embedcache.threads import Workers
from embedcache.train.convex.design import Design

Inverse = Callable[[Floats], Floats]
"""Gradient [D + 1, C] -> step [D + 1, C]."""

_ROWS_PER_FEATURE = 8  # 4 costs a fifth more iterations, 2 half as many again; for hard problems see ``widen``
_WIDE = 4
_MOST_NUMBERS = 1 << 26  # in the rows sampled: 256 MB
_MOST_FEATURES = 4096  # above this the rows sampled are fewer than the features, and their inner products are used


@dataclass(frozen=True, eq=False)
class _Basis:
    """``G``: centre [D], eigenvectors [D, R] and eigenvalues [R]; ``rest`` is the curvature of all other directions."""

    centre: Floats
    vectors: Array
    values: Array
    rest: float


class Curvature:
    """Rows sampled once, from which the approximation is rebuilt at any point."""

    def __init__(self, design: Design, workers: Workers) -> None:
        features = design.x.shape[1]
        self._design, self._workers = design, workers
        self._sample(max(_ROWS_PER_FEATURE * features, 8 * design.columns, 2048))

    def widen(self, taken: int) -> None:
        """Sample more rows from now on, if their ``G`` costs no more evaluations than were ``taken`` already.

        For a problem that takes long, in which a better estimate pays.
        """
        n, features = self._design.x.shape
        rows = min(n, _WIDE * len(self._x))
        columns = max(8, self._design.columns * self._design.problems)  # fewer are no faster: reading the rows is
        if not self._all and rows * features <= 4 * n * columns * taken:
            self._sample(rows)

    def _sample(self, wanted: int) -> None:
        design = self._design
        n, features = design.x.shape
        most = _MOST_FEATURES // 2 if features > _MOST_FEATURES else max(2048, _MOST_NUMBERS // features)
        wanted = min(wanted, most, n)
        rows = np.sort(np.random.default_rng(0).permutation(n)[:wanted])
        scale = np.ones(features) if design.scale is None else design.scale.mean(axis=0)
        # In place, and without the rows sampled before: with four copies this was the peak of the whole solver.
        self._x = np.empty((0, features), np.float32)
        x = design.x[rows]
        x -= design.shift.astype(x.dtype)
        x /= scale.astype(x.dtype)
        self._x = x.astype(np.float32, copy=False)
        self._y = design.y[rows]
        self._all = wanted in (n, most)
        mass = np.ones((1, len(rows))) if design.weight is None else design.weight[:, rows]
        self._mass = mass * (n / wanted)  # the sampled rows stand for all of them

    @property
    def spread(self) -> float:
        """The mean squared length of a row, standardised where that is asked for."""
        return float(np.einsum("nd,nd->", self._x, self._x) / len(self._x))

    def at(self, points: Sequence[Floats], problems: Sequence[int], strengths: Sequence[float]) -> list[Inverse]:
        """Return an inverse for each problem at its point [D + 1, C]; they share one ``G``."""
        width = self._x.shape[1]
        stacked = np.hstack([point[:-1] for point in points]).astype(np.float32)
        biases = np.concatenate([point[-1] for point in points]).astype(np.float32)

        def outputs(block: slice) -> tuple[list[Floats], Floats]:
            logits = np.split(self._x[block] @ stacked + biases, len(points), axis=1)
            terms = [self._outputs(part, block, problem) for part, problem in zip(logits, problems, strict=True)]
            return [outer for outer, _ in terms], np.sum([own for _, own in terms], axis=0)

        outers: list[Floats] = []
        unsure = []
        for own, weights in self._workers.each(len(self._x), max(width, len(biases)), outputs):
            # Added as they come: those of a thousand classes are 8 MB a block and problem.
            outers = [total + more for total, more in zip(outers, own, strict=True)] if outers else own
            unsure.append(weights)
        basis = self._renewed(np.concatenate(unsure))

        def inverse(of: tuple[Floats, float, int]) -> Inverse:
            outer, l2, problem = of
            return _inverse(basis, outer, l2, self._design.softmax, float(self._mass[problem].sum()))

        return list(self._workers.run(zip(outers, strengths, problems, strict=True), inverse))

    def _outputs(self, logits: Array, rows: slice, problem: int) -> tuple[Floats, Floats]:
        """Return the rows' share of ``B`` [C, C] (its diagonal [C] for sigmoids) and the weight ``tr L_i`` of each."""
        mass = self._mass[problem, rows]
        if self._design.softmax:
            # In float64: how far a probability is from 1 is what counts.
            p = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float64)
            p /= p.sum(axis=1, keepdims=True)
            weighed = p * mass[:, None]
            outer = np.diag(weighed.sum(axis=0)) - weighed.T @ p
            return outer, np.maximum(0.0, mass * (1 - np.einsum("nc,nc->n", p, p)))
        small = np.exp(-np.abs(logits), dtype=np.float64)
        spread = small / np.square(1 + small) * mass[:, None]
        if self._design.on is not None:
            spread *= 1 + self._y[rows] * (self._design.on - 1)
        return spread.sum(axis=0), spread.sum(axis=1)

    def _renewed(self, unsure: Floats) -> _Basis:
        """Return ``G`` of the rows sampled, whose weights are proportional to ``unsure`` [T]."""
        import scipy.linalg

        x, total = self._x, unsure.sum()
        # A thousandth of it by equal parts: where all rows but two are certain, two rows are not an estimate.
        even = np.full(len(x), 1 / len(x))
        share = 0.999 * unsure / total + 0.001 * even if total > 0 else even
        centre = share.astype(np.float32) @ x
        root = np.sqrt(share).astype(np.float32)[:, None]

        def square(block: slice) -> Array:
            rows = (x[block] - centre) * root[block]
            return np.asarray(rows.T @ rows)

        every = len(x) == len(self._design.x)
        if few := len(x) < x.shape[1]:
            rows = (x - centre) * root
            gram = rows @ rows.T
        else:
            gram = sum(self._workers.each(len(x), x.shape[1], square), np.zeros((x.shape[1],) * 2, np.float32))
        # BLAS has one thread here, which of this size LAPACK is faster with than with two.
        values, vectors = scipy.linalg.eigh(gram, driver="evd", overwrite_a=True, check_finite=False)
        values = np.maximum(values, 0)
        if not few:
            return _Basis(centre.astype(np.float64), vectors, values, 0.0)
        # Fewer rows than features: their inner products have the same eigenvalues, and far fewer numbers.
        kept = values > values.max() * 1e-6
        values, vectors = values[kept], rows.T @ (vectors[:, kept] / np.sqrt(values[kept]))
        # Rows that were not sampled curve the other directions too, about as much as the flattest direction seen. Where
        # every row was sampled nothing but the penalty curves them.
        rest = 0.0 if every or not len(values) else float(values.min())
        return _Basis(centre.astype(np.float64), vectors, values, rest)


def _inverse(basis: _Basis, block: Floats, l2: float, softmax: bool, mass: float) -> Inverse:
    turn: Array | None = None
    own = block
    if softmax:
        # Adding the same to every class changes nothing but the penalty: give that direction an ordinary curvature.
        own, turned = np.linalg.eigh(block + np.trace(block) / len(block) ** 2)
        turn = turned.astype(np.float32)
    # Where all rows are certain nothing is curved, and a step divided by it would be endless.
    own = np.maximum(own, max(1e-6 * own.max(), 1e-16 * mass))
    below = (np.outer(basis.values, own) + l2).astype(np.float32)
    rest = basis.rest * own + l2
    square = basis.vectors.shape[1] == basis.vectors.shape[0]
    vectors = basis.vectors

    def apply(gradient: Floats) -> Floats:
        bias = gradient[-1]
        # Around the weighted centre weights and biases are uncoupled: go there, divide, come back.
        inner = (gradient[:-1] - np.outer(basis.centre, bias)).astype(np.float32)
        if turn is not None:
            inner, bias = inner @ turn, bias @ turn
        within = vectors.T @ inner
        step = np.empty_like(gradient)
        divided = within / below
        if square:
            weights = vectors @ divided
        else:
            weights = inner / rest.astype(np.float32) + vectors @ (divided - within / rest.astype(np.float32))
        bias = bias / own
        if turn is not None:
            weights, bias = weights @ turn.T, bias @ turn.T
        step[:-1] = weights
        step[-1] = bias - basis.centre @ step[:-1]
        return step

    return apply
