"""What is swept over: the labelled rows of a cache, how they are divided, and what makes two sweeps the same."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedcache.errors import SweepError
from embedcache.features import Dense, Ragged
from embedcache.fingerprint import sha256_bytes
from embedcache.spec import TaskName
from embedcache.sweep import folds
from embedcache.sweep.folds import Fold, Strata
from embedcache.sweep.protocol import Protocol
from embedcache.task import task_named
from embedcache.train.metrics import metric_named

if TYPE_CHECKING:
    from embedcache.cache import FeatureCache

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Problem:
    """Labelled rows of a cache: N for choosing (``rows``, in train and validation) and those of the test split.

    ``y`` are the targets of ``rows``; ``test_rows`` is empty where there is no test split.
    """

    cache: FeatureCache
    task: TaskName
    class_names: tuple[str, ...]
    rows: Rows
    y: Array
    validation: npt.NDArray[np.bool_]
    strata: Strata
    test_rows: Rows
    test_y: Array
    metric: str
    protocol: Protocol

    @classmethod
    def of(cls, cache: FeatureCache, metric: str | None = None, protocol: Protocol | None = None) -> Problem:
        """Look at a cache. Raises ``SweepError`` without labels or rows to learn from, ``SpecError`` for a metric."""
        if cache.task is None:
            raise SweepError(f"{cache.path} has no labels: give it some with embedcache relabel {cache.path} INPUT")
        task: TaskName = cache.task
        name = metric or task_named(task).headline_metric
        metric_named(name, task)
        targets, codes = cache.targets(), cache.split_codes()
        labelled = task_named(task).labelled(targets)
        by_name = {split: codes == code for code, split in enumerate(cache.split_names)}
        none = np.zeros(len(codes), bool)
        train, validation = by_name.get("train", none), by_name.get("validation", none)
        rows = np.flatnonzero((train | validation) & labelled)
        if not len(rows):
            raise SweepError(f"{cache.path} has no labelled row in train or validation: there is nothing to learn from")
        if task == "classification" and len(np.unique(targets[rows])) < 2:
            only = cache.class_names[int(targets[rows[0]])]
            raise SweepError(f"every row of train and validation has the class {only!r}: expected at least two classes")
        keys = np.asarray(cache.keys())
        test = np.flatnonzero(by_name.get("test", none) & labelled)
        return cls(
            cache, task, tuple(cache.class_names), rows, targets[rows], validation[rows],
            folds.strata(keys[rows], targets[rows], task, cache.class_names), test, targets[test], name,
            protocol or Protocol(),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def greater_is_better(self) -> bool:
        """The direction of the metric."""
        return metric_named(self.metric, self.task).greater_is_better

    @cached_property
    def folds(self) -> list[Fold]:
        """The divisions by which heads are compared. Raises ``SweepError`` where the rows do not allow them."""
        plan = self.protocol
        if plan.shots is not None:
            if self.task != "classification":
                raise SweepError(f"--shots draws rows of each class, and this is {self.task}: use --learning-curve")
            return folds.shots(self.strata, plan.shots, plan.draws, seed=plan.seed)
        options = {"seed": plan.seed, "stopping": plan.stopping_share}
        if plan.folds == 1:
            return folds.given_split(self.strata, ~self.validation, self.validation, **options)  # type: ignore[arg-type]
        return folds.k_folds(self.strata, plan.folds, plan.repeats, exact=self.task == "classification", **options)  # type: ignore[arg-type]

    @cached_property
    def mean_train_rows(self) -> float:
        """Rows to learn from, a fold."""
        return float(np.mean([fold.rows for fold in self.folds]))

    @cached_property
    def mean_score_rows(self) -> float:
        """Rows to score, a fold."""
        return float(np.mean([int(fold.score.sum()) for fold in self.folds]))

    @cached_property
    def final(self) -> Fold:
        """All rows to learn from, less the share to stop early by: how the chosen head is trained for the test."""
        everything = np.ones(len(self), bool)
        nothing = np.zeros(len(self), bool)
        whole = Fold(everything, nothing, nothing)
        if self.protocol.shots is not None:
            return whole
        # A subset that leaves nothing out, so that the held-out share is drawn as it is in every fold.
        stopping = Fold(everything, everything, nothing)
        return folds.subset(
            self.strata, stopping, 1.0, seed=self.protocol.seed, stopping=self.protocol.stopping_share
        )  # fmt: skip

    def features(self, name: str, rows: Rows) -> Dense | Ragged:
        """Return a feature set of some rows in memory: a map where they lie together."""
        feature = self.cache.feature(name)
        if feature.kind == "tokens":
            return self.cache.ragged(None, name).take(rows)
        return Dense(self.cache.take(self.cache.places()[rows], name), feature)

    @cached_property
    def dataset_hash(self) -> str:
        """What rows, labels and splits there are: the sha256 of their keys, targets and split names."""
        order = np.concatenate([self.rows, self.test_rows])
        keys = np.ascontiguousarray(np.asarray(self.cache.keys())[order])
        targets = np.ascontiguousarray(np.concatenate([self.y, self.test_y]))
        sizes = f"{len(self.rows)},{len(self.test_rows)},{targets.dtype.str},{targets.shape}".encode()
        return sha256_bytes(b"".join([sizes, keys.tobytes(), targets.tobytes(), self.validation.tobytes()]))

    def identity(self) -> dict[str, object]:
        """Return what must be the same for results to belong together; no path and no time is in it."""
        return {
            "cache": {"spec": self.cache.spec_hash, "dataset": self.dataset_hash},
            "task": self.task,
            "class_names": list(self.class_names),
            "metric": self.metric,
            "protocol": self.protocol.to_json(),
        }


def part(x: Dense | Ragged, mask: npt.NDArray[np.bool_]) -> Dense | Ragged:
    """Return the features of the rows in a mask, bool [N]."""
    return x.take(np.flatnonzero(mask))
