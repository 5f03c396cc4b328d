"""Arrays that other tools wrote, read block by block: NumPy, Parquet, HDF5, folders of them, or one in memory.

Files come from strangers: no pickle is loaded, and an HDF5 file can lead to no other file.
"""

from __future__ import annotations

import contextlib
import math
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np

from embedcache.errors import EmbedcacheError, InputError, InputNotFoundError, MissingExtraError
from embedcache.fingerprint import sha256_file
from embedcache.journal import explain
from embedcache.shard import Array
from embedcache.wording import did_you_mean, listed, shortened

BLOCK_BYTES = 16 << 20
"""About how much is read at once."""
EXPORTED_ROWS = "rows.jsonl"
"""What ``export --to npy`` calls the table beside its arrays."""
_DIMENSION = re.compile(r"(.*?)(\d+)")


class Arrays(ABC):
    """Features of ``rows`` rows in their order: ``row_shape`` is (D,) or (L, D), ``dtype`` what they are stored in.

    ``tables`` are files beside them that tell of the rows, ``id_column`` the column that names rows there, if known.
    """

    name: str
    rows: int
    row_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    tables: Sequence[str] = ()
    id_column: str | None = None

    @abstractmethod
    def blocks(self) -> Iterator[Array]:
        """Yield all rows, [n, D] or [n, L, D], some megabytes at a time."""

    @abstractmethod
    def digest(self) -> str:
        """Return the sha256 of the file's bytes, or of the array's."""

    @property
    def source(self) -> str:
        """The name of the file or folder, without where it is."""
        path: Path = getattr(self, "_path", Path(self.name))
        return path.name

    @property
    def rows_at_once(self) -> int:
        """How many rows make a block."""
        return max(1, BLOCK_BYTES // max(1, math.prod(self.row_shape) * self.dtype.itemsize))

    def _set(self, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        """Take shape and type of the whole. Raises ``InputError`` for what are no features."""
        if len(shape) not in (2, 3) or 0 in shape:
            raise InputError(f"{self.name} has the shape {list(shape)}: expected [rows, D] or [rows, L, D]")
        if dtype.kind not in "fiu":
            raise InputError(f"{self.name} holds values of type {dtype}: expected numbers")
        self.rows, self.row_shape, self.dtype = int(shape[0]), tuple(map(int, shape[1:])), dtype


class InMemory(Arrays):
    """An array that is in memory."""

    def __init__(self, values: Array) -> None:
        self.name, self._values = "the array", values
        self._set(values.shape, values.dtype)

    def blocks(self) -> Iterator[Array]:
        for start in range(0, self.rows, self.rows_at_once):
            yield self._values[start : start + self.rows_at_once]

    def digest(self) -> str:
        digest = sha256(f"{self.dtype.str} {self._values.shape}".encode())
        for block in self.blocks():
            digest.update(np.ascontiguousarray(block).data)
        return digest.hexdigest()


class NumpyFile(Arrays):
    """A ``.npy`` file, or one member of an ``.npz`` file. Read, not mapped: memory stays flat."""

    def __init__(self, path: Path, array: str | None = None) -> None:
        self.name, self._path, self._member = str(path), path, None
        if path.suffix == ".npz":
            with _readable(path), zipfile.ZipFile(path) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            self._member = f"{_chosen(self.name, array, names)}.npy"
            self.name = f"{path} ({self._member.removesuffix('.npy')})"
        elif array is not None:
            raise InputError(f"{path} holds one array without a name: leave out --array {array}")
        with self._opened() as (file, shape, dtype):
            self._set(shape, dtype)
            # A header may claim anything: nothing is made of so many rows before the bytes are there.
            needed, there = math.prod(shape) * dtype.itemsize, self._size() - file.tell()
            if there < needed:
                row = max(0, there) // max(1, needed // self.rows)
                raise InputError(f"{self.name} ends early, in row {row}: copy it again")

    def _size(self) -> int:
        """Return how many bytes the array's file has, header and all."""
        if self._member is None:
            return self._path.stat().st_size
        with zipfile.ZipFile(self._path) as archive:
            return archive.getinfo(self._member).file_size

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]]:
        with _readable(self._path), contextlib.ExitStack() as stack:
            if self._member is None:
                file: IO[bytes] = stack.enter_context(open(self._path, "rb"))
            else:
                archive = stack.enter_context(zipfile.ZipFile(self._path))
                file = stack.enter_context(archive.open(self._member))
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            if dtype.hasobject:
                raise InputError(f"{self.name} holds Python objects, which are never loaded: save numbers")
            if fortran and len(shape) > 1:
                raise InputError(
                    f"{self.name} is stored column by column (Fortran order), so that no row lies together: "
                    "save it with numpy.save(..., numpy.ascontiguousarray(X))"
                )
            yield file, shape, dtype

    def blocks(self) -> Iterator[Array]:
        row_bytes = math.prod(self.row_shape) * self.dtype.itemsize
        with self._opened() as (file, _, _):
            for start in range(0, self.rows, self.rows_at_once):
                count = min(self.rows_at_once, self.rows - start)
                data = bytearray()
                while len(data) < count * row_bytes and (more := file.read(count * row_bytes - len(data))):
                    data += more
                if len(data) < count * row_bytes:
                    raise InputError(f"{self.name} ends early, in row {start + len(data) // row_bytes}: copy it again")
                yield np.frombuffer(data, self.dtype).reshape(count, *self.row_shape)

    def digest(self) -> str:
        return _file_digest(self._path)


