"""The one rule of decoding: every kind of picture becomes the RGB pixels that the rule says, or one short reason."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image, ImageFile

from embedcache import pictures
from embedcache.errors import MissingExtraError, PictureError
from embedcache.pictures import canonical, decode, size_of

Pixels = NDArray[Any]

RNG = np.random.default_rng(7)
RGB = RNG.integers(0, 256, (5, 7, 3), np.uint8)
WRITTEN = set(Image.registered_extensions().values())
"""The formats that this Pillow writes: AVIF is younger than the oldest that is supported."""
GREY = RNG.integers(0, 256, (5, 7), np.uint8)


def saved(picture: Image.Image | Pixels, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(file, format, **options)
    return file.getvalue()


def pixels(content: bytes) -> Pixels:
    picture = decode(content)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def grey(values: Pixels) -> Pixels:
    return np.repeat(values[:, :, None], 3, axis=2)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_formats_without_loss(format: str) -> None:
    content = saved(RGB, format)
    assert size_of(content) == (7, 5)
    np.testing.assert_array_equal(pixels(content), RGB)


@pytest.mark.parametrize(
    ("format", "options"), [("WEBP", {"lossless": True}), ("JPEG2000", {"irreversible": False}), ("GIF", {})]
)
def test_other_formats(format: str, options: dict[str, Any]) -> None:
    flat = np.full((17, 19, 3), (11, 130, 240), np.uint8)
    np.testing.assert_array_equal(pixels(saved(flat, format, **options)), flat)


def test_lossy_formats_are_near() -> None:
    flat = np.full((17, 19, 3), (11, 130, 240), np.uint8)
    for format in ("JPEG", "AVIF") if "AVIF" in WRITTEN else ("JPEG",):
        assert np.abs(pixels(saved(flat, format)).astype(int) - flat).max() <= 3


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_eight_orientations(orientation: int, format: str) -> None:
    """What is stored is what each orientation, as the EXIF specification defines it, turns upright."""
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16] = (240, 10, 10)
    upright[:16, 32:] = (10, 240, 10)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),  # anticlockwise: shown turned clockwise
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format, {})
    content = saved(np.ascontiguousarray(stored), format, exif=exif, **options)
    assert np.abs(pixels(content).astype(int) - upright).max() <= (3 if format == "JPEG" else 0)


def test_broken_exif_is_ignored() -> None:
    for exif in (
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0",
    ):
        np.testing.assert_array_equal(pixels(saved(RGB, "PNG", exif=exif)), RGB)


def test_sixteen_bit_grey_keeps_its_upper_byte() -> None:
    """Clipping would make nearly all of it white (Pillow#2574)."""
    deep = (GREY.astype(np.uint16) << 8) | 77
    for format in ("PNG", "TIFF", "JPEG2000"):
        np.testing.assert_array_equal(pixels(saved(deep, format)), grey(GREY), err_msg=format)
    ppm = b"P5\n7 5\n65535\n" + deep.astype(">u2").tobytes()
    np.testing.assert_array_equal(pixels(ppm), grey(GREY))
    big_endian = Image.frombytes("I;16B", (7, 5), deep.astype(">u2").tobytes())
    np.testing.assert_array_equal(pixels(saved(big_endian, "TIFF")), grey(GREY))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.linspace(0, 1, 35, dtype=np.float32).reshape(5, 7), "floating-point pixels"),
        (GREY.astype(np.int32) << 20, "32-bit integer pixels"),
    ],
)
def test_pixels_without_a_range_are_refused(values: Pixels, reason: str) -> None:
    with pytest.raises(PictureError, match=f"{reason}.*extract --pixel-range LOW HIGH"):
        decode(saved(values, "TIFF"))


