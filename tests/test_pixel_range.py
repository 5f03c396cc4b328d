"""Pictures whose pixels have no range of their own: refused, or read with the range that a cache then records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_pictures
from PIL import Image

from embedcache import FeatureExtractor, Predictor, check_equivalence, extract, train_on_cache
from embedcache.backbone import load_backbone
from embedcache.cache import relabel
from embedcache.cli import run
from embedcache.errors import BadRowsError, SpecError, SpecMismatchError
from embedcache.examples import load_examples
from embedcache.finetune import ImageClassificationPipeline

RANGE = (-1.5, 2.5)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pictures.build("vit", tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture(scope="module")
def heights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven float pictures in two classes, and the same in 8 bits as the rule makes them, elsewhere."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(14):
        values = np.random.default_rng(number).normal(number % 2, 1.0, (31, 37)).astype(np.float32)
        scaled = np.floor(((values.astype(np.float64) + 1.5) / 4).clip(0, 1) * 255 + 0.5).astype(np.uint8)
        for kind, picture in (("float", values), ("bytes", scaled)):
            path = folder / kind / "ab"[number % 2] / f"{number}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    return folder


@pytest.fixture(scope="module")
def cached(vit: Path, heights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("caches") / "c"
    extract(heights / "float", output_dir=path, model=vit, pixel_range=RANGE, split="50/50", kind="image")
    return path


def test_they_are_refused_without_a_range(heights: Path) -> None:
    with pytest.raises(BadRowsError, match=r"floating-point pixels.*--pixel-range LOW HIGH"):
        load_examples(heights / "float")


def test_the_cache_records_the_range_and_its_features_are_of_scaled_pixels(
    vit: Path, heights: Path, cached: Path, tmp_path: Path
) -> None:
    plain = extract(heights / "bytes", output_dir=tmp_path / "plain", model=vit, split="50/50", kind="image")
    ranged = extract(heights / "float", output_dir=cached, split="50/50", kind="image")  # as recorded
    assert ranged.spec["preprocessing"]["pixel_range"] == [-1.5, 2.5]
    assert "pixel_range" not in plain.spec["preprocessing"]
    both = [dict(zip(map(str, cache.ids()), cache.take(cache.places()), strict=True)) for cache in (plain, ranged)]
    assert len(both[0]) == 14
    for name, features in both[0].items():
        np.testing.assert_array_equal(both[1][name.replace("bytes", "float")], features)
    with pytest.raises(SpecMismatchError, match="pixel_range"):
        extract(heights / "float", output_dir=cached, pixel_range=(0, 1), split="50/50", kind="image")


def test_what_reads_the_cache_follows_it(
    heights: Path, cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", str(cached), str(heights / "float"), "--split", "50/50", "--steps", "2"]) == 0
    check_equivalence(cached, heights / "float", kind="image", steps=1).raise_if_different()
    relabel(cached, load_examples(heights / "float", pixel_range=RANGE, split="50/50"))
    assert run(["relabel", str(cached), str(heights / "float"), "--split", "50/50"]) == 0
    train_on_cache(cached, "linear").save(tmp_path / "run")
    files = sorted((heights / "float").rglob("*.tif"))
    predicted = Predictor.load(tmp_path / "run")(files)
    assert run(["predict", str(tmp_path / "run"), str(heights / "float"), "-o", str(tmp_path / "p.csv")]) == 0
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 1 + len(predicted) == 15
    assert run(["info", str(cached)]) == 0
    assert "float and 32-bit pixels from -1.5 (black) to 2.5 (white)" in capsys.readouterr().out


def test_objects_have_it_too(vit: Path, heights: Path) -> None:
    files = sorted((heights / "float").rglob("*.tif"))[:5]
    arrays = [np.asarray(Image.open(file)) for file in files]
    expected = FeatureExtractor(vit, cache_dir=heights / "e").fit_transform(
        [str(file).replace("float", "bytes") for file in files]
    )
    for rows in (files, arrays):
        extractor = FeatureExtractor(vit, cache_dir=heights / "e", pixel_range=RANGE)
        np.testing.assert_array_equal(extractor.fit_transform(rows), expected)
    pipeline = ImageClassificationPipeline(vit, num_classes=2, pixel_range=RANGE)
    pipeline.prepare_data(arrays, [0, 1, 0, 1, 0])


@pytest.mark.parametrize("wrong", [(1, 1), (2, 1), (0, float("inf")), (0, float("nan")), (0,)])
def test_impossible_ranges(wrong: tuple[float, float], heights: Path, vit: Path) -> None:
    for call in (
        lambda: load_examples(heights / "bytes", pixel_range=wrong),
        lambda: load_backbone(vit, pixel_range=wrong),
    ):
        with pytest.raises(SpecError, match="expected two numbers, that of black and a larger one of white"):
            call()


def test_a_model_of_texts_takes_none() -> None:
    with pytest.raises(SpecError, match=r"pixel_range is given, and .* reads texts: leave it out"):
        load_backbone(pixel_range=(0, 1))
