"""Training with the backbone inside every step: full fine-tuning, from a trained head, or frozen.

The loop, the loss, the order of the rows and the schedule are those of training on a cache; only the step differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedcache import dataset
from embedcache.backbone import FrozenModel, Inputs, Prepared, Readable, rows_at_once
from embedcache.batching import Batch
from embedcache.errors import InputError, SpecError, warn
from embedcache.features import Rows
from embedcache.finetune.model import FeatureBasedModel
from embedcache.heads.modules import Head
from embedcache.spec import FINE_TUNING, TaskName, TrainSpec
from embedcache.task import CLASSIFICATION, Array, Floats, Task, task_named
from embedcache.train.batches import grouped_order, order
from embedcache.train.data import checked_targets, class_weights, refuse_untrainable, target_moments
from embedcache.train.loop import STILL_IMPROVING, Scores, Stopping, fit, still_improving, telling
from embedcache.train.losses import Loss, start_at, start_biases
from embedcache.train.metrics import measure, metric_named, scores
from embedcache.train.result import Fitted, Observe, TrainingResult
from embedcache.train.stack import BETA1, BETA2, EPSILON, schedule_factors

# One live model in training: where its batches come from, and the step. The loop is that of training on a cache.


@dataclass(frozen=True)
class ContentBatch:
    """The inputs of the network for B training rows, and the numbers of these rows, int64 [B] on the model's device."""

    inputs: Inputs
    rows: Tensor


class LiveRows(Protocol):
    """Rows that a live model reads, whichever of them at a time; ``lengths`` int64 [N] are in positions."""

    lengths: npt.NDArray[np.int64]
    device: torch.device

    def laid_out(self, rows: Rows) -> Inputs:
        """Return what the model is given for some rows, padded to the longest of them, on its device."""
        ...


