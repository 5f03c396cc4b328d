"""The head bundle: every head comes back bit for bit, and nothing in a folder from a stranger is believed."""

from __future__ import annotations

import json
import pickle
import re
import stat
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from embedcache.errors import BundleError, CacheLockedError, EmbedcacheError, FeatureError
from embedcache.fingerprint import hash_json, sha256_file
from embedcache.heads import TrainedHead, kinds
from embedcache.heads.folder import prepare, record
from embedcache.heads.record import plain
from embedcache.heads.sklearn_kinds import KINDS
from embedcache.shard import FeatureSet
from embedcache.spec import HeadSpec, TrainSpec
from embedcache.train import train_head

RUNS = Path(__file__).parent / "archives" / "runs-1.0"
D, N = 5, 61
POOLED = FeatureSet("mean", "pooled", D, 1, "float32")
LAYERS = FeatureSet("mean@all", "layers", D, 3, "bfloat16")
TOKENS = FeatureSet("tokens", "tokens", D, 1, "float16")
SPEC = {"backbone": {"architecture": "None"}, "features": {"mean": {}}}
GENERATOR = np.random.default_rng(3)
NAMES = ("plain", 'comma, quote " and | pipe', "line\nbreak\r\n", "\ud800 half a pair", "🙂 שלום", " ", "")
SMALL = {
    "mlp": {"hidden": [8]}, "residual": {"width": 8, "depth": 1}, "attention": {"width": 8},
    "attention-pooling": {"width": 8, "queries": 2},
}  # fmt: skip


def features(feature: FeatureSet) -> Any:
    if feature.kind != "tokens":
        return GENERATOR.normal(size=(N, *feature.row_shape)).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(GENERATOR.integers(1, 7, N))])
    return GENERATOR.normal(size=(offsets[-1], D)).astype(np.float32), offsets


TARGETS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "classification": (np.arange(N) % len(NAMES), NAMES),
    "multilabel": (np.stack([np.arange(N) % 2, np.arange(N) % 3 == 0, np.arange(N) % 5 == 0], 1).astype(np.uint8),
                   NAMES[:3]),
    "regression": (GENERATOR.normal(size=(N, 2)) * [1, 1000], ("a", "b")),
}  # fmt: skip


def result(kind: str, engine: Any = "torch", task: Any = "classification", feature: FeatureSet = POOLED) -> Any:
    options = SMALL.get(kind, {}) if engine == "torch" else {"max_iter": 3} if "boosting" in kind else {}
    options = {"hidden": [4], "max_iter": 5} if (kind, engine) == ("mlp", "sklearn") else options
    x, (y, names) = features(feature), TARGETS[task]
    return train_head(
        x, y, x, y, HeadSpec(kind, engine, options), TrainSpec(epochs=2), task=task, class_names=names,
        feature=feature, extraction=SPEC, model="a/model", revision="main", progress=False,
    )  # fmt: skip


def trained(*what: Any) -> TrainedHead:
    head: TrainedHead = result(*what).head
    return head


CASES = [
    *((kind, "torch", task, POOLED) for kind in ("linear", "mlp", "residual") for task in TARGETS),
    *((kind, "torch", task, feature) for kind in ("attention", "attention-pooling") for task in TARGETS
      for feature in (TOKENS, LAYERS)),
    *((kind, "torch", task, LAYERS) for kind in ("layer-mix", "layer-concat") for task in TARGETS),
    *((kind, "sklearn", task.name, POOLED) for kind in KINDS for task in KINDS[kind].tasks),
]  # fmt: skip


def test_every_kind_is_tried() -> None:
    for engine in ("torch", "sklearn"):
        assert {kind for kind, its, _, _ in CASES if its == engine} == set(kinds(engine))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:3])) + "-" + case[3].kind)
