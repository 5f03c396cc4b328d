"""What training gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedcache.heads import TrainedHead

if TYPE_CHECKING:
    from embedcache.heads.folder import RunFolder


@dataclass(frozen=True)
class TrainingResult:
    """A trained head and what is known about its training.

    ``metrics`` are by split, ``history`` has a dict for each epoch, ``notes`` are one-line facts to print.
    ``interrupted`` says that Ctrl-C ended it early with the best weights so far.
    """

    head: TrainedHead
    metrics: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    seconds: float = 0.0
    interrupted: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    def save(self, directory: Path | str | RunFolder) -> None:
        """Write the head bundle: head, metrics, history, model card; see ``TrainedHead.save_pretrained``."""
        facts = {**self.facts, "trained in": f"{self.seconds:.1f} s"}
        self.head.save_pretrained(directory, metrics=self.metrics, history=self.history, facts=facts)
