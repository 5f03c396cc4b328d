"""The equivalence check: cached training is end-to-end training, and every fault that was planted is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small_caches import files

from embedcache import pooling
from embedcache.backbone import LoadedBackbone, load_backbone
from embedcache.backbone import load as load_module
from embedcache.cache import CacheWriter, FeatureCache, relabel
from embedcache.cli import run
from embedcache.equivalence import EquivalenceResult, check, check_equivalence
from embedcache.equivalence.bits import Difference, difference, ordered_bits
from embedcache.equivalence.result import HEADER, Comparison, judged
from embedcache.equivalence.rows import TrainingPlan
from embedcache.equivalence.standard import plain_head
from embedcache.equivalence.tolerance import (
    UNIT,
    conditioning,
    feature_tolerance,
    labels_may_differ,
    local_error,
    longest_axis,
    storage_tolerance,
)
from embedcache.errors import BackboneError, InputError, NotEqualError, SpecError
from embedcache.examples import load_examples
from embedcache.extract import extract
from embedcache.features import Dense, Stored
from embedcache.heads import TrainedHead
from embedcache.heads.registry import build_head
from embedcache.shard import STORED, FeatureSet, rounded
from embedcache.spec import HeadSpec
from embedcache.task import CLASSIFICATION, MULTILABEL

HEADS = ("linear", "mlp", "residual", "attention", "attention-pooling", "layer-mix", "layer-concat")
ENDINGS = ("", "in the film", "and the plot", "of the old actor")
ROWS = [
    {"id": f"r{at}", "text": f"{text} {ending}".strip(), "label": "no" if "bad" in text or at % 5 == 0 else "yes"}
    for at, (text, ending) in enumerate((text, ending) for ending in ENDINGS for text in tiny_models.TEXTS)
]
for at in (4, 17, 30):  # words that a cased tokenizer does not know
    ROWS[at]["text"] = ROWS[at]["text"].upper()
ROWS = [{**row, "split": "validation" if at % 4 == 3 else "train"} for at, row in enumerate(ROWS)]
FAST = {"steps": 3, "head": "linear", "reference": "canonical", "progress": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("distilbert", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("input") / "rows.csv", ROWS)


@pytest.fixture(scope="module")
def cache(model: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return made(tmp_path_factory.mktemp("cache") / "c", model)


def made(path: Path, model: Path, rows: Sequence[dict[str, str]] = ROWS, **options: Any) -> FeatureCache:
    options = {"pooling": ["mean"], "rows_per_shard": 17, "id_column": "id", "positions": 96, **options}
    return extract(list(rows), output_dir=path, model=str(model), **options)


def write_csv(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def forged(
    path: Path,
    cache: FeatureCache,
    change: Callable[[dict[str, Any]], Any] = lambda arrays: arrays,
    *,
    spec: dict[str, Any] | None = None,
    like: FeatureCache | None = None,
    **provenance: Any,
) -> FeatureCache:
    """Write the cache again with other features, every hash computed anew: only recomputation can tell.

    ``spec`` is claimed to be what made it, rows and labels are those of ``like``.
    """
    like = like or cache
    arrays: dict[str, Any] = {}
    for shard in range(len(cache.manifest["shards"])):
        found = cache.shard(shard, np.arange(cache.manifest["shards"][shard]["rows"]))[1]
        for name, value in found.items():
            arrays[name] = np.concatenate([arrays[name], value.values]) if name in arrays else value.values
    sets = list(like.feature_sets.values())
    arrays = change(arrays)
    assert set(arrays) == {each.name for each in sets}
    features = {each.name: Stored(each, arrays[each.name]) for each in sets}
    with CacheWriter(path, spec or dict(like.spec), sets) as writer:
        writer.append(np.array(like.stored_keys()), features, {**cache.provenance()[0], **provenance})
        writer.commit_dataset(replace(like.dataset, ids=None))
    return FeatureCache.open(path)


def copied(folder: Path, model: Path, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """Copy a model's folder with its weights changed."""
    shutil.copytree(model, folder)
    if change is not None:
        weights = safetensors.numpy.load_file(folder / "model.safetensors")
        change(weights)
        safetensors.numpy.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def claimed(cache: FeatureCache, **fields: Any) -> dict[str, Any]:
    """The spec of a cache with some of its fields changed."""
    spec = json.loads(json.dumps(cache.spec))
    for name, value in fields.items():
        *groups, last = name.split("__")
        at = spec
        for group in groups:
            at = at[group]
        at[last] = value
    return spec


@dataclass
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def call(*arguments: Any) -> Said:
        capsys.readouterr()
        code = run([str(argument) for argument in ("check", *arguments)])
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return call


def fails(said: Said, *causes: str) -> None:
    """The command says different, in one line that points at the cause."""
    assert said.code == 1
    line = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(line) == 1
    for cause in causes:
        assert cause in line[0], line[0]


QUICK = ("--steps", "3", "--head", "linear", "--reference", "canonical")


