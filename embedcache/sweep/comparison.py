"""Results -> the leaderboard: means over folds and seeds, intervals, paired tests against the winner, the simplest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedcache.spec import FeatureSpec, TaskName
from embedcache.sweep import statistics
from embedcache.sweep.configuration import Configuration
from embedcache.sweep.problem import Problem
from embedcache.sweep.statistics import Floats, Interval
from embedcache.sweep.store import Outputs, Result, SweepFolder
from embedcache.task import task_named
from embedcache.train.metrics import metric_named, wilson
from embedcache.train.metrics.predictions import Predictions

Array = npt.NDArray[Any]
DRAWS = 1000
_FEWER_DRAWS = 300  # enough for a standard error to 4 %, which is all that the test takes from them
BOUNDS = {
    "mcc": (-1.0, 1.0), "pearson": (-1.0, 1.0), "spearman": (-1.0, 1.0), "r2": (-math.inf, 1.0),
    **dict.fromkeys(("log_loss", "mae", "rmse"), (0.0, math.inf)), "brier": (0.0, 2.0),
}  # fmt: skip
"""What a metric can be, where that is not from 0 to 1: a t interval knows no bounds."""
_ROW_METRICS = ("accuracy", "subset_accuracy", "log_loss")


@dataclass(frozen=True)
class Scored:
    """Rows that a head said something about: numbers int64 [n] of the problem's rows, outputs float32 [n, C].

    ``thresholds`` [C] are a multi-label head's own, None for one half.
    """

    rows: npt.NDArray[np.int64]
    outputs: Outputs
    thresholds: Array | None = None

    def right(self, task: TaskName, y: Array) -> Floats:
        """Return which rows are right, float64 [n], given the targets of all rows."""
        half = 0.5 if self.thresholds is None else self.thresholds
        kind = task_named(task)
        return kind.right(y[self.rows], kind.decide(self.outputs, half))


class Resampler:
    """A metric on bootstrap resamples of N rows, the same ones for every head, so that differences are paired.

    ``groups`` int64 [N]: equal contents are drawn together. A head's score is the mean over its parts (folds, seeds,
    draws), which is how the leaderboard's is made.
    """

    def __init__(self, metric: str, task: TaskName, y: Array, groups: npt.NDArray[np.int64], *, seed: int = 0) -> None:
        self._metric, self._task, self._y, self._groups, self._seed = metric, task, y, groups, seed
        self.draws = DRAWS if metric in _ROW_METRICS else _FEWER_DRAWS

    def __call__(self, heads: Sequence[Sequence[Scored]]) -> Floats:
        """Return the resampled scores of M heads, float64 [M, B]."""
        if self._metric in _ROW_METRICS:
            return self._of_rows(heads)
        prepare = metric_named(self._metric, self._task).prepare
        parts = [
            [
                (each.rows, prepare(Predictions(self._task, self._y[each.rows], each.outputs, each.thresholds)))
                for each in head
            ]
            for head in heads
        ]
        out = np.empty((len(heads), self.draws))
        at = 0
        for times in statistics.resamples(self._groups, self.draws, self._seed):
            for draw in times.astype(np.float64):
                for head, mine in enumerate(parts):
                    out[head, at] = _mean([value(draw[rows]) for rows, value in mine])
                at += 1
        return out

    def _of_rows(self, heads: Sequence[Sequence[Scored]]) -> Floats:
        """Metrics that are a mean over rows: one matrix product for each set of rows that was scored."""
        by_rows: dict[bytes, tuple[npt.NDArray[np.int64], list[tuple[int, Floats]]]] = {}
        for head, parts in enumerate(heads):
            for each in parts:
                _, members = by_rows.setdefault(each.rows.tobytes(), (each.rows, []))
                members.append((head, self._values(each)))
        total, counted = np.zeros((len(heads), self.draws)), np.zeros((len(heads), self.draws))
        at = 0
        for times in statistics.resamples(self._groups, self.draws, self._seed):
            for rows, members in by_rows.values():
                drawn = times[:, rows]
                mass = drawn.sum(axis=1, dtype=np.float64)
                values = np.stack([value for _, value in members]).astype(np.float32)
                with np.errstate(invalid="ignore", divide="ignore"):
                    scores = (values @ drawn.T) / mass
                fine = mass > 0
                for (head, _), score in zip(members, scores, strict=True):
                    total[head, at : at + len(times)][fine] += score[fine]
                    counted[head, at : at + len(times)] += fine
            at += len(times)
        with np.errstate(invalid="ignore"):
            return np.asarray(total / counted)

    def _values(self, each: Scored) -> Floats:
        if self._metric == "log_loss":
            return task_named(self._task).row_loss(self._y[each.rows], each.outputs)
        return each.right(self._task, self._y)


def _mean(values: Iterable[float]) -> float:
    kept = [value for value in values if not math.isnan(value)]
    return sum(kept) / len(kept) if kept else math.nan


@dataclass(frozen=True)
class Candidate:
    """A configuration whatever its seed, with all its results: by seed, then by fold."""

    configurations: tuple[Configuration, ...]
    results: tuple[tuple[Result, ...], ...]

    @property
    def id(self) -> str:
        """The leaderboard's id."""
        return self.configurations[0].candidate

    @property
    def first(self) -> Configuration:
        """It with its first seed."""
        return self.configurations[0]

    def error(self) -> str | None:
        """Return why it has no place in the table, if it has none."""
        every = [each for of_seed in self.results for each in of_seed]
        failed = [each.error for each in every if each.error is not None]
        if failed:
            return failed[0]
        return "its score is not defined on some fold" if any(each.score is None for each in every) else None

    def fold_scores(self) -> list[float]:
        """Return the score on each fold, the mean over seeds."""
        table = [[each.score or 0.0 for each in of_seed] for of_seed in self.results]
        return [float(each) for each in np.mean(table, axis=0)]


