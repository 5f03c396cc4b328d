"""The number of threads is part of the canonical shape: whatever else runs, and however, a row keeps its bits.

Whether another number of threads changes a bit depends on the CPU. So each backbone here has a planted fault that makes
it visible on every machine: its hidden states are scaled by the number of threads that the pass finds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import WORDS

from embedcache import FeatureCache, extract
from embedcache.backbone import LoadedBackbone, Workers, compute_features, load_backbone, probe_of, processes, threads
from embedcache.backbone.compute import run_plan
from embedcache.backbone.model import Recipe
from embedcache.batching import plan
from embedcache.errors import BackboneError
from embedcache.examples import load_examples
from embedcache.extract import Here, run
from embedcache.numerics import Outcome, Probe
from embedcache.spec import ModelSource

MODELS = ("minilm", "bert", "gpt2", "modernbert")
Texts = list[dict[str, str]]


def planted(folder: Path, dtype: str, **settings: Any) -> LoadedBackbone:
    """A backbone whose features show with how many threads they were computed."""
    backbone = load_backbone(str(folder), features=["mean", "cls"], compute_dtype=dtype, device="cpu", **settings)

    def scale(module: Any, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * (1 + torch.get_num_threads() / 4)
        return output

    backbone.network.register_forward_hook(scale)
    return backbone


@pytest.fixture(scope="session")
def folder_of(tiny: Callable[[str], Path], minilm_path: Path) -> Callable[[str], Path]:
    return lambda kind: minilm_path if kind == "minilm" else tiny(kind)


def texts(count: int) -> Texts:
    """Texts of 1 to 23 words, so that there are several canonical lengths, few with a whole batch."""
    generator = np.random.default_rng(5)
    return [{"text": f"{row} " + " ".join(generator.choice(WORDS, row % 23 + 1))} for row in range(count)]


def contents_of(rows: Texts) -> list[bytes]:
    return [row["text"].encode() for row in rows]


def features(cache: FeatureCache) -> dict[str, np.ndarray]:
    return {name: np.asarray(cache.features(feature=name)) for name in cache.feature_sets}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, values in expected.items():
        different = int((found[name].view(np.uint32) != values.view(np.uint32)).sum())
        assert not different, f"{different} of {values.size} values of {name} differ"


@pytest.fixture
def others_threads() -> Iterator[None]:
    """Somebody else, who sets the number of torch threads all the time."""
    stop = threading.Event()

    def disturb() -> None:
        while not stop.wait(0.001):
            torch.set_num_threads(3)
            torch.set_num_threads(5)

    thread = threading.Thread(target=disturb)
    before = torch.get_num_threads()
    thread.start()
    yield
    stop.set()
    thread.join()
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_row_keeps_its_bits(
    folder_of: Callable[[str], Path], tmp_path: Path, kind: str, dtype: str, others_threads: None
) -> None:
    """1, 2 and 8 threads, shards of 7 rows, three sittings, one row, two passes at once, threads set by others."""
    rows = texts(53 if kind == "minilm" else 101)
    backbone = planted(folder_of(kind), dtype, positions=256)
    options: dict[str, Any] = {"backbone": backbone, "labels": "none"}

    def caches() -> Iterator[FeatureCache]:
        for count in (1, 2, 8):  # 8: more threads than a window of 7 rows has batches
            yield extract(rows, output_dir=tmp_path / f"threads{count}", threads=count, **options)
            yield extract(
                rows, output_dir=tmp_path / f"shards{count}", threads=count, rows_per_shard=7, **options
            )  # fmt: skip
        for count, upto in ((8, 5), (2, 31), (1, len(rows))):  # a lone row, a few, and the rest
            sittings = extract(rows[:upto], output_dir=tmp_path / "sittings", threads=count, **options)
        yield sittings

    first, *others = caches()
    expected = features(first)
    for cache in others:
        assert_same(features(cache), expected)
    contents = contents_of(rows)
    for count in (1, 2, 8):
        with threads(count):
            row = 17 * count % len(rows)
            alone = compute_features(backbone, contents[row : row + 1], "mean").values
            assert alone.tobytes() == expected["mean"][row : row + 1].tobytes()
            assert torch.get_num_threads() == count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_passes_at_once(folder_of: Callable[[str], Path], dtype: str) -> None:
    """Two threads of one process, each with another number of torch threads, and one that changes its own meanwhile."""
    backbone = planted(folder_of("minilm"), dtype)
    contents = contents_of(texts(3))  # so few passes that each could have all threads
    expected = compute_features(backbone, contents, "cls").values
    found: dict[int, np.ndarray] = {}

    def work(count: int) -> None:
        torch.set_num_threads(count)
        found[count] = compute_features(backbone, contents[::-1], "cls").values[::-1]

    workers = [threading.Thread(target=work, args=(count,)) for count in (1, 4)]
    before = torch.get_num_threads()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.set_num_threads(before)
    assert all(found[count].tobytes() == expected.tobytes() for count in (1, 4))


def test_threads_changed_in_the_middle(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Whoever is told of the progress may set the number of threads of the very thread that runs the passes."""
    backbone = planted(folder_of("bert"), "float32", positions=64)
    rows = texts(67)
    expected = features(extract(rows, output_dir=tmp_path / "calm", backbone=backbone, labels="none"))

    class Meddler:
        def expect(self, tokens: int) -> None:
            torch.set_num_threads(2)

        def advance(self, rows: int, tokens: int) -> None:
            torch.set_num_threads(3)

        def close(self) -> None:
            pass

    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            found = extract(
                rows, output_dir=tmp_path / str(count), backbone=backbone, labels="none", threads=count,
                progress=Meddler(), rows_per_shard=11,
            )  # fmt: skip
            assert_same(features(found), expected)
    finally:
        torch.set_num_threads(before)


