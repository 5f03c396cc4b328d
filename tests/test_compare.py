"""The comparison: rows, recipes, arithmetic, and that nothing is measured twice."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tiny_pictures
from hypothesis import given
from hypothesis import strategies as st

from embedcache.cli import run as command_line
from embedcache.compare import APPROACHES, break_even, compare_training_approaches
from embedcache.compare import run as running
from embedcache.compare.figures import Facts, chosen, ratio_text, seconds_text
from embedcache.compare.measurements import Extraction, Folder, Job, Memory, Peak, Training, TrainingJob
from embedcache.compare.result import assemble
from embedcache.compare.rows import checked_rows, ranks, read_rows, sampled, training_rows, write_rows
from embedcache.compare.worker import perform
from embedcache.decoding import from_json, to_json
from embedcache.errors import (
    BackboneError,
    BackboneMismatchError,
    BadRowsError,
    InputError,
    Interrupted,
    SpecError,
    TrainingError,
)
from embedcache.examples import load_examples
from embedcache.spec import BackboneSettings, HeadSpec, ModelSource
from embedcache.task import CLASSIFICATION
from embedcache.train.metrics import interval

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


def rows_of(count: int) -> list[dict[str, Any]]:
    """Different texts of the words that tiny models know; good or bad, in three splits."""
    words = [word for word in tiny_models.WORDS if word not in ("good", "bad")]
    rng = np.random.default_rng(7)
    made = []
    for at in range(count):
        label = "good" if rng.random() < 0.5 else "bad"
        text = " ".join([*rng.choice(words, 3 + at % 5), label, words[at % 19], words[at % 17], words[at % 13]])
        made.append({"text": text, "label": label, "split": ("train", "train", "validation", "test")[at % 4]})
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.build("bert", tmp_path_factory.mktemp("models") / "bert"))


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Do the jobs in this process, which is faster, and keep a list of them."""
    done: list[Job] = []

    def do(job: Job) -> Any:
        done.append(job)
        return pickle.loads(pickle.dumps(perform(pickle.loads(pickle.dumps(job)))))

    monkeypatch.setattr(running, "in_own_process", do)
    return done


def training_job(approach: str, cache: Path = Path("c"), outputs: Path = Path("o")) -> TrainingJob:
    head, source = HeadSpec("linear"), ModelSource(device="cpu")
    return TrainingJob(approach, 1.0, 0, 1, "accuracy", head, cache, source, outputs, False)


def compare(model: str, folder: Path | None, count: int = 60, **options: Any) -> Any:
    settings: dict[str, Any] = {"epochs": 2, "pooling": "mean", "device": "cpu", "progress": False, **options}
    return compare_training_approaches(settings.pop("inputs", rows_of(count)), folder, model=model, **settings)


# -- the arithmetic ---------------------------------------------------------------------------------------------------


def test_break_even_by_hand() -> None:
    # One head: 30 + 1 against 11. Two: 32 against 22. Three: 33 against 33.
    assert break_even(30.0, 1.0, 11.0) == 3
    assert break_even(30.0, 1.0, 10.9) == 4
    assert break_even(5.0, 1.0, 11.0) == 1
    assert break_even(0.0, 1.0, 11.0) == 1
    assert break_even(30.0, 1.0, 1.0) is None
    assert break_even(30.0, 2.0, 1.0) is None


@given(st.integers(0, 500), st.integers(0, 50), st.integers(0, 50))
def test_break_even_is_the_first_number_of_heads_that_costs_no_more(extraction: int, head: int, other: int) -> None:
    found = break_even(extraction, head, other)
    counted = next((n for n in range(1, 1000) if extraction + n * head <= n * other), None)
    if other > head:
        assert found == counted
    else:
        assert found is None


