"""Which rows are compared on: labelled, in splits, sampled by content, in nested fractions."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedcache.dataset import Packed, mixed
from embedcache.errors import InputError, SpecError, TrainingError
from embedcache.examples import Examples
from embedcache.fingerprint import hash_json, sha256_bytes
from embedcache.spec import SPLITS
from embedcache.task import CLASSIFICATION, Array, Task

Rows = npt.NDArray[np.int64]

FEWEST = 2
"""Labelled rows that validation and test must have: with fewer, no metric means anything at all."""


def checked_rows(examples: Examples, max_rows: int | None = None, seed: int = 0) -> Examples:
    """Return the labelled rows of train, validation and test, at most ``max_rows`` of them, drawn by content.

    Raises:
        InputError: no labels, a split that is missing, or too few rows.
        TrainingError: one class only.
        SpecError: a ``max_rows`` that is not a number of rows.
    """
    if max_rows is not None and max_rows < 1:
        raise SpecError(f"max_rows is {max_rows}: expected at least 1")
    if examples.task is None or examples.targets is None:
        raise InputError("the input has no labels, and training needs them: name the column with --label-column")
    missing = [name for name in SPLITS if name not in examples.split_names]
    if missing:
        has = ", ".join(examples.split_names)
        raise InputError(
            f"the input has no {' and no '.join(missing)} rows, only {has}: the comparison selects on validation and "
            "is judged on test; add --split 80/10/10, or name the files with --train, --validation and --test"
        )
    codes = [examples.split_names.index(name) for name in SPLITS]
    rows = np.flatnonzero(examples.labelled() & np.isin(examples.split, codes))
    if max_rows is not None:
        rows = rows[sampled(examples.keys[rows], max_rows, seed)]
    kept = examples.select(rows)
    sizes = {name: int((kept.split == code).sum()) for name, code in zip(SPLITS, codes, strict=True)}
    assert kept.targets is not None
    for name, rows_there in sizes.items():
        if rows_there < FEWEST:
            raise InputError(
                f"there are too few rows: {rows_there} of {name} (of {len(kept):,} labelled rows), expected at least "
                f"{FEWEST}; give more rows, or a larger --max-rows"
            )
    if kept.task == CLASSIFICATION.name:
        train = kept.targets[kept.split == codes[0]]
        present = np.unique(train)
        if len(present) < 2:
            raise TrainingError(
                f"all {len(train)} training rows have the class {kept.class_names[int(present[0])]!r}: "
                "expected at least two classes"
            )
        if len(train) < len(kept.class_names):
            raise TrainingError(f"there are {len(train)} training rows for {len(kept.class_names)} classes: add rows")
    return kept


def ranks(keys: npt.NDArray[np.uint8], seed: int) -> npt.NDArray[np.uint64]:
    """Return a number for each row, decided by its content and ``seed`` alone; equal contents, equal numbers.

    ``keys`` is u1 [N, 16]; the second half of the key, which decides no split, is ``mixed``.
    """
    x = np.ascontiguousarray(keys[:, 8:]).view("<u8").ravel().astype(np.uint64)
    return mixed(x + np.uint64((2 * seed + 1) * 0x9E3779B97F4A7C15 % 2**64))


def sampled(keys: npt.NDArray[np.uint8], most: int, seed: int) -> Rows:
    """Return at most ``most`` rows, increasing: whole contents, drawn by ``ranks``, so a larger sample holds it."""
    if len(keys) <= most:
        return np.arange(len(keys))
    rank = ranks(keys, seed)
    ascending = np.sort(rank)
    # A content goes in with all its copies or not at all.
    bound = ascending[most]
    return np.flatnonzero(rank < bound)


def training_rows(keys: npt.NDArray[np.uint8], y: Array, task: Task, fraction: float, seed: int) -> Rows:
    """Return the places of a fraction of the training rows, increasing; a larger fraction holds a smaller one.

    Classes keep their shares, and each keeps a row at least: a fraction without a class would be another problem.
    """
    if fraction >= 1:
        return np.arange(len(y))
    rank = ranks(keys, seed)
    groups = [np.flatnonzero(y == label) for label in np.unique(y)] if task is CLASSIFICATION else [np.arange(len(y))]
    least = 1 if task is CLASSIFICATION else FEWEST
    kept = []
    for group in groups:
        by_rank = group[np.argsort(rank[group], kind="stable")]
        kept.append(by_rank[: max(least, round(fraction * len(group)))])
    return np.sort(np.concatenate(kept))


def checked_fractions(fractions: Sequence[float]) -> tuple[float, ...]:
    """Return fractions of the training rows, ascending. Raises ``SpecError`` for one outside of (0, 1]."""
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise SpecError(
                f"the fraction {fraction!r} is not a share of the training rows: expected more than 0, up to 1"
            )
    if not fractions:
        raise SpecError("no fraction was given: expected some such as 0.1,1")
    return tuple(sorted(set(map(float, fractions))))


def dataset_hash(examples: Examples) -> str:
    """Return the hash of contents, labels and splits."""
    assert examples.targets is not None
    targets = np.ascontiguousarray(examples.targets)
    return hash_json(
        {
            "keys": sha256_bytes(np.ascontiguousarray(examples.keys).tobytes()),
            "targets": [str(targets.dtype), sha256_bytes(targets.tobytes())],
            "splits": [list(examples.split_names), sha256_bytes(np.ascontiguousarray(examples.split).tobytes())],
            "task": examples.task,
            "classes": list(examples.class_names),
        }
    )


def write_rows(examples: Examples, file: Path) -> None:
    """Write rows for a process of its own to read with ``read_rows``: whole, whatever they were selected from."""
    whole = replace(examples, packed_contents=Packed.of(examples.contents()), whole=None)
    file.write_bytes(pickle.dumps(whole))


def read_rows(file: Path) -> Examples:
    """Read what ``write_rows`` wrote."""
    with open(file, "rb") as stream:
        examples: Examples = pickle.load(stream)
    return examples
