"""The last blocks trained from cached states, beside a head alone and full fine-tuning: accuracy and CPU time."""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from benchmarks.table import row

from embedcache import check_tuning, extract, train_on_cache, tune
from embedcache.backbone import load_backbone
from embedcache.cache import FeatureCache
from embedcache.examples import Examples, load_examples
from embedcache.finetune import CachedStates, FeatureBasedModel, cached_states, fine_tune
from embedcache.heads import build_head
from embedcache.spec import TUNING, HeadSpec
from embedcache.train.batches import grouped_order, order
from embedcache.train.metrics import wilson
from embedcache.wording import counted

REPO = Path(__file__).resolve().parents[2]
ROWS, PICTURES = 2000, 900
FEWER = (2,)
"""Epochs of the last blocks besides the default: they start from a head that is trained already."""
Correct = npt.NDArray[np.bool_]


def made_by(program: str, *arguments: str) -> Path:
    """Run a program of this repository that makes a file or folder, and return where it is."""
    command = [sys.executable, REPO / "data" / program, *arguments]
    made = subprocess.run(command, check=True, capture_output=True, text=True)
    return Path(made.stdout.strip().splitlines()[-1])


def texts_of(name: str) -> Examples:
    """2,000 texts of a set, each once, drawn at random, in three splits."""
    with open(made_by("prepare.py", name), newline="", encoding="utf-8") as file:
        found = {each["text"]: each["label"] for each in csv.DictReader(file)}
    texts = sorted(found)
    drawn = np.random.default_rng(0).permutation(len(texts))[:ROWS]
    rows = [{"text": texts[place], "label": found[texts[place]]} for place in drawn.tolist()]
    return load_examples(rows, split="80/10/10")


@dataclass(frozen=True)
class Result:
    """Which test rows are right, and the CPU seconds that it took, extraction included."""

    correct: Correct
    seconds: float


def measure(name: str, examples: Examples, blocks: Sequence[int], *, halved: bool = True, **options: Any) -> None:
    """Train a head, the whole network, and the last blocks, whose largest number in bfloat16 too where ``halved``.

    On a CPU that has no bfloat16 that is left out, and for convolutional networks, which are slow in it.
    """
    torch.set_num_threads(1)  # a second thread that waits takes CPU time too
    with tempfile.TemporaryDirectory() as folder:

        def extracted(number: int, computed: str = "float32") -> FeatureCache:
            states = [f"states@-{number + 1}"] if number else []
            return extract(
                examples, output_dir=Path(folder) / f"{computed}-{number}", pooling=["auto", *states], device="cpu",
                keep_inputs=True, compute_dtype=computed, **options,
            )  # fmt: skip

        begun = time.process_time()
        cache = extracted(0)
        test, y = cache.rows("test"), cache.targets("test")
        head = train_on_cache(cache, progress=False).head
        spent = time.process_time() - begun
        alone = Result(head.probabilities(cache.arrays("test")[0]).argmax(1) == y, spent)
        full = _full(cache, **options)
        tell(name, "full fine-tuning", full)
        tell(name, "a linear head on cached features", alone, full)
        kinds = [(number, "float32") for number in blocks] + [(blocks[-1], "bfloat16")] * (halved and _has_bfloat16())
        for number, computed in kinds:
            begun = time.process_time()
            cache = extracted(number, computed)
            extraction = time.process_time() - begun
            for epochs in (TUNING.epochs, *FEWER) if computed == "float32" else (TUNING.epochs,):
                begun = time.process_time()
                tuned = tune(cache, number, spec=replace(TUNING, epochs=epochs), progress=False, device="cpu")
                spent = extraction + time.process_time() - begun
                said = tuned.tuned.probabilities_of(CachedStates(cache, test, cached_states(cache, number)))
                what = f"the last {number} blocks from the cache, {counted(epochs, 'epoch')}, {computed}"
                tell(name, what, Result(said.argmax(1) == y, spent), full)
            if number == blocks[-1]:
                _checked(cache, number, computed)


