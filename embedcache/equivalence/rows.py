"""What a check works on: raw rows matched with the rows of a cache, and which of them it looks at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from embedcache.backbone import Backbone
from embedcache.cache import FeatureCache
from embedcache.dataset import key_values, renumbered
from embedcache.equivalence.bits import Array, Rows
from embedcache.errors import InputError
from embedcache.examples import Examples
from embedcache.shard import FeatureSet
from embedcache.spec import FeatureSpec, HeadSpec, TrainSpec
from embedcache.task import CLASSIFICATION, Task, task_named
from embedcache.wording import counted, listed, shortened

Keys = npt.NDArray[np.void]
_SHOWN = 5


@dataclass(frozen=True)
class RawRows:
    """The rows of the input in the cache's order, with what the input itself says of them.

    ``targets`` [N] are the input's labels in the cache's order of classes, the cache's where the input has none.
    ``findings`` say where input and cache disagree. ``examples`` is None where the cache itself keeps the contents;
    else ``numbers``, int64 [N], are the rows' numbers in it.
    """

    cache: FeatureCache
    targets: Array
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    examples: Examples | None
    numbers: Rows

    def stream(self, rows: Rows) -> Iterator[bytes]:
        """Yield the contents of some rows, int64 [n]: in one pass over the input where they stand in its order."""
        numbers = self.numbers[rows]
        if self.examples is None or (np.diff(numbers) <= 0).any():
            yield from self.contents(rows)
        else:
            yield from self.examples.contents(numbers)

    def contents(self, rows: Rows) -> list[bytes]:
        """Read the contents of some rows, int64 [n] in any order, each as often as it is asked for."""
        if self.examples is None:
            kept = self.cache.inputs()
            assert kept is not None
            return [kept[int(row)] for row in rows]
        wanted, back = np.unique(self.numbers[rows], return_inverse=True)
        read = list(self.examples.contents(wanted))
        return [read[int(place)] for place in back]


def matched(cache: FeatureCache, examples: Examples | None) -> RawRows:
    """Match an input with a cache by content; None takes the inputs that the cache itself keeps.

    Raises ``InputError`` where the one has rows or splits that the other has not, saying which and how many.
    """
    if cache.task is None:
        raise InputError(
            f"{cache.path} has no labels, and training cannot be compared without: "
            f"give it some with embedcache relabel {cache.path} INPUT"
        )
    if examples is None:
        if cache.inputs() is None:
            raise InputError(f"{cache.path} keeps no inputs: name the INPUT that it was made from")
        return RawRows(cache, cache.targets(), (), (), None, np.arange(len(cache)))
    if cache.dataset.whole is not None and cache.dataset.whole.rows == len(examples) > len(cache):
        examples = examples.select(cache.numbers())  # the cache is of a part of the input
    cached, given = key_values(cache.keys()), key_values(examples.keys)
    _refuse_other_rows(cache, examples, cached, given)
    numbers = _by_content(cached, given)
    findings: list[str] = []
    notes: list[str] = []
    if len(moved := np.flatnonzero(numbers != np.arange(len(numbers)))):
        ids = cache.ids()
        pairs = [f"{ids[row]} of the cache is row {numbers[row]} of the input" for row in moved[:_SHOWN]]
        findings.append(
            f"order of rows: {counted(len(moved), 'row')} of the input stand at another place in the cache "
            f"(rows {listed(pairs, _SHOWN, len(moved))}), so batches differ: were rows swapped or sorted?"
        )
    if len(examples.split_names) > 1:
        findings += _other_splits(cache, examples, numbers)
    elif len(cache.split_names) > 1:
        notes.append("the input names no splits: those of the cache are used")
    targets = cache.targets()
    if examples.targets is None:
        notes.append("the input has no labels: those of the cache are used")
    elif finding := _other_classes(cache, examples):
        findings.append(finding)
    else:
        targets = _targets(cache, examples, numbers)
        findings += _other_labels(cache, targets)
    return RawRows(cache, targets, tuple(findings), tuple(notes), examples, numbers)


def _refuse_other_rows(cache: FeatureCache, examples: Examples, cached: Keys, given: Keys) -> None:
    extra, lacking = np.flatnonzero(~np.isin(given, cached)), np.flatnonzero(~np.isin(cached, given))
    if not len(extra) and not len(lacking):
        if len(cached) != len(given):
            raise InputError(
                f"the input has {len(given):,} rows and {cache.path} has {len(cached):,}, of the same contents, "
                "some of them more often in one than in the other: give the input that the cache was made from"
            )
        return
    mismatches = []
    if len(extra):
        some = extra[:_SHOWN]
        rows = [f"{examples.ids[row]} {_shown(content)}" for row, content in
                zip(some.tolist(), examples.contents(some), strict=True)]  # fmt: skip
        names = listed(rows, _SHOWN, len(extra))
        mismatches.append(f"{counted(len(extra), 'row')} of the input not in {cache.path} (row {names})")
    if len(lacking):
        ids = cache.ids()
        names = listed((ids[row] for row in lacking.tolist()), _SHOWN)
        mismatches.append(f"{counted(len(lacking), 'row')} of {cache.path} not in the input (row {names})")
    raise InputError(
        f"the input does not match the cache: {' and '.join(mismatches)}: was a row changed since the extraction? "
        "Give the input that the cache was made from, or extract again to add the new rows"
    )


def _by_content(cached: Keys, given: Keys) -> Rows:
    """Return for each row of the cache the row of the input with its content; duplicates in order, place by place."""
    numbers = np.arange(len(cached))
    moved = np.flatnonzero(cached != given)
    to, of = moved[np.argsort(cached[moved], kind="stable")], moved[np.argsort(given[moved], kind="stable")]
    if (cached[to] == given[of]).all():
        numbers[to] = of
        return numbers
    order = np.argsort(given, kind="stable")  # the same contents, each another number of times
    return np.asarray(order[np.searchsorted(given[order], cached)], np.int64)


def _other_splits(cache: FeatureCache, examples: Examples, numbers: Rows) -> list[str]:
    if absent := [name for name in examples.split_names if name not in cache.split_names]:
        raise InputError(
            f"{cache.path} has no split {absent[0]!r}, which the input has: it has {', '.join(cache.split_names)}; "
            f"give it the input's splits with embedcache relabel {cache.path} INPUT"
        )
    cached = np.array(cache.split_names)[cache.split_codes()]
    given = np.array(examples.split_names)[examples.split[numbers]]
    wrong = np.flatnonzero(cached != given)
    if not len(wrong):
        return []
    ids = cache.ids()
    rows = [f"{ids[row]}: {given[row]} in the input, {cached[row]} in the cache" for row in wrong[:_SHOWN]]
    return [f"splits: {counted(len(wrong), 'row')} in another split (row {listed(rows, _SHOWN, len(wrong))})"]


def _other_classes(cache: FeatureCache, examples: Examples) -> str | None:
    """Return a finding where the input's labels are not of the cache's task and classes, so none can be compared."""
    if examples.task != cache.task:
        return f"labels: the input is a {examples.task} and the cache a {cache.task}: pass --task {cache.task}"
    known = set(examples.class_names) <= set(cache.class_names)
    if examples.class_names == cache.class_names or (known and cache.task == CLASSIFICATION.name):
        return None
    given, cached = (", ".join(names[:9]) for names in (examples.class_names, cache.class_names))
    return f"labels: the input has the classes {given} and the cache {cached}"


def _targets(cache: FeatureCache, examples: Examples, numbers: Rows) -> Array:
    """Return the input's targets in the cache's order of rows and classes."""
    assert examples.targets is not None
    targets = examples.targets[numbers]
    if examples.class_names == cache.class_names:
        return targets
    return renumbered(targets, examples.class_names, cache.class_names)


def _other_labels(cache: FeatureCache, given: Array) -> list[str]:
    cached = cache.targets()
    same = (given == cached) | ((given != given) & (cached != cached))  # NaN is the same as NaN here
    wrong = np.flatnonzero(~same.reshape(len(cached), -1).all(axis=1))
    if not len(wrong):
        return []
    ids = cache.ids()
    rows = [
        f"{ids[row]}: {_label(cache, given[row])} in the input, {_label(cache, cached[row])} in the cache"
        for row in wrong[:_SHOWN]
    ]
    return [
        f"labels: {counted(len(wrong), 'row')} of {len(cached):,} with another label "
        f"(row {listed(rows, _SHOWN, len(wrong))}): were they shuffled or corrected? "
        "embedcache relabel gives the cache the input's"
    ]


def _label(cache: FeatureCache, target: Any) -> str:
    if cache.task == CLASSIFICATION.name:
        return repr(cache.class_names[int(target)]) if target >= 0 else "none"
    return str(np.asarray(target).tolist())


@dataclass(frozen=True)
class Sample:
    """Which rows are looked at: int64 row numbers of the cache, increasing. ``features`` holds the others too."""

    features: Rows
    train: Rows
    evaluate: Rows
    split: str


def sample(
    raw: RawRows, *, rows: int, train_rows: int, evaluation_rows: int, split: str | None, everything: bool, seed: int
) -> Sample:
    """Draw the rows of a check. Raises ``InputError`` for too few rows or an unknown split."""
    cache = raw.cache
    task = task_named(cache.task or CLASSIFICATION)
    labelled = task.labelled(raw.targets)
    codes = cache.split_codes()
    if split is None:
        split = next((name for name in ("validation", "test") if name in cache.split_names), cache.split_names[0])
    split = cache.split(split)
    home = "train" if "train" in cache.split_names else cache.split_names[0]
    train, evaluate = (np.flatnonzero((codes == cache.split_names.index(name)) & labelled) for name in (home, split))
    if len(train) < 2 or not len(evaluate):
        raise InputError(
            f"{cache.path} has too few rows to compare training: {len(train)} labelled in {home} (at least 2 needed), "
            f"{len(evaluate)} in {split} (at least 1 needed)"
        )
    if task is CLASSIFICATION and len(np.unique(raw.targets[train])) < 2:
        raise InputError(f"all {len(train)} training rows of {cache.path} have one class: expected at least two")
    if everything:
        return Sample(np.arange(len(cache)), train, evaluate, split)
    draw = np.random.Generator(np.random.PCG64(seed))
    some = _drawn(draw, train, train_rows)
    if task is CLASSIFICATION and len(np.unique(raw.targets[some])) < 2:  # one row of another class suffices
        others = train[raw.targets[train] != raw.targets[some[0]]]
        some = np.sort(np.append(some[1:], others[0]))
    evaluate = _drawn(draw, evaluate, evaluation_rows)
    both = np.union1d(some, evaluate)
    more = _drawn(draw, np.setdiff1d(np.arange(len(cache)), both), max(0, rows - len(both)))
    return Sample(np.union1d(both, more), some, evaluate, split)


def _drawn(draw: np.random.Generator, rows: Rows, count: int) -> Rows:
    return np.sort(draw.permutation(rows)[:count])


def _shown(content: bytes) -> str:
    try:
        return shortened(content.decode("utf-8"))
    except UnicodeDecodeError:  # an image
        return counted(len(content), "byte")


# What a check works on: the opened cache and input, the rows that are looked at, and how both sides train.


STEPS = 10
BATCH_SIZE = 32


@dataclass(frozen=True)
class TrainingPlan:
    """How both sides train: which head on which feature set, with which settings, for how many steps.

    ``scheduled`` is how many steps the whole epochs of ``spec`` would have: the learning rate follows these.
    """

    head: HeadSpec
    feature: FeatureSet
    task: Task
    class_names: tuple[str, ...]
    spec: TrainSpec
    steps: int
    scheduled: int

    @classmethod
    def of(
        cls, cache: FeatureCache, head: HeadSpec, feature: FeatureSet, rows: int, *, steps: int | None,
        whole_epoch: bool, seed: int, optimizer: Literal["adamw", "sgd"] = "adamw",
    ) -> TrainingPlan:  # fmt: skip
        """Plan training on so many rows of a cache; ``steps`` None for 10, or at least a ``whole_epoch``."""
        size = min(BATCH_SIZE, rows)
        per_epoch = -(-rows // size)
        steps = steps or (max(STEPS, per_epoch) if whole_epoch else STEPS)
        spec = TrainSpec(
            epochs=-(-steps // per_epoch), batch_size=size, optimizer=optimizer, patience=0, seed=seed
        )  # fmt: skip
        task = task_named(cache.task or CLASSIFICATION)
        return cls(head, feature, task, tuple(cache.class_names), spec, steps, spec.epochs * per_epoch)


@dataclass(frozen=True)
class Subject:
    """A cache, the raw rows it was made from, the backbone at hand, the rows that are looked at, and the plan."""

    cache: FeatureCache
    raw: RawRows
    rows: Sample
    backbone: Backbone
    plan: TrainingPlan

    @property
    def feature_specs(self) -> list[FeatureSpec]:
        """What each feature set of the cache is made by, those of views left out."""
        return [FeatureSpec.parse(name) for name in self.cache.plain_sets]

    @property
    def views(self) -> list[FeatureSet]:
        """The views of the feature set that is trained on."""
        return self.cache.views(self.plan.feature)

    @property
    def cached_targets(self) -> Array:
        """The cache's targets of the training rows."""
        return self.cache.targets()[self.rows.train]

    @property
    def input_targets(self) -> Array:
        """The input's own targets of the training rows."""
        return self.raw.targets[self.rows.train]
