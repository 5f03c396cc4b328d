"""Whatever the caller passes -> sources, each with the split it was given for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from embedcache.errors import InputError, SpecError
from embedcache.examples.files import open_file
from embedcache.examples.objects import is_table, open_object
from embedcache.examples.source import Source
from embedcache.spec import split_name


def gather(inputs: Any, named: Mapping[str, Any], format: str | None, quoting: str) -> list[tuple[str | None, Source]]:
    """Return every source with the name of its split, None when no splits were given by inputs.

    ``inputs`` and the values of ``named`` are as in ``load_examples``. Raises ``InputError`` for what cannot be read,
    ``SpecError`` when a split is given twice.
    """
    given: list[tuple[str | None, Any]] = []
    splits = {name: value for name, value in named.items() if value is not None}
    if isinstance(inputs, Mapping):
        if not inputs:
            raise InputError("the input is an empty mapping: expected split names and their rows")
        for name, value in inputs.items():
            if _holds_cells(value):
                raise InputError(
                    f"the input maps {name!r} to cells, expected rows: pass a list of dicts or a DataFrame"
                )
            given.append((split_name(str(name)), value))
        if splits:
            raise SpecError(f"the input maps splits already: drop {', '.join(splits)}")
    elif inputs is not None:
        if "train" in splits:
            raise SpecError("both inputs and train were given: pass the training rows once")
        given.append(("train" if splits else None, inputs))
    given += splits.items()
    if not given:
        raise InputError("there is no input: pass a file, a list of dicts, a DataFrame or a Dataset")
    return [(name, source) for name, value in given for source in _sources(name, value, format, quoting)]


def _holds_cells(value: Any) -> bool:
    # A dict of columns rather than of splits: its values are lists of numbers, or of strings that are no file names.
    if not isinstance(value, (list, tuple)) or not value or not isinstance(value[0], (str, int, float)):
        return False
    return not all(isinstance(item, str) and Path(item).suffix for item in value[:3])


def _sources(name: str | None, value: Any, format: str | None, quoting: str) -> Iterator[Source]:
    label = name or "input"
    if isinstance(value, (str, os.PathLike)):
        yield open_file(os.fspath(value), format, quoting)
    elif is_table(value):
        yield open_object(value, label)
    elif isinstance(value, Sequence):
        for number, item in enumerate(value):
            if isinstance(item, (str, os.PathLike)):
                yield open_file(os.fspath(item), format, quoting)
            elif is_table(item):
                yield open_object(item, f"{label} {number}")
            else:
                what = type(item).__name__
                raise InputError(f"{label}: item {number} is a {what}, expected a path, a table or a list of dicts")
    else:
        raise InputError(
            f"{label}: got a {type(value).__name__}, expected a path, a list of dicts, a DataFrame or a Dataset "
            "(it is read more than once)"
        )
