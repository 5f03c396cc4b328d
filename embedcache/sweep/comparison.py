"""The leaderboard, made from results: means over folds and seeds, intervals, paired tests against the winner."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from embedcache.features import Rows
from embedcache.spec import FeatureSpec
from embedcache.sweep import statistics
from embedcache.sweep.configuration import Configuration
from embedcache.sweep.problem import Problem
from embedcache.sweep.store import Outputs, Result, SweepFolder
from embedcache.sweep.summary import Difference, Failure, HeadFacts, Interval, LeaderboardRow
from embedcache.task import Array, Floats, Task
from embedcache.train.metrics import metric_named, percentile_interval, wilson
from embedcache.train.metrics.formulas import Predictions

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
    """A head's outputs on some rows: numbers int64 [n] of the problem's rows, outputs float32 [n, C].

    ``thresholds`` [C] are a multi-label head's own, None for one half.
    """

    rows: Rows
    outputs: Outputs
    thresholds: Array | None = None

    def right(self, task: Task, y: Array) -> Floats:
        """Return which rows are right, float64 [n], given the targets of all rows."""
        half = 0.5 if self.thresholds is None else self.thresholds
        return task.right(y[self.rows], task.decide(self.outputs, half))


class Resampler:
    """A metric on bootstrap resamples of N rows. All heads get the same resamples, so that differences are paired.

    ``groups`` int64 [N]: equal contents are drawn together. A head's score is the mean over its parts (folds, seeds,
    draws), which is how the leaderboard's is made.
    """

    def __init__(self, metric: str, task: Task, y: Array, groups: npt.NDArray[np.int64], *, seed: int = 0) -> None:
        self._metric, self._task, self._y, self._groups, self._seed = metric, task, y, groups, seed
        self.draws = DRAWS if metric in _ROW_METRICS else _FEWER_DRAWS

    def __call__(self, heads: Sequence[Sequence[Scored]]) -> Floats:
        """Return the resampled scores of M heads, float64 [M, B]."""
        if self._metric in _ROW_METRICS:
            return self._of_rows(heads)
        prepare = metric_named(self._metric, self._task).prepare
        parts = [
            [
                (part.rows, prepare(Predictions(self._task, self._y[part.rows], part.outputs, part.thresholds)))
                for part in head
            ]
            for head in heads
        ]
        out = np.empty((len(heads), self.draws))
        draws = (
            draw.astype(np.float64)
            for times in statistics.resamples(self._groups, self.draws, self._seed) for draw in times
        )  # fmt: skip
        for number, draw in enumerate(draws):
            for head, of_head in enumerate(parts):
                out[head, number] = _mean([value(draw[rows]) for rows, value in of_head])
        return out

    def _of_rows(self, heads: Sequence[Sequence[Scored]]) -> Floats:
        """Metrics that are a mean over rows: one matrix product for each set of rows that was scored."""
        by_rows: dict[bytes, tuple[npt.NDArray[np.int64], list[tuple[int, Floats]]]] = {}
        for head, parts in enumerate(heads):
            for part in parts:
                _, members = by_rows.setdefault(part.rows.tobytes(), (part.rows, []))
                members.append((head, self._values(part)))
        total, counted = np.zeros((len(heads), self.draws)), np.zeros((len(heads), self.draws))
        start = 0
        for times in statistics.resamples(self._groups, self.draws, self._seed):
            for rows, members in by_rows.values():
                drawn = times[:, rows]
                mass = drawn.sum(axis=1, dtype=np.float64)
                values = np.stack([value for _, value in members]).astype(np.float32)
                with np.errstate(invalid="ignore", divide="ignore"):
                    scores = (values @ drawn.T) / mass
                drawn_at_all = mass > 0
                block = slice(start, start + len(times))
                for (head, _), score in zip(members, scores, strict=True):
                    total[head, block][drawn_at_all] += score[drawn_at_all]
                    counted[head, block] += drawn_at_all
            start += len(times)
        with np.errstate(invalid="ignore"):
            return np.asarray(total / counted)

    def _values(self, part: Scored) -> Floats:
        if self._metric == "log_loss":
            return self._task.row_loss(self._y[part.rows], part.outputs)
        return part.right(self._task, self._y)


def _mean(values: Iterable[float]) -> float:
    kept = [value for value in values if not math.isnan(value)]
    return sum(kept) / len(kept) if kept else math.nan


@dataclass(frozen=True)
class Candidate:
    """A configuration with all its seeds and their results: by seed, then by fold."""

    configurations: tuple[Configuration, ...]
    results: tuple[tuple[Result, ...], ...]

    @property
    def id(self) -> str:
        """The leaderboard's id."""
        return self.configurations[0].candidate

    @property
    def first(self) -> Configuration:
        """The configuration with the first seed."""
        return self.configurations[0]

    def error(self) -> str | None:
        """Return why it cannot be ranked, None where it can."""
        for result in self.every_result:
            if result.error is not None:
                return result.error
        undefined = any(result.score is None for result in self.every_result)
        return "its score is not defined on some fold" if undefined else None

    @property
    def every_result(self) -> list[Result]:
        """The results of all seeds on all folds."""
        return [result for of_seed in self.results for result in of_seed]

    def fold_scores(self) -> list[float]:
        """Return the score on each fold, the mean over seeds."""
        table = [[result.score or 0.0 for result in of_seed] for of_seed in self.results]
        return [float(score) for score in np.mean(table, axis=0)]


