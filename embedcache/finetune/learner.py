"""One live model in training: where its batches come from, and the step. The loop is that of training on a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedcache.backbone import Inputs, Prepared
from embedcache.batching import Batch as Shape
from embedcache.finetune.model import FeatureBasedModel
from embedcache.spec import TrainSpec
from embedcache.train.batches import order
from embedcache.train.loop import Scores
from embedcache.train.losses import Loss
from embedcache.train.stack import BETA1, BETA2, EPSILON, schedule_factors


@dataclass(frozen=True)
class ContentBatch:
    """Contents laid out for the network, and which training rows they are, int64 [B] on the model's device."""

    inputs: Inputs
    rows: Tensor


class ContentBatches:
    """Batches of contents, padded to the longest of each batch, in the order that a cache's rows are trained in."""

    def __init__(self, model: FeatureBasedModel, prepared: Prepared, batch_size: int, seed: int) -> None:
        self._model, self._prepared, self._size, self._seed = model, prepared, batch_size, seed
        self.steps = -(-len(prepared.lengths) // batch_size)

    def epoch(self, number: int) -> Iterator[ContentBatch]:
        """Yield the batches of one epoch."""
        rows = order(len(self._prepared.lengths), self._seed, number)
        for start in range(0, len(rows), self._size):
            batch_rows = rows[start : start + self._size]
            inputs = laid_out(self._model, self._prepared, batch_rows)
            yield ContentBatch(inputs, torch.from_numpy(batch_rows).to(self._model.extractor.device))


def laid_out(model: FeatureBasedModel, prepared: Prepared, rows: npt.NDArray[np.int64]) -> Inputs:
    """Return what the network is given for some rows, padded to the longest of them, on the model's device."""
    longest = int(prepared.lengths[rows].max())
    return model.extractor.lay_out(prepared, Shape(longest, len(rows), rows))


@dataclass(frozen=True)
class LiveLoss:
    """A loss and the targets of the training rows, on the model's device."""

    loss: Loss
    y: Tensor

    def __call__(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss of some rows and its gradient at their logits [B, C]."""
        # The classes are in front in ``Loss``, as they are in stacks of heads.
        loss, slope = self.loss(logits.t().contiguous(), self.y[rows], None)
        return loss, slope.t()


class LiveLearner:
    """One live model in training; see ``train.loop.Learner``.

    AdamW with the backbone and the head in groups of their own learning rate; decay is kept off biases and gains.
    ``judge`` gives the validation metric.
    """

    def __init__(
        self,
        model: FeatureBasedModel,
        spec: TrainSpec,
        backbone_rate: float,
        loss: LiveLoss,
        total_steps: int,
        judge: Callable[[], float] | None,
    ) -> None:
        self.model, self._loss, self._judge, self._clip = model, loss, judge, spec.clip
        self.alive: list[int] = [0]
        self._factors = schedule_factors(spec, 0, total_steps, total_steps)
        self._taken = 0
        self._rates: list[float] = []
        self.parameters: list[Tensor] = []
        groups = []
        for module, rate in ((model.backbone, backbone_rate), (model.head, spec.learning_rate)):
            trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
            for decay, parameters in (
                (spec.weight_decay, [parameter for parameter in trainable if parameter.dim() > 1]),
                (0.0, [parameter for parameter in trainable if parameter.dim() <= 1]),
            ):
                if parameters:
                    groups.append({"params": parameters, "lr": rate, "weight_decay": decay})
                    self._rates.append(rate)
                    self.parameters += parameters
        fused = self.parameters[0].device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(groups, betas=(BETA1, BETA2), eps=EPSILON, fused=True if fused else None)
        self._best: dict[str, Tensor] | None = None

    def step(self, batch: ContentBatch) -> Tensor:
        """Take one step."""
        if not self.model.training:  # looking at the validation rows left it in eval mode
            self.model.train()
        factor = float(self._factors[min(self._taken, len(self._factors) - 1)])
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        logits, _ = self.model.run(batch.inputs)
        loss, slope = self._loss(logits.detach(), batch.rows)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward([logits], [slope])
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self._clip)
        self.optimizer.step()
        self._taken += 1
        return loss

    def evaluate(self) -> Scores | None:
        """Return the validation metric, [1]."""
        return None if self._judge is None or not self.alive else np.array([self._judge()])

    def _changing(self) -> Mapping[str, Tensor]:
        """Return what training changes: trainable parameters, and buffers such as the statistics of batch norm."""
        changing = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        if self.model.freeze_backbone:
            return changing
        return changing | {f"backbone.{name}": buffer for name, buffer in self.model.backbone.named_buffers()}

    def remember(self, places: Sequence[int]) -> None:
        """Keep the present weights as the best."""
        if not places:
            return
        if self._best is None:
            self._best = {name: tensor.detach().clone() for name, tensor in self._changing().items()}
            return
        for name, tensor in self._changing().items():
            self._best[name].copy_(tensor.detach())

    def keep(self, places: Sequence[int]) -> None:
        """Go on, or not."""
        self.alive = [self.alive[place] for place in places]

    @torch.no_grad()
    def finish(self) -> None:
        """Restore the best weights; the last where nothing was measured."""
        if self._best is not None:
            for name, tensor in self._changing().items():
                tensor.copy_(self._best[name])
        self.model.eval()
