"""``summary.json``: everything a sweep found, in one file; with ``results.jsonl`` it is all that a report reads.

Strict JSON: no NaN, a number that does not exist is null. *score* always means the sweep's metric, in its own direction
(``metric.greater_is_better``). Splits are called by the cache's own names; *development rows* are all rows of train and
validation, in the order of the cache. Keys of version 1 stay; new ones may be added::

    format, version      "embedcache-sweep", 1
    complete             false while the sweep runs and after it was interrupted: what follows is then a part
    task                 "classification" | "multilabel" | "regression"
    class_names          [str]; the names of the targets for regression
    metric               {name, greater_is_better}
    baseline             the best score of a majority head among those tried: float | null
    data                 {name: the cache folder's name, model: str|null, rows: {split: int}, development_rows,
                         unique_rows, feature_sets: [{name, kind: "pooled"|"layers"|"tokens", dim, layers}],
                         classes: {class: {split: rows}} | null}
    protocol             {kind: "folds"|"split"|"shots", folds, repeats, shots|null, draws|null, seed,
                         stopping_share, alpha, text: one sentence for people}
    leaderboard          [row], best score first. A row is one candidate: a configuration whatever its seed, for seeds
                         are repetitions and nobody may choose the lucky one.
      rank, id, label    1..; 16 hex digits; one line for people such as "linear lr=0.003 wd=0.01 · mean"
      feature            name of the feature set, such as "l2:mean@-2"
      pooling, layers, normalize     the same in parts: "mean", "-2", true; layers is "all", "-1" or "1+3"; null
                         when the name does not parse
      head               {kind, engine, options}
      train              {every field of TrainSpec except seed} ; only those that this kind of head reads
      varied             {name: value}, the settings that differ within the sweep, head options as "hidden"; for plots
                         of score against a hyper-parameter. Values are numbers, strings, booleans, null or lists.
      seeds              [int]
      score, sd          mean over folds of the mean over seeds; standard deviation over folds (null for one)
      interval           [low, high] at 1 - alpha for the score; interval_method says how: "nadeau-bengio" (corrected
                         resampled t), "bootstrap" (over rows) or "wilson" (all or no rows right)
      fold_scores        [float], one a fold, mean over seeds
      difference         {value, interval: [low, high]}: this score less the winner's, paired on the same rows; the
                         winner's own is 0 and [0, 0]
      p, p_adjusted      paired test against the winner, and with Holm's correction; null for the winner
      p_folds            the same by the corrected resampled t over folds, for comparison; null when there is none
      test_method        "mcnemar-exact" | "paired-bootstrap" | null for the winner
      distinguishable    false: the data cannot tell it from the winner (always false for the winner)
      parameters         numbers in the trained head (for kNN the rows it keeps)
      seconds            of training, all folds and seeds; a head's share of the stack it was trained in
      epochs             mean epochs that were run; null where there are none
      looked_at_test     whether the test split was ever used for it
      test               {score, interval, rows} | null
    failures             [{id, label, error}] configurations that could not be trained; not in the leaderboard
    chosen               {id, label, why}; the winner, or the simplest of those not distinguishable from it with
                         --choose simplest. best/ holds it.
    recommended          {id, label, why}; the simplest of those not distinguishable from the winner
    test                 the chosen head on the test split, trained on the development rows; null without a test split
      id, label, split, rows, score, interval, interval_method (as above), trained_on: rows
      metrics            what train.measure gives (scalars of every metric, and more)
      confusion          classification: {labels, matrix: [[rows]] with truth down and prediction across,
                         normalized: the same with each true row summing to 1}; else null
      per_class          [{class, rows, precision, recall, f1}]; regression: [{target, rows, mae, rmse, r2}]
      calibration        {ece, bins: [{low, high, confidence|null, accuracy|null, rows}]}; confidence is of the
                         predicted class (multilabel: the probability of a label, and accuracy how often it holds);
                         null for regression
      points             regression: {target: [[true, predicted], ...]} at most 2,000 rows; else null
    mistakes             {split, rows: how many mistakes there are, shown: [mistake]}, the most confident first, at
                         most 50; on the test split, or out of fold on the development rows where there is none
      row, id            the row's number in the cache and its id
      true, predicted    names; lists of names (multilabel); numbers per target (regression)
      probability        of the predicted class (multilabel: of the most wrongly decided label); null for regression
      error              regression: the largest absolute error over targets in units of that target's spread; else null
      text, image        the row's content where the cache kept its inputs: text (at most 2,000 characters), or a data:
                         URI of a picture of at most 96 x 96; else null
    learning_curve       [{id, label, points: [{rows: training rows, score, sd, interval, scores}]}]; [] if not asked
    few_shot             {shots, draws, scores: of the chosen head on test, one a draw, score, sd} | null
    ran                  {command: str|null, versions: {package: version}, cache_spec: hash, dataset: hash,
                         sweep: hash of sweep.json's identity, configurations, fits, started, finished: ISO 8601 UTC,
                         seconds, machine: {platform, cpus, threads}}
    notes                [str] for people

``results.jsonl`` has one line for each configuration and fold::

    id           the configuration with its seed: 16 hex digits
    candidate    the leaderboard's id
    fold         0..; counts through repeats and draws
    repeat       which repeat or draw
    train_rows   rows it learnt from, and eval_rows, rows it was scored on
    score        float | null
    metrics      {name: float|null} scalars on the fold
    feature, head, train    as above, train with its seed
    parameters, seconds, epochs
    curve        null, or the number of training rows where the line is a point of a learning curve
    error        null, or why it could not be trained
"""

