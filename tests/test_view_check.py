"""Checks of caches with views, with planted faults; and averaging over views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pictures
from PIL import Image

from embedcache.backbone import views as rule
from embedcache.backbone.views import Draws, View
from embedcache.cache import FeatureCache
from embedcache.equivalence import EquivalenceResult, check_equivalence
from embedcache.errors import FeatureError, SpecError
from embedcache.extract import extract
from embedcache.predict import Predictor
from embedcache.spec import TrainSpec
from embedcache.sweep import sweep
from embedcache.train import evaluate_on_cache, train_on_cache

PICTURES = tiny_pictures.pictures(29)
SPLITS = ("train", "train", "train", "test")
EXAMPLES = tiny_pictures.examples_of(PICTURES, splits=SPLITS)
FAST: dict[str, Any] = {"steps": 3, "head": "linear", "reference": "canonical", "progress": False}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pictures.build("vit", tmp_path_factory.mktemp("models") / "vit")


def made(path: Path, vit: Path, **options: Any) -> FeatureCache:
    return extract(EXAMPLES, output_dir=path, model=vit, device="cpu", **{"pooling": "mean", "views": 2, **options})


def checked(cache: FeatureCache, **options: Any) -> EquivalenceResult:
    return check_equivalence(cache, EXAMPLES, **{**FAST, **options})


@pytest.mark.parametrize(
    ("pooling", "head"), [(["mean", "cls@0+1"], "mlp"), (["tokens"], "attention-pooling")]
)  # fmt: skip
def test_training_on_views_is_end_to_end_training_to_the_bit(
    vit: Path, tmp_path: Path, pooling: list[str], head: str
) -> None:
    cache = made(tmp_path / "c", vit, pooling=pooling, augment="crop+flip+colour", storage_dtype="float16")
    result = checked(cache, head=head, reference="both")
    assert result.equal, result.to_text()
    compared = {row.what for row in result.comparisons if row.reference == "canonical"}
    assert {"losses", "final parameters", "logits"} <= compared
    assert any(f"{pooling[0]}:view2" in what for what in compared)


def shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shifted(Draws):
        def __init__(self, key: bytes, view: int) -> None:
            super().__init__(key, view + 1)

    monkeypatch.setattr(rule, "Draws", Shifted)


def unflipped(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = View.drawn
    monkeypatch.setattr(View, "drawn", lambda *given: replace(drawn(*given), flip=False))


def of_another_row(monkeypatch: pytest.MonkeyPatch) -> None:
    make, pictures = rule.Views.make, dict(zip(PICTURES, [*PICTURES[1:], PICTURES[0]], strict=True))

    def made_of_another(self: Any, image: Image.Image, content: bytes, *given: Any) -> Image.Image:
        from embedcache.pictures import decode

        other = pictures.get(content, content)
        return make(self, decode(other), other, *given)

    monkeypatch.setattr(rule.Views, "make", made_of_another)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (shifted, "of view 2, in the place of view 1: another seed"),
        (unflipped, "whose views are made by crop, not by crop and flip"),
        (of_another_row, "rows were swapped"),
    ],
)
def test_planted_faults_are_found(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None], words: str
) -> None:
    with monkeypatch.context() as planted:
        fault(planted)
        cache = made(tmp_path / "c", vit)
    result = checked(cache, everything=True)
    assert not result.equal
    assert words in result.to_text(), result.to_text()
    verdicts = {row.what: row.verdict for row in result.comparisons if row.reference == "canonical"}
    assert verdicts["losses"] == "different"


def test_a_view_drawn_for_another_epoch_is_found_in_training(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedcache.equivalence import features

    cache, drawn = made(tmp_path / "c", vit), features.drawn_views
    monkeypatch.setattr(features, "drawn_views", lambda rows, views, seed, epoch: drawn(rows, views, seed, epoch + 1))
    verdicts = {row.what: row.verdict for row in checked(cache).comparisons}
    assert verdicts["losses"] == "different"
    assert verdicts["features mean"] == "identical" == verdicts["features mean:view1"]


def test_averaging_is_the_mean_over_the_plain_picture_and_its_views(vit: Path, tmp_path: Path) -> None:
    cache, plain = made(tmp_path / "c", vit), made(tmp_path / "plain", vit, views=None)
    result = train_on_cache(cache, "linear")
    head = result.head
    assert head.training["views"] == 2
    assert "with 2 views each" in result.facts["training rows"]
    expected = np.mean([head.probabilities(cache.features("test", name)) for name in cache.feature_sets], axis=0)
    result.save(tmp_path / "run")
    contents = [content for content, split in zip(PICTURES, SPLITS * 8, strict=False) if split == "test"]
    predictor = Predictor.load(tmp_path / "run", average_views=True)
    assert predictor.numerics.status == "same"
    given = np.array([list(prediction.probabilities.values()) for prediction in predictor(contents)])
    np.testing.assert_array_equal(given, expected)
    single = Predictor.load(tmp_path / "run")
    assert single.numerics.status == "same"
    assert getattr(single.backbone, "views", None) == 0
    averaged = evaluate_on_cache(head, cache, average_views=True, intervals=False)
    y = cache.targets("test")
    assert averaged["accuracy"] == pytest.approx(np.mean(expected.argmax(1) == y))
    assert evaluate_on_cache(head, cache, intervals=False) == evaluate_on_cache(head, plain, intervals=False)
    with pytest.raises(FeatureError, match="no views of mean to average over"):
        evaluate_on_cache(head, plain, average_views=True)
    train_on_cache(plain, "linear").save(tmp_path / "other")
    with pytest.raises(SpecError, match="the head's cache has no views"):
        Predictor.load(tmp_path / "other", average_views=True)
    with pytest.raises(FeatureError, match="mean:view1 is a set of views: train on mean"):
        train_on_cache(cache, feature="mean:view1")


def test_training_of_rows_on_disk_and_in_a_sweep(vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = made(tmp_path / "c", vit)
    heads = [
        {"head": "linear", "solver": "convex", "views": [0, 2]}, {"head": "linear", "epochs": 2, "views": [0, 1]},
        {"head": "majority"},
    ]  # fmt: skip
    summary = sweep(cache, {"heads": heads, "folds": 2}, output_dir=tmp_path / "sweep")
    labels = [row.label for row in summary.leaderboard]
    assert any("views=0" in label for label in labels)
    assert any("views=2" in label for label in labels)
    monkeypatch.setenv("EMBEDCACHE_MEMORY", "2000")
    spec = TrainSpec(epochs=2)
    on_disk = train_on_cache(cache, "linear", spec, progress=False).head
    assert on_disk.training["views"] == 2
