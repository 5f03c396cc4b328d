"""All rows in two dimensions, to look at."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import numpy as np

from embedcache.audit.neighbours import Unit, Vectors
from embedcache.dataset import evenly_spread
from embedcache.errors import MissingExtraError
from embedcache.features import Rows
from embedcache.task import Floats
from embedcache.threads import workers

Kind = Literal["pca", "umap"]
MOST = 20_000
"""Vectors that UMAP lays out, which takes minutes with more; evenly spread."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Places of some vectors: ``place`` float64 [n, 2] of ``vector`` int64 [n].

    ``explained`` is the share of the variance that each axis has, None where the method does not say.
    """

    vector: Rows
    place: Floats
    explained: tuple[float, float] | None = None


def layout(vectors: Vectors, kind: Kind, seed: int = 0) -> Layout:
    """Return places in two dimensions by principal components, or by UMAP, which must be there."""
    return _pca(vectors) if kind == "pca" else _umap(vectors, seed)


def refuse_without_umap() -> None:
    """Raise ``MissingExtraError`` where UMAP is not installed."""
    if find_spec("umap") is None:
        raise MissingExtraError("--map umap", "umap-learn", "umap")


def _pca(vectors: Vectors) -> Layout:
    panels = vectors.panels()
    moments, total = np.zeros((vectors.dim, vectors.dim)), np.zeros(vectors.dim)

    def summed(panel: tuple[int, int]) -> tuple[Floats, Floats]:
        x = vectors.panel(*panel).astype(np.float64)
        return x.T @ x, x.sum(axis=0)

    with workers() as threads:  # each product on one BLAS thread: the same bits on any number of them
        for product, column in threads.run(panels, summed):
            moments += product
            total += column
        mean = total / max(1, len(vectors))
        covariance = moments / max(1, len(vectors)) - np.outer(mean, mean)
        values, directions = np.linalg.eigh(covariance)
        axes = directions[:, ::-1][:, :2]
        if axes.shape[1] < 2:
            axes = np.column_stack([axes, np.zeros((vectors.dim, 2 - axes.shape[1]))])
        # An eigenvector has no sign of its own: its largest component points up.
        axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(2)] + 0.0)
        place = np.concatenate(list(threads.run(panels, lambda panel: (vectors.panel(*panel) - mean) @ axes)))
    variance = np.maximum(np.concatenate([np.zeros(2), values])[::-1][:2], 0)
    whole = float(np.maximum(values, 0).sum()) or 1.0
    return Layout(np.arange(len(vectors)), place, (float(variance[0]) / whole, float(variance[1]) / whole))


def _umap(vectors: Vectors, seed: int) -> Layout:
    import umap

    chosen = evenly_spread(len(vectors), MOST)
    x: Unit = vectors.take(chosen)
    made = umap.UMAP(n_components=2, metric="cosine", random_state=seed, n_jobs=1).fit_transform(x)
    return Layout(chosen, np.asarray(made, np.float64))
