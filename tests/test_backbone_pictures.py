"""Backbones of images: the features of the plain network on what its plain processor makes, to the bit."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_pictures
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from embedcache.backbone import Backbone, FrozenModel, compute, compute_features, load_backbone, probe_of
from embedcache.backbone import load as loading
from embedcache.backbone import pictures as preparing
from embedcache.backbone.processor import Resizing, load_processor, preprocessing_text
from embedcache.batching import Batch
from embedcache.cache import FeatureCache
from embedcache.cli.caches import describe_text
from embedcache.errors import (
    BackboneError,
    FeatureError,
    MissingExtraError,
    PoolingUnavailableError,
    SpecError,
    SpecMismatchError,
)
from embedcache.extract import Here, extract, forecast, run
from embedcache.extract import windows as cutting
from embedcache.extract.work import Proof
from embedcache.fingerprint import differences, row_key
from embedcache.numerics import Probe, difference
from embedcache.pictures import decode
from embedcache.spec import ExtractionSpec, FeatureSpec

ROWS = 32
PICTURES = tiny_pictures.pictures(7)
BY_SHAPE = {
    "cls": ("cls", "mean", "cls+mean", "max", "tokens"), "patches": ("mean", "max", "tokens"),
    "map": ("mean", "max", "tokens"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the folder of a tiny image model, built once. Tests that change a folder copy it."""
    root = tmp_path_factory.mktemp("pictures")

    def folder(kind: str) -> Path:
        return root / kind if (root / kind).is_dir() else tiny_pictures.build(kind, root / kind)

    return folder


