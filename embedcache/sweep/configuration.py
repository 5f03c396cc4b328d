"""What a grid may hold: protocol, ranges of values, and one configuration with its hash."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, SupportsFloat

import numpy as np

from embedcache.errors import SpecError, SweepError, SweepSpecError
from embedcache.fingerprint import hash_json
from embedcache.spec import MINIBATCH_SETTINGS, HeadSpec, TrainSpec
from embedcache.wording import counted, shortened

# How heads are compared, and what a file or a call asks for.


MOST_DIVISIONS = 10_000
"""Each is kept as a mask over all rows."""


@dataclass(frozen=True)
class Protocol:
    """How heads are compared.

    ``folds`` is 1 for the cache's own validation split. With ``shots`` there are ``draws`` few-shot draws instead.
    ``stopping_share`` of a fold's training rows is held out where a head stops early, so that no head sees the rows
    that it is scored on.

    Three are for published tables. With ``to_test`` nothing is chosen: heads learn from the train split, or from draws
    of it, and are scored on the test split. ``held_out`` is the share of train that stands in for a validation split
    where the cache has none. Without ``refit`` the chosen head never learns from the rows that it was chosen by.
    """

    folds: int = 5
    repeats: int = 1
    shots: int | None = None
    draws: int = 10
    seed: int = 0
    stopping_share: float = 0.1
    alpha: float = 0.05
    to_test: bool = False
    held_out: float | None = None
    refit: bool = True

    def __post_init__(self) -> None:
        if self.shots is None and (self.folds < 1 or self.repeats < 1):
            raise SweepError(f"folds is {self.folds}, repeats {self.repeats}: expected at least 1 of each")
        times = self.folds * self.repeats if self.shots is None else self.draws
        if times > MOST_DIVISIONS:
            what = (
                f"{counted(self.folds, 'fold')}, {self.repeats} times,"
                if self.shots is None
                else counted(self.draws, "draw")
            )
            raise SweepError(f"{what} are too many: expected at most {MOST_DIVISIONS:,} divisions of the rows")
        if self.folds == 1 and self.repeats > 1 and self.shots is None:
            raise SweepError("repeats needs folds: the cache's own validation split cannot be drawn again")
        if not 0 <= self.seed < 2**32:
            raise SpecError(f"seed is {self.seed}: expected a whole number from 0")

    @property
    def kind(self) -> str:
        """``folds``, ``split``, ``shots``, or ``test`` where heads are scored on the test split."""
        if self.to_test:
            return "test"
        if self.shots is not None:
            return "shots"
        return "split" if self.folds == 1 else "folds"

    def to_json(self) -> dict[str, object]:
        """Return what of it decides the results."""
        body: dict[str, object] = {"kind": self.kind, "seed": self.seed, "stopping_share": self.stopping_share}
        if self.held_out is not None:
            body["held_out"] = self.held_out
        if not self.refit:
            body["refit"] = False
        if self.shots is not None:
            return {**body, "shots": self.shots, "draws": self.draws}
        return {**body, "folds": self.folds, "repeats": self.repeats}

    def text(self) -> str:
        """Return it as a sentence for people."""
        if self.to_test and self.shots is not None:
            return (
                f"{counted(self.draws, 'draw')} of {counted(self.shots, 'row')} a class from the train split, "
                f"as MTEB draws them (seed {self.seed}), each scored on the whole test split"
            )
        if self.to_test:
            return "trained on the train split, scored on the test split"
        if self.shots is not None:
            return (
                f"{counted(self.draws, 'draw')} of {counted(self.shots, 'row')} a class from train and "
                "validation, each scored on all rows that were not drawn"
            )
        if self.folds == 1 and self.held_out is not None:
            return (
                f"trained on the train split less {100 * self.held_out:g} % of its rows, drawn at random "
                f"(seed {self.seed}) and scored: the cache has no validation split"
            )
        if self.folds == 1:
            return "trained on the train split, scored on the validation split"
        times = f", {self.repeats} times" if self.repeats > 1 else ""
        rows = "stratified, equal contents in one fold"
        return f"{self.folds}-fold cross-validation{times} over train and validation, {rows}"


@dataclass(frozen=True)
class Asked:
    """What a sweep file or a call asks for; None where it leaves the default.

    ``random`` draws this many configurations; ``seed`` is that of folds, draws and the random search.
    """

    folds: int | None = None
    repeats: int | None = None
    shots: int | None = None
    draws: int | None = None
    metric: str | None = None
    learning_curve: bool | None = None
    random: int | None = None
    seed: int | None = None
    test_all: bool | None = None

    def over(self, file: Asked) -> Asked:
        """Return what is asked for here and, where that is nothing, what the file asks for."""
        return Asked(**{**file._given(), **self._given()})

    def protocol(self) -> Protocol:
        """Return the protocol. Raises ``SweepSpecError`` where two things contradict each other."""
        if self.shots is not None and (self.folds is not None or self.repeats is not None):
            raise SweepSpecError(
                "--shots and --folds contradict each other: few-shot draws are scored on all other rows"
            )
        if self.draws is not None and self.shots is None:
            raise SweepSpecError("--draws needs --shots: how many rows of each class a draw has")
        names = {field.name for field in fields(Protocol)}
        return Protocol(**{name: value for name, value in self._given().items() if name in names})

    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


def asked_in_file(values: dict[str, object]) -> Asked:
    """Return what a sweep file asks for. Raises ``SweepSpecError`` for a value of another type."""
    for name, value in values.items():
        expected = str if name == "metric" else (bool if name in ("learning_curve", "test_all") else int)
        if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
            kind = {str: "a name", bool: "true or false", int: "a whole number"}[expected]
            raise SweepSpecError(f"{name} is {value!r}: expected {kind}")
    return Asked(**values)  # type: ignore[arg-type]


NOTHING_ASKED = Asked()
ASKED = tuple(field.name for field in fields(Asked))


# What a setting of a grid may be: one value, a list of values, or a range; counted and drawn without listing all.


@dataclass(frozen=True)
class Choices:
    """Values of one setting. ``span`` is (low, high, logarithmic) where it was given as a range, to draw from."""

    values: tuple[object, ...]
    span: tuple[float, float, bool] | None = None

    def draw(self, generator: np.random.Generator) -> object:
        """Return one value at random: of the range where there is one, else of the list."""
        if self.span is None:
            return self.values[int(generator.integers(len(self.values)))]
        low, high, logarithmic = self.span
        drawn = generator.uniform(math.log(low), math.log(high)) if logarithmic else generator.uniform(low, high)
        # Three digits are enough for a search, and keep labels and files readable.
        return float(f"{math.exp(drawn) if logarithmic else drawn:.3g}")


def choices(where: str, value: object) -> Choices:
    """Read a setting: a list is a choice of values, ``{log: [low, high], steps: n}`` and ``{linear: ...}`` are ranges.

    Raises ``SweepSpecError`` for a range that is not one.
    """
    if isinstance(value, (list, tuple)):
        if not value:
            raise SweepSpecError(f"{where} is an empty list: give it a value or leave it out")
        return Choices(tuple(tuple(choice) if isinstance(choice, list) else choice for choice in value))
    if isinstance(value, Mapping) and ("log" in value or "linear" in value):
        return _range(where, value)
    return Choices((value,))


def _range(where: str, value: Mapping[str, object]) -> Choices:
    expected = (
        f"{where}: expected {{log: [low, high], steps: n}} or {{linear: [low, high], steps: n}}, got {dict(value)}"
    )
    logarithmic = "log" in value
    ends, steps = value["log" if logarithmic else "linear"], value.get("steps", 5)
    if set(value) - {"log", "linear", "steps"} or len({"log", "linear"} & set(value)) != 1:
        raise SweepSpecError(expected)
    if not isinstance(ends, (list, tuple)) or len(ends) != 2 or isinstance(steps, bool) or not isinstance(steps, int):
        raise SweepSpecError(expected)
    low, high = (number(where, end) for end in ends)
    if not low < high or steps < 2 or (logarithmic and low <= 0):
        raise SweepSpecError(f"{expected}: low must be below high, above 0 for log, and steps at least 2")
    if steps > 1_000_000:
        raise SweepSpecError(f"{where}: {counted(steps, 'step')}: expected at most 1,000,000")
    values = np.geomspace(low, high, steps) if logarithmic else np.linspace(low, high, steps)
    return Choices(tuple(float(f"{step:.6g}") for step in values), (low, high, logarithmic))


def number(where: str, value: object) -> float:
    """Return a number. YAML 1.1 reads 1e-3 as a string, which everybody means as a number."""
    try:
        if isinstance(value, bool) or not isinstance(value, (str, SupportsFloat)):
            raise ValueError
        if math.isfinite(result := float(value)):
            return result
        raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise SweepSpecError(f"{where} is {shortened(value)}: expected a number") from None


SEEDED = frozenset({"mlp", "hist-gradient-boosting", "random-projection"})
"""Heads of scikit-learn whose result a seed changes."""

_CONVEX = ("solver", "l2", "class_weight", "standardize", "views")
_MINIBATCH = (
    "solver",
    *(name for name in MINIBATCH_SETTINGS if name != "momentum"),
    "class_weight",
    "standardize",
    "views",
)
_PENALIZED = frozenset({"linear", "logistic-regression", "linear-svm", "ridge", "random-projection"})
_SHORT = {
    "learning_rate": "lr",
    "weight_decay": "wd",
    "label_smoothing": "smoothing",
    "batch_size": "batch",
    "input_noise": "noise",
}
_ADDED: Mapping[str, object] = {"min_steps": 0, "input_noise": 0, "input_dropout": 0, "views": None}
"""Settings that are younger than kept sweeps, and at which value they change nothing."""
DEFAULTS = TrainSpec()
TRAIN_FIELDS = tuple(setting.name for setting in fields(TrainSpec))


def fields_read(head: HeadSpec, solver: str, optimizer: str = "adamw") -> tuple[str, ...]:
    """Return the settings of ``TrainSpec`` that a head reads, the seed left out."""
    if head.engine == "sklearn":
        from embedcache.heads.sklearn_kinds import KINDS

        kind = KINDS[head.kind]
        asked = (kind.weights is not False, kind.scaled, head.kind in _PENALIZED)
        reads = tuple(name for name, read in zip(("class_weight", "standardize", "l2"), asked, strict=True) if read)
        return (*reads, "views")
    if solver == "convex":
        return _CONVEX
    return _MINIBATCH + (("momentum",) if optimizer == "sgd" else ())


@dataclass(frozen=True, eq=False)
class Configuration:
    """A feature set by name, a head, and how to train it; ``train.seed`` is its seed.

    Settings that the head does not read are reset to their defaults, so that two ways to write the same configuration
    are equal.
    """

    feature: str
    head: HeadSpec
    train: TrainSpec

    def __post_init__(self) -> None:
        if self.head.engine == "torch":
            object.__setattr__(self, "train", replace(self.train, solver=self.train.solver_for(self.head)))
        read = {*fields_read(self.head, self.train.solver, self.train.optimizer)}
        if self.seeded:
            read.add("seed")
        idle = {name: getattr(DEFAULTS, name) for name in TRAIN_FIELDS if name not in read}
        if "shuffle_seed" in read and self.train.shuffle_seed is None:
            # One order of batches for all seeds: heads that differ in their seed can share a pass.
            idle["shuffle_seed"] = 0
        object.__setattr__(self, "train", replace(self.train, **idle))
        options = _plain(self.head.options)
        if (self.head.engine, self.head.kind) == ("sklearn", "knn") and options.get("weights") != "softmax":
            options.pop("temperature", None)  # of a grid whose other weights read it
        object.__setattr__(self, "head", replace(self.head, options=options))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Configuration) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def seeded(self) -> bool:
        """Whether another seed gives another head."""
        if self.head.engine == "sklearn":
            return self.head.kind in SEEDED
        return self.train.solver != "convex"

    @cached_property
    def settings(self) -> dict[str, object]:
        """The settings of training that it reads, without the seed."""
        every = asdict(self.train)
        read = fields_read(self.head, self.train.solver, self.train.optimizer)
        # Configurations from before a setting existed keep their hash: where it changes nothing, it is not recorded.
        # Written epochs imply min_steps 0.
        idle = {name for name, nothing in _ADDED.items() if every[name] == nothing}
        return {name: every[name] for name in read if name not in idle}

    def to_json(self, *, seed: bool = True) -> dict[str, object]:
        """Return it as JSON values."""
        train = self.train_json if seed else self.settings
        return {"feature": self.feature, "head": self.head_json, "train": train}

    @property
    def train_json(self) -> dict[str, object]:
        """The settings of training that it reads, and the seed."""
        return {**self.settings, "seed": self.train.seed}

    @property
    def head_json(self) -> dict[str, object]:
        """The head as JSON values."""
        return {"kind": self.head.kind, "engine": self.head.engine, "options": dict(self.head.options)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Configuration:
        """Undo ``to_json``."""
        return cls(value["feature"], HeadSpec(**value["head"]), TrainSpec(**value["train"]))

    @cached_property
    def id(self) -> str:
        """16 hex digits of the sha256 of its canonical JSON."""
        return hash_json(self.to_json())[:16]

    @cached_property
    def candidate(self) -> str:
        """The same without the seed: repetitions of one candidate."""
        return hash_json(self.to_json(seed=False))[:16]

    @cached_property
    def label(self) -> str:
        """One line for people: the head, the settings that are not at their defaults, the feature set."""
        parts = [self.head.kind if self.head.engine == "torch" else f"sklearn:{self.head.kind}"]
        if self.train.solver == "convex" and self.head.engine == "torch":
            parts = [f"{self.head.kind} l2={_text(self.train.l2)}"]
        parts += [f"{name}={_text(value)}" for name, value in self.head.options.items()]
        for name, value in self.settings.items():
            shown = name in ("learning_rate", "weight_decay") or value != getattr(DEFAULTS, name)
            if shown and name not in ("solver", "shuffle_seed") and not (name == "l2" and self.head.engine == "torch"):
                parts.append(f"{_SHORT.get(name, name)}={_text(value)}")
        return f"{' '.join(parts)} · {self.feature}"

    def flat(self) -> dict[str, object]:
        """Return head, options and settings in one level, for tables and plots."""
        return {"head": self.head.kind, "engine": self.head.engine, **self.head.options, **self.settings}


def _plain(options: Mapping[str, object]) -> dict[str, object]:
    """Return options as JSON would give them back; one hidden width is a list of one."""
    out = {}
    for name in sorted(options):
        value = options[name]
        if name == "hidden" and isinstance(value, int) and not isinstance(value, bool):
            value = [value]
        out[name] = list(value) if isinstance(value, tuple) else value
    return out


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, (list, tuple)):
        return "x".join(map(str, value))
    if isinstance(value, Mapping):
        return ",".join(f"{name}:{_text(item)}" for name, item in value.items())
    return str(value)
