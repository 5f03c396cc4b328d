"""The one rule of decoding: an image file's bytes -> the picture that a backbone is given."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

DECODING = 1
"""The number of the rule, which is part of a cache's identity."""


def decode(content: bytes) -> Image.Image:
    """Return an image file's first frame in RGB."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as opened:
        image: Image.Image = opened.convert("RGB")
    return image
