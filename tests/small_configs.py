"""What the settings of an architecture's configuration must be for a tiny model, by what they are called."""

from __future__ import annotations

from typing import Any

SIDE = 64
"""Height and width of the pictures that a tiny network of images reads."""


def small(config: Any) -> dict[str, Any]:
    """Return a config's settings, in so far as they must be other ones in a tiny model."""
    parts = getattr(type(config), "sub_configs", None) or {}
    said = config.to_dict()
    made: dict[str, Any] = {}
    for key, value in said.items():
        if key in parts:
            if getattr(config, key, None) is not None:
                part = getattr(config, key)
                made[key] = {"model_type": part.model_type, **small(part)}
        elif key in ("image_size", "img_size", "input_size"):
            made[key] = [SIDE] * len(value) if isinstance(value, (list, tuple)) else SIDE
        elif _is_of_stages(key) and isinstance(value, (list, tuple)) and _are_depths(value):
            made[key] = [1] * len(value)
        elif isinstance(value, int) and not isinstance(value, bool) and (size := _size(key.lower(), value)) != value:
            made[key] = size
    if "qk_rope_head_dim" in said:  # follows from the others
        made.pop("head_dim", None)
    for key in ("rope_parameters", "rope_scaling"):
        rope = said.get(key)
        if isinstance(rope, dict) and rope.get("mrope_section"):
            half = int(made.get("head_dim", 8) * rope.get("partial_rotary_factor", 1.0)) // 2
            made[key] = {**rope, "mrope_section": [half - 2 * (half // 4), half // 4, half // 4]}
    return made


def _is_of_stages(key: str) -> bool:
    return "feature" not in key and any(word in key for word in ("depth", "num_blocks", "layers"))


def _are_depths(values: list[Any] | tuple[Any, ...]) -> bool:
    # A list with an entry for each of many layers says which of them are of a kind, and goes with their number.
    return len(values) <= 8 and all(type(depth) is int for depth in values)


def _size(key: str, value: int) -> int:
    ends = key.endswith
    if ends(("_id", "token_index")):
        return min(value, 5)
    if "vocab" in key and "size" in key:
        return value if key == "type_vocab_size" else min(value, 128)
    if "experts_per_tok" in key or key in ("top_k", "topk", "moe_topk", "moe_k", "num_selected_experts"):
        return min(value, 2)
    if "shared_expert" in key and "size" not in key:
        return min(value, 1)
    if "expert" in key and key.startswith(("num", "n_", "moe_num")) and "group" not in key:
        return 4
    if key in ("n_group", "topk_group"):
        return 1
    if ends("head_dim") or key in ("d_kv", "attention_head_size", "d_head"):
        return 8
    if "lora_rank" in key:
        return 16
    if "heads" in key or key == "n_head":
        return 4
    if "layers" in key or key in ("n_layer", "depth", "num_blocks"):
        return min(value, 2)
    if key in ("n_positions", "n_ctx", "seq_length") or ends(("position_embeddings", "seq_len", "_positions")):
        return 80
    if key in ("d_model", "n_embd", "dim", "lru_width", "word_embed_proj_dim", "dim_model") or ends(
        ("hidden_size", "embed_dim", "emb_dim", "embedding_size")
    ):
        return min(value, 32)
    if "intermediate" in key or "ffn" in key or key in ("d_ff", "d_inner", "n_inner", "hidden_dim", "dim_ff"):
        return min(value, 48)
    return min(value, 48) if key == "feed_forward_size" else value
