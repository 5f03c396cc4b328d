"""Pictures: preparing them against the Hugging Face processor, extraction against its pipeline and a plain loop."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from benchmarks.equivalence import HEADS
from benchmarks.table import interleaved, row, seconds

from embedcache.backbone import kept_for, load_backbone, run_plan
from embedcache.backbone.pictures import Pixels
from embedcache.batching import Batch, plan
from embedcache.equivalence import check_equivalence
from embedcache.examples import load_examples
from embedcache.extract import extract, run
from embedcache.pictures import decode

REPO = Path(__file__).resolve().parents[2]
MODELS = ("EfficientNet-Lite0", "ResNet-50", "ViT-S/16")
PICTURES = 128
BATCH = 32
STEPS = 10
PATHS = 100_000
WAITING = 640


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


@contextlib.contextmanager
def model(name: str) -> Iterator[Path]:
    """Give the folder of a backbone: the real weights of Lite0, real architectures with random weights else."""
    import torch
    from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTImageProcessorPil, ViTModel

    if name == "EfficientNet-Lite0":
        command = [sys.executable, REPO / "data" / "efficientnet_lite.py"]
        yield Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
        return
    torch.manual_seed(0)
    vit_small = ViTConfig(hidden_size=384, intermediate_size=1536, num_attention_heads=6)
    with tempfile.TemporaryDirectory() as folder:
        (ResNetModel(ResNetConfig()) if name == "ResNet-50" else ViTModel(vit_small)).save_pretrained(folder)
        ViTImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(folder)
        yield Path(folder)


def preparing() -> None:
    """CPU time from JPEG bytes to what a network is given: by a backbone, and by its Hugging Face processor."""
    import torch
    from transformers import AutoImageProcessor

    files = photographs(2 * BATCH)
    for name in MODELS:
        with model(name) as folder, one_core():
            content = load_backbone(folder, device="cpu", features=["mean"]).content
            processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

            def prepared(content: Any = content) -> Any:
                batches = [content.prepare(files[start : start + BATCH]) for start in (0, BATCH)]
                laid = [content.lay_out(batch, Batch(1, BATCH, np.arange(BATCH))) for batch in batches]
                return torch.cat([each.arguments["pixel_values"] for each in laid])

            def processed(processor: Any = processor) -> Any:
                batches = [[decode(file) for file in files[start : start + BATCH]] for start in (0, BATCH)]
                return torch.cat([processor(batch, return_tensors="pt")["pixel_values"] for batch in batches])

            times = interleaved({"ours": prepared, "theirs": processed}, rounds=9, clock=time.process_time)
            differing = int((prepared() != processed()).sum())
        each = 1e3 * times["ours"] / len(files)
        row(
            f"CPU time from JPEG bytes to pixels vs the Hugging Face processor, one core, {name}",
            f"{times['theirs'] / times['ours']:.2f}x ({each:.2f} ms a picture); {differing:,} values differ",
            "1.5x, 0 values differ",
        )


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Leave this process one core, where the system can."""
    from embedcache.backbone import threads

    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if cores:
        os.sched_setaffinity(0, {min(cores)})
    try:
        with threads(1):
            yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)


def lite0() -> None:
    """EfficientNet-Lite0: extraction against the Hugging Face pipeline and a plain loop of 32."""
    _speed("EfficientNet-Lite0", "1.4x / 1.25x", PICTURES)


def resnet50() -> None:
    """ResNet-50, random weights: the same."""
    _speed("ResNet-50", "1.4x / 1.25x", PICTURES)


def vit_small() -> None:
    """ViT-S/16, random weights: the same."""
    _speed("ViT-S/16", "1.05x / report", PICTURES)


def _speed(name: str, bar: str, count: int) -> None:
    files = photographs(count)
    with tempfile.TemporaryDirectory() as directory, model(name) as folder:
        written = Path(directory) / "all"
        written.mkdir()
        for number, file in enumerate(files):
            (written / f"{number:04}.jpg").write_bytes(file)
        _against_others(name, folder, bar, Path(directory))
        _kept(name, folder, files[:64])


