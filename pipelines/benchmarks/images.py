"""Pictures: preparing them against the Hugging Face processor, extraction against its pipeline and a plain loop."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from benchmarks.table import interleaved, row, seconds

from embedcache.backbone import kept_for, load_backbone, run_plan
from embedcache.batching import plan
from embedcache.examples import load_examples
from embedcache.extract import run
from embedcache.pictures import decode

REPO = Path(__file__).resolve().parents[2]
PICTURES = 128
BATCH = 32
PATHS = 100_000


def photographs(count: int, seed: int = 0) -> list[bytes]:
    """JPEG files of 500 x 375 pixels: soft shapes with grain, about as large as photographs of that size."""
    from PIL import Image

    random, files = np.random.default_rng(seed), []
    for _ in range(count):
        shapes = Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        grain = random.normal(0, 6, (375, 500, 3))
        picture = Image.fromarray(np.clip(np.asarray(shapes) + grain, 0, 255).astype(np.uint8))
        file = io.BytesIO()
        picture.save(file, "jpeg", quality=85)
        files.append(file.getvalue())
    return files


def models(folder: Path) -> Iterator[tuple[str, Path, str]]:
    """Name, folder and bar of each backbone: real weights of Lite0, real architectures with random weights else."""
    import torch
    from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTImageProcessorPil, ViTModel

    made = subprocess.run(
        [sys.executable, REPO / "data" / "efficientnet_lite.py"], check=True, capture_output=True, text=True
    )
    yield "EfficientNet-Lite0", Path(made.stdout.strip()), "1.4x / 1.25x"
    torch.manual_seed(0)
    vit_small = ViTConfig(hidden_size=384, intermediate_size=1536, num_attention_heads=6)
    for name, network, bar in (
        ("ResNet-50", ResNetModel(ResNetConfig()), "1.4x / 1.25x"),
        ("ViT-S/16", ViTModel(vit_small), "1.05x / report"),
    ):
        network.save_pretrained(folder / name)
        ViTImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(folder / name)
        yield f"{name} (random)", folder / name, bar


def preparing() -> None:
    """From JPEG bytes to pixels on one core: as the backbone prepares them, and by the Hugging Face processor."""
    from transformers import AutoImageProcessor

    files = photographs(64)
    with tempfile.TemporaryDirectory() as directory:
        for name, folder, _ in models(Path(directory)):
            backbone = load_backbone(folder, device="cpu", features=["mean"])
            processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
            ours = backbone.content.processor

            def prepared(ours: Any = ours) -> np.ndarray[Any, Any]:
                return np.asarray(ours.normalized(np.stack([ours(decode(file)) for file in files])))

            def processed(processor: Any = processor) -> np.ndarray[Any, Any]:
                pictures = [processor(decode(file), return_tensors="np")["pixel_values"][0] for file in files]
                return np.stack(pictures)

            times = interleaved({"ours": prepared, "theirs": processed}, rounds=7)
            differing = int((prepared() != processed()).sum())
            each = 1e3 * times["ours"] / len(files)
            row(
                f"from JPEG bytes to pixels vs the Hugging Face processor, one core, {name}",
                f"{times['theirs'] / times['ours']:.2f}x ({each:.2f} ms a picture); {differing:,} values differ",
                "1.5x, 0 values differ",
            )


def images() -> None:
    """Whole extraction from JPEG files, against ``pipeline("image-feature-extraction")`` and a plain loop of 32."""
    preparing()
    files = photographs(PICTURES)
    with tempfile.TemporaryDirectory() as directory:
        written = Path(directory) / "pictures" / "all"
        written.mkdir(parents=True)
        for number, file in enumerate(files):
            (written / f"{number:04}.jpg").write_bytes(file)
        for name, folder, bar in models(Path(directory) / "models"):
            _speed(name, folder, bar, written.parent)
            _kept(name, folder, files[:128])
        again(Path(directory))
    memory()


def _speed(name: str, folder: Path, bar: str, pictures: Path) -> None:
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel, pipeline

    paths = sorted(str(path) for path in pictures.rglob("*.jpg"))
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    network = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    peer = pipeline("image-feature-extraction", model=network, image_processor=processor, device="cpu")

    def plain() -> None:
        with torch.inference_mode():
            for start in range(0, len(paths), BATCH):
                batch = [Image.open(path).convert("RGB") for path in paths[start : start + BATCH]]
                network(**processor(batch, return_tensors="pt"))

    ours = {dtype: load_backbone(folder, compute_dtype=dtype, device="cpu") for dtype in ("float32", "bfloat16")}
    waited = 0.0

    def extract(dtype: str) -> None:
        nonlocal waited
        waited = 0.0
        with tempfile.TemporaryDirectory() as out, patch("embedcache.extract.work.prefetch", _timed(note)):
            run(load_examples(str(pictures), labels="none", kind="image"), ours[dtype], Path(out) / "c")

    def note(spent: float) -> None:
        nonlocal waited
        waited += spent

    works: dict[str, Callable[[], Any]] = {
        "pipeline": lambda: peer(paths, batch_size=BATCH, return_tensors=True),
        "loop": plain,
        "float32": lambda: extract("float32"),
        "bfloat16": lambda: extract("bfloat16"),
    }
    times = interleaved(works, rounds=3)
    against_pipeline, against_loop = (times[peer] / times["float32"] for peer in ("pipeline", "loop"))
    row(
        f"extraction of {len(paths)} JPEG files vs the Hugging Face pipeline / vs a plain loop of {BATCH}, {name}",
        f"{against_pipeline:.2f}x / {against_loop:.2f}x ({len(paths) / times['float32']:.1f} a second)",
        bar,
    )
    row(
        f"the same in bfloat16 against float32's pipeline, {name}",
        f"{times['pipeline'] / times['bfloat16']:.2f}x",
        "3x with AMX, else report",
    )
    whole = seconds(works["float32"])
    row(f"share of the time in which the backbone waits for pictures, {name}", f"{waited / whole:.1%}", "at most 5 %")


def _kept(name: str, folder: Path, files: list[bytes]) -> None:
    """CPU time of passes with freed memory kept for the next layer, and without."""
    backbone = load_backbone(folder, device="cpu")
    prepared = backbone.prepare(files)
    batches = plan(prepared.lengths, backbone.policy)
    spent: dict[str, list[float]] = {"kept": [], "returned": []}
    for turn in range(4):
        for how, times in spent.items():
            with patch("embedcache.backbone.compute.kept_for", kept_for if how == "kept" else _returned):
                begun = time.process_time()
                run_plan(backbone, prepared, batches)
                if turn:
                    times.append(1e3 * (time.process_time() - begun) / len(files))
    kept, returned = min(spent["kept"]), min(spent["returned"])
    row(
        f"CPU time of a picture's pass, {name}: memory returned to the system / kept",
        f"{returned:.1f} / {kept:.1f} ms ({returned / kept:.2f}x)",
    )


def _returned(_: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _timed(note: Callable[[float], None]) -> Callable[..., Any]:
    """Return ``prefetch`` with a clock on how long its reader waits."""
    from embedcache.extract.work import prefetch

    def timed(source: Any, *arguments: Any) -> Any:
        ready = prefetch(source, *arguments)
        try:
            while True:
                items: list[Any] = []
                note(seconds(lambda: items.extend(item for item in [next(ready, None)] if item is not None)))  # noqa: B023
                if not items:
                    return
                yield items[0]
        finally:
            ready.close()

    return timed


def again(directory: Path) -> None:
    """A second extraction, and one with 100 pictures added: batches that are run."""
    folder = next(models(directory))[1]
    backbone = load_backbone(folder, device="cpu")
    pictures, cache = directory / "more" / "all", directory / "again.cache"
    pictures.mkdir(parents=True)
    counts = []
    for files in (photographs(100, 1), [], photographs(100, 2)):
        for number, file in enumerate(files, len(list(pictures.iterdir()))):
            (pictures / f"{number:04}.jpg").write_bytes(file)
        counts.append(run(load_examples(str(pictures.parent), labels="none", kind="image"), backbone, cache).batches)
    row(
        "batches of 100 new pictures, of a second extraction, of one with 100 added",
        f"{counts[0]}, {counts[1]}, {counts[2]}",
        "4, 0, 4",
    )


def memory() -> None:
    """What reading a folder of pictures holds, by the number of paths."""
    # The peak of this process alone: ``ru_maxrss`` would be the parent's where that is larger.
    code = (
        "import sys; from embedcache.examples import load_examples;"
        "load_examples(sys.argv[1], labels='none', kind='image');"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    from PIL import Image

    peaks = {}
    with tempfile.TemporaryDirectory() as directory:
        for paths in (PATHS // 10, PATHS):
            folder = Path(directory) / str(paths) / "all"
            folder.mkdir(parents=True)
            for number in range(paths):
                pixel = Image.new("RGB", (1, 1), (number % 256, number // 256 % 256, number // 65536))
                pixel.save(folder / f"{number}.ppm")
            done = subprocess.run(
                [sys.executable, "-c", code, str(folder.parent)], check=True, capture_output=True, text=True
            )
            peaks[paths] = int(done.stdout.split()[-1]) / 1024
    grown = 1e6 * (peaks[PATHS] - peaks[PATHS // 10]) / (PATHS - PATHS // 10)
    row(
        f"memory of reading {PATHS:,} picture files, whatever their size",
        f"{peaks[PATHS]:,.0f} MB ({peaks[PATHS // 10]:,.0f} MB for {PATHS // 10:,}: {grown:,.0f} bytes a path)",
        "flat",
    )


SECTIONS = (images,)
