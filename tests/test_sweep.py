"""Sweeps from a cache to a chosen head: nothing trained twice, nothing lost, the test split looked at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from planted import Planted, planted_cache, planted_rows

from embedcache.cache import FeatureCache
from embedcache.cli import cli
from embedcache.errors import Interrupted, SpecError, SweepError, TrainingError
from embedcache.extract import extract
from embedcache.heads import TrainedHead
from embedcache.heads.neighbours import TrainingRows
from embedcache.spec import HeadSpec, TrainSpec
from embedcache.sweep import Configuration, SweepResult, conclusion, stacks, sweep, training
from embedcache.sweep import run as running
from embedcache.sweep.comparison import Resampler, Scored
from embedcache.sweep.configuration import Protocol
from embedcache.sweep.cost import refuse_too_many
from embedcache.sweep.jobs import Job, JobBatch
from embedcache.sweep.problem import Problem
from embedcache.sweep.store import SweepFolder
from embedcache.task import CLASSIFICATION
from embedcache.train import train_head
from embedcache.train.metrics import score

FAST = {"head": "linear", "learning_rate": [0.003, 0.03], "epochs": 6, "seeds": [0, 1]}
GRID = ["majority", FAST, {"head": "mlp", "hidden": [5], "dropout": [0.0, 0.4], "learning_rate": 0.02, "epochs": 6}]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    rows = planted_rows(331, test=61, wrong=0.1)
    return planted_cache(tmp_path_factory.mktemp("planted") / "c", rows, keep_inputs=True)


@pytest.fixture(scope="module")
def swept(cache: FeatureCache, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    return sweep(cache, GRID, output_dir=tmp_path_factory.mktemp("swept") / "s", progress=False)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many heads each batch had that was trained."""
    seen: list[int] = []
    real = training.train_batch

    def counting(problem: Any, batch: Any, **options: Any) -> Any:
        seen.append(len(batch.jobs))
        return real(problem, batch, **options)

    monkeypatch.setattr(running, "train_batch", counting)
    monkeypatch.setattr(conclusion, "train_batch", counting)
    return seen


def test_the_leaderboard_is_honest_and_whole(swept: SweepResult) -> None:
    rows = swept.leaderboard
    assert [row.rank for row in rows] == [1, 2, 3, 4, 5]
    assert [row.score for row in rows] == sorted((row.score for row in rows), reverse=True)
    assert rows[-1].head.kind == "majority"
    assert rows[-1].distinguishable
    assert rows[0].p is None
    assert not rows[0].distinguishable
    for row in rows:
        low, high = row.interval
        assert low <= row.score <= high
        assert row.score == pytest.approx(np.mean(row.fold_scores))
        assert row.difference.value == pytest.approx(row.score - rows[0].score)
        if row.p is not None:
            assert row.p <= row.p_adjusted <= 1
    assert {row.test_method for row in rows[1:]} <= {"mcnemar-exact", "paired-bootstrap"}
    assert swept.summary["baseline"] == rows[-1].score


def test_a_seed_is_a_repetition_not_a_choice(swept: SweepResult) -> None:
    linear = [row for row in swept.leaderboard if row.head.kind == "linear"]
    assert [row.seeds for row in linear] == [(0, 1), (0, 1)]
    mine = [each for each in swept.results if each.candidate == linear[0].id]
    assert len(mine) == 10
    assert linear[0].score == pytest.approx(np.mean([each.score for each in mine]))


def test_the_score_of_a_fold_is_on_rows_no_head_of_it_saw(cache: FeatureCache, swept: SweepResult) -> None:
    problem = Problem.of(cache)
    features = problem.features("mean", problem.rows)
    first = next(each for each in swept.results if each.candidate == swept.leaderboard[0].id)
    best = {each.fold: each for each in swept.results if each.id == first.id}
    configuration = Configuration.from_json({name: getattr(first, name) for name in ("feature", "head", "train")})
    for fold, division in enumerate(problem.folds):
        job = Job(configuration, division, fold)
        ((alone,),) = training.train_batch(problem, JobBatch("stack", (job,)))
        assert alone.head is not None
        said = training.outputs_of(alone.head, features.take(np.flatnonzero(division.score)))
        expected = score("accuracy", CLASSIFICATION, problem.y[division.score], said)
        # A stack adds up in another order than one head alone: a row on the edge may fall to the other side.
        assert best[fold].score == pytest.approx(expected, abs=2.5 / division.score.sum())


