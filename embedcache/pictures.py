"""The one rule of decoding: an image file's bytes -> RGB pixels. ``FORMAT.md`` states it; ``DECODING`` numbers it.

The size is read from the header before anything is decoded. Of several frames the first counts. The EXIF orientation is
applied; a broken one is ignored. Grey of 16 bits (of 12 in a TIFF) keeps its upper 8. Floating-point and 32-bit integer
pixels have no range of their own: they are refused, or a range that is given becomes 0 to 255. Whatever has
transparency is laid over white. The result is RGB.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import io
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from embedcache.errors import MissingExtraError, PictureError
from embedcache.memory import share_memory_among_threads

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

Given = TypeVar("Given")
Result = TypeVar("Result")

DECODING = 1
"""The number of the rule, which is part of a cache's identity."""
MOST_PIXELS = 64_000_000
MOST_SLENDER = 64
"""How many times as long as it is wide a picture may be. Resized by its short side, 32,767 x 1 pixels become 7 million
x 224, which took 77 seconds and 16 GB."""

# Not whatever Pillow may know: EPS runs another program on the file, others take any file for one of theirs.
_PLUGINS = {
    "JPEG": "JpegImagePlugin",
    "PNG": "PngImagePlugin",
    "WEBP": "WebPImagePlugin",
    "GIF": "GifImagePlugin",
    "BMP": "BmpImagePlugin",
    "TIFF": "TiffImagePlugin",
    "PPM": "PpmImagePlugin",
    "JPEG2000": "Jpeg2KImagePlugin",
    "AVIF": "AvifImagePlugin",
}
_ORIENTATION, _BITS = 0x0112, 0x0102
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_TRANSPARENT = ("P", "PA", "LA", "La", "RGBA", "RGBa")
_LOADING = [threading.Lock() for _ in range(31)]
_PREFIX = 32
"""Bytes of a file that its format is told by, and of WebP the size."""


def size_of(content: bytes) -> tuple[int, int]:
    """Return width and height as the header says, before the EXIF orientation.

    Raises ``PictureError`` for what is no picture or has more than 64 megapixels, ``MissingExtraError`` without Pillow.
    """
    with _explained(), _opened(content) as picture:
        return picture.width, picture.height


def decode(content: bytes, pixel_range: tuple[float, float] | None = None) -> Image.Image:
    """Return an image file as a picture of mode RGB, by the rule that this module states.

    Raises ``PictureError`` with a short reason for what cannot be decoded whole, ``MissingExtraError`` without Pillow.
    """
    with _explained(), _opened(content) as picture:
        picture.load()
        return _upright(_rgb(picture, pixel_range), picture)


