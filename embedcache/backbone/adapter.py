"""Adapters (LoRA and its kin) that lie beside a model's weights.

Where peft is installed transformers puts an adapter on the model while it is loaded, and where it is not the adapter is
left out, both without a word. Here an adapter is part of the model: applied whole and hashed, or refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embedcache.backbone.folder import read_json
from embedcache.errors import BackboneError
from embedcache.fingerprint import hash_json, sha256_file

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
NO_ADAPTER = {"subfolder": "no-adapter"}
"""``adapter_kwargs`` with which transformers finds no adapter: what is missing in the base's own weights would not be
reported otherwise."""
_MERGE = "merge it into the model once (peft's merge_and_unload, then save_pretrained)"


def has_adapter(folder: Path) -> bool:
    """Return whether a model's folder holds an adapter. Raises ``BackboneError`` for one that cannot be read."""
    config, weights, pickled = ((folder / name).is_file() for name in (CONFIG, WEIGHTS, PICKLE))
    if pickled and not weights:
        raise BackboneError(
            f"{folder.name} has its adapter only as {PICKLE}, a pickle, which can run code when read: "
            f"save it again with peft, which writes {WEIGHTS}, or {_MERGE}"
        )
    if config != weights:
        there, absent = (CONFIG, WEIGHTS) if config else (WEIGHTS, CONFIG)
        raise BackboneError(
            f"{folder.name} has half an adapter, {there} without {absent}: copy the whole folder, "
            f"or delete {there} for the model without the adapter"
        )
    return config


def identity_of(folder: Path) -> dict[str, object]:
    """Return the hashes of a folder's adapter: its weights, and its config without where its base came from."""
    config = read_json(folder / CONFIG)
    elsewhere = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")
    return {
        "config": hash_json({key: value for key, value in config.items() if key not in elsewhere}),
        "weights": {WEIGHTS: sha256_file(folder / WEIGHTS)},
    }


def refuse_without_peft(name: str) -> None:
    """Raise ``BackboneError`` where transformers cannot apply an adapter."""
    from transformers.utils.import_utils import is_peft_available

    if not is_peft_available():
        raise BackboneError(
            f"{name} has an adapter ({WEIGHTS}), which needs the package peft, and that is not installed: "
            f"run pip install peft, or {_MERGE}"
        )


def apply_adapter(whole: Any, folder: Path, name: str) -> None:
    """Put a folder's adapter on its model. Raises ``BackboneError`` unless every one of its tensors found its place."""
    report = whole.load_adapter(str(folder))
    if report is None:  # before transformers 5
        raise BackboneError(
            f"{name} has an adapter, and this version of transformers does not say what it applies of it: "
            f"use transformers 5 or newer, or {_MERGE}"
        )
    lost = sorted([*map(str, report.missing_keys), *map(str, report.unexpected_keys)])
    if lost or report.mismatched_keys:
        raise BackboneError(
            f"{name}: its adapter does not fit the model ({(lost or [str(report.mismatched_keys)])[0][:120]}): "
            f"it was trained on another architecture; {_MERGE}"
        )
