"""Training: losses and optimizer equal torch's, a stack equals its heads alone, and the loop keeps its promises."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from embedcache.errors import FeatureError, InputError, SpecError, TrainingError
from embedcache.features import MappedRows, OnDisk, Ragged, features_of
from embedcache.heads import build_head
from embedcache.shard import FeatureSet
from embedcache.spec import HeadSpec, TaskName, TrainSpec
from embedcache.task import CLASSIFICATION, MULTILABEL, REGRESSION, task_named
from embedcache.train import TrainingResult, train_head
from embedcache.train import train_stack as stack_of_rows
from embedcache.train.batches import (
    DiskBatches,
    DisturbedBatches,
    FeatureBatch,
    RaggedBatches,
    TensorBatches,
    block_order,
    grouped_order,
    lent,
    order,
)
from embedcache.train.data import class_weights, fits_in_memory, labelled_rows_of, moments
from embedcache.train.loop import Stopping, fit, still_improving
from embedcache.train.losses import Loss, start_biases
from embedcache.train.minibatch import PassOptions, batches_of, fit_minibatch
from embedcache.train.stack import HeadStack, schedule_factors

POOLED = FeatureSet("features", "pooled", 7, 1, "float32")
NAMES = ("a", "b", "c")


def train_stack(
    x: Any, y: Any, heads: Any, specs: Any, *, task: Any, class_names: Any, x_eval: Any = None, y_eval: Any = None,
    **options: Any,
) -> list[TrainingResult]:  # fmt: skip
    """Train heads together on features and targets, judged on others if there are any."""
    kind = task_named(task)
    rows = labelled_rows_of(x, y, kind, class_names)
    judged = None if x_eval is None else labelled_rows_of(x_eval, y_eval, kind, class_names, where="validation")
    return stack_of_rows(rows, judged, heads, specs, **options)


def made(rows: int = 211, dim: int = 7, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = (generator.normal(size=(rows, dim)) * generator.uniform(0.1, 3, dim) + 2).astype(np.float32)
    y = (x @ generator.normal(size=(dim, classes)) + generator.normal(size=(rows, classes))).argmax(axis=1)
    return x, y.astype(np.int64)


# losses --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.13])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_and_its_gradient_are_torchs(smoothing: float, weighted: bool) -> None:
    torch.manual_seed(0)
    logits, y = torch.randn(11, 5, requires_grad=True), torch.randint(0, 5, (11,))
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.7]) if weighted else None
    expected = functional.cross_entropy(logits, y, weight=weight, label_smoothing=smoothing)
    (slope,) = torch.autograd.grad(expected, logits)
    loss = Loss(CLASSIFICATION, 5, [smoothing], None if weight is None else weight.numpy()[None])
    value, gradient = loss(logits.detach().t(), y)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient.t(), slope)


def test_the_other_losses_are_torchs() -> None:
    torch.manual_seed(0)
    logits = torch.randn(11, 5, requires_grad=True)
    labels, values = (torch.rand(11, 5) > 0.5).float(), torch.randn(11, 5)
    positive = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.7])
    for loss, target, expected in (
        (Loss(MULTILABEL, 5), labels, functional.binary_cross_entropy_with_logits(logits, labels)),
        (
            Loss(MULTILABEL, 5, class_weight=positive.numpy()[None]),
            labels,
            functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=positive),
        ),
        (Loss(REGRESSION, 5), values, functional.mse_loss(logits, values)),
    ):
        (slope,) = torch.autograd.grad(expected, logits)
        value, gradient = loss(logits.detach().t(), target)
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(gradient.t(), slope)


def test_a_batch_of_which_no_row_counts_moves_nothing() -> None:
    loss = Loss(CLASSIFICATION, 3, [0.1], np.array([[0, 1, 1]], np.float32))
    value, gradient = loss(torch.randn(3, 4), torch.zeros(4, dtype=torch.int64))
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
@pytest.mark.parametrize("weighted", [False, True])
def test_row_weights_equal_repeated_rows_and_zero_rows_are_absent(task: Any, weighted: bool) -> None:
    torch.manual_seed(1)
    logits, smoothing = torch.randn(2, 3, 5), [0.0, 0.2] if task != "regression" else [0.0, 0.0]
    y = torch.randint(0, 3, (5,)) if task == "classification" else torch.randint(0, 2, (5, 3)).float()
    weights = np.array([[1, 2, 3], [2, 1, 1]], np.float32) if weighted and task != "regression" else None
    loss = Loss(task_named(task), 3, smoothing, weights)
    rows = torch.tensor([[2.0, 1, 0, 1, 0], [0, 1, 3, 0, 1]])
    value, gradient = loss(logits, y, rows)
    for head in range(2):
        repeated = torch.repeat_interleave(torch.arange(5), rows[head].long())
        alone = Loss(
            task_named(task), 3, smoothing[head : head + 1], None if weights is None else weights[head : head + 1]
        )
        expected, slope = alone(logits[head, :, repeated], y[repeated])
        torch.testing.assert_close(value[head], expected)
        summed = torch.zeros(3, 5).index_add_(1, repeated, slope)
        torch.testing.assert_close(gradient[head], summed)


def test_balanced_weights_are_scikit_learns() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    y = np.array([0, 0, 0, 1, 2, 2, 2, 2], np.int64)
    mine = class_weights([TrainSpec(class_weight="balanced")], y, CLASSIFICATION, NAMES)
    assert mine is not None
    np.testing.assert_allclose(mine[0], compute_class_weight("balanced", classes=np.arange(3), y=y), rtol=1e-6)
    with pytest.raises(SpecError, match="'d', which is not a class"):
        class_weights([TrainSpec(class_weight={"d": 1.0})], y, CLASSIFICATION, NAMES)
    with pytest.raises(SpecError, match="regression"):
        class_weights([TrainSpec(class_weight="balanced")], y, REGRESSION, NAMES)


# optimizer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_steps_are_those_of_torchs_optimizer(optimizer: Any, kind: str) -> None:
    x, y = made()
    spec = TrainSpec(optimizer=optimizer, learning_rate=0.02, weight_decay=0.3, clip=0.5, schedule="linear", warmup=0.2)
    options = {"hidden": [5], "dropout": 0.0, "activation": "tanh"} if kind == "mlp" else {}
    mine, theirs = (build_head(HeadSpec(kind, "torch", options), POOLED, 3, seed=5) for _ in range(2))
    stack = HeadStack([mine], [spec], Loss(CLASSIFICATION, 3), total_steps=20)
    decayed = [each for each in theirs.parameters() if each.dim() > 1]
    groups = [
        {"params": decayed, "weight_decay": 0.3},
        {"params": [each for each in theirs.parameters() if each.dim() == 1], "weight_decay": 0.0},
    ]
    torchs: Any = torch.optim.AdamW(groups, 0.02) if optimizer == "adamw" else torch.optim.SGD(groups, 0.02, 0.9)
    factors = schedule_factors(spec, 0, 20, 20)
    for step in range(20):
        rows = order(len(x), 3, step)[:32]
        batch, target = torch.from_numpy(x[rows]), torch.from_numpy(y[rows])
        loss = functional.cross_entropy(theirs(batch), target)
        torchs.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in torchs.param_groups:
            group["lr"] = 0.02 * factors[step]
        torchs.step()
        torch.testing.assert_close(stack.step(batch, None, target), loss.detach(), rtol=2e-5, atol=2e-6)
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(stack.state(0)[name], value.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_step_of_sgd_is_torchs_to_the_bit_alone_and_in_a_stack(kind: str) -> None:
    """Heads of a stack differ in rate, decay and schedule; the optimizer gets the same gradients everywhere."""
    options = {"hidden": [5]} if kind == "mlp" else {}
    rates = [(0.1, 0.3, "cosine"), (0.007, 0.0, "cosine"), (3.1, 0.01, "constant")]
    specs = [
        TrainSpec(optimizer="sgd", momentum=0.7, learning_rate=rate, weight_decay=decay, schedule=when, clip=0)
        for rate, decay, when in rates
    ]
    heads = [HeadSpec(kind, "torch", options)] * 3

    def stack_of(places: list[int]) -> HeadStack:
        built = [build_head(heads[place], POOLED, 3, seed=place) for place in places]
        return HeadStack(built, [specs[place] for place in places], Loss(CLASSIFICATION, 3, [0.0] * len(places)), 20)

    together, alone = stack_of([0, 1, 2]), [stack_of([place]) for place in range(3)]
    plain = [dict(build_head(heads[place], POOLED, 3, seed=place).named_parameters()) for place in range(3)]
    groups = [
        [{"params": [value], "weight_decay": decay if value.dim() > 1 else 0.0} for value in own.values()]
        for own, (_, decay, _) in zip(plain, rates, strict=True)
    ]
    optimizers = [torch.optim.SGD(own, rate, 0.7) for own, (rate, _, _) in zip(groups, rates, strict=True)]
    draw = torch.Generator().manual_seed(3)
    for step in range(20):
        drawn = [torch.randn(value.shape, generator=draw) for value in together.parameters]
        for stack, places in ((together, [0, 1, 2]), *((own, [place]) for place, own in enumerate(alone))):
            own = [part[places] if stack.stacked else part[places[0]].clone() for part in drawn]
            stack.gradients = lambda *_, own=own: (torch.zeros(()), own)  # type: ignore[method-assign,misc]
            stack.step(torch.zeros(0), None, torch.zeros(0))
        for place, optimizer in enumerate(optimizers):
            for value, part in zip(plain[place].values(), drawn, strict=True):
                value.grad = part[place].clone()
            for group in optimizer.param_groups:
                group["lr"] = rates[place][0] * schedule_factors(specs[place], step, 1, 20)[0]
            optimizer.step()
    for place in range(3):
        for name, value in plain[place].items():
            assert torch.equal(together.state(place)[name], value), name
            assert torch.equal(alone[place].state(0)[name], value), name


def test_schedules() -> None:
    rising = schedule_factors(TrainSpec(schedule="constant", warmup=0.4), 0, 10, 10)
    np.testing.assert_allclose(rising, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(
        schedule_factors(TrainSpec(schedule="linear", warmup=0), 0, 5, 5), [1, 0.8, 0.6, 0.4, 0.2]
    )
    cosine = schedule_factors(TrainSpec(schedule="cosine", warmup=0), 0, 4, 4)
    np.testing.assert_allclose(cosine, [0.5 * (1 + math.cos(math.pi * share)) for share in (0, 0.25, 0.5, 0.75)])
    np.testing.assert_allclose(schedule_factors(TrainSpec(), 3, 4, 20), schedule_factors(TrainSpec(), 0, 20, 20)[3:7])


# stacks --------------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp": {"hidden": [5, 3], "norm": True},
    "residual": {"width": 6, "depth": 2, "expansion": 1},
    "attention": {"width": 6, "heads": 2},
    "attention-pooling": {"width": 6, "heads": 3, "queries": 2},
    "layer-mix": {},
    "layer-concat": {"layers": 2},
}


PLAIN = ("linear", "layer-mix", "layer-concat")  # without dropout


@settings(max_examples=12)
@given(st.sampled_from(sorted(KINDS)), st.data())
def test_a_head_in_a_stack_learns_what_it_learns_alone(kind: str, data: st.DataObject) -> None:
    draw = data.draw
    count = draw(st.integers(2, 5))
    layers = kind.startswith(("attention", "layer"))
    x, y = made(67, 21 if layers else 7)
    x = x.reshape(67, 3, 7) if layers else x
    optimizer = draw(st.sampled_from(["adamw", "sgd"]))
    smoothing = draw(st.sampled_from([0.0, 0.1]))
    disturbed = draw(st.sampled_from([{}, {"input_noise": 0.3}, {"input_noise": 0.2, "input_dropout": 0.25}]))
    heads, specs = [], []
    for seed in range(count):
        rate = draw(st.sampled_from([0.0, 0.1, 0.5]))
        heads.append(HeadSpec(kind, "torch", {**KINDS[kind], **({} if kind in PLAIN else {"dropout": rate})}))
        specs.append(
            TrainSpec(
                epochs=3, batch_size=17, optimizer=optimizer, shuffle_seed=11, seed=seed, patience=2,
                learning_rate=draw(st.sampled_from([1e-3, 1e-2])), weight_decay=draw(st.sampled_from([0.0, 0.1])),
                label_smoothing=smoothing * seed / count, schedule=draw(st.sampled_from(["constant", "cosine"])),
                class_weight=draw(st.sampled_from([None, "balanced"])), clip=draw(st.sampled_from([0.3, 1.0])),
                **disturbed,
            )
        )  # fmt: skip
    options: dict[str, Any] = {"task": "classification", "class_names": NAMES, "x_eval": x[:20], "y_eval": y[:20]}
    together = train_stack(x, y, heads, specs, **options)
    for place in range(count):
        alone = train_stack(x, y, heads[place : place + 1], specs[place : place + 1], **options)
        mine, other = together[place].history, alone[0].history
        assert len(mine) == len(other)
        for a, b in zip(mine, other, strict=True):
            assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
            assert a["validation_log_loss"] == pytest.approx(b["validation_log_loss"], abs=1e-4)
        for name, value in alone[0].head.state.items():
            np.testing.assert_allclose(together[place].head.state[name], value, atol=2e-3, rtol=1e-3)


class OneByOne:
    """What a live backbone is to training: features made of each batch's rows when it is asked for."""

    def __init__(self, source: Any) -> None:
        self.source, self.steps = source, source.steps

    def epoch(self, number: int) -> Iterator[FeatureBatch]:
        for batch in self.source.epoch(number):
            yield replace(batch, x=torch.stack([row.clone() for row in batch.x]))


