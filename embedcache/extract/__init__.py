"""Examples + backbone -> cache: ``windows`` cuts new rows, ``work`` computes them, ``commit`` keeps them in order.

``run`` is the pipeline, ``forecast`` the dry run, ``extract`` the one call that does it all. An ``Engine`` says who
does the work: ``Here`` this process; ``Elsewhere`` the workers of a ``crew``, each of which does with ``units`` what
``worker`` says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedcache.arguments import checks_arguments
from embedcache.backbone import Backbone, Encoder, choose_devices, load_backbone
from embedcache.cache import FeatureCache, read_spec
from embedcache.dataset import key_values
from embedcache.errors import SpecError, warn
from embedcache.examples import Examples, load_examples, quarantine_file
from embedcache.extract.commit import run
from embedcache.extract.crew import Given, Processes
from embedcache.extract.elsewhere import Elsewhere
from embedcache.extract.forecast import Forecast, compile_hint, forecast, half_type_hint
from embedcache.extract.here import Here
from embedcache.extract.progress import Bar, ExtractionReport, Progress
from embedcache.extract.windows import Window, new_rows
from embedcache.extract.work import Computed, Engine, Proof, work
from embedcache.spec import BackboneSettings, ModelSource, PixelRange

if TYPE_CHECKING:
    from embedcache.backbone import LoadedBackbone

__all__ = [
    "Bar",
    "Computed",
    "Elsewhere",
    "Engine",
    "ExtractionReport",
    "Forecast",
    "Here",
    "Progress",
    "Proof",
    "Window",
    "compile_hint",
    "encoder_for",
    "engine_for",
    "extract",
    "forecast",
    "load_for",
    "new_rows",
    "parse_part",
    "part_of",
    "recorded_range",
    "run",
    "work",
]


def load_for(
    output_dir: Path | str | None, source: ModelSource, asked: BackboneSettings, engine: Elsewhere | None = None
) -> LoadedBackbone:
    """Load the backbone for a cache. What is left None, an existing cache decides; what is given, it must agree with.

    The agreement itself is checked where the cache is opened for writing, with a difference that names the fields.
    ``engine`` is whoever computes elsewhere: what device they have decides the canonical shapes.
    """
    recorded = read_spec(output_dir) if output_dir is not None else None
    if recorded is not None:
        spec, made_with = recorded
        source = source.or_else(made_with.get("model"), made_with.get("revision"))
        asked = asked.over(spec.settings or BackboneSettings())
    if engine is not None:
        source, asked = engine.settled(source, asked)
    return load_backbone(**source.arguments(), **asked.arguments())


def encoder_for(
    output_dir: Path | str, function: Callable[[list[Any]], Any], identity: object, examples: Examples,
    asked: BackboneSettings, reads: str | None,
) -> Encoder:  # fmt: skip
    """Return an encoder for a cache. Raises ``SpecError`` for settings that only models have."""
    unknown = replace(asked, content=None, positions=None, storage_dtype=None)
    for setting in fields(BackboneSettings):
        if getattr(unknown, setting.name) != setting.default:
            raise SpecError(f"{setting.name} is a setting of models, and an encoder is given: it prepares rows itself")
    if identity is None:
        raise SpecError(
            "an encoder needs an identity: what it is, so that no other's features get into the cache, such as "
            'identity={"model": "vit_small_patch14", "timm": "1.0.20"}'
        )
    if examples.pixel_range is not None:
        raise SpecError("pixel_range is of models: give the encoder pictures with 8 bits, or decode them in it")
    recorded = read_spec(output_dir)
    described = {} if recorded is None else recorded[0].features.get("features", {})
    width = described.get("dim") if isinstance(described, Mapping) else None
    return Encoder.made(
        function, identity, examples.kind, reads=reads, rows=asked.positions, storage_dtype=asked.storage_dtype,
        width=width, row=next(iter(examples.contents())),
    )  # fmt: skip


def engine_for(
    executor: Executor | None = None, workers: int | None = None, ray: str | None = None, *,
    threads: int | None = None, devices: Sequence[str] = (),
) -> Elsewhere | None:  # fmt: skip
    """Return the engine that has others work: who stands behind an executor, on a Ray, in processes; None for nobody.

    Raises ``SpecError`` for what cannot be.
    """
    if executor is not None and ray is not None:
        raise SpecError("executor and ray are given: say one of them")
    if ray is not None:
        from embedcache.extract.actors import Actors

        return Elsewhere(Actors(ray, workers, threads))
    if executor is not None:
        return Elsewhere(Given(executor, workers, threads))
    return None if workers is None else Elsewhere(Processes(workers, threads, devices))


def recorded_range(cache: Path | str | None) -> PixelRange | None:
    """Return the range of pixels that a cache's pictures are read with; None where there is no cache, or no range."""
    recorded = read_spec(cache) if cache is not None else None
    return None if recorded is None else recorded[0].pixel_range


