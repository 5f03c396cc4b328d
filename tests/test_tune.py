"""The last blocks trained from cached hidden states: what live training gives, to the bit, and a run like any other."""

from __future__ import annotations

import csv
import inspect
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import tiny_models
import tiny_pictures
import torch
from safetensors.torch import load_file
from small_caches import SPEC, write
from torch import nn
from torch.nn import functional as F

from embedcache import Predictor, check_equivalence, check_tuning, extract, train_on_cache, tune
from embedcache.backbone import load_backbone
from embedcache.cache import FeatureCache
from embedcache.cli import cli, run
from embedcache.equivalence import tuning as checking
from embedcache.errors import (
    BackboneError,
    BackboneMismatchError,
    BundleError,
    FeatureError,
    Interrupted,
    SpecError,
)
from embedcache.finetune import CachedStates, LiveStates, TailModel, Tuned, cached_states, evaluate_tuned, live, tuning
from embedcache.finetune.live import LiveLearner
from embedcache.finetune.tuning import load_tail
from embedcache.heads import TrainedHead, build_head
from embedcache.shard import FeatureSet
from embedcache.spec import TUNING, HeadSpec, ModelSource, TrainSpec
from embedcache.train.minibatch import HeadLearner

WORDS = ("good", "bad", "film", "plot", "old", "very", "a")
FAST = TrainSpec(epochs=3, batch_size=5, learning_rate=1e-2, patience=0, weight_decay=0.01, seed=3)
ONE = replace(FAST, epochs=1)


def rows() -> list[dict[str, str]]:
    random = np.random.default_rng(5)
    made = [" ".join(random.choice(WORDS, int(random.integers(2, 9)))) + f" {number}" for number in range(61)]
    return [{"text": text, "label": "good" if text.count("good") > text.count("bad") else "bad"} for text in made]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("bert", tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inputs") / "rows.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows())
    return path