@pytest.mark.parametrize("kind", ["linear", "mlp", "attention-pooling"])
def test_disturbed_features_are_the_same_cached_and_live(kind: str) -> None:
    """The draws depend on the seed and the epoch alone; another seed or amount is seen."""
    x, y = made(61, 21)
    x = x.reshape(61, 3, 7) if kind == "attention-pooling" else x
    rows = labelled_rows_of(x, y, task_named("classification"), NAMES)
    spec = TrainSpec(epochs=2, batch_size=17, input_noise=0.3, input_dropout=0.2)

    def losses(spec: TrainSpec, live: bool) -> list[float]:
        batches: Any = OneByOne(batches_of(rows.x, spec)) if live else batches_of(rows.x, spec)
        options = PassOptions(keep_losses=True, progress=False)
        (fitted,) = fit_minibatch(rows, None, [HeadSpec(kind)], [spec], batches=batches, options=options)
        return [float(loss) for loss in fitted.losses]

    cached = losses(spec, live=False)
    assert cached == losses(spec, live=True)
    assert len(cached) == 8

    for other in (replace(spec, shuffle_seed=1), replace(spec, input_noise=0.3001), replace(spec, input_dropout=0.0)):
        assert cached != losses(other, live=True)


def test_noise_and_dropout_are_in_units_of_the_features() -> None:
    """Alike whether features are standardised beforehand or by the head; every epoch has draws of its own."""
    generator = np.random.default_rng(0)
    x = torch.from_numpy(generator.normal((3, -5), (0.5, 20), (9973, 2)).astype(np.float32))
    mean, deviation = x.mean(dim=0), x.std(dim=0)
    whole = TensorBatches(x, 9973, 0)
    (plain,) = whole.epoch(1)

    def disturbed(source: Any = whole, epoch: int = 1, units: Any = (mean, deviation), **asked: Any) -> Any:
        return next(DisturbedBatches(source, TrainSpec(**asked), *units).epoch(epoch)).x

    noise = (disturbed(input_noise=0.4) - plain.x) / deviation
    assert noise.std(dim=0).numpy() == pytest.approx(0.4, rel=0.03)
    assert noise.mean(dim=0).numpy() == pytest.approx(0, abs=0.02)
    dropped = (disturbed(input_dropout=0.25) - mean) / (plain.x - mean)
    gone = dropped.abs() < 1e-3
    assert gone.float().mean(dim=0).numpy() == pytest.approx(0.25, abs=0.02)
    assert dropped[~gone].numpy() == pytest.approx(4 / 3, rel=1e-2)
    standard = TensorBatches((x - mean) / deviation, 9973, 0)
    both = {"input_noise": 0.4, "input_dropout": 0.25}
    there = disturbed(standard, units=(0.0, 1.0), **both) * deviation + mean
    np.testing.assert_allclose(there, disturbed(**both), atol=1e-4)
    assert not torch.equal(disturbed(**both)[:5], disturbed(**both, seed=1)[:5])
    again = disturbed(**both, epoch=2)[torch.argsort(next(whole.epoch(2)).rows)]
    assert not torch.allclose(again, disturbed(**both)[torch.argsort(plain.rows)])


