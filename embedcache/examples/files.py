"""Files as sources: CSV, TSV, JSONL and plain lines (each also gzipped) and Parquet, read in blocks of records."""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import re
import shutil
import stat
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Protocol, cast

from embedcache.errors import EmbedcacheError, InputError, InputNotFoundError, MissingExtraError, SpecError
from embedcache.examples.content import is_missing

Kind = Literal["text", "number", "other"]
FORMATS = ("csv", "tsv", "jsonl", "lines", "parquet")

BLOCK_ROWS = 4096
SAMPLE_ROWS = 100
_BLOCK_BYTES = 1 << 20
_FIELD_LIMIT = 1 << 26  # bounds what an unclosed quote can swallow, far above any real cell
_CSV_REFUSES_NUL = sys.version_info < (3, 11)
_NUL_STAND_IN = "\ud800"  # cannot come out of decoding UTF-8, and not one of surrogateescape's either
_EXTENSIONS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "lines",
    ".parquet": "parquet",
}
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
_csv_lock = threading.Lock()


class BadRow(NamedTuple):
    """A row that cannot be used: its line (or row number), why, and what it held."""

    line: int
    reason: str
    raw: Any


@dataclass
class Block:
    """Some consecutive records: one list of cells per column asked for, and what could not be read as a record."""

    values: list[list[Any]]
    lines: Sequence[int]
    raw: Callable[[int], Any]
    bad: list[BadRow] = field(default_factory=list)


