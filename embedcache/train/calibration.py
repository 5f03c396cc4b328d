"""What is fitted on validation after a head is trained: its temperature, or from which probability a label is on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from embedcache.errors import SpecError, TrainingError
from embedcache.wording import counted

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

LOWEST, HIGHEST = 0.05, 20.0
"""The bounds of a temperature."""
FEWEST_ROWS = 10
"""With fewer labelled rows nothing is fitted: the temperature is 1."""
_OUT_OF_REACH = 20.0
_STEPS = 60


def fit_temperature(logits: Array, y: Array) -> float:
    """Return the temperature T under which ``softmax(logits / T)`` has the least log loss (Guo et al. 2017).

    ``logits`` is float [N, C], ``y`` int64 [N], -1 for rows without label, which do not count. The loss is convex in
    1 / T, and Newton's steps are kept between bounds that close in, so that it ends within [0.05, 20] whatever comes.
    Where every row is right the loss falls for ever as T goes to 0; targets are then smoothed by 1 / (N + 2), as
    Platt (1999) does, for it would be a mistake to learn from a few dozen right rows that none can be wrong. The loss
    on these rows is never above that at T = 1, which is what comes back from too few of them. Rows of a class that
    training never saw do not count, for no temperature helps them; its logit is the same in every row, and far (20 or
    more) below the highest.

    Raises ``TrainingError`` for logits that are not finite, ``SpecError`` for shapes that do not fit.
    """
    z, y = np.asarray(logits, np.float64), np.asarray(y)
    if z.ndim != 2 or y.shape != z.shape[:1]:
        raise SpecError(f"y {y.shape} does not fit logits {z.shape}: expected one class for each row")
    z, y = z[y != -1], y[y != -1].astype(np.int64)
    if len(y) and (y.min() < 0 or y.max() >= z.shape[1]):
        raise SpecError(f"classes go from {y.min()} to {y.max()}, logits have {counted(z.shape[1], 'column')}")
    if not np.isfinite(z).all():
        raise TrainingError("logits are not finite: nothing can be calibrated on them")
    if len(y) < FEWEST_ROWS or z.shape[1] < 2:
        return 1.0
    same = (z == z[:1]).all(axis=0)
    same &= not same.all()  # a head that says the same of every row says it of classes it saw
    z = z - z.max(axis=1, keepdims=True)
    reachable = ~(same & (z <= -_OUT_OF_REACH).all(axis=0))
    z, y = z[reachable[y]], y[reachable[y]]
    own = z[np.arange(len(y)), y]
    if len(own) < FEWEST_ROWS:
        return 1.0
    target = own if own.any() else z[:, reachable].mean(axis=1) / (len(own) + 2)
    sharpness = _least(z, float(target.sum()))
    return 1 / sharpness if _loss(z, own, sharpness) <= _loss(z, own, 1.0) else 1.0


def _least(z: Floats, target: float) -> float:
    """Return the beta in [1/20, 20] that makes ``sum logsumexp(beta z) - beta target`` least."""
    low, high = 1 / HIGHEST, 1 / LOWEST
    beta = 1.0
    for _ in range(_STEPS):
        p = np.exp(beta * z)
        p /= p.sum(axis=1, keepdims=True)
        weighted = p * z
        mean = weighted.sum(axis=1)
        slope = float(mean.sum()) - target
        if slope == 0:
            return beta
        low, high = (low, beta) if slope > 0 else (beta, high)
        curvature = float((weighted * z).sum() - mean @ mean)
        step = beta - slope / curvature if curvature > 0 else math.inf
        # Newton where it stays between the bounds; otherwise their geometric mean, beta being a scale.
        new = step if low < step < high else math.sqrt(low * high)
        if abs(new - beta) <= 1e-12 * beta:
            return new
        beta = new
    return beta


def _loss(z: Floats, own: Floats, beta: float) -> float:
    return float(np.log(np.exp(beta * z).sum(axis=1)).sum() - beta * own.sum())


def fit_thresholds(probabilities: Array, y: Array) -> Floats:
    """Return for each class the threshold under which its F1 is highest, float64 [C]; a label is on at or above it.

    ``probabilities`` is float [N, C], ``y`` uint8 [N, C]; rows that hold 255 do not count. Every distinct
    probability is tried. The threshold lies half-way between the lowest one taken and the highest one left out, so
    that rounding cannot move a row across. 0.5 stays where nothing beats it, as for a class without positives; of
    equally good thresholds the nearest to 0.5 is taken.

    Raises ``TrainingError`` for probabilities that are not finite, ``SpecError`` for shapes that do not fit.
    """
    p, y = np.asarray(probabilities, np.float64), np.asarray(y)
    if p.ndim != 2 or y.shape != p.shape:
        raise SpecError(f"y {y.shape} does not fit probabilities {p.shape}: expected one label for each")
    labelled = (y != 255).all(axis=1)
    p, y = p[labelled], y[labelled] == 1
    if not np.isfinite(p).all():
        raise TrainingError("probabilities are not finite: no threshold can be fitted on them")
    return np.array([_threshold(p[:, column], y[:, column]) for column in range(p.shape[1])], np.float64)


def _threshold(p: Floats, y: npt.NDArray[np.bool_]) -> float:
    positives = int(y.sum())
    if not positives:
        return 0.5
    order = np.argsort(-p, kind="stable")
    falling = p[order]
    ends = np.flatnonzero(np.append(falling[1:] != falling[:-1], True))
    hits, taken = np.cumsum(y[order])[ends], ends + 1
    f1 = 2 * hits / (taken + positives)
    usual = 2 * int((y & (p >= 0.5)).sum()) / (int((p >= 0.5).sum()) + positives)
    best = float(f1.max())
    if usual >= best:
        return 0.5
    above = falling[ends]
    below = np.append(above[1:], min(0.0, float(above[-1])))
    middle = (above + below) / 2
    # Of neighbouring floats the mean may be the lower one, which would take one row more; and all may be taken at 0.
    middle = np.where((middle > below) & (middle <= above), middle, above)[f1 == best]
    return float(middle[np.abs(middle - 0.5).argmin()])
