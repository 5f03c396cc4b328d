"""After the comparison: the chosen head trained on all development rows, measured once on the test split, and saved."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from embedcache.errors import SweepError, TrainingError
from embedcache.fingerprint import read_json
from embedcache.heads import TrainedHead
from embedcache.journal import exists, explained, make_folder
from embedcache.sweep import statistics
from embedcache.sweep.comparison import Candidate, Resampler, Scored, row_interval
from embedcache.sweep.folds import subset
from embedcache.sweep.problem import Problem, part
from embedcache.sweep.store import SweepFolder
from embedcache.sweep.summary import measured, mistakes
from embedcache.sweep.training import Batch, Job, Trained, batches, outputs_of, train_batch
from embedcache.train.metrics import score

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Shares of the training rows at which a learning curve has points; all of them is the last."""
TESTED = "tested.json"


@dataclass(frozen=True)
class Final:
    """The chosen head on all development rows, and what the test split says of it (None where there is none)."""

    trained: Trained
    head: TrainedHead
    test: dict[str, Any] | None
    mistakes: dict[str, Any]
    few_shot: dict[str, Any] | None


def finish(problem: Problem, folder: SweepFolder, chosen: Candidate) -> Final:
    """Train the chosen head for good and look at the test split with it.

    It is trained as it was in every fold, on the rows of train and validation (in a few-shot sweep on the first draw),
    with its first seed, and calibrated on what it said out of fold.

    Raises ``TrainingError`` when it cannot be trained on these rows.
    """
    shots = problem.protocol.shots is not None
    folds = problem.folds if shots else [problem.final]
    made = [_one(problem, Job(chosen.first, fold, at)) for at, fold in enumerate(folds)]
    trained = made[0]
    if trained.head is None:
        raise TrainingError(f"{chosen.first.label} could not be trained on all rows: {trained.error}")
    head = trained.head if shots else _calibrated(problem, folder, chosen, trained.head)
    test, few = None, None
    thresholds = head.thresholds
    if len(problem.test_rows):
        x = problem.features(chosen.first.feature, problem.test_rows)
        said = head.probabilities(x)
        test = {"id": chosen.id, "label": chosen.first.label, "split": "test", **_tested(problem, said, thresholds)}
        test["trained_on"] = int((folds[0].train | folds[0].stopping).sum())
        test |= measured(problem, problem.test_y, said, thresholds if problem.task == "multilabel" else None)
        wrong = mistakes(problem, "test", problem.test_rows, problem.test_y, said, thresholds)
        if shots:
            every = [
                score(problem.metric, problem.task, problem.test_y, outputs_of(each.head, x))
                for each in made
                if each.head is not None
            ]
            few = {
                "shots": problem.protocol.shots, "draws": len(every), "scores": every,
                "score": float(np.mean(every)), "sd": float(np.std(every, ddof=1)) if len(every) > 1 else None,
            }  # fmt: skip
    else:
        rows, outputs = _out_of_fold(problem, folder, chosen)
        wrong = mistakes(problem, "out of fold", problem.rows[rows], problem.y[rows], outputs, thresholds)
    return Final(trained, head, test, wrong, few)


def _one(problem: Problem, job: Job) -> Trained:
    (batch,) = batches(problem, [job])
    (trained,) = train_batch(problem, batch)
    return trained


def _out_of_fold(problem: Problem, folder: SweepFolder, chosen: Candidate) -> tuple[Any, Any]:
    """Return rows and what the first seed said of them when they were not learnt from, in its first repeat."""
    kept = folder.predictions(chosen.first.id)
    mine = [at for at, fold in enumerate(problem.folds) if fold.repeat == 0]
    rows = np.concatenate([np.flatnonzero(problem.folds[at].score) for at in mine])
    return rows, np.concatenate([kept[at] for at in mine]).astype(np.float64)


def _calibrated(problem: Problem, folder: SweepFolder, chosen: Candidate, head: TrainedHead) -> TrainedHead:
    from embedcache.train.calibration import fit_temperature, fit_thresholds

    if problem.task == "regression" or head.spec.kind == "majority":
        return head
    rows, outputs = _out_of_fold(problem, folder, chosen)
    if problem.task == "multilabel":
        return replace(
            head, calibration={"thresholds": [float(each) for each in fit_thresholds(outputs, problem.y[rows])]}
        )
    logits = np.log(np.clip(outputs, 1e-30, 1.0))
    return replace(head, calibration={"temperature": float(fit_temperature(logits, problem.y[rows]))})