# What must be equal


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_head_and_pooling_agrees_to_the_bit_and_with_plain_torch(
    dtype: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bert = tiny_models.build("bert", tmp_path / "model")
    poolings = ["mean", "cls", "max", "last", "pooler", "l2:mean@-2", "mean@all", "tokens"]
    there = made(tmp_path / "c", bert, ROWS[:23], pooling=poolings, compute_dtype=dtype)
    for head, feature in [*((head, None) for head in HEADS), ("attention", "tokens"), ("attention-pooling", "tokens")]:
        found = check_equivalence(
            there, ROWS[:23], head=head, feature=feature, steps=5, progress=False, id_column="id",
            reference="both" if (feature is None and dtype == "float32") or head == "mlp" else "canonical",
        )  # fmt: skip
        assert found.equal, f"{head}: {found.to_text()}"
        bits = [each for each in found.comparisons if each.reference == "canonical"]
        assert {each.what for each in bits} >= {*(f"features {name}" for name in poolings), "losses", "logits"}
        assert all(each.difference.same and each.verdict == "identical" for each in bits), found.to_text()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mlp", {"hidden": [13, 7], "norm": True, "activation": "silu"}),
        ("residual", {"width": 11, "depth": 3}),
        ("linear", {}),
    ],
)
def test_other_options_of_heads_agree_too(cache: FeatureCache, kind: str, options: dict[str, Any]) -> None:
    found = check_equivalence(cache, ROWS, head=HeadSpec(kind, "torch", options), steps=5, progress=False)
    assert found.equal, found.to_text()


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_other_tasks_agree_too(task: str, model: Path, tmp_path: Path) -> None:
    labels = [f"{at % 2};c" if at % 3 else str(at % 2) for at in range(len(ROWS))]
    rows = [
        {**row, "label": label if task == "multilabel" else str(at / 7)}
        for at, (row, label) in enumerate(zip(ROWS, labels, strict=True))
    ]
    reading = {"task": task, "label_separator": ";" if task == "multilabel" else None}
    there = made(tmp_path / "c", model, rows, **reading)
    found = check_equivalence(there, rows, steps=5, progress=False, **reading)
    assert found.equal, found.to_text()


@pytest.mark.parametrize("store", ["float16", "bfloat16"])
def test_what_rounding_to_storage_costs_is_said_and_not_a_fault(store: str, model: Path, tmp_path: Path) -> None:
    there = made(tmp_path / "c", model, storage_dtype=store, pooling=["mean", "tokens"])
    found = check_equivalence(there, ROWS, head="mlp", steps=5, progress=False)
    assert found.equal, found.to_text()
    costs = [each for each in found.comparisons if each.verdict == "cost"]
    assert [each.what for each in costs] == [f"features mean ({store})", f"features tokens ({store})", "logits"]
    largest = float(np.abs(there.features(feature="mean")).max())
    assert 0 < costs[0].difference.largest <= largest * UNIT[store] * 2
    assert found.costs["label agreement"].endswith("%")
    assert "accuracy" in found.costs


@pytest.mark.parametrize("kind", ["gpt2", "t5", "roberta"])
def test_other_architectures_agree_too(kind: str, tmp_path: Path) -> None:
    """A decoder without a padding token, the encoder of an encoder-decoder, positions counted from the padding id."""
    there = made(tmp_path / "c", tiny_models.build(kind, tmp_path / "m"), ROWS[:11], pooling=["last", "mean"])
    found = check_equivalence(there, ROWS[:11], head="mlp", steps=2, progress=False)
    assert found.equal, found.to_text()
    features = [each for each in found.comparisons if each.reference == "standard" and each.what.startswith("features")]
    assert len(features) == 2
    # The tolerance is of the size of what it bounds: neither never reached nor nearly broken.
    assert all(each.tolerance and each.tolerance / 100 < each.difference.largest < each.tolerance for each in features)


def test_the_real_model_agrees(minilm_path: Path, short_minilm: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"{text} and {at} in Zürich", "label": str(at % 2), "split": "validation" if at > 7 else "train"}
        for at, text in enumerate(tiny_models.TEXTS)
    ]
    for model, dtype, reference in ((minilm_path, "float32", "both"), (short_minilm, "bfloat16", "canonical")):
        there = extract(rows, model=str(model), output_dir=tmp_path / dtype, compute_dtype=dtype, positions=128)
        found = check_equivalence(there, rows, steps=2, reference=reference, progress=False)
        assert found.equal, found.to_text()


def test_inputs_that_the_cache_keeps_are_enough(model: Path, tmp_path: Path, command: Callable[..., Said]) -> None:
    made(tmp_path / "c", model, keep_inputs=True)
    assert command(tmp_path / "c", *QUICK).code == 0


def test_duplicates_and_unlabelled_inputs_are_fine(model: Path, tmp_path: Path) -> None:
    rows = [*ROWS, ROWS[3], ROWS[3]]
    there = made(tmp_path / "c", model, [{**row, "id": str(at)} for at, row in enumerate(rows)])
    assert check_equivalence(there, rows, **FAST).equal
    found = check_equivalence(there, load_examples([{"text": row["text"]} for row in rows], labels="none"), **FAST)
    assert found.equal
    assert [note for note in found.notes if "labels" in note]


