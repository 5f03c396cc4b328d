"""What a machine computes, as a value: a few built-in rows, prepared and run, and how far two such answers are apart.

A *probe* is recorded when a cache is made and run again by whoever extends, checks or predicts. Equal probes mean the
same bits; another CPU, torch, tokenizer or kernel gives another probe, and the difference says by how much at most.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from embedcache.fingerprint import hash_json, is_count, require, sha256_bytes
from embedcache.shard import STORED, decoded, encoded, rounded
from embedcache.spec import plain_name

MOST_VALUES = 8192
"""Values kept of each feature set: of a larger one every k-th, and the hash of all."""

_HASH = re.compile(r"[0-9a-f]{64}")

Status = Literal["same", "versions", "features", "inputs", "unknown"]


@dataclass(frozen=True)
class Outcome:
    """What the probe's rows gave in one feature set, in the type it is stored in.

    ``values`` float32 [n] are every ``step``-th of ``size`` values, ``sha256`` is the hash of all of them as stored.
    """

    dtype: str
    size: int
    step: int
    values: npt.NDArray[np.float32] = field(compare=False)  # sha256 stands for them
    sha256: str

    @classmethod
    def of(cls, values: npt.NDArray[Any], dtype: str) -> Outcome:
        """Keep ``values`` (float32, any shape) as ``dtype`` stores them."""
        flat = rounded(np.ascontiguousarray(values, np.float32).ravel(), dtype)
        step = max(1, -(-flat.size // MOST_VALUES))
        return cls(dtype, flat.size, step, flat[::step], sha256_bytes(encoded(flat, dtype).tobytes()))

    def to_json(self) -> dict[str, object]:
        """Return JSON values; the numbers as base64 of their little-endian bytes."""
        data = base64.b64encode(encoded(self.values, self.dtype).tobytes()).decode("ascii")
        return {"dtype": self.dtype, "size": self.size, "step": self.step, "values": data, "sha256": self.sha256}

    @classmethod
    def from_json(cls, body: Any) -> Outcome:
        """Read what ``to_json`` gave, trusting nothing in it. Raises ``ValueError`` and its kin."""
        dtype, size, step, data, digest = (body[name] for name in ("dtype", "size", "step", "values", "sha256"))
        require(dtype in STORED and is_count(size) and is_count(step, 1), "an outcome of a probe")
        require(isinstance(data, str) and isinstance(digest, str) and _HASH.fullmatch(digest), "an outcome's values")
        try:
            raw = base64.b64decode(data.encode("ascii"), validate=True)
        except binascii.Error:
            raise ValueError("the values of a probe are not base64") from None
        require(len(raw) == -(-size // step) * STORED[dtype].itemsize, "the number of a probe's values")
        values = decoded(np.frombuffer(raw, STORED[dtype]))
        return cls(dtype, size, step, values, digest)


@dataclass(frozen=True)
class Probe:
    """A backbone's answer to the built-in rows on one machine.

    ``inputs`` are hashes of the prepared rows (token ids), ``versions`` of what prepared them, ``outcomes`` by feature
    set.
    """

    inputs: tuple[str, ...]
    versions: Mapping[str, str]
    outcomes: Mapping[str, Outcome]
    hash: str = field(default="")

    def __post_init__(self) -> None:
        require(all(map(_HASH.fullmatch, self.inputs)), "the inputs of a probe")
        object.__setattr__(self, "hash", hash_json(self.to_json()))

    @property
    def bits(self) -> str:
        """A hash of the prepared rows and of the features, whichever versions made them."""
        return Probe(self.inputs, {}, self.outcomes).hash

    def only(self, name: str) -> Probe:
        """Return the probe of one feature set, which is all that a head needs; views of rows stand behind the rows."""
        times = 1 + max((plain_name(outcome)[1] for outcome in self.outcomes), default=0)
        inputs = self.inputs[: len(self.inputs) // times]
        return Probe(inputs, self.versions, {name: self.outcomes[name]} if name in self.outcomes else {})

    def to_json(self) -> dict[str, object]:
        """Return the probe as JSON values."""
        outcomes = {name: outcome.to_json() for name, outcome in self.outcomes.items()}
        return {"inputs": list(self.inputs), "versions": dict(self.versions), "outcomes": outcomes}


@dataclass(frozen=True)
class Difference:
    """How one probe differs from another.

    ``status`` is ``same``; ``versions``: the same bits, made by other versions of what prepares rows; ``features``:
    other bits from the same prepared rows; ``inputs``: the rows are prepared otherwise; ``unknown``: one of the two
    is not there. ``largest`` is the largest difference of two of the values kept, ``relative`` that in units of the
    values' own size (their root mean square), ``where`` the feature set it is in. ``versions`` holds
    ``(name, old, new)``.
    """

    status: Status
    largest: float = 0.0
    relative: float = 0.0
    where: str = ""
    versions: tuple[tuple[str, str, str], ...] = ()

    @property
    def same_bits(self) -> bool:
        """Whether rows of both may stand side by side: their bits are the same, as far as the probe can tell."""
        return self.status in ("same", "versions")

    def to_json(self) -> dict[str, object]:
        """Return JSON values; what is not known is null."""
        known = self.status != "unknown"
        largest, relative = (
            value if known and math.isfinite(value) else None for value in (self.largest, self.relative)
        )  # fmt: skip
        return {
            "status": self.status, "same_bits": self.same_bits if known else None, "largest": largest,
            "relative": relative, "feature": self.where or None, "versions": [list(change) for change in self.versions],
        }  # fmt: skip

    def notes(self, reference: str) -> list[str]:
        """Return what is to be told of it, against ``other``: nothing where it is the same, or not known."""
        told = self.status not in ("same", "unknown")
        return [f"numerics, against {reference}: {self.to_text()}"] if told else []

    def to_text(self) -> str:
        """Say it in one line."""
        changed = ", ".join(f"{name} {new} instead of {old}" for name, old, new in self.versions)
        if self.status == "unknown":
            return "not known: there is no probe to compare with"
        if self.status == "same":
            return "the same bits"
        if self.status == "versions":
            return f"the same bits, with {changed}"
        what = "rows are prepared otherwise" if self.status == "inputs" else "other bits"
        if self.where and not self.largest:
            what = f"{what}, in values of {self.where} that the record does not keep"
            return what + f"; {changed}" * bool(changed)
        size = f"values differ by up to {self.largest:.2g} ({self.relative:.1e} of their size) in {self.where}"
        return f"{what}: {size if self.where else 'there are no features in common'}" + (f"; {changed}" * bool(changed))


def difference(recorded: Probe | None, here: Probe | None) -> Difference:
    """Compare the probe of this machine with a recorded one, in the sets that both have, as the record stores them."""
    if recorded is None or here is None:
        return Difference("unknown")
    names = sorted({*recorded.versions, *here.versions})
    versions = tuple(
        (name, old, new) for name in names
        if (old := recorded.versions.get(name, "none")) != (new := here.versions.get(name, "none"))
    )  # fmt: skip
    largest, relative, where, same = 0.0, 0.0, "", True
    common = [name for name in recorded.outcomes if name in here.outcomes]
    for name in common:
        before, after = recorded.outcomes[name], here.outcomes[name]
        if before.size != after.size or before.step != after.step:  # a token-level set whose rows have other tokens
            apart, size = math.inf, 1.0
        else:
            values = rounded(after.values, before.dtype)
            differs = values.view(np.uint32) != before.values.view(np.uint32)
            with np.errstate(invalid="ignore"):
                gaps = np.abs(values.astype(np.float64) - before.values)[differs]
            apart = float(np.where(np.isnan(gaps), math.inf, gaps).max(initial=0.0))
            same &= not differs.any()  # 0.0 and -0.0 are no distance apart, and other bits
            size = float(np.sqrt(np.mean(np.square(before.values, dtype=np.float64)))) if before.size else 1.0
            if before.dtype == after.dtype:
                same &= before.sha256 == after.sha256
        if apart > largest or not where:
            largest, relative, where = apart, apart / max(size, 1e-30), name
        same &= apart == 0
    if not common and recorded.outcomes:
        return Difference("features", math.inf, math.inf, "", versions)
    if recorded.inputs != here.inputs:
        return Difference("inputs", largest, relative, where, versions)
    if not same:
        return Difference("features", largest, relative, where, versions)
    return Difference("versions" if versions else "same", versions=versions)
