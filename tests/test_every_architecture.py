"""Every text architecture of the installed transformers, made tiny: it works, or is refused in one line.

The names are those of transformers' own mappings, so that a new version's architectures are tried too. Of each, a
configuration is made small by what its settings are called; where that does not do, ``SETTINGS`` has what it takes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from small_configs import small

from embedcache.backbone import LoadedBackbone, load_backbone
from embedcache.batching import plan
from embedcache.errors import EmbedcacheError

TEXTS = tuple(text.encode() for text in tiny_models.TEXTS[:7])
LARGEST = 4_000_000
"""Parameters of what still counts as tiny."""
READ_PADDING = ("canine", "convbert", "cpmant", "fnet", "funnel", "mobilebert", "nystromformer", "yoso")
GATHER_TOKENS = ("dbrx", "jetmoe", "longcat_flash", "switch_transformers")
MADE_WITH = {
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
}
"""Architectures whose base class cannot be made from their configuration -> the class that can."""
REFUSED: dict[str, str] = {
    **dict.fromkeys(READ_PADDING, "reads padding, or the other rows of a batch"),
    **dict.fromkeys(GATHER_TOKENS, "adds up otherwise when other texts stand beside one in a batch"),
    **dict.fromkeys(("bros", "lxmert"), "cannot run on token ids and a mask"),
    **dict.fromkeys(MADE_WITH, "cannot be loaded as a text encoder"),
    "reformer": "gives other features of the same text in each pass",
    "flava": "gives no hidden states",
    "fsmt": "its encoder does not stand by itself",
}
"""Architectures that cannot be extracted -> what is said."""
BYTES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
}
HYBRID = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "n_mamba_heads": 4,
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}
MAMBA = {"mamba_chunk_size": 16, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16}
SOUND = {"model_type": "encodec", "num_filters": 4, "hidden_size": 32, "codebook_dim": 32, "codebook_size": 64}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": MAMBA,
    "blt": {
        "encoder_hash_byte_group_vocab": 100,
        "encoder_hash_byte_group_size": [3, 4],
        "patcher_config": {"vocab_size": 128, **BYTES},
        "encoder_config": {"vocab_size": 128, "hidden_size_global": 64, **BYTES},
        "decoder_config": {"vocab_size": 128, "hidden_size_global": 64, **BYTES},
        "global_config": {**BYTES, "hidden_size": 64},
    },
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "full_attention"],
        "rope_parameters": {"full_attention": SECTIONS["rope_parameters"]},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 4, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "esm": {"vocab_size": 128, "pad_token_id": 0, "mask_token_id": 4},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "funnel": {"block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "hidden_size": 32},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm4v_moe_text": {"rope_parameters": {**SECTIONS["rope_parameters"], "mrope_section": [2, 0, 0]}},
    "glm4v_text": SECTIONS,
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "glm_image_text": SECTIONS,
    "glm_ocr_text": SECTIONS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": MAMBA,
    "hunyuan_vl_text": {"head_dim": 8, **SECTIONS},
    **{kind: {"head_dim": 8} for kind in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "layoutlmv3": {"coordinate_size": 5, "shape_size": 6},
    "led": {"attention_window": [16, 16]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "longcat_flash": {
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "head_dim": 8,
        "qk_head_dim": 16,
        "v_head_dim": 8,
        "zero_expert_num": 2,
    },
    "longformer": {"attention_window": [16, 16]},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "mimo_v2_flash": {
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "num_key_value_heads": 2,
        "head_dim": 24,
    },
    **{key: {"audio_encoder": SOUND} for key in MADE_WITH},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "neomme": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 4},
    "nystromformer": {"segment_means_seq_len": 64},
    "nemotron_h": {"n_groups": 1},
    "pegasus_x": {"block_size": 16},
    "qwen2_5_vl_text": SECTIONS,
    "qwen2_vl_text": SECTIONS,
    "reformer": {
        "lsh_attn_chunk_length": 16,
        "local_attn_chunk_length": 16,
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "max_position_embeddings": 256,
    },
    "zamba": HYBRID,
    "zamba2": HYBRID,
    **{key: {"upsample_initial_channel": 32} for key in ("seamless_m4t", "seamless_m4t_v2")},
    "xmod": {"default_language": "en_XX"},
}
"""Settings of architectures that are not made small, or not valid, by their names."""
NOT_TINY: dict[str, str] = {"layoutlmv2": "needs detectron2"}
"""Architectures that cannot be made here -> why not."""


def text_architectures() -> list[str]:
    """Return the model types with a head for text and token ids as their main input, without pictures or sound."""
    from transformers.models.auto import modeling_auto

    def types(*heads: str) -> set[str]:
        return {name for head in heads for name in getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES", {})}

    text = types(
        "CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "TEXT_ENCODING", "PRETRAINING", "SEQUENCE_CLASSIFICATION",
        "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE", "NEXT_SENTENCE_PREDICTION",
    )  # fmt: skip
    known = set(modeling_auto.MODEL_MAPPING_NAMES)
    text |= {name for name in known if name.endswith(("_text", "_text_model"))}
    return sorted(text & known - types("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer that all of them have."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_models.word_level(folder)
    return folder


def features(backbone: LoadedBackbone, contents: Sequence[bytes]) -> np.ndarray:
    """[n, D] the only feature set of ``contents``, in their order."""
    prepared = backbone.prepare(contents)
    rows: list[Any] = [None] * len(contents)
    for batch in plan(prepared.lengths, backbone.policy):
        (values,) = backbone.fetch(backbone.forward(prepared, batch)).values()
        for index, row in zip(batch.indices.tolist(), values, strict=True):
            rows[index] = row
    return np.stack(rows)


@pytest.mark.filterwarnings("ignore")  # transformers' own, of a hundred authors
@pytest.mark.parametrize("kind", text_architectures())
def test_an_architecture_works_or_is_refused_in_one_line(kind: str, tokenizer: Path, tmp_path: Path) -> None:
    import transformers

    config_class = transformers.CONFIG_MAPPING[kind]
    try:
        model_class = transformers.MODEL_MAPPING[config_class]
    except ValueError:
        pytest.skip("transformers names a model that it does not have")
    if kind in MADE_WITH:
        model_class = getattr(transformers, MADE_WITH[kind])
    if isinstance(model_class, tuple):  # Funnel's, and which of them depends on the folder
        model_class = model_class[0]
    if getattr(model_class, "main_input_name", "") != "input_ids":
        pytest.skip("its main input is not text")
    if kind in NOT_TINY:
        pytest.skip(f"not made tiny: {NOT_TINY[kind]}")
    config = config_class(**(small(config_class()) | SETTINGS.get(kind, {})))
    torch.manual_seed(3)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    assert size < LARGEST, "the configuration is not tiny: give it settings"
    network = model_class(config)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point():
                parameter.normal_(0.0, 0.3)
    network.save_pretrained(tmp_path)
    for path in tokenizer.iterdir():
        shutil.copy(path, tmp_path)

    said = ""
    try:
        backbone = load_backbone(str(tmp_path), features=["mean"], device="cpu", positions=64)
    except EmbedcacheError as error:
        said = str(error)
    assert REFUSED.get(kind, "") in said
    assert "\n" not in said
    if said:
        assert kind in REFUSED, said
        return
    together = features(backbone, TEXTS)
    assert np.isfinite(together).all()
    assert together.shape == (len(TEXTS), backbone.feature_sets[0].dim)
    alone = np.concatenate([features(backbone, [text]) for text in TEXTS])
    assert (together == alone).all(), f"bits depend on the batch: {(together != alone).sum()} of {together.size}"

    encoder: Any = network.get_encoder() if getattr(config, "is_encoder_decoder", False) else network
    encoder.config.use_cache = False
    tokens = torch.from_numpy(backbone.prepare(TEXTS[:1]).ids)[None]
    with torch.no_grad():
        plain = encoder.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(together[0], plain, rtol=1e-3, atol=1e-4 * np.abs(together).max())


def test_the_tables_are_of_architectures_that_there_are() -> None:
    assert not set(REFUSED) & set(NOT_TINY)
    from transformers import __version__

    if __version__.startswith("5.23"):
        assert {*REFUSED, *NOT_TINY, *SETTINGS} <= set(text_architectures())
