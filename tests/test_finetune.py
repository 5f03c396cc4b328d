"""The live model: frozen means frozen, unfrozen learns, and both say what the cached way says."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from embedcache.backbone import FrozenModel, LoadedBackbone, compute_features, load_backbone
from embedcache.backbone.text import TextPreparation, Texts
from embedcache.batching import ShapePolicy
from embedcache.errors import FeatureError, InputError, SpecError, TrainingError
from embedcache.finetune import (
    FINE_TUNING,
    AttentionClassifier,
    FeatureBasedModel,
    LinearClassifier,
    MLPClassifier,
    ResidualClassifier,
    TextClassificationPipeline,
    TunedModel,
    fine_tune,
    live_outputs,
)
from embedcache.heads import build_head
from embedcache.shard import FeatureSet
from embedcache.spec import FeatureSpec, HeadSpec, TrainSpec
from embedcache.task import CLASSIFICATION
from embedcache.train import train_head

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")

TEXTS = [*tiny_models.TEXTS, "good film", "bad film", "a good old plot", "a bad old plot", "very good", "very bad"]
LABELS = np.array([1 if "good" in text and "bad" not in text else 0 for text in TEXTS])
NAMES = ("bad", "good")
SEEDED = TrainSpec(epochs=3, batch_size=5, learning_rate=1e-2, patience=0, schedule="linear", warmup=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("bert", tmp_path_factory.mktemp("models") / "bert")


def model_of(folder: Path, **options: Any) -> FeatureBasedModel:
    return FeatureBasedModel.from_pretrained(str(folder), 2, **{"pooling": "mean", "device": "cpu", **options})


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in [*module.named_parameters(), *module.named_buffers()]}


def changed(module: nn.Module, before: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, each in weights(module).items() if not torch.equal(each, before[name])]


def inputs(model: FeatureBasedModel, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    encoded = model.extractor.content.tokenizer(texts, padding=True, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]


# -- frozen -----------------------------------------------------------------------------------------------------------


class Wobbly(nn.Module):
    """A backbone in which everything drifts that may: batch-norm statistics, and dropout of a half."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(pad_token_id=0, _attn_implementation="eager")
        self.embeddings = nn.Embedding(67, 13)
        self.norm = nn.BatchNorm1d(13)
        self.dropout = nn.Dropout(0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.weight.dtype

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        x = self.norm(self.dropout(self.embeddings(input_ids)).transpose(1, 2)).transpose(1, 2)
        return SimpleNamespace(last_hidden_state=x)


def wobbly(folder: Path) -> LoadedBackbone:
    torch.manual_seed(3)
    identity = {
        "backbone": {"architecture": "Wobbly"},
        "storage_dtype": "float32",
    }
    tokenizer = load_backbone(str(folder), device="cpu").content.tokenizer
    network = Wobbly().eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    texts = Texts(tokenizer, TextPreparation(31, "right", "", False), network, "wobbly")
    return FrozenModel(network, texts, [FeatureSpec("mean")], ShapePolicy(max_length=31), identity, provenance={})


def test_frozen_means_frozen(folder: Path) -> None:
    backbone = wobbly(folder)
    model = FeatureBasedModel(backbone, LinearClassifier(13, 2))
    before = weights(model.backbone)
    model.train()
    assert model.head.training
    assert not any(module.training for module in model.backbone.modules())
    ids, mask = inputs(model, TEXTS)
    first, again = (model(ids, mask, torch.from_numpy(LABELS)) for _ in range(2))
    assert torch.equal(first.features, again.features), "dropout is live"
    assert not first.features.requires_grad
    first.loss.backward()
    assert all(each.grad is None for each in model.backbone.parameters())
    assert all(each.grad is not None for each in model.head.parameters())
    fine_tune(model, TEXTS, LABELS, TEXTS, LABELS, SEEDED, class_names=NAMES, progress=False)
    assert changed(model.backbone, before) == []
    assert not any(each.requires_grad for each in model.backbone.parameters())
    model.requires_grad_(True)  # of everything, by mistake
    assert not model(ids, mask).features.requires_grad


def test_freezing_as_it_is_often_written_would_be_seen(folder: Path) -> None:
    """``requires_grad=False`` alone leaves dropout live and lets the statistics drift."""

    class Forgetful(FeatureBasedModel):
        def train(self, mode: bool = True) -> FeatureBasedModel:
            return nn.Module.train(self, mode)  # type: ignore[return-value]

    model = Forgetful(wobbly(folder), LinearClassifier(13, 2))
    before = weights(model.backbone)
    ids, mask = inputs(model, TEXTS)
    first, again = model(ids, mask), model(ids, mask)
    assert not torch.equal(first.features, again.features)
    assert "norm.running_mean" in changed(model.backbone, before)


def test_the_mode_of_an_unfrozen_backbone_is_set(folder: Path) -> None:
    backbone = wobbly(folder)
    before = weights(backbone.network.train())
    model = FeatureBasedModel(backbone, LinearClassifier(13, 2), freeze_backbone=False)
    assert model.backbone.training
    assert changed(model.backbone, before) == [], "looking for unused parameters moved the statistics"
    ids, mask = inputs(model, TEXTS)
    model.backbone.dropout.eval()  # type: ignore[union-attr]
    said = model(ids, mask).features
    assert changed(model.backbone, before) == [], "batch normalisation is live"
    torch.testing.assert_close(model(ids[:1], mask[:1]).features, said[:1])
    assert not torch.equal(model.train()(ids, mask).features, said), "dropout is not live"
    assert not model.eval().backbone.training


# -- parameters -------------------------------------------------------------------------------------------------------


def test_parameters_are_counted(folder: Path) -> None:
    frozen, whole = model_of(folder), model_of(folder, freeze_backbone=False)
    backbone = sum(each.numel() for each in frozen.backbone.parameters())
    assert frozen.count_trainable_params() == (backbone + 22 * 2 + 2, 22 * 2 + 2, backbone)
    pooler = 22 * 22 + 22
    assert whole.count_trainable_params() == (backbone + 46, backbone + 46 - pooler, pooler)
    assert model_of(folder, freeze_backbone=False, pooling="pooler").count_trainable_params().frozen == 0
    assert all(each.grad is None for each in whole.parameters())
    with contextlib.redirect_stdout(io.StringIO()) as said:
        frozen.print_parameter_status()
    assert said.getvalue().splitlines()[1].split()[:2] == ["trainable", "46"]


def test_layers_above_the_one_that_is_read_are_not_trained(folder: Path) -> None:
    model = model_of(folder, freeze_backbone=False, pooling="mean@1")
    assert {int(name.split(".")[2]) for name, each in model.backbone.named_parameters() if each.requires_grad
            and name.startswith("encoder.layer")} == {0}  # fmt: skip


def test_an_unfrozen_backbone_is_another_backbone(folder: Path) -> None:
    frozen, whole, other = (
        model_of(folder),
        model_of(folder, freeze_backbone=False),
        model_of(folder, freeze_backbone=False),
    )
    assert frozen.extractor.identity["backbone"] == load_backbone(str(folder)).identity["backbone"]
    assert whole.extractor.identity["backbone"] != frozen.extractor.identity["backbone"]
    assert whole.extractor.identity["backbone"] != other.extractor.identity["backbone"]


# -- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "pooling", "options"),
    [
        ("linear", "mean", {}),
        ("mlp", "cls", {"hidden": [7]}),
        ("residual", "l2:mean", {"width": 11}),
        ("attention", "tokens", {"width": 14}),
        ("attention-pooling", "mean@all", {"width": 6}),
        ("layer-mix", "mean@all", {}),
        ("layer-concat", "mean@all", {"layers": 2}),
    ],
)
def test_forward_says_what_the_head_trained_on_the_cache_says(
    folder: Path, head: str, pooling: str, options: dict[str, Any]
) -> None:
    backbone = load_backbone(str(folder), features=(pooling,), device="cpu")
    contents = [text.encode() for text in TEXTS]
    x = compute_features(backbone, contents, pooling)
    spec = HeadSpec(head, "torch", options)
    trained = train_head(
        x, LABELS, head=spec, spec=SEEDED, class_names=NAMES, feature=backbone.feature_sets[0], progress=False
    ).head
    model = FeatureBasedModel(backbone, trained.module).eval()
    np.testing.assert_allclose(live_outputs(model, TEXTS), trained.logits(x), atol=2e-5)
    ids, mask = inputs(model, TEXTS)
    out = model(ids, mask, torch.from_numpy(LABELS))
    np.testing.assert_allclose(out.logits.detach().numpy(), trained.logits(x), atol=2e-5)
    assert out.loss.item() == pytest.approx(nn.functional.cross_entropy(out.logits, torch.from_numpy(LABELS)).item())
    assert out.features.shape[0] == len(TEXTS)
    assert out.features.shape[-1] == 22