def candidates(folder: SweepFolder, configurations: Sequence[Configuration], folds: int) -> list[Candidate]:
    """Return the candidates that are complete: every seed has a result on every fold."""
    groups: dict[str, list[Configuration]] = {}
    for configuration in configurations:
        groups.setdefault(configuration.candidate, []).append(configuration)
    out = []
    for members in groups.values():
        members.sort(key=lambda member: member.train.seed)
        keys = [[(member.id, fold, None) for fold in range(folds)] for member in members]
        if all(key in folder.results for of_seed in keys for key in of_seed):
            results = tuple(tuple(folder.results[key] for key in of_seed) for of_seed in keys)
            out.append(Candidate(tuple(members), results))
    return out


def leaderboard(
    problem: Problem, folder: SweepFolder, tried: Sequence[Candidate]
) -> tuple[list[LeaderboardRow], list[Failure]]:
    """Return the rows of the leaderboard, best first, without scores on the test split, and the failures."""
    reasons = [(candidate, candidate.error()) for candidate in tried]
    failures = [Failure(candidate.id, candidate.first.label, error) for candidate, error in reasons if error]
    ranked = [candidate for candidate, error in reasons if error is None]
    if not ranked:
        return [], failures
    sign = -1.0 if problem.greater_is_better else 1.0
    means = {candidate.id: float(np.mean(candidate.fold_scores())) for candidate in ranked}
    # Equal scores: the plainer label first, so that the order is the same in every run; of a published grid what its
    # code meets first and keeps: the strongest penalty, the smallest head, the lowest learning rate.
    first = {candidate.id: _met(candidate) if problem.published else () for candidate in ranked}
    ranked.sort(key=lambda candidate: (sign * means[candidate.id], first[candidate.id], candidate.first.label))
    scored = [_scored(problem, folder, candidate) for candidate in ranked]
    resampler = Resampler(problem.metric, problem.task, problem.y, problem.strata.group, seed=problem.protocol.seed)
    resampled = resampler(scored)
    heads = [Compared(*parts) for parts in zip(ranked, scored, resampled, strict=True)]
    tests = [_test(problem, head, heads[0]) for head in heads[1:]]
    adjusted = [None, *statistics.holm([test.p for test in tests])]
    same = statistics.not_distinguishable(adjusted, problem.protocol.alpha)
    varied = _varied([candidate.first for candidate in ranked])
    rows = [
        _row(problem, head, means[head.candidate.id], varied, test)
        for head, test in zip(heads, [_WINNER, *tests], strict=True)
    ]
    return [
        replace(row, rank=place + 1, p_adjusted=adjusted[place], distinguishable=not same[place])
        for place, row in enumerate(rows)
    ], failures


def _met(candidate: Candidate) -> tuple[float, ...]:
    train = candidate.first.train
    return -train.l2, max(result.parameters for result in candidate.every_result), train.learning_rate


@dataclass(frozen=True)
class Compared:
    """A candidate with its outputs by fold and seed, and its score on bootstrap resamples [B]."""

    candidate: Candidate
    scored: Sequence[Scored]
    resampled: Floats


@dataclass(frozen=True)
class PairedTest:
    """A candidate against the winner on the same rows; ``p`` is 1 and the method None for the winner itself."""

    difference: Difference
    p: float
    p_folds: float | None
    method: str | None


_WINNER = PairedTest(Difference(0.0, (0.0, 0.0)), 1.0, None, None)


def _row(problem: Problem, head: Compared, score: float, varied: Collection[str], test: PairedTest) -> LeaderboardRow:
    """Return a row; its rank and what comes from all p values together are put in afterwards."""
    candidate = head.candidate
    configuration, folds = candidate.first, candidate.fold_scores()
    results = candidate.every_result
    epochs = [result.epochs for result in results if result.epochs is not None]
    parsed = _parsed(configuration.feature)
    interval, method = _interval(problem, head)
    return LeaderboardRow(
        rank=0,
        id=candidate.id,
        label=configuration.label,
        feature=configuration.feature,
        pooling=parsed.pooling if parsed else configuration.feature,
        layers=None if parsed is None else "+".join(map(str, parsed.layers or ("all",))),
        normalize=parsed is not None and parsed.normalize,
        head=HeadFacts(configuration.head.kind, configuration.head.engine, dict(configuration.head.options)),
        train=configuration.settings,
        varied={name: value for name, value in configuration.flat().items() if name in varied},
        seeds=tuple(member.train.seed for member in candidate.configurations),
        score=score,
        sd=float(np.std(folds, ddof=1)) if len(folds) > 1 else None,
        interval=_finite(interval),
        interval_method=method,
        fold_scores=tuple(folds),
        difference=test.difference,
        p=None if test.method is None else test.p,
        p_adjusted=None,
        p_folds=test.p_folds,
        test_method=test.method,
        distinguishable=False,
        parameters=max(result.parameters for result in results),
        seconds=sum(result.seconds for result in results),
        epochs=float(np.mean(epochs)) if epochs else None,
    )


