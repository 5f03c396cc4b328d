"""The engine of minibatches, on torch: one head, or K of one shape as a stack."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedcache.errors import SpecError
from embedcache.features import Array, Dense, Features, OnDisk, Ragged
from embedcache.heads import build_head, stack_key
from embedcache.heads.modules import Head, Linear
from embedcache.spec import MAY_DIFFER, HeadSpec, TrainSpec
from embedcache.task import CLASSIFICATION, REGRESSION, Flags, Floats
from embedcache.train.batches import (
    Batches,
    DiskBatches,
    DisturbedBatches,
    FeatureBatch,
    RaggedBatches,
    TensorBatches,
    lent,
)
from embedcache.train.data import LabelledRows, class_weights, moments, target_moments
from embedcache.train.loop import Scores, Stopping, fit, still_improving
from embedcache.train.losses import Loss, start_at, start_biases
from embedcache.train.metrics import scores
from embedcache.train.result import Fitted
from embedcache.train.stack import HeadStack
from embedcache.wording import counted

Vectors = npt.NDArray[np.float32]

STACK_NUMBERS = 1_600_000
"""The most parameters of a stack: beyond about 6 MB, its weights no longer fit in the processor's cache."""

SMALL_STEP = 3e7
"""Floating-point operations of a step up to which one thread is enough: about a fifth of a millisecond."""


_EVALUATED_ROWS, _EVALUATED_TOKENS = 8192, 1 << 17
"""How much is judged at once."""


@dataclass(frozen=True, eq=False)
class Masks:
    """Which rows each head trains on and is judged by, for heads that share one pass: folds, or subsets.

    ``train`` and ``evaluate`` are bool [M, N]; head k uses row ``of[k]`` of both.
    """

    train: Flags
    evaluate: Flags
    of: npt.NDArray[np.int64]


@dataclass(frozen=True)
class PassOptions:
    """How a pass is carried out, beside what it trains.

    Attributes:
        device: where: ``cpu``, ``cuda`` or ``mps``.
        progress: whether a bar is shown on a terminal.
        title: what the bar is called.
        keep_losses: keep the loss of each step.
        max_steps: end after this many steps; None for no limit.
        watch: is shown the stack before its first step.
        until: when to end as Ctrl-C does, after an epoch, by ``time.perf_counter``.
    """

    device: str = "cpu"
    progress: bool = True
    title: str = "train"
    keep_losses: bool = False
    max_steps: int | None = None
    watch: Callable[[HeadStack], None] | None = None
    until: float = math.inf


@dataclass(frozen=True, eq=False)
class Standardisation:
    """What features are standardised by: mean and scale of all training rows, float32 [D].

    Heads on folds each have training rows of their own. Their features are standardised by all rows together, once, and
    what is left is each head's difference: ``own_mean`` and ``own_scale``, float32 [M, D], of what is standardised.
    ``applied`` says that the features are standardised already; otherwise the heads' first layers do it.
    """

    mean: Vectors
    scale: Vectors
    applied: bool
    masks: Masks | None = None
    own_mean: Vectors | None = None
    own_scale: Vectors | None = None

    def of(self, head: int) -> tuple[Vectors, Vectors]:
        """Return mean and scale of one head, [D]."""
        if self.masks is None or self.own_mean is None or self.own_scale is None:
            return self.mean, self.scale
        mask = int(self.masks.of[head])
        return self.mean + self.own_mean[mask] / self.scale, self.scale * self.own_scale[mask]

    def tell(self, stack: HeadStack, device: str) -> None:
        """Set what the first layers of the heads still have to standardise."""
        if self.masks is not None and self.own_mean is not None and self.own_scale is not None:
            of = self.masks.of if stack.stacked else self.masks.of[0]
            mean, scale = self.own_mean[of], self.own_scale[of]
        elif not self.applied:
            mean, scale = self.mean, self.scale
        else:
            return
        stack.module.standardize(torch.from_numpy(mean).to(device), torch.from_numpy(scale).to(device))


Prepared = Tensor | Ragged | OnDisk
"""Features as a pass reads them: a tensor on the device, or rows that are brought there batch by batch."""