def test_the_table_is_put_together_by_hand() -> None:
    """Two seeds, two approaches: who is charged for what, the means, the break-even, the paired difference."""
    memory = Memory(baseline=100, device=None, peak=400)
    extraction = Extraction(
        seconds=20.0, unique=40, extracted=20, parameters=1000, memory=replace(memory, peak=900), rows=60, tokens=600,
        setup_seconds=1.0,
    )  # fmt: skip
    cached = Training(
        train_rows=10, validation_rows=5, test_rows=6, charged=12, best_epoch=2, epoch_seconds=3.0, validation=0.5,
        memory=memory, probe_seconds=None, seconds=1.0, trainable=7, setup_seconds=0.0, history=(),
    )  # fmt: skip
    full = replace(cached, seconds=10.0, trainable=900, total=1007)
    runs = {
        (1.0, "cached", 0): cached,
        (1.0, "cached", 1): replace(cached, seconds=3.0),
        (1.0, "full", 0): replace(full, best_epoch=1),
        (1.0, "full", 1): replace(full, seconds=14.0),
        (1.0, "lp-ft", 0): replace(full, probe_seconds=0.5),
        (1.0, "lp-ft", 1): replace(full, probe_seconds=1.5),
    }
    y = np.array([0, 1, 0, 1, 0, 1])
    right, wrong = np.eye(2)[y], np.eye(2)[1 - y]
    half = np.where(np.arange(6)[:, None] < 3, right, wrong)
    outputs = {key: right if key[1] == "full" else half for key in runs} | {(1.0, "full", 1): half}
    facts = Facts(
        task="classification", metric="accuracy", fractions=[1.0], approaches=["cached", "full", "lp-ft"],
        seeds=[0, 1], epochs=5, rows=60, unique=40, splits={"train": 10}, outputs=2, model="m", pooling="mean",
        head="linear", device="cpu", threads=1, torch="2", adjusted=True,
    )  # fmt: skip
    found = assemble(facts, {0: extraction}, runs, outputs, y, None)
    assert found.extraction.seconds == 40.0  # a second a text, and half of them were there before
    cached, full, lp_ft = found.rows
    assert (cached.extraction_seconds, cached.training_seconds, cached.total_seconds) == (12.0, 2.0, 14.0)
    assert (full.extraction_seconds, full.total_seconds) == (None, 12.0)
    assert lp_ft.total_seconds == 12.0 + 1.0 + 10.0
    assert (cached.parameters, cached.trainable) == (1007, 7)
    assert (full.parameters, full.trainable) == (1007, 900)
    assert (cached.memory.resident, cached.head_memory, full.memory.resident) == (800, 300, 300)
    assert (cached.best_epoch, full.best_epoch) == (2, 1.5)
    assert (cached.test, full.test) == (0.5, 0.75)
    assert (cached.difference, full.difference) == (None, 0.25)
    assert cached.test_interval == interval(CLASSIFICATION, y, half, "accuracy")
    low, high = full.difference_interval
    assert 0 <= low < 0.25 < high <= 0.5
    (even,) = found.break_even
    assert (even.against, even.heads) == ("full", 2)  # 12 + 2 n <= 12 n
    assert (even.first, even.further) == (12 / 14, 6.0)
    assert "head number 2" in found.sentences()[0]
    assert found.row("full") is full
    with pytest.raises(KeyError):
        found.row("full", 0.5)
    assert any("interrupted" in note for note in found.notes)


def test_numbers_as_people_read_them() -> None:
    assert [seconds_text(each) for each in (None, 0.0123, 0.9999, 59.94, 119.9, 120.0, 3700)] == [
        "-", "12.3 ms", "1.0 s", "59.9 s", "119.9 s", "2 min 00 s", "61 min 40 s",
    ]  # fmt: skip
    assert [ratio_text(each) for each in (0.831, 4.24, 340.4)] == ["0.83x", "4.2x", "340x"]


# -- rows -------------------------------------------------------------------------------------------------------------


def keys_of(count: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16), dtype=np.uint8)


