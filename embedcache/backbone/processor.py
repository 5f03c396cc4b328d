"""A model's image processor: what it makes of a picture, made fast with no value changed.

A processor of Hugging Face is slow for what it does, so it is only asked what it does: when a model is loaded, its
resizing is compared with Pillow's own on pictures of several shapes, and its rescaling and normalising is read off as
one table of 3 x 256 numbers. Where either gives another value than the processor, the processor itself is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedcache.backbone.network import one_line, quiet
from embedcache.errors import BackboneError, FeatureError, MissingExtraError

if TYPE_CHECKING:
    from PIL import Image

Values = npt.NDArray[Any]
Box = tuple[int, int, int, int]

MOST_RESIZED = 16_000_000
"""Pixels that a picture may have after it was resized and before it is cropped."""
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Pillow's resampling filters, by the number under which a processor's settings have them."""
_NO_SETTINGS = (
    "_processor_class", "processor_class", "auto_map", "return_tensors", "data_format", "input_data_format", "device",
    "disable_grouping", "feature_extractor_type",
)  # fmt: skip
"""What is in a processor's settings and changes no pixel."""


@dataclass(frozen=True)
class Resizing:
    """How a picture becomes pixels of one size, by a processor's ``settings`` or by ``how`` in their place.

    ``size`` is the height and width of what the network is given.
    """

    settings: Mapping[str, Any]
    how: str | None
    size: tuple[int, int]

    @property
    def filter(self) -> int:
        """Pillow's number of the resampling filter."""
        return int(self.settings.get("resample", 2))

    @property
    def background(self) -> tuple[int, int, int]:
        """The colour on which ``pad`` puts a picture: the mean that is subtracted, so about nothing to the network."""
        means = self.settings.get("image_mean") if self.settings.get("do_normalize") else None
        red, green, blue = (round(255 * mean) for mean in (means or (0.5, 0.5, 0.5)))
        return red, green, blue

    def geometry(self, width: int, height: int) -> tuple[tuple[int, int], Box | None]:
        """Return to which width and height a picture is resized, and the box that is then cut out of it.

        A box may stand out of a picture on all sides; None is all of it. What it returns for a processor's settings is
        compared with what the processor does.
        """
        out_height, out_width = self.size
        if self.how == "squash":
            return (out_width, out_height), None
        if self.how is not None:
            across, down = out_width / width, out_height / height
            scale = max(across, down) if self.how == "crop" else min(across, down)
            resized = max(1, round(width * scale)), max(1, round(height * scale))
            return resized, _centred(resized, self.size)
        size, crop = self.settings.get("size") or {}, self.settings.get("crop_size") or {}
        resized, edge = (width, height), size.get("shortest_edge")
        if edge and "crop_pct" in self.settings:  # ConvNeXT's
            if edge >= 384:
                return (edge, edge), None
            resized = _short_side(width, height, int(edge / self.settings["crop_pct"]))
            return resized, _centred(resized, (edge, edge))
        if self.settings.get("do_resize"):
            resized = (
                _short_side(width, height, edge) if edge else (size.get("width", width), size.get("height", height))
            )
        cropped = self.settings.get("do_center_crop") and "height" in crop
        return resized, _centred(resized, (crop["height"], crop["width"])) if cropped else None

    def covers(self, width: int, height: int) -> bool:
        """Whether a resized picture is at least as large as what is cut out of it; else it stands on black."""
        (across, down), box = self.geometry(width, height)
        return box is None or (box[0] >= 0 and box[1] >= 0 and box[2] <= across and box[3] <= down)

    def shown(self, width: int, height: int) -> float:
        """Return the share of a picture of this size that the network sees."""
        (across, down), box = self.geometry(width, height)
        left, top, right, bottom = box or (0, 0, across, down)
        return (min(right, across) - max(left, 0)) * (min(bottom, down) - max(top, 0)) / (across * down)

    def resized(self, image: Image.Image) -> Values:
        """Return an RGB picture as uint8 [3, H, W], by Pillow alone.

        Raises ``FeatureError`` for a picture so long that resizing would make more of it than memory holds.
        """
        (across, down), box = self.geometry(*image.size)
        if across * down > MOST_RESIZED:
            raise FeatureError(
                f"a picture of {image.width:,} x {image.height:,} pixels would be resized to {across:,} x {down:,}: "
                f"expected at most {MOST_RESIZED:,} pixels; leave it out, or extract --resize squash"
            )
        # Leaving out what the box cuts off would save a sixth of this, and change bits: Pillow 13 resizes rows or
        # columns first, by a rule of its own, and rounds in between (seen November 2026).
        resized = image.resize((across, down), self.filter)
        if box is not None and self.how == "pad":
            from PIL import Image

            whole = Image.new("RGB", (box[2] - box[0], box[3] - box[1]), self.background)
            whole.paste(resized, (-box[0], -box[1]))
            resized = whole
        elif box is not None:
            resized = resized.crop(box)
        values: Values = np.asarray(resized).transpose(2, 0, 1)
        return values


