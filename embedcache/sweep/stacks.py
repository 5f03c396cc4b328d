"""Torch heads of one shape, stacked fold by fold, the stacks side by side on all cores.

Each fold has rows of its own: a stack is what training on those rows alone would be. Each stack has one thread where
there are as many stacks as cores: a head's steps are too small to be divided, and a divided step waits for whichever
core is busy with something else. (Before, all folds shared a pass in which rows that a fold holds out weighed nothing:
a third slower, and ten times on a machine with other work.)
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from embedcache.errors import FeatureError, TrainingError
from embedcache.memory import share_memory_among_threads
from embedcache.notebook import shows_bars
from embedcache.spec import MIN_STEPS
from embedcache.sweep.jobs import Interruption, Job, TrainedJob, is_small, stacks_of
from embedcache.sweep.problem import Fold, Problem
from embedcache.task import Flags
from embedcache.train.data import LabelledRows, fits_in_memory, labelled_rows_of
from embedcache.train.result import Origin

if TYPE_CHECKING:
    from embedcache.train import PassOptions


def train_stacks(
    problem: Problem, jobs: Sequence[Job], *, progress: bool = False, title: str = "", until: float = math.inf
) -> Iterator[list[TrainedJob]]:
    """Train jobs that read one feature set, and yield those of a shape and all folds together, in their order.

    Raises ``Interruption`` after ``until``, by ``time.perf_counter``.
    """
    import torch
    from tqdm.auto import tqdm

    from embedcache.backbone.device import threads
    from embedcache.train import PassOptions

    feature = jobs[0].configuration.feature
    x = problem.features(feature, problem.rows)
    rows: dict[int, LabelledRows] = {}  # by how many views they have
    groups = stacks_of(problem, jobs)
    for group in groups:
        views = problem.views(feature, group[0][0].configuration.train)
        if len(views) not in rows:
            rows[len(views)] = labelled_rows_of(x, problem.y, problem.task, problem.class_names, views=views)
    parts = [part for group in groups for part in group]
    cores = torch.get_num_threads()
    workers = min(len(parts), cores)
    size = sum(vectors.nbytes for vectors in x.vectors()) * (max(rows) + 1) if x.in_memory else 0
    while workers > 1 and not fits_in_memory(workers * size):  # each has a copy of its rows, standardised
        workers -= 1
    each = max(1, cores // workers)
    if not x.in_memory:
        share_memory_among_threads()  # or each of a dozen would keep the windows that it has read and freed
    stopped = threading.Event()
    bar = tqdm(
        total=sum(_steps(part[0]) for part in parts), desc=title, unit="step", mininterval=0.2,
        disable=not (progress and shows_bars()),
    )  # fmt: skip

    def each_step() -> None:
        if stopped.is_set() or time.perf_counter() > until:
            raise KeyboardInterrupt
        bar.update()

    options = PassOptions(progress=False, each_step=each_step)

    def train(part: Sequence[Job]) -> list[TrainedJob]:
        return _stack(problem, part, rows[len(problem.views(feature, part[0].configuration.train))], options)

    pool = ThreadPoolExecutor(workers, "embedcache-stack", torch.set_num_threads, (each,))
    # A new thread starts with the number that was set last, whoever set it; at the end the number is ours again.
    with threads(each):
        try:
            for running in [[(pool.submit(train, part), part) for part in group] for group in groups]:
                done: list[TrainedJob] = []
                for future, part in running:
                    try:
                        done += future.result()
                    except (TrainingError, FeatureError) as error:
                        if len(part) == 1:
                            done.append(TrainedJob(part[0], None, error=str(error)))
                            continue
                        # One head spoils what is trained together: each for itself.
                        done += [own for job in part for (own,) in train_stacks(problem, (job,), until=until)]
                yield done
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
    if is_small(problem, jobs[0]):
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


def _learn_and_stop(fold: Fold, stopping: bool) -> tuple[Flags, Flags]:
    """Return the rows to learn from and to stop early by: a head that never stops early learns from both."""
    return (fold.train, fold.stopping) if stopping else (fold.usable, np.zeros_like(fold.stopping))
