"""Real trackers without a network: what was sent is read back from their own files."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import small_caches

from embedcache import cli, tracking
from embedcache.errors import EmbedcacheWarning, Interrupted
from embedcache.heads.folder import RunFolder
from embedcache.shard import FeatureSet
from embedcache.train import train_on_cache


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Path:
    """A folder with a run of three epochs, ``run``, and a sweep of two heads, ``sweep``."""
    folder: Path = tmp_path_factory.mktemp("trackers")
    small_caches.write(folder / "c", 97, 97, (FeatureSet("mean", "pooled", 5, 1, "float32"),))
    cache, run, sweep = (str(folder / name) for name in ("c", "run", "sweep"))
    assert cli.run(["train", cache, "-o", run, "--head", "mlp", "--epochs", "3"]) == 0
    assert cli.run(["sweep", cache, "-o", sweep, "--head", "linear", "--set", "l2=0.1,10", "--folds", "2"]) == 0
    return folder


def history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text("utf-8").splitlines()]


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return read


def hparams(folder: Path) -> dict[str, Any]:
    """The settings that TensorBoard's HParams page shows for a head."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    (content,) = (
        data
        for tag, data in events(folder).SummaryMetadata("_hparams_/session_start_info").plugin_data.ListFields()
        if tag.name == "content"
    )
    started = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in started.items()}


def test_tensorboard_has_curves_hparams_and_the_page(made: Path) -> None:
    for _ in range(2):  # told again, it shows everything once
        assert tracking.track(made / "run", "tensorboard") == ("tensorboard",)
    read = events(made / "run" / "tensorboard")
    curve = [(event.step, event.value) for event in read.Scalars("train_loss")]
    assert [step for step, _ in curve] == [1, 2, 3]
    assert [value for _, value in curve] == pytest.approx([epoch["train_loss"] for epoch in history(made / "run")])
    measured = json.loads((made / "run" / "metrics.json").read_text())["train"]["accuracy"]
    assert [event.value for event in read.Scalars("final/train/accuracy")] == pytest.approx([measured])
    page = read.Tensors("report/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "# mlp head" in page
    assert hparams(made / "run" / "tensorboard")["head"] == "mlp"


def test_tensorboard_shows_epochs_as_they_end(made: Path, tmp_path: Path) -> None:
    seen: list[list[int]] = []
    with tracking.Reporting(tmp_path / "run", ["tensorboard"]) as report:

        def observe(step: int, values: Any) -> None:
            report(step, values)
            seen.append([event.step for event in events(tmp_path / "run" / "tensorboard").Scalars("learning_rate")])

        with RunFolder(tmp_path / "run") as folder:
            train_on_cache(made / "c", "mlp", {"epochs": 3}, observe=observe).save(folder)
    assert seen == [[1], [1, 2], [1, 2, 3]]
    read = events(tmp_path / "run" / "tensorboard")
    assert [event.step for event in read.Scalars("train_loss")] == [1, 2, 3]
    assert "final/train/accuracy" in read.Tags()["scalars"]


def test_tensorboard_has_a_folder_for_each_head_of_a_sweep(made: Path) -> None:
    assert tracking.track(made / "sweep", "tensorboard") == ("tensorboard",)
    folders = sorted(path for path in (made / "sweep" / "tensorboard").iterdir() if path.is_dir())
    assert len(folders) == 2
    assert {hparams(folder)["l2"] for folder in folders} == {0.1, 10.0}
    assert len(events(folders[0]).Scalars("fold/accuracy")) == 2


def test_mlflow_has_nested_runs_and_the_page(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow

    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    client = mlflow.MlflowClient()
    assert tracking.track(made / "run", "mlflow") == ("mlflow",)
    assert tracking.track(made / "sweep", "mlflow") == ("mlflow",)
    experiment = client.get_experiment_by_name("embedcache")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    run, sweep = runs["run"], runs["sweep"]
    assert run.data.params["head"] == "mlp"
    assert run.info.status == "FINISHED"
    losses = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train_loss")]
    assert losses == [(epoch["epoch"], epoch["train_loss"]) for epoch in history(made / "run")]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["README.md"]
    assert [file.path for file in client.list_artifacts(sweep.info.run_id)] == ["report.html"]
    parts = [run for run in runs.values() if run.data.tags.get("mlflow.parentRunId") == sweep.info.run_id]
    assert {part.data.params["l2"] for part in parts} == {"0.1", "10.0"}
    assert all("final/validation/accuracy" in part.data.metrics for part in parts)


def test_mlflow_shows_epochs_as_they_end_and_how_the_run_ended(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)  # which mlflow sets, of the store of another test
    import mlflow

    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    client, seen = mlflow.MlflowClient(), []
    report = tracking.Reporting(tmp_path / "run", ["mlflow"])

    def observe(step: int, values: Any) -> None:
        report(step, values)
        (run,) = client.search_runs([client.get_experiment_by_name("embedcache").experiment_id])
        seen.append((run.info.status, len(client.get_metric_history(run.info.run_id, "learning_rate"))))
        if step == 3:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted), report:
        train_on_cache(made / "c", "mlp", {"epochs": 9}, observe=observe)
    assert seen == [("RUNNING", 1), ("RUNNING", 2), ("RUNNING", 3)]
    (run,) = client.search_runs([client.get_experiment_by_name("embedcache").experiment_id])
    assert run.info.status == "KILLED"
    assert mlflow.active_run() is None


def test_mlflow_without_its_server_costs_a_note(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri("http://127.0.0.1:9")  # the port that discards
    with pytest.warns(EmbedcacheWarning, match="mlflow did not take .*run .*the folder has everything"):
        assert tracking.track(made / "run", "mlflow") == ()


def test_wandb_offline_keeps_a_run_for_each_head(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert tracking.track(made / "sweep", "wandb") == ("wandb",)
    kept = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(kept) == 3
    written = b"".join(path.read_bytes() for path in kept)
    assert b"final/validation/accuracy" in written
    assert b"report.html" in written


def test_trackio_keeps_curves_and_the_page(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when it is imported, which nothing did before
    assert tracking.track(made / "run", "trackio") == ("trackio",)
    from trackio.sqlite_storage import SQLiteStorage

    assert (tmp_path / "embedcache.db").is_file()
    logged = SQLiteStorage.get_logs("embedcache", "run")
    losses = [row["train_loss"] for row in logged if "train_loss" in row]
    assert losses == pytest.approx([epoch["train_loss"] for epoch in history(made / "run")])
    assert any("final/train/accuracy" in row and "report" in row for row in logged)
