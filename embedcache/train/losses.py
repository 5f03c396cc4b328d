"""Losses with their gradients at the logits, for one head or for K; and the biases that a head starts from.

Logits are [C, B], or [K, C, B], with the rows of the batch last: reductions over a handful of classes then run along
whole vectors, and a linear head's products need no transposed copy. Each loss is a weighted mean over the rows, and the
gradient that of the mean. It is written out, not left to autograd: nothing else of a linear head would need a graph.

AdamW moves a bias by about one learning rate a step. The best bias of a label that one row in twenty has is -2.9; from
0, default training on a few hundred rows ended before it got there. So biases start where they are best without any
feature ("init well", Karpathy 2019).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from embedcache.heads.modules import Head
from embedcache.task import CLASSIFICATION, REGRESSION, Array, Floats, Task


class Loss:
    """The loss of K heads: cross-entropy, binary cross-entropy for each label, or the squared error.

    Cross-entropy takes label smoothing and class weights as ``torch.nn.functional.cross_entropy`` does: the mean is
    over the weights of the rows' own classes. ``smoothing`` is [K], ``class_weight`` None or [K, C] (for multi-label
    heads the weight of a label that is on).
    """

    def __init__(
        self,
        task: Task,
        outputs: int,
        smoothing: Sequence[float] = (0.0,),
        class_weight: npt.NDArray[np.float32] | None = None,
        *,
        device: str = "cpu",
    ) -> None:
        self.task = task
        self._of_logits = {
            "cross_entropy": self._cross_entropy,
            "binary_cross_entropy": self._binary_cross_entropy,
            "squared_error": self._squared_error,
        }[self.task.loss]
        self.outputs = outputs
        self._smoothing = torch.tensor(smoothing, dtype=torch.float32, device=device)
        self._weight = None if class_weight is None else torch.tensor(class_weight, device=device)
        self._plain = class_weight is None and not any(smoothing)

    def keep(self, heads: Tensor) -> None:
        """Go on with some of the heads."""
        self._smoothing = self._smoothing[heads]
        if self._weight is not None:
            self._weight = self._weight[heads]

    def __call__(self, logits: Tensor, y: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the mean losses, [] or [K], and their gradients at ``logits`` [C, B] or [K, C, B].

        ``y`` is int64 [B], or float32 [B, C] or [B, R]; ``rows`` are weights of rows, [B] or [K, B], None for equal.
        """
        return self._of_logits(logits, y, rows)

    def _cross_entropy(self, logits: Tensor, y: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        log_p = functional.log_softmax(logits, dim=-2)
        if self._plain:  # nothing but the log probability of each row's own class
            own_class = y.expand(*logits.shape[:-2], 1, -1)
            nll = log_p.gather(-2, own_class).neg_()
            slope = log_p.exp_().scatter_(-2, own_class, -1.0, reduce="add")
            return _mean(nll.squeeze(-2), slope, rows)
        stacked = logits.dim() == 3
        hot = torch.zeros(logits.shape[-2:], dtype=logits.dtype, device=logits.device).scatter_(0, y[None], 1.0)
        epsilon = self._smoothing[:, None, None] if stacked else self._smoothing[0]
        even: Tensor | float = 1 / self.outputs
        own: Tensor | float = 1.0
        if self._weight is not None:
            weight = self._weight if stacked else self._weight[0]
            own = weight[..., y].unsqueeze(-2)
            even = even * weight.unsqueeze(-1)
        target = (1 - epsilon) * own * hot + epsilon * even
        loss = -(target * log_p).sum(dim=-2)
        gradient = log_p.exp_().mul_(target.sum(dim=-2, keepdim=True)).sub_(target)
        if not isinstance(own, Tensor):
            return _mean(loss, gradient, rows)
        share = own.squeeze(-2)
        if rows is not None:
            share, loss, gradient = share * rows, loss * rows, gradient * rows.unsqueeze(-2)
        total = share.sum(dim=-1)
        total = total.masked_fill(total <= 0, math.inf)  # a batch in which no row counts moves nothing
        return loss.sum(dim=-1) / total, gradient / total[..., None, None]

    def _binary_cross_entropy(self, logits: Tensor, y: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        target, stacked = y.t(), logits.dim() == 3
        if self._smoothing.any():
            epsilon = self._smoothing[:, None, None] if stacked else self._smoothing[0]
            target = target * (1 - epsilon) + 0.5 * epsilon
        log_on, log_off = functional.logsigmoid(logits), functional.logsigmoid(-logits)
        on = target
        if self._weight is not None:
            on = target * (self._weight if stacked else self._weight[0]).unsqueeze(-1)
        off = 1 - target
        loss = -(on * log_on + off * log_off).mean(dim=-2)
        p = log_on.exp()
        gradient = (p * (on + off) - on) / self.outputs
        return _mean(loss, gradient, rows)

    def _squared_error(self, logits: Tensor, y: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        error = logits - y.t()
        return _mean(error.square().mean(dim=-2), error * (2 / self.outputs), rows)


def _mean(loss: Tensor, gradient: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the mean of losses [B] or [K, B] over rows, and the gradient of it."""
    if rows is None:
        return loss.mean(dim=-1), gradient.div_(loss.shape[-1])
    share = rows / rows.sum(dim=-1, keepdim=True).clamp_min(1e-12)
    return (loss * share).sum(dim=-1), gradient * share.unsqueeze(-2)


# Where a head starts: with the output biases that are best without any feature.


def start_biases(
    y: Array, task: Task, outputs: int, *, smoothing: float = 0.0,
    class_weight: npt.ArrayLike | None = None, rows: Array | None = None,
) -> Floats:  # fmt: skip
    """Return the biases [C] that are best for a head that reads no feature.

    These are log shares of classes (their mean 0), log-odds of labels, means of targets. ``y`` is int64 [N], uint8
    [N, C] or, in the units of training, float [N, R]; ``class_weight`` [C] and ``rows`` [N] are weights, None for
    equal. A class or label that never or always occurs counts as half a row, so that no bias is infinite.
    """
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
    """Give a head's last layer its biases [C], where it has any and takes them."""
    if head.output.bias is not None and head.starts_at_shares:
        with torch.no_grad():
            head.output.bias.copy_(torch.from_numpy(biases.astype(np.float32)))
