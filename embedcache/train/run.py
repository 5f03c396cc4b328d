"""One head, or many of one shape, from features in hand: trained by each engine, calibrated on validation."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from embedcache.arguments import checks_arguments
from embedcache.errors import SpecError, TrainingError, warn
from embedcache.heads import TrainedHead
from embedcache.heads.registry import head_named
from embedcache.numerics import Probe
from embedcache.shard import FeatureSet
from embedcache.spec import ExtractionSpec, HeadSpec, TaskName, TrainSpec
from embedcache.task import CLASSIFICATION, MULTILABEL, Array, Flags, Floats, task_named
from embedcache.train.data import LabelledRows, checked_names, constants_note, labelled_rows_of, refuse_untrainable
from embedcache.train.metrics import measure
from embedcache.train.metrics.measuring import MetricValues
from embedcache.train.parts import Parts
from embedcache.train.result import Fitted, Observe, Origin, TrainingResult
from embedcache.wording import counted

if TYPE_CHECKING:
    from embedcache.train.minibatch import PassOptions


# What is fitted on validation after a head is trained: its temperature, or from which probability a label is on.


LOWEST, HIGHEST = 0.05, 20.0
"""The bounds of a temperature."""
FEWEST_ROWS = 10
"""With fewer labelled rows nothing is fitted: the temperature is 1."""
_OUT_OF_REACH = 20.0
_STEPS = 60


def fit_temperature(logits: Array, y: Array) -> float:
    """Return the temperature T under which ``softmax(logits / T)`` has the least log loss (Guo et al. 2017).

    ``logits`` is float [N, C], ``y`` int64 [N], -1 for rows without label, which do not count. The loss is convex in
    1 / T; Newton's steps are kept within shrinking bounds, so the result lies in [0.05, 20]. Where every row is
    classified rightly the loss falls without end as T goes to 0; targets are then smoothed by 1 / (N + 2) as Platt
    (1999) does, since a few dozen right rows do not prove that no row can be wrong. The loss on these rows is never
    higher than at T = 1, which is returned for too few rows. Rows of a class that training never saw do not count,
    because no temperature helps them: its logit is the same in every row, and 20 or more below the highest.

    Raises ``TrainingError`` for logits that are not finite, ``SpecError`` for shapes that do not fit.
    """
    z, y = np.asarray(logits, np.float64), np.asarray(y)
    if z.ndim != 2 or y.shape != z.shape[:1]:
        raise SpecError(f"y {y.shape} does not fit logits {z.shape}: expected one class for each row")
    z, y = z[y != -1], y[y != -1].astype(np.int64)
    if len(y) and (y.min() < 0 or y.max() >= z.shape[1]):
        raise SpecError(f"classes go from {y.min()} to {y.max()}, logits have {counted(z.shape[1], 'column')}")
    if not np.isfinite(z).all():
        raise TrainingError("logits are not finite: nothing can be calibrated on them")
    if len(y) < FEWEST_ROWS or z.shape[1] < 2:
        return 1.0
    same = (z == z[:1]).all(axis=0)
    same &= not same.all()  # where every column is constant, none says that its class was never seen
    z = z - z.max(axis=1, keepdims=True)
    reachable = ~(same & (z <= -_OUT_OF_REACH).all(axis=0))
    z, y = z[reachable[y]], y[reachable[y]]
    own = z[np.arange(len(y)), y]
    if len(own) < FEWEST_ROWS:
        return 1.0
    target = own if own.any() else z[:, reachable].mean(axis=1) / (len(own) + 2)
    sharpness = _least(z, float(target.sum()))
    return 1 / sharpness if _loss(z, own, sharpness) <= _loss(z, own, 1.0) else 1.0


def _least(z: Floats, target: float) -> float:
    """Return the beta in [1/20, 20] that makes ``sum logsumexp(beta z) - beta target`` least."""
    low, high = 1 / HIGHEST, 1 / LOWEST
    beta = 1.0
    for _ in range(_STEPS):
        p = np.exp(beta * z)
        p /= p.sum(axis=1, keepdims=True)
        weighted = p * z
        mean = weighted.sum(axis=1)
        slope = float(mean.sum()) - target
        if slope == 0:
            return beta
        low, high = (low, beta) if slope > 0 else (beta, high)
        curvature = float((weighted * z).sum() - mean @ mean)
        step = beta - slope / curvature if curvature > 0 else math.inf
        # Newton where it stays between the bounds; otherwise their geometric mean, beta being a scale.
        new = step if low < step < high else math.sqrt(low * high)
        if abs(new - beta) <= 1e-12 * beta:
            return new
        beta = new
    return beta


def _loss(z: Floats, own: Floats, beta: float) -> float:
    return float(np.log(np.exp(beta * z).sum(axis=1)).sum() - beta * own.sum())


def fit_thresholds(probabilities: Array, y: Array) -> Floats:
    """Return for each class the threshold under which its F1 is highest, float64 [C]; a label is on at or above it.

    ``probabilities`` is float [N, C], ``y`` uint8 [N, C]; rows that hold 255 do not count. Every distinct
    probability is tried. The threshold lies half-way between the lowest one taken and the highest one left out, so
    that rounding cannot move a row across. 0.5 stays where nothing beats it, as for a class without positives; of
    equally good thresholds the nearest to 0.5 is taken.

    Raises ``TrainingError`` for probabilities that are not finite, ``SpecError`` for shapes that do not fit.
    """
    p, y = np.asarray(probabilities, np.float64), np.asarray(y)
    if p.ndim != 2 or y.shape != p.shape:
        raise SpecError(f"y {y.shape} does not fit probabilities {p.shape}: expected one label for each")
    labelled = (y != 255).all(axis=1)
    p, y = p[labelled], y[labelled] == 1
    if not np.isfinite(p).all():
        raise TrainingError("probabilities are not finite: no threshold can be fitted on them")
    return np.array([_threshold(p[:, column], y[:, column]) for column in range(p.shape[1])], np.float64)


def _threshold(p: Floats, y: Flags) -> float:
    positives = int(y.sum())
    if not positives:
        return 0.5
    order = np.argsort(-p, kind="stable")
    falling = p[order]
    ends = np.flatnonzero(np.append(falling[1:] != falling[:-1], True))
    hits, taken = np.cumsum(y[order])[ends], ends + 1
    f1 = 2 * hits / (taken + positives)
    usual = 2 * int((y & (p >= 0.5)).sum()) / (int((p >= 0.5).sum()) + positives)
    best = float(f1.max())
    if usual >= best:
        return 0.5
    above = falling[ends]
    below = np.append(above[1:], min(0.0, float(above[-1])))
    middle = (above + below) / 2
    # Of neighbouring floats the mean may be the lower one, which would take one row more; and all may be taken at 0.
    middle = np.where((middle > below) & (middle <= above), middle, above)[f1 == best]
    return float(middle[np.abs(middle - 0.5).argmin()])


_MEASURED = 50_000
"""Metrics are measured on at most this many rows of a split: more would change digits that nobody reads."""


@checks_arguments()
def train_head(
    x: object,
    y: npt.ArrayLike,
    x_eval: object = None,
    y_eval: npt.ArrayLike | None = None,
    head: HeadSpec | str = "linear",
    spec: TrainSpec | Mapping[str, object] | None = None,
    *,
    task: TaskName = "classification",
    class_names: Sequence[str] | Sequence[int],
    sample_weight: npt.ArrayLike | None = None,
    views: Sequence[object] = (),
    feature: FeatureSet | None = None,
    extraction: Mapping[str, object] | None = None,
    model: str | None = None,
    revision: str | None = None,
    probe: Probe | None = None,
    device: str = "cpu",
    progress: bool = True,
    calibrate: bool = True,
    intervals: bool = True,
    notes: Sequence[str] = (),
    observe: Observe | None = None,
) -> TrainingResult[TrainedHead]:
    """Train one head on features.

    Args:
        x: float32 [N, D] or [N, L, D], ragged (values, offsets), or a reader of rows on disk (``features.Reader``).
        y: int64 [N] class indices (-1: no label), uint8 [N, C] labels (255: none), or float [N, R] (NaN: none).
        x_eval, y_eval: validation rows: early stopping of minibatches, calibration. None for none.
        head: a ``HeadSpec``, or a kind of head with its defaults.
        spec: how to train, also as a mapping; None for the defaults: a linear head's optimum, others by minibatches.
        task: ``classification``, ``multilabel`` or ``regression``.
        class_names: the C classes (whole numbers become their digits), or the names of the R targets.
        sample_weight: [N] weights of the training rows, None for equal.
        views: features of augmented views of the same N rows, each as ``x`` is. Minibatches draw one of ``x`` and the
            first ``spec.views`` for each row and epoch; what reads all rows at once reads all of them, each weighing
            as much as its part of the row. Features are standardised over all of them. Validation has none.
        feature: what the features are; None to go by their shape.
        extraction, model, revision, probe: the spec of the cache, the backbone's name and what its machine computed,
            recorded in the head.
        device: where a torch head is trained: ``cpu``, ``cuda``, ``mps``, or ``auto`` for the first there is.
        calibrate: fit a temperature or thresholds on the validation rows.
        intervals: bootstrap intervals in the validation metrics, which take seconds with many rows and labels.
        notes: what the caller has to say already. They and training's own are the result's ``notes``, and an
            ``EmbedcacheWarning`` each.
        observe: is called after each epoch of minibatches with its number and values: loss, validation metric,
            learning rate.

    Raises:
        TrainingError: one class only, fewer rows than classes, a loss that became NaN.
        FeatureError: features that hold NaN or infinity, naming the row, or that the head cannot read.
        SpecError: an unknown head, option or metric, or settings that contradict each other.
    """
    spec, head, kind = TrainSpec.of(spec), head_named(head), task_named(task)
    names = checked_names(class_names)
    if device != "cpu":
        from embedcache.backbone import choose_device

        device = choose_device(device)
    number = spec.of_views(len(views))
    spec = replace(spec, views=number) if len(views) else spec
    rows = labelled_rows_of(
        x, y, kind, names, feature=feature, weight=sample_weight, views=[*views][:number]
    )  # fmt: skip
    remarks = [*notes, *refuse_untrainable(rows.y, rows.task, names)]
    if len(rows) < (total := np.shape(y)[0]):
        remarks.append(f"{total - len(rows):,} of {total:,} training rows have no label and are left out")
    if spec.standardize and rows.x.in_memory and (note := constants_note(rows.x)) is not None:
        remarks.append(note)
    judged = None
    if x_eval is not None and y_eval is not None:
        judged = labelled_rows_of(x_eval, y_eval, kind, names, feature=rows.feature, where="validation")
        judged = judged if len(judged) else None
    in_memory = rows.x.in_memory
    if not in_memory and spec.solver_for(head) != spec.solver_for(head, in_memory=False):
        remarks.append("the features do not fit in memory: trained by minibatches, which only come near the optimum")
    spec = replace(spec, solver=spec.solver_for(head, in_memory=in_memory))
    begun = time.perf_counter()
    if head.engine == "sklearn":
        from embedcache.train.sklearn_engine import fit_sklearn

        fitted = fit_sklearn(rows.every_view(), head, spec)
    elif spec.solver == "convex":
        from embedcache.train.convex.solver import fit_convex

        if device != "cpu":
            remarks.append("the convex solver runs on the CPU")
        fitted = fit_convex(rows.every_view(), head, spec)
    else:
        from embedcache.train.minibatch import PassOptions, fit_minibatch

        options = PassOptions(device=device, progress=progress, observe=observe)
        (fitted,) = fit_minibatch(rows, judged, [head], [spec], options=options)
        remarks += _epoch_notes(fitted, spec)
    remarks += fitted.notes
    trained = _head_of(fitted, head, spec, rows, Origin(ExtractionSpec(extraction or {}), model, revision, probe))
    if not trained.votes and trained.parameters > 20 * len(rows) * max(1, rows.feature.dim // 100):
        remarks.append(
            f"the head has {trained.parameters:,} parameters for {counted(len(rows), 'training row')}: "
            "a linear or a narrower head may do better"
        )
    if judged is not None and calibrate:
        trained = calibrated(trained, judged)
    seconds = time.perf_counter() - begun
    plain = replace(rows, views=None)
    metrics = {"train": measured(trained, plain.spread(_MEASURED), intervals=False)}
    if judged is not None:
        metrics["validation"] = measured(trained, judged.spread(_MEASURED), intervals=intervals)
    beside = f", with {counted(number, 'view')} each" if number else ""
    facts = {"training rows": f"{len(rows):,}{beside}", "validation rows": f"{len(judged) if judged else 0:,}"}
    warn(remarks)
    return TrainingResult(trained, fitted, metrics, tuple(remarks), seconds, facts)


def _epoch_notes(fitted: Fitted, spec: TrainSpec) -> list[str]:
    """Return notes on how training by minibatches ended."""
    from embedcache.train.loop import STILL_IMPROVING

    notes, epochs_run = [], len(fitted.history)
    if fitted.interrupted:
        notes.append(f"interrupted in epoch {epochs_run + 1} of {fitted.epochs}: the best weights so far are kept")
    elif fitted.best_epoch >= 0 and epochs_run < fitted.epochs:
        notes.append(f"stopped early after epoch {epochs_run}; best was epoch {fitted.best_epoch + 1}")
    if fitted.epochs > spec.epochs:
        epochs = counted(fitted.epochs, "epoch")
        notes.append(f"{epochs} instead of {spec.epochs}, for at least {spec.least_steps} steps")
    if fitted.improving:
        notes.append(STILL_IMPROVING)
    return notes


def _head_of(fitted: Fitted, head: HeadSpec, spec: TrainSpec, rows: LabelledRows, origin: Origin) -> TrainedHead:
    """Return a head that an engine fitted, with all that is recorded in it."""
    return TrainedHead(
        head, rows.task.name, rows.class_names, rows.feature, state=fitted.state, estimator=fitted.estimator,
        extraction=origin.extraction, model=origin.model, revision=origin.revision,
        probe=None if origin.probe is None else origin.probe.only(rows.feature.name), training=spec.record(),
    )  # fmt: skip


def calibrated(trained: TrainedHead, rows: LabelledRows) -> TrainedHead:
    """Return the head with a temperature, or with thresholds for each label, fitted on validation rows."""
    if rows.task is CLASSIFICATION and trained.spec.kind != "majority":
        temperature = fit_temperature(trained.logits(rows.x), rows.y)
        return replace(trained, calibration={"temperature": float(temperature)})
    if rows.task is MULTILABEL:
        thresholds = fit_thresholds(trained.probabilities(rows.x), rows.y)
        return replace(trained, calibration={"thresholds": [float(threshold) for threshold in thresholds]})
    return trained


def measured(trained: TrainedHead, rows: LabelledRows, *, intervals: bool) -> MetricValues:
    """Return the metrics of a head on labelled rows, averaged over their views where they have any; see ``measure``."""
    x = rows.trained
    outputs, thresholds = trained.probabilities(x.whole() if isinstance(x, Parts) else x), trained.thresholds
    outputs = outputs.reshape(rows.of_views + 1, len(rows), -1).mean(axis=0) if rows.of_views else outputs
    return measure(rows.task, rows.y, outputs, trained.class_names, intervals=intervals, thresholds=thresholds)


def train_stack(
    rows: LabelledRows,
    judged: LabelledRows | None,
    heads: Sequence[HeadSpec],
    specs: Sequence[TrainSpec],
    *,
    origin: Origin | None = None,
    options: PassOptions | None = None,
) -> list[TrainingResult[TrainedHead]]:
    """Train K heads of one shape in one pass over the features.

    Args:
        rows: what they are trained on; ``data.labelled_rows_of`` makes them.
        judged: validation rows for early stopping, None for none.
        heads: they may differ in dropout only.
        specs: one for each head; they may differ in what ``spec.MAY_DIFFER`` names.
        origin: where the features come from, recorded in the heads.
        options: device, progress, and whatever else does not change which heads come out.

    The heads are neither calibrated nor measured. Raises as ``train_head`` does, and ``SpecError`` for heads that
    cannot be stacked.
    """
    from embedcache.train.minibatch import PassOptions, fit_minibatch

    refuse_untrainable(rows.y, rows.task, rows.class_names)
    fitted = fit_minibatch(rows, judged, heads, specs, options=options or PassOptions())
    return [
        TrainingResult(_head_of(own, head, spec, rows, origin or Origin()), own, seconds=own.seconds)
        for own, head, spec in zip(fitted, heads, specs, strict=True)
    ]
