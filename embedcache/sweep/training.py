"""Configurations x folds -> trained heads: what can be is trained together, the rest in parallel processes.

Torch heads of one shape form a stack, all folds of all of them: the folds are masks over rows that are read once.
Linear heads of the convex solver are a path over penalties. scikit-learn's are fitted by joblib's processes. Heads on
ragged tokens, few-shot draws and points of learning curves are stacked fold by fold, on their own rows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from embedcache.errors import EmbedcacheError, FeatureError, TrainingError, quiet
from embedcache.features import Dense, Ragged, features_of
from embedcache.fingerprint import canonical_json
from embedcache.heads import TrainedHead, build_head, stack_key
from embedcache.heads.registry import checked_kind
from embedcache.spec import MIN_STEPS
from embedcache.sweep.configuration import DEFAULTS, Configuration
from embedcache.sweep.folds import Fold
from embedcache.sweep.problem import Problem, part

MAY_DIFFER = (
    "learning_rate", "weight_decay", "label_smoothing", "class_weight", "schedule", "warmup", "clip", "seed",
)  # fmt: skip
"""Settings in which the heads of one stack may differ."""

_STACK_BYTES = 1 << 30
_STACK_HEADS = 384
_BYTES_A_PARAMETER = 28  # weight, gradient, two moments, scratch, the best so far, a copy
_IN_PROCESS = frozenset({"majority"})  # fitting takes less than sending the features

_WORTH_PROCESSES = 4_000_000
"""Below so many numbers to learn from, over all jobs, processes take longer to start than to work."""

Outputs = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Job:
    """One head to train: a configuration on one fold. ``number`` is the fold's; ``curve`` a learning curve's point."""

    configuration: Configuration
    fold: Fold
    number: int
    curve: int | None = None


@dataclass(frozen=True)
class Trained:
    """What became of a job: the head, or why there is none."""

    job: Job
    head: TrainedHead | None
    seconds: float = 0.0
    epochs: float | None = None
    error: str | None = None
    history: Sequence[Any] = ()
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
class Batch:
    """Jobs that are trained in one go; ``how`` is ``stack``, ``convex`` or ``sklearn``."""

    how: str
    jobs: tuple[Job, ...]

    @property
    def title(self) -> str:
        """What to call it on a terminal."""
        first = self.jobs[0].configuration
        return f"{len(self.jobs)} x {first.head.kind} · {first.feature}"


class Interruption(Exception):
    """Ctrl-C stopped a stack: its heads are half trained and do not count."""


def batches(problem: Problem, jobs: Iterable[Job]) -> list[Batch]:
    """Group jobs into what is trained in one go, cheapest kinds first, so that a table fills early."""
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault(_group(problem, job), []).append(job)
    out = []
    for key in sorted(groups, key=lambda key: (_ORDER[key[0]], canonical_json([str(each) for each in key]))):
        members, how = groups[key], key[0]
        if how == "stack":
            size = _most_in_a_stack(problem, members[0].configuration)
            out += [Batch(how, tuple(members[at : at + size])) for at in range(0, len(members), size)]
        else:
            out.append(Batch(how, tuple(members)))
    return out


_ORDER = {"convex": 0, "sklearn": 1, "stack": 2}


def _group(problem: Problem, job: Job) -> tuple[Any, ...]:
    configuration = job.configuration
    how = "sklearn" if configuration.head.engine == "sklearn" else "stack"
    how = "convex" if how == "stack" and configuration.train.solver == "convex" else how
    if how == "sklearn":
        return how, configuration.feature
    if how == "convex":
        train = asdict(configuration.train)
        alike = canonical_json({name: train[name] for name in ("class_weight", "standardize")})
        return how, configuration.feature, alike, *_alone(problem, job)
    train = asdict(configuration.train)
    alike = canonical_json({name: value for name, value in train.items() if name not in MAY_DIFFER})
    clipped = bool(configuration.train.clip)
    return how, configuration.feature, stack_key(configuration.head), alike, clipped, *_alone(problem, job)


def _alone(problem: Problem, job: Job) -> tuple[Any, ...]:
    """Return what keeps folds apart where they cannot share a pass."""
    ragged = problem.cache.feature(job.configuration.feature).kind == "tokens"
    # Masks leave a small subset a row or two in each batch; alone it gets whole batches.
    small = job.curve is not None or int(job.fold.train.sum()) * 2 < len(problem)
    return (job.number, job.curve) if ragged or small else ()


def _most_in_a_stack(problem: Problem, configuration: Configuration) -> int:
    head = build_head(configuration.head, problem.cache.feature(configuration.feature), len(problem.class_names))
    size = sum(each.numel() for each in head.parameters())
    return max(1, min(_STACK_HEADS, _STACK_BYTES // (size * _BYTES_A_PARAMETER)))


def refuse_impossible(problem: Problem, configurations: Sequence[Configuration]) -> None:
    """Build a head of every shape once. Raises ``SpecError`` or ``FeatureError`` for one that cannot be."""
    seen = set()
    for each in configurations:
        key = each.feature, stack_key(each.head), canonical_json(each.head.options.get("dropout"))
        if key not in seen:
            seen.add(key)
            if each.head.engine == "sklearn":
                checked_kind(each.head, problem.task)
            else:
                build_head(each.head, problem.cache.feature(each.feature), len(problem.class_names))
        if each.train.metric is not None:
            from embedcache.train.metrics import metric_named

            metric_named(each.train.metric, problem.task)


def train_batch(problem: Problem, batch: Batch, *, progress: bool = False, title: str = "") -> Iterator[Trained]:
    """Train the jobs of a batch and yield each as it is done; what cannot be trained comes with its error.

    Raises ``Interruption`` after Ctrl-C.
    """
    x = problem.features(batch.jobs[0].configuration.feature, problem.rows)
    if batch.how == "sklearn":
        yield from _sklearn(problem, batch, x)
        return
    together = _convex if batch.how == "convex" else _stack
    try:
        yield from together(problem, batch, x, progress, title)
    except (TrainingError, FeatureError) as error:
        if len(batch.jobs) == 1:
            yield Trained(batch.jobs[0], None, error=str(error))
            return
        # One head spoils what is trained together: each for itself, so that the others keep their place.
        for job in batch.jobs:
            yield from train_batch(problem, Batch(batch.how, (job,)))


def _stack(problem: Problem, batch: Batch, x: Dense | Ragged, progress: bool, title: str) -> Iterator[Trained]:
    from embedcache.train import Masks, Origin, PassOptions, labelled_rows_of, train_stack

    jobs = batch.jobs
    origin, options = Origin.of(problem.cache), PassOptions(progress=progress, title=title or batch.title)
    rows = labelled_rows_of(x, problem.y, problem.task, problem.class_names)
    heads, specs = [job.configuration.head for job in jobs], [job.configuration.train for job in jobs]
    stopping = bool(specs[0].patience)
    begun = time.perf_counter()
    if _alone(problem, jobs[0]):
        fold = jobs[0].fold
        learn, stop = _learn_and_stop(fold, stopping)
        judged = rows.take(np.flatnonzero(stop)) if stop.any() else None
        # A part of the rows has fewer steps in as many epochs: what is compared is rows, not steps.
        specs = [replace(spec, min_steps=max(MIN_STEPS, spec.least_steps)) for spec in specs]
        found = train_stack(rows.take(np.flatnonzero(learn)), judged, heads, specs, origin=origin, options=options)
    else:
        numbers = list(dict.fromkeys(job.number for job in jobs))
        by_number = {job.number: _learn_and_stop(job.fold, stopping) for job in jobs}
        masks = Masks(
            np.stack([by_number[number][0] for number in numbers]),
            np.stack([by_number[number][1] for number in numbers]),
            np.array([numbers.index(job.number) for job in jobs], np.int64),
        )
        found = train_stack(rows, None, heads, specs, masks=masks, origin=origin, options=options)
    if any(result.interrupted for result in found):
        raise Interruption
    seconds = time.perf_counter() - begun
    ran = [max(1, len(result.history)) for result in found]
    for job, result, epochs in zip(jobs, found, ran, strict=True):
        yield Trained(
            job, result.head, seconds * epochs / sum(ran), float(epochs), history=result.history,
            improving=result.fitted.improving,
        )  # fmt: skip


def _convex(problem: Problem, batch: Batch, x: Dense | Ragged, progress: bool, title: str) -> Iterator[Trained]:
    """Solve all penalties on all folds side by side: a path from the strongest penalty to the weakest."""
    from embedcache.train.convex import path_folds

    first = batch.jobs[0].configuration
    if first.train.class_weight is not None:
        yield from _one_by_one(problem, batch, x)  # weights by class name are the trainer's business
        return
    begun = time.perf_counter()
    penalties = list(dict.fromkeys(job.configuration.train.l2 for job in batch.jobs))
    numbers = list(dict.fromkeys(job.number for job in batch.jobs))
    learn = {job.number: job.fold.train | job.fold.stopping for job in batch.jobs}
    masks, y = np.stack([learn[number] for number in numbers]), problem.y
    if _alone(problem, batch.jobs[0]):
        rows = masks[0]
        x, y, masks = part(x, rows), y[rows], np.ones((1, int(rows.sum())), bool)
    found = path_folds(
        x.values, y, penalties, masks, task=problem.task, outputs=len(problem.class_names),
        standardize=first.train.standardize,
    )  # fmt: skip
    seconds = (time.perf_counter() - begun) / len(batch.jobs)
    feature = problem.cache.feature(first.feature)
    for job in batch.jobs:
        one = found[penalties.index(job.configuration.train.l2)][numbers.index(job.number)]
        head = TrainedHead(
            job.configuration.head, problem.task, problem.class_names, feature,
            state={"output.weight": one.weight, "output.bias": one.bias}, training=job.configuration.train.record(),
            **_origin(problem),
        )  # fmt: skip
        entry = {"epoch": one.iterations, "train_loss": one.loss / len(y), "gradient_norm": one.gradient_norm}
        yield Trained(job, head, seconds, float(one.iterations), history=[entry])


def _learn_and_stop(fold: Fold, stopping: bool) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return the rows to learn from and to stop early by: a head that never stops early learns from both."""
    return (fold.train, fold.stopping) if stopping else (fold.train | fold.stopping, np.zeros_like(fold.stopping))


