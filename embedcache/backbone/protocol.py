"""What extraction needs of a model, and of rows made ready for one. Anything that has these members can be cached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from embedcache.batching import Batch, ShapePolicy
from embedcache.shard import Array, FeatureSet

Numbers = npt.NDArray[np.int64]
PassFeatures = dict[str, Array | tuple[Array, Array]]
"""What one pass gives of each feature set: [b, D] or [b, L, D], or for tokens (values [sum T, D], vectors [b])."""


class Prepared(Protocol):
    """Rows made ready for the model on the CPU: tokens, pixels.

    ``vectors`` [n] may be there too: how many vectors a token-level set has of each row. Without it they are as many
    as ``lengths``, as a text has one vector for each token. An image costs 1, whatever the number of its patches.
    """

    @property
    def lengths(self) -> Numbers:
        """[n] what each row costs, in positions of a canonical batch."""
        ...

    @property
    def truncated(self) -> int:
        """How many rows were longer than the model reads."""
        ...


def vectors_of(prepared: Prepared) -> Numbers:
    """Return how many vectors a token-level set has of each row, int64 [n]."""
    return np.asarray(getattr(prepared, "vectors", prepared.lengths), np.int64)


class Backbone(Protocol):
    """What extraction needs of a model. Features of ``fetch`` are in the order of ``batch.indices``.

    One that has ``probe_rows`` (contents), ``probe_versions`` (names -> versions of what prepares them) and prepared
    rows with ``digests()`` (a hash a row) too gets a probe in its caches; see ``probe``.
    """

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that decides the bits of a feature, as JSON, content hashes only."""
        ...

    @property
    def provenance(self) -> Mapping[str, object]:
        """What ran it: device, versions, the name it was asked for by. Recorded, never compared."""
        ...

    @property
    def feature_sets(self) -> Sequence[FeatureSet]:
        """What one pass gives."""
        ...

    @property
    def policy(self) -> ShapePolicy:
        """The canonical shapes."""
        ...

    def prepare(self, contents: Sequence[bytes]) -> Prepared:
        """Decode rows. Runs in a thread of its own beside ``forward``."""
        ...

    def forward(self, prepared: Any, batch: Batch) -> Any:
        """Start one canonical pass; on a GPU it may return before the work is done."""
        ...

    def side_by_side(self, batches: int) -> int:
        """Return how many of ``batches`` passes may run at a time; each has ``policy.pass_threads`` threads."""
        ...

    def fetch(self, running: Any) -> PassFeatures:
        """Wait for a pass and return its features, as ``PassFeatures`` says."""
        ...
