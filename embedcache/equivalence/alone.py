"""A check without the encoder: what a cache proves by itself where the code that made its features is not at hand.

The features are read once more straight from the HDF5 files, past memory maps, row index and gathering; and a plain
head in plain torch is trained on those, step by step, beside training on the cache. Whether the features are what their
encoder gives cannot be known here, and the result says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import h5py
import numpy as np
import torch
from torch import Tensor

from embedcache.backbone import Backbone
from embedcache.cache import FeatureCache
from embedcache.equivalence.bits import Rows, difference
from embedcache.equivalence.result import Outcome, judged
from embedcache.equivalence.rows import RawRows, Sample, Subject, TrainingPlan
from embedcache.errors import BackboneError
from embedcache.shard import Array, FeatureSet, decoded
from embedcache.spec import Origin


def raw_rows(cache: FeatureCache) -> RawRows:
    """Return the rows of a cache as they are compared where there is no input."""
    return RawRows(cache, cache.targets(), (), (), None, np.arange(len(cache)))


def subject_of(cache: FeatureCache, raw: RawRows, rows: Sample, plan: TrainingPlan) -> Subject:
    """Return what is checked, of which nothing asks for a backbone. Raises ``BackboneError`` for token-level sets."""
    if plan.feature.kind == "tokens":
        raise BackboneError(f"{cache.path}: token-level sets are not checked without the encoder that made them")
    return Subject(cache, raw, rows, cast("Backbone", None), plan)


class FromFiles:
    """The stored features of a cache, read by HDF5's own library from the shards and told by their keys."""

    def __init__(self, cache: FeatureCache) -> None:
        self._cache = cache
        self._place: dict[bytes, tuple[str, int]] = {}
        for entry in cache.manifest["shards"]:
            name = entry["name"]
            with h5py.File(cache.path / "features" / name, "r") as file:
                for row, key in enumerate(file["row_key"][()]):
                    self._place.setdefault(key.tobytes(), (name, row))

    def values(self, rows: Rows, feature: FeatureSet) -> Array:
        """Return the features of some rows of the dataset, float32 [n, D] or [n, L, D]."""
        keys = self._cache.keys()[rows]
        places = [self._place[key.tobytes()] for key in keys]
        out = np.empty((len(rows), *feature.row_shape), np.float32)
        for name in sorted({name for name, _ in places}):
            with h5py.File(self._cache.path / "features" / name, "r") as file:
                stored = decoded(file[feature.name][()])
            for at, (shard, row) in enumerate(places):
                if shard == name:
                    out[at] = stored[row]
        return out


class Batches:
    """What ``train_standard`` asks for the features of a batch: they were read before. Contents are row numbers."""

    def __init__(self, x: Array) -> None:
        self._x = torch.from_numpy(x)

    def batch(self, contents: Sequence[int], feature: FeatureSet) -> tuple[Tensor, None]:
        """Return the features of the rows of a batch, float32 [B, D] or [B, L, D]; no mask."""
        return self._x[list(contents)], None


def compare_files(subject: Subject, files: FromFiles) -> Outcome:
    """Compare what the cache gives with what its files hold, bit for bit."""
    cache, rows = subject.cache, subject.rows.features
    comparisons = []
    for name, feature in cache.feature_sets.items():
        if feature.kind == "tokens":
            continue
        here = np.asarray(cache.of_rows(rows, feature).values)
        gap = difference(here, files.values(rows, feature))
        where = "" if gap.where is None else f"row {cache.ids()[int(rows[gap.where[0]])]}"
        comparisons.append(judged("files", f"features {name}", gap, where))
    return Outcome(tuple(comparisons))


def rounding(x: Array) -> Array:
    """Return what one rounding of float32 may change in each component [...] of features [n, ...]."""
    return np.asarray(np.abs(x).max(axis=0).astype(np.float64) * 2.0**-24)


def not_proved(cache: FeatureCache, origin: Origin) -> str:
    """Say what a check of such a cache does not show, and what would."""
    more = (
        "import the files again into it, which compares every value"
        if origin.kind == "import"
        else "pass the encoder, check_equivalence(cache, inputs, encoder=...), which runs it on the rows"
    )
    return (
        f"not proved: that the features are what their encoder gives ({origin.to_text()}), as it is not at hand. "
        f"{more[0].upper()}{more[1:]}. Proved: training on {cache.path} is training on the features in its files"
    )
