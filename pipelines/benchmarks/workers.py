"""Passes side by side on more cores than there are: what threads and processes make of 1 to 32 of them."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
from benchmarks.engines import Silent
from benchmarks.table import row

from embedcache.backbone import MOST_PASSES, load_backbone, resolve_model, run_plan
from embedcache.backbone import threads as torch_threads
from embedcache.batching import Plan, plan
from embedcache.extract import Elsewhere, Window
from embedcache.extract.crew import Processes
from embedcache.extract.progress import Watch

PASS = 0.1
"""Seconds that a pass holds a core of its own: less than MiniLM's in bfloat16 takes on one."""
EACH = 12
"""Passes for each core that is pretended."""
CORES = (1, 2, 4, 8, 16, 32)
MODELING = f"""
import time

from transformers import BertModel


class Waiting(BertModel):
    def forward(self, *arguments, **options):
        time.sleep({PASS})  # a core that is not there, which would compute meanwhile without Python's lock
        return super().forward(*arguments, **options)
"""


def waiting_model(folder: Path) -> Path:
    """Make a network of BERT-base's 12 layers, so narrow that only Python's share of a pass is left, which waits."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(None))
    torch.manual_seed(0)
    widths = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(num_hidden_layers=12, **widths)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "modeling_waiting.py").write_text(MODELING)
    written = json.loads((folder / "config.json").read_text())
    written |= {"architectures": ["Waiting"], "auto_map": {"AutoModel": "modeling_waiting.Waiting"}}
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def workers() -> None:
    """1 to 32 passes at a time, each of which waits as long as a pass computes on a core of its own."""
    with tempfile.TemporaryDirectory() as folder:
        backbone = load_backbone(waiting_model(Path(folder)), device="cpu", trust_remote_code=True)
        text = b"a snippet of about as many words as most of them have, so that it is of the usual length, no more"
        rows = backbone.policy.rows(int(backbone.prepare([text]).lengths[0]))
        taken: dict[str, dict[int, float]] = {"threads": {}, "processes": {}}
        for cores in CORES:
            prepared = backbone.prepare([text] * (rows * EACH * cores))
            batches = plan(prepared.lengths, backbone.policy)
            with torch_threads(cores), patch("embedcache.backbone.compute.MOST_PASSES", cores):
                taken["threads"][cores] = _rate(lambda: run_plan(backbone, prepared, batches), batches)  # noqa: B023
            if cores > MOST_PASSES:
                window = Window(np.arange(rows * EACH * cores), [text] * (rows * EACH * cores))
                with contextlib.closing(Elsewhere(Processes(-(-cores // MOST_PASSES), cores))) as engine:
                    engine.prove(backbone)
                    watch = Watch(Silent(), len(window))
                    run = lambda: list(engine.map(backbone, iter([window]), watch))  # noqa: B023, E731
                    taken["processes"][cores] = _rate(run, batches)
    for kind, rates in taken.items():
        shown = ", ".join(f"{cores}: {rate:.2f}" for cores, rate in rates.items())
        row(f"passes of {1e3 * PASS:.0f} ms side by side, simulated cores: how many are kept busy, in {kind}", shown)


def _rate(work: Callable[[], object], batches: Plan) -> float:
    """Return how many cores were busy."""
    begun = time.perf_counter()
    work()
    return len(batches) * PASS / (time.perf_counter() - begun)


SECTIONS = (workers,)