def test_a_range_becomes_0_to_255() -> None:
    """Linearly, to the nearest, halves up; what is beyond is clipped. By hand: -3 is black and 7 white."""
    values = np.array([[-np.inf, -4, -3, 2, 7, 9, np.inf], [-2.99, -2.98, 0.5, 0, 6.98, 6.99, 1.23]], np.float32)
    expected = [[0, 0, 0, 128, 255, 255, 255], [0, 1, 89, 77, 254, 255, 108]]
    np.testing.assert_array_equal(np.asarray(decode(saved(values, "TIFF"), (-3, 7)))[..., 1], expected)
    whole = np.array([[-(2**31), 0, 2**30, 2**31 - 1]], np.int32)
    shown = np.asarray(decode(saved(whole, "TIFF"), (0, 2.0**31)))
    assert shown[0].tolist() == [[0] * 3, [0] * 3, [128] * 3, [255] * 3]
    for value in (values, Image.fromarray(values), np.dstack([values] * 3)):
        np.testing.assert_array_equal(pixels(canonical(value, (-3, 7)))[..., 2], expected)
    with pytest.raises(PictureError, match="array of float32 of shape"):
        canonical(values)
    values[1, 1] = np.nan
    with pytest.raises(PictureError, match="not numbers"):
        decode(saved(values, "TIFF"), (-3, 7))


def test_a_range_is_only_of_pixels_that_have_none() -> None:
    deep = (GREY.astype(np.uint16) << 8) | 77
    for content in (saved(RGB), saved(GREY), saved(deep), saved(deep, "TIFF"), b"P5\n7 5\n65535\n" + deep.tobytes()):
        np.testing.assert_array_equal(np.asarray(decode(content, (0.0, 1.0))), pixels(content))


def test_twelve_bits_are_scaled() -> None:
    """A TIFF by hand, two pixels of 12 bits in three bytes; it was dark. Turned, as tags are lost on the way."""
    twelve = [[0x000, 0x7F0, 0x80F, 0xFFF], [0x010, 0xFEF, 0x123, 0xABC]]
    data = b"".join(
        bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255])
        for row in twelve
        for a, b in zip(row[::2], row[1::2], strict=True)
    )
    for turn, expected in ((1, [[0x00, 0x7F, 0x80, 0xFF], [0x01, 0xFE, 0x12, 0xAB]]),
                           (3, [[0xAB, 0x12, 0xFE, 0x01], [0xFF, 0x80, 0x7F, 0x00]])):  # fmt: skip
        entries = [
            (256, 4),
            (257, 2),
            (258, 12),
            (259, 1),
            (262, 1),
            (273, 8),
            (274, turn),
            (277, 1),
            (278, 2),
            (279, 12),
        ]
        table = struct.pack("<H", len(entries)) + b"".join(
            struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries
        )
        content = struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + table + bytes(4)
        np.testing.assert_array_equal(pixels(content), grey(np.array(expected)))


def test_libraries_print_nothing_of_broken_files(capfd: pytest.CaptureFixture[str]) -> None:
    """libtiff has a handler of its own for that, which knows nothing of Python's stderr."""
    grain = RNG.integers(0, 256, (41, 43, 3), np.uint8)
    content = bytearray(saved(grain, "TIFF", compression="tiff_adobe_deflate"))
    content[2000:2040] = bytes(40)
    with pytest.raises(PictureError, match="broken picture"):
        decode(bytes(content))
    assert capfd.readouterr() == ("", "")


def test_webp_over_the_limit_is_told_by_its_header() -> None:
    for chunk in (
        b"VP8L\0\0\0\0/" + struct.pack("<I", 16382 | 16382 << 14) + bytes(9),
        b"VP8X\0\0\0\0" + bytes(4) + b"\xfe\x3f\0\xfe\x3f\0" + bytes(4),
        b"VP8 \0\0\0\0\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383) + bytes(4),
    ):
        with pytest.raises(
            PictureError, match=r"^is 16,383 x 16,383 pixels, more than 64 megapixels: make it smaller$"
        ):
            decode(b"RIFF\0\0\0\0WEBP" + chunk)


def over_white(colours: Pixels, alpha: Pixels) -> Pixels:
    share = alpha[:, :, None].astype(float) / 255
    return np.floor(colours * share + 255 * (1 - share) + 0.5)


