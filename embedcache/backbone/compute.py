"""Rows -> features: every batch of a plan is run, and what comes out is put back in the order of the rows."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedcache.backbone.device import MOST_PASSES, threads
from embedcache.batching import Batch, Plan, plan
from embedcache.errors import FeatureError
from embedcache.shard import STORED, FeatureSet, decoded
from embedcache.wording import counted

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
    arrays = empty(backbone.feature_sets, lengths)
    passes = min(backbone.side_by_side(len(batches)), MOST_PASSES)
    running = (
        _together(backbone, prepared, batches, passes) if passes > 1 else _trailing(backbone, prepared, batches)
    )  # fmt: skip
    with contextlib.closing(running):
        for batch, features in running:
            put(arrays, lengths, batch, features)
            if done is not None:
                done(len(batch.indices), int(lengths[batch.indices].sum()))
    return arrays


def empty(feature_sets: Sequence[FeatureSet], lengths: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Return arrays for the features of rows of these lengths [n], as ``run_plan`` returns them, not yet filled."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    arrays: dict[str, Any] = {}
    for each in feature_sets:
        dtype: np.dtype[Any] = STORED[each.dtype]
        if each.kind == "tokens":
            arrays[each.name] = (np.empty((int(offsets[-1]), each.dim), dtype), offsets)
        else:
            arrays[each.name] = np.empty((len(lengths), *each.row_shape), dtype)
    return arrays


def put(arrays: Mapping[str, Any], lengths: npt.NDArray[np.int64], batch: Batch, features: Mapping[str, Any]) -> None:
    """Put what one pass gave in its rows' places."""
    counts = lengths[batch.indices]
    for name, value in features.items():
        if not isinstance(value, tuple):
            arrays[name][batch.indices] = value
            continue
        values, given = value
        if not np.array_equal(given, counts):
            raise FeatureError(f"{name}: the backbone gave {given.sum()} vectors for {counted(counts.sum(), 'token')}")
        into, offsets = arrays[name]
        for row, part in zip(batch.indices, np.split(values, np.cumsum(counts)[:-1]), strict=True):
            into[offsets[row] : offsets[row + 1]] = part


def _trailing(backbone: Backbone, prepared: Prepared, batches: Plan) -> Passes:
    """Run one pass after the other; a GPU starts the next one while the last is copied back."""
    trailing: deque[tuple[Batch, Any]] = deque()
    # One setting for all passes: changing the number of threads drops the kernels that oneDNN has prepared.
    with threads(backbone.policy.pass_threads):
        for batch in batches:
            trailing.append((batch, backbone.forward(prepared, batch)))
            if len(trailing) > 1:
                batch, running = trailing.popleft()
                yield batch, backbone.fetch(running)
        for batch, running in trailing:
            yield batch, backbone.fetch(running)


def _together(backbone: Backbone, prepared: Prepared, batches: Plan, passes: int) -> Passes:
    """Run several passes at a time, and give them back in the order of the plan."""
    import torch

    def one(batch: Batch) -> dict[str, Any]:
        return backbone.fetch(backbone.forward(prepared, batch))

    each = backbone.policy.pass_threads
    workers = ThreadPoolExecutor(passes, "embedcache-pass", torch.set_num_threads, (each,))
    ahead: deque[tuple[Batch, Future[dict[str, Any]]]] = deque()
    with threads(each):  # a new thread starts with the number that was set last, whoever set it; at the end it is ours
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
