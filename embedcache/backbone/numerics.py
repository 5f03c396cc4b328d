"""The probe of a backbone: built-in rows of several canonical lengths, prepared and run on this machine."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from embedcache.backbone.compute import run_plan
from embedcache.batching import plan
from embedcache.numerics import Outcome, Probe
from embedcache.shard import decoded

TEXT_ROWS = tuple(
    text.encode()
    for text in (
        "Good.",
        "An instant classic: I loved every minute of it, from Zoë's first scene (1999!) to the naïve façade's fall.",
        "It wasn't until the third act, some 90 minutes in, that anything happened; the plot, such as it is, follows "
        "two brothers who can't agree on what to do with their late father's café, and by the time they do, nobody "
        "cares. Überlang, 10/10 for the soundtrack though — 東京 at night, £5 beers, and a singer who means it 🎬.",
    )
)
"""Letters, numbers, accents, capitals, quotation marks and characters beyond the BMP: what tokenizers treat apart."""


def probe_of(backbone: Any) -> Probe | None:
    """Run a backbone over its own ``probe_rows``, at canonical shapes; None where it has none. A few passes."""
    rows = [row for row in getattr(backbone, "probe_rows", ()) if _takes(backbone, row)]
    if not rows:
        return None
    prepared = backbone.prepare(rows)
    arrays = run_plan(backbone, prepared, plan(prepared.lengths, backbone.policy))
    outcomes = {}
    for each in backbone.feature_sets:
        values = arrays[each.name]
        outcomes[each.name] = Outcome.of(decoded(values[0] if isinstance(values, tuple) else values), each.dtype)
    return Probe(tuple(prepared.digests()), backbone.probe_versions, outcomes)


def _takes(backbone: Any, row: bytes) -> bool:
    """Whether a tokenizer makes tokens of a row that its model knows; one for proteins, say, may not."""
    try:
        backbone.prepare([row])
    except Exception:  # whatever a tokenizer raises; the user's own rows will say what is wrong, if anything is
        return False
    return True


def tokenizer_versions() -> dict[str, str]:
    """Return the versions of the libraries that make tokens of texts."""
    versions = {}
    for name in ("tokenizers", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    return versions
