"""Writing so that nothing is lost: files that are whole or not there, files that only grow, one writer at a time.

Whoever makes several files that belong together writes each under a name that nothing uses yet and then replaces the
one file that names them; before that the old ones count, from then on the new ones. Nothing is written through a link:
a temporary is a new file under a name that nobody can have guessed, a link under the final name is itself replaced,
and a folder or a growing file that turns out to be a link is refused.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from embedcache.errors import CacheError, CacheLockedError, EmbedcacheError

try:
    import fcntl
except ImportError:  # not a POSIX system: caches can be read there, not written
    fcntl = None  # type: ignore[assignment]

_PLAIN = sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
"""No link is followed, no pipe waited for."""
LOCK = ".lock"
TEMPORARY = r"(\.[0-9a-f]+)+\.tmp"
"""What stands after ``.NAME`` in the name of a temporary: older versions had the number of the process."""

Kind = type[EmbedcacheError]
R = TypeVar("R")


def commit(path: Path, data: bytes, kind: Kind = CacheError) -> None:
    """Put ``data`` at ``path`` so that after a crash either all of it is there or nothing is; see ``replacing``."""
    with replacing(path, kind) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path, kind: Kind = CacheError, *, named: Callable[[], str] | None = None) -> Iterator[IO[bytes]]:
    """Open a new file that takes the place of ``path`` once the block is done; if that fails, nothing has changed.

    ``named`` gives the name in its folder that the file is to have, where that depends on what was written.

    Temporary in the same directory (``O_EXCL``) -> write -> fsync -> replace -> fsync(directory). A failed fsync is
    never retried: the kernel may have dropped the pages, and a second call would report success.

    Raises ``kind`` when the disk is full, read-only or broken; the temporary is then removed.
    """
    stem = path.name.removeprefix(".").removesuffix(".tmp")[:60]
    temporary = path.with_name(f".{stem}.{secrets.token_hex(8)}.tmp")
    with explained(f"cannot write {path}", kind):
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _PLAIN, 0o666)
    raw = _Raw(descriptor, f"cannot write {path}", kind)
    try:
        try:
            file = io.BufferedWriter(raw, 1 << 20)
            yield file  # what the block raises is not ours to explain
            file.flush()
            with explained(f"cannot write {path}", kind):
                os.fsync(descriptor)
        finally:
            raw.over = True
            with explained(f"cannot write {path}", kind):
                os.close(descriptor)
        with explained(f"cannot write {path}", kind):
            os.replace(temporary, path if named is None else path.with_name(named()))
    except BaseException:
        _unlink(temporary)
        raise
    with explained(f"cannot write {path}", kind):
        sync_directory(path.parent)


class _Raw(io.RawIOBase):
    """A descriptor that is written to; its owner closes it. A buffer that is thrown away flushes into nothing."""

    def __init__(self, descriptor: int, what: str, kind: Kind) -> None:
        self.descriptor, self.what, self.kind = descriptor, what, kind
        self.over = False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.over:
            return len(data)
        with explained(self.what, self.kind):
            return os.write(self.descriptor, data)


def append(path: Path, data: bytes, kind: Kind = CacheError) -> None:
    """Append lines to a journal, made if it is not there, and wait until they are on the disk.

    A crash may leave a part of ``data`` at the end, which ``recover`` takes away. Raises ``kind``.
    """
    with explained(f"cannot write {path}", kind):
        new = not os.path.lexists(path)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _PLAIN, 0o666)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                raise OSError(errno.ELOOP, "")
            rest = memoryview(data)
            while len(rest):
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if new:
            sync_directory(path.parent)


def recover(path: Path, kind: Kind = CacheError) -> tuple[bytes, bool]:
    """Return the whole lines of a journal, and whether there was half a line after them; for its one writer.

    Half a line was never counted and is taken away. A file that has a second name, in a backup made of hard links
    perhaps, gets a copy to grow. Raises ``kind``, also for a link or what is not a plain file.
    """
    with explained(f"cannot read {path}", kind):
        try:
            descriptor = os.open(path, os.O_RDONLY | _PLAIN)
        except FileNotFoundError:
            return b"", False
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.ELOOP, "")
            data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data) or status.st_nlink != 1:
        commit(path, whole, kind)
    return whole, len(whole) < len(data)


@dataclass(frozen=True)
class Journal(Generic[R]):
    """Records in a file that only grows, one a line, synced when they are added: a crash loses none that was kept.

    ``parse`` reads the bytes of a line (``ValueError``, ``TypeError`` or ``KeyError`` for one that is damaged), and
    ``dump`` writes a record without its line break. ``remedy`` says what becomes of a line that a user deletes.
    Whoever adds holds the lock on the folder (see ``writing``); reading needs none.
    """

    path: Path
    parse: Callable[[bytes], R]
    dump: Callable[[R], str]
    kind: Kind
    remedy: str

    def read(self) -> list[R]:
        """Return the records; half a line at the end is one that is being written. Raises ``kind``, naming the line."""
        return self._records(read(self.path, self.kind) or b"")

    def recover(self) -> tuple[list[R], bool]:
        """Return the records and whether half a line was removed after them; for the one who holds the lock."""
        data, half = recover(self.path, self.kind)
        return self._records(data), half

    def append(self, records: Sequence[R]) -> None:
        """Add records, and wait until they are on the disk. Raises ``kind``."""
        if records:
            append(self.path, "".join(f"{self.dump(record)}\n" for record in records).encode("utf-8"), self.kind)

    def _records(self, data: bytes) -> list[R]:
        records = []
        # Only b"\n" ends a line: str.splitlines would also split at characters that stand in texts from data.
        for number, line in enumerate(data.split(b"\n")[:-1], 1):
            try:
                records.append(self.parse(line))
            except (ValueError, TypeError, KeyError) as error:
                raise self.kind(
                    f"{self.path}, line {number} is damaged ({error}): delete that line, and {self.remedy}"
                ) from None
        return records


@contextlib.contextmanager
def writing(path: Path, kind: Kind = CacheError, *, parts: Sequence[str] = (), fresh: bool) -> Iterator[None]:
    """Make an output folder with its ``parts`` (folders inside), and be its one writer while the block runs.

    What killed processes left half written is removed once the lock is held. ``fresh`` is that of ``make_output``.
    Raises ``kind``, and ``CacheLockedError`` where another process writes.
    """
    make_output(path, kind, fresh=fresh)
    for name in parts:
        make_folder(path / name, kind)
    with lock(path):
        for folder in (path, *(path / name for name in parts)):
            remove_temporaries(folder, kind)
        yield


def refuse_foreign(path: Path, what: str, marker: str, parts: Collection[str], kind: Kind = CacheError) -> None:
    """Raise ``kind`` unless a path is free or holds ``what`` (such as "a sweep"), which its file ``marker`` shows.

    A process that was killed before it wrote the marker leaves only ``parts``, a lock file and the marker's temporary.
    """
    if not exists(path, kind):
        return
    if not path.is_dir():
        raise kind(f"{path} is a file: choose a new or an empty directory")
    if exists(path / marker, kind):
        return
    with explained(f"cannot read {path}", kind):
        names = os.listdir(path)
    strangers = [name for name in names if name not in (*parts, LOCK) and not name.startswith(f".{marker}.")]
    if strangers:
        raise kind(f"{path} exists and is not {what} (it holds {strangers[0]}): choose a new or an empty directory")


def read(path: Path, kind: Kind = CacheError) -> bytes | None:
    """Return the bytes of a file, None where there is none. Raises ``kind`` when it cannot be read."""
    with explained(f"cannot read {path}", kind), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return path.read_bytes()
    return None


def url_of(path: Path | str) -> str | None:
    """Return the URL that a path is, such as ``s3://bucket/reviews.cache``; None for a local one.

    A ``Path`` has lost a slash of it. Schemes have at least two letters, as drives have one.
    """
    found = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.:-]+):/(/?)(.*)", str(path), re.DOTALL)
    if found is None:
        return None
    scheme, slash, rest = found.groups()
    return str(path) if slash else f"{scheme}://{'/' * (scheme in ('file', 'local'))}{rest}"


def make_output(path: Path, kind: Kind = CacheError, *, fresh: bool) -> None:
    """Make an output folder and those above it. Raises ``kind``; a link that the user named is followed."""
    if (url := url_of(path)) is not None:
        raise kind(f"{url} is not a local folder, and nothing is written elsewhere: choose one")
    with explained(f"cannot make {path}", kind):
        made = [folder for folder in path.parents if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        # Until the directory above knows its name, a power cut can take a new directory with all that is in it.
        for folder in (path, *made) if fresh else ():
            with contextlib.suppress(PermissionError):  # one may write to a directory that one may not read
                sync_directory(folder.parent)


def refuse_link(path: Path, kind: Kind = CacheError) -> None:
    """Raise ``kind`` for a link: what is written there would go elsewhere."""
    with explained(f"cannot write {path}", kind):
        if path.is_symlink():
            raise OSError(errno.ELOOP, "")


def make_folder(path: Path, kind: Kind = CacheError) -> None:
    """Make a folder inside of an output folder, if it is not there. Raises ``kind``, also where a link is."""
    with explained(f"cannot make {path}", kind):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise OSError(errno.ELOOP if path.is_symlink() else errno.ENOTDIR, "")


def exists(path: Path, kind: Kind = CacheError) -> bool:
    """Whether anything is at a path, a broken link too. Raises ``kind`` when that cannot be told."""
    with explained(f"cannot read {path}", kind):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def lock(path: Path, *, needed: bool = True) -> contextlib.ExitStack:
    """Take the writer's lock on a directory; closing what is returned gives it back.

    The lock is on the directory itself and leaves nothing behind. Network file systems that lock only what is open for
    writing get a lock file, removed afterwards. On a system without locks nothing is locked, unless that is ``needed``.

    Raises ``CacheLockedError`` at once when another writer has it, ``CacheError`` where locks do not work at all.
    """
    if os.name != "posix" and not needed:
        return contextlib.ExitStack()
    if fcntl is None:
        raise CacheError(f"cannot write {path}: writing a cache needs a POSIX system; reading does not")
    file = path / LOCK
    for attempt in range(100):
        with contextlib.ExitStack() as stack:
            try:
                flags = os.O_RDWR | os.O_CREAT | _PLAIN
                descriptor = os.open(path, os.O_RDONLY) if not attempt else os.open(file, flags, 0o644)
                stack.callback(_close, descriptor)
                _take(descriptor)
                if attempt:
                    # The one who had the lock may have removed the file after it was opened here.
                    there = os.stat(file) if file.exists() else None
                    if there is None or not os.path.samestat(there, os.fstat(descriptor)):
                        continue
                    stack.callback(_unlink, file)
                elif not os.path.samestat(os.stat(path), os.fstat(descriptor)):
                    raise BlockingIOError(errno.EWOULDBLOCK, "the one who had the lock has removed the directory")
                return stack.pop_all()
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES) and isinstance(error, BlockingIOError):
                    raise CacheLockedError(f"another process is writing to {path}: wait for it, or stop it") from None
                if attempt or error.errno not in (errno.EBADF, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
                    raise CacheError(f"cannot lock {path}: {explain(error)}") from error
    raise CacheLockedError(f"another process is writing to {path}: wait for it, or stop it")


def is_locked(path: Path) -> bool:
    """Whether a writer has the lock on a directory now; asks for it and gives it back, so ``lock`` tries twice."""
    for locked in (path, path / LOCK) if fcntl is not None else ():
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            descriptor = os.open(locked, os.O_RDONLY | _PLAIN)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def _take(descriptor: int) -> None:
    """Take the lock on an open file. Raises ``BlockingIOError`` when somebody has it for more than a moment."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(0.02)  # perhaps ``is_locked`` was just asking
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # nothing was written through it
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a worker process may still have a copy of it
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def remove_temporaries(folder: Path, kind: Kind = CacheError) -> None:
    """Remove what killed processes left in a folder that is locked. Raises ``kind`` when it cannot be read."""
    with explained(f"cannot read {folder}", kind):
        left = [name for name in os.listdir(folder) if re.fullmatch(rf"\..+{TEMPORARY}", name)]
    for name in left:
        _unlink(folder / name)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    if os.name == "nt":  # which opens no directories
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no such operation for a directory; their server sees to it.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(what: str, kind: Kind = CacheError) -> Iterator[None]:
    """Raise the system's errors in the block as ``kind``: what could not be done, and why."""
    try:
        yield
    except OSError as error:
        if isinstance(error, EmbedcacheError):
            raise
        raise kind(f"{what}: {explain(error)}") from error


def explain(error: OSError) -> str:
    """Say what an operating system's error means and what to do."""
    again = "and run the same command again; what was committed is kept"
    link = "a link or a special file stands there, and nothing is written through it: remove it"
    advice = {
        errno.ENOSPC: f"the disk is full: free some space {again}",
        errno.EDQUOT: f"your disk quota is used up: free some space {again}",
        errno.EFBIG: "the file is larger than this file system or its limit allows (extract --shard-rows makes "
        "smaller ones)",
        errno.EACCES: "permission denied: change its permissions, or choose another place",
        errno.EPERM: "permission denied: change its permissions, or choose another place",
        errno.EROFS: "the file system is read-only: choose another directory",
        errno.ENOTDIR: "a part of the path is a file, not a directory: choose another one",
        errno.EIO: f"the disk reports an error: check it {again}",
        errno.ELOOP: link,
        errno.ENXIO: link,
    }
    return advice.get(error.errno or 0, error.strerror or str(error))
