"""The results of training: the parameters that an engine fitted, and the head with the record of its training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from embedcache.heads import TrainedHead
from embedcache.notebook import Table, panel
from embedcache.numerics import Probe
from embedcache.spec import ExtractionSpec
from embedcache.task import Array
from embedcache.wording import counted, duration

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator
    from torch import Tensor

    from embedcache.cache import FeatureCache
    from embedcache.heads.folder import RunFolder

Epoch = dict[str, float]
"""The record of one epoch: ``epoch`` from 1 on, ``train_loss``, ``seconds``, ``validation_METRIC``."""
Observe = Callable[[int, Mapping[str, float]], object]
"""What is told of training as it goes on: a step, such as an epoch's number, and values."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """One head as an engine (minibatch, convex, sklearn) fitted it.

    Attributes:
        state: its arrays by name; empty for an estimator that is not linear.
        estimator: that estimator.
        history: a record for each epoch; the convex solver has one entry, with its iterations.
        notes: one-line facts to print.
        epochs: how many were planned; 0 for engines without epochs.
        best_epoch: the best on validation, counted from 0; -1 where nothing was measured, or the start was kept.
        start: the validation metric of what training started from, where that was kept; else None.
        steps: steps that were taken.
        seconds: the duration of the pass, for all heads that shared it.
        interrupted: whether Ctrl-C ended it early, with the best weights so far.
        improving: whether it was still improving when training ended.
        losses: [] or [K] for each step, where ``keep_losses`` asked for them.
    """

    state: Mapping[str, Array] = field(default_factory=dict)
    estimator: BaseEstimator | None = None
    history: Sequence[Epoch] = ()
    notes: tuple[str, ...] = ()
    epochs: int = 0
    best_epoch: int = -1
    start: float | None = None
    steps: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    improving: bool = False
    losses: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Origin:
    """The origin of features: the spec of the cache, the backbone's name, and the probe of the machine."""

    extraction: ExtractionSpec = field(default_factory=ExtractionSpec)
    model: str | None = None
    revision: str | None = None
    probe: Probe | None = None

    @classmethod
    def of(cls, cache: FeatureCache) -> Origin:
        """Return where the features of a cache come from."""
        last = cache.provenance()[-1] if cache.provenance() else {}
        return cls(cache.spec, last.get("model"), last.get("revision"), cache.common_probe)


H = TypeVar("H")


@dataclass(frozen=True)
class TrainingResult(Generic[H]):
    """A ``TrainedHead`` or a fine-tuned model, with the record of its training.

    ``metrics`` are by split, ``notes`` are one-line facts to print, ``facts`` stand in the model card; ``fitted`` is
    what the engine made, ``seconds`` what it and the calibration took.
    """

    head: H
    fitted: Fitted = field(repr=False)
    metrics: Mapping[str, object] = field(default_factory=dict)
    notes: Sequence[str] = ()
    seconds: float = 0.0
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def history(self) -> Sequence[Epoch]:
        """A dict for each epoch."""
        return self.fitted.history

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it early, with the best weights so far."""
        return self.fitted.interrupted

    def _repr_html_(self) -> str:
        facts = self.head.facts() if isinstance(self.head, TrainedHead) else {"model": type(self.head).__name__}
        splits = {name: values for name, values in self.metrics.items() if isinstance(values, Mapping)}
        names = dict.fromkeys(
            name for values in splits.values() for name, value in values.items() if isinstance(value, (int, float))
        )
        rows = [[name, *(_shown(values.get(name)) for values in splits.values())] for name in names]
        table = Table(["metric", *splits], rows, range(1, len(splits) + 1))
        took = f"{counted(len(self.history), 'epoch')} in {duration(self.seconds)}" if self.fitted.epochs else ""
        return panel("TrainingResult", facts, [table] if rows else [], self.notes, more=took)

    def save(self: TrainingResult[TrainedHead], directory: Path | str | RunFolder) -> None:
        """Write the head bundle: head, metrics, history, model card; see ``TrainedHead.save_pretrained``."""
        facts = {**self.facts, "trained in": f"{self.seconds:.1f} s"}
        self.head.save_pretrained(directory, metrics=self.metrics, history=self.history, facts=facts)


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else "-"