def parse_part(text: str | None) -> tuple[int, int] | None:
    """Read ``I/N`` with 1 <= I <= N, or None."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise SpecError(f"part is {text!r}: expected I/N with 1 <= I <= N, such as 2/8")
    return int(match[1]), int(match[2])


def part_of(examples: Examples, part: int, parts: int) -> Examples:
    """Return the rows of one part: unique contents, in the order of the input, are dealt out in ``parts`` runs.

    A content and all its duplicates fall in one part, so no part computes what another does.
    """
    order = new_rows(examples, np.full(len(examples.keys), -1, np.int64))
    chosen = order[len(order) * (part - 1) // parts : len(order) * part // parts]
    keys = key_values(examples.keys)
    return examples.select(np.flatnonzero(np.isin(keys, keys[chosen])))


@checks_arguments(load_examples, ModelSource, BackboneSettings)
def extract(
    inputs: Any = None,
    *,
    output_dir: Path | str,
    model: Path | str | None = None,
    pooling: str | Sequence[str] = (),
    backbone: Backbone | None = None,
    encoder: Callable[[list[Any]], Any] | None = None,
    identity: Mapping[str, Any] | None = None,
    reads: str | None = None,
    rows_per_shard: int | None = None,
    part: str | None = None,
    keep_inputs: bool = False,
    threads: int | None = None,
    accept_numerics: bool = False,
    processes: bool = False,
    devices: str | None = None,
    executor: Executor | None = None,
    workers: int | None = None,
    ray: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> FeatureCache:
    """Run a frozen backbone once over ``inputs`` and return the cache of its features.

    Args:
        inputs: paths, a list of dicts, a DataFrame or a Hugging Face ``Dataset``; see ``load_examples``.
        output_dir: the cache to make, to go on with or to extend.
        model: local folder or hub name; None for the packaged all-MiniLM-L6-v2.
        pooling: one or several feature sets, such as ``"mean"`` or ``["cls", "mean@-2"]``.
        backbone: a loaded backbone, instead of ``model`` and its settings.
        encoder: a callable instead of a model: timm, open_clip, an API. It is given a list of texts, or of pictures
            (PIL, RGB), and returns an array [n, D]; always ``positions`` of them (32; from 16 on a multiple of 16), the
            last repeated where rows end. What it makes of a row must not depend on the others.
        identity: what the encoder is, such as ``{"model": "vit_small_patch14", "timm": "1.0.20"}``: whatever could
            change a feature, as nobody else can know. Another identity is another cache.
        reads: ``"bytes"`` to give the encoder rows' contents as they are: UTF-8, or the bytes of a picture's file.
        rows_per_shard: None for 16,384, or fewer so that a shard stays within 64 MB.
        part: ``"2/8"`` for the second of eight parts, to be joined by ``merge``.
        keep_inputs: store the rows' contents in the cache.
        threads: how many CPU threads the passes share, each pass having its own ``pass_threads``; changes no bit.
        accept_numerics: add rows to a cache though this machine computes other last bits, by their probes.
        processes: work in processes of their own where one does not keep all cores busy (more than 8 passes at a
            time, 8,192 new rows); the program is imported again in each, so it needs ``if __name__ == "__main__"``.
        devices: ``all`` for every GPU of this machine, or names such as ``cuda:0,cuda:1``: each gets a copy of the
            model and takes batches as it gets free; changes no bit. In the place of ``device``.
        executor: a ``concurrent.futures.Executor`` whose workers compute, such as a ``ProcessPoolExecutor`` (of the
            context ``spawn``) or Dask's ``client.get_executor(pure=False)``. Each worker loads the model and gets work
            once it has proved to compute the same bits; this process reads, cuts and commits. Changes no byte. The
            executor stays yours: at the end its workers are told to let go of the model, and one that is not reached
            does so after ten minutes without work.
        workers: how many workers the executor or Ray has, None to ask; without either, processes of this machine to
            compute in: they share ``threads``, or each has a GPU. One that dies is replaced, its rows computed again.
        ray: the address of a Ray cluster whose actors compute, one for each GPU or else for each node: ``host:port``,
            ``auto`` for the one that runs here or that ``RAY_ADDRESS`` names, ``local`` to start one.
        progress: where to report to; None draws a bar on a terminal.
        options: the settings of ``load_backbone`` (``max_length``, ``compute_dtype``, ...) and the columns and splits
            of ``load_examples`` (``text_column``, ``label_column``, ``split``, ...).

    What was guessed, looks wrong in the data, or leaves the cache that was there is an ``EmbedcacheWarning`` each, and
    in the ``notes`` of the cache.

    Raises:
        InputError, BackboneError, CacheError, Interrupted: each says what to do.

    Example::

        cache = extract("reviews.csv", output_dir="reviews.cache", split="80/10/10")
        X, y = cache.arrays("train")
    """
    source = replace(ModelSource.taken_from(options), model=model)
    several = [] if devices is None else choose_devices(devices)
    source = replace(source, device=several[0]) if several else source
    others = engine_for(executor, workers, ray, threads=threads, devices=several)
    quarantine = quarantine_file(options.get("on_bad_row", "stop"), options.get("quarantine"))
    poolings = [pooling] if isinstance(pooling, str) else list(pooling)
    asked = BackboneSettings.taken_from(options, poolings)
    if isinstance(inputs, Examples):
        examples = inputs
    else:
        examples = load_examples(inputs, pixel_range=asked.pixel_range or recorded_range(output_dir), **options)
    if encoder is not None:
        if backbone is not None or model is not None:
            raise SpecError("encoder is given, and a model too: features come from one of them")
        backbone = encoder_for(output_dir, encoder, identity, examples, asked, reads)
    elif identity is not None or reads is not None:
        raise SpecError("identity and reads tell of an encoder, and none is given: what a model is, its files say")
    if backbone is None:
        asked = replace(
            asked, content=asked.content or examples.kind, pixel_range=asked.pixel_range or examples.pixel_range
        )
        backbone = load_for(output_dir, source, asked, others)
    selected = parse_part(part)
    if selected is not None:
        examples = part_of(examples, *selected)
    found = (compile_hint(examples, backbone, output_dir), half_type_hint(backbone)) if others is None else ()
    hints = tuple(hint for hint in found if hint is not None)
    warn(hints)
    report = run(
        examples,
        backbone,
        output_dir,
        engine=others or Here(threads, processes, several),
        rows_per_shard=rows_per_shard,
        keep_inputs=keep_inputs,
        accept_numerics=accept_numerics,
        quarantine=quarantine,
        progress=progress,
    )
    cache = FeatureCache.open(output_dir)
    cache.notes = (*examples.notes, *hints, *report.notes)
    return cache
