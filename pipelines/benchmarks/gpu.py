"""A GPU: rows a second and share of its peak, against a plain loop and sentence-transformers; bits; where time goes.

``EMBEDCACHE_GPU=cpu python pipelines/benchmark.py gpu --rows 64`` runs the same on a CPU, to see that it runs.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.extraction import snippets
from benchmarks.table import SETTINGS, row, seconds

from embedcache.backbone import load_backbone, resolve_model, run_plan
from embedcache.batching import plan
from embedcache.examples import load_examples
from embedcache.extract import run
from embedcache.spec import TrainSpec
from embedcache.train import train_head

DEVICE = os.environ.get("EMBEDCACHE_GPU", "cuda")
TOKENS = 128
PEER_BATCHES = (32, 128, 512)
HEAD_ROWS = 100_000


@dataclass(frozen=True)
class Precision:
    """A type that networks run in; float32 with its products in TF32 or not."""

    name: str
    dtype: str
    tf32: bool = False


PRECISIONS = (
    Precision("float32", "float32"),
    Precision("float32 with TF32", "float32", tf32=True),
    Precision("bfloat16", "bfloat16"),
    Precision("float16", "float16"),
)


def gpu() -> None:
    """MiniLM, BERT-base and ViT-B/16 (both with random weights) on a GPU; skipped where there is none."""
    import torch

    on_gpu = DEVICE.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        row("figures of a GPU", "there is none here")
        return
    kind = torch.cuda.get_device_name() if on_gpu else "a CPU, which only shows that this runs"
    row("device", f"{kind}, torch {torch.__version__}")
    peaks = {}
    for precision in PRECISIONS:
        if on_gpu or precision.dtype != "float16":
            peaks[precision] = _gemm_peak(precision)
            row(f"GEMM peak, {precision.name}", f"{peaks[precision] / 1e12:,.1f} TFLOP/s")
    with tempfile.TemporaryDirectory() as directory:
        for model in _models(Path(directory)):
            for precision, peak in peaks.items():
                _speed(model, precision, peak)
            _bits(model)
            _compiled(model)
            _profile(model)
    _heads()


@dataclass(frozen=True)
class Model:
    """A network, its rows' contents, and the floating-point operations of one position's products."""

    name: str
    folder: Path
    contents: list[bytes]
    positions: int
    unit: str

    def operations(self, network: Any) -> float:
        """Return the operations of a row's products, attention's included: 2 for each weight of its blocks."""
        import torch

        config = network.config
        blocks = [part for part in network.modules() if isinstance(part, torch.nn.ModuleList)]
        weights = sum(
            part.weight.numel() for block in blocks[:1] for part in block.modules() if isinstance(part, torch.nn.Linear)
        )
        attention = 4 * self.positions * config.hidden_size * config.num_hidden_layers
        return float(self.positions * (2 * weights + attention))


def _models(directory: Path) -> Iterator[Model]:
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel, ViTConfig, ViTImageProcessorPil, ViTModel

    minilm = resolve_model(None)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    texts = _long_texts(tokenizer, SETTINGS["rows"])
    yield Model(f"MiniLM, {TOKENS} tokens", minilm, texts, TOKENS, "tokens")
    torch.manual_seed(0)
    BertModel(BertConfig()).save_pretrained(directory / "bert")
    tokenizer.save_pretrained(directory / "bert")
    yield Model(f"BERT-base (random), {TOKENS} tokens", directory / "bert", texts, TOKENS, "tokens")
    ViTModel(ViTConfig()).save_pretrained(directory / "vit")
    ViTImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(directory / "vit")
    yield Model("ViT-B/16 (random)", directory / "vit", _pictures(SETTINGS["rows"]), 197, "images")


def _long_texts(tokenizer: Any, count: int) -> list[bytes]:
    """Real reviews, one after the other, cut so that each has ``TOKENS`` tokens with the two special ones."""
    words = tokenizer(" ".join(record["text"] for record in snippets()), add_special_tokens=False, verbose=False)
    ids, own = words["input_ids"], TOKENS - 2
    starts = [(number * 37) % (len(ids) - own) for number in range(count)]
    return [tokenizer.decode(ids[start : start + own]).encode() for start in starts]


def _pictures(count: int) -> list[bytes]:
    from benchmarks.images import photographs

    files = photographs(min(count, 256))
    return [file + bytes(1 + number // len(files)) for number, file in zip(range(count), files * count, strict=False)]


def _load(model: Model, precision: Precision, **options: Any) -> Any:
    texts = {"max_length": TOKENS} if model.unit == "tokens" else {}
    return load_backbone(
        model.folder, features=["mean"], compute_dtype=precision.dtype, device=DEVICE, **texts, **options
    )


@contextmanager
def _tf32(on: bool) -> Iterator[None]:
    import torch

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _wait() -> None:
    import torch

    if DEVICE.startswith("cuda"):
        torch.cuda.synchronize()


def _best(work: Callable[[], Any], rounds: int = 3) -> float:
    """Return the shortest of some runs after one to warm up, the device's work included."""

    def waited() -> None:
        work()
        _wait()

    waited()
    return min(seconds(waited) for _ in range(rounds))