def test_a_part_is_compared_with_its_rows_of_the_whole(model: Path, tmp_path: Path) -> None:
    there = made(tmp_path / "c", model, part="2/2")
    assert check_equivalence(there, ROWS, **FAST).equal


# What is printed


def test_the_table_says_what_was_compared(
    cache: FeatureCache, csv: Path, command: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = command(cache.path, csv, "--steps", "3", "--rows", "11", "--json", "--split", "validation")
    assert said.code == 0
    told = json.loads(said.out)
    assert told["equal"]
    assert told["sampled"]["training"] == "3 minibatch steps of 32 on 33 rows, by adamw"
    whats = {(each["reference"], each["what"]): each for each in told["comparisons"]}
    assert whats["canonical", "losses"]["values"] == whats["canonical", "losses"]["identical"] == 3
    assert (
        whats["standard", "features mean"]["largest_absolute_difference"]
        < whats["standard", "features mean"]["tolerance"]
    )
    monkeypatch.setattr(check, "TRAIN_ROWS", 5)
    monkeypatch.setattr(check, "EVALUATION_ROWS", 3)
    said = command(cache.path, csv, *QUICK, "--rows", "13")
    assert said.code == 0
    assert "features 13 of 44 rows" in said.out
    assert "missed with probability 70%" in said.out
    assert "verdict: equal" in said.out
    said = command(cache.path, csv, *QUICK, "--all")
    assert "features all rows" in said.out
    assert [line.split()[-1] for line in said.out.splitlines() if " optimum " in line] == ["identical"], said.out


def test_raise_if_different_carries_the_cause() -> None:
    apart = Comparison("canonical", "losses", Difference(5, 3, 0.25, 7, (2,)), "step 2", None, "different")
    found = EquivalenceResult([apart])
    with pytest.raises(NotEqualError, match=r"losses differ .* up to 0\.25"):
        found.raise_if_different()
    with pytest.raises(NotEqualError, match="weights"):
        EquivalenceResult([], findings=["weights: changed"]).raise_if_different()
    assert EquivalenceResult([replace(apart, verdict="within tolerance")]).raise_if_different().equal


# Planted faults: the model


def test_one_weight_off_by_one_ulp(
    cache: FeatureCache, model: Path, csv: Path, tmp_path: Path, command: Callable[..., Said]
) -> None:
    def nudge(weights: dict[str, Any]) -> None:
        value = weights["transformer.layer.2.output_layer_norm.weight"]
        value[5] = np.nextafter(value[5], np.float32(9))

    other = copied(tmp_path / "model", model, nudge)
    said = command(cache.path, csv, *QUICK, "--model", other)
    fails(said, "weights: the model's weight files are not those", "model.safetensors", "features mean:")
    assert "different" in said.out
    # The same weights, and a cache that claims to be made with them.
    spec = claimed(cache, backbone__weights=load_backbone(str(other)).identity["backbone"]["weights"])
    lying = forged(tmp_path / "lying", cache, spec=spec)
    said = command(lying.path, csv, *QUICK, "--model", other)
    fails(said, "of 44 rows differ", "the arithmetic or the weights differ a little")
    assert "weight files" not in said.err


def test_another_model_of_the_same_shape(
    cache: FeatureCache, model: Path, csv: Path, tmp_path: Path, command: Callable[..., Said]
) -> None:
    def redraw(weights: dict[str, Any]) -> None:
        weights.update({name: np.flip(value).copy() for name, value in weights.items() if value.ndim == 2})

    other = copied(tmp_path / "model", model, redraw)
    fails(command(cache.path, csv, *QUICK, "--model", other), "weights:", "features mean:")
    lying = forged(tmp_path / "lying", cache, spec=load_backbone(str(other), features=["mean"]).identity)
    fails(command(lying.path, csv, *QUICK, "--model", other), "another model, pooling or way of preparing texts")


def test_a_model_of_another_width(cache: FeatureCache, tmp_path: Path, csv: Path, command: Callable[..., Said]) -> None:
    wide = tiny_models.build("modernbert", tmp_path / "wide")
    fails(command(cache.path, csv, *QUICK, "--model", wide), "architecture:", "[22] in the cache, [24] here")


def test_another_pooling_under_the_same_name(
    cache: FeatureCache, model: Path, csv: Path, tmp_path: Path, command: Callable[..., Said]
) -> None:
    cls = made(tmp_path / "cls", model, pooling=["cls"])
    lying = forged(tmp_path / "lying", cls, lambda arrays: {"mean": arrays["cls"]}, like=cache)
    fails(command(lying.path, csv, *QUICK), "the cache holds what the pooling cls gives: another pooling")


def test_another_precision(
    cache: FeatureCache, model: Path, csv: Path, tmp_path: Path, command: Callable[..., Said]
) -> None:
    half = made(tmp_path / "half", model, compute_dtype="bfloat16")
    lying = forged(tmp_path / "lying", half, like=cache)
    fails(command(lying.path, csv, *QUICK), "44 of 44 rows differ", "precision")


def swapped_loader(monkeypatch: pytest.MonkeyPatch, change: Callable[[LoadedBackbone], None]) -> None:
    def load(*arguments: Any, **options: Any) -> LoadedBackbone:
        backbone = load_backbone(*arguments, **options)
        change(backbone)
        return backbone

    monkeypatch.setattr(load_module, "load_backbone", load)


def test_dropout_left_on(
    cache: FeatureCache, csv: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Said]
) -> None:
    swapped_loader(monkeypatch, lambda backbone: backbone.network.train())
    fails(command(cache.path, csv, *QUICK), "other features each time", "dropout left on", "in training mode")


