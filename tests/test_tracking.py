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
from embedcache.heads.folder import RunFolder
from embedcache.shard import FeatureSet
from embedcache.tracking import records, trackers
from embedcache.tracking.records import Experiment, experiment_in
from embedcache.tracking.trackers import Tracker

FALLING = ("--schedule", "linear", "--warmup", "0", "--learning-rate", "0.003")


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Path:
    """A folder with a cache, ``c``, a run of two epochs, ``run``, and a sweep, ``sweep``."""
    folder: Path = tmp_path_factory.mktemp("tracking")
    small_caches.write(folder / "c", 97, 97, (FeatureSet("mean", "pooled", 5, 1, "float32"),))
    cache, run, sweep = (str(folder / name) for name in ("c", "run", "sweep"))
    assert (
        cli.run(["train", cache, "-o", run, "--head", "mlp", "--epochs", "2", "--head-option", "hidden=[7]", *FALLING])
        == 0
    )
    heads = ["--head", "linear", "--set", "l2=0.1,10", "--folds", "2"]
    assert cli.run(["sweep", cache, "-o", sweep, *heads]) == 0
    return folder


class Told:
    """A tracker's run, and all that it was told; at ``fails`` points it raises ``error``."""

    def __init__(self, folder: Path, fails: int = -1, error: BaseException | None = None) -> None:
        print("chatter")
        self.folder, self.fails, self.error = folder, fails, error
        self.points: list[tuple[int, dict[str, float]]] = []
        self.saved: list[bool] = []
        self.experiments: list[Experiment] = []
        self.states: list[str] = []

    def log(self, step: int, values: Any) -> None:
        self.points.append((step, dict(values)))
        self.saved.append((self.folder / "config.json").exists() or (self.folder / "summary.json").exists())
        if len(self.points) == self.fails and self.error is not None:
            raise self.error

    def settle(self, experiment: Experiment) -> None:
        assert not self.states
        self.experiments.append(experiment)

    def close(self, state: str) -> None:
        self.states.append(state)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Told]:
    """What a tracker called mlflow was told; another, called wandb, always fails."""
    begun: list[Told] = []

    def begin(folder: Path) -> Told:
        begun.append(Told(folder))
        return begun[-1]

    def fail(folder: Path) -> Told:
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Tracker("json", begin))
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Tracker("json", fail))
    return begun


