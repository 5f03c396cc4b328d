"""Views of pictures: the rule by which they are made, and how they are kept."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import numpy as np
import pytest
import tiny_pictures
from PIL import Image, ImageEnhance

from embedcache.backbone import FrozenModel, compute, compute_features, load_backbone, probe_of
from embedcache.backbone.pictures import Pictures
from embedcache.backbone.views import Draws, View, Views, coloured
from embedcache.cache import FeatureCache, merge
from embedcache.cli.caches import describe_text
from embedcache.errors import SpecError, SpecMismatchError
from embedcache.extract import extract, forecast, run
from embedcache.fingerprint import row_key
from embedcache.pictures import decode
from embedcache.spec import ExtractionSpec, FeatureSpec, augments, plain_name

PICTURES = tiny_pictures.pictures(11)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pictures.build("vit", tmp_path_factory.mktemp("views") / "vit")


def test_draws_are_splitmix64() -> None:
    draws = Draws(b"", 0)
    draws._state = 1234567
    # The published outputs of SplitMix64 seeded with 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [draws.below(2**64) for _ in range(3)] == expected
    seed = hashlib.blake2b(b"key" + bytes([5, 0, 0, 0]), digest_size=8).digest()
    assert Draws(b"key", 5)._state == int.from_bytes(seed, "little")
    assert Draws(b"key", 4)._state != Draws(b"key", 5)._state != Draws(b"kez", 5)._state


def test_a_view_stays_within_its_picture_and_its_ranges() -> None:
    views = [View.drawn((640, 480), bytes([number % 256, number // 256]), 3) for number in range(2000)]
    boxes = np.array([view.box for view in views])
    across, down = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() == 0
    assert boxes[:, 2].max() == 640
    assert boxes[:, 3].max() == 480
    inside = (across < 640) & (down < 480)  # neither side was cut to the picture's own
    area, ratio = (across * down / (640 * 480))[inside], (across / down)[inside]
    assert area.min() > 0.34
    assert ratio.min() > 0.745
    assert ratio.max() < 1.345
    assert ratio.min() < 0.78
    assert ratio.max() > 1.3
    assert area.max() > 0.8
    assert 900 < sum(view.flip for view in views) < 1100
    factors = np.array([view.factors for view in views])
    assert factors.min() == 154
    assert factors.max() == 358
    assert View.drawn((1, 64), b"a", 1).box[2] == 1
    # Frozen: what this gives is part of the format.
    assert View.drawn((45, 37), row_key(b"content"), 2) == FROZEN


FROZEN = View((11, 3, 39, 32), True, (319, 253, 157))


def test_colours_are_near_those_of_pillow_and_exact() -> None:
    image = decode(PICTURES[0])
    assert np.array_equal(np.asarray(coloured(image, 256, 256, 256)), np.asarray(image))
    for place, enhance in enumerate((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)):
        factors = [256, 256, 256]
        factors[place] = 179
        theirs = np.asarray(enhance(image).enhance(179 / 256)).astype(int)
        assert np.abs(np.asarray(coloured(image, *factors)) - theirs).max() <= 1
    tall = image.resize((3, 700))  # more than one strip
    assert np.array_equal(np.asarray(coloured(tall, 256, 256, 0)), np.asarray(tall.convert("L").convert("RGB")))


def test_views_are_made_with_the_processor_s_own_filter_and_scaling(vit: Path) -> None:
    backbone = load_backbone(vit, features=["mean", "tokens", "cls@0+1"], views=2, augment="flip+crop")
    pixels = backbone.prepare(PICTURES)
    processor = backbone.content.processor
    for row, content in enumerate(PICTURES):
        image = decode(content)
        assert np.array_equal(pixels.values[3 * row], processor(image))
        for view in (1, 2):
            drawn = View.drawn(image.size, row_key(content), view)
            made = image.crop(drawn.box).resize((32, 32), processor.resizing.filter)
            made = made.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if drawn.flip else made
            assert np.array_equal(pixels.values[3 * row + view], np.asarray(made).transpose(2, 0, 1))
    only_flip = Views(1, ("flip",))
    flipped = next(content for content in PICTURES if View.drawn(decode(content).size, row_key(content), 1).flip)
    image = decode(flipped)
    assert np.array_equal(np.asarray(only_flip.make(image, flipped, 1, (3, 3), 2)), np.asarray(image)[:, ::-1])


def test_a_processor_without_a_table_makes_views_too(vit: Path) -> None:
    backbone = load_backbone(vit, views=1)
    exact = backbone.prepare(PICTURES)
    expected = backbone.content.processor.normalized(exact.values)
    processor = copy.copy(backbone.content.processor)
    processor.table = None
    backbone.content.processor = processor
    assert np.array_equal(backbone.prepare(PICTURES).values, expected)


def test_every_set_has_its_views_and_no_bit_of_the_plain_ones_changes(vit: Path, tmp_path: Path) -> None:
    pooling = ["mean", "tokens", "cls@0+1"]
    rows = [{"image": content, "label": number % 2} for number, content in enumerate([*PICTURES, PICTURES[0]])]
    plain = extract(rows, output_dir=tmp_path / "plain", model=vit, pooling=pooling)
    cache = extract(rows, output_dir=tmp_path / "views", model=vit, pooling=pooling, views=2, augment="colour+crop")
    assert list(cache.feature_sets)[:4] == ["mean", "tokens", "cls@0+1", "mean:view1"]
    assert list(cache.plain_sets) == pooling
    assert len(cache.feature_sets) == 9
    assert [feature.name for feature in cache.views(cache.feature("tokens"))] == ["tokens:view1", "tokens:view2"]
    for name in ("mean", "cls@0+1"):
        assert np.array_equal(plain.features(feature=name), cache.features(feature=name))
        assert not np.array_equal(cache.features(feature=name), cache.features(feature=f"{name}:view1"))
    assert np.array_equal(plain.ragged(feature="tokens").values, cache.ragged(feature="tokens").values)
    assert plain.spec == cache.spec.only(pooling)
    # Each view is what a backbone makes of that picture alone.
    alone = load_backbone(vit, features=pooling, views=2, augment="crop+colour")
    assert isinstance(alone, FrozenModel)
    assert isinstance(alone.content, Pictures)
    for number in (3, 7):
        again = compute_features(alone, [PICTURES[number]], "tokens:view2")
        assert np.array_equal(again.values, cache.ragged(feature="tokens:view2")[number])
    settings = ExtractionSpec(cache.spec).settings
    assert settings is not None
    assert (settings.views, settings.augment) == (2, "crop+colour")
    assert {*settings.features} == {*pooling}
    probe = probe_of(alone)
    assert probe is not None
    assert len(probe.inputs) == 6
    assert "mean:view1" in probe.outcomes
    assert "views:    2 of each image beside it (crop+colour)" in describe_text(cache.describe())
    assert "mean:view1" not in describe_text(cache.describe())


def test_growing_resuming_and_merging_keep_views(vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(vit, views=2)
    monkeypatch.setattr(compute, "PREPARED_BYTES", 5 * backbone.prepared_bytes + 1)
    whole = tiny_pictures.examples_of(PICTURES)
    report = run(whole, backbone, tmp_path / "whole")
    assert (report.extracted, report.tokens, report.views, report.shards) == (11, 33, 2, 3)
    assert "of 3 pictures each" in report.to_text(tmp_path)
    run(whole.select(np.arange(5)), backbone, tmp_path / "grown")
    run(whole, backbone, tmp_path / "grown")  # the views of the five rows are there already
    same, grown = FeatureCache.open(tmp_path / "whole"), FeatureCache.open(tmp_path / "grown")
    run(whole.select(np.arange(6, 11)), backbone, tmp_path / "end")
    run(whole.select(np.arange(6)), backbone, tmp_path / "start")
    merged = merge([tmp_path / "start", tmp_path / "end"], tmp_path / "merged")
    for name in same.feature_sets:
        assert np.array_equal(same.features(feature=name), grown.features(feature=name))
        assert np.array_equal(same.features(feature=name), merged.features(feature=name))
    with pytest.raises(SpecMismatchError, match="view1"):
        run(whole, load_backbone(vit), tmp_path / "whole")
    extract(whole, output_dir=tmp_path / "whole", model=vit)  # what is not said, the cache decides


def test_a_dry_run_says_what_views_cost(vit: Path) -> None:
    told = forecast(tiny_pictures.examples_of(PICTURES), load_backbone(vit, features=["mean", "tokens"], views=4), None)
    assert told.tokens == 5 * 11
    assert told.bytes["mean:view4"] == told.bytes["mean"]
    text = told.to_text()
    assert "views       4 of each picture: 5 times the passes and the disk" in text
    assert "mean: 968 bytes, and 3.9 kB for its views" in text
    assert "view4:" not in text


def test_what_cannot_be_is_refused_in_one_line(vit: Path, tmp_path: Path) -> None:
    assert FeatureSpec.parse("l2:mean@-2:view3").name == "l2:mean@-2:view3"
    assert plain_name("mean:view0")[1] == 0
    assert plain_name("l2:mean@-2:view3") == ("l2:mean@-2", 3)
    assert augments("colour+crop") == ("crop", "colour")
    with pytest.raises(SpecError, match="augment is 'crop\\+blur': expected some of crop, flip, colour"):
        load_backbone(vit, views=1, augment="crop+blur")
    with pytest.raises(SpecError, match="augment is given without views"):
        load_backbone(vit, augment="crop")
    with pytest.raises(SpecError, match="mean:view1 is a set of views: ask for mean by extract --views N"):
        load_backbone(vit, features=["mean:view1"], views=1)
    with pytest.raises(SpecError, match="views is 101"):
        load_backbone(vit, views=101)
    with pytest.raises(SpecError, match=r"views is given, and .* reads texts: leave it out"):
        load_backbone(views=2)
