"""Every figure the README quotes about speed and memory, as ratios within one run.

    python pipelines/benchmark.py [SECTION ...]      sections: see SECTIONS at the end; default: all
    python pipelines/benchmark.py extraction --rows 4000

Prints a Markdown table. Texts are the movie-review snippets that ``data/prepare.py`` makes.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parent.parent
TABLE: list[tuple[str, str, str]] = []


def row(figure: str, value: str, bar: str = "report") -> None:
    TABLE.append((figure, value, bar))
    print(f"| {figure} | {value} | {bar} |", flush=True)


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def texts(count: int) -> list[dict[str, str]]:
    import csv

    made = subprocess.run(
        [sys.executable, REPO / "data" / "prepare.py", "movie-reviews"], check=True, capture_output=True, text=True
    )
    with open(made.stdout.strip().splitlines()[-1], newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{"text": each["text"], "label": each["label"]} for each in rows[:count]]


def extraction(rows: int) -> None:
    """Extraction, commits included, against sentence-transformers on the same texts, and against the tutorial's loop."""
    import torch
    from sentence_transformers import SentenceTransformer

    from embedcache.backbone import load_backbone, resolve_model
    from embedcache.examples import load_examples
    from embedcache.extract import run

    data = texts(2 * rows)
    first, second = data[:rows], data[rows:]
    peer = SentenceTransformer(str(resolve_model(None)), device="cpu")

    def encode(records: list[dict[str, str]]) -> float:
        return seconds(lambda: peer.encode([each["text"] for each in records], show_progress_bar=False))

    def ours(backbone: Any, records: list[dict[str, str]]) -> float:
        examples = load_examples(records)
        with tempfile.TemporaryDirectory() as folder:
            return seconds(lambda: run(examples, backbone, Path(folder) / "c"))

    backbones = {dtype: load_backbone(compute_dtype=dtype) for dtype in ("float32", "bfloat16")}
    times: dict[str, list[float]] = {}
    for turn in range(4):  # in turn, so that a machine that slows down slows all of them; the first is a warm-up
        sample = data[:512] if turn == 0 else first
        peer.float()
        measured = {"st float32": encode(sample)}
        peer.bfloat16()
        measured["st bfloat16"] = encode(sample)
        measured |= {dtype: ours(backbone, sample) for dtype, backbone in backbones.items()}
        if turn:
            for name, value in measured.items():
                times.setdefault(name, []).append(value)
    best = {name: statistics.median(values) for name, values in times.items()}
    row(
        f"extraction vs SentenceTransformer.encode, float32, eager ({rows:,} texts)",
        f"{best['st float32'] / best['float32']:.2f}x",
        "1.1x",
    )
    row("the same, bfloat16 against its float32, eager", f"{best['st float32'] / best['bfloat16']:.2f}x", "3x (AMX)")
    row("the same, bfloat16 against its bfloat16, eager", f"{best['st bfloat16'] / best['bfloat16']:.2f}x", "1.1x")
    for dtype, bars in (("float32", ("1.35x",)), ("bfloat16", ("1.6x", "4.5x (AMX)"))):
        backbone = load_backbone(compute_dtype=dtype, compiled=True)
        cold = ours(backbone, first)
        marginal = statistics.median(ours(backbone, data) - ours(backbone, second) for _ in range(3))
        overhead = max(cold - marginal, 0.0)
        saved = (best[dtype] - marginal) / rows
        even = f"{overhead / saved:,.0f} rows" if saved > 0 else "never"
        row(
            f"compiled and warm, {dtype} against its {dtype}",
            f"{best[f'st {dtype}'] / marginal:.2f}x (compile {overhead:.0f} s, even after {even})",
            bars[0],
        )
        if dtype == "bfloat16":
            row("compiled and warm, bfloat16 against its float32", f"{best['st float32'] / marginal:.2f}x", bars[1])

    from transformers import AutoModel, AutoTokenizer

    folder = resolve_model(None)
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModel.from_pretrained(folder, dtype=torch.float32).eval(),
    )

    def tutorial() -> None:
        for at in range(0, rows, 16):
            inputs = tokenizer(
                [each["text"] for each in first[at : at + 16]],
                padding="max_length",
                max_length=128,
                truncation=True,
                return_tensors="pt",
            )
            with torch.no_grad():
                model(**inputs)

    epoch = seconds(tutorial)
    row(
        "extraction once vs the tutorial's loop (pad to 128, batches of 16), 5 epochs",
        f"{5 * epoch / best['float32']:.1f}x (its epoch {epoch:.0f} s, measured once, times 5)",
    )


