"""What an extraction would do, how long it would take and how much it would write; nothing is written."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from embedcache.backbone import Backbone, rows_at_once, run_plan, vectors_of, views_of
from embedcache.backbone import threads as torch_threads
from embedcache.batching import Plan, plan
from embedcache.cache import known_rows
from embedcache.dataset import evenly_spread
from embedcache.examples import Examples
from embedcache.extract.windows import Rows, new_rows, row_bytes_of, shard_rows
from embedcache.spec import plain_name, states_set
from embedcache.wording import counted, duration, listed

SAMPLE = 20_000
CALIBRATION = 4
COMPILE_SECONDS = 15.0
COMPILE_GAIN = 1.3


@dataclass(frozen=True)
class Saving:
    """What hidden states spare each epoch of ``tune``: so many of the network's blocks are not run.

    ``seconds`` are about what these take for the training rows, ``rows``; None where nothing was timed.
    """

    trained: int
    spared: int
    blocks: int
    rows: int
    seconds: float | None

    def to_text(self) -> str:
        """Say it on one line."""
        took = f", about {duration(self.seconds)} for {counted(self.rows, 'training row')}" if self.seconds else ""
        epoch = f"every epoch of tune --blocks {self.trained}"
        return f"{self.spared:,} of {counted(self.blocks, 'block')} in {epoch}{took}"


@dataclass(frozen=True)
class Forecast:
    """A dry run. ``histogram`` and ``shapes`` describe the rows that would be computed.

    ``saves`` has what each set of hidden states spares.
    """

    rows: int
    unique: int
    already_there: int
    to_extract: int
    sampled: int
    truncated: int
    tokens: int
    computed: int
    histogram: list[dict[str, int]]
    shapes: list[dict[str, int]]
    bytes: dict[str, int]
    shards: int
    seconds: float | None
    views: int = 0
    saves: Mapping[str, Saving] = field(default_factory=dict)

    @property
    def overhead(self) -> float:
        """Positions computed for each real one."""
        return self.computed / self.tokens if self.tokens else 1.0

    def to_json(self) -> dict[str, object]:
        """Return the forecast as JSON values."""
        return {**asdict(self), "overhead": self.overhead}

    def to_text(self) -> str:
        """Lay the forecast out for a terminal."""
        lines = [
            f"rows        {self.rows:,} ({self.unique:,} unique)",
            f"to extract  {self.to_extract:,} ({self.already_there:,} unique rows are in the cache)",
        ]
        if not self.to_extract:
            return "\n".join([*lines, "nothing to compute"])
        if self.sampled < self.to_extract:
            lines.append(f"sampled     {counted(self.sampled, 'row')}, scaled up below")
        shapes = [f"{shape['rows']}x{shape['length']} ({shape['batches']:,})" for shape in self.shapes]
        if self.views:
            times = self.views + 1
            lines.append(
                f"views       {self.views} of each picture: {times} times the passes and the disk of the plain pictures"
            )
        if self.tokens == self.to_extract * (self.views + 1):  # pictures, each of them one position
            lines.append(f"batches     rows x 1 (batches): {listed(shapes, 6)}")
        else:
            lines += [*self._histogram(), f"shapes      rows x tokens (batches): {listed(shapes, 6)}"]
            of_each = f"{counted(self.computed, 'position')} for {counted(self.tokens, 'token')}"
            lines.append(f"padding     {of_each}: {self.overhead:.3f}")
        lines += [f"on disk     {name}: {told}" for name, told in self._on_disk().items()]
        lines += [f"saves       {name}: {saving.to_text()}" for name, saving in self.saves.items()]
        lines.append(f"shards      {self.shards:,}")
        if self.seconds is not None:
            lines.append(f"time        about {duration(self.seconds)}, from a few calibration batches")
        return "\n".join(lines)

    def _on_disk(self) -> dict[str, str]:
        """Return what each set takes, those of views behind their plain one's."""
        names = [(name, *plain_name(name)) for name in self.bytes]
        told = {name: _size(self.bytes[name]) for name, _, view in names if not view}
        for plain in told:
            if of_views := sum(self.bytes[name] for name, of, view in names if view and of == plain):
                told[plain] += f", and {_size(of_views)} for its views"
        return told

    def _histogram(self) -> Iterator[str]:
        most = max(step["rows"] for step in self.histogram)
        yield "tokens a row"
        for step in self.histogram:
            bar = "#" * -(-40 * step["rows"] // most)
            yield f"  {step['from']:>5}-{step['to']:<5} {step['rows']:>9,}  {bar}".rstrip()
        if self.truncated:
            yield f"truncated   {self.truncated:,} rows are longer than the model reads"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def forecast(
    examples: Examples,
    backbone: Backbone,
    output_dir: Path | str | None,
    *,
    rows_per_shard: int | None = None,
    threads: int | None = None,
) -> Forecast:
    """Prepare the rows that would be computed, plan them and time a few batches.

    Of many rows it is a sample: 20,000 texts, or as many images as are prepared at a time.
    """
    known = known_rows(output_dir, backbone.identity, backbone.feature_sets, examples.keys)
    todo = new_rows(examples, known)
    sample = todo[evenly_spread(len(todo), rows_at_once(backbone) or SAMPLE)]
    scale = len(todo) / max(len(sample), 1)
    lengths = vectors = np.zeros(0, np.int64)
    truncated, seconds = 0, None
    if len(sample):
        prepared = backbone.prepare(list(examples.contents(sample)))
        lengths, truncated = np.asarray(prepared.lengths, np.int64), prepared.truncated
        vectors = vectors_of(prepared)[:: views_of(prepared) + 1]
        batches = plan(lengths, backbone.policy)
        getattr(prepared, "wait", lambda: None)()  # what is timed is the passes
        with torch_threads(threads):
            count = CALIBRATION * backbone.side_by_side(len(batches))
            chosen = evenly_spread(len(batches), count)
            some = Plan(tuple(batches.batches[number] for number in chosen), batches.real)
            run_plan(backbone, prepared, Plan(some.batches[-1:], batches.real))
            start = time.perf_counter()
            run_plan(backbone, prepared, some)
            rate = some.computed / max(time.perf_counter() - start, 1e-9)
        seconds = batches.computed * scale / rate
    whole = plan(lengths, backbone.policy)
    counts: dict[tuple[int, int], int] = {}
    for batch in whole:
        counts[batch.rows, batch.length] = counts.get((batch.rows, batch.length), 0) + 1
    size = {
        feature.name: row_bytes_of(feature)
        * (round(float(vectors.sum()) * scale) if feature.kind == "tokens" else len(todo))
        for feature in backbone.feature_sets
    }
    return Forecast(
        rows=len(examples.keys),
        unique=examples.n_unique,
        already_there=examples.n_unique - len(todo),
        to_extract=len(todo),
        sampled=len(sample),
        truncated=round(truncated * scale),
        tokens=round(whole.real * scale),
        computed=round(whole.computed * scale),
        histogram=_histogram(lengths, scale),
        shapes=[
            {"rows": rows, "length": length, "batches": round(count * scale)}
            for (rows, length), count in sorted(counts.items(), key=lambda item: -item[1])
        ],
        bytes=size,
        shards=-(-len(todo) // shard_rows(backbone.feature_sets, rows_per_shard)),
        seconds=seconds,
        views=views_of(backbone),
        saves=_saves(examples, backbone, None if seconds is None else seconds / len(todo) / (views_of(backbone) + 1)),
    )


def _saves(examples: Examples, backbone: Backbone, seconds_a_row: float | None) -> dict[str, Saving]:
    """Return what each set of states spares, if all blocks take the same time and embeddings take none."""
    rows, blocks = examples.split_sizes().get("train", 0), int(getattr(backbone, "blocks", 0))
    there = {feature.name for feature in backbone.feature_sets}
    return {
        states_set(trained): Saving(
            trained, blocks - trained, blocks, rows,
            None if seconds_a_row is None else seconds_a_row * rows * (blocks - trained) / blocks,
        )
        for trained in range(1, blocks) if states_set(trained) in there
    }  # fmt: skip


def _histogram(lengths: Rows, scale: float) -> list[dict[str, int]]:
    if not len(lengths):
        return []
    low, high = int(lengths.min()), int(lengths.max())
    step = max(1, -(-(high - low + 1) // 12))
    starts = range(low, high + 1, step)
    return [
        {
            "from": start,
            "to": start + step - 1,
            "rows": round(float(((lengths >= start) & (lengths < start + step)).sum()) * scale),
        }
        for start in starts
    ]


def compile_hint(examples: Examples, backbone: Backbone, output_dir: Path | str) -> str | None:
    """Return one line when so many rows are new that compiling would pay, judged by two batches; else None."""
    known = known_rows(output_dir, backbone.identity, backbone.feature_sets, examples.keys)
    rows = len(new_rows(examples, known))
    # A cache that exists has decided already; a few thousand rows never pay.
    if backbone.identity.get("execution") != "eager" or rows < 5000 or (known >= 0).any():
        return None
    sample = evenly_spread(len(examples.keys), 256)
    prepared = backbone.prepare(list(examples.contents(sample)))
    batches = plan(prepared.lengths, backbone.policy)
    batch = max(batches, key=lambda batch: len(batch.indices))
    backbone.fetch(backbone.forward(prepared, batch))
    start = time.perf_counter()
    backbone.fetch(backbone.forward(prepared, batch))
    seconds = (time.perf_counter() - start) / batch.positions * batches.overhead * batches.real / len(sample) * rows
    saved = seconds * (1 - 1 / COMPILE_GAIN) - COMPILE_SECONDS
    if saved < 30:
        return None
    return (
        f"about {duration(seconds)} of computing: --compile would save about {duration(saved)} "
        "(other last bits, so another cache)"
    )


def half_type_hint(backbone: Backbone) -> str | None:
    """Return one line where a half type was asked for that this CPU has no instructions for; else None."""
    import torch

    dtype = str(backbone.identity.get("compute_dtype"))
    asks = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}
    supported = getattr(torch.ops.mkldnn, asks.get(dtype, ""), None)
    if getattr(backbone, "device", torch.device("meta")).type != "cpu" or supported is None or supported():
        return None
    return (
        f"this CPU has no instructions for {dtype}, which takes several times as long as float32 here: --dtype "
        "float32 is quicker, and --store float16 keeps features small all the same"
    )
