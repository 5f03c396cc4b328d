"""A sweep's folder: results as they come, so that a killed sweep goes on and nothing is trained twice.

::

    SWEEP/
    ├── sweep.json                     what is compared on what: written once, refused when it differs
    ├── results.jsonl                  one line a configuration and fold, appended and synced
    ├── predictions/ID.safetensors     what each configuration said of the rows of each fold, for paired tests
    ├── summary.json                   everything found; see ``summary``
    └── best/                          the chosen head's bundle

A result counts only with its predictions, which are written first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedcache.errors import SweepError
from embedcache.fingerprint import canonical_json, differences, hash_json, read_json, strict_json
from embedcache.journal import (
    LOCK,
    append,
    commit,
    exists,
    explain,
    explained,
    lock,
    make_folder,
    make_output,
    read,
    recover,
    refuse_link,
    remove_temporaries,
)

FORMAT, VERSION = "embedcache-sweep", 1
Outputs = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Result:
    """A line of ``results.jsonl``; ``summary`` says what the fields are."""

    id: str
    candidate: str
    fold: int
    repeat: int
    train_rows: int
    eval_rows: int
    score: float | None
    metrics: Mapping[str, float | None]
    feature: str
    head: Mapping[str, Any]
    train: Mapping[str, Any]
    parameters: int
    seconds: float
    epochs: float | None = None
    curve: int | None = None
    error: str | None = None

    @property
    def key(self) -> tuple[str, int, int | None]:
        """What there can be only one of: configuration, fold, point of a learning curve."""
        return self.id, self.fold, self.curve

    @classmethod
    def from_json(cls, value: Any) -> Result:
        """Read a line. Raises ``ValueError`` for anything else."""
        names = [each.name for each in fields(cls)]
        if not isinstance(value, dict) or set(value) != set(names):
            raise ValueError("its fields are not those of a result")
        texts, counts = ("id", "candidate", "feature"), ("fold", "repeat", "train_rows", "eval_rows", "parameters")
        numbers = ("score", "seconds", "epochs", "curve")
        fine = all(isinstance(value[name], str) for name in texts)
        fine &= all(isinstance(value[name], int) and value[name] >= 0 for name in counts)
        fine &= all(value[name] is None or isinstance(value[name], (int, float)) for name in numbers)
        fine &= all(isinstance(value[name], dict) for name in ("metrics", "head", "train"))
        fine &= value["error"] is None or isinstance(value["error"], str)
        if not fine:
            raise ValueError("a field has an impossible value")
        return cls(**value)


class SweepFolder:
    """A sweep's folder, opened by one process at a time, as a context manager.

    ``notes`` say what was repaired. Raises ``SweepError`` for a folder of another sweep, with what differs, for a
    folder of something else, and for a damaged line, naming it.
    """

    def __init__(self, path: Path | str, identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.identity = dict(identity)
        self.notes: list[str] = []
        self.results: dict[tuple[str, int, int | None], Result] = {}
        self._lock: contextlib.ExitStack | None = None

    def __enter__(self) -> SweepFolder:
        refuse_foreign(self.path)
        make_output(self.path, SweepError, fresh=not exists(self.path / "sweep.json", SweepError))
        make_folder(self.path / "predictions", SweepError)
        refuse_link(self.path / "best", SweepError)  # now, not after hours
        self._lock = lock(self.path)
        try:
            for folder in (self.path, self.path / "predictions"):
                remove_temporaries(folder, SweepError)
            self._identify()
            self.results = self._read()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _identify(self) -> None:
        if not exists(self.path / "sweep.json", SweepError):
            body = {"format": FORMAT, "version": VERSION, "identity": self.identity}
            commit(self.path / "sweep.json", (canonical_json(body) + "\n").encode(), SweepError)
            return
        found = read_identity(self.path)
        differ = differences(found, self.identity)
        if differ:
            shown = "; ".join(
                f"{name}: the folder has {_short(old)}, now {_short(new)}" for name, old, new in differ[:6]
            )
            raise SweepError(
                f"{self.path} holds a sweep of something else ({shown}): choose another folder, or sweep as before"
            )

    @property
    def hash(self) -> str:
        """The hash of what is compared on what."""
        return hash_json(self.identity)

    def _read(self) -> dict[tuple[str, int, int | None], Result]:
        file = self.path / "results.jsonl"
        data, half = recover(file, SweepError)
        if half:
            self.notes.append("the last line of results.jsonl was half written; it was dropped and is computed again")
        found: dict[tuple[str, int, int | None], Result] = {}
        for number, line in enumerate(data.split(b"\n")[:-1], 1):
            result = _parse(file, number, line)
            found.setdefault(result.key, result)
        return found

    def add(self, results: Sequence[Result], outputs: Mapping[str, Mapping[int, Outputs]] | None = None) -> None:
        """Keep results: the predictions of each configuration by fold first, then the lines, synced."""
        for name, by_fold in (outputs or {}).items():
            self._write_predictions(name, by_fold)
        new = [each for each in results if each.key not in self.results]
        lines = "".join(canonical_json(asdict(each)) + "\n" for each in new).encode("ascii")
        if not lines:
            return
        append(self.path / "results.jsonl", lines, SweepError)
        for each in new:
            self.results[each.key] = each

    def _write_predictions(self, name: str, by_fold: Mapping[int, Outputs]) -> None:
        from safetensors.numpy import save

        tensors = {f"fold{fold}": np.ascontiguousarray(value, np.float32) for fold, value in by_fold.items()}
        kept = self.predictions(name)
        tensors = {**{f"fold{fold}": value for fold, value in kept.items()}, **tensors}
        commit(self._prediction_file(name), save(tensors), SweepError)

    def _prediction_file(self, name: str) -> Path:
        return self.path / "predictions" / f"{name}.safetensors"

    def predictions(self, name: str) -> dict[int, Outputs]:
        """Return what a configuration said, by fold: float32 [rows, C] each. {} where the file is gone or damaged."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            tensors = load(read(self._prediction_file(name), SweepError) or b"")
            return {int(each.removeprefix("fold")): value for each, value in tensors.items()}
        except (SafetensorError, ValueError) as error:
            if isinstance(error, SweepError):
                raise
            return {}

    def done(self, name: str, folds: Mapping[int, int], outputs: int) -> set[int]:
        """Return the folds of a configuration that are finished, given how many rows each scores."""
        lines = {fold for fold in folds if (name, fold, None) in self.results}
        failed = {fold for fold in lines if self.results[name, fold, None].error is not None}
        if lines == failed:
            return lines
        kept = self.predictions(name)
        shapes = {fold: value.shape for fold, value in kept.items()}
        return failed | {fold for fold in lines - failed if shapes.get(fold) == (folds[fold], outputs)}

    def write(self, name: str, value: Any) -> None:
        """Replace a JSON file of the folder, atomically."""
        import json

        data = (json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()
        commit(self.path / name, data, SweepError)


def _parse(file: Path, number: int, line: bytes) -> Result:
    try:
        return Result.from_json(strict_json(line))
    except (ValueError, TypeError) as error:
        raise SweepError(
            f"{file}, line {number} is damaged ({error}): delete that line, and what it held is computed again"
        ) from None


def refuse_foreign(path: Path) -> None:
    """Raise ``SweepError`` unless a path may become a sweep's folder or is one."""
    if not exists(path, SweepError):
        return
    if not path.is_dir():
        raise SweepError(f"{path} is a file: choose a new or an empty directory")
    if not exists(path / "sweep.json", SweepError):
        # A process killed between making the folder and naming it leaves only this.
        with explained(f"cannot read {path}", SweepError):
            strangers = [name for name in os.listdir(path) if name not in ("predictions", LOCK)]
        strangers = [name for name in strangers if not name.startswith(".sweep.json.")]
        if strangers:
            raise SweepError(
                f"{path} exists and is no sweep (it holds {strangers[0]}): choose a new or an empty directory"
            )


def read_identity(path: Path | str) -> dict[str, Any]:
    """Return what a sweep's folder compares. Raises ``SweepError`` when it is no sweep, or of another version."""
    file = Path(path) / "sweep.json"
    try:
        body = read_json(file)
        name, version, identity = body["format"], body["version"], body["identity"]
    except (FileNotFoundError, NotADirectoryError):
        raise SweepError(f"{path} is no sweep: it has no sweep.json") from None
    except OSError as error:
        raise SweepError(f"cannot read {file}: {explain(error)}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise SweepError(f"{file} is damaged ({error}): restore it, or sweep into a new folder") from None
    if name != FORMAT or not isinstance(identity, dict):
        raise SweepError(f"{file} is no sweep's: expected format {FORMAT!r}")
    if version != VERSION:
        raise SweepError(f"{file} has version {version!r}, this embedcache reads {VERSION}: use the one that wrote it")
    return identity


def read_results(path: Path | str) -> list[Result]:
    """Return the results in a sweep's folder, in the order in which they came; a half-written last line is left out.

    Raises ``SweepError`` for a damaged line.
    """
    file = Path(path) / "results.jsonl"
    lines = (read(file, SweepError) or b"").split(b"\n")[:-1]
    return _unique(_parse(file, number, line) for number, line in enumerate(lines, 1))


def _unique(results: Iterable[Result]) -> list[Result]:
    found: dict[tuple[str, int, int | None], Result] = {}
    for each in results:
        found.setdefault(each.key, each)
    return list(found.values())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
