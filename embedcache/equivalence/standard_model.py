"""Features the way anyone would compute them, with no code of ours: the first half of the standard reference.

``AutoTokenizer`` with ``padding="longest"``, a plain ``AutoModel`` under ``no_grad``, pooling in a few lines of torch.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedcache.equivalence.features import InMemory
from embedcache.features import Dense, Ragged
from embedcache.shard import FeatureSet, rounded
from embedcache.spec import FeatureSpec

BATCH = 32


class StandardModel:
    """A tokenizer and a frozen model as ``transformers`` loads them, set up as the spec of a cache says."""

    def __init__(self, folder: Path, spec: Mapping[str, Any], device: str, *, trust_remote_code: bool = False) -> None:
        import transformers

        verbosity = transformers.utils.logging.get_verbosity()
        bars = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.set_verbosity(logging.ERROR)
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
            dtype = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
            model = transformers.AutoModel.from_pretrained(
                folder, trust_remote_code=trust_remote_code, use_safetensors=True,
                attn_implementation=spec["attention"], **{dtype: getattr(torch, spec["compute_dtype"])},
            )  # fmt: skip
        finally:
            transformers.utils.logging.set_verbosity(verbosity)
            if bars:
                transformers.utils.logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if model.config.is_encoder_decoder or (hasattr(model, "encoder") and hasattr(model, "decoder")):
            model = model.get_encoder()
        if getattr(model.config, "use_cache", None):
            model.config.use_cache = False
        self.model: nn.Module = model.to(device).eval()
        self.device = device
        self.text = spec["preprocessing"]
        self.tokenizer.padding_side = "right"
        self.tokenizer.truncation_side = self.text["truncation_side"]
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def with_network(self, network: nn.Module) -> StandardModel:
        """Return the same tokenizer with another network, such as one whose weights are moved a little."""
        other = copy.copy(self)
        other.model = network
        return other

    def inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Tokenise some texts, padded to the longest of them: ids and mask [B, T]."""
        texts = [self.text["prompt"] + text for text in texts]
        if self.text["lower_case"]:
            texts = [text.lower() for text in texts]
        encoded = self.tokenizer(
            texts, padding="longest", truncation=True, max_length=self.text["max_length"], return_tensors="pt",
            return_token_type_ids=False, verbose=False,
        )  # fmt: skip
        return {
            "input_ids": encoded["input_ids"].to(self.device),
            "attention_mask": encoded["attention_mask"].to(self.device),
        }

    def __call__(self, texts: Sequence[str], wanted: Sequence[FeatureSpec]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the features of one batch, float32 [B, D], [B, L, D] or for tokens [B, T, D], and its mask [B, T]."""
        with torch.no_grad():
            inputs = self.inputs(texts)
            out = self.model(**inputs, output_hidden_states=True)
            mask = inputs["attention_mask"].bool()
            return {feature.name: pooled(out, mask, feature) for feature in wanted}, mask

    def vectors(self, texts: Sequence[str], wanted: Sequence[FeatureSpec]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the features of one batch without padding, tokens as [sum T, D]; and the lengths [B]."""
        features, mask = self(texts, wanted)
        tokens = {feature.name: features[feature.name][mask] for feature in wanted if feature.pooling == "tokens"}
        return {**features, **tokens}, mask.sum(dim=1)

    def features(self, texts: Sequence[str], sets: Mapping[str, FeatureSet]) -> dict[str, InMemory]:
        """Return feature sets of many texts, computed in batches of 32 and rounded as they are stored."""
        wanted = [FeatureSpec.parse(name) for name in sets]
        parts = [self.vectors(texts[start : start + BATCH], wanted) for start in range(0, len(texts), BATCH)]
        ends = np.cumsum(np.concatenate([[0], *(lengths.cpu().numpy() for _, lengths in parts)]))
        made: dict[str, InMemory] = {}
        for name, feature in sets.items():
            values = rounded(np.concatenate([vectors[name].cpu().numpy() for vectors, _ in parts]), feature.dtype)
            made[name] = Ragged(values, ends, feature) if feature.kind == "tokens" else Dense(values, feature)
        return made


def pooled(out: Any, mask: Tensor, spec: FeatureSpec) -> Tensor:
    """Pool the hidden states of one batch, in float32; tokens are left as they are, [B, T, D]."""
    if spec.pooling == "pooler":
        vectors: Tensor = out.pooler_output.float()
    else:
        layers = range(len(out.hidden_states)) if spec.layers is None else spec.layers
        pools = [
            _pooled((out.last_hidden_state if layer == -1 else out.hidden_states[layer]).float(), mask, spec.pooling)
            for layer in layers
        ]
        vectors = torch.stack(pools, dim=1) if spec.multi_layer else pools[0]
    return F.normalize(vectors, dim=-1) if spec.normalize else vectors


def _pooled(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    weights = mask.unsqueeze(-1).float()
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "mean":
        return (hidden * weights).sum(1) / weights.sum(1)
    if pooling == "max":
        return hidden.masked_fill(~mask.unsqueeze(-1), -math.inf).max(dim=1).values
    if pooling == "last":
        return hidden[torch.arange(len(hidden)), mask.sum(dim=1) - 1]
    return hidden
