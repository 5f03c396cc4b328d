"""What is measured, and what it took: the jobs that worker processes do, and the results that they give back.

All of them are values that travel as JSON: jobs and results between processes, results in the folder's journal too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from embedcache.fingerprint import require
from embedcache.spec import HeadSpec, ModelSource, TaskName

Json = Mapping[str, Any]
V = TypeVar("V", bound="_Value")

_NUMBERS = {
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (int, float),
    "float | None": (int, float, type(None)),
}
"""What JSON may hold for an annotation: a whole number is also a float, and true is neither."""

EXTRACTION = "extraction"
"""Stands where a training has the name of its approach."""


@dataclass(frozen=True)
class _Value:
    """A value with JSON's types in its fields."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls: type[V], body: Json) -> V:
        """Read what ``to_json`` gave; other fields are left out.

        Raises ``KeyError`` for a field that is missing, and ``ValueError`` for a number that is not a number.
        """
        values = {part.name: body[part.name] for part in fields(cls)}
        for part in fields(cls):
            allowed = _NUMBERS.get(str(part.type))
            require(allowed is None or type(values[part.name]) in allowed, f"its {part.name}")
        return cls(**values)


@dataclass(frozen=True)
class Memory(_Value):
    """Bytes that a process held: ``baseline`` before the work, ``peak`` at most; ``device`` on the GPU, if any."""

    baseline: int
    device: int | None
    peak: int

    @property
    def held(self) -> int:
        """How much the work took."""
        return max(self.peak - self.baseline, 0)


@dataclass(frozen=True)
class Extraction(_Value):
    """What extraction took. ``extracted`` of the ``unique`` contents were computed, the others were there before."""

    extracted: int
    memory: Memory
    parameters: int
    rows: int
    seconds: float
    setup_seconds: float
    tokens: int
    unique: int

    @classmethod
    def from_json(cls, body: Json) -> Extraction:
        """Read what ``to_json`` gave."""
        return super().from_json({**body, "memory": Memory.from_json(body["memory"])})

    @property
    def seconds_per_content(self) -> float:
        """How long one content took."""
        return self.seconds / max(self.extracted, 1)

    @property
    def adjusted(self) -> bool:
        """Whether it was interrupted and gone on with, so that its time is that of the rest, in proportion."""
        return self.extracted < self.unique


@dataclass(frozen=True)
class Training(_Value):
    """What one training took and how validation went.

    ``charged`` counts the different contents whose features it needs. ``probe_seconds`` is what training the first
    head of LP-FT took, None elsewhere; ``total`` counts all parameters, None where the backbone was not loaded.
    ``best_epoch`` counts from 1; ``history`` has numbers by name for each epoch.
    """

    train_rows: int
    validation_rows: int
    test_rows: int
    charged: int
    best_epoch: int
    validation: float
    epoch_seconds: float
    history: list[dict[str, float]]
    seconds: float
    probe_seconds: float | None
    setup_seconds: float
    memory: Memory
    trainable: int
    total: int | None = None

    @classmethod
    def from_json(cls, body: Json) -> Training:
        """Read what ``to_json`` gave."""
        return super().from_json({"total": None, **body, "memory": Memory.from_json(body["memory"])})


@dataclass(frozen=True)
class ExtractionJob(_Value):
    """Run the backbone once over the rows of a file; see ``rows.write_rows``."""

    cache: str
    rows: str
    task: TaskName
    class_names: list[str]
    model: str | None
    pooling: str
    device: str
    trust_remote_code: bool
    progress: bool
    approach: str = EXTRACTION

    @property
    def source(self) -> ModelSource:
        """Where the model is."""
        return ModelSource(self.model, device=self.device, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class TrainingJob(_Value):
    """Train by one approach on a fraction of a cache's training rows, and write what it says of the test rows."""

    approach: str
    fraction: float
    seed: int
    epochs: int
    metric: str
    head: str
    cache: str
    device: str
    outputs: str
    trust_remote_code: bool
    progress: bool
    head_options: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> ModelSource:
        """The model of the cache, on this job's device."""
        return ModelSource(device=self.device, trust_remote_code=self.trust_remote_code)

    @property
    def head_spec(self) -> HeadSpec:
        """The head that is trained."""
        return HeadSpec(self.head, "torch", self.head_options)


Job = ExtractionJob | TrainingJob


def job_of(body: Json) -> Job:
    """Read a job of either sort."""
    return (ExtractionJob if body["approach"] == EXTRACTION else TrainingJob).from_json(body)
