"""Every error embedcache raises on purpose, and its one category of warnings.

::

    EmbedcacheError
    ├── InputError (ValueError)              a file, column, row or option of the input is wrong
    │   ├── BadRowsError                     rows that cannot be used, with file, line and reason
    │   ├── InputNotFoundError (FileNotFoundError)
    │   └── PictureError                     a picture that cannot be decoded: the reason, without its place
    ├── SpecError (ValueError)               a setting has an impossible value
    ├── BackboneError (ValueError)           the model cannot be loaded or cannot do what was asked
    │   ├── PoolingUnavailableError          the model does not give that pooling; names those it gives
    │   ├── DeviceMemoryError (MemoryError)  the device's memory does not hold a model or a batch of it
    │   └── WorkerRefusedError               a worker of an extraction that computes otherwise, or cannot
    ├── FeatureError (ValueError)            features that must not be used: NaN, inf, overflow, shape
    ├── CacheError (OSError)                 something about a cache directory
    │   ├── CacheNotFoundError (FileNotFoundError)
    │   ├── CorruptCacheError (ValueError)   bytes differ from what was committed
    │   ├── IncompleteCacheError             an extraction was interrupted before its first dataset
    │   ├── CacheLockedError (BlockingIOError)  another process is writing
    │   ├── NumericsMismatchError (ValueError)  rows that another kind of machine computed, with other last bits
    │   └── SpecMismatchError (ValueError)   the cache holds features made another way; carries a diff
    ├── BundleError (ValueError)             a run folder or head bundle is missing, hostile or damaged
    │   └── BackboneMismatchError            the head was trained on another backbone's features
    ├── TrainingError (ValueError)           a head cannot be trained on this data
    ├── SweepError (ValueError)              a sweep that cannot be run or resumed
    │   └── SweepSpecError                   a head, setting or number of a sweep that cannot be, whatever the rows
    ├── AuditError (ValueError)              an audit's folder that is missing, damaged or something else's
    ├── NotEqualError (AssertionError)       the equivalence check found a difference
    ├── MissingExtraError (ImportError)      an optional package is not installed; names the command
    └── Interrupted (RuntimeError)           Ctrl-C: what was kept and how to go on

    EmbedcacheWarning (UserWarning)          a note: what was guessed, dropped or looks wrong in the data

Each is also a subclass of the builtin in brackets, so ``except ValueError`` keeps working for callers who
have never heard of this module. A note is warned of once where it arises, and kept as ``notes`` on what the call
returns; the command line prints it as ``note: ...``. The command line prints ``str(error)`` on one line and exits with
``error.exit_code`` (2 for usage, 1 for everything else).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from embedcache.wording import counted, shown


class EmbedcacheError(Exception):
    """Base class; ``str(error)`` is one line that says what, where, what was expected and what to do."""

    exit_code = 1

    def __str__(self) -> str:
        # Names of files, columns and classes come from strangers: none of them may begin a line of its own.
        return shown(super().__str__())

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are unpickled by calling their class with the message, which is not what ours are made of; a
        # worker's error would arrive in its parent as a TypeError, or not at all.
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[EmbedcacheError], arguments: tuple[object, ...], state: dict[str, object]) -> EmbedcacheError:
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    error.__dict__.update(state)
    return error


class InputError(EmbedcacheError, ValueError):
    """A file, column, row or option of the input is wrong."""


class BadRowsError(InputError):
    """Rows that cannot be used. ``rows`` holds the first ten as ``(where, reason)``; ``total`` counts all."""

    def __init__(self, rows: Sequence[tuple[str, str]], total: int) -> None:
        self.rows = tuple(rows)
        self.total = total
        listed = "; ".join(f"{where}: {reason}" for where, reason in self.rows)
        more = f" (first {len(self.rows)} of {total})" if total > len(self.rows) else ""
        super().__init__(
            f"{counted(total, 'bad row')}{more}: {listed}. "
            "Correct them, or pass --on-bad-row skip to set them aside in a quarantine file"
        )


class InputNotFoundError(InputError, FileNotFoundError):
    """An input file does not exist."""


class PictureError(InputError):
    """A picture that cannot be decoded. The message is the reason alone: where it lies, only the caller knows."""


class SpecError(EmbedcacheError, ValueError):
    """A setting has an impossible value."""

    exit_code = 2


class BackboneError(EmbedcacheError, ValueError):
    """The model cannot be loaded, or cannot do what was asked."""


class PoolingUnavailableError(BackboneError):
    """The model does not give that pooling; the message lists those it gives."""


class DeviceMemoryError(BackboneError, MemoryError):
    """The device's memory does not hold the model, or a batch at a canonical shape."""


