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


FRESH = """
import os, sys, traceback
import torch, transformers  # only what these words load anywhere; it takes seconds
status = 0
for names in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            exec(f"from embedcache import {names}; assert all(map(callable, [{names}]))")
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status |= os.waitpid(child, 0)[1]
sys.exit(status != 0)
"""


def test_every_public_name_is_found_in_a_fresh_interpreter() -> None:
    """Each module is the first that is asked for, in a process that has nothing of ours."""
    names = [", ".join(name for name in WHERE if WHERE[name] == module) for module in dict.fromkeys(WHERE.values())]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *names], capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_has_a_module() -> None:
    assert set(WHERE) == {name for name in NAMES if not name.startswith("_")}


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = embedcache.no_such_name


def test_the_types_and_the_format_travel_with_the_package() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "FORMAT.md").is_file()