class ParquetFile(Arrays):
    """A Parquet file: a column of lists of one length, or one column for each dimension (``x0``, ``x1``, ...)."""

    def __init__(self, path: Path, array: str | None = None) -> None:
        self.name, self._path = str(path), path
        try:
            import pyarrow as arrow
            import pyarrow.parquet as parquet
        except ImportError:
            raise MissingExtraError(f"reading {path}", "pyarrow", "parquet") from None
        self._arrow, self._parquet = arrow, parquet
        with self._table() as table:
            self.rows, schema = table.metadata.num_rows, table.schema_arrow
            self._columns = self._chosen_columns(schema, array)
            self.tables = [str(path)] if set(schema.names) - set(self._columns) else []
            kind = schema.field(self._columns[0]).type
            self._lists = not self._is_number(kind)
            value = kind.value_type if self._lists else kind
            if not self.rows:
                raise InputError(f"{self.name}: there are columns but no rows")
            width = len(self._columns)
            if self._lists:
                first = next(table.iter_batches(batch_size=1, columns=self._columns)).column(0)[0].as_py()
                width = len(first or ())
        self._set((self.rows, width), np.dtype(value.to_pandas_dtype()))

    def _chosen_columns(self, schema: Any, array: str | None) -> list[str]:
        types = self._arrow.types
        lists = [
            field.name for field in schema
            if (types.is_list(field.type) or types.is_large_list(field.type) or types.is_fixed_size_list(field.type))
            and self._is_number(field.type.value_type)
        ]  # fmt: skip
        numbered: dict[str, dict[int, str]] = {}
        for field in schema:
            if self._is_number(field.type) and (match := _DIMENSION.fullmatch(field.name)):
                numbered.setdefault(match[1], {})[int(match[2])] = field.name
        numbered = {
            prefix: columns for prefix, columns in numbered.items()
            if len(columns) > 1 and sorted(columns) == list(range(min(columns), min(columns) + len(columns)))
        }  # fmt: skip
        chosen = _chosen(self.name, array, [*lists, *numbered], "a column of lists, or numbered columns such as x0, x1")
        return [chosen] if chosen in lists else [numbered[chosen][number] for number in sorted(numbered[chosen])]

    def _is_number(self, kind: Any) -> bool:
        return bool(self._arrow.types.is_floating(kind) or self._arrow.types.is_integer(kind))

    @contextlib.contextmanager
    def _table(self) -> Iterator[Any]:
        try:
            with _readable(self._path), open(self._path, "rb") as file:
                yield self._parquet.ParquetFile(file)
        except KeyError as error:
            raise InputError(f"{self.name}: cannot be read as Parquet: {error}") from None

    def blocks(self) -> Iterator[Array]:
        row = 0
        with self._table() as table:
            for batch in table.iter_batches(batch_size=self.rows_at_once, columns=self._columns):
                columns = [batch.column(name) for name in self._columns]
                for column in columns:
                    if column.null_count:
                        raise InputError(f"{self.name}: a cell is empty in rows {row} to {row + batch.num_rows - 1}")
                yield (
                    self._of_lists(columns[0], row)
                    if self._lists
                    else np.stack([column.to_numpy(zero_copy_only=False) for column in columns], axis=1)
                )
                row += batch.num_rows

    def _of_lists(self, column: Any, row: int) -> Array:
        (width,) = self.row_shape
        if not self._arrow.types.is_fixed_size_list(column.type):
            lengths = np.diff(column.offsets.to_numpy())
            if len(wrong := np.flatnonzero(lengths != width)):
                place = int(wrong[0])
                raise InputError(
                    f"{self.name}: row {row + place} has {int(lengths[place])} numbers, and those before it {width}"
                )
        values = column.flatten()
        if values.null_count:
            raise InputError(f"{self.name}: a number is missing in rows {row} to {row + len(column) - 1}")
        return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(len(column), width)

    def digest(self) -> str:
        return _file_digest(self._path)


