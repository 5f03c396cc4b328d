"""One measurement in a process of its own: the extraction, or one training.

The parent writes a job and reads a result, both pickled; a mistake of the user's comes back as the error that it is.
"""

from __future__ import annotations

import io
import os
import pickle
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from embedcache.compare.figures import APPROACHES, Approach
from embedcache.compare.measurements import Extraction, ExtractionJob, Job, Memory, Peak, Training, TrainingJob
from embedcache.compare.rows import Rows, read_rows, training_rows
from embedcache.errors import BackboneMismatchError, EmbedcacheError, InputError, quiet
from embedcache.journal import commit
from embedcache.spec import TUNING_DECAY, TUNING_DROPOUT, BackboneSettings, TrainSpec, differences_text, states_set
from embedcache.task import CLASSIFICATION, REGRESSION, Array, Task, task_named

if TYPE_CHECKING:
    from embedcache.cache import FeatureCache
    from embedcache.features import Features
    from embedcache.heads import TrainedHead
    from embedcache.heads.modules import Head
    from embedcache.shard import FeatureSet

INTERRUPTED = 130

History = Sequence[Mapping[str, float]]
"""What training reports of each epoch, by name."""


def main() -> None:
    """Do the job in the file that the arguments name, beside the parent's number, and write the result beside it."""
    file = Path(sys.argv[1])
    end_with(int(sys.argv[2]))
    result: Extraction | Training | EmbedcacheError
    try:
        with quiet():  # of the rows, the parent has said it
            result = perform(pickle.loads(file.read_bytes()))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except EmbedcacheError as error:
        result = error
    file.with_suffix(".result").write_bytes(pickle.dumps(result))


def end_with(parent: int) -> None:
    """End this process when its parent is gone: a killed comparison must not hold the cache its successor needs."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, name="embedcache-parent", daemon=True).start()


def perform(job: Job) -> Extraction | Training:
    """Do one job. Raises ``KeyboardInterrupt`` where it was interrupted, so that nothing half done is kept."""
    return extraction(job) if isinstance(job, ExtractionJob) else training(job)


def extraction(job: ExtractionJob) -> Extraction:
    """Run the backbone once over all rows, and say what that took."""
    from embedcache.errors import Interrupted
    from embedcache.extract import load_for, run

    load("torch", "transformers")
    memory = Peak(job.source.device)
    examples = read_rows(job.rows)
    begun = time.perf_counter()
    sets = (job.pooling, states_set(job.blocks)) if job.blocks else (job.pooling,)
    asked = BackboneSettings(sets, content=examples.kind, pixel_range=examples.pixel_range)
    backbone = load_for(job.cache, job.source, asked)
    setup = time.perf_counter() - begun
    try:
        report = run(examples, backbone, job.cache, keep_inputs=True)
    except Interrupted:
        raise KeyboardInterrupt from None
    return Extraction(
        extracted=report.extracted,
        memory=memory.read(),
        parameters=sum(parameter.numel() for parameter in backbone.network.parameters()),
        rows=report.rows,
        seconds=report.seconds,
        setup_seconds=setup,
        tokens=report.tokens,
        unique=report.unique,
        disk=sum(shard.stat().st_size for shard in (job.cache / "features").glob("*.h5")),
    )


def load(*modules: str) -> None:
    """Load what a job needs before memory is watched: libraries are the baseline, whatever is done with them."""
    for module in modules:
        import_module(module)


@dataclass(frozen=True)
class Split:
    """The rows of one training: a fraction of train, all of validation and test, as numbers of rows of the cache."""

    train: Rows
    validation: Rows
    test: Rows

    @classmethod
    def of(cls, cache: FeatureCache, fraction: float, seed: int) -> Split:
        """Return the labelled rows of a cache's splits."""
        task, y = task_named(cache.task or CLASSIFICATION), cache.targets()
        labelled = task.labelled(y)
        train, validation, test = (
            rows[labelled[rows]] for rows in (cache.rows(name) for name in ("train", "validation", "test"))
        )
        keys = cache.keys("train")[labelled[cache.rows("train")]]
        return cls(train[training_rows(keys, y[train], task, fraction, seed)], validation, test)


