"""The layers that heads are made of. Each works on one head, or on K of one shape at once.

A stacked head has the same modules with parameters that carry a leading K axis. Its first layer reads features that
all K heads share, [B, ..., D], as one matrix product; what comes after carries the axis in front, [K, B, ..., H].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class Affine(nn.Module):
    """``x @ W.T + b``: [..., I] -> [..., O], stacked [K, ..., I] -> [K, ..., O].

    ``first`` says that the layer reads the features themselves, which stacked heads share and which may have to be
    standardised: ``mean`` and ``scale`` [D] (or [K, D]) are folded into the weights, so that it costs nothing a row.
    ``bias=False`` leaves ``b`` out.
    """

    bias: nn.Parameter | None

    mean: Tensor | None
    scale: Tensor | None

    def __init__(self, inputs: int, outputs: int, *, first: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.first = first
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs)) if bias else None)
        self.register_buffer("mean", None)
        self.register_buffer("scale", None)

    def initialize(self, generator: torch.Generator) -> None:
        """Draw weights and biases as ``nn.Linear`` does: uniform within 1 / sqrt(I)."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        with torch.no_grad():
            self.weight.uniform_(-bound, bound, generator=generator)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        weight: Tensor = self.weight
        if self.bias is None:
            if weight.dim() == 3:
                weight = weight.view(len(weight), *[1] * (x.dim() - 3), *weight.shape[1:])
            return x @ weight.transpose(-1, -2)
        bias: Tensor = self.bias
        if self.mean is not None and self.scale is not None:
            weight = weight * self.scale.unsqueeze(-2)
            bias = bias - (weight @ self.mean.unsqueeze(-1)).squeeze(-1)
        if weight.dim() == 2:
            return functional.linear(x, weight, bias)
        heads, outputs, inputs = weight.shape
        if self.first:
            y = functional.linear(x, weight.reshape(heads * outputs, inputs), bias.reshape(-1))
            return y.view(*x.shape[:-1], heads, outputs).movedim(-2, 0)
        flat = x.reshape(heads, -1, inputs)
        return torch.baddbmm(bias.unsqueeze(1), flat, weight.transpose(1, 2)).view(*x.shape[:-1], outputs)


class Norm(nn.Module):
    """Layer normalisation over the last axis, with a gain and a bias for each head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H], stacked [K, ..., H]."""
        width = x.shape[-1]
        if self.weight.dim() == 1:
            return functional.layer_norm(x, (width,), self.weight, self.bias)
        shape = (-1, *[1] * (x.dim() - 2), width)
        return functional.layer_norm(x, (width,)) * self.weight.view(shape) + self.bias.view(shape)


class Dropout(nn.Module):
    """Dropout whose draws are each head's own, so that a head in a stack sees what it would see alone.

    ``rates`` has one rate a head. The draws come from ``generators``, set by whoever trains; without them from
    torch's global generator.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rates: tuple[float, ...] = (rate,)
        self.stacked = False
        self.generators: Sequence[torch.Generator] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Zero a share of the values and scale up the rest, in training only."""
        if not self.training or not any(self.rates):
            return x
        kept = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for head, rate in enumerate(self.rates):
            kept_of_head = kept[head] if self.stacked else kept
            generator = self.generators[head] if self.generators is not None else None
            if rate:
                draw_kept(kept_of_head, rate, generator)
            else:
                kept_of_head.fill_(1.0)
        return x * kept


def draw_kept(out: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """Fill ``out`` with what dropout multiplies by: 0 for a share of ``rate``, and for the rest what keeps the mean.

    Each 64 random bits decide four numbers, with ``rate`` rounded to a 65,536th: ``bernoulli_`` draws for every number,
    and took the largest share of a stacked MLP's step beside its matrix products.
    """
    if out.device.type not in ("cpu", "cuda"):
        return out.bernoulli_(1 - rate, generator=generator).div_(1 - rate)
    dropped = min(round(rate * 65536), 65535)
    bits = torch.empty(-(-out.numel() // 4), dtype=torch.int64, device=out.device)
    bits.random_(-(2**63), None, generator=generator)
    kept = bits.view(torch.int16)[: out.numel()].view(out.shape) >= dropped - 32768
    return out.copy_(kept).mul_(65536 / (65536 - dropped))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}
