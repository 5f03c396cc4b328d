"""What was asked of which model: feature sets, settings of a backbone, all that decides the bits of its features."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedcache.errors import SpecError
from embedcache.fingerprint import differences as json_differences
from embedcache.spec.origin import Origin

if TYPE_CHECKING:
    from typing import TypeGuard

# Feature sets as they are asked for: a pooling at some layers.


POOLINGS = ("cls", "mean", "cls+mean", "max", "pooler", "projected", "last", "tokens", "states")
CONTENTS = ("text", "image")
RESIZES = ("crop", "pad", "squash")
DTYPES = ("float32", "bfloat16", "float16")
AUGMENTS = ("crop", "flip", "colour")
"""What makes a view of a picture, in the order in which it is done; FORMAT.md, section 5.4."""
AUGMENT = "crop+flip"
MOST_VIEWS = 100

_FEATURE = re.compile(
    r"(?P<l2>l2:)?(?P<norm>norm:)?(?P<pooling>[a-z]+(?:\+[a-z]+)?)(?:@(?P<layers>all|-?\d+(?:\.\.-?\d+)?(?:\+-?\d+(?:\.\.-?\d+)?)*))?"
    r"(?::view(?P<view>[1-9]\d*))?"
)


@dataclass(frozen=True)
class FeatureSpec:
    """One feature set: a pooling at one layer, or at several layers as one ``[n, L, D]`` set.

    ``layers`` indexes the hidden states as Hugging Face does: 0 is the embedding output, ``-1`` the last layer.
    ``None`` means every one of them. The written form, also the set's name, is
    ``[l2:][norm:]POOLING[@LAYERS]``: ``mean``, ``cls@-2``, ``l2:mean``, ``mean@-4..-1`` (inclusive), ``mean@1+3+5``,
    ``cls@all``, ``tokens`` (one vector per token or patch, for sequence heads), ``states@-3`` (all vectors that a layer
    gives, as the next one reads them).

    A picture's ``mean``, ``max`` and ``tokens`` are of its patches alone, without the class and register tokens;
    ``cls+mean`` is the class token's vector with the mean behind it; ``projected`` is what CLIP compares with texts.

    With ``final_norm``, written ``norm:``, layers before the last go through the network's last norm too, as the last
    one does: ``norm:cls@-4..-1`` of pictures.

    ``view`` 1 and up is the same set of an augmented view of each picture: ``mean:view1``. 0 is the plain picture.
    """

    pooling: str
    layers: tuple[int, ...] | None = (-1,)
    normalize: bool = False
    view: int = 0
    final_norm: bool = False

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise SpecError(f"unknown pooling {self.pooling!r}: expected one of {', '.join(POOLINGS)}, or auto")
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise SpecError(f"{self.pooling}: layers must be named once each, got {self.layers}")
        if self.pooling in ("pooler", "projected") and self.layers != (-1,):
            raise SpecError(f"{self.pooling} reads the last layer only: write {self.pooling} without @")
        if self.final_norm and (self.layers == (-1,) or self.pooling == "states"):
            what = "states are what the next layer reads" if self.pooling == "states" else "the last layer is behind it"
            raise SpecError(f"norm:{self.pooling} puts layers through the last norm, and {what}: leave norm: out")
        if self.token_level and (self.layers is None or len(self.layers) != 1):
            raise SpecError(f"a token-level set holds one layer: write {self.pooling} or {self.pooling}@-2")

    @classmethod
    def parse(cls, text: str) -> FeatureSpec:
        """Read the written form. Raises ``SpecError`` with the grammar when it does not fit."""
        match = _FEATURE.fullmatch(text.strip())
        if match is None:
            raise SpecError(
                f"cannot read the pooling {text!r}: expected [l2:][norm:]POOLING[@LAYERS][:viewN], "
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
        return cls(
            match["pooling"], layers, match["l2"] is not None, int(match["view"] or 0), match["norm"] is not None
        )

    @property
    def name(self) -> str:
        """The name of the set in the cache."""
        if self.layers is None:
            where = "@all"
        elif self.layers == (-1,):
            where = ""
        else:
            where = "@" + "+".join(str(layer) for layer in self.layers)
        before = f"{'l2:' if self.normalize else ''}{'norm:' if self.final_norm else ''}"
        return view_name(f"{before}{self.pooling}{where}", self.view)

    def to_json(self) -> dict[str, object]:
        """Return the set as it is described in a cache's spec."""
        layers = None if self.layers is None else list(self.layers)
        of_view = {"view": self.view} if self.view else {}
        normed = {"final_norm": True} if self.final_norm else {}
        return {"pooling": self.pooling, "layers": layers, "normalize": self.normalize, **normed, **of_view}

    @property
    def token_level(self) -> bool:
        """Whether a row has several vectors, as many as it has tokens or patches."""
        return self.pooling in ("tokens", "states")

    @property
    def multi_layer(self) -> bool:
        """Whether the set is ``[n, L, D]``."""
        return self.layers is None or len(self.layers) > 1