def preprocessing_text(prepared: object) -> str | None:
    """Say in one line what is done to a picture, by the ``preprocessing`` of a spec; None where it is of no picture.

    What is read comes from a manifest, which may be a stranger's and hold anything.
    """
    if not isinstance(prepared, Mapping) or prepared.get("kind") != "image":
        return None
    try:
        settings, (height, width) = dict(prepared["processor"]), prepared["size"]
        resizing = Resizing(settings, prepared["resize"], (int(height), int(width)))
        (across, down), box = resizing.geometry(640, 480)
        how = f"of 640 x 480 resized to {across} x {down} ({FILTERS[resizing.filter]})" + (
            "" if box is None else f" on {width} x {height}" if resizing.how == "pad" else ", the centre cut out"
        )
        scaled = [
            f"{name} {', '.join(f'{float(number):.4g}' for number in settings[key])}"
            for name, key in (("mean", "image_mean"), ("std", "image_std"))
            if settings.get("do_normalize") and key in settings
        ]
        seen = f"{width} x {height}, {how}: {resizing.shown(640, 480):.0%} of it is seen"
        if "pixel_range" in prepared:
            low, high = (float(number) for number in prepared["pixel_range"])
            scaled.append(f"float and 32-bit pixels from {low:g} (black) to {high:g} (white)")
        return "; ".join([seen, *scaled])
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return "prepared in a way that is not known here"


def _short_side(width: int, height: int, edge: int) -> tuple[int, int]:
    long = int(edge * max(width, height) / min(width, height))
    return (edge, long) if width <= height else (long, edge)


def _centred(resized: tuple[int, int], size: tuple[int, int]) -> Box:
    left, top = (resized[0] - size[1]) // 2, (resized[1] - size[0]) // 2
    return left, top, left + size[1], top + size[0]


@dataclass(frozen=True)
class Steps:
    """Rescaling and normalising in three steps: divide by ``scale``, subtract ``mean`` [3], divide by ``std`` [3]."""

    scale: np.float32
    mean: Values
    std: Values

    def run(self, picture: Values, into: Values) -> None:
        """Take the steps from uint8 [3, H, W] to float32 of that shape, whichever of both has its channels last."""
        whole, last = into.transpose(1, 2, 0), picture.transpose(1, 2, 0).flags.c_contiguous
        if last and whole.flags.c_contiguous:  # rows of W x 3 numbers, as short loops over channels are slow
            rows = whole.reshape(whole.shape[0], -1)
            rows[...] = picture.transpose(1, 2, 0).reshape(rows.shape)
            parts = [(rows, np.tile(self.mean, whole.shape[1]), np.tile(self.std, whole.shape[1]))]
        else:
            into[...] = picture
            parts = list(zip(into, self.mean, self.std, strict=True))
        for values, mean, std in parts:
            np.divide(values, self.scale, out=values)
            np.subtract(values, mean, out=values)
            np.divide(values, std, out=values)


def _steps(table: Values, settings: Mapping[str, Any]) -> Steps | None:
    """Return the steps that make a table, each of its 3 x 256 numbers to the bit; None where they do not.

    They take half the time of looking numbers up.
    """
    scales = settings.get("do_normalize")
    try:
        mean, std = (np.full(3, settings[key] if scales else none, np.float32)
                     for key, none in (("image_mean", 0), ("image_std", 1)))  # fmt: skip
        steps = Steps(np.float32(1 / settings["rescale_factor"] if settings.get("do_rescale") else 1), mean, std)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return None
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(3, axis=0)
    for order in ((0, 1, 2), (1, 2, 0)):
        lying, made = (np.empty([(3, 16, 16)[axis] for axis in order], kind).transpose(np.argsort(order))
                       for kind in (np.uint8, np.float32))  # fmt: skip
        lying[...] = ramp
        with np.errstate(all="ignore"):
            steps.run(lying, made)
        if np.ascontiguousarray(made).tobytes() != table.astype(np.float32).tobytes():
            return None
    return steps


