"""How this process gets its memory from the system, where that costs more time than what the memory is for.

glibc returns blocks above 32 MB to the system as soon as they are freed, and the system clears each again, page by
page, before the next layer of a network may have it. Convolutional networks spend a fifth to a third of their time on
that, and more in long runs (``pipelines/benchmark.py images``). No bit depends on it.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# glibc's own numbers of what ``mallopt`` sets, from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_KEPT = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}
# What glibc comes to by itself once large blocks have been freed.
_USUAL = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 64 << 20, _MMAP_THRESHOLD: 32 << 20}
_lock = threading.Lock()
_runs = 0


@contextmanager
def uncollected() -> Iterator[None]:
    """Leave Python's garbage collector out while many small values are made: it would look at each time and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def memory_kept() -> Iterator[None]:
    """Keep freed memory for whoever needs some next, on Linux; at the end it goes back to the system.

    It holds for the whole process while any such context lasts, and does nothing where the environment sets malloc.
    """
    global _runs
    libc = _glibc()
    if libc is None:
        yield
        return
    share_memory_among_threads()
    with _lock:
        _runs += 1
        if _runs == 1:
            _set(libc, _KEPT)
    try:
        yield
    finally:
        with _lock:
            _runs -= 1
            if not _runs:
                _set(libc, _USUAL)
                libc.malloc_trim(0)


def return_memory() -> None:
    """Give freed memory back to the system, of all threads, before something else needs much."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def share_memory_among_threads() -> None:
    """Let threads that start from now on have their memory from one place: only there is it kept."""
    if (libc := _glibc()) is not None:
        _set(libc, {_ARENA_MAX: 1})


def _set(libc: ctypes.CDLL, values: dict[int, int]) -> None:
    for name, value in values.items():
        libc.mallopt(name, value)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    if any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    try:
        libc = ctypes.CDLL(None)
        _ = libc.gnu_get_libc_version  # other systems may have a mallopt too, whose numbers mean something else
    except (OSError, TypeError, AttributeError):
        return None
    return libc
