"""What is known of imported rows: ids, labels, splits. Their content nobody has, so the id stands for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.dataset import Examples, Packed, key_values
from embedcache.errors import InputError
from embedcache.examples import IdColumn, assign_splits, load_examples, parse_split
from embedcache.fingerprint import row_key
from embedcache.importing.arrays import Arrays
from embedcache.wording import counted, shown


def rows_of(arrays: Arrays, ids: object, **reading: Any) -> Examples:
    """Return the rows of ``arrays``: of a table, of a list of ids, else of the tables that come with the arrays.

    Where there is none, a row's id is its number. Raises ``InputError`` for another number of rows than there are
    features, and for an id that two rows have.
    """
    given = list(arrays.tables) if ids is None else ids
    reading.setdefault("labels", "optional")
    if isinstance(given, Sequence) and not isinstance(given, str) and given and _are_ids(given):
        given = [{"id": each} for each in given]
    elif isinstance(given, np.ndarray) and given.ndim == 1:
        given = [{"id": each} for each in given.tolist()]
    if isinstance(given, list) and not given:
        examples = _numbered(arrays.rows, reading.get("split"), reading.get("split_seed", 0))
    else:
        if ids is None and reading.get("id_column") is None:
            reading["id_column"] = arrays.id_column
        examples = load_examples(given, kind="id", **reading)
    if len(examples) != arrays.rows:
        raise InputError(
            f"{arrays.name} has {counted(arrays.rows, 'row')}, and there are {counted(len(examples), 'id')}: "
            "give one id for each row, in the order of the features"
        )
    _refuse_twice(examples)
    return examples


def _are_ids(values: Sequence[object]) -> bool:
    """Whether a list is of ids, not of files or of rows."""
    if all(isinstance(value, (int, np.integer)) for value in values):
        return True
    return all(isinstance(value, str) for value in values) and not any(Path(str(value)).is_file() for value in values)


def _numbered(rows: int, split: str | None, seed: int) -> Examples:
    packed = Packed.of(str(row).encode() for row in range(rows))
    keys = np.frombuffer(b"".join(row_key(name) for name in packed), np.uint8).reshape(-1, 16)
    names: tuple[str, ...] = ("train",)
    codes = np.zeros(rows, np.uint8)
    if split is not None:
        names, shares = parse_split(split)
        codes = assign_splits(keys, shares, seed)
    return Examples(
        keys=keys, split=codes, split_names=names, ids=IdColumn(rows), kind="id", packed_contents=packed, n_unique=rows
    )


def _refuse_twice(examples: Examples) -> None:
    _, first, back = np.unique(key_values(examples.keys), return_index=True, return_inverse=True)
    again = np.flatnonzero(first[back.ravel()] != np.arange(len(examples)))
    if not len(again):
        return
    row, more = int(again[0]), f", and {len(again) - 1:,} more repeat one" if len(again) > 1 else ""
    raise InputError(
        f"two rows have the id {shown(examples.ids[row])!r}, row {int(first[back.ravel()[row]])} and row {row} "
        f"(counted from 0){more}: each row needs an id of its own"
    )