def test_a_head_with_another_seed_is_seen_to_differ() -> None:
    x, y = made()
    options: dict[str, Any] = {"task": "classification", "class_names": NAMES}
    heads = [HeadSpec("mlp", "torch", {"hidden": [5]})]
    losses = [
        train_stack(x, y, heads, [TrainSpec(epochs=1, seed=seed, shuffle_seed=0)], **options)[0].history[0][
            "train_loss"
        ]
        for seed in (0, 1)
    ]
    assert abs(losses[0] - losses[1]) > 1e-4


def test_stopped_heads_leave_the_stack_and_keep_their_best() -> None:
    x, y = made(300)
    specs = [TrainSpec(epochs=40, patience=2, learning_rate=rate, shuffle_seed=0) for rate in (3.0, 1e-3)]
    found = train_stack(
        x[:150], y[:150], [HeadSpec("mlp")] * 2, specs, x_eval=x[150:], y_eval=y[150:],
        task="classification", class_names=NAMES,
    )  # fmt: skip
    assert len(found[0].history) < len(found[1].history)
    assert len(found[0].history) == found[0].fitted.best_epoch + 3
    from embedcache.train.metrics import score

    measured = score("log_loss", CLASSIFICATION, y[150:], found[0].head.probabilities(x[150:]))
    assert measured == pytest.approx(min(each["validation_log_loss"] for each in found[0].history), rel=1e-4)