def test_alpha_is_laid_over_white() -> None:
    alpha = RNG.integers(0, 256, (5, 7), np.uint8)
    alpha[0, :2] = 0, 255
    rgba = np.dstack([RGB, alpha])
    for content in (saved(rgba), saved(rgba, "TIFF"), saved(rgba, "WEBP", lossless=True, exact=True)):
        result = pixels(content)
        assert np.abs(result - over_white(RGB, alpha)).max() <= 1
        assert result[0, 0].tolist() == [255, 255, 255]  # where nothing is to be seen, no hidden colour shows
        assert result[0, 1].tolist() == RGB[0, 1].tolist()
    with_grey = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha)])
    assert np.abs(pixels(saved(with_grey)) - over_white(grey(GREY), alpha)).max() <= 1


def test_a_palette_and_a_colour_may_be_transparent() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 90, 80, 70])
    palette.putpixel((1, 0), 1)
    assert pixels(saved(palette)).tolist() == [[[9, 8, 7], [90, 80, 70]]]
    for transparency in (0, b"\x00\xff"):
        assert pixels(saved(palette, transparency=transparency)).tolist() == [[[255, 255, 255], [90, 80, 70]]]
    assert pixels(saved(palette, "GIF", transparency=1)).tolist() == [[[9, 8, 7], [255, 255, 255]]]
    two = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    assert pixels(saved(two, transparency=(1, 2, 3))).tolist() == [[[255, 255, 255], [4, 5, 6]]]
    assert pixels(saved(np.array([[3, 4]], np.uint8), transparency=3)).tolist() == [[[255] * 3, [4] * 3]]


def test_cmyk_one_bit_and_grey() -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = pixels(saved(cmyk, "TIFF"))
    assert (red == [255, 0, 0]).all()
    assert np.abs(pixels(saved(cmyk, "JPEG", quality=100)).astype(int) - [255, 0, 0]).max() <= 3
    bits = GREY > 100
    np.testing.assert_array_equal(pixels(saved(bits)), grey(np.where(bits, 255, 0)))
    np.testing.assert_array_equal(pixels(saved(GREY)), grey(GREY))


def test_the_first_of_several_frames() -> None:
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue", "green")]
    for format in ("GIF", "TIFF", "PNG"):
        content = saved(frames[0], format, save_all=True, append_images=frames[1:])
        assert pixels(content)[1, 1].tolist() == [255, 0, 0]


LARGE = saved(RNG.integers(0, 256, (64, 64, 3), np.uint8))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "PPM"])
@pytest.mark.parametrize("share", [0.25, 0.6, 0.95])
def test_truncated_pictures_are_refused(format: str, share: float) -> None:
    whole = saved(RNG.integers(0, 256, (64, 64, 3), np.uint8), format)
    with pytest.raises(PictureError, match=r"^is (truncated|a broken picture)"):
        decode(whole[: int(len(whole) * share)])
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"a text, which is no picture\n", "is not a picture in a format that is read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a picture in a format that is read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "is not a picture in a format that is read"),
        (b"P6 is how this text begins", "is a broken picture"),
        (b"\xff\xd8\xff", "is a broken picture"),
        (LARGE[:20], "is (truncated|a broken picture)"),
    ],
)
def test_what_is_no_picture_is_one_reason(content: bytes, reason: str) -> None:
    for function in (decode, size_of):
        with pytest.raises(PictureError, match=reason) as caught:
            function(content)
        assert "\n" not in str(caught.value)