def test_padding_counts_for_nothing(folder: Path) -> None:
    model = model_of(folder).eval()
    ids, mask = inputs(model, ["good film", "a good old plot and a bad scene"])
    alone = model(*inputs(model, ["good film"])).logits
    torch.testing.assert_close(model(ids, mask).logits[:1], alone, atol=1e-5, rtol=0)
    assert (model(ids).logits[:1] - alone).abs().max() > 1e-3, "without its mask padding must show here"


# -- training ---------------------------------------------------------------------------------------------------------


def test_unfrozen_really_trains(folder: Path) -> None:
    model = model_of(folder, freeze_backbone=False)
    before = weights(model.backbone)
    done = fine_tune(
        model, TEXTS, LABELS, TEXTS, LABELS, TrainSpec(**{**SEEDED.__dict__, "epochs": 13}), class_names=NAMES,
        backbone_learning_rate=3e-3, progress=False,
    )  # fmt: skip
    moved = changed(model.backbone, before)
    assert "embeddings.word_embeddings.weight" in moved
    assert "encoder.layer.2.output.LayerNorm.bias" in moved
    assert not any(name.startswith("pooler") for name in moved)
    assert done.history[-1]["train_loss"] < 0.85 * done.history[0]["train_loss"]
    assert done.metrics["validation"]["accuracy"] > 0.75
    assert not model.training


