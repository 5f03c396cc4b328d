"""Dask's workers and processes, for real: whichever are killed, the files are those of one process.

``make engines`` installs Dask and runs this; the ordinary suite does not.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from killing import Doomed, Killer, files, words

from embedcache.cache import FeatureCache
from embedcache.errors import BackboneError, EmbedcacheWarning
from embedcache.extract import extract

ROWS = words(173)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    extract(ROWS, output_dir=tmp_path / "here", backbone=Doomed(), rows_per_shard=29)
    return tmp_path / "here"


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    import dask

    # As many workers are lost over a row before Dask says so as it has been told.
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as made,
        distributed.Client(made) as connected,
    ):
        yield connected


@pytest.mark.filterwarnings("default")  # Dask's own
def test_dask(client: Any, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": tiny("bert"), "pooling": ["mean", "tokens"], "rows_per_shard": 29}
    extract(ROWS, output_dir=tmp_path / "here", **options)
    extract(ROWS, output_dir=tmp_path / "there", executor=client.get_executor(pure=False), **options)
    assert files(tmp_path / "there") == files(tmp_path / "here")


@pytest.mark.filterwarnings("default")
def test_a_row_that_kills_workers_of_dask_and_one_killed_besides(client: Any, signed: Path, tmp_path: Path) -> None:
    backbone = Doomed(signed, slow=0.02)
    options: dict[str, Any] = {"on_bad_row": "skip", "quarantine": tmp_path / "aside", "rows_per_shard": 8}
    with (
        Killer(signed, 1, 7),
        pytest.warns(EmbedcacheWarning, match="1 row set aside"),
    ):
        extract(
            words(61, poison=30), output_dir=tmp_path / "c", backbone=backbone,
            executor=client.get_executor(pure=False), **options,
        )  # fmt: skip
    assert len(FeatureCache.open(tmp_path / "c")) == 60


def test_a_process_pool_that_is_broken_is_gone_on_from(here: Path, signed: Path, tmp_path: Path) -> None:
    spawn, options = multiprocessing.get_context("spawn"), {"output_dir": tmp_path / "there", "rows_per_shard": 29}
    with (
        Killer(signed, 1, 7),
        ProcessPoolExecutor(2, spawn) as pool,
        pytest.raises(BackboneError, match="make a new one and extract again"),
    ):
        extract(ROWS, backbone=Doomed(signed, slow=0.05), executor=pool, **options)
    with ProcessPoolExecutor(2, spawn) as pool:
        extract(ROWS, backbone=Doomed(signed), executor=pool, **options)
    assert files(tmp_path / "there") == files(here)


@pytest.mark.parametrize("seed", range(3))
def test_processes_that_are_killed_are_replaced(here: Path, signed: Path, tmp_path: Path, seed: int) -> None:
    with Killer(signed, 1 + seed, seed) as killer:
        extract(
            ROWS, output_dir=tmp_path / "there", backbone=Doomed(signed, slow=0.02), workers=2, rows_per_shard=29
        )  # fmt: skip
    assert killer.killed
    assert files(tmp_path / "there") == files(here)


def test_processes_end_with_the_one_that_started_them(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("text\n" + "".join(f"{row['text']}\n" for row in words(4001)))
    common = [sys.executable, "-m", "embedcache", "extract", str(table), "--no-labels", "--model", str(tiny("bert"))]
    command = [*common, "--shard-rows", "13", "--batch-size", "32", "-o", str(tmp_path / "c"), "--workers", "2"]
    driver = subprocess.Popen(command)
    children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children")
    while driver.poll() is None and len(list(tmp_path.glob("c/features/*"))) < 3:
        time.sleep(0.01)
    started = [int(number) for number in children.read_text().split()]
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert len(started) >= 2
    for _ in range(500):
        if not any(os.path.exists(f"/proc/{number}") for number in started):
            break
        time.sleep(0.02)
    else:
        pytest.fail("workers outlive the process that started them")