@dataclass(frozen=True)
class Problem:
    """What one training learns from: the cache, the rows of its job, and the feature set that the head reads."""

    job: TrainingJob
    cache: FeatureCache
    split: Split
    feature: FeatureSet

    @property
    def approach(self) -> Approach:
        """How it is trained."""
        return APPROACHES[self.job.approach]

    def train_spec(self, approach: Approach) -> TrainSpec:
        """Return the settings by which an approach trains in this job."""
        return approach.train_spec(self.job.epochs, self.job.seed, self.job.metric)

    @property
    def task(self) -> Task:
        """What is learned."""
        return task_named(self.cache.task or CLASSIFICATION)

    @cached_property
    def targets(self) -> Array:
        """The targets of all rows of the cache."""
        return self.cache.targets()

    def features(self, rows: Rows) -> Features:
        """Return the cached features of some rows."""
        from embedcache.train.cached import rows_of

        return rows_of(self.cache, rows, self.feature)


@dataclass(frozen=True)
class Trained:
    """What training by an approach gave: its history, the seconds, parameters, and the outputs of the test rows.

    ``start`` is the validation metric of what training started from, where that was kept.
    """

    history: History
    seconds: float
    memory: Memory
    trainable: int
    outputs: Array
    probe_seconds: float | None = None
    setup_seconds: float = 0.0
    total: int | None = None
    start: float | None = None


def training(job: TrainingJob) -> Training:
    """Train by one approach, measure it, and keep what it says of the test rows in ``job.outputs``."""
    from embedcache.cache import FeatureCache
    from embedcache.train.cached import feature_for
    from embedcache.train.metrics import metric_named

    live = job.approach != "cached"
    load("embedcache.train.minibatch", *(["embedcache.finetune"] if live else []))
    memory = Peak(job.source.device)
    cache = FeatureCache.open(job.cache)
    split = Split.of(cache, job.fraction, job.seed)
    problem = Problem(job, cache, split, feature_for(cache, job.head, None))
    train = _last_blocks if problem.approach.blocks else _live if live else _cached
    trained = train(problem, memory)
    data = io.BytesIO()
    np.save(data, trained.outputs.astype(np.float32))
    commit(job.outputs, data.getvalue(), InputError)
    values = [float(epoch[f"validation_{job.metric}"]) for epoch in trained.history]
    greater = metric_named(job.metric, problem.task).greater_is_better
    best = int(np.argmax(values) if greater else np.argmin(values))
    return Training(
        train_rows=len(split.train),
        validation_rows=len(split.validation),
        test_rows=len(split.test),
        charged=len(np.unique(cache.places()[np.concatenate([split.train, split.validation])])),
        best_epoch=best + 1 if trained.start is None else 0,
        validation=values[best] if trained.start is None else trained.start,
        epoch_seconds=statistics.median(float(epoch["seconds"]) for epoch in trained.history),
        history=tuple({name: float(value) for name, value in epoch.items()} for epoch in trained.history),
        seconds=trained.seconds,
        probe_seconds=trained.probe_seconds,
        setup_seconds=trained.setup_seconds,
        memory=trained.memory,
        trainable=trained.trainable,
        total=trained.total,
    )


def _train_head(problem: Problem) -> tuple[TrainedHead, History, float]:
    """Train the head on the cache, as the cached approach does; the head, its history and the seconds."""
    from embedcache.train import train_head

    job, split, y = problem.job, problem.split, problem.targets
    begun = time.perf_counter()
    x, x_validation = problem.features(split.train), problem.features(split.validation)
    reading = time.perf_counter() - begun
    result = train_head(
        x, y[split.train], x_validation, y[split.validation], job.head, problem.train_spec(APPROACHES["cached"]),
        task=problem.task.name, class_names=problem.cache.class_names, feature=problem.feature, calibrate=False,
        intervals=False, device="cpu", progress=job.progress,
    )  # fmt: skip
    if result.interrupted:
        raise KeyboardInterrupt
    return result.head, result.history, reading + result.seconds


def _cached(problem: Problem, memory: Peak) -> Trained:
    head, history, seconds = _train_head(problem)
    held = memory.read()
    return Trained(history, seconds, held, head.parameters, head.probabilities(problem.features(problem.split.test)))


