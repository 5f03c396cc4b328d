"""What extraction needs of a model, and how it is run: rows -> features, in the order of the rows."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from embedcache.backbone.device import MOST_PASSES, threads
from embedcache.batching import Batch, Plan, ShapePolicy, plan
from embedcache.errors import FeatureError
from embedcache.features import InMemory, Ragged, Stored, joined
from embedcache.memory import memory_kept
from embedcache.numerics import Outcome, Probe
from embedcache.shard import STORED, Array, FeatureSet
from embedcache.spec import view_name
from embedcache.wording import counted

# What extraction needs of a model, and of rows made ready for one. Anything that has these members can be cached.


Numbers = npt.NDArray[np.int64]
PassFeatures = Mapping[str, Array | tuple[Array, ...]]
"""What one pass gives of each feature set: [b, D] or [b, L, D], or for tokens (values [sum T, D], vectors [b])."""
StoredSets = dict[str, Stored]
"""Features of some rows by feature set."""


class Prepared(Protocol):
    """Rows made ready for the model on the CPU: tokens, pixels.

    ``vectors`` [n] may be there too: how many vectors a token-level set has of each row. Without it they are as many
    as ``lengths``, as a text has one vector for each token. An image costs 1, whatever the number of its patches.

    Rows that have ``views`` have that many more pictures each, behind the plain one: both arrays are then of pictures.
    Rows that are made ready while others go through the model already have a ``wait()`` for all of them.
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


def views_of(prepared: object) -> int:
    """Return how many views of each row there are beside the row itself, in prepared rows or of a backbone."""
    return int(getattr(prepared, "views", 0))


class Backbone(Protocol):
    """What extraction needs of a model. Features of ``fetch`` are in the order of ``batch.indices``.

    One that has ``probe_rows`` (contents), ``probe_versions`` (names -> versions of what prepares them) and prepared
    rows with ``digests()`` (a hash a row) too gets a probe in its caches; see ``probe``. One that makes ``views`` of
    its rows says with ``pass_sets`` which feature sets a pass gives; ``feature_sets`` has those of the views besides.
    One whose ``pass_threads`` is None decides itself on how many threads a pass has.
    """

    @property
    def identity(self) -> Mapping[str, object]:
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


Passes = Generator[tuple[Batch, StoredSets], None, None]
Done = Callable[[int, int], None]
"""What is told of each batch that is done: its rows, and their positions."""


class Collected:
    """Arrays for the features of prepared rows, filled pass by pass in whatever order the passes come."""

    def __init__(self, backbone: Backbone, prepared: Prepared, done: Done | None = None) -> None:
        self._views = views_of(prepared)
        self._lengths, self._vectors, self._done = np.asarray(prepared.lengths, np.int64), vectors_of(prepared), done
        ends = offsets_of(self._vectors)
        self.features: StoredSets = {}
        for feature in pass_sets(backbone):
            rows, offsets = (int(ends[-1]), ends) if feature.kind == "tokens" else (len(self._lengths), None)
            values = np.empty((rows, *feature.row_shape), STORED[feature.dtype])
            self.features[feature.name] = Stored(feature, values, offsets)

    def put(self, batch: Batch, features: StoredSets) -> None:
        """Put what one pass gave in its rows' places.

        Raises ``FeatureError`` when it gave another number of vectors than its rows have.
        """
        counts = self._vectors[batch.indices]
        for name, stored in features.items():
            into, offsets = self.features[name].values, self.features[name].offsets
            if stored.offsets is None or offsets is None:
                into[batch.indices] = stored.values
                continue
            if not np.array_equal(np.diff(stored.offsets), counts):
                raise FeatureError(
                    f"{name}: the backbone gave {stored.offsets[-1]} vectors for {counted(counts.sum(), 'token')}"
                )
            for row, part in zip(batch.indices, np.split(stored.values, stored.offsets[1:-1]), strict=True):
                into[offsets[row] : offsets[row + 1]] = part
        if self._done is not None:
            self._done(len(batch.indices), int(self._lengths[batch.indices].sum()))

    def finished(self) -> StoredSets:
        """Return the features by set, those of views in sets of their own."""
        if not self._views:
            return self.features
        sets = [
            _every(stored, view, self._views + 1)
            for view in range(self._views + 1) for stored in self.features.values()
        ]  # fmt: skip
        return {stored.feature.name: stored for stored in sets}