def test_the_test_split_is_looked_at_once_with_the_chosen_head(cache: FeatureCache, swept: SweepResult) -> None:
    rows = swept.leaderboard
    assert [row.looked_at_test for row in rows] == [True, False, False, False, False]
    test = swept.summary["test"]
    assert test["id"] == rows[0].id == swept.summary["chosen"]["id"]
    assert test["rows"] == 61
    x, y = cache.arrays("test")
    assert (swept.best.predict(x) == y).mean() == pytest.approx(test["score"])
    assert np.sum(test["confusion"]["matrix"]) == 61
    assert sum(each["rows"] for each in test["calibration"]["bins"]) == 61
    wrong = swept.summary["mistakes"]
    assert wrong["rows"] == int((swept.best.predict(x) != y).sum()) == len(wrong["shown"])
    first = wrong["shown"][0]
    assert first["true"] != first["predicted"]
    assert first["text"].startswith(tuple("xyz"))
    assert [each["probability"] for each in wrong["shown"]] == sorted(
        (each["probability"] for each in wrong["shown"]), reverse=True
    )
    assert swept.best.calibration["temperature"] > 0


def test_labels_of_the_test_split_cannot_change_the_choice(cache: FeatureCache, tmp_path: Path) -> None:
    """A planted leak would show here: the same rows with other test labels, and the same leaderboard."""
    rows = planted_rows(331, test=61, wrong=0.1)
    for row in rows[-61:]:
        row["label"] = "xyz"[("xyz".index(row["label"]) + 1) % 3]
    other = planted_cache(tmp_path / "c", rows)
    grid = [{**FAST, "seeds": [0]}]
    one, two = (sweep(each, grid, progress=False) for each in (cache, other))
    keep = ("id", "score", "fold_scores", "p")
    assert [{name: getattr(row, name) for name in keep} for row in one.leaderboard] == [
        {name: getattr(row, name) for name in keep} for row in two.leaderboard
    ]
    assert one.summary["test"]["score"] != two.summary["test"]["score"]


def test_the_same_sweep_again_trains_nothing_and_changes_nothing(
    cache: FeatureCache, tmp_path: Path, passes: list[int]
) -> None:
    grid = [{**FAST, "seeds": [0]}]
    first = sweep(cache, grid, output_dir=tmp_path / "s", progress=False)
    assert passes == [10, 1]  # one stack of two heads on five folds, and the chosen head
    before = {file: file.read_bytes() for file in (tmp_path / "s").rglob("*") if file.is_file()}
    again = sweep(cache, grid, output_dir=tmp_path / "s", progress=False)
    assert passes == [10, 1]
    assert again.summary == first.summary
    assert {file: file.read_bytes() for file in (tmp_path / "s").rglob("*") if file.is_file()} == before
    # A third configuration costs its own five folds; the table has all three.
    third = sweep(
        cache, [{**FAST, "seeds": [0], "learning_rate": [0.03, 0.1]}], output_dir=tmp_path / "s", progress=False
    )
    assert passes == [10, 1, 5, 1]
    assert len(third.leaderboard) == 3
    # The same in one go gives the same table.
    whole = sweep(cache, [{**FAST, "seeds": [0], "learning_rate": [0.003, 0.03, 0.1]}], progress=False)
    assert [row.id for row in whole.leaderboard] == [row.id for row in third.leaderboard]
    assert [row.score for row in whole.leaderboard] == pytest.approx([row.score for row in third.leaderboard], abs=0.01)