class Drifting(torch.nn.Module):
    """A layer norm followed by a batch normalisation, as an image model might have it."""

    def __init__(self, inner: torch.nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.batch = inner, torch.nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.batch(self.inner(x).transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("updating", [True, False])
def test_batch_norm_updating(
    updating: bool,
    csv: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[..., Said],
) -> None:
    def insert(backbone: Any, live: bool = False) -> None:
        block = backbone.network.transformer.layer[1]
        block.output_layer_norm = Drifting(block.output_layer_norm, 22)
        block.output_layer_norm.train(live)

    backbone = load_backbone(str(model), features=["mean"])
    insert(backbone)
    extract(ROWS, output_dir=tmp_path / "c", backbone=backbone, id_column="id")
    swapped_loader(monkeypatch, lambda backbone: insert(backbone, updating))
    said = command(tmp_path / "c", csv, *QUICK)
    if updating:
        fails(said, "its buffers", "running_mean", "batch normalisation is live")
    else:
        assert said.code == 0, said.err


# Planted faults: the preparation of texts


def test_a_tokenizer_with_one_changed_word(
    cache: FeatureCache, model: Path, csv: Path, tmp_path: Path, command: Callable[..., Said]
) -> None:
    other = copied(tmp_path / "model", model)
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["vocab"]["scene"] = words["model"]["vocab"]["lovely"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    fails(command(cache.path, csv, *QUICK, "--model", other), "tokenizer: its files are not those", "tokenizer.json")
    here = load_backbone(str(other), features=["mean"]).identity
    lying = forged(tmp_path / "lying", cache, spec=here)
    fails(command(lying.path, csv, *QUICK, "--model", other), "with the word 'scene' and no others: the tokenizer")


def test_lower_casing_changed(
    cache: FeatureCache, model: Path, csv: Path, tmp_path: Path, command: Callable[..., Said]
) -> None:
    other = copied(tmp_path / "model", model)
    tiny_models.sentence_transformers_files(other, {"pooling_mode": "mean"}, max_length=64)
    (other / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": True}))
    fails(command(cache.path, csv, *QUICK, "--model", other), "lower-casing:", "False in the cache, True here")
    # A cache that is honest about it agrees, when its settings are all read from its spec.
    honest = made(tmp_path / "honest", other)
    assert honest.spec["preprocessing"]["lower_case"]
    assert command(honest.path, csv, *QUICK).code == 0
    lying = forged(tmp_path / "lying", honest, like=cache)
    fails(command(lying.path, csv, *QUICK, "--model", model), "upper-case letters and no others: lower-casing differs")


def test_maximum_length_changed(
    cache: FeatureCache, model: Path, csv: Path, tmp_path: Path, command: Callable[..., Said]
) -> None:
    found = check_equivalence(cache, ROWS, backbone=load_backbone(str(model), features=["mean"], max_length=7), **FAST)
    assert not found.equal
    assert "maximum length" in found.reason
    assert "preprocessing.max_length: 64 in the cache, 7 here" in found.reason
    short = made(tmp_path / "short", model, max_length=12)
    lying = forged(tmp_path / "lying", short, like=cache)
    fails(command(lying.path, csv, *QUICK), "and more tokens, none of", "another maximum length")


def test_token_counts_that_differ(model: Path, csv: Path, tmp_path: Path) -> None:
    long, short = (made(tmp_path / str(length), model, pooling=["tokens"], max_length=length) for length in (64, 12))
    found = check_equivalence(
        long, ROWS, backbone=load_backbone(str(model), features=["tokens"], max_length=12), steps=2, progress=False,
        reference="canonical",
    )  # fmt: skip
    assert not found.equal
    assert check_equivalence(short, ROWS, steps=2, progress=False).equal


def test_a_prompt_that_was_left_out(
    cache: FeatureCache, model: Path, csv: Path, tmp_path: Path, command: Callable[..., Said]
) -> None:
    lying = forged(tmp_path / "lying", cache, spec=claimed(cache, preprocessing__prompt="the film "))
    fails(command(lying.path, csv, *QUICK), "features mean: 44 of 44 rows differ")
    backbone = load_backbone(str(model), features=["mean"], prompt="the film ")
    assert "prompt:" in check_equivalence(cache, ROWS, backbone=backbone, **FAST).reason


# Planted faults: rows, labels, stored values


def test_one_text_changed(cache: FeatureCache, tmp_path: Path, command: Callable[..., Said]) -> None:
    rows = [{**row, "text": "not so bad"} if row["id"] == "r13" else row for row in ROWS]
    said = command(cache.path, write_csv(tmp_path / "rows.csv", rows), *QUICK, "--id-column", "id")
    fails(said, "1 row of the input not in", "(row r13 'not so bad')", "was a row changed")


def test_two_rows_of_the_input_swapped(cache: FeatureCache, tmp_path: Path, command: Callable[..., Said]) -> None:
    rows = [ROWS[9] if at == 5 else ROWS[5] if at == 9 else row for at, row in enumerate(ROWS)]
    said = command(cache.path, write_csv(tmp_path / "rows.csv", rows), *QUICK)
    fails(said, "order of rows: 2 rows", "r5 of the cache is row 9 of the input")


def test_two_stored_rows_swapped(cache: FeatureCache, csv: Path, tmp_path: Path, command: Callable[..., Said]) -> None:
    order = np.arange(len(ROWS))
    order[[8, 21]] = 21, 8
    lying = forged(tmp_path / "lying", cache, lambda arrays: {"mean": arrays["mean"][order]})
    fails(command(lying.path, csv, *QUICK), "features mean: 2 of 44 rows differ (row 8, 21)", "rows were swapped")


def test_labels_shuffled(cache: FeatureCache, tmp_path: Path, command: Callable[..., Said]) -> None:
    labels = [row["label"] for row in ROWS]
    rows = [{**row, "label": labels[at - 1]} for at, row in enumerate(ROWS)]
    wrong = sum(row["label"] != before["label"] for row, before in zip(rows, ROWS, strict=True))
    said = command(cache.path, write_csv(tmp_path / "rows.csv", rows), *QUICK)
    fails(said, f"labels: {wrong} rows of 44 with another label", "in the input", "shuffled")
    assert "losses" in said.err


def test_rows_in_another_split(cache: FeatureCache, tmp_path: Path, command: Callable[..., Said]) -> None:
    rows = [{**row, "split": "validation"} if at == 6 else row for at, row in enumerate(ROWS)]
    said = command(cache.path, write_csv(tmp_path / "rows.csv", rows), *QUICK)
    fails(said, "splits: 1 row", "r6: validation in the input, train in the cache")


def test_one_stored_bit_flipped(cache: FeatureCache, csv: Path, tmp_path: Path, command: Callable[..., Said]) -> None:
    def flip(arrays: dict[str, Any]) -> dict[str, Any]:
        arrays["mean"].view(np.uint32)[19, 3] ^= 1
        return arrays

    lying = forged(tmp_path / "lying", cache, flip)
    assert not lying.verify()  # every hash is right
    said = command(lying.path, csv, *QUICK, "--json")
    fails(said, "1 of 44 rows differ (row 19)", "1 value by up to 1 ULP", "what is stored was changed")
    row = next(each for each in json.loads(said.out)["comparisons"] if each["what"] == "features mean")
    assert (row["values"] - row["identical"], row["largest_ulp_distance"], row["where"]) == (1, 1, "row 19 [3]")


# Planted faults: training


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"seed": 1, "shuffle_seed": 0}, "initial head differ at output"),
        ({"shuffle_seed": 1}, "batch order differ at step 0"),
        ({"standardize": False}, "standardisation differ"),
        ({"label_smoothing": 0.1}, "initial head differ at output.bias"),
        ({"class_weight": "balanced"}, "another seed, other targets, class weights or smoothing"),
        ({"learning_rate": 0.0031}, "losses differ at step 1 first: the first steps agree, then one moved"),
        ({"weight_decay": 1.0}, "learning rate, decay, momentum, clipping or schedule"),
        ({"optimizer": "sgd"}, "learning rate, decay, momentum, clipping or schedule"),
        ({"schedule": "linear"}, "the optimizer differs"),
    ],
)
def test_a_head_trained_another_way(
    change: dict[str, Any], cause: str, cache: FeatureCache, csv: Path, monkeypatch: pytest.MonkeyPatch,
    command: Callable[..., Said],
) -> None:  # fmt: skip
    honest = check.train_live

    def other(plan: TrainingPlan, x: Any, y: Any, evaluation: Any, batches: Any, **options: Any) -> Any:
        batches._seed = change.get("shuffle_seed", 0)
        return honest(replace(plan, spec=replace(plan.spec, **change)), x, y, evaluation, batches, **options)

    monkeypatch.setattr(check, "train_live", other)
    fails(command(cache.path, csv, *QUICK), "training, canonical reference: ", cause)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_steps_of_sgd_agree_to_the_bit_and_with_torchs(
    head: str, cache: FeatureCache, csv: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Said]
) -> None:
    asked = ("--steps", "3", "--head", head, "--optimizer", "sgd")
    said = command(cache.path, csv, *asked, "--json")
    assert said.code == 0
    told = json.loads(said.out)
    assert told["sampled"]["training"] == "3 minibatch steps of 32 on 33 rows, by sgd"
    verdicts = {(row["reference"], row["what"]): row["verdict"] for row in told["comparisons"]}
    assert verdicts["canonical", "optimizer: first"] == verdicts["canonical", "final parameters"] == "identical"
    assert verdicts["standard", "optimizer: first"] in ("identical", "within tolerance")
    assert ("canonical", "optimizer: second") not in verdicts  # SGD has none
    honest = check.train_live, check.train_standard

    def lost(plan: TrainingPlan, *rest: Any, **options: Any) -> Any:
        return honest[0](replace(plan, spec=replace(plan.spec, momentum=0.0)), *rest, **options)

    def ours_lost(plan: TrainingPlan, *rest: Any, **options: Any) -> Any:
        return honest[1](replace(plan, spec=replace(plan.spec, momentum=0.5)), *rest, **options)

    monkeypatch.setattr(check, "train_live", lost)
    fails(command(cache.path, csv, *asked, "--reference", "canonical"), "decay, momentum, clipping or schedule")
    monkeypatch.setattr(check, "train_standard", ours_lost)
    fails(command(cache.path, csv, *asked, "--reference", "standard"), "training, standard reference: ")
    refused = command(cache.path, csv, *asked, "--blocks", "1")
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert "--optimizer sgd and --blocks" in refused.err


