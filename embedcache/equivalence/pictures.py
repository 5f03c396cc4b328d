"""Images in a check: the way anyone would prepare and run them, and the ways in which that goes wrong."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from embedcache.backbone import Backbone, FrozenModel, compute_features, compute_views
from embedcache.backbone.folder import read_json
from embedcache.backbone.pictures import Pictures, Pixels
from embedcache.backbone.processor import FILTERS
from embedcache.backbone.views import Views
from embedcache.equivalence.bits import Array
from embedcache.equivalence.standard import StandardModel, load_quietly
from embedcache.pictures import decode
from embedcache.spec import AUGMENTS, FeatureSpec, plain_name

if TYPE_CHECKING:
    from PIL import Image

# The standard reference, with no code of ours: Pillow, `AutoImageProcessor`, `AutoModel`, pooling in a few lines.


class StandardPictures(StandardModel):
    """An image processor and a frozen model as ``transformers`` loads them; of CLIP and SigLIP the vision tower."""

    def __init__(self, folder: Path, spec: Mapping[str, Any], device: str, *, trust_remote_code: bool = False) -> None:
        named = next(iter(read_json(folder / "config.json").get("architectures") or ()), "")  # type: ignore[call-overload]
        model = named if str(named).endswith("VisionModelWithProjection") else "AutoModel"
        self.processor, whole = load_quietly(folder, spec, "AutoImageProcessor", model, trust_remote_code)
        whole = whole.to(device).eval()
        self.model, self.device = getattr(whole, "vision_model", whole), device
        self.projection = getattr(whole, "visual_projection", None)
        self.resize, self.size = spec["preprocessing"]["resize"], tuple(spec["preprocessing"]["size"])
        self.pixel_range = spec["preprocessing"].get("pixel_range")
        noise = torch.rand((2, 3, *self.size), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            out = self.model(**self._moved(noise), output_hidden_states=True)
        first, last = out.hidden_states[0], out.last_hidden_state
        alike = (first[0] == first[1]).all(-1) if first.ndim == 3 and first.shape == last.shape else torch.zeros(1)
        self.special = int(alike.long().cumprod(0).sum())

    def inputs(self, contents: Sequence[bytes]) -> dict[str, Tensor]:
        """Decode and process some images: pixels [B, 3, H, W]."""
        pictures = [plain_picture(content, self.pixel_range) for content in contents]
        options = {}
        if self.resize is not None:
            pictures = [self._resized(picture) for picture in pictures]
            options = {name: False for name in ("do_resize", "do_center_crop") if getattr(self.processor, name, None)}
        return self._moved(self.processor(pictures, return_tensors="pt", **options)["pixel_values"])

    def _moved(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": pixels.to(self.device, next(self.model.parameters()).dtype)}

    def _resized(self, picture: Image.Image) -> Image.Image:
        from PIL import Image

        (height, width), method = self.size, self.processor.resample
        if self.resize == "squash":
            return picture.resize((width, height), method)
        ratios = width / picture.width, height / picture.height
        scale = max(ratios) if self.resize == "crop" else min(ratios)
        across, down = (max(1, round(side * scale)) for side in picture.size)
        left, top = (across - width) // 2, (down - height) // 2
        means = self.processor.image_mean if self.processor.do_normalize else (0.5, 0.5, 0.5)
        whole = Image.new("RGB", (width, height), tuple(round(255 * mean) for mean in means))
        whole.paste(picture.resize((across, down), method), (-left, -top))
        return whole

    def pooled(
        self, out: Any, inputs: Mapping[str, Tensor], wanted: Sequence[FeatureSpec]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Pool the outputs of one batch; every patch is real."""
        features = {feature.name: self._pool(out, feature) for feature in wanted}
        tokens = next((features[feature.name] for feature in wanted if feature.token_level), None)
        shape = (len(inputs["pixel_values"]), 1) if tokens is None else tokens.shape[:2]
        return features, torch.ones(shape, dtype=torch.bool, device=self.device)

    def _pool(self, out: Any, spec: FeatureSpec) -> Tensor:
        if spec.pooling in ("pooler", "projected"):
            vectors: Tensor = out.pooler_output.flatten(1)
            if spec.pooling == "projected" and self.projection is not None:
                vectors = self.projection(vectors)
        else:
            layers = range(len(out.hidden_states)) if spec.layers is None else spec.layers
            states = [out.last_hidden_state if layer == -1 else out.hidden_states[layer] for layer in layers]
            if spec.final_norm:
                norm: Any = [child for name, child in self.model.named_children() if "norm" in name][-1]
                states = [state if state is out.last_hidden_state else norm(state) for state in states]
            pools = [self._pool_layer(state.float(), spec.pooling) for state in states]
            vectors = torch.stack(pools, dim=1) if spec.multi_layer else pools[0]
        return F.normalize(vectors.float(), dim=-1) if spec.normalize else vectors.float()

    def _pool_layer(self, hidden: Tensor, pooling: str) -> Tensor:
        hidden = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
        patches = hidden[:, self.special :]
        by_name: dict[str, Callable[[], Tensor]] = {
            "cls": lambda: hidden[:, 0], "mean": lambda: patches.mean(1), "max": lambda: patches.amax(1),
            "states": lambda: hidden, "cls+mean": lambda: torch.cat([hidden[:, 0], patches.mean(1)], dim=-1),
        }  # fmt: skip
        return by_name[pooling]() if pooling in by_name else patches


