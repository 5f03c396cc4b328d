"""A model's folder -> a frozen backbone of texts, and the identity that says what decides its features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from embedcache.arguments import checks_arguments
from embedcache.backbone import adapter, behaviour, folder_state
from embedcache.backbone.device import POSITIONS, choose_device, needs_spare_row
from embedcache.backbone.folder import (
    DEFAULT_MODEL,
    config_hash,
    model_name,
    resolve_model,
    tokenizer_files,
    weight_files,
)
from embedcache.backbone.loading import load_network
from embedcache.backbone.model import FrozenModel, Recipe
from embedcache.backbone.sentence_transformers import SentenceTransformerSettings, lower_cases
from embedcache.backbone.text import TextPreparation, Texts, Tokens, length_limit, load_tokenizer, text_inputs
from embedcache.batching import ShapePolicy
from embedcache.errors import BackboneError, SpecError
from embedcache.fingerprint import sha256_file
from embedcache.spec import BackboneSettings, FeatureSpec, ModelSource

if TYPE_CHECKING:
    import torch

TextBackbone = FrozenModel[Tokens]
"""A frozen model whose rows are texts."""


@checks_arguments()
def load_backbone(
    model: Path | str | None = None,
    *,
    features: Sequence[str] = ("auto",),
    max_length: int | None = None,
    truncation_side: str = "right",
    prompt: str | None = None,
    compute_dtype: str = "float32",
    storage_dtype: str = "float32",
    attention: str | None = None,
    compiled: bool = False,
    device: str = "auto",
    policy: Mapping[str, int] | None = None,
    positions: int | None = None,
    pass_threads: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> TextBackbone:
    """Load a Hugging Face text encoder, frozen and in eval mode.

    Args:
        model: a local folder, a hub name, or None for the packaged default.
        features: feature sets in the written form of ``FeatureSpec``; ``auto`` follows the folder's own
            sentence-transformers files, and without them is ``mean`` (``last`` for a decoder).
        max_length: longest row in tokens; None takes the folder's or the model's own limit.
        truncation_side: ``right`` keeps the beginning of a longer text, ``left`` its end.
        prompt: put before every text; None takes the folder's default prompt, usually none.
        compute_dtype: ``float32``, ``bfloat16`` or ``float16``: what the weights are held and multiplied in.
        storage_dtype: what features are stored in.
        attention: ``sdpa`` or ``eager``; None takes what transformers chooses for the model.
        compiled: run through ``torch.compile``: faster after about 15 s; results differ in the last bits.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        policy: canonical shapes as ``ShapePolicy.to_json`` gives them, such as an existing cache's.
        positions: positions in a batch, where ``policy`` is not given; None for the device's default.
        pass_threads: threads that one pass has on a CPU, where ``policy`` is not given; None for 1. Kernels add up
            otherwise with another number, so it decides bits; cores are filled by passes side by side.
        revision: the hub's branch, tag or commit.
        trust_remote_code: run Python that comes with the model.

    Raises:
        BackboneError: no such model, no weights, weights that do not fill the model, a length it cannot read.
        PoolingUnavailableError: a pooling it does not give.
        SpecError: a setting with an impossible value.
    """
    asked = BackboneSettings(
        tuple(features), max_length, truncation_side, prompt, compute_dtype, storage_dtype, attention, compiled,
        policy, positions, pass_threads,
    )  # fmt: skip
    asked.refuse_impossible()
    return _load_texts(ModelSource(model_name(model), revision, device, trust_remote_code), asked)


def load_again(settings: BackboneSettings, source: ModelSource, made_with: ModelSource, whose: str) -> TextBackbone:
    """Load the backbone that once made features, with the settings that were recorded.

    ``source`` says where it is now; what it leaves open is as in ``made_with``. ``whose`` begins the sentence that a
    model that is not there any more ends with: "the head was trained on".
    """
    here = source.or_else(made_with.model, made_with.revision)
    try:
        return load_backbone(**here.arguments(), **settings.arguments())
    except BackboneError as error:
        if source.model is not None:
            raise
        raise BackboneError(f"{error}; {whose} {here.model}: say where it is now with --model") from None


def _load_texts(source: ModelSource, asked: BackboneSettings) -> TextBackbone:
    """Load a model of texts. Settings are decided in this order: asked for, the folder's own, the model's."""
    folder = resolve_model(source.model, source.revision)
    name, device = str(source.model or DEFAULT_MODEL), choose_device(source.device)
    before = folder_state.stamp(folder)
    weights, files, config = weight_files(folder), tokenizer_files(folder), config_hash(folder)
    own = _own_settings(folder, asked)
    tokenizer = load_tokenizer(folder, name, source.trust_remote_code)
    dtype = str(asked.compute_dtype)
    network, pooler = load_network(folder, name, dtype, asked.attention, source.trust_remote_code)
    network.to(device)
    limit = length_limit(network, tokenizer, own, asked.max_length)
    preparation = TextPreparation(limit, str(asked.truncation_side), _prompt(name, asked, own), lower_cases(folder))
    texts = Texts(tokenizer, preparation, network, name)
    causal = own is None and "auto" in asked.features and behaviour.reads_from_left_to_right(network, texts)
    specs = _feature_specs(asked.features, own, causal)
    shapes = _shapes(asked, limit, device)
    identity = {
        "backbone": _network_identity(folder, network, config, weights, code=source.trust_remote_code),
        "preprocessing": preparation.to_json(files),
        "compute_dtype": dtype,
        "storage_dtype": asked.storage_dtype,
        "attention": str(getattr(network.config, "_attn_implementation", None) or "eager"),
        "execution": "compiled" if asked.compiled else "eager",
        "shapes": shapes.to_json(),
    }
    folder_state.refuse_changed(folder, before, name)  # else the hashes may be of other weights than those that run
    provenance = _provenance(name, source.revision or _commit(folder), device)
    model = FrozenModel(network, texts, specs, shapes, identity, provenance=provenance, pooler=pooler)
    behaviour.refuse_misbehaviour(
        lambda ids, mask: model.outputs(text_inputs(ids, mask)), network, texts, longest=shapes.max_length
    )
    if asked.compiled:
        model.compile()
    model.recipe = Recipe(
        ModelSource(str(folder), device=device, trust_remote_code=source.trust_remote_code),
        replace(
            asked, features=tuple(spec.name for spec in specs), max_length=limit, prompt=preparation.prompt,
            shapes=shapes.to_json(), positions=None, pass_threads=None,
        ),
    )  # fmt: skip
    return model


def _own_settings(folder: Path, asked: BackboneSettings) -> SentenceTransformerSettings | None:
    """Return what the folder's authors say, read only where it is followed; refuse what cannot be followed."""
    if "auto" not in asked.features and asked.max_length is not None and asked.prompt is not None:
        return None
    own = SentenceTransformerSettings.read(folder)
    if own is not None and own.obstacle and "auto" in asked.features:
        raise BackboneError(own.obstacle)
    if own is not None and own.prompt is None and asked.prompt is None:
        raise BackboneError(
            f"{folder.name}/config_sentence_transformers.json has no prompt of the name that it gives as default: "
            "say which prompt with extract --prompt, '' for none"
        )
    return own


