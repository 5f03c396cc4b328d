"""Every figure the README quotes about speed and memory, as ratios within one run.

    python pipelines/benchmark.py [SECTION ...]      default: all; --list names them
    python pipelines/benchmark.py extraction --rows 4000 --json figures.json

Prints a Markdown table. Each module in ``benchmarks/`` that has ``SECTIONS``, a tuple of functions, adds its own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import platform
import sys
from pathlib import Path
from typing import Any

import benchmarks
from benchmarks.table import SETTINGS, TABLE

from embedcache.cli import reported


def sections() -> dict[str, Any]:
    """Return every section by name."""
    names = sorted(each.name for each in pkgutil.iter_modules(benchmarks.__path__))
    modules = [importlib.import_module(f"benchmarks.{name}") for name in names]
    return {section.__name__: section for module in modules for section in getattr(module, "SECTIONS", ())}


def chosen(names: list[str], found: dict[str, Any]) -> list[str]:
    """Return the sections named, where the name of a module, such as ``images``, stands for all of its sections."""
    modules = {name: section.__module__.removeprefix("benchmarks.") for name, section in found.items()}
    several = {name: [each for each in found if modules[each] == name] for name in set(modules.values()) - set(found)}
    return [each for name in names for each in several.get(name, [name])]


def machine() -> dict[str, Any]:
    """Say what the figures were taken on."""
    import torch

    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return {"platform": platform.platform(), "torch": torch.__version__, "threads": threads, "cpu": capability}


def main() -> None:
    """Run the sections asked for."""
    found = sections()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(found))
    parser.add_argument("--rows", type=int, default=SETTINGS["rows"], help="texts to extract (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON too")
    parser.add_argument("--list", action="store_true", help="name the sections and stop")
    arguments = parser.parse_args()
    if arguments.list:
        for name, section in found.items():
            print(f"{name:16} {(section.__doc__ or '').splitlines()[0]}")
        return
    sections_asked = chosen(arguments.sections, found)
    if unknown := [name for name in sections_asked if name not in found]:
        parser.error(f"no section {unknown[0]!r}: expected {', '.join(found)}")
    SETTINGS["rows"] = arguments.rows
    print("| figure | measured | bar |\n|---|---|---|")
    for name in sections_asked or found:
        found[name]()
        if arguments.json:  # after each section, so that an interrupted run keeps its figures
            arguments.json.write_text(json.dumps({"machine": machine(), "figures": TABLE}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(reported(main))
