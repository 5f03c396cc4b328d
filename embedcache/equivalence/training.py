"""A few steps of training with everything written down, and two such records compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedcache.equivalence.bits import Array, Difference, difference
from embedcache.equivalence.result import Comparison, judged
from embedcache.equivalence.rows import TrainingPlan
from embedcache.features import InMemory, joined
from embedcache.heads import TrainedHead
from embedcache.heads.modules import Dropout
from embedcache.train.batches import Batches, FeatureBatch
from embedcache.train.data import LabelledRows
from embedcache.train.minibatch import PassOptions, batches_of, fit_minibatch
from embedcache.train.result import Fitted
from embedcache.train.stack import HeadStack

Named = Mapping[str, Array]


@dataclass(frozen=True)
class Record:
    """What training did: S steps, P parameters by name.

    ``initial``, ``final`` and the optimizer's moments (of SGD the first ones alone) are by parameter;
    ``standardisation`` is mean and 1 / deviation [D] each; ``batches`` are the rows of each step; ``losses`` and
    ``norms`` (of the gradients, before clipping) are float32 [S]; ``draws`` is the state of the dropout's generator
    after the last step; ``logits`` are those of the evaluation rows, float32 [N, C]. ``head`` is None where the trained
    head is a plain module.
    """

    initial: Named
    standardisation: Named
    batches: Sequence[Array]
    losses: Array
    norms: Array
    final: Named
    first_moments: Named
    second_moments: Named
    draws: Array
    logits: Array
    head: TrainedHead | None = None


@dataclass
class _Watched(Batches):
    """A source of batches that writes down which rows went by, and what the first step starts from."""

    source: Batches
    batches: list[Array] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    stacks: list[HeadStack] = field(default_factory=list)
    initial: Named = field(default_factory=dict)
    standardisation: Named = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return self.source.steps

    def epoch(self, number: int) -> Iterator[FeatureBatch]:
        for batch in self.source.epoch(number):
            self.batches.append(batch.rows.cpu().numpy())
            yield batch

    def start(self, stack: HeadStack) -> None:
        """Write down what training starts from, and from now on the norm of every step's gradients."""
        self.stacks.append(stack)
        self.initial = _numpy(stack.state(0))
        if stack.module.standardised is not None:
            mean, scale = stack.module.standardised
            self.standardisation = _numpy({"mean": mean, "scale": scale})
        gradients_of = stack.gradients

        def observed(
            x: Tensor, mask: Tensor | None, y: Tensor, rows: Tensor | None = None
        ) -> tuple[Tensor, list[Tensor]]:
            loss, gradients = gradients_of(x, mask, y, rows)
            square = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()
            self.norms.append(float(torch.sqrt(square)))
            return loss, gradients

        stack.gradients = observed  # type: ignore[method-assign]


def train(
    plan: TrainingPlan, x: InMemory, y: Array, evaluation: InMemory, batches: Batches | None = None, *,
    views: Sequence[InMemory] = (), progress: bool = False, title: str = "train",
) -> Record:  # fmt: skip
    """Train one head as planned and write down what happens.

    Standardisation is computed from ``x``; ``batches`` of raw features are made of it where none are given.
    ``views`` are those of the rows. ``evaluation`` are the features of the rows whose logits are recorded.
    """
    every: Any = joined([x, *views]) if views else x
    watched = _Watched(batches or batches_of(every, plan.spec, views=len(views)))
    rows = LabelledRows(x, y, plan.task, plan.class_names, views=every if views else None)
    options = PassOptions(progress=progress, title=title, keep_losses=True, max_steps=plan.steps, watch=watched.start)
    (fitted,) = fit_minibatch(rows, None, [plan.head], [plan.spec], batches=watched, options=options)
    refuse_interrupted(fitted)
    stack = watched.stacks[0]
    moments = stack.optimizer_state()
    generators = [module.generators for module in stack.module.modules() if isinstance(module, Dropout)]
    head = TrainedHead(plan.head, plan.task.name, plan.class_names, plan.feature, state=fitted.state)
    return Record(
        initial=watched.initial,
        standardisation=watched.standardisation,
        batches=watched.batches,
        losses=torch.stack(list(fitted.losses)).cpu().numpy(),
        norms=np.array(watched.norms, np.float32),
        final=_numpy(stack.state(0)),
        first_moments=_numpy({name: pair[0] for name, pair in moments.items()}),
        second_moments=_numpy({name: pair[1] for name, pair in moments.items() if plan.spec.optimizer == "adamw"}),
        draws=generators[0][0].get_state().numpy() if generators and generators[0] else np.zeros(0, np.uint8),
        logits=np.asarray(head.logits(evaluation), np.float32),
        head=head,
    )


