"""The last blocks trained from cached hidden states, beside a head alone and full fine-tuning."""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from benchmarks.table import row

from embedcache import check_tuning, evaluate_on_cache, extract, train_on_cache, tune
from embedcache.backbone import load_backbone
from embedcache.examples import load_examples
from embedcache.finetune import FeatureBasedModel, evaluate_tuned, fine_tune
from embedcache.heads import TrainedHead, build_head
from embedcache.spec import TUNING, HeadSpec
from embedcache.task import CLASSIFICATION
from embedcache.train.metrics import measure

REPO = Path(__file__).resolve().parents[2]
ROWS = 2000


def questions() -> list[dict[str, str]]:
    """TREC's questions, each once, of which 2,000 are drawn."""
    command = [sys.executable, REPO / "data" / "prepare.py", "trec"]
    made = subprocess.run(command, check=True, capture_output=True, text=True)
    with open(made.stdout.strip().splitlines()[-1], newline="", encoding="utf-8") as file:
        found = {each["text"]: each["label"] for each in csv.DictReader(file)}
    texts = sorted(found)
    drawn = np.random.default_rng(0).permutation(len(texts))[:ROWS]
    return [{"text": texts[place], "label": found[texts[place]]} for place in drawn.tolist()]


def tuning() -> None:
    """TREC, 2,000 questions through MiniLM: accuracy and time of a head, the last 1 to 3 blocks, and all of it."""
    examples = load_examples(questions(), split="80/10/10")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        begun = time.perf_counter()
        cache = extract(
            examples, output_dir=place / "c", pooling=["auto", "tokens@-2", "tokens@-3", "tokens@-4"], device="cpu",
            keep_inputs=True,
        )  # fmt: skip
        extraction = time.perf_counter() - begun
        stored = sum(path.stat().st_size for path in place.rglob("*.h5")) / 1e6
        row("extraction of 2,000 questions with the states of three cuts", f"{extraction:.0f} s, {stored:.0f} MB")
        begun = time.perf_counter()
        head = train_on_cache(cache, progress=False).head
        _said("a linear head on cached features", evaluate_on_cache(head, cache), time.perf_counter() - begun)
        for blocks in (1, 2, 3):
            begun = time.perf_counter()
            tuned = tune(cache, blocks, progress=False, device="cpu")
            taken = time.perf_counter() - begun
            tuned.save(place / "run")
            measured = evaluate_tuned(TrainedHead.from_pretrained(place / "run"), cache)
            _said(f"the last {blocks} of 6 blocks from the cache, 5 epochs", measured, taken)
        checked = check_tuning(cache, blocks=2, steps=20, device="cpu", progress=False)
        values = sum(each.difference.values for each in checked.comparisons)
        differing = values - sum(each.difference.identical for each in checked.comparisons)
        row(
            "bits of 20 steps that differ from those with the frozen blocks in the loop",
            f"{differing} of {values:,}",
            "0",
        )
        backbone = load_backbone(device="cpu", features=("auto",))
        fresh = build_head(HeadSpec("linear"), backbone.feature_sets[0], len(cache.class_names), seed=0)
        train, validation, test = (cache.rows(name) for name in ("train", "validation", "test"))
        kept, y = cache.inputs(), cache.targets()
        assert kept is not None
        begun = time.perf_counter()
        whole = fine_tune(
            FeatureBasedModel(backbone, fresh, freeze_backbone=False), kept.select(train), y[train],
            kept.select(validation), y[validation], TUNING, class_names=cache.class_names, new_head=True,
            progress=False,
        )  # fmt: skip
        taken = time.perf_counter() - begun
        said = whole.head.probabilities(kept.select(test))
        _said(
            "full fine-tuning, 5 epochs",
            measure(CLASSIFICATION, y[test], said, cache.class_names, intervals=True),
            taken,
        )


def _said(how: str, measured: dict[str, object], taken: float) -> None:
    accuracy, (low, high) = measured["accuracy"], measured["intervals"]["accuracy"]  # type: ignore[index]
    row(f"TREC, 2,000 rows, test accuracy: {how}", f"{accuracy:.3f} [{low:.3f}, {high:.3f}], {taken:.1f} s")


SECTIONS = (tuning,)