class Hdf5File(Arrays):
    """One array of an HDF5 file, however it is laid out, as long as it lies in that file."""

    def __init__(self, path: Path, array: str | None = None) -> None:
        self.name, self._path = str(path), path
        with self._file() as file:
            self._array = _chosen(self.name, array, self._arrays(file))
            found = file[self._array]
            self._set(found.shape, found.dtype)
            if not found.id.get_storage_size():
                raise InputError(f"{self.name}: nothing was ever written into {self._array}")
        self.name = f"{path} ({self._array})"

    def _arrays(self, group: Any, before: str = "") -> list[str]:
        """Return the names of the arrays of two or three dimensions, reached by hard links alone."""
        import h5py

        names: list[str] = []
        for name in group:
            if group.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
                continue  # it would lead to another file
            found = group[name]
            if isinstance(found, h5py.Group) and before.count("/") < 8:
                names += self._arrays(found, f"{before}{name}/")
            elif isinstance(found, h5py.Dataset) and found.ndim in (2, 3) and found.dtype.kind in "fiu":
                if found.is_virtual or found.external:
                    raise InputError(f"{self.name}: {before}{name} lies in other files: copy it into one file")
                names.append(before + name)
        return names

    @contextlib.contextmanager
    def _file(self) -> Iterator[Any]:
        import h5py

        with _readable(self._path):
            try:
                with h5py.File(self._path, "r") as file:
                    yield file
            except (RuntimeError, KeyError, OSError) as error:
                if isinstance(error, OSError) and error.errno:
                    raise
                raise InputError(f"{self.name}: HDF5 cannot read it ({' '.join(str(error).split())})") from None

    def blocks(self) -> Iterator[Array]:
        with self._file() as file:
            for start in range(0, self.rows, self.rows_at_once):
                yield np.asarray(file[self._array][start : start + self.rows_at_once])

    def digest(self) -> str:
        return _file_digest(self._path)


