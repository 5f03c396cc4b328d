"""The head bundle: a folder with a trained head, and nothing in it that can run.

::

    run/
    ├── config.json        head, task, id2label/label2id, feature set, the backbone's spec and its hash, calibration
    ├── model.safetensors  the arrays; or model.skops for a scikit-learn estimator that is not linear
    ├── metrics.json       what was measured, by split
    ├── history.jsonl      one line an epoch
    └── README.md          model card

``config.json`` is replaced last and names the file of the arrays, which is never changed: where an older head is saved
over, the new one's is ``model-SHA.safetensors``. ``folder`` writes all this.

Loading checks names, shapes, types and hashes, and trusts nothing: no pickle, no code, no file outside the folder.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from embedcache.errors import BundleError, EmbedcacheError, FeatureError, SpecError
from embedcache.fingerprint import hash_json, read_json, sha256_bytes, strict_json
from embedcache.heads.record import HeadRecord
from embedcache.heads.registry import blank_head, checked_kind, kinds, refuse_unknown_options
from embedcache.heads.sklearn_io import load_estimator
from embedcache.heads.sklearn_outputs import outputs
from embedcache.journal import explain, explained
from embedcache.numerics import Probe
from embedcache.shard import FeatureSet
from embedcache.spec import TASKS, HeadSpec

R = TypeVar("R", bound=HeadRecord)

FORMAT, MAJOR, MINOR = "embedcache-head", 1, 1
CONFIG, TENSORS, ESTIMATOR, METRICS = "config.json", "model.safetensors", "model.skops", "metrics.json"
WEIGHTS = re.compile(r"model(-[0-9a-f]{16})?\.(safetensors|skops)")
LARGEST_CONFIG = 64 << 20
_LARGEST_WEIGHTS = 4 << 30


def to_json(value: Any, indent: int | None = 1) -> str:
    """Return JSON with a newline: readable in any script, without NaN, and safe for halves of surrogate pairs."""
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    return text if _encodes(text) else json.dumps(_finite(value), indent=indent, allow_nan=False) + "\n"


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _finite(value: Any) -> Any:
    """Return a value in which NaN and infinity are null, which is all that JSON can say of them."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def config_of(
    head: HeadRecord, weights: str, sha256: str, facts: Mapping[str, Any], beside: Mapping[str, str]
) -> dict[str, Any]:
    """Return what stands in ``config.json``; ``beside`` are the sha256 of metrics, history and card."""
    config = {
        "format": FORMAT,
        "version": f"{MAJOR}.{MINOR}",
        "head": {"kind": head.spec.kind, "engine": head.spec.engine, "options": dict(head.spec.options)},
        "task": head.task,
        "id2label": {str(at): name for at, name in enumerate(head.class_names)},
        "label2id": {name: at for at, name in enumerate(head.class_names)},
        "feature": asdict(head.feature),
        "model": head.model,
        "revision": head.revision,
        "extraction": dict(head.extraction),
        "extraction_hash": hash_json(dict(head.extraction)),
        **({} if head.probe is None else {"probe": head.probe.to_json()}),
        "calibration": dict(head.calibration),
        "training": dict(head.training),
        "facts": {str(name): str(value) for name, value in facts.items()},
        "weights": {"file": weights, "sha256": sha256},
        "beside": dict(beside),
    }
    config = strict_json(to_json(config))  # as it will be read: tuples are lists
    return sealed(config)