def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _checked(cache: FeatureCache, number: int, computed: str) -> None:
    checked = check_tuning(cache, blocks=number, steps=20, device="cpu", progress=False, reference="canonical")
    values = sum(each.difference.values for each in checked.comparisons)
    differing = values - sum(each.difference.identical for each in checked.comparisons)
    what = (
        f"numbers that differ in 20 steps on the last {number} blocks, cached vs frozen blocks in the loop, {computed}"
    )
    row(what, f"{differing} of {values:,}", "0")


def _full(cache: FeatureCache, **options: Any) -> Result:
    backbone = load_backbone(device="cpu", features=(next(iter(cache.feature_sets)),), **options)
    fresh = build_head(HeadSpec("linear"), backbone.feature_sets[0], len(cache.class_names), seed=0)
    train, validation, test = (cache.rows(name) for name in ("train", "validation", "test"))
    kept, y = cache.inputs(), cache.targets()
    assert kept is not None
    begun = time.process_time()
    tuned = fine_tune(
        FeatureBasedModel(backbone, fresh, freeze_backbone=False), kept.select(train), y[train],
        kept.select(validation), y[validation], TUNING, class_names=cache.class_names, new_head=True, progress=False,
    )  # fmt: skip
    spent = time.process_time() - begun
    return Result(tuned.head.probabilities(kept.select(test)).argmax(1) == y[test], spent)


def tell(name: str, how: str, result: Result, full: Result | None = None) -> None:
    """Add a row: accuracy with Wilson's interval, CPU time, and both against the whole network."""
    low, high = wilson(float(result.correct.sum()), len(result.correct))
    told, took = f"{result.correct.mean():.3f} [{low:.3f}, {high:.3f}]", f"{result.seconds:.0f} s of CPU"
    if full is not None:
        apart = result.correct.astype(float) - full.correct
        half = 1.96 * float(apart.std()) / np.sqrt(len(apart))
        told += f", {apart.mean():+.3f} [{apart.mean() - half:+.3f}, {apart.mean() + half:+.3f}] to full"
        took += f", {result.seconds / full.seconds:.0%}"
    row(f"{name}: {how}", f"{told}; {took}", "report")


def padding(name: str, examples: Examples) -> None:
    """Say how many positions batches of 16 have for each token, with rows at random and of similar length."""
    lengths = load_backbone(device="cpu").prepare(list(examples.contents())).lengths
    told = [
        sum(int(lengths[rows[at : at + 16]].max()) * len(rows[at : at + 16]) for at in range(0, len(rows), 16))
        / int(lengths.sum())
        for rows in (order(len(lengths), 0, 0), grouped_order(lengths, 16, 0, 0))
    ]
    row(
        f"{name}: positions for each token in training, rows at random / of similar length",
        "{:.2f} / {:.2f}".format(*told),
    )


def tuning_padding() -> None:
    """What batches of rows of similar length save: padding, TREC and movie reviews."""
    for name in ("trec", "movie-reviews"):
        padding(name, texts_of(name))


def tuning() -> None:
    """TREC, 2,000 questions through MiniLM, 5 epochs."""
    measure("TREC", texts_of("trec"), (1, 2, 3))


def tuning_reviews() -> None:
    """2,000 movie reviews through MiniLM, 5 epochs."""
    measure("movie reviews", texts_of("movie-reviews"), (1, 2, 3))


def tuning_pictures() -> None:
    """900 pictures of CIFAR-10, of which 45 % to train and 45 % to test, through EfficientNet-Lite0 of 16 blocks."""
    pictures = made_by("prepare_pictures.py", "cifar10")
    examples = load_examples(str(pictures / "train"), split="45/10/45")
    by_key = np.argsort(examples.keys[:, :8].copy().view(">u8").ravel())  # in which classes are mixed
    model = made_by("efficientnet_lite.py")
    chosen = examples.select(np.sort(by_key[:PICTURES]))
    measure("CIFAR-10", chosen, (1, 4, 8), halved=False, model=model)


SECTIONS = (tuning_padding, tuning, tuning_reviews, tuning_pictures)
