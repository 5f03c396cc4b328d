"""One configuration: a feature set, a head, how to train it, a seed; and its hash, by which results are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from embedcache.fingerprint import hash_json
from embedcache.spec import MINIBATCH_SETTINGS, HeadSpec, TrainSpec

SEEDED = frozenset({"mlp", "hist-gradient-boosting", "random-projection"})
"""Heads of scikit-learn whose result a seed changes."""

_CONVEX = ("solver", "l2", "class_weight", "standardize")
_MINIBATCH = ("solver", *(name for name in MINIBATCH_SETTINGS if name != "momentum"), "class_weight", "standardize")
_PENALIZED = frozenset({"linear", "logistic-regression", "linear-svm", "ridge", "random-projection"})
_SHORT = {"learning_rate": "lr", "weight_decay": "wd", "label_smoothing": "smoothing", "batch_size": "batch"}
DEFAULTS = TrainSpec()
TRAIN_FIELDS = tuple(setting.name for setting in fields(TrainSpec))


def fields_read(head: HeadSpec, solver: str, optimizer: str = "adamw") -> tuple[str, ...]:
    """Return the settings of ``TrainSpec`` that a head reads, the seed left out."""
    if head.engine == "sklearn":
        from embedcache.heads.sklearn_kinds import KINDS

        kind = KINDS[head.kind]
        asked = (kind.weights is not False, kind.scaled, head.kind in _PENALIZED)
        return tuple(name for name, there in zip(("class_weight", "standardize", "l2"), asked, strict=True) if there)
    if solver == "convex":
        return _CONVEX
    return _MINIBATCH + (("momentum",) if optimizer == "sgd" else ())


@dataclass(frozen=True, eq=False)
class Configuration:
    """A feature set by name, a head, and how to train it; ``train.seed`` is its seed.

    What the head does not read is put back to its default, so that two ways of writing one thing are one thing.
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
        object.__setattr__(self, "head", replace(self.head, options=_plain(self.head.options)))

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
        whole = asdict(self.train)
        read = fields_read(self.head, self.train.solver, self.train.optimizer)
        # Stated epochs have no least number of steps, and no need to say so: what stated them before it was there is
        # the same configuration as ever.
        idle = {"min_steps"} if self.train.min_steps == 0 else set()
        return {name: whole[name] for name in read if name not in idle}

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
        return ",".join(f"{name}:{_text(held)}" for name, held in value.items())
    return str(value)
