"""The engine of minibatches, on torch: one head, or K of one shape as a stack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedcache.errors import SpecError
from embedcache.features import Array, Dense, Features, OnDisk, Ragged
from embedcache.heads import build_head, stack_key
from embedcache.heads.modules import Head, Linear
from embedcache.spec import MAY_DIFFER, HeadSpec, TrainSpec
from embedcache.task import CLASSIFICATION, REGRESSION, Floats
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
from embedcache.train.loop import Scores, Stopping, fit, still_improving, telling
from embedcache.train.losses import Loss, start_at, start_biases
from embedcache.train.metrics import scores
from embedcache.train.parts import Parts
from embedcache.train.result import Fitted, Observe
from embedcache.train.stack import HeadStack
from embedcache.wording import counted

Vectors = npt.NDArray[np.float32]

STACK_NUMBERS = 1_600_000
"""The most parameters of a stack: beyond about 6 MB, its weights no longer fit in the processor's cache."""

SMALL_STEP = 1e8
"""Floating-point operations of a step up to which one thread is enough: about half a millisecond."""


_EVALUATED_ROWS, _EVALUATED_TOKENS = 8192, 1 << 17
"""How much is judged at once."""


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
        each_step: is called before each step; where it raises ``KeyboardInterrupt``, training ends as by Ctrl-C.
        observe: is told of each epoch of the first head.
    """

    device: str = "cpu"
    progress: bool = True
    title: str = "train"
    keep_losses: bool = False
    max_steps: int | None = None
    watch: Callable[[HeadStack], None] | None = None
    each_step: Callable[[], object] | None = None
    observe: Observe | None = None


Prepared = Tensor | Ragged | OnDisk
"""Features as a pass reads them: a tensor on the device, or rows that are brought there batch by batch."""


class HeadLearner:
    """K heads learning from batches of features; see ``loop.Learner``."""

    def __init__(self, stack: HeadStack, y: Tensor, weight: Tensor | None, judge: Judge | None) -> None:
        self.stack = stack
        self._y, self._weight, self._judge = y, weight, judge

    @property
    def alive(self) -> Sequence[int]:
        """The numbers of the heads still in training."""
        return self.stack.alive

    def step(self, batch: FeatureBatch) -> Tensor:
        """Take one step."""
        weight = None if self._weight is None else self._weight[batch.rows]
        return self.stack.step(batch.x, batch.mask, self._y.index_select(0, batch.rows), weight)

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
    """The validation metric of every head in a stack.

    ``x`` are the features of the ``rows``, prepared; ``target`` mean and deviation of the targets that were trained on.
    """

    rows: LabelledRows
    x: Prepared
    metric: str
    target: tuple[Floats, Floats]
    device: str

    def __call__(self, stack: HeadStack) -> Scores:
        """Return [K]."""
        outputs = outputs_of(stack, self.x, self.device)
        if self.rows.task is REGRESSION:
            outputs = outputs * self.target[1] + self.target[0]
        return scores(self.metric, self.rows.task, self.rows.y, outputs)


def outputs_of(stack: HeadStack, x: Prepared, device: str = "cpu") -> Array:
    """Return probabilities (values for a regression) of K heads on rows of features, float32 [K, N, C]."""
    parts = []
    for batch, mask in _evaluation_batches(x):
        z = stack.logits(batch.to(device), None if mask is None else mask.to(device))
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
    batches: Batches | None = None,
    options: PassOptions = PassOptions(),
) -> list[Fitted]:
    """Train K heads of one shape in one pass or, where they outgrow the processor's cache, a few.

    ``judged`` are validation rows. ``batches`` replaces the source of
    features; ``rows`` then gives only targets and moments.
    """
    refuse_unstackable(heads, specs)
    size = sum(weight.numel() for weight in build_head(heads[0], rows.feature, rows.outputs).parameters())
    most = max(1, STACK_NUMBERS // size) if batches is None else len(heads)
    results: list[Fitted] = []
    for begin in range(0, len(heads), most):
        part = slice(begin, begin + most)
        results += _Pass(rows, judged, heads[part], specs[part], batches, options).run()
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
        weights = class_weights(self.specs, rows.y, rows.task, rows.class_names)
        self._set_biases(modules, y, weights)
        trained = rows.trained
        mean, scale = moments(trained, rows.trained_weight) if spec.standardize else (None, None)
        # Arrays in memory are standardised once; anything else is left as it is, and the heads' first layers do it.
        dense = isinstance(trained, Dense | Parts) and (self.judged is None or isinstance(self.judged.x, Dense))
        plain = self.batches is None and dense
        applied = (mean, scale) if plain and mean is not None and scale is not None else None
        x = _prepared(trained, applied, device)
        source = self._disturbed(self.batches or batches_of(x, spec, device, rows.of_views), applied is not None)
        loss = Loss(rows.task, rows.outputs, [own.label_smoothing for own in self.specs], weights, device=device)
        stopping = Stopping.of(spec, rows.task, source.steps, options.max_steps)
        stack = HeadStack(modules, self.specs, loss, stopping.epochs * source.steps)
        if mean is not None and scale is not None and applied is None:
            stack.module.standardize(torch.from_numpy(mean).to(device), torch.from_numpy(scale).to(device))
        if options.watch is not None:
            options.watch(stack)
        judge = None
        if self.judged is not None and len(self.judged):
            judged_x = _prepared(self.judged.x, applied, device)
            judge = Judge(self.judged, judged_x, stopping.metric, target, device)
        weight = None if rows.weight is None else torch.from_numpy(rows.weight).to(device)
        targets = torch.from_numpy(y if rows.task is CLASSIFICATION else np.asarray(y, np.float32)).to(device)
        learner = HeadLearner(stack, targets, weight, judge)
        with _threads_for(stack, rows, spec) if self.batches is None else nullcontext():
            result = fit(
                learner, source, stopping, title=options.title, progress=options.progress,
                keep_losses=options.keep_losses, each_step=options.each_step,
                each_epoch=telling(options.observe, spec, stopping.epochs * source.steps),
            )  # fmt: skip
        real = target if rows.task is REGRESSION else None
        standardised = None if mean is None or scale is None else (mean, scale)
        states = [_in_real_units(state, modules[0], standardised, real) for state in stack.finish()]
        return [
            Fitted(
                state, history=history, epochs=stopping.epochs, best_epoch=best, steps=result.steps,
                seconds=result.seconds, interrupted=result.interrupted,
                improving=still_improving(history, best, own, stopping.epochs), losses=result.losses,
            )
            for state, history, best, own in zip(states, result.history, result.best_epoch, self.specs, strict=True)
        ]  # fmt: skip

    def _disturbed(self, source: Batches, standardised: bool) -> Batches:
        """Return the batches with noise and dropout, in units of the features as the batches have them."""
        spec = self.specs[0]
        if not spec.input_noise and not spec.input_dropout:
            return source
        if standardised:
            return DisturbedBatches(source, spec, 0.0, 1.0)
        both = moments(self.rows.trained, self.rows.trained_weight)
        mean, scale = (torch.from_numpy(part).to(self.options.device) for part in both)
        return DisturbedBatches(source, spec, mean, 1 / scale)

    def _set_biases(self, modules: Sequence[Head], y: Array, weights: Vectors | None) -> None:
        """Give each head the output biases that are best without features."""
        rows = self.rows
        for head, (module, spec) in enumerate(zip(modules, self.specs, strict=True)):
            biases = start_biases(
                y, rows.task, rows.outputs, smoothing=spec.label_smoothing,
                class_weight=None if weights is None else weights[head], rows=rows.weight,
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
    assert isinstance(x, Dense | Parts)
    if standardise is None:
        values = (x.whole() if isinstance(x, Parts) else x).values
        return lent(np.ascontiguousarray(values, np.float32)).to(device)
    mean, scale = standardise
    out, start = np.empty((len(x), *x.feature.row_shape), np.float32), 0
    for part in x.parts if isinstance(x, Parts) else (x,):
        np.subtract(part.values, mean, out=out[start : start + len(part)], dtype=np.float32)
        start += len(part)
    out *= scale
    return torch.from_numpy(out).to(device)


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
