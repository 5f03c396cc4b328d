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

import contextlib
import inspect
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedcache.errors import BundleError, EmbedcacheError, FeatureError, SpecError
from embedcache.fingerprint import hash_json, read_json, sha256_file, strict_json
from embedcache.heads.card import model_card
from embedcache.heads.registry import build_head, head_class, kinds, refuse_unknown_options
from embedcache.heads.trained import TrainedHead
from embedcache.shard import FeatureSet
from embedcache.spec import TASKS, HeadSpec

if TYPE_CHECKING:
    from embedcache.heads.modules import Head

FORMAT, MAJOR, MINOR = "embedcache-head", 1, 0
CONFIG, TENSORS, ESTIMATOR, METRICS = "config.json", "model.safetensors", "model.skops", "metrics.json"
_FILES = (CONFIG, TENSORS, ESTIMATOR, METRICS, "history.jsonl", "README.md")
OURS = {*_FILES[1:], *(f".{name}.tmp" for name in _FILES)}
"""What a half-written bundle may hold."""
_WEIGHTS = {TENSORS, ESTIMATOR, f".{TENSORS}.tmp", f".{ESTIMATOR}.tmp"}
_LARGEST_CONFIG = 64 << 20


def save(
    head: TrainedHead,
    directory: Path,
    *,
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
) -> None:
    """Write a bundle. Whenever it is cut short, the folder holds the old head, whole, or none that would load.

    ``facts`` are further lines of the model card. Raises ``BundleError`` when the folder is something else or cannot
    be written.
    """
    weights, other = (TENSORS, ESTIMATOR) if head.state else (ESTIMATOR, TENSORS)
    made: list[Path] = []
    try:
        prepare(directory)
        made.append(directory / f".{weights}.tmp")
        if head.state:
            from safetensors.numpy import save_file

            save_file({name: np.ascontiguousarray(value) for name, value in head.state.items()}, made[0])
        else:
            from embedcache.heads.sklearn_kinds import save_estimator

            save_estimator(made[0], head.estimator)
        config = config_of(head, weights, sha256_file(made[0]), facts)
        parse(strict_json(_json(config)))  # what could not be read again is not written
        made.append(directory / f".{CONFIG}.tmp")
        made[1].write_text(_json(config), "utf-8")
        lines = "".join(_json(dict(each), None) for each in history)
        for name in (CONFIG, other):  # a half-replaced bundle must not look whole
            (directory / name).unlink(missing_ok=True)
        os.replace(made[0], directory / weights)
        _write(directory / METRICS, _json(metrics))
        _write(directory / "history.jsonl", lines)
        _write(directory / "README.md", model_card(head, metrics, facts))
        os.replace(made[1], directory / CONFIG)
    except OSError as error:
        if isinstance(error, EmbedcacheError):
            raise
        raise BundleError(f"cannot write {directory}: {error.strerror or error}") from error
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def prepare(directory: Path) -> None:
    """Make the folder of a bundle. Raises ``BundleError`` where it is a file, holds something else or cannot be made.

    Worth calling before training, not only after it.
    """
    try:
        if directory.exists() and not directory.is_dir():
            raise BundleError(f"{directory} is a file: choose a new or an empty directory")
        there = {each.name for each in directory.iterdir()} if directory.is_dir() else set()
        half_written = there <= OURS and bool(there & _WEIGHTS)
        if there and CONFIG not in there and not half_written:
            raise BundleError(f"{directory} holds something else than a head: choose a new or an empty directory")
        if CONFIG in there and not _is_ours(directory / CONFIG):
            raise BundleError(f"{directory} holds another model than a head: choose a new or an empty directory")
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise BundleError(f"cannot write {directory}: Permission denied")
    except OSError as error:
        if isinstance(error, EmbedcacheError):
            raise
        raise BundleError(f"cannot write {directory}: {error.strerror or error}") from error


def _is_ours(path: Path) -> bool:
    """Return whether a config may be replaced: one of ours, even damaged, but nobody else's."""
    try:
        if path.is_symlink() or path.stat().st_size > _LARGEST_CONFIG:
            return False
        return FORMAT in path.read_bytes()[:200].decode("utf-8", "replace")
    except OSError:
        return False


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)


def _json(value: Any, indent: int | None = 1) -> str:
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


def record(directory: Path, split: str, measured: Mapping[str, Any]) -> None:
    """Add what was measured on a split to the metrics and the model card of a bundle.

    Raises ``BundleError`` for a folder that is no bundle or cannot be written.
    """
    head = load(directory)
    try:
        config = read_json(directory / CONFIG)
        metrics = read_json(directory / METRICS) if (directory / METRICS).is_file() else {}
        metrics = {**_mapping(metrics), split: dict(measured)}
        _write(directory / METRICS, _json(metrics))
        _write(directory / "README.md", model_card(head, metrics, _mapping(config.get("facts", {}))))
    except OSError as error:
        raise BundleError(f"cannot write {directory}: {error.strerror or error}") from error
    except ValueError as error:
        raise BundleError(f"{directory / METRICS} is not what a head's metrics must be ({error})") from None


