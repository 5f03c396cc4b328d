"""A cache behind a URL, through fsspec: its manifest, which files are there, their bytes.

Nothing is read in place: ``fetch`` copies a cache into a local folder, where it is opened like any other, and ``push``
puts one there. Credentials, endpoints and retries are the file system's own, as fsspec documents them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from embedcache.cache import manifest as manifests
from embedcache.cache.manifest import Manifest, ShardFile
from embedcache.errors import CacheError, CacheNotFoundError, CorruptCacheError, EmbedcacheError, MissingExtraError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

_PIECE = 8 << 20
"""Bytes that are asked for at a time."""
_AT_ONCE = 4
"""Files that travel side by side."""

Sizes = dict[tuple[str, str], int]
Moved = Callable[[int], None]


@dataclass(frozen=True)
class Remote:
    """A folder behind a URL. Whatever its file system raises becomes a ``CacheError`` of one line."""

    url: str
    system: AbstractFileSystem
    root: str

    @classmethod
    def at(cls, url: str) -> Remote:
        """Find the file system of a URL. Raises ``MissingExtraError`` where its package is not installed."""
        scheme = url.partition("://")[0]
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise MissingExtraError(f"{scheme}://", "fsspec", "remote") from None
        try:
            system, root = url_to_fs(url)
        except ImportError as error:  # fsspec's own, of the import that failed
            package = (getattr(error.__cause__, "name", None) or f"for {scheme}").partition(".")[0]
            raise MissingExtraError(f"{scheme}://", package, "remote" if package == "s3fs" else None) from None
        except ValueError as error:
            raise CacheError(f"{url} cannot be opened ({_reason(error)}): use a protocol that fsspec knows") from None
        return cls(url.rstrip("/"), system, root.rstrip("/"))

    def _name(self, *parts: str) -> str:
        return "/".join((self.root, *parts))

    def told(self, folder: str, file: ShardFile) -> str:
        """Return the URL of a file."""
        return f"{self.url}/{folder}/{file.name}"

    def manifest_bytes(self) -> bytes | None:
        """Return the manifest as it stands there, None where there is none."""
        with _explained(f"cannot read {self.url}"):
            self.system.invalidate_cache()
            try:
                with self.system.open(self._name(manifests.NAME), "rb", block_size=_PIECE) as file:
                    data: bytes = file.read(manifests.LARGEST + 1)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None
        return data

    def parsed(self, data: bytes) -> Manifest:
        """Return the value of the manifest that was read there. Raises ``CorruptCacheError``."""
        return manifests.parsed(data, f"{self.url}/{manifests.NAME}")

    def manifest(self) -> tuple[bytes, Manifest]:
        """Return the manifest as it stands there, and as a value.

        Raises ``CacheNotFoundError`` where there is none, ``CorruptCacheError`` where it is damaged.
        """
        if (data := self.manifest_bytes()) is None:
            raise CacheNotFoundError(
                f"{self.url} is not a feature cache (it has no {manifests.NAME}): correct the address, or run "
                "embedcache push again if that was interrupted"
            )
        return data, self.parsed(data)

    def sizes(self) -> Sizes | None:
        """Return the bytes of each file, by folder and name; None where they are not listed.

        Web servers list links or nothing, and who may read a bucket may not be allowed to list it.
        """
        found: Sizes = {}
        self.system.invalidate_cache()
        for folder in manifests.FOLDERS:
            try:
                with _explained(f"cannot list {self.url}"):
                    entries = self.system.ls(self._name(folder), detail=True)
            except CacheError as error:
                if isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
                    continue
                return None
            for entry in entries:
                if not isinstance(entry.get("size"), int):
                    return None
                found[folder, entry["name"].rstrip("/").rpartition("/")[2]] = entry["size"]
        return found or None

    def lacking(self, files: Iterable[tuple[str, ShardFile]]) -> list[str]:
        """Return what is missing or of another size, one line each, as far as the file system can list."""
        if (sizes := self.sizes()) is None:
            return []
        problems = []
        for folder, file in files:
            size = sizes.get((folder, file.name))
            if size is None:
                problems.append(f"{self.told(folder, file)} is missing: {ADVICE}")
            elif size != file.bytes:
                problems.append(
                    f"{self.told(folder, file)} has {size:,} bytes, {file.bytes:,} were committed: {ADVICE}"
                )
        return problems

    def pieces(self, folder: str, file: ShardFile, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a file from ``start`` on, at most one more than were committed.

        Raises ``CorruptCacheError`` where it is missing.
        """
        with _explained(f"cannot read {self.told(folder, file)}"):
            try:
                stream = self.system.open(self._name(folder, file.name), "rb", block_size=_PIECE)
            except FileNotFoundError:
                raise CorruptCacheError(f"{self.told(folder, file)} is missing: {ADVICE}") from None
            with stream:
                try:
                    stream.seek(start)
                except ValueError:  # a server that gives no ranges
                    left = start
                    while left and (piece := stream.read(min(_PIECE, left))):
                        left -= len(piece)
                while start <= file.bytes and (piece := stream.read(min(_PIECE, file.bytes + 1 - start))):
                    start += len(piece)
                    yield piece

    def is_whole(self, folder: str, file: ShardFile, moved: Moved) -> bool:
        """Whether a file has the bytes that were committed, all of which are read."""
        digest = sha256()
        for piece in self.pieces(folder, file):
            digest.update(piece)
            moved(len(piece))
        return digest.hexdigest() == file.sha256

    def make_folders(self) -> None:
        """Make the folders of a cache, where the file system has such a thing."""
        from fsspec.asyn import AsyncFileSystem

        if not isinstance(self.system, AsyncFileSystem):  # object stores, of which one would make a bucket
            with _explained(f"cannot write {self.url}"):
                for folder in manifests.FOLDERS:
                    self.system.makedirs(self._name(folder), exist_ok=True)

    def refuse_foreign(self) -> None:
        """Raise ``CacheError`` where something else than the beginnings of a cache is."""
        try:
            names = [entry["name"].rstrip("/").rpartition("/")[2] for entry in self.system.ls(self.root, detail=True)]
        except Exception:  # nothing is there, or it may not be listed: what is written next tells
            return
        ours = {*manifests.FOLDERS, *_BESIDE, self.root.rstrip("/").rpartition("/")[2]}  # a file is listed as itself
        if others := sorted(name for name in names if name and name not in ours):
            raise CacheError(f"{self.url} is not a feature cache: it holds {others[0]}; choose another place")

    def put(self, folder: str, file: ShardFile, local: Path) -> None:
        """Send a local file to a folder there."""
        with _explained(f"cannot write {self.told(folder, file)}"):
            self.system.put_file(str(local), self._name(folder, file.name))

    def put_manifest(self, data: bytes) -> None:
        """Write the manifest, after which what it names is a cache.

        Object stores have the whole of it or nothing. A file on a disk is renamed into place, as one that is written
        over is no cache until it is whole.
        """
        from fsspec.implementations.local import LocalFileSystem

        name = self._name(manifests.NAME)
        with _explained(f"cannot write {self.url}"):
            if not isinstance(self.system, LocalFileSystem):
                self.system.pipe_file(name, data)
                return
            self.system.pipe_file(part := self._name(_PART), data)
            self.system.mv(part, name)


