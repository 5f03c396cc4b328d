"""Memory is flat in the number of pictures: pixels are there for as many as are prepared at once, and no files."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pictures
from PIL import Image

import embedcache as ec
from embedcache import shard
from embedcache.backbone import LoadedBackbone, compute, compute_features, compute_sets, compute_views, load_backbone
from embedcache.cache import CacheWriter, writer
from embedcache.dataset import Contents
from embedcache.extract import run
from embedcache.finetune import (
    FeatureBasedModel,
    ImageClassificationPipeline,
    LinearClassifier,
    fine_tune,
    live_outputs,
)
from embedcache.spec import TrainSpec

FEW, MANY, AT_ONCE = 23, 89, 11
PIXELS = 3 * tiny_pictures.SIDE**2
"""The bytes of one prepared picture."""
SIDE = 31
FILE = 3 * SIDE**2
"""The bytes of one file, and a few more."""


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pictures.build("vit", tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many pictures in files, uncompressed."""
    root = tmp_path_factory.mktemp("pictures")
    for name in "ab":
        (root / name).mkdir()
    for number in range(MANY):
        Image.new("RGB", (SIDE, SIDE), (number, 7, 11)).save(root / "ab"[number % 2] / f"{number:03}.bmp")
    return root


@pytest.fixture(scope="module")
def contents(folder: Path) -> Contents:
    return ec.load_examples(folder).packed_contents


def backbone_of(vit: Path, **options: int) -> LoadedBackbone:
    return load_backbone(vit, features=("mean",), positions=3, device="cpu", **options)


def growth(work: Callable[[int], object]) -> float:
    """Return by how many bytes a picture the memory at its highest grows with the number of pictures."""

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            work(count)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    work(FEW)  # what the first call keeps
    return (peak(MANY) - peak(FEW)) / (MANY - FEW)


def ways(vit: Path, folder: Path, contents: Contents) -> dict[str, Callable[[int], object]]:
    """Return what runs a backbone over so many pictures, by name."""
    plain, with_views = backbone_of(vit), backbone_of(vit, views=2)
    model = FeatureBasedModel(backbone_of(vit), LinearClassifier(22, 2))
    pipeline = ImageClassificationPipeline(vit, num_classes=2, pooling="mean", device="cpu")
    files = [str(file) for file in sorted(folder.glob("*/*.bmp"))]
    labels = np.arange(MANY) % 2

    def some(count: int) -> Contents:
        return contents.select(np.arange(count))

    def tune(count: int) -> object:
        rows, y = some(count), labels[:count]
        spec = TrainSpec(epochs=1, batch_size=7)
        return fine_tune(model, rows, y, rows, y, spec, class_names=("a", "b"), progress=False)

    return {
        "features": lambda count: compute_features(plain, some(count), "mean"),
        "all sets of views": lambda count: compute_sets(with_views, some(count), ("mean", "mean:view2")),
        "one view": lambda count: compute_views(with_views, some(count), np.arange(count) % 3, "mean"),
        "fine-tuning": tune,
        "a live model": lambda count: live_outputs(model, some(count)),
        "the pipeline": lambda count: pipeline.prepare_data(files[:count], labels[:count].tolist()),
    }


def test_pixels_are_there_for_a_block_of_pictures(
    vit: Path, folder: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ways(vit, folder, contents)
    monkeypatch.setattr(compute, "PREPARED_BYTES", AT_ONCE * PIXELS)
    grown = {name: growth(work) for name, work in made.items()}
    assert max(grown.values()) < 0.7 * min(PIXELS, FILE), grown
    monkeypatch.undo()  # the old way: all of them at once
    grown = {name: growth(work) for name, work in made.items()}
    assert min(grown.values()) > PIXELS, grown


def test_blocks_change_no_bit(vit: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, views = backbone_of(vit, views=2), np.arange(MANY) % 3

    def computed() -> list[bytes]:
        sets = compute_sets(backbone, contents, ("mean", "mean:view1"))
        sets["one"] = compute_views(backbone, contents, views, "mean")
        return [x.values.tobytes() for x in sets.values()]

    whole = computed()
    monkeypatch.setattr(compute, "PREPARED_BYTES", AT_ONCE * PIXELS)
    assert computed() == whole


def test_a_live_model_learns_the_same_from_pictures_that_are_decoded_when_they_are_wanted(
    vit: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learned() -> list[bytes]:
        model = FeatureBasedModel(backbone_of(vit), LinearClassifier(22, 2), freeze_backbone=False)
        y = np.arange(MANY) % 2
        spec = TrainSpec(epochs=2, batch_size=7)
        result = fine_tune(model, contents, y, contents, y, spec, class_names=("a", "b"), progress=False)
        return [
            result.head.probabilities(contents).tobytes(),
            *(part.numpy().tobytes() for part in model.state_dict().values()),
        ]

    whole = learned()
    monkeypatch.setattr(compute, "PREPARED_BYTES", AT_ONCE * PIXELS)
    assert learned() == whole


def test_files_that_are_kept_are_there_one_after_the_other(
    vit: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, examples = backbone_of(vit), ec.load_examples(folder)
    run(examples, backbone, tmp_path / "c")
    monkeypatch.setattr(shard, "_PIECE", 1000)
    hashes = []

    def keep(count: int) -> None:
        some = examples.select(np.arange(count))
        with CacheWriter(tmp_path / "c", backbone.identity, backbone.feature_sets) as cache:
            cache.commit_dataset(some, some.packed_contents)
        (file,) = (tmp_path / "c" / "examples").iterdir()
        hashes.append(file.name.split("-")[1])

    def at_once(columns: Mapping[str, Any], name: str, contents: Contents) -> Iterator[bytes]:
        return iter([shard.build({**columns, name: np.frombuffer(b"".join(contents), np.uint8)})])

    assert growth(keep) < 0.4 * FILE
    monkeypatch.setattr(writer, "pieces", at_once)  # the old way
    assert growth(keep) > FILE
    assert hashes[:3] == hashes[3:]
