"""Examples + backbone -> cache: what is new is cut into windows, computed, and committed in order.

Five things overlap: a thread reads and prepares the next window of rows, the main thread runs the backbone, on a GPU
the copy back trails one batch behind, and another thread builds, writes and commits the last window as a shard. At
most three windows are in memory, however many rows there are.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from embedcache.backbone import Backbone, views_of
from embedcache.cache import SET_ASIDE, CacheWriter
from embedcache.dataset import Examples, key_values
from embedcache.errors import BadRowsError, FeatureError, Interrupted, warn
from embedcache.examples import set_aside
from embedcache.extract.here import Here
from embedcache.extract.progress import Bar, ExtractionReport, Progress, Watch
from embedcache.extract.windows import Rows, new_rows, shard_rows, windows
from embedcache.extract.work import Computed, Costs, Engine
from embedcache.memory import return_memory
from embedcache.wording import counted


def run(
    examples: Examples,
    backbone: Backbone,
    output_dir: Path | str,
    *,
    engine: Engine | None = None,
    rows_per_shard: int | None = None,
    keep_inputs: bool = False,
    accept_numerics: bool = False,
    quarantine: Path | None = None,
    progress: Progress | None = None,
) -> ExtractionReport:
    """Bring a cache up to date with ``examples``: run the backbone over the rows it does not hold, and nothing else.

    ``engine`` says who computes, None for ``Here()``. Rows that its workers do not survive are written to the
    ``quarantine`` and left out of the dataset, by later runs too; with None they are tried again, and end the run.
    Where there are new rows, the backbone's probe is run first: rows are added only to rows of the same bits, or with
    ``accept_numerics`` to others, which the cache then records.

    Raises:
        SpecMismatchError: the cache there holds features made another way.
        NumericsMismatchError: the cache there holds rows that another kind of machine computed.
        BadRowsError: rows that workers do not survive; all before them are committed.
        CacheLockedError: another process writes to it.
        Interrupted: Ctrl-C; what was committed stays, and the same call goes on from there.
    """
    start = time.perf_counter()
    engine = Here() if engine is None else engine
    costs, numerics, lost = Costs(), None, np.zeros(0, np.int64)
    provenance: Mapping[str, object] = backbone.provenance
    with (
        contextlib.closing(engine),  # also where the cache is not to be written
        CacheWriter(Path(output_dir), backbone.identity, backbone.feature_sets) as writer,
        contextlib.closing(Bar(pictures=examples.kind == "image") if progress is None else progress) as display,
    ):
        known = writer.lookup(examples.keys)
        todo, reused = new_rows(examples, known), int((known >= 0).sum())
        if quarantine is not None:  # not tried again, or the others would be cut otherwise than they were
            aside = np.isin(key_values(examples.keys[todo]), key_values(writer.set_aside))
            lost, todo = todo[aside], todo[~aside]
        new_keys = examples.keys[todo]
        del known  # 8 bytes a row, for as long as the backbone runs
        source = windows(examples, todo, backbone, shard_rows(backbone.feature_sets, rows_per_shard))
        try:
            if len(todo):
                proof = engine.prove(backbone, writer.probe)
                numerics = writer.admit(proof.probe, accept=accept_numerics)
                provenance = {**proof.provenance, **({} if proof.probe is None else {"probe": proof.probe.hash})}
            with (
                Commits(writer, examples, backbone, provenance) as commits,
                contextlib.closing(engine.map(backbone, source, Watch(display, len(todo)))) as computed_windows,
            ):
                for computed in computed_windows:
                    lost = np.union1d(lost, computed.lost)
                    if len(lost) and quarantine is None:  # before its window, whose shard would not be one process's
                        raise BadRowsError(_told(examples, lost), len(lost))
                    commits.add(computed)
                    costs += computed.costs
            return_memory()  # the windows' buffers
            notes, left_out = [*engine.notes], _left_out(examples, lost)
            if len(lost) and quarantine is not None:
                set_aside(quarantine, _told(examples, lost), examples.contents(lost))
                notes.append(f"{counted(len(lost), 'row')} set aside in {quarantine}: workers do not survive them")
                examples = examples.without(lost)
            notes += writer.dropped(examples)
            writer.commit_dataset(examples, examples.packed_contents if keep_inputs else None, left_out)
        except KeyboardInterrupt:
            kept = int((writer.lookup(new_keys) >= 0).sum())
            raise Interrupted(
                f"interrupted: {kept:,} of {len(todo):,} new rows are committed in {output_dir} and stay; "
                "run the same command again to go on from there"
            ) from None
    warn(notes)
    return ExtractionReport(
        rows=len(examples.keys),
        unique=examples.n_unique,
        reused=reused,
        seconds=time.perf_counter() - start,
        numerics=numerics,
        notes=tuple(notes),
        views=views_of(backbone),
        **vars(costs),
    )


def _told(examples: Examples, lost: Rows) -> list[tuple[str, str]]:
    """Return what rows are called that workers do not survive, and what is wrong with them."""
    return [(f"row {examples.ids[row]}", "every worker that computes it is lost") for row in lost.tolist()]


def _left_out(examples: Examples, lost: Rows) -> list[str]:
    """Return the keys, in hexadecimal, of lost rows and of each duplicate: merged parts have to lack as many."""
    if not len(lost):
        return []
    keys = examples.keys
    return [key.tobytes().hex() for key in keys[np.isin(key_values(keys), key_values(keys[lost]))]]


class Commits:
    """Commits windows as shards, in the order they come, in a thread of its own and at most one window behind."""

    def __init__(
        self, writer: CacheWriter, examples: Examples, backbone: Backbone, provenance: Mapping[str, object]
    ) -> None:
        self._writer, self._examples, self._backbone, self._provenance = writer, examples, backbone, provenance
        self._thread = ThreadPoolExecutor(1, "embedcache-commit")
        self._last: Future[None] | None = None
        self._aside: list[str] = []

    def __enter__(self) -> Commits:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        # What was computed is committed also when a later window failed; that failure is then the one to tell of.
        self._thread.shutdown(wait=True)
        if error is None:
            self._wait()

    def add(self, computed: Computed) -> None:
        """Commit a window once the one before it is; raises what that one met with."""
        self._wait()
        self._last = self._thread.submit(self._commit, computed)

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()

    def _commit(self, computed: Computed) -> None:
        refuse_non_finite(computed, self._backbone, self._examples)
        keys = self._examples.keys
        # Kept with the shard, so that a run that goes on knows what was cut; of a window without a row with the next.
        self._aside += _left_out(self._examples, computed.lost)
        if len(computed.rows):
            told = {SET_ASIDE: self._aside} if self._aside else {}
            self._writer.append(keys[computed.rows], computed.features, {**self._provenance, **told})
            self._aside = []


def refuse_non_finite(computed: Computed, backbone: Backbone, examples: Examples) -> None:
    """Raise ``FeatureError`` naming the first row whose features hold NaN or infinity."""
    for name, stored in computed.features.items():
        row = stored.first_non_finite()
        if row is None:
            continue
        compute_dtype = backbone.identity.get("compute_dtype", "float32")
        advice = "compute in bfloat16 or float32" if compute_dtype == "float16" else "check the model's weights"
        raise FeatureError(
            f"the backbone gave NaN or infinity for row {examples.ids[int(computed.rows[row])]} "
            f"in the set {name}: {advice}"
        )