class WorkerRefusedError(BackboneError):
    """A worker of an extraction that computes other bits than the others, or cannot load the backbone."""


class FeatureError(EmbedcacheError, ValueError):
    """Features that must not be used: NaN, inf, an overflow of the storage type, a wrong shape."""


class CacheError(EmbedcacheError, OSError):
    """Something about a cache directory."""


class CacheNotFoundError(CacheError, FileNotFoundError):
    """There is no cache at that path."""


class CorruptCacheError(CacheError, ValueError):
    """Bytes on disk differ from what was committed."""


class IncompleteCacheError(CacheError):
    """The extraction was interrupted before the cache held its first whole dataset."""


class CacheLockedError(CacheError, BlockingIOError):
    """Another process is writing to the cache."""


class SpecMismatchError(CacheError, ValueError):
    """The cache holds features made another way. ``differences`` is a tuple of ``(field, old, new)``."""

    def __init__(self, where: str, differences: Sequence[tuple[str, object, object]]) -> None:
        self.differences = tuple(differences)
        listed = "; ".join(f"{field}: cache has {old!r}, asked for {new!r}" for field, old, new in self.differences)
        super().__init__(
            f"{where} holds features made another way ({listed}). "
            "Choose another output directory, or drop the options that differ"
        )


class NumericsMismatchError(CacheError, ValueError):
    """Rows that another kind of machine computed, whose last bits differ. ``difference`` says by how much."""

    def __init__(self, where: str, difference: str, *, known: bool = True) -> None:
        self.difference = difference
        what = (
            f"holds rows that another kind of machine or library computed ({difference}): extract where it was made"
            if known
            else f"says nothing of what its machine computes, or this backbone does not ({difference}): extract anew"
        )
        super().__init__(
            f"{where} {what}, or pass --accept-numerics (accept_numerics=True) to keep both, which the cache records"
        )


class BundleError(EmbedcacheError, ValueError):
    """A run folder or head bundle is missing, hostile or damaged."""


class BackboneMismatchError(BundleError):
    """The head was trained on the features of another backbone."""


class TrainingError(EmbedcacheError, ValueError):
    """A head cannot be trained on this data."""


class SweepError(EmbedcacheError, ValueError):
    """A sweep that cannot be run or resumed."""


class SweepSpecError(SweepError):
    """A head, setting or number of a sweep that cannot be, whatever the rows are."""

    exit_code = 2


class AuditError(EmbedcacheError, ValueError):
    """A folder of an audit that is missing, damaged or something else's."""


class NotEqualError(EmbedcacheError, AssertionError):
    """The equivalence check found a difference."""


class MissingExtraError(EmbedcacheError, ImportError):
    """An optional package is not installed."""

    def __init__(self, what: str, package: str, extra: str | None) -> None:
        install = package if extra is None else f"'embedcache[{extra}]'"
        super().__init__(f"{what} needs the package {package}, which is not installed: run pip install {install}")


class Interrupted(EmbedcacheError, RuntimeError):
    """Ctrl-C: the message says what was kept and how to go on."""


class EmbedcacheWarning(UserWarning):
    """A note: what was guessed or dropped, or what looks wrong in the data."""


_QUIET: ContextVar[bool] = ContextVar("embedcache_quiet", default=False)


def warn(notes: Iterable[str]) -> None:
    """Warn of each note at the line, outside of this package, that called into it; nothing inside of ``quiet``."""
    if _QUIET.get():
        return
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "embedcache":
        frame, level = frame.f_back, level + 1
    for note in notes:
        warnings.warn(shown(note), EmbedcacheWarning, stacklevel=level)


@contextmanager
def quiet() -> Iterator[None]:
    """Let a public function be called as a part of another, whose caller its notes would not help."""
    token = _QUIET.set(True)
    try:
        yield
    finally:
        _QUIET.reset(token)