def test_a_head_comes_back_bit_for_bit(case: Any, tmp_path: Path) -> None:
    head = trained(*case)
    head.save_pretrained(tmp_path / "run", metrics={"validation": {"accuracy": 0.5}}, history=[{"epoch": 1}])
    again = TrainedHead.from_pretrained(tmp_path / "run")
    x = features(case[3])
    for ours, theirs in ((head, again), (again, head)):
        np.testing.assert_array_equal(ours.logits(x), theirs.logits(x))
        np.testing.assert_array_equal(ours.probabilities(x), theirs.probabilities(x))
        np.testing.assert_array_equal(ours.predict(x), theirs.predict(x))
    for name in ("task", "class_names", "feature", "calibration", "extraction", "model", "revision"):
        assert getattr(again, name) == getattr(head, name)
    assert again.spec.kind == head.spec.kind
    assert again.spec.engine == head.spec.engine
    assert dict(again.spec.options) == dict(head.spec.options)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    weights = "model.safetensors" if head.state else "model.skops"
    assert names == {"config.json", weights, "metrics.json", "history.jsonl", "README.md"}


@given(names=st.lists(st.text(st.characters(), max_size=7), min_size=2, max_size=5, unique=True))
def test_class_names_may_be_any_text(names: list[str], tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("run")
    state = {"output.weight": np.zeros((len(names), D), np.float32), "output.bias": np.zeros(len(names), np.float32)}
    TrainedHead(HeadSpec("linear"), "classification", tuple(names), POOLED, state).save_pretrained(folder)
    assert TrainedHead.from_pretrained(folder).class_names == tuple(names)
    assert json.loads((folder / "config.json").read_bytes())["label2id"] == {name: at for at, name in enumerate(names)}


# Saving.


def held(run: Path) -> dict[str, bytes]:
    """Every file of a run, by its name."""
    return {path.name: path.read_bytes() for path in run.iterdir()}


def test_a_head_is_saved_over_another(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for kind, engine, weights in (
        ("linear", "torch", r"model\.safetensors"),
        ("mlp", "torch", r"model-[0-9a-f]{16}\.safetensors"),
        ("linear", "torch", r"model\.safetensors"),
        ("hist-gradient-boosting", "sklearn", r"model\.skops"),
        ("hist-gradient-boosting", "sklearn", r"model-[0-9a-f]{16}\.skops"),
        ("knn", "sklearn", r"model\.safetensors"),
    ):
        trained(kind, engine).save_pretrained(run, metrics={"validation": {"of": kind}}, history=[{"of": kind}])
        assert TrainedHead.from_pretrained(run).spec.kind == kind
        *names, last = sorted(held(run))
        assert re.fullmatch(weights, last)
        assert names == ["README.md", "config.json", "history.jsonl", "metrics.json"]
        assert json.loads((run / "metrics.json").read_text()) == {"validation": {"of": kind}}
        assert json.loads((run / "history.jsonl").read_text()) == {"of": kind}


def test_a_run_of_the_first_version_is_read_recorded_in_and_saved_over(tmp_path: Path) -> None:
    for number, then in enumerate((trained("mlp").save_pretrained, lambda run: record(run, "test", {"f1": 0.5}))):
        run = copied(RUNS / "linear", tmp_path / str(number))
        (run / ".metrics.json.tmp").write_text("left by a killed process of that version")
        head = TrainedHead.from_pretrained(run)
        expected = np.load(RUNS / "linear.npy")
        np.testing.assert_allclose(head.logits(np.eye(D, dtype=np.float32)), expected, rtol=1e-5)
        then(run)
        again = TrainedHead.from_pretrained(run)
        if then is not None and number == 0:
            assert again.spec.kind == "mlp"
            assert "model.safetensors" not in held(run)
        else:
            np.testing.assert_allclose(again.logits(np.eye(D, dtype=np.float32)), expected, rtol=1e-5)
            assert json.loads((run / "metrics.json").read_text()) == {"train": {"accuracy": 0.75}, "test": {"f1": 0.5}}
        assert ".metrics.json.tmp" not in held(run)


@pytest.mark.parametrize("older", [True, False])
def test_a_disk_that_fills_up_at_any_write_keeps_the_old_head_and_leaves_nothing(
    older: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    run, write, count = tmp_path / "run", os.write, [0]
    old, new = trained("linear"), trained("mlp")
    if older:
        old.save_pretrained(run)
    before = held(run) if older else None

    def full_at(number: int) -> Callable[..., int]:
        def call(descriptor: int, data: bytes) -> int:
            count[0] += 1
            if count[0] > number:
                raise OSError(28, "No space left on device")
            return write(descriptor, data)

        return call

    for number in range(5):
        count[0] = 0
        monkeypatch.setattr(os, "write", full_at(number))
        with pytest.raises(BundleError, match=rf"cannot write {re.escape(str(run))}/\S+: the disk is full") as caught:
            new.save_pretrained(run, history=[{"epoch": 1}])
        monkeypatch.undo()
        assert "\n" not in str(caught.value)
        assert (held(run) if older else run.exists() or None) == before
    monkeypatch.setattr(os, "write", full_at(5))
    count[0] = 0
    new.save_pretrained(run, history=[{"epoch": 1}])


def test_two_writers_of_a_run(tmp_path: Path) -> None:
    from embedcache.heads.folder import RunFolder

    head = trained("linear")
    with RunFolder(tmp_path / "run") as folder:
        for other in (lambda: head.save_pretrained(tmp_path / "run"), RunFolder(tmp_path / "run").__enter__):
            with pytest.raises(CacheLockedError, match=r"another process is writing to .*run: wait for it, or stop it"):
                other()
        head.save_pretrained(folder)
        with pytest.raises(CacheLockedError, match="another process"):
            record(tmp_path / "run", "test", {})
    assert TrainedHead.from_pretrained(tmp_path / "run").spec.kind == "linear"
    with RunFolder(tmp_path / "unused"):
        pass
    assert not (tmp_path / "unused").exists()
    with RunFolder(tmp_path / "removed") as folder:
        (tmp_path / "removed").rmdir()  # by somebody, while it trained
        head.save_pretrained(folder)
    assert TrainedHead.from_pretrained(tmp_path / "removed").spec.kind == "linear"
    (tmp_path / "link").symlink_to(tmp_path / "run")
    trained("mlp").save_pretrained(tmp_path / "link")  # a link that the user names is his own
    assert TrainedHead.from_pretrained(tmp_path / "run").spec.kind == "mlp"


def test_a_reader_beside_a_writer_sees_one_head_or_the_other(tmp_path: Path) -> None:
    import threading

    heads = [trained("linear"), trained("mlp"), trained("linear", "torch", "multilabel")]
    state = {(head.spec.kind, head.task): head.state["output.bias"] for head in heads}
    heads[0].save_pretrained(tmp_path / "run")
    done = threading.Event()

    def write() -> None:
        for number in range(60):
            heads[number % 3].save_pretrained(tmp_path / "run")
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not done.is_set() or not reads:
        head = TrainedHead.from_pretrained(tmp_path / "run")
        np.testing.assert_array_equal(head.state["output.bias"], state[head.spec.kind, head.task])
        reads += 1
    writer.join()


def test_what_is_not_a_number_is_null_in_the_files(tmp_path: Path) -> None:
    history = [{"epoch": 1, "train_loss": float("nan"), "seconds": np.float64(2)}]
    trained("linear").save_pretrained(tmp_path, metrics={"test": {"mcc": float("inf")}}, history=history)
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"test": {"mcc": None}}
    assert json.loads((tmp_path / "history.jsonl").read_text()) == {"epoch": 1, "train_loss": None, "seconds": 2.0}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"notes.txt": "mine"}, "holds something else than a head"),
        ({"README.md": "mine"}, "holds something else than a head"),
        ({"config.json": '{"model_type": "bert"}', "model.safetensors": ""}, "holds another model than a head"),
        (None, "is a file: choose a new or an empty directory"),
    ],
)
def test_nothing_of_anybody_elses_is_overwritten(files: dict[str, str] | None, said: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    if files is None:
        run.write_text("mine")
    else:
        run.mkdir()
        for name, text in files.items():
            (run / name).write_text(text)
    with pytest.raises(BundleError, match=said):
        trained("linear").save_pretrained(run)
    assert run.is_file() or {path.name: path.read_text() for path in run.iterdir()} == files


def test_a_folder_that_cannot_be_made_is_said_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="a part of the path is a file"):
        prepare(tmp_path / "file" / "run")
    prepare(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


# The card.


def test_the_card_says_what_matters(tmp_path: Path) -> None:
    done = result("mlp")
    done.save(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    for part in ("# mlp head on a/model", "hidden=\\[8\\]", "| task | classification |", "| backbone | a/model @ main",
                 "| features | mean (pooled, 5 wide) |", "| training rows | 61 |", "epochs 2", "| accuracy |",
                 "By class, on validation:"):  # fmt: skip
        assert part in card, part
    record(tmp_path, "test", {"accuracy": 0.75, "rows": 12, "intervals": {"accuracy": [0.7, 0.8]},
                              "missing_classes": ["a|b"]})  # fmt: skip
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "| metric | train | validation | test |" in card
    assert "test accuracy: 0.7000 to 0.8000 (95 % interval" in card
    assert "Not in test: a\\|b." in card
    assert "| training rows | 61 |" in card
    assert json.loads((tmp_path / "metrics.json").read_text())["test"]["accuracy"] == 0.75
    TrainedHead.from_pretrained(tmp_path)


def test_the_card_leaves_out_metrics_that_somebody_changed(tmp_path: Path) -> None:
    wrong = {"intervals": 3, "missing_classes": 5, "per_class": "all", "accuracy": 0.5}
    trained("linear").save_pretrained(tmp_path, metrics={"validation": wrong})
    record(tmp_path, "test", {"accuracy": 0.75})
    assert "| accuracy | 0.5000 | 0.7500 |" in (tmp_path / "README.md").read_text("utf-8")


def test_the_card_escapes_what_comes_from_data(tmp_path: Path) -> None:
    names = ("a | b", "<script>x</script>", "[x](http://evil.example)", "![i](www.evil.example)", "`code`\n# head",
             "@everyone", "$x$", "&lt;", "\x1b[31m", "\u202eabc")  # fmt: skip
    state = {"output.weight": np.zeros((len(names), D), np.float32), "output.bias": np.zeros(len(names), np.float32)}
    metrics = {"te|st": {"accuracy": 0.5, "per_class": [{"class": name, "f1": 0.5} for name in names]}}
    TrainedHead(
        HeadSpec("linear"), "classification", names, POOLED, state, model="m`<b>", revision="|"
    ).save_pretrained(tmp_path, metrics=metrics, facts={"a|b": "<i>"})  # fmt: skip
    card = (tmp_path / "README.md").read_text("utf-8")
    body = card.split("---", 2)[2].split("## Use")[0]
    assert not re.search(r"(?<!\\)([<>`\[\]$&!]|@\w)", body)
    assert not re.search(r"https?://|(?<!\\)www\.", body)
    assert "\x1b" not in card
    assert "\u202e" not in card
    assert body.count("\n# ") == 1
    for line in body.splitlines():
        if line.startswith("| te") or line.startswith("| a "):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4)
    assert plain("line\nbreak\ttab") == "line break tab"


# Loading what a stranger made.


@pytest.fixture(scope="module")
def good(tmp_path_factory: Any) -> dict[str, Path]:
    made = {}
    for name, what in {"mlp": ("mlp",), "linear": ("linear",), "trees": ("hist-gradient-boosting", "sklearn"),
                       "knn": ("knn", "sklearn"),
                       "attention": ("attention", "torch", "classification", TOKENS),
                       "labels": ("linear", "torch", "multilabel")}.items():  # fmt: skip
        made[name] = tmp_path_factory.mktemp("good") / name
        trained(*what).save_pretrained(made[name])
    return made


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def sealed(run: Path, change: Callable[[dict[str, Any]], Any] = lambda config: None) -> None:
    """Change a config as a careful forger would: with every hash made right again."""
    config = json.loads((run / "config.json").read_text("utf-8"))
    weights = run / "model.safetensors"
    weights = weights if weights.exists() else run / "model.skops"
    if weights.is_file():
        config["weights"]["sha256"] = sha256_file(weights)
    changed = change(config)
    config = config if changed is None else changed
    if isinstance(config, dict):
        config["hash"] = hash_json({name: value for name, value in config.items() if name != "hash"})
    (run / "config.json").write_text(json.dumps(config), "utf-8")


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one value of a config; ``...`` takes it out."""
    *where, value = path

    def change(config: dict[str, Any]) -> None:
        for key in where[:-1]:
            config = config[key]
        if value is ...:
            del config[where[-1]]
        else:
            config[where[-1]] = value

    return change


CONFIGS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("mlp", put("format", "another"), "not the config of an embedcache head"),
    ("mlp", lambda config: [config], "not the config of an embedcache head"),
    ("mlp", lambda config: "text", "not the config of an embedcache head"),
    ("mlp", put("version", "2.0"), "has format 2.0, and this version reads 1.x: upgrade"),
    ("mlp", put("head", "kind", "mpl"), "has no head 'mpl' on torch: it has linear, mlp"),
    ("mlp", put("head", "kind", ["mlp"]), "expected the name of a head"),
    ("mlp", put("head", "kind", ...), "lacks 'kind'"),
    ("mlp", put("head", "engine", "jax"), "engine is 'jax': expected torch or sklearn"),
    ("mlp", put("head", "engine", ["torch"]), "engine is .'torch'."),
    ("mlp", put("head", "engine", "sklearn"), "mlp"),
    ("mlp", put("head", "options", {"hiden": [8]}), "no option 'hiden'.*did you mean hidden"),
    ("mlp", put("head", "options", {"hidden": [8] * 10_000}), "10000 hidden layers"),
    ("mlp", put("head", "options", {"hidden": [1 << 40]}), "hidden is 1099511627776"),
    ("mlp", put("head", "options", {"hidden": "8"}), "hidden is '8'"),
    ("mlp", put("head", "options", {"feature": 1}), "no option 'feature'"),
    ("mlp", put("head", "options", []), "is not a mapping"),
    ("mlp", put("head", []), "is not a mapping"),
    ("mlp", put("head", ...), "lacks 'head'"),
    ("linear", put("head", "options", {"width": 3}), "linear has no option 'width'"),
    ("attention", put("head", "options", {"width": 8, "heads": 3}), "3 heads do not divide"),
    ("attention", put("feature", "kind", "pooled"), "nothing to attend to"),
    ("knn", put("head", "options", {"n_neighbours": 3}), "did you mean n_neighbors"),
    ("knn", put("head", "options", {"n_neighbors": -3}), "n_neighbors is -3"),
    ("knn", put("head", "engine", "torch"), "has no head 'knn' on torch"),
    ("knn", put("task", "regression"), "calibration"),
    ("knn", put("feature", "dim", D + 2), r"has the shape \(.*, 5\), expected \(.*, 7\)"),
    ("trees", put("feature", "dim", D + 2), "reads 5 features, and the config beside it says 7"),
    ("mlp", put("task", "ranking"), "unknown task 'ranking'"),
    ("mlp", put("task", ["classification"]), "unknown task"),
    ("mlp", put("id2label", {"0": "a"}), "label2id is not the inverse"),
    ("mlp", put("id2label", {}), "does not name each class once"),
    ("mlp", put("id2label", {"0": "a", "2": "b"}), "lacks '1'"),
    ("mlp", put("id2label", {"0": "a", "1": "a"}), "does not name each class once"),
    ("mlp", put("id2label", {"0": 5}), "does not name each class once"),
    ("mlp", put("label2id", {}), "label2id is not the inverse"),
    ("mlp", put("extraction", "prompt", "another"), "the backbone's spec was changed"),
    ("mlp", put("extraction_hash", "0" * 64), "the backbone's spec was changed"),
    ("mlp", put("extraction", []), "is not a mapping"),
    ("mlp", put("feature", "dim", -1), "dim -1"),
    ("mlp", put("feature", "dim", "5"), "dim '5'"),
    ("mlp", put("feature", "dim", D + 2), r"hidden.0.weight has the shape \(8, 5\), expected \(8, 7\)"),
    ("mlp", put("feature", "kind", "video"), "no kind 'video'"),
    ("mlp", put("feature", "name", "../x"), "feature set name"),
    ("mlp", put("feature", ...), "lacks 'feature'"),
    ("mlp", put("model", 5), "model or revision is not a text"),
    ("mlp", put("revision", []), "model or revision is not a text"),
    ("mlp", put("calibration", {"temperature": 0}), "the temperature is 0"),
    ("mlp", put("calibration", {"temperature": "1"}), "the temperature is '1'"),
    ("mlp", put("calibration", {"temperature": True}), "the temperature is True"),
    ("mlp", put("calibration", {"thresholds": [0.5] * 7}), "expected .'temperature'. for classification"),
    ("mlp", put("calibration", {"code": "1"}), "calibration is"),
    ("labels", put("calibration", {"thresholds": [0.5]}), "expected 3 thresholds"),
    ("labels", put("calibration", {"thresholds": [0.5, -1, 0.5]}), "a threshold is not a probability"),
    ("labels", put("calibration", {"thresholds": [0.5, None, 0.5]}), "a threshold is not a probability"),
    ("mlp", put("training", 3), "is not a mapping"),
    ("mlp", put("weights", "file", "../mlp/model.safetensors"), "weights in '../mlp/model.safetensors': expected"),
    ("mlp", put("weights", "file", "/etc/passwd"), "weights in '/etc/passwd'"),
    ("mlp", put("weights", "file", "config.json"), "weights in 'config.json'"),
    ("mlp", put("weights", "file", "model.skops"), "weights in 'model.skops'"),
    ("mlp", put("weights", "sha256", "0" * 64), "its sha256 differs"),
    ("mlp", put("weights", []), "is not what a head's config must be"),
]  # fmt: skip


@pytest.mark.parametrize(("which", "change", "said"), CONFIGS, ids=range(len(CONFIGS)))
def test_a_config_that_is_not_right_is_refused(
    which: str, change: Any, said: str, good: dict[str, Path], tmp_path: Path
) -> None:
    run = copied(good[which], tmp_path / "run")
    sealed(run, change)
    with pytest.raises(BundleError, match=said) as caught:
        TrainedHead.from_pretrained(run)
    assert "\n" not in str(caught.value)
    assert str(run) in str(caught.value)


def test_the_forgers_tool_alone_changes_nothing(good: dict[str, Path], tmp_path: Path) -> None:
    for name, source in good.items():
        run = copied(source, tmp_path / name)
        sealed(run)
        TrainedHead.from_pretrained(run)


@given(data=st.data())
def test_any_change_of_a_config_is_seen(data: st.DataObject, good: dict[str, Path], tmp_path_factory: Any) -> None:
    run = copied(good["labels"], tmp_path_factory.mktemp("changed") / "run")
    raw = bytearray((run / "config.json").read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] = data.draw(st.integers(0, 255).filter(lambda byte: byte != raw[at]))
    (run / "config.json").write_bytes(raw)
    try:
        again = TrainedHead.from_pretrained(run)
    except BundleError:
        return
    else:  # one space for another
        assert again.class_names == TARGETS["multilabel"][1]
        assert bytes(raw).split() == (good["labels"] / "config.json").read_bytes().split()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "Expecting value"),
        (b"{", "is not what a head's config must be"),
        (b"\xff\xfe{}", "can't decode"),
        (b'{"format": "embedcache-head", "format": 1}', "occurs twice"),
        (b'{"format": NaN}', "NaN is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"null", "not the config of an embedcache head"),
        (b"1e999", "too large a number"),
    ],
)
def test_a_config_that_is_no_json_is_refused(raw: bytes, said: str, good: dict[str, Path], tmp_path: Path) -> None:
    run = copied(good["mlp"], tmp_path / "run")
    (run / "config.json").write_bytes(raw)
    with pytest.raises(BundleError, match=said) as caught:
        TrainedHead.from_pretrained(run)
    assert "\n" not in str(caught.value)


def arrays(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def forge(run: Path) -> None:
        state = load_file(run / "model.safetensors")
        changed = change(state)
        save_file(state if changed is None else changed, run / "model.safetensors")

    return forge


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {each: value for each, value in state.items() if each != name}


def header(size: int, text: bytes) -> Callable[[Path], None]:
    return lambda run: (run / "model.safetensors").write_bytes(struct.pack("<Q", size) + text) and None


WEIGHTS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("mlp", arrays(without("output.bias")), "lacks the array output.bias: train"),
    ("mlp", arrays(lambda state: {"output.bias": state["output.bias"]}), "lacks the array .* and [0-9] more"),
    ("mlp", arrays(without("hidden.0.mean")), "lacks the array hidden.0.mean"),
    ("mlp", arrays(lambda state: state | {"extra": np.zeros(3)}), "holds an array 'extra' that the head mlp does not"),
    ("mlp", arrays(lambda state: state | {"output.mean": np.zeros(D, np.float32)}), "holds an array 'output.mean'"),
    ("mlp", arrays(lambda state: state | {"output.bias": np.zeros(3, np.float32)}), r"has the shape \(3,\)"),
    ("mlp", arrays(lambda state: state | {"output.weight": np.zeros((8, 7), np.float32)}), r"the shape \(8, 7\)"),
    ("mlp", arrays(lambda state: state | {"output.bias": np.zeros(7, np.int64)}), "is of type int64"),
    ("mlp", arrays(lambda state: state | {"output.bias": np.zeros(7, np.float16)}), "is of type float16"),
    ("mlp", arrays(lambda state: state | {"output.bias": np.full(7, np.nan, np.float32)}), "output.bias holds NaN"),
    ("linear", arrays(lambda state: state | {"output.bias": np.full(7, np.inf, np.float32)}), "output.bias holds NaN"),
    ("linear", arrays(lambda state: {}), "lacks the array output.bias and 1 more"),
    ("attention", arrays(lambda state: state | {"layer.weight": np.zeros((3, 8), np.float32)}), "'layer.weight'"),
    ("mlp", lambda run: (run / "model.safetensors").write_bytes(pickle.dumps({"a": 1})), "cannot be read as safetens"),
    ("mlp", lambda run: torch.save({"a": torch.zeros(3)}, run / "model.safetensors"), "cannot be read as safetensors"),
    ("mlp", lambda run: (run / "model.safetensors").write_bytes(b""), "cannot be read as safetensors"),
    ("mlp", header(1 << 62, b"{}"), "cannot be read as safetensors"),
    ("mlp", header(200_000_000, b"{" + b" " * 1000), "cannot be read as safetensors"),
    ("mlp", header(3, b"{]}"), "cannot be read as safetensors"),
    ("mlp", header(75, b'{"output.bias":{"dtype":"F32","shape":[9999999999999],"data_offsets":[0,4]}}'), "cannot"),
    ("trees", lambda run: (run / "model.skops").write_bytes(pickle.dumps({"a": 1})), "cannot be read"),
    ("trees", lambda run: (run / "model.skops").write_bytes(b""), "cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("which", "forge", "said"), WEIGHTS, ids=range(len(WEIGHTS)))
def test_weights_that_are_not_right_are_refused(
    which: str, forge: Any, said: str, good: dict[str, Path], tmp_path: Path
) -> None:
    run = copied(good[which], tmp_path / "run")
    forge(run)
    with pytest.raises(BundleError, match="its sha256 differs"):
        TrainedHead.from_pretrained(run)
    sealed(run)
    with pytest.raises(BundleError, match=said) as caught:
        TrainedHead.from_pretrained(run)
    assert "\n" not in str(caught.value)


def test_types_that_no_head_is_made_of_are_not_made(good: dict[str, Path], tmp_path: Path) -> None:
    run = copied(good["trees"], tmp_path / "run")
    with zipfile.ZipFile(run / "model.skops") as file:
        parts = {each: file.read(each) for each in file.namelist()}
    schema = json.loads(parts["schema.json"])
    schema["__class__"], schema["__module__"] = "system", "os"
    with zipfile.ZipFile(run / "model.skops", "w") as file:
        for name, part in (parts | {"schema.json": json.dumps(schema).encode()}).items():
            file.writestr(name, part)
    sealed(run)
    with pytest.raises(BundleError, match=r"os\.system"):
        TrainedHead.from_pretrained(run)


def test_an_estimator_of_another_task_or_number_of_classes_is_refused(good: dict[str, Path], tmp_path: Path) -> None:
    run = copied(good["trees"], tmp_path / "run")

    def fewer(config: dict[str, Any]) -> None:
        names = [f"class {at}" for at in range(3)]
        config["id2label"] = {str(at): name for at, name in enumerate(names)}
        config["label2id"] = {name: at for at, name in enumerate(names)}

    sealed(run, fewer)
    with pytest.raises(BundleError, match="does not fit the config beside it"):
        TrainedHead.from_pretrained(run)
    other = copied(good["trees"], tmp_path / "other")
    (other / "model.skops").write_bytes(saved(tmp_path, "mlp"))
    sealed(other)
    # Another estimator of the same shape is only another estimator, which the forger could have trained himself.
    TrainedHead.from_pretrained(other)


def saved(tmp_path: Path, kind: str) -> bytes:
    trained(kind, "sklearn").save_pretrained(tmp_path / kind)
    return (tmp_path / kind / "model.skops").read_bytes()


def test_links_and_what_is_no_file_are_refused(good: dict[str, Path], tmp_path: Path) -> None:
    import os

    for name in ("config.json", "model.safetensors"):
        run = copied(good["mlp"], tmp_path / f"link {name}")
        (run / name).unlink()
        (run / name).symlink_to(good["mlp"] / name)
        with pytest.raises(BundleError, match=r"not a run folder|is missing"):
            TrainedHead.from_pretrained(run)
        run = copied(good["mlp"], tmp_path / f"pipe {name}")
        (run / name).unlink()
        os.mkfifo(run / name)
        assert stat.S_ISFIFO((run / name).stat().st_mode)
        with pytest.raises(BundleError, match=r"not a run folder|is missing"):
            TrainedHead.from_pretrained(run)
    linked = tmp_path / "a link to a whole run is the user's own"
    linked.symlink_to(good["mlp"])
    TrainedHead.from_pretrained(linked)


@pytest.mark.parametrize(
    ("make", "what"), [("nothing", "is not there"), ("folder", "no config.json"), ("file", "file")]
)
def test_a_folder_that_is_no_run_is_refused(make: str, what: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    if make == "folder":
        run.mkdir()
    elif make == "file":
        run.write_text("")
    with pytest.raises(
        BundleError, match=rf"{re.escape(str(run))} is not a run folder \(it .*{what}.*embedcache train"
    ):
        TrainedHead.from_pretrained(run)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_head_whose_numbers_overflow_is_refused(good: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Finite weights that a flipped bit has made huge: an infinite logit would become NaN, without a word."""
    head = TrainedHead.from_pretrained(good[kind])
    state = {name: np.where(value == 0, value, np.float32(3e38)) for name, value in head.state.items()}
    with pytest.raises(FeatureError, match="no finite number for row 0"):
        replace(head, state=state).predict(np.full((3, head.feature.dim), 7, np.float32))


def test_every_error_is_an_embedcache_error_for_any_bytes(good: dict[str, Path], tmp_path_factory: Any) -> None:
    @given(data=st.data())
    def damaged(data: st.DataObject) -> None:
        which = data.draw(st.sampled_from(["linear", "knn", "trees"]))
        run = copied(good[which], tmp_path_factory.mktemp("damaged") / "run")
        path = run / ("model.skops" if which == "trees" else "model.safetensors")
        raw = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) // 2]))])
        sealed(run)
        try:
            head = TrainedHead.from_pretrained(run)
            head.predict(features(POOLED))
        except EmbedcacheError:
            return

    damaged()
