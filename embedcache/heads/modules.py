"""Heads on torch, and the layers that they are made of: feature vectors -> logits.

A head is built for one feature set, ``Head(feature, outputs, **options)``, from the layers below; its last layer is an
``Affine`` called ``output``.

K heads of one shape can be stacked: the same modules, whose parameters have K as their first axis. The first layer
reads the features [B, ..., D] that all heads share in one matrix product; from there on tensors are [K, B, ..., H].
Every layer works stacked as well as alone, and so does every head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from embedcache.errors import FeatureError, SpecError
from embedcache.shard import FeatureSet, Kind

# The layers that heads are made of. Each works on one head, or on K of one shape at once.


class Affine(nn.Module):
    """``x @ W.T + b``: [..., I] -> [..., O], stacked [K, ..., I] -> [K, ..., O].

    ``first`` marks a layer that reads the features themselves. Stacked heads share those, and they may have to be
    standardised: ``mean`` and ``scale``, [D] or [K, D], are folded into the weights, which costs nothing for each row.
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
    """Dropout with random numbers of each head's own, so that a head drops the same values in a stack as alone.

    ``rates`` has one rate for each head. ``generators`` are set by the trainer; without them torch's global generator
    is used.
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
    """Fill ``out`` with dropout's factors: 0 for a share ``rate`` of the values, 1 / (1 - rate) for the others.

    64 random bits decide four values, with ``rate`` rounded to a multiple of 1 / 65,536. ``bernoulli_`` draws anew for
    every value, which took more of a stacked MLP's step than anything but its matrix products.
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


class Head(nn.Module):
    """The base class of heads. ``takes`` are the kinds of feature sets that it reads; ``output`` is its last layer.

    ``starts_at_shares`` says that training begins with the biases that are best without features; ``standardised`` is
    what ``standardize`` was given.
    """

    takes: ClassVar[tuple[Kind, ...]] = ("pooled",)
    starts_at_shares: ClassVar[bool] = True
    standardised: tuple[Tensor, Tensor] | None = None
    output: Affine

    def __init__(self, feature: FeatureSet, outputs: int) -> None:
        super().__init__()
        if feature.kind not in self.takes:
            raise FeatureError(_cannot_read(type(self).__name__, self.takes, feature))
        self.dim = feature.dim

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, D] -> logits [B, C]; [B, L, D] or [B, T, D] (mask [B, T], True = real) for heads that attend."""
        raise NotImplementedError

    def initialize(self, seed: int) -> None:
        """Draw all weights from ``seed``; dropout gets a generator of its own, with another seed made from it."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if module is not self and callable(start := getattr(module, "initialize", None)):
                start(generator)
        self.draw_from([torch.Generator().manual_seed(seed + 2**32)])

    def draw_from(self, generators: Sequence[torch.Generator]) -> None:
        """Take dropout draws from these generators, one for each head of a stack."""
        for module in self.modules():
            if isinstance(module, Dropout):
                module.generators = generators

    def first_layers(self) -> Iterator[Affine]:
        """The layers that read the features."""
        return (module for module in self.modules() if isinstance(module, Affine) and module.first)

    def standardize(self, mean: Tensor | None, scale: Tensor | None) -> None:
        """Make the head read ``(x - mean) * scale`` from now on; [D], or [K, D] for a stack."""
        self.standardised = None if mean is None or scale is None else (mean, scale)
        for layer in self.first_layers():
            layer.mean, layer.scale = self.of_inputs(mean), self.of_inputs(scale)

    def of_inputs(self, moments: Tensor | None) -> Tensor | None:
        """Return moments of features as the layers that read these have them, which is the same for most heads."""
        return moments


def _cannot_read(name: str, takes: tuple[Kind, ...], feature: FeatureSet) -> str:
    words = {"pooled": "one vector a row", "layers": "several layers a row", "tokens": "one vector a token"}
    if feature.kind == "pooled":
        if "tokens" not in takes:
            return (
                f"{name} reads several layers a row, and the feature set {feature.name} has one: make such a set "
                "(extract --pooling mean@all), or use mlp"
            )
        return (
            f"{name} attends over several vectors a row, and the feature set {feature.name} has one, so there is "
            "nothing to attend to: make such a set (extract --tokens, or extract --pooling mean@all), or use mlp"
        )
    expected = " or ".join(words[kind] for kind in takes)
    return (
        f"{name} reads {expected}, and the feature set {feature.name} has {words[feature.kind]}: "
        "choose another feature set, or the head attention or attention-pooling"
    )


def stack_heads(heads: Sequence[Head]) -> Head:
    """Join heads of one shape: the same modules with parameters [K, ...]. Dropout rates may differ."""
    stacked = copy.deepcopy(heads[0])
    parameters = [dict(head.named_parameters()) for head in heads]
    owners = dict(stacked.named_modules())
    for name in parameters[0]:
        owner, _, leaf = name.rpartition(".")
        value = torch.stack([own[name].detach() for own in parameters])
        setattr(owners[owner], leaf, nn.Parameter(value))
    for name, module in owners.items():
        if isinstance(module, Dropout):
            dropouts = [_dropout_of(head, name) for head in heads]
            module.rates = tuple(dropout.rates[0] for dropout in dropouts)
            generators = [dropout.generators[0] for dropout in dropouts if dropout.generators is not None]
            module.generators = generators if len(generators) == len(dropouts) else None
            module.stacked = True
    return stacked


def _dropout_of(head: Head, name: str) -> Dropout:
    dropout = head.get_submodule(name)
    assert isinstance(dropout, Dropout)
    return dropout


