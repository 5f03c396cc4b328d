"""Paths -> sources: the format of a file, by its name or as the caller says."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from embedcache.errors import InputError
from embedcache.examples.delimited import CsvSource
from embedcache.examples.file_source import InputFile, StandardInput
from embedcache.examples.lines import JsonlSource, LinesSource
from embedcache.examples.parquet import ParquetSource
from embedcache.examples.source import Source

Format = Literal["csv", "tsv", "jsonl", "lines", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)

_EXTENSIONS: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "lines",
    ".parquet": "parquet",
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


def _source(file: InputFile, format: Format, quoting: str) -> Source:
    if format == "parquet":
        return ParquetSource(file)
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
            f"{path}: cannot tell the format from the name: expected .csv, .tsv, .jsonl or .txt (each also .gz) or "
            f".parquet, or name it with --input-format{hint}"
        )
    return format
