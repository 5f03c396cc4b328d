"""The last blocks of a backbone, trained from the hidden states that a cache holds, and the run that comes of it."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from embedcache.arguments import checks_arguments
from embedcache.backbone import FrozenModel, load_again, load_backbone, probe_of, resolve_model, weight_files
from embedcache.backbone.network import save_whole
from embedcache.cache import FeatureCache
from embedcache.errors import BackboneMismatchError, BundleError, FeatureError, InputError, Interrupted, SpecError, warn
from embedcache.finetune.live import (
    LabelledLive,
    Part,
    TunedModel,
    fit_live,
    into_standard_units,
    outputs_of,
)
from embedcache.finetune.model import live_head
from embedcache.finetune.states import CachedStates, blocks_entered, cached_states
from embedcache.finetune.tail import TailModel, refuse_computed
from embedcache.fingerprint import hash_json, sha256_file
from embedcache.heads import TrainedHead, build_head
from embedcache.heads.folder import BACKBONE, RunFolder
from embedcache.heads.modules import Head
from embedcache.journal import explained, sync_directory
from embedcache.shard import FeatureSet
from embedcache.spec import (
    TUNING,
    TUNING_DECAY,
    TUNING_DROPOUT,
    TUNING_RATE,
    ExtractionSpec,
    FeatureSpec,
    HeadSpec,
    ModelSource,
    TrainSpec,
    differences_text,
)
from embedcache.task import CLASSIFICATION, MULTILABEL, REGRESSION, Array, Floats, task_named
from embedcache.train import train_on_cache
from embedcache.train.cached import feature_for, refuse_unseen, targets_for, training_rows
from embedcache.train.data import class_weights
from embedcache.train.metrics import measure
from embedcache.train.metrics.measuring import MetricValues
from embedcache.train.result import Fitted, Observe, Origin
from embedcache.train.run import fit_temperature, fit_thresholds
from embedcache.wording import counted

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tuned:
    """The last blocks and the head after training.

    ``computed`` is the type that the backbone computes in. ``metrics`` are by split, ``facts`` stand in the model card.
    """

    model: TailModel
    head: HeadSpec
    tuned: TunedModel
    fitted: Fitted
    calibration: Mapping[str, Any]
    metrics: Mapping[str, MetricValues]
    source: ModelSource
    record: Mapping[str, object]
    facts: Mapping[str, str]
    computed: str

    @property
    def history(self) -> Any:
        """A dict for each epoch."""
        return self.fitted.history

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it early, with the best weights so far."""
        return self.fitted.interrupted

    def save(self, run: Path | str | RunFolder) -> TrainedHead:
        """Write a run folder: the head, and beside it the whole backbone as a folder that transformers loads.

        The head is the last that is written: until then a folder holds the head and the backbone that it held before.
        Raises ``BundleError``.
        """
        if not isinstance(run, RunFolder):
            with RunFolder(run) as folder:
                return self.save(folder)
        before = resolve_model(self.source.model, self.source.revision)
        name = _write_backbone(self.model, before, self.source.trust_remote_code, run.path)
        head = self._head(name, run.path)
        run.save(head, metrics=self.metrics, history=self.history, facts=self.facts)
        for other in os.listdir(run.path):
            if BACKBONE.fullmatch(other) and other != name:
                shutil.rmtree(run.path / other, ignore_errors=True)
        return head

    def _head(self, name: str, run: Path) -> TrainedHead:
        """Return the head with the identity of the backbone that was written, as it is read again."""
        extractor = self.model.extractor
        settings = replace(
            _settings(ExtractionSpec(extractor.identity)), features=(extractor.specs[0].name,),
            compute_dtype=self.computed,
        )  # fmt: skip
        source = replace(self.source, model=str(run / name), revision=None, device=str(extractor.device))
        again = load_backbone(**source.arguments(), **settings.arguments())
        feature, probe = again.feature_sets[0], probe_of(again)
        return TrainedHead(
            self.head, self.tuned.task, self.tuned.class_names, feature, state=_state(self.model.head, self.tuned),
            extraction=ExtractionSpec(again.identity), model=f"./{name}",
            probe=None if probe is None else probe.only(feature.name), calibration=self.calibration,  # type: ignore[arg-type]
            training=self.record,
        )  # fmt: skip


