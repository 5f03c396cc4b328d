"""train, evaluate and predict on the command line: every option, every kind of input, every mistake on one line."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_caches
import tiny_models
from fakes import CountingBackbone

from embedcache import cli
from embedcache.cache import FeatureCache
from embedcache.cli.predictions import _line, shown
from embedcache.errors import FeatureError, InputError, TrainingError
from embedcache.estimator import HeadClassifier, HeadRegressor
from embedcache.examples import load_examples
from embedcache.extract import run as extract
from embedcache.heads import TrainedHead
from embedcache.predict import Prediction, text_table
from embedcache.shard import FeatureSet
from embedcache.spec import MINIBATCH_SETTINGS, HeadSpec, TrainSpec
from embedcache.sweep import sweep
from embedcache.task import task_named
from embedcache.train import train_head, train_on_cache
from embedcache.train.convex import solve

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process: exit status, stdout, stderr."""

    def command(*arguments: Any) -> tuple[int, str, str]:
        status = cli.run([str(each) for each in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return command


def rows(number: int = 97, label: Callable[[int], Any] = lambda at: ("bad", "good", "so\nso")[at % 3]) -> list[Any]:
    return [{"text": f"text number {at}", "label": label(at)} for at in range(number)]


def cached(path: Path, given: list[Any] | dict[str, Any], **options: Any) -> Path:
    split = {} if isinstance(given, dict) else {"split": "60/20/20"}
    extract(load_examples(given, **(split | options)), CountingBackbone(tokens=True), path)
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: Any) -> Path:
    return cached(tmp_path_factory.mktemp("caches") / "classes", rows())


@pytest.fixture(scope="module")
def several(tmp_path_factory: Any) -> Path:
    labels = rows(label=lambda at: ["a"] * (at % 2) + ["b, or c"] * (at % 3 == 0))
    return cached(tmp_path_factory.mktemp("caches") / "labels", labels, task="multilabel")


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: Any) -> Path:
    given = [row | {"a": at / 7, "b": at * 100.0} for at, row in enumerate(rows())]
    return cached(tmp_path_factory.mktemp("caches") / "numbers", given, task="regression", label_column=["a", "b"])


def last(err: str) -> str:
    """The one line of an error."""
    (line,) = [line for line in err.splitlines() if not line.startswith("note: ") and line]
    return line


# train, evaluate.

OPTIONS = [
    (),
    ("--epochs", 2, "--batch-size", 7, "--optimizer", "sgd", "--learning-rate", 0.1, "--momentum", 0.5),
    ("--weight-decay", 0.5, "--schedule", "linear", "--warmup", 0.3, "--clip", 0, "--patience", 0, "--epochs", 2),
    ("--metric", "log_loss", "--label-smoothing", 0.1, "--class-weight", "balanced", "--no-standardize", "--lr", "1"),
    ("--class-weight", '{"bad": 3, "good": 1}', "--seed", 7, "--standardize", "--schedule", "constant", "--epochs", 1),
    ("--solver", "convex", "--l2", 0.5),
    ("--l2", 2), ("--solver", "auto", "--epochs", 1), ("--solver", "minibatch"), ("--shuffle-seed", 3),
    ("--head", "mlp", "--head-option", "hidden=[8, 4]", "--head-option", "activation=gelu", "--epochs", 2),
    ("--head", "residual", "--head-option", "width=8", "--head-option", "depth=1", "--epochs", 1, "--device", "cpu"),
    ("--head", "attention", "--head-option", "width=8", "--epochs", 2, "--device", "auto"),
    ("--head", "attention-pooling", "--feature", "tokens", "--epochs", 1),
    ("--head", "logistic-regression", "--l2", 3, "--class-weight", "balanced"),
    ("--engine", "sklearn",),
    ("--head", "mlp", "--engine", "sklearn", "--head-option", "hidden=[4]", "--head-option", "max_iter=3"),
    ("--head", "linear-svm", "--feature", "mean"),
    ("--head", "ridge", "--head-option", "alpha=3"),
    ("--head", "lda"), ("--head", "knn", "--head-option", "n_neighbors=3"),
    ("--head", "hist-gradient-boosting", "--head-option", "max_iter=2"),
    ("--head", "majority"), ("--head", "random-projection", "--head-option", "dims=2"),
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(map(str, options))[:40] or "defaults")
def test_every_option_trains_saves_and_evaluates(options: Any, cache: Path, run: Run, tmp_path: Path) -> None:
    status, out, err = run("train", cache, "-o", tmp_path / "run", *options)
    assert status == 0, err
    assert out.splitlines()[0].split() == ["metric", "train", "validation"]
    assert "accuracy" in out
    head = TrainedHead.from_pretrained(tmp_path / "run")
    assert head.class_names == ("bad", "good", "so\nso")
    status, out, err = run("evaluate", tmp_path / "run", cache, "--json")
    assert status == 0, err
    test = json.loads(out)["test"]
    assert test["rows"] == len(FeatureCache.open(cache).rows("test"))
    low, high = test["intervals"]["accuracy"]
    assert low <= test["accuracy"] <= high


