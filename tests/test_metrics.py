"""Every metric against scikit-learn, stacked and weighted forms against the plain one, and what is undefined."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as oracle

from embedcache.errors import SpecError, TrainingError
from embedcache.task import CLASSIFICATION, MULTILABEL, REGRESSION, Task
from embedcache.train import metrics
from embedcache.train.metrics import METRICS, interval, measure, metrics_of, score, scores
from embedcache.train.metrics.formulas import Predictions, Ranked, areas

TASKS = (CLASSIFICATION, MULTILABEL, REGRESSION)
N, C, R, K = 97, 5, 3, 7


def classification(seed: int, rows: int = N, classes: int = C, ties: bool = True) -> tuple[Any, Any]:
    """Labels and probabilities that go some way together; ``ties`` makes equal scores common."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, classes, rows)
    p = generator.dirichlet(np.ones(classes), rows) + 0.3 * np.eye(classes)[y]
    p = np.round(p, 1) + 0.05 if ties else p
    return y, p / p.sum(axis=1, keepdims=True)


def multilabel(seed: int, rows: int = N) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    y = generator.integers(0, 2, (rows, C)).astype(np.uint8)
    return y, np.round(np.clip(0.3 * y + generator.uniform(0, 0.7, y.shape), 0, 1), 2)


def regression(seed: int, rows: int = N, targets: int = R) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    y = np.round(generator.normal(5, 3, (rows, targets)), 1)
    return y, np.round(y + generator.normal(0, 2, y.shape), 1)


MAKE = {CLASSIFICATION: classification, MULTILABEL: multilabel, REGRESSION: regression}


def multiclass_brier(y: Any, p: Any) -> float:
    return oracle.brier_score_loss(y, p, labels=range(p.shape[1]))


ORACLES_CLASSIFICATION = {
    "accuracy": lambda y, p: oracle.accuracy_score(y, p.argmax(1)),
    "balanced_accuracy": lambda y, p: oracle.balanced_accuracy_score(y, p.argmax(1)),
    "f1_macro": lambda y, p: oracle.f1_score(y, p.argmax(1), average="macro", labels=np.unique(y), zero_division=0),
    "f1_weighted": lambda y, p: oracle.f1_score(y, p.argmax(1), average="weighted", zero_division=0),
    "mcc": lambda y, p: oracle.matthews_corrcoef(y, p.argmax(1)),
    "roc_auc": lambda y, p: np.mean([oracle.roc_auc_score(y == c, p[:, c]) for c in np.unique(y)]),
    "average_precision": lambda y, p: np.mean([oracle.average_precision_score(y == c, p[:, c]) for c in np.unique(y)]),
    "log_loss": lambda y, p: oracle.log_loss(y, p, labels=range(p.shape[1])),
    "brier": multiclass_brier,
}
ORACLES_MULTILABEL = {
    "subset_accuracy": lambda y, p: oracle.accuracy_score(y, p >= 0.5),
    "hamming_loss": lambda y, p: oracle.hamming_loss(y, p >= 0.5),
    "f1_micro": lambda y, p: oracle.f1_score(y, p >= 0.5, average="micro"),
    "f1_macro": lambda y, p: oracle.f1_score(y, p >= 0.5, average="macro", zero_division=0),
    "roc_auc": lambda y, p: oracle.roc_auc_score(y, p),
    "average_precision": lambda y, p: oracle.average_precision_score(y, p),
    "log_loss": lambda y, p: np.mean([oracle.log_loss(y[:, c], p[:, c], labels=[0, 1]) for c in range(C)]),
    "brier": lambda y, p: np.mean([oracle.brier_score_loss(y[:, c], p[:, c], labels=[0, 1]) for c in range(C)]),
}
ORACLES_REGRESSION = {
    "mae": oracle.mean_absolute_error,
    "rmse": oracle.root_mean_squared_error,
    "r2": oracle.r2_score,
    "pearson": lambda y, p: np.mean([scipy.stats.pearsonr(y[:, r], p[:, r])[0] for r in range(y.shape[1])]),
    "spearman": lambda y, p: np.mean([scipy.stats.spearmanr(y[:, r], p[:, r])[0] for r in range(y.shape[1])]),
}
ORACLES = {CLASSIFICATION: ORACLES_CLASSIFICATION, MULTILABEL: ORACLES_MULTILABEL, REGRESSION: ORACLES_REGRESSION}
EVERY = [(task, name) for task in TASKS for name in metrics_of(task)]


