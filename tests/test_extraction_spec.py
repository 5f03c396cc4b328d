"""What was asked of which model: kept as the manifest has it, read as settings, compared field by field."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.backbone import load_backbone
from embedcache.errors import SpecError
from embedcache.fingerprint import canonical_json, differences
from embedcache.spec import BackboneSettings, ExtractionSpec, FeatureSpec, ModelSource, differences_text

MANIFESTS = sorted((Path(__file__).parent / "archives").glob("v*/*/manifest.json"))
TEXT: dict[str, Any] = {
    "backbone": {"architecture": "BertModel", "weights": {"model.safetensors": "a" * 64}},
    "preprocessing": {
        "kind": "text", "files": {}, "max_length": 61, "truncation_side": "left", "prompt": "query: ",
        "lower_case": False,
    },
    "features": {"mean": FeatureSpec("mean").to_json(), "cls@-2": FeatureSpec("cls", (-2,)).to_json()},
    "compute_dtype": "bfloat16", "storage_dtype": "float16", "attention": "eager", "execution": "compiled",
    "shapes": {"positions": 127, "step": 4, "max_length": 61, "spare": 0, "threads": 1},
}  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-7, 7) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=7,
)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.parent.name)
def test_a_manifest_s_spec_is_written_as_it_was_read(path: Path) -> None:
    spec = json.loads(path.read_text())["spec"]
    assert canonical_json(ExtractionSpec(spec)) == canonical_json(spec)


@given(body=st.dictionaries(st.sampled_from([*TEXT, "anything"]), JSON))
def test_any_object_is_kept_and_read_without_fault(body: dict[str, Any]) -> None:
    spec = ExtractionSpec(body)
    assert canonical_json(spec) == canonical_json(body)
    assert spec.differences(spec) == spec.differences_for("mean", spec) == []
    spec.only(["mean"])
    assert spec.settings is None or spec.has_backbone


def test_the_settings_of_a_spec() -> None:
    spec = ExtractionSpec(TEXT)
    assert spec.has_backbone
    assert spec.settings == BackboneSettings(
        ("mean", "cls@-2"), 61, "left", "query: ", "bfloat16", "float16", "eager", True, TEXT["shapes"], content="text"
    )
    assert not ExtractionSpec({"backbone": {"architecture": "Fake"}}).has_backbone
    images = {**TEXT, "preprocessing": {"kind": "image", "decoding": 1, "resize": "pad"}}
    assert ExtractionSpec(images).settings == BackboneSettings(
        ("mean", "cls@-2"), None, None, None, "bfloat16", "float16", "eager", True, TEXT["shapes"], content="image",
        resize="pad",
    )  # fmt: skip
    sounds = {**TEXT, "preprocessing": {"kind": "sound", "rate": 16000}}
    assert ExtractionSpec(sounds).has_backbone
    assert ExtractionSpec(sounds).settings is None


def test_recorded_settings_load_the_same_backbone(tiny: Callable[[str], Path]) -> None:
    asked = BackboneSettings(
        ("cls@-2", "l2:mean"), 31, "left", "the ", "bfloat16", "float16", "eager", positions=64, pass_threads=2
    )
    source = ModelSource(str(tiny("bert")), device="cpu")
    made = load_backbone(**source.arguments(), **asked.arguments())
    settings = ExtractionSpec(made.identity).settings
    assert settings is not None
    assert settings.shapes is not None
    assert settings.shapes["threads"] == 2
    again = load_backbone(**source.arguments(), **settings.arguments())
    assert differences(made.identity, again.identity) == []


# Which of two settings decides


def test_what_is_open_is_as_recorded() -> None:
    recorded = ExtractionSpec(TEXT).settings
    assert recorded is not None
    assert BackboneSettings().over(recorded) == recorded
    asked = BackboneSettings(("max",), 53, "right", "", "float32", "float32", "sdpa", False, positions=13)
    merged = asked.over(recorded)
    assert merged == replace(asked, shapes={**TEXT["shapes"], "max_length": 53, "positions": 13}, content="text")
    images = BackboneSettings(("mean",), content="image")
    assert images.over(recorded) == images  # what was recorded of texts decides nothing
    assert BackboneSettings(pass_threads=3).over(recorded).shapes == {**TEXT["shapes"], "threads": 3}
    assert BackboneSettings(max_length=5).over(BackboneSettings()).shapes is None


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((), ("mean", "cls@-2")),
        (("cls@-2", "mean"), ("mean", "cls@-2")),  # the same sets have the order of the cache
        (("mean",), ("mean",)),
        (("mean", "auto"), ("mean", "auto")),
        (("mean", "max"), ("mean", "max")),
    ],
)
def test_feature_sets_have_the_order_of_the_record(asked: tuple[str, ...], expected: tuple[str, ...]) -> None:
    recorded = ExtractionSpec(TEXT).settings
    assert recorded is not None
    assert BackboneSettings(asked).over(recorded).features == expected


def test_a_source_that_names_no_model_is_the_recorded_one() -> None:
    here = ModelSource(device="cpu", trust_remote_code=True)
    assert here.or_else("someone/model", "v2") == ModelSource("someone/model", "v2", "cpu", True)
    assert ModelSource(revision="v3").or_else("someone/model", "v2") == ModelSource("someone/model", "v3")
    assert ModelSource("/a/copy").or_else("someone/model", "v2") == ModelSource("/a/copy")
    assert ModelSource().or_else(7, ["v2"]) == ModelSource()  # a stranger's file may hold anything


def test_settings_are_taken_out_of_options() -> None:
    options = {"device": "cpu", "max_length": 7, "prompt": "", "split": "80/20", "model": "m"}
    assert ModelSource.taken_from(options) == ModelSource("m", device="cpu")
    assert BackboneSettings.taken_from(options, ["mean"]) == BackboneSettings(("mean",), 7, prompt="")
    assert options == {"split": "80/20"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"compute_dtype": "float64"}, "compute_dtype is 'float64': expected one of float32"),
        ({"storage_dtype": "int8"}, "storage_dtype is 'int8'"),
        ({"truncation_side": "middle"}, "truncation_side is 'middle': expected right or left"),
        ({"positions": 0}, "positions is 0: expected at least 1"),
        ({"pass_threads": -1}, "pass_threads is -1"),
        ({"features": ("auto", "meen")}, "unknown pooling 'meen'"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        BackboneSettings(**wrong).refuse_impossible()
    BackboneSettings(("auto",)).refuse_impossible()


# How two specs differ


@pytest.mark.parametrize("name", [name for name in TEXT if name != "features"])
def test_every_field_is_compared(name: str) -> None:
    spec, other = ExtractionSpec(TEXT), ExtractionSpec({**TEXT, name: "another"})
    assert [field for field, *_ in spec.differences(other)] == [name]
    assert [field for field, *_ in spec.differences_for("mean", other)] == [name]


def test_a_head_minds_its_own_feature_set_alone() -> None:
    spec = ExtractionSpec(TEXT)
    changed = {**TEXT, "features": {"mean": TEXT["features"]["mean"], "cls@-2": "another"}}
    assert spec.differences_for("mean", ExtractionSpec(changed)) == []
    ((field, old, now),) = spec.differences_for("cls@-2", ExtractionSpec(changed))
    assert (field, old, now) == ("features.cls@-2", TEXT["features"]["cls@-2"], "another")
    without = ExtractionSpec({**TEXT, "features": {}})
    assert [field for field, *_ in spec.differences_for("mean", without)] == ["features.mean"]
    assert without.differences_for("mean", spec) == []  # what is not described cannot differ
    assert spec.only(["mean"]).features == {"mean": TEXT["features"]["mean"]}
    assert [*spec.only(["cls@-2", "max", "mean"]).features] == ["cls@-2", "mean"]


def test_differences_are_laid_out_in_one_line() -> None:
    assert differences_text([("a.b", 1, "x")], "it was", "it is") == "a.b: it was 1, it is 'x'"
    many = [(str(at), at, -at) for at in range(7)]
    assert differences_text(many, "was", "is").endswith("; 3: was 3, is -3 and 3 more")


def test_every_setting_but_the_shapes_is_an_argument_of_load_backbone() -> None:
    import inspect

    known = {*inspect.signature(load_backbone).parameters}
    assert {each.name for each in fields(BackboneSettings)} - known == {"shapes"}
    assert {each.name for each in fields(ModelSource)} <= known
