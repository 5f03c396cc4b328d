"""Files of one record a line: JSONL and plain text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from embedcache.errors import InputError
from embedcache.examples.source import SAMPLE_ROWS, BadRow, Block, Kind, kind_of
from embedcache.examples.stored import BLOCK_BYTES, FileSource, StoredFile
from embedcache.fingerprint import MOST_VALUES, refuse_bombs

_BLOCK_LINES = 1 << 16
"""Lines handed on at once: a megabyte of blank lines would be a million rows, each hundreds of bytes in memory."""
_LONG = 1 << 16
"""Bytes of a line that could become much more than a line when it is parsed."""


class LinesSource(FileSource):
    """One text a line, in a column called ``text``."""

    def __init__(self, file: StoredFile) -> None:
        super().__init__(file)
        self.columns = ("text",)
        self.sample = {"text": next(self.blocks(("text",))).values[0][:SAMPLE_ROWS]}

    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
        for first, lines in _line_blocks(self.file):
            texts = [line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "surrogateescape") for line in lines]
            yield Block([texts for _ in columns], range(first, first + len(texts)), texts.__getitem__)


class JsonlSource(FileSource):
    """One JSON object a line. A key that occurs twice, NaN and Infinity are refused."""

    def __init__(self, file: StoredFile) -> None:
        super().__init__(file)
        records: list[dict[str, Any]] = []
        first_bad: BadRow | None = None
        for block, _, bad in self._read():
            records += block[: SAMPLE_ROWS - len(records)]
            first_bad = first_bad or (bad[0] if bad else None)
            if len(records) == SAMPLE_ROWS:
                break
        if not records:
            if first_bad is not None:
                raise InputError(f"{self.where(first_bad.line)}: {first_bad.reason}: expected one JSON object a line")
            raise InputError(f"{self.name}: the file holds blank lines only")
        self.columns = tuple(dict.fromkeys(key for record in records for key in record))
        self.sample = {column: [record.get(column) for record in records] for column in self.columns}

    def kind(self, column: str) -> Kind:
        return kind_of(self.sample[column], numbers_in_text=False)

    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
        for records, lines, bad in self._read():
            values = [[record.get(column) for record in records] for column in columns]
            yield Block(values, lines, records.__getitem__, bad)

    def _read(self) -> Iterator[tuple[list[dict[str, Any]], list[int], list[BadRow]]]:
        decoder: Any = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        scan = decoder.scan_once
        for first, lines in _line_blocks(self.file):
            records: list[dict[str, Any]] = []
            numbers: list[int] = []
            bad: list[BadRow] = []
            for number, line in enumerate(lines, first):
                reason = ""
                try:
                    text = line.decode().strip(" \t\r\n")
                    if not text:
                        continue
                    if len(line) > _LONG:
                        refuse_bombs(line, MOST_VALUES)
                    record, end = scan(text, 0)
                    if end != len(text):
                        reason = f"invalid JSON: something follows the object at character {end + 1}"
                    elif type(record) is not dict:
                        reason = f"a JSON {type(record).__name__}, expected an object"
                except UnicodeDecodeError as error:
                    reason = f"undecodable byte 0x{line[error.start]:02x} at byte {error.start + 1}, expected UTF-8"
                except StopIteration as error:
                    reason = f"invalid JSON: nothing readable at character {error.value + 1}"
                except RecursionError:
                    reason = "invalid JSON: nested too deeply"
                except ValueError as error:
                    reason = f"invalid JSON: {str(error).split(': line 1')[0]}"
                if reason:
                    bad.append(BadRow(number, reason, line.decode("utf-8", "surrogateescape")))
                else:
                    records.append(record)
                    numbers.append(number)
            yield records, numbers, bad


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return record


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _line_blocks(file: StoredFile) -> Iterator[tuple[int, list[bytes]]]:
    first = 1
    with file.open() as binary:
        while lines := binary.readlines(BLOCK_BYTES):
            if first == 1:
                lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
            for start in range(0, len(lines), _BLOCK_LINES):
                part = lines[start : start + _BLOCK_LINES]
                yield first, part
                first += len(part)