from __future__ import annotations

import base64
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from embedcache.spec import TaskName
from embedcache.sweep.problem import Problem
from embedcache.train.metrics import measure, reliability

Array = npt.NDArray[Any]

POINTS = 2000
MISTAKES = 50
_TEXT = 2000
_SIDE = 96
_PACKAGES = ("embedcache", "numpy", "scipy", "scikit-learn", "torch", "safetensors", "h5py")
_PICTURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}


def data_facts(problem: Problem) -> dict[str, Any]:
    """Return what was swept over."""
    cache = problem.cache
    provenance = cache.provenance()
    classes = None
    if problem.task == "classification":
        codes, targets = cache.split_codes(), cache.targets()
        classes = {
            name: {
                split: int(((codes == code) & (targets == at)).sum()) for code, split in enumerate(cache.split_names)
            }
            for at, name in enumerate(problem.class_names)
        }
    return {
        "name": cache.path.resolve().name,
        "model": provenance[-1].get("model") if provenance else None,
        "rows": cache.split_sizes(),
        "development_rows": len(problem),
        "unique_rows": problem.strata.groups,
        "feature_sets": [
            {"name": each.name, "kind": each.kind, "dim": each.dim, "layers": each.layers}
            for each in cache.feature_sets.values()
        ],
        "classes": classes,
    }


def protocol_facts(problem: Problem) -> dict[str, Any]:
    """Return how heads were compared."""
    plan = problem.protocol
    return {
        "kind": plan.kind,
        "folds": None if plan.shots is not None else plan.folds,
        "repeats": None if plan.shots is not None else plan.repeats,
        "shots": plan.shots,
        "draws": plan.draws if plan.shots is not None else None,
        "seed": plan.seed,
        "stopping_share": plan.stopping_share,
        "alpha": plan.alpha,
        "text": plan.text(),
    }


def measured(problem: Problem, y: Array, outputs: Array, thresholds: Sequence[float] | None) -> dict[str, Any]:
    """Return all there is to say of outputs on some rows: metrics, confusion, classes, calibration, points."""
    metrics = measure(problem.task, y, outputs, problem.class_names, thresholds=thresholds)
    confusion = None
    if problem.task == "classification":
        matrix = np.asarray(metrics["confusion_matrix"], np.float64)
        rows = matrix.sum(axis=1, keepdims=True)
        confusion = {
            "labels": list(problem.class_names),
            "matrix": metrics["confusion_matrix"],
            "normalized": (matrix / np.maximum(rows, 1)).tolist(),
        }
    regression = problem.task == "regression"
    return {
        "metrics": {name: value for name, value in metrics.items() if name not in ("confusion_matrix", "per_class")},
        "confusion": confusion,
        "per_class": metrics["per_target"] if regression else metrics["per_class"],
        "calibration": None if regression else reliability(problem.task, y, outputs),
        "points": _points(problem, y, outputs) if regression else None,
    }


