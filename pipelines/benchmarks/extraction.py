"""Extraction: against sentence-transformers and the tutorial's loop, compiled, and the share of the peak it reaches."""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.table import SETTINGS, interleaved, row, seconds

from embedcache.backbone import compute_features, load_backbone, probe_of, resolve_model, run_plan
from embedcache.batching import Plan, plan
from embedcache.examples import load_examples
from embedcache.extract import run

REPO = Path(__file__).resolve().parents[2]
DTYPES = ("float32", "bfloat16")


def snippets(count: int | None = None) -> list[dict[str, str]]:
    """The movie-review snippets that ``data/prepare.py`` makes."""
    return prepared_rows("movie-reviews")[:count]


def prepared_rows(name: str) -> list[dict[str, str]]:
    """The rows of a data set of ``data/prepare.py``."""
    command = [sys.executable, REPO / "data" / "prepare.py", name]
    made = subprocess.run(command, check=True, capture_output=True, text=True)
    with open(made.stdout.strip().splitlines()[-1], newline="", encoding="utf-8") as file:
        return [{"text": each["text"], "label": each["label"]} for each in csv.DictReader(file)]


def extract(backbone: Any, records: list[dict[str, str]], **options: Any) -> None:
    """The whole of an extraction, reading and commits included."""
    with tempfile.TemporaryDirectory() as folder:
        run(load_examples(records), backbone, Path(folder) / "c", **options)


def extraction() -> None:
    """The same texts by sentence-transformers, by us, and by us compiled; the time of compiling is apart."""
    from sentence_transformers import SentenceTransformer

    rows = SETTINGS["rows"]
    data = snippets(2 * rows)
    first, second = data[:rows], data[rows:]
    texts = [each["text"] for each in first]
    peers = {dtype: SentenceTransformer(str(resolve_model(None)), device="cpu") for dtype in DTYPES}
    peers["bfloat16"].bfloat16()
    ours = {dtype: load_backbone(compute_dtype=dtype) for dtype in DTYPES}
    works = {
        f"peer {name}": lambda peer=peer: peer.encode(texts, show_progress_bar=False) for name, peer in peers.items()
    }
    works |= {name: lambda backbone=backbone: extract(backbone, first) for name, backbone in ours.items()}
    times = interleaved(works, rounds=3)
    fast, slow = times["peer bfloat16"], times["peer float32"]
    what = f"extraction vs `SentenceTransformer.encode`, {rows:,} texts"
    row(f"{what}, float32, eager", f"{slow / times['float32']:.2f}x", "1.1x")
    row("the same, bfloat16 against its float32, eager", f"{slow / times['bfloat16']:.2f}x", "3x with AMX, else report")
    row("the same, bfloat16 against its bfloat16, eager", f"{fast / times['bfloat16']:.2f}x", "1.1x")
    for dtype, peer, bar in (("float32", slow, "1.35x"), ("bfloat16", fast, "1.6x")):
        compiling, marginal = compiled(dtype, data, second)
        saved = (times[dtype] - marginal) / rows
        even = f"pays after {compiling / saved:,.0f} rows" if saved > 0 else "never pays"
        row(
            f"compiled and warm, {dtype} against its {dtype}",
            f"{peer / marginal:.2f}x ({compiling:.0f} s to compile, {even})",
            bar,
        )
        if dtype == "bfloat16":
            row(
                "compiled and warm, bfloat16 against its float32",
                f"{slow / marginal:.2f}x",
                "4.5x with AMX, else report",
            )
    epoch = seconds(lambda: tutorial(texts))
    said = f"{5 * epoch / times['float32']:.1f}x (one of its epochs took {epoch:.0f} s)"
    row("extraction once vs the tutorial's loop (pad to 128, batches of 16), 5 epochs", said)


