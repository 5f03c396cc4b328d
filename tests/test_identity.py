"""What changes features is in the identity, or is refused: adapters, other weights, models that were changed."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from embedcache.backbone import compute_features, load_backbone, resolve_model, weight_files
from embedcache.backbone import folder as folder_module
from embedcache.backbone import load as load_module
from embedcache.backbone.model import FrozenModel
from embedcache.errors import BackboneError, BackboneMismatchError
from embedcache.estimator import FeatureExtractor
from embedcache.fingerprint import differences

TEXTS = [each.encode() for each in tiny_models.TEXTS]


def features(folder: Path) -> np.ndarray:
    return compute_features(load_backbone(str(folder), features=["mean"], device="cpu"), TEXTS, "mean").values


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


# Models that are changed after they were loaded


def nudge(folder: Path, by: float, times: bool = True) -> None:
    """Save a model's weights again with one value changed: the same size and, with ``times``, the same mtime."""
    status = (folder / "model.safetensors").stat()
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][5:] += by
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert (folder / "model.safetensors").stat().st_size == status.st_size
    if times:
        os.utime(folder / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))


def extractor(folder: Path, tmp_path: Path) -> FeatureExtractor:
    return FeatureExtractor(str(folder), "mean", cache_dir=tmp_path / "cache", device="cpu")