def test_a_stack_too_large_for_the_cache_is_trained_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = made(90)
    heads = [HeadSpec("mlp", "torch", {"hidden": [5]})] * 5
    specs = [TrainSpec(epochs=3, seed=seed, shuffle_seed=0, learning_rate=1e-3 * (1 + seed)) for seed in range(5)]
    options: dict[str, Any] = {"task": "classification", "class_names": NAMES, "x_eval": x, "y_eval": y}
    whole = train_stack(x, y, heads, specs, **options)
    monkeypatch.setattr("embedcache.train.minibatch.STACK_NUMBERS", 2 * whole[0].head.parameters)
    stacks: list[int] = []
    watched = PassOptions(watch=lambda stack: stacks.append(len(stack)))
    parts = train_stack(x, y, heads, specs, options=watched, **options)
    assert stacks == [2, 2, 1]
    for mine, other in zip(parts, whole, strict=True):
        assert mine.fitted.best_epoch == other.fitted.best_epoch
        assert mine.fitted.steps == other.fitted.steps
        assert mine.history[-1]["train_loss"] == pytest.approx(other.history[-1]["train_loss"], abs=1e-5)
        assert mine.head.training == other.head.training
        for name in other.head.state:
            np.testing.assert_allclose(mine.head.state[name], other.head.state[name], atol=1e-4)


def test_features_on_disk_are_read_once_a_pass_however_many_heads() -> None:
    class Counted(MappedRows):
        rows = 0

        def read(self, rows: Any) -> Any:
            self.rows += len(rows)
            return super().read(rows)

    x, y = made(300)
    for heads in (1, 7):
        reader = Counted(x)
        specs = [TrainSpec(epochs=2, seed=seed, shuffle_seed=0, standardize=False) for seed in range(heads)]
        train_stack(reader, y, [HeadSpec()] * heads, specs, task="classification", class_names=NAMES)
        assert reader.rows == 2 * 300


def test_what_cannot_be_stacked_is_refused() -> None:
    x, y = made()
    options: dict[str, Any] = {"task": "classification", "class_names": NAMES}
    with pytest.raises(SpecError, match="share epochs"):
        train_stack(x, y, [HeadSpec()] * 2, [TrainSpec(epochs=1), TrainSpec(epochs=2)], **options)
    with pytest.raises(SpecError, match="one kind and shape"):
        train_stack(x, y, [HeadSpec("mlp"), HeadSpec()], [TrainSpec()] * 2, **options)
    heads = [HeadSpec("mlp", "torch", {"hidden": [width]}) for width in (3, 5)]
    with pytest.raises(SpecError, match="one kind and shape"):
        train_stack(x, y, heads, [TrainSpec()] * 2, **options)


# the loop ------------------------------------------------------------------------------------------------------------


class Scripted:
    """A learner whose validation metric is written down, for the loop alone."""

    def __init__(self, scores: list[float], losses: float = 1.0, wait: threading.Event | None = None) -> None:
        self.alive = [0]
        self.scores, self.losses, self.wait = iter(scores), losses, wait
        self.kept: list[int] = []
        self.steps = 0

    def step(self, batch: FeatureBatch) -> torch.Tensor:
        self.steps += 1
        if self.wait is not None and self.steps == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return torch.tensor(self.losses)

    def evaluate(self) -> np.ndarray:
        return np.array([next(self.scores)])

    def remember(self, places: Any) -> None:
        self.kept += [self.steps] * len(places)

    def keep(self, places: Any) -> None:
        self.alive = [self.alive[place] for place in places]


def test_an_array_that_may_not_be_written_is_lent_without_a_copy() -> None:
    x = np.arange(35, dtype=np.float32).reshape(5, 7)
    mapped = x[1:, ::2]
    mapped.flags.writeable = False
    tensor = lent(mapped)
    assert tensor.data_ptr() == x[1:].ctypes.data
    assert lent(x).data_ptr() == x.ctypes.data
    del x, mapped
    np.testing.assert_array_equal(tensor.numpy(), np.arange(35).reshape(5, 7)[1:, ::2])


def batches(rows: int = 4) -> TensorBatches:
    return TensorBatches(torch.zeros(rows, 1), rows, 0)


