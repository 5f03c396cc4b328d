"""A sweep: heads without results are trained, results are stored as they come, compared, and a head is chosen."""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import numpy as np

from embedcache.arguments import checks_arguments
from embedcache.decoding import to_json
from embedcache.errors import Interrupted, SweepError, SweepSpecError, warn
from embedcache.features import Rows
from embedcache.fingerprint import hash_json
from embedcache.journal import exists
from embedcache.notebook import shows_bars
from embedcache.sweep import conclusion
from embedcache.sweep.comparison import Candidate, candidates, leaderboard, simplest
from embedcache.sweep.configuration import NOTHING_ASKED, Asked, Configuration
from embedcache.sweep.findings import data_facts, machine, notes_on, protocol_facts, versions
from embedcache.sweep.jobs import Interruption, Job, JobBatch, TrainedJob, batches
from embedcache.sweep.plan import Budget, Plan, jobs_of, read_asked
from embedcache.sweep.problem import Problem
from embedcache.sweep.result import SweepResult, to_text
from embedcache.sweep.store import Outputs, Result, SweepFolder
from embedcache.sweep.summary import (
    FORMAT,
    SUMMARY,
    VERSION,
    Choice,
    Failure,
    Figure,
    LeaderboardRow,
    LearningCurve,
    Metric,
    PublishedFacts,
    Ran,
    Summary,
    TestScore,
    read_summary,
)
from embedcache.sweep.training import outputs_of_each, train_batch
from embedcache.train.loop import STILL_IMPROVING
from embedcache.train.metrics import metrics_of, score
from embedcache.train.result import Observe
from embedcache.wording import counted, duration

if TYPE_CHECKING:
    from embedcache.cache import FeatureCache

_SLOW_METRICS = frozenset({"roc_auc", "average_precision", "spearman"})
"""Not measured on every fold, unless heads are compared by them: they sort all rows for each class."""


@checks_arguments()
def sweep(
    cache: FeatureCache | Path | str,
    grid: object = None,
    *,
    output_dir: Path | str | None = None,
    folds: int | None = None,
    repeats: int | None = None,
    metric: str | None = None,
    shots: int | None = None,
    draws: int | None = None,
    random: int | None = None,
    seed: int | None = None,
    features: Sequence[str] = (),
    seeds: Sequence[int] = (),
    choose: Literal["best", "simplest"] = "best",
    learning_curve: bool | None = None,
    test_all: bool | None = None,
    yes: bool = False,
    minutes: float | None = None,
    protocol: str | None = None,
    progress: bool = True,
    command: str | None = None,
    observe: Observe | None = None,
) -> SweepResult:
    """Train many heads on a cache, compare them honestly, keep the best.

    Heads are chosen by their mean score over folds of train and validation; the test split is looked at once, with
    the chosen head trained on both. In ``output_dir`` everything is kept: run it again and nothing is trained twice,
    add configurations and only those are.

    Args:
        cache: an open cache or its folder.
        grid: a sweep file, its content, a list of heads (names, mappings, ``HeadSpec``, ``Configuration``), or None for
            the default; see ``embedcache.sweep.grid``.
        output_dir: the sweep's folder; None for one that lives as long as the result.
        folds: how many (default 5), 1 for the cache's own validation split; ``repeats`` of them with other folds.
        metric: what heads are compared by; accuracy, f1_macro (multi-label) or rmse when not given.
        shots, draws: train on this many rows of each class, this many times (default 10), instead of on folds.
        random: draw this many configurations from the grid instead of trying all.
        seed: of folds, draws and the random search.
        features, seeds: feature sets and heads' seeds, instead of the file's.
        choose: ``best`` keeps the winner, ``simplest`` the simplest head that cannot be told from it.
        learning_curve: also train the chosen and the recommended head on shares of the rows.
        test_all: also measure every other head on the test split; they are marked.
        yes: run more than 10,000 configurations.
        minutes: stop training in time to be done after so many; what was left out stands in the notes.
        protocol: measure one feature set as a published table does: ``mteb``, ``clip``, ``dinov2``, ``dinov2-knn``
            or ``dinov2-linear``. It fixes heads, rows, choice and metric, as ``embedcache.sweep.protocols`` says;
            ``summary["published"]`` has what it fixed, and its figures.
        progress: say on stderr what is going to be trained, and on a terminal how far it is.
        observe: is called for each head of a fold that is kept, with how many there are and its score.

    Raises:
        SweepError: a grid, protocol or folder that cannot be run.
        SpecError: a head, setting or metric that cannot be.
        Interrupted: Ctrl-C; says what was kept. What is finished is compared in the folder.
    """
    budget = Budget(minutes)
    if minutes is not None and not minutes > 0:
        raise SweepSpecError(f"--minutes {minutes}: expected a number above 0")
    problem, configurations, asked = read_asked(
        cache, grid, features, seeds, yes,
        Asked(
            folds=folds, repeats=repeats, shots=shots, draws=draws, metric=metric, learning_curve=learning_curve,
            random=random, seed=seed, test_all=test_all,
        ),
        protocol,
    )  # fmt: skip
    if problem.published is not None:
        problem.published.asked(NOTHING_ASKED, choose=choose != "best", minutes=minutes)
    path = Path(tempfile.mkdtemp(prefix="embedcache-sweep-") if output_dir is None else output_dir)
    with SweepFolder(path, problem.identity()) as folder:
        ending = Ending(choose, bool(asked.learning_curve), bool(asked.test_all))
        run = Run(problem, folder, ending, command, progress, budget, observe)
        jobs = jobs_of(problem, configurations)
        run.train(jobs, announced=True)
        try:
            run.conclude()
        except (Interruption, KeyboardInterrupt):
            raise Interrupted(
                f"interrupted: all {len(folder.results):,} fits are kept in {path}, and the conclusion is missing: "
                "run the same command to draw it"
            ) from None
    result = SweepResult(path, temporary=output_dir is None)
    warn(result.notes)
    return result


