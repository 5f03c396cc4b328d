"""Heads: their forwards by hand, masks that mask, stacks that equal single heads, and errors that help."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import embedcache
from embedcache.equivalence.standard import plain_head
from embedcache.errors import FeatureError, InputError, SpecError
from embedcache.features import Ragged, features_of, refuse_non_finite
from embedcache.heads import STACKED_OPTIONS, TrainedHead, build_head, engine_of, kinds, register_head, stack_key
from embedcache.heads.attention import AttentionPooling, SelfAttention, number_of_heads
from embedcache.heads.modules import MLP, Affine, Dropout, Head, Linear, ResidualMLP, choose_heads, stack_heads
from embedcache.heads.registry import TORCH
from embedcache.heads.trained import PASS_ROWS, padded_length, passes
from embedcache.shard import FeatureSet
from embedcache.spec import HeadSpec

POOLED = FeatureSet("mean", "pooled", 5, 1, "float32")
LAYERS = FeatureSet("mean@all", "layers", 7, 3, "float32")
TOKENS = FeatureSet("tokens", "tokens", 7, 1, "float32")
B, C, T = 11, 3, 13
SIDE_BY_SIDE = FeatureSet("cls+mean@-3+-2+-1", "layers", 14, 3, "float32")
WITHOUT_DROPOUT = ("linear", "layer-mix", "layer-concat")
SPECS = {
    "linear": (HeadSpec("linear"), POOLED),
    "mlp": (HeadSpec("mlp", options={"hidden": [17, 19], "norm": True}), POOLED),
    "residual": (HeadSpec("residual", options={"width": 17, "depth": 2, "expansion": 3}), POOLED),
    "attention": (HeadSpec("attention", options={"width": 10, "heads": 5}), TOKENS),
    "attention over layers": (HeadSpec("attention", options={"width": 10, "heads": 2}), LAYERS),
    "attention-pooling": (HeadSpec("attention-pooling", options={"width": 6, "heads": 3, "queries": 2}), TOKENS),
    "attention-pooling over layers": (HeadSpec("attention-pooling", options={"queries": 5}), LAYERS),
    "layer-mix": (HeadSpec("layer-mix"), LAYERS),
    "layer-concat": (HeadSpec("layer-concat", options={"layers": 2, "mean": "last"}), SIDE_BY_SIDE),
}


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def features(feature: FeatureSet, rows: int = B, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor | None]:
    if feature.kind == "tokens":
        lengths = torch.randint(1, T + 1, (rows,), generator=torch.Generator().manual_seed(seed))
        return numbers(rows, T, feature.dim, seed=seed), torch.arange(T) < lengths[:, None]
    return numbers(rows, *feature.row_shape, seed=seed), None


def fill(head: Head, **values: Any) -> None:
    """Set parameters by name; what is not named becomes zero."""
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            value = values.pop(name.replace(".", "_"), None)
            parameter.copy_(torch.zeros_like(parameter) if value is None else torch.tensor(value, dtype=torch.float32))
    assert not values


# Forwards by hand.


def test_linear_by_hand() -> None:
    head = Linear(FeatureSet("mean", "pooled", 2, 1, "float32"), 3)
    fill(head, output_weight=[[1, 2], [3, 4], [5, 6]], output_bias=[0.5, -0.5, 1])
    assert head(torch.tensor([[1.0, -1.0], [2.0, 0.0]])).tolist() == [[-0.5, -1.5, 0.0], [2.5, 5.5, 11.0]]


def test_mlp_by_hand() -> None:
    head = MLP(FeatureSet("mean", "pooled", 2, 1, "float32"), 1, hidden=(3, 2), dropout=0.5).eval()
    fill(
        head, hidden_0_weight=[[1, 0], [0, 1], [-1, -1]], hidden_0_bias=[0, 1, 0],
        hidden_1_weight=[[1, 1, 1], [1, -1, 0]], output_weight=[[2, 3]], output_bias=[1],
    )  # fmt: skip
    # [3, -1] -> relu [3, 0, 0] -> relu [3, 3] -> 2 * 3 + 3 * 3 + 1
    assert head(torch.tensor([[3.0, -1.0]])).tolist() == [[16.0]]


def test_residual_by_hand() -> None:
    head = ResidualMLP(FeatureSet("mean", "pooled", 2, 1, "float32"), 1, width=2, depth=1, activation="relu").eval()
    fill(
        head, input_weight=[[1, 0], [0, 1]], blocks_0_norm_weight=[1, 1], blocks_0_up_weight=[[1, 0]] * 4,
        blocks_0_down_weight=[[1, 1, 1, 1], [0, 0, 0, 0]], norm_weight=[1, 1], norm_bias=[5, 0],
        output_weight=[[1, 10]],
    )  # fmt: skip
    # [3, 1] -> normed [1, -1] -> up 1 four times -> down [4, 0] -> [7, 1] -> normed [1, -1] -> [6, -1] -> 6 - 10
    assert head(torch.tensor([[3.0, 1.0]])).item() == pytest.approx(-4.0, abs=1e-4)


def test_attention_pooling_by_hand() -> None:
    head = AttentionPooling(FeatureSet("tokens", "tokens", 2, 1, "float32"), 1, width=2, heads=1).eval()
    fill(
        head, input_weight=[[1, 0], [0, 1]], norm_weight=[1, 1], key_weight=[[1, 0], [0, 1]],
        queries_weight=[[np.sqrt(2) * np.log(3) / 2, 0]], output_weight=[[1, 0]],
    )  # fmt: skip
    # Normed tokens are [1, -1] and [-1, 1]; scores log(3) / 2 and -log(3) / 2, so weights 3/4 and 1/4.
    x = torch.tensor([[[5.0, 3.0], [2.0, 4.0]]])
    assert head(x).item() == pytest.approx(0.5, abs=1e-4)
    assert head(x, torch.tensor([[True, False]])).item() == pytest.approx(1.0, abs=1e-4)
    assert head(x, torch.tensor([[False, True]])).item() == pytest.approx(-1.0, abs=1e-4)


def test_self_attention_by_hand() -> None:
    head = SelfAttention(FeatureSet("tokens", "tokens", 2, 1, "float32"), 1, width=2, heads=1).eval()
    fill(
        head, input_weight=[[1, 0], [0, 1]], norm_weight=[1, 1], final_weight=[0, 0], final_bias=[0, 0],
        qkv_weight=[[0, 0]] * 4 + [[1, 0], [0, 1]], mix_weight=[[1, 0], [0, 1]], output_weight=[[1, 0]],
    )  # fmt: skip
    with torch.no_grad():
        head.final.weight.fill_(1.0)
    # Equal scores: each token adds the mean of the normed tokens, here [1, -1], [1, -1], [-1, 1] -> [1/3, -1/3].
    # [5, 3] + [1/3, -1/3] = [16/3, 8/3] and [2, 4] + ... = [7/3, 11/3]: normed again [1, -1], [1, -1], [-1, 1].
    x = torch.tensor([[[5.0, 3.0], [7.0, 2.0], [2.0, 4.0]]])
    assert head(x).item() == pytest.approx(1 / 3, abs=1e-4)
    assert head(x, torch.tensor([[True, True, False]])).item() == pytest.approx(1.0, abs=1e-4)


def test_self_attention_equals_torchs_own() -> None:
    head = build_head(HeadSpec("attention", options={"width": 10, "heads": 5}), TOKENS, C, seed=3).eval()
    assert isinstance(head, SelfAttention)
    x, mask = features(TOKENS)
    assert mask is not None
    theirs = torch.nn.MultiheadAttention(10, 5, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(head.qkv.weight)
        theirs.in_proj_bias.zero_()
        theirs.out_proj.weight.copy_(head.mix.weight)
        theirs.out_proj.bias.copy_(head.mix.bias)
        inside = head.input(x)
        normed = head.norm(inside)
        attended, _ = theirs(normed, normed, normed, key_padding_mask=~mask)
        after = head.final(inside + attended)
        mean = torch.stack([row[real].mean(0) for row, real in zip(after, mask, strict=True)])
        torch.testing.assert_close(head(x, mask), head.output(mean), rtol=1e-5, atol=1e-6)


def test_layers_are_told_apart() -> None:
    head = build_head(HeadSpec("attention-pooling"), LAYERS, C, seed=3).eval()
    x, _ = features(LAYERS)
    with torch.no_grad():
        assert not torch.allclose(head(x), head(x.flip(1)), atol=1e-4)


def test_a_layer_mix_is_a_matrix_on_the_layers_weighed() -> None:
    head = build_head(HeadSpec("layer-mix"), LAYERS, C, seed=3).eval()
    x, _ = features(LAYERS)
    said = []
    for learned in (torch.zeros(LAYERS.layers), torch.arange(LAYERS.layers) * 0.7):
        shares = np.exp(learned.numpy()) / np.exp(learned.numpy()).sum()
        mixed = sum(share * x[:, layer] for layer, share in enumerate(shares.tolist()))
        with torch.no_grad():
            head.get_parameter("mix.weight").copy_(learned)
            said.append(head(x))
            torch.testing.assert_close(said[-1], head.output(mixed), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(*said, atol=1e-3)
    spec, feature = SPECS["layer-mix"]
    state = {name: value.detach().numpy() for name, value in head.named_parameters()}
    told = TrainedHead(spec, "classification", ("a", "b", "c"), feature, state).facts()["weights of the layers"]
    assert told == " ".join(f"{share:.2f}" for share in shares)


def read_by_hand(x: torch.Tensor, layers: int, mean: str) -> torch.Tensor:
    """What layer-concat reads of class tokens [:7] and means [7:] of three layers."""
    parts = [x[:, layer] if mean == "all" else x[:, layer, :7] for layer in range(3 - layers, 3)]
    return torch.cat([*parts, x[:, 2, 7:]] if mean == "last" else parts, dim=1)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("mean", ["all", "last", "none"])
def test_layers_side_by_side_are_a_matrix_on_what_is_read(layers: int, mean: str) -> None:
    spec = HeadSpec("layer-concat", options={"layers": layers, "mean": mean})
    head = build_head(spec, SIDE_BY_SIDE, C, seed=3)
    assert 0.005 < float(head.output.weight.detach().std()) < 0.015  # not 1 / sqrt(I)
    with torch.no_grad():
        torch.testing.assert_close(head.get_parameter("output.bias"), torch.zeros(C), rtol=0, atol=0)
        x, _ = features(SIDE_BY_SIDE)
        read = read_by_hand(x, layers, mean)
        torch.testing.assert_close(head(x), read @ head.output.weight.T)
        centre, scale = numbers(14, seed=5), numbers(14, seed=6).exp()
        head.standardize(centre, scale)
        standardised = read_by_hand((x - centre) * scale, layers, mean)
        torch.testing.assert_close(head(x), standardised @ head.output.weight.T)
        state = {name: value.numpy() for name, value in head.named_parameters()}
        plain = plain_head(spec, state, torch.Generator())
        torch.testing.assert_close(plain(x, None), read @ head.output.weight.T)


@pytest.mark.parametrize(
    ("options", "feature", "match"),
    [
        ({"layers": 4}, LAYERS, "layers is 4: mean@all has 3 layers"),
        ({"layers": 0}, LAYERS, "layers is 0: expected a whole number"),
        ({"mean": "first"}, SIDE_BY_SIDE, "expected one of all, last, none"),
        ({"mean": "last"}, LAYERS, "which only cls.mean sets have, and not mean@all"),
    ],
)
def test_layers_that_are_not_there_are_refused(options: Any, feature: FeatureSet, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        build_head(HeadSpec("layer-concat", options=options), feature, C)


# Masks.


@pytest.mark.parametrize("kind", ["attention", "attention-pooling"])
@given(data=st.data())
def test_padding_changes_nothing(kind: str, data: st.DataObject) -> None:
    spec, feature = SPECS[kind]
    head = build_head(spec, feature, C, seed=3).eval()
    x, mask = features(feature, seed=data.draw(st.integers(0, 99)))
    assert mask is not None
    filled = torch.where(mask[..., None], x, torch.tensor(data.draw(st.sampled_from([0.0, -3.0, 1e4]))))
    with torch.no_grad():
        said = head(filled, mask)
        for row in range(B):
            real = x[row : row + 1, : int(mask[row].sum())]
            torch.testing.assert_close(said[row : row + 1], head(real), rtol=1e-4, atol=1e-5)


def test_a_mask_that_did_not_mask_would_be_seen() -> None:
    head = build_head(*SPECS["attention"], C, seed=3).eval()
    x, mask = features(TOKENS)
    assert mask is not None
    with torch.no_grad():
        assert not torch.allclose(head(x, mask), head(x), atol=1e-3)


# Stacks.


def stack_of(name: str, heads: int) -> tuple[list[Head], Head]:
    spec, feature = SPECS[name]
    dropout = {} if spec.kind in WITHOUT_DROPOUT else {"dropout": 0.1}
    alone = [
        build_head(
            HeadSpec(spec.kind, "torch", {**spec.options, **{name: rate * at for name, rate in dropout.items()}}),
            feature, C, seed=at,
        )
        for at in range(heads)
    ]  # fmt: skip
    return alone, stack_heads(alone)


@pytest.mark.parametrize("name", SPECS)
@given(heads=st.integers(1, 5), seed=st.integers(0, 99), standardized=st.sampled_from(["no", "shared", "own"]))
def test_a_stack_says_what_its_heads_say_alone(name: str, heads: int, seed: int, standardized: str) -> None:
    alone, stacked = stack_of(name, heads)
    feature = SPECS[name][1]
    x, mask = features(feature, seed=seed)
    if standardized != "no":
        mean, scale = numbers(heads, feature.dim, seed=seed), numbers(heads, feature.dim, seed=seed + 1).exp()
        if standardized == "shared":
            mean, scale = mean[0], scale[0]
        stacked.standardize(mean, scale)
        for at, head in enumerate(alone):
            head.standardize(*((mean, scale) if standardized == "shared" else (mean[at], scale[at])))
    with torch.no_grad():
        said = stacked.eval()(x, mask)
        assert said.shape == (heads, B, C)
        for at, head in enumerate(alone):
            torch.testing.assert_close(said[at], head.eval()(x, mask), rtol=1e-4, atol=1e-5)
        wanted = torch.arange(heads).flip(0)[: max(1, heads - 1)]
        torch.testing.assert_close(choose_heads(stacked, wanted)(x, mask), said[wanted], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in SPECS if name not in WITHOUT_DROPOUT])
def test_dropout_draws_are_a_heads_own(name: str) -> None:
    alone, stacked = stack_of(name, 4)
    x, mask = features(SPECS[name][1])
    for head, generators in [(stacked, range(4)), *[(head, [at]) for at, head in enumerate(alone)]]:
        head.train().draw_from([torch.Generator().manual_seed(100 + at) for at in generators])
    said = stacked(x, mask)
    for at, head in enumerate(alone):
        torch.testing.assert_close(said[at], head(x, mask), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(said[3], stacked(x, mask)[3], atol=1e-4), "dropout that drops the same, or nothing"
    chosen = choose_heads(stacked, torch.tensor([3, 1]))
    for module in chosen.modules():
        if isinstance(module, Dropout):
            assert module.rates == pytest.approx((0.3, 0.1))


def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    dropout = Dropout(0.25).train()
    dropout.generators = [torch.Generator().manual_seed(7)]
    x = dropout(torch.ones(101, 997))
    assert float((x == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(x.mean()) == pytest.approx(1.0, abs=0.01)
    assert torch.equal(dropout.eval()(x), x)


def test_standardisation_is_folded_in() -> None:
    head = build_head(*SPECS["mlp"], C, seed=3).eval()
    x, _ = features(POOLED)
    mean, scale = numbers(5, seed=8), numbers(5, seed=9).exp()
    expected = head((x - mean) * scale)
    head.standardize(mean, scale)
    torch.testing.assert_close(head(x), expected, rtol=1e-4, atol=1e-5)


def test_one_seed_one_head() -> None:
    for spec, feature in SPECS.values():
        first, again, other = (build_head(spec, feature, C, seed=seed).state_dict() for seed in (5, 5, 6))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["output.weight"], other["output.weight"])


# Errors.


def test_an_attention_head_refuses_a_single_vector() -> None:
    for kind in ("attention", "attention-pooling"):
        with pytest.raises(FeatureError, match=r"the feature set mean has one, .*extract --tokens.*mean@all"):
            build_head(HeadSpec(kind), POOLED, C)


@pytest.mark.parametrize("kind", ["linear", "mlp", "residual"])
@pytest.mark.parametrize(("feature", "said"), [(TOKENS, "one vector a token"), (LAYERS, "several layers a row")])
def test_a_head_of_one_vector_refuses_several(kind: str, feature: FeatureSet, said: str) -> None:
    with pytest.raises(FeatureError, match=rf"reads one vector a row.*{feature.name} has {said}.*attention-pooling"):
        build_head(HeadSpec(kind), feature, C)


def test_heads_divide_the_width() -> None:
    with pytest.raises(SpecError, match=r"attention: 3 heads do not divide the width 10: .*such as 5"):
        build_head(HeadSpec("attention", options={"width": 10, "heads": 3}), TOKENS, C)
    assert [number_of_heads("attention", None, width) for width in (384, 12, 6, 7)] == [8, 4, 2, 1]
    assert number_of_heads("attention", 7, 7) == 7


def test_an_unknown_option_or_kind_names_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"mlp has no option 'hiden' \(did you mean hidden\?\): it has hidden, activ"):
        build_head(HeadSpec("mlp", options={"hiden": [3]}), POOLED, C)
    with pytest.raises(SpecError, match=r"linear has no option 'width': it has none"):
        build_head(HeadSpec("linear", options={"width": 3}), POOLED, C)
    with pytest.raises(SpecError, match=r"no head 'residul' \(did you mean residual\?\): expected one of linear, mlp"):
        engine_of("residul")
    with pytest.raises(SpecError, match=r"no head 'attenton'"):
        build_head(HeadSpec("attenton"), TOKENS, C)
    assert [engine_of(kind) for kind in ("linear", "mlp", "knn", "logistic-regression")] == [
        "torch", "torch", "sklearn", "sklearn",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("mlp", {"hidden": []}, "0 hidden layers: expected 1 to 256; none is the head linear"),
        ("mlp", {"hidden": [0]}, "hidden is 0: expected a whole number"),
        ("mlp", {"hidden": [3.5]}, "hidden is 3.5"),
        ("mlp", {"hidden": "large"}, "hidden is"),
        ("mlp", {"hidden": None}, "hidden is None: expected a width"),
        ("mlp", {"hidden": [3] * 2000}, "2000 hidden layers"),
        ("mlp", {"activation": "rlu"}, "activation is 'rlu': expected one of relu, gelu, silu, tanh"),
        ("mlp", {"activation": ["relu"]}, "activation is"),
        ("mlp", {"dropout": 1.0}, r"dropout is 1.0: expected a number in \[0, 1\)"),
        ("mlp", {"dropout": True}, "dropout is True"),
        ("mlp", {"norm": "yes"}, "norm is 'yes'"),
        ("residual", {"depth": 0}, "depth is 0"),
        ("residual", {"depth": 5000}, "depth is 5000"),
        ("residual", {"width": -1}, "width is -1"),
        ("attention", {"heads": 0}, "heads is 0"),
        ("attention-pooling", {"queries": True}, "queries is True"),
    ],
)
def test_a_nonsensical_option_is_refused(kind: str, options: dict[str, Any], said: str) -> None:
    feature = TOKENS if kind.startswith("attention") else POOLED
    with pytest.raises(SpecError, match=said):
        build_head(HeadSpec(kind, options=options), feature, C)


def test_what_stacks_together() -> None:
    same = {stack_key(HeadSpec("mlp", options={"dropout": rate, "hidden": [3]})) for rate in (0.0, 0.5)}
    assert len(same) == 1
    assert STACKED_OPTIONS == ("dropout",)
    assert stack_key(HeadSpec("mlp", options={"hidden": [3]})) != stack_key(HeadSpec("mlp", options={"hidden": [5]}))


# Heads of one's own.


def contributing_block() -> str:
    """The example of CONTRIBUTING."""
    text = (Path(embedcache.__file__).parent.parent / "CONTRIBUTING.md").read_text("utf-8")
    (block,) = re.findall(r"## Adding a head\n.*?```python\n(.*?)```", text, re.DOTALL)
    return block


def test_the_example_of_contributing_runs(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        exec(contributing_block(), {"__name__": "example"})
    finally:
        TORCH.pop("gated", None)
    assert float(capsys.readouterr().out) > 0.9


def test_a_head_of_ones_own_stacks_and_is_checked() -> None:
    class Scaled(Head):
        def __init__(self, feature: FeatureSet, outputs: int, factor: float = 2.0) -> None:
            super().__init__(feature, outputs)
            self.factor = factor
            self.output = Affine(feature.dim, outputs, first=True)

        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return self.output(x) * self.factor

    class Headless(Head):
        def __init__(self, feature: FeatureSet, outputs: int) -> None:
            super().__init__(feature, outputs)
            self.last = Affine(feature.dim, outputs, first=True)

    class Blind(Head):
        def __init__(self, feature: FeatureSet, outputs: int) -> None:
            super().__init__(feature, outputs)
            self.output = Affine(feature.dim, outputs)

    try:
        for name, head in (("scaled", Scaled), ("headless", Headless), ("blind", Blind)):
            register_head(name, head)
        register_head("scaled", Scaled)
        with pytest.raises(SpecError, match="there is a head 'scaled' already"):
            register_head("scaled", Blind)
        with pytest.raises(SpecError, match="there is a head 'linear' already"):
            register_head("linear", Scaled)
        assert engine_of("scaled") == "torch"
        assert "scaled" in kinds("torch")
        alone = [build_head(HeadSpec("scaled", options={"factor": 3.0}), POOLED, C, seed=at) for at in range(2)]
        x, _ = features(POOLED)
        torch.testing.assert_close(stack_heads(alone)(x)[1], alone[1](x))
        with pytest.raises(SpecError, match="headless has no last layer called output"):
            build_head(HeadSpec("headless"), POOLED, C)
        with pytest.raises(SpecError, match="blind has no Affine"):
            build_head(HeadSpec("blind"), POOLED, C)
    finally:
        for name in ("scaled", "headless", "blind"):
            TORCH.pop(name, None)


# A trained head.


# As in real use, widths are multiples of 4 or above 12: narrower products depend on where in memory a row begins.
WIDE = {
    "linear": HeadSpec("linear"),
    "mlp": HeadSpec("mlp", options={"hidden": [20, 19], "norm": True, "activation": "gelu"}),
    "residual": HeadSpec("residual", options={"width": 16, "depth": 2, "activation": "silu"}),
    "attention": HeadSpec("attention", options={"width": 16, "heads": 4}),
    "attention over layers": HeadSpec("attention", options={"width": 16, "heads": 2}),
    "attention-pooling": HeadSpec("attention-pooling", options={"width": 16, "heads": 2, "queries": 3}),
    "attention-pooling over layers": HeadSpec("attention-pooling", options={"width": 32, "queries": 5}),
    "layer-mix": HeadSpec("layer-mix"),
    "layer-concat": HeadSpec("layer-concat", options={"layers": 2, "mean": "last"}),
}


def trained(name: str, task: Any = "classification") -> TrainedHead:
    spec, feature = WIDE[name], SPECS[name][1]
    state = {key: value.detach().numpy() for key, value in build_head(spec, feature, C, seed=3).named_parameters()}
    return TrainedHead(spec, task, ("a", "b", "c"), feature, state)


def raw(feature: FeatureSet, rows: int, seed: int = 1) -> Any:
    """Features as a cache gives them: one array, or values and offsets."""
    generator = np.random.default_rng(seed)
    if feature.kind != "tokens":
        return generator.normal(size=(rows, *feature.row_shape)).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(generator.integers(1, 90, rows))])
    return generator.normal(size=(offsets[-1], feature.dim)).astype(np.float32), offsets


def chosen(x: Any, rows: Any) -> Any:
    if not isinstance(x, tuple):
        return x[rows]
    parts = [x[0][x[1][row] : x[1][row + 1]] for row in rows]
    return np.concatenate(parts), np.concatenate([[0], np.cumsum([len(part) for part in parts])])


@pytest.mark.parametrize("name", SPECS)
@given(seed=st.integers(0, 99), rows=st.integers(1, 2 * PASS_ROWS), data=st.data())
def test_what_a_head_says_of_a_row_depends_on_that_row_alone(name: str, seed: int, rows: int, data: Any) -> None:
    head = trained(name)
    rows = rows if head.feature.kind != "tokens" else 1 + rows % 37
    x = raw(head.feature, rows, seed)
    whole = head.logits(x)
    some = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=7))
    np.testing.assert_array_equal(head.logits(chosen(x, some)), whole[some])


@pytest.mark.parametrize("name", SPECS)
def test_passes_say_what_the_module_says(name: str) -> None:
    head = trained(name)
    x = raw(head.feature, 37)
    with torch.no_grad():
        for row in range(0, 37, 5):
            one = chosen(x, [row])
            one = torch.from_numpy(one[0] if isinstance(one, tuple) else one)
            one = one.unsqueeze(0) if head.feature.kind == "tokens" else one
            np.testing.assert_allclose(head.logits(x)[row], head.module.eval()(one)[0], rtol=1e-4, atol=1e-5)
    assert head.logits(chosen(x, [])).shape == (0, C) if not isinstance(x, tuple) else True


@given(length=st.integers(1, 100_000))
def test_rows_are_padded_little(length: int) -> None:
    assert length <= padded_length(length) < max(length + 8, 1.13 * length)
    assert padded_length(padded_length(length)) == padded_length(length)


def test_a_pass_covers_each_row_once() -> None:
    x = features_of(raw(TOKENS, 101), TOKENS)
    assert isinstance(x, Ragged)
    places = np.concatenate([places for places, _, _ in passes(x)])
    assert sorted(places) == list(range(101))
    shapes = {tuple(batch.shape) for _, batch, _ in passes(x)}
    assert len({shape[1] for shape in shapes}) == len(shapes), "one number of rows for each length"
    with pytest.raises(InputError, match="row 1 has no tokens"):
        Ragged(np.zeros((3, 7), np.float32), np.array([0, 2, 2, 3]), TOKENS).padded(np.arange(3))


def test_features_read_from_disk_give_the_same() -> None:
    class Reader:
        row_shape = (5,)

        def __init__(self, x: Any) -> None:
            self.x = x

        def __len__(self) -> int:
            return len(self.x)

        def read(self, rows: Any) -> Any:
            assert len(rows) <= 1 << 20
            return self.x[rows]

    x = raw(POOLED, 997)
    for name in ("linear", "mlp"):
        np.testing.assert_array_equal(trained(name).logits(Reader(x)), trained(name).logits(x))
    assert trained("mlp").logits(Reader(x[:0])).shape == (0, C)


def test_a_head_survives_pickling_for_other_processes() -> None:
    head = trained("attention")
    x = raw(TOKENS, 17)
    expected = head.logits(x)  # and its module is cached
    again = pickle.loads(pickle.dumps(head))
    assert "module" not in vars(again)
    np.testing.assert_array_equal(again.logits(x), expected)


def test_a_linear_head_is_told_by_its_kind_not_by_its_arrays() -> None:
    assert trained("linear").linear
    assert not trained("mlp").linear
    state = trained("linear").state
    assert not TrainedHead(HeadSpec("cosine"), "classification", ("a", "b", "c"), POOLED, state).linear


def test_probabilities_and_decisions_by_hand() -> None:
    state = {"output.weight": np.eye(3, 5, dtype=np.float32), "output.bias": np.zeros(3, np.float32)}
    x = np.array([[0, np.log(2), np.log(5), 7, 7]], np.float32)
    head = TrainedHead(HeadSpec("linear"), "classification", ("a", "b", "c"), POOLED, state)
    np.testing.assert_allclose(head.probabilities(x), [[1 / 8, 2 / 8, 5 / 8]], rtol=1e-6)
    assert head.predict(x).tolist() == [2]
    cold = TrainedHead(
        HeadSpec("linear"), "classification", ("a", "b", "c"), POOLED, state, calibration={"temperature": 0.5}
    )
    np.testing.assert_allclose(cold.probabilities(x), [[1 / 30, 4 / 30, 25 / 30]], rtol=1e-6)
    many = TrainedHead(
        HeadSpec("linear"), "multilabel", ("a", "b", "c"), POOLED, state, calibration={"thresholds": [0.6, 0.6, 0.9]}
    )
    np.testing.assert_allclose(many.probabilities(x), [[1 / 2, 2 / 3, 5 / 6]], rtol=1e-6)
    assert many.predict(x).tolist() == [[False, True, False]]
    values = TrainedHead(HeadSpec("linear"), "regression", ("a", "b", "c"), POOLED, state)
    np.testing.assert_allclose(values.predict(x), x[:, :3])


@pytest.mark.parametrize(
    ("feature", "x", "said"),
    [
        (POOLED, np.zeros((3, 7)), r"shape \(3, 7\), expected \[N, 5\]"),
        (POOLED, np.zeros(5), r"shape \(5,\), expected \[N, 5\]"),
        (POOLED, [["a"] * 5], "of type <U1, expected float32"),
        (POOLED, np.zeros((3, 5), complex), "of type complex128"),
        (POOLED, (np.zeros((3, 5)), [0, 3]), r"ragged features, expected one array \[N, 5\]"),
        (LAYERS, np.zeros((3, 7, 3)), r"expected \[N, 3, 7\]"),
        (TOKENS, np.zeros((3, 7)), "token-level set: expected values"),
        (TOKENS, (np.zeros((3, 5)), [0, 3]), "expected \\[sum T, 7\\]"),
        (TOKENS, (np.zeros((3, 7)), [0, 2]), "ascending offsets"),
        (TOKENS, (np.zeros((3, 7)), [0, 3, 2, 3]), "ascending offsets"),
        (TOKENS, (np.zeros((3, 7)), [1, 3]), "ascending offsets"),
        (TOKENS, (np.zeros((3, 7)), []), "ascending offsets"),
    ],
)
def test_features_of_another_shape_are_refused(feature: FeatureSet, x: Any, said: str) -> None:
    with pytest.raises(FeatureError, match=said):
        features_of(x, feature)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_features_name_the_row_and_the_set(bad: float) -> None:
    x = np.ones((23, 5), np.float32)
    x[17, 3] = bad
    with pytest.raises(FeatureError, match="mean of validation: row 17 holds NaN or infinity"):
        features_of(x, POOLED, where="validation")
    x[18] = -x[17]  # infinities that cancel out
    with pytest.raises(FeatureError, match="row 17"):
        trained("linear").logits(x)
    values = np.ones((23, 7), np.float32)
    values[11] = bad
    with pytest.raises(FeatureError, match="tokens: row 2 holds"):
        refuse_non_finite(values, "tokens", np.array([0, 3, 7, 13, 23]))
    refuse_non_finite(np.full((3, 5), 1e30), "mean")  # large is not infinite
    with pytest.raises(FeatureError, match=r"row 0 holds a value beyond 1e\+30"):
        refuse_non_finite(np.full((3, 5), 1e308), "mean")