def test_early_stopping_waits_for_patience_and_remembers_the_best() -> None:
    learner = Scripted([0.5, 0.7, 0.6, 0.65, 0.9])
    found = fit(learner, batches(), Stopping(5, patience=2, metric="accuracy"), progress=False)
    assert [entry["validation_accuracy"] for entry in found.history[0]] == [0.5, 0.7, 0.6, 0.65]
    assert found.best_epoch == [1]
    assert learner.kept == [1, 2]


def test_a_metric_that_is_better_when_lower() -> None:
    found = fit(Scripted([0.5, 0.7, 0.4]), batches(), Stopping(3, greater_is_better=False), progress=False)
    assert found.best_epoch == [2]


def test_a_metric_that_is_not_a_number_is_never_the_best() -> None:
    found = fit(Scripted([math.nan, 0.1, math.nan]), batches(), Stopping(3), progress=False)
    assert found.best_epoch == [1]


def test_a_loss_that_explodes_is_an_error() -> None:
    with pytest.raises(TrainingError, match="lower learning rate"):
        fit(Scripted([0.5], losses=math.inf), batches(), Stopping(1), progress=False)


def test_ctrl_c_keeps_the_best_weights_so_far() -> None:
    learner = Scripted([0.5, 0.7, 0.6], wait=threading.Event())
    found = fit(learner, batches(), Stopping(9), progress=False)
    assert found.interrupted
    assert found.best_epoch == [1]


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    x, y = made()
    spec = TrainSpec(epochs=3, seed=4)
    runs = [
        train_head(x, y, x, y, HeadSpec("mlp"), each, class_names=NAMES, progress=False).head.state
        for each in (spec, spec, TrainSpec(epochs=3, seed=5))
    ]
    assert all(np.array_equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not np.array_equal(runs[0]["output.weight"], runs[2]["output.weight"])


# batches -------------------------------------------------------------------------------------------------------------


def on_disk(x: Any, reader: type[MappedRows] = MappedRows) -> OnDisk:
    features = features_of(reader(x))
    assert isinstance(features, OnDisk)
    return features


def rows_seen(source: Any, epoch: int) -> Iterator[tuple[FeatureBatch, list[int]]]:
    for batch in source.epoch(epoch):
        yield batch, batch.rows.tolist()


@settings(max_examples=15)
@given(st.integers(1, 700), st.integers(1, 97), st.integers(0, 3))
def test_every_source_gives_each_row_once_with_its_own_features(rows: int, size: int, epoch: int) -> None:
    x = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    offsets = np.concatenate([[0], np.cumsum(1 + np.arange(rows) % 5)])
    values = np.repeat(x, np.diff(offsets), axis=0)
    sources = [
        TensorBatches(torch.from_numpy(x), size, 7),
        DiskBatches(on_disk(x), size, 7, window_bytes=12 * 100),
        RaggedBatches(Ragged(values, offsets, FeatureSet("tokens", "tokens", 3, 1, "float32")), size, 7, "cpu"),
    ]
    for source in sources:
        seen: list[int] = []
        steps = 0
        for batch, mine in rows_seen(source, epoch):
            steps += 1
            assert len(mine) <= size
            seen += mine
            first = batch.x if batch.mask is None else batch.x[:, 0]
            np.testing.assert_array_equal(first.numpy(), x[mine])
            if batch.mask is not None:
                assert batch.mask.sum(dim=1).tolist() == [1 + row % 5 for row in mine]
        assert sorted(seen) == list(range(rows))
        assert steps == source.steps


def test_orders_depend_on_seed_and_epoch_alone() -> None:
    assert np.array_equal(order(97, 1, 2), order(97, 1, 2))
    assert not np.array_equal(order(97, 1, 2), order(97, 1, 3))
    assert not np.array_equal(order(97, 1, 2), order(97, 2, 2))
    windows = list(block_order(1000, 1, 0, 256, 64))
    assert len(windows) == 4
    rows, shuffled = windows[0]
    assert len(np.unique(rows // 64)) == 4  # whole blocks, drawn at random
    assert np.array_equal(rows, np.sort(rows)), "read in the order of the disk"
    assert np.array_equal(np.sort(shuffled), np.arange(len(rows)))
    assert not np.array_equal(shuffled, np.arange(len(rows)))


def test_features_on_disk_train_the_same_head_as_features_in_memory() -> None:
    x, y = made(500)
    rows, read = (labelled_rows_of(source, y, CLASSIFICATION, NAMES) for source in (x, MappedRows(x)))
    spec = TrainSpec(epochs=2, batch_size=32)
    source = DiskBatches(on_disk(x), 32, 0)
    (mine,) = fit_minibatch(rows, None, [HeadSpec()], [spec], batches=source)
    (other,) = fit_minibatch(read, None, [HeadSpec()], [spec])
    assert all(np.array_equal(mine.state[name], other.state[name]) for name in mine.state)


def test_rows_that_may_not_be_written_are_trained_on_without_a_word() -> None:
    """Mapped rows are read-only; torch's warning of them would be an error here."""
    x, y = made(500)
    x.flags.writeable = False

    class Mapped(MappedRows):
        def read(self, rows: Any) -> Any:
            found = super().read(rows)
            found.flags.writeable = False
            return found

    spec = TrainSpec(epochs=2, standardize=False)
    torch.set_warn_always(True)  # else only the first of a process is heard
    try:
        for each, other in ((x, x.copy()), (Mapped(x), MappedRows(x))):
            mine, theirs = (
                train_head(rows, y, rows, y, spec=spec, class_names=NAMES, progress=False).head.state
                for rows in (each, other)
            )
            assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
    finally:
        torch.set_warn_always(False)


def test_a_reader_that_fails_is_heard() -> None:
    class Broken(MappedRows):
        def read(self, rows: Any) -> Any:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(DiskBatches(on_disk(np.zeros((100, 3), np.float32), Broken), 10, 0).epoch(0))


def test_memory_is_what_it_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDCACHE_MEMORY", "4000")
    assert fits_in_memory(1000)
    assert not fits_in_memory(1001)


@given(st.integers(2, 300), st.floats(-1e4, 1e4), st.floats(1e-3, 1e3))
def test_moments_are_numpys(rows: int, shift: float, spread: float) -> None:
    x = (np.random.default_rng(rows).normal(size=(rows, 7)) * spread + shift).astype(np.float32)
    x[:, 3] = np.float32(shift)
    mean, scale = moments(features_of(x, POOLED))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-5, atol=1e-5)
    assert scale[3] == 1.0
    varied = exact.std(axis=0) > 1e-5 * max(1.0, abs(shift))
    np.testing.assert_allclose(scale[varied], 1 / exact.std(axis=0)[varied], rtol=2e-2)


@pytest.mark.parametrize(
    ("kind", "engine", "solver"),
    [("linear", "torch", "minibatch"), ("linear", "torch", "convex"), ("linear", "sklearn", "minibatch")],
)
def test_a_dead_unit_gets_no_weight_of_millions(kind: str, engine: Any, solver: Any) -> None:
    """A unit that varies by less than float32 rounds the row is noise, whatever the labels seem to say of it."""
    x, y = made()
    x[:, 2] = 1e-8 * x[:, 2]
    spec = TrainSpec(epochs=3, solver=solver)
    found = train_head(x, y, head=HeadSpec(kind, engine), spec=spec, class_names=["a", "b", "c"], progress=False)
    weight = np.abs(found.head.state["output.weight"])
    assert weight[:, 2].max() < 10 * weight.max(axis=0)[[0, 1, 3, 4, 5, 6]].min()


@pytest.mark.parametrize(("engine", "solver"), [("torch", "minibatch"), ("torch", "convex"), ("sklearn", "minibatch")])
def test_a_column_of_time_stamps_makes_no_constants_of_the_others(engine: Any, solver: Any) -> None:
    generator = np.random.default_rng(0)
    x = (generator.normal(size=(307, 11)) * 0.01).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int64)
    x[:, 5] = 1.7e9 + 1e10 * x[:, 5]
    spec = TrainSpec(epochs=20, learning_rate=0.03, solver=solver)
    found = train_head(x, y, head=HeadSpec("linear", engine), spec=spec, class_names=["a", "b"], progress=False)
    assert found.metrics["train"]["accuracy"] > 0.95


@pytest.mark.parametrize(
    ("task", "change", "reason"),
    [
        ("classification", lambda y: y + 1, "training: row [0-9]+ has the class 3: expected 0 to 2, or -1"),
        ("classification", lambda y: np.where(y == 0, -2, y), "has the class -2: expected 0 to 2"),
        ("multilabel", lambda y: np.eye(5)[y], "targets are 5 wide, and there are 3 names"),
        ("multilabel", lambda y: 2 * np.eye(3)[y], "row 0 has labels other than 0 and 1"),
        ("regression", lambda y: np.eye(2)[y % 2], "targets are 2 wide, and there are 3 names"),
    ],
)
def test_targets_that_do_not_fit_the_names_are_refused(task: Any, change: Any, reason: str) -> None:
    x, y = made()
    with pytest.raises(InputError, match=reason):
        train_head(x, change(y), task=task, class_names=NAMES, progress=False)
    good = {"classification": y, "multilabel": np.eye(3)[y], "regression": np.eye(3)[y]}[task]
    with pytest.raises(InputError, match=reason.replace("training", "validation")):
        train_head(x, good, x, change(y), task=task, class_names=NAMES, progress=False)
    with pytest.raises(InputError, match="every sample weight is 0"):
        train_head(x, good, task=task, class_names=NAMES, sample_weight=np.zeros(len(x)), progress=False)


# tasks and bad input -------------------------------------------------------------------------------------------------


def test_regression_is_in_real_units() -> None:
    x, _ = made(400)
    y = x @ np.arange(14).reshape(7, 2) * [1.0, 50.0] + [7.0, -300.0]
    spec = TrainSpec(epochs=60, learning_rate=0.05, batch_size=16)
    found = train_head(
        x[:300], y[:300], x[300:], y[300:], "linear", spec, task="regression", class_names=["u", "v"], progress=False
    )
    assert found.metrics["validation"]["r2"] > 0.98
    assert abs(found.head.predict(x[:300]) - y[:300]).max() < 0.2 * y.std(axis=0).max()


def test_several_labels() -> None:
    x, _ = made(400)
    y = (x[:, :3] > np.median(x[:, :3], axis=0)).astype(np.uint8)
    y[5] = 255
    found = train_head(
        x[:300],
        y[:300],
        x[300:],
        y[300:],
        "linear",
        TrainSpec(epochs=60, learning_rate=0.05),
        task="multilabel",
        class_names=NAMES,
        progress=False,
    )
    assert found.metrics["train"]["rows"] == 299
    assert found.metrics["validation"]["f1_macro"] > 0.9
    assert len(found.head.thresholds) == 3


@pytest.mark.parametrize("solver", ["minibatch", "convex"])
def test_a_linear_head_is_as_good_as_scikit_learns(solver: Any) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x, y = made(600)
    scaler = StandardScaler().fit(x[:400])
    theirs = LogisticRegression(max_iter=1000).fit(scaler.transform(x[:400]), y[:400])
    spec = TrainSpec(solver=solver, epochs=60, learning_rate=0.02, batch_size=16)
    found = train_head(x[:400], y[:400], x[400:], y[400:], "linear", spec, class_names=NAMES, progress=False)
    accuracy = theirs.score(scaler.transform(x[400:]), y[400:])
    assert found.metrics["validation"]["accuracy"] >= accuracy - 0.02
    if solver == "convex":
        np.testing.assert_array_equal(found.head.predict(x[400:]), theirs.predict(scaler.transform(x[400:])))


def test_bad_input_is_named() -> None:
    x, y = made()
    options: dict[str, Any] = {"class_names": NAMES, "progress": False}
    broken = x.copy()
    broken[13, 2] = np.nan
    with pytest.raises(FeatureError, match="row 13 holds NaN"):
        train_head(broken, y, **options)
    with pytest.raises(FeatureError, match=r"row 13 holds NaN"):
        train_head(x, y, broken, y, **options)
    with pytest.raises(TrainingError, match="have the class 'b'"):
        train_head(x, np.ones_like(y), **options)
    with pytest.raises(TrainingError, match="2 training rows for 3 classes"):
        train_head(x[:2], np.array([0, 1]), **options)
    with pytest.raises(TrainingError, match="no labelled row"):
        train_head(x, np.full_like(y, -1), **options)
    with pytest.raises(InputError, match="210 of targets"):
        train_head(x, y[:-1], **options)
    values = x[:, 0].astype(np.float64)
    values[3] = np.inf
    with pytest.raises(InputError, match="row 3 has an infinite target"):
        train_head(x, values, task="regression", class_names=["u"], progress=False)
    with pytest.raises(SpecError, match=r"metric 'acuracy' .did you mean accuracy"):
        train_head(x, y, x, y, spec=TrainSpec(metric="acuracy"), **options)
    with pytest.raises(SpecError, match="task is 'ranking': expected classification"):
        train_head(x, y, class_names=NAMES, task="ranking", progress=False)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="did you mean linear"):
        train_head(x, y, head=HeadSpec("linaer"), **options)
    with pytest.raises(SpecError, match="convex solver is for linear"):
        train_head(x, y, head="mlp", spec=TrainSpec(solver="convex"), **options)