@checks_arguments()
def tune(
    cache: FeatureCache | Path | str,
    blocks: int = 2,
    head: HeadSpec | str = "linear",
    spec: TrainSpec | Mapping[str, object] | None = None,
    *,
    feature: str | None = None,
    backbone_learning_rate: float = TUNING_RATE,
    layer_decay: float = TUNING_DECAY,
    dropout: bool = TUNING_DROPOUT,
    new_head: bool = False,
    allow_unseen: bool = False,
    model: Path | str | None = None,
    revision: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: bool = True,
    observe: Observe | None = None,
) -> Tuned:
    """Train the last blocks of a cache's backbone with a head, from the hidden states that enter them.

    What comes before is frozen, and its states are read from the cache: the steps are, to the bit, those of training
    with the frozen blocks run in each of them (``check_tuning`` proves it). The head is first trained on the cached
    features alone and goes on from there (LP-FT, Kumar et al. 2022). Where the validation rows went better before
    the blocks were trained, it stays, and the blocks as they were.

    Args:
        cache: one with the states (``extract(..., pooling=["mean", "states@-3"])`` for 2 blocks or 1; ``--states -2``).
            Where they enter more blocks than are trained, those between run, frozen, in every step.
        blocks: how many blocks are trained, from the last one on.
        head: a torch head that reads the pooled features.
        spec: how to train; ``learning_rate`` is the head's. None for ``TUNING``.
        feature: the pooled set that the head reads; None for the cache's first.
        backbone_learning_rate: the last block's.
        layer_decay: what each block before has of it.
        dropout: whether the blocks drop what their configuration says; the head's dropout is an option of the head.
        new_head: start from a new head.
        model, revision: the backbone, where it is no longer what the cache names.
        device: where it is trained.
        observe: is called after each epoch of the blocks with its number and values: loss, validation metric, and the
            head's learning rate.

    Raises:
        FeatureError: a cache without these states.
        BackboneError: a backbone that cannot be cut; see ``TailModel``.
        BackboneMismatchError: another backbone than the cache's.
        TrainingError, InputError, SpecError: as ``train_on_cache`` does.
        Interrupted: Ctrl-C before the blocks are trained; later, the result has the best so far.
    """
    cache = cache if isinstance(cache, FeatureCache) else FeatureCache.open(cache)
    spec = TUNING if spec is None else TrainSpec.of(spec)
    head_spec = live_head(head)
    pooled = feature_for(cache, head_spec, feature)
    refuse_earlier_layer(pooled)
    source = ModelSource(model, revision, device, trust_remote_code)
    states = states_for(cache, pooled, source, blocks)
    if not 0 < backbone_learning_rate < math.inf or not 0 < layer_decay <= 1:
        raise SpecError(
            f"the backbone's learning rate is {backbone_learning_rate:g} and its decay {layer_decay:g}: "
            "expected a finite rate above 0, and a decay above 0 and at most 1"
        )
    train, judged, notes = training_rows(cache)
    if not allow_unseen:
        refuse_unseen(cache, train)
    task, y = task_named(cache.task or CLASSIFICATION), cache.targets()
    train, judged = (rows[task.labelled(y[rows])] for rows in (train, judged))
    class_weights([spec], y[train], task, cache.class_names)  # refused before anything is trained
    module = build_head(head_spec, pooled, len(cache.class_names), seed=spec.seed)
    tail = load_tail(cache, pooled, source, module, blocks, states=states, dropout=dropout)
    if not new_head:
        started = train_on_cache(cache, head_spec, feature=pooled.name, allow_unseen=True, progress=progress)
        if started.interrupted:
            raise Interrupted("interrupted while the head was trained, before the blocks: nothing is saved")
        if task is REGRESSION:
            into_standard_units(started.head.module, y[train])
        tail.put_head(started.head.module)
    rows: list[LabelledLive] = [
        (CachedStates(cache, some, states, tail.extractor.device), y[some]) for some in (train, judged)
    ]  # fmt: skip
    result = fit_live(
        tail, rows[0], rows[1], spec, parts_of(tail, spec, backbone_learning_rate, layer_decay), task=task.name,
        class_names=cache.class_names, new_head=new_head, progress=progress, title=f"tune {counted(blocks, 'block')}",
        observe=observe,
    )  # fmt: skip
    warn(notes)
    tuned, origin = result.head, Origin.of(cache)
    where = source.or_else(origin.model, origin.revision)
    count = tail.count_trainable_params()
    record = {
        **spec.record(), "blocks": blocks, "states": states.name, "states_hash": states_hash(cache.spec, states.name),
        "backbone_learning_rate": backbone_learning_rate, "layer_decay": layer_decay, "dropout": dropout,
        "new_head": new_head,
    }  # fmt: skip
    what = f"the last {counted(blocks, 'block')} and the head, {count.trainable:,} parameters"
    more = f" that enter the last {given}" if (given := blocks_entered(states.name)) > blocks else ""
    facts = {
        "trained": f"{what}, from cached hidden states{more}",
        "backbone before": str(where.model), "training rows": f"{len(train):,}", "validation rows": f"{len(judged):,}",
        "trained in": f"{result.seconds:.1f} s",
    }  # fmt: skip
    if result.fitted.start is not None:
        facts["kept"] = "what training started from, as the validation rows went better before"
    calibration, metrics = _judged(tuned, dict(zip(("train", "validation"), rows, strict=True)))
    computed = str(cache.spec["compute_dtype"])
    return Tuned(tail, head_spec, tuned, result.fitted, calibration, metrics, where, record, facts, computed)


