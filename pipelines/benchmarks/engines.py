"""Extraction in workers: 1 and 2 of them against one process, and what an engine costs for each unit."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.extraction import snippets
from benchmarks.table import SETTINGS, row

from embedcache.backbone import Encoder, load_backbone
from embedcache.examples import load_examples
from embedcache.extract import Elsewhere, Engine, Here, Window, run
from embedcache.extract.crew import Crew, Given, Processes
from embedcache.extract.progress import Watch

WIDTH, UNITS, ROUNDS = 384, 24, 3


def nothing(rows: list[bytes]) -> np.ndarray:
    """An encoder that costs nothing."""
    return np.zeros((len(rows), WIDTH), np.float32)


class Silent:
    """A display of nothing."""

    def expect(self, tokens: int) -> None:
        """Nothing."""

    def advance(self, rows: int, tokens: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


@contextlib.contextmanager
def crews(workers: int) -> Iterator[dict[str, Callable[[], Crew]]]:
    """Give what makes as many workers in each way that is installed."""
    # Workers that Ray starts find this module by it.
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    found: dict[str, Callable[[], Crew]] = {"processes": lambda: Processes(workers)}
    with contextlib.ExitStack() as stack:
        if find_spec("ray"):
            import ray

            from embedcache.extract.actors import Actors

            ray.init(address="local", num_cpus=os.cpu_count(), logging_level="warning", log_to_driver=False)
            stack.callback(ray.shutdown)
            found["Ray"] = lambda: Actors("auto", workers)
        if find_spec("distributed"):
            from distributed import Client, LocalCluster

            cluster = stack.enter_context(
                LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)  # type: ignore[no-untyped-call]
            )
            client = stack.enter_context(Client(cluster))  # type: ignore[no-untyped-call]
            found["Dask"] = lambda: Given(client.get_executor(pure=False))
        yield found


def engines() -> None:
    """MiniLM over snippets: this process with all cores, against 1 and 2 processes that share them."""
    backbone, rows = load_backbone(device="cpu"), snippets(SETTINGS["rows"])
    examples = load_examples(rows)
    times: dict[str, list[float]] = {"here": [], "1": [], "2": []}
    starts, padding = [], {}
    for turn in range(ROUNDS):
        for name, took in times.items():
            engine: Any = Here() if name == "here" else Elsewhere(Processes(int(name)))
            prove, ready = engine.prove, []

            def proved(*given: Any, prove: Any = prove, ready: list[float] = ready) -> Any:
                begun, proof = time.perf_counter(), prove(*given)
                ready.extend([time.perf_counter(), time.perf_counter() - begun])
                return proof

            object.__setattr__(engine, "prove", proved)
            with tempfile.TemporaryDirectory() as folder:
                report = run(examples, backbone, Path(folder) / "c", engine=engine, progress=Silent())
            took.append(time.perf_counter() - ready[0])
            padding[name] = report.computed / report.tokens
            if name == "2":
                starts.append(ready[1])
        print(f"round {turn + 1}: {times}", file=sys.stderr)
    median = {name: statistics.median(took) for name, took in times.items()}
    row(
        f"extraction of {len(rows):,} snippets, float32, in 1 / 2 processes vs in this one, once they have started",
        f"{median['here'] / median['1']:.2f}x / {median['here'] / median['2']:.2f}x; the first of 2 has started after "
        f"{statistics.median(starts):.1f} s",
    )
    row("positions computed for each real one there, this process / 2", f"{padding['here']:.3f} / {padding['2']:.3f}")


def units() -> None:
    """Windows of 1,024 and 16,384 rows of 384 floats that cost nothing to compute: what a worker adds to each."""
    with crews(1) as found:
        for size in (1024, 16_384):
            backbone = Encoder.made(nothing, {"model": "nothing"}, "text", reads="bytes", rows=size)
            window = Window(np.arange(size), [b"x" * 100] * size)
            here = _each(Here(), backbone, window)
            costs = {name: _each(Elsewhere(made()), backbone, window) - here for name, made in found.items()}
            told = ", ".join(f"{name} {1e3 * cost:.1f}" for name, cost in costs.items())
            row(f"ms from handing out a unit of {size:,} rows of {WIDTH} floats to its result, beside computing", told)


def _each(engine: Engine, backbone: Any, window: Window) -> float:
    """Return the seconds from handing out a window to its features, one after the other, once a worker has started."""
    with contextlib.closing(engine):
        engine.prove(backbone)
        times = []
        for _ in range(UNITS):
            begun = time.perf_counter()
            list(engine.map(backbone, iter([window]), Watch(Silent(), len(window))))
            times.append(time.perf_counter() - begun)
        return statistics.median(times[1:])


SECTIONS = (engines, units)