def test_a_head_too_large_for_the_data_is_said() -> None:
    x, y = made(40)
    found = train_head(
        x,
        y,
        head=HeadSpec("mlp", "torch", {"hidden": [512]}),
        spec=TrainSpec(epochs=1),
        class_names=NAMES,
        progress=False,
    )
    assert any("parameters for 40 training rows" in note for note in found.notes)


def test_linear_on_features_that_do_not_fit_in_memory_is_trained_by_minibatches_and_says_so() -> None:
    x, y = made(90)
    found = train_head(MappedRows(x), y, class_names=NAMES, progress=False)
    assert found.head.training["solver"] == "minibatch"
    assert any("do not fit in memory: trained by minibatches" in note for note in found.notes)
    for options in ({"spec": TrainSpec(epochs=2)}, {"spec": TrainSpec(solver="convex")}, {"head": "mlp"}):
        asked = train_head(MappedRows(x), y, class_names=NAMES, progress=False, **options)  # type: ignore[arg-type]
        assert not any("memory" in note for note in asked.notes)
    assert train_head(x, y, class_names=NAMES, progress=False).head.training["solver"] == "convex"


# where training starts, and whether it has come to an end ------------------------------------------------------------


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
@pytest.mark.parametrize("smoothing", [0.0, 0.13])
@pytest.mark.parametrize("weighted", [False, True])
def test_biases_start_where_a_head_without_features_has_the_least_loss(
    task: TaskName, smoothing: float, weighted: bool
) -> None:
    generator = np.random.default_rng(5)
    y: Any = {
        "classification": generator.choice(3, 47, p=[0.8, 0.15, 0.05]),
        "multilabel": (generator.random((47, 3)) < [0.05, 0.3, 0.9]).astype(np.uint8),
        "regression": generator.normal(size=(47, 3)),
    }[task]
    y[:3] = np.arange(3) if task == "classification" else y[:3] if task == "regression" else np.eye(3)
    # A mean over weights of classes is another in each batch: with weights of rows, they are all that there is.
    rows = generator.random(47) if weighted else None
    weight = np.array([0.5, 2.0, 3.0]) if weighted and task != "regression" else None
    biases = start_biases(y, task_named(task), 3, smoothing=smoothing, class_weight=weight, rows=rows)
    loss = Loss(task_named(task), 3, [smoothing], None if weight is None else weight[None].astype(np.float32))
    logits = torch.from_numpy(np.tile(biases[:, None], 47)).float()
    targets = torch.from_numpy(y if task == "classification" else y.astype(np.float32))
    _, slope = loss(logits, targets, None if rows is None else torch.from_numpy(rows).float())
    np.testing.assert_allclose(slope.sum(dim=1), 0, atol=2e-6)


