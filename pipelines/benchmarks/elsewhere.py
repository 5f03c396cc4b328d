"""Features of other tools in and out again, and a head in onnxruntime against ``Predictor``."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from benchmarks.table import SETTINGS, interleaved, row, seconds

ROWS, DIM = 200_000, 768
MOST_TEXTS = 1000
_MEASURED = """
import re, sys, time
import numpy as np
from embedcache import import_features
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
import_features(np.ones((3, 5), "f4"), output_dir=sys.argv[2] + ".small")
before, start = peak(), time.perf_counter()
import_features(sys.argv[1], output_dir=sys.argv[2])
print(time.perf_counter() - start, peak() - before)
"""


def importing() -> None:
    """Importing 0.6 GB of features, importing them again, and exporting them."""
    from embedcache import export_features, import_features

    with tempfile.TemporaryDirectory() as folder:
        path, cache = Path(folder) / "x.npy", Path(folder) / "c"
        x = np.lib.format.open_memmap(path, "w+", "<f4", (ROWS, DIM))
        draw = np.random.default_rng(0)
        for start in range(0, ROWS, 20_000):
            x[start : start + 20_000] = draw.normal(size=(20_000, DIM))
        x.flush()
        del x
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _MEASURED, path, cache], capture_output=True, text=True, check=True
        )
        taken, memory = map(float, done.stdout.split())
        again = seconds(lambda: import_features(path, output_dir=cache))
        npy = seconds(lambda: export_features(cache, Path(folder) / "out", to="npy"))
        parquet = seconds(lambda: export_features(cache, Path(folder) / "out.parquet", to="parquet"))
    megabytes = ROWS * DIM * 4 / 1e6
    row(
        f"importing {ROWS:,} x {DIM} from .npy / again / exporting to .npy / to Parquet",
        " / ".join(f"{megabytes / each:,.0f}" for each in (taken, again, npy, parquet)) + " MB/s",
    )
    row(f"peak memory of importing these {megabytes:,.0f} MB", f"{memory / 1024:,.0f} MiB")


def exported() -> None:
    """A linear head behind MiniLM in onnxruntime, at any length, against ``Predictor``."""
    try:
        import onnxruntime
    except ImportError:
        return row("onnxruntime vs Predictor", "not installed: pip install 'embedcache[onnx]'")
    import torch
    import transformers

    sys.path.insert(0, str(Path(__file__).parents[2] / "data"))
    import prepare

    from embedcache import Predictor, export_head, extract, load_examples, train_on_cache

    examples = load_examples(prepare.prepare("movie-reviews"), text_column="text", label_column="label")
    examples = examples.select(np.arange(min(len(examples), MOST_TEXTS, SETTINGS["rows"])))
    texts = [content.decode() for content in examples.contents()]
    with tempfile.TemporaryDirectory() as folder:
        cache = extract(examples, output_dir=Path(folder) / "c", pooling="mean")
        train_on_cache(cache, "linear", progress=False).save(Path(folder) / "run")
        made = export_head(Path(folder) / "run", Path(folder) / "onnx", to="onnx", inputs=examples)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(
            str(Path(folder) / "onnx" / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(Path(folder) / "onnx")
        predictor = Predictor.load(Path(folder) / "run")
        ordered = sorted(texts, key=len)

        def run() -> None:
            for start in range(0, len(ordered), 32):
                tokens = tokenizer(ordered[start : start + 32], padding=True, truncation=True, return_tensors="np")
                session.run(None, {name: tokens[name] for name in ("input_ids", "attention_mask")})

        times = interleaved({"onnx": run, "ours": lambda: predictor(texts)}, rounds=3)
    rates = " / ".join(f"{len(texts) / times[name]:,.0f}" for name in ("onnx", "ours"))
    row(f"{len(texts):,} snippets, MiniLM and a linear head: onnxruntime / Predictor", f"{rates} rows/s")
    row("largest difference of a probability there, and labels that differ", f"{made.proof.apart:.1e}, 0")


SECTIONS = (importing, exported)
