"""The public names: all there, found lazily, and an unknown one refused in the ordinary way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import embedcache

PACKAGE = Path(embedcache.__file__).parent
NAMES = tuple(getattr(embedcache, "__all__", ("__version__",)))
WHERE: dict[str, str] = embedcache._WHERE
FIRST = tuple({module: name for name, module in reversed(WHERE.items())}.values())


def test_names_are_sorted_and_unique() -> None:
    assert list(NAMES) == sorted(set(NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there_and_listed(name: str) -> None:
    assert getattr(embedcache, name) is not None
    assert name in dir(embedcache)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("_")])
def test_every_public_name_is_documented_and_is_the_thing_not_its_module(name: str) -> None:
    thing = getattr(embedcache, name)
    # A lazy name that equals a module's (`embedcache.extract`) must stay the function once the module is loaded.
    assert not hasattr(thing, "__path__"), f"{name} is a module"
    assert thing.__doc__


@pytest.mark.parametrize("name", FIRST)
def test_every_public_name_is_found_in_a_fresh_interpreter(name: str) -> None:
    """One interpreter for each module, as what a name brings in is what its module does; those beside it follow."""
    beside = ", ".join(other for other in WHERE if WHERE[other] == WHERE[name])
    code = f"from embedcache import {name}, {beside}; assert all(map(callable, [{beside}]))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_every_public_name_has_a_module() -> None:
    assert set(WHERE) == {name for name in NAMES if not name.startswith("_")}


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = embedcache.no_such_name


def test_the_types_and_the_format_travel_with_the_package() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "FORMAT.md").is_file()
