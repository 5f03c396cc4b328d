"""TensorBoard, MLflow, Weights & Biases and Trackio, each told in its own words; where they write is theirs to say.

They are used directly. accelerate's trackers have one interface for all four, but attach no page, know no final metrics
of TensorBoard's HParams, and need a process state to be set up; they would save some thirty lines.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from embedcache.arguments import checks_arguments
from embedcache.errors import BundleError, Interrupted, MissingExtraError, SpecError, warn
from embedcache.heads.folder import TENSORBOARD
from embedcache.journal import make_folder
from embedcache.tracking.records import Experiment, Record, Values, experiment_in, numbers
from embedcache.wording import shortened

PROJECT = "embedcache"
"""The project, or MLflow's experiment, where no environment variable names another."""

State = Literal["finished", "interrupted", "failed"]


class Session(Protocol):
    """A run that a tracker has open."""

    def log(self, step: int, values: Values) -> None:
        """Take points of curves, to be seen at once where the tracker can."""
        ...

    def settle(self, experiment: Experiment) -> None:
        """Take everything but the curves of the whole."""
        ...

    def close(self, state: State) -> None:
        """End the run."""
        ...


@dataclass(frozen=True)
class Tracker:
    """How a run is begun for what is or will be in a folder; ``package`` is what must be installed for it."""

    package: str
    begin: Callable[[Path], Session]


class Reporting:
    """Trackers that are told of training into a folder as it goes on: call it with a step and values.

    As a context manager, it sends what was saved, at the end. A run is begun with its first values. A tracker that
    fails is an ``EmbedcacheWarning``, and is told no more. ``interrupted`` says that the training was, though it saved
    what it had; ``took`` are those that took all.

    Raises as ``track`` does.
    """

    def __init__(self, folder: Path | str, to: Sequence[str]) -> None:
        refuse_missing(to)
        self.folder, self.interrupted = Path(folder), False
        self.took: tuple[str, ...] = ()
        self._names = list(dict.fromkeys(to))
        self._sessions: dict[str, Session] = {}
        self._last = 0

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Tell of an epoch, or of a head that a sweep has kept."""
        self._log(step, numbers(values.items()))

    def __enter__(self) -> Reporting:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        state: State = "interrupted" if self.interrupted else "finished"
        try:
            if error is None:
                self._send(experiment_in(self.folder))
            else:  # what is in the folder, if anything, is of another training
                state = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        except BaseException:
            state = "failed"
            raise
        finally:
            for name in [*self._sessions]:
                self._told(name, lambda: self._sessions.pop(name).close(state))  # noqa: B023 - called at once

    def _send(self, experiment: Experiment) -> None:
        for step, values in experiment.whole.curves:
            if step > self._last:
                self._log(step, values)
        self._each(lambda session: session.settle(experiment))
        self.took = tuple(self._names)

    def _log(self, step: int, values: Values) -> None:
        self._last = step
        self._each(lambda session: session.log(step, values))

    def _each(self, told: Callable[[Session], None]) -> None:
        for name in [*self._names]:
            if not self._told(name, lambda: told(self._session(name))):  # noqa: B023
                self._names.remove(name)
                if (session := self._sessions.pop(name, None)) is not None:
                    with suppress(Exception):
                        session.close("failed")

    def _session(self, name: str) -> Session:
        if name not in self._sessions:
            self._sessions[name] = TRACKERS[name].begin(self.folder)
        return self._sessions[name]

    def _told(self, name: str, call: Callable[[], None]) -> bool:
        """Do what somebody else's code does, maybe over a network, and say whether it did; training goes on anyway."""
        try:
            # What they print is no result of ours, and what they warn of is not for their users to mend.
            with redirect_stdout(sys.stderr), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            again = f"embedcache.track({str(self.folder)!r}, to={name!r}) sends it again"
            warn([f"{name} did not take {self.folder} ({reason}); the folder has everything at the end, and {again}"])
            return False
        return True


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
    with Reporting(folder, [to] if isinstance(to, str) else to) as report:
        pass
    return report.took


