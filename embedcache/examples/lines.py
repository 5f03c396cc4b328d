"""Files of one record a line: JSONL and plain text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from embedcache.errors import InputError
from embedcache.examples.file_source import BLOCK_BYTES, InputFile, TextSource
from embedcache.examples.source import SAMPLE_ROWS, BadRow, Block
from embedcache.fingerprint import MOST_VALUES, refuse_bombs

_BLOCK_LINES = 1 << 16
"""Lines handed on at once: a megabyte of blank lines would be a million rows, each hundreds of bytes in memory."""
_MOST_AHEAD = 64
"""Blocks of bad lines, some 64 MB, after which no JSON object is expected any more."""
_LONG = 1 << 16
"""Bytes of a line that could become much more than a line when it is parsed."""


class LinesSource(TextSource["_LineBlock"]):
    """One content a line, in a column called ``text``."""

    numbers_are_written = True

    def __init__(self, file: InputFile) -> None:
        super().__init__(file)
        self.columns = ("text",)
        first = next(self._look_ahead())
        self.sample = {"text": list(map(_text, first.lines[:SAMPLE_ROWS]))}

    def _read(self) -> Iterator[_LineBlock]:
        return _line_blocks(self.file, "lines")

    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
        for block in self._read_all():
            texts = list(map(_text, block.lines))
            yield Block([list(texts) for _ in columns], range(block.first, block.first + len(texts)), texts.__getitem__)


class JsonlSource(TextSource["_RecordBlock"]):
    """One JSON object a line. A key that occurs twice, NaN and Infinity are refused."""

    def __init__(self, file: InputFile) -> None:
        super().__init__(file)
        sample: list[dict[str, object]] = []
        bad: list[BadRow] = []
        for number, block in enumerate(self._look_ahead(), 1):
            sample += block.records[: SAMPLE_ROWS - len(sample)]
            bad += block.bad[: 1 - len(bad)]
            if len(sample) == SAMPLE_ROWS or number == _MOST_AHEAD:
                break
        if bad and not sample:
            raise InputError(f"{self.where(bad[0].line)}: {bad[0].reason}: expected one JSON object a line")
        if not sample:
            raise InputError(f"{self.name}: the file holds blank lines only")
        self.columns = tuple(dict.fromkeys(key for record in sample for key in record))
        self.sample = {column: [record.get(column) for record in sample] for column in self.columns}

    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
        for block in self._read_all():
            values = [[record.get(column) for record in block.records] for column in columns]
            yield Block(values, block.numbers, block.records.__getitem__, block.bad)

    def _read(self) -> Iterator[_RecordBlock]:
        decoder = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        scan: Callable[[str, int], tuple[object, int]] = decoder.scan_once  # type: ignore[attr-defined]
        for block in _line_blocks(self.file, "jsonl"):
            records: list[dict[str, object]] = []
            numbers: list[int] = []
            bad: list[BadRow] = []
            for number, line in enumerate(block.lines, block.first):
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
                    elif isinstance(record, dict):
                        records.append(record)
                        numbers.append(number)
                    else:
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
            if records or bad:
                yield _RecordBlock(records, numbers, bad)


class _LineBlock(NamedTuple):
    """Consecutive lines of a file, as bytes with their ends; ``first`` is the number of the first, from 1."""

    first: int
    lines: list[bytes]


class _RecordBlock(NamedTuple):
    """Consecutive JSON objects with the numbers of their lines, and the lines that are none."""

    records: list[dict[str, object]]
    numbers: list[int]
    bad: list[BadRow]


def _text(line: bytes) -> str:
    return line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "surrogateescape")


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return record


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _line_blocks(file: InputFile, format: str) -> Iterator[_LineBlock]:
    first = 1
    with file.open_text(format) as binary:
        while lines := binary.readlines(BLOCK_BYTES):
            if first == 1:
                lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
            for start in range(0, len(lines), _BLOCK_LINES):
                part = lines[start : start + _BLOCK_LINES]
                yield _LineBlock(first, part)
                first += len(part)
