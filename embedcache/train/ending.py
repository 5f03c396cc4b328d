"""Whether training had come to an end in its last epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from embedcache.spec import TrainSpec

STILL_IMPROVING = "the head was still improving when training ended: more epochs or a higher learning rate may help"

LAST_FIFTH, STILL = 0.8, 0.05


def still_improving(history: Sequence[Mapping[str, float]], best: int, spec: TrainSpec, epochs: int) -> bool:
    """Return whether training had not come to an end in its last epoch.

    That is so where the last fifth of the way still took more than a twentieth of what the training loss fell by, and
    the best epoch on validation (-1: none) lies in it too. The way is the learning rate, summed over steps: a cosine
    leaves its last fifth to the second half of the epochs. A loss that falls towards its end as ``exp(-k t)`` still
    improves for ``k`` below 2.7.
    """
    from embedcache.train.stack import schedule_factors  # which needs torch

    if len(history) < epochs or epochs < 3:
        return False
    way = np.cumsum(schedule_factors(spec, 0, 16 * epochs, 16 * epochs).reshape(epochs, 16).sum(axis=1))
    most = LAST_FIFTH * way[-1]
    losses = np.array([epoch["train_loss"] for epoch in history])
    before = min(float(np.interp(most, way, losses)), *losses[way <= most])  # not what only swings up and down
    fallen, lately = losses[0] - losses[-1], before - losses[-1]
    return bool(lately > STILL * fallen > 0) and (best < 0 or way[best] > most)