def _live(problem: Problem, memory: Peak) -> Trained:
    from embedcache.extract import load_for
    from embedcache.finetune import FeatureBasedModel, fine_tune, into_standard_units
    from embedcache.heads import build_head

    job, cache, split, approach, y = problem.job, problem.cache, problem.split, problem.approach, problem.targets
    spec = problem.train_spec(approach)
    kept = cache.inputs()
    assert kept is not None  # by the extraction
    train, validation, test = (kept.select(rows) for rows in (split.train, split.validation, split.test))
    begun = time.perf_counter()
    backbone = load_for(cache.path, job.source, BackboneSettings())
    refuse_changed(cache, backbone.identity)
    setup = time.perf_counter() - begun
    probe = None
    if approach.name == "lp-ft":
        head, _, probe = _train_head(problem)
        module = head.module
        if problem.task is REGRESSION:
            into_standard_units(module, y[split.train])
    else:
        module = build_head(job.head, problem.feature, len(cache.class_names), seed=job.seed)
    if approach.name == "frozen" and spec.standardize:
        standardize(module, problem)
    model: FeatureBasedModel = FeatureBasedModel(backbone, module, freeze_backbone=approach.backbone_rate is None)
    tuned = fine_tune(
        model, train, y[split.train], validation, y[split.validation], spec,
        backbone_learning_rate=approach.backbone_rate or 0.0, task=problem.task.name, class_names=cache.class_names,
        new_head=approach.name != "lp-ft", progress=job.progress, title=approach.title,
    )  # fmt: skip
    if tuned.interrupted:
        raise KeyboardInterrupt
    held, count = memory.read(), model.count_trainable_params()
    return Trained(
        tuned.history, tuned.seconds, held, count.trainable, tuned.head.probabilities(test), probe, setup, count.total,
        tuned.fitted.start,
    )  # fmt: skip


def _last_blocks(problem: Problem, memory: Peak) -> Trained:
    """Train the last blocks and the head from cached states, as ``tune`` does."""
    from embedcache.finetune import (
        CachedStates,
        cached_states,
        fit_live,
        into_standard_units,
        load_tail,
        parts_of,
    )

    job, cache, split, approach, y = problem.job, problem.cache, problem.split, problem.approach, problem.targets
    spec, states = problem.train_spec(approach), cached_states(cache, approach.blocks)
    assert approach.backbone_rate is not None
    head, _, probe = _train_head(problem)
    if problem.task is REGRESSION:
        into_standard_units(head.module, y[split.train])
    begun = time.perf_counter()
    model = load_tail(cache, problem.feature, job.source, head.module, approach.blocks, dropout=TUNING_DROPOUT)
    setup = time.perf_counter() - begun
    train, validation, test = (
        CachedStates(cache, rows, states, model.extractor.device)
        for rows in (split.train, split.validation, split.test)
    )
    tuned = fit_live(
        model, (train, y[split.train]), (validation, y[split.validation]), spec,
        parts_of(model, spec, approach.backbone_rate, TUNING_DECAY), task=problem.task.name,
        class_names=cache.class_names, new_head=False, progress=job.progress, title=approach.title,
    )  # fmt: skip
    if tuned.interrupted:
        raise KeyboardInterrupt
    held = memory.read()
    with model.whole():
        count = model.count_trainable_params()
    outputs = tuned.head.probabilities_of(test)
    return Trained(
        tuned.history, tuned.seconds, held, count.trainable, outputs, probe, setup, count.total, tuned.fitted.start
    )


def standardize(module: Head, problem: Problem) -> None:
    """Let a head read features standardised by the training rows, as training on the cache does."""
    import torch

    from embedcache.train.data import moments

    mean, scale = moments(problem.features(problem.split.train))
    module.standardize(torch.from_numpy(mean), torch.from_numpy(scale))


def refuse_changed(cache: FeatureCache, identity: Mapping[str, object]) -> None:
    """Raise ``BackboneMismatchError`` where the backbone is no longer the one that the features are from."""
    if differences := cache.spec.differences(identity):
        raise BackboneMismatchError(
            f"the backbone changed during the comparison ({differences_text(differences[:1], 'it was', 'it is')}): "
            "choose another output directory"
        )
