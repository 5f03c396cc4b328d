"""Is training the last blocks from cached states the same as training them with the frozen blocks in the loop?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedcache.arguments import checks_arguments
from embedcache.backbone import FrozenModel, choose_device, compute_features, load_again, probe_of
from embedcache.cache import FeatureCache
from embedcache.equivalence.bits import Array, Difference, difference
from embedcache.equivalence.check import Reference
from embedcache.equivalence.identity import load_standard, made_with
from embedcache.equivalence.logits import compare_predictions
from embedcache.equivalence.plain_blocks import NoisyStates, PlainBlocks, states_tolerance
from embedcache.equivalence.result import Comparison, EquivalenceResult, judged
from embedcache.equivalence.rows import RawRows, Sample, matched, sample
from embedcache.equivalence.tolerance import DRAWS
from embedcache.equivalence.training import Named, differences_of, refuse_interrupted
from embedcache.errors import BackboneError, FeatureError, SpecError, quiet
from embedcache.examples import Examples, load_examples
from embedcache.features import InMemory, Ragged, Rows
from embedcache.finetune import (
    CachedStates,
    LiveStates,
    TailModel,
    fit_live,
    load_tail,
    outputs_of,
    parts_of,
    states_for,
)
from embedcache.finetune.live import into_standard_units
from embedcache.finetune.model import live_head
from embedcache.heads import TrainedHead, build_head
from embedcache.heads.modules import Head
from embedcache.numerics import difference as numerics_of
from embedcache.shard import FeatureSet
from embedcache.spec import TUNING, TUNING_DECAY, TUNING_DROPOUT, TUNING_RATE, HeadSpec, ModelSource, TrainSpec
from embedcache.task import CLASSIFICATION, REGRESSION, Task, task_named
from embedcache.train import train_head
from embedcache.train.batches import grouped_order
from embedcache.train.cached import feature_for
from embedcache.wording import counted

TRAIN_ROWS, EVALUATION_ROWS = 320, 256


@checks_arguments(load_examples)
def check_tuning(
    cache: FeatureCache | Path | str,
    inputs: Any = None,
    *,
    blocks: int = 2,
    model: Path | str | None = None,
    revision: str | None = None,
    head: HeadSpec | str | None = None,
    feature: str | None = None,
    dropout: bool = TUNING_DROPOUT,
    new_head: bool = False,
    steps: int | None = None,
    split: str | None = None,
    reference: Reference = "both",
    everything: bool = False,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: bool = True,
    **reading: Any,
) -> EquivalenceResult:
    """Compare training the last blocks from a cache's states with training that runs the frozen blocks in every step.

    Both take the same batches and dropout draws; states, the weights that training starts from, losses, gradients (all
    of the first step, and their norm in each), every trained number after the last step, and logits and labels of an
    evaluation split must agree bit for bit. The frozen blocks before the states run at canonical shapes, as in
    extraction, those behind them as ``TailModel`` says; nothing in the cache is changed.

    Args:
        cache: a cache with the states, or where it is.
        inputs: what it was made from; None for the inputs that it keeps.
        blocks: how many blocks are trained.
        head: a torch head; None for linear.
        dropout, new_head: as in ``tune``. A head that is not new is first trained by each side on its own features, of
            the training rows that are compared.
        steps: steps to compare; None for 10, with ``everything`` a whole epoch.
        reference: ``canonical``, as above; ``standard``, the whole network in plain transformers and torch, within a
            measured tolerance; or ``both``. The standard one is of float32 alone.
        everything: train on all rows and compare the states of all of them, not of a sample.

    The rest is as in ``check_equivalence``. Raises as ``tune`` does, and ``InputError`` where the input is another.
    """
    begun = time.perf_counter()
    if steps is not None and steps < 1:
        raise SpecError(f"steps is {steps}: expected at least 1")
    cache = cache if isinstance(cache, FeatureCache) else FeatureCache.open(cache)
    spec, source = live_head(head or "linear"), ModelSource(model, revision, device, trust_remote_code)
    pooled = feature_for(cache, spec, feature)
    states = states_for(cache, pooled, source, blocks)
    if inputs is not None and not isinstance(inputs, Examples):
        inputs = load_examples(inputs, **reading)
    raw = matched(cache, inputs)
    rows = sample(
        raw, rows=1, train_rows=TRAIN_ROWS, evaluation_rows=EVALUATION_ROWS, split=split, everything=everything,
        seed=seed,
    )  # fmt: skip
    epoch = -(-len(rows.train) // TUNING.batch_size)
    most = steps or (epoch if everything else 10)
    settings = replace(TUNING, epochs=-(-most // epoch), seed=seed)
    training = _Training(
        cache, raw, rows, pooled, states, spec, source, blocks, settings, most, progress, dropout, new_head
    )
    start = training.start(lambda: cache.of_rows(rows.train, pooled))
    cached = training.run("cached", training.cached, start)
    comparisons, notes, probe = [], list[str](), None
    if reference != "standard":
        frozen = training.frozen()
        probe = probe_of(frozen)
        live = training.run(
            "live", lambda some: LiveStates(frozen, raw.contents(some), states.name, frozen.device),
            training.start(lambda: compute_features(frozen, raw.contents(rows.train), pooled.name)),
        )  # fmt: skip
        comparisons.append(_states(states.name, cache, rows, cached.states, live.states))
        comparisons += training.compared("canonical", cached.values, live.values)
    if reference != "canonical":
        try:
            comparisons += training.compared_with_plain(cached, start)
        except BackboneError as error:
            notes.append(f"no standard reference: {error}")
    findings = [
        f"{row.what}: {row.difference.values - row.difference.identical:,} of {row.difference.values:,} values differ "
        f"from the {row.reference} reference, by up to {row.difference.largest:.2g}"
        for row in comparisons if row.verdict == "different"
    ]  # fmt: skip
    stored = cache.common_probe and cache.common_probe.only(states.name)
    return EquivalenceResult(
        comparisons, findings[:1], notes,
        sampled={
            "states": f"{len(rows.train) + len(rows.evaluate):,} of {len(cache):,} rows",
            "training": f"{counted(most, 'step')} of {settings.batch_size} of the last {counted(blocks, 'block')}"
            f"{' with dropout' * dropout} and {'a new' if new_head else 'a trained'} head {spec.kind} on {pooled.name}",
            "predictions": f"{counted(len(rows.evaluate), 'row')} of {rows.split}",
        },
        seconds=time.perf_counter() - begun, numerics=numerics_of(stored, probe and probe.only(states.name)),
    )  # fmt: skip


_TRAINED = ("losses", "gradients", "gradient norms", "final weights")


@dataclass(frozen=True)
class _Side:
    """What one way of training gave: the states of the rows, and arrays by name of each thing that is compared."""

    states: list[Ragged]
    values: Mapping[str, Named]
    tail: TailModel


@dataclass(frozen=True)
class _Watched:
    """The weights that a model starts from, its first gradients, and the squares of the norms of all of them."""

    tail: TailModel
    initial: dict[str, Array] = field(default_factory=dict)
    gradients: dict[str, Array] = field(default_factory=dict)
    squares: dict[str, list[float]] = field(default_factory=dict)

    def start(self) -> None:
        """Write down the weights, and from now on what each step's backward pass gives, before it is clipped."""
        self.initial.update(_weights(self.tail))
        for name, parameter in self.tail.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(self._see, name))  # type: ignore[no-untyped-call]

    def _see(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if name not in self.gradients:
            self.gradients[name] = _array(parameter.grad)
        self.squares.setdefault(name, []).append(float(parameter.grad.double().square().sum()))

    @property
    def norms(self) -> Array:
        """The norm of all gradients in each step, float32 [S]."""
        squares = [self.squares[name] for name in self.initial if name in self.squares]
        return np.asarray(np.sqrt(np.sum(squares, axis=0)), np.float32)


@dataclass(frozen=True)
class _Training:
    """What both sides train on, and how."""

    cache: FeatureCache
    raw: RawRows
    rows: Sample
    pooled: FeatureSet
    states: FeatureSet
    head: HeadSpec
    source: ModelSource
    blocks: int
    settings: TrainSpec
    steps: int
    progress: bool
    dropout: bool
    new_head: bool

    @property
    def task(self) -> Task:
        """The task of the cache."""
        return task_named(self.cache.task or CLASSIFICATION)

    @property
    def y(self) -> Array:
        """The targets of the training rows."""
        return self.raw.targets[self.rows.train]

    def start(self, features: Callable[[], InMemory]) -> TrainedHead | None:
        """Train the head to begin with on features of the training rows; None where a new one is asked for."""
        if self.new_head:
            return None
        with quiet():
            started = train_head(
                features(), self.y, head=self.head, task=self.task.name, class_names=self.cache.class_names,
                feature=self.pooled, progress=False, intervals=False,
            )  # fmt: skip
        refuse_interrupted(started.fitted)
        return started.head

    def tail(self, start: TrainedHead | None) -> TailModel:
        """Load the last blocks with a head to begin with; None for a new one, always the same."""
        if start is None:
            head = build_head(self.head, self.pooled, len(self.cache.class_names), seed=self.settings.seed)
        else:
            head = replace(start).module  # a copy of its own
            if self.task is REGRESSION:
                into_standard_units(head, self.y)
        return load_tail(
            self.cache, self.pooled, self.source, head, self.blocks, states=self.states, dropout=self.dropout
        )

    def cached(self, rows: Rows) -> CachedStates:
        """Return the states of some rows of the cache."""
        return CachedStates(self.cache, rows, self.states, choose_device(self.source.device))

    def frozen(self) -> FrozenModel[Any]:
        """Load the backbone to compute the states alone, in the type that the cache was computed in."""
        origin = made_with(self.cache)
        settings = self.cache.spec.settings
        assert settings is not None  # load_tail has refused a cache without
        settings = replace(settings, features=(self.states.name, self.pooled.name), views=None, augment=None)
        return load_again(settings, self.source, origin, f"{self.cache.path} was made by")

    def run(self, title: str, of: Callable[[Rows], CachedStates | LiveStates], start: TrainedHead | None) -> _Side:
        """Train on the states that ``of`` gives for rows of the cache, from a head to begin with."""
        tail = self.tail(start)
        watched, parts = _Watched(tail), [of(some) for some in (self.rows.train, self.rows.evaluate)]
        units = _units(tail)
        result = fit_live(
            tail, (parts[0], self.y), None, self.settings,
            parts_of(tail, self.settings, TUNING_RATE, TUNING_DECAY), task=self.task.name,
            class_names=self.cache.class_names, new_head=self.new_head, progress=self.progress, title=title,
            keep_losses=True, max_steps=self.steps, watch=watched.start,
        )  # fmt: skip
        refuse_interrupted(result.fitted)
        losses = torch.stack([loss.reshape(()) for loss in result.fitted.losses]).cpu().numpy()
        values = {
            "initial weights": watched.initial,
            "standardisation": {} if units is None else {"mean": _array(units[0]), "scale": _array(units[1])},
            "losses": {"step": losses.astype(np.float32)}, "gradients": watched.gradients,
            "gradient norms": {"step": watched.norms}, "final weights": _weights(tail),
            "logits": {"row": outputs_of(tail, parts[1])},
        }  # fmt: skip
        return _Side([part.of(np.arange(len(part.lengths))) for part in parts], values, tail)

    def compared(
        self, reference: str, cached: Mapping[str, Named], live: Mapping[str, Named],
        tolerances: Mapping[str, float] | None = None,
    ) -> list[Comparison]:  # fmt: skip
        """Compare two ways of training, from the weights that they start from to predictions."""
        comparisons = [
            judged(reference, what, *differences_of(values, live[what]), tolerances[what] if tolerances else None)
            for what, values in cached.items()
            if what in (tolerances or cached) and what != "logits" and (values or live[what])
        ]  # fmt: skip
        return comparisons + compare_predictions(
            self.cache, self.rows.evaluate, self.task, reference, cached["logits"]["row"], live["logits"]["row"],
            None if tolerances is None else tolerances["logits"],
        )  # fmt: skip

    def compared_with_plain(self, cached: _Side, start: TrainedHead | None) -> list[Comparison]:
        """Compare with the whole network in plain torch, within what noise on the states comes to."""
        if self.cache.spec["compute_dtype"] != "float32":
            raise BackboneError("it is of float32 alone")
        standard = load_standard(self.cache, self.source, cached.tail.extractor)
        if standard is None:
            raise BackboneError("transformers cannot load the backbone")
        train, evaluation = (self.raw.contents(some) for some in (self.rows.train, self.rows.evaluate))
        tolerance = states_tolerance(standard, self.states, evaluation, cached.states[1])
        moved = dict.fromkeys((*_TRAINED, "logits"), 0.0)
        for draw in range(DRAWS):
            noisy = self.run(
                "noise",
                lambda some, draw=draw: NoisyStates(  # type: ignore[misc]
                    self.cache, some, self.states, choose_device(self.source.device), tolerance, draw
                ),
                start,
            )  # fmt: skip
            for what, most in moved.items():
                moved[what] = max(most, 2 * differences_of(cached.values[what], noisy.values[what])[0].largest)
        spec = self.settings
        rates = {
            name: rate
            for parameters, rate in parts_of(cached.tail, spec, TUNING_RATE, TUNING_DECAY)
            for name, parameter in cached.tail.named_parameters() if any(parameter is each for each in parameters)
        }  # fmt: skip
        lengths, size = self.cached(self.rows.train).lengths, spec.batch_size
        epochs = [grouped_order(lengths, size, spec.order_seed, epoch) for epoch in range(spec.epochs)]
        batches = [rows[at : at + size] for rows in epochs for at in range(0, len(rows), size)]
        plain = PlainBlocks(
            standard, cached.tail.place, self.blocks, self.head, self.pooled, cached.values["initial weights"], rates,
            _units(cached.tail), self.dropout,
        ).train(spec, len(batches), batches[: self.steps], train, self.y, self.task, evaluation)  # fmt: skip
        return self.compared("standard", cached.values, plain, moved)


def _array(value: Tensor) -> Array:
    return np.asarray(value.detach().cpu().numpy().copy())


def _weights(tail: TailModel) -> dict[str, Array]:
    return {name: _array(parameter) for name, parameter in tail.named_parameters() if parameter.requires_grad}


def _units(tail: TailModel) -> tuple[Tensor, Tensor] | None:
    """Return the mean and the scale [D] by which a head standardises features, if it does."""
    assert isinstance(tail.head, Head)
    return tail.head.standardised


def _states(name: str, cache: FeatureCache, rows: Any, cached: list[Ragged], live: list[Ragged]) -> Comparison:
    whole, where = Difference(), ""
    for numbers, there, here in zip((rows.train, rows.evaluate), cached, live, strict=True):
        if not np.array_equal(there.lengths, here.lengths):
            row = int(np.flatnonzero(there.lengths != here.lengths)[0])
            raise FeatureError(
                f"row {cache.ids()[int(numbers[row])]} has {here.lengths[row]} tokens, and {there.lengths[row]} in "
                f"{cache.path}: its content or its preparation has changed"
            )
        gap = difference(there.values, here.values)
        if gap.where is not None and not where:
            row = int(np.searchsorted(there.offsets, gap.where[0], side="right")) - 1
            where = f"row {cache.ids()[int(numbers[row])]}"
        whole = whole.joined(gap, 0)
    return judged("canonical", f"states {name}", whole, where)
