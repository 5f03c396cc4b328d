"""Training with the backbone inside every step: full fine-tuning, fine-tuning from a trained head, or a frozen one.

The loop, the loss, the order of the rows and the schedule are those of training on a cache; what differs is the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedcache.backbone import Tokens
from embedcache.batching import Batch as Shape
from embedcache.errors import InputError, SpecError, warn
from embedcache.finetune.model import FeatureBasedModel
from embedcache.heads.modules import Head
from embedcache.spec import TaskName, TrainSpec
from embedcache.task import CLASSIFICATION, REGRESSION, Task, task_named
from embedcache.train.batches import Batch, order
from embedcache.train.data import checked_targets, class_weights, refuse_untrainable, target_moments
from embedcache.train.ending import STILL_IMPROVING, still_improving
from embedcache.train.loop import Scores, Stopping, fit
from embedcache.train.losses import Loss
from embedcache.train.metrics import measure, scores
from embedcache.train.stack import BETA1, BETA2, EPSILON, schedule_factors
from embedcache.train.start import start_at, start_biases

Array = npt.NDArray[Any]
Contents = Sequence[str] | Sequence[bytes]

FINE_TUNING = TrainSpec(
    epochs=3, batch_size=16, learning_rate=1e-3, weight_decay=0.01, schedule="linear", warmup=0.1, clip=1.0, patience=0
)
"""How a whole model is tuned when nobody says: batches of 16, 3 epochs, warm-up and linear decay (Devlin et al. 2019),
a tenth of the steps for warming up, Adam with its bias correction (Mosbach et al. 2021). ``learning_rate`` is the
head's."""
BACKBONE_RATE = 5e-5
"""The backbone's learning rate: the largest of the three that Devlin et al. (2019) choose from, as the default model
is small."""


class LiveBatches:
    """Batches of token ids, padded to the longest of each batch, in the order that a cache's rows are trained in.

    ``x`` of a batch is the ids [B, T], ``mask`` the attention mask [B, T].
    """

    def __init__(self, model: FeatureBasedModel, tokens: Tokens, batch_size: int, seed: int) -> None:
        self._extractor, self._tokens, self._size, self._seed = model.extractor, tokens, batch_size, seed
        self.steps = -(-len(tokens.lengths) // batch_size)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yield the batches of one epoch."""
        rows = order(len(self._tokens.lengths), self._seed, number)
        for start in range(0, len(rows), self._size):
            mine = rows[start : start + self._size]
            ids, mask = laid_out(self._extractor, self._tokens, mine)
            yield Batch(ids, mask, torch.from_numpy(mine).to(ids.device))


def laid_out(extractor: Any, tokens: Tokens, rows: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Return the token ids and the mask of some rows, int64 [B, T], padded to the longest of them."""
    longest = int(tokens.lengths[rows].max())
    inputs = extractor.lay_out(tokens, Shape(longest, len(rows), rows))
    return inputs.arguments["input_ids"], inputs.mask


def live_outputs(model: FeatureBasedModel, contents: Contents) -> npt.NDArray[np.float32]:
    """Run backbone and head over texts, in eval mode and without gradients: logits or values, float32 [N, C].

    Rows of like length go together; the model is left in the mode it was in.
    """
    return _outputs(model, model.extractor.prepare(_bytes(contents)))


def _outputs(model: FeatureBasedModel, tokens: Tokens) -> npt.NDArray[np.float32]:
    lengths = tokens.lengths
    by_length = np.argsort(-lengths, kind="stable")
    positions = model.extractor.policy.positions
    parts, start, training = [], 0, model.training
    model.eval()
    try:
        with torch.no_grad():
            while start < len(by_length):
                rows = by_length[start : start + max(1, positions // int(lengths[by_length[start]]))]
                parts.append(model(*laid_out(model.extractor, tokens, rows)).logits.float().cpu().numpy())
                start += len(rows)
    finally:
        model.train(training)
    found = np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
    out = np.empty_like(found)
    out[by_length] = found
    return out


def _bytes(contents: Contents) -> list[bytes]:
    return [each.encode("utf-8") if isinstance(each, str) else each for each in contents]


def as_probabilities(logits: Array, task: TaskName) -> npt.NDArray[np.float64]:
    """Turn logits [N, C] into probabilities by softmax or sigmoid; a regression's values stay values."""
    z = logits.astype(np.float64)
    if task == "regression":
        return z
    if task == "multilabel":
        return np.asarray(0.5 * (1 + np.tanh(0.5 * z)))
    z = np.exp(z - z.max(axis=1, keepdims=True))
    return np.asarray(z / z.sum(axis=1, keepdims=True))


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
        loss: Loss,
        y: Tensor,
        total_steps: int,
        judge: Callable[[], float] | None,
    ) -> None:
        self.model, self._loss, self._y, self._judge, self._clip = model, loss, y, judge, spec.clip
        self.alive: list[int] = [0]
        self._factors = schedule_factors(spec, 0, total_steps, total_steps)
        self._taken = 0
        self._rates: list[float] = []
        groups = []
        for module, rate in ((model.backbone, backbone_rate), (model.head, spec.learning_rate)):
            trainable = [each for each in module.parameters() if each.requires_grad]
            for decay, chosen in (
                (spec.weight_decay, [each for each in trainable if each.dim() > 1]),
                (0.0, [each for each in trainable if each.dim() <= 1]),
            ):
                if chosen:
                    groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
                    self._rates.append(rate)
        self.parameters = [each for group in groups for each in group["params"]]  # type: ignore[attr-defined]
        device = self.parameters[0].device.type
        self.optimizer = torch.optim.AdamW(
            groups, betas=(BETA1, BETA2), eps=EPSILON, fused=True if device in ("cpu", "cuda") else None
        )
        self._best: dict[str, Tensor] | None = None

    def step(self, batch: Batch) -> Tensor:
        """Take one step."""
        if not self.model.training:
            self.model.train()
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * float(self._factors[min(self._taken, len(self._factors) - 1)])
        logits = self.model(batch.x, batch.mask).logits
        loss, slope = self._loss(logits.detach().t().contiguous(), self._y[batch.rows], None)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward([logits], [slope.t()])
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self._clip)
        self.optimizer.step()
        self._taken += 1
        return loss

    def evaluate(self) -> Scores | None:
        """Return the validation metric, [1]."""
        return None if self._judge is None or not self.alive else np.array([self._judge()])

    def _changing(self) -> Mapping[str, Tensor]:
        changing: dict[str, Tensor] = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        if not self.model.freeze_backbone:
            changing |= {f"backbone.{name}": each for name, each in self.model.backbone.named_buffers()}
        return changing

    def remember(self, places: Sequence[int]) -> None:
        """Keep the present weights as the best."""
        if not places:
            return
        if self._best is None:
            self._best = {name: each.detach().clone() for name, each in self._changing().items()}
            return
        for name, each in self._changing().items():
            self._best[name].copy_(each.detach())

    def keep(self, places: Sequence[int]) -> None:
        """Go on, or not."""
        self.alive = [self.alive[place] for place in places]

    @torch.no_grad()
    def finish(self) -> None:
        """Restore the best weights; the last where nothing was measured."""
        if self._best is not None:
            for name, each in self._changing().items():
                each.copy_(self._best[name])
        self.model.eval()


