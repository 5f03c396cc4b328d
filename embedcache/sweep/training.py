"""Configurations x folds -> trained heads: together where that is possible, else in parallel processes.

Torch heads of one shape are stacked (``stacks``). Linear heads of the convex solver are solved as a path over
penalties. Nearest neighbours are their rows, and those of a fold are searched once for all heads that look for
neighbours alike. Other heads of scikit-learn are fitted by joblib's processes.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedcache.errors import EmbedcacheError, FeatureError, TrainingError, quiet
from embedcache.features import Dense, Features, OnDisk, features_of, joined
from embedcache.fingerprint import canonical_json
from embedcache.heads import TrainedHead, build_head, stack_key
from embedcache.heads.registry import checked_kind
from embedcache.heads.trained import logits_of_each
from embedcache.shard import FeatureSet
from embedcache.spec import TrainSpec
from embedcache.sweep.configuration import Configuration
from embedcache.sweep.jobs import Job, JobBatch, TrainedJob, is_small
from embedcache.sweep.problem import Problem
from embedcache.sweep.stacks import train_stacks
from embedcache.sweep.store import Outputs
from embedcache.task import Array, Task
from embedcache.train.data import LabelledRows
from embedcache.train.metrics import metric_named
from embedcache.train.result import Origin

if TYPE_CHECKING:
    pass

_IN_PROCESS = frozenset({"majority"})  # fitting takes less than sending the features

_TOO_LARGE = "the features do not fit in memory, where scikit-learn needs them: use heads of torch"

_WORTH_PROCESSES = 4_000_000
"""Below this many numbers to learn from, over all jobs, processes take longer to start than to work."""


def refuse_impossible(problem: Problem, configurations: Sequence[Configuration]) -> None:
    """Build a head of every shape once. Raises ``SpecError`` or ``FeatureError`` for one that cannot be."""
    seen = set()
    for configuration in configurations:
        head, feature = configuration.head, problem.cache.feature(configuration.feature)
        key = configuration.feature, stack_key(head), canonical_json(head.options.get("dropout"))
        if key not in seen and head.engine == "sklearn":
            checked_kind(head, problem.task)
        elif key not in seen:
            build_head(head, feature, len(problem.class_names))
        seen.add(key)
        if configuration.train.metric is not None:
            metric_named(configuration.train.metric, problem.task)


def train_batch(
    problem: Problem, batch: JobBatch, *, progress: bool = False, title: str = "", until: float = math.inf
) -> Iterator[list[TrainedJob]]:
    """Train the jobs of a batch and yield what is to be kept together; what cannot be trained comes with its error.

    These are a head of scikit-learn, all nearest neighbours of a fold, a penalty on all folds, or a shape's stacks on
    all folds.

    Raises ``Interruption`` after Ctrl-C, and where stacks are not done ``until`` then, by ``time.perf_counter``.
    """
    if batch.how == "stack":
        yield from train_stacks(problem, batch.jobs, progress=progress, title=title or batch.title, until=until)
        return
    x = problem.features(batch.jobs[0].configuration.feature, problem.rows)
    if batch.how == "neighbours":
        yield from _neighbours(problem, batch, x)
        return
    if batch.how == "sklearn":
        for trained in _sklearn(problem, batch, x):
            yield [trained]
        return
    try:
        yield from _convex(problem, batch, x)
    except (TrainingError, FeatureError) as error:
        if len(batch.jobs) == 1:
            yield [TrainedJob(batch.jobs[0], None, error=str(error))]
            return
        # One head spoils what is solved together: each for itself, so that the others keep their place.
        for job in batch.jobs:
            yield from train_batch(problem, JobBatch(batch.how, (job,)), until=until)


def _convex(problem: Problem, batch: JobBatch, x: Features) -> Iterator[list[TrainedJob]]:
    """Solve all penalties on all folds side by side, and yield each penalty's heads: from the strongest to the weakest.

    What was yielded is kept when the walk is stopped, and outputs of one penalty at a time are in memory.
    """
    from embedcache.train.convex import walk_folds
    from embedcache.train.convex.design import by_problems

    first = batch.jobs[0].configuration
    if first.train.class_weight is not None:
        yield [*_one_by_one(problem, batch.jobs, x)]  # weights by class name are the trainer's business
        return
    begun = time.perf_counter()
    by_penalty: dict[float, list[Job]] = {}
    for job in batch.jobs:
        by_penalty.setdefault(job.configuration.train.l2, []).append(job)
    numbers = list(dict.fromkeys(job.number for job in batch.jobs))
    usable = {job.number: job.fold.usable for job in batch.jobs}
    masks, y = np.stack([usable[number] for number in numbers]), problem.y
    views = problem.views(first.feature, first.train)
    learned = LabelledRows(x, y, problem.task, problem.class_names, views=joined([x, *views]) if views else None)
    if is_small(problem, batch.jobs[0]):
        learned, masks = learned.take(np.flatnonzero(masks[0])), np.ones((1, int(masks[0].sum())), bool)
    rows = learned.every_view()
    options: dict[str, Any] = {"tolerance": 1e-9} if batch.jobs[0].kept else {}
    masks = np.tile(masks, rows.repeats)
    if isinstance(rows.x, OnDisk):
        # The solver reads blocks of rows, again and again: features that memory does not hold are a map of a file, in
        # the order that the solver would put a copy of them in.
        order, _ = by_problems(masks)
        rows, masks = rows.take(order), masks[:, order]
        rows = replace(rows, x=rows.x.mapped())  # type: ignore[attr-defined]  # it is still on disk
    walk = walk_folds(
        rows.matrix("the convex solver"), rows.y, list(by_penalty), masks, task=problem.task,
        outputs=len(problem.class_names), sample_weight=rows.weight, standardize=first.train.standardize, **options,
    )  # fmt: skip
    feature = problem.cache.feature(first.feature)
    for l2, solutions in walk:
        jobs = by_penalty[l2]
        seconds = (time.perf_counter() - begun) / len(jobs)
        done: list[TrainedJob] = []
        for job in jobs:
            solved = solutions[numbers.index(job.number)]
            train = job.configuration.train
            recorded = replace(train, views=len(views)) if views else train
            head = TrainedHead(
                job.configuration.head, problem.task.name, problem.class_names, feature,
                state={"output.weight": solved.weight, "output.bias": solved.bias},
                training=recorded.record(), **vars(Origin.of(problem.cache)),
            )  # fmt: skip
            entry = {
                "epoch": solved.iterations,
                "train_loss": solved.loss / len(learned),
                "gradient_norm": solved.gradient_norm,
            }
            done.append(TrainedJob(job, head, seconds, float(solved.iterations), history=[entry]))
        yield done
        begun = time.perf_counter()


@dataclass(frozen=True)
class _Fitting:
    """What heads that are trained one by one share; it goes to other processes too."""

    task: Task
    class_names: tuple[str, ...]
    feature: FeatureSet
    origin: Origin

    @classmethod
    def on(cls, problem: Problem, feature: str) -> _Fitting:
        return cls(problem.task, problem.class_names, problem.cache.feature(feature), Origin.of(problem.cache))

    def fit(self, job: Job, x: object, y: Array, views: Sequence[object] = ()) -> TrainedJob:
        """Train one head by itself, on features of its own rows and of their views."""
        from embedcache.train import train_head

        begun = time.perf_counter()
        try:
            with quiet():
                result = train_head(
                    x, y, None, None, job.configuration.head, job.configuration.train, task=self.task.name,
                    class_names=self.class_names, feature=self.feature, progress=False, calibrate=False, views=views,
                    **vars(self.origin),
                )  # fmt: skip
        except EmbedcacheError as error:
            return TrainedJob(job, None, time.perf_counter() - begun, error=str(error))
        return TrainedJob(job, result.head, time.perf_counter() - begun, history=result.history)

    def fit_elsewhere(
        self, number: int, job: Job, x: npt.NDArray[np.float32], y: Array, views: Sequence[npt.NDArray[np.float32]] = ()
    ) -> tuple[int, TrainedHead | None, float, str | None]:
        """Train one head in a process of its own; ``number`` says which, for they come back in any order."""
        rows = job.fold.learned
        trained = self.fit(job, x[rows], y[rows], [view[rows] for view in views])
        return number, trained.head, trained.seconds, trained.error


def _one_by_one(problem: Problem, jobs: Sequence[Job], x: Features) -> Iterator[TrainedJob]:
    for job in jobs:
        rows = job.fold.learned
        views = [view.take(rows) for view in problem.views(job.configuration.feature, job.configuration.train)]
        yield _Fitting.on(problem, job.configuration.feature).fit(job, x.take(rows), problem.y[rows], views)


def _neighbours(problem: Problem, batch: JobBatch, x: Features) -> Iterator[list[TrainedJob]]:
    """Yield the heads of each fold, which hold the same rows: ``outputs_of_each`` searches them once."""
    if isinstance(x, OnDisk):
        yield [TrainedJob(job, None, error=_TOO_LARGE) for job in batch.jobs]
        return
    from embedcache.train.sklearn_engine import fit_sklearn

    first = batch.jobs[0].configuration
    views = problem.views(first.feature, first.train)
    train = replace(first.train, views=len(views)) if views else first.train
    learned = LabelledRows(
        x, problem.y, problem.task, problem.class_names, views=joined([x, *views]) if views else None
    )  # fmt: skip
    of_fold: dict[tuple[int, int | None], list[Job]] = {}
    for job in batch.jobs:
        of_fold.setdefault((job.number, job.curve), []).append(job)
    for jobs in of_fold.values():
        begun = time.perf_counter()
        rows = learned.take(np.flatnonzero(jobs[0].fold.usable))
        try:
            state = fit_sklearn(rows.every_view(), first.head, train).state
        except EmbedcacheError as error:
            yield [TrainedJob(job, None, error=str(error)) for job in jobs]
            continue
        heads = [
            TrainedHead(
                job.configuration.head, problem.task.name, problem.class_names, x.feature, state=state,
                training=train.record(), **vars(Origin.of(problem.cache)),
            )
            for job in jobs
        ]  # fmt: skip
        seconds = (time.perf_counter() - begun) / len(jobs)
        yield [TrainedJob(job, head, seconds) for job, head in zip(jobs, heads, strict=True)]


def _sklearn(problem: Problem, batch: JobBatch, x: Features) -> Iterator[TrainedJob]:
    yield from _one_by_one(problem, [job for job in batch.jobs if job.configuration.head.kind in _IN_PROCESS], x)
    jobs = [job for job in batch.jobs if job.configuration.head.kind not in _IN_PROCESS]
    if isinstance(x, OnDisk):
        yield from (TrainedJob(job, None, error=_TOO_LARGE) for job in jobs)
        return
    assert isinstance(x, Dense)  # no head of scikit-learn reads tokens
    workers = min(len(jobs), os.cpu_count() or 1)
    if workers < 2 or len(jobs) < 3 or x.feature.dim * sum(job.fold.rows for job in jobs) < _WORTH_PROCESSES:
        yield from _one_by_one(problem, jobs, x)
        return
    from joblib import Parallel, delayed

    # joblib hands arrays over 1 MB to its processes as one memory map.
    array = np.ascontiguousarray(x.values)
    views = [np.ascontiguousarray(view.values) for view in problem.views(jobs[0].configuration.feature, TrainSpec())]  # type: ignore[attr-defined]  # as x is
    run = Parallel(n_jobs=workers, return_as="generator_unordered", inner_max_num_threads=1, prefer="processes")
    fit = delayed(_Fitting.on(problem, jobs[0].configuration.feature).fit_elsewhere)
    for number, head, seconds, error in run(
        fit(number, job, array, problem.y, views) for number, job in enumerate(jobs)
    ):
        yield TrainedJob(jobs[number], head, seconds, error=error)


def outputs_of(head: TrainedHead, x: object) -> Outputs:
    """Return the uncalibrated outputs of a head, float32 [n, C]: probabilities or values, NaN where it diverged."""
    (outputs,) = outputs_of_each([head], x)
    return outputs


def outputs_of_each(heads: Sequence[TrainedHead], x: object) -> Iterator[Outputs]:
    """Yield the outputs of heads that read one feature set; nearest neighbours of the same rows have one search."""
    features = features_of(x, heads[0].feature)
    together = [heads] if all(head.votes for head in heads) else [[head] for head in heads]
    for part in together:
        try:
            for head, logits in zip(part, logits_of_each(part, features), strict=True):
                yield np.asarray(head.calibrated(logits), np.float32)
        except FeatureError:  # the features are sound, so it is the head whose numbers overflow
            yield from (np.full((len(features), len(head.class_names)), np.nan, np.float32) for head in part)