def test_what_never_occurs_has_a_finite_bias() -> None:
    biases = start_biases(np.array([0, 0, 1]), CLASSIFICATION, 3)
    assert biases == pytest.approx(np.log([2, 1, 0.5]) - np.log([2, 1, 0.5]).mean())
    labels = np.array([[0, 1], [0, 1], [0, 1]], np.uint8)
    assert start_biases(labels, MULTILABEL, 2) == pytest.approx([np.log(0.5 / 3), np.log(3 / 0.5)])
    assert start_biases(labels, MULTILABEL, 2, class_weight=[1, 0]) == pytest.approx([np.log(0.5 / 3), 0])
    assert np.isfinite(start_biases(np.array([0, 1]), CLASSIFICATION, 2, class_weight=[1, 0])).all()


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_heads_start_alike_alone_in_a_stack_and_on_disk(task: TaskName, kind: str) -> None:
    x, classes = made(90)
    y: Any = {
        "classification": classes, "multilabel": np.eye(3, dtype=np.uint8)[classes],
        "regression": x[:, :3].astype(float),
    }[task]  # fmt: skip
    seen: list[dict[str, Any]] = []

    def watch(stack: HeadStack) -> None:
        seen.extend(stack.state(place) for place in range(len(stack.alive)))

    def start(heads: int, source: Any = x) -> list[dict[str, Any]]:
        seen.clear()
        data = labelled_rows_of(source, y, task_named(task), NAMES, weight=np.float32(np.arange(90) % 4 + 1))
        spec = TrainSpec(label_smoothing=0.1, class_weight=None if task == "regression" else "balanced", epochs=1)
        options = PassOptions(max_steps=1, progress=False, watch=watch)
        fit_minibatch(data, None, [HeadSpec(kind)] * heads, [spec] * heads, options=options)
        return list(seen)

    alone = start(1)[0]
    for other in [*start(2), *start(1, MappedRows(x))]:
        assert all(torch.equal(alone[name], other[name]) for name in alone)