def peak(rows: int) -> None:
    """The share of the measured GEMM peak that the forward passes reach, and where the rest goes."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from embedcache.backbone import load_backbone
    from embedcache.batching import plan

    contents = [each["text"].encode() for each in texts(min(rows, 2000))]
    for dtype in ("float32", "bfloat16"):
        square = torch.randn(2048, 2048, dtype=getattr(torch, dtype))
        gemm = 2 * 2048**3 / statistics.median(seconds(lambda: square @ square) for _ in range(20))  # noqa: B023
        backbone = load_backbone(compute_dtype=dtype)
        prepared = backbone.prepare(contents)
        batches = plan(prepared.lengths, backbone.policy)
        weights = sum(
            module.weight.numel()
            for module in backbone.network.encoder.modules()
            if isinstance(module, torch.nn.Linear)
        )
        attention = sum(4 * batch.rows * batch.length**2 * backbone.feature_sets[0].dim * 6 for batch in batches)
        operations = 2 * weights * batches.computed + attention
        taken = seconds(lambda: [backbone.fetch(backbone.forward(prepared, batch)) for batch in batches])  # noqa: B023
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            for batch in batches.batches[::8]:
                backbone.fetch(backbone.forward(prepared, batch))
        events = recorded.key_averages()
        whole = sum(event.self_cpu_time_total for event in events)
        top = sorted(events, key=lambda event: -event.self_cpu_time_total)[:5]
        shares = ", ".join(
            f"{event.key.removeprefix('aten::')} {event.self_cpu_time_total / whole:.0%}" for event in top
        )
        row(
            f"share of the GEMM peak, {dtype} ({gemm / 1e9:,.0f} GFLOP/s)", f"{operations / taken / gemm:.0%}; {shares}"
        )


def writing(rows: int) -> None:
    """The cost of commits: the same pipeline with features thrown away."""
    from unittest.mock import patch

    from embedcache.backbone import load_backbone
    from embedcache.cache import CacheWriter
    from embedcache.examples import load_examples
    from embedcache.extract import run

    examples, backbone = load_examples(texts(rows)), load_backbone(compute_dtype="bfloat16")

    def once() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return seconds(lambda: run(examples, backbone, Path(folder) / "c", rows_per_shard=1024))

    ratios = []
    for turn in range(6):
        kept = once()
        with (
            patch.object(CacheWriter, "append", lambda *_: None),
            patch.object(CacheWriter, "finish", lambda *_, **__: None),
        ):
            thrown = once()
        if turn:
            ratios.append(kept / thrown)
    row(
        "extraction with commits vs discarding features (bfloat16, shards of 1,024 rows)",
        f"{statistics.median(ratios) - 1:+.1%}",
        "at most +3 %",
    )


def reading(rows: int) -> None:
    """``arrays()`` and a full pass against a memory-mapped .npy of the same array, page cache warm."""
    from embedcache.cache import CacheWriter, FeatureCache
    from embedcache.shard import FeatureSet

    count, dim = 16384 * 12, 384
    x = np.random.default_rng(0).standard_normal((count, dim), dtype=np.float32)
    keys = np.random.default_rng(1).integers(0, 256, (count, 16), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/x.npy", x)
        for shards, bar in ((1, "0.95x"), (60, "0.6x")):
            path = Path(folder) / f"{shards}.cache"
            with CacheWriter(path, {"made": "up"}, [FeatureSet("mean", "pooled", dim, 1, "float32")]) as writer:
                for part in np.array_split(np.arange(count), shards):
                    writer.append(keys[part], {"mean": x[part]}, {})
                writer.commit_dataset(
                    keys, np.zeros(count, np.int64), "classification", ["a"], np.zeros(count, np.uint8), ["train"]
                )
            cache = FeatureCache.open(path)
            theirs, ours = [], []
            for _ in range(9):
                theirs.append(seconds(lambda: np.load(f"{folder}/x.npy", mmap_mode="r").sum()))
                ours.append(seconds(lambda: cache.arrays("train")[0].sum()))  # noqa: B023
            row(
                f"arrays() and a pass vs a memory-mapped .npy, rows in {shards} shard{'s' * (shards > 1)}",
                f"{statistics.median(theirs) / statistics.median(ours):.2f}x",
                bar,
            )
        opened = []
        for _ in range(5):
            opened.append(seconds(lambda: FeatureCache.open(path)))
        row(
            f"opening a {count:,} x {dim} cache of 60 shards again",
            f"{statistics.median(opened) * 1000:.0f} ms",
            "50 ms for 1M rows",
        )


def memory(rows: int) -> None:
    """Resident memory of an extraction by a counting fake backbone, each size in a process of its own."""
    script = (
        "import sys, resource; sys.path[:0] = [sys.argv[1] + '/tests']\n"
        "from fakes import CountingBackbone\nfrom embedcache.examples import load_examples\nfrom embedcache.extract import run\n"
        "run(load_examples(sys.argv[2]), CountingBackbone(384, positions=4096), sys.argv[3])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    said = []
    for count in (10_000, 100_000, 1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "rows.csv"
            source.write_text(
                "text,label\n" + "".join(f"row number {at} of the file,{at % 3}\n" for at in range(count))
            )
            done = subprocess.run(
                [sys.executable, "-c", script, REPO, source, f"{folder}/c"], check=True, capture_output=True, text=True
            )
            said.append(f"{count:,}: {int(done.stdout) / 1024:,.0f} MiB")
    row("peak resident memory of an extraction x 384 by rows", ", ".join(said), "flat")


def startup(rows: int) -> None:
    """CPU time of ``embedcache --help``."""
    taken = []
    for _ in range(9):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "embedcache", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    row("embedcache --help, CPU time", f"{statistics.median(taken):.2f} s", "0.15 s")


SECTIONS = {each.__name__: each for each in (extraction, peak, writing, reading, memory, startup)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--rows", type=int, default=4000, help="texts to extract (default: 4000)")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.sections if name not in SECTIONS]:
        parser.error(f"no section {unknown[0]!r}: expected {', '.join(SECTIONS)}")
    print("| figure | measured | bar |\n|---|---|---|")
    for name in arguments.sections or SECTIONS:
        SECTIONS[name](arguments.rows)
