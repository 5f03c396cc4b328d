"""The facts of a summary: the data, measured scores, mistakes; and notes on how far to trust them."""

from __future__ import annotations

import base64
import os
import platform
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from embedcache.dataset import evenly_spread
from embedcache.examples import CONTENTS, content_of
from embedcache.features import Rows
from embedcache.spec import ExtractionSpec
from embedcache.sweep.problem import Problem
from embedcache.sweep.summary import (
    Bin,
    Calibration,
    Confusion,
    DataFacts,
    FeatureSetFacts,
    Interval,
    LeaderboardRow,
    Measured,
    Mistake,
    Mistakes,
    ProtocolFacts,
)
from embedcache.task import CLASSIFICATION, MULTILABEL, REGRESSION, Array, Floats, Named
from embedcache.train.metrics import measure, reliability
from embedcache.version import versions_of
from embedcache.wording import counted

POINTS = 2000
MISTAKES = 50
_PACKAGES = ("embedcache", "numpy", "scipy", "scikit-learn", "torch", "safetensors", "h5py")


def data_facts(problem: Problem) -> DataFacts:
    """Return what was swept over."""
    cache = problem.cache
    provenance = cache.provenance()
    classes = None
    if problem.task is CLASSIFICATION:
        codes, targets = cache.split_codes(), cache.targets()
        classes = {
            name: {
                split: int(((codes == code) & (targets == label)).sum()) for code, split in enumerate(cache.split_names)
            }
            for label, name in enumerate(problem.class_names)
        }
    return DataFacts(
        name=cache.path.resolve().name,
        model=provenance[-1].get("model") if provenance else None,
        rows=cache.split_sizes(),
        development_rows=int(problem.learnable.sum()),
        unique_rows=problem.strata.groups,
        feature_sets=tuple(
            FeatureSetFacts(feature.name, feature.kind, feature.dim, feature.layers)
            for feature in cache.plain_sets.values()
        ),
        classes=classes,
    )


def protocol_facts(problem: Problem) -> ProtocolFacts:
    """Return how heads were compared."""
    plan = problem.protocol
    few = plan.shots is not None
    return ProtocolFacts(
        kind=plan.kind,
        folds=None if few else plan.folds,
        repeats=None if few else plan.repeats,
        shots=plan.shots,
        draws=plan.draws if few else None,
        seed=plan.seed,
        stopping_share=plan.stopping_share,
        alpha=plan.alpha,
        text=plan.text(),
    )


def measured(problem: Problem, y: Array, outputs: Array, thresholds: Sequence[float]) -> Measured:
    """Return everything that is measured of outputs on some rows."""
    metrics = measure(problem.task, y, outputs, problem.class_names, thresholds=thresholds)
    confusion, calibration = None, None
    if problem.task is CLASSIFICATION:
        matrix = np.asarray(metrics["confusion_matrix"], np.float64)
        shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        confusion = Confusion(
            tuple(problem.class_names),
            tuple(map(tuple, metrics["confusion_matrix"])),
            tuple(map(tuple, shares.tolist())),
        )
    regression = problem.task is REGRESSION
    if not regression:
        curve = reliability(problem.task, y, outputs)
        calibration = Calibration(curve["ece"], tuple(Bin(**values) for values in curve["bins"]))
    return Measured(
        metrics={name: value for name, value in metrics.items() if name not in ("confusion_matrix", "per_class")},
        confusion=confusion,
        per_class=tuple(metrics["per_target"] if regression else metrics["per_class"]),
        calibration=calibration,
        points=_points(problem, y, outputs) if regression else None,
    )


def _points(problem: Problem, y: Array, outputs: Array) -> dict[str, tuple[Interval, ...]]:
    rows = evenly_spread(len(y), POINTS)
    return {
        name: tuple(zip(y[rows, column].tolist(), outputs[rows, column].tolist(), strict=True))
        for column, name in enumerate(problem.class_names)
    }


def mistakes(
    problem: Problem, split: str, rows: Rows, y: Array, outputs: Array, thresholds: Sequence[float]
) -> Mistakes:
    """Return the most confident mistakes among ``rows`` of the cache, with what the rows hold where it was kept."""
    limits = np.asarray(thresholds)
    wrong, weight = _wrong(problem, y, outputs, limits)
    worst = wrong[np.argsort(-weight[wrong], kind="stable")][:MISTAKES]
    names, contents = problem.cache.ids(), problem.cache.inputs()
    shown = []
    for place in worst.tolist():
        row = int(rows[place])
        true, predicted, probability = _decision(problem, y[place], outputs[place], limits)
        text, image = preview(problem.cache.spec, None if contents is None else contents[row])
        error = float(weight[place]) if problem.task is REGRESSION else None
        shown.append(Mistake(row, names[row], true, predicted, probability, error, text, image))
    return Mistakes(split, len(wrong), tuple(shown))


