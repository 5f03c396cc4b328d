"""One measurement in a process of its own: the extraction, or one training.

The parent writes a job, a JSON object, and reads a result; a mistake of the user's comes back as its class and line.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedcache.compare.approaches import APPROACHES
from embedcache.compare.memory import Peak
from embedcache.compare.rows import labelled, read_rows, training_rows
from embedcache.errors import BackboneMismatchError, EmbedcacheError, InputError, quiet
from embedcache.journal import commit
from embedcache.spec import (
    BackboneSettings,
    ExtractionSpec,
    HeadSpec,
    ModelSource,
    TaskName,
    TrainSpec,
    differences_text,
)

if TYPE_CHECKING:
    from embedcache.cache import FeatureCache
    from embedcache.finetune import FeatureBasedModel
    from embedcache.heads import TrainedHead
    from embedcache.shard import FeatureSet

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]
Job = Mapping[str, Any]

INTERRUPTED = 130


def main() -> None:
    """Read the job's file, named in the arguments, do the job, write the result beside it."""
    file = Path(sys.argv[1])
    job = json.loads(file.read_text("utf-8"))
    end_with(int(job["parent"]))
    try:
        with quiet():  # of the rows, the parent has said it
            result = perform(job)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except EmbedcacheError as error:
        result = {"error": type(error).__name__, "message": str(error)}
    file.with_suffix(".result").write_text(json.dumps(result), "utf-8")


