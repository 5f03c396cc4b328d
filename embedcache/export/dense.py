"""A folder for sentence-transformers: linear and MLP heads as ``Dense`` modules behind its own pooling."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.errors import MissingExtraError, SpecError
from embedcache.export.graph import quiet
from embedcache.export.modules import folded
from embedcache.export.proof import Proof, prove
from embedcache.export.source import Source
from embedcache.spec import FeatureSpec
from embedcache.task import task_named

POOLINGS = {"mean": "mean", "cls": "cls", "max": "max", "last": "lasttoken"}
ACTIVATIONS = {"relu": "ReLU", "gelu": "GELU", "silu": "SiLU", "tanh": "Tanh"}
ELSEWHERE = "--to onnx and --to torch-export hold it"


def to_sentence_transformers(source: Source, folder: Path, *, head_only: bool) -> Proof:
    """Write the folder, load it with ``SentenceTransformer`` and run it; ``encode`` gives calibrated logits."""
    if head_only:
        raise SpecError("sentence-transformers holds whole models: leave out --head-only, or use --to onnx")
    refuse_unmapped(source)
    models = _modules()
    import torch
    from sentence_transformers import SentenceTransformer

    spec, preparation = FeatureSpec.parse(source.head.feature.name), source.texts.preparation
    with quiet():
        where = source.backbone_folder()
        transformer = models.Transformer(
            str(where), max_seq_length=preparation.max_length, do_lower_case=preparation.lower_case
        )
        transformer.tokenizer.truncation_side = preparation.truncation_side
        modules: list[Any] = [transformer, models.Pooling(source.backbone.feature_sets[0].dim, POOLINGS[spec.pooling])]
        modules += [models.Normalize()] if spec.normalize else []
        pairs = folded(source.head)
        for number, (weight, bias) in enumerate(pairs):
            last = number == len(pairs) - 1
            options = source.head.spec.options
            name = ACTIVATIONS[str(options.get("activation", "relu"))]
            activation = torch.nn.Identity() if last else getattr(torch.nn, name)()
            dense = models.Dense(weight.shape[1], weight.shape[0], activation_function=activation)
            with torch.no_grad():
                dense.linear.weight.copy_(torch.from_numpy(weight))
                dense.linear.bias.copy_(torch.from_numpy(bias))
            modules.append(dense)
        prompts = {"query": preparation.prompt} if preparation.prompt else None
        SentenceTransformer(
            modules=modules, device="cpu", prompts=prompts, default_prompt_name="query" if prompts else None
        ).save(str(folder), create_model_card=False)
        loaded = SentenceTransformer(str(folder), device="cpu")
        texts = [content.decode("utf-8") for content in source.rows]
        logits = np.asarray(loaded.encode(texts, batch_size=16, show_progress_bar=False), np.float64)
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in source.head.class_names), encoding="utf-8")
    return prove(
        source.head, "sentence-transformers", source.expected, task_named(source.head.task).probabilities(logits)
    )


def _modules() -> Any:
    """Return the module that has its modules: in version 6 they moved."""
    for name in ("sentence_transformers.sentence_transformer.modules", "sentence_transformers.models"):
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    what = "sentence-transformers"
    raise MissingExtraError(f"exporting to {what}", what, what)


def refuse_unmapped(source: Source) -> None:
    """Raise ``SpecError`` for what its modules cannot say, and which target can."""
    head, spec = source.head, FeatureSpec.parse(source.head.feature.name)
    reason = None
    if not source.is_text:
        reason = "pictures: its modules read texts here"
    elif not (head.linear or (head.spec.kind == "mlp" and head.spec.engine == "torch")) or not head.state:
        reason = f"the head {head.spec.kind}: its Dense modules are linear and MLP heads"
    elif head.spec.options.get("norm"):
        reason = "an MLP with layer normalisation between a matrix and its activation"
    elif spec.pooling not in POOLINGS or spec.layers != (-1,):
        reason = f"the pooling {spec.name}: it has {', '.join(POOLINGS)} of the last layer"
    elif head.feature.dtype != "float32":
        reason = f"features rounded to {head.feature.dtype}"
    if reason is not None:
        raise SpecError(f"sentence-transformers does not hold {reason}; {ELSEWHERE}")
