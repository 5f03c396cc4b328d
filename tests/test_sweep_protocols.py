"""Protocols of published tables: each equals a straight-line program of the published procedure."""

from __future__ import annotations

import itertools
import json
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeRows
from planted import Planted, planted_cache, planted_rows
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score

from embedcache.batching import Batch
from embedcache.cache import FeatureCache
from embedcache.cli import cli, run
from embedcache.errors import SweepError, SweepSpecError
from embedcache.extract import extract
from embedcache.report import report
from embedcache.shard import FeatureSet
from embedcache.spec import TrainSpec
from embedcache.sweep import SweepResult, planned, sweep
from embedcache.sweep.protocols import PUBLISHED
from embedcache.task import Array
from embedcache.train.batches import order

NAMES = sorted(PUBLISHED)
LINEAR = PUBLISHED["dinov2-linear"]
BLOCKS = "norm:cls+mean@-4+-3+-2+-1"


class Blocks(Planted):
    """Beside the planted features the class tokens and means of four blocks, the planted ones in the last of them."""

    def __init__(self, views: int = 0, **options: Any) -> None:
        super().__init__(**options)
        names = [BLOCKS, *(f"{BLOCKS}:view{view}" for view in range(1, views + 1))]
        self.feature_sets += tuple(FeatureSet(name, "layers", 2 * self.dim, 4, "float32") for name in names)

    def forward(self, prepared: FakeRows, batch: Batch) -> dict[str, Any]:
        out = super().forward(prepared, batch)
        for view, feature in enumerate(self.feature_sets[1:]):
            out[feature.name] = np.stack([self.blocks(prepared.contents[row], view) for row in batch.indices])
        return out

    def blocks(self, content: bytes, view: int) -> np.ndarray:
        out = np.random.default_rng([zlib.crc32(content), view]).normal(0, self.noise, (4, 2 * self.dim))
        out[3] += np.concatenate([self.vector(content), self.vector(content[:1] + content[::-1])])
        return out.astype(np.float32)


def made(path: Path, classes: int = 3, **options: Any) -> FeatureCache:
    rows = planted_rows(331, classes=classes, test=61, wrong=0.1)
    return extract(rows, output_dir=path, backbone=Blocks(noise=1.3, **options))


@pytest.fixture(scope="module", autouse=True)
def few_steps() -> Iterator[None]:
    """The linear evaluation has a four-hundredth of its steps, in batches that leave some rows for a smaller one."""
    (head,) = LINEAR.heads
    with pytest.MonkeyPatch.context() as patched:
        few = replace(LINEAR, heads=({**head, "min_steps": 30, "batch_size": 64},))
        patched.setitem(PUBLISHED, "dinov2-linear", few)  # type: ignore[arg-type]  # a dict, whatever its type says
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return made(tmp_path_factory.mktemp("planted") / "c")


@pytest.fixture(scope="module")
def swept(cache: FeatureCache, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SweepResult]:
    folder = tmp_path_factory.mktemp("swept")
    return {name: sweep(cache, protocol=name, output_dir=folder / name, progress=False) for name in NAMES}


def mteb_by_hand(cache: FeatureCache, shots: int) -> list[np.ndarray]:
    """What ten experiments of MTEB predict for the test split, int [N] each."""
    (x, y), (x_test, _) = cache.arrays("train"), cache.arrays("test")
    order, out = list(range(len(y))), []
    for _ in range(10):
        np.random.RandomState(42).shuffle(order)
        seen: dict[int, int] = defaultdict(int)
        drawn = []
        for row in order:
            if seen[y[row]] < shots:
                drawn.append(row)
                seen[y[row]] += 1
        out.append(LogisticRegression(max_iter=100, random_state=42).fit(x[drawn], y[drawn]).predict(x_test))
    return out


def test_mteb_is_its_ten_experiments_to_the_bit(cache: FeatureCache, swept: dict[str, SweepResult]) -> None:
    (figure,) = swept["mteb"].summary["published"]["figures"]
    y = cache.arrays("test")[1]
    scores = [float(np.mean(predicted == y)) for predicted in mteb_by_hand(cache, 8)]
    assert figure["scores"] == scores
    assert len(set(scores)) > 5  # draws differ
    assert figure["score"] == pytest.approx(np.mean(scores), abs=1e-15)
    assert figure["sd"] == pytest.approx(np.std(scores, ddof=1))
    assert figure["rows"] == len(y) == 61
    by_hand = [f1_score(y, predicted, average="macro") for predicted in mteb_by_hand(cache, 8)]
    assert figure["beside"]["f1_macro"] == pytest.approx(np.mean(by_hand))