def test_settings_reach_the_training(cache: Path, run: Run, tmp_path: Path) -> None:
    run(
        "train", cache, "-o", tmp_path / "run", *OPTIONS[1], "--seed", 5, "--head", "mlp", "--head-option", "hidden=[4]"
    )
    head = TrainedHead.from_pretrained(tmp_path / "run")
    expected = {"epochs": 2, "batch_size": 7, "optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.5, "seed": 5}
    assert {name: head.training[name] for name in expected} == expected
    assert head.spec == HeadSpec("mlp", "torch", {"hidden": [4]})
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("task", ["classes", "several", "numbers"])
def test_linear_is_one_head_at_every_door(task: str, request: Any, run: Run, tmp_path: Path) -> None:
    """The command, the function, the estimator and the sweep: the optimum, which the solver gives to the bit."""
    opened = FeatureCache.open(folder := request.getfixturevalue("cache" if task == "classes" else task))
    assert run("train", folder, "-o", tmp_path / "run")[0] == 0
    x, y = opened.arrays("train")
    best = solve(x, y, task=task_named(opened.task), outputs=len(opened.class_names), l2=1.0, standardize=True)
    estimator = HeadRegressor() if opened.task == "regression" else HeadClassifier()
    doors = {
        "train": TrainedHead.from_pretrained(tmp_path / "run"),
        "train_on_cache": train_on_cache(opened, progress=False).head,
        "estimator": estimator.fit(x, y).head_,
        "sweep": sweep(opened, ["linear"], output_dir=tmp_path / "sweep", folds=1, progress=False).best,
    }
    for door, head in doors.items():
        assert head.training["solver"] == "convex", door
        assert "epochs" not in head.training, door
        if door != "sweep":  # which trains what it keeps on validation rows too
            assert np.array_equal(head.state["output.weight"], best.weight), door


def test_a_setting_of_minibatches_asks_for_them_also_at_its_default(cache: Path, run: Run, tmp_path: Path) -> None:
    for name in MINIBATCH_SETTINGS:
        value = getattr(TrainSpec(), name)
        options = ("--optimizer", "sgd") if name == "momentum" else ()
        text = {"metric": "log_loss", "shuffle_seed": "0", "min_steps": 300}.get(name, value)
        status, _, err = run("train", cache, "-o", tmp_path / "run", f"--{name.replace('_', '-')}", text, *options)
        assert status == 0, err
        assert TrainedHead.from_pretrained(tmp_path / "run").training["solver"] == "minibatch", name


def test_few_rows_get_more_epochs_and_a_head_that_still_improves_is_said(cache: Path, run: Run, tmp_path: Path) -> None:
    _, _, err = run("train", cache, "-o", tmp_path / "run", "--head", "mlp", "--patience", 2)
    assert "note: 300 epochs instead of 30, for at least 300 steps" in err, "58 rows are one step an epoch"
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 300
    still = "note: the head was still improving when training ended: more epochs"
    _, _, err = run("train", cache, "-o", tmp_path / "run", "--epochs", 10, "--lr", 0.0001)
    assert still in err
    assert "instead of" not in err
    _, _, err = run("train", cache, "-o", tmp_path / "run", "--lr", 0.1, "--epochs", 400, "--weight-decay", 1)
    assert still not in err


def test_one_seed_one_head(cache: Path, run: Run, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("train", cache, "-o", tmp_path / name, "--seed", seed, "--epochs", 2, "--head", "mlp")
    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == again != other


def test_several_labels_and_numbers(several: Path, numbers: Path, run: Run, tmp_path: Path) -> None:
    for cache, metric in ((several, "f1_micro"), (numbers, "rmse")):
        for at, options in enumerate(
            [("--epochs", 2), ("--solver", "convex"), ("--head", "knn"), ("--head", "majority")]
        ):
            folder = tmp_path / f"{metric}{at}"
            status, out, err = run("train", cache, "-o", folder, *options)
            assert status == 0, err
            assert metric in out
            status, out, err = run("evaluate", folder, cache)
            assert status == 0, err
            assert metric in out
            assert "b, or c" in out or cache is numbers
    assert "target" in out
    assert run("evaluate", tmp_path / "rmse0", several)[0] == 1


def test_json_is_all_there_is_on_stdout(cache: Path, run: Run, tmp_path: Path) -> None:
    _, out, _ = run("train", cache, "-o", tmp_path / "run", "--json", "--epochs", 2)
    assert set(json.loads(out)) == {"train", "validation"}


def test_an_evaluation_is_shown_and_can_be_recorded(cache: Path, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run("train", cache, "-o", folder, "--epochs", 2)
    _, out, _ = run("evaluate", folder, cache)
    assert "(95 % interval)" in out
    assert "so\\nso" in out
    assert "test" not in json.loads((folder / "metrics.json").read_text())
    status, _, _ = run("evaluate", folder, cache, "--split", "validation", "--record")
    assert status == 0
    assert run("evaluate", folder, cache, "--record")[0] == 0
    assert "accuracy" in json.loads((folder / "metrics.json").read_text())["test"]
    card = (folder / "README.md").read_text("utf-8")
    (test,) = (line for line in card.splitlines() if line.startswith("test accuracy: "))
    (validation,) = (line for line in card.splitlines() if line.startswith("validation accuracy: "))
    assert "(95 % interval, over rows)" in test
    assert "these rows chose the epoch and the calibration too" in validation
    assert run("train", cache, "-o", folder, "--epochs", 1)[0] == 0, "a run may be replaced"
    assert "test" not in json.loads((folder / "metrics.json").read_text())


def test_without_a_validation_split_some_rows_are_held_out(run: Run, tmp_path: Path) -> None:
    cached(tmp_path / "cache", {"train": rows(), "test": rows(120)[97:]})
    status, _, err = run("train", tmp_path / "cache", "-o", tmp_path / "run", "--epochs", 2)
    assert status == 0
    assert "note: there is no validation split" in err


def test_ctrl_c_keeps_the_best_head_so_far(cache: Path, run: Run, tmp_path: Path) -> None:
    run("train", cache, "-o", tmp_path / "warm", "--epochs", 1)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.7)
        status, out, err = run("train", cache, "-o", tmp_path / "run", "--epochs", 10**6, "--patience", 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert status == 1
    assert "accuracy" in out
    assert "stopped after" in last(err)
    assert f"the best head so far is saved in {tmp_path / 'run'}" in last(err)
    assert TrainedHead.from_pretrained(tmp_path / "run").training["epochs"] == 10**6
    assert "Traceback" not in err


# What is not imported.


@pytest.mark.parametrize(
    ("heads", "absent"),
    [
        (
            (("logistic-regression",), ("hist-gradient-boosting", "--head-option", "max_iter=2")),
            ("torch", "transformers"),
        ),
        ((("mlp", "--epochs", "1"),), ("transformers",)),
    ],
)
def test_stage_two_is_light(heads: Any, absent: Any, cache: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom embedcache.cli import run\n"
        f"for at, head in enumerate({heads!r}):\n"
        f"    made = f'{tmp_path}/run{{at}}'\n"
        f"    assert run(['train', {str(cache)!r}, '-o', made, '--head', *head]) == 0\n"
        f"    assert run(['evaluate', made, {str(cache)!r}]) == 0\n"
        f"print([name for name in {absent!r} if name in sys.modules], 'sklearn' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1].startswith("[]"), done.stdout + done.stderr


# Mistakes.

MISTAKES: list[tuple[tuple[Any, ...], int, str]] = [
    (("--head", "mpl"), 2, r"there is no head 'mpl' (did you mean mlp?)"),
    (("--head", "attention", "--engine", "sklearn"), 2, "the head attention is torch's"),
    (("--head", "knn", "--engine", "torch"), 2, "the head knn is sklearn's"),
    (("--head", "mlp", "--head-option", "hiden=[3]"), 2, "did you mean hidden"),
    (("--head", "mlp", "--head-option", "hidden"), 2, "--head-option 'hidden': expected NAME=VALUE"),
    (("--head", "knn", "--head-option", "n_neighbors=-1"), 2, "n_neighbors is -1"),
    (("--head", "attention", "--feature", "mean"), 1, "the feature set mean has one, so there is nothing to attend to"),
    (("--head", "layer-concat", "--feature", "mean"), 1, "has one: make such a set (extract --pooling mean@all), or"),
    (("--head", "linear", "--feature", "tokens"), 1, "reads one vector a row"),
    (("--head", "knn", "--feature", "tokens"), 1, "reads one vector a row"),
    (("--feature", "cls"), 1, "cls"),
    (("--epochs", "0"), 2, "epochs is 0: expected a whole number of at least 1"),
    (("--lr", "-1"), 2, "learning_rate is -1"),
    (("--lr", "nan"), 2, "learning_rate is nan"),
    (("--metric", "acuracy"), 2, "acuracy"),
    (("--metric", "rmse"), 2, "rmse"),
    (("--class-weight", "heavy"), 2, "--class-weight 'heavy' is not JSON"),
    (("--class-weight", '{"worse": 1}'), 2, "class_weight names 'worse', which is not a class"),
    (("--class-weight", '{"bad": -1}'), 2, "class_weight is -1 for 'bad'"),
    (("--class-weight", "[1]"), 2, "class_weight"),
    (("--solver", "convex", "--head", "mlp"), 2, "convex solver is for linear heads"),
    (("--solver", "convex", "--epochs", "3"), 2, "--epochs means nothing to the convex solver"),
    (("--solver", "convex", "--engine", "sklearn"), 2, "--solver means nothing to the scikit-learn head linear"),
    (("--head", "ridge", "--epochs", "3"), 2, "--epochs means nothing to the scikit-learn head ridge"),
    (("--head", "knn", "--l2", "3"), 2, "--l2 means nothing to the scikit-learn head knn"),
    (("--head", "knn", "--device", "cpu"), 2, "--device means nothing to the scikit-learn head knn"),
    (("--l2", "3", "--head", "mlp"), 2, "--l2 means nothing to training by minibatches: use --weight-decay"),
    (("--l2", "3", "--epochs", "3"), 2, "--l2 means nothing to training by minibatches, which --epochs asks for: use"),
    (("--momentum", "0.5"), 2, "--momentum means nothing to adamw: use --optimizer sgd"),
    (("--device", "tpu"), 1, "device 'tpu' is not available here"),
    (("--seed", "-1"), 2, "seed is -1"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "expected", "said"), MISTAKES, ids=[" ".join(each[0])[:50] for each in MISTAKES])
def test_a_mistake_costs_one_line(
    options: Any, expected: int, said: str, cache: Path, run: Run, tmp_path: Path
) -> None:
    status, out, err = run("train", cache, "-o", tmp_path / "run", *options)
    assert said in last(err)
    assert status == expected
    assert out == ""
    assert not (tmp_path / "run").exists(), "a folder with nothing in it is left"


def test_a_feature_set_that_is_not_there_names_those_that_are(cache: Path, run: Run, tmp_path: Path) -> None:
    _, _, err = run("train", cache, "-o", tmp_path / "run", "--feature", "cls")
    assert "mean" in last(err)
    assert "tokens" in last(err)
    assert not (tmp_path / "run").exists()


def test_a_cache_or_run_that_is_none(cache: Path, run: Run, tmp_path: Path) -> None:
    status, _, err = run("train", tmp_path / "nothing", "-o", tmp_path / "run")
    assert (status, "nothing" in last(err)) == (1, True)
    for command in (("evaluate", tmp_path, cache), ("predict", tmp_path, "--text", "x")):
        status, _, err = run(*command)
        assert status == 1
        assert "is not a run folder (it has no config.json): make one with embedcache train" in last(err)
    (tmp_path / "mine").write_text("")
    status, _, err = run("train", cache, "-o", tmp_path)
    assert (status, "holds something else than a head" in last(err)) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_evaluating_on_something_else(cache: Path, several: Path, run: Run, tmp_path: Path) -> None:
    run("train", cache, "-o", tmp_path / "run", "--epochs", 1)
    status, _, err = run("evaluate", tmp_path / "run", cache, "--split", "tset")
    assert (status, "tset" in last(err)) == (1, True)
    status, _, err = run("evaluate", tmp_path / "run", several)
    assert (status, "the head is for classification" in last(err)) == (1, True)
    other = tmp_path / "other"
    extract(load_examples(rows(), split="60/20/20"), CountingBackbone(name="another"), other)
    status, _, err = run("evaluate", tmp_path / "run", other)
    assert "backbone.weights: trained on 'fake', the cache has 'another'" in last(err)
    cached(tmp_path / "more", rows(label=lambda at: ("bad", "new")[at % 2]))
    status, _, err = run("evaluate", tmp_path / "run", tmp_path / "more")
    assert "labels that the head was not trained on ('new')" in last(err)
    cached(tmp_path / "fewer", rows(label=lambda at: ("so\nso", "bad")[at % 2]))
    status, out, err = run("evaluate", tmp_path / "run", tmp_path / "fewer", "--json")
    assert status == 0, "fewer classes, in another order, are no fault"
    assert json.loads(out)["test"]["missing_classes"] == ["good"]


def test_labels_that_nothing_can_be_learnt_from(run: Run, tmp_path: Path) -> None:
    cached(tmp_path / "one", rows(label=lambda at: "only"))
    status, _, err = run("train", tmp_path / "one", "-o", tmp_path / "run")
    assert (status, "have the class 'only': expected at least two classes" in last(err)) == (1, True)
    given = {"train": rows(), "validation": rows(100)[97:], "test": [*rows(110)[100:], {"text": "x", "label": "new"}]}
    cached(tmp_path / "unseen", given)
    status, _, err = run("train", tmp_path / "unseen", "-o", tmp_path / "run")
    assert (status, "test has classes that no training row has: 'new' (1 row)" in last(err)) == (1, True)
    status, _, err = run("train", tmp_path / "unseen", "-o", tmp_path / "run", "--allow-unseen", "--epochs", 1)
    assert status == 0, err
    assert "note: no training row has the class 'new'" in err
    given = {"train": rows(2), "validation": rows(4)[2:], "test": rows(9)[4:]}
    cached(tmp_path / "few", given, class_names=[*"abcde", "bad", "good", "so\nso"])
    status, _, err = run("train", tmp_path / "few", "-o", tmp_path / "run", "--allow-unseen")
    assert (status, "2 training rows for 8 classes" in last(err)) == (1, True)
    extract(load_examples(rows(), labels="none", split="60/20/20"), CountingBackbone(), tmp_path / "none")
    status, _, err = run("train", tmp_path / "none", "-o", tmp_path / "run")
    assert (status, "label" in last(err)) == (1, True)


def test_a_head_too_large_for_the_data_is_said(cache: Path, run: Run, tmp_path: Path) -> None:
    options = ("--head", "mlp", "--head-option", "hidden=[2048]", "--epochs", 1)
    status, _, err = run("train", cache, "-o", tmp_path / "run", *options)
    assert status == 0
    assert "18,435 parameters for" in err
    assert "a linear or a narrower head may do better" in err


X = np.random.default_rng(3).normal(size=(23, 5)).astype(np.float32)
Y = np.arange(23) % 2


@pytest.mark.parametrize("head", ["linear", "mlp", HeadSpec("linear", "sklearn"), HeadSpec("knn", "sklearn")])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_name_row_and_set(head: Any, bad: float) -> None:
    wrong = X.copy()
    wrong[17, 3] = bad
    with pytest.raises(FeatureError, match="features of training: row 17 holds NaN or infinity"):
        train_head(wrong, Y, head=head, class_names=("a", "b"), progress=False)
    with pytest.raises(FeatureError, match="features of validation: row 17 holds NaN or infinity"):
        train_head(X, Y, wrong, Y, head=head, class_names=("a", "b"), progress=False)


def test_targets_that_are_not_finite() -> None:
    wrong = np.arange(23.0)
    wrong[11] = np.inf
    with pytest.raises(InputError, match="training: row 11 has an infinite target"):
        train_head(X, wrong, task="regression", class_names=("y",), progress=False)
    some = np.stack([np.arange(23.0), np.arange(23.0)], axis=1)
    some[7, 1] = np.nan
    with pytest.raises(InputError, match="training: row 7 has a target that is NaN"):
        train_head(X, some, task="regression", class_names=("y", "z"), progress=False)
    with pytest.raises(TrainingError, match="no labelled row"):
        train_head(X, np.full(23, np.nan), task="regression", class_names=("y",), progress=False)
    wrong[11] = np.nan
    done = train_head(X, wrong, task="regression", class_names=("y",), spec=TrainSpec(epochs=1), progress=False)
    assert "1 of 23 training rows have no label and are left out" in done.notes


# predict.


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> dict[str, Path]:
    """Runs of a real, tiny backbone: classes, labels, numbers."""
    folder = tmp_path_factory.mktemp("runs")
    model = tiny_models.build("bert", folder / "bert")
    made = {}
    labels: dict[str, Callable[[int], Any]] = {
        "classification": lambda at: ("a, b", 'q"uote')[at % 2],
        "multilabel": lambda at: ["x;y"] * (at % 2) + ["z"],
        "regression": lambda at: at * 1.5,
    }
    for task, label in labels.items():
        given = [{"text": text, "label": label(at)} for at, text in enumerate(tiny_models.TEXTS)]
        cache = folder / f"{task}.cache"
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
        arguments = ["extract", folder / f"{task}.jsonl", "-o", cache, "--model", model, "--pooling", "mean"]
        arguments += ["--device", "cpu", "--task", task]
        assert cli.run([str(each) for each in arguments]) == 0
        assert cli.run(["train", str(cache), "-o", str(folder / task), "--solver", "convex"]) == 0
        made[task] = folder / task
    return made


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_one_text_reads_like_a_sentence(runs: dict[str, Path], run: Run) -> None:
    status, out, err = run("predict", runs["classification"], "--text", "the film was good", "--text", "not\nbad")
    assert status == 0, err
    first, second = out.splitlines()
    assert first.split("  ")[0] in ("a, b", 'q"uote')
    assert "'the film was good'  [a, b 0." in first
    assert repr("not\nbad") in second
    _, out, _ = run("predict", runs["multilabel"], "--text", "good")
    assert "'good'  [x;y 0." in out
    _, out, _ = run("predict", runs["regression"], "--text", "good")
    assert "'good'  [label " in out


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet", "lines", "stdin", "csv.gz"])
def test_files_of_every_kind(
    form: str, runs: dict[str, Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["the film, was good", 'very "boring"', "not bad 😀"]
    path: Any = tmp_path / f"in.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps({"key": f"k{at}", "text": text}) + "\n" for at, text in enumerate(texts)))
    elif form == "parquet":
        pd = pytest.importorskip("pandas")
        pd.DataFrame({"key": ["k0", "k1", "k2"], "text": texts}).to_parquet(path)
    elif form == "lines":
        path = tmp_path / "in.txt"
        path.write_text("\n".join(texts))
    elif form == "stdin":
        path = "-"
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(texts).encode()), "utf-8"))
    else:
        import gzip

        file = io.StringIO()
        writer = csv.writer(file, delimiter="\t" if form == "tsv" else ",")
        writer.writerows([["key", "text"], *([f"k{at}", text] for at, text in enumerate(texts))])
        raw = file.getvalue().encode()
        path.write_bytes(gzip.compress(raw) if form == "csv.gz" else raw)
    named = form not in ("lines", "stdin")
    status, out, err = run("predict", runs["classification"], path, *(("--id-column", "key") if named else ()))
    assert status == 0, err
    found = read_csv(out)
    assert [row["id"] for row in found] == (["k0", "k1", "k2"] if named else ["0", "1", "2"])
    assert list(found[0]) == ["id", "label", "confidence", "margin", "a, b", 'q"uote']
    _, alone, _ = run("predict", runs["classification"], "--format", "jsonl", *(
        part for text in texts for part in ("--text", text)))  # fmt: skip
    records = [json.loads(line) for line in alone.splitlines()]
    for row, record in zip(found, records, strict=True):
        assert row["label"] == record["label"]
        assert row["confidence"] == f"{record['confidence']:.6g}"
        assert sum(record["probabilities"].values()) == pytest.approx(1)


def test_every_task_as_csv_and_jsonl(runs: dict[str, Path], run: Run, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("\n".join(tiny_models.TEXTS))
    for task, folder in runs.items():
        for form in ("csv", "jsonl"):
            status, out, err = run("predict", folder, tmp_path / "in.txt", "-o", tmp_path / f"out.{form}")
            assert (status, out) == (0, ""), err
        records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
        table = read_csv((tmp_path / "out.csv").read_text("utf-8"))
        assert len(records) == len(table) == len(tiny_models.TEXTS)
        if task == "regression":
            assert [float(row["label"]) for row in table] == pytest.approx(
                [r["values"]["label"] for r in records], 1e-5
            )
        elif task == "multilabel":
            assert [json.loads(row["label"]) for row in table] == [record["label"] for record in records]
            assert table[0]["confidence"] == ""
            assert records[0]["confidence"] is None
    assert not list(tmp_path.glob(".*.tmp"))


def test_mistakes_of_predicting(
    runs: dict[str, Path], run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_models.build("electra", tmp_path / "electra")
    capsys.readouterr()
    one = runs["classification"]
    status, _, err = run("predict", one)
    assert status == 2
    assert "say what to predict" in err
    assert run("predict", one, "in.csv", "--text", "x")[0] == 2
    status, _, err = run("predict", one, tmp_path / "nothing.csv")
    assert (status, "nothing.csv" in last(err)) == (1, True)
    status, _, err = run("predict", one, "--text", " ")
    assert (status, "row 0: 'text' is blank" in last(err)) == (1, True)
    (tmp_path / "in.csv").write_text("text,other\nfine,1\n,2\n")
    status, _, err = run("predict", one, tmp_path / "in.csv", "-o", tmp_path / "out.csv")
    assert (status, "in.csv:3" in last(err)) == (1, True)
    assert not (tmp_path / "out.csv").exists()
    status, _, err = run("predict", one, tmp_path / "in.csv", "-o", tmp_path / "out.csv", "--on-bad-row", "skip")
    assert status == 0
    assert len(read_csv((tmp_path / "out.csv").read_text())) == 1
    assert (tmp_path / "out.csv.quarantine.jsonl").exists()
    status, _, err = run("predict", one, tmp_path / "in.csv", "--text-column", "txet")
    assert (status, "txet" in last(err)) == (1, True)
    status, _, err = run("predict", one, "--text", "x", "--model", tmp_path)
    assert (status, str(tmp_path) in last(err)) == (1, True)
    status, _, err = run("predict", one, "--text", "x", "--model", other, "--device", "cpu")
    assert (status, "the head was trained on the features of another backbone (" in last(err)) == (1, True)
    status, _, err = run("predict", one, "--text", "x", "-o", tmp_path / "no" / "where.csv")
    assert (status, "No such file" in last(err)) == (1, True)
    (tmp_path / "empty.txt").write_text("")
    assert run("predict", one, tmp_path / "empty.txt")[0] == 1


def test_a_prediction_that_fails_leaves_the_old_file(runs: dict[str, Path], run: Run, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\ntwo")
    (tmp_path / "out.csv").write_text("old")
    from embedcache.predict import Predictor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Predictor, "contents", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        status, _, err = run("predict", runs["regression"], tmp_path / "in.txt", "-o", tmp_path / "out.csv")
    assert (status, last(err)[:12]) == (1, "interrupted:")
    assert (tmp_path / "out.csv").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.csv"]


def head_of(names: tuple[str, ...], task: Any = "classification") -> TrainedHead:
    return TrainedHead(HeadSpec(), task, names, FeatureSet("mean", "pooled", 5, 1, "float32"))


def test_a_run_that_another_process_writes_costs_one_line(cache: Path, run: Run, tmp_path: Path) -> None:
    from embedcache.heads.folder import RunFolder

    with RunFolder(tmp_path / "run"):
        status, _, err = run("train", cache, "-o", tmp_path / "run")
        assert status == 1
        assert last(err) == f"error: another process is writing to {tmp_path / 'run'}: wait for it, or stop it"
    assert run("train", cache, "-o", tmp_path / "run", "--epochs", 1)[0] == 0


def test_class_names_of_any_kind_survive_in_every_format() -> None:
    names = ("label", "a,b\n", 'say "x"', "x;y", "\u202e", "\x1b[31m")
    prediction = Prediction("a,b\n", 0.5, dict.fromkeys(names, 0.1))
    file = io.StringIO()
    text_table("csv", file, head_of(names)).write("id, 1", prediction)
    (row,) = read_csv(file.getvalue())
    assert list(row)[4:] == ["probability of " + name for name in names], "a class called label is not the label"
    assert (row["id"], row["label"]) == ("id, 1", "a,b\n")
    file = io.StringIO()
    several = Prediction(("x;y", "label"), None, dict.fromkeys(names, 0.1))
    text_table("csv", file, head_of(names, "multilabel")).write("1", several)
    assert json.loads(read_csv(file.getvalue())[0]["label"]) == ["x;y", "label"]
    file = io.StringIO()
    text_table("jsonl", file, head_of(names)).write("1", prediction)
    assert json.loads(file.getvalue())["probabilities"] == dict.fromkeys(names, 0.1)
    line = _line("text\n", prediction)
    assert line.isprintable()
    assert line.startswith("a,b\\n  0.500")
    assert line.endswith("  ...]")
    assert shown("ok 好") == "ok 好"
    assert _line("t", Prediction((), None, {"a": 0.1})).startswith("(none)")


def test_a_small_cache_of_every_kind_of_set_trains(run: Run, tmp_path: Path) -> None:
    small_caches.write(tmp_path / "cache", rows=60)
    for feature, head in (
        ("cls", "linear"),
        ("l2:mean", "mlp"),
        ("cls@all", "attention"),
        ("mean@1+2", "attention-pooling"),
    ):
        options = ("--head", head, "--feature", feature, "--epochs", 1)
        status, _, err = run("train", tmp_path / "cache", "-o", tmp_path / "run", *options)
        assert status == 0, err
    assert "saved in" in run("train", tmp_path / "cache", "-o", tmp_path / "run", "--solver", "convex")[1]
    status, _, err = run("predict", tmp_path / "run", "--text", "x")
    assert (status, "give it features, not text" in last(err)) == (1, True)


def test_the_real_minilm_from_extract_to_predict(minilm_path: Path, run: Run, tmp_path: Path) -> None:
    sample = Path(cli.__file__).parents[2] / "data" / "sample.csv"
    steps: list[tuple[Any, ...]] = [
        ("extract", sample, "-o", tmp_path / "cache", "--split", "60/20/20", "--device", "cpu"),
        ("train", tmp_path / "cache", "-o", tmp_path / "run", "--solver", "convex"),
        ("evaluate", tmp_path / "run", tmp_path / "cache", "--json"),
    ]
    for step in steps:
        status, out, err = run(*step)
        assert status == 0, err
    assert json.loads(out)["test"]["accuracy"] > 0.5
    status, out, err = run("predict", tmp_path / "run", "--text", "I loved every minute of it.", "--device", "cpu")
    assert status == 0, err
    assert out.startswith("positive")


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_help_explains_every_option(command: str, run: Run) -> None:
    status, out, _ = run(command, "--help")
    assert status == 0
    made = cli.cli.commands[command]
    for parameter in made.params:
        if parameter.param_type_name == "option":
            assert getattr(parameter, "help", None), f"{command} {parameter.name} has no help"
    assert out.count("\n") < 105