def config_of(head: TrainedHead, weights: str, sha256: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what stands in ``config.json``."""
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
        "calibration": dict(head.calibration),
        "training": dict(head.training),
        "facts": {str(name): str(value) for name, value in facts.items()},
        "weights": {"file": weights, "sha256": sha256},
    }
    config = strict_json(_json(config))  # as it will be read: tuples are lists
    return {**config, "hash": hash_json(config)}


def load(directory: Path) -> TrainedHead:
    """Read a bundle. Raises ``BundleError`` for a folder that is none, and for anything in it that is not right."""
    path = directory / CONFIG
    if path.is_symlink() or not path.is_file():
        what = "has no config.json" if directory.is_dir() else "is a file" if directory.exists() else "is not there"
        raise BundleError(f"{directory} is no run folder (it {what}): make one with embedcache train CACHE -o RUN")
    try:
        config = read_json(path, largest=_LARGEST_CONFIG)
        head, file = parse(config)
    except EmbedcacheError as error:
        raise BundleError(f"{path}: {error}") from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise BundleError(
            f"{path} is not what a head's config must be ({reason[:200]}): train the head again"
        ) from None
    weights = directory / file["file"]
    if weights.is_symlink() or not weights.is_file():
        raise BundleError(f"{weights} is missing: copy the whole folder")
    try:
        if sha256_file(weights) != file["sha256"]:
            raise BundleError(
                f"{weights} is not the file that {CONFIG} names (its sha256 differs): copy the folder again"
            )
    except OSError as error:
        if isinstance(error, EmbedcacheError):
            raise
        raise BundleError(f"{weights} cannot be read: {error.strerror or error}") from None
    if file["file"] == ESTIMATOR:
        from embedcache.heads.sklearn_kinds import load_estimator

        head = replace(head, estimator=load_estimator(weights))
        refuse_wrong_estimator(head, weights)
        return head
    head = replace(head, state=read_tensors(weights))
    refuse_misfit(head, weights)
    return head


def refuse_wrong_estimator(head: TrainedHead, where: Path) -> None:
    """Raise ``BundleError`` unless an estimator takes the features and gives finite outputs of the right number."""
    takes = getattr(head.estimator, "n_features_in_", None)
    if takes != head.feature.dim:
        raise BundleError(f"{where} reads {takes} features, and the config beside it says {head.feature.dim}")
    try:
        said = head.logits(np.zeros((1, head.feature.dim), np.float32))
    except EmbedcacheError as error:
        raise BundleError(f"{where} does not fit the config beside it: {error}") from None
    if not np.isfinite(said).all():
        raise BundleError(f"{where}: the estimator says {said[0, 0]} of a row of zeros: train the head again")


def parse(config: Any) -> tuple[TrainedHead, dict[str, str]]:
    """Turn a config into a head without arrays, and the name and hash of its weights."""
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise BundleError("this is not the config of an embedcache head (a Hugging Face model, perhaps?)")
    if config.get("hash") != hash_json({name: value for name, value in config.items() if name != "hash"}):
        raise BundleError("it was changed after it was written (its hash differs): copy the folder again")
    version = str(config.get("version"))
    if version.split(".")[0] != str(MAJOR):
        raise BundleError(f"the bundle has format {version}, and this version reads {MAJOR}.x: upgrade embedcache")
    wanted = _mapping(config["head"])
    spec = HeadSpec(wanted["kind"], wanted["engine"], _mapping(wanted["options"]))
    if not isinstance(spec.kind, str) or spec.kind not in kinds(spec.engine):
        raise SpecError(
            f"this version has no head {spec.kind!r} on {spec.engine}: it has {', '.join(kinds(spec.engine))}; "
            "a head of your own must be registered before its bundle is loaded"
        )
    if not isinstance(config["task"], str) or config["task"] not in TASKS:
        raise SpecError(f"unknown task {config['task']!r}: expected one of {', '.join(TASKS)}")
    if spec.engine == "sklearn":
        from embedcache.heads.sklearn_kinds import checked_kind

        checked_kind(spec, config["task"])
    elif spec.kind == "linear":
        refuse_unknown_options(spec, ())
    names = _names(config["id2label"], config["label2id"])
    extraction = _mapping(config["extraction"])
    if hash_json(extraction) != config["extraction_hash"]:
        raise BundleError("the backbone's spec was changed after it was written (its hash differs)")
    file = {name: str(config["weights"][name]) for name in ("file", "sha256")}
    if file["file"] not in (TENSORS, ESTIMATOR) or (file["file"] == ESTIMATOR and spec.engine != "sklearn"):
        raise BundleError(f"weights in {file['file']!r}: expected {TENSORS} or {ESTIMATOR}")
    model, revision = config["model"], config["revision"]
    if not all(value is None or isinstance(value, str) for value in (model, revision)):
        raise BundleError("model or revision is no text")
    feature = FeatureSet(**{name: config["feature"][name] for name in ("name", "kind", "dim", "layers", "dtype")})
    calibration = _calibration(_mapping(config["calibration"]), config["task"], len(names))
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


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a safetensors file. Raises ``BundleError`` when it is none."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, MemoryError) as error:
        raise BundleError(f"{path} cannot be read as safetensors: {str(error)[:200]}") from None


def refuse_misfit(head: TrainedHead, where: Path) -> None:
    """Raise ``BundleError`` for missing, extra, misshapen, wrongly typed or non-finite arrays."""
    outputs, dim = len(head.class_names), head.feature.dim
    if head.spec.engine == "sklearn" or head.spec.kind == "linear":
        expected: dict[str, tuple[int, ...]] = {"output.weight": (outputs, dim), "output.bias": (outputs,)}
        first = ["output"]
    else:
        import torch

        try:
            with torch.device("meta"):
                module = _blank(head)
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


def _blank(head: TrainedHead) -> Head:
    made = head_class(head.spec.kind)
    refuse_unknown_options(head.spec, tuple(inspect.signature(made.__init__).parameters)[3:])
    return made(head.feature, len(head.class_names), **head.spec.options)


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


__all__ = ["load", "module_of", "prepare", "record", "save"]
