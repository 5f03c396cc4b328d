"""One head, or many of one shape, from features in hand; each engine and solver behind one call."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedcache.arguments import checks_arguments
from embedcache.errors import SpecError, warn
from embedcache.heads import TrainedHead
from embedcache.heads.registry import head_named
from embedcache.numerics import Probe
from embedcache.shard import FeatureSet
from embedcache.spec import HeadSpec, TaskName, TrainSpec
from embedcache.task import CLASSIFICATION, MULTILABEL
from embedcache.train.calibration import fit_temperature, fit_thresholds
from embedcache.train.data import LabelledRows, checked_names, constants_note, labelled_rows_of, refuse_untrainable
from embedcache.train.metrics import measure
from embedcache.train.result import Fitted, Origin, TrainingResult
from embedcache.wording import counted

if TYPE_CHECKING:
    from embedcache.train.batches import Batches
    from embedcache.train.minibatch import Masks, PassOptions

_MEASURED = 50_000
"""Most training rows that metrics are taken on: what they add past that is digits nobody reads."""


@checks_arguments()
def train_head(
    x: object,
    y: npt.ArrayLike,
    x_eval: object = None,
    y_eval: npt.ArrayLike | None = None,
    head: HeadSpec | str = "linear",
    spec: TrainSpec | Mapping[str, Any] | None = None,
    *,
    task: TaskName = "classification",
    class_names: Sequence[str] | Sequence[int],
    sample_weight: npt.ArrayLike | None = None,
    feature: FeatureSet | None = None,
    extraction: Mapping[str, Any] | None = None,
    model: str | None = None,
    revision: str | None = None,
    probe: Probe | None = None,
    device: str = "cpu",
    progress: bool = True,
    calibrate: bool = True,
    intervals: bool = True,
    batches: Batches | None = None,
    notes: Sequence[str] = (),
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
        feature: what the features are; None to go by their shape.
        extraction, model, revision, probe: the spec of the cache, the backbone's name and what its machine computed,
            recorded in the head.
        device: where a torch head is trained: ``cpu``, ``cuda``, ``mps``, or ``auto`` for the first there is.
        calibrate: fit a temperature or thresholds on the validation rows.
        intervals: bootstrap intervals in the validation metrics, which take seconds with many rows and labels.
        batches: another source of training batches (``batches.Batches``) than ``x`` itself.
        notes: what the caller has to say already. They and training's own are the result's ``notes``, and an
            ``EmbedcacheWarning`` each.

    Raises:
        TrainingError: one class only, fewer rows than classes, a loss that became NaN.
        FeatureError: features that hold NaN or infinity, naming the row, or that the head cannot read.
        SpecError: an unknown head, option or metric, or settings that contradict each other.
    """
    spec, head = TrainSpec.of(spec), head_named(head)
    names = checked_names(class_names)
    if device != "cpu":
        from embedcache.backbone import choose_device

        device = choose_device(device)
    rows = labelled_rows_of(x, y, task, names, feature=feature, weight=sample_weight)
    remarks = [*notes, *refuse_untrainable(rows.y, rows.task, names)]
    if len(rows) < (total := np.shape(y)[0]):
        remarks.append(f"{total - len(rows):,} of {total:,} training rows have no label and are left out")
    if spec.standardize and rows.x.in_memory and (note := constants_note(rows.x)) is not None:
        remarks.append(note)
    judged = None
    if x_eval is not None and y_eval is not None:
        judged = labelled_rows_of(x_eval, y_eval, task, names, feature=rows.feature, where="validation")
        judged = judged if len(judged) else None
    in_memory = batches is None and rows.x.in_memory
    if not in_memory and spec.solver_for(head) != spec.solver_for(head, in_memory=False):
        remarks.append("the features do not fit in memory: trained by minibatches, which only come near the optimum")
    spec = replace(spec, solver=spec.solver_for(head, in_memory=in_memory))
    begun = time.perf_counter()
    if head.engine == "sklearn":
        from embedcache.train.sklearn_engine import fit_sklearn

        fitted = fit_sklearn(rows, head, spec)
    elif spec.solver == "convex":
        from embedcache.train.convex.engine import fit_convex

        if device != "cpu":
            remarks.append("the convex solver runs on the CPU")
        fitted = fit_convex(rows, head, spec)
    else:
        from embedcache.train.minibatch import PassOptions, fit_minibatch

        options = PassOptions(device=device, progress=progress)
        (fitted,) = fit_minibatch(rows, judged, [head], [spec], batches=batches, options=options)
        remarks += _epoch_notes(fitted, spec)
    remarks += fitted.notes
    trained = _head_of(fitted, head, spec, rows, Origin(extraction or {}, model, revision, probe))
    if trained.parameters > 20 * len(rows) * max(1, rows.feature.dim // 100):
        remarks.append(
            f"the head has {trained.parameters:,} parameters for {counted(len(rows), 'training row')}: "
            "a linear or a narrower head may do better"
        )
    if judged is not None and calibrate:
        trained = calibrated(trained, judged)
    seconds = time.perf_counter() - begun
    metrics = {"train": measured(trained, rows.spread(_MEASURED), intervals=False)}
    if judged is not None:
        metrics["validation"] = measured(trained, judged.spread(_MEASURED), intervals=intervals)
    facts = {"training rows": f"{len(rows):,}", "validation rows": f"{len(judged) if judged else 0:,}"}
    warn(remarks)
    return TrainingResult(trained, fitted, metrics, tuple(remarks), seconds, facts)


def _epoch_notes(fitted: Fitted, spec: TrainSpec) -> list[str]:
    """Return what is worth saying of how training by minibatches ended."""
    from embedcache.train.ending import STILL_IMPROVING

    notes, done = [], len(fitted.history)
    if fitted.interrupted:
        notes.append(f"interrupted in epoch {done + 1} of {fitted.epochs}: the best weights so far are kept")
    elif fitted.best_epoch >= 0 and done < fitted.epochs:
        notes.append(f"stopped early after epoch {done}; best was epoch {fitted.best_epoch + 1}")
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
        extraction=dict(origin.extraction), model=origin.model, revision=origin.revision,
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


def measured(trained: TrainedHead, rows: LabelledRows, *, intervals: bool) -> dict[str, Any]:
    """Return the metrics of a head on labelled rows; see ``measure``."""
    thresholds = trained.thresholds if rows.task is MULTILABEL else None
    outputs = trained.probabilities(rows.x)
    return measure(rows.task, rows.y, outputs, trained.class_names, intervals=intervals, thresholds=thresholds)


def train_stack(
    rows: LabelledRows,
    judged: LabelledRows | None,
    heads: Sequence[HeadSpec],
    specs: Sequence[TrainSpec],
    *,
    masks: Masks | None = None,
    origin: Origin | None = None,
    options: PassOptions | None = None,
) -> list[TrainingResult[TrainedHead]]:
    """Train K heads of one shape in one pass over the features.

    Args:
        rows: what they are trained on; ``data.labelled_rows_of`` makes them.
        judged: validation rows for early stopping, None for none.
        heads: they may differ in dropout only.
        specs: one for each head; they may differ in what ``spec.MAY_DIFFER`` names.
        masks: head k trains on ``masks.train[masks.of[k]]`` and is judged on ``masks.evaluate[masks.of[k]]`` of the
            same rows; each then standardises features by its own training rows. ``judged`` is not looked at.
        origin: where the features come from, recorded in the heads.
        options: device, progress, and whatever else does not change which heads come out.

    The heads are neither calibrated nor measured. Raises as ``train_head`` does, and ``SpecError`` for heads that
    cannot be stacked.
    """
    from embedcache.train.minibatch import PassOptions, fit_minibatch

    if masks is not None:
        if len(rows) != masks.train.shape[1]:
            raise SpecError(f"the masks are for {counted(masks.train.shape[1], 'row')}, and {len(rows)} are labelled")
        judged = rows if masks.evaluate.any() else None
    refuse_untrainable(rows.y, rows.task, rows.class_names)
    fitted = fit_minibatch(rows, judged, heads, specs, masks=masks, options=options or PassOptions())
    return [
        TrainingResult(_head_of(own, head, spec, rows, origin or Origin()), own, seconds=own.seconds)
        for own, head, spec in zip(fitted, heads, specs, strict=True)
    ]
