"""Damaged and fuzzed files of every kind: refused in one line, or read as what they were; nothing crashes or hangs.

Each function takes ``(count, seed)`` and returns how often it was tried and what went wrong.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import resource
import shutil
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import damage
import forge
import hdf5
import manifests
import small_caches
from small_caches import SETS

from embedcache.cache import FeatureCache, files, verify
from embedcache.errors import EmbedcacheError
from embedcache.examples import load_examples
from embedcache.heads import TrainedHead
from embedcache.report import report
from embedcache.spec import HeadSpec, TrainSpec
from embedcache.sweep import SweepResult, sweep
from embedcache.sweep.grid import parse, read_file
from embedcache.sweep.store import read_results

Result = tuple[int, list[str]]


@contextlib.contextmanager
def quick() -> Iterator[Path]:
    """A folder for the work, in which nothing waits for a disk or a tick, and libraries warn of nothing."""
    kept = os.fsync, files._TICK
    os.fsync, files._TICK = lambda descriptor: None, 0  # type: ignore[assignment]
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield Path(folder)
    finally:
        os.fsync, files._TICK = kept


def outcome(read: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return what reading gave, or None where it was refused; and what is wrong with the way it was refused."""
    files._KNOWN.clear()
    files._VALIDATED.clear()
    try:
        return read(), None
    except EmbedcacheError as error:
        return None, None if str(error).isprintable() and str(error) else f"not one line: {str(error)!r}"
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def everything(path: Path) -> list[Any]:
    """All that a cache holds."""
    cache = FeatureCache.open(path)
    values: list[Any] = [cache.targets(), cache.split_codes(), cache.keys(), cache.ids(), cache.class_names]
    for each in cache.feature_sets.values():
        if each.kind == "tokens":
            ragged = cache.ragged(None, each.name)
            values += [ragged.values, ragged.offsets]
        else:
            values.append(cache.features(None, each.name))
    return [np.array(value).tobytes() if isinstance(value, np.ndarray) else value for value in values]


def flip(path: Path, rng: random.Random) -> str:
    """Flip one bit of one file below a folder and say which."""
    file = rng.choice(sorted(each for each in path.rglob("*") if each.is_file() and each.stat().st_size))
    at, bit = rng.randrange(file.stat().st_size), rng.randrange(8)
    damage.flip(file, at, bit)
    return f"bit {bit} of byte {at} of {file.relative_to(path)}"


def flips_in_caches(count: int, seed: int) -> Result:
    """Every flipped bit is noticed, by opening and by ``verify``."""
    rng, problems = random.Random(seed), []
    with quick() as folder:
        sound = small_caches.write(folder / "sound")
        for _ in range(count):
            path = Path(shutil.copytree(sound, folder / "c"))
            where = flip(path, rng)
            found, wrong = outcome(lambda path=path: FeatureCache.open(path))
            if found is not None or wrong or not verify(path):
                problems.append(f"{where}: {wrong or 'not noticed'}")
            shutil.rmtree(path)
    return count, problems


def partial_copies(count: int, seed: int) -> Result:
    """Files cut short, swapped, left out or of another cache are noticed."""
    rng, problems = random.Random(seed), []
    with quick() as folder:
        sound, other = small_caches.write(folder / "sound"), small_caches.write(folder / "other", 29, 11)
        names = sorted(small_caches.files(sound))
        for _ in range(count):
            path = Path(shutil.copytree(sound, folder / "c"))
            one, two = rng.sample(names, 2)
            kind = rng.choice(["cut", "swapped", "left out", "of another", "zeroed", "longer"])
            data = (path / one).read_bytes()
            if kind == "cut":
                (path / one).write_bytes(data[: rng.randrange(len(data))])
            elif kind == "swapped":
                (path / one).write_bytes((path / two).read_bytes())
                (path / two).write_bytes(data)
            elif kind == "left out":
                (path / one).unlink()
            elif kind == "of another":
                (path / one).write_bytes(rng.choice(sorted(small_caches.files(other).values())))
            elif kind == "zeroed":
                at = rng.randrange(len(data))
                (path / one).write_bytes(data[:at] + bytes(len(data) - at))
            else:
                (path / one).write_bytes(data + bytes(rng.randrange(1, 5000)))
            same = small_caches.files(path) == small_caches.files(sound)
            found, wrong = outcome(lambda path=path: FeatureCache.open(path))
            if not same and (found is not None or wrong):
                problems.append(f"{one} {kind}: {wrong or 'not noticed'}")
            shutil.rmtree(path)
    return count, problems