def sealed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with its own hash."""
    body = {name: value for name, value in config.items() if name != "hash"}
    return {**body, "hash": hash_json(body)}


def load(directory: Path, made: type[R]) -> R:
    """Read a bundle as ``HeadRecord``, or as what is made of one.

    Beside a writer it is the old head or the new one, whole. Raises ``BundleError`` for a folder that is not a bundle,
    and for anything in it that is not right.
    """
    while True:
        seen = _state(directory)
        try:
            with explained(f"cannot read {directory}", BundleError):
                return _load(directory, made)
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


def _load(directory: Path, made: type[R]) -> R:
    path = directory / CONFIG
    if path.is_symlink() or not path.is_file():
        what = "has no config.json" if directory.is_dir() else "is a file" if directory.exists() else "is not there"
        raise BundleError(f"{directory} is no run folder (it {what}): make one with embedcache train CACHE -o RUN")
    try:
        config = read_json(path, largest=LARGEST_CONFIG)
        head, file = parse(config, made)
    except EmbedcacheError as error:
        raise BundleError(f"{path}: {error}") from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {explain(error)}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise BundleError(
            f"{path} is not what a head's config must be ({reason[:200]}): train the head again"
        ) from None
    weights = directory / file["file"]
    if weights.is_symlink() or not weights.is_file():
        raise BundleError(f"{weights} is missing: copy the whole folder")
    with explained(f"{weights} cannot be read", BundleError):
        if weights.stat().st_size > _LARGEST_WEIGHTS:
            raise BundleError(f"{weights} is too large to be a head's")
        data = weights.read_bytes()  # once: what is hashed is what is used
    if sha256_bytes(data) != file["sha256"]:
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
    takes = getattr(head.estimator, "n_features_in_", None)
    if takes != head.feature.dim:
        raise BundleError(f"{where} reads {takes} features, and the config beside it says {head.feature.dim}")
    try:
        zeros = np.zeros((1, head.feature.dim), np.float32)
        values = outputs(head.estimator, zeros, head.task, len(head.class_names))
    except EmbedcacheError as error:
        raise BundleError(f"{where} does not fit the config beside it: {error}") from None
    if not np.isfinite(values).all():
        raise BundleError(f"{where}: the estimator gives {values[0, 0]} for a row of zeros: train the head again")


def parse(config: Any, made: type[R]) -> tuple[R, dict[str, str]]:
    """Turn a config into a head without arrays, and the name and hash of its weights."""
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise BundleError("this is not the config of an embedcache head (a Hugging Face model, perhaps?)")
    if config.get("hash") != hash_json({name: value for name, value in config.items() if name != "hash"}):
        raise BundleError("it was changed after it was written (its hash differs): copy the folder again")
    version = str(config.get("version"))
    if version.split(".")[0] != str(MAJOR):
        raise BundleError(f"the bundle has format {version}, and this version reads {MAJOR}.x: upgrade embedcache")
    wanted = mapping(config["head"])
    spec = HeadSpec(wanted["kind"], wanted["engine"], mapping(wanted["options"]))
    if not isinstance(spec.kind, str) or spec.kind not in kinds(spec.engine):
        raise SpecError(
            f"this version has no head {spec.kind!r} on {spec.engine}: it has {', '.join(kinds(spec.engine))}; "
            "a head of your own must be registered before its bundle is loaded"
        )
    if not isinstance(config["task"], str) or config["task"] not in TASKS:
        raise SpecError(f"unknown task {config['task']!r}: expected one of {', '.join(TASKS)}")
    if spec.engine == "sklearn":
        checked_kind(spec, config["task"])
    elif spec.kind == "linear":
        refuse_unknown_options(spec, ())
    names = _names(config["id2label"], config["label2id"])
    extraction = mapping(config["extraction"])
    if hash_json(extraction) != config["extraction_hash"]:
        raise BundleError("the backbone's spec was changed after it was written (its hash differs)")
    file = {name: str(config["weights"][name]) for name in ("file", "sha256")}
    skops = file["file"].endswith(".skops")
    if not WEIGHTS.fullmatch(file["file"]) or (skops and spec.engine != "sklearn"):
        raise BundleError(f"weights in {file['file']!r}: expected {TENSORS} or {ESTIMATOR}")
    model, revision = config["model"], config["revision"]
    if not all(value is None or isinstance(value, str) for value in (model, revision)):
        raise BundleError("model or revision is no text")
    feature = FeatureSet(**{name: config["feature"][name] for name in ("name", "kind", "dim", "layers", "dtype")})
    calibration = _calibration(mapping(config["calibration"]), config["task"], len(names))
    head = made(
        spec, config["task"], names, feature, extraction=extraction, model=model, revision=revision,
        probe=Probe.from_json(config["probe"]) if "probe" in config else None,
        calibration=calibration, training=mapping(config["training"]),
    )  # fmt: skip
    return head, file


def mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no mapping")
    return value


def _names(id2label: Any, label2id: Any) -> tuple[str, ...]:
    names = [mapping(id2label)[str(at)] for at in range(len(id2label))]
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise ValueError("id2label does not name each class once, from 0 on")
    if label2id != {name: at for at, name in enumerate(names)}:
        raise ValueError("label2id is not the inverse of id2label")
    return tuple(names)


def _calibration(found: dict[str, Any], task: str, outputs: int) -> dict[str, Any]:
    allowed = {"classification": {"temperature"}, "multilabel": {"thresholds"}}.get(task, set())
    if set(found) - allowed:
        raise ValueError(f"calibration is {sorted(found)}, expected {sorted(allowed) or 'none'} for {task}")
    temperature, thresholds = found.get("temperature", 1.0), found.get("thresholds", [0.5] * outputs)
    if not _number(temperature) or not 1e-6 < temperature < 1e6:
        raise ValueError(f"the temperature is {temperature!r}")
    if not isinstance(thresholds, list) or len(thresholds) != outputs:
        raise ValueError(f"expected {outputs} thresholds")
    if not all(_number(each) and 0 <= each <= 2 for each in thresholds):
        raise ValueError("a threshold is no probability")
    return found


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_tensors(path: Path, data: bytes) -> dict[str, Any]:
    """Read the bytes of a safetensors file. Raises ``BundleError`` when it is none."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return dict(load(data))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, MemoryError) as error:
        raise BundleError(f"{path} cannot be read as safetensors: {str(error)[:200]}") from None


