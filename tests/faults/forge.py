"""What a forger can do: rewrite a cache so that every name, size and hash in it is right again.

A hash finds damage; it cannot tell who computed it. With these, an attack gets past the hashes, and only the checks of
what the files hold are left to refuse it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.cache import manifest
from embedcache.fingerprint import hash_json, sha256_bytes


def body(cache: Path) -> dict[str, Any]:
    """The manifest as JSON values."""
    return dict(json.loads((cache / "manifest.json").read_bytes()))


def sign(cache: Path, changed: dict[str, Any]) -> None:
    """Write a manifest with the hashes that it should have."""
    changed["spec_hash"] = hash_json(changed["spec"])
    changed["manifest_hash"] = hash_json({key: value for key, value in changed.items() if key != "manifest_hash"})
    (cache / "manifest.json").write_bytes(manifest.encoded(changed))


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """An attack that changes the manifest and signs it."""

    def attack(cache: Path) -> None:
        changed = body(cache)
        change(changed)
        sign(cache, changed)

    return attack


def put(cache: Path, folder: str, data: bytes, at: int = 0) -> None:
    """Put bytes in place of a shard or of the dataset, under their right name, and sign."""
    changed = body(cache)
    entry = changed["shards"][at] if folder == "features" else changed["examples"]
    old = cache / folder / entry["name"]
    digest = sha256_bytes(data)
    entry |= {"name": f"{entry['name'].split('-')[0]}-{digest[:16]}.h5", "bytes": len(data), "sha256": digest}
    old.unlink()
    (cache / folder / entry["name"]).write_bytes(data)
    sign(cache, changed)


def first_shard(cache: Path) -> Path:
    """Where the first shard lies."""
    return cache / "features" / body(cache)["shards"][0]["name"]


def dataset_file(cache: Path) -> Path:
    """Where the dataset lies."""
    return cache / "examples" / body(cache)["examples"]["name"]


def stored(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a file."""
    import h5py

    with h5py.File(file, "r") as opened:
        return {name: opened[name][()] for name in opened}


def main(attacks: dict[str, Callable[[Path], None]]) -> None:
    """``python tests/faults/damage.py`` lists the attacks; ``... ATTACK CACHE`` spoils CACHE, or makes a spoilt one."""
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent))
    from small_caches import write

    if len(sys.argv) != 3:
        print("\n".join(attacks))
        return
    cache = Path(sys.argv[2])
    if not cache.exists():
        write(cache)
    attacks[sys.argv[1]](cache)