def refuse_earlier_layer(feature: FeatureSet) -> None:
    """Raise ``SpecError`` unless a feature set is of the last layer alone, which the last blocks end in."""
    if FeatureSpec.parse(feature.name).layers != (-1,):
        hint = ": keep its tokens too, with extract --tokens" * (feature.kind == "tokens")
        raise SpecError(
            f"the head would read {feature.name}: expected a set of the last layer, which the blocks end in{hint}"
        )


def states_for(cache: FeatureCache, pooled: FeatureSet, source: ModelSource, blocks: int) -> FeatureSet:
    """Return the set of a cache that enters the last blocks, or more; see ``cached_states``.

    Raises ``FeatureError`` where it was not extracted, and what ``load_tail`` does where it could not be.
    """
    try:
        return cached_states(cache, blocks)
    except FeatureError:
        load_tail(cache, pooled, source, torch.nn.Identity(), blocks)
        raise


def load_tail(
    cache: FeatureCache,
    pooled: FeatureSet,
    source: ModelSource,
    head: torch.nn.Module,
    blocks: int,
    *,
    states: FeatureSet | None = None,
    dropout: bool = True,
) -> TailModel:
    """Load the backbone of a cache with one feature set, and cut off its last blocks, to be trained with a head.

    They compute as the cache was computed, in float32 or bfloat16, from ``states``, by default those that enter just
    these blocks. Raises ``BackboneMismatchError`` where it is another backbone, ``SpecError`` for a cache that was
    computed otherwise, ``BackboneError`` as ``TailModel`` does.
    """
    settings = replace(_settings(cache.spec), features=(pooled.name,), views=None, augment=None)
    computed = settings.compute_dtype
    refuse_computed(f"{cache.path} was", computed, bool(settings.compiled))
    origin = Origin.of(cache)
    made_with = ModelSource(origin.model, origin.revision)
    settings = replace(settings, compute_dtype="float32")  # small steps of training would be lost in bfloat16
    backbone: FrozenModel[Any] = load_again(settings, source, made_with, f"{cache.path} was made by")
    identity = ExtractionSpec({**backbone.identity, "compute_dtype": computed})
    if differences := cache.spec.differences_for(pooled.name, identity):
        shown = differences_text(differences, "the cache has", "this is")
        raise BackboneMismatchError(
            f"the backbone is not the one that made {cache.path} ({shown}): give the same model with --model"
        )
    given = None if states is None else blocks_entered(states.name)
    return TailModel(backbone, head, blocks, given=given, bfloat16=computed == "bfloat16", dropout=dropout)


