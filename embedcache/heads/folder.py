"""A run's folder, written by one process at a time: at every moment it holds one whole head, the old or the new.

First the arrays are written under a name that no config uses, and metrics, history and card beside their final names.
Then ``config.json``, which names them all by hash, is replaced: that commits the new head. Afterwards the files are
moved to their names, and those of the old head are removed. If the writer is killed after the commit, the next one
finishes this.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from embedcache.errors import BundleError
from embedcache.fingerprint import read_json, sha256_bytes, strict_json
from embedcache.heads.bundle import (
    CONFIG,
    ESTIMATOR,
    FORMAT,
    LARGEST_CONFIG,
    MAJOR,
    METRICS,
    MINOR,
    TENSORS,
    WEIGHTS,
    Weights,
    config_of,
    load,
    mapping,
    parse,
    sealed,
    to_json,
)
from embedcache.heads.record import HeadRecord, model_card
from embedcache.heads.sklearn_io import dump_estimator
from embedcache.journal import LOCK, TEMPORARY, commit, exists, explained, lock, make_output, sync_directory

HISTORY, CARD = "history.jsonl", "README.md"
_BESIDE = (METRICS, HISTORY, CARD)
_TEMPORARY = re.compile(rf"\.({'|'.join(map(re.escape, (CONFIG, *_BESIDE)))}|{WEIGHTS.pattern})(\.tmp|{TEMPORARY})")
"""Also those that older versions left, whose names had no number."""
BACKBONE = re.compile(r"\.?backbone-[0-9a-f]{16}")
"""A folder beside a head whose backbone was trained with it; the head names it as its model, ``./backbone-...``."""


TENSORBOARD = "tensorboard"
"""The folder within a run's or a sweep's where TensorBoard's files are, from the first epoch on."""