def _every(stored: Stored, view: int, step: int) -> Stored:
    """Return the features of every so many pictures, as the set of that view."""
    feature = replace(stored.feature, name=view_name(stored.feature.name, view))
    if stored.offsets is None:
        return Stored(feature, np.ascontiguousarray(stored.values[view::step]))
    rows = np.arange(view, len(stored), step)
    chosen = Ragged(stored.values, stored.offsets, feature).take(rows)
    return Stored(feature, chosen.values, chosen.offsets)


def pass_sets(backbone: Backbone) -> Sequence[FeatureSet]:
    """Return the feature sets that one pass gives."""
    sets: Sequence[FeatureSet] = getattr(backbone, "pass_sets", backbone.feature_sets)
    return sets


def run_plan(backbone: Backbone, prepared: Prepared, batches: Plan, done: Done | None = None) -> StoredSets:
    """Run every batch and put the features in the rows' order, in the storage type.

    Raises ``FeatureError`` when the backbone gives another number of token vectors than there are tokens.
    """
    collected = Collected(backbone, prepared, done)
    passes = min(backbone.side_by_side(len(batches)), MOST_PASSES)
    running = (
        _together(backbone, prepared, batches, passes) if passes > 1 else trailing(backbone, prepared, batches)
    )  # fmt: skip
    with kept_for(backbone), contextlib.closing(running):
        for batch, features in running:
            collected.put(batch, features)
    return collected.finished()


def kept_for(backbone: Backbone) -> contextlib.AbstractContextManager[None]:
    """Keep memory between the passes of pictures. Those of texts need small blocks, which are kept anyway."""
    return memory_kept() if getattr(backbone, "prepared_bytes", 0) else contextlib.nullcontext()


def offsets_of(counts: npt.ArrayLike) -> Numbers:
    """Return where each row's vectors begin and the last one's end, int64 [n + 1], given how many each row has."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _fetched(backbone: Backbone, running: object) -> StoredSets:
    """Wait for a pass. Raises ``FeatureError`` unless the backbone gives the feature sets that it says it has."""
    given, sets = backbone.fetch(running), {feature.name: feature for feature in pass_sets(backbone)}
    if given.keys() != sets.keys():
        raise FeatureError(f"the backbone gave the feature sets {sorted(given)}, expected {sorted(sets)}")
    features = {}
    for name, feature in sets.items():
        parts = given[name] if feature.kind == "tokens" else (given[name],)
        if len(parts) > 2:
            raise FeatureError(f"{name}: the backbone gave one array, expected a pair: values, and vectors of each row")
        values, *counts = map(np.asarray, parts)
        if values.dtype != STORED[feature.dtype] and np.can_cast(values.dtype, STORED[feature.dtype], "same_kind"):
            values = values.astype(STORED[feature.dtype], copy=False)
        features[name] = Stored(feature, values, *map(offsets_of, counts))
    return features


def trailing(backbone: Backbone, prepared: Prepared, batches: Iterable[Batch]) -> Passes:
    """Run one pass after the other; a GPU starts the next one while the last is copied back."""
    started: deque[tuple[Batch, object]] = deque()
    # One setting for all passes: changing the number of threads drops the kernels that oneDNN has prepared.
    with threads(getattr(backbone, "pass_threads", backbone.policy.pass_threads)):
        for batch in batches:
            started.append((batch, backbone.forward(prepared, batch)))
            if len(started) > 1:
                batch, running = started.popleft()
                yield batch, _fetched(backbone, running)
        for batch, running in started:
            yield batch, _fetched(backbone, running)


def _together(backbone: Backbone, prepared: Prepared, batches: Plan, passes: int) -> Passes:
    """Run several passes at a time, and give them back in the order of the plan."""
    import torch

    def run_pass(batch: Batch) -> StoredSets:
        return _fetched(backbone, backbone.forward(prepared, batch))

    pass_threads = backbone.policy.pass_threads
    workers = ThreadPoolExecutor(passes, "embedcache-pass", torch.set_num_threads, (pass_threads,))
    ahead: deque[tuple[Batch, Future[StoredSets]]] = deque()
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


class Readable(Protocol):
    """The contents of N rows: a list, or what reads each when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> bytes: ...