def _origin(problem: Problem) -> dict[str, Any]:
    where = problem.cache.provenance()[-1] if problem.cache.provenance() else {}
    return {
        "extraction": problem.cache.spec, "model": where.get("model"), "revision": where.get("revision"),
        "probe": problem.cache.common_probe,
    }  # fmt: skip


def _one(problem: Problem, job: Job, x: Dense | Ragged, y: npt.NDArray[Any]) -> Trained:
    """Train one head by itself, on features of its own rows."""
    from embedcache.train import train_head

    begun = time.perf_counter()
    try:
        with quiet():
            result = train_head(
                x, y, None, None, job.configuration.head, job.configuration.train, task=problem.task,
                class_names=problem.class_names, feature=problem.cache.feature(job.configuration.feature),
                progress=False, calibrate=False, **_origin(problem),
            )  # fmt: skip
    except EmbedcacheError as error:
        return Trained(job, None, time.perf_counter() - begun, error=str(error))
    return Trained(job, result.head, time.perf_counter() - begun, history=result.history)


def _one_by_one(problem: Problem, batch: Batch, x: Dense | Ragged) -> Iterator[Trained]:
    for job in batch.jobs:
        learn, _ = _learn_and_stop(job.fold, False)
        yield _one(problem, job, part(x, learn), problem.y[learn])