def test_training_the_head_with_the_backbone_in_every_step_is_training_it_on_the_cache(folder: Path) -> None:
    """The same losses and the same head, but for the last digits: another padding, another order of adding up."""
    spec = TrainSpec(**{**SEEDED.__dict__, "standardize": False, "epochs": 5, "schedule": "cosine"})
    head = HeadSpec("mlp", "torch", {"hidden": [7], "dropout": 0.3})
    backbone = load_backbone(str(folder), features=("mean",), device="cpu")
    x = compute_features(backbone, [text.encode() for text in TEXTS], "mean")
    cached = train_head(x, LABELS, x, LABELS, head, spec, class_names=NAMES, progress=False, calibrate=False)
    module = build_head(head, backbone.feature_sets[0], 2, seed=spec.seed)
    live = fine_tune(
        FeatureBasedModel(backbone, module), TEXTS, LABELS, TEXTS, LABELS, spec, class_names=NAMES, progress=False,
        new_head=True,
    )  # fmt: skip
    assert [note for note in cached.notes if "improving" in note] == [*live.notes]
    for ours, theirs in zip(cached.history, live.history, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        assert ours["validation_log_loss"] == pytest.approx(theirs["validation_log_loss"], rel=1e-4)
    np.testing.assert_allclose(module.output.weight.detach().numpy(), cached.head.state["output.weight"], atol=1e-4)
    np.testing.assert_allclose(live.head.probabilities(TEXTS), cached.head.probabilities(x), atol=1e-4)


def test_a_live_model_that_still_improves_says_so(folder: Path) -> None:
    for epochs, notes in ((8, 1), (2, 0)):  # of two epochs nothing can be said
        spec = TrainSpec(epochs=epochs, batch_size=5, learning_rate=1e-4)
        done = fine_tune(model_of(folder), TEXTS, LABELS, spec=spec, class_names=NAMES, progress=False)
        assert len(done.notes) == notes, [each["train_loss"] for each in done.history]


def test_lp_ft_starts_where_the_trained_head_is(folder: Path) -> None:
    backbone = load_backbone(str(folder), features=("mean",), device="cpu")
    x = compute_features(backbone, [text.encode() for text in TEXTS], "mean")
    trained = train_head(x, LABELS, spec=SEEDED, class_names=NAMES, progress=False)
    model = FeatureBasedModel(backbone, trained.head.module, freeze_backbone=False)
    start = live_outputs(model, TEXTS)
    np.testing.assert_allclose(start, trained.head.logits(x), atol=2e-5)
    assert (start.argmax(axis=1) == LABELS).mean() == trained.metrics["train"]["accuracy"]
    assert model.training, "looking at the outputs leaves the mode as it was"
    done = fine_tune(model, TEXTS, LABELS, spec=SEEDED, class_names=NAMES, keep_losses=True, progress=False)
    cold = fine_tune(
        model_of(folder, freeze_backbone=False), TEXTS, LABELS, spec=SEEDED, class_names=NAMES, keep_losses=True,
        progress=False,
    )  # fmt: skip
    assert done.fitted.losses[0] < cold.fitted.losses[0]


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(folder: Path) -> None:
    def losses(seed: int) -> list[float]:
        model = model_of(folder, freeze_backbone=False, head="mlp", hidden=[7])
        torch.rand(seed + 1)  # what is drawn outside must not matter
        state = torch.random.get_rng_state()
        spec = TrainSpec(**{**SEEDED.__dict__, "seed": seed, "shuffle_seed": 0})
        done = fine_tune(model, TEXTS, LABELS, spec=spec, class_names=NAMES, keep_losses=True, progress=False)
        assert torch.equal(torch.random.get_rng_state(), state), "torch's own generator was moved"
        return [float(loss) for loss in done.fitted.losses]

    first = losses(5)
    assert first == losses(5)
    assert first != losses(6)


def test_the_best_weights_are_restored_and_training_stops_early(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(folder, freeze_backbone=False)
    kept: list[dict[str, torch.Tensor]] = []
    values = iter([0.3, 0.9, 0.5, 0.9, 0.2, 0.95])

    def judge(self: Any) -> float:
        kept.append(weights(model))
        return next(values)

    monkeypatch.setattr("embedcache.finetune.live._Judge.__call__", judge)
    spec = TrainSpec(**{**SEEDED.__dict__, "epochs": 7, "patience": 3, "metric": "accuracy"})
    done = fine_tune(model, TEXTS, LABELS, TEXTS, LABELS, spec, class_names=NAMES, progress=False)
    assert [each["validation_accuracy"] for each in done.history] == [0.3, 0.9, 0.5, 0.9, 0.2]
    assert done.fitted.best_epoch == 1  # counted from 0
    assert changed(model, kept[1]) == []
    assert changed(model, kept[-1]) != []


def test_rates_and_decay_by_group(folder: Path) -> None:
    """One step of AdamW moves a weight by its group's rate, whatever the gradient; decay spares biases and gains."""
    from embedcache.backbone import text_inputs
    from embedcache.finetune.live import ContentBatch, LiveLearner, LiveLoss
    from embedcache.train.losses import Loss

    model = model_of(folder, freeze_backbone=False)
    spec = TrainSpec(**{**SEEDED.__dict__, "weight_decay": 0.1, "schedule": "constant", "warmup": 0.0, "clip": 0.0})
    loss = LiveLoss(Loss(CLASSIFICATION, 2), torch.from_numpy(LABELS))
    parts = [(model.backbone.parameters(), 1e-4), (model.head.parameters(), spec.learning_rate)]
    learner = LiveLearner(model, spec, parts, loss, 1, None)
    assert [(group["lr"], group["weight_decay"]) for group in learner.optimizer.param_groups] == [
        (1e-4, 0.1), (1e-4, 0.0), (1e-2, 0.1), (1e-2, 0.0),
    ]  # fmt: skip
    assert all(each.dim() == 1 for group in learner.optimizer.param_groups[1::2] for each in group["params"])
    before = model.head.output.bias.detach().clone()
    learner.step(ContentBatch(text_inputs(*inputs(model, TEXTS)), torch.arange(len(TEXTS))))
    step = (model.head.output.bias.detach() - before).abs()
    torch.testing.assert_close(step, torch.full((2,), 1e-2), rtol=1e-3, atol=0)


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_the_other_tasks(folder: Path, task: Any) -> None:
    y = np.stack([LABELS, 1 - LABELS, LABELS], axis=1)
    targets = y.astype(np.uint8) if task == "multilabel" else 1000.0 + 300.0 * y
    done = fine_tune(
        FeatureBasedModel.from_pretrained(str(folder), 3, pooling="mean", freeze_backbone=False), TEXTS, targets,
        TEXTS, targets, TrainSpec(**{**SEEDED.__dict__, "epochs": 11}), backbone_learning_rate=3e-3,
        class_names=("a", "b", "c"), task=task, progress=False,
    )  # fmt: skip
    values = done.head.probabilities(TEXTS)
    assert values.shape == (len(TEXTS), 3)
    if task == "multilabel":
        assert ((values > 0) & (values < 1)).all()
        assert done.history[-1]["train_loss"] < 0.95 * done.history[0]["train_loss"]
    else:
        assert done.metrics["validation"]["r2"] > 0.5
        assert 900 < values.min() < values.max() < 1400


@given(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=7), st.randoms())
def test_outputs_are_those_of_each_text_alone(texts: list[str], random: Any) -> None:
    model = _shared()
    whole = live_outputs(model, texts)
    at = random.randrange(len(texts))
    np.testing.assert_allclose(whole[at], live_outputs(model, [texts[at]])[0], atol=1e-5)


_MODELS: list[FeatureBasedModel] = []


def _shared() -> FeatureBasedModel:
    return _MODELS[0]


@pytest.fixture(scope="module", autouse=True)
def _share(folder: Path) -> Iterator[None]:
    _MODELS.append(model_of(folder).eval())
    yield
    _MODELS.clear()


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "gpt2", "t5", "modernbert"])
def test_other_architectures_are_fine_tuned(kind: str, tmp_path: Path) -> None:
    made = tiny_models.build(kind, tmp_path / kind)
    model = FeatureBasedModel.from_pretrained(str(made), 2, freeze_backbone=False, device="cpu")
    before = weights(model.backbone)
    fine_tune(model, TEXTS, LABELS, spec=SEEDED, class_names=NAMES, progress=False)
    trainable = [name for name, each in model.backbone.named_parameters() if each.requires_grad]
    assert set(trainable) <= set(changed(model.backbone, before))


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_to_a_model(folder: Path) -> None:
    with pytest.raises(SpecError, match="reads one feature set, got mean, cls"):
        FeatureBasedModel(load_backbone(str(folder), features=("mean", "cls")), LinearClassifier(22, 2))
    with pytest.raises(SpecError, match="num_classes is 0"):
        FeatureBasedModel.from_pretrained(str(folder), 0)
    with pytest.raises(SpecError, match="did you mean linear"):
        model_of(folder, head="liner")
    with pytest.raises(FeatureError, match="nothing to attend to"):
        model_of(folder, head="attention")


