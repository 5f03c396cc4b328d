"""How heads are compared, and what a file or a call asks for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from embedcache.errors import SpecError, SweepError, SweepSpecError
from embedcache.wording import counted

MOST_DIVISIONS = 10_000
"""Each is kept as a mask over all rows."""


@dataclass(frozen=True)
class Protocol:
    """How heads are compared.

    ``folds`` is 1 for the cache's own validation split. With ``shots`` there are ``draws`` few-shot draws instead.
    ``stopping_share`` of a fold's training rows is held out where a head stops early, so that no head sees the rows
    that it is scored on.
    """

    folds: int = 5
    repeats: int = 1
    shots: int | None = None
    draws: int = 10
    seed: int = 0
    stopping_share: float = 0.1
    alpha: float = 0.05

    def __post_init__(self) -> None:
        if self.shots is None and (self.folds < 1 or self.repeats < 1):
            raise SweepError(f"folds is {self.folds}, repeats {self.repeats}: expected at least 1 of each")
        times = self.folds * self.repeats if self.shots is None else self.draws
        if times > MOST_DIVISIONS:
            what = (
                f"{counted(self.folds, 'fold')}, {self.repeats} times,"
                if self.shots is None
                else counted(self.draws, "draw")
            )
            raise SweepError(f"{what} are too many: expected at most {MOST_DIVISIONS:,} divisions of the rows")
        if self.folds == 1 and self.repeats > 1 and self.shots is None:
            raise SweepError("repeats needs folds: the cache's own validation split cannot be drawn again")
        if not 0 <= self.seed < 2**32:
            raise SpecError(f"seed is {self.seed}: expected a whole number from 0")

    @property
    def kind(self) -> str:
        """``folds``, ``split`` or ``shots``."""
        if self.shots is not None:
            return "shots"
        return "split" if self.folds == 1 else "folds"

    def to_json(self) -> dict[str, object]:
        """Return what of it decides the results."""
        body: dict[str, object] = {"kind": self.kind, "seed": self.seed, "stopping_share": self.stopping_share}
        if self.shots is not None:
            return {**body, "shots": self.shots, "draws": self.draws}
        return {**body, "folds": self.folds, "repeats": self.repeats}

    def text(self) -> str:
        """Return it as a sentence for people."""
        if self.shots is not None:
            return (
                f"{counted(self.draws, 'draw')} of {counted(self.shots, 'row')} a class from train and "
                "validation, each scored on all rows that were not drawn"
            )
        if self.folds == 1:
            return "trained on the train split, scored on the validation split"
        times = f", {self.repeats} times" if self.repeats > 1 else ""
        rows = "stratified, equal contents in one fold"
        return f"{self.folds}-fold cross-validation{times} over train and validation, {rows}"


@dataclass(frozen=True)
class Asked:
    """What a sweep file or a call asks for; None where it leaves the default.

    ``random`` draws so many configurations; ``seed`` is that of folds, draws and the random search.
    """

    folds: int | None = None
    repeats: int | None = None
    shots: int | None = None
    draws: int | None = None
    metric: str | None = None
    learning_curve: bool | None = None
    random: int | None = None
    seed: int | None = None
    test_all: bool | None = None

    def over(self, other: Asked) -> Asked:
        """Return what is asked for here, and where that is nothing, what the other asks for."""
        return Asked(**{**other._given(), **self._given()})

    def protocol(self) -> Protocol:
        """Return the protocol. Raises ``SweepSpecError`` where two things contradict each other."""
        if self.shots is not None and (self.folds is not None or self.repeats is not None):
            raise SweepSpecError(
                "--shots and --folds contradict each other: few-shot draws are scored on all other rows"
            )
        if self.draws is not None and self.shots is None:
            raise SweepSpecError("--draws needs --shots: how many rows of each class a draw has")
        names = {field.name for field in fields(Protocol)}
        return Protocol(**{name: value for name, value in self._given().items() if name in names})

    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


def asked_in_file(values: dict[str, object]) -> Asked:
    """Return what a sweep file asks for. Raises ``SweepSpecError`` for a value of another type."""
    for name, value in values.items():
        expected = str if name == "metric" else (bool if name in ("learning_curve", "test_all") else int)
        if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
            kind = {str: "a name", bool: "true or false", int: "a whole number"}[expected]
            raise SweepSpecError(f"{name} is {value!r}: expected {kind}")
    return Asked(**values)  # type: ignore[arg-type]


NOTHING_ASKED = Asked()
ASKED = tuple(field.name for field in fields(Asked))
