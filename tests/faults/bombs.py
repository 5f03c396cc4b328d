"""Small files that would become gigabytes or days: of JSON, of YAML, of packed text."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

JSON: Mapping[str, bytes] = {
    "empty lists": b"[" + b"[]," * 9_000_000 + b"0]",
    "empty objects": b"[" + b"{}," * 9_000_000 + b"0]",
    "short texts": b"[" + b'"ab",' * 9_000_000 + b"0]",
    "deep lists": b"[" * 3_000 + b"]" * 3_000,
    "deep objects": b'{"a":' * 3_000 + b"0" + b"}" * 3_000,
    "deep in a sound one": b'{"format": ' + b"[" * 150 + b"]" * 150 + b"}",
    "open for ever": b"[{" * 9_000_000,
}

_NINE = [chr(ord("b") + at) for at in range(12)]
YAML: Mapping[str, tuple[str, str]] = {
    "5,000 levels": ("heads: " + "[" * 5_000 + "]" * 5_000, "nested too deeply"),
    "a million levels": ("[" * 1_000_000, "nested too deeply"),
    "levels by indentation": ("- " * 300_000, "nested too deeply"),
    "30 levels": ("heads: " + "[" * 30 + "]" * 30, "nested too deeply"),
    "a number of 5,000 digits": ("seed: " + "9" * 5_000, "a value of 5,000 characters"),
    "a number of 300,000 sixtieths": ("seed: 1" + ":59" * 300_000, "a value of 900,001 characters"),
    "month 13": ("seed: 2024-13-45", "holds a value that cannot be"),
    "30 February": ("seed: 2024-02-30T25:61:61", "holds a value that cannot be"),
    "no time": ("seed: !!timestamp soon", "holds a value that cannot be"),
    "no truth": ("test_all: !!bool maybe", "holds a value that cannot be"),
    "no base64": ("seed: !!binary x===", "not YAML"),
    "nine to the twelfth": (
        "a: &a [1]\n" + "".join(f"{name}: &{name} [{f'*{chr(ord(name) - 1)},' * 9}]\n" for name in _NINE),
        "values: expected 100,000 at most",
    ),
    "within itself": ("heads: &a [*a]", "nested too deeply, or within itself"),
    "a program": ("heads: !!python/object/apply:os.system [ls]", "not YAML"),
    "more than a megabyte": ("#" * 1_100_000, "at most 1 MB"),
    "a billion folds": ("folds: 1000000000\nheads: [linear]", "too many: expected at most 10,000"),
    "a billion repeats": ("repeats: 1000000000\nheads: [linear]", "too many: expected at most 10,000"),
    "a billion draws": ("shots: 1\ndraws: 1000000000\nheads: [linear]", "too many: expected at most 10,000"),
    "a billion shots": ("shots: 1000000000\nheads: [linear]", "some must be left to score"),
    "a billion drawn heads": ("random: 1000000000\nheads: [linear]", "expected 1 to 2,000,000"),
    "a billion seeds": ("seeds: 10000000000\nheads: [linear]", "seeds holds 10000000000"),
    "a range of seeds": ("seeds: {linear: [0, 1000000000], steps: 1000000000}\nheads: [linear]", "seeds holds"),
    "a bound of 400 digits": (f"heads: [{{head: mlp, dropout: {{log: [0.1, {'9' * 400}]}}}}]", "expected a number"),
    "a solver that is a number": (f"heads: [{{head: linear, solver: {'9' * 400}, l2: 1}}]", "linear|solver"),
    "an infinite bound": ("heads: [{head: mlp, dropout: {linear: [0.1, .inf]}}]", "expected a number"),
    "a billion steps": (
        "heads: [{head: linear, learning_rate: {log: [1, 2], steps: 1000000000}}]",
        "at most 1,000,000",
    ),
}

_MEGABYTE = 1 << 20
# name: what the file begins with, what is then repeated without end, what is said of it
TEXT: Mapping[str, tuple[bytes, bytes, str]] = {
    "NULs.csv": (b"", b"\0", "a line is longer than"),
    "NULs.jsonl": (b"", b"\0", "a line is longer than"),
    "NULs.txt": (b"", b"\0", "a line is longer than"),
    "endless line.csv": (b"text,label\n", b"x", "a line is longer than"),
    "endless header.csv": (b"", b"ab,", "a line is longer than"),
    "endless object.jsonl": (b'{"text": "', b"x", "a line is longer than"),
    "endless line.txt": (b"sound\n", b"x", "a line is longer than"),
    "blank lines.csv": (b"text,label\n", b"\n", "unpacks to more than"),
    "blank lines.jsonl": (b"", b"\n", "unpacks to more than"),
    "blank lines.txt": (b"", b"\n", "unpacks to more than"),
    "open quote.csv": (b'text,label\n"', b"line\n", "unpacks to more than|a quote is opened and not closed"),
    "endless row.csv": (b'text,label\n"', b'\n","', "unpacks to more than|a row is longer than"),
}
PLAIN = ("NULs.csv", "endless line.csv", "open quote.csv", "endless row.csv", "endless object.jsonl", "NULs.txt")
"""Those that cost a reader without any packing."""


def text(name: str, size: int = 400 * _MEGABYTE) -> Iterator[bytes]:
    """Yield a text of about ``size`` bytes, a piece at a time."""
    start, again, _ = TEXT[name]
    yield start
    piece = again * (_MEGABYTE // len(again))
    for _ in range(size // _MEGABYTE):
        yield piece


def pack(file: Path, size: int = 400 * _MEGABYTE) -> None:
    """Write such a text, packed where the name of the file says so."""
    name = file.name.removesuffix(".gz")
    with gzip.open(file, "wb", compresslevel=1) if name != file.name else open(file, "wb") as stream:
        for piece in text(name, size):
            stream.write(piece)


def refusals(folder: Path, names: Sequence[str], size: int) -> tuple[int, list[str]]:
    """Have a process of its own read each such file; return how many, and what was not refused within 512 MB."""
    files = [folder / name for name in names]
    for file in files:
        pack(file, size)
    problems = []
    for file in files:  # one process each: the peak of memory is a process's, not a file's
        done = subprocess.run([sys.executable, __file__, file], capture_output=True, text=True, check=True)
        line = done.stdout.strip()
        found = json.loads(line)
        _, _, said = TEXT[file.name.removesuffix(".gz")]
        if not re.search(f"{said}|unpacks to more than", found["said"]) or found["mib"] > 512:
            problems.append(line)
    return len(files), problems


def main() -> None:
    """``python tests/faults/bombs.py FILE`` reads it as ``predict`` does and prints memory, seconds, reason."""
    from embedcache.errors import EmbedcacheError
    from embedcache.examples import load_examples

    load_examples([{"text": "what the libraries take is not the fault of a file"}], labels="none")
    file, begun = sys.argv[1], time.monotonic()
    try:
        load_examples([file], labels="none", text_column="text")
        said = "read"
    except EmbedcacheError as error:
        said = str(error)
    # Not getrusage, whose peak a process inherits from the one that started it.
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps({"file": file, "mib": int(peak) >> 10, "seconds": time.monotonic() - begun, "said": said}))


if __name__ == "__main__":
    main()
