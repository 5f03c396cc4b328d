"""The last blocks trained from cached states, beside a head alone and full fine-tuning: accuracy and CPU time."""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
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
from embedcache.spec import FINE_TUNING, TUNING, HeadSpec
from embedcache.train.batches import grouped_order, order
from embedcache.train.metrics import wilson
from embedcache.wording import counted

REPO = Path(__file__).resolve().parents[2]
ROWS, PICTURES = 2000, 500
FULL = (5, 3)
"""Epochs of full fine-tuning; the others are held against the first."""
Correct = npt.NDArray[np.bool_]


def made_by(program: str, *arguments: str) -> Path:
    """Run a program of this repository that makes a file or folder, and return where it is."""
    command = [sys.executable, REPO / "data" / program, *arguments]
    made = subprocess.run(command, check=True, capture_output=True, text=True)
    return Path(made.stdout.strip().splitlines()[-1])


def texts_of(name: str, seed: int, tested: int) -> Examples:
    """Texts of a set, each once, drawn at random: 1,600 to train, 200 to validate, and ``tested`` at most to test."""
    with open(made_by("prepare.py", name), newline="", encoding="utf-8") as file:
        found = {each["text"]: each["label"] for each in csv.DictReader(file)}
    splits = ["train"] * (ROWS * 8 // 10) + ["validation"] * (ROWS // 10) + ["test"] * tested
    rows = [
        {"text": text, "label": found[text], "split": split}
        for text, split in zip(mixed(found, seed), splits, strict=False)
    ]
    return load_examples(rows, split_column="split")


def pictures_of(seed: int) -> Examples:
    """Pictures of CIFAR-10: 400 to train and 100 to validate, drawn at random, and all 1,000 of its test to test."""
    train, test = (made_by("prepare_pictures.py", "cifar10") / part for part in ("train", "test"))
    splits = ["train"] * (PICTURES * 8 // 10) + ["validation"] * (PICTURES // 5)
    drawn = [*zip(mixed(map(str, train.glob("*/*")), seed), splits, strict=False)]
    rows = [
        {"image": path, "label": Path(path).parent.name, "split": split}
        for path, split in (*drawn, *((str(path), "test") for path in test.glob("*/*")))
    ]
    return load_examples(rows, image_column="image", split_column="split")


def mixed(names: Iterable[str], seed: int) -> list[str]:
    """Return names in an order that hangs on the seed alone."""
    ordered = sorted(names)
    return [ordered[place] for place in np.random.default_rng(seed).permutation(len(ordered))]


@dataclass(frozen=True)
class Result:
    """Which test rows are right, and the CPU seconds that it took: extraction included, but for the test rows."""

    correct: Correct
    seconds: float


class Draw:
    """Rows in three splits, and the seed by which everything is trained on them."""

    def __init__(self, examples: Examples, seed: int, folder: Path, options: dict[str, Any]) -> None:
        self.seed, self._folder, self._options = seed, folder, options
        tested = examples.split == examples.split_names.index("test")
        self._rows = {
            "learned": examples.select(np.flatnonzero(~tested)),
            "tested": examples.select(np.flatnonzero(tested)),
        }
        self._made: dict[tuple[int, str], tuple[dict[str, FeatureCache], float]] = {}

    def caches(self, number: int, computed: str = "float32") -> tuple[dict[str, FeatureCache], float]:
        """Return caches with the states before the last blocks, and the seconds that the one to learn from took."""
        if (number, computed) not in self._made:
            states, made, seconds = [f"states@-{number + 1}"] if number else [], {}, 0.0
            for what in ("tested", "learned"):
                begun = time.process_time()
                made[what] = extract(
                    self._rows[what], output_dir=self._folder / f"{what}-{computed}-{number}", device="cpu",
                    pooling=["auto", *states], keep_inputs=True, compute_dtype=computed, **self._options,
                )  # fmt: skip
                seconds = time.process_time() - begun
            self._made[number, computed] = made, seconds
        return self._made[number, computed]

    def head(self) -> Result:
        """Train a linear head on cached features."""
        made, seconds = self.caches(0)
        begun = time.process_time()
        head = train_on_cache(made["learned"], progress=False).head
        seconds += time.process_time() - begun
        x, y = made["tested"].arrays("test")
        return Result(head.probabilities(x).argmax(1) == y, seconds)

    def tuned(self, number: int, computed: str) -> Result:
        """Train the last blocks from cached states, the head first."""
        made, seconds = self.caches(number, computed)
        begun = time.process_time()
        spec = replace(TUNING, seed=self.seed)
        tuned = tune(made["learned"], number, spec=spec, progress=False, device="cpu").tuned
        seconds += time.process_time() - begun
        cache = made["tested"]
        outputs = tuned.probabilities_of(CachedStates(cache, cache.rows("test"), cached_states(cache, number)))
        return Result(outputs.argmax(1) == cache.targets("test"), seconds)

    def full(self, epochs: int) -> Result:
        """Fine-tune the whole network, with a new head."""
        cache, tested = (self.caches(0)[0][what] for what in ("learned", "tested"))
        backbone = load_backbone(device="cpu", features=(next(iter(cache.feature_sets)),), **self._options)
        fresh = build_head(HeadSpec("linear"), backbone.feature_sets[0], len(cache.class_names), seed=self.seed)
        kept, contents, y = cache.inputs(), tested.inputs(), cache.targets()
        assert kept is not None
        assert contents is not None
        train, validation = (cache.rows(name) for name in ("train", "validation"))
        begun = time.process_time()
        tuned = fine_tune(
            FeatureBasedModel(backbone, fresh, freeze_backbone=False), kept.select(train), y[train],
            kept.select(validation), y[validation], replace(FINE_TUNING, epochs=epochs, seed=self.seed),
            class_names=cache.class_names, new_head=True, progress=False,
        )  # fmt: skip
        seconds = time.process_time() - begun
        return Result(tuned.head.probabilities(contents).argmax(1) == tested.targets("test"), seconds)


def measure(
    name: str, draws: Sequence[Examples], blocks: Sequence[int], *, halved: bool = True, **options: Any
) -> None:
    """Train a head, the whole network, and the last blocks, whose largest number in bfloat16 too where ``halved``.

    On several draws of rows, each with a seed of its own. A CPU that has no bfloat16 leaves that out, and so do
    convolutional networks, which are slow in it.
    """
    torch.set_num_threads(1)  # a second thread that waits takes CPU time too
    computed = ("float32", "bfloat16") if halved and _has_bfloat16() else ("float32",)
    results: dict[str, list[Result]] = {}
    for seed, examples in enumerate(draws):
        with tempfile.TemporaryDirectory() as folder:
            draw = Draw(examples, seed, Path(folder), options)
            for epochs in FULL:
                results.setdefault(f"full fine-tuning, {counted(epochs, 'epoch')}", []).append(draw.full(epochs))
            results.setdefault("a linear head on cached features", []).append(draw.head())
            for number in blocks:
                for dtype in computed if number == blocks[-1] else ("float32",):
                    what = f"the last {counted(number, 'block')} from the cache, {dtype}"
                    results.setdefault(what, []).append(draw.tuned(number, dtype))
                    if seed == 0 and number == blocks[-1]:
                        _checked(draw.caches(number, dtype)[0]["learned"], number, dtype)
    joined = {
        what: Result(np.concatenate([each.correct for each in some]), float(np.mean([each.seconds for each in some])))
        for what, some in results.items()
    }
    full = next(iter(joined.values()))
    for what, result in joined.items():
        tell(name, what, result, None if result is full else full)


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


def tell(name: str, how: str, result: Result, full: Result | None = None) -> None:
    """Add a row: accuracy with Wilson's interval over all test rows, CPU time, and both against the whole network."""
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
        padding(name, texts_of(name, 0, ROWS // 10))


def tuning() -> None:
    """TREC, 1,800 questions to learn from through MiniLM and 3,581 to test on, in two draws."""
    measure("TREC", [texts_of("trec", seed, 2 * ROWS) for seed in range(2)], (1, 2, 3))


def tuning_reviews() -> None:
    """1,800 sentences of movie reviews to learn from through MiniLM and 4,000 to test on, in one draw."""
    measure("movie reviews", [texts_of("movie-reviews", 0, 2 * ROWS)], (1, 2, 3))


def tuning_pictures() -> None:
    """500 pictures of CIFAR-10 to learn from through EfficientNet-Lite0 of 16 blocks, 1,000 to test on; two draws."""
    model = made_by("efficientnet_lite.py")
    measure("CIFAR-10", [pictures_of(seed) for seed in range(2)], (1, 4, 8), halved=False, model=model)


SECTIONS = (tuning_padding, tuning, tuning_reviews, tuning_pictures)
