"""What changes features is in the identity, or is refused: adapters, other weights, models that were changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from embedcache.backbone import features_of, load_backbone, resolve_model, weight_files
from embedcache.errors import BackboneError
from embedcache.fingerprint import differences

TEXTS = [text.encode() for text in tiny_models.TEXTS]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the folder of a tiny model, built once. Tests that change a folder copy it."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(kind: str) -> Path:
        return root / kind if (root / kind).is_dir() else tiny_models.build(kind, root / kind)

    return folder


@pytest.fixture
def bert(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny BERT that a test may change."""
    return Path(shutil.copytree(tiny("bert"), tmp_path / "bert"))


def features(folder: Path) -> np.ndarray:
    return np.asarray(features_of(load_backbone(str(folder), features=["mean"], device="cpu"), TEXTS, "mean"))


def refused(folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(BackboneError, match=match) as caught:
        load_backbone(str(folder), **{"features": ["mean"], "device": "cpu", **options})
    assert "\n" not in str(caught.value)


# Adapters


def add_adapter(folder: Path, seed: int = 0, target: str = "query", **config: Any) -> None:
    """Write a LoRA adapter of rank 3 over the query of each layer, as peft saves it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(3):
        name = f"base_model.model.encoder.layer.{layer}.attention.self.{target}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(3, 22, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(22, 3, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    said = {
        "peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["query"], "base_model_name_or_path": "/a/path",
        "lora_dropout": 0.5, "inference_mode": True, "task_type": None, **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(said))


def test_an_adapter_that_cannot_be_applied_is_refused(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_peft_available", lambda: False)
    add_adapter(bert)
    refused(bert, r"has an adapter \(adapter_model.safetensors\), which needs the package peft.*pip install peft")
    (bert / "adapter_config.json").unlink()
    refused(bert, r"half an adapter, adapter_model.safetensors without adapter_config.json")
    add_adapter(bert)
    (bert / "adapter_model.safetensors").unlink()
    refused(bert, r"half an adapter, adapter_config.json without adapter_model.safetensors")
    (bert / "adapter_model.bin").write_bytes(b"pickle")
    refused(bert, r"its adapter only as adapter_model\.bin, a pickle")


def test_an_adapter_alone_says_what_it_is(bert: Path) -> None:
    add_adapter(bert)
    (bert / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"is an adapter alone, without the weights of its base model \(/a/path\)"):
        weight_files(bert)
    (bert / "config.json").unlink()
    with pytest.raises(BackboneError, match=r"is an adapter alone.*merge_and_unload"):
        resolve_model(str(bert))


def test_an_adapter_that_is_applied_is_hashed(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for peft that adds ``alpha / r * B A`` to the weights."""
    base = load_backbone(str(bert), features=["mean"], device="cpu")
    plain = features(bert)

    def apply(self: Any, folder: str) -> Any:
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        tensors, lost = load_file(Path(folder) / "adapter_model.safetensors"), []
        for name in tensors:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            if name.endswith("A.weight") and module in dict(self.named_modules()):
                change = tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
                self.get_submodule(module).weight.data += config["lora_alpha"] / config["r"] * change
            elif name.endswith("A.weight"):
                lost.append(name)
        return SimpleNamespace(missing_keys=set(), unexpected_keys=set(lost), mismatched_keys=set())

    monkeypatch.setattr("transformers.utils.import_utils.is_peft_available", lambda: True)
    monkeypatch.setattr("transformers.PreTrainedModel.load_adapter", apply)
    check_adapters(bert, base.identity, plain)


def test_an_adapter_applied_by_peft(bert: Path) -> None:
    """The same with peft itself, where it is installed."""
    pytest.importorskip("peft")
    base = load_backbone(str(bert), features=["mean"], device="cpu")
    check_adapters(bert, base.identity, features(bert))


def check_adapters(bert: Path, base: Any, plain: np.ndarray) -> None:
    def identity() -> Any:
        return load_backbone(str(bert), features=["mean"], device="cpu").identity

    def changed(before: Any) -> list[str]:
        return [field for field, _, _ in differences(before, identity())]

    add_adapter(bert)
    first, adapted = identity(), features(bert)
    assert changed(base) == ["backbone.adapter"]
    assert "/a/path" not in json.dumps(first)
    assert np.abs(adapted - plain).max() > 1e-3
    add_adapter(bert, seed=1)
    assert changed(first) == ["backbone.adapter.weights.adapter_model.safetensors"]
    assert np.abs(features(bert) - adapted).max() > 1e-3
    add_adapter(bert, lora_alpha=9)
    assert changed(first) == ["backbone.adapter.config"]
    assert np.abs(features(bert) - adapted).max() > 1e-3
    add_adapter(bert, base_model_name_or_path="elsewhere")
    assert changed(first) == []
    assert features(bert).tobytes() == adapted.tobytes()
    add_adapter(bert, target="no_such")
    refused(bert, "its adapter does not fit the model")
    # The base's own weights are held to account, too.
    weights = load_file(bert / "model.safetensors")
    save_file(
        {name: each for name, each in weights.items() if "layer.1" not in name}, bert / "model.safetensors",
        metadata={"format": "pt"},
    )  # fmt: skip
    add_adapter(bert)
    refused(bert, "they would be random")


def test_weights_that_the_config_names_are_refused(bert: Path) -> None:
    shutil.copy(bert / "model.safetensors", bert / "other.safetensors")
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    refused(bert, r"names its weights itself \(transformers_weights: 'other.safetensors'\)")
