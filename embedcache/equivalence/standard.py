"""Features, heads and training the way anyone would write them, with no code of ours: the standard reference.

Parameters have the names that ours have, so that both can start from the same numbers and be compared by name.

``AutoTokenizer`` with ``padding="longest"``, a plain ``AutoModel`` under ``no_grad``, pooling in a few lines of torch.

A plain ``nn.Module`` as the head, autograd, ``torch.optim``'s AdamW or SGD and ``torch.nn.functional``'s losses.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedcache.equivalence.bits import Array
from embedcache.equivalence.rows import TrainingPlan
from embedcache.equivalence.training import Record
from embedcache.errors import SpecError
from embedcache.features import Dense, InMemory, Ragged
from embedcache.shard import FeatureSet, rounded
from embedcache.spec import FeatureSpec, HeadSpec, TrainSpec
from embedcache.task import CLASSIFICATION, MULTILABEL, REGRESSION, Task

# The heads once more, in the plainest torch: no stacking, no folding, nothing of `embedcache.heads`.


Options = Mapping[str, Any]
Named = Mapping[str, npt.NDArray[np.float32]]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def plain_head(spec: HeadSpec, state: Named, generator: torch.Generator) -> nn.Module:
    """Build the plain twin of a head from its initial arrays; dropout is drawn from ``generator``.

    Raises ``SpecError`` for a head that has none: one that was registered from outside.
    """
    if spec.kind not in STANDARD_HEADS:
        raise SpecError(f"there is no plain twin of the head {spec.kind}: check it with --reference canonical")
    net = STANDARD_HEADS[spec.kind](spec.options, state, generator)
    net.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()})
    return net


def _linear(state: Named, name: str) -> nn.Linear:
    outputs, inputs = state[f"{name}.weight"].shape
    return nn.Linear(inputs, outputs, bias=f"{name}.bias" in state)


def _norm(state: Named, name: str) -> nn.Module:
    return nn.LayerNorm(len(state[f"{name}.weight"])) if f"{name}.weight" in state else nn.Identity()


class _Drop(nn.Module):
    def __init__(self, options: Options, generator: torch.Generator) -> None:
        super().__init__()
        self.rate, self.generator = float(options.get("dropout", 0.1)), generator

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        # The very draws belong to the seed: 16 random bits a value, four values to an int64.
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=self.generator)
        numbers = bits.view(torch.int16)[: x.numel()].reshape(x.shape).int() + 32768
        dropped = round(self.rate * 65536)
        return x * (numbers >= dropped) / (1 - dropped / 65536)


class _Linear(nn.Module):
    def __init__(self, options: Options, state: Named, generator: torch.Generator) -> None:
        super().__init__()
        self.output = _linear(state, "output")

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = self.output(x)
        return out


class _MLP(nn.Module):
    def __init__(self, options: Options, state: Named, generator: torch.Generator) -> None:
        super().__init__()
        depth = sum(name.startswith("hidden.") and name.endswith(".weight") for name in state)
        self.hidden = nn.ModuleList(_linear(state, f"hidden.{layer}") for layer in range(depth))
        self.norms = nn.ModuleList(_norm(state, f"norms.{layer}") for layer in range(depth))
        self.output = _linear(state, "output")
        self.act = ACTIVATIONS[options.get("activation", "relu")]
        self.drop = _Drop(options, generator)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for layer, norm in zip(self.hidden, self.norms, strict=True):
            x = self.drop(self.act(norm(layer(x))))
        out: Tensor = self.output(x)
        return out


class _Block(nn.Module):
    def __init__(self, options: Options, state: Named, number: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = _norm(state, f"blocks.{number}.norm")
        self.up, self.down = _linear(state, f"blocks.{number}.up"), _linear(state, f"blocks.{number}.down")
        self.act = ACTIVATIONS[options.get("activation", "gelu")]
        self.drop = _Drop(options, generator)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.drop(self.act(self.up(self.norm(x)))))
        return out


class _Residual(nn.Module):
    def __init__(self, options: Options, state: Named, generator: torch.Generator) -> None:
        super().__init__()
        depth = sum(name.startswith("blocks.") and name.endswith(".up.weight") for name in state)
        self.input = _linear(state, "input")
        self.blocks = nn.Sequential(*(_Block(options, state, number, generator) for number in range(depth)))
        self.norm, self.output = _norm(state, "norm"), _linear(state, "output")

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = self.output(self.norm(self.blocks(self.input(x))))
        return out


class _Vectors(nn.Module):
    def __init__(self, weight: npt.NDArray[np.float32]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(weight.shape))


class _Attending(nn.Module):
    def __init__(self, options: Options, state: Named, generator: torch.Generator) -> None:
        super().__init__()
        self.input, self.output = _linear(state, "input"), _linear(state, "output")
        self.norm = _norm(state, "norm")
        self.layer = _Vectors(state["layer.weight"]) if "layer.weight" in state else None
        self.drop = _Drop(options, generator)
        width = self.input.out_features
        self.heads = options.get("heads") or next(count for count in (8, 4, 2, 1) if width % count == 0)

    def read(self, x: Tensor) -> Tensor:
        x = self.input(x)
        return x if self.layer is None else x + self.layer.weight

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(q k / sqrt(d)) v, head by head."""
        size = query.shape[-1] // self.heads
        outputs = []
        for q, k, v in zip(*(torch.split(part, size, dim=-1) for part in (query, key, value)), strict=True):
            scores = q @ k.transpose(-1, -2) / math.sqrt(size)
            if mask is not None:
                scores = scores.masked_fill(~mask[:, None, :], -math.inf)
            outputs.append(scores.softmax(dim=-1) @ v)
        return torch.cat(outputs, dim=-1)


