"""What must hold on a GPU: ``make gpu``. Skipped where there is none; ``EMBEDCACHE_GPU=cpu`` runs the same on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pictures
import torch
from tiny_models import WORDS

from embedcache.backbone import choose_devices, compute_features, load_backbone, probe_of
from embedcache.cache import FeatureCache
from embedcache.equivalence import check_equivalence
from embedcache.errors import DeviceMemoryError, EmbedcacheWarning, NumericsMismatchError
from embedcache.extract import extract
from embedcache.numerics import difference
from embedcache.predict import Predictor
from embedcache.spec import TrainSpec
from embedcache.train import train_head, train_on_cache

DEVICE = os.environ.get("EMBEDCACHE_GPU", "cuda")
ON_GPU = DEVICE.startswith("cuda")
pytestmark = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="there is no CUDA GPU here")
DTYPES = ("float32", "bfloat16", "float16")
FEATURES = {"bert": ["mean", "cls@-2", "tokens"], "gpt2": ["last"], "vit": ["cls", "tokens"], "resnet": ["mean"]}


@pytest.fixture(scope="module")
def backbone_of(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Give a tiny backbone on the device, by kind and type; batches are small, so that there are several."""
    root = tmp_path_factory.mktemp("pictures")

    def load(kind: str, dtype: str = "float32", **options: Any) -> Any:
        if pictured(kind):
            folder = root / kind if (root / kind).is_dir() else tiny_pictures.build(kind, root / kind)
            options = {"positions": 16, **options}
        else:
            folder, options = tiny(kind), {"positions": 256, **options}
        return load_backbone(folder, features=FEATURES[kind], compute_dtype=dtype, device=DEVICE, **options)

    return load


def pictured(kind: str) -> bool:
    return kind in ("vit", "resnet")


def rows_of(kind: str, count: int, first: int = 0) -> list[dict[str, Any]]:
    """Different rows: texts of 1 to 23 words, or pictures of several sizes."""
    if pictured(kind):
        files = tiny_pictures.pictures(count, first)
        return [{"image": file, "label": "ab"[row % 2]} for row, file in enumerate(files)]
    generator = np.random.default_rng(5)
    words = [" ".join(generator.choice(WORDS, row % 23 + 1)) for row in range(first + count)][first:]
    return [{"text": f"{first + row} {text}", "label": "ab"[row % 2]} for row, text in enumerate(words)]


def contents_of(kind: str, count: int) -> list[bytes]:
    return [row["image"] if pictured(kind) else row["text"].encode() for row in rows_of(kind, count)]


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*.h5")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FEATURES)
def test_a_rows_bits_depend_on_that_row_alone(backbone_of: Callable[..., Any], kind: str, dtype: str) -> None:
    """In another order, alone, beside others, by another model object: 0 differing bits."""
    if not ON_GPU and dtype == "float16":
        pytest.skip("not every CPU kernel has float16")
    backbone = backbone_of(kind, dtype)
    contents = contents_of(kind, 61)
    for name in FEATURES[kind]:
        if name == "tokens":
            continue
        whole = compute_features(backbone, contents, name).values
        assert np.isfinite(whole).all()
        again = compute_features(backbone_of(kind, dtype), contents[::-1], name).values[::-1]
        assert again.tobytes() == whole.tobytes(), f"{int((again != whole).sum())} values of {name} differ"
        for row in (0, 17, 60):
            alone = compute_features(backbone, contents[row : row + 1], name).values
            assert alone.tobytes() == whole[row : row + 1].tobytes(), (name, row)
    assert difference(probe_of(backbone), probe_of(backbone_of(kind, dtype))).same_bits


@pytest.mark.parametrize("kind", FEATURES)
def test_extended_and_cut_otherwise_a_cache_has_the_same_bits(
    backbone_of: Callable[..., Any], kind: str, tmp_path: Path
) -> None:
    backbone, rows = backbone_of(kind), rows_of(kind, 61)
    whole = extract(rows, backbone=backbone, output_dir=tmp_path / "whole")
    extract(rows[:23], backbone=backbone, output_dir=tmp_path / "parts", rows_per_shard=7)
    parts = extract(rows, backbone=backbone_of(kind), output_dir=tmp_path / "parts", rows_per_shard=7)
    name = next(name for name in FEATURES[kind] if name != "tokens")
    a, b = (dict(zip(map(bytes, cache.keys()), cache.features(feature=name), strict=True)) for cache in (whole, parts))
    assert a.keys() == b.keys()
    assert all(a[key].tobytes() == b[key].tobytes() for key in a)