def choose_heads(stacked: Head, heads: Tensor) -> Head:
    """Return a stack of some heads of a stack, [k] int64: copies of their parameters, and their dropout rates."""
    chosen = copy.copy(stacked)
    chosen._modules = {}
    for name, module in stacked.named_children():
        setattr(chosen, name, _chosen(module, heads))
    return chosen


def _chosen(module: nn.Module, heads: Tensor) -> nn.Module:
    chosen = copy.copy(module)
    chosen._parameters, chosen._buffers, chosen._modules = {}, {}, {}
    for name, parameter in module._parameters.items():
        value = None if parameter is None else nn.Parameter(parameter.detach()[heads])
        chosen.register_parameter(name, value)
    for name, buffer in module._buffers.items():
        per_head = buffer is not None and buffer.dim() > 1
        chosen.register_buffer(name, buffer[heads] if per_head and buffer is not None else buffer)
    for name, child in module._modules.items():
        chosen._modules[name] = None if child is None else _chosen(child, heads)
    if isinstance(chosen, Dropout):
        kept = heads.tolist()
        chosen.rates = tuple(chosen.rates[head] for head in kept)
        chosen.generators = None if chosen.generators is None else [chosen.generators[head] for head in kept]
    return chosen


class Linear(Head):
    """One matrix: multinomial logistic regression, or linear regression."""

    def __init__(self, feature: FeatureSet, outputs: int) -> None:
        super().__init__(feature, outputs)
        self.output = Affine(feature.dim, outputs, first=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, D] -> [B, C]."""
        return self.output(x)  # type: ignore[no-any-return]


class MLP(Head):
    """A multi-layer perceptron of any depth.

    Args:
        hidden: the width of each hidden layer.
        activation: ``relu``, ``gelu``, ``silu`` or ``tanh``.
        dropout: share of hidden values dropped in training.
        norm: layer normalisation before each activation.
    """

    def __init__(
        self,
        feature: FeatureSet,
        outputs: int,
        hidden: Sequence[int] | int = (256,),
        activation: str = "relu",
        dropout: float = 0.1,
        norm: bool = False,
    ) -> None:
        super().__init__(feature, outputs)
        given: object = hidden
        if not isinstance(given, (int, list, tuple)):
            raise SpecError(f"mlp: hidden is {given!r}: expected a width, or a list of widths")
        widths = [hidden] if isinstance(hidden, int) else list(hidden)
        if not 1 <= len(widths) <= DEEPEST:
            raise SpecError(f"mlp: {len(widths)} hidden layers: expected 1 to {DEEPEST}; none is the head linear")
        if not isinstance(norm, bool):
            raise SpecError(f"mlp: norm is {norm!r}: expected true or false")
        for width in widths:
            whole("mlp", "hidden", width)
        self.activation = activation_of("mlp", activation)
        sizes = [feature.dim, *widths]
        self.hidden = nn.ModuleList(
            Affine(inputs, width, first=layer == 0) for layer, (inputs, width) in enumerate(pairwise(sizes))
        )
        self.norms = nn.ModuleList(Norm(width) if norm else nn.Identity() for width in widths)
        self.dropout = Dropout(rate("mlp", dropout))
        self.output = Affine(widths[-1], outputs)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, D] -> [B, C]."""
        for layer, norm in zip(self.hidden, self.norms, strict=True):
            x = self.dropout(self.activation(norm(layer(x))))
        return self.output(x)  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """``x + W2 dropout(act(W1 norm(x)))``: a pre-norm residual block (He et al. 2016; Xiong et al. 2020)."""

    def __init__(self, width: int, inner: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.up = Affine(width, inner)
        self.down = Affine(inner, width)
        self.dropout = Dropout(dropout)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        inner: Tensor = self.dropout(self.activation(self.up(self.norm(x))))
        return x + self.down(inner)  # type: ignore[no-any-return]


class ResidualMLP(Head):
    """A projection, pre-norm residual blocks, a final norm, a matrix.

    Args:
        width: of the residual stream.
        depth: number of blocks.
        expansion: the inner width of a block is ``expansion * width``.
        activation, dropout: as in ``MLP``.
    """

    def __init__(
        self,
        feature: FeatureSet,
        outputs: int,
        width: int = 256,
        depth: int = 2,
        expansion: int = 2,
        activation: str = "gelu",
        dropout: float = 0.1,
    ) -> None:
        super().__init__(feature, outputs)
        for name, value in (("width", width), ("depth", depth), ("expansion", expansion)):
            whole("residual", name, value, DEEPEST if name == "depth" else WIDEST)
        activation_of("residual", activation)
        self.input = Affine(feature.dim, width, first=True)
        dropped = rate("residual", dropout)
        self.blocks = nn.ModuleList(ResidualBlock(width, expansion * width, activation, dropped) for _ in range(depth))
        self.norm = Norm(width)
        self.output = Affine(width, outputs)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, D] -> [B, C]."""
        x = self.input(x)
        for block in self.blocks:
            x = block(x)
        return self.output(self.norm(x))  # type: ignore[no-any-return]


WIDEST, DEEPEST = 65_536, 256
"""Limits far above any use, so that a bundle from a stranger cannot ask for a head that takes hours to build."""


def whole(head: str, name: str, value: object, most: int = WIDEST) -> int:
    """Return a positive whole number. Raises ``SpecError`` for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise SpecError(f"{head}: {name} is {value!r}: expected a whole number from 1 to {most:,}")
    return value


def rate(head: str, value: object) -> float:
    """Return a dropout rate. Raises ``SpecError`` outside of [0, 1)."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
        raise SpecError(f"{head}: dropout is {value!r}: expected a number in [0, 1)")
    return float(value)


def activation_of(head: str, name: str) -> Callable[[Tensor], Tensor]:
    """Return an activation function by name. Raises ``SpecError`` with the names there are."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise SpecError(f"{head}: activation is {name!r}: expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
