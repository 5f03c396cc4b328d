"""The check on caches of images: equal to training end to end, and every fault that was planted is found."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pictures
import torch
from PIL import Image

from embedcache.backbone import FrozenModel, load_backbone
from embedcache.backbone import load as load_module
from embedcache.backbone import pictures as preparing
from embedcache.cache import CacheWriter, FeatureCache
from embedcache.equivalence import EquivalenceResult, check_equivalence
from embedcache.errors import InputError
from embedcache.extract import extract
from embedcache.features import Stored

PICTURES = tiny_pictures.pictures(24)
SPLITS = ("train", "train", "train", "validation")
FAST: dict[str, Any] = {"steps": 3, "head": "linear", "reference": "canonical", "progress": False}


def turned(number: int) -> bytes:
    """A JPEG whose EXIF says that it lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.open(io.BytesIO(tiny_pictures.picture(number))).save(stream, "JPEG", exif=exif)
    return stream.getvalue()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")
    return lambda kind: root / kind if (root / kind).is_dir() else tiny_pictures.build(kind, root / kind)


def made(path: Path, model: Path, contents: list[bytes] = PICTURES, **options: Any) -> FeatureCache:
    options = {"device": "cpu", "rows_per_shard": 13, **options}
    return extract(tiny_pictures.examples_of(contents, splits=SPLITS), output_dir=path, model=model, **options)


def forged(path: Path, cache: FeatureCache, like: FeatureCache) -> FeatureCache:
    """The features of one cache under the spec of another: only recomputation can tell."""
    arrays: dict[str, Any] = {}
    for shard, entry in enumerate(cache.manifest["shards"]):
        for name, value in cache.shard(shard, np.arange(entry["rows"]))[1].items():
            arrays[name] = np.concatenate([arrays[name], value.values]) if name in arrays else value.values
    features = {feature.name: Stored(feature, arrays[feature.name]) for feature in like.feature_sets.values()}
    with CacheWriter(path, dict(like.spec), list(like.feature_sets.values())) as writer:
        writer.append(np.array(like.stored_keys()), features, like.provenance()[0])
        writer.commit_dataset(replace(like.dataset, ids=None))
    return FeatureCache.open(path)


def checked(cache: FeatureCache, contents: list[bytes] = PICTURES, **options: Any) -> EquivalenceResult:
    return check_equivalence(cache, tiny_pictures.examples_of(contents, splits=SPLITS), **{**FAST, **options})


def finds(result: EquivalenceResult, *words: str) -> None:
    assert not result.equal
    for word in words:
        assert word in result.to_text(), result.to_text()


@pytest.mark.parametrize(
    ("kind", "poolings", "options"),
    [
        ("vit", ["mean", "cls@-2", "pooler", "l2:cls+mean"], {}), ("registers", ["mean", "max@1"], {}),
        ("dinov2", ["norm:cls+mean@-2..-1", "l2:norm:mean@1"], {}),
        ("resnet", ["pooler", "mean@1"], {"storage_dtype": "float16"}), ("clip", ["projected"], {"resize": "pad"}),
        ("convnext", ["pooler"], {"resize": "crop"}), ("siglip", ["pooler", "norm:mean@-2"], {"resize": "squash"}),
        ("mobilenetv2", ["mean"], {}),
    ],
)  # fmt: skip
def test_cached_features_are_those_of_the_network(
    models: Callable[[str], Path], tmp_path: Path, kind: str, poolings: list[str], options: dict[str, Any]
) -> None:
    """Bit for bit at canonical shapes, within the derived tolerance of plain Pillow, transformers and torch."""
    cache = made(tmp_path / "c", models(kind), pooling=poolings, **options)
    result = checked(cache, reference="both", head="mlp")
    assert result.equal, result.to_text()
    assert {row.reference for row in result.comparisons} >= {"canonical", "standard"}