@pytest.mark.parametrize(
    ("y", "spec", "error", "match"),
    [
        (np.zeros(len(TEXTS), int), SEEDED, TrainingError, "all 17 training rows have the class 'bad'"),
        (LABELS[:3], SEEDED, InputError, "17 rows of features and 3 of targets"),
        (LABELS.astype(float), SEEDED, InputError, "int64"),
        (np.full(len(TEXTS), -1), SEEDED, TrainingError, "no labelled row"),
        (LABELS, TrainSpec(solver="convex"), SpecError, "minibatch AdamW"),
        (LABELS, TrainSpec(optimizer="sgd"), SpecError, "minibatch AdamW"),
        (LABELS, TrainSpec(input_noise=0.1), SpecError, "input_noise and input_dropout disturb cached features"),
        (LABELS, TrainSpec(learning_rate=1e30, clip=0.0, warmup=0.0), TrainingError, "lower learning rate"),
    ],
)
def test_bad_input_to_training(folder: Path, y: Any, spec: TrainSpec, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        fine_tune(model_of(folder), TEXTS, y, spec=spec, class_names=NAMES, progress=False)


@pytest.mark.parametrize("rate", [-1e-5, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused_before_training(folder: Path, rate: float) -> None:
    with pytest.raises(SpecError, match=r"backbone_learning_rate is .*: expected a finite number of 0 or more"):
        fine_tune(model_of(folder), TEXTS, LABELS, backbone_learning_rate=rate, class_names=NAMES, progress=False)


def test_unlabelled_rows_are_left_out(folder: Path) -> None:
    y = np.where(np.arange(len(TEXTS)) % 3 == 0, -1, LABELS)
    done = fine_tune(model_of(folder), TEXTS, y, TEXTS, y, SEEDED, class_names=NAMES, progress=False)
    assert done.metrics["validation"]["rows"] == int((y >= 0).sum())
    assert done.fitted.steps == 3 * -(-int((y >= 0).sum()) // 5)


# -- heads by width ---------------------------------------------------------------------------------------------------


def test_classifiers_are_the_heads_of_the_registry() -> None:
    x = torch.randn(3, 11)
    pooled, tokens = FeatureSet("x", "pooled", 11, 1, "float32"), FeatureSet("x", "tokens", 11, 1, "float32")
    pairs = [
        (LinearClassifier(11, 5, seed=7), HeadSpec("linear"), pooled),
        (MLPClassifier(11, 13, 5, 0.2, seed=7), HeadSpec("mlp", options={"hidden": [13], "dropout": 0.2}), pooled),
        (ResidualClassifier(11, 5, 7, 3, seed=7), HeadSpec("residual", options={"width": 7, "depth": 3}), pooled),
        (AttentionClassifier(11, 5, seed=7), HeadSpec("attention"), tokens),
    ]
    for ours, spec, feature in pairs:
        theirs = build_head(spec, feature, 5, seed=7).eval()
        given_x = x if feature is pooled else x.unsqueeze(1).repeat(1, 2, 1)
        torch.testing.assert_close(ours.eval()(given_x), theirs(given_x))
        assert ours(given_x).shape == (3, 5)


def test_attention_takes_a_mask_as_tokenizers_give_it() -> None:
    head = AttentionClassifier(10, 3, num_heads=5).eval()
    x = torch.randn(2, 7, 10)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1] * 7])
    padded = x.clone()
    padded[0, 3:] = 1e6
    torch.testing.assert_close(head(padded, mask), head(x, mask))
    torch.testing.assert_close(head(x, mask)[:1], head(x[:1, :3]))
    assert not torch.allclose(head(padded, None), head(x, None))


def test_bad_input_to_classifiers() -> None:
    with pytest.raises(SpecError, match="num_classes is 0"):
        LinearClassifier(7, 0)
    with pytest.raises(SpecError, match="do not divide"):
        AttentionClassifier(7, 2, num_heads=3)
    with pytest.raises(SpecError, match="dropout is 2"):
        MLPClassifier(7, 3, 2, dropout=2)
    head = AttentionClassifier(7, 2)
    with pytest.raises(FeatureError, match="reads a sequence a row"):
        head(torch.zeros(3, 7))
    with pytest.raises(FeatureError, match="one value a token"):
        head(torch.zeros(3, 5, 7), torch.ones(3, 4))


# -- the pipeline -----------------------------------------------------------------------------------------------------


def pipeline_of(folder: Path, **options: Any) -> TextClassificationPipeline:
    return TextClassificationPipeline(str(folder), num_classes=2, pooling="mean", device="cpu", **options)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_pipeline(folder: Path, frozen: bool) -> None:
    pipeline = pipeline_of(folder, freeze_backbone=frozen, head="mlp", head_options={"hidden": [7]})
    pipeline.prepare_data(TEXTS, LABELS.tolist(), TEXTS[:5], LABELS[:5].tolist())
    done = pipeline.train(num_epochs=7, learning_rate=1e-2)
    assert isinstance(done.head, TunedModel) is not frozen
    classes, probabilities = pipeline.predict(TEXTS)
    assert classes.shape == (len(TEXTS),)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, atol=1e-6)
    assert done.history[-1]["train_loss"] < done.history[0]["train_loss"]
    if frozen:
        assert (classes == LABELS).mean() > 0.7
    # What the model itself says has the same order of classes; the pipeline's is calibrated on validation besides.
    logits = pipeline.model(*inputs(pipeline.model, TEXTS)).logits
    assert (logits.argmax(dim=1).numpy() == classes).all()


