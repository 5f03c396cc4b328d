"""memory: freed blocks are kept for the next layer, and go back to the system at the end."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told anything")

PROGRAM = """
import resource, sys, threading
import numpy as np
from embedcache.memory import memory_kept, share_memory_among_threads

def faults():  # pages that the system had to clear for 4 blocks of 48 MB, one after the other
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        np.ones(48 << 20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 20

def elsewhere(work):
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start(), thread.join()
    return results[0]

share_memory_among_threads()
faults()
before = held()
with memory_kept():
    with memory_kept():
        faults()
    kept, thread, inside = faults(), elsewhere(faults), held()
print(kept, thread, faults(), inside - before, held() - before)
"""


def run(**environment: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return [int(number) for number in done.stdout.split()]


def test_freed_blocks_are_kept_on_every_thread_and_returned_at_the_end() -> None:
    kept, thread, usual, inside, after = run()
    assert usual > 40  # four times 48 MB, 2 MB a page at most
    assert max(kept, thread) < 20
    assert inside >= 40
    assert after < 20


def test_what_the_user_has_set_stands() -> None:
    kept, thread, usual, _, _ = run(MALLOC_TRIM_THRESHOLD_="131072")
    assert min(kept, thread, usual) > 40