def test_patches_for_an_attention_head(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Without the class and register tokens, in the cache as in training end to end."""
    cache = made(tmp_path / "c", models("registers"), pooling=["tokens"])
    result = checked(cache, reference="both", head="attention-pooling")
    assert result.equal, result.to_text()


def test_odd_files_are_prepared_as_anyone_careful_would(models: Callable[[str], Path], tmp_path: Path) -> None:
    contents = [*PICTURES, turned(90), turned(91)]
    assert checked(made(tmp_path / "c", models("vit"), contents), contents, reference="standard").equal


# Planted faults.


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"resample": 0}, "resized with another filter (nearest)"),
        (
            {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
            "normalised with other constants (ImageNet's)",
        ),
        ({"do_normalize": False}, "normalised with other constants (none)"),
    ],
)
def test_another_processor_under_the_same_name(
    models: Callable[[str], Path], tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    """In the folder it is told by its settings; in a cache that lies about it, by what it does."""
    honest, other = made(tmp_path / "honest", models("vit")), Path(shutil.copytree(models("vit"), tmp_path / "other"))
    tiny_pictures.save_processor(other, "ViTImageProcessor", **tiny_pictures.PLAIN, **changed)
    finds(checked(honest, model=other), "processor: images are resized, cropped or normalised with other settings")
    lying = forged(tmp_path / "lying", made(tmp_path / "made", other), honest)
    finds(checked(lying), "24 of 24 rows differ", f"the cache holds the features of images {said}")


def test_channels_in_another_order(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(content: bytes, _: object) -> Any:
        red, green, blue = decode(content).split()
        return Image.merge("RGB", (blue, green, red))

    decode = preparing.decode
    monkeypatch.setattr(preparing, "decode", swapped)
    cache = made(tmp_path / "c", models("vit"))
    monkeypatch.setattr(preparing, "decode", decode)
    finds(checked(cache), "the cache holds the features of images with channels in another order")


def test_pictures_that_were_not_turned(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only those with EXIF differ, and what they lack is said."""
    contents = [*PICTURES, *map(turned, range(90, 96))]
    decode = preparing.decode
    monkeypatch.setattr(preparing, "decode", lambda content, _: Image.open(io.BytesIO(content)).convert("RGB"))
    cache = made(tmp_path / "c", models("vit"), contents)
    monkeypatch.setattr(preparing, "decode", decode)
    finds(checked(cache, contents), "6 of 30 rows differ", "images that are not turned as their EXIF says")


def test_one_pixel(models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One channel of one pixel of one picture."""

    def brighter(content: bytes, _: object) -> Any:
        image = decode(content)
        if content == PICTURES[7]:
            red, green, blue = image.getpixel((5, 5))
            image.putpixel((5, 5), (red, green, 255 - blue))
        return image

    decode = preparing.decode
    monkeypatch.setattr(preparing, "decode", brighter)
    cache = made(tmp_path / "c", models("vit"))
    monkeypatch.setattr(preparing, "decode", decode)
    finds(checked(cache, everything=True), "1 of 24 rows differ (row 7)", "all other rows agree to the bit")


def test_another_picture_under_the_same_name(models: Callable[[str], Path], tmp_path: Path) -> None:
    cache = made(tmp_path / "c", models("vit"))
    with pytest.raises(InputError, match=r"1 row of the input not in .* \(row 0 [\d,]+ bytes\).* was a row changed"):
        checked(cache, [tiny_pictures.picture(99), *PICTURES[1:]])


def test_batch_normalisation_that_drifts(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = made(tmp_path / "c", models("resnet"))

    def load(*arguments: Any, **options: Any) -> FrozenModel[Any]:
        backbone = load_backbone(*arguments, **options)
        for module in backbone.network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.train()
        return backbone

    monkeypatch.setattr(load_module, "load_backbone", load)
    finds(checked(cache), "the backbone changes while it runs", "running_mean", "batch normalisation is live")


def test_another_architecture_of_the_same_width(models: Callable[[str], Path], tmp_path: Path) -> None:
    cache = made(tmp_path / "c", models("vit"))
    lying = forged(tmp_path / "lying", made(tmp_path / "d", models("deit")), cache)
    finds(checked(lying), "another model, pooling or way of preparing images")
    assert json.loads(json.dumps(cache.spec))["preprocessing"]["size"] == [32, 32]
