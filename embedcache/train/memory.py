"""Whether features fit in the memory that is free."""

from __future__ import annotations

import os


def fits_in_memory(size: int) -> bool:
    """Whether features of ``size`` bytes may be read whole: a quarter of the memory that is free now.

    ``EMBEDCACHE_MEMORY`` (bytes) overrides the detected free memory.
    """
    given = os.environ.get("EMBEDCACHE_MEMORY", "")
    free = int(given) if given.isdecimal() else available_memory()
    return free is None or size <= free // 4


def available_memory() -> int | None:
    """Return how much memory is free, in bytes, within a container's limit; None where the system does not say."""
    limits = []
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            limits += [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        pass
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = int(file.read())
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as file:
            limits.append(max(0, limit - int(file.read())))
    except (OSError, ValueError):
        pass
    try:
        import resource

        soft = resource.getrlimit(resource.RLIMIT_DATA)[0]
        if soft != resource.RLIM_INFINITY:
            limits.append(soft)
    except (ImportError, ValueError, OSError):
        pass
    return min(limits) if limits else None