def refuse_missing(names: Sequence[str]) -> None:
    """Raise ``SpecError`` for a tracker that does not exist, ``MissingExtraError`` for one that is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise SpecError(f"there is no tracker {shortened(name)}: expected one of {', '.join(TRACKERS)}")
        if find_spec(TRACKERS[name].package) is None:
            raise MissingExtraError(f"reporting to {name}", TRACKERS[name].package, name)


def _final(record: Record) -> dict[str, float]:
    return {f"final/{name}": value for name, value in record.metrics.items()}


class _TensorBoard:
    """Files beside what was trained. They know no state of a run."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._root, self._open = folder / TENSORBOARD, SummaryWriter
        make_folder(self._root, BundleError)
        for old in self._root.rglob("events.out.tfevents.*"):  # of a head that was trained into this folder before
            old.unlink()
        self._writer = SummaryWriter(str(self._root))

    def log(self, step: int, values: Values) -> None:
        self._scalars(self._writer, step, values)
        self._writer.flush()

    def _scalars(self, writer: Any, step: int, values: Values) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    def settle(self, experiment: Experiment) -> None:
        self._writer.add_text("report", experiment.markdown)
        self._hparams(self._writer, experiment.whole)
        for part in experiment.parts:
            with self._open(str(self._root / re.sub(r"[^\w.=+-]+", "-", part.name)[:80])) as writer:
                for step, values in part.curves:
                    self._scalars(writer, step, values)
                self._hparams(writer, part)

    def close(self, state: State) -> None:
        self._writer.close()

    def _hparams(self, writer: Any, record: Record) -> None:
        # In the same folder, so that HParams has one line a head.
        writer.add_hparams(dict(record.settings), _final(record), run_name=".")


class _MLflow:
    """A run, within the one that is active, if one is."""

    states: Mapping[State, str] = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}

    def __init__(self, folder: Path) -> None:
        # A server that is away is asked for minutes by default.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        import mlflow

        if not os.environ.keys() & {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} and mlflow.active_run() is None:
            mlflow.set_experiment(PROJECT)
        self._mlflow = mlflow
        mlflow.start_run(run_name=folder.resolve().name, nested=mlflow.active_run() is not None)

    def log(self, step: int, values: Values) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def settle(self, experiment: Experiment) -> None:
        self._settle(experiment.whole)
        self._mlflow.log_artifact(str(experiment.page))
        for part in experiment.parts:
            with self._mlflow.start_run(run_name=part.name, nested=True):
                for step, values in part.curves:
                    self.log(step, values)
                self._settle(part)

    def close(self, state: State) -> None:
        self._mlflow.end_run(self.states[state])

    def _settle(self, record: Record) -> None:
        self._mlflow.log_params(dict(record.settings))
        self._mlflow.log_metrics(_final(record))


class _WandB:
    """A run, and of a sweep one for each candidate, in a group."""

    codes: Mapping[State, int] = {"finished": 0, "interrupted": 255, "failed": 1}  # as wandb itself has them

    def __init__(self, folder: Path) -> None:
        self._group = folder.resolve().name
        self._run = self._begin(self._group)

    def _begin(self, name: str) -> Any:
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        return wandb.init(project=project, name=name, group=self._group, reinit="create_new")

    def log(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def settle(self, experiment: Experiment) -> None:
        self._run.save(str(experiment.page), base_path=str(experiment.folder), policy="now")
        self._settle(self._run, experiment.whole)
        for part in experiment.parts:
            run = self._begin(part.name)
            for step, values in part.curves:
                run.log(dict(values), step=step)
            self._settle(run, part)
            run.finish()

    def close(self, state: State) -> None:
        self._run.finish(exit_code=self.codes[state])

    def _settle(self, run: Any, record: Record) -> None:
        run.config.update(dict(record.settings))
        run.summary.update(_final(record))


class _Trackio:
    """Told at the end: it takes a run's settings when the run begins, and they are known when it was trained."""

    def __init__(self, folder: Path) -> None:
        self._points: list[tuple[int, Values]] = []

    def log(self, step: int, values: Values) -> None:
        self._points.append((step, values))

    def settle(self, experiment: Experiment) -> None:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        for record in (experiment.whole, *experiment.parts):
            trackio.init(
                project=project, name=record.name, group=experiment.name, config=dict(record.settings), embed=False,
                auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
            for step, values in self._points if record is experiment.whole else record.curves:
                trackio.log(dict(values), step=step)
            final: dict[str, Any] = _final(record)
            if record is experiment.whole:
                final["report"] = trackio.Markdown(experiment.markdown)
            trackio.log(final)
            trackio.finish()

    def close(self, state: State) -> None:
        """Every run is finished."""


TRACKERS = {
    "tensorboard": Tracker("tensorboard", _TensorBoard),
    "mlflow": Tracker("mlflow", _MLflow),
    "wandb": Tracker("wandb", _WandB),
    "trackio": Tracker("trackio", _Trackio),
}
