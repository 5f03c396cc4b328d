"""Pictures in folders, one folder a class, and in tar files as WebDataset writes them."""

from __future__ import annotations

import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from embedcache.dataset import Packed
from embedcache.errors import InputError
from embedcache.examples.content import PICTURE_SUFFIXES
from embedcache.examples.source import (
    BLOCK_ROWS,
    SAMPLE_ROWS,
    BadRow,
    Block,
    DeclaredType,
    InputFile,
    Source,
    row_of,
)
from embedcache.examples.splits import is_standard, ordered
from embedcache.fingerprint import strict_json
from embedcache.spec import split_name
from embedcache.wording import counted

METADATA = ("metadata.csv", "metadata.jsonl")
"""Tables that name the pictures of their folder in a column ``file_name``, as the library datasets has it."""
_SKIPPED = frozenset(["__macosx", "thumbs.db", "desktop.ini", *METADATA])
_IMAGE = DeclaredType("image", "picture")
_NAME = DeclaredType("text", "name of a folder")


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """Return what lies in a folder, by name, without what programs hide or leave there."""
    try:
        with os.scandir(folder) as entries:
            found = [
                entry for entry in entries if not entry.name.startswith(".") and entry.name.lower() not in _SKIPPED
            ]
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror or error}") from None
    return sorted(found, key=lambda entry: entry.name)


def split_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of the splits, by the splits' names, where a folder holds nothing but such folders."""
    folders = [entry.name for entry in _visible(folder) if entry.is_dir()]
    if not folders or not all(map(is_standard, folders)):
        return {}
    named = {split_name(name): folder / name for name in folders}
    if len(named) < len(folders):
        raise InputError(f"{folder}: two of its folders ({', '.join(folders)}) are the same split: join them")
    return {name: named[name] for name in ordered(named)}


