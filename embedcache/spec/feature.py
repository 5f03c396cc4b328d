"""Feature sets as they are asked for: a pooling at some layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from embedcache.errors import SpecError

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

    def to_json(self) -> dict[str, object]:
        """Return the set as it is described in a cache's spec."""
        layers = None if self.layers is None else list(self.layers)
        return {"pooling": self.pooling, "layers": layers, "normalize": self.normalize}

    @property
    def multi_layer(self) -> bool:
        """Whether the set is ``[n, L, D]``."""
        return self.layers is None or len(self.layers) > 1


def feature_name(written: str) -> str:
    """Return the name of a feature set as a cache has it: ``mean@-2..-1`` is ``mean@-2+-1``. Raises ``SpecError``."""
    return FeatureSpec.parse(written).name


def _layer_range(part: str, text: str) -> Sequence[int]:
    if ".." not in part:
        return [int(part)]
    first, last = (int(end) for end in part.split(".."))
    if (first < 0) != (last < 0) or last < first:
        raise SpecError(
            f"{text!r}: a range of layers goes from the lower to the higher, both counted from the same end"
        )
    return range(first, last + 1)