def canonical(value: object, pixel_range: tuple[float, float] | None = None) -> bytes:
    """Return the content of a row: bytes as they are, pixels as a binary PPM of RGB, which no library version changes.

    ``value`` is the bytes of an image file, a PIL image, or an array of uint8 [H, W], [H, W, 3] or [H, W, 4]; with a
    range, an array [H, W] or [H, W, 3] of other numbers too.
    Raises ``PictureError`` for anything else.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    with _explained():
        given = _from_pixels(value, pixel_range)
        picture = _upright(_rgb(given, pixel_range), given)
        return b"P6\n%d %d\n255\n" % picture.size + picture.tobytes()


def thumbnail(content: bytes, side: int, pixel_range: tuple[float, float] | None = None) -> bytes:
    """Return a picture in at most ``side`` x ``side`` pixels, as a PNG. Raises what ``decode`` does."""
    picture = decode(content, pixel_range)
    picture.thumbnail((side, side))
    file = io.BytesIO()
    # Made anew, as the file's own comments and colour profile need no room on a page.
    _from_bytes(picture).save(file, "PNG")
    return file.getvalue()


def _from_bytes(picture: Image.Image) -> Image.Image:
    from PIL import Image

    return Image.frombytes("RGB", picture.size, picture.tobytes())


def _from_pixels(value: object, pixel_range: tuple[float, float] | None) -> Image.Image:
    import numpy as np
    from PIL import Image

    if isinstance(value, Image.Image):
        _check_size(value.size)
        with _LOADING[id(value) % len(_LOADING)]:  # the same object may stand in two rows, read by two threads
            value.load()
        return value
    if not isinstance(value, np.ndarray):
        raise PictureError(
            f"is of type {type(value).__name__}: expected an image file's bytes, a PIL image or an array"
        )
    shape = value.shape
    numbers = value.dtype != np.uint8 and value.dtype.kind in "iuf" and 0 not in shape
    if numbers and pixel_range is not None and (value.ndim == 2 or shape[2:] == (3,)):
        _check_size((shape[1], shape[0]))
        value = _scaled(value, pixel_range)
    if value.dtype != np.uint8 or not (value.ndim == 2 or (value.ndim == 3 and shape[2] in (3, 4))) or 0 in shape:
        raise PictureError(
            f"is an array of {value.dtype} of shape {shape}: expected uint8 [height, width], [height, width, 3] or "
            "[height, width, 4]"
        )
    _check_size((shape[1], shape[0]))
    return Image.fromarray(np.ascontiguousarray(value))


def mapped(
    function: Callable[[Given], Result], values: Iterable[Given], done: Callable[[int], object] | None = None
) -> list[Result]:
    """Return ``function`` of every value, on all cores: Pillow lets go of Python's lock while it decodes.

    ``done`` is told of each value that it is one more. An interrupt does not wait for what has not begun.
    """
    pool = _decoders()
    try:
        results = []
        for result in pool.map(function, values):
            results.append(result)
            if done is not None:
                done(1)
        return results
    finally:
        pool.shutdown(cancel_futures=True)


class Begun:
    """``function`` of every value, begun on all cores: who reads the first does not wait for the last.

    What nobody can ask for any more is not done.
    """

    def __init__(self, function: Callable[[Given], object], values: Iterable[Given]) -> None:
        pool = _decoders()
        self._done = [pool.submit(function, value) for value in values]
        pool.shutdown(wait=False)
        weakref.finalize(self, pool.shutdown, wait=False, cancel_futures=True)

    def wait(self, places: Iterable[int] | None = None) -> None:
        """Wait for the values in some places, None for all, and raise what ``function`` raised of the first."""
        for done in self._done if places is None else [self._done[place] for place in places]:
            done.result()


def _decoders() -> ThreadPoolExecutor:
    share_memory_among_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(cores, "embedcache-decode")


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what a broken file makes Pillow raise, which may be anything, into one ``PictureError``."""
    try:
        yield
    except (PictureError, MissingExtraError):
        raise
    except ImportError:
        raise MissingExtraError("reading pictures", "pillow", "vision") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, EOFError) or "truncated" in reason.lower():
            raise PictureError("is truncated") from None
        raise PictureError(f"is a broken picture ({reason[:80]})") from None


@functools.cache
def _openers() -> list[tuple[Callable[..., Any], Callable[[bytes], bool | str]]]:
    """Return, for each format that is read, what opens it and what tells it by a file's first bytes."""
    from PIL import Image

    found = []
    for name, plugin in _PLUGINS.items():
        try:
            importlib.import_module(f"PIL.{plugin}")
        except ImportError:  # AVIF is younger than the oldest Pillow that is supported
            continue
        opener, accepts = Image.OPEN[name]
        assert accepts is not None
        found.append((opener, accepts))
    _silence()
    return found


def _silence() -> None:
    """Keep libtiff and Pillow's logger from writing to stderr about broken files, of which we tell in a line.

    Pillow leaves libtiff its own handler of errors, which prints. The copy of the library that is loaded by now can be
    told to have none, for the whole process; where it is not found among what is mapped (not Linux), it goes on.
    """
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    with contextlib.suppress(OSError, AttributeError):
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
            paths = {line.split(maxsplit=5)[-1].rstrip("\n") for line in file if "libtiff" in line}
        for path in paths:
            handler = ctypes.CDLL(path).TIFFSetErrorHandler
            handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            handler(None)


