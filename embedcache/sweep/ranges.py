"""What a setting of a grid may be: one value, a list of values, or a range; counted and drawn without listing all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import SupportsFloat

import numpy as np

from embedcache.errors import SweepSpecError
from embedcache.wording import counted, shortened


@dataclass(frozen=True)
class Choices:
    """Values of one setting. ``span`` is (low, high, logarithmic) where it was given as a range, to draw from."""

    values: tuple[object, ...]
    span: tuple[float, float, bool] | None = None

    def draw(self, generator: np.random.Generator) -> object:
        """Return one value at random: of the range where there is one, else of the list."""
        if self.span is None:
            return self.values[int(generator.integers(len(self.values)))]
        low, high, logarithmic = self.span
        drawn = generator.uniform(math.log(low), math.log(high)) if logarithmic else generator.uniform(low, high)
        # Three digits are enough for a search, and keep labels and files readable.
        return float(f"{math.exp(drawn) if logarithmic else drawn:.3g}")


def choices(where: str, value: object) -> Choices:
    """Read a setting: a list is a choice of values, ``{log: [low, high], steps: n}`` and ``{linear: ...}`` are ranges.

    Raises ``SweepSpecError`` for a range that is not one.
    """
    if isinstance(value, (list, tuple)):
        if not value:
            raise SweepSpecError(f"{where} is an empty list: give it a value or leave it out")
        return Choices(tuple(tuple(choice) if isinstance(choice, list) else choice for choice in value))
    if isinstance(value, Mapping) and ("log" in value or "linear" in value):
        return _range(where, value)
    return Choices((value,))


def _range(where: str, value: Mapping[str, object]) -> Choices:
    expected = (
        f"{where}: expected {{log: [low, high], steps: n}} or {{linear: [low, high], steps: n}}, got {dict(value)}"
    )
    logarithmic = "log" in value
    ends, steps = value["log" if logarithmic else "linear"], value.get("steps", 5)
    if set(value) - {"log", "linear", "steps"} or len({"log", "linear"} & set(value)) != 1:
        raise SweepSpecError(expected)
    if not isinstance(ends, (list, tuple)) or len(ends) != 2 or isinstance(steps, bool) or not isinstance(steps, int):
        raise SweepSpecError(expected)
    low, high = (number(where, end) for end in ends)
    if not low < high or steps < 2 or (logarithmic and low <= 0):
        raise SweepSpecError(f"{expected}: low must be below high, above 0 for log, and steps at least 2")
    if steps > 1_000_000:
        raise SweepSpecError(f"{where}: {counted(steps, 'step')}: expected at most 1,000,000")
    made = np.geomspace(low, high, steps) if logarithmic else np.linspace(low, high, steps)
    return Choices(tuple(float(f"{step:.6g}") for step in made), (low, high, logarithmic))


def number(where: str, value: object) -> float:
    """Return a number. YAML 1.1 reads 1e-3 as a string, which everybody means as a number."""
    try:
        if isinstance(value, bool) or not isinstance(value, (str, SupportsFloat)):
            raise ValueError
        if math.isfinite(found := float(value)):
            return found
        raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise SweepSpecError(f"{where} is {shortened(value)}: expected a number") from None
