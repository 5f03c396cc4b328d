"""Is training the last blocks from cached states the same as training them with the frozen blocks in the loop?"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedcache.arguments import checks_arguments
from embedcache.backbone import load_backbone, probe_of
from embedcache.cache import FeatureCache
from embedcache.equivalence.bits import Array, Difference, difference
from embedcache.equivalence.result import Comparison, EquivalenceResult, judged
from embedcache.equivalence.rows import matched, sample
from embedcache.errors import FeatureError, SpecError
from embedcache.examples import Examples, load_examples
from embedcache.features import Ragged
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
from embedcache.spec import TUNING, TUNING_DECAY, TUNING_RATE, HeadSpec, ModelSource
from embedcache.task import CLASSIFICATION, task_named
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
    task, y = task_named(cache.task or CLASSIFICATION), raw.targets
    epoch = -(-len(rows.train) // TUNING.batch_size)
    most = steps or (epoch if everything else 10)
    settings = replace(TUNING, epochs=-(-most // epoch), seed=seed)
    sides: list[dict[str, Array]] = []
    found: list[Any] = []
    probe = None
    for live in (False, True):
        module = build_head(spec, pooled, len(cache.class_names), seed=seed)
        tail = load_tail(cache, pooled, source, module, blocks)
        halves, parts = (rows.train, rows.evaluate), list[CachedStates | LiveStates]()
        if live:
            frozen = _whole(tail.extractor, states.name, str(cache.spec["compute_dtype"]))
            probe = probe_of(frozen)
            parts += [LiveStates(frozen, raw.contents(some), states.name, tail.extractor.device) for some in halves]
        else:
            parts += [CachedStates(cache, some, states, tail.extractor.device) for some in halves]
        initial = _weights(tail)
        result = fit_live(
            tail, (parts[0], y[rows.train]), None, settings,
            parts_of(tail, settings, TUNING_RATE, TUNING_DECAY), task=task.name, class_names=cache.class_names,
            new_head=True, progress=progress, title="live" if live else "cached", keep_losses=True, max_steps=most,
        )  # fmt: skip
        losses = torch.stack([loss.reshape(()) for loss in result.fitted.losses]).cpu().numpy()
        found.append([part.of(np.arange(len(part.lengths))) for part in parts])
        sides.append(
            {f"initial {name}": value for name, value in initial.items()}
            | {"losses": losses.astype(np.float32)} | _weights(tail) | {"logits": outputs_of(tail, parts[1])}
        )  # fmt: skip
    comparisons = [_states(states.name, cache, rows, *found)]
    for what in ("initial weights", "losses", "final weights", "logits"):
        comparisons.append(_compared(what, *sides))
    findings = [
        f"{row.what}: {row.difference.values - row.difference.identical:,} of {row.difference.values:,} values differ"
        for row in comparisons if row.verdict == "different"
    ]  # fmt: skip
    stored = cache.common_probe and cache.common_probe.only(states.name)
    return EquivalenceResult(
        comparisons, findings[:1],
        sampled={
            "states": f"{len(rows.train) + len(rows.evaluate):,} of {len(cache):,} rows",
            "training": f"{counted(most, 'step')} of {settings.batch_size} of the last {counted(blocks, 'block')} and "
            f"the head {spec.kind} on {pooled.name}",
            "predictions": f"{counted(len(rows.evaluate), 'row')} of {rows.split}",
        },
        seconds=time.perf_counter() - begun, numerics=numerics_of(stored, probe and probe.only(states.name)),
    )  # fmt: skip


def _whole(backbone: Any, name: str, computed: str) -> Any:
    """Load the same backbone once more, to compute the states alone, in the type that the cache was computed in."""
    recipe = backbone.recipe
    settings = replace(recipe.settings, features=(name,), compute_dtype=computed)
    return load_backbone(**recipe.source.arguments(), **settings.arguments())


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


def _compared(what: str, cached: dict[str, Array], live: dict[str, Array]) -> Comparison:
    single = what if what in cached else None
    initial = what == "initial weights"
    names = [single] if single else [
        name for name in cached if name.startswith("initial ") == initial and name not in ("losses", "logits")
    ]  # fmt: skip
    whole, where = Difference(), ""
    for name in names:
        gap = difference(cached[name], live[name])
        if gap.where is not None and not where:
            where = f"{name}[{', '.join(map(str, gap.where))}]"
        whole = whole.joined(gap, 0)
    return judged("canonical", what, whole, where)