def _points(problem: Problem, y: Array, outputs: Array) -> dict[str, list[list[float]]]:
    rows = np.unique(np.linspace(0, len(y) - 1, min(POINTS, len(y))).astype(np.int64))
    return {
        name: np.stack([y[rows, at], outputs[rows, at]], axis=1).tolist() for at, name in enumerate(problem.class_names)
    }


def mistakes(
    problem: Problem, split: str, rows: npt.NDArray[np.int64], y: Array, outputs: Array, thresholds: Sequence[float]
) -> dict[str, Any]:
    """Return the most confident mistakes among ``rows`` of the cache, with what the rows hold where it was kept."""
    wrong, weight = _wrong(problem.task, y, outputs, np.asarray(thresholds))
    order = wrong[np.argsort(-weight[wrong], kind="stable")][:MISTAKES]
    names, contents = problem.cache.ids(), problem.cache.inputs()
    shown = []
    for at in order.tolist():
        true, predicted, probability = _said(problem, y[at], outputs[at], np.asarray(thresholds))
        row = int(rows[at])
        error = float(weight[at]) if problem.task == "regression" else None
        shown.append(
            {
                "row": row, "id": names[row], "true": true, "predicted": predicted, "probability": probability,
                "error": error, **_content(None if contents is None else contents[row]),
            }
        )  # fmt: skip
    return {"split": split, "rows": len(wrong), "shown": shown}


def _wrong(task: TaskName, y: Array, outputs: Array, thresholds: Array) -> tuple[npt.NDArray[np.int64], Array]:
    """Return which rows are wrong, and how confidently: [N]."""
    if task == "classification":
        return np.flatnonzero(outputs.argmax(axis=1) != y), outputs.max(axis=1, initial=0.0)
    if task == "multilabel":
        off = (outputs >= thresholds) != (y == 1)
        return np.flatnonzero(off.any(axis=1)), np.where(off, np.abs(outputs - y), 0.0).max(axis=1, initial=0.0)
    spread = np.where(y.std(axis=0) > 0, y.std(axis=0), 1.0)
    error = np.abs(outputs - y) / spread
    return np.arange(len(y)), error.max(axis=1, initial=0.0)


def _said(problem: Problem, y: Any, outputs: Array, thresholds: Array) -> tuple[Any, Any, float | None]:
    names = problem.class_names
    if problem.task == "classification":
        at = int(outputs.argmax())
        return names[int(y)], names[at], float(outputs[at])
    if problem.task == "regression":
        return [float(each) for each in y], [float(each) for each in outputs], None
    on = outputs >= thresholds
    off = on != (y == 1)
    worst = int(np.where(off, np.abs(outputs - y), -1.0).argmax())
    true = [name for name, label in zip(names, y, strict=True) if label == 1]
    return true, [name for name, label in zip(names, on, strict=True) if label], float(outputs[worst])


def _content(data: bytes | None) -> dict[str, str | None]:
    """Return a row's content as a text or a small picture."""
    if data is None:
        return {"text": None, "image": None}
    if any(data.startswith(start) for start in _PICTURES):
        return {"text": None, "image": _thumbnail(data)}
    try:
        return {"text": data.decode("utf-8")[:_TEXT], "image": None}
    except UnicodeDecodeError:
        return {"text": None, "image": None}


def _thumbnail(data: bytes) -> str | None:
    import io

    try:
        from PIL import Image
    except ImportError:
        # Small ones can be shown as they are.
        kind = next(name for start, name in _PICTURES.items() if data.startswith(start))
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}" if len(data) <= 20_000 else None
    try:
        with Image.open(io.BytesIO(data)) as picture:
            small = picture.convert("RGB")
            small.thumbnail((_SIDE, _SIDE))
            out = io.BytesIO()
            small.save(out, "PNG")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def machine() -> dict[str, Any]:
    """Return where the sweep ran."""
    import sys

    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch is not None else None
    return {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": threads}


def versions() -> dict[str, str]:
    """Return the versions of what a sweep depends on."""
    out = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def strict(value: Any) -> Any:
    """Return JSON values with null for every number that is not finite."""
    if isinstance(value, Mapping):
        return {str(name): strict(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(each) for each in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
