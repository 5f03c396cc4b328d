"""What a folder's own sentence-transformers files say: how its authors pool, cut and normalise texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from embedcache.backbone.folder import read_json
from embedcache.errors import BackboneError
from embedcache.spec import POOLINGS

_TRANSFORMER_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_LIST_OF_MODULES = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
_FOLLOWED = {
    "transformer_task": (None, "feature-extraction"),
    "module_output_name": (None, "token_embeddings"),
    "modality_config": (None, {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}),
    "query_length": (None,),
    "document_length": (None,),
}
"""Settings of a Transformer module that could change features, and the values that mean what we do anyway."""
_ARGUMENTS = (
    "model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs",
    "processing_kwargs", "query_expansion",
)  # fmt: skip
_OURS = ("attn_implementation", "dtype", "torch_dtype", "trust_remote_code")
"""Arguments that are settings of our own, in the identity: whatever the folder says of them is asked for here."""


def lower_cases(folder: Path) -> bool:
    """Return whether a folder's sentence-transformers files say that texts are lower-cased, however it is pooled."""
    return (folder / "modules.json").is_file() and bool(_transformer_config(folder).get("do_lower_case"))


def _transformer_config(folder: Path) -> dict[str, object]:
    there = (folder / name for name in _TRANSFORMER_CONFIGS if (folder / name).is_file())
    return next((config for config in map(read_json, there) if config), {})


@dataclass(frozen=True)
class SentenceTransformerSettings:
    """What a folder's own sentence-transformers files say: how its authors pool, cut and normalise.

    ``obstacle`` is why ``auto`` cannot follow them, empty where it can; ``prompt`` is None for a default prompt that is
    not there.
    """

    pooling: str
    normalize: bool
    max_length: int | None
    prompt: str | None
    include_prompt: bool = True
    obstacle: str = ""

    @classmethod
    def read(cls, folder: Path) -> SentenceTransformerSettings | None:
        """Return the settings, or None where the folder has no ``modules.json``. Raises ``BackboneError``."""
        if not (folder / "modules.json").is_file():
            return None
        config = folder / "config_sentence_transformers.json"
        sentence, general = _transformer_config(folder), read_json(config) if config.is_file() else {}
        prompts, chosen = general.get("prompts") or {}, general.get("default_prompt_name")
        prompt = "" if not chosen else prompts.get(chosen) if isinstance(prompts, dict) else None
        limit = sentence.get("max_seq_length")
        pooling, normalize, include_prompt = "mean", False, True
        try:
            kinds, pool = _modules(folder)
            pooling, normalize = _pooling(pool), "Normalize" in kinds
            include_prompt = bool(pool.get("include_prompt", True))
            _refuse_what_changes_features(sentence, general, pool)
            obstacle = ""
        except BackboneError as error:
            obstacle = f"{folder.name}: --pooling auto cannot follow {error}: name a pooling, such as --pooling mean"
        return cls(
            pooling, normalize, int(limit) if isinstance(limit, (int, float, str)) and limit else None,
            None if prompt is None else str(prompt), include_prompt, obstacle,
        )  # fmt: skip


def _modules(folder: Path) -> tuple[list[str], dict[str, object]]:
    """Return the kinds of a folder's modules and the config of its pooling."""
    try:
        listed = json.loads((folder / "modules.json").read_text())
        modules = [(str(module["type"]), str(module["path"])) for module in listed]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise BackboneError("its modules.json, which is not a list of modules") from None
    kinds = [kind.rsplit(".", 1)[-1] for kind, _ in modules]
    if kinds not in _LIST_OF_MODULES:
        raise BackboneError(f"its sentence-transformers modules ({', '.join(kinds)})")
    if foreign := [kind for kind, _ in modules if not kind.startswith("sentence_transformers.")]:
        raise BackboneError(f"a module of its own ({foreign[0][:80]})")
    if modules[0][1] not in ("", "."):
        raise BackboneError(f"a model in a folder below it ({modules[0][1][:80]})")
    for kind, path in modules[2:]:
        config = read_json(folder / path / "config.json") if (folder / path / "config.json").is_file() else {}
        if any(value != "sentence_embedding" for key, value in config.items() if key.startswith("module_")):
            raise BackboneError(f"its {kind.rsplit('.', 1)[-1]} of something else than the sentence's vector")
    return kinds, read_json(folder / modules[1][1] / "config.json")


def _refuse_what_changes_features(
    sentence: Mapping[str, object], general: Mapping[str, object], pool: Mapping[str, object]
) -> None:
    width, kept = pool.get("embedding_dimension", pool.get("word_embedding_dimension")), general.get("truncate_dim")
    if kept is not None and not (isinstance(width, int) and isinstance(kept, int) and kept >= width):
        raise BackboneError(f"truncate_dim {kept} of its config_sentence_transformers.json (features are whole)")
    for name, followed in _FOLLOWED.items():
        if sentence.get(name) not in followed:
            raise BackboneError(f"{name} {str(sentence[name])[:80]!r} of its Transformer module")
    for name in _ARGUMENTS:
        given = sentence.get(name) or {}
        if not isinstance(given, dict) or set(given) - {*_OURS}:
            raise BackboneError(f"{name} {str(given)[:80]} of its Transformer module")


def _pooling(pool: Mapping[str, object]) -> str:
    """Return our name of the pooling that a ``1_Pooling/config.json`` chooses; there are two ways to write it."""
    ours = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "lasttoken": "last", "last_token": "last"}
    if isinstance(mode := pool.get("pooling_mode"), str):
        asked = [mode]
    elif isinstance(mode, list):
        asked = [str(name) for name in mode]
    else:
        asked = [
            key.removeprefix("pooling_mode_")
            for key, value in pool.items()
            if key.startswith("pooling_mode_") and value
        ]
    chosen = [ours.get(name, name) for name in asked or ["mean"]]  # mean where none is chosen, as its authors' library
    if len(chosen) != 1 or chosen[0] not in POOLINGS:
        raise BackboneError(" and ".join(asked))
    return chosen[0]