@dataclass(frozen=True)
class FineTuned:
    """A live model after training, with its best weights and in eval mode.

    ``metrics`` has ``validation`` where there were rows for it, ``history`` a dict for each epoch; ``best_epoch``
    counts from 1, 0 where nothing was measured; ``notes`` are one-line facts to print. A regression's values are in
    real units.
    """

    model: FeatureBasedModel
    task: TaskName
    class_names: tuple[str, ...]
    metrics: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    best_epoch: int
    steps: int
    seconds: float
    interrupted: bool
    losses: Sequence[float]
    target: tuple[Array, Array]
    notes: Sequence[str] = ()

    def outputs(self, contents: Contents) -> npt.NDArray[np.float64]:
        """Return probabilities float64 [N, C] for texts; for regression, values."""
        return _judged_outputs(live_outputs(self.model, contents), self.task, self.target)


def _judged_outputs(logits: Array, task: TaskName, target: tuple[Array, Array]) -> npt.NDArray[np.float64]:
    said = as_probabilities(logits, task)
    return np.asarray(said * target[1] + target[0]) if task == "regression" else said


@dataclass(frozen=True, eq=False)
class _Labelled:
    """Contents that have a label, and their targets."""

    contents: list[bytes]
    y: Array

    @classmethod
    def of(cls, contents: Contents, y: npt.ArrayLike, task: Task, where: str) -> _Labelled:
        """Raise ``InputError`` for targets that do not fit."""
        if isinstance(contents, (str, bytes)):
            raise InputError(f"{where}: expected a list of texts, got one text")
        content = _bytes(contents)
        targets, kept = checked_targets(y, len(content), task, where=where)
        return cls([content[row] for row in np.flatnonzero(kept).tolist()], targets[kept])