def test_each_fold_is_trained_as_its_rows_alone_would_be(cache: FeatureCache) -> None:
    """Bit for bit, whatever trains beside it; and no row of another part of the fold is looked at."""
    problem = Problem.of(cache)
    head, spec = HeadSpec("mlp", options={"hidden": [5]}), TrainSpec(epochs=3, patience=0, solver="minibatch")
    jobs = [Job(Configuration("mean", head, spec), fold, number) for number, fold in enumerate(problem.folds)]
    (trained,) = training.train_batch(problem, JobBatch("stack", tuple(jobs)))
    assert sorted(each.job.number for each in trained) == list(range(5))
    x = problem.features("mean", problem.rows)
    for each in trained:
        rows = np.flatnonzero(each.job.fold.usable)
        own = train_head(
            x.take(rows), problem.y[rows], head=head, spec=spec, class_names=problem.class_names, progress=False
        )
        assert all(np.array_equal(each.head.state[name], value) for name, value in own.head.state.items())


def test_a_fold_that_cannot_be_trained_costs_the_others_nothing(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem.of(cache)
    configuration = Configuration("mean", HeadSpec("mlp", options={"hidden": [5]}), TrainSpec(epochs=2))
    jobs = [Job(configuration, fold, number) for number, fold in enumerate(problem.folds)]
    real = stacks._stack

    def failing(problem: Any, jobs: Any, *rest: Any) -> Any:
        if jobs[0].number == 2:
            raise TrainingError("no such fold")
        return real(problem, jobs, *rest)

    monkeypatch.setattr(stacks, "_stack", failing)
    (done,) = training.train_batch(problem, JobBatch("stack", tuple(jobs)))
    trained = {each.job.number: each for each in done}
    assert {number: each.error for number, each in trained.items() if each.head is None} == {2: "no such fold"}
    assert len(trained) == 5


def test_a_stopped_sweep_goes_on(cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = [{**FAST, "seeds": [0]}, GRID[2]]
    real, calls = training.train_batch, []

    def stopping(problem: Any, batch: Any, **options: Any) -> Any:
        calls.append(len(batch.jobs))
        for done in real(problem, batch, **options):
            yield done
            if len(calls) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(running, "train_batch", stopping)
    with pytest.raises(Interrupted, match=r"10 of 20 fits are kept in .*: run the same command to go on"):
        sweep(cache, grid, output_dir=tmp_path / "s", progress=False)
    part = SweepResult(tmp_path / "s")
    assert not part.summary["complete"]
    assert len(part.leaderboard) == 2
    assert part.summary["test"] is None
    # Killed in the middle of a line, too.
    file = tmp_path / "s/results.jsonl"
    file.write_bytes(file.read_bytes()[:-7])
    whole = sweep(cache, grid, output_dir=tmp_path / "s", progress=False)
    assert calls == [20, 1 + 10]
    assert whole.summary["complete"]
    assert any("half written" in note for note in whole.summary["notes"])
    monkeypatch.undo()
    straight = sweep(cache, grid, progress=False)
    assert [row.id for row in straight.leaderboard] == [row.id for row in whole.leaderboard]


def test_another_cache_metric_or_protocol_is_refused(cache: FeatureCache, swept: SweepResult, tmp_path: Path) -> None:
    other = planted_cache(tmp_path / "c", planted_rows(100))
    for options, match in [
        ({"cache": other}, "cache.dataset: the folder has"),
        ({"metric": "f1_macro"}, "metric: the folder has 'accuracy', now 'f1_macro'"),
        ({"folds": 3}, "protocol.folds: the folder has 5, now 3"),
        ({"shots": 2}, "protocol.kind: the folder has 'folds', now 'shots'"),
    ]:
        used = options.pop("cache", cache)
        with pytest.raises(SweepError, match=match):
            sweep(used, GRID, output_dir=swept.path, progress=False, **options)


def test_a_moved_cache_and_a_moved_sweep_are_the_same(cache: FeatureCache, tmp_path: Path, passes: list[int]) -> None:
    import shutil

    grid = [{**FAST, "seeds": [0]}]
    sweep(cache, grid, output_dir=tmp_path / "s", progress=False)
    shutil.copytree(cache.path, tmp_path / "elsewhere")
    shutil.move(tmp_path / "s", tmp_path / "t")
    done = len(passes)
    sweep(str(tmp_path / "elsewhere"), grid, output_dir=tmp_path / "t", progress=False)
    assert len(passes) == done


def test_tidy_results(swept: SweepResult, tmp_path: Path) -> None:
    rows = swept.rows()
    assert len(rows) == (1 + 2 * 2 + 2) * 5
    assert {row["learning_rate"] for row in rows if row["head"] == "linear"} == {0.003, 0.03}
    frame = swept.to_dataframe()
    assert frame.groupby("candidate").score.mean().max() == pytest.approx(swept.leaderboard[0].score)
    swept.to_csv(tmp_path / "x.csv")
    assert len((tmp_path / "x.csv").read_text().splitlines()) == len(rows) + 1
    swept.to_jsonl(tmp_path / "x.jsonl")
    assert json.loads((tmp_path / "x.jsonl").read_text().splitlines()[0])["id"] == rows[0]["id"]
    assert "recommended: " in swept.to_text()
    assert swept.to_text(1).count("\n") < swept.to_text().count("\n")


def test_few_shots(cache: FeatureCache) -> None:
    result = sweep(cache, [{**FAST, "seeds": [0]}, "majority"], shots=5, draws=4, progress=False)
    few = result.summary["few_shot"]
    assert (few["shots"], few["draws"], len(few["scores"])) == (5, 4, 4)
    assert few["score"] == pytest.approx(np.mean(few["scores"]))
    assert all(each.train_rows == 15 and each.eval_rows == 255 for each in result.results)
    assert result.leaderboard[0].score > result.summary["baseline"]
    with pytest.raises(SweepError, match="contradict"):
        sweep(cache, GRID, shots=5, folds=3)
    with pytest.raises(SweepError, match="--draws needs --shots"):
        sweep(cache, GRID, draws=5)


def test_a_learning_curve_has_points_below_all_rows(cache: FeatureCache, tmp_path: Path) -> None:
    grid = [{**FAST, "seeds": [0]}, "majority"]
    result = sweep(cache, grid, output_dir=tmp_path / "s", learning_curve=True, folds=2, progress=False)
    curves = result.summary["learning_curve"]
    assert [curve["id"] for curve in curves][-1] == result.leaderboard[-1].id
    points = curves[0]["points"]
    assert [point["rows"] for point in points] == [14, 27, 68, 135]
    assert points[-1]["score"] == pytest.approx(result.leaderboard[0].score)
    assert all(len(point["scores"]) == 2 for point in points)
    assert len(result.leaderboard) == 3  # points of a curve are no candidates


def test_test_all_marks_every_head(cache: FeatureCache, tmp_path: Path) -> None:
    grid = [{**FAST, "seeds": [0]}]
    result = sweep(cache, grid, output_dir=tmp_path / "s", test_all=True, progress=False)
    assert all(row.looked_at_test and row.test.rows == 61 for row in result.leaderboard)
    assert "looked at with 2 heads" in " ".join(result.summary["notes"])
    # What was seen stays seen.
    again = sweep(cache, grid, output_dir=tmp_path / "s", progress=False)
    assert all(row.looked_at_test for row in again.leaderboard)


def test_a_chosen_head_that_still_improves_is_said(cache: FeatureCache) -> None:
    for rate, still in ((1e-4, True), (0.3, False)):
        heads = [{"head": "linear", "learning_rate": rate, "epochs": 40, "patience": 0, "weight_decay": 1.0}]
        notes = sweep(cache, heads, folds=2, progress=False).summary["notes"]
        assert any("was still improving when training ended" in note for note in notes) == still, notes


def test_the_simplest_can_be_chosen(cache: FeatureCache) -> None:
    grid = [{"head": "mlp", "hidden": [5, 7], "learning_rate": 0.02, "epochs": 8}, {**FAST, "seeds": [0]}]
    result = sweep(cache, grid, choose="simplest", progress=False)
    assert result.summary["chosen"]["id"] == result.summary["recommended"]["id"]
    group = [row for row in result.leaderboard if not row.distinguishable]
    assert result.best.parameters == min(row.parameters for row in group)


def test_the_given_split_and_repeats(cache: FeatureCache) -> None:
    one = sweep(cache, [{**FAST, "seeds": [0]}], folds=1, progress=False)
    assert {each.fold for each in one.results} == {0}
    assert {each.eval_rows for each in one.results} == {int(cache.split_sizes()["validation"])}
    assert one.leaderboard[0].interval_method in ("bootstrap", "wilson")
    two = sweep(cache, [{**FAST, "seeds": [0]}], folds=2, repeats=2, progress=False)
    assert len(two.results) == 8
    assert two.leaderboard[1].test_method == "paired-bootstrap"


def test_a_cache_without_test_shows_mistakes_out_of_fold(tmp_path: Path) -> None:
    result = sweep(planted_cache(tmp_path / "c", planted_rows(150)), [{**FAST, "seeds": [0]}], folds=3, progress=False)
    assert result.summary["test"] is None
    assert result.summary["mistakes"]["split"] == "out of fold"
    assert not any(row.looked_at_test for row in result.leaderboard)
    assert "no labelled test split" in " ".join(result.summary["notes"])


def test_regression_and_many_labels(tmp_path: Path) -> None:
    rows = [
        {**row, "label": float("xyz".index(row["text"][0])) + 0.1 * (at % 5)}
        for at, row in enumerate(planted_rows(151, test=31))
    ]
    numbers = planted_cache(tmp_path / "r", rows)
    result = sweep(numbers, ["majority", FAST], folds=3, progress=False)
    assert result.summary["metric"] == {"name": "rmse", "greater_is_better": False}
    scores = [row.score for row in result.leaderboard]
    assert scores == sorted(scores)
    assert len(next(iter(result.summary["test"]["points"].values()))) == 31
    many = [
        {**row, "label": [row["text"][0], *(["even"] if at % 2 else [])]}
        for at, row in enumerate(planted_rows(151, test=31))
    ]
    labels = extract(many, output_dir=tmp_path / "m", backbone=Planted(), task="multilabel")
    result = sweep(labels, ["majority", FAST], folds=3, progress=False)
    assert result.summary["metric"]["name"] == "f1_macro"
    assert len(result.best.thresholds) == 4
    assert result.summary["mistakes"]["shown"][0]["true"] != result.summary["mistakes"]["shown"][0]["predicted"]
    with pytest.raises(SweepError, match="each class, and this is multilabel"):
        sweep(labels, [FAST], shots=3)


def test_tokens_are_trained_fold_by_fold(tmp_path: Path) -> None:
    cache = planted_cache(tmp_path / "c", planted_rows(91, test=17), tokens=True, noise=0.5)
    grid = [{"head": "attention-pooling", "width": 4, "heads": 1, "epochs": 40, "learning_rate": 0.05}, "majority"]
    result = sweep(cache, grid, folds=3, progress=False)
    assert result.leaderboard[0].feature == "tokens"
    assert result.leaderboard[0].score > result.summary["baseline"] + 0.2
    assert TrainedHead.from_pretrained(result.path / "best").spec.kind == "attention-pooling"


def test_features_that_memory_does_not_hold_are_swept(cache: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear heads come out as in memory to the bit; minibatches have another order; scikit-learn's are named."""
    grid = [*GRID, {"head": "linear", "solver": "convex", "l2": [1.0, 10.0]}, {"head": "lda", "engine": "sklearn"}]
    inside = sweep(cache, grid, progress=False)
    monkeypatch.setenv("EMBEDCACHE_MEMORY", "1")
    assert not Problem.of(cache).features("mean", np.arange(7)).in_memory
    outside = sweep(cache, grid, progress=False)
    assert [each["label"] for each in outside.summary["failures"]] == ["sklearn:lda · mean"]
    assert "do not fit in memory" in outside.summary["failures"][0]["error"]
    for row in outside.leaderboard:
        (own,) = [each for each in inside.leaderboard if each.id == row.id]
        if row.head.kind == "majority" or row.train.get("solver") == "convex":
            assert row.fold_scores == own.fold_scores
        assert row.score == pytest.approx(own.score, abs=0.15)


def test_heads_of_scikit_learn_run_beside(cache: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_WORTH_PROCESSES", 0)
    grid = [{"head": "knn", "n_neighbors": [3, 7]}, "lda", "majority"]
    result = sweep(cache, grid, folds=2, progress=False)
    assert {row.head.kind for row in result.leaderboard} == {"knn", "lda", "majority"}
    assert min(row.parameters for row in result.leaderboard if row.head.kind == "knn") > 7 * 100


def test_nearest_neighbours_of_a_fold_have_one_search(cache: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all numbers, weights and temperatures; each says, to the bit, what it says trained and searched by itself."""
    searched: list[int] = []
    real = TrainingRows.search
    monkeypatch.setattr(TrainingRows, "search", lambda self, x, k: searched.append(k) or real(self, x, k))
    ways = {"n_neighbors": [1, 5, 200], "weights": ["uniform", "distance", "softmax"], "temperature": [0.07, 0.5]}
    grid = [{"head": "knn", "standardize": False, **ways}, {"head": "knn", "metric": "euclidean"}]
    result = sweep(cache, grid, folds=2, progress=False)
    assert sorted(searched[:-1]) == [10, 10, 200, 200]  # the last is the chosen head, on the test split
    assert len(result.leaderboard) == 3 * (2 + 2) + 1
    problem = Problem.of(cache, protocol=Protocol(folds=2))
    x = problem.features("mean", problem.rows).values
    kept = SweepFolder(result.path, problem.identity())
    for each in result.results:
        learn, judged = problem.folds[each.fold].usable, problem.folds[each.fold].score
        alone = train_head(
            x[learn], problem.y[learn], None, None, HeadSpec(**each.head), TrainSpec(**each.train),
            class_names=problem.class_names, progress=False, calibrate=False,
        ).head  # fmt: skip
        np.testing.assert_array_equal(kept.predictions(each.id)[each.fold], training.outputs_of(alone, x[judged]))


def test_what_cannot_be_trained_is_a_failure_with_its_reason(cache: FeatureCache, tmp_path: Path) -> None:
    grid = [{**FAST, "seeds": [0], "learning_rate": [0.03, 1e30], "clip": 0, "optimizer": "sgd"}]
    with np.errstate(all="ignore"):
        result = sweep(cache, grid, output_dir=tmp_path / "s", progress=False)
    (failure,) = result.summary["failures"]
    assert "learning rate" in failure["error"]
    assert len(result.leaderboard) == 1


def test_a_setting_that_cannot_be_is_refused_before_anything_is_made(cache: FeatureCache, tmp_path: Path) -> None:
    for grid, match in [
        ([{"head": "mlp", "dropout": [0.1, 2]}], "dropout is 2"),
        ([{"head": "knn", "n_neighbors": 0}], "n_neighbors is 0"),
        ([{"head": "linear", "metric": "acuracy"}], "did you mean accuracy"),
    ]:
        with pytest.raises(SpecError, match=match):
            sweep(cache, grid, output_dir=tmp_path / "s")
    with pytest.raises(SpecError, match="no metric 'acuracy'"):
        sweep(cache, GRID, metric="acuracy", output_dir=tmp_path / "s")
    with pytest.raises(SweepError, match="200 folds, but the class"):
        sweep(cache, GRID, folds=200, output_dir=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_million_configurations_need_a_yes(cache: FeatureCache) -> None:
    grid = [{"head": "linear", "learning_rate": {"log": [1e-5, 1], "steps": 1000}, "weight_decay":
             {"linear": [0, 1], "steps": 1000}}]  # fmt: skip
    with pytest.raises(SweepError, match=r"1,000,000 configurations on 5 folds are 5,000,000 heads, about .*--yes"):
        sweep(cache, grid)
    from embedcache.sweep.grid import parse

    problem = Problem.of(cache, protocol=Protocol())
    refuse_too_many(problem, parse(grid, cache.feature_sets), None, True)
    refuse_too_many(problem, parse(grid, cache.feature_sets), 50, False)


def test_resampling_is_the_metric_on_resampled_rows() -> None:
    """The fast path, and the general one, against drawing rows and scoring them."""
    from embedcache.sweep import statistics

    generator = np.random.default_rng(0)
    y = generator.integers(0, 3, 53)
    heads = []
    for _ in range(2):
        said = generator.dirichlet([1, 1, 1], 53).astype(np.float32)
        half = generator.permutation(53) < 29
        heads.append([Scored(np.flatnonzero(half), said[half]), Scored(np.flatnonzero(~half), said[~half])])
    (times,) = statistics.resamples(np.arange(53), 300, seed=3)
    for metric in ("accuracy", "log_loss", "f1_macro"):
        found = Resampler(metric, CLASSIFICATION, y, np.arange(53), seed=3)(heads)
        for head, parts in enumerate(heads):
            for draw in (0, 7, 299):
                slow = []
                for each in parts:
                    at = np.repeat(np.arange(len(each.rows)), times[draw, each.rows].astype(int))
                    slow.append(score(metric, CLASSIFICATION, y[each.rows][at], each.outputs[at]))
                assert found[head, draw] == pytest.approx(np.mean(slow), rel=1e-5), metric


def test_the_command(cache: FeatureCache, tmp_path: Path) -> None:
    run = CliRunner()
    arguments = ["sweep", str(cache.path), "-o", str(tmp_path / "s"), "--folds", "2", "--seeds", "0"]
    flags = ["--head", "linear", "--set", "learning_rate=0.03,0.003", "--set", "epochs=4"]
    done = run.invoke(cli, [*arguments, *flags])
    assert done.exit_code == 0, done.output
    assert "recommended: linear" in done.output
    file = tmp_path / "sweep.yaml"
    file.write_text("folds: 2\nseeds: 0\nheads:\n- {head: linear, learning_rate: [0.03, 0.003], epochs: 4}\n")
    again = run.invoke(cli, ["sweep", str(cache.path), "-o", str(tmp_path / "s"), "--config", str(file), "--json"])
    body = json.loads(again.stdout)
    assert body["complete"]
    assert body["ran"]["fits"] == 4
    for more, match in [
        (["--config", str(file), "--head", "linear"], "contradict"),
        (["--set", "epochs=3"], "goes with --head"),
    ]:
        assert match in run.invoke(cli, [*arguments, *more]).output
    wrong = run.invoke(cli, [*arguments, "--head", "linear", "--set", "epochs"])
    assert isinstance(wrong.exception, SpecError)


def test_a_pair_of_specs_is_a_configuration(cache: FeatureCache) -> None:
    result = sweep(
        cache, [(HeadSpec("linear"), TrainSpec(epochs=3, learning_rate=0.05, seed=7))], folds=2, progress=False
    )
    assert result.leaderboard[0].seeds == (7,)
    assert result.leaderboard[0].train["learning_rate"] == 0.05


def test_a_path_of_penalties_is_each_of_them_alone(cache: FeatureCache, passes: list[int]) -> None:
    """Folds and penalties side by side, against one head at a time by the trainer."""
    from embedcache.train import train_head

    result = sweep(cache, [{"head": "linear", "solver": "convex", "l2": [0.3, 30.0]}], folds=3, progress=False)
    assert passes == [6, 1]
    problem = Problem.of(cache, protocol=Protocol(folds=3))
    x = problem.features("mean", problem.rows).values
    for each in result.results:
        fold = problem.folds[each.fold]
        learn = fold.train | fold.stopping
        alone = train_head(
            x[learn], problem.y[learn], None, None, HeadSpec("linear"), TrainSpec("convex", l2=each.train["l2"]),
            class_names=problem.class_names, progress=False, calibrate=False,
        ).head  # fmt: skip
        said = training.outputs_of(alone, x[fold.score])
        assert each.metrics["log_loss"] == pytest.approx(
            score("log_loss", CLASSIFICATION, problem.y[fold.score], said), abs=1e-4
        )


def test_the_default_sweep_has_every_sort_of_head_and_says_where_to_look_further(cache: FeatureCache) -> None:
    result = sweep(cache, folds=2, progress=False)
    assert {row.head.kind for row in result.leaderboard} == {"majority", "linear", "mlp", "residual", "knn"}
    simple = next(row for row in result.leaderboard if row.id == result.summary["recommended"]["id"])
    group = [row for row in result.leaderboard if not row.distinguishable]
    assert simple.parameters == min(row.parameters for row in group)
    edge = sweep(cache, [{"head": "linear", "solver": "convex", "l2": [1e3, 1e4, 1e5]}], folds=2, progress=False)
    assert "the winner's l2 is the" in " ".join(edge.summary["notes"])
