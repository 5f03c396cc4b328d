"""What people complain about where features of pictures are made, and the test that each complaint is.

``COMPLAINTS`` is the table, to be walked again: complaint, where it was made, and tests as file and name. Those of no
other file stand here.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pictures
import torch
from PIL import Image

from embedcache.backbone import compute_features, load_backbone
from embedcache.backbone import pictures as preparing
from embedcache.errors import NumericsMismatchError
from embedcache.examples import content as reading
from embedcache.examples import load_examples
from embedcache.extract import extract
from embedcache.pictures import decode
from embedcache.spec import PixelRange

HERE = Path(__file__).parent
COMPLAINTS: dict[str, tuple[str, ...]] = {
    "another version of the decoder changes pixels (Pillow#9457, #2316, vision#8088)": (
        "backbone_pictures::test_another_decoder_is_noticed",
        "complaints::test_pixels_of_another_decoder_are_not_mixed_in",
    ),
    "fast and slow processors differ by up to .34 (transformers PR#37112, PR#34785)": (
        "complaints::test_a_fast_processor_is_read_as_the_one_of_pillow",
        "backbone_pictures::test_processors_that_cannot_be_used",
    ),
    "antialias: PIL against tensors (vision#2950, #6506)": (
        "complaints::test_a_fast_processor_is_read_as_the_one_of_pillow",
        "backbone_pictures::test_pixels_are_those_of_the_plain_processor",
    ),
    "a wrong default filter (transformers#28180, DALI#1111)": (
        "complaints::test_a_filter_that_is_not_written_down_is_recorded",
        "equivalence_pictures::test_another_processor_under_the_same_name",
    ),
    "wrong normalisation (torchgeo-bench PR#40)": (
        "backbone_pictures::test_pixels_are_those_of_the_plain_processor",
        "equivalence_pictures::test_another_processor_under_the_same_name",
    ),
    "EXIF ignored (vision#7977)": (
        "pictures::test_the_eight_orientations", "complaints::test_orientations_reach_the_features",
        "equivalence_pictures::test_pictures_that_were_not_turned",
    ),
    "16-bit clipped (Pillow#2574, #1108, #5248)": ("pictures::test_sixteen_bit_grey_keeps_its_upper_byte",),
    "alpha black (DIGITS#85)": (
        "pictures::test_alpha_is_laid_over_white", "pictures::test_a_palette_and_a_colour_may_be_transparent",
    ),
    "palettes and CMYK, Adobe's inverted too": (
        "pictures::test_cmyk_one_bit_and_grey", "complaints::test_adobe_s_cmyk_is_not_a_negative",
    ),
    "truncated, empty, bombs (autogluon#3207, yolo-scout PR#63)": (
        "pictures::test_truncated_pictures_are_refused", "pictures::test_a_bomb_is_refused_by_its_header",
        "pictures::test_a_sliver_is_refused_by_its_header", "image_input::test_a_bad_file_is_a_bad_row",
        "image_journey::test_bad_pictures_are_set_aside_on_the_way",
    ),
    "a pooler with random weights (transformers#25377)": (
        "backbone_pictures::test_a_pooler_without_weights_is_no_pooling",
    ),
    "registers in the mean (transformers#37817, dinov3#124)": (
        "backbone_pictures::test_every_family_pools_its_own_hidden_states",
        "every_vision_architecture::test_an_architecture_works_or_is_refused_in_one_line",
    ),
    "padding patches (transformers#36382)": ("backbone_pictures::test_processors_that_cannot_be_used",),
    "features depend on the batch (CLIP#198, #147, pytorch#73475)": (
        "backbone_pictures::test_a_picture_is_computed_alike_in_every_run",
        "backbone_pictures::test_a_network_that_looks_at_the_rest_of_the_batch_is_refused",
        "complaints::test_a_batch_that_leaves_pictures_over_is_tried_at_load",
    ),
    "workers leak memory (pytorch#62066)": (
        "complaints::test_memory_stays_flat_over_many_pictures",
        "image_input::test_memory_over_many_paths_stays_flat",
    ),
    "hidden, empty or numeric class folders (vision#2831, #4925)": (
        "image_input::test_class_folders_are_names", "image_input::test_what_is_no_class_and_no_picture",
    ),
    "CLIP before or after its projection (CLIP#353)": (
        "backbone_pictures::test_every_family_pools_its_own_hidden_states",
        "backbone_pictures::test_auto_is_the_vector_that_a_family_was_trained_to_give",
    ),
    "the centre crop loses content (transformers#23669)": (
        "backbone_pictures::test_info_says_what_is_done_to_a_picture", "backbone_pictures::test_ways_to_resize",
    ),
    "caching loses augmentation (dino#141, jepa#24)": (
        "views::test_every_set_has_its_views_and_no_bit_of_the_plain_ones_changes",
    ),
    "slow after one bad JPEG (DALI#2667)": ("complaints::test_a_bad_jpeg_costs_the_others_nothing",),
}  # fmt: skip


def test_the_table_names_tests_that_there_are() -> None:
    for complaint, tests in COMPLAINTS.items():
        for test in tests:
            file, name = test.split("::")
            code = (HERE / f"test_{file}.py").read_text(encoding="utf-8")
            assert re.search(rf"^def {name}\(", code, re.MULTILINE), f"{complaint}: {test}"


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pictures.build("vit", tmp_path_factory.mktemp("model") / "vit")


def saved(picture: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def test_pixels_of_another_decoder_are_not_mixed_in(vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder of JPEG that is a step off here and there: adding rows is refused, and recorded where it is allowed."""
    contents = tiny_pictures.pictures(11)
    options: dict[str, Any] = {"output_dir": tmp_path / "c", "model": vit, "device": "cpu"}
    before = extract(tiny_pictures.examples_of(contents[:7]), **options).features()[:]

    def nudged(content: bytes, pixel_range: PixelRange | None = None) -> Image.Image:
        image = decode(content, pixel_range)
        if content.startswith(b"\xff\xd8"):
            values = np.asarray(image).copy()
            values[::5, ::3, 1] ^= 1
            return Image.fromarray(values)
        return image

    monkeypatch.setattr(preparing, "decode", nudged)
    with pytest.raises(NumericsMismatchError, match="--accept-numerics") as caught:
        extract(tiny_pictures.examples_of(contents), **options)
    assert "\n" not in str(caught.value)
    mixed = extract(tiny_pictures.examples_of(contents), accept_numerics=True, **options)
    assert [kind["accepted"] for kind in mixed.numerics()] == [False, True]
    assert mixed.features()[:7].tobytes() == before.tobytes()


