"""What a sweep is about to do, and how long it may take: said before it starts, kept to while it runs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from embedcache.arguments import checks_arguments
from embedcache.errors import SweepError
from embedcache.journal import exists
from embedcache.sweep.configuration import NOTHING_ASKED, Asked, Configuration
from embedcache.sweep.cost import refuse_too_many, seconds_of, speed
from embedcache.sweep.grid import parse, read_file
from embedcache.sweep.jobs import Job, JobBatch, batches
from embedcache.sweep.problem import Problem
from embedcache.sweep.protocols import published_named
from embedcache.sweep.store import IDENTITY, read_results
from embedcache.sweep.training import refuse_impossible
from embedcache.wording import counted, duration

if TYPE_CHECKING:
    from embedcache.cache import FeatureCache

_FOR_THE_END = 0.15
"""The share of a budget that is left for the comparison, the chosen head and the test split."""


@dataclass(frozen=True)
class Plan:
    """The fits that have no result yet, in the order in which they are trained.

    ``kept`` of ``heads`` on ``folds`` are there already; ``seconds`` has an estimate for each of ``batches``. ``fixed``
    is what a published protocol fixes, in words.
    """

    heads: int
    folds: int
    kept: int
    batches: Sequence[JobBatch]
    seconds: Sequence[float]
    fixed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, problem: Problem, heads: int, kept: int, batches: Sequence[JobBatch]) -> Plan:
        """Estimate what batches take on this machine, whose speed is measured first, in a twentieth of a second."""
        faster = speed() if batches else 1.0
        seconds = [_seconds(problem, batch) / faster for batch in batches]
        return cls(heads, len(problem.folds), kept, batches, seconds, problem.fixed)

    @property
    def fits(self) -> int:
        """How many heads are trained, folds counted."""
        return sum(len(batch.jobs) for batch in self.batches)

    def to_text(self) -> str:
        """Return one line: how many fits, about how long, and what comes first; a line before for each thing fixed."""
        fixed = "".join(f"{name}: {text}\n" for name, text in self.fixed.items())
        there = f", {self.kept:,} of them there already" if self.kept else ""
        total = (
            f"{counted(self.heads, 'head')} on {counted(self.folds, 'fold')}: {counted(self.fits + self.kept, 'fit')}"
        )
        if not self.batches:
            return f"{fixed}{total}, all there already"
        parts = ", ".join(
            f"{batch.title} ({duration(seconds)})" for batch, seconds in zip(self.batches, self.seconds, strict=True)
        )
        return f"{fixed}{total}{there}, about {duration(sum(self.seconds))}: {parts}"


def _seconds(problem: Problem, batch: JobBatch) -> float:
    known: dict[object, float] = {}
    for job in batch.jobs:
        if job.configuration not in known:
            known[job.configuration] = seconds_of(problem, job.configuration)
    return sum(known[job.configuration] for job in batch.jobs) * batch.works / len(batch.jobs)


@checks_arguments()
def planned(
    cache: FeatureCache | Path | str, grid: object = None, *, output_dir: Path | str | None = None,
    features: Sequence[str] = (), seeds: Sequence[int] = (), yes: bool = False, asked: Asked = NOTHING_ASKED,
    protocol: str | None = None,
) -> Plan:  # fmt: skip
    """Return what ``sweep`` would train with the same arguments, and about how long it would take; nothing is written.

    Raises what ``sweep`` raises before it trains.
    """
    problem, configurations, _ = read_asked(cache, grid, features, seeds, yes, asked, protocol)
    there: set[tuple[str, int]] = set()
    if output_dir is not None and exists(Path(output_dir) / IDENTITY, SweepError):
        there = {(result.id, result.fold) for result in read_results(output_dir) if result.curve is None}
    jobs = [job for job in jobs_of(problem, configurations) if (job.configuration.id, job.number) not in there]
    heads = len({configuration.candidate for configuration in configurations})
    kept = len(configurations) * len(problem.folds) - len(jobs)
    return Plan.of(problem, heads, kept, batches(problem, jobs))


def read_asked(
    cache: FeatureCache | Path | str,
    grid: object,
    features: Sequence[str],
    seeds: Sequence[int],
    yes: bool,
    asked: Asked,
    protocol: str | None = None,
) -> tuple[Problem, list[Configuration], Asked]:
    """Read the grid and refuse what cannot be, before anything is made."""
    from embedcache.cache import FeatureCache

    published = None if protocol is None else published_named(protocol)
    division = None if published is None else published.asked(asked, grid=grid, seeds=list(seeds))
    opened = cache if isinstance(cache, FeatureCache) else FeatureCache.open(cache)
    if published is not None:
        features = published.feature_of(opened, features)
        grid = published.grid(opened, features[0])
    value = read_file(grid) if isinstance(grid, Path) or (isinstance(grid, str) and _is_file(grid)) else grid
    parsed = parse(value, opened.plain_sets, features=features, seeds=seeds)
    asked = asked.over(parsed.asked)
    if published is None:
        problem = Problem.of(opened, asked.metric, asked.protocol())
    else:
        problem = Problem.of(opened, published.metric, division, published)
    problem.folds  # noqa: B018  # refuses what the rows do not allow
    refuse_too_many(problem, parsed, asked.random, yes)
    configurations = parsed.configurations(asked.random, asked.seed or 0)
    refuse_impossible(problem, configurations)
    if published is not None:
        problem = replace(problem, fixed=published.fixed(opened, problem.protocol, configurations))
    return problem, configurations, asked


def jobs_of(problem: Problem, configurations: Sequence[Configuration]) -> list[Job]:
    # By published scores heads are chosen among neighbours in a fine grid: there the convex solver goes to the optimum.
    exact = problem.published is not None
    return [
        Job(configuration, fold, number, kept=exact)
        for configuration in configurations
        for number, fold in enumerate(problem.folds)
    ]


def _is_file(text: str) -> bool:
    return text.endswith((".yaml", ".yml", ".json"))


@dataclass
class Budget:
    """So many minutes, of which the end gets its share; None for no limit."""

    minutes: float | None = None
    _begun: float = field(default_factory=time.perf_counter)

    @property
    def until(self) -> float:
        """When training ends, by ``time.perf_counter``; infinite without a limit."""
        return math.inf if self.minutes is None else self._begun + 60 * self.minutes * (1 - _FOR_THE_END)

    @property
    def left(self) -> float:
        """Seconds left to train in."""
        return self.until - time.perf_counter()
