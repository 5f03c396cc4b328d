"""Build the archives of the current format: small caches, and beside each, as JSON, what must be read from it.

They are built once for each released version of the format and then never again:
``python tests/archives/build.py v1.1``. A minor version has archives of what it added only.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from small_caches import SETS, arrays

from embedcache.cache import CacheWriter, FeatureCache
from embedcache.dataset import key_values
from embedcache.examples import Examples, load_examples
from embedcache.numerics import Outcome, Probe

SAMPLE = Path(__file__).parents[2] / "data" / "sample.csv"
SPEC = {
    "backbone": {"architecture": "None", "weights": {"model.safetensors": hashlib.sha256(b"none").hexdigest()}},
    "features": ["every kind"],
    "preprocessing": {"max_length": 64, "prompt": None, "note": "é, 🎉 and \"quotes\""},
}  # fmt: skip


def sample() -> list[dict[str, Any]]:
    """The first 37 rows of the sample, with ids, a split and other labels."""
    import csv

    with open(SAMPLE, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:37]
    splits = ("train", "train", "validation", "test")
    return [
        {**row, "id": f"review {at} é", "split": splits[at % 4], "score": at / 8 - 2} for at, row in enumerate(rows)
    ]


def inputs() -> dict[str, Examples]:
    """The datasets, by the name of their archive."""
    rows = sample()
    columns: dict[str, Any] = {"text_column": "text", "split_column": "split"}
    several = [{**row, "label": ["long", row["label"]] if len(row["text"]) > 40 else [row["label"]]} for row in rows]
    return {
        "classification": load_examples(rows + rows[:3], label_column="label", id_column="id", **columns),
        "multilabel-part": load_examples(several, label_column="label", **columns).select(np.arange(5, 20, 2)),
        "regression": load_examples(rows, label_column="score", task="regression", **columns),
        "unlabelled": load_examples([{"text": row["text"]} for row in rows[:5]], text_column="text", labels="none"),
        "probed": load_examples([{"text": row["text"]} for row in rows[:7]], text_column="text", labels="none"),
    }


def probe(sets: Any, kind: int) -> Probe:
    """What a machine of some kind gives for three rows."""
    given = arrays(sets, [kind, 1, 2])
    outcomes = {each.name: Outcome.of(given[each.name].decoded().values, each.dtype) for each in sets}
    return Probe(tuple(hashlib.sha256(bytes([at])).hexdigest() for at in range(3)), {"tokenizers": "0.22.1"}, outcomes)


def write(path: Path, examples: Examples, sets: Any, per_shard: int, keep_inputs: bool) -> None:
    """Write a cache of ``examples``; the i-th different content has the features of row i in ``small_caches``.

    The archive ``probed`` has the rows of two kinds of machine.
    """
    _, first = np.unique(key_values(examples.keys), return_index=True)
    first.sort()
    with CacheWriter(path, SPEC, sets) as writer:
        for start in range(0, len(first), per_shard):
            mine = first[start : start + per_shard]
            ran = {"device": "none", "embedcache": "archive", "shard": start // per_shard}
            if path.name == "probed":
                writer.admit(made := probe(sets, start // per_shard), accept=True)
                ran["probe"] = made.hash
            writer.append(examples.keys[mine], arrays(sets, range(start, start + len(mine))), ran)
        writer.commit_dataset(examples, examples.packed_contents if keep_inputs else None)


def digest(array: np.ndarray) -> str:
    """The sha256 of an array's numbers, little-endian."""
    return hashlib.sha256(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()).hexdigest()


def read(cache: FeatureCache) -> dict[str, Any]:
    """Everything there is to read from a cache, as JSON values; of features the first row, and the hash of all."""
    said: dict[str, Any] = {
        "spec": cache.spec,
        "spec_hash": cache.spec_hash,
        "task": cache.task,
        "class_names": list(cache.class_names),
        "split_names": list(cache.split_names),
        "split_sizes": cache.split_sizes(),
        "split": cache.split_codes().tolist(),
        "numbers": cache.numbers().tolist(),
        "ids": cache.ids(),
        "keys": [bytes(key).hex() for key in cache.keys()],  # noqa: SIM118 - not a mapping
        "n_stored": cache.n_stored,
        "n_unique": cache.n_unique,
        "targets": None if cache.task is None else cache.targets().tolist(),
        "inputs": None if (kept := cache.inputs()) is None else [each.decode() for each in kept],
        "provenance": cache.provenance(),
        "complete": cache.manifest["complete"],
        "features": {},
    }
    for name, each in cache.feature_sets.items():
        facts: dict[str, Any] = {"kind": each.kind, "dim": each.dim, "layers": each.layers, "dtype": each.dtype}
        if each.kind == "tokens":
            ragged = cache.ragged(None, name)
            facts |= {"offsets": ragged.offsets.tolist(), "sha256": digest(ragged.values), "row 1": ragged[1].tolist()}
        else:
            x = cache.features(None, name)
            facts |= {"shape": list(x.shape), "sha256": digest(x), "row 1": x[1].tolist()}
        said["features"][name] = facts
    if cache.numerics():
        said["numerics"] = cache.numerics()
    return said


LAYOUTS: dict[str, tuple[Any, int, bool]] = {
    "classification": (SETS, 13, True),
    "multilabel-part": (SETS[:1], 5, False),
    "regression": (SETS[2:3], 37, False),
    "unlabelled": (SETS[5:], 2, False),
    "probed": (SETS[:3], 4, False),
}
VERSIONS = {"v1": ("classification", "multilabel-part", "regression", "unlabelled"), "v1.1": ("probed",)}


def build(folder: Path) -> None:
    """Write all archives of a version and what is read from them."""
    for name, examples in inputs().items():
        if name not in VERSIONS[folder.name]:
            continue
        sets, per_shard, keep_inputs = LAYOUTS[name]
        write(folder / name, examples, sets, per_shard, keep_inputs)
        text = json.dumps(read(FeatureCache.open(folder / name)), indent=1, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    build(Path(__file__).parent / sys.argv[1])