def test_every_metric_has_an_oracle_or_a_value_by_hand() -> None:
    assert {(task, name) for task in TASKS for name in ORACLES[task]} | {
        (CLASSIFICATION, "ece"),
        (MULTILABEL, "ece"),
    } == set(EVERY)


@pytest.mark.parametrize(("task", "name"), [(task, name) for task in TASKS for name in ORACLES[task]])
@given(seed=st.integers(0, 2**16), rows=st.integers(41, 131))
def test_equals_scikit_learn(task: Task, name: str, seed: int, rows: int) -> None:
    y, outputs = MAKE[task](seed, rows)
    assert score(name, task, y, outputs) == pytest.approx(ORACLES[task][name](y, outputs), rel=1e-11, abs=1e-12)


@given(seed=st.integers(0, 2**16), ties=st.booleans())
def test_two_classes_equal_scikit_learn(seed: int, ties: bool) -> None:
    """Of two classes the second is looked for, and the Brier score is halved, as scikit-learn has it."""
    y, p = classification(seed, 53, 2, ties)
    if len(np.unique(y)) == 2:
        expected = {
            "roc_auc": oracle.roc_auc_score(y, p[:, 1]),
            "average_precision": oracle.average_precision_score(y, p[:, 1]),
            "brier": oracle.brier_score_loss(y, p[:, 1]),
            "log_loss": oracle.log_loss(y, p[:, 1]),
            "mcc": oracle.matthews_corrcoef(y, p.argmax(1)),
        }
        for name, value in expected.items():
            assert score(name, CLASSIFICATION, y, p) == pytest.approx(value, rel=1e-11, abs=1e-12), name


@given(seed=st.integers(0, 2**16), rows=st.integers(1, 41), share=st.floats(0, 1), steps=st.integers(1, 13))
def test_two_ways_to_rank_are_one(seed: int, rows: int, share: float, steps: int) -> None:
    """The short way, for rows of equal weight, gives the areas of the long one; with many ties and with none."""
    generator = np.random.default_rng(seed)
    positive, score_ = generator.random(rows) < share, generator.integers(0, steps, rows) / steps
    short, ranked = areas(positive, score_), Ranked(positive, score_)
    ones = np.ones(rows)
    np.testing.assert_allclose(short, [ranked.roc_auc(ones), ranked.average_precision(ones)], rtol=1e-12)


def test_a_planted_fault_is_found() -> None:
    """Swap two columns, or judge rows in another order, and every metric notices."""
    for task, name in EVERY:
        y, outputs = MAKE[task](3)
        shuffled = outputs[np.random.default_rng(0).permutation(len(outputs))]
        assert abs(score(name, task, y, shuffled) - score(name, task, y, outputs)) > 1e-3, (task, name)


def test_calibration_error_by_hand() -> None:
    # Bins of 1/15: 0.9 and 0.92 share (13/15, 14/15], one of the two is right; 0.6 is alone at its bin's upper edge.
    p = np.array([[0.9, 0.1], [0.92, 0.08], [0.4, 0.6]])
    expected = (2 * abs(0.5 - 0.91) + abs(1 - 0.6)) / 3
    assert score("ece", CLASSIFICATION, np.array([0, 1, 1]), p) == pytest.approx(expected)
    found = metrics.reliability(CLASSIFICATION, np.array([0, 1, 1]), p)
    assert found["ece"] == pytest.approx(expected)
    filled = {number: each for number, each in enumerate(found["bins"]) if each["rows"]}
    assert sorted(filled) == [8, 13]
    assert filled[13] == {
        "low": 13 / 15, "high": 14 / 15, "rows": 2, "accuracy": 0.5, "confidence": pytest.approx(0.91),
    }  # fmt: skip
    assert found["bins"][0]["accuracy"] is None
    # Multi-label: every label counts, so 0.1 and 0.08 are judged as well.
    y = np.array([[1, 0], [0, 1], [0, 1]], np.uint8)
    by_label = (2 * abs(0.5 - 0.91) + 1 * abs(0 - 0.4) + 2 * abs(0.5 - 0.09) + abs(1 - 0.6)) / 6
    assert score("ece", MULTILABEL, y, p) == pytest.approx(by_label)


