"""Which metrics there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from embedcache.errors import SpecError
from embedcache.spec import TASKS, TaskName
from embedcache.train.metrics import formulas
from embedcache.train.metrics.formulas import Prepared
from embedcache.train.metrics.judged import Judged


@dataclass(frozen=True)
class Metric:
    """One number that heads are judged by.

    Attributes:
        name: how it is asked for.
        greater_is_better: its direction.
        prepare: for each task that has it, a function from ``Judged`` to a function from weights float64 [N].
    """

    name: str
    greater_is_better: bool
    prepare: Mapping[TaskName, Callable[[Judged], Prepared]]

    def better(self, new: float, old: float) -> bool:
        """Whether ``new`` is strictly better; NaN never is, and anything is better than NaN."""
        if math.isnan(new) or math.isnan(old):
            return math.isnan(old) and not math.isnan(new)
        return new > old if self.greater_is_better else new < old


def _table() -> dict[str, Metric]:
    one, many, value = TASKS
    rows: list[tuple[str, bool, Mapping[TaskName, Callable[[Judged], Prepared]]]] = [
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


def metrics_of(task: TaskName) -> tuple[str, ...]:
    """Return the names of the metrics that a task has."""
    return tuple(name for name, metric in METRICS.items() if task in metric.prepare)


def default_metric(task: TaskName) -> str:
    """Return what training is judged by when nobody says: log loss, or the root mean squared error.

    Both are smooth and proper: on a few hundred validation rows accuracy moves in steps, stands still for epochs in
    which the head still learns, and ties half the epochs with one another. People are shown accuracy all the same.
    """
    return "rmse" if task == "regression" else "log_loss"


def metric_named(name: str, task: TaskName) -> Metric:
    """Return a metric. Raises ``SpecError`` for a name that the task does not have, with the nearest ones."""
    metric = METRICS.get(name)
    if metric is not None and task in metric.prepare:
        return metric
    there = metrics_of(task)
    # A part of the name counts as near too: accuracy is subset_accuracy where rows have several labels.
    near = [each for each in there if name in each] + get_close_matches(name, there, 2)
    hint = f" (did you mean {' or '.join(dict.fromkeys(near))}?)" if near else ""
    what = "there is no metric" if metric is None else f"{task} has no metric"
    raise SpecError(f"{what} {name!r}{hint}: expected one of {', '.join(there)}")
