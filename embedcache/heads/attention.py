"""Heads on several vectors a row: its tokens, padded and with a mask, or the backbone's layers."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from embedcache.errors import SpecError
from embedcache.heads.modules import Affine, Dropout, Head, Norm, rate, whole
from embedcache.shard import FeatureSet, Kind
from embedcache.wording import counted, shortened


class Vectors(nn.Module):
    """Learned vectors [N, H], drawn with a standard ``deviation``.

    A query each; or one for each layer of a multi-layer set, without which attention could not tell layers apart.
    """

    def __init__(self, number: int, width: int, deviation: float) -> None:
        super().__init__()
        self.deviation = deviation
        self.weight = nn.Parameter(torch.zeros(number, width))

    def initialize(self, generator: torch.Generator) -> None:
        """Draw the vectors."""
        with torch.no_grad():
            self.weight.normal_(0.0, self.deviation, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """[..., B, N, H] -> the same, with each its vector added."""
        return x + (self.weight if self.weight.dim() == 2 else self.weight.unsqueeze(1))


def number_of_heads(kind: str, heads: int | None, width: int) -> int:
    """Return the number of attention heads: ``heads``, or the largest of 8, 4, 2 and 1 that divides ``width``.

    Raises ``SpecError`` for ``heads`` that do not divide it.
    """
    if heads is None:
        return next(count for count in (8, 4, 2, 1) if width % count == 0)
    whole(kind, "heads", heads)
    if width % heads:
        near = [count for count in range(1, width + 1) if width % count == 0 and count <= 2 * heads]
        raise SpecError(
            f"{kind}: {heads} heads do not divide the width {width}: choose a number that does, such as {near[-1]}"
        )
    return heads


class _Attending(Head):
    takes: ClassVar[tuple[Kind, ...]] = ("tokens", "layers")

    def __init__(self, feature: FeatureSet, outputs: int, kind: str, width: int | None, heads: int | None) -> None:
        super().__init__(feature, outputs)
        self.width = whole(kind, "width", min(256, feature.dim) if width is None else width)
        self.heads = number_of_heads(kind, heads, self.width)
        self.layer: nn.Module = Vectors(feature.layers, self.width, 0.02) if feature.kind == "layers" else nn.Identity()

    def _split(self, x: Tensor) -> Tensor:
        """[..., T, H] -> [..., heads, T, H / heads]."""
        return x.reshape(*x.shape[:-1], self.heads, -1).transpose(-2, -3)

    def _joined(self, x: Tensor) -> Tensor:
        """Undo ``_split``."""
        return x.transpose(-2, -3).flatten(-2)


class SelfAttention(_Attending):
    """One block of self-attention without positions (Vaswani et al. 2017), then the mean over the real vectors.

    Args:
        width: the width of the attention; None for that of the features, at most 256.
        heads: attention heads, which must divide the width; None for the largest of 8, 4, 2 and 1 that does.
        dropout: share of the attended values dropped in training.
    """

    def __init__(
        self,
        feature: FeatureSet,
        outputs: int,
        width: int | None = None,
        heads: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(feature, outputs, "attention", width, heads)
        self.input = Affine(feature.dim, self.width, first=True)
        self.norm = Norm(self.width)
        # No bias: that of the keys adds the same to all scores, which softmax ignores, so only rounding would move it.
        self.qkv = Affine(self.width, 3 * self.width, bias=False)
        self.mix = Affine(self.width, self.width)
        self.dropout = Dropout(rate("attention", dropout))
        self.final = Norm(self.width)
        self.output = Affine(self.width, outputs)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, T, D] and mask [B, T] (True = real; None: all are) -> [B, C]."""
        x = self.layer(self.input(x))
        query, key, value = (self._split(part) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        keys = None if mask is None else mask[:, None, None, :]
        attended = self._joined(functional.scaled_dot_product_attention(query, key, value, attn_mask=keys))
        x = self.final(x + self.dropout(self.mix(attended)))
        if mask is None:
            return self.output(x.mean(dim=-2))  # type: ignore[no-any-return]
        real = mask.unsqueeze(-1)
        mean = x.masked_fill(~real, 0.0).sum(dim=-2) / real.sum(dim=-2)
        return self.output(mean)  # type: ignore[no-any-return]


class AttentionPooling(_Attending):
    """Learned queries, each of which takes a weighted mean of the real vectors (pooling by attention, Lee et al. 2019).

    Args:
        width, heads, dropout: as in ``SelfAttention``.
        queries: how many learned queries; their means are concatenated.
    """

    def __init__(
        self,
        feature: FeatureSet,
        outputs: int,
        width: int | None = None,
        heads: int | None = None,
        queries: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(feature, outputs, "attention-pooling", width, heads)
        whole("attention-pooling", "queries", queries)
        self.input = Affine(feature.dim, self.width, first=True)
        self.norm = Norm(self.width)
        self.key = Affine(self.width, self.width, bias=False)  # as in SelfAttention
        self.queries = Vectors(queries, self.width, 1 / math.sqrt(self.width))  # of about unit length
        self.dropout = Dropout(rate("attention-pooling", dropout))
        self.output = Affine(queries * self.width, outputs)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, T, D] and mask [B, T] (True = real; None: all are) -> [B, C]."""
        value = self.norm(self.layer(self.input(x)))
        query = self._split(self.queries.weight)
        if self.queries.weight.dim() == 3:
            query = query.unsqueeze(1)
        scores = query @ self._split(self.key(value)).transpose(-1, -2) / math.sqrt(self.width / self.heads)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
        pooled = self._joined(scores.softmax(dim=-1) @ self._split(value))
        return self.output(self.dropout(pooled.flatten(-2)))  # type: ignore[no-any-return]


class Mix(nn.Module):
    """A weighted mean of L layers, whose weights are the softmax of what is learned; equal at the start."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers))

    def forward(self, x: Tensor) -> Tensor:
        """[..., B, L, C] -> [..., B, C]."""
        shares = self.weight.softmax(dim=-1).unsqueeze(-1)
        return (x * (shares if shares.dim() == 2 else shares.unsqueeze(1))).sum(dim=-2)


class LayerMix(Head):
    """A matrix on a learned mix of the backbone's layers (ELMo's, Peters et al. 2018).

    The matrix comes first and the mix after it, which is the same, as the weights of the layers add up to 1: heads of a
    stack then read the features in one product.
    """

    takes: ClassVar[tuple[Kind, ...]] = ("layers",)

    def __init__(self, feature: FeatureSet, outputs: int) -> None:
        super().__init__(feature, outputs)
        self.output = Affine(feature.dim, outputs, first=True)
        self.mix = Mix(feature.layers)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, L, D] -> [B, C]."""
        return self.mix(self.output(x))  # type: ignore[no-any-return]


MEANS = ("all", "last", "none")


class LayerConcat(Head):
    """A matrix on the vectors of the last layers, side by side, as DINOv2 is evaluated (Oquab et al. 2023).

    Its weights start normal, with a deviation of 0.01, and its biases at 0, as there.

    Args:
        layers: how many layers it reads, the last of the set; None for all.
        mean: of ``cls+mean`` sets, whose mean stands behind the class tokens: that of ``all`` these layers, of the
            ``last`` one, or ``none``.
    """

    takes: ClassVar[tuple[Kind, ...]] = ("layers",)
    starts_at_shares: ClassVar[bool] = False

    def __init__(self, feature: FeatureSet, outputs: int, layers: int | None = None, mean: str = "all") -> None:
        super().__init__(feature, outputs)
        self.layers = feature.layers if layers is None else whole("layer-concat", "layers", layers)
        if self.layers > feature.layers:
            raise SpecError(f"layer-concat: layers is {layers}: {feature.name} has {counted(feature.layers, 'layer')}")
        if mean not in MEANS:
            raise SpecError(f"layer-concat: mean is {shortened(mean)}: expected one of {', '.join(MEANS)}")
        if mean != "all" and "cls+mean" not in feature.name.partition("@")[0]:
            raise SpecError(f"layer-concat: mean is {mean}, which only cls+mean sets have, and not {feature.name}")
        self.mean = mean
        self.output = Affine(self._beside(torch.empty(feature.row_shape)).shape[-1], outputs, first=True)

    def initialize(self, seed: int) -> None:
        """Draw all weights from ``seed``."""
        super().initialize(seed)
        with torch.no_grad():
            self.output.weight.normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))
            self.get_parameter("output.bias").zero_()

    def _beside(self, x: Tensor) -> Tensor:
        """Lay out what is read of the layers: [..., L, D] -> [..., I]."""
        last = x[..., x.shape[-2] - self.layers :, :]
        if self.mean == "all":
            return last.flatten(-2)
        half = x.shape[-1] // 2
        tokens = last[..., :half].flatten(-2)
        return tokens if self.mean == "none" else torch.cat([tokens, x[..., -1, half:]], dim=-1)

    def of_inputs(self, moments: Tensor | None) -> Tensor | None:
        """Return the moments that the layers of a set share, [D] or [K, D], for each number that is read."""
        if moments is None:
            return None
        return self._beside(moments.unsqueeze(-2).expand(*moments.shape[:-1], self.layers, -1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, L, D] -> [B, C]."""
        return self.output(self._beside(x))  # type: ignore[no-any-return]
