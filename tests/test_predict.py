"""Raw input in, labels and probabilities out: every head, the same bits alone and in a file, one backbone only."""

from __future__ import annotations

import shutil
import tracemalloc
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from fakes import CountingBackbone
from hypothesis import given
from hypothesis import strategies as st

import embedcache as ec
from embedcache.errors import BackboneError, BackboneMismatchError, BundleError, InputError
from embedcache.examples import CONTENTS
from embedcache.heads import TrainedHead
from embedcache.predict import Predictor
from embedcache.shard import FeatureSet
from embedcache.spec import ExtractionSpec, HeadSpec, TrainSpec
from embedcache.train import train_on_cache

WINDOW = CONTENTS["text"].window

TEXTS = [f"{text} {word}" for text in tiny_models.TEXTS for word in ("film", "plot", "good")]
POOLINGS = ["mean", "cls@all", "tokens"]
HEADS = [
    *((kind, engine, task)
      for kind, engine in [("linear", "torch"), ("mlp", "torch"), ("residual", "torch"), ("attention", "torch"),
                           ("attention-pooling", "torch"), ("linear", "sklearn"), ("knn", "sklearn"),
                           ("mlp", "sklearn"), ("hist-gradient-boosting", "sklearn"), ("majority", "sklearn"),
                           ("ridge", "sklearn"), ("random-projection", "sklearn")]
      for task in ("classification", "multilabel", "regression")),
    ("linear-svm", "sklearn", "classification"), ("lda", "sklearn", "classification"),
]  # fmt: skip
OPTIONS = {("mlp", "sklearn"): {"hidden": [4], "max_iter": 3}, ("hist-gradient-boosting", "sklearn"): {"max_iter": 2}}
LABELS: dict[str, Any] = {
    "classification": ["yes, sir" if at % 3 else "nö" for at in range(len(TEXTS))],
    "multilabel": [["a"] * (at % 2) + ["b"] * (at % 3 > 0) for at in range(len(TEXTS))],
    "regression": [float(at) for at in range(len(TEXTS))],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    return tiny_models.build("bert", tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="module")
def caches(model: Path, tmp_path_factory: Any) -> dict[str, Any]:
    made = {}
    for task, labels in LABELS.items():
        rows = [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=True)]
        made[task] = ec.extract(
            rows, output_dir=tmp_path_factory.mktemp("caches") / task, model=str(model), pooling=POOLINGS, task=task,
            device="cpu", split="80/20",
        )  # fmt: skip
    return made


def trained(caches: Any, kind: str, engine: Any = "torch", task: str = "classification", feature: Any = None) -> Any:
    spec = HeadSpec(kind, engine, OPTIONS.get((kind, engine), {}))
    return train_on_cache(caches[task], spec, TrainSpec(epochs=2), feature=feature, progress=False)


@pytest.fixture(scope="module")
def run(caches: Any, tmp_path_factory: Any) -> Path:
    """A saved run of a linear head."""
    path: Path = tmp_path_factory.mktemp("runs") / "linear"
    trained(caches, "linear").save(path)
    return path


@pytest.mark.parametrize(("kind", "engine", "task"), HEADS, ids=lambda each: str(each))
def test_every_head_says_of_raw_text_what_it_says_of_the_cache(
    kind: str, engine: str, task: str, caches: Any, tmp_path: Path
) -> None:
    result = trained(caches, kind, engine, task)
    result.save(tmp_path / "run")
    predictor = Predictor.load(tmp_path / "run", device="cpu")
    said = predictor(TEXTS)
    cache, head = caches[task], result.head
    feature = head.feature.name
    x = cache.ragged(None, feature) if head.feature.kind == "tokens" else cache.features(None, feature)
    expected = head.probabilities(x)
    np.testing.assert_array_equal([list(each.probabilities.values()) for each in said], expected)
    assert list(said[0].probabilities) == list(cache.class_names)
    for prediction, values in zip(said, expected, strict=True):
        if task == "classification":
            assert prediction.label == cache.class_names[int(values.argmax())]
            assert prediction.confidence == values.max()
        elif task == "multilabel":
            assert prediction.confidence is None
            assert prediction.label == tuple(
                name for name, p, limit in zip(cache.class_names, values, head.thresholds, strict=True) if p >= limit
            )
        else:
            assert prediction.label == tuple(values)


