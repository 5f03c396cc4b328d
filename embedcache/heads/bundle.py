"""The head bundle: a folder with a trained head, and nothing in it that can run.

::

    run/
    ├── config.json        head, task, id2label/label2id, feature set, the backbone's spec and its hash, calibration
    ├── model.safetensors  the arrays, of nearest neighbours the training rows; or model.skops for a scikit-learn
    │                      estimator that is not linear
    ├── metrics.json       what was measured, by split
    ├── history.jsonl      one line an epoch
    ├── README.md          model card
    └── backbone-SHA/      only where its last blocks were trained too: the whole network, as transformers reads it

``config.json`` is replaced last and names the file of the arrays, which is never changed: where an older head is saved
over, the new one's is ``model-SHA.safetensors``. ``folder`` writes all this.

Loading checks names, shapes, types and hashes, and trusts nothing: no pickle, no code, no file outside the folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from embedcache import decoding
from embedcache.errors import BundleError, EmbedcacheError, FeatureError, SpecError
from embedcache.features import LARGEST
from embedcache.fingerprint import hash_json, is_number, read_json, sha256_bytes, strict_json
from embedcache.heads.neighbours import FEATURES, MEAN, SCALE, TARGETS
from embedcache.heads.record import Calibration, HeadRecord
from embedcache.heads.registry import blank_head, checked_kind, kinds, refuse_unknown_options
from embedcache.heads.sklearn_io import load_estimator, outputs
from embedcache.journal import explain, explained
from embedcache.numerics import Probe
from embedcache.shard import FeatureSet
from embedcache.spec import ExtractionSpec, HeadSpec
from embedcache.task import CLASSIFICATION, MULTILABEL, Array, Task, task_named
from embedcache.wording import listed

FORMAT, MAJOR, MINOR = "embedcache-head", 1, 1
CONFIG, TENSORS, ESTIMATOR, METRICS = "config.json", "model.safetensors", "model.skops", "metrics.json"
WEIGHTS = re.compile(r"model(-[0-9a-f]{16})?\.(safetensors|skops)")
LARGEST_CONFIG = 64 << 20
_LARGEST_WEIGHTS = 4 << 30

R = TypeVar("R", bound=HeadRecord)


class Weights(NamedTuple):
    """The file of a head's arrays, or of its estimator, as the config names it."""

    file: str
    sha256: str