def _settings(spec: ExtractionSpec) -> Any:
    if spec.settings is None:
        raise InputError("the features are of a backbone that this package did not load: it cannot be trained here")
    return spec.settings


def parts_of(model: TailModel, spec: TrainSpec, rate: float, decay: float) -> list[Part]:
    """Return what is trained with which learning rate: blocks by depth, then the head."""
    blocks: list[Part] = [(parameters, rate * decay**depth) for depth, parameters in model.depths()]
    return [*blocks, (list(model.head.parameters()), spec.learning_rate)]


def states_hash(spec: ExtractionSpec, name: str) -> str:
    """Return the hash of all that decides the bits of one feature set."""
    return hash_json(json_of(spec.only({name})))


def json_of(value: object) -> Any:
    """Return mappings as dicts, all the way down."""
    return {key: json_of(each) for key, each in value.items()} if isinstance(value, Mapping) else value


def _outputs(tuned: TunedModel, rows: LabelledLive) -> Floats:
    """Return logits, or values in the units of the targets, [N, C]."""
    logits = outputs_of(tuned.model, rows[0]).astype(np.float64)
    if task_named(tuned.task) is not REGRESSION:
        return logits
    mean, deviation = tuned.target
    return np.asarray(logits * deviation + mean)


def _judged(tuned: TunedModel, rows: Mapping[str, LabelledLive]) -> tuple[Mapping[str, Any], dict[str, MetricValues]]:
    """Fit the calibration on the validation rows, and measure the splits with it."""
    task = task_named(tuned.task)
    outputs = {split: _outputs(tuned, live) for split, live in rows.items() if len(live[1])}
    calibration: dict[str, Any] = {}
    if "validation" in outputs and task is CLASSIFICATION:
        calibration = {"temperature": fit_temperature(outputs["validation"], rows["validation"][1])}
    elif "validation" in outputs and task is MULTILABEL:
        probabilities = task.probabilities(outputs["validation"])
        calibration = {"thresholds": fit_thresholds(probabilities, rows["validation"][1]).tolist()}
    temperature, thresholds = calibration.get("temperature", 1.0), tuple(calibration.get("thresholds", ()))
    metrics = {
        split: measure(
            task, rows[split][1], task.probabilities(each / temperature) if task.has_probabilities else each,
            tuned.class_names, intervals=split != "train", thresholds=thresholds or (0.5,) * len(tuned.class_names),
        )
        for split, each in outputs.items()
    }  # fmt: skip
    return calibration, metrics


def _state(module: torch.nn.Module, tuned: TunedModel) -> dict[str, Array]:
    """Return the arrays of a head as a bundle has them; one of a regression gives values in their own units."""
    assert isinstance(module, Head)

    def array(tensor: Tensor) -> Array:
        return np.ascontiguousarray(tensor.detach().cpu().numpy())

    state = {name: array(parameter) for name, parameter in module.named_parameters()}
    for name, layer in module.named_modules():
        if getattr(layer, "mean", None) is not None and getattr(layer, "scale", None) is not None:
            state |= {f"{name}.mean": array(layer.mean), f"{name}.scale": array(layer.scale)}
    if task_named(tuned.task) is REGRESSION:
        mean, deviation = tuned.target
        state["output.weight"] = (state["output.weight"] * deviation[:, None]).astype(np.float32)
        state["output.bias"] = (state["output.bias"] * deviation + mean).astype(np.float32)
    return state