def plain_picture(content: bytes, pixel_range: Sequence[float] | None = None) -> Image.Image:
    """Open an image as anyone careful would: turned as its EXIF says, alpha over white, scaled to 8 bits."""
    from PIL import Image, ImageOps, TiffImagePlugin

    picture: Image.Image = Image.open(io.BytesIO(content))
    try:
        turned = ImageOps.exif_transpose(picture)
    except Exception:  # whatever Pillow trips over in broken EXIF; the picture itself may be whole
        turned = picture
    if turned.mode.startswith("I;16"):
        bits = picture.tag_v2[258][0] if isinstance(picture, TiffImagePlugin.TiffImageFile) else 16
        return Image.fromarray((np.asarray(turned) >> bits - 8).astype(np.uint8)).convert("RGB")
    if turned.mode in ("F", "I") and pixel_range is not None:
        low, high = pixel_range
        share = (np.asarray(turned, np.float64) - low) / (high - low)
        return Image.fromarray(np.floor(share.clip(0, 1) * 255 + 0.5).astype(np.uint8)).convert("RGB")
    if turned.has_transparency_data:
        over = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return turned.convert("RGB")


# What goes wrong: the same backbone on images that are prepared in another way, to find the one that a cache holds.


def other_preparations(backbone: Backbone, contents: Sequence[bytes], feature: str) -> Mapping[str, Array]:
    """Return a feature set of some images, prepared in each of the usual wrong ways; nothing of other backbones."""
    if not isinstance(backbone, FrozenModel) or not isinstance(backbone.content, Pictures):
        return {}
    made = {}
    plain, view = plain_name(feature)
    if view:
        for what, changed, number in _wrong_views(backbone.content, view):
            other = copy.copy(backbone)
            other.content = changed
            made[what] = compute_views(other, contents, np.full(len(contents), number), plain).values
        return made
    for what, changed in _wrong_ways(backbone.content):
        other = copy.copy(backbone)
        other.content = changed
        made[what] = compute_features(other, contents, feature).values
    return made


def _wrong_views(pictures: Pictures, view: int) -> Iterator[tuple[str, Pictures, int]]:
    """Yield what else may stand in the place of a view, in words, and how it is made."""
    yield "that are plain, in the place of a view", pictures, 0
    for other in {view - 1, view + 1} - {0}:
        yield f"of view {other}, in the place of view {view}: another seed", pictures, other
    asked = pictures.views.augment
    for changing in AUGMENTS:  # each left out where it is asked for, and added where it is not
        augment = tuple(name for name in AUGMENTS if (name in asked) != (name == changing))
        changed = copy.copy(pictures)
        changed.views = Views(pictures.views.number, augment)
        made_by = " and ".join(augment) or "nothing"
        yield f"whose views are made by {made_by}, not by {' and '.join(asked)}", changed, view


def _wrong_ways(pictures: Pictures) -> list[tuple[str, Pictures]]:
    processor = pictures.processor
    ways: list[tuple[str, Pictures]] = [
        (
            "with channels in another order (BGR for RGB)",
            _Changed(pictures, after=lambda pixels: pixels[:, ::-1]),
        ),
        ("that are not turned as their EXIF says", _Changed(pictures, opened=_unturned)),
    ]
    for number, name in FILTERS.items():
        if number != processor.resizing.filter:
            resizing = replace(processor.resizing, settings={**processor.resizing.settings, "resample": number})
            ways.append((f"resized with another filter ({name})", _Changed(pictures, resizing=resizing)))
    ramp = (np.arange(256) * (1 / 255)).astype(np.float32)
    for name, mean, std in (
        ("none", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), ("0.5 and 0.5", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("ImageNet's", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("CLIP's", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ):  # fmt: skip
        # In the order of the plain processors, to the bit: scaled, then the mean subtracted, then divided.
        table = np.stack([(ramp - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True)])
        ways.append((f"normalised with other constants ({name})", _Changed(pictures, table=table)))
    return ways


def _unturned(content: bytes) -> Image.Image:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as opened:
        picture: Image.Image = opened.convert("RGB")
    return picture


class _Changed(Pictures):
    """The same content, one step of its preparation changed."""

    def __init__(
        self, pictures: Pictures, *, opened: Callable[[bytes], Image.Image] | None = None,
        after: Callable[[Array], Array] = lambda pixels: pixels, table: Array | None = None, resizing: Any = None,
    ) -> None:  # fmt: skip
        vars(self).update(vars(pictures))
        self._opened, self._after = opened or partial(decode, pixel_range=pictures.pixel_range), after
        self.processor = copy.copy(pictures.processor)
        if table is not None:
            self.processor.table = table
        self.processor.resizing = resizing or self.processor.resizing

    def prepare(self, contents: Sequence[bytes]) -> Pixels:
        pixels = np.stack([self.processor(self._opened(content)) for content in contents])
        return Pixels(np.ascontiguousarray(self._after(pixels)), self.patches)