class PictureProcessor:
    """What a model's own processor makes of a picture, made as fast as it can be with no value changed.

    ``resize`` takes the place of the processor's own resizing and cropping: ``crop`` fills the network's size and cuts
    off what stands out, ``pad`` shows the whole picture on the mean colour, ``squash`` stretches it. ``table`` float32
    [3, 256] is what the processor makes of each value of a pixel, None where that is not a table.
    """

    def __init__(self, processor: Any, resize: str | None, name: str) -> None:
        self._processor, self._name = processor, name
        written: dict[str, Any] = json.loads(processor.to_json_string())
        self.settings = {key: value for key, value in written.items() if value is not None and key not in _NO_SETTINGS}
        self._no_resizing = {key: False for key in ("do_resize", "do_center_crop", "do_pad") if self.settings.get(key)}
        # EfficientNet's normalises twice where include_top says so.
        scaling = ("do_rescale", "do_normalize", "include_top")
        self._no_scaling = {key: False for key in scaling if self.settings.get(key)}
        self.resizing = Resizing(self.settings, resize, self._size(resize))
        self.table = None
        self._by_pillow = resize is not None or self._resizes_as_pillow()
        self.table = self._table()

    @property
    def table(self) -> Values | None:
        """What is made of each value of a pixel, float32 [3, 256]; None where that is not all that is done."""
        return self._values

    @table.setter
    def table(self, table: Values | None) -> None:
        self._values, self._steps = table, None if table is None else _steps(table, self.settings)

    def __call__(self, image: Image.Image) -> Values:
        """Return a decoded picture as uint8 [3, H, W], or as float32 where there is no ``table``."""
        if self.table is not None:
            return self._unscaled(image)
        if self.resizing.how is None:
            return self._run(image)
        return self._run(_picture(self.resizing.resized(image)), **self._no_resizing)

    def sized(self, image: Image.Image) -> Values:
        """Return what ``__call__`` does, of a picture that has the network's size already."""
        if self.table is None:
            return self._run(image, **self._no_resizing)
        values: Values = np.asarray(image).transpose(2, 0, 1)
        return values

    def normalized(self, pictures: Sequence[Values] | Values, out: Values | None = None) -> Values:
        """Return what ``__call__`` gave of n pictures, [n, 3, H, W], as float32 that the network is given.

        It is put in ``out`` where that is given: one picture at a time, as each then stays in the CPU's cache.
        """
        out = np.empty((len(pictures), *pictures[0].shape), np.float32) if out is None else out
        for picture, into in zip(pictures, out, strict=True):
            if self.table is None:
                into[...] = picture
            elif self._steps is not None:
                self._steps.run(picture, into)
            else:
                for channel in range(3):
                    np.take(self.table[channel], picture[channel], out=into[channel], mode="clip")
        return out

    def _unscaled(self, image: Image.Image) -> Values:
        if self._by_pillow and (self.resizing.how is not None or self.resizing.covers(*image.size)):
            return self.resizing.resized(image)
        return self._run(image, **self._no_scaling)

    def _run(self, image: Image.Image, **options: bool) -> Values:
        """Run the processor itself: uint8 or float32 [3, H, W]."""
        with one_line(self._name, "as an image model: its processor fails"):
            outputs = self._processor(image, return_tensors="np", **options)
        if not isinstance(outputs, Mapping):
            raise BackboneError(f"{self._name}: its processor makes no pixel_values of a picture: use another model")
        if beside := sorted(set(outputs) - {"pixel_values"}):
            raise BackboneError(
                f"{self._name}: its processor gives {', '.join(beside)} beside the pixels, as for pictures of any size "
                "(NaFlex): use a model whose pictures have one size"
            )
        values = np.asarray(outputs["pixel_values"])
        if values.ndim != 4 or values.shape[:2] != (1, 3):
            raise BackboneError(
                f"{self._name}: its processor makes {list(values.shape)} of a picture: expected [1, 3, height, width]"
            )
        picture: Values = values[0]
        return picture if values.dtype == np.uint8 else picture.astype(np.float32, copy=False)

    def _size(self, resize: str | None) -> tuple[int, int]:
        """Return height and width of what the network is given."""
        if resize is not None:
            size = self.settings.get("crop_size" if self.settings.get("do_center_crop") else "size") or {}
            height, width = (size.get(side) or size.get("shortest_edge") for side in ("height", "width"))
            if not height or not width:
                raise BackboneError(f"{self._name}: its processor's settings have no size to {resize} pictures to")
            return int(height), int(width)
        sizes = {self._run(noise(*shape)).shape[1:] for shape in ((97, 61), (61, 97), (83, 83))}
        if len(sizes) > 1:
            raise BackboneError(
                f"{self._name}: its processor makes pictures of several sizes, and in a batch all have one: "
                "make them alike with extract --resize crop, pad or squash"
            )
        height, width = sizes.pop()
        return int(height), int(width)

    def _samples(self) -> list[Image.Image]:
        height, width = self.resizing.size
        shapes = (
            (width + 13, height + 29),
            (2 * width + 3, height // 2 + 5),
            (width // 3 + 2, height),
            (width, height),
        )
        return [noise(*shape) for shape in shapes]

    def _resizes_as_pillow(self) -> bool:
        """Whether Pillow alone gives the very pixels that the processor does, as far as some pictures can tell."""
        for picture in self._samples():
            theirs = self._run(picture, **self._no_scaling)
            try:
                same = np.array_equal(self.resizing.resized(picture), theirs)
                if not same and self.resizing.covers(*picture.size):
                    return False
            except (KeyError, TypeError, ValueError, FeatureError):  # settings that we do not know
                return False
        return True

    def _table(self) -> Values | None:
        """Return what the processor makes of each value of a pixel; None where that is not all that it does."""
        ramp = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (3, 16, 16))
        table = self._run(_picture(ramp), **self._no_resizing)
        if table.shape != ramp.shape:
            return None
        table = np.ascontiguousarray(table.reshape(3, 256), np.float32)
        for picture in self._samples():
            pixels = self._unscaled(picture)
            if pixels.dtype != np.uint8:
                return None
            whole = self.resizing.how is None
            theirs = self._run(picture) if whole else self._run(_picture(pixels), **self._no_resizing)
            ours = np.stack([table[channel][pixels[channel]] for channel in range(3)])
            if not np.array_equal(ours, theirs):
                return None
        return table


def noise(width: int, height: int) -> Image.Image:
    """Return a picture in which no two pixels are alike, the same each time."""
    values = np.random.default_rng((width, height)).integers(0, 256, (3, height, width), dtype=np.uint8)
    return _picture(values)


def _picture(values: Values) -> Image.Image:
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(values.transpose(1, 2, 0)))