def to_json(value: object, indent: int | None = 1) -> str:
    """Return JSON with a newline: readable in any script, without NaN, and safe for halves of surrogate pairs."""
    plain = decoding.to_json(value)
    text = json.dumps(plain, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a half pair has no UTF-8, but it has an escape
        return json.dumps(plain, indent=indent, allow_nan=False) + "\n"
    return text


def config_of(
    head: HeadRecord, weights: Weights, facts: Mapping[str, object], beside: Mapping[str, str]
) -> dict[str, object]:
    """Return what stands in ``config.json``; ``beside`` are the sha256 of metrics, history and card."""
    config = {
        "format": FORMAT,
        "version": f"{MAJOR}.{MINOR}",
        "head": {"kind": head.spec.kind, "engine": head.spec.engine, "options": dict(head.spec.options)},
        "task": head.task,
        "id2label": {str(number): name for number, name in enumerate(head.class_names)},
        "label2id": {name: number for number, name in enumerate(head.class_names)},
        "feature": asdict(head.feature),
        "model": head.model,
        "revision": head.revision,
        "extraction": head.extraction,
        "extraction_hash": hash_json(head.extraction),
        **({} if head.probe is None else {"probe": head.probe.to_json()}),
        "calibration": dict(head.calibration),
        "training": dict(head.training),
        "facts": {str(name): str(value) for name, value in facts.items()},
        "weights": weights._asdict(),
        "beside": dict(beside),
    }
    return sealed(mapping(strict_json(to_json(config))))  # as it will be read: tuples are lists


def sealed(config: Mapping[str, object]) -> dict[str, object]:
    """Return a config with its own hash."""
    body = {name: value for name, value in config.items() if name != "hash"}
    return {**body, "hash": hash_json(body)}


def load(directory: Path, kind: type[R]) -> R:
    """Read a bundle as ``HeadRecord``, or as what is made of one.

    While another process writes, the whole old head or the whole new one is read. Raises ``BundleError`` for a folder
    that is not a bundle, and for anything wrong in it.
    """
    while True:
        seen = _state(directory)
        try:
            with explained(f"cannot read {directory}", BundleError):
                return _load(directory, kind)
        except BundleError:
            # What a config named is removed once another has taken its place.
            if seen == _state(directory):
                raise


def _state(directory: Path) -> tuple[int, int, int] | None:
    try:
        status = os.lstat(directory / CONFIG)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _load(directory: Path, kind: type[R]) -> R:
    path = directory / CONFIG
    if path.is_symlink() or not path.is_file():
        what = "has no config.json" if directory.is_dir() else "is a file" if directory.exists() else "is not there"
        raise BundleError(f"{directory} is not a run folder (it {what}): make one with embedcache train CACHE -o RUN")
    try:
        head, stored = parse(read_json(path, largest=LARGEST_CONFIG), kind)
    except EmbedcacheError as error:
        raise BundleError(f"{path}: {error}") from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {explain(error)}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise BundleError(
            f"{path} is not what a head's config must be ({reason[:200]}): train the head again"
        ) from None
    weights = directory / stored.file
    if weights.is_symlink() or not weights.is_file():
        raise BundleError(f"{weights} is missing: copy the whole folder")
    with explained(f"{weights} cannot be read", BundleError):
        if weights.stat().st_size > _LARGEST_WEIGHTS:
            raise BundleError(f"{weights} is too large to be a head's")
        data = weights.read_bytes()  # once: what is hashed is what is used
    if sha256_bytes(data) != stored.sha256:
        raise BundleError(f"{weights} is not the file that {CONFIG} names (its sha256 differs): copy the folder again")
    if weights.suffix == ".skops":
        head = replace(head, estimator=load_estimator(weights, data))
        refuse_wrong_estimator(head, weights)
        return head
    head = replace(head, state=read_tensors(weights, data))
    refuse_misfit(head, weights)
    return head


def refuse_wrong_estimator(head: HeadRecord, where: Path) -> None:
    """Raise ``BundleError`` unless an estimator takes the features and gives finite outputs of the right number."""
    width = getattr(head.estimator, "n_features_in_", None)
    if width != head.feature.dim:
        raise BundleError(f"{where} reads {width} features, and the config beside it says {head.feature.dim}")
    try:
        zeros = np.zeros((1, head.feature.dim), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below, not warned of
            values = outputs(head.estimator, zeros, task_named(head.task), len(head.class_names))
    except EmbedcacheError as error:
        raise BundleError(f"{where} does not fit the config beside it: {error}") from None
    if not np.isfinite(values).all():
        raise BundleError(f"{where}: the estimator gives {values[0, 0]} for a row of zeros: train the head again")


def parse(config: object, kind: type[R]) -> tuple[R, Weights]:
    """Turn a config into a head without arrays, and the name and hash of the file that has them.

    Raises ``BundleError`` and ``SpecError``, and as it trusts nothing also ``ValueError``, ``KeyError`` and the like.
    """
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise BundleError("this is not the config of an embedcache head (a Hugging Face model, perhaps?)")
    if config != sealed(config):
        raise BundleError("it was changed after it was written (its hash differs): copy the folder again")
    version = str(config.get("version"))
    if version.split(".")[0] != str(MAJOR):
        raise BundleError(f"the bundle has format {version}, and this version reads {MAJOR}.x: upgrade embedcache")
    task = task_named(config["task"])
    spec = _head_spec(mapping(config["head"]), task)
    names = _class_names(mapping(config["id2label"]), config["label2id"])
    extraction = ExtractionSpec(mapping(config["extraction"]))
    if hash_json(extraction) != config["extraction_hash"]:
        raise BundleError("the backbone's spec was changed after it was written (its hash differs)")
    named = mapping(config["weights"])
    weights = Weights(str(named["file"]), str(named["sha256"]))
    skops = weights.file.endswith(".skops")
    if not WEIGHTS.fullmatch(weights.file) or (skops and spec.engine != "sklearn"):
        raise BundleError(f"weights in {weights.file!r}: expected {TENSORS} or {ESTIMATOR}")
    model, revision = config["model"], config["revision"]
    if not all(value is None or isinstance(value, str) for value in (model, revision)):
        raise BundleError("model or revision is not a text")
    feature = FeatureSet(**{name: config["feature"][name] for name in ("name", "kind", "dim", "layers", "dtype")})
    head = kind(
        spec, task.name, names, feature, extraction=extraction, model=model, revision=revision,
        probe=decoding.from_json(Probe, config["probe"]) if "probe" in config else None,
        calibration=_calibration(mapping(config["calibration"]), task, len(names)),
        training=mapping(config["training"]),
    )  # fmt: skip
    return head, weights


def mapping(value: object) -> dict[str, Any]:
    """Return a JSON value that is an object. Raises ``ValueError`` for any other."""
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not a mapping")
    return value


def _head_spec(written: Mapping[str, Any], task: Task) -> HeadSpec:
    spec = HeadSpec(written["kind"], written["engine"], mapping(written["options"]))
    if spec.kind not in kinds(spec.engine):
        raise SpecError(
            f"this version has no head {spec.kind!r} on {spec.engine}: it has {', '.join(kinds(spec.engine))}; "
            "a head of your own must be registered before its bundle is loaded"
        )
    if spec.engine == "sklearn":
        checked_kind(spec, task)
    elif spec.kind == "linear":
        refuse_unknown_options(spec, ())
    return spec


def _class_names(id2label: Mapping[str, object], label2id: object) -> tuple[str, ...]:
    names = [id2label[str(number)] for number in range(len(id2label))]
    texts = [name for name in names if isinstance(name, str)]
    if not names or len(texts) != len(names) or len(set(texts)) != len(names):
        raise ValueError("id2label does not name each class once, from 0 on")
    if label2id != {name: number for number, name in enumerate(texts)}:
        raise ValueError("label2id is not the inverse of id2label")
    return tuple(texts)


def _calibration(written: Mapping[str, object], task: Task, outputs: int) -> Calibration:
    allowed = {CLASSIFICATION: ["temperature"], MULTILABEL: ["thresholds"]}.get(task, [])
    if not written.keys() <= set(allowed):
        raise ValueError(f"calibration is {sorted(written)}, expected {allowed or 'none'} for {task}")
    if "temperature" in written:
        temperature = written["temperature"]
        if not is_number(temperature) or not 1e-6 < temperature < 1e6:
            raise ValueError(f"the temperature is {temperature!r}")
        return {"temperature": temperature}
    if "thresholds" in written:
        thresholds = written["thresholds"]
        if not isinstance(thresholds, list) or len(thresholds) != outputs:
            raise ValueError(f"expected {outputs} thresholds")
        # Above 1 stands for a label that is never given.
        if not all(is_number(threshold) and 0 <= threshold <= 2 for threshold in thresholds):
            raise ValueError("a threshold is not a probability")
        return {"thresholds": thresholds}
    return {}


def read_tensors(path: Path, data: bytes) -> dict[str, Array]:
    """Read the bytes of a safetensors file. Raises ``BundleError`` when it is none."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return dict(load(data))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, MemoryError) as error:
        raise BundleError(f"{path} cannot be read as safetensors: {str(error)[:200]}") from None


def refuse_misfit(head: HeadRecord, where: Path) -> None:
    """Raise ``BundleError`` for missing, extra, misshapen, wrongly typed or non-finite arrays."""
    expected = _array_shapes(head, where)
    if missing := sorted(set(expected) - set(head.state)):
        raise BundleError(f"{where} lacks the array {listed(missing, 1)}: train the head again")
    if extra := sorted(set(head.state) - set(expected)):
        raise BundleError(f"{where} holds an array {extra[0]!r} that the head {head.spec.kind} does not have")
    for name, shape in expected.items():
        if name == TARGETS:
            continue
        value = head.state[name]
        if value.shape != shape:
            raise BundleError(f"{where}: {name} has the shape {value.shape}, expected {shape}")
        if value.dtype not in (np.float32, np.float64):
            raise BundleError(f"{where}: {name} is of type {value.dtype}, expected float32 or float64")
        if not np.isfinite(value).all():
            raise BundleError(f"{where}: {name} holds NaN or infinity")
        if head.votes and np.abs(value).max(initial=0) > LARGEST:
            raise BundleError(f"{where}: {name} holds {np.abs(value).max():.3g}, expected {LARGEST:g} at most")
    if head.votes:
        _refuse_wrong_targets(head, where)


def _refuse_wrong_targets(head: HeadRecord, where: Path) -> None:
    """Raise ``BundleError`` for targets that no row can have: votes are counted by them, without looking."""
    task, rows, targets = task_named(head.task), len(head.state[FEATURES]), head.state[TARGETS]
    shape = task.target_shape(rows, len(head.class_names))
    if not rows or targets.shape != shape or targets.dtype != task.dtype:
        found = f"{targets.dtype} {list(targets.shape)}"
        raise BundleError(f"{where}: {TARGETS} is {found}, expected {task.dtype} {list(shape)} and a row at least")
    if (fault := task.stored_fault(targets, len(head.class_names))) or not task.labelled(targets).all():
        raise BundleError(f"{where}: {TARGETS} is not that of labelled rows ({fault or 'a row has none'})")


def _array_shapes(head: HeadRecord, where: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a head's arrays, with those of the standardisation where it has one."""
    outputs, dim = len(head.class_names), head.feature.dim
    if (head.spec.engine, head.spec.kind) == ("sklearn", "knn"):
        rows = head.state[FEATURES].shape[:1] if FEATURES in head.state else ()
        scaled = (MEAN, SCALE) if {MEAN, SCALE} & set(head.state) else ()
        return {FEATURES: (*rows, dim), TARGETS: (), **dict.fromkeys(scaled, (dim,))}
    if head.linear or head.spec.engine == "sklearn":
        shapes: dict[str, tuple[int, ...]] = {"output.weight": (outputs, dim), "output.bias": (outputs,)}
        first = ["output"]
    else:
        import torch

        try:
            with torch.device("meta"):  # shapes without memory: a stranger may ask for a huge head
                module = blank_head(head.spec, head.feature, outputs)
        except (SpecError, FeatureError, TypeError, ValueError, RuntimeError) as error:
            raise BundleError(f"{where.parent / CONFIG} asks for a head that cannot be: {error}") from None
        shapes = {name: tuple(value.shape) for name, value in module.named_parameters()}
        reading = list(module.first_layers())
        first = [name for name, part in module.named_modules() if any(part is layer for layer in reading)]
    moments = [f"{layer}.{name}" for layer in first for name in ("mean", "scale")]
    if any(name in head.state for name in moments):  # all or none: half a standardisation is another head
        shapes |= {name: (dim,) for name in moments}
    return shapes
