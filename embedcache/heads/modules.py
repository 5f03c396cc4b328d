"""Heads on torch: feature vectors -> logits.

A head is built for one feature set, ``Head(feature, outputs, **options)``, from the layers of ``layers``; its last
layer is an ``Affine`` called ``output``. Because every layer works stacked too, so does every head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from embedcache.errors import FeatureError, SpecError
from embedcache.heads.layers import ACTIVATIONS, Affine, Dropout, Norm
from embedcache.shard import FeatureSet, Kind


class Head(nn.Module):
    """What every head has. ``takes`` are the kinds of feature sets it reads; ``output`` is its last layer."""

    takes: ClassVar[tuple[Kind, ...]] = ("pooled",)
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
        """Draw all weights from ``seed``, and the dropout from another stream of it."""
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
        for layer in self.first_layers():
            layer.mean, layer.scale = mean, scale


def _cannot_read(name: str, takes: tuple[Kind, ...], feature: FeatureSet) -> str:
    words = {"pooled": "one vector a row", "layers": "several layers a row", "tokens": "one vector a token"}
    if feature.kind == "pooled":
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
    made = copy.copy(module)
    made._parameters, made._buffers, made._modules = {}, {}, {}
    for name, parameter in module._parameters.items():
        value = None if parameter is None else nn.Parameter(parameter.detach()[heads])
        made.register_parameter(name, value)
    for name, buffer in module._buffers.items():
        per_head = buffer is not None and buffer.dim() > 1
        made.register_buffer(name, buffer[heads] if per_head and buffer is not None else buffer)
    for name, child in module._modules.items():
        made._modules[name] = None if child is None else _chosen(child, heads)
    if isinstance(made, Dropout):
        kept = heads.tolist()
        made.rates = tuple(made.rates[head] for head in kept)
        made.generators = None if made.generators is None else [made.generators[head] for head in kept]
    return made


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