DIVERGED = "it diverged, and its outputs are not finite: use a lower learning rate"


@dataclass(frozen=True)
class Ending:
    """How a sweep ends: which head it keeps, and what else it trains and measures."""

    choose: Literal["best", "simplest"] = "best"
    learning_curve: bool = False
    test_all: bool = False


@dataclass
class Run:
    """One sweep going on in a folder."""

    problem: Problem
    folder: SweepFolder
    ending: Ending
    command: str | None
    progress: bool
    budget: Budget = field(default_factory=Budget)
    observe: Observe | None = None

    def __post_init__(self) -> None:
        self.begun = time.perf_counter()
        self.started = _now()
        self.show = self.progress and shows_bars()
        self.left_out: list[JobBatch] = []

    def train(self, jobs: Iterable[Job], announced: bool = False) -> None:
        """Train the jobs that have no result yet, keeping each batch as it is done, while the budget lasts.

        Raises ``Interrupted`` on Ctrl-C.
        """
        wanted = list(jobs)
        missing = self._missing(wanted)
        heads = len({job.configuration.candidate for job in wanted})
        plan = Plan.of(self.problem, heads, len(wanted) - len(missing), batches(self.problem, missing))
        if announced and self.progress and (self.command is not None or self.show):
            print(plan.to_text(), file=sys.stderr)
        done, begun, scale = 0, time.perf_counter(), 1.0
        for number, batch in enumerate(plan.batches, 1):
            if self.budget.left <= 0:
                self.left_out.append(batch)
                continue
            left = f", about {duration(scale * sum(plan.seconds[number - 1 :]))} left" if done else ""
            title = f"{done}/{counted(len(missing), 'head')}{left}; {batch.title}"
            self._train(batch, title, wanted)
            done += len(batch.jobs)
            scale = (time.perf_counter() - begun) / max(1e-9, sum(plan.seconds[:number]))
            if self.show and number < len(plan.batches):
                self._show_table()

    def _train(self, batch: JobBatch, title: str, wanted: Sequence[Job]) -> None:
        try:
            for done in train_batch(self.problem, batch, progress=self.show, title=title, until=self.budget.until):
                self._keep(done)
                if self.budget.left <= 0:
                    raise Interruption
        except (Interruption, KeyboardInterrupt) as stop:
            if isinstance(stop, KeyboardInterrupt) or self.budget.left > 0:
                self._stop(len(wanted) - len(self._missing(wanted)), len(wanted))
            if missing := self._missing(batch.jobs):
                self.left_out.append(replace(batch, jobs=tuple(missing)))

    def _stop(self, kept: int, wanted: int) -> NoReturn:
        rows, failures = self._table()
        if rows:
            self.folder.write(SUMMARY, to_json(self._summary(rows, failures)))
        raise Interrupted(f"{kept:,} of {wanted:,} fits are kept in {self.folder.path}: run the same command to go on")

    def _missing(self, jobs: Sequence[Job]) -> list[Job]:
        scored = {number: int(fold.score.sum()) for number, fold in enumerate(self.problem.folds)}
        finished: dict[str, set[int]] = {}
        out, seen = [], set()
        for job in jobs:
            name = job.configuration.id
            key = name, job.number, job.curve
            if key in seen:
                continue
            seen.add(key)
            if job.curve is not None:
                if key not in self.folder.results:
                    out.append(job)
                continue
            if name not in finished:
                finished[name] = self.folder.done(name, scored, len(self.problem.class_names))
            if job.number not in finished[name]:
                out.append(job)
        return out

    def _keep(self, heads: Sequence[TrainedJob]) -> None:
        """Score heads on the rows of their folds, and keep the results."""
        results: list[Result] = []
        outputs: dict[str, dict[int, Outputs]] = {}
        for _, group in itertools.groupby(heads, lambda one: (one.job.configuration.feature, one.job.number)):
            of_fold = list(group)
            rows = np.flatnonzero(of_fold[0].job.fold.score)
            for trained, scored in zip(of_fold, self._outputs(of_fold, rows), strict=True):
                job, probabilities = trained.job, scored
                if probabilities is not None and not np.isfinite(probabilities).all():
                    trained, probabilities = replace(trained, error=DIVERGED), None
                results.append(self._result(trained, rows, probabilities))
                if probabilities is not None and job.curve is None:
                    outputs.setdefault(job.configuration.id, {})[job.number] = probabilities
        kept = len(self.folder.results)
        self.folder.add(results, outputs)
        for number, result in enumerate(results, kept + 1):
            if self.observe is not None and result.score is not None and result.curve is None:
                self.observe(number, {f"kept/{self.problem.metric}": result.score})

    def _outputs(self, of_fold: Sequence[TrainedJob], rows: Rows) -> Iterator[Outputs | None]:
        """Yield what heads of one fold and feature set say of some rows, None for one that could not be trained."""
        heads = [trained.head for trained in of_fold if trained.head is not None]
        if heads:
            x = self.problem.features(of_fold[0].job.configuration.feature, self.problem.rows[rows])
            said = outputs_of_each(heads, x)
        yield from (None if trained.head is None else next(said) for trained in of_fold)

    def _result(self, trained: TrainedJob, rows: Rows, outputs: Outputs | None) -> Result:
        problem, job, configuration = self.problem, trained.job, trained.job.configuration
        metrics: dict[str, float | None] = {}
        if outputs is not None:
            for name in metrics_of(problem.task):
                if name not in _SLOW_METRICS or name == problem.metric:
                    value = score(name, problem.task, problem.y[rows], outputs)
                    metrics[name] = float(value) if np.isfinite(value) else None
        return Result(
            id=configuration.id, candidate=configuration.candidate, fold=job.number, repeat=job.fold.repeat,
            train_rows=job.fold.rows, eval_rows=len(rows), score=metrics.get(problem.metric), metrics=metrics,
            feature=configuration.feature, head=configuration.head_json, train=configuration.train_json,
            parameters=trained.parameters, seconds=trained.seconds, epochs=trained.epochs, curve=job.curve,
            error=trained.error,
        )  # fmt: skip

    def _candidates(self) -> list[Candidate]:
        """Return every candidate that the folder has whole, of this grid or of earlier ones."""
        known: dict[str, Configuration] = {}
        for result in self.folder.results.values():
            if result.id not in known and result.curve is None:
                written = {"feature": result.feature, "head": result.head, "train": result.train}
                known[result.id] = Configuration.from_json(written)
        return candidates(self.folder, list(known.values()), len(self.problem.folds))

    def _table(self) -> tuple[list[LeaderboardRow], list[Failure]]:
        return leaderboard(self.problem, self.folder, self._candidates())

    def _show_table(self) -> None:
        rows, failures = self._table()
        if rows:
            print(f"\n{to_text(self._summary(rows, failures), 5)}\n", file=sys.stderr)

    def conclude(self) -> None:
        """Choose, use the test split, write the summary and ``best/``; nothing where nothing has changed.

        Raises ``SweepError`` when no head could be trained.
        """
        state = self._state()
        if self._concluded(state) and not self.left_out:
            return
        by_id = {candidate.id: candidate for candidate in self._candidates()}
        rows, failures = leaderboard(self.problem, self.folder, list(by_id.values()))
        if not rows:
            first = failures[0].error if failures else "there is none"
            raise SweepError(f"none of {counted(len(failures), 'head')} could be trained; the first: {first}")
        plainest = simplest([row for row in rows if not row.distinguishable], self.problem.greater_is_better)
        chosen = plainest if self.ending.choose == "simplest" else rows[0]
        published = self.problem.published
        if published is not None and self.problem.protocol.to_test:
            chosen = next(row for row in rows if published.is_kept(row.head.options))
        curve = self._curves([by_id[name] for name in dict.fromkeys((chosen.id, plainest.id))], by_id.values())
        try:
            final = conclusion.finish(self.problem, self.folder, by_id[chosen.id])
            tested = conclusion.read_tested(self.folder)
            if final.test is not None:
                tested[chosen.id] = TestScore(final.test.score, final.test.interval, final.test.rows)
            if self.ending.test_all:
                tested |= conclusion.test_all(self.problem, [by_id[row.id] for row in rows], tested)
        except (Interruption, KeyboardInterrupt):
            self._stop(len(rows), len(rows))
        if tested:
            self.folder.write(conclusion.TESTED, to_json(tested))
        conclusion.save_best(self.problem, self.folder, final, chosen)
        looked = {row.id for row in rows if self.problem.protocol.to_test or row.id in tested}
        rows = [replace(row, looked_at_test=row.id in looked, test=tested.get(row.id)) for row in rows]
        summary = self._summary(rows, failures)
        notes = [*summary.notes, *notes_on(self.problem, rows)]
        if self.left_out:
            names = ", ".join(batch.title for batch in self.left_out)
            notes.append(
                f"{counted(sum(len(batch.jobs) for batch in self.left_out), 'fit')} left out, as the "
                f"{self.budget.minutes:g} minutes were over: {names}; run it again with more --minutes to add them"
            )
        if final.trained.improving:
            notes.append(f"{chosen.label}: {STILL_IMPROVING}")
        chosen_choice, recommended = self._choices(rows, chosen, plainest)
        figures = () if published is None else conclusion.figures(self.problem, self.folder, published, rows, final)
        whole = replace(
            summary, complete=True, chosen=chosen_choice, recommended=recommended, test=final.test,
            mistakes=final.mistakes, learning_curve=tuple(curve), few_shot=final.few_shot, notes=tuple(notes),
            ran=replace(summary.ran, state=state), published=self._published(figures),
        )  # fmt: skip
        self.folder.write(SUMMARY, to_json(whole))

    def _state(self) -> str:
        """Return a hash of everything that a conclusion is drawn from."""
        keys = sorted([name, fold] for name, fold, curve in self.folder.results if curve is None)
        asked = {"learning_curve": self.ending.learning_curve, "test_all": self.ending.test_all}
        return hash_json({"results": keys, "choose": self.ending.choose, "asked": asked})

    def _concluded(self, state: str) -> bool:
        try:
            before, _ = read_summary(self.folder.path)
        except SweepError:
            return False
        return (
            before.complete
            and before.ran.state == state
            and exists(self.folder.path / "best" / "config.json", SweepError)
        )

    def _curves(self, named: Sequence[Candidate], others: Iterable[Candidate]) -> list[LearningCurve]:
        """Train the named heads and a baseline on shares of the rows, where that was asked for."""
        if not self.ending.learning_curve:
            return []
        majority = [candidate for candidate in others if candidate.first.head.kind == "majority"]
        baselines = [candidate for candidate in majority if candidate not in named and candidate.error() is None]
        drawn = [*named, *baselines[:1]]
        self.train(conclusion.curve_jobs(self.problem, drawn))
        return conclusion.curves(self.problem, self.folder, drawn)

    def _published(self, figures: tuple[Figure, ...] = ()) -> PublishedFacts | None:
        published = self.problem.published
        return None if published is None else PublishedFacts(published.name, self.problem.fixed, figures)

    def _choices(
        self, rows: Sequence[LeaderboardRow], chosen: LeaderboardRow, plainest: LeaderboardRow
    ) -> tuple[Choice, Choice | None]:
        """Return the chosen and the recommended head, each with the reason; a published protocol recommends none."""
        if self.problem.published is not None:
            return Choice(chosen.id, chosen.label, self.problem.fixed["choice"]), None
        group = sum(not row.distinguishable for row in rows)
        among = f"simplest of the {group} heads that cannot be told from the winner"
        best = chosen.rank == 1 and self.ending.choose == "best"
        why = f"best mean {self.problem.metric} over folds" if best else among
        alone = "the winner, and every other head can be told from it"
        return (
            Choice(chosen.id, chosen.label, why),
            Choice(plainest.id, plainest.label, among if group > 1 else alone),
        )

    def _summary(self, rows: Sequence[LeaderboardRow], failures: Sequence[Failure]) -> Summary:
        """Return the summary as it is before the conclusion."""
        problem, folder = self.problem, self.folder
        majority = [row.score for row in rows if row.head.kind == "majority"]
        better = max if problem.greater_is_better else min
        return Summary(
            format=FORMAT, version=VERSION, complete=False, task=problem.task.name, class_names=problem.class_names,
            metric=Metric(problem.metric, problem.greater_is_better),
            baseline=better(majority) if majority else None,
            data=data_facts(problem), protocol=protocol_facts(problem),
            leaderboard=tuple(rows), failures=tuple(failures), chosen=None, recommended=None, test=None,
            mistakes=None, learning_curve=(), few_shot=None,
            ran=Ran(
                command=self.command, versions=versions(), cache_spec=problem.cache.spec_hash,
                dataset=problem.dataset_hash, sweep=folder.hash,
                configurations=len({result.id for result in folder.results.values()}), fits=len(folder.results),
                started=self.started, finished=_now(), seconds=time.perf_counter() - self.begun, machine=machine(),
            ),
            notes=tuple(folder.notes), published=self._published(),
        )  # fmt: skip


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
