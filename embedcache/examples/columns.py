"""What ``load_examples`` is asked to do, and which column is what: named by the caller, or guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from embedcache.errors import InputError, SpecError
from embedcache.examples.content import CONTENTS, Content
from embedcache.examples.formats import FORMATS, Format
from embedcache.examples.source import Source
from embedcache.examples.splits import is_standard, parse_split
from embedcache.spec import PixelRange, TaskName, checked_range
from embedcache.wording import did_you_mean

# What `load_examples` is asked to do, checked once.


LabelUse = Literal["required", "optional", "none"]


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How an input is to be read; see ``load_examples``. ``split`` and ``split_seed`` are ``80/10/10`` and its seed.

    Raises ``SpecError`` for a value that makes no sense.
    """

    kind: str | None = None
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
    allow_outside: bool = False
    pixel_range: PixelRange | None = None

    def __post_init__(self) -> None:
        if self.kind not in (None, *CONTENTS):
            raise SpecError(f"kind is {self.kind!r}: expected one of {', '.join(CONTENTS)}")
        if self.format not in (None, *FORMATS):
            raise SpecError(f"unknown format {self.format!r}: expected one of {', '.join(FORMATS)}")
        if self.class_names is not None and len(set(self.class_names)) != len(self.class_names):
            raise SpecError(f"class_names holds a name twice: {', '.join(self.class_names)}")
        if self.pixel_range is not None:
            object.__setattr__(self, "pixel_range", checked_range(self.pixel_range))
        if self.split is not None:
            parse_split(self.split)
        if not 0 <= self.split_seed < 2**64:
            raise SpecError(f"split_seed is {self.split_seed}: expected a whole number in [0, 2**64)")


def quarantine_file(on_bad_row: str, quarantine: Path | str | None) -> Path | None:
    """Return the file that bad rows are set aside in, None where they stop the reading.

    Raises ``SpecError`` where they are to be skipped and no file is named.
    """
    if on_bad_row == "stop":
        return None
    if quarantine is None:
        raise SpecError("on_bad_row is skip but no quarantine file is named: say where bad rows are to be set aside")
    return Path(quarantine)


def kind_and_column(kind: str | None, columns: Mapping[str, str | None]) -> tuple[str | None, str | None]:
    """Return the kind of content and its column, None for what is to be guessed; ``columns`` are those that were named.

    Raises ``SpecError`` where they contradict each other.
    """
    named = {name: column for name, column in columns.items() if column is not None}
    if len(named) > 1:
        raise SpecError(f"{' and '.join(f'{name}_column' for name in named)} were given: a row has one content")
    for name in named:
        if kind not in (None, name):
            raise SpecError(f"{name}_column was given, and kind is {kind!r}")
        return name, named[name]
    return kind, None


# fmt: off
_LABELS = frozenset([
    "label", "labels", "cls", "class", "category", "target", "sentiment", "intent", "emotion", "topic", "tag", "tags",
    "rating", "stars", "score", "polarity", "y",
])
# fmt: on
_NOT_CONTENT = frozenset(["id", "idx", "index", "uid", "guid", "__key__", "split", ""])


@dataclass
class Roles:
    """The columns chosen, and notes on the choice. ``labels`` is empty when there are no labels.

    ``kind`` is the kind of content, that of ``content`` its column.
    """

    kind: str
    content: str
    labels: tuple[str, ...] = ()
    id: str | None = None
    split: str | None = None
    notes: list[str] = field(default_factory=list)


def choose_columns(sources: Sequence[Source], options: ReadingOptions, *, guess_split: bool) -> Roles:
    """Choose the columns, going by the first source, and check that every source has them.

    Raises ``InputError`` that lists the columns there are when one is missing or the choice is not clear.
    """
    first = sources[0]
    roles = Roles("", "", id=options.id_column, split=options.split_column)
    named = [name for name in (options.content_column, options.id_column, options.split_column) if name is not None]
    for name in named:
        _require(first, name)
    if options.labels != "none" and options.label_column is not None:
        roles.labels = _label_columns(first, options.label_column)
    taken = {*named, *roles.labels}
    if options.labels != "none" and options.label_column is None:
        guess = _guess(first, [column for column in _free(first, taken) if _plain(column) in _LABELS], "label")
        if guess is not None:
            roles.labels = (guess,)
            taken.add(guess)
    if roles.id is None and first.id_column not in taken and len({source.id_column for source in sources}) == 1:
        roles.id = first.id_column
        taken.add(roles.id or "")
    roles.kind = options.kind or first.content_kind or _guess_kind(first, taken)
    content = CONTENTS[roles.kind]
    roles.content = options.content_column or _guess_content(first, content, taken)
    taken.add(roles.content)
    if options.labels == "required" and not roles.labels:
        roles.labels = (_only_other(first, taken),)
    if options.content_column is None and len(first.columns) > 1 and not first.names_roles:
        roles.notes.append(f"{content.noun} column: {roles.content!r} (guessed)")
    if roles.labels and options.label_column is None and not first.names_roles:
        roles.notes.append(f"label column: {roles.labels[0]!r} (guessed)")
    if guess_split and options.split_column is None:
        roles.split = _guess_split(first, taken | set(roles.labels))
        if roles.split is not None and not first.names_roles:
            roles.notes.append(f"split column: {roles.split!r} (guessed)")
    _check(sources, roles, content, options.labels == "optional")
    roles.notes += [note for source in sources for note in source.notes]
    return roles


