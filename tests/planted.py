"""Caches with features that were planted: how well they can be told apart is known, and no backbone runs."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from fakes import CountingBackbone

from embedcache.cache import FeatureCache
from embedcache.extract import extract


class Planted(CountingBackbone):
    """Texts ``CLASS NUMBER``: features are the class's own corner plus noise that the text alone decides."""

    def __init__(self, dim: int = 7, *, noise: float = 1.0, tokens: bool = False) -> None:
        super().__init__(dim, tokens=tokens, name=f"planted {dim} {noise}")
        self.noise = noise

    def vector(self, content: bytes) -> np.ndarray:
        generator = np.random.default_rng(zlib.crc32(content))
        out = generator.normal(0, self.noise, self.dim)
        out[b"xyz".index(content[:1])] += 2.0
        return out.astype(np.float32)

    def token_vectors(self, content: bytes) -> np.ndarray:
        generator = np.random.default_rng(zlib.crc32(content))
        out = generator.normal(0, self.noise, (min(len(content), 64), 3))
        out[0, b"xyz".index(content[:1])] += 4.0
        return out.astype(np.float32)


def planted_rows(count: int, *, classes: int = 3, test: int = 0, wrong: float = 0.0) -> list[dict[str, Any]]:
    """Rows of ``classes`` classes in turn, every tenth in validation, the last ``test`` in test, some mislabelled."""
    generator = np.random.default_rng(0)
    rows = []
    for at in range(count):
        name = "xyz"[at % classes]
        split = "test" if at >= count - test else ("validation" if at % 10 == 9 else "train")
        label = "xyz"[int(generator.integers(classes))] if generator.random() < wrong else name
        rows.append({"id": f"r{at}", "text": f"{name} {at}", "label": label, "split": split})
    return rows


def planted_cache(path: Path, rows: list[dict[str, Any]], **options: Any) -> FeatureCache:
    """Extract rows with planted features."""
    keep = options.pop("keep_inputs", False)
    return extract(rows, output_dir=path, backbone=Planted(**options), keep_inputs=keep)
