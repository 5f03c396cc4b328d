"""After the comparison: the chosen head trained on all development rows, measured once on the test split, and saved."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from embedcache.dataset import key_values
from embedcache.decoding import from_json
from embedcache.errors import SweepError, TrainingError
from embedcache.features import Features
from embedcache.fingerprint import read_json
from embedcache.heads import TrainedHead
from embedcache.journal import exists, explained, make_folder
from embedcache.sweep import statistics
from embedcache.sweep.comparison import DRAWS, Candidate, Resampler, Scored, row_interval
from embedcache.sweep.findings import measured, mistakes
from embedcache.sweep.jobs import Job, TrainedJob, batches
from embedcache.sweep.problem import Problem, subset
from embedcache.sweep.protocols import Published
from embedcache.sweep.store import SweepFolder
from embedcache.sweep.summary import (
    CurvePoint,
    FewShot,
    Figure,
    LeaderboardRow,
    LearningCurve,
    Mistakes,
    TestResult,
    TestScore,
)
from embedcache.sweep.training import outputs_of, outputs_of_each, train_batch
from embedcache.task import CLASSIFICATION, MULTILABEL, REGRESSION, Array, Floats
from embedcache.train.metrics import score

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Shares of the training rows at which a learning curve has points; all of them is the last."""
TESTED = "tested.json"


@dataclass(frozen=True)
class Final:
    """The chosen head on all development rows, and its results on the test split (None where there is none)."""

    trained: TrainedJob
    head: TrainedHead
    test: TestResult | None
    mistakes: Mistakes
    few_shot: FewShot | None


def finish(problem: Problem, folder: SweepFolder, chosen: Candidate) -> Final:
    """Train the chosen head for good and use the test split with it.

    It is trained as it was in every fold, on the rows of train and validation (in a few-shot sweep on the first draw),
    with its first seed, and calibrated on its outputs out of fold.

    Raises ``TrainingError`` when it cannot be trained on these rows.
    """
    shots, to_test = problem.protocol.shots, problem.protocol.to_test
    folds = problem.folds if shots is not None else [problem.final]
    every = [_trained(problem, Job(chosen.first, fold, number, kept=True)) for number, fold in enumerate(folds)]
    trained = every[0]
    if trained.head is None:
        raise TrainingError(f"{chosen.first.label} could not be trained on all rows: {trained.error}")
    apart = shots is None and not to_test  # else its outputs on rows apart from train and test are not there
    head = _calibrated(problem, folder, chosen, trained.head) if apart else trained.head
    if not len(problem.test_rows):
        rows, outputs = _out_of_fold(problem, folder, chosen)
        wrong = mistakes(problem, "out of fold", problem.rows[rows], problem.y[rows], outputs, head.thresholds)
        return Final(trained, head, None, wrong, None)
    x = problem.features(chosen.first.feature, problem.test_rows)
    outputs = head.probabilities(x)
    on_test, method = _tested(problem, outputs, head.thresholds)
    results = measured(problem, problem.test_y, outputs, head.thresholds)
    test = TestResult(
        **vars(results), **vars(on_test), id=chosen.id, label=chosen.first.label, split="test", interval_method=method,
        trained_on=folds[0].rows,
    )  # fmt: skip
    wrong = mistakes(problem, "test", problem.test_rows, problem.test_y, outputs, head.thresholds)
    heads = [of_draw.head for of_draw in every if of_draw.head]
    few = None if shots is None else _few_shot(problem, shots, heads, x)
    return Final(trained, head, None if to_test and shots is not None else test, wrong, few)


def _few_shot(problem: Problem, shots: int, heads: Sequence[TrainedHead], x: Features) -> FewShot:
    scores = [score(problem.metric, problem.task, problem.test_y, outputs_of(head, x)) for head in heads]
    sd = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
    return FewShot(shots, len(scores), tuple(scores), float(np.mean(scores)), sd)


