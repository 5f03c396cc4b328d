"""Kill a writer with SIGKILL at each of its system calls; what it leaves must be whole, and the next run finishes it.

``python tests/faults/killing.py`` prints one JSON object: how many points it was killed at, and what went wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from small_caches import SETS, files, values, write

from embedcache.cache import FeatureCache, manifest
from embedcache.cache import files as checked_files
from embedcache.errors import CacheNotFoundError, IncompleteCacheError

CALLS = ("open", "write", "fsync", "close", "replace", "unlink", "mkdir")
SOME = (SETS[0], SETS[6])


def first(path: Path) -> None:
    """A cache of 17 rows in three shards."""
    write(path, 17, 7, SOME)


def extended(path: Path) -> None:
    """The same, with a dataset of 26 rows."""
    write(path, 26, 7, SOME, class_names=("x", "y", "z"))


def die_at(number: int) -> None:
    """Kill this process at its ``number``-th system call from now on; half of what it writes then is written."""
    count = [0]

    def deadly(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    for name in CALLS:
        setattr(os, name, deadly(name))


def killed(work: Callable[[Path], None], path: Path, number: int) -> bool:
    """Run ``work`` in a child that dies at its ``number``-th call; False when it was done before."""
    child = os.fork()
    if not child:
        try:
            die_at(number)
            work(path)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def whole(path: Path) -> int | None:
    """How many rows the dataset has, all of them right; None where there is none yet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is being extended
            cache = FeatureCache.open(path)
    except (CacheNotFoundError, IncompleteCacheError):
        return None
    assert np.array_equal(cache.features(), np.stack([values(SOME[0], row) for row in range(len(cache))]))
    ragged = cache.ragged()
    assert all(np.array_equal(ragged[row], values(SOME[1], row)) for row in range(len(cache)))
    return len(cache)


def committed(path: Path) -> int:
    """How many rows are in the shards that the manifest names."""
    try:
        return manifest.read(path).rows
    except CacheNotFoundError:
        return 0


def kill_everywhere(
    folder: Path, before: Callable[[Path], None] | None, work: Callable[[Path], None], allowed: set[int | None]
) -> tuple[int, list[str]]:
    """Kill ``work``, which starts from what ``before`` makes, at each of its calls."""
    problems: list[str] = []
    if before is not None:
        before(folder / "before")
        shutil.copytree(folder / "before", folder / "wanted")
    work(folder / "wanted")
    wanted = files(folder / "wanted")
    rows = 0
    number = 1
    while True:
        path = folder / f"c{number}"
        if before is not None:
            shutil.copytree(folder / "before", path)
        if not killed(work, path, number):
            return number - 1, problems
        try:
            found = whole(path)
            if found not in allowed:
                problems.append(f"{number}: a dataset of {found} rows")
            if committed(path) < rows:
                problems.append(f"{number}: {committed(path)} rows are left of {rows}")
            rows = committed(path)
            work(path)
            if files(path) != wanted:
                problems.append(f"{number}: other files than an uninterrupted run writes")
        except Exception as error:
            problems.append(f"{number}: {type(error).__name__}: {error}")
        shutil.rmtree(path)
        number += 1


def main() -> None:
    """Do it all."""
    # What a killed process wrote is safe in the kernel: waiting for the disk, or for a tick, proves nothing.
    os.fsync = lambda descriptor: None
    checked_files._TICK = 0
    with tempfile.TemporaryDirectory() as folder:
        report = {}
        for name, before, work, allowed in (
            ("first", None, first, {None, 17}),
            ("extended", first, extended, {17, 26}),
        ):
            (Path(folder) / name).mkdir()
            points, problems = kill_everywhere(Path(folder) / name, before, work, allowed)
            report[name] = {"points": points, "problems": problems}
        print(json.dumps(report))


if __name__ == "__main__":
    main()