def fine_tune(
    model: FeatureBasedModel,
    contents: Contents,
    y: Any,
    eval_contents: Contents | None = None,
    y_eval: Any = None,
    spec: TrainSpec = FINE_TUNING,
    *,
    backbone_learning_rate: float = BACKBONE_RATE,
    task: TaskName = "classification",
    class_names: Sequence[str],
    new_head: bool = False,
    progress: bool = True,
    title: str = "fine-tune",
    keep_losses: bool = False,
) -> FineTuned:
    """Train a live model in place: all of it, or its head alone where the backbone is frozen.

    Args:
        model: unfrozen for full fine-tuning; with a head trained on a cache this is LP-FT (Kumar et al. 2022).
        contents: texts, or their UTF-8 bytes.
        y: int64 [N] class indices (-1: no label), uint8 [N, C], or float [N, R].
        eval_contents, y_eval: validation rows: early stopping, best weights. None for none.
        spec: how to train; ``learning_rate`` is the head's, ``standardize`` is not looked at.
        backbone_learning_rate: the backbone's, where it is not frozen.
        new_head: the head has learnt nothing yet: its biases start where those of training on a cache do.

    Draws of dropout come from ``spec.seed``; torch's own generators are left as they were.

    Raises:
        TrainingError: one class only, fewer rows than classes, a loss that became NaN.
        InputError: targets that do not fit.
        SpecError: settings that are not for a live model.
    """
    if spec.solver == "convex" or spec.optimizer != "adamw":
        raise SpecError(f"a live model is trained by minibatch AdamW, not {spec.solver} {spec.optimizer}")
    kind = task_named(task)
    data = _Labelled.of(contents, y, kind, "training")
    refuse_untrainable(data.y, kind, class_names)
    judged = None
    if eval_contents is not None and y_eval is not None:
        judged = _Labelled.of(eval_contents, y_eval, kind, "validation")
        judged = judged if judged.contents else None
    target = target_moments(data.y, kind)
    with _seeded(spec.seed, model):
        tokens = model.extractor.prepare(data.contents)
        batches = LiveBatches(model, tokens, spec.batch_size, spec.order_seed)
        stopping = Stopping.of(spec, kind, batches.steps)
        judge = None if judged is None else _Judge(model, judged, kind, stopping.metric, target)
        weights = class_weights([spec], data.y, kind, class_names)
        device = model.extractor.device
        loss = Loss(kind, len(class_names), [spec.label_smoothing], weights, device=str(device))
        targets = (data.y - target[0]) / target[1] if kind is REGRESSION else data.y
        if new_head and isinstance(model.head, Head):
            weight = None if weights is None else weights[0]
            start_at(
                model.head,
                start_biases(targets, kind, len(class_names), smoothing=spec.label_smoothing, class_weight=weight),
            )
        targets = targets if kind is CLASSIFICATION else np.asarray(targets, np.float32)
        learner = LiveLearner(
            model, spec, backbone_learning_rate, loss, torch.from_numpy(targets).to(device),
            stopping.epochs * batches.steps, judge,
        )  # fmt: skip
        fitted = fit(learner, batches, stopping, title=title, progress=progress, keep_losses=keep_losses)
        learner.finish()
    metrics = {}
    if judge is not None and judged is not None:
        metrics["validation"] = measure(kind, judged.y, judge.outputs(), class_names)
    still = still_improving(fitted.history[0], fitted.best_epoch[0], spec, stopping.epochs)
    notes = (STILL_IMPROVING,) if still else ()
    warn(notes)
    return FineTuned(
        model, task, tuple(class_names), metrics, fitted.history[0], fitted.best_epoch[0] + 1, fitted.steps,
        fitted.seconds, fitted.interrupted, [float(each) for each in fitted.losses], target,
        notes,
    )  # fmt: skip


class _Judge:
    """The validation metric of a live model."""

    def __init__(
        self, model: FeatureBasedModel, judged: _Labelled, task: Task, metric: str, target: tuple[Array, Array]
    ) -> None:
        self._model, self._task, self._metric, self._target, self._y = model, task, metric, target, judged.y
        self._tokens = model.extractor.prepare(judged.contents)

    def outputs(self) -> npt.NDArray[np.float64]:
        return _judged_outputs(_outputs(self._model, self._tokens), self._task.name, self._target)

    def __call__(self) -> float:
        return float(scores(self._metric, self._task, self._y, self.outputs()[None])[0])


@contextmanager
def _seeded(seed: int, model: FeatureBasedModel) -> Iterator[None]:
    """Draw dropout from ``seed``: the backbone's from torch's generators, the head's from its own."""
    device = model.extractor.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        if isinstance(model.head, Head):
            model.head.draw_from([torch.Generator(device).manual_seed(seed + 2**32)])
        yield
