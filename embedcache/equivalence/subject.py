"""What a check works on: the opened cache and input, the rows that are looked at, and how both sides train."""

from __future__ import annotations

from dataclasses import dataclass

from embedcache.backbone import Backbone
from embedcache.cache import FeatureCache
from embedcache.equivalence.bits import Array
from embedcache.equivalence.rows import RawRows, Sample
from embedcache.shard import FeatureSet
from embedcache.spec import FeatureSpec, HeadSpec, TrainSpec
from embedcache.task import Task, task_named

STEPS = 10
BATCH_SIZE = 32


@dataclass(frozen=True)
class TrainingPlan:
    """How both sides train: which head on which feature set, with which settings, for how many steps.

    ``scheduled`` is how many steps the whole epochs of ``spec`` would have: the learning rate follows these.
    """

    head: HeadSpec
    feature: FeatureSet
    task: Task
    class_names: tuple[str, ...]
    spec: TrainSpec
    steps: int
    scheduled: int

    @classmethod
    def of(
        cls, cache: FeatureCache, head: HeadSpec, feature: FeatureSet, rows: int, *, steps: int | None,
        whole_epoch: bool, seed: int,
    ) -> TrainingPlan:  # fmt: skip
        """Plan training on so many rows of a cache; ``steps`` None for 10, or at least a ``whole_epoch``."""
        size = min(BATCH_SIZE, rows)
        per_epoch = -(-rows // size)
        steps = steps or (max(STEPS, per_epoch) if whole_epoch else STEPS)
        spec = TrainSpec(epochs=-(-steps // per_epoch), batch_size=size, patience=0, seed=seed)
        task = task_named(cache.task or "classification")
        return cls(head, feature, task, tuple(cache.class_names), spec, steps, spec.epochs * per_epoch)


@dataclass(frozen=True)
class Subject:
    """A cache, the raw rows it was made from, the backbone at hand, the rows that are looked at, and the plan."""

    cache: FeatureCache
    raw: RawRows
    rows: Sample
    backbone: Backbone
    plan: TrainingPlan

    @property
    def feature_specs(self) -> list[FeatureSpec]:
        """What each feature set of the cache is made by."""
        return [FeatureSpec.parse(name) for name in self.cache.feature_sets]

    @property
    def cached_targets(self) -> Array:
        """The cache's targets of the training rows."""
        return self.cache.targets()[self.rows.train]

    @property
    def input_targets(self) -> Array:
        """The input's own targets of the training rows."""
        return self.raw.targets[self.rows.train]