def bomb(width: int, height: int) -> bytes:
    """A PNG that says how large it is and holds nothing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"
    )


def test_a_bomb_is_refused_by_its_header() -> None:
    for width, height in ((32767, 40000), (8001, 8000), (1 << 20, 1 << 20)):
        for function in (decode, size_of):
            with pytest.raises(PictureError, match=f"is {width:,} x {height:,} pixels, more than 64 megapixels"):
                function(bomb(width, height))
    assert size_of(bomb(8000, 8000)) == (8000, 8000)


def test_a_sliver_is_refused_by_its_header() -> None:
    """Resized by its short side it would become an image of gigabytes."""
    for width, height in ((32767, 1), (1, 65), (129, 2)):
        with pytest.raises(PictureError, match=f"is {width:,} x {height:,} pixels, more than 64 times as long"):
            size_of(bomb(width, height))
    assert size_of(bomb(64, 1)) == (64, 1)


def reason_or_mode(content: bytes) -> str:
    """The first word of the reason why a file cannot be decoded, else the mode of the picture."""
    try:
        return decode(content).mode
    except PictureError as error:
        reason = str(error)
    return "a break" if "\n" in reason else reason.split()[0]


@given(
    content=st.binary(max_size=64),
    start=st.sampled_from([LARGE[:29], saved(RGB, "GIF")[:12], saved(RGB, "BMP")[:20], b""]),
)
def test_whatever_the_bytes_are_there_is_one_reason(content: bytes, start: bytes) -> None:
    assert reason_or_mode(start + content) in ("is", "has", "RGB")


@given(place=st.integers(0, len(LARGE) - 1), value=st.integers(0, 255))
def test_a_damaged_byte_is_a_picture_or_one_reason(place: int, value: int) -> None:
    damaged = bytearray(LARGE)
    damaged[place] = value
    assert reason_or_mode(bytes(damaged)) in ("is", "has", "RGB")


# Contents of rows that are not files.


def test_the_bytes_of_a_file_stay_as_they_are() -> None:
    assert canonical(b"anything") == canonical(bytearray(b"anything")) == canonical(memoryview(b"anything"))


def test_pixels_become_a_ppm() -> None:
    small = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    golden = b"P6\n2 1\n255\n\x01\x02\x03\x04\x05\x06"
    assert canonical(small) == canonical(Image.fromarray(small)) == golden
    assert canonical(small[:, ::-1]) == b"P6\n2 1\n255\n\x04\x05\x06\x01\x02\x03"
    assert canonical(np.array([[9], [8]], np.uint8)) == b"P6\n1 2\n255\n\x09\x09\x09\x08\x08\x08"
    assert canonical(np.array([[[1, 2, 3, 0], [4, 5, 6, 255]]], np.uint8)) == b"P6\n2 1\n255\n\xff\xff\xff\x04\x05\x06"


@given(values=arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 7), st.just(3))))
def test_a_ppm_is_decoded_to_the_same_pixels(values: Pixels) -> None:
    np.testing.assert_array_equal(pixels(canonical(values)), values)


def test_a_pil_image_follows_the_same_rule() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for content in (saved(RGB, exif=exif), saved(RGB, "JPEG", exif=exif), saved(np.dstack([RGB, GREY])), saved(GREY)):
        assert decode(canonical(Image.open(io.BytesIO(content)))).tobytes() == decode(content).tobytes()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (RGB.astype(np.float32), "is an array of float32 of shape .*: expected uint8"),
        (RGB.transpose(2, 0, 1)[:, :, :2], "is an array of uint8 of shape .*expected"),
        (np.zeros((0, 3, 3), np.uint8), "is an array of uint8"),
        (GREY[0], "is an array of uint8"),
        ("a.png", "is of type str"),
        (Image.new("F", (3, 2)), "floating-point"),
        (Image.open(io.BytesIO(LARGE[: len(LARGE) // 2])), "is truncated"),
        (np.broadcast_to(np.uint8(0), (8001, 8000)), "more than 64 megapixels"),
    ],
)
def test_other_values_are_refused(value: object, reason: str) -> None:
    with pytest.raises(PictureError, match=reason):
        canonical(value)


def test_a_missing_pillow_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    pictures._openers.cache_clear()
    for function in (decode, size_of, canonical):
        with pytest.raises(MissingExtraError, match=r"pip install 'embedcache\[vision\]'"):
            function(GREY if function is canonical else LARGE)  # type: ignore[operator]
