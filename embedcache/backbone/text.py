"""Texts -> features: tokenise, lay out at canonical shapes, run, pool."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedcache import pooling
from embedcache.arguments import checks_arguments
from embedcache.backbone import adapter, behaviour, contents
from embedcache.backbone.device import POSITIONS, choose_device, needs_spare_row, side_by_side, threads
from embedcache.backbone.folder import (
    DEFAULT_MODEL,
    SentenceTransformerSettings,
    config_hash,
    lower_cases,
    model_name,
    resolve_model,
    tokenizer_files,
    weight_files,
)
from embedcache.backbone.loading import Compiled, length_limit, load_network, load_tokenizer
from embedcache.backbone.numerics import TEXT_ROWS, tokenizer_versions
from embedcache.batching import Batch, ShapePolicy
from embedcache.errors import BackboneError, FeatureError, PoolingUnavailableError, SpecError
from embedcache.fingerprint import sha256_bytes, sha256_file
from embedcache.shard import FeatureSet, Kind
from embedcache.spec import POOLINGS, BackboneSettings, FeatureSpec, ModelSource

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Tokenised rows: ``ids[offsets[i]:offsets[i + 1]]`` are the token ids of row i."""

    ids: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    truncated: int

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[n] tokens in each row."""
        return np.diff(self.offsets)

    def take(self, rows: npt.NDArray[np.int64]) -> Tokens:
        """Return some of the rows, in the order asked for."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(int(offsets[-1]))
        return Tokens(self.ids[places], offsets, 0)

    def digests(self) -> list[str]:
        """Return a hash of each row as the model will see it, the same on every machine."""
        ids = self.ids.astype("<i8")
        return [sha256_bytes(ids[start:stop].tobytes()) for start, stop in pairwise(self.offsets.tolist())]


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
    policy: Mapping[str, Any] | None = None,
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
        compiled: run through ``torch.compile``: other bits, faster after about 15 s.
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
    BackboneSettings(
        tuple(features), max_length, truncation_side, prompt, compute_dtype, storage_dtype, attention, compiled,
        positions=positions, pass_threads=pass_threads,
    ).refuse_impossible()  # fmt: skip
    model = model_name(model)
    folder = resolve_model(model, revision)
    name = model or DEFAULT_MODEL
    before = contents.stamp(folder)
    weights = weight_files(folder)
    preprocessing: dict[str, Any] = {"kind": "text", "files": tokenizer_files(folder)}
    config = config_hash(folder)
    where = choose_device(device)
    settings = (
        SentenceTransformerSettings.read(folder) if "auto" in features or max_length is None or prompt is None else None
    )
    if settings and settings.obstacle and "auto" in features:
        raise BackboneError(settings.obstacle)
    if settings and prompt is None and settings.prompt is None:
        raise BackboneError(
            f"{folder.name}/config_sentence_transformers.json has no prompt of the name that it gives as default: "
            "say which prompt with extract --prompt, '' for none"
        )
    tokenizer = load_tokenizer(folder, name, trust_remote_code)
    network, pooler = load_network(folder, name, compute_dtype, attention, trust_remote_code)
    network.to(where)
    causal = settings is None and "auto" in features and behaviour.reads_from_left_to_right(
        network, vocabulary=_vocabulary(network) or len(tokenizer), reserved=tokenizer.all_special_ids
    )  # fmt: skip
    specs = _feature_specs(features, settings, causal)
    limit = length_limit(network, tokenizer, settings, max_length)
    shapes = ShapePolicy.from_json(policy) if policy is not None else ShapePolicy(
        positions=positions or POSITIONS[where.split(":")[0]], max_length=limit, spare=int(needs_spare_row(where)),
        threads=pass_threads or 1,
    )  # fmt: skip
    if compiled and shapes.pass_threads > 1:
        raise SpecError(
            f"a compiled pass has one thread, not {shapes.pass_threads}: leave out --pass-threads or --compile"
        )
    preprocessing |= {
        "max_length": limit,
        "truncation_side": truncation_side,
        "prompt": prompt if prompt is not None else (settings and settings.prompt) or "",
        "lower_case": lower_cases(folder),
    }
    if preprocessing["prompt"] and settings and not settings.include_prompt and "auto" in features:
        raise BackboneError(
            f"{name}: --pooling auto cannot leave the prompt out, as its authors do: name a pooling, such as mean"
        )
    code = sorted(folder.glob("*.py")) if trust_remote_code else []
    identity = {
        "backbone": {
            "architecture": type(network).__name__,
            "config": config,
            "weights": {path.name: sha256_file(path) for path in weights},
            **({"adapter": adapter.identity_of(folder)} if adapter.has_adapter(folder) else {}),
            **({"code": {path.name: sha256_file(path) for path in code}} if code else {}),
        },
        "preprocessing": preprocessing,
        "compute_dtype": compute_dtype,
        "storage_dtype": storage_dtype,
        "attention": str(getattr(network.config, "_attn_implementation", None) or "eager"),
        "execution": "compiled" if compiled else "eager",
        "shapes": shapes.to_json(),
    }
    contents.refuse_changed(folder, before, name)  # else the hashes may be of other weights than those that run
    made = TextBackbone(
        network, tokenizer, specs, shapes, identity,
        provenance=_provenance(name, revision or _commit(folder), where), pooler=pooler, name=name, compiled=compiled,
    )  # fmt: skip
    made.recipe = {
        "model": str(folder), "features": tuple(spec.name for spec in specs), "max_length": limit,
        "truncation_side": truncation_side, "prompt": preprocessing["prompt"], "compute_dtype": compute_dtype,
        "storage_dtype": storage_dtype, "attention": attention, "compiled": compiled, "device": where,
        "policy": shapes.to_json(), "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    return made


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


def _feature_specs(
    features: Sequence[str], settings: SentenceTransformerSettings | None, decoder: bool
) -> tuple[FeatureSpec, ...]:
    fallback = FeatureSpec("last" if decoder else "mean")
    auto = FeatureSpec(settings.pooling, (-1,), settings.normalize) if settings else fallback
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


def _provenance(model: str, revision: str | None, device: str) -> dict[str, Any]:
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


class TextBackbone:
    """A frozen Hugging Face text encoder. Made by ``load_backbone``; has the members of ``Backbone``.

    ``network`` is the plain module, also where passes are compiled; ``specs`` are the feature sets as asked for.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        tokenizer: Any,
        specs: Sequence[FeatureSpec],
        policy: ShapePolicy,
        identity: dict[str, Any],
        *,
        provenance: Mapping[str, Any],
        pooler: bool,
        name: str,
        compiled: bool,
    ) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.policy = policy
        self.name = name
        self.probe_rows = TEXT_ROWS
        self.recipe: dict[str, Any] | None = None  # how ``load_backbone`` makes the same one in another process
        self.provenance = dict(provenance)
        self.specs = tuple(specs)
        self.device = next(network.parameters()).device
        self._text = identity["preprocessing"]
        self._storage = identity["storage_dtype"]
        self._vocabulary = _vocabulary(network)
        pads = (tokenizer.pad_token_id, getattr(network.config, "pad_token_id", None))
        # RoBERTa counts positions by its own padding id. Elsewhere what stands behind a row is masked, whatever it is.
        self._pad = next(
            (int(pad) for pad in pads if isinstance(pad, int) and 0 <= pad < (self._vocabulary or pad + 1)), 0
        )
        tokenizer.truncation_side = self._text["truncation_side"]
        self._hidden = any(spec.layers != (-1,) for spec in specs)
        self._run: Any = network
        self.poolings, self.feature_sets = self._probe(pooler)
        behaviour.refuse_misbehaviour(
            partial(self._outputs, network), network, name, vocabulary=self._vocabulary or len(tokenizer),
            reserved=tokenizer.all_special_ids, pad=self._pad, longest=policy.max_length,
        )  # fmt: skip
        self.identity = {**identity, "features": {spec.name: spec.to_json() for spec in specs}}
        if compiled:
            self._run = Compiled(network, self._warm_up)
            self._run.ready()

    @property
    def probe_versions(self) -> dict[str, str]:
        """Versions of what prepares texts."""
        return tokenizer_versions()

    def _probe(self, pooler: bool) -> tuple[tuple[str, ...], tuple[FeatureSet, ...]]:
        """Run the model once on dummies, and read poolings, widths and layers off what comes out."""
        import torch

        try:
            with torch.inference_mode():
                output = self._outputs(self.network, **self._dummies(2, min(4, self.policy.max_length)))
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, LookupError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BackboneError(
                f"{self.name}: {type(self.network).__name__} cannot run on token ids and a mask "
                f"in {self.network.dtype}: {reason[:200]}"
            ) from error
        if getattr(output, "last_hidden_state", None) is None:
            raise BackboneError(
                f"{self.name}: {type(self.network).__name__} gives no hidden states, so there is nothing to pool"
            )
        pooler = pooler and getattr(output, "pooler_output", None) is not None
        there = tuple(name for name in POOLINGS if name != "pooler" or pooler)
        for spec in self.specs:
            if spec.pooling not in there:
                raise PoolingUnavailableError(
                    f"{self.name} does not give the pooling {spec.name!r}: expected one of {', '.join(there)}"
                )
        depth = len(output.hidden_states or ()) if self._hidden else 0
        sets = []
        for spec in self.specs:
            for layer in spec.layers or ():
                if layer != -1 and not -depth <= layer < depth:
                    raise PoolingUnavailableError(
                        f"{spec.name}: {self.name} has hidden states {-depth}..{depth - 1}, "
                        f"and layer {layer} is none of them"
                    )
            width = output.pooler_output.shape[-1] if spec.pooling == "pooler" else output.last_hidden_state.shape[-1]
            layers = (len(spec.layers) if spec.layers is not None else depth) if spec.multi_layer else 1
            kind: Kind = "tokens" if spec.pooling == "tokens" else "layers" if spec.multi_layer else "pooled"
            sets.append(FeatureSet(spec.name, kind, int(width), layers, self._storage))
        return there, tuple(sets)

    def _warm_up(self) -> Iterator[Any]:
        """Run the shapes that decide what is compiled: an ordinary one, and one of a single row if there is any.

        The compiler treats a size of 1 apart, and takes two sizes that are equal at first to be equal forever.
        """
        shapes = [(self.policy.rows(length), length) for length in self.policy.lengths()]
        several = [shape for shape in shapes if 1 not in shape]
        ordinary = sorted(several, key=lambda shape: (shape[0] == shape[1], abs(shape[1] - 32)))
        single = [shape for shape in shapes if 1 in shape]
        for shape in ordinary[:1] + single[:1]:
            yield self._outputs(self._run, **self._dummies(*shape))

    def prepare(self, contents: Sequence[bytes]) -> Tokens:
        """Tokenise UTF-8 texts, with prompt and truncation.

        Raises ``FeatureError`` for a text that has no tokens, ``BackboneError`` for tokens the model does not know.
        """
        texts = [self._text["prompt"] + content.decode("utf-8") for content in contents]
        if self._text["lower_case"]:
            texts = [text.lower() for text in texts]
        if not texts:
            return Tokens(np.zeros(0, np.int64), np.zeros(1, np.int64), 0)
        limit = self._text["max_length"]
        encoded = self.tokenizer(
            texts,
            truncation=True,
            max_length=limit,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        rows = encoded["input_ids"]
        lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        if not lengths.all():
            empty = texts[int(np.argmin(lengths))]
            raise FeatureError(
                f"the tokenizer of {self.name} makes no tokens of {empty[:40]!r}: such a row has no features"
            )
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ids = np.fromiter((token for row in rows for token in row), np.int64, int(offsets[-1]))
        if self._vocabulary is not None and int(ids.max()) >= self._vocabulary:
            raise BackboneError(
                f"the tokenizer of {self.name} makes token {int(ids.max())}, and the model knows {self._vocabulary}: "
                "they do not belong together"
            )
        full = np.flatnonzero(lengths == limit)
        if encoded.encodings is not None:  # a fast tokenizer keeps what it cut off
            truncated = sum(bool(encoded.encodings[row].overflowing) for row in full)
        else:
            whole = (
                self.tokenizer([texts[row] for row in full], truncation=False, verbose=False)["input_ids"]
                if full.size
                else []
            )
            truncated = sum(len(row) > limit for row in whole)
        return Tokens(ids, offsets, truncated)

    def batch_inputs(self, tokens: Tokens, batch: Batch) -> tuple[Tensor, Tensor]:
        """Lay rows out at a canonical shape: token ids and mask, both int64 [batch.rows, batch.length].

        Padding is always on the right. A dummy row is one padding token that may be attended to, so that no row of
        the softmax is empty.
        """
        import torch

        ids = np.full((batch.rows, batch.length), self._pad, np.int64)
        mask = np.zeros((batch.rows, batch.length), np.int64)
        mask[len(batch.indices) :, 0] = 1
        for row, index in enumerate(batch.indices):
            start, stop = tokens.offsets[index], tokens.offsets[index + 1]
            ids[row, : stop - start] = tokens.ids[start:stop]
            mask[row, : stop - start] = 1
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device)

    def forward(self, prepared: Tokens, batch: Batch) -> dict[str, Any]:
        """Run one canonical pass and pool it. Tensors stay on the device, cut to the real rows."""
        import torch

        with torch.inference_mode(), threads(self.policy.pass_threads if self.device.type == "cpu" else None):
            ids, mask = self.batch_inputs(prepared, batch)
            return self.pool(self._outputs(self._run, ids, mask), mask, len(batch.indices))

    def side_by_side(self, batches: int) -> int:
        """Return how many of ``batches`` passes run at a time."""
        if isinstance(self._run, Compiled) and not Compiled.may_run_side_by_side():
            return 1
        return side_by_side(self.device.type, batches, self.policy.pass_threads)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the plain network as it stands (its mode, its gradients) and make the first feature set, in float32.

        Token ids and mask [B, T] -> [B, D], [B, L, D], or for tokens [B, T, D] with the mask, True = real.
        """
        output, spec = self._outputs(self.network, input_ids, attention_mask), self.specs[0]
        if spec.pooling != "tokens":
            return self._vectors(spec, output, attention_mask), None
        values = self._layer(output, spec.layers[0] if spec.layers else -1).float()
        return (pooling.normalize(values) if spec.normalize else values), attention_mask.bool()

    def pool(self, output: Any, mask: Tensor, real: int) -> dict[str, Any]:
        """Make every feature set of one pass, cut to its first ``real`` rows and in the storage type."""
        pooled: dict[str, Any] = {}
        for spec in self.specs:
            if spec.pooling == "tokens":
                hidden = self._layer(output, (spec.layers or (-1,))[0])[:real]
                kept = mask[:real].bool()
                values = hidden[kept].float()
                values = pooling.normalize(values) if spec.normalize else values
                pooled[spec.name] = (self._stored(values, spec), kept.sum(dim=1))
            else:
                pooled[spec.name] = self._stored(self._vectors(spec, output, mask)[:real], spec)
        return pooled

    def _vectors(self, spec: FeatureSpec, output: Any, mask: Tensor) -> Tensor:
        import torch

        if spec.pooling == "pooler":
            vectors: Tensor = output.pooler_output.float()
        else:
            layers = spec.layers if spec.layers is not None else tuple(range(len(output.hidden_states)))
            each = [pooling.MASKED[spec.pooling](self._layer(output, layer), mask) for layer in layers]
            vectors = torch.stack(each, dim=1) if spec.multi_layer else each[0]
        return pooling.normalize(vectors) if spec.normalize else vectors

    def _layer(self, output: Any, layer: int) -> Tensor:
        tensor: Tensor = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        return tensor

    def _stored(self, vectors: Tensor, spec: FeatureSpec) -> Tensor:
        if self._storage == "float16":
            half = vectors.half()
            # Rounded to infinity without being infinite: what was infinite already is the caller's to report.
            if overflow := int((half.isinf() & vectors.isfinite()).sum()):
                raise FeatureError(
                    f"{overflow} values of {spec.name} in one batch are beyond float16's largest, 65,504: "
                    "store as float32 or bfloat16 (extract --store float32)"
                )
            return half
        return vectors.bfloat16() if self._storage == "bfloat16" else vectors

    def fetch(self, running: dict[str, Any]) -> dict[str, Any]:
        """Copy one pass to the CPU as numpy; bfloat16 comes as its bits, uint16."""
        return {
            name: (_numpy(value[0]), _numpy(value[1])) if isinstance(value, tuple) else _numpy(value)
            for name, value in running.items()
        }

    def _outputs(self, network: Any, input_ids: Tensor, attention_mask: Tensor) -> Any:
        options = {"output_hidden_states": True} if self._hidden else {}
        return network(input_ids=input_ids, attention_mask=attention_mask, **options)

    def _dummies(self, rows: int, length: int) -> dict[str, Tensor]:
        import torch

        ids = torch.full((rows, length), self._pad, dtype=torch.int64, device=self.device)
        mask = torch.ones_like(ids)
        mask[-1, 1:] = 0
        return {"input_ids": ids, "attention_mask": mask}


def _vocabulary(network: torch.nn.Module) -> int | None:
    """Return how many tokens a model knows; None where its embeddings take any number (CANINE's hashes)."""
    try:
        embeddings: Any = network.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        return None
    return getattr(embeddings, "num_embeddings", None)


def _numpy(tensor: Tensor) -> npt.NDArray[Any]:
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.cpu().view(torch.uint16).numpy()
    return tensor.cpu().numpy()