class Joined(Arrays):
    """Several files, one behind the other."""

    def __init__(self, name: str, parts: Sequence[Arrays], tables: Sequence[str], id_column: str | None) -> None:
        self.name, self._parts, self.tables, self.id_column = name, parts, tables, id_column
        first = parts[0]
        for part in parts:
            if (part.row_shape, part.dtype) != (first.row_shape, first.dtype):
                raise InputError(
                    f"{part.name} holds rows of {list(part.row_shape)} {part.dtype}, and {first.name} of "
                    f"{list(first.row_shape)} {first.dtype}: import them apart"
                )
        self._set((sum(part.rows for part in parts), *first.row_shape), first.dtype)

    def blocks(self) -> Iterator[Array]:
        for part in self._parts:
            yield from part.blocks()

    def digest(self) -> str:
        return sha256("".join(part.digest() for part in self._parts).encode()).hexdigest()


_READERS: dict[str, Callable[[Path, str | None], Arrays]] = {
    ".npy": NumpyFile, ".npz": NumpyFile, ".parquet": ParquetFile, ".h5": Hdf5File, ".hdf5": Hdf5File,
}  # fmt: skip


def open_arrays(inputs: object, array: str | None = None) -> Arrays:
    """Return the features in a file or folder, or an array; ``array`` names one where there are several.

    A folder is one as clip-retrieval writes it (``img_emb/img_emb_0.npy``, ``metadata/metadata_0.parquet``; ``array``
    ``text_emb`` takes the texts'), or one of files, which are joined in the order of their numbers.

    Raises ``InputError`` that says what there is for what cannot be read.
    """
    if isinstance(inputs, np.ndarray):
        return InMemory(inputs)
    if not isinstance(inputs, (str, Path)):
        raise InputError(f"got {shortened(inputs)}: expected an array of numpy, or the path of a file or folder")
    path = Path(inputs)
    with _readable(path):
        if path.is_dir():
            return _of_folder(path, array)
        if not path.exists():
            raise InputNotFoundError(f"{path} is not there")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: cannot tell what it is: expected a folder, or a file {', '.join(_READERS)}")
    return reader(path, array)


def _of_folder(path: Path, array: str | None) -> Arrays:
    inside, beside = path / (array or "img_emb"), path / EXPORTED_ROWS
    tables, id_column = _files(path / "metadata", (".parquet",)), "image_path"
    if not inside.is_dir():
        inside, tables, id_column = path, [beside] if beside.is_file() else [], "id"
    files = _files(inside, tuple(_READERS))
    if inside == path and array is not None:
        files = [file for file in files if file.name == f"{array}.npy"]
        if not files:
            there = [file.name if file.is_dir() else file.stem for file in path.iterdir() if file != beside]
            raise InputError(f"{path} has no array {array!r}{did_you_mean(array, there)}: it has {listed(there, 9)}")
    if not files:
        raise InputError(f"{inside} holds no file {', '.join(_READERS)}")
    parts = [_READERS[file.suffix.lower()](file, None) for file in files]
    return Joined(str(path), parts, [str(table) for table in tables], id_column if tables else None)


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files of a folder that end so, those with numbers in their order."""
    if not folder.is_dir():
        return []
    files = [file for file in folder.iterdir() if file.suffix.lower() in suffixes and not file.name.startswith(".")]
    digits = re.compile(r"(\d+)")
    return sorted(files, key=lambda file: [int(t) if t.isdecimal() else t for t in digits.split(file.name)])


def _chosen(where: str, asked: str | None, there: Sequence[str], what: str = "an array") -> str:
    if asked is not None and asked in there:
        return asked
    held = listed(there, 9) or "none"
    if asked is not None:
        raise InputError(f"{where} has no array {asked!r}{did_you_mean(asked, there)}: it has {held}")
    if len(there) != 1:
        raise InputError(f"{where}: cannot tell what the features are (expected {what}): name one by --array: {held}")
    return there[0]


def _file_digest(path: Path) -> str:
    with _readable(path):
        return sha256_file(path)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Tell what goes wrong with a file in one line."""
    try:
        yield
    except EmbedcacheError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {explain(error)}") from None
    except (ValueError, EOFError, zipfile.BadZipFile, SyntaxError) as error:
        raise InputError(f"{path} is not what its name says, or damaged: {' '.join(str(error).split())}") from None
