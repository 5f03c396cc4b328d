"""The three tasks: their targets, their probabilities, their decisions, and that there is one object of each."""

from __future__ import annotations

import copy
import pickle
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from embedcache.errors import InputError, SpecError
from embedcache.spec import TASKS, TaskName
from embedcache.task import CLASSIFICATION, MULTILABEL, REGRESSION, Task, task_named

ALL = (CLASSIFICATION, MULTILABEL, REGRESSION)
LOGITS = arrays.arrays(np.float64, (5, 3), elements=st.floats(-700, 700))


def test_every_word_has_one_task_and_every_task_its_word() -> None:
    assert tuple(task.name for task in ALL) == TASKS == get_args(TaskName)
    assert [task_named(name) for name in TASKS] == list(ALL)
    assert [str(task) for task in ALL] == list(TASKS)


@pytest.mark.parametrize("task", ALL, ids=str)
def test_a_task_stays_the_same_object(task: Task) -> None:
    assert task_named(task) is task
    assert pickle.loads(pickle.dumps(task)) is task
    assert copy.deepcopy(task) is task
    assert {task: 1}[task_named(task.name)] == 1


@pytest.mark.parametrize("other", ["ranking", "", None, 2, ["classification"]])
def test_other_words_are_refused(other: Any) -> None:
    with pytest.raises(SpecError, match=r"unknown task .*expected one of classification, multilabel, regression"):
        task_named(other)


@pytest.mark.parametrize(
    ("task", "y", "labelled"),
    [
        (CLASSIFICATION, [0, -1, 2], [True, False, True]),
        (MULTILABEL, [[0, 1], [255, 255], [1, 1]], [True, False, True]),
        (REGRESSION, [[0.5, 2.0], [np.nan, np.nan], [3.0, 5.0]], [True, False, True]),
    ],
)
def test_rows_without_label(task: Task, y: Any, labelled: list[bool]) -> None:
    y = np.array(y, task.dtype)
    assert task.labelled(y).tolist() == labelled
    assert y.shape == task.target_shape(3, 2)
    checked, kept = task.checked_targets(y, "training", 3 if task is CLASSIFICATION else 2)
    assert kept.tolist() == labelled
    assert checked.dtype == task.dtype
    np.testing.assert_array_equal(checked, y)
    missing = np.full(task.target_shape(5, 2), task.unlabelled, task.dtype)
    assert not task.labelled(missing).any()


@pytest.mark.parametrize(
    ("task", "y", "message"),
    [
        (CLASSIFICATION, [[0], [1]], "classification targets are int64"),
        (CLASSIFICATION, [0.0, 1.0], "classification targets are int64"),
        (CLASSIFICATION, [0, 2], "row 1 has the class 2: expected 0 to 1, or -1"),
        (CLASSIFICATION, [0, -2], "row 1 has the class -2"),
        (MULTILABEL, [0, 1], "multi-label targets are"),
        (MULTILABEL, [[0, 1], [0, 7]], "row 1 has labels other than 0 and 1"),
        (MULTILABEL, [[0, 1], [0, 255]], "row 1 has labels other than 0 and 1"),
        (MULTILABEL, [[0, 1, 1]], "targets are 3 wide, and there are 2 names"),
        (REGRESSION, [[1.0, 2.0], [np.inf, 1.0]], "row 1 has an infinite target"),
        (REGRESSION, [[1.0, 2.0], [1e101, 1.0]], "row 1 has a target beyond 1e\\+100: scale it down"),
        (REGRESSION, [[1.0, 2.0], [np.nan, 1.0]], "row 1 has a target that is NaN"),
        (REGRESSION, [1.0, 2.0], "targets are 1 wide, and there are 2 names"),
    ],
)
def test_targets_that_do_not_fit_are_refused(task: Task, y: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"validation: .*{message}|validation: {message}"):
        task.checked_targets(np.array(y), "validation", 2)


@given(LOGITS)
def test_probabilities_are_probabilities_and_keep_the_decision(logits: Any) -> None:
    p = CLASSIFICATION.probabilities(logits)
    np.testing.assert_allclose(p.sum(axis=1), 1)
    assert (p[np.arange(5), CLASSIFICATION.decide(logits)] == p.max(axis=1)).all()
    p = MULTILABEL.probabilities(logits)
    assert ((p >= 0) & (p <= 1)).all()
    on = MULTILABEL.decide(p)
    assert on[logits >= 0].all()
    assert not on[logits < -1e-9].any()
    np.testing.assert_array_equal(REGRESSION.probabilities(logits), logits)
    assert REGRESSION.decide(logits) is logits


def test_right_rows_and_their_losses() -> None:
    y = np.array([0, 2])
    p = np.array([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
    assert CLASSIFICATION.right(y, CLASSIFICATION.decide(p)).tolist() == [1, 0]
    np.testing.assert_allclose(CLASSIFICATION.row_loss(y, p), np.log([2, 4]))
    labels = np.array([[1, 0, 0], [1, 0, 1]])
    assert MULTILABEL.right(labels, MULTILABEL.decide(p)).tolist() == [1, 0]
    assert MULTILABEL.right(labels, MULTILABEL.decide(p, np.array([0.5, 0.5, 0.25]))).tolist() == [0, 1]
    np.testing.assert_allclose(
        MULTILABEL.row_loss(labels, p), [-np.log([0.5, 0.75, 0.75]).mean(), -np.log([0.5, 0.75, 0.25]).mean()]
    )
    with pytest.raises(SpecError, match="regression has no probabilities"):
        REGRESSION.row_loss(np.zeros((2, 3)), p)
    assert CLASSIFICATION.positive(y, 2).tolist() == [False, True]
    assert MULTILABEL.positive(labels, 2).tolist() == [False, True]


def test_rows_are_counted_and_named() -> None:
    names, labels = ["a", "b", "c"], np.array([[1, 0, 1], [0, 0, 0], [255, 255, 255], [0, 0, 1]], np.uint8)
    counts = [
        CLASSIFICATION.counts(np.array([2, 0, -1, 2]), 3), MULTILABEL.counts(labels, 3), REGRESSION.counts(labels, 3)
    ]  # fmt: skip
    assert [None if each is None else each.tolist() for each in counts] == [[1, 0, 2], [1, 0, 2], None]
    assert CLASSIFICATION.named(np.int64(1), names) == "b"
    assert [MULTILABEL.named(row, names) for row in labels[:2]] == [("a", "c"), ()]
    assert REGRESSION.named(np.array([1.5, 2.0]), names) == (1.5, 2.0)


@pytest.mark.parametrize(
    ("task", "good", "bad", "fault"),
    [
        (CLASSIFICATION, [-1, 0, 4], [-1, 0, 5], "-1 to 5, expected at least -1 and below 5"),
        (CLASSIFICATION, [], [-2], "-2 to -2, expected at least -1 and below 5"),
        (MULTILABEL, [[0, 1, 255]], [[0, 2, 1]], "something other than 0, 1 and 255"),
        (REGRESSION, [[np.nan, -3.0]], [[np.inf, 1.0]], "infinity"),
    ],
)
def test_stored_targets_that_cannot_be(task: Task, good: list[Any], bad: list[Any], fault: str) -> None:
    assert task.stored_fault(np.array(good, task.dtype), 5) is None
    assert task.stored_fault(np.array(bad, task.dtype), 5) == fault
