"""Training the way anyone would write it, with no code of ours: the second half of the standard reference.

A plain ``nn.Module`` as the head, autograd, ``torch.optim.AdamW`` and ``torch.nn.functional``'s losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedcache.equivalence.bits import Array
from embedcache.equivalence.features import InMemory
from embedcache.equivalence.standard_heads import plain_head
from embedcache.equivalence.standard_model import StandardModel
from embedcache.equivalence.subject import TrainingPlan
from embedcache.equivalence.training import Record
from embedcache.features import Ragged
from embedcache.spec import FeatureSpec, TrainSpec
from embedcache.task import CLASSIFICATION, MULTILABEL, REGRESSION, Task


def train_standard(
    plan: TrainingPlan, model: StandardModel, texts: Sequence[str], x: InMemory, y: Array, start: Record,
    evaluation: InMemory,
) -> Record:  # fmt: skip
    """Train a plain head with the backbone run in every step, on the batches and from the initial head of ``start``.

    ``x`` are the standard features of all texts, which standardisation is computed from; ``evaluation`` are those of
    the rows whose logits are recorded.
    """
    spec, feature = plan.spec, FeatureSpec.parse(plan.feature.name)
    mean, scale = _standardisation(x.values)
    generator = torch.Generator().manual_seed(spec.seed + 2**32)
    net = plain_head(plan.head, start.initial, generator)
    module = Standardised(net, mean.float(), scale.float(), spec.standardize)
    matrices = [value for name, value in net.named_parameters() if value.dim() >= 2 and name.endswith("weight")]
    others = [value for value in net.parameters() if not any(value is matrix for matrix in matrices)]
    groups = [{"params": matrices, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=spec.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(spec, step, plan.scheduled))
    center, spread = np.zeros(1), np.ones(1)
    if plan.task is REGRESSION:
        center, spread = y.mean(axis=0), np.where(y.std(axis=0) > 0, y.std(axis=0), 1.0)
    targets = torch.from_numpy(y if plan.task is CLASSIFICATION else np.asarray((y - center) / spread, np.float32))
    losses, norms = [], []
    module.train()
    for rows in start.batches:
        features, mask = model([texts[row] for row in rows], [feature])
        stored = features[feature.name].cpu().to(getattr(torch, plan.feature.dtype)).float()
        logits = module(stored, mask.cpu() if feature.pooling == "tokens" else None)
        loss = _loss(plan.task, logits, targets[rows], spec.label_smoothing)
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
        first_moments={name: state["exp_avg"].numpy() for name, state in states.items()},
        second_moments={name: state["exp_avg_sq"].numpy() for name, state in states.items()},
        draws=generator.get_state().numpy() if len(start.draws) else start.draws,
        logits=np.asarray(_logits(module.eval(), evaluation) * spread + center, np.float32),
    )


def _standardisation(x: Array) -> tuple[Tensor, Tensor]:
    """Return the mean and the scale of each component, float64 [D], of features [..., D]."""
    values = torch.from_numpy(x).double().flatten(0, -2)
    mean, deviation = values.mean(dim=0), values.std(dim=0, unbiased=False)
    # What float32 rounds in a row of such components is no signal to scale up.
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


def _factor(spec: TrainSpec, step: int, total: int) -> float:
    warm = math.ceil(spec.warmup * total)
    if step < warm:
        return (step + 1) / warm
    share = min(1.0, (step - warm) / max(1, total - warm))
    if spec.schedule == "constant":
        return 1.0
    return 1 - share if spec.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))


def _loss(task: Task, logits: Tensor, y: Tensor, smoothing: float) -> Tensor:
    if task is CLASSIFICATION:
        return F.cross_entropy(logits, y, label_smoothing=smoothing)
    return F.binary_cross_entropy_with_logits(logits, y) if task is MULTILABEL else F.mse_loss(logits, y)