def view_name(name: str, view: int) -> str:
    """Return the name of a view's set, given that of the plain pictures', which is view 0."""
    return f"{name}:view{view}" if view else name


def plain_name(name: str) -> tuple[str, int]:
    """Return the name of the plain pictures' set, and the number of the view, given the name of any set."""
    plain, _, number = name.rpartition(":view")
    return (plain, int(number)) if plain and number.isdecimal() and int(number) else (name, 0)


def augments(text: str) -> tuple[str, ...]:
    """Read ``crop+flip``: operations in whatever order, each once. Raises ``SpecError``."""
    named = text.split("+") if isinstance(text, str) else ()
    if not named or len({*named}) < len(named) or not {*named} <= {*AUGMENTS}:
        raise SpecError(f"augment is {text!r}: expected some of {', '.join(AUGMENTS)}, such as {AUGMENT}")
    return tuple(name for name in AUGMENTS if name in named)


PixelRange = tuple[float, float]
"""The values that become black and white where pixels have no range of their own; FORMAT.md, section 5.3."""


def checked_range(given: Sequence[float]) -> PixelRange:
    """Return a range of pixels as it is recorded. Raises ``SpecError`` unless it is two numbers, the lower first."""
    try:
        low, high = map(float, given)
        if low < high and math.isfinite(high - low):
            return low, high
    except (TypeError, ValueError):
        pass
    raise SpecError(f"pixel_range is {given!r}: expected two numbers, that of black and a larger one of white")


def states_set(blocks: int) -> str:
    """Return the name of the hidden states that enter the last ``blocks`` blocks: ``states@-3`` of 2.

    Raises ``SpecError`` below 1.
    """
    if blocks < 1:
        raise SpecError(f"blocks is {blocks}: expected at least 1")
    return f"states@-{blocks + 1}"


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