_PART = f".{manifests.NAME}.0.tmp"
_BESIDE = (".gitattributes", "README.md", _PART)
"""What may lie beside a cache that is not there yet: a hub's own files, and what a push that was stopped has left."""
ADVICE = "run embedcache push again where it was made"


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn any error of a file system into a ``CacheError``: each has its own, and few of them are ``OSError``."""
    try:
        yield
    except EmbedcacheError:
        raise
    except Exception as error:
        raise CacheError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def side_by_side(tasks: list[tuple[int, Callable[[Moved], T]]], title: str) -> list[T]:
    """Do what each task does, several at a time, under one bar of the bytes that they say they ``moved``.

    A task comes with how many that will be. The first error, or Ctrl-C, stops the others at their next piece.
    """
    from tqdm import tqdm

    stop, moving = threading.Event(), threading.Lock()
    bar = tqdm(
        desc=title, total=sum(size for size, _ in tasks), unit="B", unit_scale=True,
        disable=None if sys.stderr.isatty() else True, mininterval=0.2,
    )  # fmt: skip

    def moved(size: int) -> None:
        if stop.is_set():
            raise CacheError("stopped, as another file failed")
        with moving:
            bar.update(size)

    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        futures = [pool.submit(task, moved) for _, task in tasks]
        for future in as_completed(futures):
            future.result()
        return [future.result() for future in futures]
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        bar.close()


def problems_at(url: str) -> list[str]:
    """Hash every file of a cache where it is and return what is wrong, one line each.

    Raises ``CacheNotFoundError`` when there is no cache.
    """
    remote = Remote.at(url)
    try:
        _, manifest = remote.manifest()
    except CorruptCacheError as error:
        return [str(error)]
    if lacking := remote.lacking(manifest.files()):
        return lacking

    def task(folder: str, file: ShardFile) -> tuple[int, Callable[[Moved], str | None]]:
        def problem(moved: Moved) -> str | None:
            try:
                whole = remote.is_whole(folder, file, moved)
            except CorruptCacheError as error:
                return str(error)
            return None if whole else f"{remote.told(folder, file)} is not what was committed: {ADVICE}"

        return file.bytes, problem

    problems = side_by_side([task(*named) for named in manifest.files()], "verify")
    return [problem for problem in problems if problem is not None]