def _parsed(name: str) -> FeatureSpec | None:
    try:
        return FeatureSpec.parse(name)
    except ValueError:  # features that were made elsewhere have names of their own
        return None


def _varied(configurations: Sequence[Configuration]) -> set[str]:
    """Return the settings that differ among the heads of some kind, which is what a plot can be drawn over."""
    out: set[str] = set()
    groups: dict[tuple[str, str, str], list[dict[str, object]]] = {}
    for configuration in configurations:
        head = configuration.head
        groups.setdefault((head.engine, head.kind, configuration.train.solver), []).append(configuration.flat())
    for members in groups.values():
        names = {name for settings in members for name in settings}
        out |= {name for name in names if len({repr(settings.get(name)) for settings in members}) > 1}
    return out


def _scored(problem: Problem, folder: SweepFolder, candidate: Candidate) -> list[Scored]:
    out = []
    for configuration in candidate.configurations:
        outputs = folder.predictions(configuration.id)
        out += [Scored(np.flatnonzero(fold.score), outputs[number]) for number, fold in enumerate(problem.folds)]
    return out


def _correction(problem: Problem) -> tuple[float, float]:
    """Return the mean numbers of rows to learn from and to score, for the correction of Nadeau and Bengio."""
    if problem.protocol.shots is None:
        return problem.mean_train_rows, problem.mean_score_rows
    # Draws of a few rows out of thousands hardly overlap: their scores are as good as independent.
    return 1.0, 0.0


def _interval(problem: Problem, head: Compared) -> tuple[Interval | None, str]:
    alpha = problem.protocol.alpha
    ends = statistics.resampled_t_interval(head.candidate.fold_scores(), *_correction(problem), alpha)
    if ends is not None:
        low, high = BOUNDS.get(problem.metric, (0.0, 1.0))
        return (max(low, ends[0]), min(high, ends[1])), "nadeau-bengio"
    return row_interval(problem.metric, problem.task, problem.y, head.scored, head.resampled, alpha)


def row_interval(
    metric: str, task: Task, y: Array, scored: Sequence[Scored], resampled: Floats, alpha: float
) -> tuple[Interval | None, str]:
    """Return the interval of a score over rows: the percentile bootstrap; Wilson's where all or none were right."""
    if metric == "accuracy" and len(scored) == 1:
        right = scored[0].right(task, y)
        if len(right) and right.min() == right.max():  # the bootstrap would see no spread at all
            return wilson(float(right.sum()), len(right), alpha), "wilson"
    return percentile_interval(resampled, alpha), "bootstrap"


def _test(problem: Problem, head: Compared, best: Compared) -> PairedTest:
    """Compare a candidate with the winner on the same rows."""
    differences = np.array(head.candidate.fold_scores()) - np.array(best.candidate.fold_scores())
    value, resampled = float(differences.mean()), head.resampled - best.resampled
    p_folds = statistics.resampled_t_test(differences.tolist(), *_correction(problem))
    one_seed = len(head.candidate.configurations) == len(best.candidate.configurations) == 1
    one_answer_a_row = one_seed and problem.protocol.repeats == 1 and problem.protocol.shots is None
    # McNemar's test takes rows to be independent: equal contents are not.
    if problem.metric == "accuracy" and one_answer_a_row and problem.strata.groups == len(problem):
        right = [
            np.concatenate([part.right(problem.task, problem.y) for part in compared.scored]) > 0
            for compared in (head, best)
        ]
        p, method = statistics.mcnemar(*right), "mcnemar-exact"
    else:
        p, method = statistics.bootstrap_test(value, resampled, problem.strata.groups), "paired-bootstrap"
    interval = percentile_interval(resampled, problem.protocol.alpha)
    return PairedTest(Difference(value, _finite(interval)), p, p_folds, method)


def _finite(interval: Interval | None) -> Interval | None:
    if interval is None or not all(map(math.isfinite, interval)):
        return None
    return float(interval[0]), float(interval[1])


KIND_ORDER = (
    "majority", "linear", "logistic-regression", "ridge", "linear-svm", "lda", "nearest-centroid", "random-projection",
    "layer-mix", "layer-concat", "mlp", "residual", "attention-pooling", "attention", "hist-gradient-boosting", "knn",
)  # fmt: skip
"""From simple to complex, where two heads have the same number of parameters; a kind of your own comes last."""


def simplest(rows: Sequence[LeaderboardRow], greater_is_better: bool) -> LeaderboardRow:
    """Return the simplest row: fewest parameters, then ``KIND_ORDER``, then the best score."""

    def cost(row: LeaderboardRow) -> tuple[int, int, float]:
        order = KIND_ORDER.index(row.head.kind) if row.head.kind in KIND_ORDER else len(KIND_ORDER)
        return row.parameters, order, -row.score if greater_is_better else row.score

    return min(rows, key=cost)
