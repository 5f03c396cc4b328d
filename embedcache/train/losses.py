"""Losses with their gradients at the logits, for one head or for K at once.

Logits are [B, C], or [B, C, K] with the heads last, so that reductions over classes run along whole vectors. Each loss
is a weighted mean over the rows of a batch; the gradient is that of the mean. Written out rather than left to
autograd, because for a linear head nothing else is left to differentiate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from embedcache.spec import Task


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
        self.outputs = outputs
        self._smoothing = torch.tensor(smoothing, dtype=torch.float32, device=device)
        self._weight = None if class_weight is None else torch.tensor(class_weight, device=device).T.contiguous()
        self._plain = class_weight is None and not any(smoothing)

    def keep(self, heads: Tensor) -> None:
        """Go on with some of the heads."""
        self._smoothing = self._smoothing[heads]
        if self._weight is not None:
            self._weight = self._weight[:, heads]

    def __call__(self, logits: Tensor, y: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the mean losses, [] or [K], and their gradients at ``logits`` [B, C] or [B, C, K].

        ``y`` is int64 [B], or float32 [B, C] or [B, R]; ``rows`` are weights of rows, [B] or [B, K], None for equal.
        """
        return getattr(self, f"_{self.task}")(logits, y, rows)  # type: ignore[no-any-return]

    def _classification(self, logits: Tensor, y: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        log_p = functional.log_softmax(logits, dim=1)
        stacked = logits.dim() == 3
        if self._plain:  # nothing but the log probability of each row's own class
            own_class = y.view(-1, 1, 1).expand(-1, 1, logits.shape[2]) if stacked else y.view(-1, 1)
            nll = log_p.gather(1, own_class).squeeze(1).neg_()
            slope = log_p.exp_()
            return _mean(nll, slope.scatter_add_(1, own_class, torch.full_like(nll, -1.0).unsqueeze(1)), rows)
        hot = torch.zeros(logits.shape[:2], dtype=logits.dtype, device=logits.device).scatter_(1, y[:, None], 1.0)
        target = hot.unsqueeze(-1) if stacked else hot
        epsilon = self._smoothing if stacked else self._smoothing[0]
        even = torch.ones_like(hot[:1]) / self.outputs
        even = even.unsqueeze(-1) if stacked else even
        own: Tensor | float = 1.0
        if self._weight is not None:
            weight = self._weight if stacked else self._weight[:, 0]
            own = weight[y].unsqueeze(1)
            even = even * weight
        target = (1 - epsilon) * own * target + epsilon * even
        loss = -(target * log_p).sum(dim=1)
        gradient = log_p.exp_().mul_(target.sum(dim=1, keepdim=True)).sub_(target)
        share = rows
        if self._weight is not None:
            own_weight = (self._weight if stacked else self._weight[:, 0])[y]
            share = own_weight if rows is None else own_weight * _like(rows, own_weight)
            if rows is not None:
                loss = loss * _like(rows, loss)
                gradient = gradient * _like(rows, loss).unsqueeze(1)
            total = share.sum(dim=0).clamp_min(1e-12)
            return loss.sum(dim=0) / total, gradient / total
        return _mean(loss, gradient, share)

    def _multilabel(self, logits: Tensor, y: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        target = y.unsqueeze(-1) if logits.dim() == 3 else y
        if self._smoothing.any():
            target = target * (1 - self._smoothing) + 0.5 * self._smoothing
        log_on, log_off = functional.logsigmoid(logits), functional.logsigmoid(-logits)
        on = target
        if self._weight is not None:
            on = target * (self._weight if logits.dim() == 3 else self._weight[:, 0])
        off = 1 - target
        loss = -(on * log_on + off * log_off).mean(dim=1)
        p = log_on.exp()
        gradient = (p * (on + off) - on) / self.outputs
        return _mean(loss, gradient, rows)

    def _regression(self, logits: Tensor, y: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        error = logits - (y.unsqueeze(-1) if logits.dim() == 3 else y)
        return _mean(error.square().mean(dim=1), error * (2 / self.outputs), rows)


def _like(rows: Tensor, loss: Tensor) -> Tensor:
    return rows.unsqueeze(-1) if rows.dim() < loss.dim() else rows


def _mean(loss: Tensor, gradient: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the mean of losses [B] or [B, K] over rows, and the gradient of it."""
    if rows is None:
        return loss.mean(dim=0), gradient.div_(loss.shape[0])
    rows = _like(rows, loss)
    share = rows / rows.sum(dim=0).clamp_min(1e-12)
    return (loss * share).sum(dim=0), gradient * share.unsqueeze(1)