def load_processor(folder: Path, name: str, resize: str | None, trust: bool) -> PictureProcessor:
    """Load a folder's image processor, always the one that uses Pillow.

    Raises ``BackboneError`` where there is only another, whose pixels differ and depend on what is installed.
    """
    import transformers

    try:
        import PIL  # noqa: F401
    except ImportError:
        raise MissingExtraError("a backbone of images", "pillow", "vision") from None
    newer = int(transformers.__version__.split(".")[0]) >= 5
    options: dict[str, Any] = {"backend": "pil"} if newer else {"use_fast": False}
    try:
        with quiet(), one_line(name, "as an image processor"):
            loader: Any = transformers.AutoImageProcessor
            processor = loader.from_pretrained(folder, trust_remote_code=trust, **options)
    except BackboneError as error:
        if "torchvision" in str(error).lower():
            raise BackboneError(_TORCHVISION.format(name=name)) from error
        raise
    if getattr(processor, "backend", "pil") != "pil" or type(processor).__name__.endswith("Fast"):
        raise BackboneError(_TORCHVISION.format(name=name))
    return PictureProcessor(processor, resize, name)


_TORCHVISION = (
    "{name}: its image processor needs torchvision, whose pixels differ from Pillow's and from version to version: "
    "use a model whose processor works with Pillow"
)
