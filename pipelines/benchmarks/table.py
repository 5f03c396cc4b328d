"""What the sections share: the table, and times taken in turn so that a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

TABLE: list[dict[str, str]] = []
"""Every row so far, as it goes into ``--json``."""
SETTINGS = {"rows": 4000}
"""What the command line may change."""


def row(figure: str, measured: str, bar: str = "report") -> None:
    """Add a row to the table, and print it."""
    TABLE.append({"figure": figure, "measured": measured, "bar": bar})
    print(f"| {figure} | {measured} | {bar} |", flush=True)


Clock = Callable[[], float]


def seconds(work: Callable[[], Any], clock: Clock = time.perf_counter) -> float:
    """Return how long ``work`` takes."""
    start = clock()
    work()
    return clock() - start


def interleaved(
    works: Mapping[str, Callable[[], Any]], rounds: int = 5, warm_up: bool = True, clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Run all works in turn, ``rounds`` times after a warm-up, and return each one's median in seconds.

    With the ``clock`` of the process, seconds are those of all of its threads together.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + warm_up):
        for name, work in works.items():
            taken = seconds(work, clock)
            if turn or not warm_up:
                times[name].append(taken)
    return {name: statistics.median(each) for name, each in times.items()}