def lengths() -> None:
    """Against sentence-transformers for questions of 14 tokens, snippets of 27 and texts of 160, in both dtypes."""
    from sentence_transformers import SentenceTransformer

    peers = {dtype: SentenceTransformer(str(resolve_model(None)), device="cpu") for dtype in DTYPES}
    peers["bfloat16"].bfloat16()
    ours = {dtype: load_backbone(compute_dtype=dtype) for dtype in DTYPES}
    reviews = snippets(SETTINGS["rows"])
    joined = [" ".join(each["text"] for each in reviews[at : at + 6]) for at in range(0, len(reviews), 6)]
    sets = {
        "questions": list({each["text"]: each for each in prepared_rows("trec")}.values()),
        "snippets": reviews,
        "texts": [{"text": text, "label": str(at % 2)} for at, text in enumerate(joined)],
    }
    for (name, data), bars in zip(sets.items(), (("1.2x", "1.6x"), ("1.25x", "1.6x"), ("1.3x", "1.4x")), strict=True):
        data = data[: SETTINGS["rows"]]
        texts = [each["text"] for each in data]
        works: dict[str, Callable[[], Any]] = {
            f"peer {dtype}": lambda peer=peer, texts=texts: peer.encode(texts, show_progress_bar=False)
            for dtype, peer in peers.items()
        }
        works |= {dtype: lambda own=own, data=data: extract(own, data) for dtype, own in ours.items()}
        times = interleaved(works, rounds=3)
        tokens = ours["float32"].prepare([each.encode() for each in texts]).lengths
        what = f"{len(data):,} {name} of {np.mean(tokens):.0f} tokens vs `SentenceTransformer.encode`"
        row(f"{what}, float32", f"{times['peer float32'] / times['float32']:.2f}x", bars[0])
        row(f"{what}, bfloat16", f"{times['peer bfloat16'] / times['bfloat16']:.2f}x", bars[1])
        row(f"{what}, bfloat16 vs its float32", f"{times['peer float32'] / times['bfloat16']:.2f}x", "4x with AMX")


def own_share() -> None:
    """What an extraction takes beyond the forward passes over its rows: reading, tokens, the probe, features, commits.

    The shares are of elapsed time and of the CPU's: where tokens are made beside a pass that leaves a core free, the
    first is the smaller.
    """
    data = snippets(SETTINGS["rows"])
    for dtype in DTYPES:
        backbone = load_backbone(compute_dtype=dtype)
        prepared = backbone.prepare([each["text"].encode() for each in data])
        batches = plan(prepared.lengths, backbone.policy)
        works: dict[str, Callable[[], Any]] = {
            "whole": lambda backbone=backbone: extract(backbone, data),
            "passes": lambda backbone=backbone: run_plan(backbone, prepared, batches),  # noqa: B023
        }
        wall, cpu = interleaved(works, rounds=5), interleaved(works, rounds=3, clock=time.process_time)
        beyond = " / ".join(f"{1 - times['passes'] / times['whole']:.1%}" for times in (wall, cpu))
        row(
            f"an extraction's own share beyond the forward passes, {len(data):,} snippets, {dtype}: elapsed / CPU time",
            f"{beyond} of {wall['whole']:.1f} s",
            "at most 8 %",
        )


def compiled(dtype: str, data: list[dict[str, str]], second: list[dict[str, str]]) -> tuple[float, float]:
    """Seconds to load and compile, and what the other half of ``data`` then costs: the marginal rate."""
    loaded: list[Any] = []
    compiling = seconds(lambda: loaded.append(load_backbone(compute_dtype=dtype, compiled=True)))
    extract(loaded[0], data[:512])
    works = {"all": lambda: extract(loaded[0], data), "half": lambda: extract(loaded[0], second)}
    times = interleaved(works, rounds=3, warm_up=False)
    return compiling, times["all"] - times["half"]