def test_standardised_by_other_moments_and_other_dropout(
    cache: FeatureCache, csv: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Said]
) -> None:
    honest = check.train_live

    def moved(plan: TrainingPlan, x: Dense, *rest: Any, **options: Any) -> Any:
        return honest(plan, x.take(np.arange(len(x) - 1)), *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr(check, "train_live", moved)
        fails(command(cache.path, csv, *QUICK), "standardisation differ at ", "another mean or scale")

    def wetter(plan: TrainingPlan, *rest: Any, **options: Any) -> Any:
        return honest(replace(plan, head=replace(plan.head, options={"dropout": 0.2})), *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr(check, "train_live", wetter)
        said = command(cache.path, csv, *QUICK[:2], "--head", "mlp", "--reference", "canonical")
        fails(said, "training, canonical reference: losses differ at step")


def test_predictions_that_read_features_another_way(
    cache: FeatureCache, csv: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Said]
) -> None:
    honest = check.train_live

    def other(plan: TrainingPlan, x: Any, y: Any, evaluation: Dense, *rest: Any, **options: Any) -> Any:
        record = honest(plan, x, y, evaluation, *rest, **options)
        head = record.head
        state = {name: value * np.float32(1.0001) for name, value in head.state.items()}
        moved = TrainedHead(head.spec, head.task, head.class_names, head.feature, state=state)
        return replace(record, logits=moved.logits(evaluation))

    monkeypatch.setattr(check, "train_live", other)
    fails(command(cache.path, csv, *QUICK), "logits differ at row r")


def test_a_fault_that_our_own_code_makes_on_both_sides_is_seen_by_the_standard_reference(
    model: Path, csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Said]
) -> None:
    monkeypatch.setitem(pooling.MASKED, "mean", lambda hidden, mask: hidden.float().mean(dim=1))  # counts padding
    there = made(tmp_path / "c", model)
    assert command(there.path, csv, *QUICK).code == 0
    said = command(there.path, csv, "--steps", "3", "--head", "linear")
    fails(said, "standard reference, features mean: off by up to", "pooling")


