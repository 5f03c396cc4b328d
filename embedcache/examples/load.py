"""The pass over the input: check every row, keep compact columns, read contents again on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from embedcache.arguments import checks_arguments
from embedcache.errors import BadRowsError, InputError, SpecError, warn
from embedcache.examples import findings
from embedcache.examples.class_sets import ClassSets
from embedcache.examples.columns import LabelUse, Roles, choose_columns
from embedcache.examples.content import CONTENTS, Content, Faults
from embedcache.examples.dataset import Examples, Part, row_keys
from embedcache.examples.ids import IdCollector, IdColumn
from embedcache.examples.inputs import gather
from embedcache.examples.labels import Classes, KnownClasses, Labels, Numbers, Targets
from embedcache.examples.quarantine import Quarantine
from embedcache.examples.source import BadRow, Block, Source
from embedcache.examples.splits import SplitColumn, assign_splits, ordered, parse_split, shares_note
from embedcache.fingerprint import KEY_BYTES
from embedcache.spec import TASKS, TaskName
from embedcache.wording import counted

_SHOWN_BAD_ROWS = 10


@checks_arguments()
def load_examples(
    inputs: Any = None,
    *,
    text_column: str | None = None,
    label_column: str | Sequence[str] | None = None,
    id_column: str | None = None,
    split_column: str | None = None,
    train: Any = None,
    validation: Any = None,
    test: Any = None,
    split: str | None = None,
    split_seed: int = 0,
    task: TaskName | None = None,
    label_separator: str | None = None,
    class_names: Sequence[str] | None = None,
    extend_classes: bool = False,
    labels: LabelUse = "required",
    on_bad_row: Literal["stop", "skip"] = "stop",
    quarantine: str | Path | None = None,
    format: str | None = None,
    quoting: Literal["minimal", "none"] = "minimal",
    kind: str = "text",
) -> Examples:
    """Read an input once and return its usable rows.

    ``inputs`` is a path, ``-`` for standard input, a list of dicts, a DataFrame or a Dataset, or a list of these, or a
    mapping from the name of a split to one of these (a DatasetDict). Files are CSV, TSV, JSONL or plain lines (each
    also gzipped) or Parquet, by their extension or by ``format``; ``quoting="none"`` takes quotes in CSV and TSV as
    ordinary characters.

    Splits come from ``train``, ``validation`` and ``test`` (``inputs`` counts as train beside them), from a mapping,
    from ``split_column``, or by content hash from ``split`` such as ``80/10/10`` with ``split_seed``. Without any of
    them a column called ``split`` is used if it holds the usual names; otherwise all rows are train.

    Labels are strings or integers, one column; or several classes a row, as lists or with ``label_separator``, or as
    several 0/1 columns (``a,b,c``); or numbers, one or several columns. The task is guessed from them unless given.
    ``class_names`` fixes the classes and their order, and other labels are refused unless ``extend_classes``.
    ``labels="optional"`` lets rows have none, ``"none"`` ignores them.

    Bad rows raise ``BadRowsError`` once the whole input was read, or with ``on_bad_row="skip"`` go to the JSONL file
    ``quarantine`` as ``{"file", "line", "reason", "raw"}``. Raises ``InputError`` for anything else about the input,
    ``SpecError`` for options that make no sense. What was guessed or looks wrong (contents in two splits, contradicting
    labels, ...) is an ``EmbedcacheWarning`` each, and in ``notes``.

    >>> examples = load_examples([{"text": "fine", "label": "good"}, {"text": "poor", "label": "bad"}])
    >>> examples.class_names, examples.targets.tolist(), list(examples.contents())
    (('bad', 'good'), [1, 0], [b'fine', b'poor'])
    """
    _check_options(task, labels, on_bad_row, quarantine, split, split_seed, class_names, kind)
    given = gather(inputs, {"train": train, "validation": validation, "test": test}, format, quoting)
    from_files = [name for name, _ in given if name is not None]
    if from_files and (split is not None or split_column is not None):
        other = "split" if split is not None else "split_column"
        named = ", ".join(dict.fromkeys(from_files))
        raise SpecError(f"splits were given both as inputs ({named}) and by {other}: choose one")
    sources = [source for _, source in given]
    content = CONTENTS[kind]
    roles = choose_columns(
        sources,
        content,
        text_column=text_column,
        label_column=label_column,
        id_column=id_column,
        split_column=split_column,
        labels=labels,
        guess_split=labels != "none" and not from_files and split is None,
    )
    label_rows = _label_collector(sources, roles, task, label_separator, labels)
    with ExitStack() as stack:
        writer = None
        if on_bad_row == "skip":
            assert quarantine is not None
            writer = stack.enter_context(Quarantine(Path(quarantine), sources))
        reading = _Pass(roles, content, label_rows, writer)
        for source in sources:
            reading.read(source)
    fixed = None if class_names is None else tuple(class_names)
    known = KnownClasses(fixed, extend_classes, _declared(sources, roles))
    examples = reading.finish(kind, known, [name for name, _ in given], split, split_seed)
    warn(examples.notes)
    return examples


def _check_options(
    task: str | None,
    labels: str,
    on_bad_row: str,
    quarantine: object,
    split: str | None,
    split_seed: int,
    class_names: Sequence[str] | None,
    kind: str,
) -> None:
    for name, value, choices in (
        ("task", task, (None, *TASKS)),
        ("labels", labels, ("required", "optional", "none")),
        ("on_bad_row", on_bad_row, ("stop", "skip")),
        ("kind", kind, tuple(CONTENTS)),
    ):
        if value not in choices:
            expected = ", ".join(choice for choice in choices if choice is not None)
            raise SpecError(f"{name} is {value!r}: expected one of {expected}")
    if on_bad_row == "skip" and quarantine is None:
        raise SpecError("on_bad_row is skip but no quarantine file is named: say where bad rows are to be set aside")
    if class_names is not None and len(set(class_names)) != len(class_names):
        raise SpecError(f"class_names holds a name twice: {', '.join(class_names)}")
    if split is not None:
        parse_split(split)
    if not 0 <= split_seed < 2**64:
        raise SpecError(f"split_seed is {split_seed}: expected a whole number in [0, 2**64)")


def _label_collector(
    sources: Sequence[Source], roles: Roles, task: TaskName | None, separator: str | None, labels: LabelUse
) -> Labels | None:
    """Choose what collects the labels, going by the options and the first cells of the first label column.

    Raises ``SpecError`` for options that contradict each other.
    """
    columns, required = roles.labels, labels == "required"
    if not columns:
        return None
    if separator == "":
        raise SpecError("label_separator is empty: expected a character that stands between labels, such as |")
    if separator is not None and (task in ("classification", "regression") or len(columns) > 1):
        what = f"task {task}" if task in ("classification", "regression") else f"{len(columns)} label columns"
        raise SpecError(f"label_separator is for several labels in one cell and does not go with {what}")
    if task == "regression" or len(columns) > 1:
        if task == "classification":
            raise SpecError(f"classification takes one label column, got {', '.join(columns)}")
        return Numbers(columns, task, required)
    sample = [value for source in sources if columns[0] in source.columns for value in source.sample[columns[0]]]
    is_list = any(isinstance(value, (list, tuple, set, frozenset, np.ndarray)) for value in sample)
    if task == "multilabel" or separator is not None or (task is None and is_list):
        return ClassSets(columns[0], task, separator, required)
    return Classes(columns[0], task, required)


def _declared(sources: Sequence[Source], roles: Roles) -> tuple[str, ...]:
    if len(roles.labels) != 1:
        return ()
    found = {source.class_names(roles.labels[0]) for source in sources if roles.labels[0] in source.columns}
    return (found.pop() or ()) if len(found) == 1 else ()


class _Pass:
    """The state of the pass over all sources."""

    def __init__(self, roles: Roles, content: Content, labels: Labels | None, quarantine: Quarantine | None) -> None:
        self._roles = roles
        self._content = content
        self._labels = labels
        self._quarantine = quarantine
        self._ids = IdCollector(roles.id) if roles.id is not None else None
        self._splits = SplitColumn(roles.split) if roles.split is not None else None
        self._keys = bytearray()
        self._parts: list[Part] = []
        self._bad: list[tuple[str, str]] = []
        self._n_bad = 0

    def read(self, source: Source) -> None:
        """Read one source to its end."""
        roles = self._roles
        present = [column for column in roles.labels if column in source.columns]
        others = [column for column in (roles.id, roles.split) if column is not None]
        first = self._rows
        records = 0
        skipped: list[int] = []
        for block in source.blocks((roles.content, *others, *present)):
            cells = dict(zip((roles.content, *others, *present), block.values, strict=True))
            rows = len(block.lines)
            if rows:
                # A source of unlabelled rows may lack the column altogether.
                label_cells = [cells.get(column) or [None] * rows for column in roles.labels]
                faults = self._take(cells, label_cells)
                skipped += (records + place for place in sorted(faults))
                block.bad += (BadRow(block.lines[place], reason, block.raw(place)) for place, reason in faults.items())
                records += rows
            if block.bad:
                self._set_aside(source, block)
        self._parts.append(Part(source, roles.content, first, self._rows - first, np.array(skipped, np.int64)))

    @property
    def _rows(self) -> int:
        return len(self._keys) // KEY_BYTES

    def _take(self, cells: Mapping[str, list[Any]], label_cells: list[list[Any]]) -> Faults:
        contents, faults = self._content.encode(self._roles.content, cells[self._roles.content])
        parsed: list[tuple[Callable[[Any], None], Sequence[Any]]] = [(self._append_keys, contents)]
        columns: list[tuple[IdCollector | SplitColumn | Labels | None, Any]] = [
            (self._ids, cells.get(self._roles.id or "")),
            (self._splits, cells.get(self._roles.split or "")),
            (self._labels, label_cells),
        ]
        for column, values in columns:
            if column is not None:
                result, found = column.parse(values)
                parsed.append((column.append, result))
                faults = {**found, **faults}
        if faults:
            keep = [place for place in range(len(contents)) if place not in faults]
            parsed = [(append, [values[place] for place in keep]) for append, values in parsed]
        if len(faults) < len(contents):
            for append, values in parsed:
                append(values)
        return faults

    def _append_keys(self, contents: list[bytes]) -> None:
        self._keys += row_keys(contents)

    def _set_aside(self, source: Source, block: Block) -> None:
        self._n_bad += len(block.bad)
        block.bad.sort(key=lambda row: row.line)
        for row in block.bad[: _SHOWN_BAD_ROWS - len(self._bad)]:
            self._bad.append((source.where(row.line), row.reason))
        if self._quarantine is not None:
            for row in block.bad:
                self._quarantine.add(source.name, row)

    def finish(
        self, kind: str, known: KnownClasses, given: Sequence[str | None], split: str | None, split_seed: int
    ) -> Examples:
        """Put everything together, or raise for the bad rows that were met."""
        notes = list(self._roles.notes)
        if self._n_bad and self._quarantine is None:
            raise BadRowsError(self._bad, self._n_bad)
        if self._quarantine is not None and self._n_bad:
            notes.append(f"{counted(self._n_bad, 'bad row')} set aside in {self._quarantine.path}")
        rows = self._rows
        if not rows:
            where, reason = self._bad[0] if self._bad else ("?", "no rows")
            raise InputError(f"no usable row is left: all {self._n_bad} are bad, the first at {where}: {reason}")
        keys = np.frombuffer(self._keys, np.uint8).reshape(-1, KEY_BYTES)
        targets: Targets | None = None
        if self._labels is not None:
            targets = self._labels.finish(known)
            notes += targets.notes
        ids = IdColumn(rows)
        if self._ids is not None:
            ids, more = self._ids.finish()
            notes += more
        splits, split_names = self._split(keys, given, split, split_seed)
        for array in (keys, splits, *([] if targets is None else [targets.values])):
            array.flags.writeable = False
        groups = findings.group(keys)
        examples = Examples(
            keys=keys,
            targets=None if targets is None else targets.values,
            task=None if targets is None else targets.task,
            class_names=() if targets is None else targets.class_names,
            split=splits,
            split_names=split_names,
            ids=ids,
            notes=(),
            n_unique=groups.number,
            kind=kind,
            parts=tuple(self._parts),
        )

        def show(wanted: Sequence[int]) -> list[str]:
            return [self._content.show(content) for content in examples.contents(wanted)]

        if split is not None:
            notes += shares_note(split)
        notes += findings.duplicates(groups)
        notes += findings.leaks(groups, splits, split_names, show)
        notes += findings.contradictions(groups, examples.task, examples.targets, examples.class_names, show)
        notes += findings.absent(examples.task, examples.targets, examples.class_names, splits, split_names)
        object.__setattr__(examples, "notes", tuple(notes))
        return examples

    def _split(
        self, keys: NDArray[np.uint8], given: Sequence[str | None], split: str | None, seed: int
    ) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
        if self._splits is not None:
            return self._splits.finish()
        if split is not None:
            names, shares = parse_split(split)
            return assign_splits(keys, shares, seed), names
        names = ordered(name or "train" for name in given)
        codes = [names.index(name or "train") for name in given]
        return np.repeat(np.array(codes, np.uint8), [part.rows for part in self._parts]), names
