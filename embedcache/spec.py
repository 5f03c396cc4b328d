"""What to extract, which head, how to train: frozen values, validated once, at the edge."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from embedcache.errors import SpecError

Task = Literal["classification", "multilabel", "regression"]
TASKS: tuple[Task, ...] = ("classification", "multilabel", "regression")

POOLINGS = ("cls", "mean", "max", "pooler", "last", "tokens")
DTYPES = ("float32", "bfloat16", "float16")

_FEATURE = re.compile(
    r"(?P<l2>l2:)?(?P<pooling>[a-z]+)(?:@(?P<layers>all|-?\d+(?:\.\.-?\d+)?(?:\+-?\d+(?:\.\.-?\d+)?)*))?"
)


@dataclass(frozen=True)
class FeatureSpec:
    """One feature set: a pooling at one layer, or at several layers as one ``[n, L, D]`` set.

    ``layers`` indexes the hidden states as Hugging Face does: 0 is the embedding output, ``-1`` the last layer.
    ``None`` means every one of them. The written form, also the set's name, is
    ``[l2:]POOLING[@LAYERS]``: ``mean``, ``cls@-2``, ``l2:mean``, ``mean@-4..-1`` (inclusive), ``mean@1+3+5``,
    ``cls@all``, ``tokens`` (one vector per token, for sequence heads).
    """

    pooling: str
    layers: tuple[int, ...] | None = (-1,)
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise SpecError(f"unknown pooling {self.pooling!r}: expected one of {', '.join(POOLINGS)}, or auto")
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise SpecError(f"{self.pooling}: layers must be named once each, got {self.layers}")
        if self.pooling == "pooler" and self.layers != (-1,):
            raise SpecError("the pooler reads the last layer only: write pooler without @")
        if self.pooling == "tokens" and (self.layers is None or len(self.layers) != 1):
            raise SpecError("a token-level set holds one layer: write tokens or tokens@-2")

    @classmethod
    def parse(cls, text: str) -> FeatureSpec:
        """Read the written form. Raises ``SpecError`` with the grammar when it does not fit."""
        match = _FEATURE.fullmatch(text.strip())
        if match is None:
            raise SpecError(
                f"cannot read the pooling {text!r}: expected [l2:]POOLING[@LAYERS], "
                "such as mean, cls@-2, l2:mean, mean@-4..-1"
            )
        written = match["layers"]
        layers: tuple[int, ...] | None
        if written is None:
            layers = (-1,)
        elif written == "all":
            layers = None
        else:
            layers = tuple(layer for part in written.split("+") for layer in _layer_range(part, text))
        return cls(match["pooling"], layers, match["l2"] is not None)

    @property
    def name(self) -> str:
        """The name of the set in the cache."""
        if self.layers is None:
            where = "@all"
        elif self.layers == (-1,):
            where = ""
        else:
            where = "@" + "+".join(str(layer) for layer in self.layers)
        return f"{'l2:' if self.normalize else ''}{self.pooling}{where}"

    @property
    def multi_layer(self) -> bool:
        """Whether the set is ``[n, L, D]``."""
        return self.layers is None or len(self.layers) > 1


def _layer_range(part: str, text: str) -> Sequence[int]:
    if ".." not in part:
        return [int(part)]
    first, last = (int(end) for end in part.split(".."))
    if (first < 0) != (last < 0) or last < first:
        raise SpecError(
            f"{text!r}: a range of layers goes from the lower to the higher, both counted from the same end"
        )
    return range(first, last + 1)


@dataclass(frozen=True)
class HeadSpec:
    """Which head: ``kind`` names it in the registry of ``engine``; ``options`` are its constructor's keywords."""

    kind: str = "linear"
    engine: Literal["torch", "sklearn"] = "torch"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.engine not in ("torch", "sklearn"):
            raise SpecError(f"unknown engine {self.engine!r}: expected torch or sklearn")


@dataclass(frozen=True)
class TrainSpec:
    """How to train one head.

    ``solver`` is ``minibatch`` (``optimizer`` over shuffled batches) or ``convex`` (full batch, linear heads only).
    ``warmup`` is the share of all steps in [0, 1). ``clip`` is the largest gradient norm, 0 for none.
    ``patience`` counts epochs without a better ``metric`` on validation, 0 for never stopping early.
    ``seed`` decides initial weights and dropout, ``shuffle_seed`` the order of the batches (None: ``seed`` does).
    ``l2`` is the strength of the convex solver's penalty, ``l2 / 2 * ||W||^2`` added to the *sum* of losses
    (scikit-learn's ``C`` is ``1 / l2``).
    """

    solver: Literal["minibatch", "convex"] = "minibatch"
    epochs: int = 30
    batch_size: int = 64
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    momentum: float = 0.9
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = 0.05
    clip: float = 1.0
    patience: int = 5
    metric: str | None = None
    label_smoothing: float = 0.0
    class_weight: Literal["balanced"] | Mapping[str, float] | None = None
    standardize: bool = True
    l2: float = 1.0
    seed: int = 0
    shuffle_seed: int | None = None

    def __post_init__(self) -> None:
        _check(self.solver in ("minibatch", "convex"), "solver", self.solver, "minibatch or convex")
        _check(self.optimizer in ("adamw", "sgd"), "optimizer", self.optimizer, "adamw or sgd")
        _check(
            self.schedule in ("constant", "linear", "cosine"), "schedule", self.schedule, "constant, linear or cosine"
        )
        _check(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        _check(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _check(_positive(self.learning_rate), "learning_rate", self.learning_rate, "a positive number")
        _check(_positive(self.weight_decay, zero=True), "weight_decay", self.weight_decay, "0 or a positive number")
        _check(0 <= self.momentum < 1, "momentum", self.momentum, "a number in [0, 1)")
        _check(0 <= self.warmup < 1, "warmup", self.warmup, "a share of the steps in [0, 1)")
        _check(_positive(self.clip, zero=True), "clip", self.clip, "0 or a positive number")
        _check(self.patience >= 0, "patience", self.patience, "0 or more epochs")
        _check(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "a number in [0, 1)")
        _check(_positive(self.l2, zero=True), "l2", self.l2, "0 or a positive number")
        for name, seed in (("seed", self.seed), ("shuffle_seed", self.order_seed)):
            _check(isinstance(seed, int) and 0 <= seed < 2**32, name, seed, "a whole number in [0, 2**32)")
        fine = self.class_weight is None or self.class_weight == "balanced" or isinstance(self.class_weight, Mapping)
        _check(fine, "class_weight", self.class_weight, "balanced, or a weight for each class")

    @property
    def order_seed(self) -> int:
        """The seed of the batch order."""
        return self.seed if self.shuffle_seed is None else self.shuffle_seed


def _positive(value: float, zero: bool = False) -> bool:
    return math.isfinite(value) and (value > 0 or (zero and value == 0))


def _check(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise SpecError(f"{name} is {value!r}: expected {expected}")
