"""A module imports only from lower layers, and the command line starts without the heavy libraries."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import embedcache

PACKAGE = Path(embedcache.__file__).parent

# The house. A room is a module, or a package of the same name whose files may import one another. The table changes
# together with the code, never alone.
LAYERS = (
    ("version", "wording"),
    ("errors", "notebook"),
    ("journal", "arguments", "memory", "threads", "decoding", "hub"),
    ("fingerprint", "pooling", "batching", "shard", "pictures"),
    ("spec",),
    ("task", "features"),
    ("numerics",),
    ("dataset",),
    ("examples", "backbone", "heads", "cache"),
    ("extract", "train"),
    ("estimator", "sweep", "predict", "finetune", "importing"),
    ("equivalence", "compare", "export", "audit"),
    ("report",),
    ("tracking",),
    ("cli",),
    ("__main__",),
)
LAYER_OF = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}
# Loaded before every room and, being lazy, after all of them: it has no layer.
ROOT = "__init__"


def room_of(file: Path, package: Path) -> str:
    """The room a file is in: the first part of its path below the package."""
    return file.relative_to(package).parts[0].removesuffix(".py")


def imported_modules(file: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of each import, wherever in the file it stands; types-only imports count."""
    here = [package.name, *file.relative_to(package).with_suffix("").parts]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def faults(package: Path) -> list[str]:
    """Every import that goes sideways or upward, and every module that the table does not know."""
    found = []
    rooms = {room_of(file, package) for file in package.rglob("*.py")} - {ROOT}
    found += [f"{room}: not in the table of layers" for room in sorted(rooms - LAYER_OF.keys())]
    for file in sorted(package.rglob("*.py")):
        room = room_of(file, package)
        if room == ROOT:
            continue
        for line, module in imported_modules(file, package):
            parts = module.split(".")
            if parts[0] != package.name or len(parts) < 2 or parts[1] == room:
                continue
            if parts[1] not in LAYER_OF and parts[1] not in rooms:
                found.append(f"{file.relative_to(package)}:{line}: imports {module} through the package itself")
            elif LAYER_OF.get(parts[1], 99) >= LAYER_OF.get(room, 99):
                found.append(f"{file.relative_to(package)}:{line}: {room} imports {parts[1]}, which is not below it")
    return found


def test_every_import_goes_down() -> None:
    assert not (found := faults(PACKAGE)), "\n".join(found)


def test_no_room_is_named_twice() -> None:
    assert len(LAYER_OF) == sum(map(len, LAYERS))


