"""Small files that would become gigabytes or days: of JSON, of YAML, of packed text."""

from __future__ import annotations

from collections.abc import Mapping

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
    "a billion steps": (
        "heads: [{head: linear, learning_rate: {log: [1, 2], steps: 1000000000}}]",
        "at most 1,000,000",
    ),
}
