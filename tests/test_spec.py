"""One set of defaults, ranges and help texts, whichever way a setting is given."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from dataclasses import asdict, replace
from typing import Any

import click
import pytest

import embedcache as ec
from embedcache import HeadClassifier, HeadRegressor, HeadSpec, TrainSpec
from embedcache.cli import cli
from embedcache.errors import SpecError
from embedcache.heads import kinds
from embedcache.spec import MINIBATCH_SETTINGS, TUNING, declared

SETTINGS = declared(TrainSpec)
HEAD = {"kind": "kind", "engine": "engine", "head_options": "options"}
ANOTHER_THING = {
    ("sweep", "metric"): "heads are compared by it, whatever they are trained by",
    ("sweep", "seed"): "of folds and draws; --seeds are those of heads",
    ("audit", "seed"): "of folds and of UMAP",
    ("compare", "metric"): "approaches are compared by it",
    ("extract", "views"): "how many are made; train's are how many of them are read",
}
OWN_DEFAULT = {
    ("compare", "epochs"): 5, ("check", "kind"): None,
    **{
        ("tune", name): getattr(TUNING, name)
        for name in ("epochs", "batch_size", "learning_rate", "weight_decay", "warmup", "patience")
    },
}  # fmt: skip
UNIQUE = {"shuffle_seed", "seed", "views"}
"""What an estimator has as ``random_state``, scikit-learn's name, and what it has not: its features have no views."""


def options() -> list[tuple[str, click.Option]]:
    commands = cli.commands.items()
    return [(name, each) for name, command in commands for each in command.params if isinstance(each, click.Option)]


def words(text: str) -> str:
    return re.sub(r"\s+", " ", text)


TABLE = [
    (name, option) for name, option in options()
    if option.name in SETTINGS and (name, option.name) not in ANOTHER_THING
]  # fmt: skip


@pytest.mark.parametrize(("command", "option"), TABLE, ids=[f"{name}-{option.name}" for name, option in TABLE])
def test_an_option_has_the_default_range_and_help_of_its_setting(command: str, option: click.Option) -> None:
    assert option.name is not None
    assert option.help is not None
    setting, default = SETTINGS[option.name], getattr(TrainSpec(), option.name)
    shown = OWN_DEFAULT.get((command, option.name), default)
    assert option.default in (None, shown), "None leaves it to TrainSpec"
    bracket = setting.described(shown).removeprefix(setting.help)
    assert option.help.startswith(setting.help)
    assert option.help.endswith(bracket)
    assert tuple(getattr(option.type, "choices", ())) == setting.choices


def test_every_setting_is_an_option_of_train() -> None:
    assert {option.name for name, option in TABLE if name == "train"} == set(SETTINGS)


def test_commands_that_take_a_head_say_the_same_of_it() -> None:
    about, torch = declared(HeadSpec), ", ".join(kinds("torch"))
    said = [(name, option) for name, option in options() if option.name in HEAD]
    assert {name for name, _ in said} == {"train", "tune", "check", "compare"}
    for name, option in said:
        setting = about[HEAD[str(option.name)]]
        first = re.split(r"[;.]", setting.help)[0]
        assert str(option.help).startswith(first), f"{name} {option.name}"
        if option.name == "kind":
            assert option.default == OWN_DEFAULT.get((name, "kind"), HeadSpec().kind)
            assert torch in str(option.help)
    assert all(kind in about["kind"].help for engine in ("torch", "sklearn") for kind in kinds(engine))


@pytest.mark.parametrize("estimator", [HeadClassifier, HeadRegressor])
def test_an_estimator_has_the_defaults_ranges_and_help_of_the_settings(estimator: Any) -> None:
    parameters = inspect.signature(estimator).parameters
    assert parameters["head"].default == HeadSpec().kind
    for name, given in (("kind", "head"), ("engine", "engine")):
        assert words(f"{given}: {declared(HeadSpec)[name].described(getattr(HeadSpec(), name))}") in words(
            estimator.__doc__
        )
    assert f"options: {declared(HeadSpec)['options'].help}" in words(estimator.__doc__)
    only_classes = {"label_smoothing", "class_weight"} if estimator is HeadRegressor else set()
    assert set(SETTINGS) - set(parameters) == UNIQUE | only_classes
    for name in set(SETTINGS) & set(parameters):
        assert parameters[name].default == getattr(TrainSpec(), name), name
        assert words(f"{name}: {SETTINGS[name].described(parameters[name].default)}") in words(estimator.__doc__)