@given(order=st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=20))
@pytest.mark.parametrize("kind", ["linear", "attention"])
def test_a_row_gets_the_same_bits_alone_and_in_company(kind: str, order: list[int], caches: Any) -> None:
    predictor = predictors(caches, kind)
    expected = {text: list(each.probabilities.values()) for text, each in whole(caches, kind).items()}
    said = predictor([TEXTS[at] for at in order])
    assert [list(each.probabilities.values()) for each in said] == [expected[TEXTS[at]] for at in order]


_MADE: dict[Any, Any] = {}


def predictors(caches: Any, kind: str) -> Predictor:
    if kind not in _MADE:
        from embedcache.predict import backbone_of
        from embedcache.spec import ModelSource

        head = trained(caches, kind).head
        _MADE[kind] = Predictor(head, backbone_of(head, ModelSource(device="cpu")))
    return _MADE[kind]


def whole(caches: Any, kind: str) -> dict[str, Any]:
    if ("whole", kind) not in _MADE:
        _MADE["whole", kind] = dict(zip(TEXTS, predictors(caches, kind)(TEXTS), strict=True))
    return _MADE["whole", kind]


# The right backbone only.


def test_a_moved_backbone_is_given_by_hand(run: Path, model: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(model, moved)
    expected = Predictor.load(run, device="cpu")(TEXTS)
    assert Predictor.load(run, model=str(moved), device="cpu")(TEXTS) == expected


def test_a_backbone_that_is_gone_says_how_to_go_on(caches: Any, tmp_path: Path) -> None:
    head = replace(trained(caches, "linear").head, model=str(tmp_path / "gone"))
    head.save_pretrained(tmp_path / "run")
    with pytest.raises(BackboneError, match=r"gone.*the head was trained on .*gone: say where it is now with --model"):
        Predictor.load(tmp_path / "run", device="cpu")


def test_another_backbone_is_refused_with_a_difference(run: Path, model: Path, tmp_path: Path) -> None:
    other = tiny_models.build("electra", tmp_path / "electra")
    with pytest.raises(BackboneMismatchError, match=r"another backbone \(.*trained on .*, this is .*--model") as caught:
        Predictor.load(run, model=str(other), device="cpu")
    assert "\n" not in str(caught.value)
    changed = tmp_path / "changed"
    shutil.copytree(model, changed)
    weights = changed / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1  # one bit of one weight
    weights.write_bytes(raw)
    with pytest.raises(BackboneMismatchError, match=r"weights"):
        Predictor.load(run, model=str(changed), device="cpu")


def test_a_changed_tokenizer_is_refused(run: Path, model: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(model, changed)
    file = changed / "tokenizer.json"
    file.write_text(file.read_text("utf-8").replace('"lowercase": true', '"lowercase": false'), "utf-8")
    with pytest.raises(BackboneMismatchError, match="tokenizer"):
        Predictor.load(run, model=str(changed), device="cpu")


def test_the_settings_of_training_are_those_of_predicting(model: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "label": str(at % 2)} for at, text in enumerate(TEXTS)]
    cache = ec.extract(
        rows, output_dir=tmp_path / "cache", model=str(model), pooling="l2:mean@-2", device="cpu", max_length=11,
        truncation_side="left", prompt="the film ", compute_dtype="bfloat16", storage_dtype="float16",
        attention="eager",
    )  # fmt: skip
    result = train_on_cache(cache, "linear", TrainSpec(epochs=1), progress=False)
    result.save(tmp_path / "run")
    said = Predictor.load(tmp_path / "run", device="cpu")(TEXTS)
    expected = result.head.probabilities(cache.features())
    np.testing.assert_array_equal([list(each.probabilities.values()) for each in said], expected)


def test_the_revision_is_asked_for_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from embedcache import predict
    from embedcache.backbone import load as load_module
    from embedcache.spec import ModelSource

    asked: dict[str, Any] = {}

    def load(model: Any, **settings: Any) -> Any:
        asked.update(settings, model=model)
        return "a backbone"

    monkeypatch.setattr(load_module, "load_backbone", load)
    head = replace(TrainedHead.from_pretrained(run), model="someone/model", revision="v2")
    predict.backbone_of(head, ModelSource(trust_remote_code=True))
    assert (asked["model"], asked["revision"], asked["trust_remote_code"]) == ("someone/model", "v2", True)
    predict.backbone_of(head, ModelSource("/a/copy"))
    assert (asked["model"], asked["revision"], asked["trust_remote_code"]) == ("/a/copy", None, False)


def test_a_head_of_bare_features_has_no_backbone(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    ec.train_head(x, np.arange(20) % 2, class_names=("a", "b"), progress=False).save(tmp_path / "run")
    with pytest.raises(BackboneMismatchError, match="trained on features without a backbone: give it features"):
        Predictor.load(tmp_path / "run")
    with pytest.raises(BundleError, match="is not a run folder"):
        Predictor.load(tmp_path)


# Many rows.


def counting(tokens: bool = False) -> tuple[CountingBackbone, Predictor]:
    backbone = CountingBackbone(tokens=tokens)
    state = {"output.weight": np.eye(2, 5, dtype=np.float32), "output.bias": np.zeros(2, np.float32)}
    head = TrainedHead(
        HeadSpec("linear"), "classification", ("a", "b"), backbone.feature_sets[0], state,
        extraction=ExtractionSpec({**backbone.identity, "features": {}}),
    )  # fmt: skip
    return backbone, Predictor(head, backbone)


def test_equal_rows_are_computed_once() -> None:
    backbone, predictor = counting()
    said = predictor(["one", "two", "one", "one"])
    assert sorted(backbone.rows_seen) == [b"one", b"two"]
    assert said[0] == said[2] == said[3] != said[1]
    assert predictor([]) == []


def test_memory_stays_flat_however_many_rows_there_are() -> None:
    backbone, predictor = counting()
    backbone.rows_seen = deque(maxlen=1)  # type: ignore[assignment]  # it would grow with the rows

    def texts(rows: int) -> Iterator[str]:
        return (f"row number {at} of many" for at in range(rows))

    peaks = []
    for rows in (2 * WINDOW, 10 * WINDOW):
        tracemalloc.start()
        assert sum(1 for _ in predictor.stream(texts(rows))) == rows
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_a_stream_asks_for_no_more_than_a_window() -> None:
    _, predictor = counting()
    asked = []

    def texts() -> Iterator[str]:
        for at in range(3 * WINDOW):
            asked.append(at)
            yield f"row {at}"

    stream = predictor.stream(texts())
    next(stream)
    assert len(asked) == WINDOW


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["fine", ""], "row 1: 'text' is empty"),
        (["fine", " \n"], "row 1: 'text' is blank"),
        ([None], "row 0: 'text' is missing"),
        ([b"bytes"], "row 0: 'text' holds b'bytes' of type bytes, expected text"),
        (["\ud800"], "row 0: lone surrogate"),
        ("one string", "got one string: expected a list"),
        (["fine"] * (WINDOW + 5) + [3], f"row {WINDOW + 5}: 'text' holds 3"),
    ],
)
def test_what_is_no_text_is_refused(texts: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        counting()[1](texts)


def test_content_that_is_not_known_is_predicted_by_its_bytes_alone() -> None:
    backbone, predictor = counting()
    backbone.identity["preprocessing"] = {"kind": "sounds"}
    head = replace(predictor.head, extraction=ExtractionSpec({**backbone.identity, "features": {}}))
    assert Predictor(head, backbone).contents([b"one"]) == predictor.contents([b"one"])
    with pytest.raises(InputError, match="rows of the kind 'sounds' cannot be read here: give their contents"):
        Predictor(head, backbone)(["one"])


def test_another_feature_set_of_the_same_backbone_does_not_matter() -> None:
    backbone, predictor = counting()
    more = CountingBackbone(tokens=True)
    assert Predictor(predictor.head, more)(["one"]) == predictor(["one"])
    other = CountingBackbone(name="another")
    with pytest.raises(BackboneMismatchError, match=r"backbone.weights: trained on 'fake', this is 'another'"):
        Predictor(predictor.head, other)
    assert backbone.feature_sets[0] == FeatureSet("mean", "pooled", 5, 1, "float32")