def _sklearn(problem: Problem, batch: Batch, x: Dense | Ragged) -> Iterator[Trained]:
    here = [job for job in batch.jobs if job.configuration.head.kind in _IN_PROCESS]
    yield from _one_by_one(problem, Batch("sklearn", tuple(here)), x)
    rest = [job for job in batch.jobs if job.configuration.head.kind not in _IN_PROCESS]
    workers = min(len(rest), os.cpu_count() or 1)
    if workers < 2 or len(rest) < 3 or np.size(x.values) * len(rest) < _WORTH_PROCESSES:
        yield from _one_by_one(problem, Batch("sklearn", tuple(rest)), x)
        return
    from joblib import Parallel, delayed

    # joblib hands arrays over 1 MB to its processes as one memory map.
    array = np.ascontiguousarray(x.values)
    run = Parallel(n_jobs=workers, return_as="generator_unordered", inner_max_num_threads=1, prefer="processes")
    about = (problem.task, problem.class_names, problem.cache.feature(rest[0].configuration.feature), _origin(problem))
    for at, head, seconds, error in run(
        delayed(_fit_elsewhere)(
            at, job.configuration.to_json(), np.flatnonzero(job.fold.train | job.fold.stopping), array, problem.y, about
        )
        for at, job in enumerate(rest)
    ):  # fmt: skip
        yield Trained(rest[at], head, seconds, error=error)


