"""JSON values -> frozen dataclasses, checked once by their types, and back."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar, Union, cast, overload

import numpy as np

from embedcache.wording import shortened

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
Read = Callable[[object], object]


class ImpossibleValue(ValueError):
    """A value that is not of its type; knows the way to it from the outermost value."""

    def __init__(self, reason: str, place: str = "") -> None:
        super().__init__(reason)
        self.reason, self.place = reason, place

    def __str__(self) -> str:
        return f"{self.place.lstrip('.') or 'the whole'} {self.reason}"


FLAT = {"flat": True}
"""The metadata of a field that holds a dataclass whose own fields stand among those beside it."""


def from_json(kind: type[T], value: object) -> T:
    """Return a dataclass made of JSON values, those in it too.

    Null stands for NaN where a field is a ``float``, as ``to_json`` writes it. A field with a default may be missing;
    keys that are not fields are left out, for a later version may add some. A field of type ``object`` holds any JSON.
    A class that has a ``from_json`` of its own is asked.

    Raises ``ValueError`` naming the first place that is wrong, such as ``leaderboard[3].interval``.
    """
    return cast(T, _reader(cast(Hashable, kind))(value))


@overload
def to_json(value: DataclassInstance) -> dict[str, object]: ...
@overload
def to_json(value: object) -> object: ...
def to_json(value: object) -> object:
    """Return dataclasses, arrays and what they hold as JSON values, with null for every number that is not finite.

    A field that is None and whose metadata say ``omitted`` is left out; see ``FLAT``. What has a ``to_json`` of its own
    is asked.
    """
    if hasattr(value, "to_json"):
        return cast(object, value.to_json())
    if dataclasses.is_dataclass(value):
        return fields_to_json(cast("DataclassInstance", value))
    if isinstance(value, Mapping):
        return {str(name): to_json(held) for name, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(held) for held in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


@functools.cache
def _reader(kind: Hashable) -> Read:
    """Return the function that reads a type; made once, so that thousands of rows are read quickly."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if hasattr(kind, "from_json"):
        return cast(Read, kind.from_json)
    if dataclasses.is_dataclass(kind):
        return functools.partial(_record, kind, _fields(kind))
    if origin is Literal:
        return functools.partial(_choice, parts)
    if origin in (Union, types.UnionType):
        (inner,) = (_reader(part) for part in parts if part is not types.NoneType)
        return lambda value: None if value is None else inner(value)
    if origin is tuple and parts[-1] is Ellipsis:
        return functools.partial(_list, _reader(parts[0]))
    if origin is tuple:
        return functools.partial(_row, [_reader(part) for part in parts])
    if isinstance(kind, type) and issubclass(kind, dict):  # a mapping that is more
        return lambda value: kind(_expected(dict, "a mapping", value))
    if origin is Mapping or kind is Mapping:
        return functools.partial(_mapping, _reader(parts[1]) if parts else _anything)
    return _PLAIN[kind]


def fields_to_json(value: DataclassInstance) -> dict[str, object]:
    """Return the fields of a dataclass as ``to_json`` does, whether it has a ``to_json`` of its own or not."""
    written: dict[str, object] = {}
    for field in dataclasses.fields(value):
        held = getattr(value, field.name)
        if "flat" in field.metadata:
            written |= fields_to_json(held)
        elif held is not None or "omitted" not in field.metadata:
            written[field.name] = to_json(held)
    return written


class _Field(NamedTuple):
    name: str
    read: Read
    needed: bool
    flat: bool


def _fields(kind: type) -> list[_Field]:
    types_of = typing.get_type_hints(kind)
    return [
        _Field(
            name=field.name,
            read=_reader(types_of[field.name]),
            needed=field.default is dataclasses.MISSING,
            flat="flat" in field.metadata,
        )
        for field in dataclasses.fields(kind)
    ]


def _within(read: Read, value: object, step: str) -> object:
    try:
        return read(value)
    except ImpossibleValue as error:
        error.place = step + error.place
        raise


def _record(kind: Callable[..., object], fields: list[_Field], value: object) -> object:
    mapping = _expected(dict, "a mapping", value)
    held: dict[str, object] = {}
    for field in fields:
        name, read, needed, flat = field
        if flat:
            held[name] = read(mapping)
        elif name in mapping:
            try:
                held[name] = read(mapping[name])
            except ImpossibleValue as error:
                error.place = f".{name}{error.place}"
                raise
        elif needed:
            raise ImpossibleValue(f"lacks {name}")
    try:
        return kind(**held)
    except ValueError as error:  # what a dataclass checks itself
        raise ImpossibleValue(f"is impossible: {error}") from None


def _list(read: Read, value: object) -> tuple[object, ...]:
    items: list[object] = []
    try:
        for item in _expected(list, "a list", value):
            items.append(read(item))
    except ImpossibleValue as error:
        error.place = f"[{len(items)}]{error.place}" if isinstance(value, list) else error.place
        raise
    return tuple(items)


def _row(reads: list[Read], value: object) -> tuple[object, ...]:
    items = _expected(list, "a list", value)
    if len(items) != len(reads):
        raise ImpossibleValue(f"has {len(items)} values: expected {len(reads)}")
    return tuple(
        _within(read, item, f"[{number}]") for number, (read, item) in enumerate(zip(reads, items, strict=True))
    )


def _mapping(read: Read, value: object) -> dict[str, object]:
    mapping = _expected(dict, "a mapping", value)
    if read is _anything:
        return mapping
    return {name: _within(read, item, f".{name}") for name, item in mapping.items()}


def _expected(kind: type[T], name: str, value: object) -> T:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ImpossibleValue(f"is of type {type(value).__name__}: expected {name}")
    return value


def _choice(choices: tuple[object, ...], value: object) -> object:
    if value not in choices:
        raise ImpossibleValue(f"is {shortened(value)}: expected one of {', '.join(map(str, choices))}")
    return value


def _text(value: object) -> str:
    return value if type(value) is str else _expected(str, "a text", value)


def _bool(value: object) -> bool:
    return _expected(bool, "true or false", value)


def _int(value: object) -> int:
    return value if type(value) is int else _expected(int, "a whole number", value)


def _float(value: object) -> float:
    if value is None:
        return math.nan
    return float(value) if isinstance(value, float) else float(_expected(int, "a number", value))


def _anything(value: object) -> object:
    return value


_PLAIN: Mapping[Hashable, Read] = {str: _text, bool: _bool, int: _int, float: _float, object: _anything}
