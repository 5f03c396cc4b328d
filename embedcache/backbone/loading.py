"""A model's folder -> its network, frozen and in eval mode, and its tokenizer."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedcache.backbone.adapter import NO_ADAPTER, apply_adapter, has_adapter, refuse_without_peft
from embedcache.backbone.device import threads
from embedcache.backbone.experts import experts_option
from embedcache.backbone.folder import SentenceTransformerSettings
from embedcache.errors import BackboneError, SpecError
from embedcache.wording import counted

if TYPE_CHECKING:
    import torch

_HARMLESS = ("position_ids", "token_type_ids", "num_batches_tracked", "inv_freq", "masked_bias", "attn.bias")
"""Endings of tensors that a model makes itself when a weight file, of another age, has them or not."""
_LARGE = 1_000_000
"""Tokenizers without a limit say so by a huge number."""


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
    with quiet(), _one_line(name, "as a text encoder"):
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
    missing = _random_tensors(whole, network, [str(each) for each in report["missing_keys"]])
    if essential := [each for each in missing if not each.startswith("pooler.")]:
        raise BackboneError(
            f"{name}: {len(essential)} of the model's tensors are not in its weight files ({essential[0]}, ...): "
            "they would be random; the weights belong to another architecture or are incomplete"
        )
    if adapted:
        with quiet(), _one_line(name, "with its adapter"):
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


def load_tokenizer(folder: Path, name: str, trust: bool) -> Any:
    """Load a tokenizer. Raises ``BackboneError`` when it cannot be loaded or has no vocabulary."""
    import transformers

    with quiet(), _one_line(name, "as a tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    # Without its vocabulary file, a tokenizer may come up knowing nothing but its special tokens.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise BackboneError(
            f"{name}: its tokenizer has no vocabulary: expected tokenizer.json or vocab.txt in the folder"
        )
    return tokenizer


@contextlib.contextmanager
def _one_line(name: str, what: str) -> Iterator[None]:
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


def length_limit(
    network: torch.nn.Module, tokenizer: Any, settings: SentenceTransformerSettings | None, asked: int | None
) -> int:
    """Return the longest row in tokens: ``asked``, or what the folder, the tokenizer and the model allow.

    Raises ``SpecError`` when ``asked`` leaves no room for text, ``BackboneError`` when the model cannot read so much.
    """
    hard = _position_limit(network)
    if asked is None:
        # The folder's own limit takes the place of its tokenizer's, as in sentence-transformers.
        said = settings.max_length if settings else None
        wished = [said or getattr(tokenizer, "model_max_length", None), hard]
        return int(min((limit for limit in wished if limit is not None and 0 < limit < _LARGE), default=512))
    specials = tokenizer.num_special_tokens_to_add()
    if asked <= specials:
        raise SpecError(
            f"max_length is {asked}: expected at least {specials + 1}, "
            f"as the tokenizer adds {counted(specials, 'token')} to each text"
        )
    if hard is not None and asked > hard:
        raise BackboneError(f"max_length {asked} is more than this model reads: expected at most {hard}")
    return asked


def _position_limit(network: torch.nn.Module) -> int | None:
    """Return how many positions the model has, by its config and its learned position table; None for any number."""
    limits = [getattr(network.config, "max_position_embeddings", None)]
    for name, module in network.named_modules():
        if name.rsplit(".", 1)[-1] in ("position_embeddings", "wpe", "embed_positions") and hasattr(
            module, "num_embeddings"
        ):
            # RoBERTa and its kin number positions from the padding index on.
            padding = module.padding_idx
            limits.append(int(module.num_embeddings) - (int(padding) + 1 if padding is not None else 0))
    return min((limit for limit in limits if isinstance(limit, int) and 0 < limit < _LARGE), default=None)


class Compiled:
    """A network run through ``torch.compile``: one compilation for all canonical shapes, always the same one.

    What inductor makes of a network, and with it the bits, may depend on the first shape it sees. So ``warm_up``, an
    iterable of passes through this object at shapes that the canonical ones alone decide, always comes first. It
    writes the number of threads into its kernels too, so on CPU a pass always has one, and passes run side by side.
    """

    def __init__(self, network: torch.nn.Module, warm_up: Callable[[], Iterable[Any]]) -> None:
        self._network = network
        self._run: Any = None
        self._warm_up = warm_up
        self._ready = False

    def __call__(self, **inputs: Any) -> Any:
        import torch
        import torch._dynamo.config as dynamo
        import torch._inductor.config as inductor

        self.ready()
        on_cpu = next(iter(inputs.values())).device.type == "cpu"
        # Freezing packs the weights once. Patched around each call, because it is read while tracing, and is nobody
        # else's business. Dynamo counts all models of a class together, and would fall back to eager past its limit.
        with (
            inductor.patch(freezing=True),
            dynamo.patch(recompile_limit=1024, fail_on_recompile_limit_hit=True),
            threads(1 if on_cpu and torch.get_num_threads() > 1 else None),
        ):
            return self._run(**inputs)

    @staticmethod
    def may_run_side_by_side() -> bool:
        """Whether the compiler's settings are each thread's own, as they are in newer versions of torch."""
        import torch._inductor.config as inductor

        entry = getattr(inductor, "_config", {}).get("freezing")
        return isinstance(getattr(entry, "user_override", None), ContextVar)

    def ready(self) -> None:
        """Compile, unless that is done. Raises ``BackboneError`` when it cannot be."""
        import torch

        if self._ready:
            return
        self._ready = True
        try:
            with warnings.catch_warnings(), torch.inference_mode():
                warnings.simplefilter("ignore")
                self._run = torch.compile(self._network, dynamic=True)
                for _ in self._warm_up():
                    pass
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the compiler's own errors, the C++ compiler's, and what a model trips over
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            if "CxxCompiler" in f"{type(error).__name__} {error}":
                reason = f"there is no working C++ compiler (install g++, or name one in CXX) [{reason[:120]}]"
            raise BackboneError(
                f"the model cannot be compiled here: {reason[:300]}; or extract without compiling"
            ) from error
