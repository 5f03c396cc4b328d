"""CSV, TSV, JSONL and plain text, read exactly; and which source a path is, by its name or as the caller says."""

from __future__ import annotations

import csv
import io
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal, NamedTuple, get_args

from embedcache.errors import InputError
from embedcache.examples.folders import FolderSource, TarSource, metadata_of, split_folders
from embedcache.examples.parquet import ParquetSource
from embedcache.examples.source import (
    BLOCK_BYTES,
    BLOCK_ROWS,
    LONGEST,
    SAMPLE_ROWS,
    BadRow,
    Block,
    InputFile,
    Source,
    StandardInput,
    TextSource,
    unique_columns,
)
from embedcache.fingerprint import MOST_VALUES, refuse_bombs

# CSV and TSV, read exactly.


_MOST_BLOCKS = LONGEST // BLOCK_BYTES + 2
_UNCLOSED = 'a quote is opened and not closed: write a quote inside a quoted cell twice ("")'
_CSV_REFUSES_NUL = sys.version_info < (3, 11)
_NUL_STAND_IN = "\ud800"  # cannot come out of decoding UTF-8, and not one of surrogateescape's either
_csv_lock = threading.Lock()


class _Lines:
    """Lines of a text file, a block at a time, remembering the block for messages."""

    def __init__(self, name: str, text: IO[str]) -> None:
        self._name, self._text = name, text
        self.row = 1
        self._block: list[str] = []
        self._before = 0
        self.blocks = self.finished = 0

    def __iter__(self) -> Iterator[str]:
        while block := self._text.readlines(BLOCK_BYTES):
            if not self.blocks and block[0].startswith("\ufeff"):
                block[0] = block[0][1:]
            if _CSV_REFUSES_NUL:
                block = [line.replace("\0", _NUL_STAND_IN) for line in block]
            self._before += len(self._block)
            self._block = block
            self.blocks += 1
            if self.blocks - self.finished > _MOST_BLOCKS:
                raise InputError(f"{self._name}:{self.row}: a row is longer than {LONGEST:,} characters: {_UNCLOSED}")
            yield from block

    def between(self, first: int, last: int) -> str:
        """Return the lines ``first`` to ``last``, counted from 1, as far as they are still at hand."""
        return "".join(self._block[max(0, first - 1 - self._before) : last - self._before])


class _RowBlock(NamedTuple):
    """Consecutive rows with the numbers of the lines they start at, and what could not be read as a row."""

    rows: list[list[str]]
    lines: list[int]
    bad: list[BadRow]


