"""TensorBoard, MLflow, Weights & Biases and Trackio, each told in its own words; where they write is theirs to say.

They are used directly. accelerate's trackers have one interface for all four, but attach no page, know no final metrics
of TensorBoard's HParams, and need a process state to be set up; they would save some thirty lines.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from embedcache.arguments import checks_arguments
from embedcache.errors import BundleError, MissingExtraError, SpecError, warn
from embedcache.journal import make_folder
from embedcache.tracking.records import Experiment, Record, experiment_in
from embedcache.wording import shortened

PROJECT = "embedcache"
"""The project, or MLflow's experiment, where no environment variable names another."""
TENSORBOARD = "tensorboard"
"""The folder within a run's or a sweep's where TensorBoard's files are."""


@dataclass(frozen=True)
class Tracker:
    """How an experiment is sent; ``package`` is what must be installed for it."""

    package: str
    send: Callable[[Experiment], None]


@checks_arguments()
def track(folder: Path | str, to: str | Sequence[str]) -> tuple[str, ...]:
    """Send a saved run or sweep to trackers, and return those that took it.

    Settings, curves by epoch, final metrics and the page (a sweep's report, a run's model card) are sent; of a sweep
    also its candidates, the best hundred. A tracker that fails is an ``EmbedcacheWarning``: the folder has everything,
    and can be sent again. Where they write is theirs: MLFLOW_TRACKING_URI, WANDB_PROJECT, WANDB_MODE, TRACKIO_DIR and
    their like; TensorBoard's files are in ``FOLDER/tensorboard``.

    Raises:
        SpecError: there is no such tracker.
        MissingExtraError: its package is not installed.
        BundleError: the folder holds neither a run nor a sweep.

    Example::

        ec.track("run", to="tensorboard")
    """
    names = [to] if isinstance(to, str) else list(dict.fromkeys(to))
    refuse_missing(names)
    experiment, took = experiment_in(Path(folder)), []
    for name in names:
        try:
            # What they print is no result of ours, and what they warn of is not for their users to mend.
            with redirect_stdout(sys.stderr), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                TRACKERS[name].send(experiment)
            took.append(name)
        except Exception as error:  # somebody else's code, over a network: the run is kept, whatever it was
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            again = f"embedcache.track({str(folder)!r}, to={name!r}) sends it again"
            warn([f"{name} did not take {folder} ({reason}); everything is kept there, and {again}"])
    return tuple(took)


def refuse_missing(names: Sequence[str]) -> None:
    """Raise ``SpecError`` for a tracker that does not exist, ``MissingExtraError`` for one that is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise SpecError(f"there is no tracker {shortened(name)}: expected one of {', '.join(TRACKERS)}")
        if find_spec(TRACKERS[name].package) is None:
            raise MissingExtraError(f"reporting to {name}", TRACKERS[name].package, name)


def _final(record: Record) -> dict[str, float]:
    return {f"final/{name}": value for name, value in record.metrics.items()}


def _to_tensorboard(experiment: Experiment) -> None:
    from torch.utils.tensorboard import SummaryWriter

    root = experiment.folder / TENSORBOARD
    make_folder(root, BundleError)
    for old in root.rglob("events.out.tfevents.*"):  # of a head that was trained into this folder before
        old.unlink()
    places = [(experiment.whole, root)]
    places += [(part, root / re.sub(r"[^\w.=+-]+", "-", part.name)[:80]) for part in experiment.parts]
    for record, place in places:
        with SummaryWriter(str(place)) as writer:
            for step, values in record.curves:
                for name, value in values.items():
                    writer.add_scalar(name, value, step)
            if record is experiment.whole:
                writer.add_text("report", experiment.markdown)
            # In the same folder, so that HParams has one line a head.
            writer.add_hparams(
                dict(record.settings), {f"final/{name}": v for name, v in record.metrics.items()}, run_name="."
            )


def _to_mlflow(experiment: Experiment) -> None:
    # A server that is away is asked for minutes by default.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    import mlflow

    if not os.environ.keys() & {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} and mlflow.active_run() is None:
        mlflow.set_experiment(PROJECT)
    with mlflow.start_run(run_name=experiment.name, nested=mlflow.active_run() is not None):
        _log_to_mlflow(mlflow, experiment.whole)
        mlflow.log_artifact(str(experiment.page))
        for part in experiment.parts:
            with mlflow.start_run(run_name=part.name, nested=True):
                _log_to_mlflow(mlflow, part)


def _log_to_mlflow(mlflow: Any, record: Record) -> None:
    mlflow.log_params(dict(record.settings))
    for step, values in record.curves:
        mlflow.log_metrics(dict(values), step=step)
    mlflow.log_metrics(_final(record))


def _to_wandb(experiment: Experiment) -> None:
    import wandb

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    for record in (experiment.whole, *experiment.parts):
        run = wandb.init(
            project=project, name=record.name, group=experiment.name, config=dict(record.settings), reinit="create_new"
        )
        for step, values in record.curves:
            run.log(dict(values), step=step)
        run.summary.update(_final(record))
        if record is experiment.whole:
            run.save(str(experiment.page), base_path=str(experiment.folder), policy="now")
        run.finish()


def _to_trackio(experiment: Experiment) -> None:
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    for record in (experiment.whole, *experiment.parts):
        trackio.init(
            project=project, name=record.name, group=experiment.name, config=dict(record.settings), embed=False,
            auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip
        for step, values in record.curves:
            trackio.log(dict(values), step=step)
        final: dict[str, Any] = _final(record)
        if record is experiment.whole:
            final["report"] = trackio.Markdown(experiment.markdown)
        trackio.log(final)
        trackio.finish()


TRACKERS = {
    "tensorboard": Tracker("tensorboard", _to_tensorboard),
    "mlflow": Tracker("mlflow", _to_mlflow),
    "wandb": Tracker("wandb", _to_wandb),
    "trackio": Tracker("trackio", _to_trackio),
}