OUTSIDE: dict[str, tuple[Any, ...]] = {
    "solver": ("newton", None), "epochs": (0, 2.5, True, "3"), "min_steps": (-1, 0.5), "batch_size": (0, 1.5),
    "optimizer": ("adam", 1),
    "learning_rate": (0, -1, float("nan"), float("inf"), "fast"), "weight_decay": (-0.1, None), "momentum": (1, -0.1),
    "schedule": ("step",), "warmup": (1, -0.1), "clip": (-1, None), "patience": (-1, 0.5), "metric": (3,),
    "input_noise": (-0.1, None), "input_dropout": (1, -0.1),
    "label_smoothing": (1, -0.1), "class_weight": ("even", 3), "standardize": (None, "yes", 1), "l2": (-1, None),
    "seed": (-1, 2**32, 0.5, None), "shuffle_seed": (-1, 2**32, "0"), "views": (-1, 0.5),
}  # fmt: skip


def test_values_outside_the_range_are_refused_and_the_range_is_said() -> None:
    assert set(OUTSIDE) == set(SETTINGS)
    for name, values in OUTSIDE.items():
        for value in values:
            with pytest.raises(SpecError, match=rf"{name} is .*: expected {re.escape(SETTINGS[name].expected)}"):
                TrainSpec(**{name: value})


def test_naming_a_setting_of_minibatches_asks_for_them() -> None:
    linear, mlp, theirs = HeadSpec(), HeadSpec("mlp"), HeadSpec("linear", "sklearn")
    assert [TrainSpec().solver_for(head) for head in (linear, mlp, theirs)] == ["convex", "minibatch", "minibatch"]
    assert TrainSpec().solver_for(linear, in_memory=False) == "minibatch"
    assert TrainSpec(l2=3, seed=5, standardize=False, class_weight="balanced").solver_for(linear) == "convex"
    for name in MINIBATCH_SETTINGS:
        named = TrainSpec(**{name: getattr(TrainSpec(), name)})
        assert (named.solver, replace(named, seed=3).solver) == ("minibatch", "minibatch"), name
        assert TrainSpec(**{name: getattr(TrainSpec(), name), "solver": "convex"}).solver_for(linear) == "convex"
        with pytest.raises(SpecError, match=f"l2 is a setting of the convex solver, and {name} one of minibatches"):
            TrainSpec(**{name: getattr(TrainSpec(), name)}, l2=2)
    assert TrainSpec("convex").solver == "convex", "by position"


def test_a_spec_is_a_value() -> None:
    """Copies, changed or not, keep what they were asked for; what older versions wrote is what it was."""
    spec = TrainSpec()
    for same in (replace(spec), copy.deepcopy(spec), pickle.loads(pickle.dumps(spec)), TrainSpec(**asdict(spec))):
        assert (same, same.solver, vars(same).keys() - {"_given"}) == (spec, "auto", vars(spec).keys())
    assert replace(spec, seed=3).solver == "auto"
    assert replace(spec, epochs=3).solver_for(HeadSpec()) == "minibatch"
    written = {"epochs": 30, "batch_size": 64, "optimizer": "adamw", "l2": 1.0, "standardize": True}
    assert TrainSpec(**written, solver="minibatch").solver_for(HeadSpec()) == "minibatch"
    assert set(TrainSpec(solver="convex").record()) == set(SETTINGS) - {*MINIBATCH_SETTINGS, "views"}


def test_whoever_names_epochs_gets_just_those() -> None:
    """Otherwise there is a least number of steps; what was written before there was one is what it was."""
    assert [TrainSpec().epochs_of(steps) for steps in (1, 6, 10, 11, 5000)] == [300, 50, 30, 30, 30]
    assert TrainSpec(min_steps=7, epochs=2).epochs_of(2) == 4
    assert TrainSpec(min_steps=0).epochs_of(1) == 30
    for named in (TrainSpec(epochs=30), TrainSpec(epochs=30, batch_size=9), replace(TrainSpec(epochs=30), seed=2)):
        assert (named.epochs_of(1), named.min_steps) == (30, 0)
    assert replace(TrainSpec(), epochs=5).epochs_of(1) == 5
    assert TrainSpec(**asdict(TrainSpec())).epochs_of(6) == 50


WRITTEN_OTHERWISE = {("compare", "approaches"), ("compare", "fractions"), ("compare", "seeds")}
"""A list with commas, and how many seeds instead of which."""

FUNCTIONS: list[tuple[str, Any]] = [
    ("train", ec.train_on_cache), ("evaluate", ec.evaluate_on_cache), ("check", ec.check_equivalence),
    ("sweep", ec.sweep), ("compare", ec.compare_training_approaches), ("extract", ec.extract),
    ("extract", ec.FeatureExtractor),
]  # fmt: skip


@pytest.mark.parametrize(("command", "function"), FUNCTIONS, ids=lambda each: getattr(each, "__name__", each))
def test_a_command_has_the_defaults_of_the_function_that_it_calls(command: str, function: Any) -> None:
    parameters = inspect.signature(function).parameters
    shared = [option for name, option in options() if name == command and option.name in parameters]
    assert shared
    for option in shared:
        if isinstance(option.default, (str, float, int)) and (command, option.name) not in WRITTEN_OTHERWISE:
            assert option.default == parameters[str(option.name)].default, f"{command} --{option.name}"