def _gemm_peak(precision: Precision) -> float:
    import torch

    size = 8192 if DEVICE.startswith("cuda") else 1024
    square = torch.randn(size, size, device=DEVICE).to(getattr(torch, precision.dtype))
    with _tf32(precision.tf32):
        return 2 * size**3 / _best(lambda: square @ square, rounds=10)


def _speed(model: Model, precision: Precision, peak: float) -> None:
    """Passes alone, and a whole extraction, against a plain loop and sentence-transformers at their best."""
    with _tf32(precision.tf32):
        backbone = _load(model, precision)
        prepared = backbone.prepare(model.contents)
        batches = plan(prepared.lengths, backbone.policy)
        passes = _best(lambda: run_plan(backbone, prepared, batches))
        key = "text" if model.unit == "tokens" else "image"
        records = [{key: text.decode() if key == "text" else text} for text in model.contents]

        def extract() -> None:
            with tempfile.TemporaryDirectory() as folder:
                run(load_examples(records, labels="none"), backbone, Path(folder) / "c")

        whole = _best(extract)
        count, per_row = len(model.contents), TOKENS if model.unit == "tokens" else 1
        reached = count * model.operations(backbone.network) / passes / peak
        figures = [
            f"{count * per_row / passes:,.0f} {model.unit}/s in passes ({reached:.0%} of the GEMM peak)",
            f"{count * per_row / whole:,.0f} with reading, tokens or pixels, and commits",
        ]
        for name, work in _peers(model, precision):
            batch, best = min(((batch, _best(lambda: work(batch))) for batch in PEER_BATCHES), key=lambda one: one[1])  # noqa: B023
            figures.append(f"{best / whole:.2f}x {name} (batches of {batch})")
    row(f"{model.name}, {precision.name}", "; ".join(figures), "2x, MFU 50 % in bfloat16")


def _peers(model: Model, precision: Precision) -> Iterator[tuple[str, Callable[[int], Any]]]:
    import torch
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    dtype = getattr(torch, precision.dtype)
    network = AutoModel.from_pretrained(model.folder, dtype=dtype).to(DEVICE).eval()
    if model.unit == "tokens":
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import Pooling, Transformer

        tokenizer, texts = AutoTokenizer.from_pretrained(model.folder), [text.decode() for text in model.contents]

        def loop(batch: int) -> None:
            with torch.inference_mode():
                for start in range(0, len(texts), batch):
                    inputs = tokenizer(
                        texts[start : start + batch], padding=True, truncation=True, max_length=TOKENS,
                        return_tensors="pt",
                    ).to(DEVICE)  # fmt: skip
                    network(**inputs).last_hidden_state.mean(dim=1).float().cpu()

        yield "a plain loop", loop
        words = Transformer(str(model.folder), max_seq_length=TOKENS)
        sentences = SentenceTransformer(
            modules=[words, Pooling(words.get_word_embedding_dimension())], device=DEVICE
        ).to(dtype)
        yield "sentence-transformers", lambda batch: sentences.encode(texts, batch_size=batch, show_progress_bar=False)
        return
    from embedcache.pictures import decode

    processor = AutoImageProcessor.from_pretrained(model.folder, backend="pil")

    def pictures(batch: int) -> None:
        with torch.inference_mode():
            for start in range(0, len(model.contents), batch):
                files = [decode(file) for file in model.contents[start : start + batch]]
                inputs = processor(files, return_tensors="pt")["pixel_values"].to(DEVICE, dtype)
                network(pixel_values=inputs).last_hidden_state.mean(dim=1).float().cpu()

    yield "a plain loop", pictures