def refuse_misfit(head: HeadRecord, where: Path) -> None:
    """Raise ``BundleError`` for missing, extra, misshapen, wrongly typed or non-finite arrays."""
    outputs, dim = len(head.class_names), head.feature.dim
    if head.spec.engine == "sklearn" or head.spec.kind == "linear":
        expected: dict[str, tuple[int, ...]] = {"output.weight": (outputs, dim), "output.bias": (outputs,)}
        first = ["output"]
    else:
        import torch

        try:
            with torch.device("meta"):
                module = blank_head(head.spec, head.feature, len(head.class_names))
        except (SpecError, FeatureError, TypeError, ValueError, RuntimeError) as error:
            raise BundleError(f"{where.parent / CONFIG} asks for a head that cannot be: {error}") from None
        expected = {name: tuple(value.shape) for name, value in module.named_parameters()}
        reading = list(module.first_layers())
        first = [name for name, each in module.named_modules() if any(each is layer for layer in reading)]
    moments = [f"{layer}.{name}" for layer in first for name in ("mean", "scale")]
    if any(name in head.state for name in moments):  # all or none: half a standardisation is another head
        expected |= {name: (dim,) for name in moments}
    if missing := sorted(set(expected) - set(head.state)):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BundleError(f"{where} lacks the array {missing[0]}{more}: train the head again")
    if extra := sorted(set(head.state) - set(expected)):
        raise BundleError(f"{where} holds an array {extra[0]!r} that the head {head.spec.kind} does not have")
    for name, shape in expected.items():
        value = head.state[name]
        if value.shape != shape:
            raise BundleError(f"{where}: {name} has the shape {value.shape}, expected {shape}")
        if value.dtype not in (np.float32, np.float64):
            raise BundleError(f"{where}: {name} is of type {value.dtype}, expected float32 or float64")
        if not np.isfinite(value).all():
            raise BundleError(f"{where}: {name} holds NaN or infinity")
