"""A model's folder -> a frozen backbone of texts or images, its identity, and proof that it behaves.

Some architectures read padding although there is a mask (a Fourier transform or a convolution along the text, means
over segments of it), some let the rows of a batch compete, and some draw random numbers in every pass. No config says
so: it is measured when a model is loaded, with five passes of a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedcache.arguments import checks_arguments
from embedcache.backbone.device import (
    POSITIONS,
    choose_device,
    device_memory,
    has_own_memory,
    images_a_batch,
    needs_spare_row,
    threads,
)
from embedcache.backbone.folder import (
    DEFAULT_MODEL,
    SentenceTransformerSettings,
    config_hash,
    contents_read,
    lower_cases,
    model_name,
    refuse_changed,
    resolve_model,
    stamp,
    tokenizer_files,
    weight_files,
)
from embedcache.backbone.model import FrozenModel, Outputs, P, Recipe
from embedcache.backbone.network import has_adapter, identity_of, load_network, load_tower, quiet
from embedcache.backbone.pictures import Pictures, Pixels, refuse_misbehaving
from embedcache.backbone.processor import load_processor
from embedcache.backbone.text import TextPreparation, Texts, Tokens, length_limit, load_tokenizer, text_inputs
from embedcache.backbone.views import NO_VIEWS, Views
from embedcache.batching import ShapePolicy
from embedcache.errors import BackboneError, SpecError
from embedcache.fingerprint import sha256_file
from embedcache.spec import AUGMENT, BackboneSettings, FeatureSpec, ModelSource, augments, checked_range

if TYPE_CHECKING:
    import torch
    from torch import Tensor


# Whether a model does what features rely on: the same each time, whatever a row is padded with or stands beside.


TOKENS, PADDING = 5, 3
"""A short row, and how far it is padded: what ``ShapePolicy`` does to it with its usual step."""
BESIDE = 7
"""Rows beside a short row, once with some tokens and once with others: nothing of the short row may change."""
ROUNDING = {"float32": 2e-4, "float16": 0.02, "bfloat16": 0.08}
"""How far rounding may move a token's vector at another shape, relative to the vector's length. It moves it far less,
and reading padding far more: ``tests/test_every_architecture.py`` tries every architecture."""
ROUNDING_ELSEWHERE = 5e-3
"""The same for float32 on accelerators, which may multiply in fewer bits."""

SEEN = 1e-4
"""How far the first token's vector moves at least, relative to its length, when a model that reads both ways is given
other words behind it; in one that reads from left to right it does not move at all."""


def refuse_misbehaviour(
    run: Callable[[Tensor, Tensor], Outputs], network: torch.nn.Module, texts: Texts, *, longest: int
) -> None:
    """Run a short row twice alone, padded, and beside other rows: the passes must agree, or ``BackboneError``.

    ``run`` takes token ids and mask, int64 [B, T], and gives the network's outputs; ``longest`` is the longest row that
    is read.
    """
    import torch

    name, kind, parameter = texts.name, type(network).__name__, next(network.parameters())
    tokens = min(max(TOKENS, _chunk(network.config) + 1), longest)
    wide = min(tokens + PADDING, longest)
    row = _row(texts, [texts.pad], wide).to(parameter.device)
    beside = torch.stack([row, row.flip(0)])
    beside[0, tokens:] = texts.pad
    mask = torch.ones_like(beside)
    mask[0, tokens:] = 0

    def vectors(ids: Tensor, mask: Tensor) -> Tensor:
        hidden: Tensor = run(ids, mask).last_hidden_state
        return hidden[0, :tokens].float()

    on_cpu = parameter.device.type == "cpu"
    try:
        with torch.inference_mode(), quiet(), threads(1 if on_cpu else None):
            once, again = (vectors(row[None, :tokens], mask[1:, :tokens]) for _ in range(2))
            padded = vectors(beside, mask)
            crowd = torch.cat([mask[:1], mask[1:].expand(BESIDE, -1)])
            beside_long, beside_short = (
                vectors(torch.cat([beside[:1], others.expand(BESIDE, wide)]), crowd)
                for others in (row[None], row[:1, None])
            )
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, LookupError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackboneError(f"{name}: {kind} cannot run on a row of {tokens} tokens: {reason[:200]}") from error
    allowed = ROUNDING.get(str(parameter.dtype).removeprefix("torch."), ROUNDING["bfloat16"])
    allowed = allowed if on_cpu else max(allowed, ROUNDING_ELSEWHERE)
    if (apart := _apart(once, again)) > (0 if on_cpu else allowed):
        raise BackboneError(
            f"{name}: {kind} gives other features of the same text in each pass (by {apart:.1e} of their size): "
            "it is random, so nothing of it can be cached; use another model"
        )
    if (apart := _apart(once, padded)) > allowed:
        raise BackboneError(
            f"{name}: {kind} reads padding, or the other rows of a batch, although there is a mask (features move by "
            f"{apart:.1e} of their size): they would depend on how texts are batched; use another model"
        )
    if on_cpu and _apart(beside_long, beside_short) > 0:  # elsewhere some kernels differ from run to run by as much
        raise BackboneError(
            f"{name}: {kind} adds up otherwise when other texts stand beside one in a batch (a mixture of experts that "
            "gathers tokens): its features would not have the same bits in every run; use another model"
        )


def reads_from_left_to_right(network: torch.nn.Module, texts: Texts) -> bool:
    """Whether a model's first token sees no later one, so that only the last has seen the whole text.

    Measured, because neither the class that a model was saved as nor its config's ``is_decoder`` tells. False for a
    model that does not run.
    """
    import torch

    parameter = next(network.parameters())
    row = _row(texts, [], 2 * TOKENS - 1).to(parameter.device)
    # Other words, not the same ones in another order: attention that is nearly even would hardly tell.
    ids = torch.stack([row[:TOKENS], torch.cat([row[:1], row[TOKENS:]])])
    try:
        with torch.inference_mode(), quiet():
            first: Tensor = network(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0].float()
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, LookupError):
        return False
    return _apart(first[:1], first[1:]) < SEEN


def _row(texts: Texts, more: Sequence[int], tokens: int) -> Tensor:
    """Return tokens from all over the vocabulary, int64 [T]: no special one and none of ``more`` if it has others."""
    import torch

    vocabulary = np.arange(texts.known_tokens)
    ordinary = np.setdiff1d(vocabulary, [*texts.tokenizer.all_special_ids, *more])
    known = ordinary if ordinary.size else vocabulary
    return torch.from_numpy(known[np.linspace(0, len(known) - 1, tokens).astype(np.int64)])


def _chunk(config: object) -> int:
    """Return how long a row may be before attention in chunks (Reformer's, which is random) begins; 0 without."""
    lengths = [getattr(config, name, None) for name in ("lsh_attn_chunk_length", "local_attn_chunk_length")]
    return max((length for length in lengths if isinstance(length, int)), default=0)


def _apart(a: Tensor, b: Tensor) -> float:
    """Return how far two vectors [T, D] of a token are apart at most, relative to their length.

    What is not finite is left for extraction to report, with its row.
    """
    if not (a.isfinite().all() and b.isfinite().all()):
        return 0.0
    return float(((a - b).norm(dim=-1) / a.norm(dim=-1).clamp(min=1e-12)).max())


LoadedBackbone = FrozenModel[Any]
"""A frozen model whose rows are texts or images: ``FrozenModel[Tokens]`` or ``FrozenModel[Pixels]``."""


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
    content: str | None = None,
    resize: str | None = None,
    views: int | None = None,
    augment: str | None = None,
    pixel_range: Sequence[float] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedBackbone:
    """Load a Hugging Face encoder of texts or of images, frozen and in eval mode.

    Args:
        model: a local folder, a hub name, or None for the packaged default.
        features: feature sets in the written form of ``FeatureSpec``; ``auto`` follows the folder's own
            sentence-transformers files, and without them is ``mean`` (``last`` for a decoder). For images it is the
            class token, and without one the network's own pooler, or else ``mean``; the pooler too where it is no more
            than a norm, as CLIP's of the class token and BEiT's of the mean are.
        max_length: longest text in tokens; None takes the folder's or the model's own limit.
        truncation_side: ``right`` keeps the beginning of a longer text, ``left`` its end.
        prompt: put before every text; None takes the folder's default prompt, usually none.
        compute_dtype: ``float32``, ``bfloat16`` or ``float16``: what the weights are held and multiplied in.
        storage_dtype: what features are stored in.
        attention: ``sdpa`` or ``eager``; None takes what transformers chooses for the model.
        compiled: run through ``torch.compile``: faster after about 15 s; results differ in the last bits.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        policy: canonical shapes as ``ShapePolicy.to_json`` gives them, such as an existing cache's.
        positions: tokens or images in a batch, where ``policy`` is not given; None for the device's default.
        pass_threads: threads that one pass has on a CPU, where ``policy`` is not given; None for 1. Kernels add up
            otherwise with another number, so it decides bits; cores are filled by passes side by side.
        content: ``text`` or ``image``; None is text where the folder has a tokenizer. Of a model that reads both, such
            as CLIP, ``image`` takes the vision tower.
        resize: how images become the size that the network reads: ``crop``, ``pad`` or ``squash``; None does as the
            model's own processor.
        views: how many augmented views of each image are made beside it, each in a feature set of its own:
            ``mean:view1``. None for none.
        augment: what makes a view: ``crop`` (35 % to 100 % of the area), ``flip`` (left to right, every other time; not
            for what has a left and a right, such as digits or text), ``colour`` (brightness, contrast and saturation
            between 0.6 and 1.4 times), joined by ``+``; None for ``crop+flip``.
        pixel_range: the values of floating-point and 32-bit integer pixels that are black and white: what is between
            is scaled linearly, what is beyond is clipped. Without it such images are refused.
        revision: the hub's branch, tag or commit.
        trust_remote_code: run Python that comes with the model.

    Raises:
        BackboneError: no such model, no weights, weights that do not fill the model, a length it cannot read.
        PoolingUnavailableError: a pooling it does not give.
        SpecError: a setting with an impossible value.
    """
    asked = BackboneSettings(
        tuple(features), max_length, truncation_side, prompt, compute_dtype, storage_dtype, attention, compiled,
        policy, positions, pass_threads, content, resize, views, augment,
        None if pixel_range is None else checked_range(pixel_range),
    )  # fmt: skip
    asked.refuse_impossible()
    source = ModelSource(model_name(model), revision, device, trust_remote_code)
    folder = resolve_model(source.model, source.revision)
    if _content(folder, str(source.model or DEFAULT_MODEL), asked) == "image":
        return _load_images(folder, source, asked)
    return _load_texts(folder, source, asked)


def _content(folder: Path, name: str, asked: BackboneSettings) -> str:
    """Return what is to be read: ``text`` or ``image``. Raises ``SpecError`` for settings of the other."""
    there = contents_read(folder)
    kind = asked.content or next(iter(there), "text")
    if kind not in there and there:
        needed = {"text": "tokenizer (tokenizer.json)", "image": "image processor (preprocessor_config.json)"}[kind]
        raise BackboneError(
            f"{name} reads {_PLURAL[there[0]]}, not {_PLURAL[kind]}, as its folder has no {needed}: "
            f"name a model that reads {_PLURAL[kind]} with --model"
        )
    of_texts: dict[str, object] = {"max_length": asked.max_length, "prompt": asked.prompt}
    of_images: dict[str, object] = {"resize": asked.resize, "views": asked.views or None, "augment": asked.augment}
    of_images["pixel_range"] = asked.pixel_range
    of_others = of_images if kind == "text" else of_texts
    if wrong := [setting for setting, value in of_others.items() if value is not None]:
        raise SpecError(f"{wrong[0]} is given, and {name} reads {_PLURAL[kind]}: leave it out")
    return kind


_PLURAL = {"text": "texts", "image": "images"}


def load_again(settings: BackboneSettings, source: ModelSource, made_with: ModelSource, whose: str) -> LoadedBackbone:
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


def _load_texts(folder: Path, source: ModelSource, asked: BackboneSettings) -> FrozenModel[Tokens]:
    """Load a model of texts. Settings are decided in this order: asked for, the folder's own, the model's."""
    name, device = str(source.model or DEFAULT_MODEL), choose_device(source.device)
    before = stamp(folder)
    weights, files, config = weight_files(folder), tokenizer_files(folder), config_hash(folder)
    own = _own_settings(folder, asked)
    tokenizer = load_tokenizer(folder, name, source.trust_remote_code)
    dtype = str(asked.compute_dtype)
    network, pooler = load_network(folder, name, dtype, asked.attention, source.trust_remote_code)
    _move(device, name, network)
    limit = length_limit(network, tokenizer, own, asked.max_length)
    preparation = TextPreparation(limit, str(asked.truncation_side), _prompt(name, asked, own), lower_cases(folder))
    texts = Texts(tokenizer, preparation, network, name)
    causal = own is None and "auto" in asked.features and reads_from_left_to_right(network, texts)
    specs = _feature_specs(asked.features, FeatureSpec(own.pooling, (-1,), own.normalize) if own else _fallback(causal))
    shapes = _shapes(asked, limit, device)
    identity = {
        "backbone": _network_identity(folder, network, config, weights, code=source.trust_remote_code),
        "preprocessing": preparation.to_json(files),
        **_settings_identity(asked, network, shapes),
    }
    refuse_changed(folder, before, name)  # else the hashes may be of other weights than those that run
    provenance = _provenance(name, source.revision or _commit(folder), device)
    model = FrozenModel(network, texts, specs, shapes, identity, provenance=provenance, pooler=pooler)
    refuse_misbehaviour(
        lambda ids, mask: model.outputs(text_inputs(ids, mask)), network, texts, longest=shapes.max_length
    )
    settings = replace(asked, max_length=limit, prompt=preparation.prompt)
    return _finished(model, asked, Recipe(_found_at(folder, device, source), settings))


def _load_images(folder: Path, source: ModelSource, asked: BackboneSettings) -> FrozenModel[Pixels]:
    """Load a model of images, with its own processor."""
    import torch

    name, device, trust = str(source.model or DEFAULT_MODEL), choose_device(source.device), source.trust_remote_code
    before = stamp(folder)
    weights, config = weight_files(folder), config_hash(folder)
    processor = load_processor(folder, name, asked.resize, trust)
    network, pooler, projection = load_tower(folder, name, str(asked.compute_dtype), asked.attention, trust)
    _move(device, name, network, projection)
    views = Views(asked.views, augments(asked.augment or AUGMENT)) if asked.views else NO_VIEWS
    pictures = Pictures(processor, network, name, views, asked.pixel_range)
    outputs = pictures.study(network)
    if pictures.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    pooled = pooler and getattr(outputs, "pooler_output", None) is not None
    auto = "pooler" if pooled and (pictures.normed or not pictures.skip) else "cls" if pictures.skip else "mean"
    specs = _feature_specs(asked.features, FeatureSpec(auto))
    usual = images_a_batch(device, pictures.values)
    shapes = _shapes(replace(asked, positions=asked.positions or usual), 1, device)
    identity = {
        "backbone": _network_identity(folder, network, config, weights, code=trust),
        "preprocessing": pictures.to_json(),
        **_settings_identity(asked, network, shapes),
    }
    refuse_changed(folder, before, name)
    provenance = _provenance(name, source.revision or _commit(folder), device)
    model = FrozenModel(
        network, pictures, specs, shapes, identity, provenance=provenance, pooler=pooler, projection=projection,
        last_norm=pictures.last_norm, views=views,
    )  # fmt: skip
    if outputs is not None:
        pictures.count_patches(specs, outputs)
    refuse_misbehaving(model, pictures)
    return _finished(model, asked, Recipe(_found_at(folder, device, source), replace(asked, content="image")))


def _finished(model: FrozenModel[P], asked: BackboneSettings, recipe: Recipe) -> FrozenModel[P]:
    """See whether its batches fit in memory, compile it where that was asked for, and note how it is made again."""
    if has_own_memory(model.device.type):
        model.fit_memory(shrink=asked.shapes is None and asked.positions is None)
    if asked.compiled:
        model.compile()
    decided = replace(
        recipe.settings, features=tuple(spec.name for spec in model.specs), shapes=model.policy.to_json(),
        positions=None, pass_threads=None,
    )  # fmt: skip
    model.recipe = Recipe(recipe.source, decided)
    return model


def _move(device: str, name: str, *modules: torch.nn.Module | None) -> None:
    with device_memory(f"the weights of {name}", "use a half type (extract --dtype bfloat16)"):
        for module in modules:
            if module is not None:
                module.to(device)


def _found_at(folder: Path, device: str, source: ModelSource) -> ModelSource:
    return ModelSource(str(folder), device=device, trust_remote_code=source.trust_remote_code)


def _settings_identity(asked: BackboneSettings, network: torch.nn.Module, shapes: ShapePolicy) -> dict[str, object]:
    return {
        "compute_dtype": asked.compute_dtype,
        "storage_dtype": asked.storage_dtype,
        "attention": str(getattr(network.config, "_attn_implementation", None) or "eager"),
        "execution": "compiled" if asked.compiled else "eager",
        "shapes": shapes.to_json(),
    }


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
    if has_adapter(folder):
        identity["adapter"] = identity_of(folder)
    if code and (files := sorted(folder.glob("*.py"))):
        identity["code"] = {path.name: sha256_file(path) for path in files}
    return identity


def _fallback(decoder: bool) -> FeatureSpec:
    return FeatureSpec("last" if decoder else "mean")


def _feature_specs(features: Sequence[str], auto: FeatureSpec) -> tuple[FeatureSpec, ...]:
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
