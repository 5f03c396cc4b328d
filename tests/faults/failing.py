"""Every call to the system fails once, with every error: what comes out is one line of ours, and nothing is lost."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
import small_caches
from small_caches import SETS

from embedcache.cache import FeatureCache, files, known_rows, merge, read_spec, relabel, verify
from embedcache.errors import CacheNotFoundError, EmbedcacheError
from embedcache.examples import load_examples

CALLS = ("open", "stat", "lstat", "fstat", "listdir", "scandir", "mkdir", "unlink", "replace", "fsync", "write")
ERRORS = (errno.EIO, errno.EACCES, errno.ENOSPC, errno.ESTALE, errno.EMFILE, errno.ENOMEM, errno.ENAMETOOLONG)
SOME = (SETS[0], SETS[5])


class Failing:
    """While it is entered, the ``number``-th call about something in ``folder`` fails; ``count`` says how many came."""

    def __init__(self, folder: Path, number: int, code: int) -> None:
        self.folder, self.number, self.code = os.path.realpath(folder), number, code
        self.count, self.failed = 0, ""

    def _fail(self, name: str, subject: Any) -> None:
        if isinstance(subject, int):
            try:
                subject = os.readlink(f"/proc/self/fd/{subject}")
            except OSError:
                return
        if not isinstance(subject, (str, bytes, os.PathLike)) or not os.fsdecode(subject).startswith(self.folder):
            return
        self.count += 1
        if self.count == self.number:
            self.failed = name
            raise OSError(self.code, os.strerror(self.code), os.fsdecode(subject))

    @contextlib.contextmanager
    def entered(self) -> Iterator[Failing]:
        places: list[tuple[Any, str]] = [(os, name) for name in CALLS] + [(builtins, "open"), (io, "open")]
        kept = [getattr(place, name) for place, name in places]

        def failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def call(subject: Any = ".", *arguments: Any, **options: Any) -> Any:
                self._fail(name, subject)
                return real(subject, *arguments, **options)

            return call

        for (place, name), real in zip(places, kept, strict=True):
            setattr(place, name, failing(name, real))
        try:
            yield self
        finally:
            for (place, name), real in zip(places, kept, strict=True):
                setattr(place, name, real)


def _read(folder: Path) -> None:
    cache = FeatureCache.open(folder / "c")
    cache.features("test", "mean")
    cache.ragged()
    cache.ids()
    cache.stored_keys()


def _write(folder: Path) -> None:
    small_caches.write(folder / "c", 17, 7, SOME)


def _relabel(folder: Path) -> None:
    rows = [{"text": f"row {row}", "label": "ab"[row % 2]} for row in range(11)]
    relabel(folder / "c", load_examples(rows))


def _merge(folder: Path) -> None:
    merge([folder / "c", folder / "d"], folder / "merged")


def _known(folder: Path) -> None:
    known_rows(folder / "c", small_caches.SPEC, SOME, small_caches.keys(range(3)))
    read_spec(folder / "c")


def _texts(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        loaded = load_examples(
            folder / name, labels="none", text_column="text", on_bad_row="skip", quarantine=folder / "q.jsonl"
        )
        list(loaded.contents())

    return read


def _nothing(folder: Path) -> None:
    for there in ("nowhere", "empty"):
        with contextlib.suppress(CacheNotFoundError):
            FeatureCache.open(folder / there)


WORK: dict[str, Callable[[Path], None]] = {
    "open and read a cache": _read,
    "verify a cache": lambda folder: verify(folder / "c") and None,
    "extend a cache": _write,
    "make a cache": lambda folder: small_caches.write(folder / "empty", 5, 3, SOME) and None,
    "open what is no cache": _nothing,
    "relabel a cache": _relabel,
    "merge caches": _merge,
    "look rows up": _known,
    "read CSV": _texts("a.csv"),
    "read packed CSV": _texts("a.csv.gz"),
    "read JSONL": _texts("a.jsonl"),
    "read lines": _texts("a.txt"),
}


def prepared(folder: Path) -> Path:
    """Make what the work is done on."""
    import gzip

    small_caches.write(folder / "c", 11, 7, SOME)
    (folder / "empty").mkdir()
    small_caches.write(folder / "d", 13, 7, SOME)
    (folder / "a.csv").write_text("text,label\nfine,x\nfair,y\n,z\n")
    (folder / "a.csv.gz").write_bytes(gzip.compress((folder / "a.csv").read_bytes()))
    (folder / "a.jsonl").write_text('{"text": "fine"}\n{"text": "fair"}\n[]\n')
    (folder / "a.txt").write_text("fine\nfair\n")
    return folder


def one(name: str, number: int, code: int) -> tuple[bool, str | None]:
    """Do a piece of work whose ``number``-th call fails; return whether it had so many, and what went wrong."""
    with tempfile.TemporaryDirectory() as made:
        folder = prepared(Path(made))
        files._KNOWN.clear()
        trouble = Failing(folder, number, code)
        where = f"{name}, call {number}: {errno.errorcode[code]}"
        with trouble.entered():
            try:
                WORK[name](folder)
            except EmbedcacheError as error:
                if "\n" in str(error):
                    return True, f"{where} in {trouble.failed}: more than a line: {error}"
            except Exception as error:
                return True, f"{where} in {trouble.failed}: {type(error).__name__}: {error}"
        if not trouble.failed:
            return False, None
        rows = len(FeatureCache.open(folder / "c"))
        problems = [each for each in verify(folder / "c") if "left over" not in each]
        if rows not in (11, 17) or problems:
            return True, f"{where} in {trouble.failed}: {rows} rows are left; {problems}"
        return True, None


def run(count: int, seed: int = 0) -> tuple[int, list[str]]:
    """Have ``count`` calls fail, one at a time, in turn through all work, its calls and a seeded choice of errors."""
    rng = random.Random(seed)
    tried, problems = 0, []
    numbers = dict.fromkeys(WORK, 1 + 16 * (seed % 3))
    with quick():
        while tried < count:
            for name in list(WORK)[: max(1, count - tried)]:
                there, problem = one(name, numbers[name], rng.choice(ERRORS))
                numbers[name] = numbers[name] + 1 if there else 1
                tried += there
                problems += [] if problem is None else [problem]
    return tried, problems


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """No waiting for the disk or for a tick, and no warning of what was interrupted."""
    kept = os.fsync, files._TICK
    os.fsync, files._TICK = lambda descriptor: None, 0  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        os.fsync, files._TICK = kept


if __name__ == "__main__":
    tried, problems = run(int(sys.argv[1]))
    print(tried, len(problems), *problems[:60], sep="\n")
