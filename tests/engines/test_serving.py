"""The README's lines for serving, on exports of a run, say what ``Predictor`` says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_models

import embedcache as ec

README = (Path(__file__).resolve().parents[2] / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```py\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_an_onnx_file_and_a_pipeline_serve_a_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": text, "label": ("bad", "good")[at % 2]} for at, text in enumerate(tiny_models.TEXTS)]
    model = tiny_models.build("bert", tmp_path / "bert")
    cache = ec.extract(rows, output_dir="c", model=str(model), pooling="cls", device="cpu", split="80/20")
    ec.train_on_cache(cache, "linear", progress=False).save("run")
    expected = [list(row.probabilities.values()) for row in ec.Predictor.load("run")(["A gem!", "Dull."])]
    ec.export_head("run", "model.onnx", to="onnx")
    ec.export_head("run", "model.hf", to="transformers")
    onnx, pipe = BLOCKS
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(onnx, {})
    printed = [float(number) for number in re.findall(r"\d\.\d+(?:e[+-]\d+)?", said.getvalue())]
    np.testing.assert_allclose(np.reshape(printed, (2, 2)), expected, atol=1e-5)
    space: dict[str, object] = {}
    with contextlib.redirect_stdout(said):
        exec(pipe, space)
    answers = space["classify"](["A gem!", "Dull."], top_k=None)  # type: ignore[operator]
    by_class = [{each["label"]: each["score"] for each in answer} for answer in answers]
    np.testing.assert_allclose([[answer["bad"], answer["good"]] for answer in by_class], expected, atol=1e-5)
