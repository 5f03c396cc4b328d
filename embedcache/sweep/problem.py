"""The labelled rows of a cache that heads are compared on, and their division into folds.

Everything is decided by a row's content key, its label and a seed, never by its place: another order of the rows gives
every row the same fold. Rows of equal content are one *group*, which is never divided. Protocols of published tables
alone draw by place, as their authors did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from embedcache.dataset import key_values, mixed
from embedcache.errors import SweepError, SweepSpecError
from embedcache.features import Features, Rows
from embedcache.fingerprint import sha256_bytes
from embedcache.spec import TrainSpec
from embedcache.sweep.configuration import Protocol
from embedcache.sweep.protocols import Published
from embedcache.task import CLASSIFICATION, MULTILABEL, Array, Flags, Task, task_named
from embedcache.train.cached import rows_of
from embedcache.train.metrics import metric_named
from embedcache.wording import counted

if TYPE_CHECKING:
    from embedcache.cache import FeatureCache


# Which rows a head learns from and which it is scored on: folds, few-shot draws, subsets for learning curves.


_BINS = 10  # strata of a regression target


@dataclass(frozen=True)
class Fold:
    """One division of N development rows: bool [N] masks of the rows to learn from, to stop early by, and to score.

    ``stopping`` may be empty. The three never share a row, nor a content. ``repeat`` says which repeat or draw it is.
    ``order`` has the rows of ``train`` in the order in which a protocol drew them, which moves a sum's last bits.
    """

    train: Flags
    stopping: Flags
    score: Flags
    repeat: int = 0
    order: Rows | None = None

    @property
    def learned(self) -> Rows:
        """The rows a head may use, as numbers in the order in which it gets them."""
        return np.flatnonzero(self.usable) if self.order is None else self.order

    @property
    def usable(self) -> Flags:
        """Which rows a head may use: those to learn from and those to stop early by."""
        return self.train | self.stopping

    @property
    def rows(self) -> int:
        """How many rows a head may use."""
        return int(self.usable.sum())


@dataclass(frozen=True)
class Strata:
    """The basis of the division: each row's ``group`` and ``stratum`` int64 [N], and ``keys`` uint64 [G] of the groups.

    ``names`` are those of the strata, for messages.
    """

    group: Rows
    stratum: Rows
    keys: npt.NDArray[np.uint64]
    names: tuple[str, ...]

    @property
    def groups(self) -> int:
        """How many different contents there are."""
        return len(self.keys)


def strata(keys: npt.NDArray[np.uint8], y: Array, task: Task, names: Sequence[str]) -> Strata:
    """Return groups and strata of rows by their keys u1 [N, 16] and targets.

    A stratum is a class; the rarest of a row's labels (the first step of iterative stratification, Sechidis et al.
    2011); or a tenth of the first regression target. A group takes the smallest stratum among its rows.
    """
    contents, group = np.unique(key_values(keys), return_inverse=True)
    short = np.ascontiguousarray(contents).view(np.uint8).reshape(-1, 16)[:, :8].copy().view("<u8").reshape(-1)
    group = group.reshape(-1).astype(np.int64)
    if task is CLASSIFICATION:
        stratum, titles = y.astype(np.int64), tuple(names)
    elif task is MULTILABEL:
        counts = y.sum(0)
        rank = np.argsort(np.argsort(counts, kind="stable"), kind="stable")
        cost = np.where(y > 0, rank[None, :], len(names))
        stratum = np.where(y.any(1), cost.argmin(1), len(names)).astype(np.int64)
        titles = (*names, "no label")
    else:
        edges = np.quantile(y[:, 0], np.linspace(0, 1, _BINS + 1)[1:-1])
        stratum = np.searchsorted(edges, y[:, 0], side="right").astype(np.int64)
        titles = tuple(f"tenth {tenth}" for tenth in range(1, _BINS + 1))
    lowest = np.full(len(contents), len(titles), np.int64)
    np.minimum.at(lowest, group, stratum)
    return Strata(group, lowest[group], short, titles)


def k_folds(
    of: Strata, folds: int, repeats: int = 1, *, seed: int = 0, stopping: float = 0.1, exact: bool = True
) -> list[Fold]:
    """Return ``folds * repeats`` stratified folds by group.

    ``exact`` refuses a stratum of fewer groups than folds: some fold could not score it.

    Raises ``SweepError`` for fewer than two folds, or more folds than a class has different rows, naming it.
    """
    if folds < 2:
        raise SweepError(f"folds is {folds}: expected at least 2, or 1 for the cache's own validation split")
    if of.groups < folds:
        raise SweepError(f"{folds} folds of {of.groups} different rows: ask for at most {of.groups} folds")
    stratum = _group_strata(of)
    if exact:
        counts = np.bincount(stratum, minlength=len(of.names))
        short = [label for label in np.flatnonzero(counts) if counts[label] < folds]
        if short:
            worst = min(short, key=lambda label: counts[label])
            raise SweepError(
                f"{counted(folds, 'fold')}, but the class {of.names[worst]!r} has {counts[worst]} different "
                f"{'row' if counts[worst] == 1 else 'rows'} in train and validation: "
                f"ask for --folds {max(2, int(counts[worst]))} at most, or --folds 1 for the validation split"
                if counts[worst] > 1
                else f"{folds} folds, but the class {of.names[worst]!r} has 1 different row in train and validation: "
                "no folds can hold it on both sides; add rows, drop the class, or use --folds 1"
            )
    sizes = np.bincount(of.group, minlength=of.groups)
    out = []
    for repeat in range(repeats):
        order = _order(of, seed, repeat)
        fold_of = np.empty(of.groups, np.int64)
        totals = np.zeros(folds, np.int64)
        for label in range(len(of.names)):
            members = order[stratum[order] == label]
            if len(members):
                fold_of[members] = _deal(sizes[members], folds, totals)
        assigned = fold_of[of.group]
        for fold in range(folds):
            score = assigned == fold
            out.append(Fold(*_hold_out(of, ~score, stopping, seed), score, repeat))
    return out


def _group_strata(of: Strata) -> Rows:
    stratum = np.empty(of.groups, np.int64)
    stratum[of.group] = of.stratum
    return stratum


def _order(of: Strata, *seeds: int) -> Rows:
    """Return the groups in an order that only their content and the seeds decide."""
    ranks = of.keys
    for seed in seeds:  # neighbouring ones give unrelated orders
        ranks = mixed(ranks + np.uint64((seed * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) % 2**64))
    return np.argsort(ranks, kind="stable")


def _deal(sizes: Rows, folds: int, totals: Rows) -> Rows:
    """Give groups of one stratum to folds so that their rows are as even as can be, ``totals`` [folds] too.

    Groups of several rows go first, each to the emptiest fold; single rows then level what is left.
    """
    fold_of = np.empty(len(sizes), np.int64)
    counts = np.zeros(folds, np.int64)
    several = np.flatnonzero(sizes > 1)
    for group in several[np.argsort(-sizes[several], kind="stable")]:
        emptiest_fold = min(range(folds), key=lambda fold: (counts[fold], totals[fold], fold))
        fold_of[group] = emptiest_fold
        counts[emptiest_fold] += sizes[group]
        totals[emptiest_fold] += sizes[group]
    single = np.flatnonzero(sizes == 1)
    # Level by level: the k-th single row of a fold costs its count so far; the cheapest places are taken.
    left = len(single)
    shares = np.zeros(folds, np.int64)
    while left:
        level = counts + shares
        low = np.flatnonzero(level == level.min())
        higher = level[level > level.min()]
        room = (int(higher.min()) - int(level.min())) * len(low) if len(higher) else left
        if min(left, room) >= len(low):
            rows_each = min(left, room) // len(low)
            shares[low] += rows_each
            left -= rows_each * len(low)
        else:
            emptiest = low[np.argsort(totals[low] + shares[low], kind="stable")][:left]
            shares[emptiest] += 1
            left = 0
    fold_of[single] = np.repeat(np.arange(folds), shares)
    totals += shares
    return fold_of


def _hold_out(of: Strata, among: Flags, share: float, seed: int) -> tuple[Flags, Flags]:
    """Divide rows into those to learn from and a share of every stratum, rounded down, to stop early by."""
    stopping = among & _first(of, among, share, (seed, 7919))
    return among & ~stopping, stopping


def _first(of: Strata, among: Flags, share: float, seeds: tuple[int, ...], at_least: int = 0) -> Flags:
    """Return the rows of the first ``share`` of each stratum's groups among some rows, in an order by content."""
    inside = np.zeros(of.groups, bool)
    inside[of.group[among]] = True
    order = _order(of, *seeds)
    order = order[inside[order]]
    stratum = _group_strata(of)[order]
    chosen = np.zeros(of.groups, bool)
    for label in np.unique(stratum):
        members = order[stratum == label]
        chosen[members[: max(at_least, int(share * len(members) + 1e-9))]] = True
    return chosen[of.group]


