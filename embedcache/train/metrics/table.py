"""Which metrics there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from embedcache.errors import SpecError
from embedcache.spec import TaskName
from embedcache.task import CLASSIFICATION, MULTILABEL, REGRESSION, Task, task_named
from embedcache.train.metrics import formulas
from embedcache.train.metrics.formulas import Prepared
from embedcache.train.metrics.predictions import Predictions


@dataclass(frozen=True)
class Metric:
    """One number that heads are judged by.

    Attributes:
        name: how it is asked for.
        greater_is_better: its direction.
        of: for each task that has it, a function from ``Predictions`` to a function from weights float64 [N].
    """

    name: str
    greater_is_better: bool
    of: Mapping[Task, Callable[[Predictions], Prepared]]

    def prepare(self, predictions: Predictions) -> Prepared:
        """Return the metric of some predictions as a function of the weights of their rows, float64 [N]."""
        return self.of[predictions.task](predictions)

    def better(self, new: float, old: float) -> bool:
        """Whether ``new`` is strictly better; NaN never is, and anything is better than NaN."""
        if math.isnan(new) or math.isnan(old):
            return math.isnan(old) and not math.isnan(new)
        return new > old if self.greater_is_better else new < old


def _table() -> dict[str, Metric]:
    one, many, value = CLASSIFICATION, MULTILABEL, REGRESSION
    rows: list[tuple[str, bool, Mapping[Task, Callable[[Predictions], Prepared]]]] = [
        ("accuracy", True, {one: formulas.accuracy}),
        ("subset_accuracy", True, {many: formulas.accuracy}),
        ("hamming_loss", False, {many: formulas.hamming}),
        ("balanced_accuracy", True, {one: formulas.of_counts(formulas.balanced_accuracy)}),
        ("f1_micro", True, {many: formulas.of_counts(formulas.f1_micro)}),
        ("f1_macro", True, dict.fromkeys((one, many), formulas.of_counts(formulas.f1_macro))),
        ("f1_weighted", True, {one: formulas.of_counts(formulas.f1_weighted)}),
        ("mcc", True, {one: formulas.of_counts(formulas.mcc)}),
        ("roc_auc", True, dict.fromkeys((one, many), formulas.of_ranks("roc_auc"))),
        ("average_precision", True, dict.fromkeys((one, many), formulas.of_ranks("average_precision"))),
        ("log_loss", False, dict.fromkeys((one, many), formulas.log_loss)),
        ("brier", False, dict.fromkeys((one, many), formulas.brier)),
        ("ece", False, dict.fromkeys((one, many), formulas.ece)),
        ("mae", False, {value: formulas.of_targets(formulas.mae)}),
        ("rmse", False, {value: formulas.of_targets(formulas.rmse)}),
        ("r2", True, {value: formulas.of_targets(formulas.r2)}),
        ("pearson", True, {value: formulas.of_targets(formulas.pearson)}),
        ("spearman", True, {value: formulas.of_targets(formulas.spearman)}),
    ]
    return {name: Metric(name, greater, prepare) for name, greater, prepare in rows}


METRICS: Mapping[str, Metric] = _table()
"""Every metric by name."""


def metrics_of(task: Task | TaskName) -> tuple[str, ...]:
    """Return the names of the metrics that a task has."""
    task = task_named(task)
    return tuple(name for name, metric in METRICS.items() if task in metric.of)


def metric_named(name: str, task: Task | TaskName) -> Metric:
    """Return a metric. Raises ``SpecError`` for a name that the task does not have, with the nearest ones."""
    task, metric = task_named(task), METRICS.get(name)
    if metric is not None and task in metric.of:
        return metric
    there = metrics_of(task)
    # A part of the name counts as near too: accuracy is subset_accuracy where rows have several labels.
    near = [known for known in there if name in known] + get_close_matches(name, there, 2)
    hint = f" (did you mean {' or '.join(dict.fromkeys(near))}?)" if near else ""
    what = "there is no metric" if metric is None else f"{task} has no metric"
    raise SpecError(f"{what} {name!r}{hint}: expected one of {', '.join(there)}")