class CsvSource(TextSource[_RowBlock]):
    """CSV or TSV with a header, as RFC 4180 has it; a cell that breaks the quoting rules is a bad row, not a guess."""

    numbers_are_written = True

    def __init__(self, file: InputFile, format: Literal["csv", "tsv"], quoting: str) -> None:
        super().__init__(file)
        self._format = format
        self._quoting: Literal[0, 3] = csv.QUOTE_NONE if quoting == "none" else csv.QUOTE_MINIMAL
        header, rows = self._first_rows()
        for column in header:
            if any("\ud800" <= character <= "\udfff" for character in column):
                raise InputError(f"{self.name}:1: the header is not UTF-8: save the file as UTF-8")
        self.columns = unique_columns(self.name, header)
        full = [row for row in rows if len(row) == len(header)]
        self.sample = {column: [row[place] for row in full] for place, column in enumerate(header)}

    def _first_rows(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and some rows, which may be none where only bad rows follow the header."""
        first: list[list[str]] = []
        for rows, _, bad in self._look_ahead():
            first += rows[: SAMPLE_ROWS + 1]
            if not first:
                raise InputError(f"{self.name}:{bad[0].line}: cannot read the header: {bad[0].reason}")
            if len(first) > 1 or bad:
                return first[0], first[1:]
        raise InputError(
            f"{self.name}: {'there is a header but no rows' if first else 'the file holds blank lines only'}"
        )

    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
        places = [self.columns.index(column) for column in columns]
        width = len(self.columns)
        header = True
        for rows, lines, bad in self._read_all():
            if set(map(len, rows)) != {width}:
                for line, row in zip(lines, rows, strict=True):
                    if len(row) != width:
                        held = "1 field" if len(row) == 1 else f"{len(row)} fields"
                        bad.append(BadRow(line, f"{held}, expected {width} ({', '.join(self.columns)})", row))
                lines = [line for line, row in zip(lines, rows, strict=True) if len(row) == width]
                rows = [row for row in rows if len(row) == width]
            if header and rows:
                header = False
                rows, lines = rows[1:], lines[1:]
            yield Block([[row[place] for row in rows] for place in places], lines, rows.__getitem__, bad)

    def _read(self) -> Iterator[_RowBlock]:
        with self.file.open_text(self._format) as binary:
            text = io.TextIOWrapper(binary, "utf-8", errors="surrogateescape", newline="")
            lines = _Lines(self.name, text)
            delimiter = "," if self._format == "csv" else "\t"
            reader = csv.reader(lines, delimiter=delimiter, quoting=self._quoting, strict=True)
            more = True
            end = 0
            while more:
                rows: list[list[str]] = []
                starts: list[int] = []
                bad: list[BadRow] = []
                lines.finished = stop = max(lines.blocks, 1)
                lines.row = end + 1
                with _large_cells():
                    try:
                        more = False
                        for row in reader:
                            if row:  # a blank line is not a row
                                rows.append(row)
                                starts.append(end + 1)
                            end = reader.line_num
                            if lines.blocks > stop or len(rows) == BLOCK_ROWS:
                                more = True
                                break
                    except csv.Error as error:
                        if "field limit" in str(error):  # nothing that follows can be believed to be rows
                            raise InputError(f"{self.name}:{end + 1}: {self._explain(str(error))}") from None
                        more = True
                        bad.append(BadRow(end + 1, self._explain(str(error)), lines.between(end + 1, reader.line_num)))
                        end = reader.line_num
                if _CSV_REFUSES_NUL:
                    rows = [[cell.replace(_NUL_STAND_IN, "\0") for cell in row] for row in rows]
                if rows or bad:
                    yield _RowBlock(rows, starts, bad)

    def _explain(self, error: str) -> str:
        if "unexpected end of data" in error or "field limit" in error:
            return _UNCLOSED
        if "expected after" in error:
            return 'text after a closing quote: write a quote inside a quoted cell twice (""), or pass --quoting none'
        return error


@contextmanager
def _large_cells() -> Iterator[None]:
    # The limit belongs to the whole process: lift it only while our own reader runs, then put the caller's back.
    with _csv_lock:
        before = csv.field_size_limit(LONGEST)
        try:
            yield
        finally:
            csv.field_size_limit(before)


# Files of one record a line: JSONL and plain text.


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


Format = Literal["csv", "tsv", "jsonl", "lines", "parquet", "tar"]
FORMATS: tuple[Format, ...] = get_args(Format)

_EXTENSIONS: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "lines",
    ".parquet": "parquet",
    ".tar": "tar",
}


def open_path(path: str, format: Format | None, quoting: str) -> Source:
    """Return the source for a file, or for standard input when ``path`` is ``-``.

    The format comes from the extension unless it is given; standard input is plain lines unless said otherwise.
    ``quoting`` is ``minimal`` or ``none``. Raises ``InputError`` when it cannot be read, ``MissingExtraError`` for
    Parquet without pyarrow.
    """
    if path == "-":
        return _source(StandardInput(), format or "lines", quoting)
    return _source(InputFile(Path(path)), format or _format_of(Path(path)), quoting)


def open_folder(path: Path) -> list[tuple[str | None, Source]]:
    """Return the sources of a folder of pictures, each with the split that it is for.

    A folder with a table of its pictures (``metadata.csv``) is that table, and so are folders of splits with one each.
    """
    splits = split_folders(path)
    tables = {split: table for split, folder in splits.items() if (table := metadata_of(folder)) is not None}
    whole = metadata_of(path)
    if whole is None and (not splits or len(tables) < len(splits)):
        return [(None, FolderSource(path))]
    opened: list[tuple[str | None, Source]] = []
    for split, table in [(None, whole)] if whole is not None else tables.items():
        source = open_path(str(table), None, "minimal")
        source.content_kind = "image"
        opened.append((split, source))
    return opened


def _source(file: InputFile, format: Format, quoting: str) -> Source:
    if format == "parquet":
        return ParquetSource(file)
    if format == "tar":
        return TarSource(file)
    if format == "jsonl":
        return JsonlSource(file)
    if format == "lines":
        return LinesSource(file)
    return CsvSource(file, format, quoting)


def _format_of(path: Path) -> Format:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] == ".gz"
    suffix = (suffixes[:-1] if packed else suffixes)[-1:]
    format = _EXTENSIONS.get(suffix[0]) if suffix else None
    if format is None or (packed and format == "parquet"):
        hint = "; a JSON array must be rewritten with one object a line" if suffix == [".json"] else ""
        raise InputError(
            f"{path}: cannot tell the format from the name: expected .csv, .tsv, .jsonl or .txt (each also .gz), "
            f".parquet or .tar, or name it with --input-format{hint}"
        )
    return format