def candidates(folder: SweepFolder, configurations: Sequence[Configuration], folds: int) -> list[Candidate]:
    """Return the candidates among configurations of which every seed has a result on every fold."""
    groups: dict[str, list[Configuration]] = {}
    for each in configurations:
        groups.setdefault(each.candidate, []).append(each)
    out = []
    for members in groups.values():
        members = sorted(members, key=lambda each: each.train.seed)
        whole = [each for each in members if all((each.id, fold, None) in folder.results for fold in range(folds))]
        if len(whole) == len(members):
            results = tuple(tuple(folder.results[each.id, fold, None] for fold in range(folds)) for each in members)
            out.append(Candidate(tuple(members), results))
    return out


def leaderboard(
    problem: Problem, folder: SweepFolder, found: Sequence[Candidate]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of the leaderboard, best first, without what the test split says, and the failures."""
    failures = [{"id": each.id, "label": each.first.label, "error": each.error()} for each in found if each.error()]
    fine = [each for each in found if each.error() is None]
    if not fine:
        return [], failures
    sign = -1.0 if problem.greater_is_better else 1.0
    means = {each.id: float(np.mean(each.fold_scores())) for each in fine}
    # Equal scores: the plainer label first, so that the order is the same in every run.
    fine.sort(key=lambda each: (sign * means[each.id], each.first.label))
    scored = [_scored(problem, folder, each) for each in fine]
    resampler = Resampler(problem.metric, problem.task, problem.y, problem.strata.group, seed=problem.protocol.seed)
    resampled = resampler(scored)
    best = fine[0]
    tests = [None, *(_test(problem, fine[at], best, scored, at, resampled) for at in range(1, len(fine)))]
    adjusted = [None, *statistics.holm([each["p"] for each in tests if each is not None])]
    same = statistics.not_distinguishable(adjusted, problem.protocol.alpha)
    varied = _varied([each.first for each in fine])
    rows = []
    for at, each in enumerate(fine):
        interval, method = _interval(problem, each, scored[at], resampled[at])
        test = tests[at]
        rows.append({
            "rank": at + 1,
            **_described(each.first, varied),
            "seeds": [member.train.seed for member in each.configurations],
            "score": means[each.id],
            "sd": _sd(each.fold_scores()),
            "interval": _finite(interval),
            "interval_method": method,
            "fold_scores": each.fold_scores(),
            "difference": {"value": 0.0, "interval": [0.0, 0.0]} if test is None else test["difference"],
            "p": None if test is None else test["p"],
            "p_adjusted": adjusted[at],
            "p_folds": None if test is None else test["p_folds"],
            "test_method": None if test is None else test["method"],
            "distinguishable": not same[at],
            "parameters": max(result.parameters for of_seed in each.results for result in of_seed),
            "seconds": sum(result.seconds for of_seed in each.results for result in of_seed),
            "epochs": _mean_epochs(each),
            "looked_at_test": False,
            "test": None,
        })  # fmt: skip
    return rows, failures


def _described(configuration: Configuration, varied: set[str]) -> dict[str, Any]:
    feature = FeatureSpec.parse(configuration.feature) if _parses(configuration.feature) else None
    body = configuration.to_json(seed=False)
    flat = configuration.flat()
    return {
        "id": configuration.candidate,
        "label": configuration.label,
        "feature": configuration.feature,
        "pooling": feature.pooling if feature else configuration.feature,
        "layers": None if feature is None else "+".join(map(str, feature.layers or ("all",))),
        "normalize": bool(feature and feature.normalize),
        "head": body["head"],
        "train": body["train"],
        "varied": {name: value for name, value in flat.items() if name in varied},
    }  # fmt: skip


def _parses(name: str) -> bool:
    try:
        FeatureSpec.parse(name)
    except ValueError:
        return False
    return True


def _varied(configurations: Sequence[Configuration]) -> set[str]:
    """Return the settings that differ among the heads of some kind, which is what a plot can be drawn over."""
    out: set[str] = set()
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for each in configurations:
        groups.setdefault((each.head.engine, each.head.kind, each.train.solver), []).append(each.flat())
    for members in groups.values():
        for name in {name for each in members for name in each}:
            if len({repr(each.get(name)) for each in members}) > 1:
                out.add(name)
    return out


def _scored(problem: Problem, folder: SweepFolder, each: Candidate) -> list[Scored]:
    out = []
    for configuration in each.configurations:
        kept = folder.predictions(configuration.id)
        out += [Scored(np.flatnonzero(fold.score), kept[at]) for at, fold in enumerate(problem.folds)]
    return out


def _sizes(problem: Problem) -> tuple[float, float]:
    """Return the mean number of rows to learn from and to score, for the correction of Nadeau and Bengio."""
    learn = float(np.mean([int((fold.train | fold.stopping).sum()) for fold in problem.folds]))
    return learn, float(np.mean([int(fold.score.sum()) for fold in problem.folds]))


def _correction(problem: Problem) -> tuple[float, float]:
    if problem.protocol.shots is None:
        return _sizes(problem)
    # Draws of a few rows out of thousands hardly overlap: their scores are as good as independent.
    return 1.0, 0.0


def _interval(
    problem: Problem, each: Candidate, scored: Sequence[Scored], resampled: Floats
) -> tuple[Interval | None, str]:
    alpha = problem.protocol.alpha
    found = statistics.resampled_t_interval(each.fold_scores(), *_correction(problem), alpha)
    if found is not None:
        low, high = BOUNDS.get(problem.metric, (0.0, 1.0))
        return (max(low, found[0]), min(high, found[1])), "nadeau-bengio"
    return row_interval(problem.metric, problem.task, problem.y, scored, resampled, alpha)


def row_interval(
    metric: str, task: TaskName, y: Array, scored: Sequence[Scored], resampled: Floats, alpha: float
) -> tuple[Interval | None, str]:
    """Return the interval of a score over rows: the percentile bootstrap; Wilson's where all or none were right."""
    if metric == "accuracy" and len(scored) == 1:
        mine = scored[0].right(task, y)
        if len(mine) and mine.min() == mine.max():
            return wilson(float(mine.sum()), len(mine), alpha), "wilson"
    return statistics.percentile_interval(resampled, alpha), "bootstrap"


def _test(
    problem: Problem, each: Candidate, best: Candidate, scored: Sequence[Sequence[Scored]], at: int, resampled: Floats
) -> dict[str, Any]:
    """Compare a candidate with the winner on the same rows."""
    theirs = np.array(each.fold_scores()) - np.array(best.fold_scores())
    value, moved = float(theirs.mean()), resampled[at] - resampled[0]
    p_folds = statistics.resampled_t_test(theirs.tolist(), *_correction(problem))
    once = len(each.configurations) == len(best.configurations) == 1 and problem.protocol.repeats == 1
    alone = problem.strata.groups == len(problem)
    if problem.metric == "accuracy" and once and alone and problem.protocol.shots is None:
        a, b = (
            np.concatenate([part.right(problem.task, problem.y) for part in parts]) for parts in (scored[at], scored[0])
        )
        p, method = statistics.mcnemar(a > 0, b > 0), "mcnemar-exact"
    else:
        p, method = statistics.bootstrap_test(value, moved, problem.strata.groups), "paired-bootstrap"
    return {
        "difference": {
            "value": value,
            "interval": _finite(statistics.percentile_interval(moved, problem.protocol.alpha)),
        },
        "p": p, "p_folds": p_folds, "method": method,
    }  # fmt: skip


def _finite(interval: Interval | None) -> list[float] | None:
    return None if interval is None or not all(map(math.isfinite, interval)) else [float(end) for end in interval]


def _sd(scores: Sequence[float]) -> float | None:
    return float(np.std(scores, ddof=1)) if len(scores) > 1 else None


def _mean_epochs(each: Candidate) -> float | None:
    ran = [result.epochs for of_seed in each.results for result in of_seed if result.epochs is not None]
    return float(np.mean(ran)) if ran else None


def pick(rows: Sequence[Mapping[str, Any]], greater_is_better: bool) -> int:
    """Return the place of the simplest row among those that cannot be told from the winner."""
    group = [at for at, row in enumerate(rows) if not row["distinguishable"]]
    return group[statistics.simplest([dict(rows[at]) for at in group], greater_is_better)]
