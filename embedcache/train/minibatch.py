"""Training by minibatches on torch: one head, or K of one shape as a stack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedcache.errors import SpecError
from embedcache.heads import build_head, stack_key
from embedcache.heads.modules import Linear
from embedcache.heads.trained import blocks, count
from embedcache.shard import FeatureSet
from embedcache.spec import HeadSpec, TaskName, TrainSpec
from embedcache.train.batches import Batch, Batches, InMemory, InMemoryRagged, OnDisk, lent
from embedcache.train.data import Data, choose, class_weights, moments
from embedcache.train.ending import still_improving
from embedcache.train.loop import Fitted, Scores, fit
from embedcache.train.losses import Loss
from embedcache.train.metrics import default_metric, metric_named, scores
from embedcache.train.stack import MAY_DIFFER, HeadStack
from embedcache.train.start import start_at, start_biases
from embedcache.wording import counted

Array = npt.NDArray[Any]

STACK_NUMBERS = 1_600_000
"""Numbers that a stack may hold: past about 6 MB of weights its passes run at the memory's pace, not the cache's."""

SMALL_STEP = 3e7
"""Floating-point operations of a step up to which one thread is enough: about a fifth of a millisecond."""


@dataclass(frozen=True)
class Moments:
    """Mean and scale of features for each of M sets of training rows, float32 [M, D]; and of targets, [R]."""

    mean: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Masks:
    """Which rows each head trains on and is judged by, for heads that share one pass: folds, or subsets.

    ``train`` and ``evaluate`` are bool [M, N]; head k uses row ``of[k]`` of both.
    """

    train: npt.NDArray[np.bool_]
    evaluate: npt.NDArray[np.bool_]
    of: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Trained:
    """The arrays of each head, the history of each, and which loop made them."""

    states: list[dict[str, Array]]
    fitted: Fitted


class HeadLearner:
    """K heads learning from batches of features; see ``loop.Learner``."""

    def __init__(
        self,
        stack: HeadStack,
        y: Tensor,
        weight: Tensor | None,
        masks: Masks | None,
        judge: Judge | None,
    ) -> None:
        self.stack = stack
        self._y, self._weight, self._judge = y, weight, judge
        self._masks = masks
        self._train = None if masks is None else torch.from_numpy(masks.train.astype(np.float32)).to(y.device)

    @property
    def alive(self) -> Sequence[int]:
        """The numbers of the heads still in training."""
        return self.stack.alive

    def step(self, batch: Batch) -> Tensor:
        """Take one step."""
        return self.stack.step(batch.x, batch.mask, self._y.index_select(0, batch.rows), self._weights(batch.rows))

    def _weights(self, rows: Tensor) -> Tensor | None:
        weight = None if self._weight is None else self._weight[rows]
        if self._train is None or self._masks is None:
            return weight
        mine = self._train[:, rows][torch.from_numpy(self._masks.of[self.stack.alive])]
        mine = mine if weight is None else mine * weight
        return mine if self.stack.stacked else mine[0]

    def evaluate(self) -> Scores | None:
        """Return the validation metric of each head still in training."""
        return None if self._judge is None else self._judge(self.stack)

    def remember(self, places: Sequence[int]) -> None:
        """Keep present weights as the best."""
        self.stack.remember(places)

    def keep(self, places: Sequence[int]) -> None:
        """Go on with some heads."""
        self.stack.keep(places)


class Judge:
    """The validation metric of every head in a stack, on rows of its own."""

    def __init__(
        self, data: Data, task: TaskName, metric: str, masks: Masks | None, target: tuple[Array, Array], device: str
    ) -> None:
        self._data, self._task, self._metric, self._masks, self._target = data, task, metric, masks, target
        self._device = device

    def __call__(self, stack: HeadStack) -> Scores:
        """Return [K]."""
        if self._masks is None:
            return self._scores(stack, None, self._data)
        out = np.empty(len(stack))
        mine = self._masks.of[stack.alive]
        for mask in np.unique(mine):
            places = np.flatnonzero(mine == mask)
            rows = np.flatnonzero(self._masks.evaluate[mask])
            part = Data(_pick(self._data.x, rows), self._data.y[rows])
            out[places] = self._scores(stack, torch.from_numpy(places) if stack.stacked else None, part)
        return out

    def _scores(self, stack: HeadStack, heads: Tensor | None, data: Data) -> Scores:
        said = outputs_of(stack, data.x, heads, self._device)
        if self._task == "regression":
            said = said * self._target[1] + self._target[0]
        return scores(self._metric, self._task, data.y, said)


def _pick(x: Any, rows: Array) -> Any:
    return x[torch.from_numpy(rows)] if isinstance(x, Tensor) else choose(x, rows)


def outputs_of(stack: HeadStack, x: Any, heads: Tensor | None = None, device: str = "cpu") -> Array:
    """Return probabilities (values for a regression) of K heads on rows of features, float32 [K, N, C]."""
    parts = []
    for batch, mask in _blocks(x):
        z = stack.logits(batch.to(device), None if mask is None else mask.to(device), heads)
        if stack.loss.task == "classification":
            z = z.softmax(dim=-1)
        elif stack.loss.task == "multilabel":
            z = z.sigmoid()
        parts.append(z.cpu())
    return torch.cat(parts, dim=1).numpy()


def _blocks(x: Any) -> Any:
    if isinstance(x, Tensor):
        for start in range(0, len(x), 8192):
            yield x[start : start + 8192], None
    elif hasattr(x, "read"):
        size = max(1, (16 << 20) // (4 * int(np.prod(x.row_shape))))
        for start in range(0, len(x), size):
            yield lent(x.read(np.arange(start, min(start + size, len(x))))), None
    else:
        for _, _, part, mask in blocks(x):
            yield part, mask


def metric_of(spec: TrainSpec, task: TaskName) -> tuple[str, bool]:
    """Return the metric that validation is judged by, and whether more of it is better."""
    name = spec.metric or default_metric(task)
    return name, metric_named(name, task).greater_is_better


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


def train_minibatch(
    data: Data,
    judged: Data | None,
    heads: Sequence[HeadSpec],
    specs: Sequence[TrainSpec],
    feature: FeatureSet,
    task: TaskName,
    class_names: Sequence[str],
    *,
    masks: Masks | None = None,
    batches: Batches | None = None,
    start: Sequence[Mapping[str, Array]] | None = None,
    **options: Any,
) -> Trained:
    """Train K heads of one shape on ``data``, in one pass or, where they outgrow the processor's cache, a few.

    ``judged`` are validation rows; with ``masks`` they must be ``data`` itself. ``batches`` replaces the source of
    features, of which ``data`` then gives only targets and moments. ``start`` replaces initial weights. ``options``
    are those of the pass: ``device``, ``progress``, ``title``, ``keep_losses``, ``max_steps``, ``watch``.
    """
    refuse_unstackable(heads, specs)
    size = sum(each.numel() for each in build_head(heads[0], feature, len(class_names)).parameters())
    most = max(1, STACK_NUMBERS // size) if batches is None else len(heads)
    parts = []
    for begin in range(0, len(heads), most):
        mine = slice(begin, begin + most)
        own = None if masks is None else Masks(masks.train, masks.evaluate, masks.of[mine])
        parts.append(
            _one_pass(
                data, judged, heads[mine], specs[mine], feature, task, class_names, masks=own, batches=batches,
                start=None if start is None else start[mine], **options,
            )
        )  # fmt: skip
        if parts[-1].fitted.interrupted and begin + most < len(heads):
            raise KeyboardInterrupt  # some heads have not begun
    if len(parts) == 1:
        return parts[0]
    fits = [part.fitted for part in parts]
    return Trained(
        [state for part in parts for state in part.states],
        Fitted(
            history=[each for fit in fits for each in fit.history],
            best_epoch=[each for fit in fits for each in fit.best_epoch],
            steps=sum(fit.steps for fit in fits),
            seconds=sum(fit.seconds for fit in fits),
            interrupted=fits[-1].interrupted,
            losses=[each for fit in fits for each in fit.losses],
            epochs=fits[0].epochs,
            improving=[each for fit in fits for each in fit.improving],
        ),
    )


def _one_pass(
    data: Data,
    judged: Data | None,
    heads: Sequence[HeadSpec],
    specs: Sequence[TrainSpec],
    feature: FeatureSet,
    task: TaskName,
    class_names: Sequence[str],
    *,
    masks: Masks | None = None,
    batches: Batches | None = None,
    start: Sequence[Mapping[str, Array]] | None = None,
    device: str = "cpu",
    progress: bool = True,
    title: str = "train",
    keep_losses: bool = False,
    max_steps: int | None = None,
    watch: Callable[[HeadStack], None] | None = None,
) -> Trained:
    """Train K heads of one shape in one pass over ``data``.

    ``judged`` are validation rows; with ``masks`` they must be ``data`` itself. ``batches`` replaces the source of
    features, of which ``data`` then gives only targets and moments. ``start`` replaces initial weights. ``watch`` is
    shown the stack before its first step.
    """
    spec = specs[0]
    metric, greater = metric_of(spec, task)
    outputs = len(class_names)
    modules = [
        build_head(head, feature, outputs, seed=each.seed).to(device) for head, each in zip(heads, specs, strict=True)
    ]
    target = _target_moments(data.y, task)
    weights = _class_weights(specs, data.y, task, class_names, masks)
    if start is not None:
        for module, values in zip(modules, start, strict=True):
            module.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in values.items()})
    else:
        for at, (module, each) in enumerate(zip(modules, specs, strict=True)):
            start_at(module, _biases(at, each, data, task, outputs, target, weights, masks))
    mean, scale = moments(data.x, feature, data.weight) if spec.standardize else (None, None)
    # Arrays in memory are standardised once; anything else is left as it is, and the heads' first layers do it.
    plain = batches is None and all(isinstance(each.x, np.ndarray) for each in (data, judged) if each is not None)
    x: Any = _tensor(data.x, *((mean, scale) if plain else (None, None)), device)
    judge_x: Any = None
    if judged is not None:
        judge_x = x if judged is data else _tensor(judged.x, *((mean, scale) if plain else (None, None)), device)
    source = batches or _source(x, spec, device)
    relative: Moments | None = None
    if masks is not None and spec.standardize:
        if not plain:
            raise SpecError("heads that share a pass over different rows need features that are arrays in memory")
        relative = _masked_moments(x, masks)
    loss = Loss(task, outputs, [each.label_smoothing for each in specs], weights, device=device)
    epochs = spec.epochs_of(source.steps)
    stack = HeadStack(modules, specs, loss, epochs * source.steps)
    if relative is not None and masks is not None:
        # The features are standardised already, by all rows together; what is left is each head's own difference.
        of = masks.of if stack.stacked else masks.of[0]
        own = (torch.from_numpy(each[of]).to(device) for each in (relative.mean, relative.scale))
        stack.module.standardize(*own)
    elif not plain and mean is not None and scale is not None:
        stack.module.standardize(torch.from_numpy(mean).to(device), torch.from_numpy(scale).to(device))
    if watch is not None:
        watch(stack)
    y = _targets(data.y, task, target, device)
    weight = None if data.weight is None else torch.from_numpy(data.weight).to(device)
    judge = None
    if judged is not None and len(judged):
        judge = Judge(Data(judge_x, judged.y), task, metric, masks, target, device)
    learner = HeadLearner(stack, y, weight, masks, judge)
    with _threads_for(stack, data, spec) if batches is None else nullcontext():
        fitted = fit(
            learner, source, epochs=epochs, patience=spec.patience, greater_is_better=greater, metric=metric,
            title=title, progress=progress, keep_losses=keep_losses, max_steps=max_steps, min_steps=spec.least_steps,
        )  # fmt: skip
    fitted.improving = [
        still_improving(history, best, each, epochs)
        for history, best, each in zip(fitted.history, fitted.best_epoch, specs, strict=True)
    ]
    first = [name for name, module in modules[0].named_modules() if module in set(modules[0].first_layers())]
    states = []
    for at, state in enumerate(stack.finish()):
        own_mean, own_scale = mean, scale
        if relative is not None and masks is not None and mean is not None and scale is not None:
            mask = int(masks.of[at])
            own_mean, own_scale = mean + relative.mean[mask] / scale, scale * relative.scale[mask]
        states.append(_finished(state, type(modules[0]) is Linear, first, own_mean, own_scale, target, task))
    return Trained(states, fitted)


def _biases(
    at: int, spec: TrainSpec, data: Data, task: TaskName, outputs: int, target: tuple[Array, Array],
    weights: npt.NDArray[np.float32] | None, masks: Masks | None,
) -> npt.NDArray[np.float64]:  # fmt: skip
    """Return the biases that head ``at`` starts with: those of its own training rows, as if it were alone."""
    y = (data.y - target[0]) / target[1] if task == "regression" else data.y
    rows = data.weight
    if masks is not None:
        mine = masks.train[masks.of[at]]
        y, rows = y[mine], None if rows is None else rows[mine]
    weight = None if weights is None else weights[at if len(weights) > 1 else 0]
    return start_biases(y, task, outputs, smoothing=spec.label_smoothing, class_weight=weight, rows=rows)


@contextmanager
def _threads_for(stack: HeadStack, data: Data, spec: TrainSpec) -> Iterator[None]:
    """Run small steps on one thread: waking a second costs more than it does, and far more on a busy machine."""
    vectors = len(data.x[0]) / max(len(data), 1) if isinstance(data.x, tuple) else 1.0
    vectors *= data.x.shape[1] if isinstance(data.x, np.ndarray) and data.x.ndim == 3 else 1
    operations = 4 * spec.batch_size * vectors * sum(each.numel() for each in stack.parameters)
    before = torch.get_num_threads()
    if operations < SMALL_STEP:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _source(x: Any, spec: TrainSpec, device: str) -> Batches:
    if isinstance(x, Tensor):
        return InMemory(x, spec.batch_size, spec.order_seed)
    if isinstance(x, tuple):
        values, offsets = x
        return InMemoryRagged(values, offsets, spec.batch_size, spec.order_seed, device)
    return OnDisk(x, spec.batch_size, spec.order_seed, device)


def _tensor(x: Any, mean: Array | None, scale: Array | None, device: str) -> Any:
    """Return an array as a tensor, standardised where moments are given; ragged rows and readers as they are."""
    if not isinstance(x, np.ndarray):
        return x
    if mean is None or scale is None:
        return lent(np.ascontiguousarray(x, np.float32)).to(device)
    out = np.subtract(x, mean, dtype=np.float32)
    out *= scale
    return torch.from_numpy(out).to(device)


def _masked_moments(x: Tensor, masks: Masks) -> Moments:
    """Return the moments of standardised features over the training rows of each mask, by two matrix products."""
    flat = x.reshape(len(x), -1, x.shape[-1])
    chosen = torch.from_numpy(masks.train.astype(np.float32)).to(x.device)
    rows = chosen.sum(dim=1, keepdim=True).double() * flat.shape[1]
    total = (chosen @ flat.sum(dim=1)).double()
    squares = (chosen @ flat.square().sum(dim=1)).double()
    mean = total / rows
    deviation = (squares / rows - mean.square()).clamp_min(0).sqrt()
    scale = torch.where(deviation > 1e-4, 1 / deviation.clamp_min(1e-4), torch.ones_like(deviation))
    return Moments(mean.float().cpu().numpy(), scale.float().cpu().numpy())


def _target_moments(y: Array, task: TaskName) -> tuple[Array, Array]:
    if task != "regression":
        return np.zeros(1), np.ones(1)
    deviation = y.std(axis=0)
    return y.mean(axis=0), np.where(deviation > 0, deviation, 1.0)


def _targets(y: Array, task: TaskName, target: tuple[Array, Array], device: str) -> Tensor:
    if task == "classification":
        return torch.from_numpy(y).to(device)
    values = (y - target[0]) / target[1] if task == "regression" else y
    return torch.from_numpy(np.asarray(values, np.float32)).to(device)


def _class_weights(
    specs: Sequence[TrainSpec], y: Array, task: TaskName, class_names: Sequence[str], masks: Masks | None
) -> npt.NDArray[np.float32] | None:
    if masks is None:
        return class_weights(specs, y, task, class_names)
    each = [class_weights([spec], y[masks.train[masks.of[at]]], task, class_names) for at, spec in enumerate(specs)]
    if all(weights is None for weights in each):
        return None
    ones = np.ones((1, len(class_names)), np.float32)
    return np.concatenate([ones if weights is None else weights for weights in each])


def _finished(
    state: Mapping[str, Tensor],
    linear: bool,
    first: Sequence[str],
    mean: Array | None,
    scale: Array | None,
    target: tuple[Array, Array],
    task: TaskName,
) -> dict[str, Array]:
    """Return a head's arrays in real units: targets scaled back, standardisation folded in or beside its layer."""
    arrays = {name: value.cpu().numpy().astype(np.float64) for name, value in state.items()}
    if task == "regression":
        arrays["output.weight"] *= target[1][:, None]
        arrays["output.bias"] = arrays["output.bias"] * target[1] + target[0]
    if mean is not None and scale is not None:
        if linear:
            arrays["output.weight"] *= scale
            arrays["output.bias"] -= arrays["output.weight"] @ mean.astype(np.float64)
        else:
            for layer in first:
                arrays[f"{layer}.mean"], arrays[f"{layer}.scale"] = mean, scale
    return {name: np.ascontiguousarray(value, np.float32) for name, value in arrays.items()}


__all__ = ["HeadLearner", "Masks", "Trained", "count", "outputs_of", "train_minibatch"]
