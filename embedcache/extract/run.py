"""Examples + backbone -> cache: plan, resume, deduplicate, commit.

Five things overlap: a thread reads and tokenises the next window of rows, the main thread runs the backbone, on a GPU
the copy back trails one batch behind, and another thread builds, writes and commits the last window as a shard. At
most three windows are in memory, however many rows there are.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from embedcache.backbone import Backbone, Prepared, probe_of, run_plan, vectors_of, workers
from embedcache.backbone import threads as torch_threads
from embedcache.batching import plan
from embedcache.cache import CacheWriter
from embedcache.errors import FeatureError, Interrupted, SpecError, warn
from embedcache.examples import Examples
from embedcache.numerics import Difference
from embedcache.shard import STORED, FeatureSet
from embedcache.wording import counted, shown

SHARD_ROWS = 16384
PROCESS_ROWS = 8192
"""New rows from which on more processes, each of which loads the model, are worth starting."""
SHARD_BYTES = 64 << 20
CONTENT_BYTES = 64 << 20
RAGGED_BYTES = 256 << 20
"""Token-level windows may be larger than a pooled shard: canonical batches need company of their own length."""

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ExtractionReport:
    """What one extraction did. ``tokens`` are real positions, ``computed`` includes padding and dummy rows.

    ``numerics`` says how the new rows' machine differs from that of the rows that were there; None where either is not.
    ``notes`` say what of the cache's former dataset the new one does not have.
    """

    rows: int
    unique: int
    reused: int
    extracted: int
    truncated: int
    batches: int
    tokens: int
    computed: int
    shards: int
    seconds: float
    numerics: Difference | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {**asdict(self), "numerics": None if self.numerics is None else self.numerics.to_json()}

    def to_text(self, where: Path | str) -> str:
        """Say it in a few lines."""
        lines = [
            f"{counted(self.rows, 'row')} ({self.unique:,} unique) in {shown(where)}: "
            f"{self.extracted:,} extracted, {self.reused:,} already there"
        ]
        if self.extracted:
            rate = f"{self.extracted / self.seconds:,.0f} rows/s, {self.tokens / self.seconds:,.0f} tokens/s"
            padding = f"{self.computed / max(self.tokens, 1):.3f} positions computed for each real one"
            lines.append(
                f"{self.seconds:.1f} s, {rate}; {counted(self.batches, 'forward pass')}, {padding}; "
                f"{counted(self.shards, 'new shard')}"
            )
        if self.truncated:
            lines.append(f"{self.truncated:,} rows were longer than the model reads and were cut")
        if self.numerics is not None and self.numerics.status != "same":
            lines.append(f"numerics of the new rows, against those that were there: {self.numerics.to_text()}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Window:
    """Consecutive new rows that are tokenised, planned and committed together, as one shard."""

    rows: Rows
    prepared: Prepared

    def __len__(self) -> int:
        return len(self.rows)


class Progress(Protocol):
    """What a progress display must do; ``Bar`` draws one with tqdm, tests count with one."""

    def expect(self, tokens: int) -> None:
        """Say how many real positions the whole run is now thought to have."""

    def advance(self, rows: int, tokens: int) -> None:
        """Say that a batch is done."""

    def close(self) -> None:
        """Say that no more is coming."""


class Bar:
    """A tqdm bar on stderr, only on a terminal: tokens done of tokens expected, tokens/s, time left, rows/s."""

    def __init__(self, title: str = "extract") -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            desc=title, unit="tok", unit_scale=True, disable=None if sys.stderr.isatty() else True, mininterval=0.2
        )
        self._rows = 0
        self._start = time.perf_counter()

    def expect(self, tokens: int) -> None:
        """Correct the expected total."""
        self._bar.total = tokens

    def advance(self, rows: int, tokens: int) -> None:
        """Move the bar."""
        self._rows += rows
        if not self._bar.disable:
            self._bar.set_postfix_str(
                f"{self._rows / max(time.perf_counter() - self._start, 1e-9):,.0f} rows/s", refresh=False
            )
            self._bar.update(tokens)

    def close(self) -> None:
        """Leave the finished bar on its line."""
        self._bar.close()


def new_rows(examples: Examples, known: Rows) -> Rows:
    """Return the rows whose content is not in the cache yet, each content once, in the order of the input.

    ``known`` [N] holds each row's place in the cache, -1 for none.
    """
    missing = np.flatnonzero(known < 0)
    keys = np.ascontiguousarray(examples.keys[missing]).view("V16").ravel()
    _, first = np.unique(keys, return_index=True)
    first.sort()
    return missing[first]


def unique_count(examples: Examples) -> int:
    """Return how many different contents there are."""
    return len(np.unique(np.ascontiguousarray(examples.keys).view("V16").ravel()))


def row_bytes_of(each: FeatureSet) -> int:
    """Return the bytes of one row of a feature set, or of one token's vector."""
    dtype: np.dtype[Any] = STORED[each.dtype]
    return int(np.prod(each.row_shape)) * dtype.itemsize


