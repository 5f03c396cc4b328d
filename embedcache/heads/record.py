"""What is known of a trained head and stands in its bundle, as a value: nothing in it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

from embedcache.numerics import Probe
from embedcache.shard import FeatureSet
from embedcache.spec import HeadSpec, TaskName
from embedcache.task import Array

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator


class Calibration(TypedDict, total=False):
    """What makes logits calibrated: of a classification its temperature, of labels a threshold for each; else {}."""

    temperature: float
    thresholds: Sequence[float]


@dataclass(frozen=True, eq=False)
class HeadRecord:
    """The fields of a trained head. ``TrainedHead`` says what each is, and adds everything that runs the head."""

    spec: HeadSpec
    task: TaskName
    class_names: tuple[str, ...]
    feature: FeatureSet
    state: Mapping[str, Array] = field(default_factory=dict)
    estimator: BaseEstimator | None = None
    extraction: Mapping[str, object] = field(default_factory=dict)
    model: str | None = None
    revision: str | None = None
    probe: Probe | None = None
    calibration: Calibration = field(default_factory=Calibration)
    training: Mapping[str, object] = field(default_factory=dict)

    @property
    def linear(self) -> bool:
        """Whether it is one matrix: ``output.weight`` [C, D] and ``output.bias`` [C]."""
        return bool(self.state) and (self.spec.engine == "sklearn" or self.spec.kind == "linear")

    @property
    def parameters(self) -> int:
        """How many numbers were learned; 0 for an estimator that is not linear."""
        return sum(int(value.size) for name, value in self.state.items() if not name.endswith((".mean", ".scale")))

    @property
    def thresholds(self) -> tuple[float, ...]:
        """From which probability on each label of a multi-label head is given."""
        return tuple(self.calibration.get("thresholds", (0.5,) * len(self.class_names)))