# Another environment


def test_another_environment_is_said_and_held_to_the_tolerance(
    cache: FeatureCache, csv: Path, tmp_path: Path, command: Callable[..., Said]
) -> None:
    def nudge(arrays: dict[str, Any]) -> dict[str, Any]:
        return {"mean": np.nextafter(arrays["mean"], np.float32(9))}

    there = forged(tmp_path / "there", cache, nudge, torch="2.1.0")
    said = command(there.path, csv, *QUICK)
    assert said.code == 0, said.err
    assert "made in another environment (torch 2.1.0 there" in said.out
    assert "within tolerance" in said.out
    far = forged(tmp_path / "far", cache, lambda arrays: {"mean": arrays["mean"] * np.float32(1.001)}, torch="2.1.0")
    fails(command(far.path, csv, *QUICK), "44 of 44 rows differ")


# Bad input; and nothing is ever changed


def test_a_check_changes_nothing(cache: FeatureCache, csv: Path, tmp_path: Path, command: Callable[..., Said]) -> None:
    before = files(cache.path)
    command(cache.path, csv, "--steps", "2", "--head", "mlp")
    command(cache.path, write_csv(tmp_path / "rows.csv", ROWS[1:]), *QUICK)
    assert files(cache.path) == before


def bad(change: Callable[[list[dict[str, str]]], list[dict[str, str]]], tmp_path: Path) -> Path:
    return write_csv(tmp_path / "bad.csv", change([dict(row) for row in ROWS]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1:], "1 row of .* not in the input \\(row r0\\)"),
        (lambda rows: [*rows, {**rows[0], "text": "more"}], "1 row of the input not in .* \\(row 44 'more'\\)"),
        (lambda rows: [{**row, "text": f"{row['text']} x"} for row in rows], "44 rows of the input .* and 39 more"),
        (lambda rows: [*rows, rows[0]], "45 rows and .* has 44, of the same contents"),
        (
            lambda rows: [{**row, "split": "test"} for row in rows[:5]] + rows[5:],
            "no split 'test', which the input has",
        ),
    ],
)
def test_an_input_that_is_not_the_caches(change: Any, message: str, cache: FeatureCache, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        check_equivalence(cache, bad(change, tmp_path), **FAST)
    assert "\n" not in str(error.value)


def test_other_classes_in_the_input_are_a_finding(cache: FeatureCache) -> None:
    rows = [{**row, "label": "maybe"} if at == 2 else row for at, row in enumerate(ROWS)]
    assert "labels: the input has the classes maybe, no, yes" in check_equivalence(cache, rows, **FAST).reason
    # The same classes in another order are the same labels.
    examples = load_examples(ROWS, class_names=["yes", "no"])
    assert check_equivalence(cache, examples, **FAST).equal


def test_what_cannot_be_checked_is_said_in_one_line(
    cache: FeatureCache, model: Path, csv: Path, tmp_path: Path, command: Callable[..., Said]
) -> None:
    gone = copied(tmp_path / "gone", model)
    made(tmp_path / "c", gone)
    shutil.rmtree(gone)
    fails(command(tmp_path / "c", csv, *QUICK), "say where it is now with --model")
    assert command(tmp_path / "c", csv, *QUICK, "--model", model).code == 0
    fails(command(tmp_path / "c", *QUICK), "keeps no inputs: name the INPUT")
    with pytest.raises(InputError, match="no split 'tset': it has train, validation"):
        check_equivalence(cache, ROWS, split="tset", **FAST)
    with pytest.raises(SpecError, match="steps is 0"):
        check_equivalence(cache, ROWS, **{**FAST, "steps": 0})
    with pytest.raises(SpecError, match="not trained in steps"):
        check_equivalence(cache, ROWS, **{**FAST, "head": HeadSpec("knn", "sklearn")})
    with pytest.raises(SpecError, match="reference"):
        check_equivalence(cache, ROWS, reference="mine")
    alike = [ROWS[1], ROWS[4], ROWS[6]]
    few = made(tmp_path / "few", model, alike)
    with pytest.raises(InputError, match="one class"):
        check_equivalence(few, alike, **FAST)
    with pytest.raises(InputError, match="too few rows to compare training: 1 labelled in train"):
        check_equivalence(made(tmp_path / "one", model, ROWS[2:4]), ROWS[2:4], **FAST)
    relabel(tmp_path / "few", load_examples([{"text": row["text"]} for row in alike], labels="none"))
    with pytest.raises(InputError, match="no labels"):
        check_equivalence(tmp_path / "few", alike, **FAST)
    with pytest.raises(BackboneError, match="backbone of one's own"):
        check_equivalence(forged(tmp_path / "own", cache, spec={"made": "up"}), ROWS, **FAST)


# The parts


floats = st.floats(width=32, allow_nan=False)


@given(arrays(np.float32, st.integers(1, 11), elements=floats))
def test_rounding_is_torchs(x: np.ndarray) -> None:
    for dtype in ("float16", "bfloat16"):
        theirs = torch.from_numpy(x.copy()).to(getattr(torch, dtype)).float().numpy()
        assert rounded(x, dtype).tobytes() == theirs.tobytes()
        assert rounded(rounded(x, dtype), dtype).tobytes() == theirs.tobytes()
    assert STORED["float16"] == np.dtype("<f2")


@given(floats, st.integers(-7, 7))
def test_ulps_count_steps_between_neighbours(start: float, steps: int) -> None:
    a = b = np.float32(start)
    with np.errstate(over="ignore"):  # past the largest number
        for _ in range(abs(steps)):
            b = np.nextafter(b, np.float32(np.inf if steps > 0 else -np.inf))
    if not np.isfinite([a, b]).all():
        return
    found = difference(np.array([a, 1.0], np.float32), np.array([b, 1.0], np.float32))
    assert found.ulps == abs(steps)
    assert found.identical == (2 if a.tobytes() == b.tobytes() else 1)
    assert found.largest == abs(float(a) - float(b))


@pytest.mark.parametrize(("dtype", "digits"), [("float32", 24), ("float16", 11), ("bfloat16", 8), ("float64", 53)])
def test_ulps_are_of_values_within_a_factor_of_two(dtype: str, digits: int) -> None:
    """Near zero a count of them, in the thousands of millions, would say nothing of how large a difference is."""
    kind = np.float64 if dtype == "float64" else np.float32

    def ulps(*pairs: tuple[float, float]) -> int | None:
        a, b = np.array(pairs, kind).T.copy()
        return difference(a, b, dtype).ulps

    assert ulps((1.0, 1.0), (1.0, 1.0 + 2.0 ** (1 - digits))) == 1
    assert ulps((1.5, 2.0)) in (2 ** (digits - 2), 2 ** (digits - 3)), "in units of the larger one or of the smaller"
    for far in ((1e-3, -1e-3), (1e-3, 3e-3), (0.0, 1.0), (1.0, np.nan), (1.0, np.inf)):
        assert ulps((1.0, 1.0), far) is None
    near, far_apart = Difference(2, 1, 0.5, 7, (0,)), Difference(2, 1, 0.5, None, (0,))
    assert near.joined(far_apart, 2).ulps is far_apart.joined(near, 2).ulps is None
    assert near.joined(Difference(3, 3), 2).ulps == 7


def test_ulps_are_shown_where_bits_are_compared() -> None:
    gap = Difference(5, 3, 1e-6, 3, (0,))
    for row, cell, told in (
        (judged("canonical", "losses", gap), "3", 3),
        (judged("standard", "losses", gap, tolerance=1e-5), "-", None),
        (judged("standard", "losses", replace(gap, identical=5, ulps=0), tolerance=1e-5), "0", 0),
        (judged("canonical", "losses", replace(gap, ulps=None)), "-", None),
    ):
        assert row.cells()[HEADER.index("ulps")] == cell
        assert row.to_json()["largest_ulp_distance"] == told


def test_differences_of_bits() -> None:
    zero = difference(np.array([0.0], np.float32), np.array([-0.0], np.float32))
    assert (zero.identical, zero.largest, zero.ulps, zero.where) == (0, 0.0, 0, (0,))
    nan = np.array([np.nan, 1.0], np.float32)
    assert difference(nan, nan).same
    assert difference(nan, np.array([2.0, 1.0], np.float32)).largest == np.inf
    assert difference(np.zeros(3), np.zeros(2)).identical == 0
    assert difference(np.array([3, 5]), np.array([3, 9])) == Difference(2, 1, 4.0, None, (1,))
    a = np.zeros((2, 3), np.float32)
    b = a.copy()
    b[1, 2] = 0.5
    assert difference(a, b).where == (1, 2)
    assert Difference(5, 5).joined(difference(a, b), 5) == Difference(11, 10, 0.5, None, (6, 2))
    one = np.array([1.0], np.float32)
    assert ordered_bits(one + np.float32(2**-7), "bfloat16") - ordered_bits(one, "bfloat16") == 1
    assert ordered_bits(one + np.float32(2**-10), "float16") - ordered_bits(one, "float16") == 1


@pytest.mark.parametrize("kind", HEADS)
def test_plain_heads_are_the_same_function(kind: str) -> None:
    attends, layers = kind.startswith("attention"), 5 if kind.startswith("layer-") else 1
    what = "tokens" if attends else "layers" if layers > 1 else "pooled"
    feature = FeatureSet("m", what, 13, layers, "float32")  # type: ignore[arg-type]
    ours = build_head(HeadSpec(kind), feature, 3, seed=5).eval()
    with torch.no_grad():
        for vectors in (value for name, value in ours.named_parameters() if value.dim() == 1):
            vectors.add_(torch.arange(len(vectors)) * 0.1)  # a mix, norms and biases that are all alike hide a fault
    state = {name: value.numpy() for name, value in ours.state_dict().items()}
    plain = plain_head(HeadSpec(kind), state, torch.Generator()).eval()
    x = torch.randn(7, 13) if what == "pooled" else torch.randn(7, 5, 13)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3], [5], [2], [4], [5]]) if attends else None
    with torch.no_grad():
        torch.testing.assert_close(plain(x, mask), ours(x, mask), rtol=0, atol=2e-6)
    with pytest.raises(SpecError, match="no plain twin"):
        plain_head(HeadSpec("mine"), state, torch.Generator())