class _SelfAttention(_Attending):
    def __init__(self, options: Options, state: Named, generator: torch.Generator) -> None:
        super().__init__(options, state, generator)
        self.qkv, self.mix = _linear(state, "qkv"), _linear(state, "mix")
        self.final = _norm(state, "final")

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.read(x)
        query, key, value = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = self.final(x + self.drop(self.mix(self.attend(query, key, value, mask))))
        weights = torch.ones(x.shape[:2]) if mask is None else mask.float()
        out: Tensor = self.output((x * weights[..., None]).sum(1) / weights.sum(1, keepdim=True))
        return out


class _AttentionPooling(_Attending):
    def __init__(self, options: Options, state: Named, generator: torch.Generator) -> None:
        super().__init__(options, state, generator)
        self.key, self.queries = _linear(state, "key"), _Vectors(state["queries.weight"])

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        value = self.norm(self.read(x))
        query = self.queries.weight.expand(len(x), -1, -1)
        pooled = self.attend(query, self.key(value), value, mask)
        out: Tensor = self.output(self.drop(pooled.flatten(1)))
        return out


class _LayerMix(nn.Module):
    def __init__(self, options: Options, state: Named, generator: torch.Generator) -> None:
        super().__init__()
        self.output, self.mix = _linear(state, "output"), _Vectors(state["mix.weight"])

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        mixed = torch.tensordot(x, self.mix.weight.softmax(0), dims=([1], [0]))
        out: Tensor = self.output(mixed)
        return out


class _LayerConcat(nn.Module):
    def __init__(self, options: Options, state: Named, generator: torch.Generator) -> None:
        super().__init__()
        self.output = _linear(state, "output")
        self.layers, self.mean = options.get("layers", 0), options.get("mean", "all")

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        layers = x.unbind(1)[-self.layers :]
        if self.mean == "all":
            parts = list(layers)
        else:
            parts = [layer.chunk(2, dim=1)[0] for layer in layers]
            parts += [layers[-1].chunk(2, dim=1)[1]] if self.mean == "last" else []
        out: Tensor = self.output(torch.cat(parts, dim=1))
        return out


STANDARD_HEADS: dict[str, Callable[[Options, Named, torch.Generator], nn.Module]] = {
    "linear": _Linear,
    "mlp": _MLP,
    "residual": _Residual,
    "attention": _SelfAttention,
    "attention-pooling": _AttentionPooling,
    "layer-mix": _LayerMix,
    "layer-concat": _LayerConcat,
}


# Features the way anyone would compute them, with no code of ours: the first half of the standard reference.


BATCH = 32


