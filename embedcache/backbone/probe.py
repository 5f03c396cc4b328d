"""The probe of a backbone: its built-in rows, of several canonical lengths, prepared and run on this machine."""

from __future__ import annotations

from collections.abc import Mapping

from embedcache.backbone.compute import run_plan
from embedcache.backbone.protocol import Backbone
from embedcache.batching import plan
from embedcache.numerics import Outcome, Probe
from embedcache.shard import decoded


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