def test_mteb_of_two_classes_has_average_precision_and_takes_other_shots(tmp_path: Path) -> None:
    cache = made(tmp_path / "c", 2)
    (figure,) = sweep(cache, protocol="mteb", shots=16, progress=False).summary["published"]["figures"]
    y, predictions = cache.arrays("test")[1], mteb_by_hand(cache, 16)
    assert figure["scores"] == [float(np.mean(predicted == y)) for predicted in predictions]
    by_hand = [average_precision_score(y, predicted) for predicted in predictions]
    assert figure["beside"]["ap"] == pytest.approx(np.mean(by_hand))


def test_mteb_takes_all_rows_of_a_class_that_has_too_few(tmp_path: Path) -> None:
    rows = planted_rows(331, test=61)
    kept = [row for at, row in enumerate(rows) if row["label"] != "z" or row["split"] == "test" or at < 16]
    cache = planted_cache(tmp_path / "c", kept)
    result = sweep(cache, protocol="mteb", progress=False)
    assert {row.train_rows for row in result.results} == {8 + 8 + int((cache.arrays("train")[1] == 2).sum())}


def probed_by_hand(cache: FeatureCache, penalties: list[float]) -> tuple[float, float]:
    """Return the penalty that validation chooses, the strongest of equals, and the accuracy on test thereafter."""

    def right(x: Array, y: Array, penalty: float, x_scored: Array, y_scored: Array) -> float:
        head = LogisticRegression(C=1 / penalty, max_iter=100_000, tol=1e-10).fit(x.astype(np.float64), y)
        return float(np.mean(head.predict(x_scored.astype(np.float64)) == y_scored))

    x, y = cache.arrays("train")
    if "validation" in cache.split_names:
        x_chosen, y_chosen = cache.arrays("validation")
    else:
        torch.manual_seed(0)
        order = torch.randperm(len(y)).numpy()
        held, rest = order[: len(y) // 10], order[len(y) // 10 :]
        (x_chosen, y_chosen), (x, y) = (x[held], y[held]), (x[rest], y[rest])
    chosen = max(penalties, key=lambda penalty: (right(x, y, penalty, x_chosen, y_chosen), penalty))
    both = np.concatenate([x, x_chosen]), np.concatenate([y, y_chosen])
    return chosen, right(*both, chosen, *cache.arrays("test"))


PENALTIES = {"clip": np.logspace(-6, 6, 97).tolist(), "dinov2": (1 / np.logspace(-6, 5, 45)).tolist()}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("validation", [True, False])
def test_a_probe_is_the_straight_line_one(name: str, classes: int, validation: bool, tmp_path: Path) -> None:
    rows = planted_rows(331, classes=classes, test=61, wrong=0.1)
    if not validation:
        rows = [{**row, "split": "test" if row["split"] == "test" else "train"} for row in rows]
    cache = planted_cache(tmp_path / "c", rows, noise=1.3)
    result = sweep(cache, protocol=name, progress=False)
    penalty, accuracy = probed_by_hand(cache, PENALTIES[name])
    best = next(row for row in result.leaderboard if row.id == result.summary["chosen"]["id"])
    assert best.train["l2"] == pytest.approx(penalty)
    (figure,) = result.summary["published"]["figures"]
    assert figure["score"] == accuracy
    assert ("the cache has no validation split" in result.summary["published"]["fixed"]["rows"]) is not validation


def test_neighbours_vote_as_in_a_straight_line(cache: FeatureCache, swept: dict[str, SweepResult]) -> None:
    (x, y), (x_test, y_test) = cache.arrays("train"), cache.arrays("test")
    unit, unit_test = (torch.nn.functional.normalize(torch.tensor(each), dim=1) for each in (x, x_test))
    similarity, nearest = (unit_test @ unit.T).topk(200)
    votes = torch.nn.functional.one_hot(torch.tensor(y)[nearest], 3) * (similarity / 0.07).softmax(1)[:, :, None]
    expected = {k: float((votes[:, :k].sum(1).argmax(1).numpy() == y_test).mean()) for k in (10, 20, 100, 200)}
    found = swept["dinov2-knn"]
    of = {row.label: row.head.options["n_neighbors"] for row in found.leaderboard}
    assert {of[figure["label"]]: figure["score"] for figure in found.summary["published"]["figures"]} == expected
    assert len(set(expected.values())) > 1
    assert found.best.spec.options["n_neighbors"] == 20  # whichever was best
    assert found.summary["test"]["score"] == expected[20]
    assert [row.looked_at_test for row in found.leaderboard] == [True] * 4


def linear_by_hand(cache: FeatureCache) -> dict[tuple[int, str, float], tuple[np.ndarray, np.ndarray]]:
    """Probabilities on validation and test rows of DINOv2's heads, by blocks, mean and learning rate."""
    (x, y), (x_held, _), (x_test, _) = (cache.arrays(split, BLOCKS) for split in ("train", "validation", "test"))
    half, per_epoch = x.shape[-1] // 2, -(-len(y) // 64)
    epochs = -(-30 // per_epoch)
    out = {}

    def read(of: np.ndarray, blocks: int, mean: str) -> torch.Tensor:
        tokens = of[:, 4 - blocks :, :half].reshape(len(of), -1)
        return torch.tensor(np.concatenate([tokens, of[:, 3, half:]], 1) if mean == "last" else tokens)

    for blocks, mean, base in itertools.product((1, 4), ("none", "last"), RATES):
        inputs, targets = read(x, blocks, mean), torch.tensor(y)
        net = torch.nn.Linear(inputs.shape[1], 3)
        net.weight.data.normal_(0, 0.01, generator=torch.Generator().manual_seed(0))
        net.bias.data.zero_()
        optimizer = torch.optim.SGD(net.parameters(), lr=base * 1024 / 256, momentum=0.9, weight_decay=0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch, eta_min=0)
        for epoch in range(epochs):
            for rows in torch.from_numpy(order(len(y), 0, epoch)).split(64):
                loss = torch.nn.functional.cross_entropy(net(inputs[rows]), targets[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            held, test = (net(read(of, blocks, mean)).softmax(1).numpy() for of in (x_held, x_test))
        out[blocks, mean, base * 4] = held, test
    return out


RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


def test_the_linear_evaluation_is_the_straight_line_one(cache: FeatureCache, swept: dict[str, SweepResult]) -> None:
    """Probabilities agree to 1e-6: a stack multiplies matrices of other shapes, which adds up in another order."""
    found, by_hand = swept["dinov2-linear"], linear_by_hand(cache)
    y, y_test = cache.arrays("validation")[1], cache.arrays("test")[1]
    assert len(found.results) == len(by_hand) == 52
    right: dict[tuple[int, str, float], float] = {}
    for result in found.results:
        options = result.head["options"]
        at = options["layers"], options["mean"], result.train["learning_rate"]
        held, _ = by_hand[at]
        right[at] = float((held.argmax(1) == y).mean())
        assert result.score == right[at], at
    assert len(set(right.values())) > 5
    best = max(right.values())
    chosen = next(at for at in by_hand if right[at] == best)  # which its code meets first
    head = found.best
    assert (head.spec.options["layers"], head.spec.options["mean"], head.training["learning_rate"]) == chosen
    raw = replace(head, calibration={}).probabilities(cache.arrays("test", BLOCKS)[0])
    np.testing.assert_allclose(raw, by_hand[chosen][1], atol=1e-6, rtol=0)
    (figure,) = found.summary["published"]["figures"]
    assert figure["score"] == float((by_hand[chosen][1].argmax(1) == y_test).mean())


def test_the_linear_evaluation_fixes_what_its_code_fixes() -> None:
    (head,) = LINEAR.heads
    assert head["learning_rate"] == pytest.approx([4 * rate for rate in RATES])
    assert (head["layers"], head["mean"]) == ([1, 4], ["none", "last"])
    fixed = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0, "schedule": "cosine", "warmup": 0, "clip": 0,
             "batch_size": 1024, "epochs": 1, "min_steps": 12_500, "patience": 0, "standardize": False}  # fmt: skip
    assert {name: head[name] for name in fixed} == fixed
    assert TrainSpec(epochs=1, min_steps=12_500).epochs_of(1252) == 10  # of ImageNet


def test_the_linear_evaluation_trains_on_views_where_there_are_some(tmp_path: Path) -> None:
    found = sweep(made(tmp_path / "c", views=2), protocol="dinov2-linear", progress=False)
    assert "in training of the plain picture or 2 views" in found.summary["published"]["fixed"]["features"]
    assert found.best.training["views"] == 2
    other = sweep(made(tmp_path / "d"), protocol="dinov2-linear", progress=False)
    assert {row.label: row.score for row in found.leaderboard} != {row.label: row.score for row in other.leaderboard}


def test_a_cache_without_the_blocks_is_told_how_to_make_them(cache: FeatureCache, tmp_path: Path) -> None:
    there = planted_cache(tmp_path / "c", planted_rows(90, test=20))
    for asked, features in ((there, ()), (cache, ("mean",))):
        with pytest.raises(SweepError, match=r"not in mean: .* extract INPUT --pooling norm:cls.mean@-4\.\.-1"):
            sweep(asked, protocol="dinov2-linear", features=features)
    written = sweep(cache, protocol="dinov2-linear", features=("norm:cls+mean@-4..-1",), progress=False)
    assert written.best.feature.name == BLOCKS


def test_a_protocol_of_pictures_is_not_for_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = planted_cache(tmp_path / "c", planted_rows(90, test=20))
    monkeypatch.setattr(type(there.spec), "content", "text")
    with pytest.raises(SweepError, match=r"is of pictures, and .* is of texts: sweep it by --protocol mteb"):
        sweep(there, protocol="dinov2-linear", progress=False)


def test_what_is_said_is_what_was_run(swept: dict[str, SweepResult]) -> None:
    fixed = swept["mteb"].summary["published"]["fixed"]
    assert fixed["rows"].startswith("10 draws of 8 rows a class from the train split")
    assert fixed["heads"] == "sklearn:logistic-regression, C=1.0, dtype=float32, max_iter=100, tol=0.0001"
    assert fixed["features"].startswith("mean, not standardised;")
    results = swept["mteb"].results
    assert [row.train_rows for row in results] == [24] * 10
    assert {row.eval_rows for row in results} == {61}
    options = {"C": 1.0, "dtype": "float32", "max_iter": 100, "tol": 1e-4}
    assert all(row.head == {"kind": "logistic-regression", "engine": "sklearn", "options": options} for row in results)
    assert not any(row.train["standardize"] for row in results)
    fixed, results = swept["dinov2-knn"].summary["published"]["fixed"], swept["dinov2-knn"].results
    assert fixed["heads"] == (
        "sklearn:knn, metric=cosine, n_neighbors in 10, 20, 100, 200, temperature=0.07, weights=softmax"
    )
    assert fixed["rows"] == "trained on the train split, scored on the test split"
    assert fixed["choice"] == "nothing is chosen; best/ keeps n_neighbors=20"
    assert {(row.train_rows, row.eval_rows) for row in results} == {(243, 61)}
    votes = {"metric": "cosine", "temperature": 0.07, "weights": "softmax"}
    assert [row.head["options"] for row in results] == [votes | {"n_neighbors": k} for k in (10, 20, 100, 200)]
    fixed, results = swept["dinov2-linear"].summary["published"]["fixed"], swept["dinov2-linear"].results
    assert fixed["heads"] == (
        "layer-concat, layers in 1, 4, mean in none, last, solver=minibatch, epochs=1, min_steps=30, batch_size=64, "
        "optimizer=sgd, learning_rate in 13 values from 4e-05 to 0.4, weight_decay=0.0, schedule=cosine, warmup=0.0, "
        "clip=0.0, patience=0, momentum=0.9"
    )
    assert fixed["choice"].endswith("that head, as it is, is scored on the test split once")
    assert {(row.train_rows, row.eval_rows) for row in results} == {(243, 27)}
    for name, heads, count in (
        ("clip", "linear, solver=convex, l2 in 97 values from 1e-06 to 1e+06", 97),
        ("dinov2", "linear, solver=convex, l2 in 45 values from 1e-05 to 1e+06", 45),
    ):
        fixed, results = swept[name].summary["published"]["fixed"], swept[name].results
        assert fixed["heads"] == heads
        assert fixed["rows"] == "trained on the train split, scored on the validation split"
        assert fixed["features"].startswith("mean, not standardised")
        strengths = [row.train["l2"] for row in results]
        assert len(set(strengths)) == len(results) == count
        assert heads.endswith(f"from {min(strengths):g} to {max(strengths):g}")
        assert {(row.head["kind"], row.train["solver"], row.train["standardize"]) for row in results} == {
            ("linear", "convex", False)
        }
        assert {(row.train_rows, row.eval_rows) for row in results} == {(243, 27)}


@pytest.mark.parametrize("name", NAMES)
def test_nobody_is_told_to_go_beyond_what_is_fixed_or_that_a_head_was_chosen_where_none_was(
    name: str, cache: FeatureCache, swept: dict[str, SweepResult], capsys: pytest.CaptureFixture[str]
) -> None:
    found, to_test = swept[name], PUBLISHED[name].protocol.to_test
    assert not [note for note in found.notes if "lie beyond" in note]
    assert any("one split only" in note for note in found.notes) == (not to_test)
    page = report(found.path)
    notebook = found._repr_html_()
    for text in (page, notebook):
        assert ("nothing is chosen" in text) == to_test
    assert ("The kept head on" in page, "The chosen head on" in page) == (to_test and name != "mteb", not to_test)
    assert ('best">kept' in page, 'best">chosen' in page) == (to_test, not to_test)
    assert ("* is the kept one" in notebook, "* is the chosen one" in notebook) == (to_test, not to_test)
    assert run(["sweep", str(cache.path), "-o", str(found.path), "--protocol", name]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    which = "head that the protocol keeps" if to_test else "chosen head"
    assert told == f"kept in {found.path}; the {which} in {found.path}/best"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_fixed_is_said_before_and_after(
    name: str, cache: FeatureCache, swept: dict[str, SweepResult], tmp_path: Path
) -> None:
    facts = swept[name].summary["published"]
    lines = [f"{fact}: {text}" for fact, text in facts["fixed"].items()]
    assert planned(cache, protocol=name).to_text().splitlines()[:-1] == lines
    assert set(lines) < set(swept[name].to_text().splitlines())
    texts = [swept[name].to_text(), swept[name]._repr_html_()]
    for form in ("html", "markdown"):
        report(swept[name].path, str(tmp_path / form), form)
        texts.append((tmp_path / form).read_text())
    for text in texts:
        assert all(fact in text for fact in facts["fixed"])
        assert "AbsTaskClassification" in text or name != "mteb"
        assert all(f"accuracy {figure['score']:.4f}" in text for figure in facts["figures"])
    assert facts["figures"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "flags",
    ["--head linear", "--config s.yaml", "--folds 3", "--seeds 1", "--metric f1_macro", "--random 3", "--seed 0",
     "--draws 3", "--repeats 2", "--learning-curve", "--test-all", "--choose simplest", "--minutes 3"],
)  # fmt: skip
def test_a_flag_that_contradicts_a_protocol_is_refused(
    name: str, flags: str, cache: FeatureCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["sweep", str(cache.path), "-o", str(tmp_path / "s"), "--protocol", name, *flags.split()]
    assert run(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--protocol {name} and" in line
    assert flags.split()[0] in line
    assert not (tmp_path / "s").exists()


def test_shots_belong_to_mteb_alone(cache: FeatureCache) -> None:
    for name in NAMES:
        if name != "mteb":
            with pytest.raises(SweepSpecError, match="--shots contradict"):
                sweep(cache, protocol=name, shots=4)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_that_does_not_suit_is_refused(name: str, tmp_path: Path) -> None:
    rows = planted_rows(90)
    with pytest.raises(SweepError, match=r"needs a test split.*relabel"):
        sweep(planted_cache(tmp_path / "a", rows), protocol=name)
    numbers = [{**row, "label": at + 0.5} for at, row in enumerate(planted_rows(90, test=20))]
    with pytest.raises(SweepError, match="is of classification"):
        sweep(planted_cache(tmp_path / "b", numbers), protocol=name)
    with pytest.raises(SweepSpecError, match=f"did you mean {name}"):
        sweep(planted_cache(tmp_path / "a", rows), protocol=f"{name}x")


def test_the_command_says_what_is_fixed_first_and_its_folder_is_the_protocols_own(
    cache: FeatureCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["sweep", str(cache.path), "-o", str(tmp_path / "s")]
    assert run([*given, "--protocol", "mteb", "--json"]) == 0
    printed = capsys.readouterr()
    assert "rows: 10 draws of 8 rows a class" in printed.err.split("1 head on 10 folds")[0]
    assert json.loads(printed.out)["published"]["name"] == "mteb"
    assert run(given) == 1
    assert "holds a sweep of something else" in capsys.readouterr().err


def test_the_flag_offers_every_protocol() -> None:
    option = next(option for option in cli.commands["sweep"].params if option.name == "protocol")
    assert sorted(option.type.choices) == NAMES