def given_split(of: Strata, train: Flags, validation: Flags, *, seed: int = 0, stopping: float = 0.1) -> list[Fold]:
    """Return the cache's own division: learn from train, score validation.

    A row of train whose content is in validation too is left out of training.

    Raises ``SweepError`` when either is empty.
    """
    twins = np.isin(of.group, of.group[validation])
    learn = train & ~twins
    if not learn.any() or not validation.any():
        raise SweepError("--folds 1 needs rows in train and in validation: split the input, or ask for --folds 5")
    return [Fold(*_hold_out(of, learn, stopping, seed), validation)]


def shots(of: Strata, per_class: int, draws: int, *, seed: int = 0) -> list[Fold]:
    """Return ``draws`` few-shot divisions: learn from ``per_class`` different rows a class, score all others.

    Raises ``SweepError`` when a class has fewer rows than that, naming it, or nothing is left to score.
    """
    if per_class < 1 or draws < 1:
        raise SweepSpecError(f"--shots {per_class} --draws {draws}: expected at least 1 of each")
    stratum = _group_strata(of)
    counts = np.bincount(stratum, minlength=len(of.names))
    for label in np.flatnonzero(counts):
        members = int(counts[label])
        if members <= per_class:
            raise SweepError(
                f"--shots {per_class}, but the class {of.names[label]!r} has {members} different rows in train and "
                f"validation, and some must be left to score: ask for --shots {max(1, members - 1)} at most"
            )
    first = np.zeros(len(of.group), bool)
    first[np.unique(of.group, return_index=True)[1]] = True
    out = []
    for draw in range(draws):
        order = _order(of, seed, draw, 104729)
        drawn = np.zeros(of.groups, bool)
        for label in np.flatnonzero(counts):
            drawn[order[stratum[order] == label][:per_class]] = True
        rows = drawn[of.group]
        out.append(Fold(rows & first, np.zeros(len(rows), bool), ~rows, draw))
    return out