def _prompt(name: str, asked: BackboneSettings, own: SentenceTransformerSettings | None) -> str:
    prompt = asked.prompt if asked.prompt is not None else (own and own.prompt) or ""
    if prompt and own and not own.include_prompt and "auto" in asked.features:
        raise BackboneError(
            f"{name}: --pooling auto cannot leave the prompt out, as its authors do: name a pooling, such as mean"
        )
    return prompt


def _shapes(asked: BackboneSettings, limit: int, device: str) -> ShapePolicy:
    if asked.shapes is not None:
        shapes = ShapePolicy.from_json(asked.shapes)
    else:
        positions = asked.positions or POSITIONS[device.split(":")[0]]
        spare, threads = int(needs_spare_row(device)), asked.pass_threads or 1
        shapes = ShapePolicy(positions=positions, max_length=limit, spare=spare, threads=threads)
    if asked.compiled and shapes.pass_threads > 1:
        raise SpecError(
            f"a compiled pass has one thread, not {shapes.pass_threads}: leave out --pass-threads or --compile"
        )
    return shapes


def _network_identity(
    folder: Path, network: torch.nn.Module, config: str, weights: Sequence[Path], *, code: bool
) -> dict[str, object]:
    """Return what decides the network: hashes of its files, an adapter's too, and of its code where that is run."""
    hashes = {path.name: sha256_file(path) for path in weights}
    identity: dict[str, object] = {"architecture": type(network).__name__, "config": config, "weights": hashes}
    if adapter.has_adapter(folder):
        identity["adapter"] = adapter.identity_of(folder)
    if code and (files := sorted(folder.glob("*.py"))):
        identity["code"] = {path.name: sha256_file(path) for path in files}
    return identity


def _feature_specs(
    features: Sequence[str], own: SentenceTransformerSettings | None, decoder: bool
) -> tuple[FeatureSpec, ...]:
    fallback = FeatureSpec("last" if decoder else "mean")
    auto = FeatureSpec(own.pooling, (-1,), own.normalize) if own else fallback
    specs = tuple(auto if text == "auto" else FeatureSpec.parse(text) for text in features)
    if not specs:
        raise SpecError("no feature set was asked for: expected at least one pooling, such as mean")
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SpecError(f"the feature set {twice[0]} is asked for twice (auto is {auto.name} here)")
    return specs


def _commit(folder: Path) -> str | None:
    # The hub's client keeps each commit of a model as .../snapshots/COMMIT.
    return folder.name if folder.parent.name == "snapshots" else None


def _provenance(model: str, revision: str | None, device: str) -> dict[str, object]:
    import torch
    import transformers

    return {
        "model": model,
        "revision": revision,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
