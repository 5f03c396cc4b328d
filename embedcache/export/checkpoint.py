"""A checkpoint that transformers loads by itself: linear heads on ``pooler`` and ``cls``, for ``pipeline``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from embedcache.errors import SpecError
from embedcache.export.dense import ELSEWHERE
from embedcache.export.graph import quiet, save_tokenizer
from embedcache.export.modules import folded
from embedcache.export.proof import Proof, prove
from embedcache.export.source import Source
from embedcache.spec import FeatureSpec
from embedcache.task import CLASSIFICATION, REGRESSION, task_named

if TYPE_CHECKING:
    from embedcache.shard import Array

EPSILON = 2.0**-12
"""``tanh(e x) / e`` is x to within ``e^2 x^3 / 3``: how a vector passes a pooler that it must not change."""
PROBLEMS = {
    "classification": "single_label_classification", "multilabel": "multi_label_classification",
    "regression": "regression",
}  # fmt: skip


def to_transformers(source: Source, folder: Path, *, head_only: bool) -> Proof:
    """Write the checkpoint, load it as anybody would and run ``pipeline`` on it."""
    if head_only:
        raise SpecError("a checkpoint of transformers is a whole model: leave out --head-only, or use --to onnx")
    spec = _refused(source)
    import transformers

    head, names = source.head, source.head.class_names
    auto = transformers.AutoModelForSequenceClassification if source.is_text else (
        transformers.AutoModelForImageClassification
    )  # fmt: skip
    with quiet():
        model = auto.from_pretrained(
            source.backbone_folder(), num_labels=len(names), id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)}, problem_type=PROBLEMS[head.task],
        ).eval()  # fmt: skip
        ((weight, bias),) = folded(head)
        with torch.no_grad():
            _fill(model, spec.pooling, torch.from_numpy(weight), torch.from_numpy(bias))
        model.save_pretrained(folder)
        if source.is_text:
            save_tokenizer(source, folder)
        else:
            processors: Any = transformers.AutoImageProcessor
            processors.from_pretrained(source.backbone_folder()).save_pretrained(folder)
        given = _piped(source, folder)
    if head.task == "multilabel":
        thresholds = dict(zip(names, head.thresholds, strict=True))
        (folder / "thresholds.json").write_text(json.dumps(thresholds, indent=1) + "\n", encoding="utf-8")
    return prove(head, "transformers.pipeline", source.expected, given)


def _refused(source: Source) -> FeatureSpec:
    """Return what the head reads. Raises ``SpecError`` for what a checkpoint cannot say, and which target can."""
    head, spec = source.head, FeatureSpec.parse(source.head.feature.name)
    reason = None
    if not head.linear:
        reason = f"the head {head.spec.kind}: its classifiers are one matrix"
    elif spec.pooling not in ("cls", "pooler") or spec.layers != (-1,) or spec.normalize:
        reason = f"the pooling {spec.name}: its classifiers read cls or pooler; --to sentence-transformers holds mean"
    elif head.feature.dtype != "float32":
        reason = f"features rounded to {head.feature.dtype}"
    elif source.is_text and source.texts.preparation.prompt:
        reason = "a prompt before every text; --to sentence-transformers does"
    if reason is not None:
        raise SpecError(f"a checkpoint of transformers does not hold {reason}; {ELSEWHERE}")
    return spec


def _fill(model: nn.Module, pooling: str, weight: Tensor, bias: Tensor) -> None:
    """Write the head into a model's own classifier. Raises ``SpecError`` where that computes something else."""
    classifier, base = getattr(model, "classifier", None), getattr(model, str(model.base_model_prefix), None)
    pooler = getattr(getattr(base, "pooler", None), "dense", None)
    dense, out = getattr(classifier, "dense", None), getattr(classifier, "out_proj", None)
    if pooling == "pooler" and isinstance(classifier, nn.Linear) and pooler is not None:
        _set(classifier, weight, bias)
    elif pooling == "cls" and isinstance(classifier, nn.Linear) and pooler is not None:
        _pass_through(pooler, classifier, weight, bias)
    elif pooling == "cls" and isinstance(dense, nn.Linear) and isinstance(out, nn.Linear):
        _pass_through(dense, out, weight, bias)
    elif pooling == "cls" and isinstance(classifier, nn.Linear) and getattr(base, "pooler", None) is None:
        _set(classifier, weight, bias)
    else:
        raise SpecError(f"{type(model).__name__} has a classifier that a head on {pooling} does not fit; {ELSEWHERE}")


def _pass_through(before: nn.Linear, classifier: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    _set(before, torch.eye(before.in_features) * EPSILON, torch.zeros(before.out_features))
    _set(classifier, weight / EPSILON, bias)


def _set(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    if layer.weight.shape != weight.shape:
        raise SpecError(
            f"the classifier reads {layer.in_features} numbers, and the head {weight.shape[1]}; {ELSEWHERE}"
        )
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)


def _piped(source: Source, folder: Path) -> Array:
    """Return what the pipeline says of the rows, float64 [n, C]."""
    import transformers

    task = task_named(source.head.task)
    function = "none" if task is REGRESSION else "softmax" if task is CLASSIFICATION else "sigmoid"
    kind = "text-classification" if source.is_text else "image-classification"
    pipeline: Any = transformers.pipeline
    pipe = pipeline(kind, model=str(folder), device="cpu")
    names = source.head.class_names
    options: dict[str, Any] = {"top_k": len(names) + 1, "function_to_apply": function}
    rows: Sequence[Any]
    if source.is_text:
        rows = [content.decode("utf-8") for content in source.rows]
        options |= {"truncation": True, "top_k": None}
    else:
        from embedcache import pictures

        rows = [pictures.decode(content) for content in source.rows]
    said = pipe(list(rows), **options)
    scores = [{each["label"]: each["score"] for each in row} for row in said]
    return np.array([[row[name] for name in names] for row in scores], np.float64)