@given(st.integers(1, 97), st.integers(1, 97), st.integers(1, 97), st.integers(0, 2**32 - 1))
def test_samples_are_nested_and_keep_copies_together(count: int, few: int, many: int, seed: int) -> None:
    keys = keys_of(count)[np.random.default_rng(seed).integers(0, count, count)]
    few, many = sorted((few, many))
    small, large = set(sampled(keys, few, seed).tolist()), set(sampled(keys, many, seed).tolist())
    assert small <= large
    assert len(large) <= many
    rank = ranks(keys, seed)
    assert not set(rank[list(small)].tolist()) & set(rank[[row for row in range(count) if row not in small]].tolist())


@given(st.sampled_from([0.01, 0.1, 0.35, 0.5]), st.integers(0, 2**32 - 1))
def test_fractions_are_nested_and_keep_every_class(fraction: float, seed: int) -> None:
    keys, y = keys_of(211), np.random.default_rng(5).choice([0, 1, 4], 211, p=[0.9, 0.08, 0.02])
    some = training_rows(keys, y, CLASSIFICATION, fraction, seed)
    more = training_rows(keys, y, CLASSIFICATION, min(1.0, 2 * fraction), seed)
    assert set(some.tolist()) <= set(more.tolist())
    assert (np.diff(some) > 0).all()
    for label in (0, 1, 4):
        assert (y[some] == label).sum() == max(1, round(fraction * (y == label).sum()))
    assert len(training_rows(keys, y, CLASSIFICATION, 1.0, seed)) == 211
    # Decided by content: the same rows in another order.
    order = np.random.default_rng(seed).permutation(211)
    again = training_rows(keys[order], y[order], CLASSIFICATION, fraction, seed)
    assert {tuple(key) for key in keys[some].tolist()} == {tuple(key) for key in keys[order][again].tolist()}


