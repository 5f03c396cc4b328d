"""Where a head starts: with the output biases that are best without any feature.

AdamW moves a bias by about one learning rate a step. A label that one row in twenty has lies 2.9 from a bias of 0,
which default training of a few hundred rows never got to: it ended before it began (Karpathy 2019, "init well").
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from embedcache.heads.modules import Head
from embedcache.spec import TaskName
from embedcache.task import CLASSIFICATION, REGRESSION, Array, Floats, Task, task_named


def start_biases(
    y: Array, task: Task | TaskName, outputs: int, *, smoothing: float = 0.0,
    class_weight: npt.ArrayLike | None = None, rows: Array | None = None,
) -> Floats:  # fmt: skip
    """Return the biases [C] that make the loss of ``train.losses`` least in a head that reads no feature.

    These are log shares of classes (their mean 0), log-odds of labels, means of targets. ``y`` is int64 [N], uint8
    [N, C] or, in the units of training, float [N, R]; ``class_weight`` [C] and ``rows`` [N] are weights, None for
    equal. What never occurs, or always, counts as half a row: no bias is infinite.
    """
    task = task_named(task)
    mass = np.ones(len(y)) if rows is None else np.asarray(rows, np.float64)
    if task is REGRESSION:
        return np.asarray((mass[:, None] * y).sum(axis=0) / mass.sum())
    weight = np.ones(outputs) if class_weight is None else np.asarray(class_weight, np.float64)
    least = 0.5 * mass.sum() / len(y)
    if task is CLASSIFICATION:
        own = np.bincount(y, mass, outputs)
        target = weight * ((1 - smoothing) * own + smoothing / outputs * mass.sum())
        logs = np.log(np.maximum(target, least * (target.sum() / mass.sum() or 1.0)))
        return np.asarray(logs - logs.mean())
    positive = (mass[:, None] * ((1 - smoothing) * (np.asarray(y) == 1) + 0.5 * smoothing)).sum(axis=0)
    negative = mass.sum() - positive
    return np.asarray(np.log(np.maximum(weight * positive, least)) - np.log(np.maximum(negative, least)))


def start_at(head: Head, biases: Floats) -> None:
    """Give a head's last layer its biases [C], where it has any."""
    if head.output.bias is not None:
        with torch.no_grad():
            head.output.bias.copy_(torch.from_numpy(biases.astype(np.float32)))