def fails(at: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> list[Told]:
    """What a tracker called trackio was told, whose run raises at that point."""
    begun: list[Told] = []
    monkeypatch.setitem(
        trackers.TRACKERS, "trackio", Tracker("json", lambda folder: begun.append(Told(folder, at, error)) or begun[-1])
    )
    return begun


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
    assert records.numbers([("a", True), ("b", float("nan")), ("c", 2), ("d", "x")]) == {"c": 2}


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_a_tracker_that_fails_costs_a_note(
    command: str, made: Path, told: list[Told], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [command, str(made / "c"), "-o", str(tmp_path / "out"), "--head", "majority", "--json"]
    assert cli.run([*arguments, "--report-to", "wandb", "--report-to", "mlflow"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out), "what a tracker prints is no result"
    assert "chatter" in err
    (note,) = (line for line in err.splitlines() if "wandb" in line)
    assert note.startswith(f"note: wandb did not take {tmp_path / 'out'} (ConnectionError: no route to host)")
    assert "reported to mlflow" in err
    assert [(each.folder, len(each.experiments), each.states) for each in told] == [(tmp_path / "out", 1, ["finished"])]


# As it goes on.


def train(made: Path, out: Path, *more: str) -> int:
    arguments = ["train", str(made / "c"), "-o", str(out), "--head", "mlp", "--epochs", "2", *FALLING]
    return cli.run([*arguments, "--head-option", "hidden=[7]", *more])


def test_epochs_are_told_as_they_end_and_change_no_bit(made: Path, told: list[Told], tmp_path: Path) -> None:
    assert train(made, tmp_path / "run", "--report-to", "mlflow") == 0
    (session,) = told
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    rates = [values.pop("learning_rate") for _, values in session.points]
    assert [{"epoch": step, **values} for step, values in session.points] == history
    assert {"train_loss", "validation_log_loss"} <= history[0].keys()
    assert rates == [0.003, 0.0015]
    assert session.saved == [False, False]
    assert (session.experiments[0].whole.name, session.states) == ("run", ["finished"])
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (made / "run" / "model.safetensors").read_bytes()


def test_heads_of_a_sweep_are_told_as_they_are_kept(made: Path, told: list[Told], tmp_path: Path) -> None:
    arguments = ["sweep", str(made / "c"), "-o", str(tmp_path / "sweep"), "--head", "linear", "--set", "l2=0.1,10"]
    assert cli.run([*arguments, "--folds", "2", "--report-to", "mlflow"]) == 0
    (session,) = told
    assert [step for step, _ in session.points] == [1, 2, 3, 4]
    lines = [json.loads(line) for line in (tmp_path / "sweep" / "results.jsonl").read_text().splitlines()]
    scores = [line["score"] for line in lines if line.get("curve") is None]
    assert [values for _, values in session.points] == [{"kept/accuracy": score} for score in scores]
    assert session.saved == [False] * 4
    assert (len(session.experiments), session.states) == (1, ["finished"])


def test_a_tracker_that_fails_in_the_middle_is_told_no_more(
    made: Path, told: list[Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = fails(1, TimeoutError("gone"), monkeypatch)
    assert train(made, tmp_path / "run", "--report-to", "trackio", "--report-to", "mlflow") == 0
    err = capsys.readouterr().err
    (note,) = (line for line in err.splitlines() if "trackio" in line)
    assert note.startswith(f"note: trackio did not take {tmp_path / 'run'} (TimeoutError: gone)")
    assert "reported to mlflow\n" in err
    assert (len(failing[0].points), failing[0].experiments, failing[0].states) == (1, [], ["failed"])
    assert (len(told[0].points), told[0].states) == (2, ["finished"])
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (made / "run" / "model.safetensors").read_bytes()


def test_ctrl_c_ends_the_run_of_a_tracker_as_interrupted(
    made: Path, told: list[Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it comes while a tracker is told, which is as good a moment as any."""
    stopped = fails(1, KeyboardInterrupt(), monkeypatch)
    reports = ["--report-to", "mlflow", "--report-to", "trackio"]
    assert train(made, tmp_path / "run", *reports) == 1
    for session in (told[0], stopped[0]):
        assert (len(session.points), len(session.experiments), session.states) == (1, 1, ["interrupted"])
    arguments = ["sweep", str(made / "c"), "-o", str(tmp_path / "sweep"), "--head", "linear", "--folds", "2"]
    assert cli.run([*arguments, *reports]) == 1
    for session in (told[1], stopped[1]):
        assert (len(session.points), session.experiments, session.states) == (1, [], ["interrupted"])


def test_training_that_fails_ends_the_run_of_a_tracker_as_failed(
    made: Path, told: list[Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in the folder is the head of before, which is not sent as if it were new."""
    out = tmp_path / "run"
    assert train(made, out) == 0

    def full(*arguments: Any, **named: Any) -> None:
        raise BundleError("the disk is full")

    monkeypatch.setattr(RunFolder, "save", full)
    assert train(made, out, "--report-to", "mlflow") == 1
    assert [(len(each.points), each.experiments, each.states) for each in told] == [(2, [], ["failed"])]


def test_a_folder_with_files_of_tensorboard_alone_may_become_a_run(made: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "tensorboard").mkdir(parents=True)  # of a process that was killed before its head was saved
    assert train(made, tmp_path / "run") == 0


def test_mistakes_are_told_before_the_work(
    made: Path, told: list[Told], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "trackio", Tracker("no_such_package", Told))
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
