"""The heads of both engines by name, and how one is built.

A new torch head is a class as in ``modules`` and a line here, or a call of ``register_head`` from outside. A new head
of scikit-learn is a line in ``sklearn_kinds``.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from embedcache.arguments import checks_arguments
from embedcache.errors import SpecError
from embedcache.heads.sklearn_kinds import KINDS, Kind, Options
from embedcache.spec import HeadSpec
from embedcache.task import Task
from embedcache.wording import did_you_mean, shortened

if TYPE_CHECKING:
    from embedcache.heads.modules import Head
    from embedcache.shard import FeatureSet
    from embedcache.shard import Kind as FeatureKind

Engine = Literal["torch", "sklearn"]
ENGINES: Mapping[str, Engine] = {"torch": "torch", "sklearn": "sklearn"}

TORCH: dict[str, str | type[Head]] = {
    "linear": "embedcache.heads.modules:Linear",
    "mlp": "embedcache.heads.modules:MLP",
    "residual": "embedcache.heads.modules:ResidualMLP",
    "attention": "embedcache.heads.attention:SelfAttention",
    "attention-pooling": "embedcache.heads.attention:AttentionPooling",
    "layer-mix": "embedcache.heads.attention:LayerMix",
    "layer-concat": "embedcache.heads.attention:LayerConcat",
}
"""Kind -> class, or where it is: naming a kind must not import torch."""

STACKED_OPTIONS = ("dropout",)
"""Options of a head that change no shape, so that heads which differ in them can be trained as one stack."""


def kinds(engine: Engine) -> tuple[str, ...]:
    """Return the kinds of heads an engine has."""
    return tuple(TORCH) if engine == "torch" else tuple(KINDS)


def option_names(kind: str, engine: Engine = "torch") -> tuple[str, ...]:
    """Return the names of the options of a kind. Raises ``SpecError`` for a kind that the engine does not have."""
    if engine == "sklearn":
        return tuple(_sklearn_kind(kind).options)
    # A head's constructor takes itself, the feature set and the number of outputs, and then its options.
    return tuple(inspect.signature(head_class(kind).__init__).parameters)[3:]


def engine_of(kind: str) -> Engine:
    """Return the engine that has a kind, torch where both do. Raises ``SpecError`` naming the nearest kinds."""
    for engine in ENGINES.values():
        if kind in kinds(engine):
            return engine
    raise _unknown(kind, (*kinds("torch"), *kinds("sklearn")))


def head_named(
    head: HeadSpec | str, engine: str | None = None, options: Mapping[str, object] | None = None
) -> HeadSpec:
    """Return the head that a text names: ``"mlp"``, ``"logistic-regression"``, ``"sklearn:mlp"``, or a ``HeadSpec``.

    Without ``engine`` it is the engine that has the kind, torch where both do. Raises ``SpecError`` for an unknown
    head, naming the nearest.
    """
    if isinstance(head, HeadSpec):
        return head
    if not isinstance(head, str):
        raise SpecError(f"head is {shortened(head)}: expected the name of a head, such as linear, or a HeadSpec")
    if not isinstance(engine, (str, type(None))):
        raise SpecError(f"engine is {shortened(engine)}: expected torch or sklearn, or None")
    prefix, _, rest = head.partition(":")
    kind, engine = (rest, engine or prefix) if rest and prefix in ENGINES else (head, engine)
    default = engine_of(kind)
    chosen = ENGINES.get(engine or default)
    if chosen is None:
        raise SpecError(f"the engine {engine!r} has no head {kind!r}: expected torch or sklearn")
    if kind not in kinds(chosen):
        raise SpecError(f"the head {kind} is {default}'s, and {chosen} has none of that name: leave the engine out")
    return HeadSpec(kind, chosen, options or {})


@checks_arguments()
def register_head(kind: str, head: type[Head]) -> None:
    """Add a torch head of your own under a new name; see CONTRIBUTING for an example.

    A bundle of it can be loaded wherever the same registration has been made.

    Raises ``SpecError`` for a name that is taken or malformed, and for a class that is not a torch module.
    """
    from torch.nn import Module

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", kind):
        raise SpecError(f"a head cannot be called {kind!r}: expected letters, digits, - and _, such as gated")
    if not (isinstance(head, type) and issubclass(head, Module)):
        raise SpecError(f"{shortened(head)} is not a head: expected a class made as CONTRIBUTING.md shows")
    if kind in TORCH and TORCH[kind] is not head:
        raise SpecError(f"there is a head {kind!r} already: choose another name")
    TORCH[kind] = head


def head_class(kind: str) -> type[Head]:
    """Return the class of a torch head. Raises ``SpecError`` for a kind there is not."""
    head = TORCH.get(kind)
    if head is None:
        raise _unknown(kind, kinds("torch"))
    if isinstance(head, str):
        module, _, name = head.partition(":")
        imported: type[Head] = getattr(importlib.import_module(module), name)
        return imported
    return head


def kinds_read(head: HeadSpec) -> tuple[FeatureKind, ...]:
    """Return the kinds of feature sets that a head reads; torch is loaded only for a head that may read several."""
    if head.engine == "sklearn" or head.kind in ("linear", "mlp", "residual"):
        return ("pooled",)
    return head_class(head.kind).takes


def build_head(spec: HeadSpec, feature: FeatureSet, outputs: int, *, seed: int = 0) -> Head:
    """Build a torch head for a feature set, with ``outputs`` logits, initialised from ``seed``.

    Raises ``SpecError`` for an unknown kind or option, ``FeatureError`` when the head cannot read the set.
    """
    built = blank_head(spec, feature, outputs)
    refuse_headless(spec.kind, built)
    built.initialize(seed)
    return built


def blank_head(spec: HeadSpec, feature: FeatureSet, outputs: int) -> Head:
    """Build a torch head whose weights are not initialised; raises as ``build_head`` does."""
    refuse_unknown_options(spec, option_names(spec.kind))
    return head_class(spec.kind)(feature, outputs, **spec.options)


def refuse_headless(kind: str, head: Head) -> None:
    """Raise ``SpecError`` for a class that lacks the layers which standardisation and regression targets need."""
    from embedcache.heads.modules import Affine

    if not isinstance(getattr(head, "output", None), Affine):
        raise SpecError(f"the head {kind} has no last layer called output that is an Affine: see CONTRIBUTING")
    if not any(head.first_layers()):
        raise SpecError(f"the head {kind} has no Affine(..., first=True) that reads the features: see CONTRIBUTING")


def refuse_unknown_options(spec: HeadSpec, allowed: tuple[str, ...]) -> None:
    """Raise ``SpecError`` for an option that a head does not have."""
    for name in spec.options:
        if name not in allowed:
            has = f"it has {', '.join(allowed)}" if allowed else "it has none"
            raise SpecError(f"the head {spec.kind} has no option {name!r}{did_you_mean(name, allowed)}: {has}")


def checked_kind(head: HeadSpec, task: Task) -> tuple[Kind, Options]:
    """Return the kind of a scikit-learn head, and all its options, given or by default.

    Raises ``SpecError`` for an unknown kind, a task that it cannot do, an unknown option, or an impossible value.
    """
    kind = _sklearn_kind(head.kind)
    if task not in kind.tasks:
        able = ", ".join(name for name, kind in KINDS.items() if task in kind.tasks)
        raise SpecError(f"the head {head.kind} cannot do {task}: expected one of {able}")
    refuse_unknown_options(head, tuple(kind.options))
    options = Options()
    for name, option in kind.options.items():
        options[name] = value = head.options.get(name, option.default)
        if not option.allowed(value):
            raise SpecError(f"{head.kind}: {name} is {value!r}, expected {option.expected}")
    if (fault := kind.fault(head.options, options)) is not None:
        raise SpecError(f"{head.kind}: {fault}")
    return kind, options


def _sklearn_kind(name: str) -> Kind:
    if name not in KINDS and engine_of(name) == "torch":
        raise SpecError(f"the head {name} is torch's: expected one of {', '.join(KINDS)}, or the engine torch")
    return KINDS[name]


def stack_key(spec: HeadSpec) -> tuple[str, str, str]:
    """Return what two heads must share to be trained as one stack: kind, engine and the options that set shapes."""
    shaping = {name: spec.options[name] for name in sorted(spec.options) if name not in STACKED_OPTIONS}
    return spec.engine, spec.kind, repr(shaping)


def _unknown(kind: str, existing: tuple[str, ...]) -> SpecError:
    hint = did_you_mean(kind, existing)
    return SpecError(f"there is no head {kind!r}{hint}: expected one of {', '.join(dict.fromkeys(existing))}")