def _fit_elsewhere(
    at: int, configuration: dict[str, Any], rows: npt.NDArray[np.int64], x: npt.NDArray[np.float32],
    y: npt.NDArray[Any], about: tuple[Any, ...],
) -> tuple[int, TrainedHead | None, float, str | None]:  # fmt: skip
    """Fit one scikit-learn head in a process of its own."""
    from embedcache.train import train_head

    made = Configuration.from_json(configuration)
    task, names, feature, origin = about
    begun = time.perf_counter()
    try:
        with quiet():
            head = train_head(
                x[rows], y[rows], None, None, made.head, made.train, task=task, class_names=names, feature=feature,
                progress=False, calibrate=False, **origin,
            ).head  # fmt: skip
    except EmbedcacheError as error:
        return at, None, time.perf_counter() - begun, str(error)
    return at, head, time.perf_counter() - begun, None


def _estimator_size(estimator: Any) -> int:
    """Return how many numbers a fitted estimator holds, nested ones and trees included."""
    seen: set[int] = set()

    def size(value: Any, depth: int) -> int:
        if id(value) in seen or depth > 8:
            return 0
        seen.add(id(value))
        if isinstance(value, np.ndarray):
            if value.dtype.names:
                return int(value.size * len(value.dtype.names))
            if value.dtype == object:
                return sum(size(each, depth + 1) for each in value.flat)
            return int(value.size) if value.dtype.kind in "fiu" else 0
        if isinstance(value, (list, tuple)):
            return sum(size(each, depth + 1) for each in value)
        module = type(value).__module__
        if module.startswith("sklearn"):
            return sum(size(each, depth + 1) for each in vars(value).values()) if hasattr(value, "__dict__") else 0
        return 0

    return size(estimator, 0)


def outputs_of(head: TrainedHead, x: object) -> Outputs:
    """Return the uncalibrated outputs of a head, float32 [n, C]: probabilities or values, NaN where it diverged."""
    features = features_of(x, head.feature)
    try:
        logits = head.logits(features)
    except FeatureError:  # the features are sound, so it is the head whose numbers overflow
        return np.full((len(features), len(head.class_names)), np.nan, np.float32)
    return np.asarray(head.calibrated(logits), np.float32)


__all__ = [
    "DEFAULTS", "Batch", "Interruption", "Job", "Trained", "batches", "outputs_of", "refuse_impossible", "train_batch",
]  # fmt: skip
