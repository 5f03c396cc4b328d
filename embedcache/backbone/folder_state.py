"""Whether a model's folder holds what it held before.

Identity is content alone. Times and inodes only decide whether files must be read again, and where they leave a doubt
(a file changed so recently that a second change may bear the same time) they are.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from embedcache.errors import BackboneError
from embedcache.fingerprint import hash_json, sha256_file

Stamp = tuple[tuple[str, int, int, int, int], ...]
DOUBT = 2.0
"""Seconds within which two changes of a file may have the same time: the coarsest clock of a common file system."""

_known: dict[Path, tuple[Stamp, float, str]] = {}
_lock = threading.Lock()


def stamp(folder: Path) -> Stamp:
    """Return name, size, times and inode of every file that loading may read: in the folder and one level below it."""
    stamps = []
    for path in sorted([*folder.glob("*"), *folder.glob("*/*.json"), *folder.glob("*/*.py")]):
        try:
            status = path.stat()  # of what a link leads to, as the hub's folders are made of links
        except OSError:
            continue
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            # The change time is the kernel's own: a file written again with its size and modification time kept shows.
            stamps.append((name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))
    return tuple(stamps)


def contents_hash(folder: Path) -> str:
    """Return the hash of a folder's files, read again only where they may have changed since they were last read."""
    folder = folder.resolve()
    before, now = stamp(folder), time.time()
    with _lock:
        known = _known.get(folder)
    if known is not None and known[0] == before and _is_certain(before, known[1]):
        return known[2]
    value = hash_json({name: sha256_file(folder / name) for name, *_ in before})
    if stamp(folder) == before:  # else it changes just now, and is read again the next time
        with _lock:
            _known[folder] = before, now, value
    return value


def _is_certain(files: Stamp, read: float) -> bool:
    newest = max((max(changed, modified) for _, _, modified, changed, _ in files), default=0)
    return newest / 1e9 + DOUBT < read


def refuse_changed(folder: Path, before: Stamp, name: str) -> None:
    """Raise ``BackboneError`` when a folder is not what it was before its model was loaded and hashed."""
    if stamp(folder) != before:
        raise BackboneError(f"{name} was written to while it was being loaded: wait until it is whole, and run again")