def refuse_interrupted(fitted: Fitted) -> None:
    """Raise ``KeyboardInterrupt`` where Ctrl-C ended training early: half of it would be taken for a difference."""
    if fitted.interrupted:
        raise KeyboardInterrupt


def _numpy(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}


TOLERATED = ("losses", "gradient norms", "final parameters", "optimizer: first", "optimizer: second", "logits")
"""What rounding moves, and therefore has a tolerance where bits need not agree."""


def parts(record: Record, *, relative: bool = False) -> dict[str, Named]:
    """Return what two records are compared in, in the order in which a fault would show.

    With ``relative``, the standardisation is in units that suit a tolerance: components differ by powers of ten.
    """
    moments = record.standardisation
    if relative and moments:
        mean, scale = (moments[name].astype(np.float64) for name in ("mean", "scale"))
        moments = {
            "mean / deviation": (mean * scale).astype(np.float32),
            "log scale": np.log(scale).astype(np.float32),
        }
    return {
        "initial head": record.initial,
        "batch order": {"step": _laid_out(record.batches)},
        "standardisation": moments,
        "dropout draws": {"generator": record.draws},
        "losses": {"step": record.losses},
        "gradient norms": {"step": record.norms},
        "final parameters": record.final,
        "optimizer: first": record.first_moments,
        "optimizer: second": record.second_moments,
    }


def _laid_out(batches: Sequence[Array]) -> Array:
    """Return the rows of each step as one array [S, B], the missing places of smaller batches -1."""
    widest = max(map(len, batches), default=0)
    return np.array([[*rows, *[-1] * (widest - len(rows))] for rows in batches], np.int64).reshape(-1, widest)


def first_step(a: Named, b: Named) -> int | None:
    """Return the first step in which two series differ, None for none."""
    if "step" not in a or "step" not in b or a["step"].shape != b["step"].shape:
        return None
    differs = (a["step"] != b["step"]).reshape(len(a["step"]), -1).any(axis=1)
    return int(differs.argmax()) if differs.any() else None


def differences_of(a: Named, b: Named) -> tuple[Difference, str]:
    """Return what two sets of named arrays differ in, and in words where."""
    whole, where = Difference(), ""
    empty = np.zeros(0, np.float32)
    first = first_step(a, b)
    for name in dict.fromkeys([*a, *b]):
        gap = difference(a.get(name, empty), b.get(name, empty))
        if gap.where is not None and (whole.where is None or gap.largest > whole.largest):
            place = f"{name}[{', '.join(map(str, gap.where))}]" if name in a and a[name].shape else name
            where = place if first is None else f"step {first} first"
        whole = whole.joined(gap, 0)
    return whole, where


def compare_records(
    reference: str, cached: Record, live: Record, tolerances: Mapping[str, float] | None, taken: Sequence[str] = ()
) -> list[Comparison]:
    """Compare two records; without ``tolerances`` every bit must agree. What was ``taken`` from the other is left out.

    A part that has no values on either side, such as the draws of a head without dropout, is left out too.
    """
    comparisons = []
    live_parts = parts(live, relative=tolerances is not None)
    for what, values in parts(cached, relative=tolerances is not None).items():
        if what in taken or not any(value.size for value in (*values.values(), *live_parts[what].values())):
            continue
        gap, where = differences_of(values, live_parts[what])
        comparisons.append(judged(reference, what, gap, where, None if tolerances is None else tolerances.get(what)))
    return comparisons
