"""Canonical JSON, content hashes of files and rows, and a readable difference of two specs.

Identity in embedcache is content only: no path, no modification time, no host name enters any hash here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeGuard

from embedcache.wording import counted

KEY_BYTES = 16
_BLOCK = 1 << 20
MOST_VALUES = 2_000_000
"""What ``strict_json`` takes unless told otherwise; the config of a head of 100,000 classes has 400,000."""
_DEEPEST = 100
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_ALL_BUT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class _Absent:
    """What a field that is not there has in a difference: null is a value, and another one."""

    def __repr__(self) -> str:
        return "nothing"

    def __reduce__(self) -> str:
        return "ABSENT"  # there is one, also on the other side of a pipe


ABSENT = _Absent()


def canonical_json(value: object) -> str:
    """Return ``value`` as JSON with sorted keys, no spaces, plain ASCII and no NaN: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def strict_json(text: str | bytes, *, most: int = MOST_VALUES, shared: bool = False) -> Any:
    """Parse JSON, refusing duplicate keys, the non-standard NaN and Infinity, and numbers too large for a float.

    A megabyte of brackets becomes fifty of Python's lists: more than ``most`` values, or more than 100 levels, are
    refused before anything is parsed. Of objects that follow one another and are equal, of texts alone, there is one
    where they may be ``shared``.

    Raises ``ValueError`` with the reason.
    """
    refuse_bombs(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text, most)

    last: dict[str, object] = {}

    def no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        nonlocal last
        held = dict(pairs)
        if len(held) < len(pairs):
            names = [key for key, _ in pairs]
            twice = next(key for number, key in enumerate(names) if key in names[:number])
            raise ValueError(f"the key {twice!r} occurs twice")
        if shared and held == last:
            return last
        if shared and all(type(value) is str for value in held.values()):
            last = held
        return held

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def finite(digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            raise ValueError(f"{digits} is too large a number")
        return number

    try:
        return json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constant, parse_float=finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path | str, *, largest: int = 64 << 20, most: int = MOST_VALUES) -> Any:
    """Read a JSON file in UTF-8 as ``strict_json`` does.

    Raises ``ValueError`` too for what is not a plain file or has more than ``largest`` bytes, ``OSError`` as the system
    does.
    """
    # Opening a pipe would wait for its other end, and a device never ends.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a plain file")
        if status.st_size > largest:
            raise ValueError(f"it has {status.st_size:,} bytes, {largest:,} at most are expected")
        return strict_json(file.read(largest).decode("utf-8"), most=most)


def refuse_bombs(data: bytes, most: int) -> None:
    """Raise ``ValueError`` for more values or levels than are expected; costs little beside parsing.

    A comma or a bracket in a string counts too: the limits leave room for those.
    """
    opened = data.count(b"[") + data.count(b"{")
    if opened + data.count(b",") > most:
        raise ValueError(f"it has more than {counted(most, 'value')}")
    if opened <= _DEEPEST or len(_flattened(data)) <= _DEEPEST:
        return
    # Brackets in strings need not close: without the strings there may be no depth at all.
    if data.count(b'"') > 8 * most or len(_flattened(_STRING.sub(b"", data))) > _DEEPEST:
        raise ValueError("nested too deeply")


def _flattened(data: bytes) -> bytes:
    """Return the brackets that are left once the innermost pairs have been taken out a hundred times."""
    nested = data.translate(None, _ALL_BUT_BRACKETS)
    for _ in range(_DEEPEST):
        inner = len(nested)
        nested = nested.replace(b"[]", b"").replace(b"{}", b"")
        if len(nested) == inner:
            break
    return nested


def require(holds: object, what: str) -> None:
    """Raise ``ValueError`` for a field of a file that is not what its format allows."""
    if not holds:
        raise ValueError(f"{what} is not what this format allows")


def is_number(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a number, true and false left out."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_count(value: object, least: int = 0) -> TypeGuard[int]:
    """Whether a JSON value is a whole number from ``least`` to where floats no longer hold each of them."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**53


def sha256_bytes(data: bytes | memoryview) -> str:
    """Return the sha256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path | str, file: IO[bytes] | None = None) -> str:
    """Return the sha256 of a file's bytes in hexadecimal, read in blocks; ``file`` where it is open already."""
    if file is None:
        with open(path, "rb") as opened:
            return sha256_file(path, opened)
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: IO[bytes]) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def hash_json(value: object) -> str:
    """Return the sha256 of the canonical JSON of ``value``."""
    return sha256_bytes(canonical_json(value).encode("ascii"))


def row_key(content: bytes) -> bytes:
    """Return the 16-byte key of a row: blake2b-128 of its canonical content (text as UTF-8, an image file's bytes)."""
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


def differences(old: object, new: object, prefix: str = "") -> list[tuple[str, object, object]]:
    """Return ``(dotted.path, old value, new value)`` for every leaf in which two JSON values differ.

    The value of a field that only one of the two has is ``ABSENT`` in the other.
    """
    return list(_differences(old, new, prefix))


def _differences(old: object, new: object, prefix: str) -> Iterator[tuple[str, object, object]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(set(old) | set(new)):
            path = f"{prefix}.{key}" if prefix else str(key)
            yield from _differences(old.get(key, ABSENT), new.get(key, ABSENT), path)
    elif old is ABSENT or new is ABSENT or canonical_json(old) != canonical_json(new):
        yield prefix, old, new
