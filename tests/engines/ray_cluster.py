"""A real Ray on this machine, of two nodes: whatever is killed, the files are those of one process.

``make engines`` installs Ray and runs this; the ordinary suite does not.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from killing import Doomed, Killer, files, words

from embedcache.cache import FeatureCache
from embedcache.errors import BackboneError, BadRowsError, EmbedcacheWarning
from embedcache.extract import elsewhere, extract

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("default")  # Ray's own


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    os.environ["RAY_AUTH_MODE"] = "disabled"
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    made.shutdown()


class HalfWay:
    """A display that does something when half of the rows are done."""

    def __init__(self, rows: int, then: Callable[[], object]) -> None:
        self.rows, self.then, self.done = rows / 2, then, 0

    def expect(self, tokens: int) -> None:
        pass

    def advance(self, rows: int, tokens: int) -> None:
        before, self.done = self.done, self.done + rows
        if before < self.rows <= self.done:
            self.then()

    def close(self) -> None:
        pass


@pytest.mark.parametrize("seed", range(20))
def test_actors_killed_at_random(cluster: Any, signed: Path, tmp_path: Path, seed: int) -> None:
    rows, options = words(173), {"rows_per_shard": 29 if seed % 2 else 200}
    extract(rows, output_dir=tmp_path / "here", backbone=Doomed(), **options)
    backbone = Doomed(signed, slow=0.02)
    with Killer(signed, 1 + seed % 3, seed) as killer:
        extract(rows, output_dir=tmp_path / "there", backbone=backbone, ray=cluster.address, **options)
    assert killer.killed
    assert files(tmp_path / "there") == files(tmp_path / "here")


def test_more_workers_than_there_is_room_for(
    cluster: Any, signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are told of, and the cache whose kind of worker nobody is waits for them no longer than it says."""
    extract(words(29), output_dir=tmp_path / "c", backbone=Doomed())
    monkeypatch.setattr(elsewhere, "TELL_SECONDS", 1.0)
    monkeypatch.setattr(elsewhere, "GRACE_SECONDS", 3.0)
    with pytest.warns(EmbedcacheWarning, match="of 5 workers started: the Ray cluster has room for 2, as each takes 1"):
        extract(
            words(57), output_dir=tmp_path / "c", backbone=Doomed(nudge=0.001), ray=cluster.address, workers=5,
            accept_numerics=True,
        )  # fmt: skip
    assert len(FeatureCache.open(tmp_path / "c")) == 57


def test_a_poison_row_is_named_or_set_aside(cluster: Any, signed: Path, tmp_path: Path) -> None:
    rows = words(43, poison=19)
    options: dict[str, Any] = {"output_dir": tmp_path / "c", "rows_per_shard": 8, "backbone": Doomed(signed)}
    with pytest.raises(BadRowsError, match="row 19: every worker that computes it is lost"):
        extract(rows, ray=cluster.address, **options)
    with pytest.warns(EmbedcacheWarning, match="1 row set aside"):
        extract(rows, ray=cluster.address, on_bad_row="skip", quarantine=tmp_path / "aside", **options)
    assert len(FeatureCache.open(tmp_path / "c")) == 42


def test_a_driver_that_is_killed_is_gone_on_from(cluster: Any, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in words(401)))
    common = [sys.executable, "-m", "embedcache", "extract", str(table), "--model", str(tiny("bert"))]
    common += ["--shard-rows", "13", "--batch-size", "64", "-o"]
    subprocess.run([*common, str(tmp_path / "here")], check=True)
    there = [*common, str(tmp_path / "there"), "--ray", cluster.address]
    driver = subprocess.Popen(there)
    while driver.poll() is None and len(list(tmp_path.glob("there/features/*"))) < 5:
        time.sleep(0.01)
    driver.send_signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    subprocess.run(there, check=True)
    assert files(tmp_path / "there") == files(tmp_path / "here")


def test_a_node_that_is_removed_half_way(cluster: Any, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """The last test of the cluster: one of its nodes is gone."""
    rows = words(601)
    options: dict[str, Any] = {"model": tiny("bert"), "pooling": ["mean", "tokens"], "positions": 32}
    extract(rows, output_dir=tmp_path / "here", rows_per_shard=31, **options)
    (node,) = cluster.worker_nodes
    extract(
        rows, output_dir=tmp_path / "there", rows_per_shard=31, ray=cluster.address,
        progress=HalfWay(601, lambda: cluster.remove_node(node, allow_graceful=False)), **options,
    )  # fmt: skip
    assert not cluster.worker_nodes
    assert files(tmp_path / "there") == files(tmp_path / "here")


def test_the_program_that_is_to_be_copied(tmp_path: Path, minilm_path: Path) -> None:
    repository = Path(__file__).resolve().parents[2]
    program = [sys.executable, repository / "pipelines" / "extract_on_ray.py", repository / "data" / "sample.csv"]
    done = subprocess.run([*program, tmp_path / "c", "local"], check=True, capture_output=True, text=True)
    assert "60 rows in" in done.stdout
    assert "a linear head on them: accuracy" in done.stdout


def test_local_is_the_ray_that_this_process_has_started(cluster: Any, tmp_path: Path) -> None:
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        with pytest.raises(BackboneError, match=r"connected to the Ray at .* and cannot be to the one at local too"):
            extract(words(13), output_dir=tmp_path / "c", backbone=Doomed(), ray="local")
    finally:
        ray.shutdown()
    ray.init(address="local", num_cpus=1, log_to_driver=False)
    try:
        assert len(extract(words(13), output_dir=tmp_path / "c", backbone=Doomed(), ray="local")) == 13
        assert ray.is_initialized(), "who has started it ends it"
    finally:
        ray.shutdown()


def test_where_there_is_no_ray(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"there is no Ray at 127\.0\.0\.1:9 .*ray start"):
        extract(words(3), output_dir=tmp_path / "c", backbone=Doomed(), ray="127.0.0.1:9")