class RunFolder:
    """A run's folder opened for writing, as a context manager; a new one that nothing was saved in is removed again.

    Worth opening before training, so that a folder that cannot be written is found before the work, not after it.

    Raises ``BundleError`` where it is a file, holds something else or cannot be made, and ``CacheLockedError`` where
    another process has it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> RunFolder:
        new = not exists(self.path, BundleError)
        prepare(self.path)
        self._stack.enter_context(lock(self.path, needed=False))
        if new:
            self._stack.callback(self._remove_empty)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _remove_empty(self) -> None:
        with contextlib.suppress(OSError):
            os.rmdir(self.path)

    def save(
        self,
        head: HeadRecord,
        *,
        metrics: Mapping[str, object],
        history: Sequence[Mapping[str, object]],
        facts: Mapping[str, object],
    ) -> None:
        """Replace the head. ``facts`` are further lines of the model card. Raises ``BundleError``."""
        # Hours of training are not lost because somebody tidied up meanwhile.
        make_output(self.path, BundleError, fresh=not exists(self.path, BundleError))
        former = _read(self.path)
        self._settle(former)
        if head.state:
            from safetensors.numpy import save as dump

            data = dump({name: np.ascontiguousarray(value) for name, value in head.state.items()})
        else:
            data = dump_estimator(self.path / ESTIMATOR, head.estimator)
        digest = sha256_bytes(data)
        file = TENSORS if head.state else ESTIMATOR
        if file == _weights(former or {}):  # which the former config still needs until it is replaced
            name, _, ending = file.partition(".")
            file = f"{name}-{digest[:16]}.{ending}"
        beside = {
            METRICS: to_json(metrics),
            HISTORY: "".join(to_json(epoch, None) for epoch in history),
            CARD: model_card(head, metrics, facts),
        }
        texts = {name: text.encode("utf-8") for name, text in beside.items()}
        hashes = {name: sha256_bytes(text) for name, text in texts.items()}
        config = config_of(head, Weights(file, digest), facts, hashes)
        parse(strict_json(to_json(config)), HeadRecord)  # what could not be read again is not written
        self._publish(config, texts, {file: data})

    def record(self, split: str, measured: Mapping[str, object]) -> None:
        """Add what was measured on a split to the metrics and the model card. Raises ``BundleError``."""
        self._settle(_read(self.path))
        head = load(self.path, HeadRecord)
        file = self.path / METRICS
        with explained(f"cannot read {self.path}", BundleError):
            config = read_json(self.path / CONFIG, largest=LARGEST_CONFIG)
            try:
                metrics = mapping(read_json(file)) if file.is_file() else {}
            except ValueError as error:
                raise BundleError(f"{file} is not what a head's metrics must be ({error})") from None
        metrics = {**metrics, split: dict(measured)}
        card = model_card(head, metrics, mapping(config.get("facts", {})))
        texts = {METRICS: to_json(metrics).encode("utf-8"), CARD: card.encode("utf-8")}
        hashes = {**_beside(config), **{name: sha256_bytes(text) for name, text in texts.items()}}
        self._publish(sealed({**config, "version": f"{MAJOR}.{MINOR}", "beside": hashes}), texts, {})

    def _publish(self, config: Mapping[str, object], beside: Mapping[str, bytes], files: Mapping[str, bytes]) -> None:
        new = {**files, **{_waiting(name, sha256_bytes(data)): data for name, data in beside.items()}}
        try:
            for name, data in new.items():
                commit(self.path / name, data, BundleError)
            commit(self.path / CONFIG, to_json(config).encode("utf-8"), BundleError)
        except BaseException:
            with contextlib.suppress(OSError, BundleError):
                if _read(self.path) == config:  # it was committed, whatever came after
                    self._settle(config)
                else:
                    self._remove(new)
            raise
        self._settle(config)

    def _settle(self, config: Mapping[str, object] | None) -> None:
        """Finish what was committed, and remove what was not: all as the config says."""
        if config is None:  # damaged, or none yet: what its files are is not known
            return
        with explained(f"cannot write {self.path}", BundleError):
            for name, digest in _beside(config).items():
                with contextlib.suppress(FileNotFoundError):
                    os.replace(self.path / _waiting(name, digest), self.path / name)
            sync_directory(self.path)
            for name in os.listdir(self.path):
                if _TEMPORARY.fullmatch(name) or (WEIGHTS.fullmatch(name) and name != _weights(config)):
                    self._remove([name])

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):
                os.unlink(self.path / name)


def record(directory: Path, split: str, measured: Mapping[str, object]) -> None:
    """Add what was measured on a split to the metrics and the model card of a bundle.

    Raises ``BundleError`` for a folder that is not a bundle or cannot be written.
    """
    load(directory, HeadRecord)
    with RunFolder(directory) as folder:
        folder.record(split, measured)


def prepare(directory: Path) -> None:
    """Make a run's folder. Raises ``BundleError`` where it is a file, holds something else or cannot be made."""
    with explained(f"cannot write {directory}", BundleError):
        if exists(directory, BundleError) and not directory.is_dir():
            raise BundleError(f"{directory} is a file: choose a new or an empty directory")
        names = set(os.listdir(directory)) - {LOCK} if directory.is_dir() else set()
        names = {name for name in names if not BACKBONE.fullmatch(name) and name != TENSORBOARD}
        # A process that was killed before it wrote the first config leaves weights, or temporaries alone.
        weights = any(WEIGHTS.fullmatch(name.removeprefix(".").removesuffix(".tmp")) for name in names)
        ours = all(name in _BESIDE or WEIGHTS.fullmatch(name) or _TEMPORARY.fullmatch(name) for name in names)
        left = ours and (weights or all(map(_TEMPORARY.fullmatch, names)))
        if names and CONFIG not in names and not left:
            raise BundleError(f"{directory} holds something else than a head: choose a new or an empty directory")
        if CONFIG in names and not is_ours(directory / CONFIG):
            raise BundleError(f"{directory} holds another model than a head: choose a new or an empty directory")
        make_output(directory, BundleError, fresh=CONFIG not in names)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise BundleError(
                f"cannot write {directory}: permission denied: change its permissions, or choose another place"
            )


def is_ours(path: Path) -> bool:
    """Return whether a config may be replaced: one of ours, even damaged, but nobody else's."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST_CONFIG:
            return False
        return FORMAT in path.read_bytes()[:200].decode("utf-8", "replace")
    except OSError:
        return False


def _read(directory: Path) -> dict[str, object] | None:
    """Return a config as it was written, None where there is none. Raises ``BundleError`` when it cannot be read."""
    path = directory / CONFIG
    try:
        with explained(f"cannot read {path}", BundleError):
            if path.is_symlink() or not path.is_file():
                return None
            config = mapping(read_json(path, largest=LARGEST_CONFIG))
    except ValueError as error:
        if isinstance(error, BundleError):
            raise
        return None
    return config if config.get("format") == FORMAT and sealed(config) == config else None


def _weights(config: Mapping[str, object]) -> str | None:
    file = config.get("weights")
    return str(file["file"]) if isinstance(file, dict) and "file" in file else None


def _beside(config: Mapping[str, object]) -> dict[str, str]:
    """Return the hashes of metrics, history and card; older versions wrote none."""
    written = config.get("beside")
    hashes = {name: written.get(name) for name in _BESIDE} if isinstance(written, dict) else {}
    return {name: sha for name, sha in hashes.items() if isinstance(sha, str) and re.fullmatch("[0-9a-f]{64}", sha)}


def _waiting(name: str, digest: str) -> str:
    return f".{name}.{digest[:16]}.tmp"


__all__ = ["RunFolder", "prepare", "record"]