def mteb_draws(y: Array, train: Flags, score: Flags, per_class: int, draws: int, *, seed: int) -> list[Fold]:
    """Return MTEB's draws of ``per_class`` train rows a class, all there are of a smaller one; score the test rows.

    Every draw shuffles the order that the last one left, by a generator that begins again from the seed
    (``AbsTaskClassification._undersample_data`` of mteb 2), and takes the first rows of each class.
    """
    rows, out = np.flatnonzero(train), []
    for draw in range(draws):
        np.random.RandomState(seed).shuffle(rows)
        labels = y[rows]
        drawn = np.sort(np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in np.unique(labels)]))
        learn = np.zeros(len(y), bool)
        learn[rows[drawn]] = True
        out.append(Fold(learn, np.zeros(len(y), bool), score, draw, rows[drawn]))
    return out


def random_share(rows: int, share: float, seed: int) -> Flags:
    """Return a random share of rows, rounded down, as DINOv2 holds it out of train (``eval/log_regression.py``)."""
    import torch

    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).numpy()
    chosen = np.zeros(rows, bool)
    chosen[order[: int(rows * share + 1e-9)]] = True
    return chosen


def subset(of: Strata, fold: Fold, share: float, *, seed: int = 0, stopping: float = 0.1) -> Fold:
    """Return a fold that learns from a share of the rows, of every stratum at least one; larger shares hold smaller."""
    rows = fold.usable & _first(of, fold.usable, share, (seed, 15485863), at_least=1)
    return Fold(*_hold_out(of, rows, stopping if fold.stopping.any() else 0.0, seed), fold.score, fold.repeat)