def _check(sources: Sequence[Source], roles: Roles, content: Content, labels_optional: bool) -> None:
    noun = content.noun
    names = [name for name in (roles.content, *roles.labels, roles.id, roles.split) if name is not None]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"the column {name!r} has two roles: name different columns for {noun}, label, id and split"
            )
    for source in sources:
        for name in names:
            if name not in source.columns and name in roles.labels and labels_optional:
                roles.notes.append(f"{source.name} has no column {name!r}: its rows have no label")
            else:
                _require(source, name)
        declared = source.declared_type(roles.content)
        if declared is not None and not content.accepts(declared.kind):
            raise InputError(f"{source.name}: the column {roles.content!r} is of type {declared.name}, expected {noun}")


def _require(source: Source, name: str) -> None:
    if name in source.columns:
        return
    hint = did_you_mean(name, source.columns)
    raise InputError(f"{source.name} has no column {name!r}{hint}: it has {_listed(source)}")


def _listed(source: Source) -> str:
    shown = ", ".join(map(repr, source.columns[:30])) + (", ..." if len(source.columns) > 30 else "")
    if len(source.columns) == 1 and (held := [mark for mark in ";\t|," if mark in source.columns[0]]):
        shown += f" (one column with {held[0]!r} in its name: .csv is split at commas, .tsv at tabs)"
    return shown


def _label_columns(source: Source, given: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(given, str):
        names = (given,) if given in source.columns else tuple(name.strip() for name in given.split(","))
    else:
        names = tuple(given)
    if not names:
        raise InputError("label_column is an empty list: name at least one column, or pass labels='none'")
    for name in names:
        _require(source, name)
    return names


def _plain(column: str) -> str:
    return column.strip().lower()


def _free(source: Source, taken: set[str]) -> list[str]:
    return [column for column in source.columns if column not in taken]


def _guess(source: Source, likely: Sequence[str], default: str) -> str | None:
    """Return the one of the ``likely`` columns, or the one that is called ``default``; None where there is none."""
    named = [column for column in likely if _plain(column) == default]
    if len(likely) > 1 and len(named) != 1:
        raise InputError(
            f"{source.name}: {' and '.join(map(repr, likely))} could each be the {default} column: "
            f"name it with --{default}-column; the columns are {_listed(source)}"
        )
    return next(iter(named or likely), None)


def _guess_kind(source: Source, taken: set[str]) -> str:
    """Return the first kind of content that a column is taken for, else the first kind of all, which is text."""
    columns = [(column, source.kind(column), source.sample[column]) for column in _free(source, taken)]
    claimed = (
        kind
        for kind, content in CONTENTS.items()
        if content.guessed and any(content.claims(*column) for column in columns)
    )
    return next(claimed, next(iter(CONTENTS)))


def _guess_content(source: Source, content: Content, taken: set[str]) -> str:
    free = [(column, source.kind(column), source.sample[column]) for column in _free(source, taken)]
    guess = _guess(source, [column[0] for column in free if content.claims(*column)], content.noun)
    if guess is not None:
        return guess
    likely = [name for name, kind, cells in free if _plain(name) not in _NOT_CONTENT and content.holds(kind, cells)]
    named = [name for name, _, _ in free if _plain(name) in content.column_names]
    if len(likely or named) == 1:
        return (likely or named)[0]
    raise InputError(
        f"{source.name}: cannot tell which column is the {content.noun}: name it with --{content.noun}-column; "
        f"the columns are {_listed(source)}"
    )


def _only_other(source: Source, taken: set[str]) -> str:
    others = [column for column in _free(source, taken) if _plain(column) not in _NOT_CONTENT]
    if len(others) == 1:
        return others[0]
    raise InputError(
        f"{source.name}: cannot tell which column is the label: name it with --label-column; "
        f"the columns are {_listed(source)}"
    )


def _guess_split(source: Source, taken: set[str]) -> str | None:
    for column in _free(source, taken):
        if _plain(column) == "split":
            values = [value for value in source.sample[column] if isinstance(value, str)]
            if values and all(map(is_standard, values)):
                return column
    return None
