"""Paths -> sources: the format of a file, by its name or as the caller says."""

from __future__ import annotations

from pathlib import Path

from embedcache.errors import InputError, SpecError
from embedcache.examples.delimited import CsvSource
from embedcache.examples.lines import JsonlSource, LinesSource
from embedcache.examples.parquet import ParquetSource
from embedcache.examples.source import Source
from embedcache.examples.stored import SpooledFile, StoredFile, refuse_foreign

FORMATS = ("csv", "tsv", "jsonl", "lines", "parquet")

_EXTENSIONS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "lines",
    ".parquet": "parquet",
}


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
        return _open(SpooledFile(), format or "lines", quoting)
    file = StoredFile(Path(path))
    return _open(file, format or _format_of(file.path), quoting)


def _open(file: StoredFile, format: str, quoting: str) -> Source:
    if format == "parquet":
        return ParquetSource(file)
    refuse_foreign(file, format)
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
            f".parquet, or name it with --input-format{hint}"
        )
    return format
