"""Configurations x folds as jobs, and the groups of them that are trained in one go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from embedcache.fingerprint import canonical_json
from embedcache.heads import TrainedHead, build_head, stack_key
from embedcache.heads.sklearn_kinds import KINDS
from embedcache.spec import MAY_DIFFER
from embedcache.sweep.configuration import Configuration
from embedcache.sweep.cost import seconds_of
from embedcache.sweep.problem import Fold, Problem

_STACK_BYTES = 1 << 30
_STACK_HEADS = 384
_BYTES_A_PARAMETER = 28  # weight, gradient, two moments, scratch, the best so far, a copy


@dataclass(frozen=True)
class Job:
    """One head to train: a configuration on one fold. ``number`` is the fold's; ``curve`` a learning curve's point.

    ``kept`` is what the convex solver takes to the optimum, such as the chosen head; folds as far as a choice needs.
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
        return self.head.parameters or estimator_size(self.head.estimator)


How = Literal["convex", "neighbours", "sklearn", "stack"]


@dataclass(frozen=True)
class JobBatch:
    """Jobs that are trained in one go; ``how`` is ``stack``, ``convex``, ``neighbours`` or ``sklearn``.

    Stacks may be of several shapes: they train side by side, and no core waits between one shape and the next.
    """

    how: How
    jobs: tuple[Job, ...]

    @property
    def works(self) -> int:
        """How often the work of one head is done: nearest neighbours have one search for all heads of a fold."""
        return len({(job.number, job.curve) for job in self.jobs}) if self.how == "neighbours" else len(self.jobs)

    @property
    def title(self) -> str:
        """What to call it on a terminal."""
        kinds = Counter(job.configuration.head.kind for job in self.jobs)
        names = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        return f"{names} · {self.jobs[0].configuration.feature}"


class Interruption(Exception):
    """Ctrl-C stopped a stack: its heads are half trained and do not count."""


def batches(problem: Problem, jobs: Iterable[Job]) -> list[JobBatch]:
    """Group jobs into what is trained in one go, cheapest first, so that a table fills early."""
    groups: dict[_Group, list[Job]] = {}
    for job in jobs:
        groups.setdefault(_group_of(problem, job), []).append(job)

    def cost(group: _Group) -> tuple[float, str]:
        batch = JobBatch(group.how, tuple(groups[group]))
        return batch.works * seconds_of(problem, batch.jobs[-1].configuration), group.name

    out: list[JobBatch] = []
    stacked: dict[str, int] = {}  # where the stacks that read a feature set are
    for group in sorted(groups, key=cost):
        members, place = tuple(groups[group]), stacked.get(str(group.key[0]))
        if group.how == "stack" and place is not None:
            out[place] = JobBatch("stack", out[place].jobs + members)
            continue
        if group.how == "stack":
            stacked[str(group.key[0])] = len(out)
        out.append(JobBatch(group.how, members))
    return out


def stacks_of(problem: Problem, jobs: Iterable[Job]) -> list[list[tuple[Job, ...]]]:
    """Return jobs by what is kept together, each a list with the stack of every fold."""
    groups: dict[_Group, dict[tuple[int, int | None], list[Job]]] = {}
    for job in jobs:
        by_fold = groups.setdefault(_group_of(problem, job), {})
        by_fold.setdefault((job.number, job.curve), []).append(job)
    out = []
    for by_fold in groups.values():
        most = _most_in_a_stack(problem, next(iter(by_fold.values()))[0].configuration)
        for start in range(0, max(map(len, by_fold.values())), most):
            out.append([tuple(part) for own in by_fold.values() if (part := own[start : start + most])])
    return out


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
    train = asdict(configuration.train)
    if configuration.head.engine == "sklearn" and configuration.head.kind == "knn":
        metric = configuration.head.options.get("metric", KINDS["knn"].options["metric"].default)
        return _Group("neighbours", (configuration.feature, metric, train["standardize"], train["views"]))
    if configuration.head.engine == "sklearn":
        return _Group("sklearn", (configuration.feature,))
    if configuration.train.solver == "convex":
        alike = canonical_json({name: train[name] for name in ("class_weight", "standardize", "views")})
        alone = (job.number, job.curve) if is_small(problem, job) else ()
        return _Group("convex", (configuration.feature, alike, *alone))
    alike = canonical_json({name: value for name, value in train.items() if name not in MAY_DIFFER})
    clipped = bool(configuration.train.clip)
    return _Group("stack", (configuration.feature, stack_key(configuration.head), alike, clipped))


def is_small(problem: Problem, job: Job) -> bool:
    """Whether a job learns from a part of the rows: a few-shot draw, or a point of a learning curve."""
    return job.curve is not None or int(job.fold.train.sum()) * 2 < len(problem)


def _most_in_a_stack(problem: Problem, configuration: Configuration) -> int:
    head = build_head(configuration.head, problem.cache.feature(configuration.feature), len(problem.class_names))
    size = sum(parameter.numel() for parameter in head.parameters())
    return max(1, min(_STACK_HEADS, _STACK_BYTES // (size * _BYTES_A_PARAMETER)))


def estimator_size(estimator: object) -> int:
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
