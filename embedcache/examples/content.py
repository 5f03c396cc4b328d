"""From a cell of the input to the canonical bytes of a row. Only ``TextContent`` knows that a row is a text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol, cast

from embedcache.examples.source import Faults, Kind, is_missing, unicode_fault


class Content(Protocol):
    """A kind of content. Another kind (image files, say) is another class here and one line in ``CONTENTS``."""

    noun: str
    """What messages call it; its column is named by ``NOUN_column`` and ``--NOUN-column``."""
    column_names: frozenset[str]
    """Lower-case column names under which this content is usually found; ``noun`` wins when several are there."""
    column_kind: Kind
    """What a column of this content holds."""

    def encode(self, column: str, values: Sequence[object]) -> tuple[list[bytes], Faults]:
        """Return the canonical bytes of every value (``b""`` for a faulty one) and the faults."""
        ...

    def show(self, content: bytes) -> str:
        """Return a short printable form for messages."""
        ...


class TextContent:
    """Text: the exact characters as UTF-8. Empty and blank texts, other types and lone surrogates are faults."""

    noun = "text"
    column_kind: Kind = "text"
    # fmt: off
    column_names = frozenset([
        "text", "sentence", "review", "content", "body", "question", "comment", "tweet", "message", "document",
        "utterance", "snippet", "query", "sms", "post",
    ])
    # fmt: on

    def encode(self, column: str, values: Sequence[object]) -> tuple[list[bytes], Faults]:
        if set(map(type, values)) == {str}:
            texts = cast("Sequence[str]", values)
            if not any(not text or text.isspace() for text in texts):
                with suppress(UnicodeEncodeError):  # which is looked for below
                    return [text.encode() for text in texts], {}
        contents: list[bytes] = []
        faults: Faults = {}
        for position, value in enumerate(values):
            fault = text_fault(column, value)
            if fault is not None:
                faults[position] = fault
            contents.append(value.encode() if fault is None and isinstance(value, str) else b"")
        return contents, faults

    def show(self, content: bytes) -> str:
        text = content.decode()
        return repr(text) if len(text) <= 40 else repr(text[:37]) + "..."


CONTENTS: dict[str, Content] = {"text": TextContent()}


def text_fault(column: str, value: object) -> str | None:
    """Return why ``value`` is not a usable text, or None when it is."""
    if is_missing(value):
        return f"{column!r} is missing"
    if not isinstance(value, str):
        return f"{column!r} holds {_short(value)} of type {type(value).__name__}, expected text"
    if not value:
        return f"{column!r} is empty"
    if value.isspace():
        return f"{column!r} is blank"
    return unicode_fault(column, value)


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
