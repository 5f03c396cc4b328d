"""Arguments of public functions, held to their annotations: a wrong one is one line of ours, said before any work."""

from __future__ import annotations

import inspect
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from embedcache.errors import SpecError
from embedcache.wording import did_you_mean, shortened

P = ParamSpec("P")
R = TypeVar("R")

_PLAIN: Mapping[object, tuple[tuple[type, ...], str]] = {
    str: ((str,), "a text"),
    int: ((Integral,), "a whole number"),
    float: ((Real,), "a number"),
    Path: ((os.PathLike,), "a path"),
    Mapping: ((Mapping,), "a mapping"),
    dict: ((Mapping,), "a mapping"),
    type: ((type,), "a class"),
}


def checks_arguments(*takers: Callable[..., object]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Have a function refuse an argument that it does not have, and one that is not of the kind its annotation says.

    Annotations of the function's own classes and of plain kinds are checked; what only type checkers can see is not.
    ``takers`` are the functions that its ``**options`` go to.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        parameters = signature.parameters
        kinds: dict[str, object] = {}
        known: set[str] = set()

        @wraps(function)
        def call(*arguments: P.args, **named: P.kwargs) -> R:
            if not kinds:  # at the first call: importing a module must cost nothing
                kinds.update({name: _kind(own.annotation, function) for name, own in parameters.items()})
                for taker in (function, *takers):
                    taken = inspect.signature(taker).parameters.values()
                    known.update(parameter.name for parameter in taken if parameter.kind not in _MANY)
            anything = not takers and any(own.kind is own.VAR_KEYWORD for own in parameters.values())
            if wrong := next((name for name in named if not anything and name not in known), None):
                hint = did_you_mean(wrong, known)
                raise SpecError(f"{function.__qualname__} got an unexpected keyword argument {wrong!r}{hint}")
            try:
                bound = signature.bind(*arguments, **named)
            except TypeError as error:
                raise SpecError(f"{function.__qualname__} {error}") from None
            for name, value in bound.arguments.items():
                if signature.parameters[name].kind not in _MANY and not _is(value, kinds[name]):
                    expected = _words(kinds[name])
                    raise SpecError(f"{function.__qualname__}: {name} is {shortened(value)}: expected {expected}")
            return function(*arguments, **named)

        return call

    return decorate


_MANY = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def _kind(annotation: object, function: Callable[..., object]) -> object:
    """Return what an annotation means, ``Any`` where only a type checker knows."""
    if not isinstance(annotation, str):
        return Any if annotation is inspect.Parameter.empty else annotation
    try:
        return eval(annotation, getattr(function, "__globals__", {}))  # our own source, not a stranger's
    except (NameError, TypeError):
        return Any


def _is(value: object, kind: object) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if kind is None or kind is types.NoneType:
        return value is None
    if origin in (Union, types.UnionType):
        return any(_is(value, alternative) for alternative in inner)
    if origin is Literal:
        return any(type(value) is type(allowed) and value == allowed for allowed in inner)
    if kind is bool:
        return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")
    if (origin or kind) in _PLAIN:
        return isinstance(value, _PLAIN[origin or kind][0]) and not isinstance(value, bool)
    if (origin or kind) in (Sequence, list):
        # An array is as good as a list; what can be walked only once is not.
        items: object = value.tolist() if hasattr(value, "tolist") and getattr(value, "ndim", 0) > 0 else value
        if not isinstance(items, Sequence) or isinstance(items, (str, bytes)):
            return False
        return all(_is(item, inner[0]) for item in items)
    if (origin or kind) is Iterable:
        return isinstance(value, Iterable) and not isinstance(value, (str, bytes))
    if not isinstance(kind, type) or origin is not None:
        return True
    # Not hasattr: a property may compute for long.
    return _members(kind) <= set(dir(value)) if getattr(kind, "_is_protocol", False) else isinstance(value, kind)


def _members(protocol: type) -> set[str]:
    """Return the names that whatever follows a protocol has."""
    bases = [base for base in protocol.__mro__ if base.__module__ != "typing" and base is not object]
    names = {name for base in bases for name in (*vars(base), *vars(base).get("__annotations__", {}))}
    return {name for name in names if not name.startswith("_")}


def _words(kind: object) -> str:
    words = list(dict.fromkeys(_alternatives(kind)))
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _alternatives(kind: object) -> list[str]:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return [word for alternative in inner for word in _alternatives(alternative)]
    if origin is Literal:
        return [str(allowed) for allowed in inner]
    if kind is None or kind is types.NoneType:
        return ["None"]
    if kind is bool:
        return ["True", "False"]
    if (origin or kind) in _PLAIN:
        return [_PLAIN[origin or kind][1]]
    if (origin or kind) in (Sequence, list, Iterable):
        return ["a list" if not inner or inner[0] is Any else f"a list of {_words(inner[0]).removeprefix('a ')}s"]
    return [f"a {kind.__name__}" if isinstance(kind, type) else str(kind)]