def rare(rows: int = 359, labels: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels that about one row in twenty has."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(rows, 384)).astype(np.float32)
    z = 2 * x @ generator.normal(size=(384, labels)) / np.sqrt(384) + generator.logistic(size=(rows, labels))
    return x, (z > 4.2).astype(np.uint8)


def test_training_on_few_rows_of_rare_labels_ends_near_their_rate() -> None:
    """With biases of 0 and 180 steps the mean probability was 0.43, and 0.06 is true."""
    x, y = rare()
    names = [f"label {at}" for at in range(20)]
    shared: dict[str, Any] = {"task": "multilabel", "class_names": names, "progress": False, "calibrate": False}
    new, _ = rare()
    new = np.random.default_rng(1).normal(size=new.shape).astype(np.float32)
    for spec, head in ((TrainSpec(solver="minibatch"), "linear"), (TrainSpec(), "mlp")):
        found = train_head(x, y, head=head, spec=spec, **shared)
        assert len(found.history) == 50, "6 steps an epoch, 300 at least"
        for features in (x, new):
            assert abs(found.head.probabilities(features).mean() - y.mean()) < 0.06


def test_no_head_stops_before_the_least_number_of_steps() -> None:
    learner = Scripted([0.5] * 9)
    found = fit(learner, TensorBatches(torch.zeros(8, 1), 4, 0), Stopping(9, patience=2, min_steps=11), progress=False)
    assert len(found.history[0]) == 6, "2 steps an epoch: 12 are the first that are enough"


def told(losses: list[float]) -> list[dict[str, Any]]:
    return [{"train_loss": loss} for loss in losses]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_head_that_still_improves_is_told_from_one_that_has_come_to_its_end(schedule: Any) -> None:
    """Losses that fall as exp(-k t), where t is the way: the learning rate, summed over steps."""
    spec = TrainSpec(schedule=schedule, warmup=0.1)
    for epochs in (5, 30, 300):
        way = np.cumsum(schedule_factors(spec, 0, 100 * epochs, 100 * epochs).reshape(epochs, 100).sum(axis=1))
        way /= way[-1]
        for k, still in ((0.3, True), (1.0, True), (6.0, False), (20.0, False)):
            history = told([0.2 + float(np.exp(-k * t)) for t in way])
            assert still_improving(history, -1, spec, epochs) == still, (epochs, k)
            assert still_improving(history, epochs - 1, spec, epochs) == still
            assert not still_improving(history, 0, spec, epochs), "validation was best at the beginning"
            assert not still_improving(history[:-1], -1, spec, epochs), "stopped early"
    swinging = [1.0 if epoch == 0 else 0.5 + 0.2 * (-1) ** epoch for epoch in range(30)]
    assert not still_improving(told(swinging), -1, spec, 30)
    assert not still_improving(told(swinging[:-1]), -1, spec, 29)
    assert not still_improving(told([0.5] * 30), -1, spec, 30)
    assert not still_improving(told([0.1, 0.2, 0.3]), -1, spec, 3), "it rises"


def test_stacks_say_which_of_their_heads_still_improve() -> None:
    x, y = made(200)
    specs = [TrainSpec(epochs=40, learning_rate=rate, shuffle_seed=0, weight_decay=1.0) for rate in (1e-4, 0.1)]
    options: dict[str, Any] = {"task": "classification", "class_names": NAMES}
    assert [each.fitted.improving for each in train_stack(x, y, [HeadSpec()] * 2, specs, **options)] == [True, False]


@given(st.lists(st.integers(1, 97), min_size=1, max_size=229), st.integers(1, 13), st.integers(0, 5))
def test_batches_of_similar_length_hold_each_row_once(lengths: list[int], size: int, epoch: int) -> None:
    array = np.array(lengths, np.int64)
    rows = grouped_order(array, size, 3, epoch)
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    assert rows.tolist() == grouped_order(array, size, 3, epoch).tolist()
    if len({*lengths}) == 1:
        assert rows.tolist() == order(len(lengths), 3, epoch).tolist()


def test_batches_of_similar_length_are_hardly_padded_and_come_anew() -> None:
    lengths = np.random.default_rng(1).integers(3, 61, 499)

    def padded(rows: Any) -> float:
        return sum(int(lengths[rows[at : at + 7]].max()) * 7 for at in range(0, 497, 7)) / int(lengths.sum())

    first, second = (grouped_order(lengths, 7, 3, epoch) for epoch in (0, 1))
    assert padded(first) < 1.15 < 1.5 < padded(order(499, 3, 0))
    assert {frozenset(first[:7].tolist())} != {frozenset(second[:7].tolist())}
    longest = [int(lengths[first[at : at + 7]].max()) for at in range(0, 497, 7)]
    assert longest != sorted(longest), "short ones would always come first"
