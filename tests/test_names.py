"""Heads, splits and feature sets: a name means the same in Python and on the command line, however it is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_caches

from embedcache import cli
from embedcache.cache import FeatureCache
from embedcache.errors import EmbedcacheError, FeatureError, InputError, SpecError
from embedcache.estimator import HeadClassifier
from embedcache.heads import TrainedHead, head_named
from embedcache.shard import FeatureSet
from embedcache.spec import HeadSpec
from embedcache.sweep import sweep
from embedcache.sweep.grid import parse
from embedcache.train import evaluate_on_cache, train_on_cache

SETS = (FeatureSet("mean", "pooled", 5, 1, "float32"), FeatureSet("mean@-3+-2+-1", "layers", 5, 3, "float32"))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    split = (np.arange(41) % 5 // 2).astype(np.uint8)
    names = {"split": split, "split_names": ("train", "validation", "test")}
    return small_caches.write(tmp_path_factory.mktemp("names") / "c", 41, 41, SETS, **names)


@pytest.fixture
def cache(path: Path) -> FeatureCache:
    return FeatureCache.open(path)


HEADS = {
    "linear": ("linear", "torch"),
    "torch:mlp": ("mlp", "torch"),
    "mlp": ("mlp", "torch"),
    "sklearn:mlp": ("mlp", "sklearn"),
    "logistic-regression": ("logistic-regression", "sklearn"),
    "sklearn:knn": ("knn", "sklearn"),
}


@pytest.mark.parametrize("written", ["linear", "logistic-regression", "sklearn:knn", HeadSpec("knn", "sklearn")])
def test_a_head_is_the_same_in_every_place(written: Any, cache: FeatureCache, tmp_path: Path) -> None:
    expected = HeadSpec(*HEADS[written]) if isinstance(written, str) else written  # type: ignore[arg-type]
    assert head_named(written) == expected
    head = train_on_cache(cache, written, progress=False).head
    assert head.spec == expected
    block = parse([written], cache.feature_sets).blocks[0]
    assert (block.kind, block.engine) == (expected.kind, expected.engine)
    if isinstance(written, str):
        x, y = cache.arrays("train")
        assert HeadClassifier(written).fit(x, y).head_.spec == expected
        assert cli.run(["train", str(cache.path), "-o", str(tmp_path / "run"), "--head", written]) == 0
        assert TrainedHead.from_pretrained(tmp_path / "run").spec == expected


@pytest.mark.parametrize("written", [name for name in HEADS if name not in ("linear", "logistic-regression")])
def test_heads_by_name(written: str) -> None:
    assert (head_named(written).kind, head_named(written).engine) == HEADS[written]


@pytest.mark.parametrize(
    ("written", "engine", "words"),
    [
        ("mpl", None, r"there is no head 'mpl' \(did you mean mlp\?\)"),
        (
            "sklearn:attention",
            None,
            "the head attention is torch's, and sklearn has none of that name",
        ),
        ("knn", "torch", "the head knn is sklearn's, and torch has none of that name"),
        ("knn", "jax", "the engine 'jax' has no head 'knn'"),
        ("", None, "there is no head ''"),
        (3, None, "head is 3: expected the name of a head"),
        (["mlp"], None, r"head is \['mlp'\]: expected the name of a head"),
    ],
)
def test_heads_that_there_are_not(written: Any, engine: str | None, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        head_named(written, engine)


@pytest.mark.parametrize("written", ["validation", "val", "valid", "dev", "VAL", " Development "])
def test_a_split_is_the_same_in_every_place(
    written: str, cache: FeatureCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = train_on_cache(cache, progress=False).head
    head.save_pretrained(tmp_path / "run")
    for ask in (cache.rows, cache.targets, cache.features, cache.ids, cache.keys, cache.places):
        assert np.array_equal(ask(written), ask("validation"))
    assert evaluate_on_cache(head, cache, written) == evaluate_on_cache(head, cache, "validation")
    assert cli.run(["evaluate", str(tmp_path / "run"), str(cache.path), "--split", written, "--json"]) == 0
    assert "validation" in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("written", ["mean@-3..-1", "mean@-3..-2+-1", "mean@-3+-2+-1", " mean@-3..-1 "])
def test_a_feature_set_is_the_same_in_every_place(written: str, cache: FeatureCache, tmp_path: Path) -> None:
    name = "mean@-3+-2+-1"
    assert cache.feature(written).name == name
    assert np.array_equal(cache.features("train", written), cache.features("train", name))
    head = train_on_cache(cache, "attention-pooling", {"epochs": 1}, feature=written, progress=False).head
    assert head.feature.name == name
    for grid in (
        {"features": written, "heads": "attention-pooling"},
        [{"head": "attention-pooling", "features": written}],
    ):
        assert parse(grid, cache.feature_sets).blocks[0].features == (name,)
    named = ["--head", "attention-pooling", "--feature", written]
    assert cli.run(["train", str(cache.path), "-o", str(tmp_path / "run"), "--epochs", "1", *named]) == 0
    assert TrainedHead.from_pretrained(tmp_path / "run").feature.name == name


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda cache: cache.rows("vla"), InputError),
        (lambda cache: cache.rows(["train"]), InputError),
        (lambda cache: cache.feature("cls"), FeatureError),
        (lambda cache: cache.feature("mean@-1..-3"), FeatureError),
        (lambda cache: cache.feature(["mean"]), FeatureError),
        (lambda cache: sweep(cache, "linear", features=["mean@@"]), EmbedcacheError),
    ],
)
def test_names_that_are_none(
    ask: Callable[[FeatureCache], Any], error: type[EmbedcacheError], cache: FeatureCache
) -> None:
    with pytest.raises(error, match=r"(no split|no feature set) .*(it|the cache) has (train|mean)"):
        ask(cache)