def load_quietly(folder: Path, spec: Mapping[str, Any], reader: str, model: str, trust: bool) -> tuple[Any, Any]:
    """Load what reads rows and a model, by the names of their classes in ``transformers``, as a spec says."""
    import transformers

    newer = int(transformers.__version__.split(".")[0]) >= 5
    verbosity = transformers.utils.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.set_verbosity(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    by_pillow = {} if reader != "AutoImageProcessor" else {"backend": "pil"} if newer else {"use_fast": False}
    try:
        loaded = getattr(transformers, reader).from_pretrained(folder, trust_remote_code=trust, **by_pillow)
        return loaded, getattr(transformers, model).from_pretrained(
            folder, trust_remote_code=trust, use_safetensors=True, attn_implementation=spec["attention"],
            **{"dtype" if newer else "torch_dtype": getattr(torch, spec["compute_dtype"])},
        )  # fmt: skip
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()  # type: ignore[no-untyped-call]


class StandardModel:
    """A tokenizer and a frozen model as ``transformers`` loads them, set up as the spec of a cache says."""

    def __init__(self, folder: Path, spec: Mapping[str, Any], device: str, *, trust_remote_code: bool = False) -> None:
        self.tokenizer, model = load_quietly(folder, spec, "AutoTokenizer", "AutoModel", trust_remote_code)
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
        changed = copy.copy(self)
        changed.model = network
        return changed

    def inputs(self, contents: Sequence[bytes]) -> dict[str, Tensor]:
        """Tokenise some texts, padded to the longest of them: ids and mask [B, T]."""
        texts = [self.text["prompt"] + content.decode("utf-8") for content in contents]
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

    def __call__(self, contents: Sequence[bytes], wanted: Sequence[FeatureSpec]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the features of one batch, float32 [B, D], [B, L, D] or for tokens [B, T, D], and its mask [B, T]."""
        with torch.no_grad():
            inputs = self.inputs(contents)
            out = self.model(**inputs, output_hidden_states=True)
            return self.pooled(out, inputs, wanted)

    def batch(self, contents: Sequence[bytes], feature: FeatureSet) -> tuple[Tensor, Tensor | None]:
        """Return one feature set of one batch as ``__call__`` does, and of a token-level set the mask."""
        features, mask = self(contents, [FeatureSpec.parse(feature.name)])
        return features[feature.name], mask.cpu() if feature.kind == "tokens" else None

    def pooled(
        self, out: Any, inputs: Mapping[str, Tensor], wanted: Sequence[FeatureSpec]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Pool the outputs of one batch; see ``__call__``."""
        mask = inputs["attention_mask"].bool()
        return {feature.name: pooled(out, mask, feature) for feature in wanted}, mask

    def vectors(self, contents: Sequence[bytes], wanted: Sequence[FeatureSpec]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the features of one batch without padding, tokens as [sum T, D]; and the lengths [B]."""
        features, mask = self(contents, wanted)
        tokens = {feature.name: features[feature.name][mask] for feature in wanted if feature.token_level}
        return {**features, **tokens}, mask.sum(dim=1)

    def features(self, contents: Sequence[bytes], sets: Mapping[str, FeatureSet]) -> dict[str, InMemory]:
        """Return feature sets of many rows, computed in batches of 32 and rounded as they are stored."""
        wanted = [FeatureSpec.parse(name) for name in sets]
        parts = [self.vectors(contents[start : start + BATCH], wanted) for start in range(0, len(contents), BATCH)]
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


# Training the way anyone would write it, with no code of ours: the second half of the standard reference.


class Batchwise(Protocol):
    """What gives the features of a batch anew in every step, of rows by their contents or whatever stands for them."""

    def batch(self, contents: Sequence[Any], feature: FeatureSet) -> tuple[Tensor, Tensor | None]:
        """Return the features of some rows, and of a token-level set which vectors are theirs."""
        ...


def train_standard(
    plan: TrainingPlan, model: Batchwise, contents: Sequence[Any], x: InMemory, y: Array, start: Record,
    evaluation: InMemory,
) -> Record:  # fmt: skip
    """Train a plain head with the backbone run in every step, on the batches and from the initial head of ``start``.

    ``x`` are the standard features of all rows, which standardisation is computed from; ``evaluation`` are those of
    the rows whose logits are recorded.
    """
    spec = plan.spec
    mean, scale = _standardisation(x.values)
    generator = torch.Generator().manual_seed(spec.seed + 2**32)
    net = plain_head(plan.head, start.initial, generator)
    module = Standardised(net, mean.float(), scale.float(), spec.standardize)
    matrices = [value for name, value in net.named_parameters() if value.dim() >= 2 and name.endswith("weight")]
    others = [value for value in net.parameters() if not any(value is matrix for matrix in matrices)]
    groups = [{"params": matrices, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(groups, lr=spec.learning_rate)
        if spec.optimizer == "adamw"
        else torch.optim.SGD(groups, lr=spec.learning_rate, momentum=spec.momentum)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: plain_factor(spec, step, plan.scheduled))
    center, spread = np.zeros(1), np.ones(1)
    if plan.task is REGRESSION:
        center, spread = y.mean(axis=0), np.where(y.std(axis=0) > 0, y.std(axis=0), 1.0)
    targets = torch.from_numpy(y if plan.task is CLASSIFICATION else np.asarray((y - center) / spread, np.float32))
    losses, norms = [], []
    module.train()
    for rows in start.batches:
        features, mask = model.batch([contents[row] for row in rows], plan.feature)
        logits = module(features.cpu().to(getattr(torch, plan.feature.dtype)).float(), mask)
        loss = plain_loss(plan.task, logits, targets[rows], spec.label_smoothing)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [value.grad for value in net.parameters() if value.grad is not None]
        norms.append(math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients)))
        if spec.clip:
            nn.utils.clip_grad_norm_(net.parameters(), spec.clip)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    states = {name: optimizer.state[value] for name, value in net.named_parameters()}
    return Record(
        initial=dict(start.initial),
        standardisation={"mean": mean.float().numpy(), "scale": scale.float().numpy()},
        batches=start.batches,
        losses=np.array(losses, np.float32),
        norms=np.array(norms, np.float32),
        final={name: value.detach().numpy() for name, value in net.named_parameters()},
        first_moments=_state(states, "exp_avg" if spec.optimizer == "adamw" else "momentum_buffer"),
        second_moments=_state(states, "exp_avg_sq"),
        draws=generator.get_state().numpy() if len(start.draws) else start.draws,
        logits=np.asarray(_logits(module.eval(), evaluation) * spread + center, np.float32),
    )


def _state(states: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Array]:
    """Return one of the optimizer's tensors of each parameter, as far as there is one."""
    return {parameter: state[name].numpy() for parameter, state in states.items() if name in state}


def _standardisation(x: Array) -> tuple[Tensor, Tensor]:
    """Return the mean and the scale of each component, float64 [D], of features [..., D]."""
    values = torch.from_numpy(x).double().flatten(0, -2)
    mean, deviation = values.mean(dim=0), values.std(dim=0, unbiased=False)
    # What float32 rounds in a row of such components is not a signal to scale up.
    sizes = torch.stack([mean, deviation]).norm(dim=0).sort().values
    rounding = sizes[int(0.9 * (len(sizes) - 1))] * len(sizes) ** 0.5 * 2**-23
    constant = deviation <= torch.maximum(1e-6 * mean.abs(), rounding)
    return mean, torch.where(constant, torch.ones_like(deviation), 1 / torch.where(constant, 1.0, deviation))


class Standardised(nn.Module):
    """A head behind ``(x - mean) * scale``."""

    def __init__(self, net: nn.Module, mean: Tensor, scale: Tensor, on: bool) -> None:
        super().__init__()
        self.net, self.mean, self.scale, self.on = net, mean, scale, on

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, ..., D] -> [B, C]."""
        out: Tensor = self.net((x - self.mean) * self.scale if self.on else x, mask)
        return out


def _logits(module: nn.Module, x: InMemory) -> Array:
    """Return the logits of features, float64 [N, C]; token-level rows one by one, which need no padding."""
    with torch.no_grad():
        if not isinstance(x, Ragged):
            return np.asarray(module(torch.from_numpy(x.values), None).double().numpy())
        rows = [module(torch.from_numpy(x[row])[None], None) for row in range(len(x))]
        return np.asarray(torch.cat(rows).double().numpy())


def plain_factor(spec: TrainSpec, step: int, total: int) -> float:
    """Return what a step has of the learning rate."""
    warm = math.ceil(spec.warmup * total)
    if step < warm:
        return (step + 1) / warm
    share = min(1.0, (step - warm) / max(1, total - warm))
    if spec.schedule == "constant":
        return 1.0
    return 1 - share if spec.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))


def plain_loss(task: Task, logits: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """Return the mean loss of a batch's logits [B, C]."""
    if task is CLASSIFICATION:
        return F.cross_entropy(logits, y, label_smoothing=smoothing)
    return F.binary_cross_entropy_with_logits(logits, y) if task is MULTILABEL else F.mse_loss(logits, y)