FieldDifference = tuple[str, object, object]
"""A field, dots between its levels, with its value before and now."""
MOST_SHOWN = 4
Options = MutableMapping[str, Any]
"""Options of a function or a command, out of which its own are taken."""
Arguments = dict[str, Any]
"""Keyword arguments of a function, which checks them itself."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model is, and how it may be run here. None of it decides a bit, so none of it is in an identity."""

    model: Path | str | None = None
    revision: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False

    @classmethod
    def taken_from(cls, options: Options) -> ModelSource:
        """Take what describes a source out of the options of a function or a command."""
        return cls(**_taken(options, [field.name for field in fields(cls)]))

    def arguments(self) -> Arguments:
        """Return the keyword arguments with which ``load_backbone`` loads the model from here."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def or_else(self, model: object, revision: object) -> ModelSource:
        """Return this source, or where it names no model, the one recorded with its revision."""
        if self.model is not None:
            return self
        model, revision = (value if isinstance(value, str) else None for value in (model, self.revision or revision))
        return replace(self, model=model, revision=revision)


@dataclass(frozen=True)
class BackboneSettings:
    """How a backbone is to make features; see ``load_backbone``. None is what nobody has decided yet.

    ``content`` is what it reads. ``max_length``, ``truncation_side`` and ``prompt`` are of texts; ``resize``, the
    ``pixel_range``, the number of ``views`` and what they ``augment`` are of images.
    ``shapes`` are all canonical shapes, as ``ShapePolicy.to_json`` gives them; ``positions`` and ``pass_threads`` are
    what one may ask of them.
    """

    features: tuple[str, ...] = ()
    max_length: int | None = None
    truncation_side: str | None = None
    prompt: str | None = None
    compute_dtype: str | None = None
    storage_dtype: str | None = None
    attention: str | None = None
    compiled: bool | None = None
    shapes: Mapping[str, int] | None = None
    positions: int | None = None
    pass_threads: int | None = None
    content: str | None = None
    resize: str | None = None
    views: int | None = None
    augment: str | None = None
    pixel_range: PixelRange | None = None

    @classmethod
    def taken_from(cls, options: Options, features: Sequence[str] = ()) -> BackboneSettings:
        """Take what describes settings out of the options of a function or a command."""
        names = [field.name for field in fields(cls) if field.name not in ("features", "shapes")]
        return cls(features=tuple(features), **_taken(options, names))

    def refuse_impossible(self) -> None:
        """Raise ``SpecError`` for a value that no model can have, before anything is loaded."""
        for name in ("compute_dtype", "storage_dtype"):
            if (dtype := getattr(self, name)) is not None and dtype not in DTYPES:
                raise SpecError(f"{name} is {dtype!r}: expected one of {', '.join(DTYPES)}")
        if self.truncation_side not in (None, "right", "left"):
            raise SpecError(f"truncation_side is {self.truncation_side!r}: expected right or left")
        for name, known in (("content", CONTENTS), ("resize", RESIZES)):
            if (value := getattr(self, name)) is not None and value not in known:
                raise SpecError(f"{name} is {value!r}: expected one of {', '.join(known)}")
        for name in ("positions", "pass_threads"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise SpecError(f"{name} is {number}: expected at least 1")
        if self.pixel_range is not None:
            checked_range(self.pixel_range)
        if self.views is not None and not 0 <= self.views <= MOST_VIEWS:
            raise SpecError(f"views is {self.views}: expected a whole number from 0 to {MOST_VIEWS}")
        if self.augment is not None and augments(self.augment) and not self.views:
            raise SpecError("augment is given without views: say how many views of each picture are made")
        for feature in self.features:
            if feature != "auto" and FeatureSpec.parse(feature).view:
                raise SpecError(f"{feature} is a set of views: ask for {plain_name(feature)[0]} by extract --views N")

    def over(self, recorded: BackboneSettings) -> BackboneSettings:
        """Return these settings, and the recorded ones where these leave something open.

        The same feature sets in another order are those of the record in its order. Settings recorded of another kind
        of content decide nothing.
        """
        if None not in (self.content, recorded.content) and self.content != recorded.content:
            return self
        names = [feature_name(text) for text in self.features if text != "auto"]
        same = len(self.features) == len(recorded.features) and set(names) == set(recorded.features)
        merged = {
            field.name: getattr(recorded if getattr(self, field.name) is None else self, field.name)
            for field in fields(self)
        }
        if recorded.shapes is not None:
            asked = {"max_length": self.max_length, "positions": self.positions, "threads": self.pass_threads}
            changed = {name: number for name, number in asked.items() if number is not None}
            merged["shapes"] = {**(self.shapes or recorded.shapes), **changed}
        features = recorded.features if same or not self.features else self.features
        return BackboneSettings(**{**merged, "features": features})

    def arguments(self) -> Arguments:
        """Return the keyword arguments with which ``load_backbone`` follows these settings."""
        named = {"policy": self.shapes, **{field.name: getattr(self, field.name) for field in fields(self)}}
        return {name: value for name, value in named.items() if name != "shapes" and value not in (None, ())}


class ExtractionSpec(dict[str, Any]):
    """All that decides the bits of a feature: the spec of a cache, the extraction of a head, a backbone's identity.

    It is the JSON object of FORMAT.md, section 5, and nothing in it is refused: what a backbone of one's own or a newer
    version says of itself may be anything, and must give the same hash when it is written again. What is not known
    makes ``settings`` None.
    """

    @property
    def has_backbone(self) -> bool:
        """Whether a model that a name leads to made the features, from raw rows."""
        return "preprocessing" in self

    @property
    def origin(self) -> Origin | None:
        """Where the features come from, where no loaded model made them."""
        return Origin.from_json(self.get("source"))

    @property
    def content(self) -> str | None:
        """The kind of content that the backbone reads, such as ``text``; None where none is named."""
        if (origin := self.origin) is not None:
            return origin.content
        prepared = self.get("preprocessing")
        kind = prepared.get("kind") if isinstance(prepared, Mapping) else None
        return kind if isinstance(kind, str) else None

    @property
    def features(self) -> Mapping[str, object]:
        """The feature sets by name, as far as they are described."""
        described = self.get("features")
        return described if isinstance(described, Mapping) else {}

    @property
    def settings(self) -> BackboneSettings | None:
        """The settings of the backbone that made the features; None where ``load_backbone`` did not make it."""
        prepared, own = self.get("preprocessing"), _OF_CONTENT.get(self.content or "")
        if not isinstance(prepared, Mapping) or own is None or not {*own} <= {*prepared}:
            return None
        if not {*_OF_MODEL} <= {*self}:
            return None
        recorded: Arguments = {"content": self.content, **{name: prepared[name] for name in own}}
        recorded["pixel_range"] = self.pixel_range
        recorded |= {name: self[name] for name in _OF_MODEL}
        compiled = recorded.pop("execution") == "compiled"
        features = tuple(name for name, told in self.features.items() if not _of_view(told))
        return BackboneSettings(features, compiled=compiled, **recorded, **self._views())

    @property
    def pixel_range(self) -> PixelRange | None:
        """The range of floating-point and 32-bit integer pixels; None where none was given."""
        prepared = self.get("preprocessing")
        try:
            return checked_range(prepared["pixel_range"]) if isinstance(prepared, Mapping) else None
        except (LookupError, SpecError):
            return None

    def _views(self) -> Arguments:
        """Return how many views of each picture there are, and what they augment; nothing where there are none."""
        told = [told for told in self.features.values() if _of_view(told)]
        if not told:
            return {}
        return {"views": max(int(view["view"]) for view in told), "augment": told[0].get("augment")}

    def only(self, names: Collection[str]) -> ExtractionSpec:
        """Return the spec with these feature sets alone, in this order: others do not matter to who reads these."""
        if "features" not in self:
            return self
        kept = {name: self.features[name] for name in names if name in self.features}
        return ExtractionSpec({**self, "features": kept})

    def differences(self, now: Mapping[str, object]) -> list[FieldDifference]:
        """Return every field in which ``now`` is not what this spec says, with both values."""
        return json_differences(self, now)

    def differences_for(self, feature: str, now: ExtractionSpec) -> list[FieldDifference]:
        """Return the differences that matter to who reads one feature set, as a head does.

        A set that this spec does not describe cannot differ.
        """
        names = {feature} & {*self.features}
        described, here = ({"features": {}, **spec.only(names)} for spec in (self, now))
        return json_differences(described, here)


def _of_view(told: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(told, Mapping) and isinstance(told.get("view"), int)


_OF_CONTENT = {"text": ("max_length", "truncation_side", "prompt"), "image": ("resize",)}
_OF_MODEL = ("compute_dtype", "storage_dtype", "attention", "execution", "shapes")


def differences_text(differences: Sequence[FieldDifference], before: str, now: str) -> str:
    """Lay differences out for a message: ``backbone.config: trained on 'a', this is 'b'``, the first four of them."""
    shown = "; ".join(f"{field}: {before} {old!r}, {now} {new!r}" for field, old, new in differences[:MOST_SHOWN])
    return shown + (f" and {len(differences) - MOST_SHOWN} more" if len(differences) > MOST_SHOWN else "")


def _taken(options: Options, names: Sequence[str]) -> Arguments:
    return {name: options.pop(name) for name in names if name in options}
