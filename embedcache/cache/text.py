"""The text of a manifest: the one form in which it stands on disk, and the canonical JSON that it is hashed by.

Both are what ``json.dumps`` gives. That takes seconds for 100,000 shards, whose entries are alike, and so each entry is
put together from parts, with the text of what ran it made once. For the same reason entries are read by their form
(``found``); where a single one deviates, the whole is read as JSON, which tells what is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from itertools import islice
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, NamedTuple

from embedcache.fingerprint import strict_json

SHARDS, HASH = "shards", "manifest_hash"
_AT_ONCE = 1000
"""Entries that are joined before they are compared or hashed."""


class Text(NamedTuple):
    """A part of a manifest: ``shown`` as it stands on disk, ``canonical`` as it is hashed."""

    shown: str
    canonical: str


def entry_text(entry: object) -> Text:
    """Return the text of a shard's entry, without what is around it."""
    if isinstance(entry, Mapping) and len(entry) == 5 and entry.keys() == _KEYS:
        size, name, provenance, rows, digest = (entry[key] for key in _KEYS)
        if type(size) is type(rows) is int and type(name) is type(digest) is str and isinstance(provenance, Mapping):
            ran, name, digest = _provenance_text(provenance), quoted(name), quoted(digest)
            return Text(
                f'  {{\n   "bytes": {size},\n   "name": {name},\n   "provenance": {ran.shown},\n   "rows": {rows},\n'
                f'   "sha256": {digest}\n  }}',
                f'{{"bytes":{size},"name":{name},"provenance":{ran.canonical},"rows":{rows},"sha256":{digest}}}',
            )
    return Text(_dumps([[entry]], 1)[len("[\n [\n") : -len("\n ]\n]")], _dumps(entry))


_KEYS = dict.fromkeys(("bytes", "name", "provenance", "rows", "sha256")).keys()


def _provenance_text(provenance: Mapping[str, object]) -> Text:
    """Return the text of what ran a shard; that of its neighbour is equal, and asking is quicker than encoding."""
    global _last
    known, text = _last
    if provenance == known:
        return text
    text = _text_of(provenance)
    # What equals texts and null is alike; 1 equals 1.0 and True, which are written otherwise.
    if all(value is None or type(value) is str for value in provenance.values()):
        _last = provenance, text
    return text


def _text_of(provenance: Mapping[str, object]) -> Text:
    nested = _dumps([[[provenance]]], 1)
    return Text(nested[len("[\n [\n  [\n   ") : -len("\n  ]\n ]\n]")], _dumps(provenance))


def _dumps(value: object, indent: int | None = None) -> str:
    separators = (",", ":") if indent is None else None
    return json.dumps(
        value, indent=indent, separators=separators, sort_keys=True, ensure_ascii=True, allow_nan=False
    )  # fmt: skip


_last: tuple[Mapping[str, object], Text] = ({}, _text_of({}))


def parts(body: Mapping[str, object], entries: Iterable[Text] | None = None) -> Iterator[Text]:
    """Yield the text of a manifest, part by part; its own hash is not a part of what is canonical.

    ``entries`` are the texts of its shards, None to make them of ``body``.
    """
    shown, canonical = "{\n", "{"
    for name in sorted(body):
        value = body[name]
        if name == SHARDS and isinstance(value, (list, tuple)) and value:
            yield Text(f'{shown} "{SHARDS}": [\n', f'{canonical}"{SHARDS}":[')
            yield from _joined(iter(map(entry_text, value) if entries is None else entries))
            yield Text("\n ]", "]")
        else:
            member = _dumps({name: value})[1:-1] if name != HASH else None
            yield Text(shown + _dumps({name: value}, 1)[2:-2], "" if member is None else canonical + member)
        shown, canonical = ",\n", canonical if name == HASH else ","
    yield Text("\n}\n", "}")


def _joined(entries: Iterator[Text]) -> Iterator[Text]:
    shown = canonical = ""
    while block := list(islice(entries, _AT_ONCE)):
        yield Text(
            shown + ",\n".join(entry.shown for entry in block),
            canonical + ",".join(entry.canonical for entry in block),
        )
        shown, canonical = ",\n", ","


def hash_of(body: Iterable[Text]) -> str:
    """Return the hash of a manifest's text: that of ``hash_json`` of all but the hash."""
    digest = sha256()
    for part in body:
        digest.update(part.canonical.encode("ascii"))
    return digest.hexdigest()


def reads_as(data: bytes, body: Iterable[Text]) -> tuple[bool, str]:
    """Return whether ``data`` is a manifest's text to the byte, and the hash of that."""
    digest, position, same = sha256(), 0, True
    for part in body:
        shown = part.shown.encode("ascii")
        same = same and data.startswith(shown, position)
        position += len(shown)
        digest.update(part.canonical.encode("ascii"))
    return same and position == len(data), digest.hexdigest()


class Found(NamedTuple):
    """A manifest read by the form of its shards: each as (bytes, name, provenance, rows, sha256).

    ``rest`` is the manifest as it would be without shards, ``canonical`` the text of the shards as it is hashed.
    """

    shards: list[tuple[int, str, Mapping[str, object], int, str]]
    rest: str
    canonical: str

    def hash(self, body: Mapping[str, object]) -> str:
        """Return the hash of the whole, given what is in ``rest``."""
        return hash_of(parts({**body, SHARDS: self.shards}, [Text("", self.canonical)]))


_START, _END = f'\n "{SHARDS}": [\n', "\n ]"
_ENTRY = re.compile(
    r'  \{\n   "bytes": ([1-9][0-9]{0,15}),\n   "name": "([0-9a-f.h-]*)",\n'
    r'   "provenance": (\{\}|\{\n(?:    .*\n)*   \}),\n'
    r'   "rows": ([1-9][0-9]{0,15}),\n   "sha256": "([0-9a-f]*)"\n  \}(?:,\n|$)'
)
# What an entry has around its five values and with the comma behind it; of these, four characters are in the sample.
_AROUND = len(",\n") + len(entry_text({"bytes": 1, "name": "", "provenance": {}, "rows": 1, "sha256": ""}).shown) - 4


def found(text: str) -> Found | None:
    """Return what a manifest's text says of its shards; None unless every entry has the one form to the last byte.

    Raises ``ValueError`` for what ran a shard that is not JSON.
    """
    start = text.find(_START) + len(_START)
    end = text.find(_END, start)
    if start < len(_START) or end < 0:
        return None
    entries = _ENTRY.findall(text, start, end)
    # The last has no comma. Where something else stands between two entries, they are shorter than the whole.
    length = sum(map(len, [part for entry in entries for part in entry])) + len(entries) * _AROUND - len(",\n")
    if length != end - start:
        return None
    known: dict[str, tuple[Any, str]] = {}
    shards, canonical = [], []
    for size, name, ran, rows, digest in entries:
        if ran not in known:
            provenance = strict_json(ran)
            shown, hashed = _text_of(provenance)
            if shown != ran:
                return None
            known[ran] = provenance, hashed
        provenance, hashed = known[ran]
        shards.append((int(size), name, provenance, int(rows), digest))
        canonical.append(f'{{"bytes":{size},"name":"{name}","provenance":{hashed},"rows":{rows},"sha256":"{digest}"}}')
    return Found(shards, f"{text[: start - 1]}{text[end + 2 :]}", ",".join(canonical))