def _trained(problem: Problem, job: Job) -> TrainedJob:
    (batch,) = batches(problem, [job])
    ((trained,),) = train_batch(problem, batch)
    return trained


def _out_of_fold(problem: Problem, folder: SweepFolder, chosen: Candidate) -> tuple[npt.NDArray[np.int64], Floats]:
    """Return rows and the first seed's outputs on them when they were not learnt from, in its first repeat."""
    outputs = folder.predictions(chosen.first.id)
    folds = [number for number, fold in enumerate(problem.folds) if fold.repeat == 0]
    rows = np.concatenate([np.flatnonzero(problem.folds[number].score) for number in folds])
    return rows, np.concatenate([outputs[number] for number in folds]).astype(np.float64)


def _calibrated(problem: Problem, folder: SweepFolder, chosen: Candidate, head: TrainedHead) -> TrainedHead:
    from embedcache.train.run import fit_temperature, fit_thresholds

    if problem.task is REGRESSION or head.spec.kind == "majority":
        return head
    rows, outputs = _out_of_fold(problem, folder, chosen)
    if problem.task is MULTILABEL:
        thresholds = [float(limit) for limit in fit_thresholds(outputs, problem.y[rows])]
        return replace(head, calibration={"thresholds": thresholds})
    logits = np.log(np.clip(outputs, 1e-30, 1.0))
    return replace(head, calibration={"temperature": float(fit_temperature(logits, problem.y[rows]))})


def _tested(problem: Problem, outputs: Array, thresholds: Sequence[float]) -> tuple[TestScore, str]:
    """Return score and interval over the rows of the test split, equal contents drawn together, and the method."""
    value = score(problem.metric, problem.task, problem.test_y, outputs, thresholds=thresholds)
    _, groups = np.unique(key_values(problem.cache.keys()[problem.test_rows]), return_inverse=True)
    rows = np.arange(len(problem.test_y))
    scored = [Scored(rows, np.asarray(outputs, np.float32), np.asarray(thresholds))]
    resampler = Resampler(
        problem.metric, problem.task, problem.test_y, groups.reshape(-1).astype(np.int64), seed=problem.protocol.seed
    )
    resampler.draws = DRAWS
    interval, method = row_interval(
        problem.metric, problem.task, problem.test_y, scored, resampler([scored])[0], problem.protocol.alpha
    )
    return TestScore(float(value), interval, len(rows)), method


def figures(
    problem: Problem, folder: SweepFolder, published: Published, rows: Sequence[LeaderboardRow], final: Final
) -> tuple[Figure, ...]:
    """Return what a published table prints: of every head where nothing was chosen, else of the chosen one."""
    tested = len(problem.test_rows)
    if not problem.protocol.to_test:
        assert final.test is not None  # the protocol was refused without a test split
        score, test = final.test.score, final.test
        beside = {name: _number(test.metrics.get(name)) for name in published.beside}
        return (Figure(test.label, score, None, (score,), test.interval, tested, beside),)
    out = []
    for row in rows:
        results = [result for result in folder.results.values() if result.candidate == row.id]
        values = {name: [result.metrics.get(name) for result in results] for name in published.beside}
        beside = {name: _mean(of_draws) for name, of_draws in values.items()}
        if len(problem.class_names) == 2:
            beside["ap"] = _mean(_precisions_of_decisions(problem, folder, results[0].id))
        out.append(Figure(row.label, row.score, row.sd, row.fold_scores, row.interval, tested, beside))
    return tuple(out)


def _precisions_of_decisions(problem: Problem, folder: SweepFolder, name: str) -> list[float]:
    """Return the average precision of each draw's decisions, 0 or 1: MTEB ranks rows by them, not by probabilities."""
    outputs = folder.predictions(name)
    return [
        score("average_precision", problem.task, problem.y[fold.score], np.eye(2)[outputs[number].argmax(axis=1)])
        for number, fold in enumerate(problem.folds)
    ]


def _number(value: object) -> float | None:
    return value if isinstance(value, float) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(known)) if len(known) == len(values) else None


