"""A few steps of training with everything written down, and two such records compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedcache.equivalence.bits import Difference, difference
from embedcache.equivalence.result import Comparison, judged
from embedcache.features import Dense, Features, Ragged
from embedcache.heads import TrainedHead
from embedcache.heads.layers import Dropout
from embedcache.spec import HeadSpec, TrainSpec
from embedcache.train.batches import Batch, Batches, RaggedBatches, TensorBatches
from embedcache.train.data import LabelledRows
from embedcache.train.minibatch import PassOptions, fit_minibatch
from embedcache.train.stack import HeadStack

Array = npt.NDArray[Any]
Named = Mapping[str, Array]


@dataclass
class Record:
    """What training did: S steps, P parameters by name.

    ``initial``, ``final`` and the optimizer's moments are by parameter; ``standardisation`` is mean and 1 / deviation
    [D] each; ``batches`` are the rows of each step; ``losses`` and ``norms`` (of the gradients, before clipping) are
    float32 [S]; ``draws`` is the state of the dropout's generator after the last step.
    """

    initial: dict[str, Array] = field(default_factory=dict)
    standardisation: dict[str, Array] = field(default_factory=dict)
    batches: list[Array] = field(default_factory=list)
    losses: Array = field(default_factory=lambda: np.zeros(0, np.float32))
    norms: Array = field(default_factory=lambda: np.zeros(0, np.float32))
    final: dict[str, Array] = field(default_factory=dict)
    first_moments: dict[str, Array] = field(default_factory=dict)
    second_moments: dict[str, Array] = field(default_factory=dict)
    draws: Array = field(default_factory=lambda: np.zeros(0, np.uint8))
    head: TrainedHead | None = None
    logits: Array = field(default_factory=lambda: np.zeros((0, 0), np.float32))


class _Seen:
    """A source of batches that writes down which rows went by."""

    def __init__(self, source: Batches, rows: list[Array]) -> None:
        self._source, self._rows = source, rows
        self.steps = source.steps

    def epoch(self, number: int) -> Iterator[Batch]:
        for batch in self._source.epoch(number):
            self._rows.append(batch.rows.cpu().numpy())
            yield batch


def cached_batches(x: Features, spec: TrainSpec) -> Batches:
    """Return the source of batches for features in memory."""
    if isinstance(x, Ragged):
        return RaggedBatches(x, spec.batch_size, spec.order_seed, "cpu")
    assert isinstance(x, Dense)
    return TensorBatches(torch.from_numpy(np.array(x.values, np.float32)), spec.batch_size, spec.order_seed)


def train(
    data: LabelledRows,
    batches: Batches,
    head: HeadSpec,
    spec: TrainSpec,
    steps: int,
    *,
    progress: bool = False,
    title: str = "train",
) -> Record:
    """Train one head for so many steps on ``batches`` of raw features and write down what happens.

    ``data`` gives targets, and the features that standardisation is computed from.
    """
    record = Record()
    norms: list[float] = []
    stacks: list[HeadStack] = []

    def watch(stack: HeadStack) -> None:
        stacks.append(stack)
        record.initial = _numpy(stack.state(0))
        layer = next(stack.module.first_layers())
        if layer.mean is not None and layer.scale is not None:
            record.standardisation = _numpy({"mean": layer.mean, "scale": layer.scale})
        gradients = stack.gradients

        def observed(*given: Any) -> tuple[Tensor, list[Tensor]]:
            loss, found = gradients(*given)
            norms.append(float(torch.sqrt(torch.stack([each.double().square().sum() for each in found]).sum())))
            return loss, found

        stack.gradients = observed  # type: ignore[method-assign, assignment]

    options = PassOptions(progress=progress, title=title, keep_losses=True, max_steps=steps, watch=watch)
    (fitted,) = fit_minibatch(data, None, [head], [spec], batches=_Seen(batches, record.batches), options=options)
    stack = stacks[0]
    moments = stack.optimizer_state()
    record.losses = torch.stack(list(fitted.losses)).cpu().numpy()
    record.norms = np.array(norms, np.float32)
    record.final = _numpy(stack.state(0))
    record.first_moments = _numpy({name: each[0] for name, each in moments.items()})
    record.second_moments = _numpy({name: each[1] for name, each in moments.items()})
    dropouts = [each for each in stack.module.modules() if isinstance(each, Dropout)]
    if dropouts and dropouts[0].generators is not None:
        record.draws = dropouts[0].generators[0].get_state().numpy()
    record.head = TrainedHead(head, data.task.name, data.class_names, data.feature, state=fitted.state)
    return record


def _numpy(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    return {name: each.detach().cpu().numpy().copy() for name, each in tensors.items()}


TOLERATED = ("losses", "gradient norms", "final parameters", "optimizer: first", "optimizer: second", "logits")
"""What rounding moves, and therefore has a tolerance where bits need not agree."""


def parts(record: Record, *, relative: bool = False) -> dict[str, Named]:
    """Return what two records are compared in, in the order in which a fault would show.

    With ``relative``, the standardisation is in units that suit a tolerance: components differ by powers of ten.
    """
    moments: Named = record.standardisation
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
    for name in dict.fromkeys([*a, *b]):
        empty = np.zeros(0, np.float32)
        found = difference(a.get(name, empty), b.get(name, empty))
        if found.where is not None and (whole.where is None or found.largest > whole.largest):
            shape = a[name].shape if name in a else ()
            place = ", ".join(str(at) for at in found.where)
            first = first_step(a, b)
            where = f"step {first} first" if first is not None else f"{name}[{place}]" if shape else name
        whole = whole.joined(found, 0)
    return whole, where


def compare(
    reference: str, cached: Record, live: Record, tolerances: Mapping[str, float] | None, given: Sequence[str] = ()
) -> list[Comparison]:
    """Compare two records; without ``tolerances`` every bit must agree. ``given`` was taken from the other."""
    rows = []
    theirs = parts(live, relative=tolerances is not None)
    for what, mine in parts(cached, relative=tolerances is not None).items():
        if what in given or not any(value.size for value in (*mine.values(), *theirs[what].values())):
            continue
        found, where = differences_of(mine, theirs[what])
        tolerance = None if tolerances is None else tolerances.get(what)
        rows.append(judged(reference, what, found, where, tolerance))
    return rows
