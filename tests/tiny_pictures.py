"""Tiny image models of real architectures with their own processors, and pictures that no two rows share.

Widths are distinct primes times the number of heads where an architecture lets them be.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.dataset import Packed
from embedcache.examples import Examples, load_examples
from embedcache.fingerprint import row_key

SIDE = 32
VIT = {
    "hidden_size": 22, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37, "image_size": SIDE,
    "patch_size": 8,
}  # fmt: skip
STAGES = {"depths": [1, 1], "num_heads": [1, 2], "embed_dim": 6, "image_size": SIDE, "patch_size": 4, "window_size": 4}
CONVNEXT = {"hidden_sizes": [5, 7, 11, 13], "depths": [1, 1, 1, 1]}
HIERA = {
    "image_size": [SIDE, SIDE], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "patch_size": [7, 7],
    "patch_stride": [4, 4], "patch_padding": [3, 3], "masked_unit_size": [4, 4], "num_query_pool": 1,
    "query_stride": [2, 2],
}  # fmt: skip
TEXT = {
    "hidden_size": 22, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 37, "vocab_size": 67,
    "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
PLAIN: dict[str, Any] = {"size": {"height": SIDE, "width": SIDE}}
CROPPED: dict[str, Any] = {"size": {"shortest_edge": 41}, "crop_size": {"height": SIDE, "width": SIDE}}
SHORT: dict[str, Any] = {"size": {"shortest_edge": SIDE}}
Entry = tuple[str, str, dict[str, Any], str, dict[str, Any], str]
FAMILIES: dict[str, Entry] = {
    "resnet": (
        "ResNetConfig", "ResNetModel",
        {"embedding_size": 7, "hidden_sizes": [7, 11], "depths": [1, 1], "layer_type": "basic"},
        "ConvNextImageProcessor", SHORT, "map",
    ),
    "vit": ("ViTConfig", "ViTModel", VIT, "ViTImageProcessor", PLAIN, "cls"),
    "deit": ("DeiTConfig", "DeiTModel", VIT, "DeiTImageProcessor", {**PLAIN, **CROPPED, **PLAIN}, "cls"),
    "beit": ("BeitConfig", "BeitModel", VIT, "BeitImageProcessor", PLAIN, "cls"),
    "dinov2": ("Dinov2Config", "Dinov2Model", VIT, "BitImageProcessor", CROPPED, "cls"),
    "registers": (
        "Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", {**VIT, "num_register_tokens": 3}, "BitImageProcessor",
        CROPPED, "cls",
    ),
    "swin": ("SwinConfig", "SwinModel", STAGES, "ViTImageProcessor", PLAIN, "patches"),
    "swinv2": ("Swinv2Config", "Swinv2Model", STAGES, "ViTImageProcessor", PLAIN, "patches"),
    "convnext": ("ConvNextConfig", "ConvNextModel", CONVNEXT, "ConvNextImageProcessor", SHORT, "map"),
    "convnextv2": (
        "ConvNextV2Config", "ConvNextV2Model", CONVNEXT, "ConvNextImageProcessor", {"size": {"shortest_edge": 384}},
        "map",
    ),
    "efficientnet": (
        "EfficientNetConfig", "EfficientNetModel",
        {"image_size": SIDE, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
        "EfficientNetImageProcessor", PLAIN, "map",
    ),
    "mobilenetv1": (
        "MobileNetV1Config", "MobileNetV1Model", {"image_size": SIDE, "depth_multiplier": 0.1},
        "MobileNetV1ImageProcessor", CROPPED, "map",
    ),
    "mobilenetv2": (
        "MobileNetV2Config", "MobileNetV2Model", {"image_size": SIDE, "depth_multiplier": 0.1},
        "MobileNetV2ImageProcessor", CROPPED, "map",
    ),
    "regnet": (
        "RegNetConfig", "RegNetModel",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4}, "ConvNextImageProcessor",
        SHORT, "map",
    ),
    "hiera": ("HieraConfig", "HieraModel", HIERA, "BitImageProcessor", CROPPED, "patches"),
    "clip": (
        "CLIPConfig", "CLIPModel", {"text_config": TEXT, "vision_config": VIT, "projection_dim": 13},
        "CLIPImageProcessor", CROPPED, "cls",
    ),
    "clip-projected": (
        "CLIPVisionConfig", "CLIPVisionModelWithProjection", {**VIT, "projection_dim": 13}, "CLIPImageProcessor",
        CROPPED, "cls",
    ),
    "tower": ("CLIPVisionConfig", "CLIPVisionModel", VIT, "CLIPImageProcessor", CROPPED, "cls"),
    "siglip": (
        "SiglipConfig", "SiglipModel", {"text_config": TEXT, "vision_config": VIT}, "SiglipImageProcessor", PLAIN,
        "patches",
    ),
}  # fmt: skip
"""Kind -> config, model, its options, processor, its options, and whether hidden states are tokens with a class token
before them, patches alone, or a feature map."""


def build(kind: str, folder: Path, *, processor: dict[str, Any] | None = None, **changed: int) -> Path:
    """Save a tiny model of ``kind`` with its processor in ``folder``, and return it.

    ``changed`` are options of its configuration.
    """
    import torch
    import transformers

    config_name, model_name, options, processor_name, settings, _ = FAMILIES[kind]
    torch.manual_seed(13)
    network = getattr(transformers, model_name)(getattr(transformers, config_name)(**{**options, **changed}))
    with torch.no_grad():  # the usual initialisation is so small that layers would hardly differ
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    network.save_pretrained(folder)
    save_processor(folder, processor_name, **{**settings, **(processor or {})})
    return folder


def save_processor(folder: Path, name: str, **settings: Any) -> None:
    """Save an image processor, by the name of its class without an ending."""
    import transformers

    kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    kind(**settings).save_pretrained(folder)


def picture(number: int, form: str = "PNG", size: tuple[int, int] | None = None) -> bytes:
    """Return an image file, of sides between 23 and 61 unless told otherwise, with shapes and grain."""
    from PIL import Image

    generator = np.random.default_rng(number)
    width, height = size or generator.integers(23, 61, 2).tolist()
    coarse = Image.fromarray(generator.integers(0, 256, (3, 5, 3), dtype=np.uint8)).resize((width, height))
    values = np.asarray(coarse).astype(int) + generator.integers(-20, 21, (height, width, 3))
    stream = io.BytesIO()
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(stream, form)
    return stream.getvalue()


def pictures(count: int, start: int = 0) -> list[bytes]:
    """Return image files, every third a JPEG."""
    return [picture(number, "JPEG" if number % 3 == 0 else "PNG") for number in range(start, start + count)]


def examples_of(contents: Sequence[bytes], *, splits: Sequence[str] = ()) -> Examples:
    """Return rows of pictures with labels, as an input of images gives them; in ``splits``, one after the other."""
    rows = [{"text": f"row {number}", "label": "ab"[number % 2]} for number in range(len(contents))]
    if splits:
        rows = [{**row, "split": splits[at % len(splits)]} for at, row in enumerate(rows)]
    keys = np.frombuffer(b"".join(map(row_key, contents)), np.uint8).reshape(-1, 16)
    return replace(
        load_examples(rows), kind="image", keys=keys, packed_contents=Packed.of(contents), n_unique=len(set(contents))
    )
