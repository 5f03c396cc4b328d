"""From a cell of the input to the canonical bytes of a row. Only these classes know what a row is."""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from embedcache import pictures
from embedcache.dataset import Contents, InFiles
from embedcache.errors import InputError, PictureError
from embedcache.examples.packing import MOST_HELD, Packing, encoded_ids
from embedcache.examples.source import Faults, Kind, Parsed, Source, is_missing, parsed, unicode_fault
from embedcache.fingerprint import KEY_BYTES, row_key
from embedcache.spec import PixelRange

PICTURE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm",
    ".pbm", ".pnm", ".jp2", ".j2k", ".avif",
)  # fmt: skip
"""How the names of files end that may be pictures."""
_PREVIEW, _SIDE = 2000, 96
"""Characters of a text and pixels of a picture's longer side, as a report shows them."""
_MOST_BYTES = 512 << 20
"""A picture of 64 megapixels with 16 bits a channel has 384 MB when nothing is compressed."""


class Content(ABC):
    """A kind of content. Another kind is another class here and one line in ``CONTENTS``."""

    noun: str
    """What messages call it; its column is named by ``NOUN_column`` and ``--NOUN-column``."""
    column_names: frozenset[str]
    """Lower-case column names under which this content is usually found; ``noun`` wins when several are there."""
    column_kind: Kind
    """What a column of this content holds."""
    one: str
    """What a string in place of a list is called, as it could be taken for a list."""
    stacked: tuple[int, ...] = ()
    """The dimensions of an array whose first is the rows, where a row is an array itself."""
    guessed = True
    """Whether a column is taken for this content where nobody named the kind."""
    unit: str | None = None
    """What a progress bar counts while rows are read; None where that takes no time."""
    window = 2048
    """Rows that are held, prepared and batched together: enough to fill batches, few enough to stay small in memory."""

    def accepts(self, declared: Kind) -> bool:
        """Whether a column that a source declares to be of a kind may hold this content."""
        return declared == self.column_kind

    def claims(self, name: str, kind: Kind, cells: Sequence[object]) -> bool:
        """Whether a column is taken for this content: going by its name, what it holds, and its first cells."""
        return name.strip().lower() in self.column_names

    def holds(self, kind: Kind, cells: Sequence[object]) -> bool:
        """Whether a column may be this content whatever its name is, where there is only one that may."""
        return kind == self.column_kind

    def encode_all(self, values: Sequence[object], name: Callable[[int], str]) -> list[bytes]:
        """Return the canonical bytes of every value. Raises ``InputError`` that names the first faulty one."""
        contents, faults = self.encode(self.noun, values)
        if faults:
            row = min(faults)
            raise InputError(f"{name(row)}: {faults[row]}")
        return contents

    def preview(self, content: bytes) -> tuple[str | None, bytes | None]:
        """Return what a report shows of a content: a text, or a small picture as a PNG; by default neither."""
        return None, None

    @abstractmethod
    def encode(self, column: str, values: Sequence[object]) -> tuple[list[bytes], Faults]:
        """Return the canonical bytes of every value (``b""`` for a faulty one) and the faults."""

    @abstractmethod
    def show(self, content: bytes) -> str:
        """Return a short printable form for messages."""

    def collector(self, column: str, allow_outside: bool) -> ContentCollector:
        """Return what collects the contents of an input. ``allow_outside`` is for contents that name files."""
        return ContentCollector(self, column)


class ContentCollector:
    """Collects the contents of the usable rows of an input, and their keys."""

    def __init__(self, content: Content, column: str) -> None:
        self.keys = bytearray()
        """The row keys, ``KEY_BYTES`` each, one after the other."""
        self.done: Callable[[int], object] | None = None
        """What is told of each cell that is read, where reading takes time."""
        self._content, self._column = content, column
        self._packing = Packing(MOST_HELD)

    def parse(self, values: Sequence[object], source: Source) -> Parsed:
        """Judge the cells of one block."""
        contents, faults = self._content.encode(self._column, values)
        return parsed(contents, faults, self._append)

    def _append(self, contents: Sequence[bytes]) -> None:
        self._packing.append(contents)
        # ``fingerprint.row_key`` of each, without a Python call a row: half of the cost of a pass. A test holds that.
        self.keys += b"".join([blake2b(content, digest_size=KEY_BYTES).digest() for content in contents])

    def finish(self) -> Contents:
        """Return all contents; nothing is to be added afterwards."""
        return self._packing.finish()

    def show(self, contents: Contents, row: int) -> str:
        """Return a short printable form of a row of what ``finish`` gave."""
        return self._content.show(contents[row])