def labelled(folder: Path) -> FeatureCache:
    """A cache to train on."""
    split = (np.arange(60) % 5 == 0).astype(np.uint8)
    return FeatureCache.open(
        small_caches.write(folder / "labelled", 60, 60, SETS[:1], split=split, split_names=("train", "validation"))
    )


def flips_in_runs(count: int, seed: int) -> Result:
    """A flipped bit in a run's folder is noticed, or is in nothing that a prediction depends on."""
    from embedcache.train import train_on_cache

    rng, problems = random.Random(seed), []
    with quick() as folder:
        cache = labelled(folder)
        train_on_cache(cache, HeadSpec("mlp"), TrainSpec(epochs=2, solver="minibatch")).save(folder / "run")
        x = cache.features()
        wanted = TrainedHead.from_pretrained(folder / "run").predict(x)
        for _ in range(count):
            path = Path(shutil.copytree(folder / "run", folder / "r"))
            where = flip(path, rng)
            found, wrong = outcome(lambda path=path: TrainedHead.from_pretrained(path).predict(x))
            if wrong or (found is not None and list(found) != list(wanted)):
                problems.append(f"{where}: {wrong or 'other predictions'}")
            shutil.rmtree(path)
    return count, problems


def flips_in_sweeps(count: int, seed: int) -> Result:
    """A flipped bit in a sweep's folder is refused in one line, or reads as a number or a name that it may be."""
    rng, problems = random.Random(seed), []
    with quick() as folder:
        sweep(labelled(folder), ["majority", "ridge"], output_dir=folder / "sweep", folds=2)

        def read(path: Path) -> object:
            result = SweepResult(path)
            pages = [report(path, form=form) for form in ("html", "markdown", "json")]
            return result.to_text(), result.best, read_results(path), pages

        for _ in range(count):
            path = Path(shutil.copytree(folder / "sweep", folder / "s"))
            where = flip(path, rng)
            if wrong := outcome(lambda path=path: read(path))[1]:
                problems.append(f"{where}: {wrong}")
            shutil.rmtree(path)
    return count, problems


HOSTILE: dict[str, Callable[[Path], None]] = {
    **damage.ATTACKS,
    **manifests.ATTACKS,
    **{name: attack for name, (_, attack) in (hdf5.ATTACKS | hdf5.DATASETS).items()},
}


def entries(path: Path) -> dict[str, tuple[int, bytes]]:
    """What stands in a folder: of each entry its mode, which tells links and pipes from files, and a file's bytes."""
    found = {str(each.relative_to(path)): each for each in [path, *path.rglob("*")]}
    return {
        name: (each.lstat().st_mode, each.read_bytes() if stat.S_ISREG(each.lstat().st_mode) else b"")
        for name, each in found.items()
    }


def hostile_caches(count: int, seed: int) -> Result:
    """Every attack, and every two of them one after the other, is refused in one line."""
    rng, problems = random.Random(seed), []
    names = list(HOSTILE)
    with quick() as folder:
        for number in range(count):
            (folder / "at").mkdir()
            path = small_caches.write(folder / "at" / "c")
            sound = entries(path)
            first = names[number % len(names)]
            others = [name for name in names if name != first]  # the same again may be its inverse: transposed
            chosen = [first] + ([rng.choice(others)] if number >= len(names) else [])
            for name in chosen:
                if any(each.is_fifo() for each in path.rglob("*")):
                    break  # an attack that reads would wait in it
                with contextlib.suppress(Exception):  # the first attack has left nothing for the second to change
                    HOSTILE[name](path)
            if entries(path) == sound:  # the second attack undid the first
                shutil.rmtree(folder / "at")
                continue
            found, wrong = outcome(lambda path=path: FeatureCache.open(path))
            if found is not None or wrong:
                problems.append(f"{' and '.join(chosen)}: {wrong or 'not noticed'}")
            shutil.rmtree(folder / "at")
    return count, problems


