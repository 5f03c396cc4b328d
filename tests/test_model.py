"""A frozen model knows no kind of content: pictures, planted here, go through it as texts do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from embedcache.backbone import FrozenModel, Inputs, compute_features, run_plan, vectors_of
from embedcache.batching import Batch, ShapePolicy, plan
from embedcache.errors import FeatureError, PoolingUnavailableError
from embedcache.examples import load_examples
from embedcache.extract import forecast, run
from embedcache.shard import FeatureSet
from embedcache.spec import FeatureSpec

SIDE, CHANNELS, PATCHES = 12, 3, 9  # patches of 4 x 4, and a token of the class before them
ROWS = 5
SIZE = CHANNELS * SIDE * SIDE


@dataclass
class Pixels:
    """Decoded pictures [n, C, H, W]. Each costs one position, whatever the number of its patches."""

    values: np.ndarray
    tokens: int
    truncated: int = 0

    @property
    def lengths(self) -> np.ndarray:
        return np.ones(len(self.values), np.int64)

    @property
    def vectors(self) -> np.ndarray:
        return np.full(len(self.values), self.tokens, np.int64)


class Pictures:
    """Contents are the bytes of a picture, repeated to its size."""

    given = "pixels"
    probe_rows = ()
    poolings = ("cls", "mean", "max", "last", "pooler", "tokens")
    prepared_bytes = 0

    def __init__(self, tokens: int = PATCHES + 1) -> None:
        self.tokens = tokens

    def versions(self) -> dict[str, str]:
        return {}

    def prepare(self, contents: Sequence[bytes]) -> Pixels:
        rows = [np.frombuffer((content * SIZE)[:SIZE], np.uint8).reshape(CHANNELS, SIDE, SIDE) for content in contents]
        return Pixels(np.stack(rows).astype(np.float32) / 255 if rows else np.zeros((0, 3, 2, 2)), self.tokens)

    def lay_out(self, prepared: Pixels, batch: Batch) -> Inputs:
        values = np.zeros((batch.rows, *prepared.values.shape[1:]), np.float32)
        values[: len(batch.indices)] = prepared.values[batch.indices]
        return Inputs({"pixel_values": torch.from_numpy(values)})

    def dummies(self, rows: int, length: int) -> Inputs:
        return Inputs({"pixel_values": torch.zeros(rows, CHANNELS, SIDE, SIDE)})


def vit() -> torch.nn.Module:
    torch.manual_seed(7)
    config = transformers.ViTConfig(
        hidden_size=22, num_hidden_layers=2, num_attention_heads=2, intermediate_size=37, image_size=SIDE, patch_size=4
    )
    return frozen(transformers.ViTModel(config))


def resnet() -> torch.nn.Module:
    torch.manual_seed(7)
    config = transformers.ResNetConfig(
        embedding_size=7, hidden_sizes=[7, 11], depths=[1, 1], layer_type="basic", downsample_in_first_stage=False
    )
    return frozen(transformers.ResNetModel(config))


def frozen(network: torch.nn.Module) -> torch.nn.Module:
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network.eval()


def model(network: torch.nn.Module, *names: str, tokens: int = PATCHES + 1) -> FrozenModel[Pixels]:
    policy = ShapePolicy(positions=ROWS, max_length=1)
    identity = {"backbone": {"architecture": type(network).__name__}, "storage_dtype": "float32"}
    specs = [FeatureSpec.parse(name) for name in names]
    return FrozenModel(network, Pictures(tokens), specs, policy, identity, provenance={"model": "it"}, pooler=True)


CONTENTS = [bytes([at, 255 - at, 3 * at, 17]) for at in range(13)]


def expected(network: torch.nn.Module) -> Any:
    """The outputs of a plain pass over all pictures."""
    with torch.no_grad():
        values = torch.from_numpy(Pictures().prepare(CONTENTS).values)
        return network(pixel_values=values, output_hidden_states=True)


def test_poolings_of_a_vision_transformer() -> None:
    network = vit()
    names = ("cls", "mean", "max", "last", "pooler", "tokens", "l2:mean@-2", "cls@all")
    backbone, out = model(network, *names), expected(network)
    assert [each.kind for each in backbone.feature_sets] == ["pooled"] * 5 + ["tokens", "pooled", "layers"]
    final, before = out.last_hidden_state, out.hidden_states[-2].mean(1)
    for name, vectors in {
        "cls": final[:, 0], "mean": final.mean(1), "max": final.amax(1), "last": final[:, -1],
        "pooler": out.pooler_output, "l2:mean@-2": before / before.norm(dim=-1, keepdim=True),
        "cls@all": torch.stack([state[:, 0] for state in out.hidden_states], 1),
    }.items():  # fmt: skip
        np.testing.assert_allclose(compute_features(backbone, CONTENTS, name).values, vectors, atol=1e-5, err_msg=name)
    tokens = compute_features(backbone, CONTENTS, "tokens")
    assert tokens.offsets.tolist() == list(range(0, 131, 10))
    np.testing.assert_allclose(tokens.values.reshape(final.shape), final, atol=1e-5)


def test_what_a_row_costs_and_how_many_vectors_it_has_are_two_numbers(tmp_path: Path) -> None:
    """Thirteen pictures are three batches of five positions, and 130 vectors."""
    backbone = model(vit(), "tokens", "mean")
    prepared = backbone.prepare(CONTENTS)
    assert vectors_of(prepared).sum() == 130
    done: list[tuple[int, int]] = []
    batches = plan(prepared.lengths, backbone.policy)
    features = run_plan(backbone, prepared, batches, lambda rows, positions: done.append((rows, positions)))
    assert (len(batches), batches.real, batches.computed) == (3, 13, 15)
    assert sum(rows for rows, _ in done) == sum(positions for _, positions in done) == 13
    assert features["tokens"].values.shape == (130, 22)
    rows = [{"text": content.decode("latin-1"), "label": str(at % 2)} for at, content in enumerate(CONTENTS)]
    examples = load_examples(rows)
    said = forecast(examples, backbone, None)
    assert said.bytes == {"tokens": 130 * 22 * 4, "mean": 13 * 22 * 4}
    report = run(examples, backbone, tmp_path / "c")
    assert (report.extracted, report.tokens, report.computed) == (13, 13, 15)


def test_another_number_of_vectors_than_was_said_is_refused() -> None:
    backbone = model(vit(), "tokens", tokens=PATCHES)
    with pytest.raises(FeatureError, match="gave 50 vectors for 45 tokens"):
        compute_features(backbone, CONTENTS, "tokens")


def test_a_convolutional_network_has_layers_of_their_own_widths() -> None:
    network = resnet()
    backbone, out = model(network, "mean", "mean@1", "pooler", "max@0"), expected(network)
    assert backbone.feature_sets == (
        FeatureSet("mean", "pooled", 11, 1, "float32"), FeatureSet("mean@1", "pooled", 7, 1, "float32"),
        FeatureSet("pooler", "pooled", 11, 1, "float32"), FeatureSet("max@0", "pooled", 7, 1, "float32"),
    )  # fmt: skip
    for name, vectors in {
        "mean": out.last_hidden_state.mean((2, 3)), "mean@1": out.hidden_states[1].mean((2, 3)),
        "pooler": out.pooler_output.flatten(1), "max@0": out.hidden_states[0].amax((2, 3)),
    }.items():  # fmt: skip
        np.testing.assert_allclose(compute_features(backbone, CONTENTS, name).values, vectors, atol=1e-5, err_msg=name)
    with pytest.raises(PoolingUnavailableError, match=r"different widths \(7, 11\): ask for a feature set of each"):
        model(network, "mean@all")


def test_live_features_of_a_picture_follow_the_network() -> None:
    backbone = model(vit(), "tokens")
    inputs = backbone.lay_out(backbone.prepare(CONTENTS[:3]), Batch(1, ROWS, np.arange(3)))
    values, real = backbone.features(inputs)
    assert real is not None
    assert real.all()
    assert real.shape == values.shape[:2] == (ROWS, PATCHES + 1)


def test_changed_weights_are_another_identity() -> None:
    backbone = model(vit(), "mean")
    before = backbone.identity
    backbone.no_longer_frozen("a mark")
    assert backbone.identity == {**before, "backbone": {"architecture": "ViTModel", "unfrozen": "a mark"}}
    assert before["backbone"] == {"architecture": "ViTModel"}
