"""A Hugging Face model, frozen and in eval mode: rows -> features.

``load_backbone`` gives an object with the members of ``Backbone``; anything that has them can be cached, images
included. Nothing here is guessed from a model's name: widths, layers and the longest input are read off the loaded
model, and everything that could change a feature is hashed into ``identity``.

``device`` says where it runs, ``folder`` finds and reads a model's folder, ``loading`` makes a network of it,
``text`` turns texts into features, ``compute`` runs any backbone over rows at canonical shapes, ``numerics`` over a few
built-in rows, to know what this machine computes, ``processes`` in other processes where there are many cores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from embedcache.backbone.compute import features_of, run_plan
from embedcache.backbone.contents import contents_hash
from embedcache.backbone.device import POSITIONS, choose_device, needs_spare_row, side_by_side, threads
from embedcache.backbone.folder import (
    DEFAULT_MODEL,
    SentenceTransformerSettings,
    model_name,
    resolve_model,
    weight_files,
)
from embedcache.backbone.numerics import probe_of
from embedcache.backbone.processes import Workers, workers
from embedcache.backbone.text import TextBackbone, Tokens, load_again, load_backbone
from embedcache.batching import Batch, ShapePolicy
from embedcache.shard import FeatureSet

__all__ = [
    "DEFAULT_MODEL",
    "POSITIONS",
    "Backbone",
    "Prepared",
    "SentenceTransformerSettings",
    "TextBackbone",
    "Tokens",
    "Workers",
    "choose_device",
    "contents_hash",
    "features_of",
    "load_again",
    "load_backbone",
    "model_name",
    "needs_spare_row",
    "probe_of",
    "resolve_model",
    "run_plan",
    "side_by_side",
    "threads",
    "weight_files",
    "workers",
]


class Prepared(Protocol):
    """Rows made ready for the model on the CPU: tokens, pixels."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[n] what each row costs, in positions."""
        ...

    @property
    def truncated(self) -> int:
        """How many rows were longer than the model reads."""
        ...


class Backbone(Protocol):
    """What extraction needs of a model. Features of ``fetch`` are in the order of ``batch.indices``.

    One that has ``probe_rows`` (contents), ``probe_versions`` (names -> versions of what prepares them) and prepared
    rows with ``digests()`` (a hash a row) too gets a probe in its caches; see ``numerics``.
    """

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that decides the bits of a feature, as JSON, content hashes only."""
        ...

    @property
    def provenance(self) -> Mapping[str, Any]:
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

    def fetch(self, running: Any) -> dict[str, Any]:
        """Wait for a pass: name -> [b, D] or [b, L, D], or a pair (values [sum T, D], lengths [b]) for tokens."""
        ...
