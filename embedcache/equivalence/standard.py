"""The same work the way anyone would write it, with nothing of ours: the reference that shares no code with us.

``AutoTokenizer`` with ``padding="longest"``, a plain ``AutoModel`` under ``no_grad``, pooling in a few lines of torch,
a plain ``nn.Module`` as the head, autograd, ``torch.optim.AdamW`` and ``torch.nn.functional``'s losses.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedcache.equivalence.plain import plain_head
from embedcache.equivalence.training import Record
from embedcache.spec import FeatureSpec, HeadSpec, TaskName, TrainSpec

Array = npt.NDArray[Any]
BATCH = 32


class StandardModel:
    """A tokenizer and a frozen model as ``transformers`` loads them, set up as the spec of a cache says."""

    def __init__(self, folder: Path, spec: Mapping[str, Any], device: str, *, trust_remote_code: bool = False) -> None:
        import transformers

        said = transformers.utils.logging.get_verbosity()
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
            transformers.utils.logging.set_verbosity(said)
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
            return {each.name: pooled(out, mask, each) for each in wanted}, mask

    def features(self, texts: Sequence[str], wanted: Sequence[FeatureSpec]) -> dict[str, Any]:
        """Return the features of many texts in batches of 32: arrays [N, ...], or (values, offsets) for tokens."""
        made: dict[str, list[Array]] = {each.name: [] for each in wanted}
        lengths: list[Array] = []
        for start in range(0, len(texts), BATCH):
            found, mask = self(texts[start : start + BATCH], wanted)
            lengths.append(mask.sum(dim=1).cpu().numpy())
            for each in wanted:
                x = found[each.name][mask] if each.pooling == "tokens" else found[each.name]
                made[each.name].append(x.cpu().numpy())
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        joined: dict[str, Any] = {name: np.concatenate(each) for name, each in made.items()}
        return {
            each.name: (joined[each.name], offsets) if each.pooling == "tokens" else joined[each.name]
            for each in wanted
        }


def pooled(out: Any, mask: Tensor, spec: FeatureSpec) -> Tensor:
    """Pool the hidden states of one batch, in float32; tokens are left as they are, [B, T, D]."""
    if spec.pooling == "pooler":
        vectors: Tensor = out.pooler_output.float()
    else:
        layers = range(len(out.hidden_states)) if spec.layers is None else spec.layers
        each = [
            _pooled((out.last_hidden_state if layer == -1 else out.hidden_states[layer]).float(), mask, spec.pooling)
            for layer in layers
        ]
        vectors = torch.stack(each, dim=1) if spec.multi_layer else each[0]
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


def train_standard(
    model: StandardModel,
    texts: Sequence[str],
    y: Array,
    x: Any,
    feature: FeatureSpec,
    head: HeadSpec,
    spec: TrainSpec,
    task: TaskName,
    start: Record,
    total_steps: int,
    dtype: str = "float32",
) -> tuple[Record, nn.Module]:
    """Train a plain head with the backbone run in every step, on the batches and from the head of ``start``.

    ``x`` are the standard features of all texts, which standardisation is computed from; ``dtype`` is what features
    are stored in. Returns what happened and the module, which reads raw features.
    """
    values = torch.from_numpy(x[0] if isinstance(x, tuple) else x).double().flatten(0, -2)
    mean, deviation = values.mean(dim=0), values.std(dim=0, unbiased=False)
    # What float32 rounds in a row of such components is no signal to scale up.
    sizes = torch.stack([mean, deviation]).norm(dim=0).sort().values
    rounded = sizes[int(0.9 * (len(sizes) - 1))] * len(sizes) ** 0.5 * 2**-23
    constant = deviation <= torch.maximum(1e-6 * mean.abs(), rounded)
    scale = torch.where(constant, torch.ones_like(deviation), 1 / torch.where(constant, 1.0, deviation))
    generator = torch.Generator().manual_seed(spec.seed + 2**32)
    net = plain_head(head, start.initial, generator)
    module = Standardised(net, mean.float(), scale.float(), spec.standardize)
    matrices = [each for name, each in net.named_parameters() if each.dim() >= 2 and name.endswith("weight")]
    others = [each for each in net.parameters() if not any(each is one for one in matrices)]
    groups = [{"params": matrices, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=spec.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(spec, step, total_steps))
    if task == "regression":
        y = (y - y.mean(axis=0)) / np.where(y.std(axis=0) > 0, y.std(axis=0), 1.0)
    targets = torch.from_numpy(y if task == "classification" else np.asarray(y, np.float32))
    record = Record(
        initial=dict(start.initial), standardisation={"mean": mean.float().numpy(), "scale": scale.float().numpy()}
    )
    record.batches = list(start.batches)
    losses, norms = [], []
    module.train()
    for rows in start.batches:
        found, mask = model([texts[row] for row in rows], [feature])
        features = found[feature.name].cpu()
        logits = module(features.to(getattr(torch, dtype)).float(), mask.cpu() if feature.pooling == "tokens" else None)
        loss = _loss(task, logits, targets[rows], spec.label_smoothing)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norms.append(
            math.sqrt(
                sum(float(each.grad.double().square().sum()) for each in net.parameters() if each.grad is not None)
            )
        )
        if spec.clip:
            nn.utils.clip_grad_norm_(net.parameters(), spec.clip)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    record.losses, record.norms = np.array(losses, np.float32), np.array(norms, np.float32)
    record.final = {name: each.detach().numpy() for name, each in net.named_parameters()}
    record.first_moments = {name: optimizer.state[each]["exp_avg"].numpy() for name, each in net.named_parameters()}
    record.second_moments = {name: optimizer.state[each]["exp_avg_sq"].numpy() for name, each in net.named_parameters()}
    record.draws = generator.get_state().numpy() if len(start.draws) else start.draws
    return record, module.eval()


class Standardised(nn.Module):
    """A head behind ``(x - mean) * scale``."""

    def __init__(self, net: nn.Module, mean: Tensor, scale: Tensor, on: bool) -> None:
        super().__init__()
        self.net, self.mean, self.scale, self.on = net, mean, scale, on

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, ..., D] -> [B, C]."""
        out: Tensor = self.net((x - self.mean) * self.scale if self.on else x, mask)
        return out


def logits_of(module: nn.Module, x: Any, y: Array, task: TaskName) -> Array:
    """Return the logits of features [N, ...] or (values, offsets), in real units for a regression; ``y`` are the
    training targets."""
    with torch.no_grad():
        if isinstance(x, tuple):
            found = [module(torch.from_numpy(each)[None], None) for each in np.split(x[0], x[1][1:-1])]
            logits = torch.cat(found).double().numpy()
        else:
            logits = module(torch.from_numpy(x), None).double().numpy()
    if task == "regression":
        logits = logits * np.where(y.std(axis=0) > 0, y.std(axis=0), 1.0) + y.mean(axis=0)
    return np.asarray(logits, np.float32)


def _factor(spec: TrainSpec, step: int, total: int) -> float:
    warm = math.ceil(spec.warmup * total)
    if step < warm:
        return (step + 1) / warm
    share = min(1.0, (step - warm) / max(1, total - warm))
    if spec.schedule == "constant":
        return 1.0
    return 1 - share if spec.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))


def _loss(task: TaskName, logits: Tensor, y: Tensor, smoothing: float) -> Tensor:
    if task == "classification":
        return F.cross_entropy(logits, y, label_smoothing=smoothing)
    return F.binary_cross_entropy_with_logits(logits, y) if task == "multilabel" else F.mse_loss(logits, y)
