"""Grids: what a user may write, what it comes to, and what is refused in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.errors import InputNotFoundError, SpecError, SweepError
from embedcache.shard import FeatureSet
from embedcache.spec import HeadSpec, TrainSpec
from embedcache.sweep.configuration import Asked, Configuration, choices
from embedcache.sweep.grid import parse, read_file

SETS = {
    each.name: each
    for each in (
        FeatureSet("mean", "pooled", 7, 1, "float32"),
        FeatureSet("cls@-2", "pooled", 7, 1, "float32"),
        FeatureSet("tokens", "tokens", 7, 1, "float32"),
    )
}


def labels(value: Any, **options: Any) -> list[str]:
    return [each.label for each in parse(value, SETS, **options).configurations()]


def test_a_grid_is_every_combination_in_a_fixed_order() -> None:
    value = {
        "features": ["mean", "cls@-2"],
        "seeds": [0, 1],
        "heads": [{"head": "linear", "learning_rate": [0.001, 0.01], "weight_decay": [0, 0.1]}],
    }
    found = parse(value, SETS)
    assert len(found) == 2 * 2 * 2 * 2
    made = found.configurations()
    assert len({each.id for each in made}) == 16
    assert len({each.candidate for each in made}) == 8
    assert [each.id for each in made] == [each.id for each in parse(value, SETS).configurations()]


def test_the_same_thing_written_twice_is_one_configuration() -> None:
    value = [
        {"head": "mlp", "hidden": 256, "features": "mean"},
        {"head": "mlp", "hidden": [[256]], "learning_rate": TrainSpec().learning_rate, "features": "mean"},
        {"head": "linear", "solver": "convex", "l2": 1, "seeds": [0, 1, 2], "features": "mean"},
        {"head": "linear", "solver": "convex", "l2": [1.0], "features": "mean"},
    ]
    assert len(parse(value, SETS).configurations()) == 2


def test_linear_is_the_optimum_unless_a_setting_of_minibatches_is_named() -> None:
    """What a grid states it keeps: its configurations have the names under which old sweeps hold their results."""
    entries: list[tuple[Any, str]] = [
        ("linear", "convex"), ({"head": "linear", "l2": 2}, "convex"), ({"head": "linear", "solver": "auto"}, "convex"),
        ({"head": "linear", "class_weight": "balanced"}, "convex"), (HeadSpec(), "convex"),
        ((HeadSpec(), TrainSpec()), "convex"), ((HeadSpec(), TrainSpec(epochs=30)), "minibatch"),
        ({"head": "linear", "epochs": 30}, "minibatch"), ({"head": "linear", "learning_rate": 0.003}, "minibatch"),
        ({"head": "linear", "solver": "minibatch"}, "minibatch"), ({"head": "mlp", "epochs": 3}, "minibatch"),
    ]  # fmt: skip
    for entry, solver in entries:
        (one,) = parse([entry], {"mean": SETS["mean"]}).configurations()
        assert one.train.solver == solver, entry
        assert Configuration.from_json(one.to_json()) == one
    assert Configuration("mean", HeadSpec(), TrainSpec()).train.solver == "convex"
    old = parse([{"head": "linear", "learning_rate": 0.01, "epochs": 7}], {"mean": SETS["mean"]}).configurations()
    assert [each.id for each in old] == ["2ff054e47dfeabd4"]
    assert not {"min_steps", "input_noise", "input_dropout"} & {*old[0].settings}
    assert old[0].label == "linear epochs=7 lr=0.01 wd=0.01 · mean"


def test_a_temperature_makes_no_difference_to_votes_that_do_not_read_it() -> None:
    grid = [{"head": "knn", "weights": ["uniform", "softmax"], "temperature": [0.05, 0.07], "features": "mean"}]
    assert sorted(configuration.label for configuration in parse(grid, SETS).configurations()) == [
        "sklearn:knn temperature=0.05 weights=softmax · mean",
        "sklearn:knn temperature=0.07 weights=softmax · mean",
        "sklearn:knn weights=uniform · mean",
    ]


def test_hidden_is_a_choice_of_widths_or_of_lists_of_them() -> None:
    made = parse([{"head": "mlp", "hidden": [16, [32, 8]], "features": "mean"}], SETS).configurations()
    assert [each.head.options["hidden"] for each in made] == [[16], [32, 8]]


def test_a_configuration_survives_json_and_keeps_its_hash() -> None:
    made = parse(["mlp", {"head": "knn", "n_neighbors": [3]}], SETS, features=["mean"]).configurations()
    for each in made:
        again = Configuration.from_json(each.to_json())
        assert again == each
        assert again.id == each.id
    # Pinned: a change of this hash would make every kept sweep start anew.
    assert Configuration("mean", HeadSpec("linear"), TrainSpec("convex", l2=2.0)).id == "5fd93689ca4169fc"


def test_python_values_are_as_good_as_a_file() -> None:
    spec = HeadSpec("mlp", options={"hidden": [8]})
    assert labels(["linear"], features=["mean"]) == labels({"heads": [{"head": "linear"}], "features": "mean"})
    assert "hidden=8" in labels([spec], features=["mean"])[0]
    assert "lr=0.5" in labels([(spec, TrainSpec(learning_rate=0.5))], features=["mean"])[0]
    given_one = Configuration("mean", spec, TrainSpec(seed=5))
    assert parse([given_one], SETS).configurations() == [given_one]


def test_the_default_has_a_baseline_and_takes_heads_to_the_sets_they_read() -> None:
    made = parse(None, SETS).configurations()
    kinds = {each.head.kind for each in made}
    assert kinds == {"majority", "linear", "mlp", "residual", "knn", "attention-pooling"}
    assert {each.feature for each in made if each.head.kind == "attention-pooling"} == {"tokens"}
    layers = {"mean@all": FeatureSet("mean@all", "layers", 8, 3, "float32")}
    assert {each.head.kind for each in parse(None, layers).configurations()} == {"attention-pooling", "layer-mix"}
    assert len([each for each in made if each.train.solver == "convex" and each.feature == "cls@-2"]) == 16
    assert all(SETS[each.feature].kind == "pooled" for each in made if each.head.kind != "attention-pooling")


def test_hidden_states_for_tune_are_read_where_they_are_named() -> None:
    kept = {name: FeatureSet(name, "tokens", 7, 1, "float32") for name in ("states@-3", "l2:states@-2")}
    vector = FeatureSet("states@1", "pooled", 7, 1, "float32")  # imported under such a name, with one vector a row
    sets: dict[str, FeatureSet] = {**kept, **SETS, vector.name: vector}

    def read(value: Any, **options: Any) -> set[str]:
        return {each.feature for each in parse(value, sets, **options).configurations()}

    assert read(None) == {*SETS, "states@1"}
    assert read(["attention", "linear"]) == {*SETS, "states@1"}
    assert read(None, features=["states@-3"]) == {"states@-3"}
    assert read({"heads": ["attention"], "features": ["states@-3", "tokens"]}) == {"states@-3", "tokens"}
    assert read([{"head": "attention", "features": "l2:states@-2"}]) == {"l2:states@-2"}
    assert {each.feature for each in parse(None, kept).configurations()} == {*kept}, "there is nothing else"
    with pytest.raises(SweepError, match="that: name states@-3 or l2:states@-2 by --feature to have it read that"):
        parse(["attention"], {**kept, "mean": SETS["mean"]})


@given(st.integers(1, 30), st.integers(0, 5))
def test_a_random_search_draws_that_many_different_ones_the_same_each_time(count: int, seed: int) -> None:
    value = [{"head": "linear", "learning_rate": {"log": [1e-4, 1e-1]}, "seeds": [0, 1], "features": "mean"}]
    made = parse(value, SETS).configurations(count, seed)
    assert len(made) == 2 * count
    assert made == parse(value, SETS).configurations(count, seed)
    assert all(1e-4 <= each.train.learning_rate <= 1e-1 for each in made)


def test_a_random_search_of_a_small_grid_stops_at_all_of_it() -> None:
    assert (
        len(parse([{"head": "linear", "learning_rate": [0.1, 0.2]}], SETS, features=["mean"]).configurations(50)) == 2
    )


def test_a_million_are_counted_without_being_made() -> None:
    value = [{"head": "linear", "learning_rate": {"log": [1e-5, 1], "steps": 1000}, "weight_decay":
              {"linear": [0, 1], "steps": 1000}, "features": "mean"}]  # fmt: skip
    found = parse(value, SETS)
    assert len(found) == 1_000_000
    assert len(found.configurations(3)) == 3
    with pytest.raises(SweepError, match=r"3,000,000,000 configurations are too many: .*--random"):
        parse([{**value[0], "clip": {"linear": [0, 1], "steps": 3000}}], SETS).configurations()


def test_ranges() -> None:
    assert choices("x", {"log": [0.01, 100], "steps": 5}).values == (0.01, 0.1, 1.0, 10.0, 100.0)
    assert choices("x", {"linear": [0, 1], "steps": 3}).values == (0.0, 0.5, 1.0)
    assert choices("x", {"log": ["1e-3", "1e-1"], "steps": 2}).values == (0.001, 0.1)
    for wrong in ({"log": [0, 1]}, {"log": [1]}, {"linear": [1, 0]}, {"log": [1, 2], "step": 3}, {"log": ["a", 2]}):
        with pytest.raises(SweepError):
            choices("x", wrong)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"heads": []}, "no configurations"),
        ([], "no configurations"),
        ({"head": []}, r"does not know 'head' \(did you mean heads\?\)"),
        (["linaer"], r"no head 'linaer' \(did you mean linear\?\)"),
        ([{"head": "linear", "lerning_rate": 1}], r"does not know 'lerning_rate' \(did you mean learning_rate\?\)"),
        ([{"head": "mlp", "hiden": 8}], r"does not know 'hiden' \(did you mean hidden\?\)"),
        ([{"head": "linear", "features": "maen"}], r"no feature set 'maen' \(did you mean mean\?\)"),
        ([{"head": "linear", "features": "tokens"}], "linear reads one vector a row, and none of tokens"),
        ([{"head": "attention", "features": "mean"}], "attention reads one vector a token or several"),
        ([{"head": "linear", "l2": 1, "epochs": 3}], r"does not read l2 \(l2 goes with the head linear and no setting"),
        ([{"head": "linear", "momentum": 0.5}], r"momentum goes with optimizer: sgd"),
        ([{"head": "linear", "solver": "convex", "learning_rate": 1}], "does not read learning_rate: it reads"),
        ([{"head": "mlp", "solver": "convex"}], "convex solver trains the torch head linear, not mlp"),
        ([{"head": "ridge", "epochs": 3}], "ridge of scikit-learn does not read epochs"),
        ([{"head": "mlp", "engine": "skleran"}], "engine 'skleran' has no head"),
        ([{"head": "linear", "learning_rate": -1}], "learning_rate is -1"),
        ([{"head": "linear", "learning_rate": "fast"}], "learning_rate is 'fast': expected a number"),
        ([{"head": "linear", "epochs": 2.5}], "expected whole numbers"),
        ([{"head": "linear", "learning_rate": []}], "is an empty list"),
        ([{"head": "linear", "seed": 3}], r"write seeds: \[3\]"),
        ([{"learning_rate": 1}], "names no head"),
        ([7], "expected the name of a head"),
        ([{"head": "knn", "temperature": 0.1}], "knn reads a temperature with weights: softmax"),
        ({"seeds": [-1]}, "seeds holds -1"),
        ({"folds": "five"}, "folds is 'five': expected a whole number"),
    ],
)
def test_mistakes_are_named(value: Any, message: str) -> None:
    with pytest.raises((SweepError, SpecError), match=message) as caught:
        parse(value, SETS).configurations()
    assert "\n" not in str(caught.value)


def test_a_file_is_strict_yaml(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("heads:\n- {head: linear, learning_rate: [1e-3, 0.01]}\nfolds: 3\nfeatures: mean\n")
    found = parse(read_file(file), SETS)
    assert found.asked == Asked(folds=3)
    assert [each.train.learning_rate for each in found.configurations()] == [0.001, 0.01]
    for text, message in [
        ("folds: 3\nseed: 1\nfolds: 4\n", "line 3: the key 'folds' stands twice"),
        ("heads:\n- {head: linear, epochs: 1, epochs: 2}\n", "'epochs' stands twice"),
        ("heads: [linear\n", "is not YAML"),
        ("heads: !!python/object/apply:os.system [true]\n", "is not YAML"),
        ("- linear\n", "holds no settings"),
        ("", "holds no settings"),
        ("x: " + "y" * (1 << 20), "at most 1 MB"),
    ]:
        file.write_text(text)
        with pytest.raises(SweepError, match=message):
            read_file(file)
    with pytest.raises(InputNotFoundError, match="does not exist"):
        read_file(tmp_path / "none.yaml")


def test_the_documented_file_is_read() -> None:
    import yaml

    from embedcache.sweep import grid

    text = (grid.__doc__ or "").partition("::\n\n")[2]
    found = parse(yaml.safe_load(text), SETS)
    assert found.asked == Asked(folds=5)
    assert len(found) == 1 + 2 * 4 * 3 + 2 * 16 + 4 * 3 + 2 * 2 + 2 * 8 * 2
