"""One small function per pooling: hidden states (B, T, D) and mask (B, T) -> features (B, D).

Every function reads one row at a time: no result depends on a row's neighbours or on how far a row was padded.
They run in float32 whatever the model computes in, because a bfloat16 sum over T tokens would lose what the
storage type keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    Pooling = Callable[[Tensor, Tensor], Tensor]


def cls(hidden: Tensor, mask: Tensor) -> Tensor:
    """Take the first real token of each row: (B, T, D), (B, T) -> (B, D)."""
    return hidden[_rows(hidden), mask.long().argmax(dim=1)].float()


def last(hidden: Tensor, mask: Tensor) -> Tensor:
    """Take the last real token of each row, as decoders are pooled: (B, T, D), (B, T) -> (B, D)."""
    positions = (mask.long().cumsum(dim=1) * mask.long()).argmax(dim=1)
    return hidden[_rows(hidden), positions].float()


def mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Average the real tokens of each row: (B, T, D), (B, T) -> (B, D). Padding counts for nothing."""
    real = mask.bool().unsqueeze(-1)
    # Filled, not multiplied: what a model makes of padding may be infinite.
    return hidden.float().masked_fill(~real, 0.0).sum(dim=1) / real.sum(dim=1)


def max(hidden: Tensor, mask: Tensor) -> Tensor:
    """Take the largest value of each feature over the real tokens: (B, T, D), (B, T) -> (B, D)."""
    return hidden.float().masked_fill(~mask.bool().unsqueeze(-1), float("-inf")).amax(dim=1)


def normalize(features: Tensor) -> Tensor:
    """Scale each vector to unit Euclidean length; a zero vector stays zero. (..., D) -> (..., D)."""
    lengths: Tensor = features.norm(dim=-1, keepdim=True)
    return features / lengths.clamp_min(1e-12)


def _rows(hidden: Tensor) -> Tensor:
    import torch

    return torch.arange(hidden.shape[0], device=hidden.device)


MASKED: dict[str, Pooling] = {"cls": cls, "mean": mean, "max": max, "last": last}