@pytest.mark.parametrize("storage", DTYPES)
def test_what_is_stored_in_fewer_bits(backbone_of: Callable[..., Any], storage: str) -> None:
    exact, stored = (backbone_of("bert", storage_dtype=dtype) for dtype in ("float32", storage))
    contents = contents_of("bert", 19)
    expected = torch.from_numpy(compute_features(exact, contents, "mean").values)
    values = compute_features(stored, contents, "mean").values
    assert np.array_equal(values, expected.to(getattr(torch, storage)).float().numpy())


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_checked_where_it_was_made_and_read_on_a_cpu(
    backbone_of: Callable[..., Any], kind: str, tmp_path: Path
) -> None:
    """A cache of this device passes its check here; a CPU predicts from its head and says how far off it is."""
    backbone, rows = backbone_of(kind), rows_of(kind, 61)
    cache = extract(rows, backbone=backbone, output_dir=tmp_path / "cache", split="80/10/10")
    result = check_equivalence(cache, rows, device=DEVICE)
    assert result.equal, result.to_text()
    head = train_on_cache(cache, spec=TrainSpec(epochs=3), device=DEVICE).head
    head.save_pretrained(tmp_path / "run")
    here, there = (Predictor.load(tmp_path / "run", device=device) for device in (DEVICE, "cpu"))
    assert here.numerics.same_bits
    assert there.numerics.same_bits == (not ON_GPU)
    one, other = (predictor([next(iter(row.values())) for row in rows[:7]]) for predictor in (here, there))
    for a, b in zip(one, other, strict=True):
        assert a.probabilities["a"] == pytest.approx(b.probabilities["a"], abs=1e-3)
    if ON_GPU:
        settings = backbone.recipe.settings.arguments()
        on_cpu = load_backbone(backbone.recipe.source.model, device="cpu", **settings)
        with pytest.raises(NumericsMismatchError, match="accept-numerics"):
            extract(rows_of(kind, 67), backbone=on_cpu, output_dir=tmp_path / "cache")
        with pytest.warns(EmbedcacheWarning):
            both = extract(rows_of(kind, 67), backbone=on_cpu, output_dir=tmp_path / "cache", accept_numerics=True)
        assert len(both) == 67


def test_several_devices(backbone_of: Callable[..., Any], tmp_path: Path) -> None:
    names = choose_devices("all") if ON_GPU else ["cpu", "cpu"]
    if len(names) == 1:
        names *= 2  # the same GPU twice: two streams of passes
    rows = rows_of("bert", 61)
    extract(rows, backbone=backbone_of("bert"), output_dir=tmp_path / "one")
    extract(rows, backbone=backbone_of("bert"), output_dir=tmp_path / "all", devices=",".join(names))
    assert files(tmp_path / "one") == files(tmp_path / "all")


def test_heads_learn_there_what_they_learn_on_a_cpu() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(997, 37)).astype(np.float32)
    y = (x @ generator.normal(size=(37, 5))).argmax(axis=1)
    for head in ("linear", "mlp"):
        spec = TrainSpec(epochs=3, batch_size=101)
        there, here = (
            train_head(x, y, None, None, head, spec, class_names=range(5), device=device).fitted
            for device in (DEVICE, "cpu")
        )
        assert [epoch["train_loss"] for epoch in there.history] == pytest.approx(
            [epoch["train_loss"] for epoch in here.history], rel=1e-3
        )


@pytest.mark.skipif(not ON_GPU, reason="a CPU does not say when its memory is full")
def test_memory_that_does_not_suffice(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """With a few megabytes to allocate, batches shrink; a cache made with larger ones is refused in one line."""
    folder, rows = tiny("bert"), rows_of("bert", 61)
    extract(rows, model=folder, device=DEVICE, output_dir=tmp_path / "cache")
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((held + (24 << 20)) / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.warns(EmbedcacheWarning, match="do not fit in the device's memory"):
            small = extract(rows, model=folder, device=DEVICE, output_dir=tmp_path / "small")
        assert small.spec["shapes"]["positions"] < 32768
        with pytest.raises(DeviceMemoryError, match="smaller batches"):
            extract(rows_of("bert", 67), model=folder, device=DEVICE, output_dir=tmp_path / "cache")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(FeatureCache.open(tmp_path / "cache")) == 61
