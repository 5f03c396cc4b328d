"""Cached features as a torch ``Dataset``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from embedcache.features import InMemory, Ragged
from embedcache.shard import Array

Item = Tensor | tuple[Tensor, Tensor]
"""One row: x, or x and y where there are labels."""


class CachedDataset(Dataset[Item]):
    """``(x, y)`` pairs; a sampler's whole batch is read at once through ``__getitems__``."""

    def __init__(self, x: InMemory, y: Array | None) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> Item:
        # Copied, because what is mapped is read-only, and torch has no such tensors.
        x = torch.from_numpy(np.array(self.x[row]))
        return x if self.y is None else (x, torch.from_numpy(np.array(self.y[row])))

    def __getitems__(self, rows: Sequence[int]) -> list[Item]:
        if isinstance(self.x, Ragged):
            return [self[row] for row in rows]
        x = torch.from_numpy(self.x.values[np.asarray(rows)])
        if self.y is None:
            return list(x)
        return list(zip(x, torch.from_numpy(np.asarray(self.y[np.asarray(rows)])), strict=True))