PREPARED_BYTES = 128 << 20
"""Pictures are small as files and large as pixels: so many bytes of them are prepared at once."""


def rows_at_once(backbone: Backbone) -> int | None:
    """Return how many rows are prepared at once: whole batches of pictures. None for any number, as of texts."""
    if not (row_bytes := getattr(backbone, "prepared_bytes", 0)):
        return None
    batch, fitting = max(1, backbone.policy.rows(1) - backbone.policy.spare), max(1, PREPARED_BYTES // row_bytes)
    return fitting // batch * batch or fitting


def compute_sets(backbone: Backbone, contents: Readable, names: Sequence[str]) -> dict[str, InMemory]:
    """Run a backbone over rows at canonical shapes: the very bits that a cache would hold, of some feature sets.

    Returns them in float32, not looked through for NaN. No more rows are read and prepared than ``rows_at_once`` says.
    """
    return _by_blocks(backbone, contents, names, lambda rows: backbone.prepare([contents[row] for row in rows]))


def compute_features(backbone: Backbone, contents: Readable, name: str) -> InMemory:
    """Return the feature set ``name`` as ``compute_sets`` does."""
    return compute_sets(backbone, contents, (name,))[name]


def compute_views(backbone: Backbone, contents: Readable, views: Numbers, name: str) -> InMemory:
    """Make one view of each row, by its number [n], and run the backbone over those alone; 0 is the row itself.

    ``name`` is the plain feature set's. Returns what ``compute_features`` does.
    """
    prepare = backbone.prepare_views  # type: ignore[attr-defined]  # only what has views is asked
    prepare_some = lambda rows: prepare([contents[row] for row in rows], views[rows.start : rows.stop])  # noqa: E731
    return _by_blocks(backbone, contents, (name,), prepare_some)[name]


def _by_blocks(
    backbone: Backbone, contents: Readable, names: Sequence[str], prepare: Callable[[range], Prepared]
) -> dict[str, InMemory]:
    parts: dict[str, list[InMemory]] = {name: [] for name in names}
    for rows in _blocks(len(contents), rows_at_once(backbone)):
        prepared = prepare(rows)
        features = run_plan(backbone, prepared, plan(prepared.lengths, backbone.policy))
        del prepared  # before the next block is prepared
        for name in names:
            parts[name].append(features[name].decoded())
    return {name: cast("InMemory", joined(parts[name])) for name in names}


def _blocks(count: int, size: int | None) -> Iterator[range]:
    """Yield the numbers of ``count`` rows, ``size`` of them at a time; of no rows, one block of none."""
    size = size or max(count, 1)
    for start in range(0, max(count, 1), size):
        yield range(start, min(start + size, count))


# The probe of a backbone: its built-in rows, of several canonical lengths, prepared and run on this machine.


def probe_of(backbone: Backbone) -> Probe | None:
    """Run a backbone over its own ``probe_rows``, at canonical shapes; None where it has none. A few passes."""
    rows = [row for row in getattr(backbone, "probe_rows", ()) if _takes(backbone, row)]
    if not rows:
        return None
    prepared = backbone.prepare(rows)
    features = run_plan(backbone, prepared, plan(prepared.lengths, backbone.policy))
    outcomes = {name: Outcome.of(stored.decoded().values, stored.feature.dtype) for name, stored in features.items()}
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