class ContentBatches:
    """Batches of contents, padded to the longest of each batch.

    Where they are ``grouped`` their rows are of similar length; else they come in the order that a cache's rows are
    trained in.
    """

    def __init__(self, rows: LiveRows, batch_size: int, seed: int, *, grouped: bool) -> None:
        self._rows, self._size, self._seed, self._grouped = rows, batch_size, seed, grouped
        self.steps = -(-len(rows.lengths) // batch_size)

    def epoch(self, number: int) -> Iterator[ContentBatch]:
        """Yield the batches of one epoch."""
        lengths = self._rows.lengths
        rows = (
            grouped_order(lengths, self._size, self._seed, number) if self._grouped
            else order(len(lengths), self._seed, number)
        )  # fmt: skip
        for start in range(0, len(rows), self._size):
            batch_rows = rows[start : start + self._size]
            inputs = self._rows.laid_out(batch_rows)
            yield ContentBatch(inputs, torch.from_numpy(batch_rows).to(self._rows.device))


class RawRows:
    """Rows of contents that a network reads, whichever of them at a time.

    They are prepared once where they are few or small, as tokens are. The pixels of many pictures are too large for
    that: these are decoded again each time that they are wanted. ``lengths`` int64 [N] are in positions.
    """

    def __init__(self, backbone: FrozenModel[Any], contents: Readable) -> None:
        self._backbone, self._contents = backbone, contents
        self._prepared: Prepared | None = None
        self.device, self.lengths = backbone.device, np.ones(len(contents), np.int64)  # a picture is one position
        if len(contents) <= (rows_at_once(backbone) or len(contents)):
            self._prepared = backbone.prepare([contents[row] for row in range(len(contents))])
            self.lengths = self._prepared.lengths

    def laid_out(self, rows: Rows) -> Inputs:
        """Return the inputs of the network for some rows, padded to the longest of them, on the model's device."""
        prepared, places = self._prepared, rows
        if prepared is None:
            prepared = self._backbone.prepare([self._contents[row] for row in rows.tolist()])
            places = np.arange(len(rows))
        return self._backbone.lay_out(prepared, Batch(int(self.lengths[rows].max()), len(rows), places))


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


Part = tuple[Iterable[Tensor], float]
"""Parameters and their learning rate."""


class LiveLearner:
    """One live model in training; see ``train.loop.Learner``.

    AdamW on what is trained, each part with its learning rate; biases and gains have no weight decay. ``judge`` gives
    the validation metric.
    """

    def __init__(
        self,
        model: FeatureBasedModel,
        spec: TrainSpec,
        parts: Sequence[Part],
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
        for given, rate in parts:
            trainable = [parameter for parameter in given if parameter.requires_grad]
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
            self._best = self.weights()
            return
        for name, tensor in self._changing().items():
            self._best[name].copy_(tensor.detach())

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of what training changes, for ``restore``."""
        return {name: tensor.detach().clone() for name, tensor in self._changing().items()}

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Go back to these weights."""
        for name, tensor in self._changing().items():
            tensor.copy_(weights[name])

    def keep(self, places: Sequence[int]) -> None:
        """Go on with the model, or end where ``places`` is empty."""
        self.alive = [self.alive[place] for place in places]

    def finish(self) -> None:
        """Restore the best weights; the last where nothing was measured."""
        if self._best is not None:
            self.restore(self._best)
        self.model.eval()


Contents = Sequence[str] | Sequence[bytes] | dataset.Contents
"""Texts, contents in memory, or contents that are read when they are wanted."""

BACKBONE_RATE = 5e-5
"""The backbone's learning rate: the largest of the three that Devlin et al. (2019) choose from, as the default model
is small."""


@dataclass(frozen=True)
class TunedModel:
    """A trained model with its backbone, as ``TrainedHead`` is a trained head on features.

    ``target`` are the mean and the deviation of each target [R], as a regression is trained on standardised targets;
    0 and 1 for other tasks.
    """

    model: FeatureBasedModel
    task: TaskName
    class_names: tuple[str, ...]
    target: tuple[Floats, Floats]

    def probabilities(self, contents: Contents) -> Floats:
        """Return probabilities float64 [N, C]; for regression, the values."""
        return self.probabilities_of(RawRows(self.model.extractor, _readable(contents)))

    def probabilities_of(self, rows: LiveRows) -> Floats:
        """Return the same for rows that are ready."""
        mean, deviation = self.target
        return np.asarray(task_named(self.task).probabilities(outputs_of(self.model, rows)) * deviation + mean)


def live_outputs(model: FeatureBasedModel, contents: Contents) -> npt.NDArray[np.float32]:
    """Run backbone and head over contents, in eval mode and without gradients: logits or values, float32 [N, C].

    Rows of similar length are batched together. The model returns to the mode (train or eval) that it was in.
    """
    return outputs_of(model, RawRows(model.extractor, _readable(contents)))


def outputs_of(model: FeatureBasedModel, rows: LiveRows) -> npt.NDArray[np.float32]:
    """Return what ``live_outputs`` does, for rows that are ready."""
    lengths = rows.lengths
    by_length = np.argsort(-lengths, kind="stable")
    positions = model.extractor.policy.positions
    parts, start, training = [], 0, model.training
    model.eval()
    try:
        with torch.no_grad():
            while start < len(by_length):
                some = by_length[start : start + max(1, positions // int(lengths[by_length[start]]))]
                logits, _ = model.run(rows.laid_out(some))
                parts.append(logits.float().cpu().numpy())
                start += len(some)
    finally:
        model.train(training)
    sorted_outputs = np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
    outputs = np.empty_like(sorted_outputs)
    outputs[by_length] = sorted_outputs
    return outputs


def _readable(contents: Contents) -> Readable:
    if isinstance(contents, (dataset.Packed, dataset.InFiles)):
        return contents
    return [content.encode("utf-8") if isinstance(content, str) else content for content in contents]


@dataclass(frozen=True, eq=False)
class _Labelled:
    """Contents that have a label, and their targets."""

    contents: Readable
    y: Array

    @classmethod
    def of(cls, contents: Contents, y: npt.ArrayLike, task: Task, where: str) -> _Labelled:
        """Raise ``InputError`` for targets that do not fit."""
        if isinstance(contents, (str, bytes)):
            raise InputError(f"{where}: expected a list of texts, got one text")
        readable = _readable(contents)
        targets, labelled = checked_targets(y, len(readable), task, where=where)
        rows = np.flatnonzero(labelled)
        if isinstance(readable, (dataset.Packed, dataset.InFiles)):
            return cls(readable.select(rows), targets[labelled])
        return cls([readable[row] for row in rows.tolist()], targets[labelled])


def fine_tune(
    model: FeatureBasedModel,
    contents: Contents,
    y: npt.ArrayLike,
    eval_contents: Contents | None = None,
    y_eval: npt.ArrayLike | None = None,
    spec: TrainSpec = FINE_TUNING,
    *,
    backbone_learning_rate: float = BACKBONE_RATE,
    task: TaskName = "classification",
    class_names: Sequence[str],
    new_head: bool = False,
    progress: bool = True,
    title: str = "fine-tune",
    keep_losses: bool = False,
) -> TrainingResult[TunedModel]:
    """Train a live model in place: all of it, or its head alone where the backbone is frozen.

    The result has the model with its best weights, in eval mode.

    Args:
        model: unfrozen for full fine-tuning; with a head trained on a cache this is LP-FT (Kumar et al. 2022).
        contents: what the backbone reads: texts or their UTF-8 bytes, the bytes of image files, or
            ``Examples.packed_contents``, which are read when a batch needs them.
        y: int64 [N] class indices (-1: no label), uint8 [N, C], or float [N, R].
        eval_contents, y_eval: validation rows: early stopping, best weights; also whether a model whose head is not
            new did better before (by ``spec.metric``, else by accuracy and its like), and stays so. None for none.
        spec: how to train; ``learning_rate`` is the head's, ``standardize`` is not looked at.
        backbone_learning_rate: the backbone's, where it is not frozen; finite, 0 or more.
        new_head: whether the head is untrained: its biases then start as in training on a cache.

    Draws of dropout come from ``spec.seed``; torch's own generators are left as they were.

    Raises:
        TrainingError: one class only, fewer rows than classes, a loss that became NaN.
        InputError: targets that do not fit.
        SpecError: settings that are not for a live model.
    """
    if spec.solver == "convex" or spec.optimizer != "adamw":
        raise SpecError(f"a live model is trained by minibatch AdamW, not {spec.solver} {spec.optimizer}")
    if not 0 <= backbone_learning_rate < np.inf:
        raise SpecError(f"backbone_learning_rate is {backbone_learning_rate:g}: expected a finite number of 0 or more")
    if spec.input_noise or spec.input_dropout:
        raise SpecError("input_noise and input_dropout disturb cached features: a live model has dropout of its own")
    kind = task_named(task)
    rows = _Labelled.of(contents, y, kind, "training")
    judged = None
    if eval_contents is not None and y_eval is not None:
        labelled = _Labelled.of(eval_contents, y_eval, kind, "validation")
        judged = (RawRows(model.extractor, labelled.contents), labelled.y)
    parts: list[Part] = [
        (model.backbone.parameters(), backbone_learning_rate), (model.head.parameters(), spec.learning_rate),
    ]  # fmt: skip
    return fit_live(
        model, (RawRows(model.extractor, rows.contents), rows.y), judged, spec, parts, task=task,
        class_names=class_names, new_head=new_head, progress=progress, title=title, keep_losses=keep_losses,
    )  # fmt: skip


LabelledLive = tuple[LiveRows, Array]
"""Rows of a live model, and their targets, all of which are there."""


def fit_live(
    model: FeatureBasedModel, rows: LabelledLive, judged: LabelledLive | None, spec: TrainSpec, parts: Sequence[Part],
    *, task: TaskName, class_names: Sequence[str], new_head: bool, progress: bool = True, title: str = "fine-tune",
    keep_losses: bool = False, max_steps: int | None = None, observe: Observe | None = None,
    watch: Callable[[], None] | None = None,
) -> TrainingResult[TunedModel]:  # fmt: skip
    """Do what ``fine_tune`` does, for rows that are ready and for ``parts`` of a model; at most so many steps.

    ``observe`` is told of each epoch, ``watch`` is called before the first step.
    """
    kind, (live, y) = task_named(task), rows
    refuse_untrainable(y, kind, class_names)
    tuned = TunedModel(model, task, tuple(class_names), target_moments(y, kind))
    metrics = {}
    with _seeded(spec.seed, model):
        # A frozen backbone gives what a cache has, and its head is to see the batches of one that reads a cache.
        batches = ContentBatches(live, spec.batch_size, spec.order_seed, grouped=not model.freeze_backbone)
        stopping = Stopping.of(spec, kind, batches.steps, max_steps)
        judge = _Judge(tuned, *judged, stopping.metric) if judged is not None and len(judged[1]) else None
        learner = LiveLearner(
            model, spec, parts, _loss(tuned, y, spec, new_head), stopping.epochs * batches.steps, judge
        )  # fmt: skip
        if watch is not None:
            watch()
        before = None if judge is None or new_head else (judge.outputs(), learner.weights())
        outcome = fit(
            learner, batches, stopping, title=title, progress=progress, keep_losses=keep_losses,
            each_epoch=telling(observe, spec, stopping.epochs * batches.steps),
        )  # fmt: skip
        learner.finish()
        after = None if judge is None else judge.outputs()
        history, start, best, notes = outcome.history[0], None, outcome.best_epoch[0], tuple[str, ...]()
        if judge is not None and after is not None and before is not None:
            name = metric_named(spec.metric or kind.headline_metric, kind)
            then, now = (judge.score(name.name, outputs) for outputs in (before[0], after))
            if (then > now) if name.greater_is_better else (then < now):
                learner.restore(before[1])
                after, start, best = before[0], judge.score(stopping.metric, before[0]), -1
                notes = (_kept(name.name, then, now),)
        if judge is not None and after is not None:
            metrics["validation"] = measure(kind, judge.y, after, class_names)
    improving = start is None and still_improving(history, best, spec, stopping.epochs)
    notes = (STILL_IMPROVING,) if improving else notes
    warn(notes)
    fitted = Fitted(
        history=history, notes=notes, epochs=stopping.epochs, best_epoch=best, start=start,
        steps=outcome.steps, seconds=outcome.seconds, interrupted=outcome.interrupted, improving=improving,
        losses=outcome.losses,
    )  # fmt: skip
    return TrainingResult(tuned, fitted, metrics, notes, outcome.seconds)


# Whether to keep the start hangs on the metric that people look at, not on the loss: a network that is ever surer of
# itself loses there while it gets more rows right, and what it says is calibrated in the end.
def _kept(name: str, then: float, now: float) -> str:
    return (
        f"the validation rows went better before ({name} {then:.3f}) than in the best epoch ({now:.3f}), so the model "
        "stays as it was: a lower learning rate may help"
    )


class _Judge:
    """The validation metric of a model in training."""

    def __init__(self, tuned: TunedModel, rows: LiveRows, y: Array, metric: str) -> None:
        self._tuned, self._rows, self.y, self._metric = tuned, rows, y, metric

    def outputs(self) -> Floats:
        return self._tuned.probabilities_of(self._rows)

    def __call__(self) -> float:
        return self.score(self._metric, self.outputs())

    def score(self, metric: str, outputs: Floats) -> float:
        """Return a metric of outputs [N, C]."""
        return float(scores(metric, task_named(self._tuned.task), self.y, outputs[None])[0])


def _loss(tuned: TunedModel, y: Array, spec: TrainSpec, new_head: bool) -> LiveLoss:
    """Return the loss on the targets of the training rows; a new head gets the biases it starts from."""
    model, task, outputs = tuned.model, task_named(tuned.task), len(tuned.class_names)
    device = model.extractor.device
    weights = class_weights([spec], y, task, tuned.class_names)
    mean, deviation = tuned.target
    targets = y if task is CLASSIFICATION else (y - mean) / deviation
    if new_head and isinstance(model.head, Head):
        weight = None if weights is None else weights[0]
        biases = start_biases(targets, task, outputs, smoothing=spec.label_smoothing, class_weight=weight)
        start_at(model.head, biases)
    loss = Loss(task, outputs, [spec.label_smoothing], weights, device=str(device))
    typed = targets if task is CLASSIFICATION else targets.astype(np.float32)
    return LiveLoss(loss, torch.from_numpy(typed).to(device))


def into_standard_units(module: Head, y: Array) -> None:
    """Turn a trained regression head, which gives values, into one that gives them standardised by ``y`` [N, R]."""
    deviation = y.std(axis=0)
    mean, deviation = (torch.from_numpy(part) for part in (y.mean(axis=0), np.where(deviation > 0, deviation, 1.0)))
    weight, bias = module.output.weight, module.output.bias
    assert bias is not None  # heads of one's own are not compared
    with torch.no_grad():
        weight.copy_(weight / deviation[:, None])
        bias.copy_((bias - mean) / deviation)


@contextmanager
def _seeded(seed: int, model: FeatureBasedModel) -> Iterator[None]:
    """Draw dropout from ``seed``: the backbone's from torch's generators, the head's from its own."""
    device = model.extractor.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        if isinstance(model.head, Head):
            model.head.draw_from([torch.Generator(device).manual_seed(seed + 2**32)])
        yield
