"""Every command that writes, run small: killed at any call, given an error by any call, met by a link at any name.

``python tests/faults/commands.py kills=3,links=1000 SEED`` prints one JSON object: for each kind of fault
and each command how often it was tried, and what went wrong. In a process of its own, because it forks. From Python,
``FAULTS`` has one function ``run(count, seed) -> (tried, problems)`` each; call them ``with quiet_disk()``.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import errno
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny_models
from fakes import CountingBackbone
from power import Disk, Node, policies

from embedcache import cli, compare
from embedcache.cache import FeatureCache, files
from embedcache.compare import run as comparing
from embedcache.compare.measurements import Folder
from embedcache.compare.worker import perform
from embedcache.errors import CacheNotFoundError, EmbedcacheError, IncompleteCacheError
from embedcache.examples import load_examples
from embedcache.extract import run as extract
from embedcache.heads import TrainedHead
from embedcache.predict import Predictor
from embedcache.sweep.store import read_results

CALLS = (
    "open", "write", "fsync", "close", "replace", "unlink", "mkdir", "rmdir", "stat", "lstat", "listdir", "scandir",
)  # fmt: skip
ERRORS = (errno.EIO, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ESTALE)
Hook = Callable[[str, int, Callable[[], Any], tuple[Any, ...]], Any]


class Tap:
    """Stands before the system calls that touch files below ``root``; ``hook`` makes the real call, or does not."""

    def __init__(self, root: Path, hook: Hook, calls: tuple[str, ...] = (*CALLS, "io.open")) -> None:
        self.root, self.hook, self.calls = str(root), hook, calls
        self.number = 0
        self.ours: set[int] = set()

    def __enter__(self) -> Tap:
        self.stack = contextlib.ExitStack()
        for name in CALLS:
            self.stack.enter_context(mock.patch.object(os, name, self._call(name, getattr(os, name))))
        opening = self._call("io.open", io.open)
        self.stack.enter_context(mock.patch.object(io, "open", opening))
        self.stack.enter_context(mock.patch.object(builtins, "open", opening))
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    def _call(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            subject = args[0] if args else "."
            inside = subject in self.ours if isinstance(subject, int) else self._inside(subject)
            if not inside:
                return real(*args, **options)

            def go() -> Any:
                done = real(*args, **options)
                if name == "open":
                    self.ours.add(done)
                return done

            if name == "close" or (name == "io.open" and isinstance(subject, int)):  # which closes it some day
                self.ours.discard(subject)
            if name not in self.calls:
                return go()
            self.number += 1
            return self.hook(name, self.number, go, args)

        return call

    def _inside(self, path: Any) -> bool:
        try:
            return f"{os.fspath(path)}/".startswith(f"{self.root}/")
        except TypeError:
            return False


@dataclass(frozen=True)
class Writing:
    """A command that writes: what is there before, the command, and what a reader finds in the folder.

    ``state`` is None for nothing yet, and raises when it is not whole. ``own`` says that the output is a folder of
    ours, in which the next run leaves no temporaries of a killed one.
    """

    name: str
    before: Callable[[Path], None]
    work: Callable[[Path], None]
    state: Callable[[Path], Any]
    own: bool = True


# What commands are run on.


def command(*arguments: Any) -> None:
    """Run a command so that what it raises is seen, not what is said of it."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        cli.cli.main([str(each) for each in arguments], prog_name="embedcache", standalone_mode=False)


