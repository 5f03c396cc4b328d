"""Is the difference real? Intervals, paired tests and corrections, on numpy and scipy alone.

Two sources of chance are kept apart. *Which rows were scored*: the bootstrap over rows (Efron & Tibshirani 1993) and
McNemar's exact test (McNemar 1947; Dietterich 1998 on its use for classifiers). *Which rows were learnt from*: the
t interval over folds with the variance corrected for the overlap of training sets (Nadeau & Bengio 2003).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from embedcache.sweep.summary import Interval
from embedcache.task import Flags, Floats


def resampled_t(scores: Sequence[float], train_rows: float, eval_rows: float) -> tuple[float, float, int]:
    """Return mean, corrected standard error and degrees of freedom of scores over J folds or random splits.

    ``se^2 = (1 / J + eval_rows / train_rows) * s^2`` with the sample variance ``s^2``: Nadeau & Bengio (2003),
    "Inference for the generalization error", section 4.2. For k-fold cross-validation the second term is 1 / (k - 1).
    """
    values = np.asarray(scores, np.float64)
    if len(values) < 2:
        return float(values.mean()), math.nan, 0
    variance = float(values.var(ddof=1)) * (1 / len(values) + eval_rows / train_rows)
    return float(values.mean()), math.sqrt(variance), len(values) - 1


def resampled_t_interval(
    scores: Sequence[float], train_rows: float, eval_rows: float, alpha: float = 0.05
) -> Interval | None:
    """Return the corrected resampled t interval at 1 - alpha; None with fewer than two scores. See ``resampled_t``."""
    from scipy.stats import t

    mean, error, freedom = resampled_t(scores, train_rows, eval_rows)
    if not freedom:
        return None
    half = float(t.ppf(1 - alpha / 2, freedom)) * error
    return mean - half, mean + half


def resampled_t_test(differences: Sequence[float], train_rows: float, eval_rows: float) -> float | None:
    """Return the two-sided p of a mean difference over folds; None with fewer than two. See ``resampled_t``."""
    mean, error, freedom = resampled_t(differences, train_rows, eval_rows)
    return _two_sided(mean, error, freedom) if freedom else None


def _two_sided(difference: float, error: float, freedom: float) -> float:
    from scipy.stats import t

    if difference == 0:
        return 1.0
    return float(2 * t.sf(abs(difference) / error, freedom)) if error > 0 else 0.0


def mcnemar(right_a: Flags, right_b: Flags) -> float:
    """Return the exact two-sided p of McNemar's test for two heads on the same rows, bool [N] each: who was right.

    Only rows on which they disagree count: under the null hypothesis either is right on half of them (binomial).
    """
    from scipy.stats import binomtest

    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """Return p values adjusted by Holm's (1979) step-down method: family-wise error, no assumption of independence."""
    count = len(p)
    adjusted = [0.0] * count
    highest = 0.0
    for rank, place in enumerate(sorted(range(count), key=lambda place: p[place])):
        highest = max(highest, min(1.0, (count - rank) * p[place]))
        adjusted[place] = highest
    return adjusted


def resamples(groups: npt.NDArray[np.int64], draws: int, seed: int = 0) -> Iterator[npt.NDArray[np.float32]]:
    """Yield how often each row occurs in each bootstrap resample, float32 [b, N] in blocks, ``draws`` in all.

    ``groups`` int64 [N] in 0..G-1: rows of one group (duplicates of one content) are drawn together, G groups a
    resample (the cluster bootstrap; Davison & Hinkley 1997, section 3.8). Rows that are alike are one observation.
    """
    count = int(groups.max()) + 1
    generator = np.random.default_rng(seed)
    block = max(1, min(draws, 8_000_000 // max(len(groups), 1)))
    alone = count == len(groups) and bool((groups == np.arange(count)).all())
    for start in range(0, draws, block):
        size = min(block, draws - start)
        times = np.empty((size, count), np.float32)
        for draw in range(size):
            times[draw] = np.bincount(generator.integers(0, count, count), minlength=count)
        yield times if alone else times[:, groups]


def bootstrap_test(difference: float, resampled: Floats, groups: int) -> float:
    """Return the two-sided p of a paired difference, given its bootstrap resamples [B].

    By t with the bootstrap's standard error, not by counting resamples: with B of them no p below 1 / B could be seen,
    and none would survive a correction for hundreds of comparisons.
    """
    finite = resampled[np.isfinite(resampled)]
    error = float(finite.std(ddof=1)) if len(finite) > 1 else math.nan
    if math.isnan(error):
        return 1.0
    return _two_sided(difference, error, max(groups - 1, 1))


def not_distinguishable(p_adjusted: Sequence[float | None], alpha: float = 0.05) -> list[bool]:
    """Return which heads the data cannot tell from the winner, whose own p is None.

    The group holds a head that is truly best with probability of about 1 - alpha or more, although the winner was
    picked by the same scores: to leave it out, one of the others must beat it at Holm's level, which is the argument
    of multiple comparisons with the best (Hsu 1984).
    """
    return [p is None or p >= alpha for p in p_adjusted]
