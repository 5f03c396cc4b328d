"""Training on views: what is drawn, and that every way of training reads the same rows and views."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedcache.errors import FeatureError, InputError, SpecError
from embedcache.features import MappedRows, OnDisk, Ragged, features_of, joined
from embedcache.shard import FeatureSet
from embedcache.spec import HeadSpec, TrainSpec
from embedcache.task import CLASSIFICATION
from embedcache.train import labelled_rows_of, train_head, train_stack
from embedcache.train.batches import DiskBatches, RaggedBatches, TensorBatches, drawn_views, order
from embedcache.train.parts import Parts

N, D, C = 61, 7, 3
GENERATOR = np.random.default_rng(5)
Y = np.arange(N) % C
X = (GENERATOR.normal(size=(N, D)) + 2 * np.eye(D)[Y]).astype(np.float32)
VIEWS = [(X + 0.5 * GENERATOR.normal(size=X.shape)).astype(np.float32) for _ in range(2)]
NAMES = ("a", "b", "c")
SPEC = TrainSpec(solver="minibatch", epochs=4, batch_size=16)


def fitted(head: str | HeadSpec = "linear", spec: TrainSpec = SPEC, x: Any = X, y: Any = Y, **more: Any) -> Any:
    return train_head(x, y, head=head, spec=spec, class_names=NAMES, progress=False, **more).head


def test_draws_are_uniform_and_depend_on_seed_epoch_and_row_alone() -> None:
    drawn = np.stack([drawn_views(1000, 4, 7, epoch) for epoch in range(50)])
    shares = np.bincount(drawn.ravel(), minlength=5) / drawn.size
    assert np.abs(shares - 0.2).max() < 0.01
    assert np.abs(np.corrcoef(drawn[:2])[0, 1]) < 0.1
    assert np.abs(np.corrcoef(drawn[:, :2].T)[0, 1]) < 0.4
    assert np.array_equal(drawn_views(10, 4, 7, 3), drawn[3, :10])
    assert not np.array_equal(drawn_views(1000, 4, 8, 3), drawn[3])


def test_every_source_gives_the_drawn_view_of_each_row() -> None:
    dense = joined([features_of(part) for part in (X, *VIEWS)])
    on_disk = joined([OnDisk(MappedRows(part), features_of(X).feature) for part in (X, *VIEWS)])
    tokens = FeatureSet("tokens", "tokens", D, 1, "float32")
    ends = np.arange(N + 1, dtype=np.int64)
    ragged = joined([Ragged(part, ends, tokens) for part in (X, *VIEWS)])
    assert isinstance(on_disk, OnDisk)
    assert isinstance(ragged, Ragged)
    sources: list[Any] = [
        TensorBatches(torch.from_numpy(dense.values), 16, 3, 2),  # type: ignore[attr-defined]
        DiskBatches(on_disk, 16, 3, "cpu", 2, window_bytes=20 * 4 * D), RaggedBatches(ragged, 16, 3, "cpu", 2),
    ]  # fmt: skip
    every = np.stack([X, *VIEWS])
    for source in sources:
        assert source.steps == 4
        for epoch in (0, 5):
            views, seen = drawn_views(N, 2, 3, epoch), []
            for batch in source.epoch(epoch):
                rows = batch.rows.numpy()
                seen += rows.tolist()
                assert np.array_equal(batch.x.numpy().reshape(-1, D), every[views[rows], rows])
            assert sorted(seen) == list(range(N))
            assert isinstance(source, DiskBatches) or seen == order(N, 3, epoch).tolist()


def test_a_stack_equals_single_heads_and_views_change_them() -> None:
    rows = labelled_rows_of(X, Y, CLASSIFICATION, NAMES, views=VIEWS)
    specs = [replace(SPEC, learning_rate=rate) for rate in (1e-3, 3e-3)]
    heads = [HeadSpec("mlp", options={"hidden": [11]})] * 2
    stacked = train_stack(rows, None, heads, specs)
    for spec, own in zip(specs, stacked, strict=True):
        single = fitted(heads[0], spec, views=VIEWS)
        for name, value in single.state.items():
            np.testing.assert_allclose(own.head.state[name], value, rtol=2e-5, atol=2e-6)
    without, none = fitted(spec=SPEC), fitted(spec=replace(SPEC, views=0), views=VIEWS)
    assert np.array_equal(without.state["output.weight"], none.state["output.weight"])
    assert not np.allclose(without.state["output.weight"], fitted(views=VIEWS).state["output.weight"], atol=1e-3)
    assert fitted(views=VIEWS).training["views"] == 2
    assert none.training["views"] == 0
    assert "views" not in without.training


@pytest.mark.parametrize("standardize", [True, False])
def test_views_are_not_copied_before_they_are_prepared(standardize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One standardised copy is made of rows and views, bit for bit that of one array; the old way made two."""
    rows, dim = 2003, 503  # more than one of the pieces that moments are made of
    x = np.random.default_rng(1).normal(size=(3, rows, dim)).astype(np.float32)
    y, spec = np.arange(rows) % C, replace(SPEC, epochs=1, batch_size=997, standardize=standardize)

    def peak() -> tuple[float, bytes]:
        tracemalloc.start()
        try:
            head = fitted("linear", spec, x[0], y, views=[*x[1:]])
            return tracemalloc.get_traced_memory()[1] / x.nbytes, head.state["output.weight"].tobytes()
        finally:
            tracemalloc.stop()

    peak()  # what the first one imports
    flat, weight = peak()
    monkeypatch.setattr(Parts, "of", joined)
    before, same = peak()
    assert weight == same
    assert flat < 1.7
    assert before > 1.9 or not standardize


def test_validation_is_of_plain_pictures() -> None:
    """With views that are nothing like them it does not change what is measured, only what is learnt."""
    rows = labelled_rows_of(X, Y, CLASSIFICATION, NAMES, views=VIEWS)
    judged = labelled_rows_of(X, Y, CLASSIFICATION, NAMES)
    (result,) = train_stack(rows, judged, [HeadSpec("linear")], [replace(SPEC, patience=0)])
    assert len(result.history) == 4
    score = result.history[-1]["validation_log_loss"]
    own = result.head.probabilities(X)[np.arange(N), Y]
    assert score == pytest.approx(min(score, -float(np.log(own).mean())), rel=1e-5)


@pytest.mark.parametrize("head", ["linear", HeadSpec("lda", "sklearn"), HeadSpec("knn", "sklearn")])
def test_what_reads_all_rows_at_once_reads_every_view(head: Any) -> None:
    whole = fitted(head, TrainSpec(), views=VIEWS)
    weights = {} if head != "linear" else {"sample_weight": np.full(3 * N, 1 / 3)}
    tiled = fitted(head, TrainSpec(), np.concatenate([X, *VIEWS]), np.tile(Y, 3), **weights)
    np.testing.assert_allclose(whole.logits(X), tiled.logits(X), rtol=1e-5, atol=1e-6)
    one = fitted(head, TrainSpec(views=1), views=VIEWS)
    assert not np.allclose(one.logits(X), whole.logits(X), atol=1e-4)


def test_wrong_views_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="views is 3: the features have 2; make them by extract --views 3"):
        fitted(spec=replace(SPEC, views=3), views=VIEWS)
    with pytest.raises(SpecError, match="views is 1: the features have 0"):
        fitted(spec=TrainSpec(views=1))
    with pytest.raises(InputError, match="61 rows of features, and 60 of a view"):
        fitted(views=[X[:60]])
    with pytest.raises(FeatureError, match="shape"):
        fitted(views=[X[:, :5]])
