"""ONNX and torch's own exported programs: the head alone, or backbone, pooling and head in one file."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embedcache.backbone.network import quiet as silent
from embedcache.errors import MissingExtraError, SpecError
from embedcache.export.modules import Outputs, Whole
from embedcache.export.proof import Proof, batches, prove
from embedcache.export.source import Source
from embedcache.shard import Array

CONFIG = "embedcache.json"
ONNX, PROGRAM = "model.onnx", "model.pt2"
BATCH = 16


def to_onnx(source: Source, folder: Path, *, head_only: bool) -> Proof:
    """Write ``model.onnx`` (inputs of any batch and length), and run it in onnxruntime."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("exporting to ONNX", str(error.name), "onnx") from None
    module, examples, names = _module(source, head_only)
    outputs = _output_names(source)
    with quiet():
        torch.onnx.export(
            module, examples, str(folder / ONNX), dynamo=True, input_names=names, output_names=outputs,
            dynamic_shapes=_dynamic(names), external_data=False, verbose=False,
        )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / ONNX), options, providers=["CPUExecutionProvider"])

    def run(tensors: Sequence[Tensor]) -> Array:
        given = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return np.asarray(session.run([outputs[1]], given)[0])

    _write_config(source, folder, names, outputs)
    return _proved(source, head_only, "onnxruntime", run, folder)


def to_torch(source: Source, folder: Path, *, head_only: bool) -> Proof:
    """Write ``model.pt2`` by ``torch.export``, load it again and run it."""
    module, examples, names = _module(source, head_only)
    with quiet():
        program = torch.export.export(module, examples, dynamic_shapes=_dynamic(names))
        torch.export.save(program, folder / PROGRAM)
        loaded = torch.export.load(folder / PROGRAM).module()

    def run(tensors: Sequence[Tensor]) -> Array:
        with torch.inference_mode():
            return np.asarray(loaded(*tensors)[1].numpy())

    _write_config(source, folder, names, _output_names(source))
    return _proved(source, head_only, "torch.export", run, folder)


def _module(source: Source, head_only: bool) -> tuple[nn.Module, tuple[Tensor, ...], list[str]]:
    if not source.head.state or source.head.votes:
        what = "training rows" if source.head.votes else "a scikit-learn estimator"
        raise SpecError(
            f"the head {source.head.spec.kind} is {what} without matrices: torch heads and "
            "scikit-learn's linear ones can be exported"
        )
    if head_only:
        return Outputs(source.head).eval(), (torch.from_numpy(source.features[:2].copy()),), ["features"]
    module = Whole(source.backbone, source.head).eval()
    if source.is_text:
        ids = torch.zeros(2, 5, dtype=torch.int64)
        mask = torch.ones_like(ids)
        mask[1, 3:] = 0
        return module, (ids, mask), ["input_ids", "attention_mask"]
    return module, tuple(source.backbone.content.dummies(2, 1).arguments.values()), ["pixel_values"]


def _output_names(source: Source) -> list[str]:
    return ["logits", "values" if source.head.task == "regression" else "probabilities"]


def _dynamic(names: Sequence[str]) -> Any:
    free = torch.export.Dim.AUTO  # within what the model itself allows
    return tuple({0: free, 1: free} if name in ("input_ids", "attention_mask") else {0: free} for name in names)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what exporters print to themselves: what matters is whether the result is right, which is tried."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    with ExitStack() as stack:
        stack.enter_context(silent())
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for logger in loggers:
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


def _write_config(source: Source, folder: Path, names: Sequence[str], outputs: Sequence[str]) -> None:
    """Say beside the model what goes in and what comes out, and write the tokenizer where texts go in."""
    head = source.head
    config: dict[str, object] = {
        "inputs": list(names), "outputs": list(outputs), "task": head.task, "class_names": list(head.class_names),
        "thresholds": list(head.thresholds) if head.task == "multilabel" else None,
        "feature": {"name": head.feature.name, "dim": head.feature.dim, "layers": head.feature.layers},
        "backbone": head.model, "extraction": dict(head.extraction),
    }  # fmt: skip
    if "input_ids" in names:
        preparation = source.texts.preparation
        config["preparation"] = {
            "prompt": preparation.prompt, "lower_case": preparation.lower_case, "max_length": preparation.max_length
        }  # fmt: skip
        save_tokenizer(source, folder)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def save_tokenizer(source: Source, folder: Path) -> None:
    """Write the tokenizer, with the length and the side at which texts are cut."""
    import copy

    preparation = source.texts.preparation
    tokenizer = copy.deepcopy(source.texts.tokenizer)
    tokenizer.model_max_length, tokenizer.padding_side = preparation.max_length, "right"
    tokenizer.save_pretrained(folder)


def _proved(source: Source, head_only: bool, tool: str, run: Any, folder: Path) -> Proof:
    if head_only:
        parts = [run([torch.from_numpy(part)]) for part in _parts(source.features)]
        return prove(source.head, tool, source.head.probabilities(source.features), np.concatenate(parts))
    if source.is_text:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        given = [run(_tokens(source, tokenizer, texts)) for texts in batches(source.rows, BATCH)]
    else:
        given = [run([_pixels(source, rows)]) for rows in batches(source.rows, BATCH)]
    return prove(source.head, tool, source.expected, np.concatenate(given))


def _parts(values: Array) -> list[Array]:
    return [values[start : start + BATCH] for start in range(0, len(values), BATCH)]


def _tokens(source: Source, tokenizer: Any, contents: Sequence[bytes]) -> list[Tensor]:
    """Make token ids as somebody with the exported folder would: padded to the longest of a batch."""
    preparation = source.texts.preparation
    texts = [preparation.prompt + content.decode("utf-8") for content in contents]
    texts = [text.lower() for text in texts] if preparation.lower_case else texts
    encoded = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    return [encoded["input_ids"], encoded["attention_mask"]]


def _pixels(source: Source, contents: Sequence[bytes]) -> Tensor:
    from embedcache.batching import Batch

    prepared = source.backbone.prepare(contents)
    batch = Batch(1, len(contents), np.arange(len(contents)))
    return source.backbone.lay_out(prepared, batch).arguments["pixel_values"].contiguous()
