"""A sweep's folder: results as they come, so that a killed sweep goes on and nothing is trained twice.

::

    SWEEP/
    ├── sweep.json                     what is compared on what: written once, refused when it differs
    ├── results.jsonl                  one line a configuration and fold, appended and synced
    ├── predictions/ID.safetensors     each configuration's outputs on the rows of each fold, for paired tests
    ├── summary.json                   all findings; see ``summary``
    └── best/                          the chosen head's bundle

A result counts only with its predictions, which are written first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedcache.decoding import from_json
from embedcache.errors import SweepError
from embedcache.fingerprint import canonical_json, differences, hash_json, read_json, strict_json
from embedcache.journal import (
    Journal,
    commit,
    exists,
    explain,
    read,
    refuse_foreign,
    refuse_link,
    writing,
)
from embedcache.sweep.summary import FORMAT, VERSION, dumps
from embedcache.wording import shortened

IDENTITY, PREDICTIONS = "sweep.json", "predictions"
Outputs = npt.NDArray[np.float32]
Key = tuple[str, int, int | None]
"""What there can be only one result of: configuration, fold, point of a learning curve."""


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
    head: Mapping[str, object]
    train: Mapping[str, object]
    parameters: int
    seconds: float
    epochs: float | None = None
    curve: int | None = None
    error: str | None = None

    @property
    def key(self) -> Key:
        """Configuration, fold, point of a learning curve."""
        return self.id, self.fold, self.curve

    def __post_init__(self) -> None:
        if min(self.fold, self.repeat, self.train_rows, self.eval_rows, self.parameters) < 0:
            raise ValueError("it counts less than nothing")


class SweepFolder:
    """A sweep's folder, opened by one process at a time, as a context manager.

    ``notes`` say what was repaired. Raises ``SweepError`` for a folder of another sweep, with what differs, for a
    folder of something else, and for a damaged line, naming it.
    """

    def __init__(self, path: Path | str, identity: Mapping[str, object]) -> None:
        self.path = Path(path)
        self.identity = dict(identity)
        self.notes: list[str] = []
        self.results: dict[Key, Result] = {}
        self._journal = _journal(self.path)
        self._writing = contextlib.ExitStack()

    def __enter__(self) -> SweepFolder:
        refuse_foreign(self.path, "a sweep", IDENTITY, [PREDICTIONS], SweepError)
        fresh = not exists(self.path / IDENTITY, SweepError)
        refuse_link(self.path / "best", SweepError)  # now, not after hours
        with contextlib.ExitStack() as stack:
            stack.enter_context(writing(self.path, SweepError, parts=[PREDICTIONS], fresh=fresh))
            self._identify()
            records, half = self._journal.recover()
            self._writing = stack.pop_all()
        if half:
            self.notes.append("the last line of results.jsonl was half written; it was dropped and is computed again")
        self.results = _by_key(records)
        return self

    def __exit__(self, *exception: object) -> None:
        self._writing.close()

    def _identify(self) -> None:
        if not exists(self.path / IDENTITY, SweepError):
            body = {"format": FORMAT, "version": VERSION, "identity": self.identity}
            commit(self.path / IDENTITY, (canonical_json(body) + "\n").encode(), SweepError)
            return
        differ = differences(read_identity(self.path), self.identity)
        if differ:
            shown = "; ".join(
                f"{name}: the folder has {shortened(old)}, now {shortened(new)}" for name, old, new in differ[:6]
            )
            raise SweepError(
                f"{self.path} holds a sweep of something else ({shown}): choose another folder, or sweep as before"
            )

    @property
    def hash(self) -> str:
        """The hash of the sweep's identity."""
        return hash_json(self.identity)

    def add(self, results: Sequence[Result], outputs: Mapping[str, Mapping[int, Outputs]] | None = None) -> None:
        """Keep results: the predictions of each configuration by fold first, then the lines, synced."""
        for name, by_fold in (outputs or {}).items():
            self._write_predictions(name, by_fold)
        new = [result for result in results if result.key not in self.results]
        self._journal.append(new)
        self.results |= {result.key: result for result in new}

    def _write_predictions(self, name: str, by_fold: Mapping[int, Outputs]) -> None:
        from safetensors.numpy import save

        tensors = {f"fold{fold}": np.ascontiguousarray(value, np.float32) for fold, value in by_fold.items()}
        kept = self.predictions(name)
        tensors = {**{f"fold{fold}": value for fold, value in kept.items()}, **tensors}
        commit(self._prediction_file(name), save(tensors), SweepError)

    def _prediction_file(self, name: str) -> Path:
        return self.path / PREDICTIONS / f"{name}.safetensors"

    def predictions(self, name: str) -> dict[int, Outputs]:
        """Return a configuration's outputs by fold: float32 [rows, C] each. {} where the file is gone or damaged."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            tensors = load(read(self._prediction_file(name), SweepError) or b"")
            return {int(name.removeprefix("fold")): value for name, value in tensors.items()}
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

    def write(self, name: str, value: object) -> None:
        """Replace a JSON file of the folder, atomically."""
        commit(self.path / name, dumps(value).encode(), SweepError)


def _journal(path: Path) -> Journal[Result]:
    return Journal(
        path / "results.jsonl", lambda line: from_json(Result, strict_json(line)),
        lambda result: canonical_json(asdict(result)), SweepError, "what it held is computed again",
    )  # fmt: skip


def _by_key(results: Iterable[Result]) -> dict[Key, Result]:
    """Return results by their keys. Of two with the same key the first counts: the predictions are from it."""
    by_key: dict[Key, Result] = {}
    for result in results:
        by_key.setdefault(result.key, result)
    return by_key


def read_identity(path: Path | str) -> dict[str, object]:
    """Return what a sweep's folder compares. Raises ``SweepError`` when it is not a sweep, or of another version."""
    file = Path(path) / IDENTITY
    try:
        body = read_json(file)
        name, version, identity = body["format"], body["version"], body["identity"]
    except (FileNotFoundError, NotADirectoryError):
        raise SweepError(f"{path} is not a sweep: it has no sweep.json") from None
    except OSError as error:
        raise SweepError(f"cannot read {file}: {explain(error)}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise SweepError(f"{file} is damaged ({error}): restore it, or sweep into a new folder") from None
    if name != FORMAT or not isinstance(identity, dict):
        raise SweepError(f"{file} is not a sweep's: expected format {FORMAT!r}")
    if version != VERSION:
        raise SweepError(f"{file} has version {version!r}, this embedcache reads {VERSION}: use the one that wrote it")
    return identity


def read_results(path: Path | str) -> list[Result]:
    """Return the results in a sweep's folder, in the order in which they came; a half-written last line is left out.

    Raises ``SweepError`` for a damaged line.
    """
    return list(_by_key(_journal(Path(path)).read()).values())
