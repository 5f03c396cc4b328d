"""Extract on a Ray cluster: this program reads, cuts and commits, actors on every GPU or node compute.

    python pipelines/extract_on_ray.py INPUT CACHE [ADDRESS]

ADDRESS is host:port, ``auto`` (the default) for the cluster that runs here or that submitted this job, or ``local`` to
start one on this machine. CACHE is written by this program alone, so it need not be on a shared file system. Whatever
is killed, run it again and it goes on; the cache is that of one process, byte for byte.
"""

from __future__ import annotations

import argparse
import sys

import embedcache as ec
from embedcache.cli import reported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input")
    parser.add_argument("cache")
    parser.add_argument("address", nargs="?", default="auto")
    given = parser.parse_args()
    cache = ec.extract(
        given.input, output_dir=given.cache, ray=given.address, split="80/10/10",
        on_bad_row="skip", quarantine=f"{given.cache}.quarantine.jsonl",
    )  # fmt: skip
    print(f"{len(cache):,} rows in {given.cache}")
    result = ec.train_on_cache(cache, "linear", progress=False)
    print(f"a linear head on them: accuracy {ec.evaluate_on_cache(result.head, cache, 'test')['accuracy']:.3f}")


if __name__ == "__main__":
    sys.exit(reported(main))
