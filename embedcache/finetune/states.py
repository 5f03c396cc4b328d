"""Hidden states of rows, as the last blocks are given them: from a cache, or computed when they are asked for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from embedcache.backbone import FrozenModel, Inputs, compute_features
from embedcache.errors import FeatureError
from embedcache.features import Ragged, Rows
from embedcache.finetune.tail import STATES
from embedcache.shard import FeatureSet
from embedcache.spec import states_set
from embedcache.wording import counted

if TYPE_CHECKING:
    from embedcache.cache import FeatureCache
    from embedcache.dataset import Contents


def cached_states(cache: FeatureCache, blocks: int) -> FeatureSet:
    """Return the set of a cache that enters the last blocks, else the one that enters the fewest more than those.

    Raises ``FeatureError`` where neither was extracted.
    """
    kinds = ("states", "tokens") if cache.spec.content == "text" else ("states",)  # of a text these are the same
    found = [
        (blocks_entered(name), kinds.index(name.partition("@")[0]), name)
        for name in cache.plain_sets if name.startswith(kinds) and blocks_entered(name) >= max(1, blocks)
    ]  # fmt: skip
    if blocks < 1 or not found:
        raise FeatureError(
            f"{cache.path} has no hidden states that enter the last {counted(blocks, 'block')} ({states_set(blocks)}), "
            f"or more: extract them too, into another cache, with extract --states -{blocks}"
        )
    return cache.feature(min(found)[2])


def blocks_entered(name: str) -> int:
    """Return how many last blocks a set of hidden states enters: 2 of ``states@-3``; 0 of what is none by its name."""
    found = re.fullmatch(r"(?:states|tokens)@-([1-9][0-9]{0,3})", name)
    return int(found[1]) - 1 if found else 0


class _States:
    """Rows whose states are laid out with zeros behind the shorter ones; see ``live.LiveRows``."""

    def __init__(self, lengths: Rows, pictures: bool, device: torch.device | str) -> None:
        self.lengths = np.ones(len(lengths), np.int64) if pictures else lengths  # a picture is one position
        self._pictures, self.device = pictures, torch.device(device)

    def of(self, rows: Rows) -> Ragged:
        """Return the states of some rows."""
        raise NotImplementedError

    def laid_out(self, rows: Rows) -> Inputs:
        """Return the states [B, T, D] of some rows and their mask [B, T], T being the longest; none of pictures."""
        values, mask = self.of(rows).padded(np.arange(len(rows)))
        real = None if self._pictures else torch.from_numpy(mask).long().to(self.device)
        return Inputs({STATES: torch.from_numpy(values).to(self.device)}, real)


class CachedStates(_States):
    """States of some rows of a cache, read from its maps whenever they are wanted: no more is in memory."""

    def __init__(
        self, cache: FeatureCache, rows: Rows, feature: FeatureSet, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(cache.vectors(feature)[rows], cache.spec.content == "image", device)
        self._cache, self._rows, self._feature = cache, rows, feature

    def of(self, rows: Rows) -> Ragged:
        """Return the states of some rows."""
        states = self._cache.of_rows(self._rows[rows], self._feature)
        assert isinstance(states, Ragged)
        return states


class LiveStates(_States):
    """States that the frozen backbone computes of raw rows, at canonical shapes, whenever they are wanted."""

    def __init__(
        self, backbone: FrozenModel[Any], contents: Contents | list[bytes], name: str, device: Any = "cpu"
    ) -> None:
        pictures, lengths = backbone.content.given == "pixels", np.ones(len(contents), np.int64)
        if not pictures:
            lengths = backbone.prepare([contents[row] for row in range(len(contents))]).lengths
        super().__init__(lengths, pictures, device)
        self._backbone, self._contents, self._name = backbone, contents, name

    def of(self, rows: Rows) -> Ragged:
        """Return the states of some rows, rounded as they would be stored."""
        states = compute_features(self._backbone, [self._contents[row] for row in rows.tolist()], self._name)
        assert isinstance(states, Ragged)
        return states
