"""The raw rows of an input, matched with the rows of a cache; and which of them a check looks at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedcache.cache import FeatureCache
from embedcache.errors import InputError
from embedcache.examples import Examples
from embedcache.wording import counted

Rows = npt.NDArray[np.int64]
_SHOWN = 5


@dataclass(frozen=True)
class RawRows:
    """The rows of the input in the cache's order, with what the input itself says of them.

    ``targets`` [N] are the input's labels in the cache's order of classes, the cache's where the input has none.
    ``findings`` say where input and cache disagree.
    """

    cache: FeatureCache
    targets: npt.NDArray[Any]
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    _examples: Examples | None
    _at: Rows

    def stream(self, rows: Rows) -> Iterator[bytes]:
        """Yield the contents of some rows, int64 [n]: in one pass over the input where they stand in its order."""
        at = self._at[rows]
        if self._examples is None or (np.diff(at) <= 0).any():
            yield from self.contents(rows)
        else:
            yield from self._examples.contents(at)

    def contents(self, rows: Rows) -> list[bytes]:
        """Read the contents of some rows, int64 [n] in any order, each as often as it is asked for."""
        if self._examples is None:
            kept = self.cache.inputs()
            assert kept is not None
            return [kept[int(row)] for row in rows]
        wanted, back = np.unique(self._at[rows], return_inverse=True)
        read = list(self._examples.contents(wanted))
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
    mine, theirs = (np.ascontiguousarray(each).view("V16").ravel() for each in (cache.keys(), examples.keys))
    _refuse_other_rows(cache, examples, mine, theirs)
    findings: list[str] = []
    notes: list[str] = []
    at = np.arange(len(mine))
    if len(mine) != len(theirs) or (mine != theirs).any():
        at = _by_content(mine, theirs)
        moved = np.flatnonzero(at != np.arange(len(mine)))
        ids = cache.ids()
        findings.append(
            f"order of rows: {counted(len(moved), 'row')} of the input stand at another place in the cache "
            f"(rows {_some([f'{ids[row]} of the cache is row {at[row]} of the input' for row in moved[:_SHOWN]])}"
            f"{_more(len(moved))}), so batches differ: were rows swapped or sorted?"
        )
    findings += _splits(cache, examples, at, notes)
    targets, found = _targets(cache, examples, at, notes)
    return RawRows(cache, targets, tuple(findings + found), tuple(notes), examples, at)


def _refuse_other_rows(cache: FeatureCache, examples: Examples, mine: Any, theirs: Any) -> None:
    extra, lacking = np.flatnonzero(~np.isin(theirs, mine)), np.flatnonzero(~np.isin(mine, theirs))
    if not len(extra) and not len(lacking):
        if len(mine) != len(theirs):
            raise InputError(
                f"the input has {len(theirs):,} rows and {cache.path} has {len(mine):,}, of the same contents, "
                "some of them more often in one than in the other: give the input that the cache was made from"
            )
        return
    said = []
    if len(extra):
        shown = [f"{examples.ids[row]} {_show(content)}" for row, content in
                 zip(extra[:_SHOWN].tolist(), examples.contents(extra[:_SHOWN]), strict=True)]  # fmt: skip
        said.append(
            f"{counted(len(extra), 'row')} of the input not in {cache.path} (row {_some(shown)}{_more(len(extra))})"
        )
    if len(lacking):
        ids = cache.ids()
        shown = [ids[row] for row in lacking[:_SHOWN].tolist()]
        said.append(
            f"{counted(len(lacking), 'row')} of {cache.path} not in the input (row {_some(shown)}{_more(len(lacking))})"
        )
    raise InputError(
        f"the input does not match the cache: {' and '.join(said)}: was a text changed since the extraction? "
        "Give the input that the cache was made from, or extract again to add the new rows"
    )


def _by_content(mine: Any, theirs: Any) -> Rows:
    """Return for each row of the cache the row of the input with its content; duplicates in order, place by place."""
    at = np.empty(len(mine), np.int64)
    same = mine == theirs
    at[same] = np.flatnonzero(same)
    left, right = np.flatnonzero(~same), np.flatnonzero(~same)
    ours, other = left[np.argsort(mine[left], kind="stable")], right[np.argsort(theirs[right], kind="stable")]
    if (mine[ours] == theirs[other]).all():
        at[ours] = other
        return at
    order = np.argsort(theirs, kind="stable")  # the same contents, each another number of times
    return np.asarray(order[np.searchsorted(theirs[order], mine)], np.int64)


def _splits(cache: FeatureCache, examples: Examples, at: Rows, notes: list[str]) -> Iterator[str]:
    if len(examples.split_names) == 1:
        if len(cache.split_names) > 1:
            notes.append("the input names no splits: those of the cache are used")
        return
    if absent := [name for name in examples.split_names if name not in cache.split_names]:
        raise InputError(
            f"{cache.path} has no split {absent[0]!r}, which the input has: it has {', '.join(cache.split_names)}; "
            f"give it the input's splits with embedcache relabel {cache.path} INPUT"
        )
    ours = np.array(cache.split_names)[cache.split_codes()]
    theirs = np.array(examples.split_names)[examples.split[at]]
    wrong = np.flatnonzero(ours != theirs)
    if len(wrong):
        ids = cache.ids()
        shown = [f"{ids[row]}: {theirs[row]} in the input, {ours[row]} in the cache" for row in wrong[:_SHOWN]]
        yield f"splits: {counted(len(wrong), 'row')} in another split (row {_some(shown)}{_more(len(wrong))})"


def _targets(cache: FeatureCache, examples: Examples, at: Rows, notes: list[str]) -> tuple[npt.NDArray[Any], list[str]]:
    ours = cache.targets()
    if examples.targets is None:
        notes.append("the input has no labels: those of the cache are used")
        return ours, []
    if examples.task != cache.task:
        return ours, [f"labels: the input is a {examples.task} and the cache a {cache.task}: pass --task {cache.task}"]
    theirs = examples.targets[at]
    if examples.class_names != cache.class_names:
        unknown = [name for name in examples.class_names if name not in cache.class_names]
        if unknown or cache.task != "classification":
            return ours, [
                f"labels: the input has the classes {', '.join(examples.class_names[:9])} and the cache "
                f"{', '.join(cache.class_names[:9])}"
            ]
        table = np.array([cache.class_names.index(name) for name in examples.class_names], np.int64)
        theirs = np.where(theirs < 0, -1, table[np.maximum(theirs, 0)])
    same = (theirs == ours) | ((theirs != theirs) & (ours != ours))
    wrong = np.flatnonzero(~same.reshape(len(ours), -1).all(axis=1))
    if not len(wrong):
        return theirs, []
    ids = cache.ids()
    shown = [
        f"{ids[row]}: {_label(cache, theirs[row])} in the input, {_label(cache, ours[row])} in the cache"
        for row in wrong[:_SHOWN]
    ]
    return theirs, [
        f"labels: {counted(len(wrong), 'row')} of {len(ours):,} with another label (row {_some(shown)}"
        f"{_more(len(wrong))}): were they shuffled or corrected? embedcache relabel gives the cache the input's"
    ]


def _label(cache: FeatureCache, value: Any) -> str:
    if cache.task == "classification":
        return repr(cache.class_names[int(value)]) if value >= 0 else "none"
    return str(np.asarray(value).tolist())


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
    labelled = _labelled(cache, raw.targets)
    codes = cache.split_codes()
    if split is None:
        split = next((name for name in ("validation", "test") if name in cache.split_names), cache.split_names[0])
    split = cache.split(split)
    home = "train" if "train" in cache.split_names else cache.split_names[0]
    train = np.flatnonzero((codes == cache.split_names.index(home)) & labelled)
    evaluate = np.flatnonzero((codes == cache.split_names.index(split)) & labelled)
    if len(train) < 2 or not len(evaluate):
        raise InputError(
            f"{cache.path} has too few rows to compare training: {len(train)} labelled in {home} (at least 2 needed), "
            f"{len(evaluate)} in {split} (at least 1 needed)"
        )
    if cache.task == "classification" and len(np.unique(raw.targets[train])) < 2:
        raise InputError(f"all {len(train)} training rows of {cache.path} have one class: expected at least two")
    if everything:
        return Sample(np.arange(len(cache)), train, evaluate, split)
    draw = np.random.Generator(np.random.PCG64(seed))
    chosen = _drawn(draw, train, train_rows)
    if cache.task == "classification" and len(np.unique(raw.targets[chosen])) < 2:  # one row of another class suffices
        others = train[raw.targets[train] != raw.targets[chosen[0]]]
        chosen = np.sort(np.append(chosen[1:], others[0]))
    judged = _drawn(draw, evaluate, evaluation_rows)
    have = np.union1d(chosen, judged)
    more = _drawn(draw, np.setdiff1d(np.arange(len(cache)), have), max(0, rows - len(have)))
    return Sample(np.union1d(have, more), chosen, judged, split)


def _drawn(draw: np.random.Generator, rows: Rows, count: int) -> Rows:
    return np.sort(draw.permutation(rows)[:count])


def _labelled(cache: FeatureCache, targets: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    if cache.task == "classification":
        return np.asarray(targets >= 0)
    if cache.task == "multilabel":
        return np.asarray(~(targets == 255).all(axis=1))
    return np.asarray(~np.isnan(targets).reshape(len(targets), -1).any(axis=1))


def _show(content: bytes) -> str:
    text = content.decode("utf-8", "replace")
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _some(shown: Sequence[str]) -> str:
    return ", ".join(map(str, shown))


def _more(count: int) -> str:
    return f", and {count - _SHOWN:,} more" if count > _SHOWN else ""
