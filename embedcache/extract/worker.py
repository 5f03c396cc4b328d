"""The far side of an engine: what a worker does, in whatever process and on whatever machine it is.

A worker loads the backbone itself, once for each extraction, proves by its probe that it computes the same bits, and
makes features of the windows it is given. Nothing here knows who hands them out.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import threading
from dataclasses import dataclass, replace
from pathlib import Path

from embedcache.backbone import Backbone, Recipe, choose_device, kept_for, load_backbone, probe_of
from embedcache.backbone import threads as torch_threads
from embedcache.errors import EmbedcacheError, WorkerRefusedError, quiet
from embedcache.extract.windows import Window
from embedcache.extract.work import Computed, Proof, work
from embedcache.fingerprint import hash_json
from embedcache.numerics import Probe, difference
from embedcache.spec import BackboneSettings, ModelSource
from embedcache.version import __version__


@dataclass(frozen=True)
class Job:
    """What a worker is for: a backbone, by its recipe or as it is, and what it must compute of its built-in rows.

    ``token`` is that of one extraction, as what is loaded serves no other. ``named`` is where a model is looked for
    whose folder is not on the worker's machine. ``probe`` is None until somebody has proved. ``threads`` are those that
    a worker's passes share, None for what its process has. ``backbone`` is None where the worker should have it, as
    one that is no recipe may be large. ``idle`` is after how many seconds without work a process that outlives the
    extraction lets go of the backbone, None for never.
    """

    token: str
    backbone: Recipe | Backbone | None
    identity: str
    named: ModelSource
    device: str
    threads: int | None = None
    probe: Probe | None = None
    idle: float | None = None
    version: str = __version__


_lock = threading.Lock()
_held: tuple[str, Backbone, Probe | None] | None = None
_alarm: threading.Timer | None = None


def prove(job: Job) -> Proof:
    """Load the backbone and run its built-in rows. Raises ``WorkerRefusedError`` where that cannot be, or differs."""
    ready = _ready(job)
    assert ready is not None
    _release_later(job)
    backbone, probe = ready
    return Proof(probe, dict(backbone.provenance), name())


def compute(job: Job, window: Window) -> Computed | None:
    """Make features of a window's rows, by a worker that has proved or does so first; None where it has no backbone."""
    ready = _ready(job)
    if ready is None:
        return None
    backbone, _ = ready
    with torch_threads(job.threads), kept_for(backbone):
        computed = work(backbone, window)
    _release_later(job)
    return computed


def release(token: str) -> None:
    """Let go of the backbone of an extraction, if this process has it."""
    global _held
    with _lock:
        if _held is not None and _held[0] == token:
            _held = None


def _release_later(job: Job) -> None:
    """Let go of the backbone when no more work of its extraction comes; what comes later brings it again."""
    global _alarm
    if job.idle is None:
        return
    with _lock:
        if _alarm is not None:
            _alarm.cancel()
        _alarm = threading.Timer(job.idle, release, (job.token,))
        _alarm.daemon = True
        _alarm.start()


def decide(source: ModelSource, asked: BackboneSettings) -> BackboneSettings:
    """Return the settings that a backbone gets on a worker's device, which decides the canonical shapes."""
    with quiet():
        backbone = load_backbone(**source.arguments(), **asked.arguments())
    assert backbone.recipe is not None
    return backbone.recipe.settings


def device_of(asked: str) -> str:
    """Return the kind of device that a worker has; see ``choose_device``."""
    return choose_device(asked)


def name() -> str:
    """Return what a worker is called in messages: its machine and the number of its process."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _ready(job: Job) -> tuple[Backbone, Probe | None] | None:
    global _held
    with _lock:
        if _held is None or _held[0] != job.token:
            if job.backbone is None:
                return None
            _held = None  # the one before may be large
            _held = (job.token, *_loaded(job, job.backbone))
        _, backbone, probe = _held
    if job.probe is not None and not (other := difference(job.probe, probe)).same_bits:
        raise WorkerRefusedError(f"the worker {name()} computes otherwise than the first ({other.to_text()})")
    return backbone, probe


def _loaded(job: Job, given: Recipe | Backbone) -> tuple[Backbone, Probe | None]:
    if job.version != __version__:
        raise WorkerRefusedError(f"the worker {name()} has embedcache {__version__}, expected {job.version}")
    try:
        with torch_threads(job.threads), quiet():
            backbone = _load(job, given) if isinstance(given, Recipe) else given
            probe = probe_of(backbone)
    except EmbedcacheError as error:
        raise WorkerRefusedError(f"the worker {name()} cannot load the backbone: {error}") from None
    if hash_json(backbone.identity) != job.identity:
        raise WorkerRefusedError(f"the worker {name()} has other files of {job.named.model} than this machine")
    return backbone, probe


def _load(job: Job, recipe: Recipe) -> Backbone:
    source = recipe.source if Path(str(recipe.source.model)).is_dir() else job.named
    return load_backbone(**replace(source, device=job.device).arguments(), **recipe.settings.arguments())


def begin() -> None:
    """Make a new process a worker that ends with the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    if (parent := multiprocessing.parent_process()) is not None:  # one that was killed can tell nobody to stop
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