@pytest.fixture(scope="module")
def cache(bert: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    path = tmp_path_factory.mktemp("caches") / "c"
    given = ["extract", str(table), "-o", str(path), "--model", str(bert), "--pooling", "mean", "--states", "-1"]
    assert run([*given, "--split", "60/20/20", "--keep-inputs", "--device", "cpu"]) == 0
    return FeatureCache.open(path)


def test_a_run_is_a_head_beside_a_whole_backbone(bert: Path, cache: FeatureCache, tmp_path: Path) -> None:
    from transformers import AutoModel

    result = tune(cache, 1, spec=FAST, progress=False, device="cpu")
    head = result.save(tmp_path / "run")
    assert cache.feature_sets.keys() == {"mean", "states@-2"}
    (folder,) = (tmp_path / "run").glob("backbone-*")
    before, after = (AutoModel.from_pretrained(place).state_dict() for place in (bert, folder))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    last = max(name for name in after if name.startswith("encoder.layer.")).split(".")[2]
    assert changed
    assert all(name.startswith(f"encoder.layer.{last}.") for name in changed)
    predictor = Predictor.load(tmp_path / "run", device="cpu")
    assert predictor.head.model == str(tmp_path / "run" / f"./{folder.name}")
    test = cache.rows("test")
    tail = result.model.eval()
    states = CachedStates(cache, test, cached_states(cache, 1))
    with torch.no_grad():
        expected = tail.run(states.laid_out(np.arange(len(test))))[0].double().numpy()
    probabilities = predictor.head.calibrated(expected)
    texts = [rows()[row]["text"] for row in test.tolist()]
    said = np.array([list(each.probabilities.values()) for each in predictor(texts)])
    np.testing.assert_allclose(said, probabilities, atol=1e-5)
    again = TrainedHead.from_pretrained(tmp_path / "run")
    assert evaluate_tuned(again, cache)["rows"] == len(test)
    assert head.training["blocks"] == 1
    for wrong in ({"blocks": "many"}, {"blocks": 2}, {"blocks": 0}, {"states": None}, {"states": "mean"}):
        with pytest.raises(BundleError, match="tune it again"):
            evaluate_tuned(replace(again, training={**again.training, **wrong}), cache)
    assert "last 1 block" in (tmp_path / "run" / "README.md").read_text()
    told: list[Any] = []
    other = tune(
        cache, 1, spec=TrainSpec(**{**FAST.record(), "epochs": 1}), progress=False, device="cpu",
        observe=lambda step, values: told.append({"epoch": step, **values}),
    )  # fmt: skip
    assert [{name: value for name, value in each.items() if name != "learning_rate"} for each in told] == other.history
    other.save(tmp_path / "run")
    assert len(list((tmp_path / "run").glob("backbone-*"))) == 1, "the old backbone goes with its head"
    Predictor.load(tmp_path / "run", device="cpu")


def test_the_commands(table: Path, cache: FeatureCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, out = str(cache.path), str(tmp_path / "run")
    command = ["tune", place, "-o", out, "--blocks", "1", "--epochs", "2", "--device", "cpu"]
    assert run([*command, "--class-weight", "balanced"]) == 0
    said, noted = capsys.readouterr()
    assert f"saved in {out}: try  embedcache predict" in said
    assert "%|" not in noted, "bars, also those of transformers, are for terminals"
    assert run(["evaluate", out, place, "--json", "--record"]) == 0
    assert json.loads(capsys.readouterr().out)["test"]["rows"] == len(cache.rows("test"))
    assert run(["predict", out, "--text", "a very good film", "--device", "cpu"]) == 0
    assert run(["check", place, str(table), "--split", "60/20/20", "--blocks", "1", "--steps", "3", "--dropout"]) == 0
    shown = capsys.readouterr().out
    assert "states states@-2" in shown
    assert "last 1 block with dropout and a trained head" in shown
    assert "verdict: equal" in shown
    for wrong, message in (
        (
            ["check", out],
            "trained on, by embedcache check CACHE INPUT --feature mean --head linear --blocks 1;",
        ),
        (["tune", place, "-o", str(tmp_path / "x"), "--blocks", "2"], "extract --states -2"),
        (["tune", place, "-o", str(tmp_path / "x"), "--class-weight", '{"bad": 2}'], "extract --states -2"),
        (["tune", place, "-o", str(tmp_path / "x"), "--blocks", "1", "--class-weight", "{"], "is not JSON"),
        (["tune", place, "-o", str(tmp_path / "x"), "--blocks", "0"], "blocks is 0: expected at least 1"),
        (["tune", place, "-o", str(tmp_path / "x"), "--blocks", "3"], "blocks is 3, and "),
        (["tune", place, "-o", str(tmp_path / "x"), "--blocks", "99"], "has 3: expected fewer than that"),
        (["check", place, "--blocks", "99"], "has 3: expected fewer than that"),
        (["tune", place, "-o", str(tmp_path / "x"), "--blocks", "1", "--head", "attention"], "extract --tokens"),
        (
            ["tune", place, "-o", str(tmp_path / "x"), "--blocks", "1", "--class-weight", '{"bad": -1}'],
            "class_weight is -1 for 'bad': expected a finite number of 0 or more",
        ),
        (["tune", place, "-o", str(tmp_path / "x"), "--blocks", "1", "--head", "knn"], "cannot be fine-tuned"),
        (["tune", place, "-o", str(tmp_path / "x"), "--blocks", "1", "--layer-decay", "2"], "at most 1"),
        (["check", place, "--dropout"], "give --blocks K too"),
        (["check", place, "--no-dropout"], "give --blocks K too"),
        (["check", place, "--new-head"], "give --blocks K too"),
        (["check", place, "--blocks", "1", "--rows", "9"], "--rows and --blocks contradict each other"),
        (["evaluate", out, place, "--average-views"], "leave out --average-views"),
        (["extract", str(table), "-o", str(tmp_path / "y"), "--states", "2"], "--states 2: expected -1 or below"),
        (["extract", str(table), "-o", str(tmp_path / "y"), "--states", "0"], "--states 0: expected -1 or below"),
    ):
        assert run(wrong) in (1, 2)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["train", "tune", "sweep"])
def test_no_number_may_be_infinite(
    name: str, cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is computed with one; only time may be without end."""
    for place in ("train.cached.train_on_cache", "finetune.tuning.train_on_cache", "finetune.tuning.load_tail"):
        monkeypatch.setattr(f"embedcache.{place}", None)
    flags = [flag.opts[0] for flag in cli.commands[name].params if flag.type is click.FLOAT]  # type: ignore[attr-defined]
    assert "--learning-rate" in flags or name == "sweep"
    place = ["--blocks", "1"] if name == "tune" else ["--head", "mlp"]
    options = [[flag, value] for flag in flags for value in ("nan", "inf", "-inf")]
    options += [["--set", f"mlp.learning_rate={value}"] for value in ("NaN", "Infinity", "nan")] * (name == "sweep")
    for given in options:
        if given != ["--minutes", "inf"]:
            assert run([name, str(cache.path), "-o", str(tmp_path / "x"), *place, *given]), given
            assert re.search("expected|means nothing", capsys.readouterr().err)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("albert", ["--states", "-1"], "AlbertModel has no list of blocks"),
        ("t5", ["--states", "-1"], "hand on more than"),
        ("bert", ["--states", "-1", "--states", "-3"], "has 3: expected fewer than that"),
        ("bert", ["--states", "-4"], "would be what enters the last 4 blocks, and .* has 3: expected fewer"),
        ("bert", ["--states", "-2", "--dtype", "float16"], "computed in float16, in which gradients are lost"),
        ("bert", ["--states", "-2", "--compile"], "by torch.compile, which does not train"),
        ("bert", ["--states", "-2"], ""),
        ("albert", ["--pooling", "states@-2"], ""),
    ],
)
def test_states_are_not_computed_in_vain(
    kind: str, options: list[str], message: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What ``tune`` would refuse ``extract --states`` refuses, also in a dry run, before a row is computed."""
    monkeypatch.setattr("embedcache.backbone.model.FrozenModel.compile", lambda self: None)
    given = ["extract", str(table), "-o", str(tmp_path / "c"), "--model", str(tiny_models.build(kind, tmp_path / kind))]
    for also in (["--dry-run"], []):
        assert bool(run([*given, "--device", "cpu", *options, *also])) == bool(message)
        assert re.search(message, capsys.readouterr().err)
    assert (tmp_path / "c").exists() == (not message)
    if kind == "bert" and not message:  # the network was put together again
        extract(
            str(table), output_dir=tmp_path / "d", model=tmp_path / kind, pooling=["auto", "states@-3"], device="cpu"
        )
        one, other = (FeatureCache.open(tmp_path / name) for name in "cd")
        assert one.spec == other.spec
        for name in one.feature_sets:
            rows = np.arange(one.n_rows)
            values = [getattr(cache.of_rows(rows, cache.feature(name)), "values", None) for cache in (one, other)]
            assert np.array_equal(*values)


def test_a_dry_run_says_what_states_save(
    bert: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["extract", str(table), "--model", str(bert), "--states", "-1", "--split", "60/20/20", "--device", "cpu"]
    assert run([*given, "--pooling", "mean", "--states", "-2", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "saves       states@-2: 2 of 3 blocks in every epoch of tune --blocks 1, about" in shown
    assert "for 39 training rows" in shown
    assert "saves       states@-3: 1 of 3 blocks in every epoch of tune --blocks 2, about" in shown
    assert run([*given, "--pooling", "states@-4", "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (saving,) = told["saves"].values()
    assert (saving["trained"], saving["spared"], saving["blocks"], saving["rows"]) == (1, 2, 3, 39)
    assert saving["seconds"] == pytest.approx(told["seconds"] * 39 / 61 * 2 / 3)


@pytest.mark.parametrize(("head", "proof"), [("mlp", "--feature mean --head mlp;"), ("knn", "--feature mean;")])
def test_a_run_in_the_place_of_its_cache_is_told_of(
    cache: FeatureCache, tmp_path: Path, capsys: pytest.CaptureFixture[str], head: str, proof: str
) -> None:
    train_on_cache(cache, head, TrainSpec(epochs=1), progress=False).head.save_pretrained(tmp_path / "run")
    assert run(["check", str(tmp_path / "run")]) == 2
    assert (
        f"{tmp_path / 'run'} is a run, not a cache: such training is proved, with the cache that "
        f"it was trained on, by embedcache check CACHE INPUT {proof}" in capsys.readouterr().err
    )
    (tmp_path / "run" / "config.json").write_text("{}")  # whatever else has such a file
    assert run(["check", str(tmp_path / "run")]) == 1
    assert "is not a feature cache (it has no manifest.json)" in capsys.readouterr().err


def test_ctrl_c(cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the head is trained nothing is saved; later the best so far."""
    steps: list[int] = []
    step, stop_at = LiveLearner.step, [3]

    def stopped(self: Any, batch: Any) -> Any:
        steps.append(1)
        if len(steps) > stop_at[0]:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(LiveLearner, "step", stopped)
    assert tune(cache, 1, spec=FAST, progress=False, device="cpu").interrupted
    place, given = tmp_path / "run", ["tune", str(cache.path), "--blocks", "1", "--device", "cpu"]
    assert run([*given, "-o", str(place)]) == 1
    assert (place / "README.md").exists()
    started = tuning.train_on_cache(cache, "linear", progress=False)
    interrupted = replace(started, fitted=replace(started.fitted, interrupted=True))
    monkeypatch.setattr(tuning, "train_on_cache", lambda *_, **__: interrupted)
    with pytest.raises(Interrupted, match="nothing is saved"):
        tune(cache, 1, spec=FAST, progress=False, device="cpu")


@pytest.mark.parametrize("blocks", [None, 1])
@pytest.mark.parametrize("taken", [0, 12])
def test_ctrl_c_ends_a_check_without_a_verdict(
    blocks: int | None, taken: int, cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each of the trainings that are compared: half of one would be taken for a difference."""
    learner: Any = LiveLearner if blocks else HeadLearner
    steps: list[int] = []
    step = learner.step

    def stopped(self: Any, batch: Any) -> Any:
        steps.append(1)
        if len(steps) == taken + 1:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(learner, "step", stopped)
    options: dict[str, Any] = {"steps": 8, "device": "cpu", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        check_tuning(cache, blocks=1, new_head=True, **options) if blocks else check_equivalence(cache, **options)


def test_the_first_blocks_may_as_well_be_run(bert: Path, cache: FeatureCache) -> None:
    """A few steps as anyone would write them, the whole network in the loop and its first blocks frozen."""
    features = cache.feature_sets["mean"]
    train = cache.rows("train")[:20]
    y = torch.from_numpy(cache.targets()[train])
    losses: list[list[float]] = []
    for whole in (False, True):
        backbone = load_backbone(bert, features=("mean",), device="cpu")
        tail = TailModel(backbone, build_head(HeadSpec("linear"), features, 2, seed=1), 1).eval()
        trained = {name for name, parameter in tail.backbone.named_parameters() if parameter.requires_grad}
        states = CachedStates(cache, train, cached_states(cache, 1))
        if whole:
            plain = load_backbone(bert, features=("mean",), device="cpu")
            for name, parameter in plain.network.named_parameters():
                parameter.requires_grad_(name in trained)
            kept = cache.inputs()
            assert kept is not None
            prepared = plain.prepare([kept[int(row)] for row in train])
        module: nn.Module = plain.network if whole else tail.backbone
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW([*parameters, *tail.head.parameters()], lr=1e-2)
        losses.append([])
        for step in range(6):
            some = np.arange(step % 4 * 5, step % 4 * 5 + 5)
            if whole:
                from embedcache.batching import Batch

                inputs = plain.lay_out(prepared, Batch(int(prepared.lengths[some].max()), 5, some))
                logits = tail.head(plain.features(inputs)[0])
            else:
                logits = tail.run(states.laid_out(some))[0]
            loss = F.cross_entropy(logits, y[some])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert losses[0][5] < losses[0][1]


@pytest.mark.parametrize("dropout", [True, False])
def test_dropout_is_off_or_on(cache: FeatureCache, monkeypatch: pytest.MonkeyPatch, dropout: bool) -> None:
    """Where it is off nothing is drawn: torch's generator stands in training where it stood before."""
    stood = []
    step = LiveLearner.step
    monkeypatch.setattr(
        LiveLearner, "step", lambda self, batch: stood.append(torch.random.get_rng_state()) or step(self, batch)
    )
    tuned = tune(cache, 1, spec=FAST, dropout=dropout, progress=False, device="cpu")
    assert len(stood) > 2
    assert torch.equal(stood[0], stood[-1]) == (not dropout)
    assert tuned.record["dropout"] is dropout


@pytest.fixture(scope="module")
def in_bfloat16(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return extract(
        rows(), model=bert, output_dir=tmp_path_factory.mktemp("caches") / "b", pooling=["mean", "states@-2"],
        split="60/20/20", device="cpu", compute_dtype="bfloat16", storage_dtype="bfloat16", keep_inputs=True,
    )  # fmt: skip


@pytest.mark.parametrize("fault", ["none", "block", "block that is not trained", "dropout", "mask", "half"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planted_faults_are_found(
    cache: FeatureCache, in_bfloat16: FeatureCache, monkeypatch: pytest.MonkeyPatch, dtype: str, fault: str
) -> None:
    given, load_tail, calls = CachedStates.laid_out, checking.load_tail, []

    def laid_out(self: Any, chosen: Any) -> Any:
        inputs = given(self, chosen)
        if isinstance(self, LiveStates):
            return inputs
        states, mask = inputs.arguments["states"], inputs.mask
        if fault == "half":
            return type(inputs)({"states": states.half().float()}, mask)
        if fault == "mask":
            return type(inputs)({"states": states}, torch.ones_like(mask))
        if fault == "dropout":
            torch.rand(1)
        return inputs

    def deeper(cache: Any, pooled: Any, source: Any, head: Any, blocks: int, **settings: Any) -> TailModel:
        """What trains from the cache runs a block more than the states have gone through, and may train it."""
        calls.append(head)
        more = fault.startswith("block") and len(calls) != 2  # the second is the live one
        if more:  # as if the states entered that block
            settings["states"] = None
        tail = load_tail(cache, pooled, source, head, blocks + more, **settings)
        for parameter in dict(tail.depths()).get(1, ()) if fault == "block that is not trained" else ():
            parameter.requires_grad_(False)
        return tail

    monkeypatch.setattr(CachedStates, "laid_out", laid_out)
    monkeypatch.setattr(checking, "load_tail", deeper)
    result = check_tuning(
        cache if dtype == "float32" else in_bfloat16, blocks=1, steps=4, dropout=fault == "dropout", device="cpu",
        progress=False,
    )  # fmt: skip
    different = [row for row in result.comparisons if row.verdict == "different"]
    found = {row.reference for row in different}
    expected = set() if fault == "none" else {"canonical", "standard"}
    if fault == "half":  # about as large as rounding in the blocks before; of bfloat16 no bit is lost at these sizes
        expected = {"canonical", *found} if dtype == "float32" else set()
    assert found == (expected if dtype == "float32" else expected - {"standard"}), result.to_text()
    assert result.equal == (not expected)
    if expected:
        first = {"block": "initial weights"}.get(fault, "losses")
        assert different[0].what == first, result.to_text()


@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("new_head", [True, False])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_whatever_tune_begins_with_is_proved(cache: FeatureCache, head: str, new_head: bool, dropout: bool) -> None:
    given: dict[str, Any] = {"dropout": dropout, "new_head": new_head, "device": "cpu", "progress": False}
    result = check_tuning(cache, blocks=1, head=head, steps=2, **given)
    assert result.equal, result.to_text()
    trained = ["losses", "gradients", "gradient norms", "final weights", "logits", "labels"]
    moments = ["standardisation"] * (head == "mlp" and not new_head)
    compared = [row.what for row in result.comparisons]
    assert compared == ["states states@-2", "initial weights", *moments, *trained, *trained], compared
    assert result.sampled["training"].startswith(
        f"2 steps of 16 of the last 1 block{' with dropout' * dropout} and a {'new' if new_head else 'trained'} head"
    )


def test_as_tune_does_it_by_default() -> None:
    for name in ("blocks", "dropout", "new_head"):
        default = inspect.signature(tune).parameters[name].default
        assert inspect.signature(check_tuning).parameters[name].default == default


@pytest.mark.parametrize("fault", ["gradients", "initial weights"])
def test_what_live_training_does_otherwise_is_found(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A gradient that is off where the loss is not; and a head that is trained on other rows."""
    loss, trained, calls = live.LiveLoss.__call__, checking.train_head, [0]

    def sloped(self: Any, *given: Any) -> Any:
        value, slope = loss(self, *given)
        calls[0] += 1
        return value, slope if calls[0] <= 2 else slope * 1.0001

    def other(x: Any, y: Any, **settings: Any) -> Any:
        calls[0] += 1
        return trained(x, y if calls[0] <= 1 else 1 - y, **settings)

    if fault == "gradients":
        monkeypatch.setattr(live.LiveLoss, "__call__", sloped)
    else:
        monkeypatch.setattr(checking, "train_head", other)
    result = check_tuning(cache, blocks=1, steps=2, reference="canonical", device="cpu", progress=False)
    first = next(row.what for row in result.comparisons if row.verdict == "different")
    assert first == ("losses" if fault == "gradients" else fault), result.to_text()
    assert any(row.what == "gradients" and row.verdict == "different" for row in result.comparisons)


def predicts_as_trained(result: Tuned, run: Path, cache: FeatureCache, contents: list[Any]) -> None:
    """Save a run, and see that it predicts and is measured as its blocks say that were trained."""
    head, test = result.save(run), cache.rows("test")
    assert evaluate_tuned(TrainedHead.from_pretrained(run), cache)["rows"] == len(test)
    tail, states = result.model.eval(), CachedStates(cache, test, cached_states(cache, 1))
    with torch.no_grad():
        logits = tail.run(states.laid_out(np.arange(len(test))))[0].double().numpy()
    said = Predictor.load(run, device="cpu")([contents[row] for row in test.tolist()])
    values = np.array([list(each.probabilities.values()) for each in said])
    np.testing.assert_allclose(values, head.calibrated(logits), atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in tiny_models.MODELS if kind not in ("albert", "t5")])
def test_every_network_with_a_list_of_blocks(kind: str, tmp_path: Path) -> None:
    """Making one compares the last block's bits by itself with those behind the others."""
    folder = tiny_models.build(kind, tmp_path / kind)
    cache = extract(
        rows(), model=folder, output_dir=tmp_path / "c", pooling=["mean", "states@-2"], split="60/20/20", device="cpu"
    )
    result = tune(cache, 1, spec=ONE, progress=False, device="cpu")
    tail = result.model
    frozen = {id(each) for block in tail._frozen for each in block.parameters()}
    assert all(id(each) not in frozen for _, part in tail.depths() for each in part)
    with tail.whole() as network:
        assert frozen <= {id(each) for each in network.parameters()}
    predicts_as_trained(result, tmp_path / "run", cache, [row["text"] for row in rows()])
    (saved,) = (tmp_path / "run").glob("backbone-*")
    before, after = ({*load_file(place / "model.safetensors")} for place in (folder, saved))
    if kind == "gpt2":  # its folder has a language model
        before = {name.removeprefix("transformer.") for name in before}
    assert after == before, "also what is beside the part that was loaded, such as a decoder"
    more = load_backbone(folder, features=("mean",), device="cpu")
    deeper = TailModel(more, build_head(HeadSpec("linear"), more.feature_sets[0], 2), 1, given=2)
    trained = [{name for name, each in of.named_parameters() if each.requires_grad} for of in (tail, deeper)]
    assert trained[0] == trained[1], "whichever states are given"


@pytest.mark.parametrize(("kind", "message"), [("albert", "has no list of blocks"), ("t5", "hand on more than")])
def test_what_cannot_be_cut(kind: str, message: str, tmp_path: Path) -> None:
    backbone = load_backbone(tiny_models.build(kind, tmp_path / kind), features=("mean",), device="cpu")
    with pytest.raises(BackboneError, match=message):
        TailModel(backbone, build_head(HeadSpec("linear"), backbone.feature_sets[0], 3), 1)


def test_refusals(bert: Path, cache: FeatureCache, tmp_path: Path) -> None:
    backbone = load_backbone(bert, features=("mean",), device="cpu")
    for blocks, given, asked in ((9, None, "blocks is 9"), (1, 3, "the states enter the last 3 blocks")):
        with pytest.raises(SpecError, match=f"{asked}, and .* has 3: expected fewer than that"):
            TailModel(backbone, build_head(HeadSpec("linear"), backbone.feature_sets[0], 3), blocks, given=given)
    backbone.identity = {**backbone.identity, "backbone": {"adapter": {}}}
    with pytest.raises(BackboneError, match="it has an adapter: merge it"):
        TailModel(backbone, build_head(HeadSpec("linear"), backbone.feature_sets[0], 3), 1)
    records = [*rows()]
    options: dict[str, Any] = {"model": bert, "pooling": ["mean", "states@-2"], "split": "60/20/20", "device": "cpu"}
    rounded = extract(records, output_dir=tmp_path / "b", compute_dtype="float16", **options)
    with pytest.raises(SpecError, match="extract --dtype bfloat16 or float32"):
        tune(rounded, 1, progress=False)
    with pytest.raises(FeatureError, match="has no hidden states"):
        tune(cache, 2, progress=False)
    other = tiny_models.build("electra", tmp_path / "electra")
    with pytest.raises(BackboneMismatchError, match="give the same model with --model"):
        tune(cache, 1, model=other, progress=False)
    assert (TUNING.epochs, TUNING.weight_decay) == (3, 0.1)


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_other_tasks(task: Any, bert: Path, tmp_path: Path) -> None:
    records: list[dict[str, object]] = [
        {"text": each["text"], "label": ["bad", "old"] if "bad" in each["text"] else ["good"]}
        if task == "multilabel" else {"text": each["text"], "label": 1000.0 + 300.0 * len(each["text"].split())}
        for each in rows()
    ]  # fmt: skip
    options: dict[str, Any] = {"model": bert, "pooling": ["mean", "tokens@-2"], "split": "60/20/20", "device": "cpu"}
    cache = extract(records, output_dir=tmp_path / "c", task=task, **options)
    result = tune(cache, 1, spec=FAST, progress=False, device="cpu")
    head = result.save(tmp_path / "run")
    assert evaluate_tuned(TrainedHead.from_pretrained(tmp_path / "run"), cache)["rows"] == len(cache.rows("test"))
    train = cache.rows("train")
    tail, states = result.model.eval(), CachedStates(cache, train, cached_states(cache, 1))
    with torch.no_grad():
        logits = tail.run(states.laid_out(np.arange(len(train))))[0].double().numpy()
    said = Predictor.load(tmp_path / "run", device="cpu")([str(records[row]["text"]) for row in train.tolist()])
    values = np.array([list(each.probabilities.values()) for each in said])
    if task == "regression":
        mean, deviation = result.tuned.target
        np.testing.assert_allclose(values, logits * deviation + mean, rtol=1e-5)
        assert 900 < values.mean() < 4000
    else:
        np.testing.assert_allclose(values, head.calibrated(logits), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_of_more_blocks_serve_fewer(
    dtype: str, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block between runs frozen: the bits of live training, and the steps from states that were taken behind it."""
    deep, near = (
        extract(
            rows(), model=bert, output_dir=tmp_path / states, pooling=["mean", states], split="60/20/20", device="cpu",
            compute_dtype=dtype, keep_inputs=True,
        )
        for states in ("states@-3", "states@-2")
    )  # fmt: skip
    checked = check_tuning(deep, blocks=1, steps=4, dropout=True, device="cpu", progress=False)
    assert checked.equal, checked.to_text()
    assert "states states@-3" in checked.to_text()
    assert {row.reference for row in checked.comparisons} == {"canonical", *["standard"] * (dtype == "float32")}
    seen, step = set[tuple[bool, ...]](), LiveLearner.step

    def watched(self: Any, batch: Any) -> Any:
        *_, between, last = self.model._list[0]
        hook = last.register_forward_hook(
            lambda _, given, output: seen.add((between.training, last.training, given[0].requires_grad))
        )
        try:
            return step(self, batch)
        finally:
            hook.remove()

    monkeypatch.setattr(LiveLearner, "step", watched)
    result, direct = (
        tune(each, 1, spec=FAST, dropout=each is deep, progress=False, device="cpu") for each in (deep, near)
    )
    assert (False, True, False) in seen
    assert not any(between or graph for between, _, graph in seen)
    assert [(each.record["states"], each.facts["trained"].partition("cached ")[2]) for each in (result, direct)] == [
        ("states@-3", "hidden states that enter the last 2"), ("states@-2", "hidden states"),
    ]  # fmt: skip
    result = tune(deep, 1, spec=FAST, progress=False, device="cpu")
    losses = [[epoch["train_loss"] for epoch in each.history] for each in (result, direct)]
    np.testing.assert_allclose(*losses, rtol=1e-4 if dtype == "float32" else 0.05)
    result.save(tmp_path / "run")
    head = TrainedHead.from_pretrained(tmp_path / "run")
    assert evaluate_tuned(head, deep)["rows"] == len(deep.rows("test"))
    with pytest.raises(FeatureError, match="extract --states -2"):
        evaluate_tuned(head, near)
    if dtype == "float32":  # planted: dropout in the block between draws alike on both sides, and plain torch has none
        train = TailModel.train

        def dropping(self: Any, mode: bool = True) -> Any:
            train(self, mode)
            if mode and hasattr(self, "_list"):
                self._list[0][-2].train()
            return self

        monkeypatch.setattr(TailModel, "train", dropping)
        planted = check_tuning(deep, blocks=1, steps=4, dropout=True, device="cpu", progress=False)
        assert {row.reference for row in planted.comparisons if row.verdict == "different"} == {"standard"}


@pytest.mark.parametrize("content", ["text", "image"])
def test_the_states_that_are_taken(content: str, tmp_path: Path) -> None:
    """Those that enter the blocks, else those with the fewest blocks between; tokens of a text are states too."""
    names = ("mean", "tokens", "states", "tokens@-3", "states@-5", "states@-4", "tokens@-2", "l2:states@-2", "tokens@1")
    sets = [FeatureSet(name, "pooled" if name == "mean" else "tokens", 3, 1, "float32") for name in names]
    spec = {**SPEC, "preprocessing": {"kind": content}}
    cache = FeatureCache.open(write(tmp_path / "c", 5, 5, sets, spec=spec))
    assert cache.spec.content == content
    taken = {blocks: cached_states(cache, blocks).name for blocks in (1, 2, 3, 4)}
    text = {1: "tokens@-2", 2: "tokens@-3", 3: "states@-4", 4: "states@-5"}
    assert taken == (text if content == "text" else {**text, 1: "states@-4", 2: "states@-4"})
    with pytest.raises(FeatureError, match=r"last 5 blocks \(states@-6\), or more: .*extract --states -5"):
        cached_states(cache, 5)


def test_in_bfloat16_too(in_bfloat16: FeatureCache, tmp_path: Path) -> None:
    """States and blocks in bfloat16, weights in float32: the bits of live training, the answers of the network."""
    cache = in_bfloat16
    checked = check_tuning(cache, blocks=1, steps=4, device="cpu", progress=False)
    assert checked.equal
    assert checked.notes == ["no standard reference: it is of float32 alone"]
    result = tune(cache, 1, spec=FAST, progress=False, device="cpu")
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}
    head, test = result.save(tmp_path / "run"), cache.rows("test")
    assert head.extraction["compute_dtype"] == "bfloat16"
    evaluate_tuned(TrainedHead.from_pretrained(tmp_path / "run"), cache)
    tail, states = result.model.eval(), CachedStates(cache, test, cached_states(cache, 1))
    with torch.no_grad():
        logits = tail.run(states.laid_out(np.arange(len(test))))[0].double().numpy()
    said = Predictor.load(tmp_path / "run", device="cpu")([rows()[row]["text"] for row in test.tolist()])
    values = np.array([list(each.probabilities.values()) for each in said])
    np.testing.assert_allclose(values, head.calibrated(logits), atol=0.05)


CUT = (
    "beit", "clip", "clip-projected", "convnext", "convnextv2", "deit", "dinov2", "hiera", "registers", "regnet",
    "resnet", "siglip", "tower", "vit",
)  # fmt: skip
UNCUT = {"swin": "hand on more than their states", "mobilenetv2": "has no list of blocks"}


@pytest.mark.parametrize("kind", UNCUT)
def test_networks_of_pictures_that_cannot_be_cut(kind: str, tmp_path: Path) -> None:
    folder = tiny_pictures.build(kind, tmp_path / kind)
    backbone = load_backbone(folder, features=("mean",), device="cpu", content="image")
    with pytest.raises(BackboneError, match=UNCUT[kind]):
        TailModel(backbone, build_head(HeadSpec("linear"), backbone.feature_sets[0], 3), 1)


@pytest.mark.parametrize("kind", CUT)
def test_pictures_all_the_way(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers behind class and register tokens, and stages of feature maps; making one compares its bits."""
    contents = tiny_pictures.pictures(23)
    examples = tiny_pictures.examples_of(contents, splits=("train", "train", "validation", "test"))
    pooling = "projected" if kind.startswith("clip") else "mean"
    cache = extract(
        examples, model=tiny_pictures.build(kind, tmp_path / "model"), output_dir=tmp_path / "c", device="cpu",
        pooling=[pooling, "states@-2"], keep_inputs=True,
    )  # fmt: skip
    result = tune(cache, 1, spec=ONE, progress=False, device="cpu")
    trained = sum(each.numel() for _, part in result.model.depths() for each in part)
    assert 0 < trained < result.model.count_trainable_params().total
    predicts_as_trained(result, tmp_path / "run", cache, contents)
    if kind not in ("vit", "resnet"):
        return
    assert cache.vectors(cache.feature("states@-2"))[0] == {"vit": 1 + 16, "resnet": 64}[kind], "with the class token"
    assert check_tuning(cache, blocks=1, steps=4, device="cpu", progress=False).equal
    given = CachedStates.laid_out

    def laid_out(self: Any, chosen: Any) -> Any:  # every patch in the place of its neighbour
        inputs = given(self, chosen)
        return type(inputs)({"states": inputs.arguments["states"].roll(1, dims=1)}, inputs.mask)

    monkeypatch.setattr(CachedStates, "laid_out", laid_out)
    assert not check_tuning(cache, blocks=1, steps=4, device="cpu", progress=False, reference="canonical").equal


@pytest.mark.parametrize(("kind", "changed"), [("vit", {"num_hidden_layers": 3}), ("convnext", {})])
def test_pictures_by_states_of_more_blocks(kind: str, changed: dict[str, int], tmp_path: Path) -> None:
    cache = extract(
        tiny_pictures.examples_of(tiny_pictures.pictures(23), splits=("train", "train", "validation", "test")),
        model=tiny_pictures.build(kind, tmp_path / "model", **changed), output_dir=tmp_path / "c", device="cpu",
        pooling=["mean", "states@-3"], keep_inputs=True,
    )  # fmt: skip
    checked = check_tuning(cache, blocks=1, steps=3, device="cpu", progress=False)
    assert checked.equal, checked.to_text()


@pytest.mark.parametrize("new_head", [False, True])
def test_no_epoch_that_is_worse_than_the_start_is_kept(new_head: bool, cache: FeatureCache) -> None:
    """Rates at which the network forgets all that it knows: what there was before stays, if it was trained."""
    wild = replace(FAST, epochs=2, learning_rate=1.0, metric="log_loss")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = tune(cache, 1, spec=wild, backbone_learning_rate=10.0, new_head=new_head, progress=False, device="cpu")
    head = train_on_cache(cache, progress=False).head.module
    pristine = load_tail(cache, cache.feature("mean"), ModelSource(device="cpu"), head, 1)
    same = all(
        torch.equal(parameter, result.model.state_dict()[name]) for name, parameter in pristine.state_dict().items()
    )
    assert same is not new_head
    assert (result.fitted.start is None) is new_head
    assert ("kept" in result.facts) is not new_head
    assert any("the validation rows went better before" in str(each.message) for each in told) is not new_head
    if not new_head:
        assert result.fitted.best_epoch == -1
        assert result.fitted.start == result.metrics["validation"]["log_loss"]
