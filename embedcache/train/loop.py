"""The one training loop: epochs, validation, early stopping, history. What a step is, is passed in.

A ``Learner`` takes steps on batches: K stacked heads on cached features, one head on the features that a live backbone
makes inside the step, or a whole model being fine-tuned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
from torch import Tensor

from embedcache.errors import TrainingError
from embedcache.notebook import shows_bars
from embedcache.spec import TrainSpec
from embedcache.task import Floats, Task
from embedcache.train.batches import BatchSource, RowsOfBatch
from embedcache.train.metrics import metric_named
from embedcache.train.result import Epoch, Observe

# Whether the head was still improving when training ended.


STILL_IMPROVING = "the head was still improving when training ended: more epochs or a higher learning rate may help"

LAST_FIFTH, STILL = 0.8, 0.05


def still_improving(history: Sequence[Mapping[str, float]], best: int, spec: TrainSpec, epochs: int) -> bool:
    """Return whether the head was still improving when training ended.

    That is the case where the last fifth of the way brought more than a twentieth of the fall of the training loss, and
    the best epoch on validation (-1: none) lies in that fifth. The way is the sum of learning rates over the steps: of
    a cosine schedule its last fifth is the second half of the epochs. A loss that approaches its limit as
    ``exp(-k t)`` is still improving for ``k`` below 2.7.
    """
    from embedcache.train.stack import schedule_factors  # which needs torch

    if len(history) < epochs or epochs < 3:
        return False
    way = np.cumsum(schedule_factors(spec, 0, 16 * epochs, 16 * epochs).reshape(epochs, 16).sum(axis=1))
    most = LAST_FIFTH * way[-1]
    losses = np.array([epoch["train_loss"] for epoch in history])
    before = min(float(np.interp(most, way, losses)), *losses[way <= most])  # not what only swings up and down
    fallen, lately = losses[0] - losses[-1], before - losses[-1]
    return bool(lately > STILL * fallen > 0) and (best < 0 or way[best] > most)


Scores = Floats


B = TypeVar("B", bound=RowsOfBatch)
B_contra = TypeVar("B_contra", bound=RowsOfBatch, contravariant=True)


class Learner(Protocol[B_contra]):
    """What the loop trains: K models at once, those at the places 0 to K - 1 still going on."""

    @property
    def alive(self) -> Sequence[int]:
        """The numbers of the models still in training."""
        ...

    def step(self, batch: B_contra) -> Tensor:
        """Take one step; return the losses, [] or [K], without waiting for a device."""
        ...

    def evaluate(self) -> Scores | None:
        """Return the validation metric of each model still in training, [K]; None where there is no validation."""
        ...

    def remember(self, places: Sequence[int]) -> None:
        """Keep the present weights of these models as their best."""
        ...

    def keep(self, places: Sequence[int]) -> None:
        """Go on with these models only."""
        ...


@dataclass(frozen=True)
class Stopping:
    """When the loop ends, and which epoch is the best.

    Attributes:
        epochs: how many there are at most.
        patience: end after this many epochs in which no model has become better; 0 never ends early.
        min_steps: no model stops early before this many steps.
        max_steps: end after this many steps, also within an epoch; None for no limit.
        metric: what ``Learner.evaluate`` measures.
        greater_is_better: its direction.
    """

    epochs: int
    patience: int = 0
    min_steps: int = 0
    max_steps: int | None = None
    metric: str = ""
    greater_is_better: bool = True

    @classmethod
    def of(cls, spec: TrainSpec, task: Task, steps: int, max_steps: int | None = None) -> Stopping:
        """Return when to stop, from settings and the steps of an epoch. Raises ``SpecError`` as ``metric_named``."""
        metric = metric_named(spec.metric or task.default_metric, task)
        return cls(
            spec.epochs_of(steps), spec.patience, spec.least_steps, max_steps, metric.name, metric.greater_is_better
        )


@dataclass
class LoopResult:
    """What the loop did: for each model an entry for each epoch, and its best epoch, -1 for none.

    ``losses`` has one [] or [K] for each step, where they were to be kept.
    """

    history: list[list[Epoch]]
    best_epoch: list[int]
    steps: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    losses: list[Tensor] = field(default_factory=list)


def telling(observe: Observe | None, spec: TrainSpec, steps: int) -> Callable[[int, Epoch], object] | None:
    """Return what ``fit`` calls after every epoch of one model, to tell of it, with its last step's learning rate.

    ``steps`` is how many there are in all, at most.
    """
    from embedcache.train.stack import schedule_factors

    if observe is None:
        return None

    def told(taken: int, epoch: Epoch) -> object:
        rate = spec.learning_rate * float(schedule_factors(spec, taken - 1, 1, steps)[0])
        values = {name: value for name, value in epoch.items() if name != "epoch"}
        return observe(int(epoch["epoch"]), {**values, "learning_rate": rate})

    return told


def fit(
    learner: Learner[B],
    batches: BatchSource[B],
    stopping: Stopping,
    *,
    title: str = "train",
    progress: bool = True,
    keep_losses: bool = False,
    each_step: Callable[[], object] | None = None,
    each_epoch: Callable[[int, Epoch], object] | None = None,
) -> LoopResult:
    """Train until the loop ends; see ``Stopping``.

    Ctrl-C stops after the step in progress: the best weights so far stay, and ``interrupted`` is set. So does
    ``each_step``, which is called before every step, where it raises ``KeyboardInterrupt``. ``each_epoch`` is called
    after every epoch with the steps taken and the record of the first model.

    Raises ``TrainingError`` when a loss becomes NaN or infinite, saying what to lower.
    """
    from tqdm.auto import tqdm

    models = len(learner.alive)
    result = LoopResult([[] for _ in range(models)], [-1] * models)
    best = np.full(models, -np.inf)
    waited = np.zeros(models, np.int64)
    sign = 1.0 if stopping.greater_is_better else -1.0
    bar = tqdm(
        total=stopping.epochs * batches.steps, desc=title, unit="step", mininterval=0.2,
        disable=not (progress and shows_bars()),
    )  # fmt: skip
    begun = time.perf_counter()
    try:
        for epoch in range(stopping.epochs):
            if not learner.alive or (stopping.max_steps is not None and result.steps >= stopping.max_steps):
                break
            start, total, seen = time.perf_counter(), None, 0
            for batch in batches.epoch(epoch):
                if each_step is not None:
                    each_step()
                loss = learner.step(batch)
                if keep_losses:
                    result.losses.append(loss.clone())
                rows = len(batch.rows)
                total = loss * rows if total is None else total.add_(loss, alpha=rows)
                seen += rows
                result.steps += 1
                bar.update()
                if stopping.max_steps is not None and result.steps >= stopping.max_steps:
                    break
            mean = np.atleast_1d((total / seen).double().cpu().numpy()) if total is not None else np.zeros(models)
            if not np.isfinite(mean).all() and len(mean) == 1:
                raise TrainingError(
                    f"the loss became {mean[0]} in epoch {epoch + 1}: "
                    "use a lower learning rate, or clip gradients to the norm 1"
                )
            scores = learner.evaluate()
            seconds = time.perf_counter() - start
            alive = list(learner.alive)
            for place, model in enumerate(alive):
                entry: Epoch = {"epoch": epoch + 1, "train_loss": float(mean[place]), "seconds": seconds}
                if scores is not None:
                    entry[f"validation_{stopping.metric}"] = float(scores[place])
                result.history[model].append(entry)
            if scores is not None:
                # A model whose loss or score is not a number never counts as better, and does not go on.
                now = np.where(np.isfinite(scores) & np.isfinite(mean), sign * scores, -np.inf)
                better = [place for place, model in enumerate(alive) if now[place] > best[model]]
                for place in better:
                    best[alive[place]] = now[place]
                    result.best_epoch[alive[place]] = epoch
                learner.remember(better)
                waited[alive] += 1
                waited[[alive[place] for place in better]] = 0
                going = [
                    place for place, model in enumerate(alive)
                    if (
                        not stopping.patience or waited[model] < stopping.patience or result.steps < stopping.min_steps
                    )
                    and np.isfinite(mean[place])
                ]  # fmt: skip
                if len(going) < len(alive):
                    learner.keep(going)
                bar.set_postfix_str(f"epoch {epoch + 1}, {stopping.metric} {sign * best.max():.4f}", refresh=False)
            if each_epoch is not None:
                each_epoch(result.steps, result.history[0][-1])
    except KeyboardInterrupt:
        result.interrupted = True
    finally:
        bar.close()
    result.seconds = time.perf_counter() - begun
    return result