def shard_rows(feature_sets: Sequence[FeatureSet], asked: int | None = None) -> int:
    """Return rows per shard: ``asked``, else 16,384 or fewer so that a shard of pooled features is at most 64 MB.

    A multiple of 1,024 rows makes every set's bytes a multiple of a memory page.
    """
    if asked is not None:
        if asked < 1:
            raise SpecError(f"rows per shard is {asked}: expected at least 1")
        return asked
    row_bytes = sum(row_bytes_of(each) for each in feature_sets if each.kind != "tokens")
    return max(1024, min(SHARD_ROWS, SHARD_BYTES // max(row_bytes, 1) // 1024 * 1024))


def windows(examples: Examples, rows: Rows, backbone: Backbone, most: int) -> Iterator[Window]:
    """Read and prepare ``rows`` (increasing) window by window.

    Where a window ends depends only on the rows from its start on, so a run resumed at a window's start cuts the
    rest exactly as the interrupted one would have.
    """
    ragged = sum(row_bytes_of(each) for each in backbone.feature_sets if each.kind == "tokens")
    contents = examples.contents(rows)
    waiting: deque[bytes] = deque()
    at = 0
    while at < len(rows):
        size = sum(len(content) for content in waiting)
        while len(waiting) < min(most, len(rows) - at) and (not waiting or size <= CONTENT_BYTES):
            waiting.append(next(contents))
            size += len(waiting[-1])
        take = _fitting(np.fromiter((len(content) for content in waiting), np.int64, len(waiting)), CONTENT_BYTES)
        prepared = backbone.prepare([waiting[index] for index in range(take)])
        if ragged and (fits := _fitting(vectors_of(prepared) * ragged, RAGGED_BYTES)) < take:
            take = fits
            prepared = backbone.prepare([waiting[index] for index in range(take)])
        for _ in range(take):
            waiting.popleft()
        yield Window(rows[at : at + take], prepared)
        at += take


def _fitting(sizes: Rows, limit: int) -> int:
    """Return how many of ``sizes`` from the start fit in ``limit``, at least 1."""
    return max(1, int(np.searchsorted(np.cumsum(sizes), limit, side="right")))


def prefetch(source: Iterator[Window], depth: int = 1) -> Iterator[Window]:
    """Run an iterator in a thread, ``depth`` items ahead; its errors are raised here, and closing stops it."""
    ready: queue.Queue[Window | BaseException | None] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: Window | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in source:
                put(item)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # handed over to the thread that can act on it
            put(error)

    thread = threading.Thread(target=produce, name="embedcache-read", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


def refuse_non_finite(window: Window, arrays: Mapping[str, Any], backbone: Backbone, examples: Examples) -> None:
    """Raise ``FeatureError`` naming the first row whose features hold NaN or infinity."""
    for each in backbone.feature_sets:
        values, offsets = arrays[each.name] if each.kind == "tokens" else (arrays[each.name], None)
        row = each.first_non_finite(values, offsets)
        if row is None:
            continue
        compute_dtype = backbone.identity.get("compute_dtype", "float32")
        advice = "compute in bfloat16 or float32" if compute_dtype == "float16" else "check the model's weights"
        raise FeatureError(
            f"the backbone gave NaN or infinity for row {examples.ids[int(window.rows[row])]} "
            f"in the set {each.name}: {advice}"
        )


def run(
    examples: Examples,
    backbone: Backbone,
    output_dir: Path | str,
    *,
    rows_per_shard: int | None = None,
    keep_inputs: bool = False,
    threads: int | None = None,
    accept_numerics: bool = False,
    processes: bool = False,
    progress: Progress | None = None,
) -> ExtractionReport:
    """Bring a cache up to date with ``examples``: run the backbone over the rows it does not hold, and nothing else.

    Where there are new rows, the backbone's probe is run first: rows are added only to rows of the same bits, or with
    ``accept_numerics`` to others, which the cache then records. With ``processes``, more passes at a time than one
    process keeps busy are run in others, where the new rows are many; the running program is then imported again.

    Raises:
        SpecMismatchError: the cache there holds features made another way.
        NumericsMismatchError: the cache there holds rows that another kind of machine computed.
        CacheLockedError: another process writes to it.
        Interrupted: Ctrl-C; what was committed stays, and the same call goes on from there.
    """
    start = time.perf_counter()
    counts = {"extracted": 0, "truncated": 0, "batches": 0, "tokens": 0, "computed": 0, "shards": 0}
    with (
        torch_threads(threads),
        CacheWriter(Path(output_dir), dict(backbone.identity), backbone.feature_sets) as writer,
    ):
        known = writer.lookup(examples.keys)
        todo = new_rows(examples, known)
        most = shard_rows(backbone.feature_sets, rows_per_shard)
        reused = int((known >= 0).sum())
        bar: Progress = progress if progress is not None else Bar()
        committer = ThreadPoolExecutor(1, "embedcache-commit")
        committing: Future[None] | None = None
        source = prefetch(windows(examples, todo, backbone, most))
        seen = tokens_seen = 0
        provenance, numerics = dict(backbone.provenance), None
        pool = contextlib.ExitStack()

        def commit(window: Window, arrays: Mapping[str, Any]) -> None:
            refuse_non_finite(window, arrays, backbone, examples)
            writer.append(examples.keys[window.rows], arrays, provenance)

        try:
            run_batches: Any = functools.partial(run_plan, backbone)
            if len(todo):
                probe = probe_of(backbone)
                numerics = writer.admit(probe, accept=accept_numerics)
                provenance |= {} if probe is None else {"probe": probe.hash}
                if processes and len(todo) >= PROCESS_ROWS:
                    others = pool.enter_context(workers(backbone, backbone.side_by_side(len(todo))))
                    run_batches = run_batches if others is None else others.run_plan
            for window in source:
                batches = plan(window.prepared.lengths, backbone.policy)
                seen += len(window)
                tokens_seen += batches.real
                bar.expect(round(tokens_seen / seen * len(todo)))
                arrays = run_batches(window.prepared, batches, bar.advance)
                if committing is not None:
                    committing.result()
                committing = committer.submit(commit, window, arrays)
                counts["extracted"] += len(window)
                counts["truncated"] += window.prepared.truncated
                counts["batches"] += len(batches)
                counts["tokens"] += batches.real
                counts["computed"] += batches.computed
                counts["shards"] += 1
            if committing is not None:
                committing.result()
            notes = writer.dropped(examples)
            writer.commit_dataset(examples, examples.packed_contents if keep_inputs else None)
        except KeyboardInterrupt:
            committer.shutdown(wait=True)
            kept = int((writer.lookup(examples.keys[todo]) >= 0).sum())
            raise Interrupted(
                f"interrupted: {kept:,} of {len(todo):,} new rows are committed in {output_dir} and stay; "
                "run the same command again to go on from there"
            ) from None
        finally:
            pool.close()
            source.close()  # type: ignore[attr-defined]  # a generator: stops the reading thread
            committer.shutdown(wait=True)
            bar.close()
    warn(notes)
    return ExtractionReport(
        rows=len(examples.keys),
        unique=unique_count(examples),
        reused=reused,
        seconds=time.perf_counter() - start,
        numerics=numerics,
        notes=tuple(notes),
        **counts,
    )