def test_the_pipeline_runs_the_backbone_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = pipeline_of(folder)
    calls = []
    forward = type(pipeline.model.extractor).forward
    monkeypatch.setattr(
        type(pipeline.model.extractor), "forward", lambda *args: (calls.append(1), forward(*args))[1]
    )  # fmt: skip
    pipeline.prepare_data(TEXTS, LABELS.tolist())
    once = len(calls)
    pipeline.train(num_epochs=11)
    pipeline.train(num_epochs=3)
    assert once > 0
    assert len(calls) == once


def test_bad_input_to_the_pipeline(folder: Path) -> None:
    pipeline = pipeline_of(folder)
    with pytest.raises(InputError, match="call prepare_data first"):
        pipeline.train()
    with pytest.raises(InputError, match="prepare_data and train first"):
        pipeline.predict(["good"])
    for texts, labels, match in [
        ([], [], "got none"),
        ("good", [1], "got one text"),
        (["good", " "], [1, 0], "text 1 is ' '"),
        (["good", 3], [1, 0], "text 1 is 3"),
        (["good", "bad"], [1], "expected 2 whole-number labels"),
        (["good", "bad"], [1, 2], "labels run from 1 to 2"),
        (["good", "bad"], [0.0, 1.0], "whole-number labels"),
    ]:
        with pytest.raises(InputError, match=match):
            pipeline.prepare_data(texts, labels)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="both eval_texts and eval_labels"):
        pipeline.prepare_data(["good", "bad"], [1, 0], ["good"])
    pipeline.prepare_data(["good", "very good"], [1, 1])
    with pytest.raises(TrainingError, match="have the class '1'"):
        pipeline.train()


def test_the_recipe_is_the_published_one() -> None:
    assert (FINE_TUNING.schedule, FINE_TUNING.warmup, FINE_TUNING.clip) == ("linear", 0.1, 1.0)
    assert (FINE_TUNING.batch_size, FINE_TUNING.weight_decay) == (16, 0.01)