PIECES = (
    b'"', b"'", b",", b"\n", b"\r\n", b"\r", b"\0", b"\t", b"{", b"}", b"[", b"]", b":", b"\\", b"\\u0000", b"\\ud800",
    b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"NaN", b"1e999", b"-1", b"null", b"true", b"text", b"label", b";",
    b"9" * 400, b"&a ", b"*a ", b"!!", b"- ", b"? ", b"<<: ", b"\x1b[2J", b"\x1f\x8b", b" " * 50, "\u2028".encode(),
)  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return a text with a few pieces put in, taken out or doubled."""
    for _ in range(rng.randrange(1, 9)):
        at = rng.randrange(len(data) + 1)
        to = min(len(data), at + rng.randrange(12))
        put = rng.choice([b"", rng.choice(PIECES), rng.choice(PIECES) * rng.randrange(1, 40), data[at:to] * 3])
        data = data[:at] + put + data[rng.choice([at, to]) :]
    return data


TEXTS = {
    "a.csv": b'text,label,id\nfine,x,1\n"so, so",y,2\n"two\nlines",x,3\n',
    "a.tsv": b"text\tlabel\nfine\tx\nfair\ty\n",
    "a.jsonl": b'{"text": "fine", "label": ["x", "y"]}\n{"text": "fair", "label": []}\n{"text": "\\u00e9", "n": 1.5}\n',
    "a.txt": "fine\nfair\nçà\n".encode(),
}


def fuzzed_inputs(count: int, seed: int) -> Result:
    """Mutated texts are read, or refused in one line; what is read is text."""
    rng, problems = random.Random(seed), []
    with quick() as folder:
        for number in range(count):
            name = sorted(TEXTS)[number % len(TEXTS)]
            data = mutated(TEXTS[name], rng)
            (folder / name).write_bytes(data)
            labels, skip = rng.choice(["none", "required"]), rng.choice(["stop", "skip"])
            quarantine = folder / "q.jsonl" if skip == "skip" else None

            def read(name: str = name, labels: Any = labels, skip: Any = skip, quarantine: Any = quarantine) -> Any:
                loaded = load_examples(folder / name, labels=labels, on_bad_row=skip, quarantine=quarantine)
                return [each.decode("utf-8") for each in loaded.contents()]

            if wrong := outcome(read)[1]:
                problems.append(f"{name} {data!r}: {wrong}")
    return count, problems


SWEEP = b"""features: [mean]
seeds: [0, 1, 2]
folds: 5
heads:
  - majority
  - {head: linear, solver: convex, l2: {log: [0.01, 1000], steps: 16}}
  - head: mlp
    hidden: [256, [512, 256]]
    dropout: [0.1, 0.5]
