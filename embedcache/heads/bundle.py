"""The head bundle: a folder with a trained head, and nothing in it that can run.

::

    run/
    ├── config.json        head, task, id2label/label2id, feature set, the backbone's spec and its hash, calibration
    ├── model.safetensors  the arrays; or model.skops for a scikit-learn estimator that is not linear
    ├── metrics.json       what was measured, by split
    ├── history.jsonl      one line an epoch
    └── README.md          model card

Loading checks names, shapes, types and hashes, and trusts nothing: no pickle, no code, no file outside the folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedcache.errors import BundleError, EmbedcacheError, FeatureError, SpecError
from embedcache.fingerprint import hash_json, sha256_file, strict_json
from embedcache.heads.card import model_card
from embedcache.heads.registry import build_head, kinds
from embedcache.heads.trained import LINEAR, TrainedHead
from embedcache.shard import FeatureSet
from embedcache.spec import TASKS, HeadSpec

if TYPE_CHECKING:
    from embedcache.heads.modules import Head

FORMAT, MAJOR, MINOR = "embedcache-head", 1, 0
CONFIG, TENSORS, ESTIMATOR = "config.json", "model.safetensors", "model.skops"
_LARGEST_CONFIG = 64 << 20


def save(
    head: TrainedHead,
    directory: Path,
    *,
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
) -> None:
    """Write a bundle; ``config.json`` comes last, so that a folder with one is whole.

    ``facts`` are further lines of the model card. Raises ``BundleError`` when the folder is something else or cannot
    be written.
    """
    try:
        if directory.exists() and not directory.is_dir():
            raise BundleError(f"{directory} is a file: choose a new or an empty directory")
        if directory.is_dir() and any(directory.iterdir()) and not (directory / CONFIG).is_file():
            raise BundleError(f"{directory} holds something else than a head: choose a new or an empty directory")
        directory.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG, TENSORS, ESTIMATOR):  # a half-replaced bundle must not look whole
            (directory / name).unlink(missing_ok=True)
        weights = directory / (TENSORS if head.state else ESTIMATOR)
        if head.state:
            from safetensors.numpy import save_file

            save_file({name: np.ascontiguousarray(value) for name, value in head.state.items()}, weights)
        else:
            from embedcache.heads.sklearn_kinds import save_estimator

            save_estimator(weights, head.estimator)
        (directory / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", "utf-8")
        lines = "".join(json.dumps(dict(each)) + "\n" for each in history)
        (directory / "history.jsonl").write_text(lines, "utf-8")
        (directory / "README.md").write_text(model_card(head, metrics, facts), "utf-8")
        partial = directory / f".{CONFIG}.tmp"
        partial.write_text(json.dumps(config_of(head, weights), indent=1, ensure_ascii=False) + "\n", "utf-8")
        os.replace(partial, directory / CONFIG)
    except OSError as error:
        if isinstance(error, EmbedcacheError):
            raise
        raise BundleError(f"cannot write {directory}: {error.strerror or error}") from error


def config_of(head: TrainedHead, weights: Path) -> dict[str, Any]:
    """Return what stands in ``config.json``."""
    return {
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
        "calibration": dict(head.calibration),
        "training": dict(head.training),
        "weights": {"file": weights.name, "sha256": sha256_file(weights)},
    }


def load(directory: Path) -> TrainedHead:
    """Read a bundle. Raises ``BundleError`` for a folder that is none, and for anything in it that is not right."""
    path = directory / CONFIG
    if not path.is_file() or path.is_symlink():
        what = "has no config.json" if directory.is_dir() else "is not there" if not directory.exists() else "is a file"
        raise BundleError(f"{directory} is no run folder (it {what}): make one with embedcache train CACHE -o RUN")
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise BundleError(f"{path} is too large to be a head's")
        config = strict_json(path.read_bytes().decode("utf-8"))
        head, file = parse(config)
    except EmbedcacheError as error:
        raise BundleError(f"{path}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise BundleError(f"{path} is not what a head's config must be ({reason}): train the head again") from None
    weights = directory / file["file"]
    if not weights.is_file() or weights.is_symlink():
        raise BundleError(f"{weights} is missing: copy the whole folder")
    if sha256_file(weights) != file["sha256"]:
        raise BundleError(f"{weights} is not the file that {CONFIG} names (its sha256 differs): copy the folder again")
    from dataclasses import replace

    if file["file"] == ESTIMATOR:
        from embedcache.heads.sklearn_kinds import load_estimator

        return replace(head, estimator=load_estimator(weights))
    head = replace(head, state=read_tensors(weights))
    refuse_misfit(head, weights)
    return head


def parse(config: Any) -> tuple[TrainedHead, dict[str, str]]:
    """Turn a config into a head without arrays, and the name and hash of its weights."""
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise BundleError("this is not the config of an embedcache head (a Hugging Face model, perhaps?)")
    version = str(config.get("version"))
    if version.split(".")[0] != str(MAJOR):
        raise BundleError(f"the bundle has format {version}, and this version reads {MAJOR}.x: upgrade embedcache")
    kind, engine, options = (config["head"][name] for name in ("kind", "engine", "options"))
    spec = HeadSpec(kind, engine, _mapping(options))
    if kind not in kinds(engine):
        raise SpecError(f"this version has no head {kind!r} on {engine}: it has {', '.join(kinds(engine))}")
    if config["task"] not in TASKS:
        raise SpecError(f"unknown task {config['task']!r}")
    names = _names(config["id2label"], config["label2id"])
    extraction = _mapping(config["extraction"])
    if hash_json(extraction) != config["extraction_hash"]:
        raise BundleError("the backbone's spec was changed after it was written (its hash differs)")
    file = {name: str(config["weights"][name]) for name in ("file", "sha256")}
    if file["file"] not in (TENSORS, ESTIMATOR) or (file["file"] == ESTIMATOR and engine != "sklearn"):
        raise BundleError(f"weights in {file['file']!r}: expected {TENSORS} or {ESTIMATOR}")
    model, revision = config["model"], config["revision"]
    if not all(value is None or isinstance(value, str) for value in (model, revision)):
        raise BundleError("model or revision is no text")
    feature = FeatureSet(**{name: config["feature"][name] for name in ("name", "kind", "dim", "layers", "dtype")})
    calibration = _calibration(_mapping(config["calibration"]), len(names))
    head = TrainedHead(
        spec, config["task"], names, feature, extraction=extraction, model=model, revision=revision,
        calibration=calibration, training=_mapping(config["training"]),
    )  # fmt: skip
    return head, file


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no mapping")
    return value


def _names(id2label: Any, label2id: Any) -> tuple[str, ...]:
    names = [_mapping(id2label)[str(at)] for at in range(len(id2label))]
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise ValueError("id2label does not name each class once")
    if label2id != {name: at for at, name in enumerate(names)}:
        raise ValueError("label2id is not the inverse of id2label")
    return tuple(names)


def _calibration(found: dict[str, Any], outputs: int) -> dict[str, Any]:
    temperature, thresholds = found.get("temperature", 1.0), found.get("thresholds", [0.5] * outputs)
    fine = isinstance(temperature, (int, float)) and 0 < temperature < 1e6 and isinstance(thresholds, list)
    if not fine or set(found) - {"temperature", "thresholds"} or len(thresholds) != outputs:
        raise ValueError("calibration is neither a temperature nor thresholds")
    if not all(isinstance(each, (int, float)) and 0 <= each <= 2 for each in thresholds):
        raise ValueError("a threshold is no probability")
    return found


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a safetensors file. Raises ``BundleError`` when it is none."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise BundleError(f"{path} cannot be read as safetensors: {str(error)[:200]}") from None


def refuse_misfit(head: TrainedHead, where: Path) -> None:
    """Raise ``BundleError`` for missing, extra, misshapen, wrongly typed or non-finite arrays."""
    outputs, dim = len(head.class_names), head.feature.dim
    if head.spec.engine == "sklearn" or head.spec.kind == "linear":
        expected: dict[str, tuple[int, ...]] = {"output.weight": (outputs, dim), "output.bias": (outputs,)}
    else:
        import torch

        try:
            with torch.device("meta"):
                module = _blank(head)
        except (SpecError, FeatureError, TypeError) as error:
            raise BundleError(f"{where.parent / CONFIG} asks for a head that cannot be: {error}") from None
        expected = {name: tuple(value.shape) for name, value in module.named_parameters()}
    optional = {f"{layer}.{name}" for layer in ("output", "input", "hidden.0") for name in ("mean", "scale")}
    standardised = {name for name in head.state if name in optional}
    expected |= {name: (dim,) for name in standardised}
    if missing := sorted(set(expected) - set(head.state)):
        raise BundleError(f"{where} lacks the array {missing[0]} (and {len(missing) - 1} more): train the head again")
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


def _blank(head: TrainedHead) -> Head:
    from embedcache.heads.registry import head_class

    return head_class(head.spec.kind)(head.feature, len(head.class_names), **head.spec.options)


def module_of(head: TrainedHead) -> Head:
    """Return a head's torch module with its arrays in it. Raises ``SpecError`` where there is none."""
    import torch

    if not head.state:
        raise SpecError(f"the head {head.spec.kind} is a scikit-learn estimator: it has no torch module")
    spec = head.spec if not head.linear else HeadSpec("linear")
    module = build_head(spec, head.feature, len(head.class_names))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(head.state[name], np.float32)))
    layer = next((name.rpartition(".")[0] for name in head.state if name.endswith(".mean")), None)
    if layer is not None:
        arrays = (torch.from_numpy(np.array(head.state[f"{layer}.{name}"], np.float32)) for name in ("mean", "scale"))
        module.standardize(*arrays)
    return module


__all__ = ["LINEAR", "load", "module_of", "save"]