@pytest.mark.parametrize("name", ["ViTImageProcessorFast", "ViTImageProcessor", "ViTImageProcessorPil"])
def test_a_fast_processor_is_read_as_the_one_of_pillow(vit: Path, tmp_path: Path, name: str) -> None:
    """Whatever its folder names, pixels are Pillow's, antialiased; what tensors make without that is far off."""
    folder = Path(shutil.copytree(vit, tmp_path / "it"))
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_processor_type": name}))
    picture = tiny_pictures.picture(3, size=(97, 83))
    prepared = load_backbone(folder, device="cpu").prepare([picture]).values[0]
    image = decode(picture)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(prepared, expected)
    tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float()
    aliased = torch.nn.functional.interpolate(tensor, (32, 32), mode="bilinear")[0].numpy()
    assert np.abs(aliased - expected).max() > 10


def test_a_filter_that_is_not_written_down_is_recorded(vit: Path, tmp_path: Path) -> None:
    """The default of the processor's class counts, and a default that changes is another identity."""
    folder = Path(shutil.copytree(vit, tmp_path / "it"))
    path = folder / "preprocessor_config.json"
    written = json.loads(path.read_text())
    assert written.pop("resample") == 2
    path.write_text(json.dumps(written))
    silent, spoken = load_backbone(folder, device="cpu"), load_backbone(vit, device="cpu")
    assert silent.identity["preprocessing"] == spoken.identity["preprocessing"]
    assert silent.identity["preprocessing"]["processor"]["resample"] == 2


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientations_reach_the_features(vit: Path, tmp_path: Path, format: str) -> None:
    """Eight files that show the same: the same features, those of a lossless file to the bit."""
    upright = np.kron(np.random.default_rng(5).integers(0, 256, (3, 4, 3), np.uint8), np.ones((16, 16, 1), np.uint8))
    transposed = upright.transpose(1, 0, 2)
    stored = (
        upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1], transposed, np.rot90(upright, 1),
        upright[::-1, ::-1].transpose(1, 0, 2), np.rot90(upright, -1),
    )  # fmt: skip
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format, {})
    contents = []
    for orientation, pixels in enumerate(stored, start=1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        contents.append(saved(Image.fromarray(np.ascontiguousarray(pixels)), format, exif=exif, **options))
    assert len(set(contents)) == 8
    features = extract(
        tiny_pictures.examples_of(contents), output_dir=tmp_path / "c", model=vit, device="cpu"
    ).features()[:]
    backbone = load_backbone(vit, device="cpu")
    expected = compute_features(backbone, [saved(Image.fromarray(upright), "PNG")], "cls").values
    lying = compute_features(backbone, [saved(Image.fromarray(np.ascontiguousarray(stored[5])), "PNG")], "cls").values
    assert np.abs(lying - expected).max() > 0.3
    np.testing.assert_allclose(features, expected.repeat(8, 0), rtol=0, atol=0.1 if format == "JPEG" else 0)


def test_adobe_s_cmyk_is_not_a_negative() -> None:
    content = saved(Image.new("CMYK", (16, 16), (0, 200, 255, 30)), "JPEG", quality=100)
    assert b"Adobe" in content
    raw = Image.open(io.BytesIO(content))
    assert raw.mode == "CMYK"
    red, green, blue = np.asarray(decode(content))[8, 8].tolist()
    assert red > 200
    assert green < 70
    assert blue < 20


def test_a_batch_that_leaves_pictures_over_is_tried_at_load(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that computes the last of three pictures otherwise, as vector kernels do with what is left over."""
    from embedcache.backbone import load as loading
    from embedcache.errors import BackboneError

    load_tower = loading.load_tower

    def uneven(*arguments: Any) -> Any:
        network, *others = load_tower(*arguments)

        def last_row(module: Any, inputs: Any, output: Any) -> Any:
            if len(output.last_hidden_state) % 8 and len(output.last_hidden_state) > 2:
                output.last_hidden_state[-1, -1, -1] *= 1 + 2**-22
            return output

        network.register_forward_hook(last_row)
        return network, *others

    monkeypatch.setattr(loading, "load_tower", uneven)
    with pytest.raises(BackboneError, match=r"in another place of a batch of 3: .*multiple of 32 .*--batch-size"):
        load_backbone(vit, device="cpu", positions=3)
    assert load_backbone(vit, device="cpu", positions=32).policy.rows(1) == 32


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_stays_flat_over_many_pictures(vit: Path) -> None:
    backbone = load_backbone(vit, device="cpu")
    contents = [tiny_pictures.picture(number, "JPEG", size=(250, 250)) for number in range(24)]

    def grown(keep: Callable[[bytes], Any]) -> int:
        for _ in range(3):
            backbone.prepare(contents)
        kept, before = [], resident()
        for _ in range(8):
            backbone.prepare(contents)
            kept.extend(map(keep, contents))
        return resident() - before

    assert grown(lambda content: None) < 12 << 20
    assert grown(decode) > 24 << 20, "a planted leak of each decoded picture: 192 of 187,500 bytes"


def test_a_bad_jpeg_costs_the_others_nothing(vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is decoded once more for its features and no oftener, and the others' features keep their bits."""
    contents = [tiny_pictures.picture(number, "JPEG") for number in range(10)]
    for name in ("good", "bad"):
        for number, content in enumerate(contents):
            path = tmp_path / name / "ab"[number % 2] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content[:200] if (name, number) == ("bad", 9) else content)
    decoded: list[bytes] = []

    def counted(content: bytes, pixel_range: PixelRange | None = None) -> Image.Image:
        decoded.append(content)
        return decode(content, pixel_range)

    monkeypatch.setattr(reading.pictures, "decode", counted)
    monkeypatch.setattr(preparing, "decode", counted)
    features = {}
    for name in ("good", "bad"):
        examples = load_examples(tmp_path / name, on_bad_row="skip", quarantine=tmp_path / f"{name}.jsonl")
        assert len(decoded) == 10
        cache = extract(examples, output_dir=tmp_path / f"{name}.c", model=vit, device="cpu")
        assert sum(content in contents for content in decoded) == 20 - 2 * (name == "bad")
        features[name] = dict(zip(map(bytes, cache.keys()), map(bytes, cache.features()[:]), strict=True))
        decoded.clear()
    assert len(features["bad"]) == 9
    assert features["bad"].items() <= features["good"].items()