def test_measure_by_hand() -> None:
    y = np.array([0, 0, 1, 2, -1])
    p = np.array([[0.6, 0.2, 0.1, 0.1], [0.2, 0.6, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.2, 0.6], [0.25] * 4])
    measured = measure(CLASSIFICATION, y, p, ["a", "b", "c", "d"])
    assert measured["rows"] == 4
    assert measured["accuracy"] == 0.5
    assert measured["balanced_accuracy"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert measured["f1_macro"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert measured["log_loss"] == pytest.approx(-np.log([0.6, 0.2, 0.7, 0.2]).mean())
    assert measured["confusion_matrix"] == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert measured["missing_classes"] == ["d"]
    assert measured["per_class"] == [
        {"class": "a", "rows": 2, "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3)},
        {"class": "b", "rows": 1, "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3)},
        {"class": "c", "rows": 1, "precision": None, "recall": 0.0, "f1": 0.0},
        {"class": "d", "rows": 0, "precision": 0.0, "recall": None, "f1": None},
    ]


def test_intervals_of_what_is_looked_at() -> None:
    y, p = classification(11)
    found = measure(CLASSIFICATION, y, p, list("abcde")[:C], intervals=True)
    assert set(found["intervals"]) == {"accuracy", "f1_macro"}
    for name, (low, high) in found["intervals"].items():
        assert low < found[name] < high
        assert (low, high) == interval(CLASSIFICATION, y, p, name)
    right = measure(CLASSIFICATION, y, np.eye(C)[y], list("abcde")[:C], intervals=True)
    assert set(right["intervals"]) == {"accuracy"}, "no draw of rows that are all right can differ"
    low, high = right["intervals"]["accuracy"]
    assert 0.8 < low < high == 1
    constant = np.full((7, 1), 2.0)
    flat = measure(REGRESSION, constant, constant + 0.5, ["target"], intervals=True)
    assert set(flat["intervals"]) == {"rmse"}, "R2 of a constant is not defined"


def test_a_missing_class_is_named_and_not_averaged_away() -> None:
    """Classes that a split lacks change no average, wherever their columns stand."""
    y, p = classification(11)
    wide = np.zeros((N, C + 2))
    wide[:, [0, 1, 3, 4, 6]] = p
    y_wide = np.array([0, 1, 3, 4, 6])[y]
    names = list("abcdefg")
    narrow, measured = measure(CLASSIFICATION, y, p, names[:C]), measure(CLASSIFICATION, y_wide, wide, names)
    assert measured["missing_classes"] == ["c", "f"]
    for name in metrics_of(CLASSIFICATION):
        assert measured[name] == pytest.approx(narrow[name], rel=1e-12), name


def test_measure_multilabel_with_thresholds() -> None:
    y, p = multilabel(5)
    y[7, 3] = 255  # one unknown label makes the row unknown
    y[:, 2] = np.where(y[:, 2] == 255, 255, 0)
    thresholds = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    measured = measure(MULTILABEL, y, p, list("abcde"), thresholds=thresholds)
    kept = np.arange(N) != 7
    on = p[kept] >= thresholds
    assert measured["rows"] == N - 1
    assert measured["missing_classes"] == ["c"]
    assert measured["subset_accuracy"] == oracle.accuracy_score(y[kept], on)
    there = [0, 1, 3, 4]
    f1 = oracle.f1_score(y[kept][:, there], on[:, there], average="macro")
    assert measured["f1_macro"] == pytest.approx(f1)
    precision, recall, each, rows = oracle.precision_recall_fscore_support(y[kept], on, zero_division=0)
    for at in there:
        assert measured["per_class"][at] == {
            "class": "abcde"[at],
            "rows": rows[at],
            "precision": pytest.approx(precision[at]),
            "recall": pytest.approx(recall[at]),
            "f1": pytest.approx(each[at]),
        }


def test_measure_regression_with_targets() -> None:
    y, said = regression(2)
    y[5, 1] = np.nan
    kept = np.arange(N) != 5
    measured = measure(REGRESSION, y, said, ["u", "v", "w"])
    assert measured["rows"] == N - 1
    assert [each["target"] for each in measured["per_target"]] == ["u", "v", "w"]
    for at, each in enumerate(measured["per_target"]):
        assert each["rmse"] == pytest.approx(oracle.root_mean_squared_error(y[kept, at], said[kept, at]))
        assert each["r2"] == pytest.approx(oracle.r2_score(y[kept, at], said[kept, at]))
    assert measured["r2"] == pytest.approx(np.mean([each["r2"] for each in measured["per_target"]]))
    one = measure(REGRESSION, y[kept, 0], said[kept, 0], ["u"])
    assert one["mae"] == pytest.approx(oracle.mean_absolute_error(y[kept, 0], said[kept, 0]))


def degenerate() -> list[tuple[str, Any, Any, tuple[str, ...]]]:
    """What can go wrong with a split, and which metrics must still be numbers."""
    p = classification(1)[1]
    q = multilabel(1)[1]
    v = regression(1)[1]
    return [
        (CLASSIFICATION, np.zeros(N, int), p, ("accuracy", "log_loss", "f1_macro", "balanced_accuracy", "brier")),
        (CLASSIFICATION, np.full(N, -1), p, ()),
        (CLASSIFICATION, np.zeros(0, int), p[:0], ()),
        (CLASSIFICATION, np.zeros(1, int), p[:1], ("accuracy", "log_loss")),
        (CLASSIFICATION, np.zeros(N, int), np.eye(C)[np.ones(N, int)], ("accuracy", "log_loss", "f1_macro")),
        (MULTILABEL, np.zeros((N, C), np.uint8), q, ("subset_accuracy", "hamming_loss", "log_loss", "ece")),
        (MULTILABEL, np.ones((N, C), np.uint8), q, ("subset_accuracy", "f1_macro", "average_precision")),
        (MULTILABEL, np.full((N, C), 255, np.uint8), q, ()),
        (REGRESSION, np.full((N, R), 0.1), v, ("mae", "rmse")),
        (REGRESSION, v, np.full((N, R), 0.1), ("mae", "rmse", "r2")),
        (REGRESSION, v[:1], v[:1], ("mae", "rmse")),
        (REGRESSION, np.full((N, R), np.nan), v, ()),
    ]


@pytest.mark.parametrize(("task", "y", "outputs", "defined"), degenerate())
def test_what_is_not_defined_is_none(task: Task, y: Any, outputs: Any, defined: tuple[str, ...]) -> None:
    """No warning leaks, nothing is NaN in the JSON, and what can be said is said."""
    measured = measure(task, y, outputs, list("abcde")[: outputs.shape[1]])
    json.dumps(measured, allow_nan=False)
    for name in defined:
        assert isinstance(measured[name], float), name
    undefined = {CLASSIFICATION: "mcc", MULTILABEL: "roc_auc", REGRESSION: "pearson"}[task]
    assert measured[undefined] is None
    assert math.isnan(score(undefined, task, y, outputs))
    low, high = interval(task, y, outputs, undefined, draws=3)
    assert math.isnan(low)
    assert math.isnan(high)


def test_a_constant_prediction_has_no_correlation_but_a_convention() -> None:
    y = classification(4)[0]
    assert score("mcc", CLASSIFICATION, y, np.eye(C)[np.full(N, 2)]) == 0.0
    assert score("roc_auc", CLASSIFICATION, y, np.full((N, C), 1 / C)) == 0.5


@pytest.mark.parametrize(("task", "name"), EVERY)
@given(seed=st.integers(0, 2**16), single=st.booleans())
def test_stacked_equals_one_by_one(task: Task, name: str, seed: int, single: bool) -> None:
    """``scores`` gives the very bits of ``score``."""
    generator = np.random.default_rng(seed)
    y = MAKE[task](seed, 53)[0]
    outputs = np.stack([MAKE[task](seed + k, 53)[1] for k in range(K)]).astype(np.float32 if single else np.float64)
    if task == CLASSIFICATION:
        y = np.where(generator.random(53) < 0.1, -1, y)
    assert scores(name, task, y, outputs).tolist() == [score(name, task, y, outputs[k]) for k in range(K)]


@pytest.mark.parametrize(("task", "name"), EVERY)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_head_that_diverged_never_looks_good(task: Task, name: str, bad: float) -> None:
    y, outputs = MAKE[task](1)
    stack = np.stack([outputs] * K)
    stack[2, 13, 1] = bad
    found = scores(name, task, y, stack)
    assert np.isnan(found).tolist() == [k == 2 for k in range(K)]
    assert math.isnan(score(name, task, y, stack[2]))
    with pytest.raises(TrainingError, match="not finite in 1 of 97 rows, first in labelled row 13"):
        measure(task, y, stack[2], list("abcde")[: outputs.shape[1]])


@pytest.mark.parametrize(("task", "name"), EVERY)
def test_a_bootstrap_draw_is_the_metric_of_the_rows_drawn(task: Task, name: str) -> None:
    y, outputs = MAKE[task](8)
    drawn = metrics.resampled_scores(task, y, outputs, name, draws=5, seed=3)
    generator = np.random.default_rng(3)
    for value in drawn:
        rows = generator.integers(0, N, N)
        assert value == pytest.approx(score(name, task, y[rows], outputs[rows]), rel=1e-9, abs=1e-12)


def test_the_interval_covers_what_it_says() -> None:
    """Of 200 samples with a known accuracy of 0.7, the 90 % interval holds it in about 90 %."""
    generator = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        y = np.zeros(199, int)
        p = np.where(generator.random(199)[:, None] < 0.7, [[0.8, 0.2]], [[0.2, 0.8]])
        low, high = interval(CLASSIFICATION, y, p, "accuracy", 0.9, draws=200, seed=seed)
        held += low <= 0.7 <= high
    assert 165 <= held <= 195
    assert interval(CLASSIFICATION, y, p, "accuracy", seed=1) == interval(CLASSIFICATION, y, p, "accuracy", seed=1)
    assert interval(CLASSIFICATION, y, p, "accuracy", 0.5)[0] > interval(CLASSIFICATION, y, p, "accuracy", 0.99)[0]
    with pytest.raises(SpecError, match="level is 95"):
        interval(CLASSIFICATION, y, p, "accuracy", 95)


def test_default_metrics_and_directions() -> None:
    assert {task: task.default_metric for task in TASKS} == {
        CLASSIFICATION: "log_loss",
        MULTILABEL: "log_loss",
        REGRESSION: "rmse",
    }
    better, less = METRICS["accuracy"].better, METRICS["log_loss"].better
    assert better(0.6, 0.5)
    assert not better(0.5, 0.5)
    assert not less(0.6, 0.5)
    assert less(0.4, 0.5)
    for either in (better, less):
        assert either(0.4, math.nan)
        assert not either(math.nan, 0.4)
        assert not either(math.nan, math.nan)
    for task, name in EVERY:  # predictions as good as they get beat bad ones, in the metric's own direction
        y, outputs = MAKE[task](6)
        perfect = np.eye(C)[y] if task == CLASSIFICATION else y.astype(float)
        assert METRICS[name].better(score(name, task, y, perfect), score(name, task, y, outputs)), (task, name)


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("acuracy", CLASSIFICATION, r"no metric 'acuracy' \(did you mean accuracy"),
        ("accuracy", MULTILABEL, r"multilabel has no metric 'accuracy' \(did you mean subset_accuracy"),
        ("f1", CLASSIFICATION, "did you mean f1_macro or f1_weighted"),
        ("accuracy", REGRESSION, "regression has no metric 'accuracy': expected one of mae, rmse, r2"),
        ("zzz", REGRESSION, "there is no metric 'zzz': expected one of"),
    ],
)
def test_an_unknown_metric_names_the_nearest(name: str, task: Task, message: str) -> None:
    y, outputs = MAKE[task](1)
    for function in (lambda: score(name, task, y, outputs), lambda: interval(task, y, outputs, name)):
        with pytest.raises(SpecError, match=message):
            function()


@pytest.mark.parametrize(
    ("task", "y", "outputs", "message"),
    [
        (CLASSIFICATION, np.zeros(3, int), np.ones((2, 2)), r"y \(3,\) does not fit outputs \(2, 2\)"),
        (MULTILABEL, np.zeros((2, 3), int), np.ones((2, 2)), "does not fit"),
        (REGRESSION, np.zeros((2, 3)), np.ones((2, 2)), "does not fit"),
        (CLASSIFICATION, np.array([0, 2]), np.ones((2, 2)) / 2, "outputs have 2 columns"),
        (CLASSIFICATION, np.array([0, -2]), np.ones((2, 2)) / 2, "outputs have 2 columns"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(task: Task, y: Any, outputs: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Predictions(task, y, outputs)


@pytest.mark.parametrize("outputs", [[[3.0, -1.0], [0.5, 0.5]], [[0.9, 0.9], [0.5, 0.5]]])
def test_logits_are_no_probabilities(outputs: Any) -> None:
    with pytest.raises(TrainingError, match="outputs are not probabilities"):
        measure(CLASSIFICATION, np.array([0, 1]), np.array(outputs), ["a", "b"])


def test_scikit_learn_is_not_imported() -> None:
    code = "import embedcache.train.metrics, sys; print('sklearn' in sys.modules, 'scipy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
