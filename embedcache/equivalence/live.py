"""The backbone in the loop: raw rows -> features, in canonical batches, inside every step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from embedcache.backbone import Backbone, features_of
from embedcache.features import Ragged
from embedcache.shard import FeatureSet, rounded
from embedcache.train.batches import Batch, order

Rows = npt.NDArray[np.int64]


class LiveBatches:
    """Training batches whose features the frozen backbone makes when they are asked for; see ``train.batches``.

    ``contents`` are the raw rows [N] and ``feature`` is the set that the head reads. The backbone tokenises, plans
    and runs the rows of one batch and of no other, at the canonical shapes; ``stored`` rounds as the cache stores.
    """

    def __init__(
        self, contents: Sequence[bytes], backbone: Backbone, feature: FeatureSet, batch_size: int, seed: int
    ) -> None:
        self._contents, self._backbone, self._feature = contents, backbone, feature
        self._size, self._seed = batch_size, seed
        self.steps = -(-len(contents) // batch_size)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yield the batches of one epoch."""
        rows = order(len(self._contents), self._seed, number)
        for start in range(0, len(rows), self._size):
            mine = rows[start : start + self._size]
            x = features_of(self._backbone, [self._contents[row] for row in mine], self._feature.name)
            if isinstance(x, tuple):
                stored = Ragged(rounded(x[0], self._feature.dtype), x[1], self._feature)
                values, mask = stored.padded(np.arange(len(mine)))
                yield Batch(torch.from_numpy(values), torch.from_numpy(mask), torch.from_numpy(mine))
            else:
                x = np.ascontiguousarray(rounded(x, self._feature.dtype))
                yield Batch(torch.from_numpy(x), None, torch.from_numpy(mine))


def backbone_state(backbone: Any) -> Mapping[str, torch.Tensor]:
    """Return a copy of what a backbone's network remembers: its buffers (running means), not its weights."""
    network = getattr(backbone, "network", None)
    return {} if network is None else {name: each.detach().clone() for name, each in network.named_buffers()}


def live_parts(backbone: Any) -> list[str]:
    """Return which modules of a backbone are in training mode and behave otherwise for it: dropout, batch norm."""
    network = getattr(backbone, "network", None)
    if network is None:
        return []
    return [
        f"{name} ({type(module).__name__})"
        for name, module in network.named_modules()
        if module.training and any(word in type(module).__name__ for word in ("Dropout", "BatchNorm", "InstanceNorm"))
        and getattr(module, "p", 1) != 0
    ]  # fmt: skip
