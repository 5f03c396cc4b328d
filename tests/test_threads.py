"""The number of threads is part of the canonical shape: whatever else runs, and however, a row keeps its bits.

Whether another number of threads changes a bit depends on the CPU. So each backbone here has a planted fault that makes
it visible on every machine: its hidden states are scaled by the number of threads that the pass finds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import WORDS

from embedcache import FeatureCache, extract
from embedcache.backbone import LoadedBackbone, Recipe, compute_features, load_backbone, probe_of, threads
from embedcache.errors import BackboneError, WorkerRefusedError
from embedcache.examples import load_examples
from embedcache.extract import Elsewhere, Here, Proof, run
from embedcache.extract import worker as far_side
from embedcache.extract.worker import Job
from embedcache.fingerprint import hash_json
from embedcache.numerics import Outcome, Probe
from embedcache.spec import ModelSource

MODELS = ("short minilm", "bert", "gpt2", "modernbert")
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
def folder_of(tiny: Callable[[str], Path], short_minilm: Path) -> Callable[[str], Path]:
    return lambda kind: short_minilm if kind == "short minilm" else tiny(kind)


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
    rows = texts(19 if kind == "short minilm" else 53)
    backbone = planted(folder_of(kind), dtype, positions=256)
    options: dict[str, Any] = {"backbone": backbone, "labels": "none"}

    def caches() -> Iterator[FeatureCache]:
        for count in (1, 2, 8):  # 8: more threads than a window of 7 rows has batches
            yield extract(rows, output_dir=tmp_path / f"threads{count}", threads=count, **options)
        yield extract(rows, output_dir=tmp_path / "shards", threads=8, rows_per_shard=7, **options)
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
    backbone = planted(folder_of("short minilm"), dtype)
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
    """Where there are more cores than one process keeps busy, others do the work: the same bytes."""
    at_work = import_module("embedcache.extract.here")
    monkeypatch.setattr("embedcache.backbone.compute.MOST_PASSES", 1)
    monkeypatch.setattr(at_work, "MOST_PASSES", 1)
    monkeypatch.setattr(at_work, "PROCESS_ROWS", 1)
    features_asked = ["mean", "tokens", "cls@all"]
    backbone = load_backbone(str(folder_of("bert")), features=features_asked, device="cpu", positions=32)
    examples = load_examples(texts(43), labels="none")
    run(examples, backbone, tmp_path / "one", engine=Here(2), rows_per_shard=17)
    windows: list[int] = []
    together = Elsewhere.map

    def counted(self: Elsewhere, backbone: Any, given: Any, watch: Any) -> Any:
        for computed in together(self, backbone, given, watch):
            windows.append(len(computed.rows))
            yield computed

    monkeypatch.setattr(Elsewhere, "map", counted)
    run(examples, backbone, tmp_path / "two", engine=Here(2, processes=True), rows_per_shard=17)
    assert windows == [17, 17, 9]
    files = {path.relative_to(tmp_path / "one"): path.read_bytes() for path in (tmp_path / "one").rglob("*.*")}
    assert {path.relative_to(tmp_path / "two"): path.read_bytes() for path in (tmp_path / "two").rglob("*.*")} == files


def test_a_process_that_computes_otherwise_than_this_one_ends_the_run(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work = import_module("embedcache.extract.here")
    monkeypatch.setattr(at_work, "MOST_PASSES", 1)
    monkeypatch.setattr(at_work, "PROCESS_ROWS", 1)
    nudged = Probe((), {}, {"mean": Outcome.of(np.ones(66, np.float32), "float32")})
    monkeypatch.setattr(Elsewhere, "prove", lambda *_: Proof(nudged, {}))
    backbone = load_backbone(str(folder_of("bert")), features=["mean"], device="cpu")
    with pytest.raises(BackboneError, match=r"computes otherwise than this one .*: extract --threads 1"):
        run(load_examples(texts(3), labels="none"), backbone, tmp_path, engine=Here(2, processes=True))


def test_a_worker_that_cannot_be_what_it_is_for_says_so(folder_of: Callable[[str], Path]) -> None:
    backbone = load_backbone(str(folder_of("bert")), features=["mean"], device="cpu")
    recipe = backbone.recipe
    assert recipe is not None
    nowhere = Recipe(ModelSource("/nowhere"), recipe.settings)
    shorter = replace(recipe, settings=replace(recipe.settings, max_length=13, shapes=None))
    for token, made, named, reason in (
        ("a", recipe, recipe.source, None),
        ("b", shorter, recipe.source, "has other files of .* than this machine"),
        ("c", nowhere, ModelSource("/nowhere/else"), "cannot load the backbone: .*/nowhere/else"),
        ("d", nowhere, recipe.source, None),
    ):
        job = Job(token, made, hash_json(backbone.identity), named, "cpu", 1)
        if reason is None:
            assert far_side.prove(job).probe == probe_of(backbone)
        else:
            with pytest.raises(WorkerRefusedError, match=reason):
                far_side.prove(job)