def _write_backbone(model: TailModel, source: Path, trust: bool, run: Path) -> str:
    """Write the whole network beside the tokenizer of the folder it came from; return the folder's name in the run."""
    temporary = run / f".backbone-{os.urandom(8).hex()}"
    with explained(f"cannot write {run}", BundleError):
        temporary.mkdir()
        try:
            content = "image" if model.extractor.content.given == "pixels" else "text"
            with model.whole() as network:
                save_whole(source, temporary, model.extractor.name, network, content, trust)
            written = {path.name for path in temporary.iterdir()}
            weights = {path.name for path in weight_files(source)} | {"model.safetensors.index.json"}
            for path in sorted(source.rglob("*")):
                place = path.relative_to(source)
                beside = path.suffix in (".json", ".txt", ".model", ".codes", ".py") and place.parts[0] not in written
                hidden = any(part.startswith(".") for part in place.parts) or place.name.startswith("adapter_")
                if path.is_file() and beside and not hidden and place.name not in weights:
                    (temporary / place).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, temporary / place)
            digest = hash_json({path.name: sha256_file(path) for path in weight_files(temporary)})
            for path in [*temporary.rglob("*")]:
                if path.is_file():
                    descriptor = os.open(path, os.O_RDONLY)
                    os.fsync(descriptor)
                    os.close(descriptor)
            name = f"backbone-{digest[:16]}"
            if (run / name).exists():  # the same weights: what is there was whole before it had its name
                shutil.rmtree(temporary)
            else:
                os.rename(temporary, run / name)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_directory(run)
    return name


def evaluate_tuned(head: TrainedHead, cache: FeatureCache | Path | str, split: str = "test") -> MetricValues:
    """Return the metrics of a tuned run on a split of a cache, from the hidden states there, with intervals.

    Raises ``BackboneMismatchError`` for states that are not those of the run's frozen blocks, ``BundleError`` for a run
    that does not say how many blocks were trained, and ``InputError`` for a split without labels.
    """
    cache = cache if isinstance(cache, FeatureCache) else FeatureCache.open(cache)
    blocks, given = head.training.get("blocks"), blocks_entered(str(head.training.get("states")))
    if not isinstance(blocks, int) or isinstance(blocks, bool) or not 1 <= blocks <= given:
        raise BundleError(
            f"the run says that its last {blocks!r} blocks were trained, of {given} that its states enter: "
            "expected a number up to that; tune it again"
        )
    states = cached_states(cache, given)
    if head.training.get("states_hash") != states_hash(cache.spec, states.name):
        raise BackboneMismatchError(
            f"the run was trained on hidden states of other blocks, or made otherwise, than those of {cache.path}"
        )
    settings = replace(_settings(head.extraction), features=(head.feature.name,), compute_dtype="float32")
    backbone = load_again(settings, ModelSource(device="cpu"), ModelSource(head.model), "the head was trained on")
    bfloat16 = head.extraction["compute_dtype"] == "bfloat16"
    tail = TailModel(backbone, head.module, blocks, given=given, bfloat16=bfloat16)
    tail.eval()
    task, targets = task_named(head.task), targets_for(head, cache)
    rows = cache.rows(split)
    rows = rows[task.labelled(targets[rows])]
    if not len(rows):
        raise InputError(f"no row of the split {split} of {cache.path} has a label")
    logits = outputs_of(tail, CachedStates(cache, rows, states))
    return measure(
        task, targets[rows], head.calibrated(logits), head.class_names, intervals=True, thresholds=head.thresholds
    )  # fmt: skip
