"""The heads by width and number of classes, for models put together by hand.

They are the heads of the registry, so what is trained here can be trained on a cache, and the other way round.
"""

from __future__ import annotations

from torch import Tensor

from embedcache.arguments import checks_arguments
from embedcache.errors import FeatureError, SpecError
from embedcache.heads.attention import SelfAttention
from embedcache.heads.modules import MLP, Linear, ResidualMLP
from embedcache.shard import FeatureSet, Kind


class LinearClassifier(Linear):
    """One matrix: features [B, D] -> logits [B, C].

    Example::

        head = LinearClassifier(384, num_classes=3)
    """

    @checks_arguments()
    def __init__(self, input_dim: int, num_classes: int, *, seed: int = 0) -> None:
        super().__init__(_features(input_dim), _classes(num_classes))
        self.initialize(seed)


class MLPClassifier(MLP):
    """One hidden layer with dropout: features [B, D] -> logits [B, C]; ``MLP`` has more of them."""

    @checks_arguments()
    def __init__(
        self, input_dim: int, hidden_dim: int, num_classes: int, dropout: float = 0.1, *, seed: int = 0
    ) -> None:
        super().__init__(_features(input_dim), _classes(num_classes), hidden=(hidden_dim,), dropout=dropout)
        self.initialize(seed)


class ResidualClassifier(ResidualMLP):
    """Pre-norm residual blocks of width ``hidden_dim``: features [B, D] -> logits [B, C]."""

    @checks_arguments()
    def __init__(
        self,
        input_dim: int,
        num_classes: int,
        hidden_dim: int = 256,
        num_blocks: int = 2,
        dropout: float = 0.1,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(
            _features(input_dim), _classes(num_classes), width=hidden_dim, depth=num_blocks, dropout=dropout
        )
        self.initialize(seed)


class AttentionClassifier(SelfAttention):
    """Self-attention over a sequence, and the mean of what is real: [B, T, D] and mask [B, T] -> logits [B, C].

    The mask is 1 or True where a token is real, as a tokenizer gives it; None says that all are. ``num_heads`` must
    divide the width of the attention, at most 256; None takes the most of 8, 4, 2 and 1 that do.
    """

    @checks_arguments()
    def __init__(
        self, input_dim: int, num_classes: int, num_heads: int | None = None, dropout: float = 0.1, *, seed: int = 0
    ) -> None:
        super().__init__(_features(input_dim, "tokens"), _classes(num_classes), heads=num_heads, dropout=dropout)
        self.initialize(seed)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, T, D], mask [B, T] -> [B, C]. Raises ``FeatureError`` for one vector a row, or a mask that misfits."""
        if x.dim() != 3:
            raise FeatureError(
                f"attention reads a sequence a row, [B, T, {self.dim}], and got {list(x.shape)}: "
                "give it the features of tokens, or use MLPClassifier"
            )
        if mask is not None and mask.shape != x.shape[:2]:
            raise FeatureError(f"the mask is {list(mask.shape)}: expected {list(x.shape[:2])}, one value a token")
        return super().forward(x, None if mask is None else mask.bool())


def _features(input_dim: int, kind: Kind = "pooled") -> FeatureSet:
    return FeatureSet("features", kind, input_dim, 1, "float32")


def _classes(num_classes: int) -> int:
    if not isinstance(num_classes, int) or num_classes < 1:
        raise SpecError(f"num_classes is {num_classes!r}: expected a whole number of at least 1")
    return num_classes
