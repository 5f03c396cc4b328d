"""Trackers are told everything once it is on disk, and whatever they do, the run is kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import small_caches

from embedcache import cli, tracking
from embedcache.errors import BundleError, EmbedcacheWarning, MissingExtraError, SpecError
from embedcache.shard import FeatureSet
from embedcache.tracking import records, trackers
from embedcache.tracking.records import Experiment, experiment_in
from embedcache.tracking.trackers import Tracker


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Path:
    """A folder with a cache, ``c``, a run of two epochs, ``run``, and a sweep, ``sweep``."""
    folder: Path = tmp_path_factory.mktemp("tracking")
    small_caches.write(folder / "c", 97, 97, (FeatureSet("mean", "pooled", 5, 1, "float32"),))
    cache, run, sweep = (str(folder / name) for name in ("c", "run", "sweep"))
    assert cli.run(["train", cache, "-o", run, "--head", "mlp", "--epochs", "2", "--head-option", "hidden=[7]"]) == 0
    heads = ["--head", "linear", "--set", "l2=0.1,10", "--folds", "2"]
    assert cli.run(["sweep", cache, "-o", sweep, *heads]) == 0
    return folder


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Experiment]:
    """What a tracker called fake was sent; another, called broken, always fails."""
    sent: list[Experiment] = []

    def take(experiment: Experiment) -> None:
        print("chatter")
        sent.append(experiment)

    def fail(experiment: Experiment) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Tracker("json", take))
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Tracker("json", fail))
    return sent


def test_a_run_is_its_settings_curves_metrics_and_card(made: Path) -> None:
    experiment = experiment_in(made / "run")
    whole = experiment.whole
    assert (whole.name, experiment.parts, experiment.page.name) == ("run", (), "README.md")
    expected = {"head": "mlp", "hidden": "[7]", "epochs": 2, "feature": "mean", "standardize": True}
    assert {name: whole.settings[name] for name in expected} == expected
    assert "metric" not in whole.settings, "what was not given is no setting"
    assert [step for step, _ in whole.curves] == [1, 2]
    history = [json.loads(line) for line in (made / "run" / "history.jsonl").read_text().splitlines()]
    assert [values["train_loss"] for _, values in whole.curves] == [epoch["train_loss"] for epoch in history]
    measured = json.loads((made / "run" / "metrics.json").read_text())
    assert whole.metrics["train/accuracy"] == measured["train"]["accuracy"]
    assert all(isinstance(value, (int, float)) for value in whole.metrics.values())
    assert experiment.markdown.lstrip().startswith("# mlp head"), "the hub's header is not for people"


def test_a_sweep_is_its_candidates_and_its_page(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = experiment_in(made / "sweep")
    summary = json.loads((made / "sweep" / "summary.json").read_text())
    first, second = experiment.parts
    assert first.name.startswith("001 linear")
    assert {first.settings["l2"], second.settings["l2"]} == {0.1, 10.0}
    assert [dict(values) for _, values in first.curves] == [
        {"fold/accuracy": score} for score in summary["leaderboard"][0]["fold_scores"]
    ]
    assert experiment.whole.metrics["validation/accuracy"] == summary["leaderboard"][0]["score"]
    assert "<html" in experiment.page.read_text("utf-8")
    monkeypatch.setattr(records, "MOST_PARTS", 1)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    from embedcache.report import page

    page._template.cache_clear()
    experiment = experiment_in(made / "sweep")
    assert (len(experiment.parts), experiment.page.name) == (1, "report.md")


def test_a_setting_is_what_every_tracker_takes() -> None:
    settings = records._settings({"a": "\ud800" * 300, "b": {"c": 1}, "d": None, "e": 0.5, "f": False})
    assert settings == {"a": ("\\ud800" * 300)[:247] + "...", "b": '{"c": 1}', "e": 0.5, "f": False}
    assert records._numbers([("a", True), ("b", float("nan")), ("c", 2), ("d", "x")]) == {"c": 2}


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_a_tracker_that_fails_costs_a_note(
    command: str, made: Path, told: list[Experiment], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [command, str(made / "c"), "-o", str(tmp_path / "out"), "--head", "majority", "--json"]
    assert cli.run([*arguments, "--report-to", "wandb", "--report-to", "mlflow"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out), "what a tracker prints is no result"
    assert "chatter" in err
    (note,) = (line for line in err.splitlines() if "wandb" in line)
    assert note.startswith(f"note: wandb did not take {tmp_path / 'out'} (ConnectionError: no route to host)")
    assert "reported to mlflow" in err
    assert [experiment.folder for experiment in told] == [tmp_path / "out"]


def test_mistakes_are_told_before_the_work(
    made: Path, told: list[Experiment], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "trackio", Tracker("no_such_package", lambda experiment: None))
    assert cli.run(["train", str(made / "c"), "-o", str(tmp_path / "out"), "--report-to", "trackio"]) == 1
    assert "reporting to trackio needs the package no_such_package" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(MissingExtraError, match=r"embedcache\[trackio\]"):
        tracking.track(made / "run", "trackio")
    with pytest.raises(SpecError, match="no tracker 'tensorbored': expected one of tensorboard, mlflow"):
        tracking.track(made / "run", "tensorbored")
    with pytest.raises(BundleError, match="is not a run folder"):
        tracking.track(tmp_path, "mlflow")
    with pytest.warns(EmbedcacheWarning, match=r"embedcache.track\('.*run', to='wandb'\) sends it again"):
        assert tracking.track(made / "run", ["wandb", "mlflow", "mlflow"]) == ("mlflow",)
    assert len(told) == 1


def test_the_commands_offer_every_tracker() -> None:
    for name in ("train", "tune", "sweep"):
        (option,) = (each for each in cli.cli.commands[name].params if each.name == "report_to")
        assert list(option.type.choices) == list(trackers.TRACKERS)  # type: ignore[attr-defined]
