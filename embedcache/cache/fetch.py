"""A cache behind a URL, copied into a local folder: what is missing, each file hashed, the manifest last."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from embedcache.arguments import checks_arguments
from embedcache.cache import manifest as manifests
from embedcache.cache.manifest import Manifest, ShardFile
from embedcache.cache.remote import ADVICE, Moved, Remote, side_by_side
from embedcache.errors import CacheError, CacheLockedError, CorruptCacheError, InputError, warn
from embedcache.fingerprint import sha256_file
from embedcache.journal import (
    commit,
    exists,
    explained,
    lock,
    make_folder,
    make_output,
    refuse_foreign,
    sync_directory,
    url_of,
)

_WAIT = 0.2
"""Seconds between two looks at a lock."""


@dataclass(frozen=True)
class Moves:
    """What was sent or fetched: ``files`` of ``total``, the manifest aside, and their ``bytes``."""

    files: int
    total: int
    bytes: int


def local_folder(path: Path | str) -> Path:
    """Return the folder from which a cache is read: its own, or for a URL a copy that is made where there is none.

    Copies are in ``embedcache/remote`` in the user's cache directory (``XDG_CACHE_HOME``, else ``~/.cache``), each in
    a folder named by the hash of its manifest. They may be removed at any time.

    Raises:
        CacheNotFoundError: there is no cache behind the URL.
        CorruptCacheError: a file there is not what was committed.
        MissingExtraError: the package for the URL's protocol is not installed.
        CacheError: the URL cannot be read, the folder cannot be written, or the cache changed meanwhile.
    """
    url = url_of(path)
    if url is None:
        return Path(path)
    remote = Remote.at(url)
    data, manifest = remote.manifest()
    copy = store() / sha256(data).hexdigest()[:32]
    if not _is_there(copy, manifest):
        make_output(copy, fresh=not exists(copy))
        with _locked(copy):
            if not _is_there(copy, manifest):  # whoever had the lock may have made it
                _fetch(remote, data, manifest, copy, relatives=True)
    return copy


def store() -> Path:
    """Return the folder that has the copies."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "embedcache" / "remote"


@contextlib.contextmanager
def advising(path: Path | str) -> Iterator[None]:
    """Say of a copy that was damaged after it was fetched, which an error in the block names, what to do."""
    try:
        yield
    except CorruptCacheError as error:
        if (url := url_of(path)) is None or str(store()) not in str(error):
            raise
        raise CorruptCacheError(f"{error}; it is a copy of {url}: remove it, and the next command fetches it") from None


@checks_arguments()
def pull(url: str, output_dir: Path | str) -> Moves:
    """Copy a cache behind a URL into a folder of one's own, where it can be extended, relabelled and merged.

    A folder that holds an earlier state of it gets what it lacks. Run again, it goes on where it was stopped.

    Raises as ``local_folder`` does, and ``CacheError`` for a folder that holds anything else.
    """
    if url_of(url) is None:
        raise InputError(f"{url} is not a URL: expected one such as s3://bucket/reviews.cache")
    remote, directory = Remote.at(url), Path(output_dir)
    data, manifest = remote.manifest()
    fresh = not exists(directory)
    make_output(directory, fresh=fresh)
    with lock(directory, needed=False):
        refuse_foreign(directory, "a feature cache", manifests.NAME, manifests.FOLDERS)
        former = manifests.read(directory) if exists(directory / manifests.NAME) else None
        if former is not None:
            refuse_other(str(directory), former, manifest, url)
        moves = _fetch(remote, data, manifest, directory)
        if former is not None and former.examples not in (None, manifest.examples):
            with contextlib.suppress(OSError):
                os.unlink(directory / "examples" / former.examples.file.name)
    return moves


