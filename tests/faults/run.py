"""``make faults``: every kind of fault in large numbers, two processes at a time, and a table of what came of it.

``python tests/faults/run.py [--scale 0.01] [--seed 1] [--only WORD]``. At scale 1 it takes less than an hour on two
cores. Exit status 1 when anything went wrong; what that was is printed, with the seed that does it again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

Run = Callable[[int, int], tuple[int, list[str]]]
SLOWEST = 1500
"""Seconds after which a kind is said to hang."""


def _bombs(count: int, seed: int) -> tuple[int, list[str]]:
    import bombs

    names = [*(f"{name}.gz" for name in bombs.TEXT), *bombs.PLAIN]
    with tempfile.TemporaryDirectory() as folder:
        return bombs.refusals(Path(folder), names[:count], 512 << 20)


def _killed(count: int, seed: int) -> tuple[int, list[str]]:
    done = subprocess.run([sys.executable, HERE / "killing.py"], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout).values()
    return sum(each["points"] for each in report), [problem for each in report for problem in each["problems"]]


def _power(count: int, seed: int) -> tuple[int, list[str]]:
    import pytest
    from test_crashes import power_cuts

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        return power_cuts(Path(folder), patch)


def _commands(name: str, count: int, seed: int) -> tuple[int, list[str]]:
    import commands

    with commands.quiet_disk():
        return commands.FAULTS[name](count, seed)


def kinds() -> dict[str, tuple[int, Run]]:
    """Every kind of fault: how often it is tried at scale 1, and ``run(count, seed) -> (tried, problems)``."""
    import beside
    import commands
    import failing
    import fuzzing

    counts = {
        "bits flipped in caches": 20_000,
        "bits flipped in run folders": 10_000,
        "bits flipped in sweep folders": 4_000,
        "files cut, swapped, left out": 10_000,
        "hostile caches": 10_000,
        "fuzzed manifests, signed": 20_000,
        "fuzzed shards, signed": 5_000,
        "fuzzed heads, signed": 10_000,
        "fuzzed inputs": 60_000,
        "fuzzed sweep files": 60_000,
    }
    found: dict[str, tuple[int, Run]] = {name: (counts[name], run) for name, run in fuzzing.FAULTS.items()}
    found["readers beside a writer"] = 3_000, beside.run
    found["I/O errors while reading and writing caches and inputs"] = 6_000, failing.run
    found["bombs in texts, half a gigabyte each"] = 18, _bombs
    found["kills of the cache's writer, at every call"] = 1, _killed
    found["power cuts of the cache's writer, at every call"] = 1, _power
    for name in commands.FAULTS:
        found[name] = 1000 if name.startswith("links") else 120, partial(_commands, name)
    return found


TITLES = {
    "kills": "kills of commands that write",
    "power_cuts": "power cuts of commands that write",
    "io_errors": "I/O errors in commands that write",
    "links": "links in the way of commands that write",
}


def table(reports: Sequence[Mapping[str, Any]], seconds: float) -> list[str]:
    """Lay the reports out, those of one kind of fault for all commands in one row."""
    rows: dict[str, list[float]] = {}
    for each in [*reports, *({**each, "name": "all"} for each in reports)]:
        title = TITLES.get(each["name"].split(":")[0], each["name"])
        row = rows.setdefault(title, [0, 0, 0.0])
        for at, value in enumerate((each["tried"], len(each["problems"]), each["seconds"])):
            row[at] += value
    rows["all"][2] = seconds
    width = max(map(len, rows))
    lines = [
        f"| {'fault':{width}} |   tried | failures | seconds |",
        f"|{'-' * (width + 2)}|--------:|---------:|--------:|",
    ]
    return lines + [f"| {title:{width}} | {row[0]:7,} | {row[1]:8,} | {row[2]:7.0f} |" for title, row in rows.items()]


def one(name: str, count: int, seed: int) -> dict[str, Any]:
    """Try one kind in a process of its own."""
    begun = time.monotonic()
    job = [sys.executable, __file__, "--one", name, "--count", str(count), "--seed", str(seed)]
    try:
        done = subprocess.run(job, capture_output=True, text=True, timeout=SLOWEST)
        report = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        report = {"tried": count, "problems": [f"it did not end within {SLOWEST} seconds"]}
    except (ValueError, IndexError):
        report = {"tried": count, "problems": [f"it ended with status {done.returncode}: {done.stderr[-2000:]}"]}
    return {"name": name, "seconds": time.monotonic() - begun, **report}


def main() -> int:
    """Try all kinds, or those that are asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds whose name holds this")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=1, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one is not None:
        warnings.simplefilter("ignore")
        tried, problems = kinds()[asked.one][1](asked.count, asked.seed)
        print(json.dumps({"tried": tried, "problems": problems}))
        return 0
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    begun = time.monotonic()
    jobs = {name: max(3, round(count * asked.scale)) for name, (count, _) in kinds().items() if asked.only in name}
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda job: one(*job, asked.seed), jobs.items()))
    print(*table(reports, time.monotonic() - begun), sep="\n")
    for each in reports:
        for problem in each["problems"][:5]:
            print(f"{each['name']} (--seed {asked.seed}): {problem}")
    return int(any(each["problems"] for each in reports))


if __name__ == "__main__":
    sys.exit(main())