def test_the_rows_of_another_seed_are_others() -> None:
    keys = keys_of(101)
    assert set(sampled(keys, 50, 0).tolist()) != set(sampled(keys, 50, 1).tolist())


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        (["a", "1", "ü"] * 4, {}),
        ([["a"], ["b", "a"], []] * 4, {"task": "multilabel"}),
        ([1.5, -2.25, 1e-9] * 4, {"task": "regression"}),
    ],
)
def test_rows_survive_the_way_to_another_process(tmp_path: Path, labels: list[Any], options: dict[str, Any]) -> None:
    data = [
        {"text": f'row {at} "ü",\n{at}', "label": label, "split": ("train", "validation", "test")[at % 3]}
        for at, label in enumerate(labels)
    ]
    examples = load_examples(data, **options)
    some = examples.select(np.array([0, 2, 3, 5, 7, 11]))
    for sent in (examples, some):
        write_rows(sent, tmp_path / "rows")
        back = read_rows(tmp_path / "rows")
        assert list(back.contents()) == list(sent.contents())
        np.testing.assert_array_equal(back.targets, sent.targets)
        np.testing.assert_array_equal(back.split, sent.split)
        assert (back.task, back.class_names, back.whole) == (sent.task, sent.class_names, None)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda row: {**row, "split": "train"}, InputError, "no validation and no test rows, only train.*80/10/10"),
        (lambda row: {**row, "split": "test"} if row["split"] != "train" else row, InputError, "no validation rows"),
        (lambda row: {**row, "label": "good"}, TrainingError, "training rows have the class 'good'"),
        (lambda row: {"text": row["text"], "split": row["split"]}, InputError, "label"),
    ],
)
def test_rows_that_cannot_be_compared_on(
    model: str, change: Callable[[Any], Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match) as raised:
        compare(model, None, inputs=[change(row) for row in rows_of(40)])
    assert "\n" not in str(raised.value)


def test_too_few_rows(model: str) -> None:
    with pytest.raises(InputError, match="too few rows: 1 of validation"):
        compare(model, None, count=4)
    with pytest.raises(InputError, match="too few rows"):
        compare(model, None, max_rows=3)
    with pytest.raises(SpecError, match="max_rows is 0"):
        compare(model, None, max_rows=0)
    many = [{**row, "label": str(at)} for at, row in enumerate(rows_of(40))]
    with pytest.raises(TrainingError, match="20 training rows for 40 classes"):
        checked_rows(load_examples(many))


def test_no_labels() -> None:
    with pytest.raises(InputError, match="has no labels"):
        checked_rows(load_examples([{"text": "a"}, {"text": "b"}], labels="none"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"approaches": ["cashed"]}, "did you mean cached"),
        ({"approaches": []}, "no approach was named"),
        ({"fractions": [0.0]}, "the fraction 0.0"),
        ({"fractions": [1.5]}, "the fraction 1.5"),
        ({"fractions": []}, "no fraction"),
        ({"epochs": 0}, "epochs is 0"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"seeds": []}, "different whole numbers"),
        ({"metric": "acuracy"}, "did you mean"),
        ({"head": "liner"}, "did you mean linear"),
        ({"approaches": ["last-4"]}, "did you mean last-"),
        ({"approaches": ["cached", "last-3"]}, "blocks is 3, and .* has 3"),
        ({"approaches": ["last-1"], "pooling": "mean@-2"}, "expected a set of the last layer"),
    ],
)
def test_settings_that_make_no_sense(model: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(SpecError, match=match):
        compare(model, None, **options)


def test_a_folder_of_something_else(model: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"is not a comparison \(it holds thesis.tex\)"):
        compare(model, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        compare(model, tmp_path / "file")


def test_the_command_says_what_is_wrong_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.csv").write_text("text,label\n" + "".join(f"text {at},{at % 2}\n" for at in range(20)))
    assert command_line(["compare", "plain.csv"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if not line.startswith("note:")] == [said[-1]]
    assert said[-1].startswith("error: the input has no validation and no test rows")
    assert command_line(["compare"]) == 2
    assert command_line(["compare", "plain.csv", "--fractions", "some"]) == 2
    assert command_line(["compare", "plain.csv", "--split", "80/10/10", "--approaches", "cached,ful"]) == 2
    assert "did you mean full" in capsys.readouterr().err
    assert not (tmp_path / "plain.compare").exists()


# -- the whole --------------------------------------------------------------------------------------------------------


def test_four_ways_on_the_same_rows(model: str, tmp_path: Path, jobs: list[Job]) -> None:
    ways = [name for name in APPROACHES if name != "last-3"]  # the model has three blocks
    found = compare(model, tmp_path / "c", fractions=[0.5, 1], head="mlp", epochs=3)
    assert list(found.facts.left_out) == ["last-3"]
    assert [(each.fraction, each.approach) for each in found.rows] == [
        (fraction, name) for fraction in (0.5, 1.0) for name in ways
    ]
    assert [job.approach for job in jobs] == [*["extraction"] * 3, *ways, *ways]
    rows = {each.approach: each for each in found.rows if each.fraction == 1}
    assert {each.train_rows for each in rows.values()} == {30}
    assert {each.train_rows for each in found.rows if each.fraction == 0.5} <= {15, 16}
    assert {(each.validation_rows, each.test_rows) for each in found.rows} == {(15, 15)}
    # The same head on the same features, from the same start, in the same order: the same answer.
    assert rows["cached"].validation == rows["frozen"].validation
    assert rows["frozen"].difference == 0.0
    assert rows["cached"].trainable == rows["frozen"].trainable < rows["full"].trainable
    assert rows["cached"].parameters == rows["frozen"].parameters == rows["full"].parameters
    assert rows["cached"].trainable < rows["last-1"].trainable < rows["last-2"].trainable < rows["full"].trainable
    assert rows["last-2"].parameters == rows["full"].parameters
    assert rows["cached"].disk < rows["last-1"].disk
    assert rows["full"].disk is None
    assert rows["last-2"].extraction_seconds > 0
    assert rows["last-2"].probe_seconds > 0
    assert rows["last-2"].from_full == rows["last-2"].test - rows["full"].test
    assert sum("of the time of full fine-tuning" in sentence for sentence in found.sentences()) == 4
    assert any("last 3 blocks, cached states: left out, as blocks is 3" in note for note in found.notes)
    assert rows["full"].trainable == rows["lp-ft"].trainable
    assert rows["lp-ft"].probe_seconds > 0
    assert [(each.fraction, each.against) for each in found.break_even] == [
        (fraction, name) for fraction in (0.5, 1.0) for name in ("frozen", "full")
    ]
    text = (tmp_path / "c" / "comparison.md").read_text()
    assert text.count("| cached features + head |") == 2
    assert "Kumar et al. 2022" in text
    assert json.loads((tmp_path / "c" / "comparison.json").read_text()) == json.loads(json.dumps(found.to_json()))
    svg = (tmp_path / "c" / "comparison.svg").read_text()
    assert "training rows" in svg
    found.plot(tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == svg


def test_nothing_is_measured_twice(model: str, tmp_path: Path, jobs: list[Job]) -> None:
    first = compare(model, tmp_path / "c", approaches=["cached", "full"])
    assert len(jobs) == 3
    again = compare(model, tmp_path / "c", approaches=["cached", "full"])
    assert len(jobs) == 3
    assert again.to_json() == first.to_json()
    compare(model, tmp_path / "c", approaches=["cached", "frozen", "full"])
    assert [job.approach for job in jobs[3:]] == ["frozen"]
    compare(model, tmp_path / "c", approaches=["cached"], seeds=[0, 1])
    assert [(job.approach, job.seed) for job in jobs[4:]] == [("cached", 1)]


@pytest.mark.parametrize(
    ("change", "measured"),
    [
        ({"epochs": 3}, ["cached"]),
        ({"head": "mlp"}, ["cached"]),
        ({"metric": "f1_macro"}, ["cached"]),
        ({"count": 64}, ["extraction", "cached"]),
        ({"pooling": "cls"}, ["extraction", "cached"]),
    ],
)
def test_what_differs_is_measured(
    model: str, tmp_path: Path, jobs: list[Job], change: dict[str, Any], measured: list[str]
) -> None:
    compare(model, tmp_path / "c", approaches=["cached"])
    del jobs[:]
    compare(model, tmp_path / "c", approaches=["cached"], **change)
    assert [job.approach for job in jobs] == measured


def test_other_weights_under_the_same_name_are_measured(model: str, tmp_path: Path, jobs: list[Job]) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    moving = tmp_path / "model"
    shutil.copytree(model, moving)
    compare(str(moving), tmp_path / "c", approaches=["cached"])
    tensors = load_file(moving / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"] += torch.tensor(0.5)
    save_file(tensors, moving / "model.safetensors", metadata={"format": "pt"})
    del jobs[:]
    compare(str(moving), tmp_path / "c", approaches=["cached"])
    assert [job.approach for job in jobs] == ["extraction", "cached"]
    # And in the midst of a comparison, by the one who finds other weights than the features are from.
    tensors["embeddings.word_embeddings.weight"] += torch.tensor(0.5)
    save_file(tensors, moving / "model.safetensors", metadata={"format": "pt"})
    cache = next(job.cache for job in jobs)
    with pytest.raises(BackboneMismatchError, match="changed during the comparison"):
        perform(training_job("frozen", cache, tmp_path / "o"))


def test_a_comparison_that_is_interrupted_goes_on(
    model: str, tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare(model, tmp_path / "whole", approaches=["cached", "full"])
    del jobs[:]
    do = running.in_own_process

    def stop(job: Job) -> Any:
        if job.approach == "full":
            raise KeyboardInterrupt
        return do(job)

    monkeypatch.setattr(running, "in_own_process", stop)
    with pytest.raises(Interrupted, match="run the same command again"):
        compare(model, tmp_path / "c", approaches=["cached", "full"])
    monkeypatch.setattr(running, "in_own_process", do)
    # A line that was being written when the power went is no line, and outputs that are gone are made again.
    with open(tmp_path / "c" / "results.jsonl", "ab") as file:
        file.write(b'{"key": "abc')
    found = compare(model, tmp_path / "c", approaches=["cached", "full"])
    assert [job.approach for job in jobs] == ["extraction", "cached", "full"]
    for ours, theirs in zip(found.rows, whole.rows, strict=True):
        for field in ("validation", "test", "test_interval", "difference", "best_epoch", "train_rows"):
            assert getattr(ours, field) == getattr(theirs, field), "the same seed, another result"
    next((tmp_path / "c" / "outputs").iterdir()).write_bytes(b"cut")
    compare(model, tmp_path / "c", approaches=["cached", "full"])
    assert len(jobs) == 4


def test_an_interrupted_extraction_is_charged_in_full(model: str, tmp_path: Path, jobs: list[Job]) -> None:
    """What was extracted before counts by the pace of the rest; where nothing is left to time, it is done again."""
    from embedcache.extract import load_for, part_of, run

    examples = checked_rows(load_examples(rows_of(60)))
    plan = running.Plan(
        examples, chosen(["cached"]), [1.0], [0], HeadSpec("linear"), "accuracy", 2,
        ModelSource(Path(model), device="cpu"), "mean",
    )  # fmt: skip
    work = running.Work(plan, Folder(tmp_path / "c"))
    backbone = load_for(None, ModelSource(model, device="cpu"), BackboneSettings(("mean",)))
    (tmp_path / "c" / "caches").mkdir(parents=True)
    run(part_of(examples, 1, 2), backbone, work.cache(0))
    found = compare(model, tmp_path / "c", approaches=["cached"])
    line = json.loads((tmp_path / "c" / "results.jsonl").read_text().splitlines()[0])
    assert (line["extracted"], line["unique"]) == (30, 60)
    assert found.extraction.seconds == pytest.approx(2 * line["seconds"])
    assert any("interrupted" in note for note in found.notes)
    (tmp_path / "c" / "results.jsonl").unlink()
    (tmp_path / "c" / "comparison.json").unlink()
    (tmp_path / "c" / "comparison.md").unlink()
    (tmp_path / "c" / "comparison.svg").unlink(missing_ok=True)
    again = compare(model, tmp_path / "c", approaches=["cached"])
    assert again.extraction.extracted == 60


def test_a_damaged_line_is_named(model: str, tmp_path: Path, jobs: list[Job]) -> None:
    compare(model, tmp_path / "c", approaches=["cached"])
    file = tmp_path / "c" / "results.jsonl"
    file.write_text(file.read_text() + '{"key": 3, "approach": "full"}\n')
    with pytest.raises(InputError, match=r"results.jsonl, line 3 is damaged .*delete that line"):
        compare(model, tmp_path / "c", approaches=["cached"])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda line: line.pop("memory"), "the whole lacks memory"),
        (lambda line: line["memory"].pop("peak"), "memory lacks peak"),
        (lambda line: line.update(seconds="12"), "seconds is of type str: expected a number"),
        (lambda line: line["memory"].update(baseline=True), "memory.baseline is of type bool: expected a whole number"),
        (lambda line: line.update(approach=["cached"]), "its approach"),
    ],
)
@pytest.mark.parametrize("number", [1, 2])
def test_a_line_that_lacks_something_is_named(
    number: int, change: Callable[[dict[str, Any]], Any], problem: str, tmp_path: Path
) -> None:
    """What is not as it was written is said of its line when the folder is opened, not in the midst of a comparison."""
    memory = Memory(baseline=2, device=None, peak=3)
    extraction = Extraction(5, memory, 7, 11, 1.5, 0.5, 13, 17)
    training = Training(19, 23, 29, 31, 1, 0.5, 1.0, ({"seconds": 1.0},), 2.0, None, 0.0, memory, 37)
    with Folder(tmp_path / "c") as folder:
        folder.add("extracted", extraction, approach="extraction")
        folder.add("trained", training, approach="cached", fraction=1.0, seed=0, epochs=1)
    with Folder(tmp_path / "c") as folder:
        assert folder.extraction("extracted") == extraction
        assert folder.training("trained") is None  # its outputs are not there
        np.save(folder.output_path("trained"), np.zeros((2, 3), np.float32))
        assert folder.training("trained") == training
    file = tmp_path / "c" / "results.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    change(lines[number - 1])
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (
        pytest.raises(InputError, match=rf"results.jsonl, line {number} is damaged .*{problem}"),
        Folder(tmp_path / "c"),
    ):
        pass


@given(st.integers(0, 2**40), st.floats(0, 1e9), st.none() | st.floats(0, 1e9), st.sampled_from(list(APPROACHES)))
def test_jobs_and_results_survive_the_way_to_another_process_and_to_the_journal(
    count: int, seconds: float, probe: float | None, approach: str
) -> None:
    memory = Memory(baseline=count, device=None, peak=2 * count)
    training = Training(3, 5, 7, count, 1, 0.5, seconds, ({"seconds": seconds},), seconds, probe, 0.0, memory, 11, 13)
    job = replace(training_job(approach), head=HeadSpec("mlp", "torch", {"hidden": [5]}), fraction=0.5, seed=2)
    assert pickle.loads(pickle.dumps((job, training))) == (job, training)
    assert from_json(Training, json.loads(json.dumps(to_json(training)))) == training


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_the_other_tasks(model: str, tmp_path: Path, jobs: list[Job], task: str) -> None:
    def label(row: dict[str, Any]) -> Any:
        good = row["label"] == "good"
        return (["good", "any"] if good else ["bad", "any"]) if task == "multilabel" else 1000.0 + 50.0 * good

    data = [{**row, "label": label(row)} for row in rows_of(60)]
    ways = ["cached", "frozen", "last-1", "lp-ft"]
    found = compare(model, None, inputs=data, task=task, epochs=3, approaches=ways)
    rows = {each.approach: each for each in found.rows}
    assert found.facts.metric == {"multilabel": "f1_macro", "regression": "rmse"}[task]
    assert rows["frozen"].test == pytest.approx(rows["cached"].test, rel=1e-3)
    if task == "regression":  # LP-FT starts from the head, not from values a thousand away from it
        assert rows["lp-ft"].test < 100
        assert rows["last-1"].test < 100


def test_a_head_on_tokens(model: str, tmp_path: Path, jobs: list[Job]) -> None:
    found = compare(model, None, head="attention", pooling="tokens", approaches=["cached", "frozen", "lp-ft"])
    rows = {each.approach: each for each in found.rows}
    assert rows["frozen"].validation == rows["cached"].validation


def test_in_processes_of_their_own(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line and its workers, for real: what is kept is what is printed; a second run measures nothing."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(60)))
    command = [
        "compare", "rows.jsonl", "--model", model, "--pooling", "mean", "--approaches", "cached,full", "--epochs", "1",
        "--device", "cpu",
    ]  # fmt: skip
    assert command_line([*command, "--json"]) == 0
    said = capsys.readouterr().out
    found = json.loads(said)
    assert found == json.loads(Path("rows.compare/comparison.json").read_text())
    assert [each["approach"] for each in found["rows"]] == ["cached", "full"]
    assert all(0 < each["memory"]["resident"] < 2**30 for each in found["rows"])
    monkeypatch.setattr(running, "in_own_process", None)
    assert command_line([*command, "--json"]) == 0
    assert capsys.readouterr().out == said
    assert command_line(command) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0].startswith("approach")
    assert "saved in rows.compare" in text


def test_a_worker_that_fails_or_dies_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def worker(status: int, error: Exception | None = None) -> None:
        def run(command: list[str], **_: Any) -> Any:
            if error is not None:
                Path(command[-2]).with_suffix(".result").write_bytes(pickle.dumps(error))
            return subprocess.CompletedProcess(command, status)

        monkeypatch.setattr(subprocess, "run", run)

    job = training_job("full")
    for status, error, match in (
        (-9, TrainingError, "full was killed: is there enough memory"),
        (3, TrainingError, "ended with status 3"),
        (130, KeyboardInterrupt, None),
    ):
        worker(status)
        with pytest.raises(error, match=match):
            running.in_own_process(job)
    for raised in (InputError("no such thing"), BadRowsError([("row 7", "no such thing")], 1)):
        worker(0, raised)
        with pytest.raises(type(raised), match="no such thing"):
            running.in_own_process(job)


def test_a_worker_ends_with_the_comparison_that_started_it() -> None:
    """Whoever is killed leaves nobody behind: the pipe that both hold is closed when the last of them is gone."""
    worker = "from embedcache.compare.worker import end_with; import sys, time; end_with(int(sys.argv[1])); {}"
    code = (
        "import os, subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())])\n"
        "time.sleep(2)\nos._exit(0)"
    )
    command = [sys.executable, "-c", code, worker.format("time.sleep(60)")]
    subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=30)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_the_peak_is_what_was_held_since_and_not_what_the_parent_held() -> None:
    """A child of a large parent reports its own: ``ru_maxrss`` would be the parent's."""
    code = (
        "from embedcache.compare.measurements import Peak\n"
        "before = bytearray(90 << 20)\nbefore[::4096] = b'x' * len(before[::4096])\ndel before\n"
        "peak = Peak()\nheld = bytearray(40 << 20)\nheld[::4096] = b'x' * len(held[::4096])\ndel held\n"
        "found = peak.read()\nprint(found.held)"
    )
    large = np.ones(60 << 20, np.uint8)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert large[0]
    assert 35 << 20 < int(done.stdout) < 60 << 20


def test_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedcache.compare.measurements._STATUS", Path("/nowhere"))
    monkeypatch.setattr("embedcache.compare.measurements._CLEAR", Path("/nowhere/clear"))
    found = Peak().read()
    assert found.peak >= found.baseline > 0
    assert found.device is None


def test_every_recipe_names_its_source() -> None:
    for each in APPROACHES.values():
        assert "et al." in each.recipe or "cache" in each.recipe
    assert chosen(["full", "cached"])[0].name == "cached"
    assert APPROACHES["cached"].spec == APPROACHES["frozen"].spec
    assert [APPROACHES["last-2"].epochs(asked) for asked in (2, 5)] == [2, 3]
    assert APPROACHES["lp-ft"].spec.learning_rate == APPROACHES["lp-ft"].backbone_rate


def test_a_model_with_code_of_its_own_is_compared_where_it_is_trusted(jobs: list[Job], tmp_path: Path) -> None:
    folder = tiny_models.build("bert", tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": auto}))
    (folder / "own.py").write_text(
        "from transformers import BertConfig, BertModel\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own'\n"
        "class OwnModel(BertModel):\n    config_class = OwnConfig\n"
    )
    ways = ("cached", "frozen")
    with pytest.raises(BackboneError, match="--trust-remote-code"):
        compare(str(folder), tmp_path / "c", approaches=ways)
    found = compare(str(folder), tmp_path / "c", approaches=ways, trust_remote_code=True)
    assert [row.approach for row in found.rows] == list(ways)


# -- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_image_models_are_compared_too(tmp_path: Path, jobs: list[Job], kind: str) -> None:
    """The same rows reach a process of its own, by the keys of their bytes; nothing is extracted twice."""
    model = tiny_pictures.build(kind, tmp_path / "model")
    examples = tiny_pictures.examples_of(tiny_pictures.pictures(24), splits=("train", "train", "validation", "test"))
    write_rows(examples, tmp_path / "rows.pickle")
    again = read_rows(tmp_path / "rows.pickle")
    assert (again.kind, again.keys.tobytes()) == ("image", examples.keys.tobytes())
    found = compare(
        str(model), tmp_path / "c", inputs=examples, pooling="mean", epochs=1, seeds=[3],
        approaches=["cached", "frozen", "last-1", "full", "lp-ft"],
    )  # fmt: skip
    assert [type(job).__name__ for job in jobs].count("ExtractionJob") == 2
    assert found.row("full").total_seconds > 0
    assert all(0 <= found.row(name).test <= 1 for name in ("cached", "frozen", "last-1", "full", "lp-ft"))