def tutorial(texts: list[str]) -> None:
    """One epoch of the loop that tutorials have: everything padded to 128, the backbone run each time."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = resolve_model(None)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    for at in range(0, len(texts), 16):
        options = {"padding": "max_length", "max_length": 128, "truncation": True, "return_tensors": "pt"}
        with torch.no_grad():
            model(**tokenizer(texts[at : at + 16], **options))


def padding() -> None:
    """Positions computed, dummy rows included, for each real token: no forward pass is needed to know."""
    backbone = load_backbone(device="cpu")
    prepared = backbone.prepare([each["text"].encode() for each in snippets()])
    batches = plan(prepared.lengths, backbone.policy)
    row(
        f"positions computed for each token, {len(prepared.lengths):,} snippets, CPU",
        f"{batches.overhead:.3f}",
        "at most 1.12",
    )


def peak() -> None:
    """The share of the measured GEMM peak that the forward passes reach, and where the rest goes."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    contents = [each["text"].encode() for each in snippets(min(SETTINGS["rows"], 2000))]
    for dtype in DTYPES:
        square = torch.randn(2048, 2048, dtype=getattr(torch, dtype))
        backbone = load_backbone(compute_dtype=dtype)
        prepared = backbone.prepare(contents)
        batches = plan(prepared.lengths, backbone.policy)
        times = interleaved(
            {"gemm": lambda: square @ square, "passes": lambda: run_plan(backbone, prepared, batches)},  # noqa: B023
            rounds=3,
        )
        linear = [each for each in backbone.network.encoder.modules() if isinstance(each, torch.nn.Linear)]
        attention = sum(4 * each.rows * each.length**2 * backbone.feature_sets[0].dim * 6 for each in batches)
        operations = 2 * sum(each.weight.numel() for each in linear) * batches.computed + attention
        most = 2 * 2048**3 / times["gemm"]
        some = Plan(batches.batches[::8], batches.real)
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            for batch in some:
                backbone.fetch(backbone.forward(prepared, batch))
        events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
        whole = sum(event.self_cpu_time_total for event in events)
        top = [f"{event.key.removeprefix('aten::')} {event.self_cpu_time_total / whole:.0%}" for event in events[:5]]
        reached = f"{operations / times['passes'] / most:.0%}; of the time: {', '.join(top)}"
        row(f"share of the GEMM peak ({most / 1e9:,.0f} GFLOP/s), {dtype}", reached)


def writing() -> None:
    """The cost of commits: the same pipeline with its features thrown away, and how long commits take by themselves."""
    from unittest.mock import patch

    from embedcache.cache import CacheWriter

    records, backbone = snippets(SETTINGS["rows"]), load_backbone(compute_dtype="bfloat16")
    spent = 0.0

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal spent
            begun = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                spent += time.perf_counter() - begun

        return run

    ratios, shares = [], []
    for turn in range(8):
        spent = 0.0
        with patch.multiple(CacheWriter, append=timed(CacheWriter.append), finish=timed(CacheWriter.finish)):
            kept = seconds(lambda: extract(backbone, records, rows_per_shard=1024))
        with patch.multiple(CacheWriter, append=lambda *_: None, finish=lambda *_, **__: None):
            thrown = seconds(lambda: extract(backbone, records, rows_per_shard=1024))
        if turn:
            ratios.append(kept / thrown)
            shares.append(spent / kept)
    said = f"{np.median(ratios) - 1:+.1%}, {min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%} in {len(ratios)} pairs"
    said += f"; commits take {np.median(shares):.1%} of the time, beside the forward passes"
    row("extraction with commits vs discarding features (bfloat16, shards of 1,024 rows)", said, "at most +3 %")


def passes() -> None:
    """One thread a pass against passes of all threads: 10,000 snippets, one row; and the time of the probe."""
    import torch

    every, records = torch.get_num_threads(), snippets(10_000)
    for dtype in DTYPES:
        one, all_of_them = (load_backbone(compute_dtype=dtype, device="cpu", pass_threads=each) for each in (1, every))
        works: dict[str, Callable[[], Any]] = {
            "all": lambda: extract(all_of_them, records),  # noqa: B023
            "one": lambda: extract(one, records),  # noqa: B023
        }
        times = interleaved(works, rounds=3)
        row(
            f"extraction of {len(records):,} snippets, {dtype}: one-thread passes side by side vs {every}-thread ones",
            f"{times['all'] / times['one']:.2f}x",
        )
        name, row_alone = one.feature_sets[0].name, [b"An instant classic, I loved every minute."]
        works = {
            "all": lambda: compute_features(all_of_them, row_alone, name),  # noqa: B023
            "one": lambda: compute_features(one, row_alone, name),  # noqa: B023
            "probe": lambda: probe_of(one),  # noqa: B023
        }
        times = interleaved(works, rounds=15)
        row(
            f"one row, {dtype}: a pass of one thread / of {every} threads; the probe",
            f"{1e3 * times['one']:.0f} / {1e3 * times['all']:.0f} ms; {1e3 * times['probe']:.0f} ms",
        )


SECTIONS = (extraction, lengths, own_share, padding, passes, peak, writing)