def metadata_of(folder: Path) -> Path | None:
    """Return the table that names the pictures of a folder, None where there is none."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


class FilesSource(Source):
    """Picture files, each named by its path: the columns ``image`` and ``file_name``."""

    content_kind = "image"
    id_column = "file_name"

    def __init__(self, paths: Sequence[str]) -> None:
        self.name = paths[0] if len(paths) == 1 else f"{len(paths):,} files from {paths[0]} on"
        self.columns = ("image", "file_name")
        self._hold(paths)

    def _hold(self, paths: Sequence[str]) -> None:
        self._paths = Packed.of(map(os.fsencode, paths))
        self.rows = len(paths)
        some = paths[:: max(1, len(paths) // SAMPLE_ROWS)]
        self.sample = dict(zip(self.columns, self._cells(some, self.columns), strict=True))

    def _cells(self, paths: Sequence[str], columns: Sequence[str]) -> list[list[object]]:
        return [list(paths) for _ in columns]

    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
        for start in range(0, len(self._paths), BLOCK_ROWS):
            paths = [os.fsdecode(path) for path in self._paths[start : start + BLOCK_ROWS]]
            values = self._cells(paths, columns)
            yield Block(values, range(start, start + len(paths)), row_of(columns, values))

    def where(self, line: int) -> str:
        return f"{self.name}, picture {line}"

    def declared_type(self, column: str) -> DeclaredType:
        return _IMAGE if column == "image" else _NAME


class FolderSource(FilesSource):
    """Pictures in folders: ``CLASS/.../x.png`` or ``SPLIT/CLASS/.../x.png``.

    Where there are class folders the column ``label`` has the name of the outermost, and where there are folders of
    splits ``split`` has theirs. ``file_name`` begins with the folder's own name. Rows are sorted by split, class, path.
    """

    names_roles = True

    def __init__(self, folder: Path) -> None:
        self.name, self.folder = str(folder), folder
        splits = split_folders(folder)
        self._splits = {path.name: split for split, path in splits.items()}
        self._depth = 1 if splits else 0
        self._skipped: Counter[str] = Counter()
        roots = list(splits.values()) or [folder]
        classes = sorted({entry.name for root in roots for entry in _visible(root) if entry.is_dir()})
        found = [path for root in roots for path in self._walk(root, f"{root.name}{os.sep}" if splits else "")]
        if not found:
            raise InputError(
                f"{folder}: is a directory without pictures: expected a file, or a folder of pictures "
                f"({', '.join(PICTURE_SUFFIXES[:5])}, ...)"
            )
        counts = Counter(path.split(os.sep)[self._depth] for path in found if path.count(os.sep) > self._depth)
        self._class_names = tuple(name for name in classes if counts[name])
        self.columns = ("image", *["label"] * bool(self._class_names), *["split"] * bool(splits), "file_name")
        self._hold(found)
        self.notes = tuple(self._notes([name for name in classes if not counts[name]]))

    def _walk(self, folder: Path, written: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
        """Yield the paths of pictures in ``folder``, which is ``written`` as it is from the folder of the source on."""
        for entry in _visible(folder):
            if entry.is_dir():
                status = entry.stat()
                place = (status.st_dev, status.st_ino)
                if place not in above:  # a link to a folder that it lies in
                    yield from self._walk(Path(entry.path), f"{written}{entry.name}{os.sep}", (*above, place))
            elif entry.name.lower().endswith(PICTURE_SUFFIXES):
                yield written + entry.name
            else:
                self._skipped[os.path.splitext(entry.name)[1].lower() or entry.name] += 1

    def _notes(self, empty: Sequence[str]) -> Iterator[str]:
        for name in empty:
            yield f"{self.name}: the folder {name!r} holds no picture: it is not a class"
        if self._skipped:
            kinds = ", ".join(f"{name} {number:,}" for name, number in self._skipped.most_common(5))
            files = counted(sum(self._skipped.values()), "file")
            yield f"{self.name}: {files} left out, whose names do not end as those of pictures that are read ({kinds})"

    def _cells(self, paths: Sequence[str], columns: Sequence[str]) -> list[list[object]]:
        assert self.folder is not None
        parts, own_name = [path.split(os.sep) for path in paths], os.path.basename(os.path.abspath(self.folder))
        cells: dict[str, list[object]] = {
            "image": list(paths),
            "label": [part[self._depth] if len(part) > self._depth + 1 else None for part in parts],
            "split": [self._splits.get(part[0]) for part in parts],
            "file_name": [os.path.join(own_name, path) for path in paths],
        }
        return [cells[column] for column in columns]

    def class_names(self, column: str) -> tuple[str, ...] | None:
        return self._class_names if column == "label" else None


_BLOCK_BYTES = 32 << 20
_LARGEST_MEMBER = 512 << 20
_KEY = "__key__"


class _Sample(NamedTuple):
    """The members of a tar file that share a stem, as cells of columns."""

    number: int
    cells: Mapping[str, object]
    fault: str | None


class TarSource(Source):
    """A tar file as WebDataset writes it: members that follow one another and share a stem are one row.

    The picture (``x.jpg``) is the column ``image``, the stem is ``__key__``, the fields of ``x.json`` are columns of
    their own, and any other member is the column that its ending names, such as ``cls`` or ``txt``, as text.
    """

    content_kind = "image"
    id_column = _KEY

    def __init__(self, file: InputFile) -> None:
        self.name, self.path = file.name, file.path
        self._file = file
        first: list[_Sample] = []
        for sample in self._samples():
            first.append(sample)
            if len(first) == SAMPLE_ROWS:
                break
        names = dict.fromkeys(name for sample in first for name in sample.cells)
        if "image" not in names:
            raise InputError(
                f"{self.name}: no picture among its first {counted(len(first), 'row')}: expected members such as "
                "000.jpg and 000.cls"
            )
        self.columns = ("image", *(name for name in names if name != "image"))
        self.sample = {name: [sample.cells.get(name) for sample in first] for name in self.columns}
        self.sample["image"] = []

    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
        waiting: list[_Sample] = []
        size = 0
        for sample in self._samples():
            waiting.append(sample)
            image = sample.cells.get("image")
            size += len(image) if isinstance(image, bytes) else 0
            if size > _BLOCK_BYTES or len(waiting) == BLOCK_ROWS:
                yield self._block(columns, waiting)
                waiting, size = [], 0
        if waiting:
            yield self._block(columns, waiting)

    def _block(self, columns: Sequence[str], samples: Sequence[_Sample]) -> Block:
        good = [sample for sample in samples if sample.fault is None]
        bad = [
            BadRow(sample.number, sample.fault, {**sample.cells, "image": None})
            for sample in samples
            if sample.fault is not None
        ]
        values = [[sample.cells.get(column) for sample in good] for column in columns]
        keys = [{_KEY: sample.cells[_KEY]} for sample in good]
        return Block(values, [sample.number for sample in good], keys.__getitem__, bad)

    def _samples(self) -> Iterator[_Sample]:
        cells: dict[str, object] = {}
        fault: str | None = None
        number = 0
        for stem, ending, content in self._members():
            if cells and cells[_KEY] != stem:
                yield _Sample(number, cells, fault)
                cells, fault, number = {}, None, number + 1
            cells[_KEY] = stem
            try:
                cells |= _cells(ending, content)
            except ValueError as error:
                fault = f"{stem}.{ending}: {error}"
        if cells:
            yield _Sample(number, cells, fault)

    def _members(self) -> Iterator[tuple[str, str, bytes]]:
        """Yield stem, ending and bytes of every member that is a file."""
        try:
            with self._file.open_binary() as file, tarfile.open(fileobj=file, mode="r:*") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # which would hold every member that was read
                    folder, _, name = member.name.rpartition("/")
                    stem, dot, ending = name.partition(".")
                    if not member.isfile() or not stem or not dot or name.lower() in _SKIPPED:
                        continue
                    if member.size > _LARGEST_MEMBER:
                        raise InputError(f"{self.name}: {member.name} has {member.size:,} bytes, more than any picture")
                    opened = tar.extractfile(member)
                    assert opened is not None
                    yield f"{folder}/{stem}" if folder else stem, ending.lower(), _whole(opened, member.size)
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise InputError(f"{self.name}: cannot be read as a tar file: {error}") from None

    def declared_type(self, column: str) -> DeclaredType | None:
        return _IMAGE if column == "image" else None


def _whole(file: IO[bytes], size: int) -> bytes:
    content = file.read()
    if len(content) != size:
        raise EOFError("it is truncated")
    return content


def _cells(ending: str, content: bytes) -> dict[str, object]:
    """Return the cells that a member of a tar file gives. Raises ``ValueError`` for what cannot be read."""
    if f".{ending}".endswith(PICTURE_SUFFIXES):
        return {"image": content}
    text = content.decode("utf-8")
    if ending != "json":
        return {ending: text.strip()}
    fields = strict_json(text)
    if not isinstance(fields, dict):
        raise ValueError("expected a JSON object")
    return fields