class HeadLearner:
    """K heads learning from batches of features; see ``loop.Learner``."""

    def __init__(
        self, stack: HeadStack, y: Tensor, weight: Tensor | None, masks: Masks | None, judge: Judge | None
    ) -> None:
        self.stack = stack
        self._y, self._weight, self._judge = y, weight, judge
        self._masks = masks
        self._train = None if masks is None else torch.from_numpy(masks.train.astype(np.float32)).to(y.device)

    @property
    def alive(self) -> Sequence[int]:
        """The numbers of the heads still in training."""
        return self.stack.alive

    def step(self, batch: FeatureBatch) -> Tensor:
        """Take one step."""
        return self.stack.step(batch.x, batch.mask, self._y.index_select(0, batch.rows), self._weights(batch.rows))

    def _weights(self, rows: Tensor) -> Tensor | None:
        weight = None if self._weight is None else self._weight[rows]
        if self._train is None or self._masks is None:
            return weight
        # Heads on folds read the same batches: the rows that a head's fold holds out weigh nothing in its loss.
        by_head = self._train[:, rows][torch.from_numpy(self._masks.of[self.stack.alive])]
        by_head = by_head if weight is None else by_head * weight
        return by_head if self.stack.stacked else by_head[0]

    def evaluate(self) -> Scores | None:
        """Return the validation metric of each head still in training."""
        return None if self._judge is None else self._judge(self.stack)

    def remember(self, places: Sequence[int]) -> None:
        """Keep present weights as the best."""
        self.stack.remember(places)

    def keep(self, places: Sequence[int]) -> None:
        """Go on with some heads."""
        self.stack.keep(places)


@dataclass(frozen=True, eq=False)
class Judge:
    """The validation metric of every head in a stack, on rows of its own.

    ``x`` are the features of the ``rows``, prepared; ``target`` mean and deviation of the targets that were trained on.
    """

    rows: LabelledRows
    x: Prepared
    metric: str
    masks: Masks | None
    target: tuple[Floats, Floats]
    device: str

    def __call__(self, stack: HeadStack) -> Scores:
        """Return [K]."""
        if self.masks is None:
            return self._scores(stack, None, self.x, self.rows.y)
        out = np.empty(len(stack))
        of = self.masks.of[stack.alive]
        for mask in np.unique(of):
            places = np.flatnonzero(of == mask)
            rows = np.flatnonzero(self.masks.evaluate[mask])
            x = self.x[torch.from_numpy(rows)] if isinstance(self.x, Tensor) else self.x.take(rows)
            heads = torch.from_numpy(places) if stack.stacked else None
            out[places] = self._scores(stack, heads, x, self.rows.y[rows])
        return out

    def _scores(self, stack: HeadStack, heads: Tensor | None, x: Prepared, y: Array) -> Scores:
        outputs = outputs_of(stack, x, heads, self.device)
        if self.rows.task is REGRESSION:
            outputs = outputs * self.target[1] + self.target[0]
        return scores(self.metric, self.rows.task, y, outputs)


def outputs_of(stack: HeadStack, x: Prepared, heads: Tensor | None = None, device: str = "cpu") -> Array:
    """Return probabilities (values for a regression) of K heads on rows of features, float32 [K, N, C]."""
    parts = []
    for batch, mask in _evaluation_batches(x):
        z = stack.logits(batch.to(device), None if mask is None else mask.to(device), heads)
        if stack.loss.task.link == "softmax":
            z = z.softmax(dim=-1)
        elif stack.loss.task.link == "sigmoid":
            z = z.sigmoid()
        parts.append(z.cpu())
    return torch.cat(parts, dim=1).numpy()