"""


def fuzzed_sweeps(count: int, seed: int) -> Result:
    """Mutated sweep files are read, or refused in one line."""
    rng, problems = random.Random(seed), []
    sets = {"mean": SETS[0]}
    with quick() as folder:
        for _ in range(count):
            data = mutated(SWEEP, rng)
            (folder / "sweep.yaml").write_bytes(data)
            if wrong := outcome(lambda: parse(read_file(folder / "sweep.yaml"), sets))[1]:
                problems.append(f"{data!r}: {wrong}")
    return count, problems


VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 2**64, 1.5, -0.0, 1e308, "", "a", "mean", "\0", "\ud800", "..",
    "../../etc/passwd", "/dev/zero", "x" * 300, [], [[]], {}, [0], ["a"], {"a": 1}, "float32", "tokens", "1.0",
)  # fmt: skip


def disturbed(body: Any, rng: random.Random) -> Any:
    """Return a JSON value of which one part is another value, missing, doubled or elsewhere."""
    body = copy.deepcopy(body)
    places: list[tuple[Any, Any]] = []
    waiting = [body]
    while waiting:
        inner = waiting.pop()
        for key in list(inner) if isinstance(inner, dict) else range(len(inner)):
            places.append((inner, key))
            if isinstance(inner[key], (dict, list)):
                waiting.append(inner[key])
    inner, key = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0:
        del inner[key]
    elif kind == 1 and isinstance(inner, list):
        inner.append(copy.deepcopy(inner[key]))
    elif kind == 2:
        there, other = rng.choice(places)
        with contextlib.suppress(KeyError, IndexError):
            inner[key] = copy.deepcopy(there[other])
    else:
        inner[key] = rng.choice(VALUES)
    return body


def fuzzed_manifests(count: int, seed: int) -> Result:
    """Disturbed manifests with the hashes that they should have are refused in one line, or say what is true."""
    rng, problems = random.Random(seed), []
    with quick() as folder:
        path = small_caches.write(folder / "c")
        body, wanted = forge.body(path), everything(path)
        for _ in range(count):
            changed = disturbed(body, rng)
            try:
                forge.sign(path, changed)
            except (ValueError, TypeError, KeyError):
                continue  # cannot be written as a manifest at all
            found, wrong = outcome(lambda: everything(path))
            # Names of classes are nothing that a hash of the features could know.
            if wrong or (found is not None and found[5:] != wanted[5:] and len(found) == len(wanted)):
                sets = json.dumps(changed["feature_sets"]) == json.dumps(body["feature_sets"])
                rows = changed["examples"] == body["examples"] and changed["shards"] == body["shards"]
                if wrong or (sets and rows):
                    problems.append(f"{wrong or 'other features'}: {json.dumps(changed)[:2000]}")
    return count, problems


def fuzzed_shards(count: int, seed: int) -> Result:
    """Shards with a few bytes of their metadata changed, signed again: nothing crashes or hangs."""
    rng, problems = random.Random(seed), []
    with quick() as folder:
        sound = small_caches.write(folder / "sound")
        for _ in range(count):
            path = Path(shutil.copytree(sound, folder / "c"))
            kind = rng.choice(["features", "examples"])
            data = bytearray((forge.first_shard(path) if kind == "features" else forge.dataset_file(path)).read_bytes())
            for _ in range(rng.randrange(1, 6)):
                at = rng.randrange(min(len(data), 2048) if rng.random() < 0.8 else len(data))
                data[at] = rng.choice([0, 1, 2, 127, 128, 255, rng.randrange(256)])
            forge.put(path, kind, bytes(data))
            if wrong := in_a_child(lambda path=path: outcome(lambda: everything(path))[1]):
                problems.append(f"{kind}: {wrong}")
            shutil.rmtree(path)
    return count, problems


def in_a_child(work: Callable[[], str | None], seconds: int = 10) -> str | None:
    """Do something in a forked process and return what it returns, or how the process ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            os.write(writing, (work() or "").encode("utf-8", "replace")[:60_000])
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading, "rb") as said:
        text = said.read().decode()
    _, status = os.waitpid(child, 0)
    return text or (f"the process ended with status {status}" if status else None)


def fuzzed_heads(count: int, seed: int) -> Result:
    """Disturbed configs of heads, signed again, are refused in one line, or make a head that predicts."""
    from embedcache.fingerprint import hash_json
    from embedcache.train import train_on_cache

    rng, problems = random.Random(seed), []
    with quick() as folder:
        cache = labelled(folder)
        train_on_cache(cache, HeadSpec("mlp"), TrainSpec(epochs=2, solver="minibatch")).save(folder / "run")
        file = folder / "run" / "config.json"
        body, x = json.loads(file.read_bytes()), cache.features()
        for _ in range(count):
            changed = disturbed({key: value for key, value in body.items() if key != "hash"}, rng)
            try:
                changed["hash"] = hash_json(changed)
                file.write_text(json.dumps(changed))
            except (ValueError, TypeError):
                continue
            if wrong := outcome(lambda: TrainedHead.from_pretrained(folder / "run").predict(x))[1]:
                problems.append(f"{wrong}: {json.dumps(changed)[:1500]}")
    return count, problems


FAULTS: dict[str, Callable[[int, int], Result]] = {
    "bits flipped in caches": flips_in_caches,
    "bits flipped in run folders": flips_in_runs,
    "bits flipped in sweep folders": flips_in_sweeps,
    "files cut, swapped, left out": partial_copies,
    "hostile caches": hostile_caches,
    "fuzzed manifests, signed": fuzzed_manifests,
    "fuzzed shards, signed": fuzzed_shards,
    "fuzzed heads, signed": fuzzed_heads,
    "fuzzed inputs": fuzzed_inputs,
    "fuzzed sweep files": fuzzed_sweeps,
}
