"""One head, or many of one shape, from features in hand; each engine and solver behind one call."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedcache.arguments import checks_arguments
from embedcache.errors import FeatureError, SpecError, warn
from embedcache.heads import TrainedHead
from embedcache.heads.registry import head_named
from embedcache.heads.trained import count
from embedcache.numerics import Probe
from embedcache.shard import FeatureSet
from embedcache.spec import HeadSpec, TaskName, TrainSpec
from embedcache.train.calibration import fit_temperature, fit_thresholds
from embedcache.train.data import (
    Data,
    checked_data,
    checked_names,
    choose,
    class_weights,
    constants_note,
    refuse_untrainable,
)
from embedcache.train.metrics import measure
from embedcache.train.result import TrainingResult
from embedcache.wording import counted

if TYPE_CHECKING:
    from embedcache.train.minibatch import Masks

Array = npt.NDArray[Any]

_MEASURED = 50_000
"""Most training rows that metrics are taken on: what they add past that is digits nobody reads."""


def feature_set_of(x: Any, name: str = "features") -> FeatureSet:
    """Return the feature set that bare features amount to. Raises ``FeatureError`` for what are no features."""
    if hasattr(x, "offsets") or isinstance(x, tuple):
        values = x.values if hasattr(x, "offsets") else x[0]
        return FeatureSet(name, "tokens", int(values.shape[1]), 1, "float32")
    shape = (len(x), *x.row_shape) if hasattr(x, "read") else np.shape(x)
    if len(shape) == 2 and shape[1]:
        return FeatureSet(name, "pooled", int(shape[1]), 1, "float32")
    if len(shape) == 3 and shape[1] and shape[2]:
        return FeatureSet(name, "layers", int(shape[2]), int(shape[1]), "float32")
    raise FeatureError(f"features have the shape {list(shape)}: expected [N, D], or [N, L, D]")


@checks_arguments()
def train_head(
    x: Any,
    y: Any,
    x_eval: Any = None,
    y_eval: Any = None,
    head: HeadSpec | str = "linear",
    spec: TrainSpec | Mapping[str, Any] | None = None,
    *,
    task: TaskName = "classification",
    class_names: Sequence[str] | Sequence[int],
    sample_weight: Any = None,
    feature: FeatureSet | None = None,
    extraction: Mapping[str, Any] | None = None,
    model: str | None = None,
    revision: str | None = None,
    probe: Probe | None = None,
    device: str = "cpu",
    progress: bool = True,
    calibrate: bool = True,
    intervals: bool = True,
    batches: Any = None,
    notes: Sequence[str] = (),
) -> TrainingResult:
    """Train one head on features.

    Args:
        x: float32 [N, D] or [N, L, D], ragged (values, offsets), or a reader of rows on disk (``batches.Reader``).
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
    class_names = checked_names(class_names)
    if device != "cpu":
        from embedcache.backbone import choose_device

        device = choose_device(device)
    feature = feature or feature_set_of(x)
    data = checked_data(x, y, feature, task, weight=sample_weight, outputs=len(class_names))
    said = [*notes, *refuse_untrainable(data, task, class_names)]
    if len(data) < len(y):
        said.append(f"{len(y) - len(data):,} of {len(y):,} training rows have no label and are left out")
    if spec.standardize and not data.on_disk and (note := constants_note(data.x, feature)) is not None:
        said.append(note)
    judged = None
    if x_eval is not None and y_eval is not None:
        judged = checked_data(x_eval, y_eval, feature, task, where="validation", outputs=len(class_names))
        judged = judged if len(judged) else None
    in_memory = batches is None and not data.on_disk
    if not in_memory and spec.solver_for(head) != spec.solver_for(head, in_memory=False):
        said.append("the features do not fit in memory: trained by minibatches, which only come near the optimum")
    spec = replace(spec, solver=spec.solver_for(head, in_memory=in_memory))
    begun = time.perf_counter()
    trained = TrainedHead(
        head, task, tuple(class_names), feature, extraction=dict(extraction or {}), model=model, revision=revision,
        probe=None if probe is None else probe.only(feature.name), training=spec.record(),
    )  # fmt: skip
    history: Sequence[Mapping[str, Any]] = ()
    interrupted = False
    if head.engine == "sklearn":
        trained, more = _sklearn(trained, data, spec)
        said += more
    elif spec.solver == "convex":
        if device != "cpu":
            said.append("the convex solver runs on the CPU")
        trained, history, more = _convex(trained, data, spec)
        said += more
    else:
        from embedcache.train.ending import STILL_IMPROVING
        from embedcache.train.minibatch import train_minibatch

        found = train_minibatch(
            data, judged, [head], [spec], feature, task, class_names, batches=batches, device=device, progress=progress
        )  # fmt: skip
        trained = replace(trained, state=found.states[0])
        history, interrupted, epochs = found.fitted.history[0], found.fitted.interrupted, found.fitted.epochs
        if interrupted:
            said.append(f"interrupted in epoch {len(history) + 1} of {epochs}: the best weights so far are kept")
        elif found.fitted.best_epoch[0] >= 0 and len(history) < epochs:
            said.append(f"stopped early after epoch {len(history)}; best was epoch {found.fitted.best_epoch[0] + 1}")
        if epochs > spec.epochs:
            said.append(f"{counted(epochs, 'epoch')} instead of {spec.epochs}, for at least {spec.least_steps} steps")
        if found.fitted.improving[0]:
            said.append(STILL_IMPROVING)
    if trained.parameters > 20 * len(data) * max(1, feature.dim // 100):
        said.append(
            f"the head has {trained.parameters:,} parameters for {counted(len(data), 'training row')}: "
            "a linear or a narrower head may do better"
        )
    if judged is not None and calibrate:
        trained = calibrated(trained, judged)
    seconds = time.perf_counter() - begun
    metrics = {}
    for name, rows in (("train", data), ("validation", judged)):
        if rows is not None:
            metrics[name] = measured(trained, head_of(rows, _MEASURED), intervals=intervals and name == "validation")
    facts = {"training rows": f"{len(data):,}", "validation rows": f"{len(judged) if judged else 0:,}"}
    warn(said)
    return TrainingResult(trained, metrics, history, tuple(said), seconds, interrupted, facts)


def _dense(data: Data, kind: str, feature: FeatureSet) -> npt.NDArray[np.float32]:
    """Return features in memory for what needs them whole."""
    if feature.kind != "pooled":
        raise FeatureError(
            f"{kind} reads one vector a row, and the feature set {feature.name} has several: "
            "choose another feature set, or the head attention or attention-pooling"
        )
    if data.on_disk:
        from embedcache.heads.trained import refuse_non_finite

        x = np.asarray(data.x.read(np.arange(len(data))))
        refuse_non_finite(x, feature.name)
        return x
    return np.asarray(data.x)


def _sklearn(trained: TrainedHead, data: Data, spec: TrainSpec) -> tuple[TrainedHead, list[str]]:
    from embedcache.train.sklearn_engine import fit_sklearn

    fitted = fit_sklearn(
        trained.spec, _dense(data, trained.spec.kind, trained.feature), data.y, task=trained.task,
        classes=len(trained.class_names), seed=spec.seed, standardize=spec.standardize,
        class_weight=_class_weight(spec, data, trained), sample_weight=data.weight, l2=spec.l2,
    )  # fmt: skip
    if fitted.linear is None:
        return replace(trained, estimator=fitted.estimator), list(fitted.notes)
    weight, bias = fitted.linear
    return replace(trained, state={"output.weight": weight, "output.bias": bias}), list(fitted.notes)


def _class_weight(spec: TrainSpec, data: Data, trained: TrainedHead) -> Any:
    found = class_weights([spec], data.y, trained.task, trained.class_names) if spec.class_weight is not None else None
    return None if found is None else found[0]


def _convex(
    trained: TrainedHead, data: Data, spec: TrainSpec
) -> tuple[TrainedHead, Sequence[Mapping[str, Any]], list[str]]:
    from embedcache.train.convex import solve

    if trained.spec.kind != "linear":
        raise SpecError(f"the convex solver is for linear heads, not {trained.spec.kind}: use the solver minibatch")
    x = _dense(data, "the convex solver", trained.feature)
    found = solve(
        x, data.y, task=trained.task, outputs=len(trained.class_names), l2=spec.l2, sample_weight=data.weight,
        class_weight=_class_weight(spec, data, trained), standardize=spec.standardize,
        # Who gives float64 gets its digits: a head is as far from the optimum as the root of the gap, here 1e-10.
        tolerance=1e-20 if x.dtype == np.float64 else 1e-9,
    )  # fmt: skip
    notes = [] if found.converged else [f"the solver stopped after {found.iterations} iterations, short of the optimum"]
    entry = {"epoch": found.iterations, "train_loss": found.loss / len(data), "gradient_norm": found.gradient_norm}
    return replace(trained, state={"output.weight": found.weight, "output.bias": found.bias}), [entry], notes


def calibrated(trained: TrainedHead, data: Data) -> TrainedHead:
    """Return the head with a temperature, or with thresholds for each label, fitted on validation rows."""
    if trained.task == "classification" and trained.spec.kind != "majority":
        temperature = fit_temperature(trained.logits(data.x), data.y)
        return replace(trained, calibration={"temperature": float(temperature)})
    if trained.task == "multilabel":
        thresholds = fit_thresholds(trained.probabilities(data.x), data.y)
        return replace(trained, calibration={"thresholds": [float(each) for each in thresholds]})
    return trained


def measured(trained: TrainedHead, data: Data, *, intervals: bool) -> dict[str, Any]:
    """Return the metrics of a head on labelled rows; see ``measure``."""
    outputs = trained.probabilities(data.x)
    thresholds = trained.thresholds if trained.task == "multilabel" else None
    return measure(trained.task, data.y, outputs, trained.class_names, intervals=intervals, thresholds=thresholds)


def head_of(data: Data, most: int) -> Data:
    """Return at most so many rows, spread evenly."""
    if len(data) <= most:
        return data
    rows = np.linspace(0, len(data) - 1, most).astype(np.int64)
    return Data(choose(data.x, rows), data.y[rows], None if data.weight is None else data.weight[rows])


@dataclass(frozen=True)
class StackResult:
    """K heads that were trained in one pass.

    ``heads`` are the trained heads, uncalibrated; ``history`` has the epochs of each, ``best_epoch`` counts from 0 and
    is -1 where nothing was measured; ``improving`` says which had not come to an end in their last epoch.
    """

    heads: Sequence[TrainedHead]
    history: Sequence[Sequence[Mapping[str, Any]]]
    best_epoch: Sequence[int]
    steps: int
    seconds: float
    interrupted: bool
    improving: Sequence[bool] = ()


def train_stack(
    x: Any,
    y: Any,
    heads: Sequence[HeadSpec],
    specs: Sequence[TrainSpec],
    *,
    task: TaskName,
    class_names: Sequence[str],
    masks: Masks | None = None,
    x_eval: Any = None,
    y_eval: Any = None,
    sample_weight: Any = None,
    feature: FeatureSet | None = None,
    extraction: Mapping[str, Any] | None = None,
    model: str | None = None,
    revision: str | None = None,
    probe: Probe | None = None,
    device: str = "cpu",
    progress: bool = True,
    title: str = "train",
) -> StackResult:
    """Train K heads of one shape in one pass over the features; arguments as in ``train_head``.

    ``heads`` may differ in dropout only, ``specs`` in what ``train.stack.MAY_DIFFER`` names. With ``masks``, head k
    trains on ``masks.train[masks.of[k]]`` and is judged on ``masks.evaluate[masks.of[k]]`` of the same rows, and every
    row must be labelled; each then standardises features by its own training rows.

    Raises as ``train_head`` does, and ``SpecError`` for heads that cannot be stacked.
    """
    from embedcache.train.minibatch import train_minibatch

    feature = feature or feature_set_of(x)
    class_names = checked_names(class_names)
    data = checked_data(x, y, feature, task, weight=sample_weight, outputs=len(class_names))
    if masks is not None and len(data) != masks.train.shape[1]:
        raise SpecError(f"the masks are for {counted(masks.train.shape[1], 'row')}, and {len(data)} are labelled")
    refuse_untrainable(data, task, class_names)
    judged: Data | None = data if masks is not None and masks.evaluate.any() else None
    if masks is None and x_eval is not None:
        judged = checked_data(x_eval, y_eval, feature, task, where="validation", outputs=len(class_names))
    found = train_minibatch(
        data, judged, heads, specs, feature, task, class_names,
        masks=masks, device=device, progress=progress, title=title,
    )  # fmt: skip
    made = [
        TrainedHead(
            head, task, tuple(class_names), feature, state=state, extraction=dict(extraction or {}), model=model,
            revision=revision, probe=None if probe is None else probe.only(feature.name), training=spec.record(),
        )
        for head, spec, state in zip(heads, specs, found.states, strict=True)
    ]  # fmt: skip
    fitted = found.fitted
    return StackResult(
        made, fitted.history, fitted.best_epoch, fitted.steps, fitted.seconds, fitted.interrupted, fitted.improving
    )


__all__ = ["StackResult", "count", "feature_set_of", "train_head", "train_stack"]
