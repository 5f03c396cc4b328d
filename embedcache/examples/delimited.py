"""CSV and TSV, read exactly."""

from __future__ import annotations

import csv
import io
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Literal, NamedTuple

from embedcache.errors import InputError
from embedcache.examples.file_source import BLOCK_BYTES, LONGEST, InputFile, TextSource
from embedcache.examples.source import BLOCK_ROWS, SAMPLE_ROWS, BadRow, Block, unique_columns

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
