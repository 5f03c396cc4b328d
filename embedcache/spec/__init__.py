"""What to extract, which head, how to train: frozen values, validated once, at the edge."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, TypeVar

from embedcache.errors import SpecError
from embedcache.spec.extraction import (
    AUGMENT,
    AUGMENTS,
    CONTENTS,
    DTYPES,
    POOLINGS,
    RESIZES,
    BackboneSettings,
    ExtractionSpec,
    FeatureSpec,
    FieldDifference,
    ModelSource,
    PixelRange,
    augments,
    checked_range,
    differences_text,
    feature_name,
    plain_name,
    states_set,
    view_name,
)
from embedcache.spec.origin import READS, Origin, checked_identity
from embedcache.wording import did_you_mean, shortened

__all__ = [
    "AUGMENT",
    "AUGMENTS",
    "CONTENTS",
    "DTYPES",
    "FINE_TUNING",
    "MAY_DIFFER",
    "MINIBATCH_SETTINGS",
    "MIN_STEPS",
    "POOLINGS",
    "READS",
    "RESIZES",
    "SPLITS",
    "TASKS",
    "TUNING",
    "TUNING_DECAY",
    "TUNING_DROPOUT",
    "TUNING_RATE",
    "BackboneSettings",
    "Declared",
    "ExtractionSpec",
    "FeatureSpec",
    "FieldDifference",
    "HeadSpec",
    "ModelSource",
    "Origin",
    "PixelRange",
    "TaskName",
    "TrainSpec",
    "augments",
    "checked_identity",
    "checked_range",
    "declared",
    "differences_text",
    "feature_name",
    "find_name",
    "plain_name",
    "split_name",
    "states_set",
    "view_name",
]

T = TypeVar("T")
TaskName = Literal["classification", "multilabel", "regression"]
TASKS: tuple[TaskName, ...] = ("classification", "multilabel", "regression")

SPLITS = ("train", "validation", "test")
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def split_name(written: str) -> str:
    """Return the name of a split: ``val``, ``dev`` and ``valid`` are ``validation``; unknown names are kept."""
    return _SPLITS.get(written.strip().lower(), written.strip())


def find_name(written: object, there: Container[str], normal: Callable[[str], str]) -> str | None:
    """Return which of the names that are ``there`` was written, None for none of them.

    A name that is there stands for itself, however it looks; any other is tried as ``normal`` writes it:
    ``split_name``, or ``feature_name``.
    """
    if not isinstance(written, str):
        return None
    if written in there:
        return written
    try:
        name = normal(written)
    except SpecError:
        return None
    return name if name in there else None


@dataclass(frozen=True)
class Declared:
    """One setting, described once for wherever it is offered: a value, a command or an estimator.

    ``help`` is one line, ``expected`` says in words what ``allowed`` tests, ``choices`` are the allowed words (none
    where it is not a word), ``type`` is what text is read as, ``metavar`` stands for the value in a command's help.
    ``unset`` says what None means. ``solver`` names the only solver that reads it; empty where several do.
    """

    help: str
    allowed: Callable[[object], bool]
    expected: str
    type: type = str
    choices: tuple[str, ...] = ()
    metavar: str = ""
    unset: str = ""
    solver: str = ""

    def described(self, default: object) -> str:
        """Return the help with a default and the range, in one line."""
        shown = self.unset if default is None else f"{default:g}" if self.type in (int, float) else str(default)
        shown = ("yes" if default else "no") if isinstance(default, bool) else shown
        known = [f"default: {shown}"] if shown else []
        known += [self.expected] if self.type in (int, float) else []
        return f"{self.help}  [{'; '.join(known)}]" if known else self.help


def declared(spec: type[HeadSpec] | type[TrainSpec]) -> dict[str, Declared]:
    """Return the description of each field, by name and in order: commands and estimators are made from it."""
    return {setting.name: setting.metadata["declared"] for setting in fields(spec)}


def _setting(
    default: T, help: str, allowed: Callable[[object], bool], expected: str, read: type = str,
    choices: tuple[str, ...] = (), **words: str,
) -> T:  # fmt: skip
    return field(default=default, metadata={"declared": Declared(help, allowed, expected, read, choices, **words)})


def _choice(default: T, help: str, *choices: str, **more: str) -> T:
    def allowed(value: object) -> bool:
        return isinstance(value, str) and value in choices

    words = f"{', '.join(choices[:-1])} or {choices[-1]}"
    return _setting(default, help, allowed, words, str, choices, **more)


def _whole(default: T, help: str, least: int = 0, most: int | None = None, **more: str) -> T:
    def allowed(value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral):
            return default is None and value is None
        return least <= int(value) and (most is None or int(value) <= most)

    expected = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most:,}"
    return _setting(default, help, allowed, expected, int, (), **{"metavar": "N", **more})


def _number(default: float, help: str, expected: str, **more: str) -> float:
    ranges: dict[str, Callable[[float], bool]] = {
        "a number above 0": lambda value: value > 0,
        "a number of at least 0": lambda value: value >= 0,
        "a number from 0 to below 1": lambda value: 0 <= value < 1,
    }

    def allowed(value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        return math.isfinite(value) and ranges[expected](float(value))

    return _setting(default, help, allowed, expected, float, (), **{"metavar": "X", **more})


def _is_class_weight(value: object) -> bool:
    return value is None or (isinstance(value, str) and value == "balanced") or isinstance(value, Mapping)


@dataclass(frozen=True)
class HeadSpec:
    """Which head: ``kind`` names it in the registry of ``engine``; ``options`` are its constructor's keywords."""

    kind: str = _setting(
        "linear",
        "Which head: linear, mlp, residual, attention, attention-pooling, layer-mix, layer-concat; or scikit-learn's "
        "logistic-regression, linear-svm, ridge, lda, nearest-centroid, knn, hist-gradient-boosting, and the baselines "
        "majority and random-projection.",
        lambda value: isinstance(value, str), "the name of a head", metavar="NAME",
    )  # fmt: skip
    engine: Literal["torch", "sklearn"] = _choice(
        "torch", "Which library trains it: both have a linear and an mlp, everything else only one of them has.",
        "torch", "sklearn",
    )  # fmt: skip
    options: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={
            "declared": Declared(
                "The head's own settings.", lambda value: isinstance(value, Mapping), "names and values",
                metavar="NAME=VALUE",
            )
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, setting in declared(HeadSpec).items():
            if not setting.allowed(getattr(self, name)):
                raise SpecError(f"the head's {name} is {shortened(getattr(self, name))}: expected {setting.expected}")


MIN_STEPS = 300
"""The least number of steps where nobody says how many epochs."""


@dataclass(frozen=True)
class TrainSpec:
    """How to train one head. A value that a setting cannot have raises ``SpecError``, which says what it can be.

    ``solver`` ``auto`` takes the convex solver for the head ``linear``: its optimum depends on the data alone. A
    setting that only minibatches have (``epochs``, ``learning_rate``, ...) selects them: ``TrainSpec(epochs=30)`` has
    the solver ``minibatch``, and so have features that do not fit in memory; see ``solver_for``. Given ``epochs`` are
    kept exactly; otherwise training takes at least ``min_steps``, as thirty epochs of one batch teach nothing.

    ``l2`` is the strength of the penalty of linear heads, ``l2 / 2 * ||W||^2`` added to the *sum* of losses
    (scikit-learn's ``C`` is ``1 / l2``). ``class_weight`` maps names of classes to weights, or is ``balanced``.
    ``shuffle_seed`` None takes ``seed``.
    """

    solver: Literal["auto", "minibatch", "convex"] = _choice(
        "auto",
        "convex: the exact optimum of the head linear. minibatch: an optimizer over shuffled batches. auto: convex for "
        "linear, unless a setting of minibatches is given or the features do not fit in memory.",
        "auto", "minibatch", "convex",
    )  # fmt: skip
    epochs: int = _whole(30, "Passes over the training rows.", 1, solver="minibatch")
    min_steps: int | None = _whole(
        None, "Train for at least this many steps: few rows get more epochs, and early stopping waits. 0 disables.",
        unset="300, and 0 where epochs are given", solver="minibatch",
    )  # fmt: skip
    batch_size: int = _whole(64, "Rows in a training step.", 1, solver="minibatch")
    optimizer: Literal["adamw", "sgd"] = _choice(
        "adamw", "Optimizer of the training steps.", "adamw", "sgd", solver="minibatch"
    )
    learning_rate: float = _number(3e-3, "Peak learning rate.", "a number above 0", solver="minibatch")
    weight_decay: float = _number(
        0.01, "Weight decay, of matrices and not of biases.", "a number of at least 0", solver="minibatch"
    )
    momentum: float = _number(0.9, "Momentum of sgd.", "a number from 0 to below 1", solver="minibatch")
    schedule: Literal["constant", "linear", "cosine"] = _choice(
        "cosine", "How the learning rate changes after the warm-up: cosine and linear fall to 0.",
        "constant", "linear", "cosine", solver="minibatch",
    )  # fmt: skip
    warmup: float = _number(
        0.05, "Share of all steps in which the learning rate rises to its peak.", "a number from 0 to below 1",
        metavar="SHARE", solver="minibatch",
    )  # fmt: skip
    clip: float = _number(
        1.0, "Clip gradients to this norm; 0 disables.", "a number of at least 0", metavar="NORM", solver="minibatch"
    )
    patience: int = _whole(
        5, "Stop early after so many epochs without a better metric on validation; 0 disables.", metavar="EPOCHS",
        solver="minibatch",
    )  # fmt: skip
    metric: str | None = _setting(
        None, "Metric on validation by which the best epoch is kept.",
        lambda value: value is None or isinstance(value, str), "the name of a metric", metavar="NAME",
        unset="log_loss, or rmse of a regression", solver="minibatch",
    )  # fmt: skip
    label_smoothing: float = _number(
        0.0,
        "Label smoothing: share of each label that is spread over all classes.",
        "a number from 0 to below 1",
        solver="minibatch",
    )
    input_noise: float = _number(
        0.0, "Add normal noise to features in training: its deviation, in those of the features.",
        "a number of at least 0", solver="minibatch",
    )  # fmt: skip
    input_dropout: float = _number(
        0.0, "Set this share of features to their mean in training.",
        "a number from 0 to below 1", solver="minibatch",
    )  # fmt: skip
    class_weight: Literal["balanced"] | Mapping[str, float] | None = _setting(
        None, 'Weights of classes: balanced, or a number for each class: {"class": weight}.', _is_class_weight,
        "balanced, or a weight for each class", metavar="balanced|JSON", unset="1 each",
    )  # fmt: skip
    standardize: bool = _setting(
        True, "Scale features to mean 0 and variance 1 first; folded into the trained head.",
        lambda value: isinstance(value, bool), "true or false", bool,
    )  # fmt: skip
    l2: float = _number(
        1.0, "L2 penalty of the convex solver and of scikit-learn's linear heads: 1 / C.", "a number of at least 0",
        solver="convex",
    )  # fmt: skip
    seed: int = _whole(0, "Seed of initial weights, dropout and the order of rows.", most=2**32 - 1)
    shuffle_seed: int | None = _whole(
        None, "Seed of the order of rows alone.", most=2**32 - 1, unset="that of seed", solver="minibatch"
    )
    views: int | None = _whole(
        None, "Train on the first N views of each picture beside the plain one, where the cache has views. 0 for none.",
        unset="all that the cache has",
    )  # fmt: skip

    def __new__(cls, *arguments: object, **given: object) -> TrainSpec:
        """Remember which settings are given: whoever names one of minibatches wants them, also at its default."""
        for name in given:
            if name not in declared(TrainSpec):
                hint = did_you_mean(name, declared(TrainSpec))
                raise SpecError(f"there is no setting {name!r}{hint}: expected {', '.join(declared(TrainSpec))}")
        made = super().__new__(cls)
        object.__setattr__(made, "_given", (*[*cls.__dataclass_fields__][: len(arguments)], *given))
        return made

    @classmethod
    def of(cls, settings: TrainSpec | Mapping[str, object] | None) -> TrainSpec:
        """Return settings that may also be written as a mapping, ``{"epochs": 2}``; None for the defaults.

        Raises ``SpecError`` for what is none, naming the nearest.
        """
        if isinstance(settings, TrainSpec):
            return settings
        if settings is not None and not isinstance(settings, Mapping):
            raise SpecError(f"spec is {shortened(settings)}: expected a TrainSpec, or settings such as {{'epochs': 2}}")
        return cls(**dict(settings or {}))  # type: ignore[arg-type]  # __post_init__ checks

    def __post_init__(self) -> None:
        for name, setting in declared(TrainSpec).items():
            value = getattr(self, name)
            if not setting.allowed(value):
                raise SpecError(f"{name} is {shortened(value)}: expected {setting.expected}")
        given = self.__dict__.pop("_given", ())
        if "epochs" in given and "min_steps" not in given:
            object.__setattr__(self, "min_steps", 0)
        if "solver" not in given and (named := [name for name in given if name in MINIBATCH_SETTINGS]):
            if "l2" in given:
                raise SpecError(
                    f"l2 is a setting of the convex solver, and {named[0]} one of minibatches: "
                    "leave one of them out, or name the solver"
                )
            object.__setattr__(self, "solver", "minibatch")

    def solver_for(self, head: HeadSpec, *, in_memory: bool = True) -> Literal["minibatch", "convex"]:
        """Return which solver trains a torch head, of features that are ``in_memory`` or not.

        ``auto`` is ``convex`` for the head ``linear`` where every setting of minibatches is at its default.
        """
        if self.solver != "auto":
            return self.solver
        plain = all(getattr(self, name) == getattr(TrainSpec, name) for name in MINIBATCH_SETTINGS)
        return "convex" if plain and in_memory and (head.kind, head.engine) == ("linear", "torch") else "minibatch"

    def of_views(self, there: int) -> int:
        """Return how many of the views that are there are trained on. Raises ``SpecError`` for more."""
        if self.views is None:
            return there
        if self.views > there:
            raise SpecError(
                f"views is {self.views}: the features have {there}; make them by extract --views {self.views}"
            )
        return self.views

    @property
    def least_steps(self) -> int:
        """The least number of steps that training takes."""
        if self.min_steps is not None:
            return self.min_steps
        return MIN_STEPS if self.epochs == TrainSpec.epochs else 0

    def epochs_of(self, steps: int) -> int:
        """Return how many epochs of so many steps are trained: ``epochs``, or as many as make ``least_steps``."""
        return max(self.epochs, -(-self.least_steps // max(1, steps)))

    def record(self) -> dict[str, object]:
        """Return what a trained head keeps of its settings, as JSON values: those that its solver reads."""
        values = {setting.name: getattr(self, setting.name) for setting in fields(self)}
        if isinstance(self.class_weight, Mapping):
            values["class_weight"] = dict(self.class_weight)
        unread = (*(MINIBATCH_SETTINGS if self.solver == "convex" else ()), *(("views",) if self.views is None else ()))
        return {name: value for name, value in values.items() if name not in unread}

    @property
    def order_seed(self) -> int:
        """The seed of the batch order."""
        return self.seed if self.shuffle_seed is None else self.shuffle_seed


MAY_DIFFER = (
    "learning_rate", "weight_decay", "label_smoothing", "class_weight", "schedule", "warmup", "clip", "seed",
)  # fmt: skip
"""Settings in which the heads of one stack may differ."""

MINIBATCH_SETTINGS = tuple(name for name, setting in declared(TrainSpec).items() if setting.solver == "minibatch")
"""Settings that only training by minibatches reads."""


FINE_TUNING = TrainSpec(
    epochs=3, batch_size=16, learning_rate=1e-3, weight_decay=0.01, schedule="linear", warmup=0.1, clip=1.0, patience=0
)
"""How a whole model is tuned by default: batches of 16, 3 epochs, warm-up and linear decay (Devlin et al. 2019),
a tenth of the steps for warming up, Adam with its bias correction (Mosbach et al. 2021). ``learning_rate`` is the
head's."""
TUNING = replace(FINE_TUNING, weight_decay=0.1)
"""How the last blocks are trained by default: as a whole model is, with more weight decay, as they learn faster."""
TUNING_RATE = 6e-4
"""The learning rate of the last block; a few blocks bear more than a whole network."""
TUNING_DECAY = 0.9
"""What each block before the last has of the rate of the block behind it (Howard and Ruder 2018)."""
TUNING_DROPOUT = False
"""Whether the last blocks drop what their configuration says: in a few epochs it costs more than it gives."""