class Source(Protocol):
    """Something that gives the same records every time it is read."""

    name: str
    columns: tuple[str, ...]
    sample: dict[str, list[Any]]
    """The first cells of every column, to guess from."""

    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
        """Read everything from the start."""
        ...

    def where(self, line: int) -> str:
        """Return the place of a record for a message: ``file:line``."""
        ...

    def kind(self, column: str) -> Kind:
        """Return what the column seems to hold."""
        ...

    def not_text(self, column: str) -> str | None:
        """Return the declared type of a column that cannot hold text, None when it can or nothing is declared."""
        ...

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Return the class names that the source declares for the column, in their order."""
        ...


def open_file(path: str | Path, format: str | None = None, quoting: str = "minimal") -> Source:
    """Return the source for a file, or for standard input when ``path`` is ``-``.

    The format comes from the extension, or from ``format`` (one of ``FORMATS``); standard input is plain lines unless
    said otherwise. Raises ``InputError`` when it cannot be read, ``MissingExtraError`` for Parquet without pyarrow.
    """
    if format is not None and format not in FORMATS:
        raise SpecError(f"unknown format {format!r}: expected one of {', '.join(FORMATS)}")
    if quoting not in ("minimal", "none"):
        raise SpecError(f"unknown quoting {quoting!r}: expected minimal or none")
    if str(path) == "-":
        return _open(_Spooled(), format or "lines", quoting)
    file = _Stored(Path(path))
    return _open(file, format or _format_of(file.path), quoting)


def _open(file: _Stored | _Spooled, format: str, quoting: str) -> Source:
    if format == "parquet":
        return ParquetSource(file)
    _refuse_foreign(file, format)
    if format == "jsonl":
        return JsonlSource(file)
    if format == "lines":
        return LinesSource(file)
    return CsvSource(file, "," if format == "csv" else "\t", quoting)


def _format_of(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] == ".gz"
    suffix = (suffixes[:-1] if packed else suffixes)[-1:]
    format = _EXTENSIONS.get(suffix[0]) if suffix else None
    if format is None or (packed and format == "parquet"):
        hint = "; a JSON array must be rewritten with one object a line" if suffix == [".json"] else ""
        raise InputError(
            f"{path}: cannot tell the format from the name: expected .csv, .tsv, .jsonl or .txt (each also .gz) or "
            f".parquet, or name it with --format{hint}"
        )
    return format


class _Stored:
    """A regular file, gzipped or not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            raise InputNotFoundError(f"{path}: no such file") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read: {_reason(error)}") from None
        if stat.S_ISDIR(mode):
            raise InputError(f"{path}: is a directory: expected a file")
        if not stat.S_ISREG(mode):
            raise InputError(f"{path}: is not a regular file, and the input is read twice: save it to a file first, or pass -")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty")

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open for reading bytes; whatever goes wrong while the file is read becomes one ``InputError``."""
        try:
            with open(self.path, "rb") as file:
                if self.path.suffix.lower() == ".gz":
                    with gzip.GzipFile(fileobj=file) as unpacked, io.BufferedReader(cast(Any, unpacked), 1 << 16) as buffered:
                        yield buffered
                else:
                    yield file
        except EmbedcacheError:
            raise
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{self.name}: broken gzip file: {_reason(error)}") from None
        except OSError as error:
            raise InputError(f"{self.name}: cannot be read: {_reason(error)}") from None


class _Spooled(_Stored):
    """Standard input, copied to a temporary file because contents are read again later."""

    def __init__(self) -> None:
        self._spool = tempfile.NamedTemporaryFile(prefix="embedcache-stdin-")  # noqa: SIM115 - lives as long as the source
        shutil.copyfileobj(sys.stdin.buffer, self._spool)
        self._spool.flush()
        try:
            super().__init__(Path(self._spool.name))
        except InputError:
            raise InputError("standard input is empty") from None
        self.name = "<stdin>"


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _refuse_foreign(file: _Stored, format: str) -> None:
    with file.open() as binary:
        start = binary.read(8)
    if not start:
        raise InputError(f"{file.name}: the file is empty")
    for magic, what in (
        (b"\x1f\x8b", "a gzip file: add .gz to its name"),
        (b"PK\x03\x04", "a zip or spreadsheet file: export it as CSV"),
        (b"PAR1", "a Parquet file: name it .parquet"),
        (b"\x89HDF", "an HDF5 file"),
        (b"\xff\xfe", "UTF-16 text: save it as UTF-8"),
        (b"\xfe\xff", "UTF-16 text: save it as UTF-8"),
    ):
        if start.startswith(magic):
            raise InputError(f"{file.name}: expected {format} in UTF-8, but this is {what}")


def unique_columns(name: str, columns: Sequence[str]) -> tuple[str, ...]:
    """Return the columns as a tuple. Raises ``InputError`` when one occurs twice."""
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise InputError(f"{name}: the column {', '.join(map(repr, twice))} occurs more than once: rename one of them")
    return tuple(columns)


def kind_of(values: Sequence[Any], numbers_in_text: bool) -> Kind:
    """Return what a column holds, going by some of its values."""
    present = [value for value in values if not is_missing(value)]
    if any(not isinstance(value, (str, int, float)) for value in present):
        return "other"
    if any(not isinstance(value, str) for value in present):
        return "number"
    written = [value for value in present if value.strip()]
    if numbers_in_text and written and all(_NUMBER.fullmatch(value) for value in written):
        return "number"
    return "text"


class _FileSource:
    """What the sources of text files share."""

    columns: tuple[str, ...]
    sample: dict[str, list[Any]]

    def __init__(self, file: _Stored) -> None:
        self._file = file
        self.name = file.name

    @property
    def path(self) -> Path:
        """The file that is read."""
        return self._file.path

    def where(self, line: int) -> str:
        return f"{self.name}:{line}"

    def kind(self, column: str) -> Kind:
        return kind_of(self.sample[column], numbers_in_text=True)

    def not_text(self, column: str) -> str | None:
        return None

    def class_names(self, column: str) -> tuple[str, ...] | None:
        return None


class _Lines:
    """Lines of a text file, a block at a time, remembering the block for messages."""

    def __init__(self, text: IO[str]) -> None:
        self._text = text
        self._block: list[str] = []
        self._before = 0
        self.blocks = 0

    def __iter__(self) -> Iterator[str]:
        while block := self._text.readlines(_BLOCK_BYTES):
            if not self.blocks and block[0].startswith("\ufeff"):
                block[0] = block[0][1:]
            if _CSV_REFUSES_NUL:
                block = [line.replace("\0", _NUL_STAND_IN) for line in block]
            self._before += len(self._block)
            self._block = block
            self.blocks += 1
            yield from block

    def between(self, first: int, last: int) -> str:
        """Return the lines ``first`` to ``last``, counted from 1, as far as they are still at hand."""
        return "".join(self._block[max(0, first - 1 - self._before) : last - self._before])


class CsvSource(_FileSource):
    """CSV or TSV with a header, as RFC 4180 has it; a cell that breaks the quoting rules is a bad row, not a guess."""

    def __init__(self, file: _Stored, delimiter: str, quoting: str) -> None:
        super().__init__(file)
        self._delimiter = delimiter
        self._quoting = csv.QUOTE_NONE if quoting == "none" else csv.QUOTE_MINIMAL
        header, rows = self._start()
        for column in header:
            if any("\ud800" <= character <= "\udfff" for character in column):
                raise InputError(f"{self.name}:1: the header is not UTF-8: save the file as UTF-8")
        self.columns = unique_columns(self.name, header)
        if not rows:
            raise InputError(f"{self.name}: there is a header but no rows")
        full = [row for row in rows if len(row) == len(header)]
        self.sample = {column: [row[place] for row in full] for place, column in enumerate(header)}

    def _start(self) -> tuple[list[str], list[list[str]]]:
        written: list[list[str]] = []
        for rows, _, bad in self._read():
            written += [row for row in rows if row][: SAMPLE_ROWS + 1]
            if bad and not written:
                raise InputError(f"{self.name}:{bad[0].line}: cannot read the header: {bad[0].reason}")
            written += [[row.raw] for row in bad]  # a row, though not a good one
            if len(written) > 1:
                break
        if not written:
            raise InputError(f"{self.name}: the file holds blank lines only")
        return written[0], written[1:]

    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
        places = [self.columns.index(column) for column in columns]
        width = len(self.columns)
        header = True
        for rows, lines, bad in self._read():
            if set(map(len, rows)) != {width}:
                good = []
                for position, row in enumerate(rows):
                    if len(row) == width:
                        good.append(position)
                    elif row:  # a blank line is no row
                        reason = f"{len(row)} field{'s' * (len(row) != 1)}, expected {width} ({', '.join(self.columns)})"
                        bad.append(BadRow(lines[position], reason, row))
                rows, lines = [rows[position] for position in good], [lines[position] for position in good]
            if header and rows:
                header = False
                rows, lines = rows[1:], lines[1:]
            yield Block([[row[place] for row in rows] for place in places], lines, rows.__getitem__, bad)

    def _read(self) -> Iterator[tuple[list[list[str]], list[int], list[BadRow]]]:
        with self._file.open() as binary:
            text = io.TextIOWrapper(cast(Any, binary), "utf-8", errors="surrogateescape", newline="")
            lines = _Lines(text)
            reader = csv.reader(lines, delimiter=self._delimiter, quoting=self._quoting, strict=True)
            more = True
            end = 0
            while more:
                rows: list[list[str]] = []
                starts: list[int] = []
                bad: list[BadRow] = []
                stop = max(lines.blocks, 1)
                with _large_cells():
                    try:
                        more = False
                        for row in reader:
                            rows.append(row)
                            starts.append(end + 1)
                            end = reader.line_num
                            if lines.blocks > stop or len(rows) == BLOCK_ROWS:
                                more = True
                                break
                    except csv.Error as error:
                        more = True
                        bad.append(BadRow(end + 1, self._explain(str(error)), lines.between(end + 1, reader.line_num)))
                        end = reader.line_num
                if _CSV_REFUSES_NUL:
                    rows = [[cell.replace(_NUL_STAND_IN, "\0") for cell in row] for row in rows]
                yield rows, starts, bad

    def _explain(self, error: str) -> str:
        if "unexpected end of data" in error or "field limit" in error:
            return 'a quote is opened and not closed: write a quote inside a quoted cell twice ("")'
        if "expected after" in error:
            return 'text after a closing quote: write a quote inside a quoted cell twice (""), or pass --quoting none'
        return error


@contextmanager
def _large_cells() -> Iterator[None]:
    # The limit belongs to the whole process: lift it only while our own reader runs, then put the caller's back.
    with _csv_lock:
        before = csv.field_size_limit(_FIELD_LIMIT)
        try:
            yield
        finally:
            csv.field_size_limit(before)


class LinesSource(_FileSource):
    """One text a line, in a column called ``text``."""

    columns = ("text",)

    def __init__(self, file: _Stored) -> None:
        super().__init__(file)
        self.sample = {"text": next(self.blocks(("text",))).values[0][:SAMPLE_ROWS]}

    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
        for first, lines in _line_blocks(self._file):
            texts = [line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "surrogateescape") for line in lines]
            yield Block([texts for _ in columns], range(first, first + len(texts)), texts.__getitem__)


class JsonlSource(_FileSource):
    """One JSON object a line. A key that occurs twice, NaN and Infinity are refused."""

    def __init__(self, file: _Stored) -> None:
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
        scan = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant).scan_once
        for first, lines in _line_blocks(self._file):
            records: list[dict[str, Any]] = []
            numbers: list[int] = []
            bad: list[BadRow] = []
            for number, line in enumerate(lines, first):
                reason = ""
                try:
                    text = line.decode().strip(" \t\r\n")
                    if not text:
                        continue
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


def _line_blocks(file: _Stored) -> Iterator[tuple[int, list[bytes]]]:
    first = 1
    with file.open() as binary:
        while lines := binary.readlines(_BLOCK_BYTES):
            if first == 1:
                lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
            yield first, lines
            first += len(lines)


class ParquetSource(_FileSource):
    """A Parquet file, read a few row groups' worth of the wanted columns at a time."""

    def __init__(self, file: _Stored) -> None:
        super().__init__(file)
        try:
            self._arrow = importlib.import_module("pyarrow")
            self._parquet = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise MissingExtraError(f"reading {self.name}", "pyarrow", "parquet") from None
        with self._opened() as table:
            self._schema = table.schema_arrow
            self.columns = unique_columns(self.name, self._schema.names)
            if table.metadata.num_rows == 0:
                raise InputError(f"{self.name}: there are columns but no rows")
        first = next(self.blocks(self.columns))
        self.sample = {column: cells[:SAMPLE_ROWS] for column, cells in zip(self.columns, first.values, strict=True)}

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with self._file.open() as binary:
                yield self._parquet.ParquetFile(binary)
        except self._arrow.ArrowException as error:
            raise InputError(f"{self.name}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None

    def where(self, line: int) -> str:
        return f"{self.name}, row {line}"

    def kind(self, column: str) -> Kind:
        kind = self._schema.field(column).type
        types = self._arrow.types
        if types.is_dictionary(kind):
            kind = kind.value_type
        if types.is_string(kind) or types.is_large_string(kind) or str(kind) == "string_view":
            return "text"
        return "number" if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) else "other"

    def not_text(self, column: str) -> str | None:
        return None if self.kind(column) == "text" else str(self._schema.field(column).type)

    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
        first = 0
        with self._opened() as table:
            for batch in table.iter_batches(batch_size=BLOCK_ROWS // 4, columns=list(columns)):
                values = [self._cells(batch.column(column)) for column in columns]
                lines = range(first, first + batch.num_rows)
                yield Block(values, lines, row_of(columns, values))
                first += batch.num_rows

    def _cells(self, column: Any) -> list[Any]:
        try:
            return cast("list[Any]", column.to_pylist())
        except UnicodeDecodeError:  # Arrow does not check that its strings are UTF-8
            values = column.cast(self._arrow.large_string()).cast(self._arrow.large_binary()).to_pylist()
            return [value if value is None else value.decode("utf-8", "surrogateescape") for value in values]


def row_of(columns: Sequence[str], values: list[list[Any]]) -> Callable[[int], dict[str, Any]]:
    """Return a function that shows one record of a columnar block as a dict."""
    return lambda position: {column: cells[position] for column, cells in zip(columns, values, strict=True)}
