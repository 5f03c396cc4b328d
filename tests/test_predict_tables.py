"""predict into files: the same rows in every format, margins, and the training rows that explain them."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_caches
import tiny_models

from embedcache import cli
from embedcache.cache import FeatureCache
from embedcache.errors import BackboneMismatchError, InputError
from embedcache.features import Ragged
from embedcache.heads import TrainedHead
from embedcache.predict import NearestRows, Prediction, Predictor, nearest, table_in, tables
from embedcache.shard import FeatureSet
from embedcache.spec import HeadSpec

TEXTS = [*tiny_models.TEXTS, tiny_models.TEXTS[0]]  # the first one twice: its content counts once
LABELS = {
    "classification": lambda at: ("a", "=b", "c;d")[at % 3],
    "multilabel": lambda at: ["x"] * (at % 2) + ["z"],
    "regression": lambda at: at * 1.5,
}


def command(*arguments: object) -> int:
    return cli.run([str(each) for each in arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Path:
    """A folder with a cache, ``TASK.cache``, and a run, ``TASK``, of each task; texts are kept."""
    folder: Path = tmp_path_factory.mktemp("made")
    model = tiny_models.build("bert", folder / "bert")
    for task, label in LABELS.items():
        rows = [{"text": text, "label": label(at), "key": f"k{at}"} for at, text in enumerate(TEXTS)]
        (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = ("--model", model, "--pooling", "mean", "--device", "cpu", "--task", task, "--id-column", "key")
        assert not command("extract", folder / "in.jsonl", "-o", folder / f"{task}.cache", "--keep-inputs", *options)
        assert not command("train", folder / f"{task}.cache", "-o", folder / task, "--solver", "convex")
    (folder / "new.txt").write_text("\n".join([TEXTS[3], "good plot", TEXTS[0]]))
    return folder


@pytest.mark.parametrize("task", LABELS)
def test_every_format_holds_the_same_rows(task: str, made: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    for form in ("csv", "jsonl", "parquet"):
        explained = ("--explain", 2, "--cache", made / f"{task}.cache")
        assert not command("predict", made / task, made / "new.txt", "-o", tmp_path / f"out.{form}", *explained)
    table = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        cells = list(csv.DictReader(file))
    expected = Predictor.load(made / task, device="cpu", explain=2, cache=made / f"{task}.cache")(
        (made / "new.txt").read_text().splitlines()
    )
    assert len(table) == len(records) == len(cells) == len(expected) == 3
    names = [name for name in table[0] if name not in ("id", "label", "confidence", "margin", "nearest")]
    if task == "regression":  # whose one target is called as the column of labels, as ``id`` is
        names = ["label"]
    for row, record, line, prediction in zip(table, records, cells, expected, strict=True):
        outputs = list(prediction.probabilities.values())
        assert [row[name] for name in names] == outputs
        assert list(record.get("probabilities", record.get("values")).values()) == outputs
        shown = [name if name in line else f"'{name}" for name in names]
        assert [float(line[name]) for name in shown] == pytest.approx(outputs, rel=1e-5)
        near = [
            {
                "id": each.id,
                "similarity": each.similarity,
                "label": list(each.label) if isinstance(each.label, tuple) else each.label,
                "text": each.text,
            }
            for each in prediction.nearest
        ]
        assert row["nearest"] == record["nearest"] == near
        assert (line["nearest 2 id"], float(line["nearest 2 similarity"])) == (near[1]["id"], near[1]["similarity"])
        assert line["nearest 1 text"] == near[0]["text"]
        if task != "regression":
            assert row["margin"] == record["margin"] == prediction.margin
            assert row["label"] == record["label"]
            assert float(line["margin"]) == pytest.approx(prediction.margin, rel=1e-5)
    assert (table[0]["nearest"][0]["id"], table[0]["nearest"][0]["similarity"]) == ("k3", 1.0)
    assert (table[2]["nearest"][0]["id"], table[2]["nearest"][0]["text"]) == ("k0", TEXTS[0])
    assert table[2]["nearest"][1]["id"] != f"k{len(TEXTS) - 1}", "the same content twice"
    assert not list(tmp_path.glob(".*"))


def test_margins_worked_out_by_hand(made: Path) -> None:
    of = {task: Predictor.load(made / task, device="cpu") for task in LABELS}
    (row,) = of["classification"](["good film"])
    second, first = sorted(row.probabilities.values())[-2:]
    assert row.margin == first - second
    (row,) = of["multilabel"](["good film"])
    apart = [abs(p - t) for p, t in zip(row.probabilities.values(), of["multilabel"].head.thresholds, strict=True)]
    assert row.margin == min(apart)
    assert of["regression"](["good film"])[0].margin is None


@pytest.mark.parametrize("name", ["mean", "cls", "mean@1+2", "tokens"])
def test_the_nearest_rows_are_those_of_every_pair(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "_BLOCK_ROWS", 7)
    monkeypatch.setattr(nearest, "_BLOCK_RAGGED", 5)
    cache = FeatureCache.open(small_caches.write(tmp_path / "c", 53, 53))
    feature = cache.feature(name)
    head = TrainedHead(HeadSpec(), cache.task or "classification", cache.class_names, feature, extraction=cache.spec)
    train = cache.rows("train")

    def vector(row: int) -> np.ndarray:
        values = small_caches.values(feature, row).astype(np.float64)
        return values.sum(axis=0) if feature.kind == "tokens" else values.ravel()

    asked = np.array([2, 3, 31])
    found = NearestRows(cache, head, 11).of(cache.of_rows(asked, feature))
    for row, neighbours in zip(asked.tolist(), found, strict=True):
        a, cosines = vector(row), []
        for other in train.tolist():
            b = vector(other)
            length = float(np.linalg.norm(a) * np.linalg.norm(b))
            cosines.append(round(float(a @ b) / length, 6) if length else 0.0)
        order = sorted(range(len(train)), key=lambda at: (-cosines[at], at))[:11]
        assert [each.similarity for each in neighbours] == pytest.approx([cosines[at] for at in order], abs=1e-9)
        assert [each.id for each in neighbours] == [cache.ids()[int(train[at])] for at in order]
    assert neighbours[0].text is None


def test_a_row_without_tokens_is_near_to_nothing() -> None:
    ragged = Ragged(np.ones((2, 3), np.float32), np.array([0, 0, 2]), FeatureSet("tokens", "tokens", 3, 1, "float32"))
    np.testing.assert_allclose(nearest._unit(ragged), [[0] * 3, [3**-0.5] * 3])


def test_another_cache_explains_nothing(made: Path, tmp_path: Path) -> None:
    head = TrainedHead.from_pretrained(made / "classification")
    other = small_caches.write(tmp_path / "c", 23, 23, (FeatureSet("mean", "pooled", head.feature.dim, 1, "float32"),))
    with pytest.raises(BackboneMismatchError, match="trained on other features than"):
        NearestRows(other, head, 1)
    bare = TrainedHead(HeadSpec(), "classification", ("a", "b"), FeatureSet("mean", "pooled", 5, 1, "float32"))
    empty = small_caches.write(
        tmp_path / "e", 23, 23, (bare.feature,), split_names=("test", "train"), split=np.zeros(23, "u1")
    )
    with pytest.raises(InputError, match="has no training rows"):
        NearestRows(empty, bare, 1)


def test_nothing_that_is_read_is_written_over(made: Path, tmp_path: Path, capsys: Any) -> None:
    run, mine = made / "classification", tmp_path / "mine.csv"
    mine.write_text("text\ngood plot\n")
    (tmp_path / "link.csv").symlink_to(mine)
    cache = made / "classification.cache"
    ours = {path: path.read_bytes() for path in (mine, run / "config.json", cache / "manifest.json")}
    for output in (*ours, tmp_path / "link.csv"):
        options = ("--format", "csv", "--explain", 1, "--cache", cache)
        assert command("predict", run, mine, "-o", output, *options) == 2
        assert f"--output {output} is read for this: name another file" in capsys.readouterr().err
    assert all(path.read_bytes() == content for path, content in ours.items())


def test_mistakes_cost_one_line(made: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, cache = made / "classification", made / "classification.cache"
    for given, said in [
        (("-o", tmp_path / "out.xlsx"), "expected .csv, .jsonl or .parquet, or one named by --format"),
        (("-o", tmp_path / "out"), "the ending says no format"),
        (("--format", "parquet"), "name a file with --output"),
        (("--explain", 3), "--explain K needs --cache CACHE"),
        (("--cache", cache), "--cache CACHE is for --explain K"),
        (("--explain", 0, "--cache", cache), "0 is not in the range x>=1"),
    ]:
        assert command("predict", run, made / "new.txt", *given) == 2
        assert said in capsys.readouterr().err
    for url in ("s3://bucket/out.csv", "gs://bucket/out.parquet"):  # before anything is loaded, or a row is computed
        assert command("predict", "no run", made / "new.txt", "-o", url) == 2
        assert f"{url} is a URL, and predictions are written to a file of this machine" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert command("predict", run, made / "new.txt", "-o", tmp_path / "out.parquet") == 1
    assert "run pip install 'embedcache[parquet]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_sentences_name_their_training_rows(made: Path, capsys: Any) -> None:
    explained = ("--explain", 1, "--cache", made / "classification.cache")
    assert not command("predict", made / "classification", "--text", TEXTS[1], *explained)
    first, second = capsys.readouterr().out.splitlines()
    assert TEXTS[1] in first
    assert second == f"    1.000  =b  id k1  {TEXTS[1]!r}"


def test_a_table_holds_one_row_group_however_many_rows_there_are(tmp_path: Path, monkeypatch: Any) -> None:
    arrow = pytest.importorskip("pyarrow")
    monkeypatch.setattr(tables, "_GROUP_ROWS", 7)
    head = TrainedHead(HeadSpec(), "classification", ("\ud800", "b"), FeatureSet("mean", "pooled", 5, 1, "float32"))
    with table_in(tmp_path / "out.parquet", "parquet", head) as table:
        for number in range(24):
            table.write(str(number), Prediction("\ud800", 0.5, {"\ud800": 0.5, "b": 0.5}, 0.0))
            assert len(table._columns[0]) < 7  # type: ignore[attr-defined]
    file = arrow.parquet.ParquetFile(tmp_path / "out.parquet")
    assert [file.metadata.row_group(at).num_rows for at in range(file.num_row_groups)] == [7, 7, 7, 3]
    assert file.schema_arrow.names == ["id", "label", "confidence", "margin", "\\ud800", "b"]
    assert file.read().column("id").to_pylist() == [str(number) for number in range(24)]
    with pytest.raises(KeyboardInterrupt), table_in(tmp_path / "half.parquet", "parquet", head) as table:
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]