@pytest.mark.parametrize(
    ("file", "code", "fault"),
    [
        ("spec.py", "from embedcache.cache import FeatureCache", "spec.py:1: spec imports cache"),
        ("spec.py", "from embedcache import cache", "spec.py:1: spec imports cache"),
        ("spec.py", "def f():\n    import embedcache.cli", "spec.py:2: spec imports cli"),
        ("shard.py", "from .pooling import mean", "shard.py:1: shard imports pooling"),
        ("shard.py", "from . import pooling", "shard.py:1: shard imports pooling"),
        ("cache/reader.py", "from ..heads import Linear", "cache/reader.py:1: cache imports heads"),
        ("cache/reader.py", "from ..extract import run", "cache/reader.py:1: cache imports extract"),
        ("spec.py", "if TYPE_CHECKING:\n    from embedcache.train import fit", "spec.py:2: spec imports train"),
        ("spec.py", "import_module('embedcache.train')", "spec.py:1: spec imports train"),
        ("spec.py", "from embedcache import FeatureCache", "through the package itself"),
        ("utils.py", "", "utils: not in the table of layers"),
    ],
)
def test_a_planted_fault_is_found(tmp_path: Path, file: str, code: str, fault: str) -> None:
    package = tmp_path / "embedcache"
    for name in ("__init__.py", "errors.py", "pooling.py", "heads.py", "cache/__init__.py", "cache/gather.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).touch()
    (package / "cache/reader.py").write_text("from .index import X\nfrom embedcache.errors import CacheError\n")
    (package / "heads.py").write_text(
        "import torch\nfrom embedcache.version import __version__\nfrom .pooling import mean\n"
    )
    assert faults(package) == []
    (package / file).write_text(code)
    (found,) = faults(package)
    assert fault in found


def circles(package: Path, room: str) -> list[list[str]]:
    """Every set of modules within a room that import one another in a circle, inside functions or not."""
    files = [file for file in sorted(package.rglob("*.py")) if room_of(file, package) == room]

    def named(file: Path) -> str:
        return ".".join([package.name, *file.relative_to(package).with_suffix("").parts]).removesuffix(".__init__")

    names = {named(file) for file in files}

    def target(module: str) -> str:
        """Return the module that an import loads: ``room.module.name`` may be a name in a module."""
        return module if module in names else module.rpartition(".")[0]

    imports = {
        named(file): {target(module) for _, module in imported_modules(file, package)} & names - {named(file)}
        for file in files
    }
    reached = {name: set(targets) for name, targets in imports.items()}
    for middle in imports:  # Warshall's transitive closure
        for name in imports:
            if middle in reached[name]:
                reached[name] |= reached[middle]
    found = {
        tuple(sorted(other for other in names if other in reached[name] and name in reached[other]))
        for name in names
        if name in reached[name]
    }
    return [list(circle) for circle in sorted(found)]


@pytest.mark.parametrize("room", sorted(LAYER_OF))
def test_no_room_has_a_circle_of_imports(room: str) -> None:
    found = circles(PACKAGE, room)
    assert not found, "\n".join(" <-> ".join(circle) for circle in found)


@pytest.mark.parametrize(
    ("a", "b", "circle"),
    [
        ("from embedcache.room.c import x", "def f():\n    from embedcache.room.a import x", False),
        ("from embedcache.room.b import x", "def f():\n    from embedcache.room.a import x", True),
        ("from embedcache.room import b", "if TYPE_CHECKING:\n    from .a import x", True),
        ("import embedcache.room.b", "import_module('embedcache.room.a')", True),
        ("from embedcache.room import name", "", True),
    ],
)
def test_a_planted_circle_is_found(tmp_path: Path, a: str, b: str, circle: bool) -> None:
    room = tmp_path / "embedcache" / "room"
    room.mkdir(parents=True)
    for name, code in (("a", a), ("b", b), ("c", ""), ("__init__", "from embedcache.room.a import x")):
        (room / f"{name}.py").write_text(code)
    assert bool(circles(tmp_path / "embedcache", "room")) is circle


def named_files(page: str) -> set[str]:
    """Return the modules that a room's docstring lists in its table, one a line."""
    return set(re.findall(r"^``(\w+)``  ", page, re.MULTILINE))


@pytest.mark.parametrize("page", sorted(PACKAGE.rglob("__init__.py")), ids=lambda page: page.parent.name)
def test_a_rooms_table_lists_its_files(page: Path) -> None:
    files = {file.stem for file in page.parent.glob("*.py")} | {file.parent.name for file in page.parent.glob("*/*.py")}
    listed = named_files(ast.get_docstring(ast.parse(page.read_text(encoding="utf-8"))) or "")
    assert listed in (set(), files - {"__init__"})


def test_a_table_is_read() -> None:
    assert named_files("A room.\n\n====  ===\n``a``   of ``x``\n``bc``  of y\n====  ===\n\n``d`` is elsewhere.") == {
        "a",
        "bc",
    }


def heavy_modules(statement: str) -> list[str]:
    """Which heavy libraries a fresh interpreter has loaded after ``statement``."""
    heavy = (
        "PIL",
        "h5py",
        "numpy",
        "pandas",
        "pyarrow",
        "safetensors",
        "scipy",
        "sklearn",
        "torch",
        "transformers",
        "yaml",
    )
    code = f"{statement}\nimport sys\nprint(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    "module",
    [
        "embedcache",
        "embedcache.cli",
        "embedcache.spec",
        "embedcache.fingerprint",
        "embedcache.errors",
        "embedcache.pictures",
    ],
)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    assert heavy_modules(f"import {module}") == []


def test_a_heavy_import_would_be_seen() -> None:
    assert "numpy" in heavy_modules("import numpy")