def _bits(model: Model) -> None:
    """Values that differ when rows are run in another order, by another model object."""
    some = model.contents[: max(64, len(model.contents) // 4)]
    for precision in PRECISIONS:
        if precision.dtype == "float16" and not DEVICE.startswith("cuda"):
            continue
        with _tf32(precision.tf32):
            one, other = (_features(_load(model, precision), rows) for rows in (some, some[::-1]))
        row(f"values that differ between two runs in other orders, {model.name}, {precision.name}",
            f"{int((one != other[::-1]).sum()):,} of {one.size:,}", "0")  # fmt: skip


def _features(backbone: Any, contents: list[bytes]) -> np.ndarray[Any, Any]:
    prepared = backbone.prepare(contents)
    return np.asarray(run_plan(backbone, prepared, plan(prepared.lengths, backbone.policy))["mean"].values)


def _compiled(model: Model) -> None:
    precision = PRECISIONS[2]
    eager = _load(model, precision)
    begun = time.perf_counter()
    compiled = _load(model, precision, compiled=True)
    compiling = time.perf_counter() - begun
    prepared = eager.prepare(model.contents)
    batches = plan(prepared.lengths, eager.policy)
    times = [_best(lambda one=one: run_plan(one, prepared, batches)) for one in (eager, compiled)]
    row(f"compiled against eager, {model.name}, bfloat16", f"{times[0] / times[1]:.2f}x, {compiling:.0f} s to compile")


def _profile(model: Model) -> None:
    """Where a pass's time goes, by kernel, and how long the device is idle between kernels."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    backbone = _load(model, PRECISIONS[2])
    prepared = backbone.prepare(model.contents)
    batches = plan(prepared.lengths, backbone.policy)
    run_plan(backbone, prepared, batches)
    on_gpu = DEVICE.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        begun = time.perf_counter()
        run_plan(backbone, prepared, batches)
        _wait()
        whole = 1e6 * (time.perf_counter() - begun)

    def spent(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    cuda = torch.autograd.DeviceType.CUDA
    events = [event for event in recorded.key_averages() if not on_gpu or event.device_type == cuda]
    events.sort(key=lambda event: -spent(event))
    busy = sum(map(spent, events))
    top = ", ".join(f"{event.key[:40]} {spent(event) / busy:.0%}" for event in events[:6])
    idle = f"the device is idle {max(0.0, 1 - busy / whole):.0%} of the time; " if on_gpu else ""
    row(f"where the time goes, {model.name}, bfloat16", idle + top)


def _heads() -> None:
    """A linear and an MLP head on many rows, there against a CPU."""
    rows = HEAD_ROWS if DEVICE.startswith("cuda") else 4 * SETTINGS["rows"]
    generator = np.random.default_rng(0)
    x = generator.normal(size=(rows, 384)).astype(np.float32)
    y = (x[:, :20] + generator.normal(size=(rows, 20))).argmax(axis=1)
    for head in ("linear", "mlp"):
        spec = TrainSpec(epochs=3, batch_size=1024)
        times = [
            min(
                seconds(lambda: train_head(x, y, None, None, head, spec, class_names=range(20), device=device))  # noqa: B023
                for _ in range(2)
            )
            for device in ("cpu", DEVICE)
        ]
        row(f"training one {head} head on {rows:,} x 384, 3 epochs: CPU time / device time",
            f"{times[0]:.2f} / {times[1]:.2f} s", "at least as fast from 100,000 rows on")  # fmt: skip


SECTIONS = (gpu,)