@pytest.fixture
def vit(model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny ViT that a test may change."""
    return Path(shutil.copytree(model("vit"), tmp_path / "vit"))


def plain(folder: Path, contents: list[bytes] = PICTURES) -> tuple[torch.nn.Module, Any]:
    """The network as transformers loads it and its outputs on what its processor makes, in one batch of 32 rows."""
    loader: Any = transformers.AutoImageProcessor
    processor = loader.from_pretrained(folder, backend="pil")
    pixels = processor([decode(content) for content in contents], return_tensors="pt")["pixel_values"]
    batch = torch.zeros(ROWS, *pixels.shape[1:])
    batch[: len(contents)] = pixels
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    whole = getattr(transformers, architecture).from_pretrained(folder).eval()
    network = getattr(whole, "vision_model", whole)
    with torch.inference_mode():
        if network(pixel_values=batch[:2]).last_hidden_state.ndim == 4:
            network, batch = network.to(memory_format=torch.channels_last), batch.to(memory_format=torch.channels_last)
        return whole, network(pixel_values=batch, output_hidden_states=True)


def rows_of(hidden: torch.Tensor, special: int) -> torch.Tensor:
    """Hidden states [B, T, D] of the patches, of as many pictures as there are."""
    hidden = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
    return hidden[: len(PICTURES), special:]


def test_pictures_are_extracted_as_the_plain_network_gives_them(model: Callable[[str], Path], tmp_path: Path) -> None:
    """A folder of a model, rows of pictures, a cache: the first way through the house."""
    for kind, pooling in (("vit", "cls"), ("resnet", "pooler")):
        _, outputs = plain(model(kind))
        cache = extract(
            tiny_pictures.examples_of(PICTURES), output_dir=tmp_path / kind, model=model(kind), device="cpu"
        )
        expected = outputs.last_hidden_state[:, 0] if pooling == "cls" else outputs.pooler_output.flatten(1)
        assert cache.features(None, pooling)[:].tobytes() == expected[: len(PICTURES)].numpy().tobytes()
        assert cache.spec["preprocessing"]["kind"] == "image"


@pytest.mark.parametrize("kind", tiny_pictures.FAMILIES)
def test_every_family_pools_its_own_hidden_states(model: Callable[[str], Path], kind: str) -> None:
    """Found by what two pictures share: class tokens, DeiT's two, registers; none where there are none."""
    folder, shape = model(kind), tiny_pictures.FAMILIES[kind][-1]
    special = {"cls": 1, "patches": 0, "map": 0}[shape] + {"deit": 1, "registers": 3}.get(kind, 0)
    whole, outputs = plain(folder)
    extra = ("pooler", "projected") if kind.startswith("clip") else ("pooler",)
    backbone = load_backbone(
        folder, features=(*BY_SHAPE[shape], *extra, "mean@0", "l2:max@1"), device="cpu", content="image"
    )
    assert backbone.poolings == tuple(
        name for name in ("cls", "mean", "cls+mean", "max", "pooler", "projected", "tokens", "states")
        if name in BY_SHAPE[shape] or name in (*extra, "states")
    )  # fmt: skip
    pixels = backbone.prepare(PICTURES)
    inputs = backbone.lay_out(pixels, Batch(1, ROWS, np.arange(len(PICTURES))))
    assert inputs.skip == special
    final = rows_of(outputs.last_hidden_state, special)
    middle = rows_of(outputs.hidden_states[1], special if shape == "cls" else 0).amax(1)
    expected = {
        "mean": final.mean(1), "max": final.amax(1), "mean@0": rows_of(outputs.hidden_states[0], special).mean(1),
        "l2:max@1": middle / middle.norm(dim=-1, keepdim=True), "tokens": final.flatten(0, 1),
        "pooler": outputs.pooler_output.flatten(1)[: len(PICTURES)],
    }  # fmt: skip
    if shape == "cls":
        expected["cls"] = outputs.last_hidden_state[: len(PICTURES), 0]
        expected["cls+mean"] = torch.cat([expected["cls"], expected["mean"]], dim=1)
    if "projected" in extra:
        with torch.inference_mode():
            expected["projected"] = whole.visual_projection(outputs.pooler_output)[: len(PICTURES)]
    for name, vectors in expected.items():
        values = compute_features(backbone, PICTURES, name).values
        exact = name in ("cls", "max", "tokens", "pooler", "projected")
        np.testing.assert_allclose(values, vectors, rtol=0, atol=0 if exact else 1e-5, err_msg=name)
    widths = {each.name: each.dim for each in backbone.feature_sets}
    assert widths["mean@0"] == rows_of(outputs.hidden_states[0], 0).shape[-1]


@pytest.mark.parametrize("kind", ["vit", "dinov2", "registers"])
def test_earlier_layers_go_through_the_last_norm_where_that_is_asked_for(
    model: Callable[[str], Path], kind: str
) -> None:
    whole, outputs = plain(model(kind))
    names = ("norm:cls+mean@-2..-1", "norm:max@1", "norm:tokens@0", "max@1")
    backbone = load_backbone(model(kind), features=names, device="cpu", content="image")
    skip = 4 if kind == "registers" else 1
    with torch.inference_mode():
        first, second = (whole.layernorm(outputs.hidden_states[layer]) for layer in (0, -2))
        final = outputs.last_hidden_state
        blocks = [
            torch.cat([hidden[: len(PICTURES), 0], rows_of(hidden, skip).mean(1)], dim=1) for hidden in (second, final)
        ]
        normed = whole.layernorm(outputs.hidden_states[1])
    expected = {
        names[0].replace("..", "+"): torch.stack(blocks, dim=1), "norm:max@1": rows_of(normed, skip).amax(1),
        "norm:tokens@0": rows_of(first, skip).flatten(0, 1),
    }  # fmt: skip
    for name, vectors in expected.items():
        values = compute_features(backbone, PICTURES, name).values
        np.testing.assert_allclose(values, vectors, rtol=0, atol=1e-5, err_msg=name)
    plain_values = compute_features(backbone, PICTURES, "max@1").values
    assert np.abs(plain_values - expected["norm:max@1"].numpy()).max() > 1e-3
    # As transformers 4.56 has it of DINOv3: the last of the hidden states is behind the norm already.
    tied = SimpleNamespace(last_hidden_state=final, hidden_states=(*outputs.hidden_states[:-1], final))
    assert backbone._hidden_of(FeatureSpec.parse("norm:max@all"), tied, len(tied.hidden_states) - 1) is final
    assert backbone.identity["features"]["norm:max@1"]["final_norm"] is True  # type: ignore[index]
    assert "final_norm" not in backbone.identity["features"]["max@1"]  # type: ignore[index]


def test_a_network_without_a_last_norm_is_said_to_have_none(model: Callable[[str], Path]) -> None:
    for kind in ("clip", "resnet"):
        refused(model(kind), "that end in a layer norm, and", PoolingUnavailableError, features=["norm:mean@-2"])
    message = r"have 6 numbers a vector, and its last norm takes 12: leave norm: out"
    refused(model("swin"), message, PoolingUnavailableError, features=["norm:mean@0"])
    for name in ("norm:mean", "norm:states@-2"):
        refused(model("vit"), "leave norm: out", SpecError, features=[name])


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        ("clip", "pooler"), ("clip-projected", "pooler"), ("tower", "pooler"), ("beit", "pooler"), ("vit", "cls"),
        ("dinov2", "cls"), ("registers", "cls"), ("deit", "cls"), ("siglip", "pooler"), ("resnet", "pooler"),
    ],
)  # fmt: skip
def test_auto_is_the_vector_that_a_family_was_trained_to_give(
    model: Callable[[str], Path], kind: str, auto: str
) -> None:
    """CLIP's class token is normed once more behind the last layer, in each of its folders; as it is it means less."""
    assert [spec.pooling for spec in load_backbone(model(kind), device="cpu", content="image").specs] == [auto]