def _tested(problem: Problem, said: Any, thresholds: Sequence[float]) -> dict[str, Any]:
    """Return score and interval over the rows of the test split, equal contents drawn together."""
    extra = {"thresholds": np.asarray(thresholds)} if problem.task == "multilabel" else {}
    value = score(problem.metric, problem.task, problem.test_y, said, **extra)
    keys = np.ascontiguousarray(np.asarray(problem.cache.keys())[problem.test_rows]).view("V16").reshape(-1)
    _, groups = np.unique(keys, return_inverse=True)
    rows = np.arange(len(problem.test_y))
    scored = [Scored(rows, np.asarray(said, np.float32), extra.get("thresholds"))]
    resampler = Resampler(
        problem.metric, problem.task, problem.test_y, groups.reshape(-1).astype(np.int64), seed=problem.protocol.seed
    )
    resampler.draws = 1000
    found, method = row_interval(
        problem.metric, problem.task, problem.test_y, scored, resampler([scored])[0], problem.protocol.alpha
    )
    return {
        "rows": len(rows), "score": float(value), "interval": None if found is None else list(found),
        "interval_method": method,
    }  # fmt: skip


def test_all(problem: Problem, others: Sequence[Candidate], known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return score and interval on the test split of every candidate that was not tested before, by id."""
    jobs = [Job(each.first, problem.final, 0) for each in others if each.id not in known]
    by_id: dict[str, dict[str, Any]] = {}
    if not len(problem.test_rows):
        return by_id
    for batch in batches(problem, jobs):
        x = problem.features(batch.jobs[0].configuration.feature, problem.test_rows)
        for trained in train_batch(problem, batch):
            if trained.head is not None:
                said = outputs_of(trained.head, x)
                by_id[trained.job.configuration.candidate] = _tested(problem, said, trained.head.thresholds)
    return by_id


def read_tested(folder: SweepFolder) -> dict[str, Any]:
    """Return what was ever measured on the test split, by candidate."""
    file = folder.path / TESTED
    try:
        with explained(f"cannot read {file}", SweepError):
            return dict(read_json(file)) if exists(file, SweepError) else {}
    except (ValueError, TypeError) as error:
        if isinstance(error, SweepError):
            raise
        return {}


def curve_jobs(problem: Problem, of: Sequence[Candidate]) -> list[Job]:
    """Return the jobs of learning curves: each fold with a share of its training rows; its all is known already."""
    jobs = []
    whole = float(np.mean([int((fold.train | fold.stopping).sum()) for fold in problem.folds]))
    least = max(10, 2 * len(problem.class_names) if problem.task == "classification" else 10)
    for candidate in of:
        for share in SHARES:
            if share * whole < least:
                continue
            for at, fold in enumerate(problem.folds):
                less = subset(
                    problem.strata, fold, share, seed=problem.protocol.seed, stopping=problem.protocol.stopping_share
                )
                jobs.append(Job(candidate.first, less, at, curve=round(share * whole)))
    return jobs


def curves(problem: Problem, folder: SweepFolder, of: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Return the learning curves that the folder's results hold."""
    out = []
    for candidate in of:
        points: dict[int, list[float]] = {}
        for (name, _, curve), result in folder.results.items():
            if name == candidate.first.id and result.score is not None:
                points.setdefault(curve or 0, []).append(result.score)
        whole = points.pop(0, [])
        rows = round(float(np.mean([int((fold.train | fold.stopping).sum()) for fold in problem.folds])))
        made = []
        for count, scores in [*sorted(points.items()), (rows, whole)]:
            evaluated = float(np.mean([int(fold.score.sum()) for fold in problem.folds]))
            found = statistics.resampled_t_interval(scores, rows, evaluated, problem.protocol.alpha)
            made.append({
                "rows": count, "score": float(np.mean(scores)),
                "sd": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
                "interval": None if found is None else list(found), "scores": scores,
            })  # fmt: skip
        out.append({"id": candidate.id, "label": candidate.first.label, "points": made})
    return out


def save_best(problem: Problem, folder: SweepFolder, final: Final, row: Mapping[str, Any]) -> None:
    """Write ``best/``, the chosen head's bundle."""
    metrics: dict[str, Any] = {
        "validation": {problem.metric: row["score"], "folds": row["fold_scores"], "interval": row["interval"]}
    }
    if final.test is not None:
        metrics["test"] = {**final.test["metrics"], "intervals": {problem.metric: final.test["interval"]}}
    facts = {
        "chosen by": f"a sweep of {problem.metric}, {problem.protocol.text()}",
        "rows": f"{len(problem):,} of train and validation",
    }
    make_folder(folder.path / "best", SweepError)  # not through a link
    final.head.save_pretrained(
        folder.path / "best", metrics=json.loads(json.dumps(metrics)), history=list(final.trained.history), facts=facts
    )


__all__ = ["Batch", "Final", "curve_jobs", "curves", "finish", "part", "read_tested", "save_best", "test_all"]
