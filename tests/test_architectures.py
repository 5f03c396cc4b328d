"""Architectures of transformers, tiny: pooled by what they are, whatever class they were saved as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

from embedcache.backbone import compute_features, load_backbone
from embedcache.equivalence.standard import StandardModel
from embedcache.errors import BackboneError

TEXTS = [text.encode() for text in tiny_models.TEXTS]
SPECIALS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
BERT = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
LLAMA = {**BERT, **SPECIALS, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
GPT2 = {**SPECIALS, "vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
XLNET = {"vocab_size": 67, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 37}
T5 = {
    "vocab_size": 67, "d_model": 22, "d_kv": 11, "d_ff": 37, "num_layers": 2, "num_heads": 2, "pad_token_id": 0,
    "eos_token_id": 3,
}  # fmt: skip
CANINE = {
    **BERT, "downsampling_rate": 4, "upsampling_kernel_size": 4, "num_hash_functions": 4, "num_hash_buckets": 53,
    "local_transformer_stride": 8,
}  # fmt: skip


def save(folder: Path, config: str, model: str, options: dict[str, Any]) -> Path:
    """Save a model of random weights and a tokenizer of words."""
    import transformers

    torch.manual_seed(7)
    getattr(transformers, model)(getattr(transformers, f"{config}Config")(**options)).save_pretrained(folder)
    tiny_models.word_level(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "model", "options", "pooling"),
    [
        ("GPT2", "GPT2Model", GPT2, "last"), ("GPT2", "GPT2LMHeadModel", GPT2, "last"),
        ("Qwen3", "Qwen3Model", LLAMA, "last"), ("Qwen3", "Qwen3ForCausalLM", LLAMA, "last"),
        ("Mistral", "MistralModel", LLAMA, "last"), ("Llama", "LlamaModel", LLAMA, "last"),
        ("Llama", "LlamaForSequenceClassification", LLAMA, "last"), ("Bert", "BertModel", BERT, "mean"),
        ("Bert", "BertLMHeadModel", BERT, "mean"), ("Bert", "BertModel", {**BERT, "is_decoder": True}, "last"),
        ("XLNet", "XLNetModel", XLNET, "mean"),
    ],
)  # fmt: skip
def test_auto_pools_by_what_a_model_reads(
    tmp_path: Path, config: str, model: str, options: dict[str, Any], pooling: str
) -> None:
    """The last token where it alone has seen the text, whatever class the model was saved as."""
    folder = save(tmp_path / model, config, model, options)
    for dtype in ("float32",) if config == "XLNet" else ("float32", "bfloat16"):  # XLNet's attention mixes float32 in
        backbone = load_backbone(str(folder), compute_dtype=dtype, device="cpu")
        assert [each.name for each in backbone.feature_sets] == [pooling]


@pytest.mark.parametrize("kind", ["T5", "MT5", "UMT5"])
def test_an_encoder_saved_alone_is_the_encoder_of_the_whole(tmp_path: Path, kind: str) -> None:
    """``T5EncoderModel.save_pretrained`` says ``is_encoder_decoder`` false, as sentence-transformers' own save does."""
    import transformers

    whole = save(tmp_path / "whole", kind, f"{kind}ForConditionalGeneration", T5)
    alone = tmp_path / "alone"
    encoder = getattr(transformers, f"{kind}EncoderModel").from_pretrained(whole)
    encoder.config.is_encoder_decoder = False
    encoder.save_pretrained(alone)
    tiny_models.word_level(alone)
    backbones = [load_backbone(str(folder), features=["mean"], device="cpu") for folder in (whole, alone)]
    first, second = (compute_features(backbone, TEXTS, "mean").values for backbone in backbones)
    assert first.tobytes() == second.tobytes()
    standard = StandardModel(alone, backbones[1].identity, "cpu")
    inputs = standard.inputs([TEXTS[0]])
    with torch.no_grad():
        expected = standard.model(**inputs).last_hidden_state[0].mean(dim=0)
    np.testing.assert_allclose(second[0], expected, atol=1e-5)


def test_canine_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = save(tmp_path / "canine", "Canine", "CanineModel", CANINE)
    with pytest.raises(BackboneError, match="CanineModel reads padding") as caught:
        load_backbone(str(folder), device="cpu")
    assert "\n" not in str(caught.value)
