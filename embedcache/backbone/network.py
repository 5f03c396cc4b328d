"""A model's folder -> its network, frozen and in eval mode, its adapters merged.

transformers gathers the tokens of each expert and multiplies as many as there happen to be, and a kernel adds up
otherwise for another number of rows: a text's features would depend, by a few units in the last place, on the texts
beside it. Here an expert always multiplies blocks of the same number of rows.

Where peft is installed transformers puts an adapter on the model while it is loaded, and where it is not the adapter is
left out, both without a word. Here an adapter is part of the model: applied whole and hashed, or refused.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedcache.backbone.folder import read_json
from embedcache.errors import BackboneError
from embedcache.fingerprint import hash_json, sha256_file
from embedcache.wording import counted

if TYPE_CHECKING:
    import torch
    from torch import Tensor


# Mixtures of experts whose bits do not depend on how a batch's tokens are spread over the experts.


ROWS = 32
"""Rows of a block. Fewer waste less on experts that get few tokens, more are faster for those that get many."""
NAME = "embedcache_blocks"


def experts_option() -> dict[str, object]:
    """Return what ``from_pretrained`` takes to run experts in blocks; empty before transformers 5 had the choice."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        return {}
    import torch

    # Which blocks there are depends on the values: nothing that could be compiled.
    ALL_EXPERTS_FUNCTIONS.register(NAME, torch.compiler.disable(_in_blocks))  # type: ignore[no-untyped-call]
    return {"experts_implementation": NAME}