def refuse_other(where: str, there: Manifest, new: Manifest, source: str) -> None:
    """Raise ``CacheError`` unless what is ``there`` is an earlier state of the ``new`` cache, or that itself."""
    earlier = (
        there.spec == new.spec
        and there.feature_sets == new.feature_sets
        and [shard.file for shard in there.shards] == [shard.file for shard in new.shards[: len(there.shards)]]
        and (there.examples == new.examples or there.generation < new.generation)
    )
    if not earlier:
        raise CacheError(
            f"{where} holds a cache that is not an earlier state of {source}, and it is kept: choose another place"
        )


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock on a copy; wait for another process that is making it."""
    told = False
    while True:
        try:
            held = lock(directory, needed=False)
            break
        except CacheLockedError:
            if not told:
                warn([f"another process is downloading into {directory}: waiting for it"])
            told = True
            time.sleep(_WAIT)
    with held:
        yield


def _is_there(directory: Path, manifest: Manifest) -> bool:
    """Whether a folder has all files of a cache in their sizes, the manifest too."""
    return exists(directory / manifests.NAME) and not _lacking(directory, manifest)


def _lacking(directory: Path, manifest: Manifest) -> list[tuple[str, ShardFile]]:
    return [(folder, file) for folder, file in manifest.files() if not _has(directory / folder / file.name, file)]


def _has(path: Path, file: ShardFile) -> bool:
    with contextlib.suppress(OSError):
        return path.stat().st_size == file.bytes
    return False


def _fetch(remote: Remote, data: bytes, manifest: Manifest, directory: Path, *, relatives: bool = False) -> Moves:
    """Copy the files that a locked folder lacks, then the manifest; of ``relatives``, other copies, where they are."""
    for folder in manifests.FOLDERS:
        make_folder(directory / folder)
    wanted = _lacking(directory, manifest)
    if relatives:
        wanted = [named for named in wanted if not _linked(directory, *named)]
    size = sum(file.bytes for _, file in wanted)
    with explained(f"cannot read {directory}"):
        free = shutil.disk_usage(directory).free
    if size > free:
        raise CacheError(f"{directory} has {free / 1e9:,.1f} GB left, and {remote.url} needs {size / 1e9:,.1f} GB more")
    try:
        if lacking := remote.lacking(wanted):
            raise CorruptCacheError(lacking[0])
        side_by_side([_task(remote, folder, file, directory) for folder, file in wanted], "download")
    except CorruptCacheError:
        if remote.manifest_bytes() not in (None, data):
            raise CacheError(
                f"{remote.url} was changed while it was being downloaded: run the same command again"
            ) from None
        raise
    with explained(f"cannot write {directory}"):
        for folder in manifests.FOLDERS:
            sync_directory(directory / folder)
    commit(directory / manifests.NAME, data)
    return Moves(len(wanted), len(manifest.files()), size)


def _linked(directory: Path, folder: str, file: ShardFile) -> bool:
    """Give a copy a file that another copy has, as another name of it: an extended cache has its former shards."""
    for other in directory.parent.glob(f"*/{folder}/{file.name}"):
        with contextlib.suppress(OSError):
            if _has(other, file) and sha256_file(other) == file.sha256:
                os.link(other, directory / folder / file.name)
                return True
    return False


def _task(remote: Remote, folder: str, file: ShardFile, directory: Path) -> tuple[int, Callable[[Moved], None]]:
    path = directory / folder / file.name
    # Of a name that every writer knows for a temporary; whoever holds the lock may go on with it.
    part = path.with_name(f".{file.name}.0.tmp")

    def fetch(moved: Moved) -> None:
        begun = _append(remote, folder, file, part, moved)
        if begun is not None and (begun == 0 or _append(remote, folder, file, part, moved) is not None):
            raise CorruptCacheError(f"{remote.told(folder, file)} is not what was committed: {ADVICE}")
        with explained(f"cannot write {path}"):
            os.replace(part, path)

    return file.bytes, fetch


def _append(remote: Remote, folder: str, file: ShardFile, part: Path, moved: Moved) -> int | None:
    """Fetch what a begun file lacks; return None if it is then whole, else what it had, after removing it."""
    digest = sha256()
    with explained(f"cannot write {part}"):
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        with open(descriptor, "r+b") as stream:
            begun = 0
            while piece := stream.read(1 << 20):
                digest.update(piece)
                begun += len(piece)
            moved(begun)
            for piece in remote.pieces(folder, file, begun):
                stream.write(piece)
                digest.update(piece)
                moved(len(piece))
            stream.flush()
            os.fsync(descriptor)
        if digest.hexdigest() == file.sha256:
            return None
        os.unlink(part)
    return begun
