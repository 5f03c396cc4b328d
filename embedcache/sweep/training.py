"""Configurations x folds -> trained heads: together where that is possible, else in parallel processes.

Torch heads of one shape are stacked fold by fold, each fold on rows of its own: a stack is what training on those rows
alone would be. As many stacks train side by side as there are cores, on one thread each: a head's steps are too small
to be divided, and a divided step waits for whichever core is busy with something else. (Before, all folds shared a pass
in which rows that a fold holds out weighed nothing: a third slower, and ten times on a machine with other work.) Linear
heads of the convex solver are solved as a path over penalties. Heads of scikit-learn are fitted by joblib's processes.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from embedcache.errors import EmbedcacheError, FeatureError, TrainingError, quiet
from embedcache.features import InMemory, features_of, joined
from embedcache.fingerprint import canonical_json
from embedcache.heads import TrainedHead, build_head, stack_key
from embedcache.heads.registry import checked_kind
from embedcache.shard import FeatureSet
from embedcache.spec import MAY_DIFFER, MIN_STEPS, TrainSpec
from embedcache.sweep.configuration import Configuration
from embedcache.sweep.cost import seconds_of
from embedcache.sweep.problem import Fold, Problem
from embedcache.sweep.store import Outputs
from embedcache.task import Array, Flags, Task
from embedcache.train.data import LabelledRows
from embedcache.train.metrics import metric_named
from embedcache.train.result import Origin

if TYPE_CHECKING:
    from embedcache.train import PassOptions

_STACK_BYTES = 1 << 30
_STACK_HEADS = 384
_BYTES_A_PARAMETER = 28  # weight, gradient, two moments, scratch, the best so far, a copy
_IN_PROCESS = frozenset({"majority"})  # fitting takes less than sending the features

_WORTH_PROCESSES = 4_000_000
"""Below this many numbers to learn from, over all jobs, processes take longer to start than to work."""


@dataclass(frozen=True)
class Job:
    """One head to train: a configuration on one fold. ``number`` is the fold's; ``curve`` a learning curve's point.

    ``kept`` is the chosen head, which the convex solver takes to the optimum; folds it takes as far as a choice needs.
    """

    configuration: Configuration
    fold: Fold
    number: int
    curve: int | None = None
    kept: bool = False


@dataclass(frozen=True)
class TrainedJob:
    """The result of a job: the head, or why it could not be trained."""

    job: Job
    head: TrainedHead | None
    seconds: float = 0.0
    epochs: float | None = None
    error: str | None = None
    history: Sequence[Mapping[str, float]] = ()
    improving: bool = False

    @property
    def parameters(self) -> int:
        """How many numbers the head holds."""
        if self.head is None:
            return 0
        if self.head.spec.kind == "majority":  # saved as a matrix of zeros; what it holds is its bias
            return len(self.head.class_names)
        return self.head.parameters or _estimator_size(self.head.estimator)


@dataclass(frozen=True)
class JobBatch:
    """Jobs that are trained in one go; ``how`` is ``stack``, ``convex`` or ``sklearn``."""

    how: How
    jobs: tuple[Job, ...]

    @property
    def title(self) -> str:
        """What to call it on a terminal."""
        first = self.jobs[0].configuration
        return f"{len(self.jobs)} x {first.head.kind} · {first.feature}"


class Interruption(Exception):
    """Ctrl-C stopped a stack: its heads are half trained and do not count."""


def batches(problem: Problem, jobs: Iterable[Job]) -> list[JobBatch]:
    """Group jobs into what is trained in one go, cheapest first, so that a table fills early."""
    groups: dict[_Group, list[Job]] = {}
    for job in jobs:
        groups.setdefault(_group_of(problem, job), []).append(job)
    out = []

    def cost(group: _Group) -> tuple[float, str]:
        members = groups[group]
        return len(members) * seconds_of(problem, members[-1].configuration), group.name

    for group in sorted(groups, key=cost):
        members = groups[group]
        most = _most_in_a_stack(problem, members[0].configuration) if group.how == "stack" else len(members)
        most *= len({(job.number, job.curve) for job in members})  # whose stacks are divided again by folds
        out += [JobBatch(group.how, tuple(members[start : start + most])) for start in range(0, len(members), most)]
    return out


How = Literal["convex", "sklearn", "stack"]


@dataclass(frozen=True)
class _Group:
    """What is alike in jobs that are trained in one go."""

    how: How
    key: tuple[object, ...]

    @property
    def name(self) -> str:
        """A text to order groups by."""
        return canonical_json([self.how, *map(str, self.key)])


def _group_of(problem: Problem, job: Job) -> _Group:
    configuration = job.configuration
    if configuration.head.engine == "sklearn":
        return _Group("sklearn", (configuration.feature,))
    train = asdict(configuration.train)
    if configuration.train.solver == "convex":
        alike = canonical_json({name: train[name] for name in ("class_weight", "standardize", "views")})
        alone = (job.number, job.curve) if _small(problem, job) else ()
        return _Group("convex", (configuration.feature, alike, *alone))
    alike = canonical_json({name: value for name, value in train.items() if name not in MAY_DIFFER})
    clipped = bool(configuration.train.clip)
    return _Group("stack", (configuration.feature, stack_key(configuration.head), alike, clipped))


def _small(problem: Problem, job: Job) -> bool:
    """Whether a job learns from a part of the rows: a few-shot draw, or a point of a learning curve."""
    return job.curve is not None or int(job.fold.train.sum()) * 2 < len(problem)


def _most_in_a_stack(problem: Problem, configuration: Configuration) -> int:
    head = build_head(configuration.head, problem.cache.feature(configuration.feature), len(problem.class_names))
    size = sum(parameter.numel() for parameter in head.parameters())
    return max(1, min(_STACK_HEADS, _STACK_BYTES // (size * _BYTES_A_PARAMETER)))


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
) -> Iterator[TrainedJob]:
    """Train the jobs of a batch and yield each as it is done; what cannot be trained comes with its error.

    Raises ``Interruption`` after Ctrl-C, and where a stack is not done ``until`` then, by ``time.perf_counter``.
    """
    x = problem.features(batch.jobs[0].configuration.feature, problem.rows)
    if batch.how == "sklearn":
        yield from _sklearn(problem, batch, x)
        return
    if batch.how == "stack":
        yield from _stacks(problem, batch, x, progress, title or batch.title, until)
        return
    try:
        yield from _convex(problem, batch, x)
    except (TrainingError, FeatureError) as error:
        yield from _each_alone(problem, batch, error, until)


def _each_alone(problem: Problem, batch: JobBatch, error: EmbedcacheError, until: float) -> Iterator[TrainedJob]:
    """Train jobs each for itself, as one of them spoils what is trained together: the others keep their place."""
    if len(batch.jobs) == 1:
        yield TrainedJob(batch.jobs[0], None, error=str(error))
        return
    for job in batch.jobs:
        yield from train_batch(problem, JobBatch(batch.how, (job,)), until=until)


def _stacks(
    problem: Problem, batch: JobBatch, x: InMemory, progress: bool, title: str, until: float
) -> Iterator[TrainedJob]:
    """Train the heads of each fold as a stack of their own, stacks side by side, and yield them in their order."""
    import torch
    from tqdm import tqdm

    from embedcache.backbone.device import threads
    from embedcache.train import PassOptions, labelled_rows_of
    from embedcache.train.data import fits_in_memory

    views = problem.views(batch.jobs[0].configuration.feature, batch.jobs[0].configuration.train)
    rows = labelled_rows_of(x, problem.y, problem.task, problem.class_names, views=views)
    by_fold: dict[tuple[int, int | None], list[Job]] = {}
    for job in batch.jobs:
        by_fold.setdefault((job.number, job.curve), []).append(job)
    parts = [JobBatch("stack", tuple(jobs)) for jobs in by_fold.values()]
    cores = torch.get_num_threads()
    workers = min(len(parts), cores)
    size = np.asarray(x.values).nbytes * (len(views) + 1)
    while workers > 1 and not fits_in_memory(workers * size):  # each has a copy of its rows, standardised
        workers -= 1
    each = max(1, cores // workers)
    stopped = threading.Event()
    bar = tqdm(
        total=sum(_steps(job) for part in parts for job in part.jobs[:1]), desc=title, unit="step", mininterval=0.2,
        disable=None if progress and sys.stderr.isatty() else True,
    )  # fmt: skip

    def each_step() -> None:
        if stopped.is_set() or time.perf_counter() > until:
            raise KeyboardInterrupt
        bar.update()

    options = PassOptions(progress=False, each_step=each_step)
    pool = ThreadPoolExecutor(workers, "embedcache-stack", torch.set_num_threads, (each,))
    # A new thread starts with the number that was set last, whoever set it; at the end the number is ours again.
    with threads(each):
        try:
            running = [(pool.submit(_stack, problem, part.jobs, rows, options), part) for part in parts]
            for done, part in running:
                try:
                    trained = done.result()
                except (TrainingError, FeatureError) as error:
                    yield from _each_alone(problem, part, error, until)
                else:
                    yield from trained
        finally:
            stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            bar.close()


def _steps(job: Job) -> int:
    """Return how many steps a head takes at most."""
    train = job.configuration.train
    steps = -(-job.fold.rows // train.batch_size)
    return steps * train.epochs_of(steps)


def _stack(problem: Problem, jobs: Sequence[Job], rows: LabelledRows, options: PassOptions) -> list[TrainedJob]:
    """Train heads of one fold as a stack. Raises ``Interruption`` where it was stopped."""
    from embedcache.train import train_stack

    specs = [job.configuration.train for job in jobs]
    specs = [replace(spec, views=rows.of_views) for spec in specs] if rows.of_views else specs
    if _small(problem, jobs[0]):
        # A part of the rows has fewer steps in as many epochs: what is compared is rows, not steps.
        specs = [replace(spec, min_steps=max(MIN_STEPS, spec.least_steps)) for spec in specs]
    begun = time.perf_counter()
    learn, stop = _learn_and_stop(jobs[0].fold, bool(specs[0].patience))
    judged = replace(rows, views=None).take(np.flatnonzero(stop)) if stop.any() else None
    results = train_stack(
        rows.take(np.flatnonzero(learn)), judged, [job.configuration.head for job in jobs], specs,
        origin=Origin.of(problem.cache), options=options,
    )  # fmt: skip
    if any(result.interrupted for result in results):
        raise Interruption
    seconds = time.perf_counter() - begun
    ran = [max(1, len(result.history)) for result in results]
    return [
        TrainedJob(
            job, result.head, seconds * epochs / sum(ran), float(epochs), history=result.history,
            improving=result.fitted.improving,
        )
        for job, result, epochs in zip(jobs, results, ran, strict=True)
    ]  # fmt: skip


def _convex(problem: Problem, batch: JobBatch, x: InMemory) -> Iterator[TrainedJob]:
    """Solve all penalties on all folds side by side, and yield each penalty's heads: from the strongest to the weakest.

    What was yielded is kept when the walk is stopped, and outputs of one penalty at a time are in memory.
    """
    from embedcache.train.convex import walk_folds

    first = batch.jobs[0].configuration
    if first.train.class_weight is not None:
        yield from _one_by_one(problem, batch.jobs, x)  # weights by class name are the trainer's business
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
    if _small(problem, batch.jobs[0]):
        learned, masks = learned.take(np.flatnonzero(masks[0])), np.ones((1, int(masks[0].sum())), bool)
    rows = learned.every_view()
    options: dict[str, Any] = {"tolerance": 1e-9} if batch.jobs[0].kept else {}
    walk = walk_folds(
        rows.matrix("the convex solver"), rows.y, list(by_penalty), np.tile(masks, rows.repeats), task=problem.task,
        outputs=len(problem.class_names), sample_weight=rows.weight, standardize=first.train.standardize, **options,
    )  # fmt: skip
    feature = problem.cache.feature(first.feature)
    for l2, solutions in walk:
        jobs = by_penalty[l2]
        seconds = (time.perf_counter() - begun) / len(jobs)
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
            yield TrainedJob(job, head, seconds, float(solved.iterations), history=[entry])
        begun = time.perf_counter()


def _learn_and_stop(fold: Fold, stopping: bool) -> tuple[Flags, Flags]:
    """Return the rows to learn from and to stop early by: a head that never stops early learns from both."""
    return (fold.train, fold.stopping) if stopping else (fold.usable, np.zeros_like(fold.stopping))


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
        usable = job.fold.usable
        trained = self.fit(job, x[usable], y[usable], [view[usable] for view in views])
        return number, trained.head, trained.seconds, trained.error


def _one_by_one(problem: Problem, jobs: Sequence[Job], x: InMemory) -> Iterator[TrainedJob]:
    for job in jobs:
        rows = np.flatnonzero(job.fold.usable)
        views = [view.take(rows) for view in problem.views(job.configuration.feature, job.configuration.train)]
        yield _Fitting.on(problem, job.configuration.feature).fit(job, x.take(rows), problem.y[rows], views)


def _sklearn(problem: Problem, batch: JobBatch, x: InMemory) -> Iterator[TrainedJob]:
    yield from _one_by_one(problem, [job for job in batch.jobs if job.configuration.head.kind in _IN_PROCESS], x)
    jobs = [job for job in batch.jobs if job.configuration.head.kind not in _IN_PROCESS]
    workers = min(len(jobs), os.cpu_count() or 1)
    if workers < 2 or len(jobs) < 3 or np.size(x.values) * len(jobs) < _WORTH_PROCESSES:
        yield from _one_by_one(problem, jobs, x)
        return
    from joblib import Parallel, delayed

    # joblib hands arrays over 1 MB to its processes as one memory map.
    array = np.ascontiguousarray(x.values)
    views = [np.ascontiguousarray(view.values) for view in problem.views(jobs[0].configuration.feature, TrainSpec())]
    run = Parallel(n_jobs=workers, return_as="generator_unordered", inner_max_num_threads=1, prefer="processes")
    fit = delayed(_Fitting.on(problem, jobs[0].configuration.feature).fit_elsewhere)
    for number, head, seconds, error in run(
        fit(number, job, array, problem.y, views) for number, job in enumerate(jobs)
    ):
        yield TrainedJob(jobs[number], head, seconds, error=error)


def _estimator_size(estimator: object) -> int:
    """Return how many numbers a fitted estimator holds, nested ones and trees included."""
    seen: set[int] = set()

    def size(value: object, depth: int) -> int:
        if id(value) in seen or depth > 8:
            return 0
        seen.add(id(value))
        parts: Iterable[object] = ()
        if isinstance(value, np.ndarray):
            if value.dtype != object:
                numbers = len(value.dtype.names) if value.dtype.names else int(value.dtype.kind in "fiu")
                return int(value.size * numbers)
            parts = value.flat
        elif isinstance(value, (list, tuple)):
            parts = value
        elif type(value).__module__.startswith("sklearn"):
            parts = getattr(value, "__dict__", {}).values()
        return sum(size(part, depth + 1) for part in parts)

    return size(estimator, 0)


def outputs_of(head: TrainedHead, x: object) -> Outputs:
    """Return the uncalibrated outputs of a head, float32 [n, C]: probabilities or values, NaN where it diverged."""
    features = features_of(x, head.feature)
    try:
        logits = head.logits(features)
    except FeatureError:  # the features are sound, so it is the head whose numbers overflow
        return np.full((len(features), len(head.class_names)), np.nan, np.float32)
    return np.asarray(head.calibrated(logits), np.float32)
