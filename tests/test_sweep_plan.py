"""A sweep says what it is about to do, keeps to a budget, and has a result at any time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from planted import planted_cache, planted_rows

from embedcache.cache import FeatureCache
from embedcache.cli import cli
from embedcache.errors import SweepSpecError
from embedcache.sweep import planned, sweep, training
from embedcache.sweep import run as running
from embedcache.sweep.plan import Budget
from embedcache.sweep.problem import Problem

PENALTIES = {"head": "linear", "solver": "convex", "l2": [0.3, 3.0, 30.0]}
MLP = {"head": "mlp", "hidden": [5], "learning_rate": 0.02, "epochs": 400}
GRID = [MLP, PENALTIES, "majority"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return planted_cache(tmp_path_factory.mktemp("planned") / "c", planted_rows(211, test=31, wrong=0.1))


def test_a_plan_counts_the_fits_puts_the_cheap_first_and_writes_nothing(cache: FeatureCache, tmp_path: Path) -> None:
    plan = planned(cache, GRID, output_dir=tmp_path / "s")
    assert not (tmp_path / "s").exists()
    assert (plan.heads, plan.folds, plan.kept, plan.fits) == (5, 5, 0, 25)
    assert [batch.jobs[0].configuration.head.kind for batch in plan.batches] == ["majority", "linear", "mlp"]
    assert plan.to_text().startswith("5 heads on 5 folds: 25 fits, about ")
    sweep(cache, ["majority"], output_dir=tmp_path / "s", progress=False)
    rest = planned(cache, GRID, output_dir=tmp_path / "s")
    assert (rest.kept, rest.fits) == (5, 20)
    assert "25 fits, 5 of them there already, about " in rest.to_text()
    sweep(cache, GRID, output_dir=tmp_path / "s", progress=False)
    assert planned(cache, GRID, output_dir=tmp_path / "s").to_text() == "5 heads on 5 folds: 25 fits, all there already"


def test_the_command_says_its_plan_first_and_dry_run_only_that(cache: FeatureCache, tmp_path: Path) -> None:
    def command(*more: str) -> Any:
        where = ["sweep", str(cache.path), "-o", str(tmp_path / "s"), "--head", "majority", "--folds", "3"]
        return CliRunner().invoke(cli, [*where, *more])

    dry = command("--dry-run")
    assert dry.output == "1 head on 3 folds: 3 fits, about a second: 3 x majority · mean (a second)\n"
    assert not (tmp_path / "s").exists()
    assert command().stderr.startswith(dry.output)
    assert "--minutes 0" in str(command("--minutes", "0").exception)


def stopped_after(penalties: int, stop: type[BaseException]) -> Any:
    """``train_batch`` that is stopped after so many penalties of a path."""
    real = training.train_batch

    def stopping(problem: Problem, batch: Any, **options: Any) -> Iterator[Any]:
        for done, trained in enumerate(real(problem, batch, **options)):
            if batch.how == "convex" and done == penalties:
                raise stop
            yield trained

    return stopping


def test_ctrl_c_keeps_each_penalty_and_prints_what_is_finished(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "train_batch", stopped_after(2, KeyboardInterrupt))
    grid = tmp_path / "sweep.yaml"
    grid.write_text("heads: [majority, {head: linear, solver: convex, l2: [0.3, 3.0, 30.0]}]\n")
    where = ["sweep", str(cache.path), "-o", str(tmp_path / "s"), "--config", str(grid)]
    said = CliRunner().invoke(cli, where)
    assert "15 of 20 fits" in str(said.exception)
    for name in ("majority", "l2=30", "l2=3"):
        assert name in said.stdout


def test_a_budget_is_kept_and_what_is_left_out_is_named(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = training.train_batch, []

    def slow(problem: Problem, batch: Any, **options: Any) -> Iterator[Any]:
        seen.append(batch.jobs[0].configuration.head.kind)
        for done, trained in enumerate(real(problem, batch, **options)):
            if batch.how == "convex" and done == 0:
                monkeypatch.setattr(Budget, "left", 0.0)
            yield trained

    monkeypatch.setattr(running, "train_batch", slow)
    with pytest.warns(UserWarning, match="left out"):
        result = sweep(cache, GRID, output_dir=tmp_path / "s", minutes=0.05, progress=False)
    assert seen == ["majority", "linear"]
    assert result.summary["complete"]
    assert {row.head.kind for row in result.leaderboard} == {"majority", "linear"}
    (note,) = [note for note in result.notes if "left out" in note]
    assert note.startswith("15 fits left out, as the 0.05 minutes were over: 10 x linear · mean, 5 x mlp · mean")
    monkeypatch.undo()
    whole = sweep(cache, GRID, output_dir=tmp_path / "s", progress=False)
    assert len(whole.leaderboard) == 5
    assert not any("left out" in note for note in whole.notes)
    with pytest.raises(SweepSpecError, match="--minutes 0"):
        sweep(cache, GRID, minutes=0.0, progress=False)
