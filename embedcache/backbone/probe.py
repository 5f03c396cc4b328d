"""The probe of a backbone: its built-in rows, of several canonical lengths, prepared and run on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast

from embedcache.backbone.compute import run_plan
from embedcache.backbone.protocol import Backbone, Prepared
from embedcache.batching import plan
from embedcache.numerics import Outcome, Probe
from embedcache.shard import decoded


class Probed(Backbone, Protocol):
    """A backbone that can be probed."""

    @property
    def probe_rows(self) -> Sequence[bytes]:
        """Contents by which it is known what a machine computes."""
        ...

    @property
    def probe_versions(self) -> Mapping[str, str]:
        """Versions of what prepares rows."""
        ...


class Digested(Prepared, Protocol):
    """Prepared rows that say what the model will see."""

    def digests(self) -> list[str]:
        """Return a hash of each row, the same on every machine."""
        ...


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
    return Probe(tuple(cast(Digested, prepared).digests()), cast(Probed, backbone).probe_versions, outcomes)


def _takes(backbone: Backbone, row: bytes) -> bool:
    """Whether a tokenizer makes tokens of a row that its model knows; one for proteins, say, may not."""
    try:
        backbone.prepare([row])
    except Exception:  # whatever a tokenizer raises; the user's own rows will say what is wrong, if anything is
        return False
    return True
