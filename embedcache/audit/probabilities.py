"""What a head says of rows that it has not learned from: out-of-fold outputs, of a sweep or of a quick linear head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from embedcache.audit.neighbours import Neighbours
from embedcache.errors import SweepError
from embedcache.features import OnDisk, Rows
from embedcache.fingerprint import differences
from embedcache.heads import TrainedHead
from embedcache.shard import FeatureSet
from embedcache.sweep.configuration import Protocol
from embedcache.sweep.problem import Problem, k_folds, strata
from embedcache.sweep.store import Outputs, SweepFolder, read_identity, read_results
from embedcache.sweep.summary import read_summary
from embedcache.task import CLASSIFICATION, REGRESSION, Array, Flags, Task
from embedcache.threads import workers
from embedcache.train.cached import CachedRows, rows_of
from embedcache.train.convex import Solution, solve, walk_folds
from embedcache.train.convex.design import by_problems
from embedcache.train.data import LabelledRows
from embedcache.wording import counted, shortened

if TYPE_CHECKING:
    from embedcache.cache import FeatureCache

PENALTIES = (1e5, 1e4, 1e3, 1e2, 10.0, 1.0, 0.1)
"""Strengths of the quick head's penalty, from the strongest on, until the log loss out of fold rises."""
_FOLDS = 5
_PART, _TEMPERATURE = 0.25, 0.1
"""How much neighbours count. On six real sets with 5 % of the labels changed a quarter finds 1 to 3 points more of them
than the head alone, and names fewer right labels; a half finds more on some and less on others (2026-11-27)."""
_BLOCK = 1 << 14


@dataclass(frozen=True, eq=False)
class OutOfFold:
    """Outputs of heads on labelled rows that they did not learn from, and a head for rows without label.

    Attributes:
        rows: int64 [n], rows of the dataset.
        outputs: float32 [n, C], probabilities, or the values of a regression.
        how: where they come from, in words.
        of_others: what gives outputs of other rows of the dataset, by their numbers.
        notes: what is to be said of them.
    """

    rows: Rows
    outputs: Outputs
    how: str
    of_others: Callable[[Rows], Outputs]
    notes: tuple[str, ...] = ()


def quick(
    cache: FeatureCache, feature: FeatureSet, task: Task, rows: Rows, keys: npt.NDArray[np.uint8], *, seed: int
) -> OutOfFold:
    """Return the out-of-fold outputs of a linear head at its optimum on labelled rows, in five stratified folds.

    Rows of equal ``keys``, u1 [n, 16], are never on both sides: a duplicate with the same wrong label would vouch for
    it. The penalty is the one of the least loss out of fold. Rows of a class that has no other rows are left out.

    Raises ``SweepError`` for fewer than two different rows, ``FeatureError`` for features that are not finite.
    """
    names = tuple(cache.class_names)
    y = cache.targets()[rows]
    notes = []
    if task is CLASSIFICATION and len(alone := _alone(keys, y, len(names))):
        notes.append(f"labels that no two different rows have cannot be judged: {counted(len(alone), 'row')}")
        kept = np.setdiff1d(np.arange(len(rows)), alone)
        rows, keys, y = rows[kept], keys[kept], y[kept]
    of = strata(keys, y, task, names)
    if of.groups < 2:
        raise SweepError("there are fewer than two different rows with a label")
    folds = k_folds(of, min(_FOLDS, of.groups), seed=seed, stopping=0.0, exact=False)
    masks = np.stack([fold.train for fold in folds])
    x, order = _matrix(cache, feature, rows, y, task, masks)
    y, masks = y[order], masks[:, order]
    best: Outputs | None = None
    least, penalty = np.inf, PENALTIES[0]
    for l2, solutions in walk_folds(x, y, PENALTIES, masks, task=task, outputs=len(names), standardize=True):
        outputs = np.empty((len(rows), len(names)), np.float32)
        for solution, mask in zip(solutions, masks, strict=True):
            outputs[~mask] = _outputs(task, solution, x, np.flatnonzero(~mask))
        loss = _loss(task, y, outputs)
        if loss >= least:
            break
        best, least, penalty = outputs, loss, l2
    assert best is not None

    def of_others(others: Rows) -> Outputs:
        whole = solve(x, y, l2=penalty, task=task, outputs=len(names), standardize=True)
        parts = rows_of(cache, others, feature).vectors()
        outputs = [_outputs(task, whole, part, np.arange(len(part))) for part in parts]
        return np.concatenate([np.zeros((0, len(names)), np.float32), *outputs])

    how = f"a linear head on {feature.name} with the penalty {penalty:g}, in {counted(len(folds), 'fold')}"
    return OutOfFold(rows[order], best, how, of_others, tuple(notes))


