"""Where features come from that no loaded model made: an encoder of one's own, or files that another tool wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from embedcache.errors import SpecError
from embedcache.fingerprint import canonical_json
from embedcache.wording import shortened

OriginKind = Literal["encoder", "import"]
READS = ("text", "image", "bytes")
"""What an encoder may be given: texts, pictures, or the contents as they are."""


@dataclass(frozen=True)
class Origin:
    """The field ``source`` of a spec; FORMAT.md, section 5.5.

    ``identity`` is what the user says of it, or for an import of which nothing was said the hash of the files.
    ``content`` is what a row's key is the hash of: ``text``, ``image``, or for an import ``id``. ``reads`` and ``rows``
    are an encoder's: what it is given, and how many rows at a time.
    """

    kind: OriginKind
    identity: Mapping[str, object]
    content: str
    reads: str | None = None
    rows: int | None = None

    def to_json(self) -> dict[str, object]:
        """Return it as it stands in a spec."""
        of_encoder = {"reads": self.reads, "rows": self.rows} if self.kind == "encoder" else {}
        return {"kind": self.kind, "identity": dict(self.identity), "content": self.content, **of_encoder}

    @classmethod
    def from_json(cls, body: object) -> Origin | None:
        """Read what ``to_json`` gave; None for anything else."""
        if not isinstance(body, Mapping) or body.get("kind") not in ("encoder", "import"):
            return None
        identity, content, reads, rows = (body.get(name) for name in ("identity", "content", "reads", "rows"))
        if not isinstance(identity, Mapping) or not isinstance(content, str):
            return None
        if body["kind"] == "encoder" and (reads not in READS or not isinstance(rows, int) or rows < 1):
            return None
        return cls(body["kind"], identity, content, reads, rows)

    def to_text(self) -> str:
        """Say it in one line."""
        said = ", ".join(f"{name} {value}" for name, value in self.identity.items())
        return f"{'an encoder of your own' if self.kind == 'encoder' else 'imported'}: {said}"


def checked_identity(given: object) -> dict[str, Any]:
    """Return what a user says of where features come from. Raises ``SpecError`` unless it is names with JSON values."""
    expected = 'names with values that JSON has, such as {"model": "resnet50.a1_in1k", "timm": "1.0.20"}'
    if not isinstance(given, Mapping) or not given or not all(isinstance(name, str) and name for name in given):
        raise SpecError(f"identity is {shortened(given)}: expected {expected}")
    try:
        canonical_json(dict(given))
    except (TypeError, ValueError):
        raise SpecError(f"identity is {shortened(given)}: expected {expected}") from None
    return dict(given)
