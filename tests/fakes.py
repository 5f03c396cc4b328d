"""A backbone that counts its forward passes and needs no torch: features are a pure function of a row's bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedcache.batching import Batch, ShapePolicy
from embedcache.shard import FeatureSet


@dataclass
class FakeRows:
    contents: list[bytes]
    lengths: np.ndarray
    truncated: int = 0


class CountingBackbone:
    """Features of a row: bytes of its content, hashed; ``token`` sets have one vector per byte."""

    def __init__(
        self, dim: int = 5, *, tokens: bool = False, name: str = "fake", positions: int = 64, slow: float = 0.0
    ) -> None:
        self.identity: dict[str, Any] = {
            "backbone": {"architecture": "Fake", "weights": name},
            "shapes": {"positions": positions},
        }
        self.provenance = {"device": "fake"}
        self.feature_sets: tuple[FeatureSet, ...] = (FeatureSet("mean", "pooled", dim, 1, "float32"),)
        if tokens:
            self.feature_sets += (FeatureSet("tokens", "tokens", 3, 1, "float32"),)
        self.policy = ShapePolicy(positions=positions, step=4, max_length=64)
        self.dim = dim
        self.forward_calls = 0
        self.rows_seen: list[bytes] = []
        self.slow = slow

    def prepare(self, contents: Sequence[bytes]) -> FakeRows:
        lengths = np.fromiter((min(len(content), 64) for content in contents), np.int64, len(contents))
        return FakeRows(list(contents), lengths, sum(len(content) > 64 for content in contents))

    def forward(self, prepared: FakeRows, batch: Batch) -> dict[str, Any]:
        if self.slow:
            import time

            time.sleep(self.slow)
        self.forward_calls += 1
        contents = [prepared.contents[index] for index in batch.indices]
        self.rows_seen += contents
        rows = np.stack([self.vector(content) for content in contents])
        out: dict[str, Any] = {"mean": rows}
        if self.feature_sets[-1].kind == "tokens":
            values = np.concatenate([self.token_vectors(content) for content in contents])
            out["tokens"] = (values, np.array([min(len(content), 64) for content in contents]))
        return out

    def side_by_side(self, batches: int) -> int:
        return 1

    def fetch(self, running: dict[str, Any]) -> dict[str, Any]:
        return running

    def vector(self, content: bytes) -> np.ndarray:
        seed = int.from_bytes(content[:8].ljust(8, b"\0"), "little") ^ len(content)
        return ((np.arange(self.dim) + 1) * (seed % 9973) / 97).astype(np.float32)

    def token_vectors(self, content: bytes) -> np.ndarray:
        return np.repeat(np.frombuffer(content[:64], np.uint8)[:, None], 3, axis=1).astype(np.float32)