def _in_blocks(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Run experts: hidden [S, D], the k experts of each token [S, k] and their weights [S, k] -> [S, D].

    The module's attributes are those that ``use_experts_implementation`` of transformers gives it.
    """
    import torch

    tokens, k = chosen.shape
    flat = chosen.reshape(-1)
    outputs = hidden.new_zeros(tokens * k, hidden.shape[-1])
    for expert in flat.unique().tolist():  # type: ignore[no-untyped-call]
        for slots in (flat == expert).nonzero()[:, 0].split(ROWS):
            rows = hidden[slots // k]
            block = torch.cat([rows, rows[:1].expand(ROWS - len(rows), -1)])
            outputs[slots] = _expert(experts, expert, block)[: len(rows)].to(outputs.dtype)
    weighted = outputs * weights.reshape(-1, 1)
    return weighted.view(tokens, k, -1).sum(dim=1).to(hidden.dtype)


def _expert(experts: Any, expert: int, rows: Tensor) -> Tensor:
    first = _linear(experts, "gate_up_proj" if experts.has_gate else "up_proj", expert, rows)
    inner = experts._apply_gate(first) if experts.has_gate else experts.act_fn(first)
    out = _linear(experts, "down_proj", expert, inner)
    normed: Tensor = experts.post_expert_norm(out) if getattr(experts, "has_post_expert_norm", False) else out
    return normed


def _linear(experts: Any, name: str, expert: int, rows: Tensor) -> Tensor:
    import torch.nn.functional as F

    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return F.linear(rows, weight.T if experts.is_transposed else weight, bias)


# Adapters (LoRA and its kin) that lie beside a model's weights.


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


# A model's folder -> its network, frozen and in eval mode.


_HARMLESS = ("position_ids", "token_type_ids", "num_batches_tracked", "inv_freq", "masked_bias", "attn.bias")
"""Endings of tensors that a model makes itself when a weight file, of another age, has them or not."""


def load_network(
    folder: Path, name: str, dtype: str, attention: str | None, trust: bool
) -> tuple[torch.nn.Module, bool]:
    """Load a model (of an encoder-decoder, the encoder). The second value says whether its pooler has weights.

    An adapter in the folder is put on the model. Raises ``BackboneError`` when it cannot be loaded, or when its weight
    files do not fill it.
    """

    part = _load_part(folder, name, dtype, attention, trust, "text")
    return part.network, not part.random


def load_tower(
    folder: Path, name: str, dtype: str, attention: str | None, trust: bool
) -> tuple[torch.nn.Module, bool, torch.nn.Module | None]:
    """Load a model of images; of one that reads texts too (CLIP, SigLIP), the vision tower.

    Returns the network, whether its pooler has weights, and the projection that CLIP compares with texts, None where
    there is none. Raises ``BackboneError`` as ``load_network`` does.
    """
    part = _load_part(folder, name, dtype, attention, trust, "image")
    projection = getattr(part.whole, "visual_projection", None)
    trained = part.whole is not part.network and "visual_projection.weight" not in part.missing
    return part.network, not part.random, projection if trained else None


def save_whole(folder: Path, to: Path, name: str, network: torch.nn.Module, content: str, trust: bool) -> None:
    """Save the model of a folder with other weights of the part that was loaded from there, ``network``'s.

    What else it has, such as a decoder or CLIP's tower of texts, is saved as it was, so that the new folder is loaded
    as the old one is; tensors that were drawn at random are not. Raises ``BackboneError`` as ``load_network`` does.
    """
    part = _load_part(folder, name, "float32", None, trust, content)
    part.network.load_state_dict(network.state_dict())
    known = {key: tensor for key, tensor in part.whole.state_dict().items() if key not in part.missing}
    with quiet():
        part.whole.save_pretrained(to, state_dict=known)


def _encoder(whole: Any) -> Any:
    return whole.get_encoder() if _has_two_halves(whole) else whole


def _tower(whole: Any) -> Any:
    part = getattr(whole, "vision_model", whole)
    return part if hasattr(part, "config") else whole


@dataclass(frozen=True)
class _Part:
    """A part of a model; with it the tensors of its pooler, and all of the model, that have no weights."""

    network: torch.nn.Module
    whole: Any
    random: Sequence[str]
    missing: Set[str]


def _load_part(folder: Path, name: str, dtype: str, attention: str | None, trust: bool, content: str) -> _Part:
    """Load a model, frozen and in eval mode, and take the part of it that reads ``content``.

    Raises ``BackboneError`` when the part needs tensors that have no weights, and are not of its pooler.
    """
    import torch
    import transformers

    part_of, what = {"text": (_encoder, "as a text encoder"), "image": (_tower, "as an image encoder")}[content]
    options = experts_option()
    if attention is not None:
        options["attn_implementation"] = attention
    adapted = has_adapter(folder)
    if adapted:
        refuse_without_peft(name)
        options["adapter_kwargs"] = dict(NO_ADAPTER)
    options["dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"] = getattr(torch, dtype)
    with quiet(), one_line(name, what):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        # Saved with its projection, CLIP's vision tower would be loaded without it.
        saved_as = next(iter(getattr(config, "architectures", None) or ()), "")
        projected = saved_as.endswith("VisionModelWithProjection") and hasattr(transformers, saved_as)
        kind = getattr(transformers, saved_as) if projected else transformers.AutoModel
        whole, report = kind.from_pretrained(
            folder,
            config=config,
            trust_remote_code=trust,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            **options,  # transformers would say no more than that there are some
        )
        network = part_of(whole)
    if not hasattr(network, "config"):
        raise BackboneError(f"{name}: {type(whole).__name__} is of no use here: its encoder does not stand by itself")
    if wrong := report["mismatched_keys"]:
        tensor, stored, expected = sorted(wrong)[0]
        raise BackboneError(
            f"{name}: {counted(len(wrong), 'tensor')} of the weight files do not have the sizes that config.json says "
            f"({tensor} is {list(stored)}, expected {list(expected)}): the weights belong to another configuration"
        )
    missing = _random_tensors(whole, network, [str(key) for key in report["missing_keys"]])
    if essential := [key for key in missing if not _is_of_pooler(key, network)]:
        raise BackboneError(
            f"{name}: {len(essential)} of the model's tensors are not in its weight files ({essential[0]}, ...): "
            "they would be random; the weights belong to another architecture or are incomplete"
        )
    if adapted:
        with quiet(), one_line(name, "with its adapter"):
            apply_adapter(whole, folder, name)
    for parameter in whole.parameters():
        parameter.requires_grad_(False)
    if getattr(network.config, "use_cache", None):  # a decoder would keep the keys and values of every layer
        network.config.use_cache = False
    whole.eval()
    return _Part(network.eval(), whole, missing, {str(key) for key in report["missing_keys"]})


def _is_of_pooler(key: str, network: torch.nn.Module) -> bool:
    # SigLIP pools by an attention of its own, which it calls its head.
    return key.startswith("pooler.") or (
        bool(getattr(network, "use_head", False)) and key.removeprefix("vision_model.").startswith("head.")
    )


def _has_two_halves(whole: Any) -> bool:
    # A folder with an encoder alone (T5EncoderModel) says is_encoder_decoder false, and is made whole all the same.
    # Funnel's halves, which are not models of their own, are two parts of one encoder.
    halves = [getattr(whole, half, None) for half in ("encoder", "decoder")]
    return bool(getattr(whole.config, "is_encoder_decoder", False)) or all(
        hasattr(half, "get_input_embeddings") for half in halves
    )


def _random_tensors(whole: torch.nn.Module, network: torch.nn.Module, missing: list[str]) -> list[str]:
    """Return which missing tensors are the network's, and not the same tensor as one that was loaded."""
    tensors = whole.state_dict(keep_vars=True)
    loaded = {id(tensor) for key, tensor in tensors.items() if key not in missing}
    ours = {id(tensor) for tensor in network.state_dict(keep_vars=True).values()}
    return sorted(
        key for key in missing
        if not key.endswith(_HARMLESS)
        and (key not in tensors or (id(tensors[key]) in ours and id(tensors[key]) not in loaded))
    )  # fmt: skip


@contextlib.contextmanager
def one_line(name: str, what: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, BackboneError):
        raise
    except Exception as error:  # transformers raises whatever its many loaders raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "trust_remote_code" in str(error):
            reason = "it brings Python code of its own, which runs only if you trust it (extract --trust-remote-code)"
        raise BackboneError(f"{name} cannot be loaded {what}: {reason[:300]}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Load without progress bars and reports: what matters in them is checked, and what is wrong is raised."""
    from transformers.utils import logging as chatter

    verbosity, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity(logging.ERROR)
    chatter.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        chatter.set_verbosity(verbosity)
        if bars:
            chatter.enable_progress_bar()  # type: ignore[no-untyped-call]