# Bits do not depend on anything but the picture.


SETS = ("mean", "mean@1", "tokens")
MANY = tiny_pictures.pictures(17)
WHOLE: dict[str, dict[bytes, bytes]] = {}
LOADED: dict[str, FrozenModel[Any]] = {}


def bits(cache: FeatureCache) -> dict[bytes, bytes]:
    """Key -> all features of the row."""
    ragged = cache.ragged(None, "tokens")
    return {
        bytes(key): ragged.values[ragged.offsets[row] : ragged.offsets[row + 1]].tobytes()
        + b"".join(cache.features(None, name)[row].tobytes() for name in SETS[:2])
        for row, key in enumerate(cache.keys())
    }


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@settings(max_examples=7)
@given(data=st.data())
def test_a_picture_is_computed_alike_in_every_run(
    tmp_path_factory: pytest.TempPathFactory, model: Callable[[str], Path], kind: str, data: st.DataObject
) -> None:
    """Permuted, a subset, in two sittings, in other shards, with other threads: bit for bit the same features."""
    if kind not in LOADED:
        LOADED[kind] = load_backbone(model(kind), features=SETS, device="cpu", positions=3)
    backbone, folder = LOADED[kind], tmp_path_factory.mktemp("run")
    if kind not in WHOLE:
        WHOLE[kind] = bits(extract(tiny_pictures.examples_of(MANY), output_dir=folder / "whole", backbone=backbone))
    order = data.draw(st.permutations(MANY))
    count = data.draw(st.integers(1, len(MANY)))
    first = data.draw(st.integers(1, count))
    for upto in (first, count):
        cache = extract(
            tiny_pictures.examples_of(order[:upto]), output_dir=folder / "c", backbone=backbone,
            rows_per_shard=data.draw(st.integers(1, 11)), threads=data.draw(st.sampled_from([1, 2])),
        )  # fmt: skip
    assert bits(cache) == {key: WHOLE[kind][key] for key in map(row_key, order[:count])}


