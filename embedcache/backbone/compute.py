"""Rows -> features: every batch of a plan is run, and what comes out is put back in the order of the rows."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedcache.backbone.device import threads
from embedcache.batching import Batch, Plan, plan
from embedcache.errors import FeatureError
from embedcache.shard import STORED

if TYPE_CHECKING:
    from embedcache.backbone import Backbone, Prepared

Passes = Generator[tuple[Batch, dict[str, Any]], None, None]


def run_plan(
    backbone: Backbone, prepared: Prepared, batches: Plan, done: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Run every batch and put the features in the rows' order, in the storage type.

    ``done`` is told of each batch: its rows and their positions. Returns name -> [n, D] or [n, L, D], or for a
    token-level set (values [sum T, D], offsets int64 [n + 1]).

    Raises ``FeatureError`` when the backbone gives another number of token vectors than there are tokens.
    """
    lengths = np.asarray(prepared.lengths, np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    arrays: dict[str, Any] = {}
    for each in backbone.feature_sets:
        dtype: np.dtype[Any] = STORED[each.dtype]
        if each.kind == "tokens":
            arrays[each.name] = (np.empty((int(offsets[-1]), each.dim), dtype), offsets)
        else:
            arrays[each.name] = np.empty((len(lengths), *each.row_shape), dtype)

    def collect(batch: Batch, features: Mapping[str, Any]) -> None:
        counts = lengths[batch.indices]
        for name, value in features.items():
            if isinstance(value, tuple):
                values, given = value
                if not np.array_equal(given, counts):
                    raise FeatureError(f"{name}: the backbone gave {given.sum()} vectors for {counts.sum()} tokens")
                for row, part in zip(batch.indices, np.split(values, np.cumsum(counts)[:-1]), strict=True):
                    arrays[name][0][offsets[row] : offsets[row + 1]] = part
            else:
                arrays[name][batch.indices] = value
        if done is not None:
            done(len(batch.indices), int(counts.sum()))

    passes, each_threads = backbone.side_by_side(len(batches))
    running = _together(backbone, prepared, batches, passes, each_threads) if passes > 1 else _trailing(
        backbone, prepared, batches
    )  # fmt: skip
    with contextlib.closing(running):
        for batch, features in running:
            collect(batch, features)
    return arrays


def _trailing(backbone: Backbone, prepared: Prepared, batches: Plan) -> Passes:
    """Run one pass after the other; a GPU starts the next one while the last is copied back."""
    trailing: deque[tuple[Batch, Any]] = deque()
    for batch in batches:
        trailing.append((batch, backbone.forward(prepared, batch)))
        if len(trailing) > 1:
            batch, running = trailing.popleft()
            yield batch, backbone.fetch(running)
    for batch, running in trailing:
        yield batch, backbone.fetch(running)


def _together(backbone: Backbone, prepared: Prepared, batches: Plan, passes: int, threads_each: int) -> Passes:
    """Run several passes at a time, and give them back in the order of the plan."""
    import torch

    def one(batch: Batch) -> dict[str, Any]:
        return backbone.fetch(backbone.forward(prepared, batch))

    # A new thread starts with torch's own idea of how many threads its kernels have.
    workers = ThreadPoolExecutor(passes, "embedcache-pass", torch.set_num_threads, (threads_each,))
    ahead: deque[tuple[Batch, Future[dict[str, Any]]]] = deque()
    with threads(threads_each):
        try:
            for batch in batches:
                ahead.append((batch, workers.submit(one, batch)))
                if len(ahead) > passes:
                    first, running = ahead.popleft()
                    yield first, running.result()
            for batch, running in ahead:
                yield batch, running.result()
        finally:
            workers.shutdown(wait=True, cancel_futures=True)


def features_of(backbone: Backbone, contents: Sequence[bytes], name: str) -> Any:
    """Run a backbone over rows at canonical shapes: the very bits that a cache would hold.

    Returns the feature set ``name`` in float32, [N, D] or [N, L, D], or for a token-level set a pair
    (values [sum T, D], offsets int64 [N + 1]).
    """
    prepared = backbone.prepare(contents)
    found = run_plan(backbone, prepared, plan(prepared.lengths, backbone.policy))[name]
    return (decoded(found[0]), found[1]) if isinstance(found, tuple) else decoded(found)


def decoded(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return stored values as float32, exactly; uint16 are the bits of bfloat16."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)
