"""Whatever the caller passes -> sources, each with the split it was given for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from embedcache.errors import InputError, SpecError
from embedcache.examples.formats import open_path
from embedcache.examples.objects import is_table, open_object
from embedcache.examples.options import ReadingOptions
from embedcache.examples.source import Source
from embedcache.spec import split_name


class GivenSource(NamedTuple):
    """A source, and the name of the split it was given for; None when no splits were given by inputs."""

    split: str | None
    source: Source


def open_inputs(inputs: object, by_split: Mapping[str, object], options: ReadingOptions) -> Iterator[GivenSource]:
    """Open every source, in order.

    ``inputs`` and the values of ``by_split`` are as in ``load_examples``. Raises ``InputError`` for what cannot be
    read, ``SpecError`` when a split is given twice.
    """
    given: list[tuple[str | None, object]] = []
    splits = {name: value for name, value in by_split.items() if value is not None}
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
    from_files = [name for name, _ in given if name is not None]
    if from_files and (options.split is not None or options.split_column is not None):
        other = "split" if options.split is not None else "split_column"
        named = ", ".join(dict.fromkeys(from_files))
        raise SpecError(f"splits were given both as inputs ({named}) and by {other}: choose one")
    for split, value in given:
        for source in _sources(split or "input", value, options):
            yield GivenSource(split, source)


def _holds_cells(value: object) -> bool:
    # A dict of columns rather than of splits: its values are lists of numbers, or of strings that are not file names.
    if not isinstance(value, (list, tuple)) or not value or not isinstance(value[0], (str, int, float)):
        return False
    return not all(isinstance(item, str) and Path(item).suffix for item in value[:3])


def _sources(label: str, value: object, options: ReadingOptions) -> Iterator[Source]:
    if isinstance(value, (str, os.PathLike)):
        yield open_path(os.fspath(value), options.format, options.quoting)
    elif is_table(value):
        yield open_object(value, label)
    elif isinstance(value, Sequence):
        for number, item in enumerate(value):
            if isinstance(item, (str, os.PathLike)):
                yield open_path(os.fspath(item), options.format, options.quoting)
            elif is_table(item):
                yield open_object(item, f"{label} {number}")
            else:
                kind = type(item).__name__
                raise InputError(f"{label}: item {number} is a {kind}, expected a path, a table or a list of dicts")
    else:
        raise InputError(
            f"{label}: got a {type(value).__name__}, expected a path, a list of dicts, a DataFrame or a Dataset"
        )