@dataclass(frozen=True, eq=False)
class Problem:
    """Labelled rows of a cache: N for choosing (``rows``, in train and validation) and those of the test split.

    ``y`` are the targets of ``rows``; ``test_rows`` is empty where there is no test split. Where a ``published``
    protocol scores on the test split, ``rows`` are those of train and test, and ``validation`` marks the latter;
    ``fixed`` is what it fixes, in words.
    """

    cache: FeatureCache
    task: Task
    class_names: tuple[str, ...]
    rows: Rows
    y: Array
    validation: Flags
    strata: Strata
    test_rows: Rows
    test_y: Array
    metric: str
    protocol: Protocol
    published: Published | None = None
    fixed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        cache: FeatureCache,
        metric: str | None = None,
        protocol: Protocol | None = None,
        published: Published | None = None,
    ) -> Problem:
        """Look at a cache. Raises ``SweepError`` without labels or rows to learn from, ``SpecError`` for a metric."""
        if cache.task is None:
            raise SweepError(f"{cache.path} has no labels: give it some with embedcache relabel {cache.path} INPUT")
        plan = protocol or Protocol()
        task = task_named(cache.task)
        name = metric or task.headline_metric
        metric_named(name, task)
        targets, codes = cache.targets(), cache.split_codes()
        labelled = task.labelled(targets)
        by_name = {split: codes == code for code, split in enumerate(cache.split_names)}
        none = np.zeros(len(codes), bool)
        train, validation = by_name.get("train", none), by_name.get("test" if plan.to_test else "validation", none)
        rows = np.flatnonzero((train | validation) & labelled)
        if not len(rows):
            raise SweepError(f"{cache.path} has no labelled row in train or validation: there is nothing to learn from")
        if task is CLASSIFICATION and len(np.unique(targets[rows])) < 2:
            only = cache.class_names[int(targets[rows[0]])]
            raise SweepError(f"every row of train and validation has the class {only!r}: expected at least two classes")
        scored = validation[rows]
        if scored.any():
            plan = replace(plan, held_out=None)
        elif plan.held_out is not None:
            scored = random_share(len(rows), plan.held_out, plan.seed)
        keys = np.asarray(cache.keys())
        test = np.flatnonzero(by_name.get("test", none) & labelled)
        return cls(
            cache, task, tuple(cache.class_names), rows, targets[rows], scored,
            strata(keys[rows], targets[rows], task, cache.class_names), test, targets[test], name,
            plan, published,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def greater_is_better(self) -> bool:
        """The direction of the metric."""
        return metric_named(self.metric, self.task).greater_is_better

    @cached_property
    def folds(self) -> list[Fold]:
        """The divisions by which heads are compared. Raises ``SweepError`` where the rows do not allow them."""
        plan = self.protocol
        if plan.to_test and plan.shots is not None:
            return mteb_draws(self.y, ~self.validation, self.validation, plan.shots, plan.draws, seed=plan.seed)
        if plan.to_test:
            return [Fold(~self.validation, np.zeros(len(self), bool), self.validation)]
        if plan.shots is not None:
            if self.task is not CLASSIFICATION:
                raise SweepError(f"--shots draws rows of each class, and this is {self.task}: use --learning-curve")
            return shots(self.strata, plan.shots, plan.draws, seed=plan.seed)
        seed, stopping = plan.seed, plan.stopping_share
        if plan.folds == 1:
            return given_split(self.strata, ~self.validation, self.validation, seed=seed, stopping=stopping)
        exact = self.task is CLASSIFICATION
        return k_folds(self.strata, plan.folds, plan.repeats, seed=seed, stopping=stopping, exact=exact)

    @cached_property
    def mean_train_rows(self) -> float:
        """Rows to learn from, a fold."""
        return float(np.mean([fold.rows for fold in self.folds]))

    @cached_property
    def mean_score_rows(self) -> float:
        """Rows to score, a fold."""
        return float(np.mean([int(fold.score.sum()) for fold in self.folds]))

    @property
    def learnable(self) -> Flags:
        """Which rows a head may ever learn from, bool [N]: all of train and validation."""
        alone = self.protocol.to_test or not self.protocol.refit
        return ~self.validation if alone else np.ones(len(self), bool)

    @cached_property
    def final(self) -> Fold:
        """All rows to learn from, less the share to stop early by: how the chosen head is trained for the test."""
        everything = self.learnable
        nothing = np.zeros(len(self), bool)
        whole = Fold(everything, nothing, nothing)
        if self.protocol.shots is not None or self.protocol.to_test:
            return whole
        if not self.protocol.refit:
            return replace(self.folds[0], score=nothing)
        # A subset that leaves nothing out, so that the held-out share is drawn as it is in every fold.
        stopping = Fold(everything, everything, nothing)
        return subset(
            self.strata, stopping, 1.0, seed=self.protocol.seed, stopping=self.protocol.stopping_share
        )  # fmt: skip

    def features(self, name: str, rows: Rows) -> Features:
        """Return a feature set of some rows: a map where they lie together, on disk where they do not fit in memory."""
        feature = self.cache.feature(name)
        return rows_of(self.cache, rows, feature, 1 + len(self.cache.views(feature)))

    def views(self, name: str, train: TrainSpec) -> list[Features]:
        """Return the features of those views of ``rows`` that are trained on."""
        sets = self.cache.views(self.cache.feature(name))
        return [rows_of(self.cache, self.rows, view, 1 + len(sets)) for view in sets[: train.of_views(len(sets))]]

    @cached_property
    def dataset_hash(self) -> str:
        """What rows, labels and splits there are: the sha256 of their keys, targets and split names."""
        order = np.concatenate([self.rows, self.test_rows])
        keys = np.ascontiguousarray(np.asarray(self.cache.keys())[order])
        targets = np.ascontiguousarray(np.concatenate([self.y, self.test_y]))
        sizes = f"{len(self.rows)},{len(self.test_rows)},{targets.dtype.str},{targets.shape}".encode()
        return sha256_bytes(b"".join([sizes, keys.tobytes(), targets.tobytes(), self.validation.tobytes()]))

    def identity(self) -> dict[str, object]:
        """Return what must be the same for results to belong together; no path and no time is in it."""
        return {
            "cache": {"spec": self.cache.spec_hash, "dataset": self.dataset_hash},
            "task": self.task.name,
            "class_names": list(self.class_names),
            "metric": self.metric,
            "protocol": self.protocol.to_json(),
            **({} if self.published is None else {"published": self.published.name}),
        }