def with_neighbours(
    judged: OutOfFold, near: Neighbours, of_row: Rows, group: Rows, task: Task, targets: Array
) -> OutOfFold:
    """Return outputs in which the labels of the nearest neighbours have a part too; a regression's stay as they are.

    A neighbour weighs exp(cosine / 0.1), as in DINO's k-NN. Rows of the same ``group`` int64 [N], such as duplicates,
    may contradict one another, but not vouch for one another. ``of_row`` int64 [N] is each row's vector, ``targets``
    [N, ...] are all labels.
    """
    if task is REGRESSION:
        return judged
    # The first labelled row of a vector stands for it.
    standing = np.full(len(near.vector), -1, np.int64)
    standing[of_row[judged.rows[::-1]]] = judged.rows[::-1]
    outputs = np.empty_like(judged.outputs)
    for start in range(0, len(judged.rows), _BLOCK):
        rows = judged.rows[start : start + _BLOCK]
        vectors, similarity = near.vector[of_row[rows]], near.similarity[of_row[rows]]
        others = np.where(vectors >= 0, standing[vectors], -1)
        contradict = targets[others] != targets[rows, None]
        contradict = contradict if contradict.ndim == 2 else contradict.any(axis=2)
        heard = (others >= 0) & (contradict | (group[others] != group[rows, None]))
        weight = np.where(heard, np.exp(similarity / _TEMPERATURE), 0.0)
        mass = weight.sum(axis=1, keepdims=True)
        said = np.zeros((len(rows), outputs.shape[1]))
        for column in range(vectors.shape[1]):  # one neighbour of every row at a time
            labels = targets[others[:, column]]
            if task is CLASSIFICATION:
                said[np.arange(len(rows)), labels] += weight[:, column]
            else:
                said += weight[:, column, None] * (labels == 1)
        head = judged.outputs[start : start + _BLOCK]
        mixed = (1 - _PART) * head + _PART * said / np.where(mass > 0, mass, 1.0)
        outputs[start : start + _BLOCK] = np.where(mass > 0, mixed, head)
    how = f"{judged.how}, and for a quarter by the labels of {counted(near.vector.shape[1], 'nearest neighbour')}"
    return replace(judged, outputs=outputs, how=how)


def _alone(keys: npt.NDArray[np.uint8], y: Array, classes: int) -> Rows:
    """Return the rows whose class has one content only: no fold can both learn it and be asked about it."""
    contents = np.unique(np.column_stack([y.astype(">i8").view(np.uint8).reshape(len(y), 8), keys]), axis=0)
    number = np.bincount(contents[:, :8].copy().view(">i8").ravel().astype(np.int64), minlength=classes)
    return np.flatnonzero(number[y] < 2)


def _matrix(
    cache: FeatureCache, feature: FeatureSet, rows: Rows, y: Array, task: Task, masks: Flags
) -> tuple[npt.NDArray[np.floating], Rows]:
    """Return features of rows [n, D], and in which order.

    They lie in a file as the solver reads them, which takes no longer, and memory does not grow with their number.
    """
    order, _ = by_problems(masks)
    x = OnDisk(CachedRows(cache, cache.places()[rows[order]], feature), feature).mapped()
    return LabelledRows(x, y, task, tuple(cache.class_names)).matrix("the audit"), order


def _outputs(task: Task, solution: Solution, x: Array, rows: Rows) -> Outputs:
    """Return outputs of some rows of ``x``: the same bits whatever the number of threads."""

    def part(block: slice) -> Outputs:
        logits = x[rows[block]].astype(np.float64) @ solution.weight.T + solution.bias
        return task.probabilities(logits).astype(np.float32)

    with workers() as threads:
        return np.concatenate(list(threads.each(len(rows), x.shape[1], part)))


def _loss(task: Task, y: Array, outputs: Outputs) -> float:
    if task is REGRESSION:
        spread = np.where(y.std(axis=0) > 0, y.std(axis=0), 1.0)
        return float(np.square((outputs - y) / spread).mean())
    return float(task.row_loss(y, outputs).mean())


def of_sweep(cache: FeatureCache, path: Path) -> OutOfFold:
    """Return the out-of-fold outputs of the head that a sweep chose, and on test rows those of its final head.

    Raises ``SweepError`` for a sweep of another cache or other labels, without folds, or without results.
    """
    written = read_identity(path)
    summary, _ = read_summary(path)
    given = written.get("protocol")
    if not isinstance(given, dict) or given.get("kind") != "folds":
        raise SweepError(
            f"{path} has no out-of-fold probabilities of every row: run embedcache sweep CACHE --folds 5, "
            "or leave --sweep out"
        )
    protocol = Protocol(folds=given["folds"], repeats=given["repeats"], seed=given["seed"])
    problem = Problem.of(cache, str(written.get("metric")), protocol)
    if differ := differences(written, problem.identity()):
        name, old, new = differ[0]
        raise SweepError(
            f"{path} is a sweep of something else than {cache.path} ({name}: {shortened(old)}, here {shortened(new)}): "
            "sweep this cache, or leave --sweep out"
        )
    if summary.chosen is None:
        raise SweepError(f"{path} has no chosen head: run the same sweep command again")
    name = next((each.id for each in read_results(path) if each.candidate == summary.chosen.id), "")
    kept = SweepFolder(path, written).predictions(name)
    folds = {number: fold for number, fold in enumerate(problem.folds) if fold.repeat == 0}
    scored = {number: np.flatnonzero(fold.score) for number, fold in folds.items()}
    shapes = {number: (len(rows), len(problem.class_names)) for number, rows in scored.items()}
    if any(number not in kept or kept[number].shape != shape for number, shape in shapes.items()):
        raise SweepError(f"{path} lacks predictions of its chosen head: run the same sweep command again")
    head = TrainedHead.from_pretrained(path / "best")

    def of_others(others: Rows) -> Outputs:
        return head.probabilities(problem.features(head.feature.name, others)).astype(np.float32)

    rows = [problem.rows[of_fold] for of_fold in scored.values()] + [problem.test_rows]
    outputs = [kept[number] for number in scored]
    if len(problem.test_rows):
        outputs.append(of_others(problem.test_rows))
    label = summary.chosen.label
    return OutOfFold(
        np.concatenate(rows),
        np.concatenate(outputs),
        f"{label}, which the sweep chose, in {len(folds)} folds",
        of_others,
    )
