"""The heads once more, in the plainest torch: no stacking, no folding, nothing of ``embedcache.heads``.

Parameters have the names that ours have, so that both can start from the same numbers and be compared by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedcache.errors import SpecError
from embedcache.spec import HeadSpec

Options = Mapping[str, Any]
Named = Mapping[str, npt.NDArray[np.float32]]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def plain_head(spec: HeadSpec, state: Named, generator: torch.Generator) -> nn.Module:
    """Build the plain twin of a head from its initial arrays; dropout is drawn from ``generator``.

    Raises ``SpecError`` for a head that has none: one that was registered from outside.
    """
    if spec.kind not in STANDARD_HEADS:
        raise SpecError(f"there is no plain twin of the head {spec.kind}: check it with --reference canonical")
    net = STANDARD_HEADS[spec.kind](spec.options, state, generator)
    net.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()})
    return net


def _linear(state: Named, name: str) -> nn.Linear:
    outputs, inputs = state[f"{name}.weight"].shape
    return nn.Linear(inputs, outputs, bias=f"{name}.bias" in state)


def _norm(state: Named, name: str) -> nn.Module:
    return nn.LayerNorm(len(state[f"{name}.weight"])) if f"{name}.weight" in state else nn.Identity()


class _Drop(nn.Module):
    def __init__(self, options: Options, generator: torch.Generator) -> None:
        super().__init__()
        self.rate, self.generator = float(options.get("dropout", 0.1)), generator

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        # The very draws belong to the seed: 16 random bits a value, four values to an int64.
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=self.generator)
        numbers = bits.view(torch.int16)[: x.numel()].reshape(x.shape).int() + 32768
        dropped = round(self.rate * 65536)
        return x * (numbers >= dropped) / (1 - dropped / 65536)


class _Linear(nn.Module):
    def __init__(self, options: Options, state: Named, generator: torch.Generator) -> None:
        super().__init__()
        self.output = _linear(state, "output")

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = self.output(x)
        return out


class _MLP(nn.Module):
    def __init__(self, options: Options, state: Named, generator: torch.Generator) -> None:
        super().__init__()
        depth = sum(name.startswith("hidden.") and name.endswith(".weight") for name in state)
        self.hidden = nn.ModuleList(_linear(state, f"hidden.{at}") for at in range(depth))
        self.norms = nn.ModuleList(_norm(state, f"norms.{at}") for at in range(depth))
        self.output = _linear(state, "output")
        self.act = ACTIVATIONS[options.get("activation", "relu")]
        self.drop = _Drop(options, generator)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for layer, norm in zip(self.hidden, self.norms, strict=True):
            x = self.drop(self.act(norm(layer(x))))
        out: Tensor = self.output(x)
        return out


class _Block(nn.Module):
    def __init__(self, options: Options, state: Named, at: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = _norm(state, f"blocks.{at}.norm")
        self.up, self.down = _linear(state, f"blocks.{at}.up"), _linear(state, f"blocks.{at}.down")
        self.act = ACTIVATIONS[options.get("activation", "gelu")]
        self.drop = _Drop(options, generator)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.drop(self.act(self.up(self.norm(x)))))
        return out


class _Residual(nn.Module):
    def __init__(self, options: Options, state: Named, generator: torch.Generator) -> None:
        super().__init__()
        depth = sum(name.startswith("blocks.") and name.endswith(".up.weight") for name in state)
        self.input = _linear(state, "input")
        self.blocks = nn.Sequential(*(_Block(options, state, at, generator) for at in range(depth)))
        self.norm, self.output = _norm(state, "norm"), _linear(state, "output")

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = self.output(self.norm(self.blocks(self.input(x))))
        return out


class _Vectors(nn.Module):
    def __init__(self, weight: npt.NDArray[np.float32]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(weight.shape))


class _Attending(nn.Module):
    def __init__(self, options: Options, state: Named, generator: torch.Generator) -> None:
        super().__init__()
        self.input, self.output = _linear(state, "input"), _linear(state, "output")
        self.norm = _norm(state, "norm")
        self.layer = _Vectors(state["layer.weight"]) if "layer.weight" in state else None
        self.drop = _Drop(options, generator)
        width = self.input.out_features
        self.heads = options.get("heads") or next(count for count in (8, 4, 2, 1) if width % count == 0)

    def read(self, x: Tensor) -> Tensor:
        x = self.input(x)
        return x if self.layer is None else x + self.layer.weight

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(q k / sqrt(d)) v, head by head."""
        size = query.shape[-1] // self.heads
        outputs = []
        for q, k, v in zip(*(torch.split(part, size, dim=-1) for part in (query, key, value)), strict=True):
            scores = q @ k.transpose(-1, -2) / math.sqrt(size)
            if mask is not None:
                scores = scores.masked_fill(~mask[:, None, :], -math.inf)
            outputs.append(scores.softmax(dim=-1) @ v)
        return torch.cat(outputs, dim=-1)


class _SelfAttention(_Attending):
    def __init__(self, options: Options, state: Named, generator: torch.Generator) -> None:
        super().__init__(options, state, generator)
        self.qkv, self.mix = _linear(state, "qkv"), _linear(state, "mix")
        self.final = _norm(state, "final")

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.read(x)
        query, key, value = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = self.final(x + self.drop(self.mix(self.attend(query, key, value, mask))))
        weights = torch.ones(x.shape[:2]) if mask is None else mask.float()
        out: Tensor = self.output((x * weights[..., None]).sum(1) / weights.sum(1, keepdim=True))
        return out


class _AttentionPooling(_Attending):
    def __init__(self, options: Options, state: Named, generator: torch.Generator) -> None:
        super().__init__(options, state, generator)
        self.key, self.queries = _linear(state, "key"), _Vectors(state["queries.weight"])

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        value = self.norm(self.read(x))
        query = self.queries.weight.expand(len(x), -1, -1)
        pooled = self.attend(query, self.key(value), value, mask)
        out: Tensor = self.output(self.drop(pooled.flatten(1)))
        return out


STANDARD_HEADS: dict[str, Callable[[Options, Named, torch.Generator], nn.Module]] = {
    "linear": _Linear,
    "mlp": _MLP,
    "residual": _Residual,
    "attention": _SelfAttention,
    "attention-pooling": _AttentionPooling,
}