@pytest.mark.parametrize("in_place", [False, True])
def test_weights_saved_again_give_their_own_features(bert: Path, tmp_path: Path, in_place: bool) -> None:
    texts = list(tiny_models.TEXTS)
    first = extractor(bert, tmp_path).fit(texts)
    before = first.transform(texts)
    assert before.tobytes() == features(bert).tobytes()
    if in_place:  # the same inode, size and time: nothing but the change time tells
        status = (bert / "model.safetensors").stat()
        other = Path(shutil.copytree(bert, tmp_path / "other"))
        nudge(other, 0.5)
        with (bert / "model.safetensors").open("r+b") as file:
            file.write((other / "model.safetensors").read_bytes())
        os.utime(bert / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
        assert (bert / "model.safetensors").stat().st_ino == status.st_ino
    else:
        nudge(bert, 0.5)
    with pytest.raises(BackboneMismatchError, match="fitted with another model") as caught:
        first.transform(texts)
    assert "\n" not in str(caught.value)
    after = clone(first).fit(texts).transform(texts)
    assert after.tobytes() == features(bert).tobytes()
    assert after.tobytes() != before.tobytes()


READ = """
import os, pickle, sys
import sklearn.pipeline, torch, transformers
for _ in sys.stdin:
    if not os.fork():
        try:
            print(pickle.load(open(sys.argv[1], "rb")).predict(["not bad"]).shape, flush=True)
        except Exception as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(0)
    os.wait()
    print("done", flush=True)
"""
"""For each line, a child says what it makes of the pipeline; the libraries, which take seconds, are loaded once."""


def test_a_pickled_pipeline_predicts_with_the_model_that_it_was_fitted_with(bert: Path, tmp_path: Path) -> None:
    texts, labels = list(tiny_models.TEXTS), [at % 2 for at in range(len(tiny_models.TEXTS))]
    pipeline = make_pipeline(extractor(bert, tmp_path), LogisticRegression()).fit(texts, labels)
    expected = pipeline.predict_proba(texts)
    data = pickle.dumps(pipeline)
    (tmp_path / "pipeline").write_bytes(data)
    process = subprocess.Popen(
        [sys.executable, "-c", READ, str(tmp_path / "pipeline")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    asked, said = process.stdin, iter(process.stdout.readline, "")

    def fresh() -> str:
        print(file=asked, flush=True)
        return "".join(itertools.takewhile(lambda line: line != "done\n", said))

    with process:
        assert fresh().strip() == "(1,)"
        nudge(bert, 0.5)
        assert "BackboneMismatchError: FeatureExtractor was fitted with another model" in fresh()
    with pytest.raises(BackboneMismatchError, match=r"backbone\.weights\.model\.safetensors: fitted with"):
        pickle.loads(data).predict(texts)
    assert not hasattr(clone(pipeline)[0], "identity_")
    shutil.rmtree(bert)
    tiny_models.build("bert", bert)
    assert pickle.loads(data).predict_proba(texts).tobytes() == expected.tobytes()


def test_shapes_of_another_device_are_those_of_the_fit(bert: Path, tmp_path: Path) -> None:
    """Fitted where batches are larger (a GPU), a pipeline still predicts here, with the batches it was fitted with."""
    made = extractor(bert, tmp_path).fit(["good"])
    made.identity_["shapes"] = {**made.identity_["shapes"], "positions": 512, "spare": 1}
    assert made.transform(["good"]).shape == (1, 22)
    made.set_params(max_length=7)
    with pytest.raises(BackboneMismatchError, match=r"preprocessing\.max_length: fitted with 64, this is 7"):
        made.transform(["good"])


def test_files_are_read_again_only_where_they_may_have_changed(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    whole = folder_module.sha256_file

    def counted(path: Path) -> str:
        read.append(path.name)
        return str(whole(path))

    monkeypatch.setattr(folder_module, "sha256_file", counted)
    first = folder_module.contents_hash(bert)
    assert folder_module.contents_hash(bert) == first
    assert read.count("model.safetensors") == 2  # written just now: in doubt
    monkeypatch.setattr(folder_module, "DOUBT", -1e9)
    assert folder_module.contents_hash(bert) == first
    assert read.count("model.safetensors") == 2
    nudge(bert, 0.5)
    assert folder_module.contents_hash(bert) != first
    assert read.count("model.safetensors") == 3


def test_a_folder_that_changes_while_it_is_loaded_is_refused(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = load_module.load_network

    def and_change(*arguments: Any) -> Any:
        loaded = load(*arguments)
        nudge(bert, 0.5)
        return loaded

    monkeypatch.setattr(load_module, "load_network", and_change)
    refused(bert, "was written to while it was being loaded")


# Models that are not what they seem

TEXT = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37}
REFORMER = {
    "vocab_size": 67, "hidden_size": 32, "num_attention_heads": 2, "attention_head_size": 16, "feed_forward_size": 37,
    "attn_layers": ["local", "lsh"], "axial_pos_embds": False, "max_position_embeddings": 256, "is_decoder": False,
}  # fmt: skip
FUNNEL = {
    "vocab_size": 67, "block_sizes": [1, 1], "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 37, "hidden_size": 32
}  # fmt: skip
MOBILE = {**TEXT, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a tiny model of a named architecture, with a tokenizer of rows of up to 128 tokens."""
    root = tmp_path_factory.mktemp("odd")

    def folder(name: str, **options: Any) -> Path:
        import transformers

        torch.manual_seed(3)
        config = getattr(transformers, f"{name}Config")(**options)
        network = getattr(transformers, f"{name}Model")(config)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.3)
        network.save_pretrained(root / name)
        tiny_models.word_level(root / name, model_max_length=128)
        return root / name

    return folder


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FNet", {**TEXT, "use_tpu_fourier_optimizations": False}), ("ConvBert", {**TEXT, "embedding_size": 32}),
        ("Funnel", FUNNEL), ("MobileBert", MOBILE), ("Yoso", TEXT), ("Nystromformer", TEXT),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_model_that_reads_padding_is_refused(odd: Callable[..., Path], name: str, options: dict[str, Any]) -> None:
    folder = odd(name, **options)
    refused(folder, f"{name}Model reads padding, or the other rows of a batch, although there is a mask")
    if name not in ("FNet",):  # whose Fourier transform there is not in this type
        refused(folder, "reads padding", compute_dtype="bfloat16")


def test_a_model_that_is_random_is_refused(odd: Callable[..., Path]) -> None:
    folder = odd("Reformer", **REFORMER)
    refused(folder, "ReformerModel gives other features of the same text in each pass")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_real_model_behaves(minilm_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a wide margin: what is measured of it is at most a fifth of what is allowed.

    On CPUs that have no bfloat16 an eighth was seen in it, on others less than a tenth.
    """
    measured: list[float] = []
    apart = load_module._apart

    def kept(one: torch.Tensor, other: torch.Tensor) -> float:
        measured.append(apart(one, other))
        return measured[-1]

    monkeypatch.setattr(load_module, "_apart", kept)
    load_backbone(str(minilm_path), compute_dtype=dtype, device="cpu")
    assert measured[0] == 0
    assert measured[1] < load_module.ROUNDING[dtype] / 5


def test_rows_that_compete_are_refused(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: a batch normalised together, as one with expert capacities is."""
    outputs = FrozenModel._outputs

    def together(self: Any, network: Any, inputs: Any) -> Any:
        found = outputs(self, network, inputs)
        found.last_hidden_state = found.last_hidden_state - found.last_hidden_state.mean(dim=0, keepdim=True) / 50
        return found

    monkeypatch.setattr(FrozenModel, "_outputs", together)
    refused(bert, "or the other rows of a batch")


# The folder's own sentence-transformers files

MEAN = {"embedding_dimension": 22, "pooling_mode": "mean"}
SAVED = {
    "transformer_task": "feature-extraction", "module_output_name": "token_embeddings",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
}  # fmt: skip
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "mean": (MEAN, {}, {}, ""),
    "as saved": (MEAN | {"include_prompt": True}, {"prompts": {"query": ""}, "truncate_dim": None}, SAVED, ""),
    "cls": (MEAN | {"pooling_mode": ["cls"]}, {}, {}, ""),
    "max": ({"word_embedding_dimension": 22, "pooling_mode_max_tokens": True}, {}, {}, ""),
    "last": (MEAN | {"pooling_mode": "lasttoken"}, {}, {}, ""),
    "none chosen": ({"word_embedding_dimension": 22, "pooling_mode_cls_token": False}, {}, {}, ""),
    "two": (MEAN | {"pooling_mode": ["cls", "mean"]}, {}, {}, "cannot follow cls and mean"),
    "square root": (MEAN | {"pooling_mode": "mean_sqrt_len_tokens"}, {}, {}, "cannot follow mean_sqrt_len_tokens"),
    "weighted": (MEAN | {"pooling_mode": "weightedmean"}, {}, {}, "cannot follow weightedmean"),
    "short rows": (MEAN, {}, {"max_seq_length": 7}, ""),
    "longer than the tokenizer says": (MEAN, {}, {"max_seq_length": 60}, ""),
    "lower case": (MEAN, {}, {"max_seq_length": 60, "do_lower_case": True}, ""),
    "prompt": (MEAN, {"prompts": {"q": "it is "}, "default_prompt_name": "q"}, {}, ""),
    "prompt that is not the default": (MEAN, {"prompts": {"query": "it is "}}, {}, ""),
    "prompt left out": (
        MEAN | {"include_prompt": False}, {"prompts": {"q": "it is "}, "default_prompt_name": "q"}, {},
        "cannot leave the prompt out",
    ),
    "no such prompt": (MEAN, {"prompts": {"q": "it is "}, "default_prompt_name": "r"}, {}, "has no prompt of the name"),
    "truncated": (MEAN, {"truncate_dim": 8}, {}, "cannot follow truncate_dim 8"),
    "truncated to its width": (MEAN, {"truncate_dim": 22}, {}, ""),
    "arguments": (MEAN, {}, {"tokenizer_args": {"padding_side": "left"}}, "cannot follow tokenizer_args"),
    "our own arguments": (MEAN, {}, {"model_args": {"attn_implementation": "eager"}}, ""),
    "task": (MEAN, {}, {"transformer_task": "fill-mask"}, "cannot follow transformer_task 'fill-mask'"),
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_auto_is_what_encode_gives_or_refused(bert: Path, setting: str) -> None:
    """Setting by setting, against the library itself; with a pooling that is named, every folder is read."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    pooling, general, transformer, said = SETTINGS[setting]
    tiny_models.word_level(bert, model_max_length=11)
    tiny_models.sentence_transformers_files(bert, pooling, normalize=True, **general)
    (bert / "sentence_bert_config.json").write_text(json.dumps(transformer))
    if said:
        refused(bert, said, features=["auto"])
        assert load_backbone(str(bert), features=["mean"], prompt="", device="cpu").feature_sets[0].name == "mean"
        return
    texts = [*tiny_models.TEXTS, "THE Film WAS good"]
    backbone = load_backbone(str(bert), device="cpu")
    found = compute_features(backbone, [text.encode() for text in texts], backbone.feature_sets[0].name).values
    peer = sentence_transformers.SentenceTransformer(str(bert), device="cpu")
    np.testing.assert_allclose(found, peer.encode(texts, show_progress_bar=False), atol=2e-5)


def test_auto_follows_no_module_of_anybody_elses(bert: Path) -> None:
    tiny_models.sentence_transformers_files(bert, MEAN, normalize=True)
    modules = json.loads((bert / "modules.json").read_text())

    def changed(at: int, **fields: str) -> None:
        written = [{**each, **(fields if number == at else {})} for number, each in enumerate(modules)]
        (bert / "modules.json").write_text(json.dumps(written))

    changed(1, type="custom_code.Pooling")
    refused(bert, r"cannot follow a module of its own \(custom_code.Pooling\)", features=["auto"])
    changed(0, path="0_Transformer")
    refused(bert, r"cannot follow a model in a folder below it \(0_Transformer\)", features=["auto"])
    changed(2, type="sentence_transformers.models.Dense")
    refused(bert, r"its sentence-transformers modules \(Transformer, Pooling, Dense\)", features=["auto"])
    load_backbone(str(bert), features=["mean"], device="cpu")
    changed(0)
    (bert / "sentence_bert_config.json").unlink(missing_ok=True)
    (bert / "sentence_xlm-roberta_config.json").write_text(json.dumps({"max_seq_length": 9}))
    assert load_backbone(str(bert), device="cpu").policy.max_length == 9
