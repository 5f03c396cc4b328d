"""Is training the last blocks from cached states the same as training them with the frozen blocks in the loop?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedcache.arguments import checks_arguments
from embedcache.backbone import FrozenModel, choose_device, load_again, probe_of
from embedcache.cache import FeatureCache
from embedcache.equivalence.bits import Array, Difference, difference
from embedcache.equivalence.check import Reference
from embedcache.equivalence.identity import load_standard, made_with
from embedcache.equivalence.plain_blocks import NoisyStates, PlainBlocks, states_tolerance
from embedcache.equivalence.result import Comparison, EquivalenceResult, judged
from embedcache.equivalence.rows import RawRows, Sample, matched, sample
from embedcache.equivalence.tolerance import DRAWS
from embedcache.errors import BackboneError, FeatureError, SpecError
from embedcache.examples import Examples, load_examples
from embedcache.features import Ragged, Rows
from embedcache.finetune import (
    CachedStates,
    LiveStates,
    TailModel,
    cached_states,
    fit_live,
    load_tail,
    outputs_of,
    parts_of,
)
from embedcache.finetune.model import live_head
from embedcache.heads import build_head
from embedcache.numerics import difference as numerics_of
from embedcache.shard import FeatureSet
from embedcache.spec import TUNING, TUNING_DECAY, TUNING_RATE, HeadSpec, ModelSource, TrainSpec
from embedcache.task import CLASSIFICATION, task_named
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

    Both start from the same weights, batches and dropout draws; states, losses, every trained number after the last
    step, and the logits of an evaluation split must agree bit for bit. The frozen blocks run at canonical shapes, as
    in extraction, and nothing in the cache is changed.

    Args:
        cache: a cache with the states, or where it is.
        inputs: what it was made from; None for the inputs that it keeps.
        blocks: how many blocks are trained.
        head: a torch head; None for linear.
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
    pooled, states = feature_for(cache, spec, feature), cached_states(cache, blocks)
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
    training = _Training(cache, raw, rows, pooled, states, spec, source, blocks, settings, most, progress)
    cached = training.run("cached", training.cached)
    comparisons, notes, probe = [], list[str](), None
    if reference != "standard":
        frozen = training.frozen()
        probe = probe_of(frozen)
        live = training.run("live", lambda some: LiveStates(frozen, raw.contents(some), states.name, frozen.device))
        comparisons.append(_states(states.name, cache, rows, cached.states, live.states))
        comparisons += [
            _compared("canonical", what, cached.values, live.values) for what in (_INITIAL, *_TRAINED)
        ]  # fmt: skip
    if reference != "canonical":
        try:
            comparisons += training.compared_with_plain(cached)
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
            "training": f"{counted(most, 'step')} of {settings.batch_size} of the last {counted(blocks, 'block')} and "
            f"the head {spec.kind} on {pooled.name}",
            "predictions": f"{counted(len(rows.evaluate), 'row')} of {rows.split}",
        },
        seconds=time.perf_counter() - begun, numerics=numerics_of(stored, probe and probe.only(states.name)),
    )  # fmt: skip


_INITIAL, _TRAINED = "initial weights", ("losses", "final weights", "logits")


@dataclass(frozen=True)
class _Side:
    """What one way of training gave: the states of the rows, and numbers by name."""

    states: list[Ragged]
    values: dict[str, Array]
    tail: TailModel


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

    def tail(self) -> TailModel:
        """Load the last blocks with a new head, always the same."""
        head = build_head(self.head, self.pooled, len(self.cache.class_names), seed=self.settings.seed)
        return load_tail(self.cache, self.pooled, self.source, head, self.blocks)

    def cached(self, rows: Rows) -> CachedStates:
        """Return the states of some rows of the cache."""
        return CachedStates(self.cache, rows, self.states, choose_device(self.source.device))

    def frozen(self) -> FrozenModel[Any]:
        """Load the backbone to compute the states alone, in the type that the cache was computed in."""
        origin = made_with(self.cache)
        settings = self.cache.spec.settings
        assert settings is not None  # load_tail has refused a cache without
        settings = replace(settings, features=(self.states.name,), views=None, augment=None)
        return load_again(settings, self.source, origin, f"{self.cache.path} was made by")

    def run(self, title: str, of: Callable[[Rows], CachedStates | LiveStates]) -> _Side:
        """Train on the states that ``of`` gives for rows of the cache."""
        task, tail = task_named(self.cache.task or CLASSIFICATION), self.tail()
        parts = [of(some) for some in (self.rows.train, self.rows.evaluate)]
        values = {f"initial {name}": value for name, value in _weights(tail).items()}
        result = fit_live(
            tail, (parts[0], self.raw.targets[self.rows.train]), None, self.settings,
            parts_of(tail, self.settings, TUNING_RATE, TUNING_DECAY), task=task.name,
            class_names=self.cache.class_names, new_head=False, progress=self.progress, title=title, keep_losses=True,
            max_steps=self.steps,
        )  # fmt: skip
        losses = torch.stack([loss.reshape(()) for loss in result.fitted.losses]).cpu().numpy()
        values |= {"losses": losses.astype(np.float32), **_weights(tail), "logits": outputs_of(tail, parts[1])}
        return _Side([part.of(np.arange(len(part.lengths))) for part in parts], values, tail)

    def compared_with_plain(self, cached: _Side) -> list[Comparison]:
        """Compare with the whole network in plain torch, within what noise on the states comes to."""
        if self.cache.spec["compute_dtype"] != "float32":
            raise BackboneError("it is of float32 alone")
        standard = load_standard(self.cache, self.source, cached.tail.extractor)
        if standard is None:
            raise BackboneError("transformers cannot load the backbone")
        train, evaluation = (self.raw.contents(some) for some in (self.rows.train, self.rows.evaluate))
        tolerance = states_tolerance(standard, self.states, evaluation, cached.states[1])
        moved: dict[str, float] = {}
        for draw in range(DRAWS):
            noisy = self.run(
                "noise",
                lambda some, draw=draw: NoisyStates(  # type: ignore[misc]
                    self.cache, some, self.states, choose_device(self.source.device), tolerance, draw
                ),
            )  # fmt: skip
            for what in _TRAINED:
                gap = _compared("noise", what, cached.values, noisy.values).difference
                moved[what] = max(moved.get(what, 0.0), 2 * gap.largest)
        spec = self.settings
        rates = {
            name: rate
            for parameters, rate in parts_of(cached.tail, spec, TUNING_RATE, TUNING_DECAY)
            for name, parameter in cached.tail.named_parameters() if any(parameter is each for each in parameters)
        }  # fmt: skip
        start = {name[8:]: value for name, value in cached.values.items() if name.startswith("initial ")}
        lengths, size = self.cached(self.rows.train).lengths, spec.batch_size
        epochs = [grouped_order(lengths, size, spec.order_seed, epoch) for epoch in range(spec.epochs)]
        batches = [rows[at : at + size] for rows in epochs for at in range(0, len(rows), size)]
        plain = PlainBlocks(standard, cached.tail.place, self.blocks, self.head, self.pooled, start, rates).train(
            spec, len(batches), batches[: self.steps], train, self.raw.targets[self.rows.train],
            task_named(self.cache.task or CLASSIFICATION), evaluation,
        )  # fmt: skip
        return [_compared("standard", what, cached.values, plain, moved[what]) for what in _TRAINED]


def _weights(tail: TailModel) -> dict[str, Array]:
    return {
        name: parameter.detach().cpu().numpy().copy()
        for name, parameter in tail.named_parameters() if parameter.requires_grad
    }  # fmt: skip


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


def _compared(
    reference: str, what: str, cached: Mapping[str, Array], live: Mapping[str, Array], tolerance: float | None = None
) -> Comparison:
    single = what if what in cached else None
    names = [single] if single else [
        name for name in cached
        if name.startswith("initial ") == (what == _INITIAL) and name not in ("losses", "logits")
    ]  # fmt: skip
    whole, where = Difference(), ""
    for name in names:
        gap = difference(cached[name], live[name])
        if gap.where is not None and gap.largest >= whole.largest:
            where = f"{name}[{', '.join(map(str, gap.where))}]"
        whole = whole.joined(gap, 0)
    return judged(reference, what, whole, where, tolerance)