def _evaluation_batches(x: Prepared) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield (x, mask) of all rows in their order, in tensors of a manageable size."""
    if isinstance(x, Tensor):
        for start in range(0, len(x), _EVALUATED_ROWS):
            yield x[start : start + _EVALUATED_ROWS], None
    elif isinstance(x, OnDisk):
        for block in x.blocks():
            yield lent(block.values), None
    else:
        start = 0
        while start < len(x):
            stop, longest = start, 0
            while stop < len(x):
                longest = max(longest, int(x.offsets[stop + 1] - x.offsets[stop]))
                if stop > start and longest * (stop + 1 - start) > _EVALUATED_TOKENS:
                    break
                stop += 1
            values, mask = x.padded(np.arange(start, stop))
            yield torch.from_numpy(values), torch.from_numpy(mask)
            start = stop


def refuse_unstackable(heads: Sequence[HeadSpec], specs: Sequence[TrainSpec]) -> None:
    """Raise ``SpecError`` unless heads and settings can be trained as one stack."""
    if len(heads) != len(specs) or not heads:
        raise SpecError(f"{counted(len(heads), 'head')} and {len(specs)} settings: expected one setting for each head")
    if len({stack_key(head) for head in heads}) > 1 or heads[0].engine != "torch":
        raise SpecError("a stack holds torch heads of one kind and shape, which may differ in dropout only")
    for name in TrainSpec.__dataclass_fields__:
        values = {repr(getattr(spec, name if name != "shuffle_seed" else "order_seed")) for spec in specs}
        if name not in MAY_DIFFER and len(values) > 1:
            raise SpecError(f"the heads of a stack must share {name}, got {', '.join(sorted(values)[:3])}")
    if len({bool(spec.clip) for spec in specs}) > 1:
        raise SpecError("the heads of a stack are all clipped or none is: clip is 0 for some of them")


def fit_minibatch(
    rows: LabelledRows,
    judged: LabelledRows | None,
    heads: Sequence[HeadSpec],
    specs: Sequence[TrainSpec],
    *,
    masks: Masks | None = None,
    batches: Batches | None = None,
    options: PassOptions = PassOptions(),
) -> list[Fitted]:
    """Train K heads of one shape in one pass or, where they outgrow the processor's cache, a few.

    ``judged`` are validation rows; with ``masks`` they must be ``rows`` itself. ``batches`` replaces the source of
    features; ``rows`` then gives only targets and moments.
    """
    refuse_unstackable(heads, specs)
    size = sum(weight.numel() for weight in build_head(heads[0], rows.feature, rows.outputs).parameters())
    most = max(1, STACK_NUMBERS // size) if batches is None else len(heads)
    results: list[Fitted] = []
    for begin in range(0, len(heads), most):
        part = slice(begin, begin + most)
        results += _Pass(
            rows, judged, heads[part], specs[part],
            None if masks is None else replace(masks, of=masks.of[part]), batches, options,
        ).run()  # fmt: skip
        if results[-1].interrupted and begin + most < len(heads):
            raise KeyboardInterrupt  # some heads have not begun
    return results


@dataclass(frozen=True, eq=False)
class _Pass:
    """K heads of one shape and the rows that they are trained on in one pass; arguments as in ``fit_minibatch``."""

    rows: LabelledRows
    judged: LabelledRows | None
    heads: Sequence[HeadSpec]
    specs: Sequence[TrainSpec]
    masks: Masks | None
    batches: Batches | None
    options: PassOptions

    def run(self) -> list[Fitted]:
        """Train the heads."""
        rows, spec, options = self.rows, self.specs[0], self.options
        device = options.device
        modules = [
            build_head(head, rows.feature, rows.outputs, seed=own.seed).to(device)
            for head, own in zip(self.heads, self.specs, strict=True)
        ]
        target = target_moments(rows.y, rows.task)
        y = (rows.y - target[0]) / target[1] if rows.task is REGRESSION else rows.y
        weights = self._class_weights()
        self._set_biases(modules, y, weights)
        trained = rows.trained
        mean, scale = moments(trained, rows.trained_weight) if spec.standardize else (None, None)
        # Arrays in memory are standardised once; anything else is left as it is, and the heads' first layers do it.
        dense = isinstance(trained, Dense) and (self.judged is None or isinstance(self.judged.x, Dense))
        plain = self.batches is None and dense
        applied = (mean, scale) if plain and mean is not None and scale is not None else None
        x = _prepared(trained, applied, device)
        source = self._disturbed(self.batches or batches_of(x, spec, device, rows.of_views), applied is not None)
        standardisation: Standardisation | None = None
        if mean is not None and scale is not None:
            standardisation = Standardisation(mean, scale, plain)
            if self.masks is not None:
                if not isinstance(x, Tensor) or not plain:
                    raise SpecError("heads that share a pass over different rows need arrays in memory as features")
                own_mean, own_scale = _masked_moments(x, np.tile(self.masks.train, rows.of_views + 1))
                standardisation = replace(standardisation, masks=self.masks, own_mean=own_mean, own_scale=own_scale)
        loss = Loss(rows.task, rows.outputs, [own.label_smoothing for own in self.specs], weights, device=device)
        stopping = Stopping.of(spec, rows.task, source.steps, options.max_steps)
        stack = HeadStack(modules, self.specs, loss, stopping.epochs * source.steps)
        if standardisation is not None:
            standardisation.tell(stack, device)
        if options.watch is not None:
            options.watch(stack)
        judge = None
        if self.judged is not None and len(self.judged):
            if self.judged is not rows:
                judged_x = _prepared(self.judged.x, applied, device)
            else:  # by the rows themselves, which stand in front of their views
                judged_x = x[: len(rows)] if isinstance(x, Tensor) else _prepared(rows.x, None, device)
            judge = Judge(self.judged, judged_x, stopping.metric, self.masks, target, device)
        weight = None if rows.weight is None else torch.from_numpy(rows.weight).to(device)
        targets = torch.from_numpy(y if rows.task is CLASSIFICATION else np.asarray(y, np.float32)).to(device)
        learner = HeadLearner(stack, targets, weight, self.masks, judge)
        with _threads_for(stack, rows, spec) if self.batches is None else nullcontext():
            result = fit(
                learner, source, stopping, title=options.title, progress=options.progress,
                keep_losses=options.keep_losses, until=options.until,
            )  # fmt: skip
        real = target if rows.task is REGRESSION else None
        states = [
            _in_real_units(state, modules[0], None if standardisation is None else standardisation.of(head), real)
            for head, state in enumerate(stack.finish())
        ]
        return [
            Fitted(
                state, history=history, epochs=stopping.epochs, best_epoch=best, steps=result.steps,
                seconds=result.seconds, interrupted=result.interrupted,
                improving=still_improving(history, best, own, stopping.epochs), losses=result.losses,
            )
            for state, history, best, own in zip(states, result.history, result.best_epoch, self.specs, strict=True)
        ]  # fmt: skip

    def _disturbed(self, source: Batches, standardised: bool) -> Batches:
        """Return the batches with noise and dropout, in units of the features as the batches have them.

        Heads on folds share the draws, in units of all rows together: what a batch is must not depend on the head.
        """
        spec = self.specs[0]
        if not spec.input_noise and not spec.input_dropout:
            return source
        if standardised:
            return DisturbedBatches(source, spec, 0.0, 1.0)
        both = moments(self.rows.trained, self.rows.trained_weight)
        mean, scale = (torch.from_numpy(part).to(self.options.device) for part in both)
        return DisturbedBatches(source, spec, mean, 1 / scale)

    def _class_weights(self) -> Vectors | None:
        """Return the class weights of each head, [K, C], of its own training rows; None where no head has any."""
        y, task, names = self.rows.y, self.rows.task, self.rows.class_names
        if self.masks is None:
            return class_weights(self.specs, y, task, names)
        by_head = [
            class_weights([spec], y[self.masks.train[self.masks.of[head]]], task, names)
            for head, spec in enumerate(self.specs)
        ]
        if all(weights is None for weights in by_head):
            return None
        ones = np.ones((1, len(names)), np.float32)
        return np.concatenate([ones if weights is None else weights for weights in by_head])

    def _set_biases(self, modules: Sequence[Head], y: Array, weights: Vectors | None) -> None:
        """Give each head the output biases of its own training rows, as if it were alone."""
        rows = self.rows
        for head, (module, spec) in enumerate(zip(modules, self.specs, strict=True)):
            own = slice(None) if self.masks is None else self.masks.train[self.masks.of[head]]
            biases = start_biases(
                y[own], rows.task, rows.outputs, smoothing=spec.label_smoothing,
                class_weight=None if weights is None else weights[head if len(weights) > 1 else 0],
                rows=None if rows.weight is None else rows.weight[own],
            )  # fmt: skip
            start_at(module, biases)


@contextmanager
def _threads_for(stack: HeadStack, rows: LabelledRows, spec: TrainSpec) -> Iterator[None]:
    """Run small steps on one thread: waking a second costs more than it does, and far more on a busy machine."""
    vectors = len(rows.x.values) / max(len(rows), 1) if isinstance(rows.x, Ragged) else 1.0
    vectors *= rows.feature.layers if isinstance(rows.x, Dense) else 1
    operations = 4 * spec.batch_size * vectors * sum(weight.numel() for weight in stack.parameters)
    before = torch.get_num_threads()
    if operations < SMALL_STEP:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batches_of(x: Prepared | Dense, spec: TrainSpec, device: str = "cpu", views: int = 0) -> Batches:
    """Return the batches that training on features has; with ``views``, ``x`` is of rows and their views."""
    if isinstance(x, Dense):
        x = lent(np.ascontiguousarray(x.values, np.float32))
    if isinstance(x, Tensor):
        return TensorBatches(x, spec.batch_size, spec.order_seed, views)
    if isinstance(x, Ragged):
        return RaggedBatches(x, spec.batch_size, spec.order_seed, device, views)
    return DiskBatches(x, spec.batch_size, spec.order_seed, device, views)


def _prepared(x: Features, standardise: tuple[Vectors, Vectors] | None, device: str) -> Prepared:
    """Return an array as a tensor, standardised where moments are given; ragged rows and rows on disk as they are."""
    if isinstance(x, Ragged | OnDisk):
        return x
    assert isinstance(x, Dense)
    if standardise is None:
        return lent(np.ascontiguousarray(x.values, np.float32)).to(device)
    mean, scale = standardise
    out = np.subtract(x.values, mean, dtype=np.float32)
    out *= scale
    return torch.from_numpy(out).to(device)


def _masked_moments(x: Tensor, train: Flags) -> tuple[Vectors, Vectors]:
    """Return the moments of standardised features over the rows of each mask [M, N], by two matrix products."""
    flat = x.reshape(len(x), -1, x.shape[-1])
    chosen = torch.from_numpy(train.astype(np.float32)).to(x.device)
    rows = chosen.sum(dim=1, keepdim=True).double() * flat.shape[1]
    total = (chosen @ flat.sum(dim=1)).double()
    squares = (chosen @ flat.square().sum(dim=1)).double()
    mean = total / rows
    deviation = (squares / rows - mean.square()).clamp_min(0).sqrt()
    scale = torch.where(deviation > 1e-4, 1 / deviation.clamp_min(1e-4), torch.ones_like(deviation))
    return mean.float().cpu().numpy(), scale.float().cpu().numpy()


def _in_real_units(
    state: Mapping[str, Tensor],
    head: Head,
    standardised: tuple[Vectors, Vectors] | None,
    target: tuple[Floats, Floats] | None,
) -> dict[str, Array]:
    """Return a head's arrays in real units: targets scaled back, standardisation folded in or beside its layer."""
    arrays: dict[str, Array] = {name: value.cpu().numpy().astype(np.float64) for name, value in state.items()}
    if target is not None:
        arrays["output.weight"] *= target[1][:, None]
        arrays["output.bias"] = arrays["output.bias"] * target[1] + target[0]
    if standardised is not None:
        mean, scale = standardised
        if type(head) is Linear:
            arrays["output.weight"] *= scale
            arrays["output.bias"] -= arrays["output.weight"] @ mean.astype(np.float64)
        else:
            first_layers = set(head.first_layers())
            for name, module in head.named_modules():
                if module in first_layers:
                    arrays[f"{name}.mean"], arrays[f"{name}.scale"] = mean, scale
    return {name: np.ascontiguousarray(value, np.float32) for name, value in arrays.items()}