def _wrong(problem: Problem, y: Array, outputs: Array, thresholds: Array) -> tuple[npt.NDArray[np.int64], Floats]:
    """Return the wrong rows, and of every row how confidently wrong it is: [N]."""
    if problem.task is CLASSIFICATION:
        return np.flatnonzero(outputs.argmax(axis=1) != y), outputs.max(axis=1, initial=0.0)
    if problem.task is MULTILABEL:
        off = (outputs >= thresholds) != (y == 1)
        return np.flatnonzero(off.any(axis=1)), np.where(off, np.abs(outputs - y), 0.0).max(axis=1, initial=0.0)
    spread = np.where(y.std(axis=0) > 0, y.std(axis=0), 1.0)
    error = np.abs(outputs - y) / spread
    return np.arange(len(y)), error.max(axis=1, initial=0.0)


def _decision(problem: Problem, y: Array, outputs: Array, thresholds: Array) -> tuple[Named, Named, float | None]:
    """Return what a row is, what was predicted, and with which probability; see ``Mistake``."""
    names, task = problem.class_names, problem.task
    decided = task.decide(outputs, thresholds)
    true, predicted = task.named(y, names), task.named(decided, names)
    if task is REGRESSION:
        return true, predicted, None
    off = decided != (y == 1)
    column = int(decided) if task is CLASSIFICATION else int(np.where(off, np.abs(outputs - y), -1.0).argmax())
    return true, predicted, float(outputs[column])


def preview(spec: ExtractionSpec, data: bytes | None) -> tuple[str | None, str | None]:
    """Return a row's content as a text, or as the data: URI of a small picture."""
    kind = spec.content or "text"
    if data is None or kind not in CONTENTS:
        return None, None
    text, image = content_of(kind, spec.pixel_range).preview(data)
    return text, None if image is None else f"data:image/png;base64,{base64.b64encode(image).decode()}"


def machine() -> dict[str, object]:
    """Return where the sweep ran."""
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch is not None else None
    return {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": threads}


def versions() -> dict[str, str]:
    """Return the versions of what a sweep depends on."""
    return {"python": platform.python_version(), **versions_of(*_PACKAGES)}


# Notes on how far to trust the results of a sweep.


def notes_on(problem: Problem, rows: Sequence[LeaderboardRow]) -> list[str]:
    """Return notes on how far to trust the results on a problem, a line each."""
    notes = []
    duplicates = len(problem) - problem.strata.groups
    if duplicates and not problem.protocol.to_test:
        what = "row of train and validation has" if duplicates == 1 else "rows of train and validation have"
        notes.append(f"{duplicates:,} {what} the content of another, and its fold")
    if not len(problem.test_rows):
        notes.append(
            "the cache has no labelled test split: nothing here was measured on rows that no choice was made by"
        )
    notes += _edges(rows) if problem.published is None else []  # a protocol's grid is not to be gone beyond
    if any(row.head.kind == "majority" and not row.distinguishable for row in rows) and len(rows) > 1:
        notes.append("these rows cannot tell the best head from one that always says the same: more rows are needed")
    unseen: list[int] = []
    if problem.task is CLASSIFICATION:
        unseen = sorted({*problem.test_y.tolist()} - {*problem.y[problem.learnable].tolist()})
    if unseen:
        names = ", ".join(problem.class_names[label] for label in unseen[:5])
        notes.append(f"the test split has classes that no other row has, so no head can know them: {names}")
    looked = sum(row.looked_at_test for row in rows)
    if looked > 1:
        notes.append(
            f"the test split has been looked at with {counted(looked, 'head')}: "
            "the best of their scores there is flattered"
        )
    if problem.protocol.kind == "split":
        notes.append("one split only: its rows decide everything, and the spread over training sets is not seen")
    return notes


def _edges(rows: Sequence[LeaderboardRow]) -> list[str]:
    """Say which settings of the winner lie at the end of what was tried: the best may lie beyond."""
    best = rows[0]
    alike = [
        row for row in rows
        if (row.head.kind, row.head.engine) == (best.head.kind, best.head.engine)
        and row.train.get("solver") == best.train.get("solver")
    ]  # fmt: skip
    notes = []
    for name, value in best.varied.items():
        tried = sorted(tried for row in alike if isinstance(tried := row.varied.get(name), (int, float)))
        if isinstance(value, (int, float)) and len({*tried}) >= 3 and value in (tried[0], tried[-1]) and value != 0:
            end = "largest" if value == tried[-1] else "smallest"
            notes.append(f"the winner's {name} is the {end} tried ({value:g}): the best may lie beyond")
    return notes