class TextContent(Content):
    """Text: the exact characters as UTF-8. Empty and blank texts, other types and lone surrogates are faults."""

    noun, one = "text", "string"
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

    def preview(self, content: bytes) -> tuple[str | None, bytes | None]:
        return content.decode("utf-8", "replace")[:_PREVIEW], None

    def show(self, content: bytes) -> str:
        text = content.decode()
        return repr(text) if len(text) <= 40 else repr(text[:37]) + "..."


class ImageContent(Content):
    """Pictures: the bytes of their files, or pixels as a PPM. What cannot be decoded is a fault.

    A cell is a path, an image file's bytes, both as ``{"bytes", "path"}``, a PIL image, or an array of uint8. With a
    ``pixel_range``, floating-point and 32-bit integer pixels are no fault.
    """

    def __init__(self, pixel_range: PixelRange | None = None) -> None:
        self._range = pixel_range

    noun, one = "image", "path"
    stacked = (3, 4)
    unit = " pictures"
    window = 256
    column_kind: Kind = "image"
    column_names = frozenset(["image", "img", "picture", "photo", "file_name", "filename", "path", "image_path"])

    def accepts(self, declared: Kind) -> bool:
        return declared != "number"

    def claims(self, name: str, kind: Kind, cells: Sequence[object]) -> bool:
        return kind == "image" or (super().claims(name, kind, cells) and self.holds(kind, cells))

    def holds(self, kind: Kind, cells: Sequence[object]) -> bool:
        return kind == "image" or (kind != "number" and _are_picture_names(cells))

    def encode(self, column: str, values: Sequence[object]) -> tuple[list[bytes], Faults]:
        read = pictures.mapped(partial(_read, _Place(None, True, self._range), column), values)
        contents = [picture.content if isinstance(picture, _Picture) else b"" for picture in read]
        return contents, {row: picture for row, picture in enumerate(read) if isinstance(picture, str)}

    def preview(self, content: bytes) -> tuple[str | None, bytes | None]:
        try:
            return None, pictures.thumbnail(content, _SIDE, self._range)
        except InputError:  # of a damaged cache, or a Pillow that reads fewer formats
            return None, None

    def show(self, content: bytes) -> str:
        width, height = pictures.size_of(content)
        return f"a picture of {width} x {height} pixels"

    def collector(self, column: str, allow_outside: bool) -> ContentCollector:
        return _PictureCollector(self, column, allow_outside, self._range)


class _PictureCollector(ContentCollector):
    """Collects pictures: of one that has a file of its own, the path."""

    def __init__(self, content: Content, column: str, allow_outside: bool, pixel_range: PixelRange | None) -> None:
        super().__init__(content, column)
        self._allow_outside, self._range = allow_outside, pixel_range
        self._in_file = bytearray()

    def parse(self, values: Sequence[object], source: Source) -> Parsed:
        place = _Place(source.folder, self._allow_outside, self._range)
        judged = pictures.mapped(partial(_judged, place, self._column), values, self.done)
        faults = {row: picture for row, picture in enumerate(judged) if isinstance(picture, str)}
        return parsed(judged, faults, self._append_judged)

    def _append_judged(self, judged: Sequence[_Judged | str]) -> None:
        for picture in judged:
            assert isinstance(picture, _Judged)
            self._packing.append([picture.path or pictures.canonical(picture.value, self._range)])
            self._in_file.append(picture.path is not None)
            self.keys += picture.key

    def finish(self) -> Contents:
        keys = np.frombuffer(self.keys, np.uint8).reshape(-1, KEY_BYTES)
        return InFiles(self._packing.finish(), np.frombuffer(self._in_file, np.bool_), keys)

    def show(self, contents: Contents, row: int) -> str:
        path = contents.path(row) if isinstance(contents, InFiles) else None
        return super().show(contents, row) if path is None else repr(os.path.relpath(path))