def test_batches_on_a_cpu_have_sixteen_pictures_where_nothing_is_left_over(
    model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Where layers give so many values of each that none of a batch are left over; a picture's place changes no bit."""
    for width in (14, 13):
        sizes = {"embedding_size": 7, "hidden_sizes": [11, width], "depths": [1, 1], "layer_type": "basic"}
        network = transformers.ResNetModel(transformers.ResNetConfig(**sizes))
        network.save_pretrained(tmp_path / str(width))
        tiny_pictures.save_processor(tmp_path / str(width), "ConvNextImageProcessor", **tiny_pictures.SHORT)
    siglip = model("siglip")
    for folder, expected in ((tmp_path / "14", 16), (tmp_path / "13", 32), (model("vit"), 32), (siglip, 32)):
        assert load_backbone(folder, device="cpu").policy.rows(1) == expected
    try:  # its pooler is 37 wide: with AVX-512 half a vector is left over of 16 pictures
        backbone = load_backbone(siglip, device="cpu", positions=16)
    except BackboneError as error:
        assert "in another place of a batch of 16: give batches a multiple of 32 pictures" in str(error)  # noqa: PT017
    else:
        pooled = compute_features(backbone, PICTURES[:1] * 16, "pooler").values
        assert (pooled == pooled[0]).all()


def test_a_second_extraction_and_a_longer_one_run_only_what_is_new(
    model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(model("vit"), device="cpu", positions=5)
    passes: list[int] = []
    forward = backbone.forward
    monkeypatch.setattr(
        backbone, "forward", lambda rows, batch: passes.append(len(batch.indices)) or forward(rows, batch)
    )
    for count, expected in ((11, 11), (11, 0), (17, 6)):
        passes.clear()
        run(tiny_pictures.examples_of(MANY[:count]), backbone, tmp_path / "c", engine=Unprobed())
        assert sum(passes) == expected


class Unprobed(Here):
    """The engine that does not run the built-in rows, whose passes would be counted."""

    def prove(self, backbone: Backbone, recorded: Probe | None = None) -> Proof:
        return Proof(None, backbone.provenance)


def test_windows_hold_so_many_pictures_as_their_pixels_allow(
    model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole batches of them where one fits; a window that is resumed is cut as it would have been."""
    backbone = load_backbone(model("vit"), device="cpu", positions=3)
    assert backbone.prepared_bytes == 3 * 32 * 32
    examples = tiny_pictures.examples_of(MANY)
    for pictures, expected in ((8, [6, 6, 5]), (2, [2] * 8 + [1]), (1000, [17])):
        monkeypatch.setattr(compute, "PREPARED_BYTES", pictures * backbone.prepared_bytes + 1)
        cut = [len(window) for window in cutting.windows(examples, np.arange(17), backbone, 1000)]
        assert cut == expected
        again = [len(window) for window in cutting.windows(examples, np.arange(cut[0], 17), backbone, 1000)]
        assert again == expected[1:]


# What the processor does.


ODD_SHAPES = [(1, 1), (3, 190), (190, 3), (31, 32), (33, 64), (64, 33), (500, 375), (41, 41)]
PROCESSORS: list[tuple[str, dict[str, Any]]] = [
    ("ViTImageProcessor", {**tiny_pictures.PLAIN, "resample": 3}),
    ("ViTImageProcessor", {"size": {"height": 29, "width": 37}, "image_mean": [0.1, 0.5, 0.7]}),
    ("ViTImageProcessor", {**tiny_pictures.PLAIN, "do_normalize": False}),
    ("ViTImageProcessor", {**tiny_pictures.PLAIN, "do_rescale": False, "do_normalize": False}),
    ("CLIPImageProcessor", tiny_pictures.CROPPED),
    ("CLIPImageProcessor", {"size": {"shortest_edge": 23}, "crop_size": {"height": 32, "width": 32}}),  # black around
    ("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": {"height": 29, "width": 31}, "resample": 1}),
    ("BitImageProcessor", tiny_pictures.CROPPED), ("DeiTImageProcessor", tiny_pictures.CROPPED),
    ("DeiTImageProcessor", {**tiny_pictures.PLAIN, "do_resize": False, "crop_size": {"height": 31, "width": 31}}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 32}, "crop_pct": 0.7}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
    ("EfficientNetImageProcessor", {**tiny_pictures.PLAIN, "rescale_offset": True}),
    ("EfficientNetImageProcessor", {**tiny_pictures.PLAIN, "include_top": True}),
    ("MobileViTImageProcessor", tiny_pictures.CROPPED),  # turns the channels round
    ("LevitImageProcessor", {"size": {"shortest_edge": 29}, "crop_size": {"height": 31, "width": 31}}),
    ("PoolFormerImageProcessor", tiny_pictures.CROPPED), ("PvtImageProcessor", tiny_pictures.PLAIN),
    ("BeitImageProcessor", {**tiny_pictures.PLAIN, "do_center_crop": True, "crop_size": {"height": 23, "width": 23}}),
    ("SiglipImageProcessor", tiny_pictures.PLAIN), ("SegformerImageProcessor", tiny_pictures.PLAIN),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), PROCESSORS)
def test_pixels_are_those_of_the_plain_processor(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """0 values differ, whichever part of the work is done without the processor."""
    tiny_pictures.save_processor(tmp_path, name, **options)
    loader: Any = transformers.AutoImageProcessor
    theirs = loader.from_pretrained(tmp_path, backend="pil")
    ours = load_processor(tmp_path, "it", None, False)
    assert ours.table is not None
    for width, height in ODD_SHAPES:
        image = decode(tiny_pictures.picture(width + height, size=(width, height)))
        expected = theirs(image, return_tensors="np")["pixel_values"]
        pixels = ours(image)
        table = [ours.table[channel][pixels[channel]] for channel in range(3)]
        np.testing.assert_array_equal([table], expected, f"{width} x {height}")
        for last in (False, True):  # where the channels stand in memory, before and after
            given = np.moveaxis(np.moveaxis(pixels, 0, -1).copy(), -1, 0) if last else pixels.copy()
            shape = (1, *pixels.shape[1:], 3) if last else (1, *pixels.shape)
            out = np.empty(shape, np.float32).transpose(0, 3, 1, 2) if last else np.empty(shape, np.float32)
            for each in (given, pixels.copy()):
                out[...] = 7
                assert ours.normalized([each], out) is out
                np.testing.assert_array_equal(out, expected, f"{width} x {height}")


def test_rescaling_in_steps_is_held_to_every_number_of_the_table(tmp_path: Path) -> None:
    """One number of 768 that the steps make otherwise, by its last bit, and they are not taken."""
    tiny_pictures.save_processor(tmp_path, "ViTImageProcessor", **tiny_pictures.PLAIN, image_std=[0.3, 0.5, 0.7])
    processor = load_processor(tmp_path, "it", None, False)
    table = processor.table
    assert table is not None
    assert processor._steps is not None
    changed = table.copy()
    changed[1, 201] = np.nextafter(changed[1, 201], np.float32(9))
    processor.table = changed
    assert processor._steps is None
    pixels = processor(decode(PICTURES[0]))
    expected = [[changed[channel][pixels[channel]] for channel in range(3)]]
    np.testing.assert_array_equal(processor.normalized([pixels]), expected)


@pytest.mark.parametrize("resize", [None, "crop"])
def test_what_is_no_table_is_left_to_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resize: str | None
) -> None:
    """A processor whose numbers depend on where a pixel is."""
    tiny_pictures.save_processor(tmp_path, "ViTImageProcessor", **tiny_pictures.PLAIN)
    kind: Any = transformers.ViTImageProcessorPil
    normalize = kind.normalize

    def slanted(self: Any, image: np.ndarray, *arguments: Any, **options: Any) -> np.ndarray:
        values = normalize(self, image, *arguments, **options)
        return values + np.arange(values.shape[-1], dtype=np.float32)

    fast = load_processor(tmp_path, "it", resize, False)
    monkeypatch.setattr(kind, "normalize", slanted)
    ours, theirs = load_processor(tmp_path, "it", resize, False), kind(**tiny_pictures.PLAIN)
    assert ours.table is None
    image = decode(tiny_pictures.picture(3, size=(47, 32)))
    whole = theirs(image, return_tensors="np")["pixel_values"]
    slant = np.arange(32, dtype=np.float32)
    expected = whole if resize is None else fast.normalized(fast(image)[None]) + slant
    np.testing.assert_array_equal(ours.normalized(ours(image)[None]), expected)


@pytest.mark.parametrize(
    ("resize", "size", "inner"),
    [
        ("squash", (64, 128), (0, 0, 32, 32)), ("crop", (64, 128), (0, 0, 32, 32)),
        ("pad", (64, 128), (8, 0, 24, 32)), ("pad", (96, 32), (0, 11, 32, 22)), ("pad", (16, 16), (0, 0, 32, 32)),
    ],
)  # fmt: skip
def test_ways_to_resize(tmp_path: Path, resize: str, size: tuple[int, int], inner: tuple[int, int, int, int]) -> None:
    """``inner`` is where the picture lies; what is around it is the mean colour."""
    tiny_pictures.save_processor(tmp_path, "CLIPImageProcessor", **tiny_pictures.CROPPED, image_mean=[0.1, 0.5, 0.7])
    processor = load_processor(tmp_path, "it", resize, False)
    image = decode(tiny_pictures.picture(5, size=size))
    left, top, right, bottom = inner
    if resize == "crop":
        expected = np.asarray(image.resize((32, 64), 3).crop((0, 16, 32, 48)))
    else:
        expected = np.full((32, 32, 3), [26, 128, 178], np.uint8)
        expected[top:bottom, left:right] = np.asarray(image.resize((right - left, bottom - top), 3))
    np.testing.assert_array_equal(processor(image), expected.transpose(2, 0, 1))
    assert processor.resizing.shown(*size) == (0.5 if resize == "crop" else 1)


@given(width=st.integers(1, 3000), height=st.integers(1, 3000), how=st.sampled_from(["crop", "pad", "squash"]))
def test_every_picture_gets_the_size_of_the_network(width: int, height: int, how: str) -> None:
    resizing = Resizing({}, how, (29, 37))
    (across, down), box = resizing.geometry(width, height)
    left, top, right, bottom = box or (0, 0, across, down)
    assert (right - left, bottom - top) == (37, 29)
    assert resizing.covers(width, height) == (how != "pad" or (across, down) == (37, 29))
    assert across == 37 or down == 29
    assert (across <= 37 and down <= 29) if how == "pad" else (across >= 37 and down >= 29)


def test_a_picture_that_resizing_would_blow_up_is_refused(tmp_path: Path) -> None:
    """By its size alone: 32,767 x 1 pixels would be made 7 million wide, and took 77 seconds and 16 GB."""
    settings = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    tiny_pictures.save_processor(tmp_path, "CLIPImageProcessor", **settings)
    image = Image.new("RGB", (32767, 1))
    with pytest.raises(FeatureError, match=r"32,767 x 1 pixels would be resized to 7,339,808 x 224: expected at most"):
        load_processor(tmp_path, "it", None, False)(image)
    assert load_processor(tmp_path, "it", "squash", False)(image).shape == (3, 224, 224)


# What cannot be done is refused in one line.


def refused(folder: Path, message: str, kind: type[Exception] = BackboneError, **options: Any) -> None:
    with pytest.raises(kind, match=message) as caught:
        load_backbone(folder, device="cpu", **options)
    assert "\n" not in str(caught.value)


def test_poolings_that_a_family_lacks_are_refused_with_those_it_has(model: Callable[[str], Path]) -> None:
    for kind, pooling, there in (
        ("swin", "cls", "mean, max, pooler, tokens, states"),
        ("resnet", "cls+mean", "mean, max, pooler, tokens, states"),
        ("vit", "last", "cls, mean, cls+mean, max, pooler, tokens, states"),
        ("siglip", "projected", "mean, max, pooler, tokens, states"),
    ):  # fmt: skip
        message = f"does not give the pooling {pooling!r}: expected one of {there}"
        refused(model(kind), re.escape(message) + "$", PoolingUnavailableError, features=[pooling])
    refused(model("clip"), "projected reads the last layer only", SpecError, features=["projected@1"])
    refused(model("swin"), "different numbers of vectors of a picture .tokens 16, tokens@0 64.",
            features=["tokens", "tokens@0"])  # fmt: skip


def test_what_is_asked_of_texts_is_not_asked_of_pictures(
    model: Callable[[str], Path], tiny: Callable[[str], Path]
) -> None:
    refused(model("vit"), "reads images, not texts, as .* name a model that reads texts", content="text")
    refused(tiny("bert"), "reads texts, not images, as .* image processor", content="image")
    refused(model("vit"), "max_length is given, and .* reads images", SpecError, max_length=7)
    refused(tiny("bert"), "resize is given, and .* reads texts", SpecError, resize="crop")
    refused(model("vit"), "resize is 'stretch': expected one of crop, pad, squash", SpecError, resize="stretch")


def test_a_model_of_texts_is_not_given_pictures(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="reads texts, not images"):
        extract(tiny_pictures.examples_of(PICTURES), output_dir=tmp_path / "c", model=tiny("bert"))


def test_processors_that_cannot_be_used(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = vit / "preprocessor_config.json"
    for written, message in (
        ({"image_processor_type": "DINOv3ViTImageProcessor"}, "image processor needs torchvision"),
        ({"image_processor_type": "DINOv3ViTImageProcessorFast"}, "image processor needs torchvision"),
        ({"image_processor_type": "Siglip2ImageProcessor"}, "gives pixel_attention_mask, spatial_shapes beside"),
        ({"image_processor_type": "NoSuchImageProcessor"}, "cannot be loaded as an image processor"),
        ({"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "do_center_crop": False},
         "makes pictures of several sizes"),
    ):  # fmt: skip
        config.write_text(json.dumps(written))
        refused(vit, message)
    backbone = load_backbone(vit, device="cpu", resize="pad")
    assert backbone.content.processor.resizing.size == (32, 32)
    monkeypatch.setitem(sys.modules, "PIL", None)
    refused(vit, r"needs the package pillow, .* run pip install 'embedcache\[vision\]'", MissingExtraError)


@pytest.mark.parametrize(
    ("kind", "lost", "pooling"),
    [
        ("vit", "pooler.", "pooler"), ("dinov2", "nothing", None), ("siglip", "vision_model.head.", "pooler"),
        ("clip", "visual_projection.", "projected"), ("clip-projected", "visual_projection.", "projected"),
    ],
)  # fmt: skip
def test_a_pooler_without_weights_is_no_pooling(
    model: Callable[[str], Path], tmp_path: Path, kind: str, lost: str, pooling: str | None
) -> None:
    """As in the folder of a classifier; transformers would make one up."""
    folder = Path(shutil.copytree(model(kind), tmp_path / "it"))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(lost)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    assert (len(kept) < len(tensors)) == (pooling is not None)
    poolings = [load_backbone(each, device="cpu", features=["mean"]).poolings for each in (model(kind), folder)]
    assert set(poolings[0]) - set(poolings[1]) == {pooling} - {None}
    if pooling:
        refused(folder, f"does not give the pooling '{pooling}'", PoolingUnavailableError, features=[pooling])


def test_a_network_that_draws_random_numbers_is_refused(tmp_path: Path) -> None:
    network = transformers.ViTMAEModel(transformers.ViTMAEConfig(**tiny_pictures.VIT))
    network.save_pretrained(tmp_path)
    tiny_pictures.save_processor(tmp_path, "ViTImageProcessor", **tiny_pictures.PLAIN)
    refused(tmp_path, "gives other features of the same picture in each pass")


def test_a_network_that_looks_at_the_rest_of_the_batch_is_refused(
    model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch normalisation that is still in training: neighbours change a picture's features."""
    load_tower = loading.load_tower

    def left_in_training(*arguments: Any) -> Any:
        network, *others = load_tower(*arguments)
        for part in network.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.train()
        return network, *others

    monkeypatch.setattr(loading, "load_tower", left_in_training)
    refused(model("resnet"), "gives other features of a picture when another stands beside it")


# What decides bits is in the identity; what a machine makes of it is in the probe.


def test_settings_are_recorded_and_load_the_same_backbone(model: Callable[[str], Path], tmp_path: Path) -> None:
    made = load_backbone(model("clip"), device="cpu", features=["projected"], resize="pad", compute_dtype="bfloat16")
    assert made.identity["preprocessing"]["decoding"] == 1
    recorded = ExtractionSpec(json.loads(json.dumps(made.identity))).settings
    assert recorded is not None
    assert (recorded.content, recorded.resize) == ("image", "pad")
    again = load_backbone(model("clip"), device="cpu", **recorded.arguments())
    assert differences(made.identity, again.identity) == []
    assert made.recipe is not None
    again = load_backbone(**made.recipe.source.arguments(), **made.recipe.settings.arguments())
    assert differences(made.identity, again.identity) == []
    examples = tiny_pictures.examples_of(PICTURES)
    cache = extract(examples, output_dir=tmp_path / "c", backbone=made)
    assert len(extract(examples, output_dir=tmp_path / "c", model=model("clip"), device="cpu").keys()) == 7
    with pytest.raises(SpecMismatchError, match=r"preprocessing\.resize: cache has 'pad', asked for 'squash'"):
        extract(examples, output_dir=cache.path, model=model("clip"), device="cpu", resize="squash")


def test_another_setting_of_the_processor_is_another_identity(vit: Path) -> None:
    before = load_backbone(vit, device="cpu").identity
    tiny_pictures.save_processor(vit, "ViTImageProcessor", **tiny_pictures.PLAIN, resample=3)
    changed = differences(before, load_backbone(vit, device="cpu").identity)
    assert changed == [("preprocessing.processor.resample", 2, 3)]


def test_another_decoder_is_noticed(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pixel of the built-in JPEG one step brighter: rows are prepared otherwise, and features move."""
    backbone = load_backbone(vit, device="cpu")
    before = probe_of(backbone)
    assert before is not None
    assert [decode(row).size for row in backbone.probe_rows] == [(45, 37), (7, 9)]
    assert {"pillow", "transformers"} < set(before.versions)

    def brighter(content: bytes, _: object) -> Any:
        image = decode(content)
        red, green, blue = image.getpixel((3, 3))
        image.putpixel((3, 3), (red ^ 1, green, blue))
        return image

    monkeypatch.setattr(preparing, "decode", brighter)
    change = difference(before, probe_of(backbone))
    assert change.status == "inputs"
    assert change.largest > 0


def test_bfloat16(model: Callable[[str], Path]) -> None:
    for kind in ("vit", "resnet"):
        exact = load_backbone(model(kind), device="cpu", features=["mean"])
        half = load_backbone(model(kind), device="cpu", features=["mean"], compute_dtype="bfloat16")
        first, second = (compute_features(backbone, PICTURES, "mean").values for backbone in (exact, half))
        assert 0 < np.abs(first - second).max() < 0.05 * np.abs(first).max()


def test_compiled_passes_give_nearly_the_same(tmp_path: Path) -> None:
    vit = tiny_pictures.build("vit", tmp_path / "vit", num_hidden_layers=1)  # each layer is compiled for itself
    eager, compiled = (load_backbone(vit, device="cpu", compiled=compiled) for compiled in (False, True))
    first, second = (compute_features(backbone, PICTURES, "cls").values for backbone in (eager, compiled))
    np.testing.assert_allclose(first, second, atol=1e-4)


def test_info_says_what_is_done_to_a_picture(model: Callable[[str], Path], tmp_path: Path) -> None:
    """Size, filter, crop with the share that it keeps, mean and standard deviation."""
    for kind, options, expected in (
        ("clip", {}, "32 x 32, of 640 x 480 resized to 54 x 41 (bicubic), the centre cut out: 46% of it is seen; mean"),
        ("clip", {"resize": "pad"}, "of 640 x 480 resized to 32 x 24 (bicubic) on 32 x 32: 100% of it is seen"),
        ("vit", {}, "of 640 x 480 resized to 32 x 32 (bilinear): 100% of it is seen; mean 0.5, 0.5, 0.5; std 0.5"),
    ):
        path = tmp_path / f"{kind}{len(options)}"
        cache = extract(
            tiny_pictures.examples_of(PICTURES), output_dir=path, model=model(kind), device="cpu", **options
        )
        assert expected in describe_text(cache.describe())


@pytest.mark.parametrize("field", ["processor", "resize", "size"])
@given(value=st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers(-1, 1), max_size=3))
def test_what_a_stranger_s_manifest_says_of_pictures_is_shown_or_not(field: str, value: object) -> None:
    prepared = {"kind": "image", "processor": {"size": {"height": 7, "width": 11}}, "resize": None, "size": [7, 11]}
    assert preprocessing_text({**prepared, field: value})
    assert preprocessing_text({"kind": "text"}) is None


def test_a_dry_run_prepares_no_more_pictures_than_a_window_holds(
    model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(model("vit"), device="cpu", positions=3)
    monkeypatch.setattr(compute, "PREPARED_BYTES", 5 * backbone.prepared_bytes)
    plan = forecast(tiny_pictures.examples_of(MANY), backbone, None)
    assert (plan.to_extract, plan.sampled, plan.tokens) == (17, 3, 17)


def test_the_first_picture_is_not_kept_waiting_by_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch waits for its own pictures; the window's others are decoded meanwhile, or not at all where it is left."""
    backbone = load_backbone(tiny_pictures.build("vit", tmp_path / "vit"), device="cpu", views=1)
    left, decoded = threading.Event(), []

    def slow(content: bytes, _: object = None) -> Image.Image:
        if content != PICTURES[0]:
            left.wait(10)
        decoded.append(content)
        return decode(content)

    monkeypatch.setattr(preparing, "decode", slow)
    prepared = backbone.prepare([PICTURES[0], *PICTURES[1:5] * 9])
    backbone.fetch(backbone.forward(prepared, Batch(1, backbone.policy.rows(1), np.arange(2))))  # it, and its view
    assert decoded == [PICTURES[0]]
    del prepared
    left.set()
    for thread in threading.enumerate():
        if thread.name.startswith("embedcache-decode"):
            thread.join(10)
    assert len(decoded) < 37