def scratch() -> Path:
    """A folder that goes with this process, but not with its killed children."""
    folder = Path(tempfile.mkdtemp(prefix="embedcache-faults-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def inputs() -> Path:
    """A folder with rows, a model, caches, runs and a sweep that commands read."""
    folder = scratch()
    rows = [{"text": f"text {at} {'good' if at % 2 else 'bad'}", "label": "gb"[at % 2]} for at in range(40)]
    for name, more in (("rows", ""), ("relabelled", " too")):
        made = [{"text": row["text"], "label": row["label"] + more} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    bad = [{"text": "a", "label": "x"}, {"text": "", "label": "y"}, {"text": "b", "label": "y"}]
    (folder / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    (folder / "texts.txt").write_text("one text\nanother text\na third\n")
    tiny_models.build("bert", folder / "bert")
    arguments = ["--model", folder / "bert", "--pooling", "mean", "--split", "60/20/20", "--device", "cpu"]
    command("extract", folder / "rows.jsonl", "-o", folder / "c", *arguments)
    for part in ("1/2", "2/2"):
        command("extract", folder / "rows.jsonl", "-o", folder / f"part{part[0]}", *arguments, "--part", part)
    command("train", folder / "c", "-o", folder / "run", "--head", "majority")
    command("sweep", folder / "c", "-o", folder / "sweep", "--head", "majority", "--folds", 2)
    return folder


@cache
def predictor() -> Predictor:
    """The predictor of the run, loaded once."""
    return Predictor.load(inputs() / "run", device="cpu")


def nothing(folder: Path) -> None:
    """Nothing is there before."""


def run_extract(count: int, folder: Path) -> None:
    """Extract so many rows, three shards or more."""
    rows = [{"text": f"text number {at}", "label": "ab"[at % 2]} for at in range(count)]
    extract(load_examples(rows, split="60/20/20"), CountingBackbone(tokens=True), folder / "c", rows_per_shard=7)


def run_compare(folder: Path) -> None:
    """Compare with the workers in this process."""
    with mock.patch.object(
        comparing, "in_own_process", lambda job: pickle.loads(pickle.dumps(perform(pickle.loads(pickle.dumps(job)))))
    ):
        compare.compare_training_approaches(
            [{"text": f"t {at} {'xy'[at % 2]}", "label": "xy"[at % 2]} for at in range(40)], folder / "o",
            model=str(inputs() / "bert"), approaches=["cached"], epochs=1, pooling="mean", device="cpu",
            progress=False, split="50/25/25",
        )  # fmt: skip


def run_predict(folder: Path) -> None:
    """Predict into a file."""
    with mock.patch.object(Predictor, "load", return_value=predictor()):
        command("predict", inputs() / "run", inputs() / "texts.txt", "-o", folder / "out.csv")


def run_quarantine(folder: Path) -> None:
    """Set a bad row aside."""
    options: dict[str, Any] = {"text_column": "text", "label_column": "label", "on_bad_row": "skip"}
    load_examples(str(inputs() / "bad.jsonl"), quarantine=folder / "q.jsonl", **options)


def cache_state(name: str, folder: Path) -> Any:
    """What is in a cache, None where no dataset is whole yet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is being extended
            found = FeatureCache.open(folder / name)
    except (CacheNotFoundError, IncompleteCacheError):
        return None
    return found.class_names, found.features().tobytes(), found.targets().tobytes(), found.split_codes().tobytes()


def run_state(folder: Path) -> Any:
    """The head of a run, None where there is no run yet."""
    if not (folder / "run" / "config.json").exists():
        return None
    head = TrainedHead.from_pretrained(folder / "run")
    return head.spec.kind, head.state["output.bias"].tobytes()


def recorded_state(folder: Path) -> Any:
    """The head of a run and which splits it was measured on."""
    measured = json.loads((folder / "run" / "metrics.json").read_bytes())
    return run_state(folder), sorted(measured)


def sweep_state(folder: Path) -> Any:
    """What a finished sweep found, None where it is not finished; its lines and its best head are whole anyway."""
    with contextlib.suppress(FileNotFoundError):
        read_results(folder / "o")
    if (folder / "o" / "best" / "config.json").exists():
        TrainedHead.from_pretrained(folder / "o" / "best")
    if not (folder / "o" / "summary.json").exists():
        return None
    summary = json.loads((folder / "o" / "summary.json").read_bytes())
    return summary["leaderboard"][0]["score"], len(summary["leaderboard"])


def compare_state(folder: Path) -> Any:
    """What a finished comparison found, None where it is not finished."""
    if (folder / "o" / "results.jsonl").exists():
        with Folder(folder / "o"):
            pass
    if not (folder / "o" / "comparison.svg").exists():
        return None
    return [row["test"] for row in json.loads((folder / "o" / "comparison.json").read_bytes())["rows"]]


def file_state(name: str, folder: Path) -> Any:
    """The bytes of a file, None where there is none."""
    return (folder / name).read_bytes() if (folder / name).exists() else None


def copied(name: str, folder: Path) -> None:
    """Put a folder of the inputs there."""
    shutil.copytree(inputs() / name, folder / name)


def older(name: str, folder: Path) -> None:
    """Put an older file there."""
    (folder / name).write_text('{"file": 1, "line": 2, "reason": 3, "raw": 4}\n')


WRITINGS = (
    Writing("extract", nothing, partial(run_extract, 17), partial(cache_state, "c")),
    Writing("extract more", partial(run_extract, 17), partial(run_extract, 26), partial(cache_state, "c")),
    Writing("relabel", partial(copied, "c"),
            lambda to: command("relabel", to / "c", inputs() / "relabelled.jsonl"), partial(cache_state, "c")),
    Writing("merge", nothing,
            lambda to: command("merge", inputs() / "part1", inputs() / "part2", "-o", to / "c"),
            partial(cache_state, "c")),
    Writing("train", nothing,
            lambda to: command("train", inputs() / "c", "-o", to / "run", "--head", "linear"), run_state),
    Writing("train over a run", partial(copied, "run"),
            lambda to: command("train", inputs() / "c", "-o", to / "run", "--head", "linear"), run_state),
    Writing("evaluate", partial(copied, "run"),
            lambda to: command("evaluate", to / "run", inputs() / "c", "--record"), recorded_state),
    Writing("sweep", nothing,
            lambda to: command("sweep", inputs() / "c", "-o", to / "o", "--head", "linear", "--head", "majority",
                               "--folds", 2), sweep_state),
    Writing("compare", nothing, run_compare, compare_state),
    Writing("report", partial(older, "r.html"),
            lambda to: command("report", inputs() / "sweep", "-o", to / "r.html"),
            partial(file_state, "r.html"), own=False),
    Writing("predict", partial(older, "out.csv"), run_predict, partial(file_state, "out.csv"), own=False),
    Writing("quarantine", partial(older, "q.jsonl"), run_quarantine, partial(file_state, "q.jsonl"), own=False),
)  # fmt: skip


class Trial:
    """One command with its folders: copies of what is there before, and what there is to find before and after."""

    def __init__(self, writing: Writing) -> None:
        self.writing = writing
        self.folder = scratch()
        self.number = 0
        (self.folder / "before").mkdir()
        writing.before(self.folder / "before")
        self.before = writing.state(self.folder / "before")
        self.calls: list[tuple[str, str]] = []
        done = self.start()
        with Tap(done, self._note):
            writing.work(done)
        self.after = writing.state(done)
        self.end(done)

    def _note(self, name: str, number: int, go: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        self.calls.append((name, str(args[-1 if name == "replace" else 0] if args else "")))
        return go()

    def start(self) -> Path:
        """Return a fresh folder with what is there before."""
        self.number += 1
        return Path(shutil.copytree(self.folder / "before", self.folder / str(self.number)))

    def end(self, path: Path) -> None:
        """Throw a folder away."""
        shutil.rmtree(path)

    def look(self, path: Path, when: str, *, finish: bool = True) -> list[str]:
        """Return what is wrong with what is left, and with what the same command makes of it."""
        problems = []
        try:
            if self.writing.state(path) not in (self.before, self.after):
                problems.append(f"{when}: neither what was there nor what was to come")
            if finish:
                self.writing.work(path)
                if self.writing.state(path) != self.after:
                    problems.append(f"{when}: the next run makes something else of it")
                left = temporaries(path) if self.writing.own else []
                problems += [f"{when}: {name} is left" for name in left]
        except Exception as error:
            problems.append(f"{when}: {type(error).__name__}: {error}")
        return problems


def temporaries(path: Path) -> list[str]:
    """The temporaries in a folder."""
    return [str(each.relative_to(path)) for each in path.rglob(".*") if each.name != ".lock"]


@cache
def trial(writing: Writing) -> Trial:
    """The trial of a command, made once."""
    with mock.patch.object(os, "fsync"):
        return Trial(writing)


def chosen(count: int, calls: int, seed: int) -> list[int]:
    """So many different numbers of calls, or all of them."""
    return sorted(random.Random(seed).sample(range(1, calls + 1), min(count, calls)))


def kills(writing: Writing, count: int, seed: int) -> tuple[int, list[str]]:
    """Kill a command at its n-th call, which may be half done, for ``count`` n; the next run finishes it."""
    at = trial(writing)
    problems: list[str] = []
    numbers = chosen(count, len(at.calls), seed)
    for number in numbers:
        path = at.start()
        child = os.fork()
        if not child:
            try:
                with Tap(path, partial(_die, number)):
                    writing.work(path)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        problems += at.look(path, f"{writing.name} killed at call {number}, {at.calls[number - 1][0]}")
        at.end(path)
    return len(numbers), problems


def _die(number: int, name: str, at: int, go: Callable[[], Any], args: tuple[Any, ...]) -> Any:
    if at == number:
        if name == "write":
            os.writev(args[0], [bytes(args[1])[: len(args[1]) // 2]])
        os.kill(os.getpid(), signal.SIGKILL)
    return go()


def power_cuts(writing: Writing, count: int, seed: int) -> tuple[int, list[str]]:
    """Cut the power at ``count`` calls of a command, and at its end, when all that it did must be safe."""
    at = trial(writing)
    pick = random.Random(seed)
    survives = policies(1)
    calls = [0]
    left: list[tuple[str, Path]] = []

    def count_calls(top: Node) -> None:
        calls[0] += 1

    def cut(top: Node) -> None:
        calls[0] += 1
        last = calls[0] == whole
        if last or calls[0] in numbers:
            how = "none" if last else pick.choice(("none", "all", "some0"))
            path = at.folder / f"cut{calls[0]}"
            shutil.rmtree(path, ignore_errors=True)
            top.write_to(path, survives[how])
            left.append((f"{writing.name}, power cut at call {calls[0]}, {how} of what was not synced is left", path))

    path = at.start()
    with Disk(path, count_calls).followed():
        writing.work(path)
    at.end(path)
    whole, calls[0] = calls[0], 0
    numbers = set(chosen(count, whole - 1, seed))
    path = at.start()
    with Disk(path, cut).followed():
        writing.work(path)
    at.end(path)
    problems: list[str] = []
    for when, path in left:
        if path == left[-1][1] and writing.state(path) != at.after:
            problems.append(f"{when}: it was done, and is gone")
        problems += at.look(path, when)
        at.end(path)
    return len(left), problems


def io_errors(writing: Writing, count: int, seed: int) -> tuple[int, list[str]]:
    """Let calls of a command fail, ``count`` of all calls with all errors: one line that says where, nothing lost."""
    at = trial(writing)
    problems: list[str] = []
    pairs = [divmod(pair - 1, len(ERRORS)) for pair in chosen(count, len(at.calls) * len(ERRORS), seed)]
    for before, which in pairs:
        number, code = before + 1, ERRORS[which]
        path = at.start()
        when = f"{writing.name} with {errno.errorcode[code]} at call {number}, {at.calls[number - 1][0]}"
        try:
            with Tap(path, partial(_fail, number, code)):
                writing.work(path)
        except EmbedcacheError as error:
            if "\n" in str(error) or str(path) not in str(error):
                problems.append(f"{when}: says {error}")
        except BaseException as error:
            problems.append(f"{when}: {type(error).__name__}: {error}")
        if at.calls[number - 1][0] not in ("unlink", "replace"):  # what was committed, the next run puts in place
            problems += [f"{when}: {name} is left" for name in temporaries(path)]
        problems += at.look(path, when)
        at.end(path)
    return len(pairs), problems


def _fail(number: int, code: int, name: str, at: int, go: Callable[[], Any], args: tuple[Any, ...]) -> Any:
    # A disk that is full stays full; anything else may happen once.
    if at == number or (at > number and name == "write" and code in (errno.ENOSPC, errno.EDQUOT)):
        if name == "close":
            go()
        raise OSError(code, os.strerror(code), *(args[:1] if args and not isinstance(args[0], int) else ()))
    return go()


def links(writing: Writing, count: int, seed: int) -> tuple[int, list[str]]:
    """Plant a link at ``count`` of the names that a command writes: what it points to is as before."""
    at = trial(writing)
    with mock.patch("secrets.token_hex", lambda size: "0" * 2 * size):
        names, folders = written(at)
    plants = [(name, kind) for name in names for kind in ("symbolic", "hard", "dangling")]
    plants += [(name, "folder") for name in folders]
    picked = random.Random(seed).sample(plants, min(count, len(plants)))
    problems: list[str] = []
    for name, kind in picked:
        path = at.start()
        victims = Path(tempfile.mkdtemp(prefix="embedcache-victims-"))
        plant(path / name, victims, kind)
        expected = contents(victims)
        when = f"{writing.name} with a {kind} link at {name}"
        try:
            with mock.patch("secrets.token_hex", lambda size: "0" * 2 * size):
                writing.work(path)
        except EmbedcacheError as error:
            if "\n" in str(error):
                problems.append(f"{when}: says {error}")
        except BaseException as error:
            problems.append(f"{when}: {type(error).__name__}: {error}")
        if contents(victims) != expected:
            problems.append(f"{when}: it was written through")
        shutil.rmtree(victims)
        at.end(path)
    return len(picked), problems


def written(at: Trial) -> tuple[list[str], list[str]]:
    """The names that a command writes to below its folder, temporaries too, and the folders that it makes or uses."""
    names: set[str] = set()
    folders: set[str] = set()
    path = at.start()

    def note(name: str, number: int, go: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        if name == "open" and args[1] & os.O_CREAT:
            names.add(os.path.relpath(args[0], path))
        elif name == "replace":
            names.update(os.path.relpath(each, path) for each in args[:2])
        elif name == "io.open" and any(letter in (args[1] if len(args) > 1 else "r") for letter in "wax+"):
            names.add(os.path.relpath(args[0], path))
        elif name == "mkdir":
            folders.add(os.path.relpath(args[0], path))
        return go()

    with Tap(path, note):
        at.writing.work(path)
    at.end(path)
    # What the user names on the command line may be a link of his own.
    return sorted(names), sorted(name for name in folders if os.sep in name)


def plant(path: Path, victims: Path, kind: str) -> None:
    """Put a link at a path, to a file or folder outside with what was there, or to nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    victim = victims / "victim"
    if path.is_dir() or path.exists():
        shutil.move(path, victim)
    elif kind == "folder":
        victim.mkdir()
    elif kind != "dangling":
        victim.write_bytes(b"")
    if kind == "hard":
        path.hardlink_to(victim)
    else:
        path.symlink_to(victims / "missing" if kind == "dangling" else victim)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below a folder."""
    found = folder.rglob("*")
    return {str(each.relative_to(folder)): each.read_bytes() if each.is_file() else None for each in found}


KINDS: dict[str, Callable[[Writing, int, int], tuple[int, list[str]]]] = {
    "kills": kills, "power_cuts": power_cuts, "io_errors": io_errors, "links": links,
}  # fmt: skip
FAULTS: dict[str, Callable[[int, int], tuple[int, list[str]]]] = {
    f"{kind}: {writing.name}": partial(function, writing) for kind, function in KINDS.items() for writing in WRITINGS
}
"""Each kind of fault for each command: ``run(count, seed) -> (tried, problems)``."""


@contextlib.contextmanager
def quiet_disk() -> Iterator[None]:
    """What a killed process wrote is safe in the kernel: waiting for the disk, or for a tick, proves nothing."""
    with mock.patch.object(os, "fsync"), mock.patch.object(files, "_TICK", 0):
        yield


def main() -> None:
    """Try each kind of fault so often with each command."""
    report = {}
    with quiet_disk():
        for asked in sys.argv[1].split(","):
            kind, _, count = asked.partition("=")
            for writing in WRITINGS:
                tried, problems = KINDS[kind](writing, int(count), int(sys.argv[2]))
                report[f"{kind}: {writing.name}"] = {"tried": tried, "problems": problems}
    print(json.dumps(report))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    main()
