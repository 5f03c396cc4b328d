"""What ``load_examples`` is asked to do, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from embedcache.errors import SpecError
from embedcache.examples.content import CONTENTS, Content
from embedcache.examples.formats import FORMATS, Format
from embedcache.examples.splits import parse_split
from embedcache.spec import TASKS, TaskName

LabelUse = Literal["required", "optional", "none"]


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How an input is to be read; see ``load_examples``. ``split`` and ``split_seed`` are ``80/10/10`` and its seed.

    Raises ``SpecError`` for a value that makes no sense.
    """

    kind: str = "text"
    content_column: str | None = None
    label_column: str | Sequence[str] | None = None
    id_column: str | None = None
    split_column: str | None = None
    split: str | None = None
    split_seed: int = 0
    task: TaskName | None = None
    label_separator: str | None = None
    class_names: tuple[str, ...] | None = None
    extend_classes: bool = False
    labels: LabelUse = "required"
    quarantine: Path | None = None
    format: Format | None = None
    quoting: Literal["minimal", "none"] = "minimal"

    def __post_init__(self) -> None:
        _refuse_other("kind", self.kind, tuple(CONTENTS))
        _refuse_other("task", self.task, (None, *TASKS))
        _refuse_other("labels", self.labels, ("required", "optional", "none"))
        if self.format not in (None, *FORMATS):
            raise SpecError(f"unknown format {self.format!r}: expected one of {', '.join(FORMATS)}")
        if self.quoting not in ("minimal", "none"):
            raise SpecError(f"unknown quoting {self.quoting!r}: expected minimal or none")
        if self.class_names is not None and len(set(self.class_names)) != len(self.class_names):
            raise SpecError(f"class_names holds a name twice: {', '.join(self.class_names)}")
        if self.split is not None:
            parse_split(self.split)
        if not 0 <= self.split_seed < 2**64:
            raise SpecError(f"split_seed is {self.split_seed}: expected a whole number in [0, 2**64)")

    @property
    def content(self) -> Content:
        """What knows what a content is."""
        return CONTENTS[self.kind]


def quarantine_file(on_bad_row: str, quarantine: Path | str | None) -> Path | None:
    """Return the file that bad rows are set aside in, None where they stop the reading.

    Raises ``SpecError`` where they are to be skipped and no file is named.
    """
    _refuse_other("on_bad_row", on_bad_row, ("stop", "skip"))
    if on_bad_row == "stop":
        return None
    if quarantine is None:
        raise SpecError("on_bad_row is skip but no quarantine file is named: say where bad rows are to be set aside")
    return Path(quarantine)


def _refuse_other(name: str, value: str | None, choices: Sequence[str | None]) -> None:
    if value not in choices:
        expected = ", ".join(choice for choice in choices if choice is not None)
        raise SpecError(f"{name} is {value!r}: expected one of {expected}")