def _opened(content: bytes) -> Any:
    """Open a file of a size that may be decoded. Only its header is read.

    ``Image.open`` does the same, but warns where we refuse, and warnings belong to the whole process.
    """
    if not content:
        raise PictureError("is empty")
    for opener, accepts in _openers():
        if accepts(content[:_PREFIX]) is True:
            _check_size(_webp_size(content[:_PREFIX]))  # Pillow has room for all of it made before it tells its size
            picture = opener(io.BytesIO(content), "")
            _check_size(picture.size)
            return picture
    raise PictureError(f"is not a picture in a format that is read ({', '.join(_PLUGINS)})")


def _webp_size(head: bytes) -> tuple[int, int]:
    """Return the size that the header of a WebP states (RFC 9649, 2.5 to 2.7), 1 x 1 for anything else."""
    kind, number = head[12:16] if head[8:12] == b"WEBP" else b"", functools.partial(int.from_bytes, byteorder="little")
    if kind == b"VP8X":
        return 1 + number(head[24:27]), 1 + number(head[27:30])
    if kind == b"VP8L":
        bits = number(head[21:25])
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return max(1, number(head[26:28]) & 0x3FFF), max(1, number(head[28:30]) & 0x3FFF)
    return 1, 1


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MOST_PIXELS:
        raise PictureError(
            f"is {width:,} x {height:,} pixels, more than {MOST_PIXELS // 1_000_000} megapixels: make it smaller"
        )
    if max(width, height) > MOST_SLENDER * min(width, height):
        raise PictureError(
            f"is {width:,} x {height:,} pixels, more than {MOST_SLENDER} times as long as it is wide: cut it"
        )


def _upright(picture: Image.Image, given: Image.Image) -> Image.Image:
    """Apply the EXIF orientation of ``given``, read after it is loaded, as a PNG has it behind the pixels."""
    from PIL import Image

    try:
        turn = _TURNS.get(given.getexif().get(_ORIENTATION, 1))
    except Exception:  # what follows a picture's pixels is no reason to lose the picture
        turn = None
    return picture if turn is None else picture.transpose(Image.Transpose[turn])


def _rgb(picture: Image.Image, pixel_range: tuple[float, float] | None) -> Image.Image:
    import numpy as np
    from PIL import Image

    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        return Image.fromarray(_upper_bytes(picture)).convert("RGB")
    if picture.mode in ("F", "I"):
        if pixel_range is not None:
            return Image.fromarray(_scaled(np.asarray(picture), pixel_range)).convert("RGB")
        kind = "floating-point" if picture.mode == "F" else "32-bit integer"
        raise PictureError(
            f"has {kind} pixels, whose range is not known: say which values are black and white (extract --pixel-range "
            "LOW HIGH, pixel_range=(LOW, HIGH)), or save it with 8 or 16 bits"
        )
    if picture.mode in _TRANSPARENT or "transparency" in picture.info:
        with_alpha = picture.convert("RGBA")
        white = Image.new("RGB", picture.size, "white")
        white.paste(with_alpha, mask=with_alpha.getchannel("A"))
        return white
    return picture.convert("RGB")


def _upper_bytes(picture: Image.Image) -> NDArray[np.uint8]:
    """Return the upper 8 bits of grey of 16, or of the 12 that a TIFF states; other formats scale theirs to 16."""
    import numpy as np

    bits = 12 if getattr(picture, "tag_v2", {}).get(_BITS) == (12,) else 16
    return (np.asarray(picture).clip(0, 2**bits - 1) >> bits - 8).astype(np.uint8)


def _scaled(values: NDArray[Any], pixel_range: tuple[float, float]) -> NDArray[np.uint8]:
    """Scale a range to 0 to 255, linearly and in float64, to nearest, halves up; what is beyond is clipped."""
    import numpy as np

    low, high = pixel_range
    scaled = values.astype(np.float64)
    if np.isnan(scaled).any():
        raise PictureError("has pixels that are not numbers (NaN): fill them in")
    with np.errstate(over="ignore"):
        for step, number in ((np.subtract, low), (np.divide, high - low), (np.multiply, 255), (np.add, 0.5)):
            step(scaled, number, out=scaled)
    return np.clip(scaled, 0, 255, out=scaled).astype(np.uint8)
