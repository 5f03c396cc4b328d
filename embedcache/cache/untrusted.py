"""A stranger's cache, looked into by a child process that has little memory and time and cannot write a file.

HDF5 files are parsed by a large C library. Whatever a hostile one makes it do happens to the child.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from embedcache.cache import manifest as manifests
from embedcache.cache.fetch import local_folder
from embedcache.errors import CorruptCacheError, EmbedcacheError, IncompleteCacheError
from embedcache.journal import explained

MEMORY, SECONDS, BYTES_PER_SECOND = 2 << 30, 60, 50_000_000
"""What the child may have: bytes of memory, seconds of CPU, and one more second for so many bytes to hash."""

_CODE = """
import json, sys
sys.path[:] = json.loads(sys.argv[3])
from embedcache.cache.untrusted import main
main()
"""


def examine(path: Path | str) -> list[str]:
    """Return the problems that ``verify`` finds, run in a limited child process.

    Raises:
        CorruptCacheError: the child died, or its answer cannot be read.
        CacheError: as ``verify`` does.
    """
    directory = local_folder(path)
    with explained(f"cannot read {directory}"):
        size = sum(os.lstat(file).st_size for file in directory.rglob("*")) if directory.is_dir() else 0
    seconds = SECONDS + size // BYTES_PER_SECOND
    # Isolated: a stranger's folder that is the working directory has no say in what is imported.
    folders = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
    command = [sys.executable, "-I", "-B", "-c", _CODE, str(directory), str(seconds), json.dumps(folders)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    try:
        answer = json.loads(done.stdout)
        problems, error = [str(problem) for problem in answer["problems"]], answer["error"]
    except (ValueError, KeyError, TypeError):
        why = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
        raise CorruptCacheError(
            f"{directory}: the process that looked into it died ({why}; it had {MEMORY >> 30} GB of memory and "
            f"{seconds} seconds): do not use the cache"
        ) from None
    if error is not None:
        manifests.read(directory)  # whose error is clearer where there is no cache
        raise CorruptCacheError(str(error))
    return problems


def _limit(seconds: int) -> None:
    """Take from this process what a reader does not need."""
    import resource

    for limit, value in (
        (resource.RLIMIT_DATA, MEMORY),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 256),
    ):
        _, most = resource.getrlimit(limit)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (value, value))


def main() -> None:
    """Verify and open a cache under limits, and print the problems as JSON."""
    from embedcache.cache.files import verify
    from embedcache.cache.reader import FeatureCache

    directory, seconds = sys.argv[1], int(sys.argv[2])
    _limit(seconds)
    problems: list[str] = []
    error = None
    try:
        problems = verify(directory)
        if not problems:
            cache = FeatureCache.open(directory)
            cache.describe()
            cache.ids()
    except IncompleteCacheError:
        pass  # whoever opens it is told
    except EmbedcacheError as caught:
        error = str(caught)
    print(json.dumps({"problems": problems, "error": error}))