def end_with(parent: int) -> None:
    """End this process when its parent is gone: a killed comparison must not hold the cache its successor needs."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, name="embedcache-parent", daemon=True).start()


def perform(job: Job) -> dict[str, Any]:
    """Do one job. Raises ``KeyboardInterrupt`` where it was interrupted, so that nothing half done is kept."""
    return extraction(job) if job["approach"] == "extraction" else training(job)


def extraction(job: Job) -> dict[str, Any]:
    """Run the backbone once over all rows, and say what that took."""
    from embedcache.errors import Interrupted
    from embedcache.extract import load_for, run

    load("torch", "transformers")
    memory = Peak(job["device"])
    examples = read_rows(Path(job["rows"]), job["task"], job["class_names"])
    begun = time.perf_counter()
    source = ModelSource(job["model"], device=job["device"], trust_remote_code=job["trust_remote_code"])
    backbone = load_for(job["cache"], source, BackboneSettings((job["pooling"],)))
    setup = time.perf_counter() - begun
    try:
        report = run(examples, backbone, job["cache"], keep_inputs=True)
    except Interrupted:
        raise KeyboardInterrupt from None
    return {
        "seconds": report.seconds,
        "setup_seconds": setup,
        "rows": report.rows,
        "unique": report.unique,
        "extracted": report.extracted,
        "tokens": report.tokens,
        "parameters": sum(each.numel() for each in backbone.network.parameters()),
        "memory": memory.read(),
    }


def load(*modules: str) -> None:
    """Load what a job needs before memory is watched: libraries are the baseline, whatever is done with them."""
    for module in modules:
        import_module(module)


class Split:
    """The rows of one training: a fraction of train, all of validation and test, as numbers of rows of the cache."""

    def __init__(self, cache: FeatureCache, fraction: float, seed: int) -> None:
        self.task: TaskName = cache.task or "classification"
        self.y = cache.targets()
        fine = labelled(self.task, self.y)
        of = {name: rows[fine[rows]] for name in ("train", "validation", "test") if len(rows := cache.rows(name))}
        train = of["train"]
        keys = cache.keys("train")[fine[cache.rows("train")]]
        self.train: Rows = train[training_rows(keys, self.y[train], self.task, fraction, seed)]
        self.validation: Rows = of["validation"]
        self.test: Rows = of["test"]

    def charged(self, cache: FeatureCache) -> int:
        """Return how many different contents training needs the features of."""
        return len(np.unique(cache.places()[np.concatenate([self.train, self.validation])]))


def training(job: Job) -> dict[str, Any]:
    """Train by one approach, measure it, and keep what it says of the test rows in ``job["outputs"]``."""
    from embedcache.cache import FeatureCache
    from embedcache.train.cached import feature_for

    approach = APPROACHES[job["approach"]]
    live = approach.name != "cached"
    load("embedcache.train.minibatch", *(["embedcache.finetune"] if live else []))
    memory = Peak(job["device"])
    cache = FeatureCache.open(job["cache"])
    split = Split(cache, job["fraction"], job["seed"])
    head = HeadSpec(job["head"], "torch", job["head_options"])
    spec = approach.train_spec(job["epochs"], job["seed"], job["metric"])
    feature = feature_for(cache, head, None)
    if live:
        found, outputs = _live(job, cache, split, head, spec, feature, memory)
    else:
        found, outputs = _cached(job, cache, split, head, spec, feature, memory)
    data = io.BytesIO()
    np.save(data, outputs.astype(np.float32))
    commit(Path(job["outputs"]), data.getvalue(), InputError)
    return {
        "train_rows": len(split.train),
        "validation_rows": len(split.validation),
        "test_rows": len(split.test),
        "charged": split.charged(cache),
        **found,
    }


def _probe(
    job: Job, cache: FeatureCache, split: Split, head: HeadSpec, spec: TrainSpec, feature: FeatureSet
) -> tuple[TrainedHead, list[dict[str, Any]], float]:
    """Train the head on the cache; the head, its history and the seconds."""
    from embedcache.train import train_head
    from embedcache.train.cached import rows_of

    begun = time.perf_counter()
    x, x_eval = (rows_of(cache, rows, feature) for rows in (split.train, split.validation))
    reading = time.perf_counter() - begun
    result = train_head(
        x, split.y[split.train], x_eval, split.y[split.validation],
        head, spec, task=split.task, class_names=cache.class_names, feature=feature, calibrate=False,
        intervals=False, device="cpu", progress=bool(job["progress"]),
    )  # fmt: skip
    if result.interrupted:
        raise KeyboardInterrupt
    return result.head, [dict(each) for each in result.history], reading + result.seconds


def _cached(
    job: Job, cache: FeatureCache, split: Split, head: HeadSpec, spec: TrainSpec, feature: FeatureSet, memory: Peak
) -> tuple[dict[str, Any], Array]:
    from embedcache.train.cached import rows_of

    trained, history, seconds = _probe(job, cache, split, head, spec, feature)
    held = memory.read()
    return {
        **_curve(history, spec, split.task),
        "seconds": seconds,
        "probe_seconds": None,
        "setup_seconds": 0.0,
        "memory": held,
        "trainable": trained.parameters,
    }, trained.probabilities(rows_of(cache, split.test, feature))


def _live(
    job: Job, cache: FeatureCache, split: Split, head: HeadSpec, spec: TrainSpec, feature: FeatureSet, memory: Peak
) -> tuple[dict[str, Any], Array]:
    from embedcache.extract import load_for
    from embedcache.finetune import FeatureBasedModel, fine_tune
    from embedcache.heads import build_head

    approach = APPROACHES[job["approach"]]
    contents = cache.inputs()
    assert contents is not None  # the extraction kept them
    begun = time.perf_counter()
    source = ModelSource(device=job["device"], trust_remote_code=job["trust_remote_code"])
    backbone = load_for(cache.path, source, BackboneSettings())
    refuse_changed(cache, backbone.identity)
    setup = time.perf_counter() - begun
    probe = None
    if approach.name == "lp-ft":
        first = APPROACHES["cached"].train_spec(job["epochs"], job["seed"], job["metric"])
        trained, _, probe = _probe(job, cache, split, head, first, feature)
        module = trained.module
        if split.task == "regression":
            into_standard_units(module, split.y[split.train])
    else:
        module = build_head(head, feature, len(cache.class_names), seed=job["seed"])
    if approach.name == "frozen" and spec.standardize:
        standardized(module, cache, split, feature)
    model: FeatureBasedModel = FeatureBasedModel(backbone, module, freeze_backbone=approach.backbone_rate is None)
    done = fine_tune(
        model, [contents[row] for row in split.train.tolist()], split.y[split.train],
        [contents[row] for row in split.validation.tolist()], split.y[split.validation], spec,
        backbone_learning_rate=approach.backbone_rate or 0.0, task=split.task, class_names=cache.class_names,
        new_head=approach.name != "lp-ft",
        progress=bool(job["progress"]), title=approach.title,
    )  # fmt: skip
    if done.interrupted:
        raise KeyboardInterrupt
    held, count = memory.read(), model.count_trainable_params()
    return {
        **_curve(done.history, spec, split.task),
        "seconds": done.seconds,
        "probe_seconds": probe,
        "setup_seconds": setup,
        "memory": held,
        "trainable": count.trainable,
        "total": count.total,
    }, done.head.probabilities([contents[row] for row in split.test.tolist()])


def standardized(module: Any, cache: FeatureCache, split: Split, feature: FeatureSet) -> None:
    """Let a head read features standardised by the training rows, as training on the cache does."""
    import torch

    from embedcache.train.cached import rows_of
    from embedcache.train.data import moments

    mean, scale = moments(rows_of(cache, split.train, feature))
    module.standardize(torch.from_numpy(mean), torch.from_numpy(scale))


def into_standard_units(module: Any, y: Array) -> None:
    """Turn a trained regression head, which gives values, into one that gives them standardised by ``y`` [N, R]."""
    import torch

    deviation = y.std(axis=0)
    mean, deviation = (torch.from_numpy(each) for each in (y.mean(axis=0), np.where(deviation > 0, deviation, 1.0)))
    with torch.no_grad():
        module.output.weight.copy_(module.output.weight / deviation[:, None])
        module.output.bias.copy_((module.output.bias - mean) / deviation)


def refuse_changed(cache: FeatureCache, identity: Mapping[str, Any]) -> None:
    """Raise ``BackboneMismatchError`` where the backbone is no longer the one that the features are from."""
    found = ExtractionSpec.from_json(cache.spec).differences(ExtractionSpec.from_json(identity))
    if found:
        raise BackboneMismatchError(
            f"the backbone changed during the comparison ({differences_text(found[:1], 'it was', 'it is')}): "
            "choose another output directory"
        )


def _curve(history: Any, spec: TrainSpec, task: TaskName) -> dict[str, Any]:
    """Say how validation went: the best epoch, counted from 1, its metric, and the seconds of an epoch."""
    from embedcache.train.metrics import metric_named

    greater = metric_named(str(spec.metric), task).greater_is_better
    values = [float(each[f"validation_{spec.metric}"]) for each in history]
    best = int(np.argmax(values) if greater else np.argmin(values))
    return {
        "best_epoch": best + 1,
        "validation": values[best],
        "epoch_seconds": statistics.median(float(each["seconds"]) for each in history),
        "history": [{name: float(value) for name, value in each.items()} for each in history],
    }


__all__ = ["INTERRUPTED", "extraction", "main", "perform", "training"]