def _against_others(name: str, folder: Path, bar: str, pictures: Path) -> None:
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

    def extracted(dtype: str) -> None:
        _extracted(ours[dtype], pictures)

    works: dict[str, Callable[[], Any]] = {
        "pipeline": lambda: peer(paths, batch_size=BATCH, return_tensors=True),
        "loop": plain,
        "float32": lambda: extracted("float32"),
        "bfloat16": lambda: extracted("bfloat16"),
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


def _extracted(backbone: Any, pictures: Path) -> None:
    """The whole of an extraction of a folder, reading and commits included."""
    with tempfile.TemporaryDirectory() as out:
        run(load_examples(str(pictures), labels="none", kind="image"), backbone, Path(out) / "c")


def waiting() -> None:
    """The share of an extraction in which the backbone waits for pictures: for the first window above all."""
    files = photographs(WAITING)
    for name in MODELS:
        with tempfile.TemporaryDirectory() as directory, model(name) as folder:
            pictures = Path(directory) / "all"
            pictures.mkdir()
            for number, file in enumerate(files):
                (pictures / f"{number:04}.jpg").write_bytes(file)
            backbone, waits = load_backbone(folder, device="cpu"), list[float]()
            with _clock_on_waiting(backbone, waits.append):
                whole = seconds(lambda: _extracted(backbone, Path(directory)))  # noqa: B023
        row(
            f"share of an extraction of {len(files)} pictures in which the backbone waits for them, {name}",
            f"{sum(waits) / whole:.1%}",
            "at most 5 %",
        )


def _kept(name: str, folder: Path, files: list[bytes]) -> None:
    """CPU time of passes with freed memory kept for the next layer, and without."""
    backbone = load_backbone(folder, device="cpu")
    prepared = backbone.prepare(files)
    batches = plan(prepared.lengths, backbone.policy)
    spent: dict[str, list[float]] = {"kept": [], "returned": []}
    for turn in range(3):
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


@contextlib.contextmanager
def _clock_on_waiting(backbone: Any, note: Callable[[float], None]) -> Iterator[None]:
    """Note how long an extraction waits for the next window, and its passes, of which several run, for their rows."""
    here = sys.modules["embedcache.extract.here"]
    wait, next_window = Pixels.wait, here.prefetch
    passes = backbone.side_by_side(backbone.policy.rows(1))

    def for_window(windows: Any) -> Iterator[Any]:
        with contextlib.closing(next_window(windows)) as ready:
            while True:
                begun = time.perf_counter()
                window = next(ready, None)
                note(time.perf_counter() - begun)
                if window is None:
                    return
                yield window

    def for_rows(pixels: Pixels, rows: Any = None) -> None:
        begun = time.perf_counter()
        wait(pixels, rows)
        if not threading.current_thread().name.startswith("embedcache-read"):  # which waits for the whole window
            note((time.perf_counter() - begun) / passes)

    with patch.object(here, "prefetch", for_window), patch.object(Pixels, "wait", for_rows):
        yield


def pictures_again() -> None:
    """A second extraction, and one with 100 pictures added: batches that are run."""
    counts = []
    with tempfile.TemporaryDirectory() as directory, model("EfficientNet-Lite0") as folder:
        backbone = load_backbone(folder, device="cpu")
        pictures, cache = Path(directory) / "pictures" / "all", Path(directory) / "cache"
        pictures.mkdir(parents=True)
        for files in (photographs(100, 1), [], photographs(100, 2)):
            for number, file in enumerate(files, len(list(pictures.iterdir()))):
                (pictures / f"{number:04}.jpg").write_bytes(file)
            examples = load_examples(str(pictures.parent), labels="none", kind="image")
            counts.append(run(examples, backbone, cache).batches)
    needed = -(-100 // backbone.policy.rows(1))
    row(
        "batches of 100 new pictures, of a second extraction, of one with 100 added",
        f"{counts[0]}, {counts[1]}, {counts[2]}",
        f"{needed}, 0, {needed}",
    )


def pictures_equivalence() -> None:
    """Every kind of head on Lite0, float32: differing values, cached against the backbone in the loop."""
    rows = [
        {"image": file, "label": "ab"[number % 2], "split": "validation" if number % 5 == 4 else "train"}
        for number, file in enumerate(photographs(40))
    ]
    with tempfile.TemporaryDirectory() as directory, model("EfficientNet-Lite0") as folder:
        cache = extract(rows, output_dir=Path(directory) / "c", model=folder, device="cpu",
                        pooling=["l2:mean", "tokens"])  # fmt: skip
        counts = {}
        for head, feature in HEADS.items():
            found = check_equivalence(
                cache, rows, head=head, feature=feature, steps=STEPS, progress=False, reference="canonical"
            )
            bits = [each.difference for each in found.comparisons]
            counts[head] = sum(each.values - each.identical for each in bits), sum(each.values for each in bits)
    row(
        f"values that differ in any bit, cached vs live backbone, {STEPS} steps, Lite0: {', '.join(counts)}",
        f"{sum(differing for differing, _ in counts.values()):,} of {sum(values for _, values in counts.values()):,}",
        "0",
    )


def pictures_memory() -> None:
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


SECTIONS = (preparing, lite0, resnet50, vit_small, waiting, pictures_equivalence, pictures_again, pictures_memory)
