"""Heads in other tools: each is run there and gives the same, or nothing is written and the reason is told."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tiny_pictures

from embedcache import FeatureCache, cli, export_head, extract, train_head, train_on_cache
from embedcache.errors import EmbedcacheError, MissingExtraError, NotEqualError
from embedcache.export import graph, head, modules
from embedcache.export.proof import prove
from embedcache.heads import TrainedHead

pytestmark = [
    pytest.mark.filterwarnings("ignore::embedcache.errors.EmbedcacheWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
TEXTS = [
    {"text": f"{'good' if row % 3 else 'bad'} film {row} {'and ' * (row % 7)}", "label": row % 2} for row in range(41)
]
POOLINGS = ["mean", "cls", "pooler", "l2:mean", "mean@-2..-1", "tokens"]
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
ONNX = pytest.param("onnx", marks=pytest.mark.skipif(not HAS_ONNX, reason="needs the extra onnx"))


@pytest.fixture(scope="session")
def dense() -> None:
    pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    folder = tmp_path_factory.mktemp("export")
    model = tiny_models.build("bert", folder / "model", num_hidden_layers=1)  # exporters trace each layer for itself
    return extract(TEXTS, model=model, output_dir=folder / "c", pooling=POOLINGS, split="80/20", keep_inputs=True)


def run_of(cache: FeatureCache, where: Path, kind: str, feature: str) -> Path:
    """A run in ``where``: a copy of one that is trained once for each cache."""
    run = cache.path.parent / f"run-{kind}-{feature}"
    if not run.exists():
        # a tiny model's pooler hardly varies: large weights would make rounding large
        settings = {"l2": 100.0} if feature == "pooler" else None
        train_on_cache(cache, kind, settings, feature=feature, progress=False).save(run)
    return Path(shutil.copytree(run, where))


HEADS = {
    "linear": ("linear", "mean"),
    "mlp": ("mlp", "l2:mean"),
    "residual": ("residual", "cls"),
    "layers": ("attention-pooling", "mean@-2+-1"),
    "mix": ("layer-mix", "mean@-2+-1"),
    "concat": ("layer-concat", "mean@-2+-1"),
    "tokens": ("attention", "tokens"),
    "sklearn": ("logistic-regression", "pooler"),
}


@pytest.mark.parametrize("name", ["layers", "tokens", "sklearn"])  # which heads can be is shown from features
def test_the_whole_from_token_ids(name: str, cache: FeatureCache, tmp_path: Path) -> None:
    run = run_of(cache, tmp_path / "run", *HEADS[name])
    done = export_head(run, tmp_path / "out", to="torch-export", cache=cache)
    assert done.proof.rows == len(cache)
    assert done.proof.apart < 1e-5
    config = json.loads((tmp_path / "out" / "embedcache.json").read_text())
    assert config["class_names"] == ["0", "1"]
    assert config["inputs"] == ["input_ids", "attention_mask"]
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(done.files)


@pytest.mark.parametrize("name", [name for name in HEADS if name != "tokens"])
def test_the_head_from_features(name: str, cache: FeatureCache, tmp_path: Path) -> None:
    run = run_of(cache, tmp_path / "run", *HEADS[name])
    for options in ({}, {"cache": cache}):
        done = export_head(run, tmp_path / f"out{len(options)}", to="torch-export", head_only=True, **options)
        assert done.proof.rows == (len(cache) if options else 200)


@pytest.mark.skipif(not HAS_ONNX, reason="needs the extra onnx")
# Another task's is linear, and so is scikit-learn's.
@pytest.mark.parametrize("name", ["mlp", "residual", "layers", "mix", "concat"])
def test_the_head_from_features_as_onnx(name: str, cache: FeatureCache, tmp_path: Path) -> None:
    run = run_of(cache, tmp_path / "run", *HEADS[name])
    done = export_head(run, tmp_path / "out", to="onnx", head_only=True, cache=cache)
    assert done.proof.rows == len(cache)


@pytest.mark.skipif(not HAS_ONNX, reason="needs the extra onnx")
@pytest.mark.parametrize("name", ["linear", "tokens"])
def test_an_onnx_file_takes_any_batch_and_length(name: str, cache: FeatureCache, tmp_path: Path) -> None:
    import onnxruntime

    run = run_of(cache, tmp_path / "run", *HEADS[name])
    done = export_head(run, tmp_path / "out", to="onnx")
    assert done.proof.rows > 40  # built-in texts
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    for shape in ((1, 3), (7, 5), (3, 17)):
        ids = np.full(shape, 3, np.int64)
        _, probabilities = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        assert probabilities.shape == (shape[0], 2)
        assert np.allclose(probabilities.sum(axis=1), 1)


@pytest.mark.parametrize("to", [ONNX, "torch-export"])
@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_every_task(task: Any, to: Any, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(61, 7)).astype(np.float32)
    y = (x[:, :3] > 0).astype(np.uint8) if task == "multilabel" else 50 * x[:, :3] @ np.ones((3, 2)) + 7
    names = ("p", "q", "r")[: y.shape[1]]
    train_head(x, y, task=task, class_names=names, progress=False).head.save_pretrained(tmp_path / "run")
    done = export_head(tmp_path / "run", tmp_path / "out", to=to, head_only=True)
    assert done.proof.apart < 1e-5
    with pytest.raises(EmbedcacheError, match="export the head alone, with --head-only"):
        export_head(tmp_path / "run", tmp_path / "other", to=to)


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize(
    ("kind", "feature", "options"),
    [
        ("linear", "mean", {}),
        ("logistic-regression", "cls", {}),
        ("mlp", "l2:mean", {"hidden": [11, 5], "activation": "gelu"}),
        ("mlp", "mean", {"activation": "silu"}),
    ],
)
def test_sentence_transformers(kind: str, feature: str, options: Any, cache: FeatureCache, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    from embedcache.heads import head_named

    result = train_on_cache(cache, head_named(kind, None, options), feature=feature, progress=False)
    result.save(tmp_path / "run")
    done = export_head(tmp_path / "run", tmp_path / "out", to="sentence-transformers", inputs=TEXTS, text_column="text")
    assert done.proof.rows == len(TEXTS)
    logits = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode([row["text"] for row in TEXTS])
    ours = result.head.predict(cache.features(feature=feature))
    assert logits.argmax(axis=1).tolist() == ours.tolist()


@pytest.mark.parametrize("feature", ["cls", "pooler"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_checkpoint_for_a_pipeline(kind: str, feature: str, tmp_path: Path) -> None:
    import transformers

    if (kind, feature) == ("roberta", "pooler"):
        pytest.skip("its classifier reads cls")
    model = tiny_models.build(kind, tmp_path / "model")
    cache = extract(TEXTS, model=model, output_dir=tmp_path / "c", pooling=feature, split="80/20")
    run = run_of(cache, tmp_path / "run", "linear", feature)
    done = export_head(run, tmp_path / "out", to="transformers", inputs=TEXTS, text_column="text")
    assert done.proof.apart < 1e-5
    said = transformers.pipeline("text-classification", str(tmp_path / "out"))([row["text"] for row in TEXTS])
    assert {each["label"] for each in said} <= {"0", "1"}


@pytest.mark.parametrize("to", [ONNX, "torch-export", "transformers"])
def test_pictures(to: Any, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    model = tiny_pictures.build("vit", tmp_path / "model", num_hidden_layers=1)
    rows = [{"image": content, "label": row % 2} for row, content in enumerate(tiny_pictures.pictures(17))]
    cache = extract(rows, model=model, output_dir=tmp_path / "c", pooling="cls", split="80/20", keep_inputs=True)
    run = run_of(cache, tmp_path / "run", "linear", "cls")
    try:
        done = export_head(run, tmp_path / "out", to=to, cache=cache)
    except NotEqualError:  # torchvision, where it is there, resizes otherwise than Pillow
        assert to == "transformers"
        return
    assert done.proof.rows == len(cache)


UNMAPPED = [
    (
        "sentence-transformers",
        "residual",
        "mean",
        "does not hold the head residual.*--to onnx and --to torch-export hold it",
    ),
    ("sentence-transformers", "linear", "pooler", "does not hold the pooling pooler"),
    ("transformers", "linear", "mean", "its classifiers read cls or pooler; --to sentence-transformers holds mean"),
    ("transformers", "mlp", "cls", "its classifiers are one matrix"),
    ("torch-export", "knn", "mean", "the head knn is training rows without matrices"),
]


@pytest.mark.parametrize("case", range(len(UNMAPPED)))
def test_what_cannot_be_mapped_says_why_and_what_can(case: int, cache: FeatureCache, tmp_path: Path) -> None:
    to, kind, feature, message = UNMAPPED[case]
    run = run_of(cache, tmp_path / "run", kind, feature)
    with pytest.raises(EmbedcacheError, match=message) as caught:
        export_head(run, tmp_path / "out", to=to)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_nothing_is_written_where_the_other_tool_differs(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(cache, tmp_path / "run", "mlp", "mean")
    forward = modules.Outputs.forward

    def off(self: Any, features: Any, mask: Any = None) -> Any:
        logits, outputs = forward(self, features, mask)
        return logits, outputs + 2e-5

    monkeypatch.setattr(modules.Outputs, "forward", off)
    with pytest.raises(NotEqualError, match=r"torch\.export gives other outputs than the head: by 2.*e-05 in row \d+"):
        export_head(run, tmp_path / "out", to="torch-export", head_only=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_another_label_is_refused_however_near(cache: FeatureCache, tmp_path: Path) -> None:
    trained = TrainedHead.from_pretrained(run_of(cache, tmp_path / "run", "linear", "mean"))
    expected = np.array([[0.5 + 1e-7, 0.5 - 1e-7], [0.9, 0.1]])
    assert prove(trained, "x", expected, expected + 1e-6).apart == pytest.approx(1e-6)
    with pytest.raises(NotEqualError, match="another label than the head in 1 place"):
        prove(trained, "x", expected, expected[:, ::-1] * [[1, 1], [0, 0]] + expected * [[0, 0], [1, 1]])
    with pytest.raises(NotEqualError, match="other outputs"):
        prove(trained, "x", expected, np.full((2, 2), np.nan))


def test_the_command(cache: FeatureCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(run_of(cache, tmp_path / "run", "linear", "mean")), str(tmp_path / "out")
    assert cli.run(["export", run, "--to", "torch-export", "-o", out, "--head-only", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["proof"]["labels_differ"] == 0
    assert cli.run(["export", run, "--to", "torch-export", "-o", out, "--head-only"]) == 1
    assert "is there already" in capsys.readouterr().err
    assert cli.run(["export", run, "--to", "torch-export", "-o", out, "--feature", "mean"]) == 2
    assert cli.run(["export", str(cache.path), "--to", "npy", "-o", out, "--head-only"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_a_missing_tool_names_its_extra(cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(cache, tmp_path / "run", "linear", "mean")
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'embedcache\[onnx\]'"):
        export_head(run, tmp_path / "out", to="onnx", head_only=True)
    assert graph.ONNX not in str(list(tmp_path.iterdir()))
    assert head.TOOLS[0] == "onnx"