def test_the_tolerance_follows_its_formula() -> None:
    assert local_error(384, "float32") == pytest.approx(2**-24 * np.sqrt(388))
    assert local_error(384, "bfloat16") == pytest.approx(2 * 2**-8, rel=1e-4)
    one, three = feature_tolerance(np.array([1.0, 3.0]), 384, "float32", 100)
    assert three == pytest.approx(3 * one)
    assert one < feature_tolerance(np.array(1.0), 384, "float32", 10_000) < 2 * one
    # A matrix alone: noise of relative size delta on each weight moves y by delta * sqrt(sum (w x)^2).
    torch.manual_seed(3)
    layer = torch.nn.Linear(211, 307, bias=False)
    x = torch.randn(1, 211)
    with torch.no_grad():
        layer.weight[5] *= 1e-20  # a component that is next to nothing has a tolerance next to nothing
    before = layer.weight.detach().clone()
    kappa = conditioning(layer, lambda network: {"y": network(x).detach()})["y"]
    expected = (before * x).square().sum(dim=1).sqrt().numpy()
    assert kappa.shape == (307,)
    assert np.median(kappa / expected) == pytest.approx(1.0, abs=0.15)
    assert 0 < kappa[5] < 1e-18
    both = np.array([1.0, 3e-9]), np.array([0.1, 1e-10])
    assert storage_tolerance(*both, "float16").tolist() == [2**-10, 0.0]
    assert storage_tolerance(*both, "float32").tolist() == [0.0, 0.0]
    assert torch.equal(layer.weight, before)
    # Behind a ReLU, what these rows leave at 0 or nearly there is as uncertain as what they do not.
    rectified = conditioning(layer, lambda network: {"y": network(torch.cat([x, -x])).detach().relu()})["y"]
    assert rectified.shape == (307,)
    assert rectified.min() == rectified[5] == pytest.approx(np.median(rectified), rel=0.2)
    assert longest_axis(layer) == 307
    close = labels_may_differ(np.array([[0.0, 1.0], [0.0, 0.1]]), 0.06, CLASSIFICATION)
    assert close.tolist() == [False, True]
    assert labels_may_differ(np.array([[0.1, 1.0]]), 0.06, MULTILABEL).tolist() == [[True, False]]
