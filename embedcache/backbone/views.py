"""The rule of views: other pictures that are made of one. ``FORMAT.md``, section 5.4, states it; ``VIEWS`` numbers it.

Everything that is drawn for a view comes from the row's key and the number of the view alone, so a view is the same
whenever and wherever it is made. All of it is whole numbers, and no step depends on a version of numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from embedcache.fingerprint import row_key

if TYPE_CHECKING:
    from PIL import Image

VIEWS = 1
"""The number of the rule, which is part of the identity of a cache with views."""
UNIT = 1 << 16
LEAST_AREA, LEAST_RATIO = 22938, 49152
"""Of a crop, in units: 0.35 of the picture's area, and 3/4 of its longer side."""
LEAST_FACTOR, MOST_FACTOR = 154, 358
"""Of brightness, contrast and saturation, in units of 1/256: from 0.6 to 1.4."""
_STRIP = 256


class Draws:
    """Whole numbers drawn for one view of one content: SplitMix64 (Steele, Lea and Flood 2014)."""

    def __init__(self, key: bytes, view: int) -> None:
        seed = blake2b(key + view.to_bytes(4, "little"), digest_size=8).digest()
        self._state = int.from_bytes(seed, "little")

    def below(self, count: int) -> int:
        """Return the next number, from 0 to ``count`` - 1."""
        self._state = (self._state + 0x9E3779B97F4A7C15) % 2**64
        z = self._state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return (z ^ (z >> 31)) * count >> 64


@dataclass(frozen=True)
class View:
    """What is drawn for one view of a picture of so many pixels: the box cut out, the flip, the factors of colours.

    The same is drawn whichever of it is used, so that ``crop`` cuts alike with ``flip`` and without.
    """

    box: tuple[int, int, int, int]
    flip: bool
    factors: tuple[int, int, int]

    @classmethod
    def drawn(cls, size: tuple[int, int], key: bytes, view: int) -> View:
        """Draw view ``view`` of the content with this ``key``, whose picture has this width and height."""
        draws, (width, height) = Draws(key, view), size
        area = LEAST_AREA + draws.below(UNIT - LEAST_AREA + 1)
        ratio = LEAST_RATIO + draws.below(UNIT - LEAST_RATIO + 1)
        pixels = width * height * area
        across, down = math.isqrt(pixels * ratio // UNIT**2), math.isqrt(pixels // ratio)
        if draws.below(2):
            across, down = down, across
        across, down = min(max(across, 1), width), min(max(down, 1), height)
        left, top = draws.below(width - across + 1), draws.below(height - down + 1)
        flip = bool(draws.below(2))
        brightness, contrast, saturation = (
            LEAST_FACTOR + draws.below(MOST_FACTOR - LEAST_FACTOR + 1) for _ in range(3)
        )
        return cls((left, top, left + across, top + down), flip, (brightness, contrast, saturation))


@dataclass(frozen=True)
class Views:
    """How many views of each picture there are beside the plain one, and what makes them: some of ``AUGMENTS``."""

    number: int = 0
    augment: Sequence[str] = ()

    @property
    def resizes(self) -> bool:
        """Whether a view has the network's size already."""
        return "crop" in self.augment

    def to_json(self) -> dict[str, object]:
        """Return what the spec of a view's feature set holds of it, beside the number of the view."""
        return {"rule": VIEWS, "augment": "+".join(self.augment)}

    def make(self, image: Image.Image, content: bytes, view: int, size: tuple[int, int], filter: int) -> Image.Image:
        """Make a view, 1 or up, of the decoded RGB picture of a ``content``.

        A crop is resized to width and height ``size`` by Pillow's ``filter``; without one a view is of the picture's
        own size.
        """
        from PIL import Image

        drawn = View.drawn(image.size, row_key(content), view)
        if "crop" in self.augment:
            image = image.crop(drawn.box).resize(size, filter)
        if "flip" in self.augment and drawn.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return coloured(image, *drawn.factors) if "colour" in self.augment else image


NO_VIEWS = Views()


def coloured(image: Image.Image, brightness: int, contrast: int, saturation: int) -> Image.Image:
    """Change an RGB picture's colours, in this order, by factors in units of 1/256, rounding to the nearest.

    Contrast is about the mean grey of the picture, saturation about each pixel's own grey.
    """
    from PIL import Image

    image = image.point([_byte(value * brightness) for value in range(256)] * 3)
    counts = image.convert("L").histogram()
    pixels = image.width * image.height
    mean = (2 * sum(value * count for value, count in enumerate(counts)) + pixels) // (2 * pixels)
    image = image.point([_byte(256 * mean + contrast * (value - mean)) for value in range(256)] * 3)
    values, grey = np.array(image), np.asarray(image.convert("L"))
    for top in range(0, len(values), _STRIP):  # strips, as whole numbers are four times as large as bytes
        part = slice(top, top + _STRIP)
        own = grey[part, :, None].astype(np.int32)
        values[part] = ((256 * own + saturation * (values[part] - own) + 128) >> 8).clip(0, 255)
    return Image.fromarray(values)


def _byte(value: int) -> int:
    return min(255, max(0, (value + 128) >> 8))
