"""A model's folder -> its network, frozen and in eval mode."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedcache.backbone.adapter import NO_ADAPTER, apply_adapter, has_adapter, refuse_without_peft
from embedcache.backbone.experts import experts_option
from embedcache.errors import BackboneError
from embedcache.wording import counted

if TYPE_CHECKING:
    import torch

_HARMLESS = ("position_ids", "token_type_ids", "num_batches_tracked", "inv_freq", "masked_bias", "attn.bias")
"""Endings of tensors that a model makes itself when a weight file, of another age, has them or not."""


def load_network(
    folder: Path, name: str, dtype: str, attention: str | None, trust: bool
) -> tuple[torch.nn.Module, bool]:
    """Load a model (of an encoder-decoder, the encoder). The second value says whether its pooler has weights.

    An adapter in the folder is put on the model. Raises ``BackboneError`` when it cannot be loaded, or when its weight
    files do not fill it.
    """
    import torch
    import transformers

    options = experts_option()
    if attention is not None:
        options["attn_implementation"] = attention
    adapted = has_adapter(folder)
    if adapted:
        refuse_without_peft(name)
        options["adapter_kwargs"] = dict(NO_ADAPTER)
    options["dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"] = getattr(torch, dtype)
    with quiet(), one_line(name, "as a text encoder"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        whole, report = transformers.AutoModel.from_pretrained(
            folder,
            config=config,
            trust_remote_code=trust,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            **options,  # transformers would say no more than that there are some
        )
        network: torch.nn.Module = whole.get_encoder() if _has_two_halves(whole) else whole
    if not hasattr(network, "config"):
        raise BackboneError(f"{name}: {type(whole).__name__} is of no use here: its encoder does not stand by itself")
    if wrong := report["mismatched_keys"]:
        tensor, stored, expected = sorted(wrong)[0]
        raise BackboneError(
            f"{name}: {counted(len(wrong), 'tensor')} of the weight files do not have the sizes that config.json says "
            f"({tensor} is {list(stored)}, expected {list(expected)}): the weights belong to another configuration"
        )
    missing = _random_tensors(whole, network, [str(key) for key in report["missing_keys"]])
    if essential := [key for key in missing if not key.startswith("pooler.")]:
        raise BackboneError(
            f"{name}: {len(essential)} of the model's tensors are not in its weight files ({essential[0]}, ...): "
            "they would be random; the weights belong to another architecture or are incomplete"
        )
    if adapted:
        with quiet(), one_line(name, "with its adapter"):
            apply_adapter(whole, folder, name)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    if getattr(network.config, "use_cache", None):  # a decoder would keep the keys and values of every layer
        network.config.use_cache = False  # type: ignore[union-attr]
    return network.eval(), not missing


def _has_two_halves(whole: Any) -> bool:
    # A folder with an encoder alone (T5EncoderModel) says is_encoder_decoder false, and is made whole all the same.
    # Funnel's halves, which are no models of their own, are two parts of one encoder.
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