def test_the_planted_fault_is_seen(folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests can fail: a pass that has all threads gives other features."""
    import embedcache.backbone.model as model

    backbone = planted(folder_of("bert"), "float32")
    contents = contents_of(texts(3))
    expected = compute_features(backbone, contents, "mean").values
    monkeypatch.setattr(model, "threads", lambda count: threads(2))
    assert compute_features(backbone, contents, "mean").values.tobytes() != expected.tobytes()


def test_pass_threads_are_part_of_the_identity(folder_of: Callable[[str], Path]) -> None:
    """A policy may say another number: then every pass has it, and the cache is another one."""
    one, two = (planted(folder_of("bert"), "float32", pass_threads=count) for count in (None, 2))
    assert (one.identity["shapes"]["threads"], two.identity["shapes"]["threads"]) == (1, 2)
    contents = contents_of(texts(3))
    with threads(8):
        assert two.side_by_side(9) == 4
        ratio = compute_features(two, contents, "mean").values / compute_features(one, contents, "mean").values
    np.testing.assert_allclose(ratio, 1.5 / 1.25, rtol=1e-4)


def test_processes_compute_what_one_does(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More passes than one process keeps busy are run in others: the same bytes; their faults are one line."""
    for name in ("compute", "processes"):
        monkeypatch.setattr(f"embedcache.backbone.{name}.MOST_PASSES", 1)
    monkeypatch.setattr(import_module("embedcache.extract.work"), "PROCESS_ROWS", 1)
    features_asked = ["mean", "tokens", "cls@all"]
    backbone = load_backbone(str(folder_of("bert")), features=features_asked, device="cpu", positions=32)
    examples = load_examples(texts(43), labels="none")
    run(examples, backbone, tmp_path / "one", engine=Here(2), rows_per_shard=17)
    passes: list[int] = []
    together = Workers.run_plan

    def counted(self: Workers, prepared: Any, batches: Any, done: Any) -> Any:
        passes.append(len(batches))
        return together(self, prepared, batches, done)

    monkeypatch.setattr(Workers, "run_plan", counted)
    run(examples, backbone, tmp_path / "two", engine=Here(2, processes=True), rows_per_shard=17)
    assert len(passes) == 3
    files = {path.relative_to(tmp_path / "one"): path.read_bytes() for path in (tmp_path / "one").rglob("*.*")}
    assert {path.relative_to(tmp_path / "two"): path.read_bytes() for path in (tmp_path / "two").rglob("*.*")} == files


def test_few_batches_are_divided_among_all_processes(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window of pictures has a few dozen: handed out as many as one process likes, most processes would wait."""
    backbone = load_backbone(str(folder_of("bert")), features=["mean"], device="cpu", positions=16)
    handed: list[int] = []

    class Pool:
        def __init__(self, *settings: Any) -> None:
            pass

        def submit(self, run: Any, prepared: Any, batches: Any) -> Future[Any]:
            handed.append(len(batches))
            future: Future[Any] = Future()
            future.set_result(run_plan(backbone, prepared, batches))
            return future

    monkeypatch.setattr(processes, "ProcessPoolExecutor", Pool)
    assert backbone.recipe is not None
    tokens = backbone.prepare(contents_of(texts(61)))
    batches = plan(tokens.lengths, backbone.policy)
    together = Workers(backbone, backbone.recipe, 4, 8).run_plan(tokens, batches)
    assert len(batches) > 12
    assert len(handed) == 4
    assert max(handed) - min(handed) <= 3
    assert together["mean"].values.tobytes() == run_plan(backbone, tokens, batches)["mean"].values.tobytes()


def test_a_process_that_would_compute_otherwise_says_so(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes.signal, "signal", lambda *_: None)
    backbone = load_backbone(str(folder_of("bert")), features=["mean"], device="cpu")
    assert backbone.recipe is not None
    probe = probe_of(backbone)
    assert probe is not None
    nudged = Probe(probe.inputs, probe.versions, {"mean": Outcome.of(np.ones(66, np.float32), "float32")})
    count = torch.get_num_threads()

    def with_settings(**changed: Any) -> Recipe:
        return replace(backbone.recipe, settings=replace(backbone.recipe.settings, **changed))

    for recipe, recorded, reason in (
        (backbone.recipe, probe, None),
        (backbone.recipe, nudged, "computes otherwise than this one"),
        (with_settings(max_length=13, shapes=None), probe, "have changed since they were loaded"),
        (replace(backbone.recipe, source=ModelSource("/nowhere")), probe, "/nowhere"),
    ):
        monkeypatch.setattr(processes, "_reason", None)
        processes._start(recipe, backbone.identity, recorded, count)
        tokens = backbone.prepare([b"good"])
        if reason is None:
            processes._run(tokens, plan(tokens.lengths, backbone.policy))
        else:
            with pytest.raises(BackboneError, match=reason):
                processes._run(tokens, plan(tokens.lengths, backbone.policy))