def test_all(problem: Problem, others: Sequence[Candidate], known: Collection[str]) -> dict[str, TestScore]:
    """Return the scores on the test split, by id, of every candidate that is not ``known``: tested before."""
    jobs = [Job(candidate.first, problem.final, 0) for candidate in others if candidate.id not in known]
    by_id: dict[str, TestScore] = {}
    if not len(problem.test_rows):
        return by_id
    for batch in batches(problem, jobs):
        x = problem.features(batch.jobs[0].configuration.feature, problem.test_rows)
        for together in train_batch(problem, batch):
            there = [(trained.job, trained.head) for trained in together if trained.head is not None]
            every = outputs_of_each([head for _, head in there], x) if there else iter(())
            for (job, head), outputs in zip(there, every, strict=True):
                by_id[job.configuration.candidate], _ = _tested(problem, outputs, head.thresholds)
    return by_id


def read_tested(folder: SweepFolder) -> dict[str, TestScore]:
    """Return what was ever measured on the test split, by candidate."""
    file = folder.path / TESTED
    if not exists(file, SweepError):
        return {}
    try:
        with explained(f"cannot read {file}", SweepError):
            scores = read_json(file)
            return {name: from_json(TestScore, value) for name, value in scores.items()}
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, SweepError):
            raise
        return {}


def curve_jobs(problem: Problem, of: Sequence[Candidate]) -> list[Job]:
    """Return the jobs of learning curves: each fold with shares of its training rows; all of them is known already."""
    jobs = []
    all_rows = problem.mean_train_rows
    least = max(10, 2 * len(problem.class_names) if problem.task is CLASSIFICATION else 10)
    for candidate in of:
        for share in SHARES:
            if share * all_rows < least:
                continue
            for number, fold in enumerate(problem.folds):
                less = subset(
                    problem.strata, fold, share, seed=problem.protocol.seed, stopping=problem.protocol.stopping_share
                )
                jobs.append(Job(candidate.first, less, number, curve=round(share * all_rows)))
    return jobs


def curves(problem: Problem, folder: SweepFolder, of: Sequence[Candidate]) -> list[LearningCurve]:
    """Return the learning curves that the folder's results hold."""
    all_rows = round(problem.mean_train_rows)
    out = []
    for candidate in of:
        scores_at: dict[int, list[float]] = {}
        for (name, _, curve), result in folder.results.items():
            if name == candidate.first.id and result.score is not None:
                scores_at.setdefault(curve or 0, []).append(result.score)
        full_scores = scores_at.pop(0, [])
        points = []
        for rows, scores in [*sorted(scores_at.items()), (all_rows, full_scores)]:
            sd = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
            interval = statistics.resampled_t_interval(
                scores, all_rows, problem.mean_score_rows, problem.protocol.alpha
            )
            points.append(CurvePoint(rows, float(np.mean(scores)), sd, interval, tuple(scores)))
        out.append(LearningCurve(candidate.id, candidate.first.label, tuple(points)))
    return out


def save_best(problem: Problem, folder: SweepFolder, final: Final, row: LeaderboardRow) -> None:
    """Write ``best/``, the chosen head's bundle."""
    split = "test" if problem.protocol.to_test else "validation"
    metrics: dict[str, object] = {
        split: {problem.metric: row.score, "folds": row.fold_scores, "interval": row.interval}
    }
    if final.test is not None:
        metrics["test"] = {**final.test.metrics, "intervals": {problem.metric: final.test.interval}}
    facts = {
        "chosen by": f"a sweep of {problem.metric}, {problem.protocol.text()}",
        "rows": f"{int(problem.learnable.sum()):,} of train{' and validation' if problem.learnable.all() else ''}",
    }
    make_folder(folder.path / "best", SweepError)  # not through a link
    final.head.save_pretrained(
        folder.path / "best", metrics=json.loads(json.dumps(metrics)), history=list(final.trained.history), facts=facts
    )
