"""Devices: one whose memory is full shrinks its batches before anything is recorded, and several share the work."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import embedcache.backbone.load as load
from embedcache.backbone import FrozenModel, load_backbone, replicas_of, run_plan
from embedcache.batching import plan
from embedcache.cache import FeatureCache
from embedcache.cli import run
from embedcache.errors import BackboneError, DeviceMemoryError, EmbedcacheWarning
from embedcache.extract import extract

ROWS = [{"text": f"row {number} " + "word " * (number % 5), "label": "ab"[number % 2]} for number in range(23)]


@pytest.fixture
def full_beyond(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the CPU a device with memory for passes of so many positions and rows of such a length, and no more."""
    real = transformers.BertModel.forward

    def limit(positions: int, longest: int = 10**9) -> None:
        def forward(self: Any, input_ids: torch.Tensor, *rest: Any, **more: Any) -> Any:
            if input_ids.numel() > positions or input_ids.shape[1] > longest:
                raise torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which "
                    "1.25 GiB is free."
                )
            return real(self, input_ids, *rest, **more)

        monkeypatch.setattr(transformers.BertModel, "forward", forward)
        monkeypatch.setattr(load, "has_own_memory", lambda device: True)

    return limit


def test_batches_shrink_until_they_fit_and_the_cache_records_it(
    tiny: Callable[[str], Path], full_beyond: Callable[..., None], tmp_path: Path
) -> None:
    folder = tiny("bert")
    assert load_backbone(folder, device="cpu").policy.positions == 1024
    full_beyond(300)
    with pytest.warns(
        EmbedcacheWarning, match="batches have 256 positions, as 1,024 do not fit in the device's memory"
    ):
        cache = extract(ROWS, model=folder, output_dir=tmp_path / "cache")
    assert cache.spec["shapes"]["positions"] == 256
    full_beyond(10**9)
    assert extract(ROWS, model=folder, output_dir=tmp_path / "cache").spec["shapes"]["positions"] == 256
    whole = extract(ROWS, model=folder, output_dir=tmp_path / "whole")
    assert whole.spec["shapes"]["positions"] == 1024


def test_recorded_and_chosen_shapes_stay(
    tiny: Callable[[str], Path], full_beyond: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other shapes have other bits: a cache is extended with its own or not at all, and nothing of it is lost."""
    folder, path = tiny("bert"), tmp_path / "cache"
    extract(ROWS[:11], model=folder, output_dir=path)
    full_beyond(300)
    told = (
        r"not enough memory \(1.25 GiB is free\) for two batches of 16 rows of length 64, .*"
        r"make a new cache with smaller batches \(extract --batch-size\), free memory .*, or use another device"
    )
    with pytest.raises(DeviceMemoryError, match=told):
        extract(ROWS, model=folder, output_dir=path)
    with pytest.raises(DeviceMemoryError, match=told):
        load_backbone(folder, device="cpu", positions=1024)
    assert len(FeatureCache.open(path)) == 11
    table = tmp_path / "rows.csv"
    table.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS))
    assert run(["extract", str(table), "-o", str(path), "--device", "cpu"]) == 1
    printed = capsys.readouterr().err
    assert "error: the device has not enough memory (1.25 GiB is free)" in printed
    assert "Traceback" not in printed


def test_a_row_that_does_not_fit_and_memory_lost_in_the_middle(
    tiny: Callable[[str], Path], full_beyond: Callable[..., None], tmp_path: Path
) -> None:
    folder = tiny("bert")
    full_beyond(10**9, longest=32)
    with pytest.raises(DeviceMemoryError, match="two batches of 1 rows of length 64"):
        load_backbone(folder, device="cpu")
    full_beyond(10**9)
    backbone = load_backbone(folder, device="cpu", positions=128)
    extract(ROWS[:5], backbone=backbone, output_dir=tmp_path / "cache")
    full_beyond(100)  # another program has taken it since
    with pytest.raises(DeviceMemoryError, match=r"for a batch of \d+ rows of length \d+: make"):
        extract(ROWS, backbone=backbone, output_dir=tmp_path / "cache")
    full_beyond(10**9)
    assert len(extract(ROWS, backbone=backbone, output_dir=tmp_path / "cache")) == 23


def files(path: Path) -> dict[Path, bytes]:
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*.*") if file.is_file()}


def test_several_devices_make_the_same_cache(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The CPU, named twice, stands for two: each has a model of its own, and which of them computes changes no byte."""
    backbone = load_backbone(tiny("bert"), features=["mean", "tokens"], device="cpu", positions=64)
    served: dict[int, int] = {}
    forward = FrozenModel.forward
    both = threading.Barrier(2)

    def counted(self: Any, prepared: Any, batch: Any) -> Any:
        served[id(self)] = served.get(id(self), 0) + 1
        if served[id(self)] == 1 and self.policy.positions == 64 and meet:
            both.wait(20)
        return forward(self, prepared, batch)

    meet = False
    monkeypatch.setattr(FrozenModel, "forward", counted)
    extract(ROWS, backbone=backbone, output_dir=tmp_path / "one", rows_per_shard=11)
    served.clear()
    replicas = replicas_of(backbone, ["cpu", "cpu"])
    served.clear()
    meet = True
    prepared = backbone.prepare([row["text"].encode() for row in ROWS])
    batches = plan(prepared.lengths, backbone.policy)
    made = replicas.run_plan(prepared, batches)
    assert len(served) == 2
    assert sum(served.values()) == len(batches)
    meet = False
    alone = run_plan(backbone, prepared, batches)
    assert all(made[name].values.tobytes() == alone[name].values.tobytes() for name in ("mean", "tokens"))
    extract(ROWS, backbone=backbone, output_dir=tmp_path / "two", rows_per_shard=11, devices="cpu,cpu")
    assert files(tmp_path / "two") == files(tmp_path / "one")
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert run(["extract", str(table), "-o", str(tmp_path / "two"), "--devices", "cpu,cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["extracted"] == 0
    for asked, told in (("cuda:7", "device 'cuda:7' is not available here"), (" , ", "devices is ' , ': expected all")):
        assert run(["extract", str(table), "-o", str(tmp_path / "three"), "--devices", asked]) in (1, 2)
        assert told in capsys.readouterr().err


def test_a_device_that_computes_otherwise_or_fails_is_named(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(tiny("bert"), features=["mean"], device="cpu", positions=64)
    two = replicas_of(backbone, ["cpu", "cpu"])
    prepared = backbone.prepare([row["text"].encode() for row in ROWS])
    batches = plan(prepared.lengths, backbone.policy)
    failed, forward = threading.Event(), backbone.forward

    def fails(*given: Any) -> Any:
        failed.set()
        raise DeviceMemoryError("full")

    def follows(prepared: Any, batch: Any) -> Any:  # or the first device may have done all there is
        failed.wait(20)
        return forward(prepared, batch)

    monkeypatch.setattr(two.backbones[0], "forward", follows)
    monkeypatch.setattr(two.backbones[1], "forward", fails)
    with pytest.raises(DeviceMemoryError, match="full"):
        two.run_plan(prepared, batches)
    monkeypatch.undo()
    pooled = FrozenModel._vectors

    def nudged(self: Any, *given: Any) -> Any:
        return pooled(self, *given) * (1 if self is backbone else 1 + 1e-6)

    monkeypatch.setattr(FrozenModel, "_vectors", nudged)
    with pytest.raises(BackboneError, match=r"cpu computes otherwise than cpu \(.*name devices of one kind"):
        replicas_of(backbone, ["cpu", "cpu"])
