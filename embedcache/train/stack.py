"""K heads of one shape in training together: each batch of features is read once, one step moves them all.

A head in a stack and the same head alone have the same initial weights, batches, dropout, learning rates and formulas.
Only the order differs in which a matrix product adds up, so losses agree to 1e-5, not to the bit. Weights mostly agree
better; but where the input of a ReLU is almost 0, it may be cut off in one and not in the other, which moves that
unit's weights by a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from embedcache.heads.modules import Head, Linear, choose_heads, stack_heads
from embedcache.spec import TrainSpec
from embedcache.task import Floats
from embedcache.train.losses import Loss

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
"""AdamW's constants (Loshchilov & Hutter 2019), torch's defaults."""

FUSED_SIZE = 16_000
"""Numbers in a head from which on it is worth a fused call of its own."""


def schedule_factors(spec: TrainSpec, start: int, steps: int, total: int) -> Floats:
    """Return the factors of the learning rate for ``steps`` steps from ``start`` on, of ``total`` in all.

    Linear warm-up over the first ``warmup`` share of the steps, then constant, linear to 0, or half a cosine to 0.
    """
    step = np.arange(start, start + steps, dtype=np.float64)
    warm = math.ceil(spec.warmup * total)
    rising = (step + 1) / max(warm, 1)
    share = np.clip((step - warm) / max(total - warm, 1), 0.0, 1.0)
    falling = {
        "constant": np.ones_like(share),
        "linear": 1 - share,
        "cosine": 0.5 * (1 + np.cos(np.pi * share)),
    }[spec.schedule]
    return np.where(step < warm, rising, falling)


@dataclass(frozen=True)
class _FusedGroup:
    """Arrays of heads with one setting that a single call of the fused AdamW updates.

    ``numbers`` are those of the parameters, ``places`` those of the heads on the K axis; ``values`` and the moments
    ``first`` and ``second`` are views, parameter by parameter and head by head.
    """

    places: list[int]
    numbers: list[int]
    rate: float
    decay: float
    values: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]


class HeadStack:
    """K heads and their optimizer. A single head is trained by the same code, without the K axis.

    ``alive`` are the numbers of the heads still in training, in the order of the K axis.
    """

    def __init__(self, heads: Sequence[Head], specs: Sequence[TrainSpec], loss: Loss, total_steps: int) -> None:
        self.specs = list(specs)
        self._adam = self.specs[0].optimizer == "adamw"
        self.alive = list(range(len(heads)))
        self.loss = loss
        self._total = total_steps
        self._taken = 0
        self._ahead: tuple[int, Floats] = (0, np.zeros((0, 1)))
        self.stacked = len(heads) > 1
        # Dropout has its own stream: with the seed of the initial weights its draws would depend on them.
        generators = [
            torch.Generator(_device(head)).manual_seed(s.seed + 2**32) for head, s in zip(heads, specs, strict=True)
        ]
        self.module = stack_heads(heads) if self.stacked else heads[0]
        self.module.draw_from(generators)
        self.module.train()
        self._collect()
        self._moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in self.parameters]
        # Where the roots of the second moments go, so that no step fetches memory for them.
        self._scratch = [torch.empty_like(value) for value in self.parameters]
        self._fused = self._fused_groups()
        self._step = torch.zeros((), device=self.parameters[0].device)
        self.best: list[dict[str, Tensor] | None] = [None] * len(heads)

    def _collect(self) -> None:
        self.names = [name for name, _ in self.module.named_parameters()]
        self.parameters = [parameter for _, parameter in self.module.named_parameters()]
        # Decay pulls on matrices, not on biases, gains and embeddings of one vector.
        rank = 3 if self.stacked else 2
        self._decays = [
            value.dim() >= rank and name.endswith("weight") for name, value in self.module.named_parameters()
        ]
        self._plain = type(self.module) is Linear  # a subclass may compute something else
        self._rate = self._per_head([spec.learning_rate for spec in self.specs])
        self._decay = self._per_head([spec.weight_decay for spec in self.specs])
        clips = [spec.clip for spec in self.specs]
        where = self.parameters[0].device
        self._clip = torch.tensor([clip or math.inf for clip in clips], device=where) if any(clips) else None
        self._one_schedule = len({(spec.schedule, spec.warmup) for spec in self.specs}) == 1

    def _per_head(self, values: list[float]) -> float | Tensor:
        return values[0] if len(set(values)) == 1 else torch.tensor(values, dtype=self._precision)

    @property
    def _precision(self) -> torch.dtype:
        # SGD rounds a learning rate once, when it is applied, in a stack as alone.
        return torch.float32 if self._adam else torch.float64

    def __len__(self) -> int:
        return len(self.alive)

    def step(self, x: Tensor, mask: Tensor | None, y: Tensor, rows: Tensor | None = None) -> Tensor:
        """Take one step on a batch and return the losses, [] or [K]. ``rows`` are weights of rows, [B] or [K, B]."""
        loss, gradients = self.gradients(x, mask, y, rows)
        self._clipped(gradients)
        self._update(gradients)
        self._taken += 1
        return loss

    def gradients(
        self, x: Tensor, mask: Tensor | None, y: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the losses and the gradients of all parameters, in their order."""
        if self._plain:
            return self._linear_gradients(x, y, rows)
        logits = self.module(x, mask)
        loss, slope = self.loss(logits.detach().transpose(-1, -2).contiguous(), y, rows)
        slope = slope.transpose(-1, -2)
        return loss, list(torch.autograd.grad(logits, self.parameters, grad_outputs=slope))

    def _linear_gradients(self, x: Tensor, y: Tensor, rows: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        # By hand: one matrix product forward, one back, and no graph.
        layer = self.module.output
        with torch.no_grad():
            weight: Tensor = layer.weight
            assert layer.bias is not None
            bias: Tensor = layer.bias
            mean, scale = layer.mean, layer.scale
            if mean is not None and scale is not None:
                weight = weight * scale.unsqueeze(-2)
                bias = bias - (weight @ mean.unsqueeze(-1)).squeeze(-1)
            # Rows last: the loss runs along them, and neither product needs a transposed copy.
            z = torch.addmm(bias.reshape(-1, 1), weight.reshape(-1, weight.shape[-1]), x.t())
            loss, slope = self.loss(z.view(*bias.shape, -1), y, rows)
            by_weight = torch.mm(slope.view(-1, len(x)), x).view_as(weight)
            by_bias = slope.sum(dim=-1)
            if mean is not None and scale is not None:  # the chain rule through the folded standardisation
                by_weight = (by_weight - by_bias.unsqueeze(-1) * mean.unsqueeze(-2)) * scale.unsqueeze(-2)
            return loss, [by_weight, by_bias]

    def _clipped(self, gradients: list[Tensor]) -> None:
        if self._clip is None:
            return
        if self.stacked:
            # A head is clipped to its own norm, or one that diverges would slow down all others.
            squares = sum(gradient.flatten(1).square().sum(dim=1) for gradient in gradients)
            factor = (self._clip / (torch.as_tensor(squares).sqrt() + 1e-6)).clamp_max(1.0)
            for gradient in gradients:
                gradient.mul_(_spread(factor, gradient))
        else:
            # A dot product needs no array of squares, and most steps then scale nothing.
            flat = [gradient.contiguous().view(-1) for gradient in gradients]
            norm = math.sqrt(sum(float(torch.dot(values, values)) for values in flat))
            if norm > self.specs[0].clip > 0:
                for gradient in gradients:
                    gradient.mul_(self.specs[0].clip / (norm + 1e-6))

    def _factor(self) -> float | Tensor:
        """Return the schedule's factor of this step: one for all heads, or [K]."""
        # A table for many steps: numpy's overhead for a single one is long beside the step of a small head.
        first, table = self._ahead
        if not first <= self._taken < first + len(table):
            different = self.specs[:1] if self._one_schedule else self.specs
            steps = min(1024, max(1, self._total - self._taken))
            table = np.stack([schedule_factors(spec, self._taken, steps, self._total) for spec in different], axis=1)
            self._ahead = first, table = self._taken, table
        row = table[self._taken - first]
        return float(row[0]) if self._one_schedule else torch.from_numpy(row).to(self._precision)

    @torch.no_grad()
    def _update(self, gradients: list[Tensor]) -> None:
        factor = self._factor()
        taken = self._taken + 1
        if self._fused is not None:
            self._update_fused(gradients, factor, taken)
            return
        rate = self._rate * factor
        if not self._adam:
            self._descend(gradients, rate)
            return
        # The moments start at 0; these correct them for the steps so far (Kingma & Ba 2015, section 3).
        grown, root = 1 - BETA1**taken, math.sqrt(1 - BETA2**taken)
        for number, (value, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
            first, second = self._moments[number]
            if self._decays[number]:
                value.mul_(1 - _spread(rate * self._decay, value))
            first.lerp_(gradient, 1 - BETA1)
            second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
            below = torch.sqrt(second, out=self._scratch[number]).div_(root).add_(EPSILON)
            if isinstance(rate, float):
                value.addcdiv_(first, below, value=-rate / grown)
            else:
                _subtract(value, torch.div(first, below, out=below), rate / grown)

    def _descend(self, gradients: list[Tensor], rate: float | Tensor) -> None:
        """Take SGD's step, to the bit as ``torch.optim.SGD`` takes it with these gradients."""
        momentum = self.specs[0].momentum
        for number, (value, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
            decay = self._decay if self._decays[number] else 0.0
            if isinstance(decay, Tensor):
                gradient = torch.addcmul(gradient, value, _across(decay, value))
            elif decay:
                gradient = torch.add(gradient, value, alpha=decay)
            if momentum:
                gradient = self._moments[number][0].mul_(momentum).add_(gradient)
            _subtract(value, gradient, rate)

    def _update_fused(self, gradients: list[Tensor], factor: float | Tensor, taken: int) -> None:
        """Take AdamW's step in one pass over memory, for the heads of each setting together."""
        step = self._step.fill_(taken)
        by_head = [gradient.contiguous().unbind(0) if self.stacked else (gradient,) for gradient in gradients]
        for group in self._fused or ():
            # Heads of a group share their schedule, so any of them tells its factor.
            rate = group.rate * (factor if isinstance(factor, float) else float(factor[group.places[0]]))
            slopes = [by_head[number][place] for number in group.numbers for place in group.places]
            torch._fused_adamw_(
                group.values, slopes, group.first, group.second, [], [step] * len(slopes), lr=rate, beta1=BETA1,
                beta2=BETA2, weight_decay=group.decay, eps=EPSILON, amsgrad=False, maximize=False,
            )  # fmt: skip

    def _fused_groups(self) -> list[_FusedGroup] | None:
        """Return parameters that one fused call of AdamW updates together, where that pays; None elsewhere.

        Many small heads that all differ are faster through a few passes over everything than by many small calls.
        """
        if not self._adam:
            return None
        schedules = [(spec.schedule, spec.warmup) for spec in self.specs]
        settings = [
            (spec.learning_rate, spec.weight_decay, when) for spec, when in zip(self.specs, schedules, strict=True)
        ]
        different = list(dict.fromkeys(settings))
        size = sum(value.numel() for value in self.parameters) // len(self.specs)
        if (len(different) > 4 and size < FUSED_SIZE) or self.parameters[0].device.type not in ("cpu", "cuda"):
            return None

        def views(tensors: Sequence[Tensor], places: list[int]) -> list[Tensor]:
            return [tensor[place] if self.stacked else tensor for tensor in tensors for place in places]

        groups = []
        for setting in different:
            places = [place for place, own in enumerate(settings) if own == setting]
            for decayed in (True, False):
                numbers = [number for number, pulled in enumerate(self._decays) if pulled == decayed]
                if not numbers:
                    continue
                groups.append(
                    _FusedGroup(
                        places, numbers, rate=setting[0], decay=setting[1] if decayed else 0.0,
                        values=views([self.parameters[number].detach() for number in numbers], places),
                        first=views([self._moments[number][0] for number in numbers], places),
                        second=views([self._moments[number][1] for number in numbers], places),
                    )
                )  # fmt: skip
        return groups

    def logits(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the logits of all heads, [K, B, C]."""
        self.module.eval()
        with torch.no_grad():
            logits: Tensor = self.module(x, mask)
        self.module.train()
        return logits if self.stacked else logits.unsqueeze(0)

    def state(self, place: int) -> dict[str, Tensor]:
        """Return a copy of the parameters of the head at a place of the K axis."""
        return {
            name: (value[place] if self.stacked else value).detach().clone()
            for name, value in zip(self.names, self.parameters, strict=True)
        }

    def optimizer_state(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the moments of all heads, by parameter."""
        return dict(zip(self.names, self._moments, strict=True))

    def remember(self, places: Sequence[int]) -> None:
        """Keep the present parameters of the heads at these places as their best."""
        for place in places:
            self.best[self.alive[place]] = self.state(place)

    def keep(self, places: Sequence[int]) -> None:
        """Go on with the heads at these places only; the others cost nothing from here on."""
        # A head that leaves without a best epoch keeps its present weights: ``finish`` returns some for every head.
        for place in set(range(len(self.alive))) - set(places):
            if self.best[self.alive[place]] is None:
                self.remember([place])
        self.alive = [self.alive[place] for place in places]
        if not places or not self.stacked:
            return
        chosen = torch.tensor(places)
        self.specs = [self.specs[place] for place in places]
        self.loss.keep(chosen)
        self.module = choose_heads(self.module, chosen)
        self._moments = [(first[chosen], second[chosen]) for first, second in self._moments]
        self._scratch = [scratch[chosen] for scratch in self._scratch]
        # The chosen heads are copies: the table of rates and the fused calls' views are of arrays no longer trained.
        self._ahead = (0, np.zeros((0, 1)))
        self._collect()
        self._fused = self._fused_groups()

    def finish(self) -> list[dict[str, Tensor]]:
        """Return the best parameters of every head there ever was; the last where nothing was measured."""
        for place, head in enumerate(self.alive):
            if self.best[head] is None:
                self.best[head] = self.state(place)
        return [state for state in self.best if state is not None]


def _device(head: Head) -> torch.device:
    return next(head.parameters()).device


def _spread(value: float | Tensor, like: Tensor) -> float | Tensor:
    """Return numbers [K], one for each head, with axes added so that they multiply a parameter [K, ...]."""
    return value if isinstance(value, (int, float)) else _across(value, like)


def _across(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).to(like.device).view(-1, *[1] * (like.dim() - 1))


def _subtract(value: Tensor, gradient: Tensor, rate: float | Tensor) -> None:
    if isinstance(rate, float):
        value.sub_(gradient, alpha=rate)
    else:
        value.addcmul_(gradient, _across(rate, value), value=-1)
