"""What extraction needs of a model, and how it is run: rows -> features, in the order of the rows."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from embedcache.backbone.device import MOST_PASSES, threads
from embedcache.batching import Batch, Plan, ShapePolicy, plan
from embedcache.errors import FeatureError
from embedcache.numerics import Outcome, Probe
from embedcache.shard import STORED, Array, FeatureSet, decoded
from embedcache.wording import counted

# What extraction needs of a model, and of rows made ready for one. Anything that has these members can be cached.


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


Passes = Generator[tuple[Batch, PassFeatures], None, None]
FeatureArrays = dict[str, Array | tuple[Array, Array]]
"""Features of n rows by feature set, as stored: [n, D] or [n, L, D], or for tokens (values [sum T, D], offsets
int64 [n + 1])."""
Done = Callable[[int, int], None]
"""What is told of each batch that is done: its rows, and their positions."""


class Collected:
    """Arrays for the features of prepared rows, filled pass by pass in whatever order the passes come."""

    def __init__(self, feature_sets: Sequence[FeatureSet], prepared: Prepared, done: Done | None = None) -> None:
        self._lengths, self._vectors, self._done = np.asarray(prepared.lengths, np.int64), vectors_of(prepared), done
        offsets = np.concatenate([[0], np.cumsum(self._vectors)])
        self.arrays: FeatureArrays = {}
        for feature in feature_sets:
            if feature.kind == "tokens":
                values = np.empty((int(offsets[-1]), feature.dim), STORED[feature.dtype])
                self.arrays[feature.name] = (values, offsets)
            else:
                rows = len(self._lengths)
                self.arrays[feature.name] = np.empty((rows, *feature.row_shape), STORED[feature.dtype])

    def put(self, batch: Batch, features: Mapping[str, Array | tuple[Array, Array]]) -> None:
        """Put what one pass gave in its rows' places.

        Raises ``FeatureError`` when it gave another number of vectors than its rows have.
        """
        counts = self._vectors[batch.indices]
        for name, value in features.items():
            target = self.arrays[name]
            if not isinstance(value, tuple) or not isinstance(target, tuple):
                target[batch.indices] = value  # type: ignore[index]  # a set of one kind gives no other
                continue
            values, given = value
            if not np.array_equal(given, counts):
                raise FeatureError(
                    f"{name}: the backbone gave {given.sum()} vectors for {counted(counts.sum(), 'token')}"
                )
            into, offsets = target
            for row, part in zip(batch.indices, np.split(values, np.cumsum(counts)[:-1]), strict=True):
                into[offsets[row] : offsets[row + 1]] = part
        if self._done is not None:
            self._done(len(batch.indices), int(self._lengths[batch.indices].sum()))


def run_plan(backbone: Backbone, prepared: Prepared, batches: Plan, done: Done | None = None) -> FeatureArrays:
    """Run every batch and put the features in the rows' order, in the storage type.

    Raises ``FeatureError`` when the backbone gives another number of token vectors than there are tokens.
    """
    collected = Collected(backbone.feature_sets, prepared, done)
    passes = min(backbone.side_by_side(len(batches)), MOST_PASSES)
    running = (
        _together(backbone, prepared, batches, passes) if passes > 1 else _trailing(backbone, prepared, batches)
    )  # fmt: skip
    with contextlib.closing(running):
        for batch, features in running:
            collected.put(batch, features)
    return collected.arrays


def _trailing(backbone: Backbone, prepared: Prepared, batches: Plan) -> Passes:
    """Run one pass after the other; a GPU starts the next one while the last is copied back."""
    trailing: deque[tuple[Batch, object]] = deque()
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

    def run_pass(batch: Batch) -> PassFeatures:
        return backbone.fetch(backbone.forward(prepared, batch))

    pass_threads = backbone.policy.pass_threads
    workers = ThreadPoolExecutor(passes, "embedcache-pass", torch.set_num_threads, (pass_threads,))
    ahead: deque[tuple[Batch, Future[PassFeatures]]] = deque()
    # A new thread starts with the number that was set last, whoever set it; at the end the number is ours again.
    with threads(pass_threads):
        try:
            for batch in batches:
                ahead.append((batch, workers.submit(run_pass, batch)))
                if len(ahead) > passes:
                    first, running = ahead.popleft()
                    yield first, running.result()
            for batch, running in ahead:
                yield batch, running.result()
        finally:
            workers.shutdown(wait=True, cancel_futures=True)


def compute_features(backbone: Backbone, contents: Sequence[bytes], name: str) -> Array | tuple[Array, Array]:
    """Run a backbone over rows at canonical shapes: the very bits that a cache would hold.

    Returns the feature set ``name`` in float32, [N, D] or [N, L, D], or for a token-level set a pair
    (values [sum T, D], offsets int64 [N + 1]).
    """
    prepared = backbone.prepare(contents)
    features = run_plan(backbone, prepared, plan(prepared.lengths, backbone.policy))[name]
    return (decoded(features[0]), features[1]) if isinstance(features, tuple) else decoded(features)


# The probe of a backbone: its built-in rows, of several canonical lengths, prepared and run on this machine.


def probe_of(backbone: Backbone) -> Probe | None:
    """Run a backbone over its own ``probe_rows``, at canonical shapes; None where it has none. A few passes."""
    rows = [row for row in getattr(backbone, "probe_rows", ()) if _takes(backbone, row)]
    if not rows:
        return None
    prepared = backbone.prepare(rows)
    arrays = run_plan(backbone, prepared, plan(prepared.lengths, backbone.policy))
    outcomes = {}
    for feature in backbone.feature_sets:
        values = arrays[feature.name]
        stored = values[0] if isinstance(values, tuple) else values
        outcomes[feature.name] = Outcome.of(decoded(stored), feature.dtype)
    digests: list[str] = getattr(prepared, "digests", list)()
    versions: Mapping[str, str] = getattr(backbone, "probe_versions", {})
    return Probe(tuple(digests), versions, outcomes)


def _takes(backbone: Backbone, row: bytes) -> bool:
    """Whether a tokenizer makes tokens of a row that its model knows; one for proteins, say, may not."""
    try:
        backbone.prepare([row])
    except Exception:  # whatever a tokenizer raises; the user's own rows will say what is wrong, if anything is
        return False
    return True
