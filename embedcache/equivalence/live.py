"""The backbone in the loop: raw rows -> features, in canonical batches, inside every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from embedcache.backbone import Backbone
from embedcache.equivalence.features import computed
from embedcache.features import Ragged
from embedcache.shard import FeatureSet
from embedcache.train.batches import Batch, order


class LiveBatches:
    """Training batches whose features the frozen backbone makes when they are asked for; see ``train.batches``.

    ``contents`` are the raw rows [N] and ``feature`` is the set that the head reads. The backbone prepares, plans and
    runs the rows of one batch and of no other, at the canonical shapes, and rounds as the cache stores.
    """

    def __init__(
        self, contents: Sequence[bytes], backbone: Backbone, feature: FeatureSet, batch_size: int, seed: int
    ) -> None:
        self._contents, self._backbone, self._feature = contents, backbone, feature
        self._size, self._seed = batch_size, seed
        self.steps = -(-len(contents) // batch_size)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yield the batches of one epoch."""
        shuffled = order(len(self._contents), self._seed, number)
        for start in range(0, len(shuffled), self._size):
            rows = shuffled[start : start + self._size]
            x = computed(self._backbone, [self._contents[row] for row in rows], self._feature)
            if isinstance(x, Ragged):
                values, mask = x.padded(np.arange(len(rows)))
                yield Batch(torch.from_numpy(values), torch.from_numpy(mask), torch.from_numpy(rows))
            else:
                yield Batch(torch.from_numpy(x.values), None, torch.from_numpy(rows))
