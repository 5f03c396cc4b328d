"""Passes on several devices of one machine: a copy of the backbone on each, which takes the next batch when it is free.

Which device computes a row changes nothing: every pass has a canonical shape, and a device that computes otherwise than
the first, by the probe, gets no work.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from embedcache.backbone.compute import Backbone, Collected, Done, Prepared, StoredSets, probe_of, trailing
from embedcache.backbone.load import LoadedBackbone, load_backbone
from embedcache.batching import Batch, Plan
from embedcache.errors import BackboneError
from embedcache.numerics import difference


class Replicas:
    """Copies of one backbone, made by ``replicas_of``; ``run_plan`` does what ``compute.run_plan`` does, on all."""

    def __init__(self, backbones: Sequence[Backbone]) -> None:
        self.backbones = tuple(backbones)

    def run_plan(self, prepared: Prepared, batches: Plan, done: Done | None = None) -> StoredSets:
        """Run every batch on whichever device is free; see ``compute.run_plan``."""
        collected = Collected(self.backbones[0], prepared, done)
        waiting, lock, stop = iter(batches), threading.Lock(), threading.Event()

        def taken() -> Iterator[Batch]:
            while not stop.is_set():
                with lock:
                    batch = next(waiting, None)
                if batch is None:
                    return
                yield batch

        def serve(backbone: Backbone) -> None:
            try:
                for batch, features in trailing(backbone, prepared, taken()):
                    with lock:
                        collected.put(batch, features)
            except BaseException:
                stop.set()  # what the others still have under way is not waited for in vain
                raise

        with ThreadPoolExecutor(len(self.backbones), "embedcache-device") as pool:
            try:
                for served in [pool.submit(serve, backbone) for backbone in self.backbones]:
                    served.result()
            finally:
                stop.set()
        return collected.finished()


def replicas_of(backbone: LoadedBackbone, devices: Sequence[str]) -> Replicas:
    """Load a backbone again on every device but the first, where it is.

    Raises ``BackboneError`` for a device that is not there, holds no canonical batch, or computes other features than
    the first by the probe.
    """
    if backbone.recipe is None:
        raise BackboneError(f"{backbone.name} was not made by load_backbone: it cannot be loaded on several devices")
    copies: list[Backbone] = [backbone]
    source, settings = backbone.recipe.source, backbone.recipe.settings
    expected = probe_of(backbone)
    for device in devices[1:]:
        copy = load_backbone(**{**source.arguments(), "device": device}, **settings.arguments())
        if copy.identity != backbone.identity:
            raise BackboneError(f"the files of {backbone.name} have changed since they were loaded: start again")
        probe = probe_of(copy)
        if expected is not None and probe is not None and not (other := difference(expected, probe)).same_bits:
            raise BackboneError(
                f"{device} computes otherwise than {devices[0]} ({other.to_text()}): "
                "rows of both would not mix; name devices of one kind (extract --devices)"
            )
        copies.append(copy)
    return Replicas(copies)