class _Place:
    """Where relative paths begin; None stands for the current directory, outside of which everything may lie.

    ``pixel_range`` is that of the pictures there.
    """

    def __init__(self, folder: Path | None, allow_outside: bool, pixel_range: PixelRange | None) -> None:
        self.pixel_range = pixel_range
        self._folder, self._anywhere = folder, folder is None or allow_outside
        self._root = os.path.abspath(folder or "")

    def path(self, written: str) -> str:
        """Return the path that a cell names. Raises ``PictureError`` for one that it must not name."""
        if "://" in written:
            raise PictureError("is an address: download the pictures and give their paths")
        path = os.path.normpath(os.path.join(self._root, written))
        if self._anywhere or _is_inside(path, self._root):
            return path
        if _is_inside(os.path.realpath(path), os.path.realpath(self._root)):  # where a folder has two names
            return path
        raise PictureError(
            f"lies outside of the folder {self._folder}: if you trust who wrote this, pass --allow-outside "
            "(allow_outside=True)"
        )


def _is_inside(path: str, root: str) -> bool:
    return path.startswith(os.path.join(root, ""))


class _Picture(NamedTuple):
    """A picture that can be decoded; ``path`` is that of a file of its own."""

    content: bytes
    path: bytes | None


class _Judged(NamedTuple):
    """What is kept of a picture until its row is known to be usable. ``value`` is the cell where it has no file."""

    key: bytes
    path: bytes | None
    value: object


def _judged(place: _Place, column: str, value: object) -> _Judged | str:
    read = _read(place, column, value)
    if isinstance(read, str):
        return read
    value = value["bytes"] if isinstance(value, Mapping) and read.path is None else value
    return _Judged(row_key(read.content), read.path, value if read.path is None else None)


def _read(place: _Place, column: str, value: object) -> _Picture | str:
    """Return the picture that a cell holds or names, decoded once to see that it can be, or why it cannot be used."""
    if isinstance(value, Mapping) and {*value} <= {"bytes", "path"}:  # as the library datasets has it
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if is_missing(value) or (isinstance(value, str) and not value):
        return f"{column!r} is missing"
    what = repr(column)
    try:
        if not isinstance(value, (str, os.PathLike)):
            content = pictures.canonical(value, place.pixel_range)
            if isinstance(value, (bytes, bytearray, memoryview)):
                pictures.decode(content, place.pixel_range)
            return _Picture(content, None)
        written = os.fspath(value)
        what = os.fsdecode(written)
        if isinstance(written, str) and (fault := unicode_fault(column, written)) and not os.path.exists(written):
            return fault
        path = place.path(what)
        content = _file(path)
        pictures.decode(content, place.pixel_range)
        return _Picture(content, os.fsencode(path))
    except PictureError as error:
        return f"{what} {error}"


def _file(path: str) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe may keep its reader waiting for ever
            raise PictureError("is not a regular file")
        if status.st_size > _MOST_BYTES:
            raise PictureError(f"has {status.st_size:,} bytes, more than any picture that is read")
        with open(path, "rb") as file:
            return file.read()
    except PictureError:
        raise
    except FileNotFoundError:
        raise PictureError(f"is not there (looked for {path})") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise PictureError(f"cannot be read: {reason or error}") from None


def _are_picture_names(cells: Sequence[object]) -> bool:
    names = [cell for cell in cells if not is_missing(cell) and not (isinstance(cell, str) and not cell)]
    return bool(names) and all(
        isinstance(name, (str, os.PathLike)) and os.fsdecode(name).lower().endswith(PICTURE_SUFFIXES) for name in names
    )


class IdContent(Content):
    """The id of a row whose content nobody has, as of imported features: a text, or a whole number as one."""

    noun, one = "id", "id"
    column_kind: Kind = "text"
    guessed = False
    column_names = frozenset(["id", "key", "image_path", "file_name", "filename", "path", "url", "uid", "guid"])

    def accepts(self, declared: Kind) -> bool:
        return declared in ("text", "number")

    def encode(self, column: str, values: Sequence[object]) -> tuple[list[bytes], Faults]:
        ids, faults = encoded_ids(column, values)
        return ids, faults

    def show(self, content: bytes) -> str:
        return repr(content.decode())


CONTENTS: dict[str, Content] = {"text": TextContent(), "image": ImageContent(), "id": IdContent()}


def content_of(kind: str, pixel_range: PixelRange | None = None) -> Content:
    """Return a kind of content, pictures with the range of pixels that have none of their own.

    Raises ``InputError`` for a kind that is not known here.
    """
    if kind not in CONTENTS:
        raise InputError(f"rows of the kind {kind!r} cannot be read here: give their contents, as bytes")
    return CONTENTS[kind] if pixel_range is None or kind != "image" else ImageContent(pixel_range)


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
