"""Training the last blocks the way anyone would write it, with no code of ours: the whole network in every step.

Weights start from the same numbers, rows come in the same batches and dropout has the same seed, as these belong to the
question and not to the answer. How far apart two correct answers may be is measured, see ``tolerance``: training from
the cached states is repeated with noise on them as large as the rounding of the blocks before.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embedcache.dataset import evenly_spread
from embedcache.equivalence.bits import Array
from embedcache.equivalence.standard import Standardised, StandardModel, plain_factor, plain_head, plain_loss
from embedcache.equivalence.tolerance import conditioning, feature_tolerance, longest_axis, noisy, storage_tolerance
from embedcache.errors import BackboneError
from embedcache.features import Ragged, Rows
from embedcache.finetune import CachedStates
from embedcache.shard import FeatureSet
from embedcache.spec import FeatureSpec, HeadSpec, TrainSpec
from embedcache.task import REGRESSION, Task

BATCH = 32


@dataclass(frozen=True)
class PlainBlocks:
    """What is trained: the last ``blocks`` of the list at ``place``, and a head on the set ``pooled``.

    ``start`` and ``rates`` are the first numbers and the learning rate of all that is trained, by name:
    ``backbone.NAME`` as in the network, and ``head.NAME``. ``units`` are the mean and the scale [D] that the head
    standardises features by, None for neither. ``dropout`` says whether the blocks drop.
    """

    standard: StandardModel
    place: str
    blocks: int
    head: HeadSpec
    pooled: FeatureSet
    start: Mapping[str, Array]
    rates: Mapping[str, float]
    units: tuple[Tensor, Tensor] | None
    dropout: bool

    def train(
        self, spec: TrainSpec, scheduled: int, batches: Sequence[Rows], contents: Sequence[bytes], y: Array, task: Task,
        evaluation: Sequence[bytes],
    ) -> dict[str, dict[str, Array]]:  # fmt: skip
        """Train on batches of rows, int64 [B] each; return losses, gradients, weights and logits.

        Gradients are those of the first step by name, before clipping, and the norm of all of them in each step.

        Raises ``BackboneError`` for a network whose parameters have other names.
        """
        network = copy.deepcopy(self.standard.model).requires_grad_(False)
        named = dict(network.named_parameters())
        if missing := [name for name in self.start if name.startswith("backbone.") and name[9:] not in named]:
            raise BackboneError(f"as transformers loads it, the network has no {missing[0][9:]}")
        trained = {name: named[name[9:]] for name in self.start if name.startswith("backbone.")}
        first = {name[5:]: value for name, value in self.start.items() if name.startswith("head.")}
        net = plain_head(self.head, first, torch.Generator().manual_seed(spec.seed + 2**32)).to(self.standard.device)
        trained |= {f"head.{name}": value for name, value in net.named_parameters()}
        head = net if self.units is None else Standardised(net, *self.units, True)
        groups = [
            {"params": [value.requires_grad_()], "lr": self.rates[name],
             "weight_decay": spec.weight_decay if value.dim() > 1 else 0.0}
            for name, value in trained.items()
        ]  # fmt: skip
        optimizer = torch.optim.AdamW(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: plain_factor(spec, step, scheduled))
        targets = torch.from_numpy(_standard_units(y, task))
        network.eval()
        for block in list(network.get_submodule(self.place))[-self.blocks :]:  # type: ignore[call-overload]
            block.train(self.dropout)
            for module in block.modules():
                if isinstance(module, nn.BatchNorm2d):  # frozen, as whoever tunes a few blocks on small batches has it
                    module.eval()
        losses, norms, gradients = [], [], dict[str, Array]()
        with torch.random.fork_rng():
            torch.manual_seed(spec.seed)
            for rows in batches:
                logits = self._logits(network, head, [contents[int(row)] for row in rows])
                loss = plain_loss(task, logits, targets[rows].to(logits.device), spec.label_smoothing)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                slopes = {name: value.grad for name, value in trained.items() if value.grad is not None}
                gradients = gradients or {name: _array(slope).copy() for name, slope in slopes.items()}
                norms.append(math.sqrt(sum(float(slope.double().square().sum()) for slope in slopes.values())))
                if spec.clip:
                    nn.utils.clip_grad_norm_(list(trained.values()), spec.clip)
                optimizer.step()
                schedule.step()
                losses.append(float(loss.detach()))
        network.eval(), head.eval()
        with torch.no_grad():
            outputs = [
                self._logits(network, head, evaluation[at : at + BATCH]) for at in range(0, len(evaluation), BATCH)
            ]
        return {
            "losses": {"step": np.array(losses, np.float32)}, "gradients": gradients,
            "gradient norms": {"step": np.array(norms, np.float32)},
            "final weights": {name: _array(value) for name, value in trained.items()},
            "logits": {"row": _array(torch.cat(outputs).float())},
        }  # fmt: skip

    def _logits(self, network: nn.Module, head: nn.Module, contents: Sequence[bytes]) -> Tensor:
        inputs = self.standard.inputs(contents)
        outputs = network(**inputs, output_hidden_states=True)
        features, mask = self.standard.pooled(outputs, inputs, [FeatureSpec.parse(self.pooled.name)])
        logits: Tensor = head(features[self.pooled.name], mask if self.pooled.kind == "tokens" else None)
        return logits


def _array(value: Tensor) -> Array:
    return np.asarray(value.detach().cpu().numpy())


def _standard_units(y: Array, task: Task) -> Array:
    if task is REGRESSION:
        spread = np.where(y.std(axis=0) > 0, y.std(axis=0), 1.0)
        return np.asarray((y - y.mean(axis=0)) / spread, np.float32)
    return y if y.ndim == 1 else y.astype(np.float32)


def states_tolerance(standard: StandardModel, states: FeatureSet, contents: Sequence[bytes], stored: Ragged) -> Array:
    """Return how far apart two correct computations of cached states may be, float64 [D], storage included."""
    some = [contents[int(row)] for row in evenly_spread(len(contents), BATCH)]
    wanted = [FeatureSpec.parse(states.name)]
    kappa = conditioning(standard.model, lambda moved: standard.with_network(moved).vectors(some, wanted)[0])
    computed = feature_tolerance(kappa[states.name], longest_axis(standard.model), "float32", stored.values.size)
    return computed + storage_tolerance(np.abs(stored.values).max(axis=0), computed, states.dtype)


class NoisyStates(CachedStates):
    """States of a cache with noise of the size of a tolerance [D]."""

    def __init__(self, cache: Any, rows: Rows, feature: FeatureSet, device: Any, tolerance: Array, seed: int) -> None:
        super().__init__(cache, rows, feature, device)
        self._tolerance, self._seed = tolerance, seed

    def of(self, rows: Rows) -> Ragged:
        """Return the states of some rows."""
        states = noisy(super().of(rows), self._tolerance, self._seed)
        assert isinstance(states, Ragged)
        return states
