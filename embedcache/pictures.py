"""The one rule of decoding: an image file's bytes -> RGB pixels. ``FORMAT.md`` states it; ``DECODING`` numbers it.

The size is read from the header before anything is decoded. Of several frames the first counts. The EXIF orientation is
applied; a broken one is ignored. 16-bit grey keeps its upper byte; floating-point and 32-bit integer pixels, which have
no range of their own, are refused. Whatever has transparency is laid over white. The result is RGB.
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import threading
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
_ORIENTATION = 0x0112
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
_PREFIX = 16
"""Bytes of a file that its format is told by."""


def size_of(content: bytes) -> tuple[int, int]:
    """Return width and height as the header says, before the EXIF orientation.

    Raises ``PictureError`` for what is no picture or has more than 64 megapixels, ``MissingExtraError`` without Pillow.
    """
    with _explained(), _opened(content) as picture:
        return picture.width, picture.height


def decode(content: bytes) -> Image.Image:
    """Return an image file as a picture of mode RGB, by the rule that this module states.

    Raises ``PictureError`` with a short reason for what cannot be decoded whole, ``MissingExtraError`` without Pillow.
    """
    with _explained(), _opened(content) as picture:
        picture.load()
        return _rgb(_upright(picture))


def canonical(value: object) -> bytes:
    """Return the content of a row: bytes as they are, pixels as a binary PPM of RGB, which no library version changes.

    ``value`` is the bytes of an image file, a PIL image, or an array of uint8 [H, W], [H, W, 3] or [H, W, 4].
    Raises ``PictureError`` for anything else.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    with _explained():
        picture = _rgb(_upright(_from_pixels(value)))
        return b"P6\n%d %d\n255\n" % picture.size + picture.tobytes()


def thumbnail(content: bytes, side: int) -> bytes:
    """Return a picture in at most ``side`` x ``side`` pixels, as a PNG. Raises what ``decode`` does."""
    picture = decode(content)
    picture.thumbnail((side, side))
    file = io.BytesIO()
    # Made anew, as the file's own comments and colour profile need no room on a page.
    _from_bytes(picture).save(file, "PNG")
    return file.getvalue()


def _from_bytes(picture: Image.Image) -> Image.Image:
    from PIL import Image

    return Image.frombytes("RGB", picture.size, picture.tobytes())


def _from_pixels(value: object) -> Image.Image:
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
    if value.dtype != np.uint8 or not (value.ndim == 2 or (value.ndim == 3 and shape[2] in (3, 4))) or 0 in shape:
        raise PictureError(
            f"is an array of {value.dtype} of shape {shape}: expected uint8 [height, width], [height, width, 3] or "
            "[height, width, 4]"
        )
    _check_size((shape[1], shape[0]))
    return Image.fromarray(np.ascontiguousarray(value))


def mapped(function: Callable[[Given], Result], values: Iterable[Given]) -> list[Result]:
    """Return ``function`` of every value, on all cores: Pillow lets go of Python's lock while it decodes.

    An interrupt does not wait for what has not begun.
    """
    share_memory_among_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(cores, "embedcache-decode")
    try:
        return list(pool.map(function, values))
    finally:
        pool.shutdown(cancel_futures=True)


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
    return found


def _opened(content: bytes) -> Any:
    """Open a file of a size that may be decoded. Only its header is read.

    ``Image.open`` does the same, but warns where we refuse, and warnings belong to the whole process.
    """
    if not content:
        raise PictureError("is empty")
    for opener, accepts in _openers():
        if accepts(content[:_PREFIX]) is True:
            picture = opener(io.BytesIO(content), "")
            _check_size(picture.size)
            return picture
    raise PictureError(f"is not a picture in a format that is read ({', '.join(_PLUGINS)})")


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


def _upright(picture: Image.Image) -> Image.Image:
    """Apply the EXIF orientation, which is read after loading, as a PNG has it behind the pixels."""
    from PIL import Image

    try:
        turn = _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # what follows a picture's pixels is no reason to lose the picture
        turn = None
    return picture if turn is None else picture.transpose(Image.Transpose[turn])


def _rgb(picture: Image.Image) -> Image.Image:
    from PIL import Image

    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        return Image.fromarray(_upper_bytes(picture)).convert("RGB")
    if picture.mode in ("F", "I"):
        kind = "floating-point" if picture.mode == "F" else "32-bit integer"
        raise PictureError(f"has {kind} pixels, whose range is not known: save it with 8 or 16 bits")
    if picture.mode in _TRANSPARENT or "transparency" in picture.info:
        with_alpha = picture.convert("RGBA")
        white = Image.new("RGB", picture.size, "white")
        white.paste(with_alpha, mask=with_alpha.getchannel("A"))
        return white
    return picture.convert("RGB")


def _upper_bytes(picture: Image.Image) -> NDArray[np.uint8]:
    import numpy as np

    return (np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8)
