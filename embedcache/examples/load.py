"""The pass over the input: check every row, keep compact columns and contents, set bad rows aside."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, cast

import numpy as np
from numpy.typing import NDArray

from embedcache.arguments import checks_arguments
from embedcache.dataset import Examples, IdColumn, Packed
from embedcache.errors import BadRowsError, InputError, SpecError, quiet, warn
from embedcache.examples import findings
from embedcache.examples.class_sets import ClassSets
from embedcache.examples.columns import (
    LabelUse,
    ReadingOptions,
    Roles,
    choose_columns,
    kind_and_column,
    quarantine_file,
)
from embedcache.examples.content import content_of
from embedcache.examples.inputs import GivenSource, open_inputs
from embedcache.examples.labels import Classes, KnownClasses, Labels, Numbers, Targets
from embedcache.examples.packing import IdCollector
from embedcache.examples.source import BadRow, Block, Faults, Source
from embedcache.examples.splits import SplitColumn, assign_splits, ordered, parse_split, shares_note
from embedcache.fingerprint import KEY_BYTES, strict_json
from embedcache.journal import commit, explained, replacing
from embedcache.notebook import shows_bars
from embedcache.spec import PixelRange, TaskName
from embedcache.wording import counted

# The file that bad rows are set aside in.


class Quarantine:
    """The file that bad rows are set aside in: written beside its place, put there when the pass is over."""

    def __init__(self, path: Path, sources: Sequence[Source]) -> None:
        self.path = path
        self._stack = ExitStack()
        self._file: IO[bytes] | None = None
        with explained(f"cannot read {path}", InputError):
            self._there = path.exists()
            for source in sources:
                if source.path is not None and self._there and os.path.samefile(source.path, path):
                    raise SpecError(f"the quarantine file {path} is an input file: name another one")
        if self._there and not self._is_ours():
            raise SpecError(f"the quarantine file {path} exists and was not written by embedcache: name another one")

    def _is_ours(self) -> bool:
        try:
            with open(self.path, "rb") as file:
                line = file.readline(1 << 24)
            return not line or list(strict_json(line)) == ["file", "line", "reason", "raw"]
        except (OSError, ValueError, TypeError):
            return False

    def __enter__(self) -> Quarantine:
        return self

    def add(self, name: str, row: BadRow) -> None:
        """Write one row. ASCII only, so that bytes that are not UTF-8 come back by ``surrogateescape``."""
        if self._file is None:
            self._file = self._stack.enter_context(replacing(self.path, InputError))
        record = {"file": name, "line": row.line, "reason": row.reason, "raw": row.raw}
        self._file.write((json.dumps(record, default=_shown_value) + "\n").encode("ascii"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is None and kind is None and self._there:
            commit(self.path, b"", InputError)  # of an earlier run, which had bad rows
        self._stack.__exit__(kind, error, traceback)


def set_aside(path: Path, rows: Iterable[tuple[str, str]], contents: Iterable[bytes]) -> None:
    """Add rows to the file of bad rows: each has a name in the place of its file, a reason and its content."""
    with explained(f"cannot read {path}", InputError):
        lines = [path.read_bytes()] if path.exists() else []
    for (name, reason), content in zip(rows, contents, strict=True):
        try:
            raw = content.decode("utf-8")
        except UnicodeDecodeError:
            raw = _shown_value(content)
        lines.append((json.dumps({"file": name, "line": 0, "reason": reason, "raw": raw}) + "\n").encode("ascii"))
    commit(path, b"".join(lines), InputError)


def _shown_value(value: object) -> str:
    """Return what JSON has no form for; of the bytes of a file, which its source holds anyway, how many there are."""
    if isinstance(value, bytes) and len(value) > _MOST_RAW:
        return f"{len(value):,} bytes"
    return repr(value)


_MOST_RAW = 1000
_SHOWN_BAD_ROWS = 10
_MOST_OPEN = 16
"""Files that are kept open, with a block of rows each, between the look at their first rows and the reading of all."""


@checks_arguments()
def load_examples(
    inputs: object = None,
    *,
    text_column: str | None = None,
    image_column: str | None = None,
    label_column: str | Sequence[str] | None = None,
    id_column: str | None = None,
    split_column: str | None = None,
    train: object = None,
    validation: object = None,
    test: object = None,
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
    kind: str | None = None,
    allow_outside: bool = False,
    pixel_range: Sequence[float] | None = None,
) -> Examples:
    """Read an input once and return its usable rows.

    ``inputs`` is a path, ``-`` for standard input, a list of dicts, a DataFrame or a Dataset, or a list of these, or a
    mapping from the name of a split to one of these (a DatasetDict). Files are CSV, TSV, JSONL or plain lines (each
    also gzipped), Parquet or WebDataset tar, by their extension or by ``format``; ``quoting="none"`` takes quotes in
    CSV and TSV as ordinary characters. A folder holds pictures, in folders that are the classes (``cat/1.png``), also
    within folders of splits (``train/cat/1.png``), or named by the column ``file_name`` of a ``metadata.csv`` or
    ``metadata.jsonl``.

    The ``kind`` of content is ``"text"`` or ``"image"``, guessed unless given; ``text_column`` or ``image_column``
    names its column. It is ``"id"`` for rows whose content nobody has, as of imported features: there ``id_column``
    stands for it. A cell of an image column is a path (in a file, relative to its folder, and outside of that only
    with ``allow_outside``), an image file's bytes, both as the library ``datasets`` has them, a PIL image, or an array
    of uint8. Floating-point and 32-bit integer pixels (also arrays of other numbers) need a ``pixel_range``, the values
    of black and white: what is between is scaled linearly, what is beyond is clipped. Pictures that are files stay
    where they are, and must stay there as long as their contents are wanted.

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
    kind, content_column = kind_and_column(kind, {"text": text_column, "image": image_column})
    if kind == "id":
        content_column, id_column = id_column, None
    options = ReadingOptions(
        kind=kind,
        content_column=content_column,
        label_column=label_column,
        id_column=id_column,
        split_column=split_column,
        split=split,
        split_seed=split_seed,
        task=task,
        label_separator=label_separator,
        class_names=None if class_names is None else tuple(class_names),
        extend_classes=extend_classes,
        labels=labels,
        quarantine=quarantine_file(on_bad_row, quarantine),
        format=format,  # type: ignore[arg-type]  # refused there unless it is one
        quoting=quoting,
        allow_outside=allow_outside,
        pixel_range=pixel_range,  # type: ignore[arg-type]  # made one there
    )
    examples = read(inputs, {"train": train, "validation": validation, "test": test}, options)
    warn(examples.notes)
    return examples


def examples_of(
    values: Sequence[object], kind: str, name: Callable[[int], str], pixel_range: PixelRange | None = None
) -> Examples:
    """Read values of one ``kind`` of content, without labels; nothing is warned of.

    Raises ``InputError`` that calls the first faulty one by ``name`` of its row.
    """
    content = content_of(kind, pixel_range)
    try:
        with quiet():  # that contents repeat is what they are kept for
            rows = [{content.noun: value} for value in values]
            return load_examples(rows, kind=kind, labels="none", pixel_range=pixel_range)
    except BadRowsError:  # which knows rows by their numbers alone
        for start in range(0, len(values), content.window):
            block = values[start : start + content.window]
            content.encode_all(block, lambda row: name(start + row))  # noqa: B023  # it is called at once
        raise


def read(inputs: object, by_split: Mapping[str, object], options: ReadingOptions) -> Examples:
    """Do what ``load_examples`` does, but warn of nothing."""
    with ExitStack() as stack:
        given: list[GivenSource] = []
        for split, source in open_inputs(inputs, by_split, options):
            stack.callback(source.close)
            given.append(GivenSource(split, source))
            if len(given) > _MOST_OPEN and source.path is not None:
                source.close()  # as a process may not have many open; it is opened again when its turn comes
        sources = [source for _, source in given]
        guess_split = options.labels != "none" and options.split is None and all(split is None for split, _ in given)
        roles = choose_columns(sources, options, guess_split=guess_split)
        labels = _label_collector(sources, roles, options)
        quarantine = None
        if options.quarantine is not None:
            quarantine = stack.enter_context(Quarantine(options.quarantine, sources))
        reading = _Pass(roles, options, labels, quarantine)
        with reading.shown(sources):
            for split, source in given:
                reading.read(source, split or "train")
                source.close()
        known = KnownClasses(options.class_names, options.extend_classes, _declared(sources, roles))
        return reading.finish(known)


def _label_collector(sources: Sequence[Source], roles: Roles, options: ReadingOptions) -> Labels | None:
    """Choose what collects the labels, going by the options and the first cells of the first label column.

    Raises ``SpecError`` for options that contradict each other.
    """
    columns, task, separator = roles.labels, options.task, options.label_separator
    required = options.labels == "required"
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
    """Return the class names that all sources with the label column declare alike."""
    if len(roles.labels) != 1:
        return ()
    declared = {source.class_names(roles.labels[0]) for source in sources if roles.labels[0] in source.columns}
    return (declared.pop() or ()) if len(declared) == 1 else ()


class _Pass:
    """The state of the pass over all sources."""

    def __init__(
        self, roles: Roles, options: ReadingOptions, labels: Labels | None, quarantine: Quarantine | None
    ) -> None:
        self._roles = roles
        self._options = options
        self._labels = labels
        self._quarantine = quarantine
        self._ids = IdCollector(roles.id) if roles.id is not None else None
        self._splits = SplitColumn(roles.split) if roles.split is not None else None
        content = content_of(roles.kind, options.pixel_range)
        self._unit = content.unit
        self._contents = content.collector(roles.content, options.allow_outside)
        self._rows_given: list[tuple[str, int]] = []
        self._bad: list[tuple[str, str]] = []
        self._n_bad = 0

    @contextmanager
    def shown(self, sources: Sequence[Source]) -> Iterator[None]:
        """Draw a bar on a terminal while rows are read that take time: of how many, if all sources know it."""
        if self._unit is None or not shows_bars():
            yield
            return
        from tqdm.auto import tqdm

        rows = [source.rows for source in sources if source.rows is not None]
        total = sum(rows) if len(rows) == len(sources) else None
        with tqdm(total=total, desc="read", unit=self._unit, delay=1, mininterval=0.2) as bar:
            self._contents.done = bar.update
            yield

    def read(self, source: Source, split: str) -> None:
        """Read one source to its end; ``split`` is that of its rows unless a column or the options say otherwise."""
        roles = self._roles
        wanted = [roles.content, roles.id, roles.split, *(name for name in roles.labels if name in source.columns)]
        columns = [name for name in wanted if name is not None]
        first = self._rows
        for block in source.blocks(columns):
            rows = len(block.lines)
            if rows:
                cells = dict(zip(columns, block.values, strict=True))
                # A source of unlabelled rows may lack the column altogether.
                missing: list[object] = [None] * rows
                faults = self._take(source, cells, [cells.get(name) or missing for name in roles.labels])
                block.bad += (BadRow(block.lines[place], reason, block.raw(place)) for place, reason in faults.items())
            if block.bad:
                self._set_aside(source, block)
        self._rows_given.append((split, self._rows - first))

    @property
    def _rows(self) -> int:
        return len(self._contents.keys) // KEY_BYTES

    def _take(
        self, source: Source, cells: Mapping[str, Sequence[object]], label_cells: Sequence[Sequence[object]]
    ) -> Faults:
        """Add the usable rows of a block; return why the others are not usable."""
        roles = self._roles
        columns = [self._contents.parse(cells[roles.content], source)]
        if self._ids is not None and roles.id is not None:
            columns.append(self._ids.parse(cells[roles.id]))
        if self._splits is not None and roles.split is not None:
            columns.append(self._splits.parse(cells[roles.split]))
        if self._labels is not None:
            columns.append(self._labels.parse(label_cells))
        faults: Faults = {}
        for column in reversed(columns):  # of several faults of a row, the first column's is told
            faults |= column.faults
        keep = [place for place in range(len(cells[roles.content])) if place not in faults] if faults else None
        if keep is None or keep:
            for column in columns:
                column.add(keep)
        return faults

    def _set_aside(self, source: Source, block: Block) -> None:
        self._n_bad += len(block.bad)
        block.bad.sort(key=lambda row: row.line)
        for row in block.bad[: _SHOWN_BAD_ROWS - len(self._bad)]:
            self._bad.append((source.where(row.line), row.reason))
        if self._quarantine is not None:
            for row in block.bad:
                self._quarantine.add(source.name, row)

    def finish(self, known: KnownClasses) -> Examples:
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
        keys = np.frombuffer(self._contents.keys, np.uint8).reshape(-1, KEY_BYTES)
        targets: Targets | None = None
        if self._labels is not None:
            targets = self._labels.finish(known)
            notes += targets.notes
        ids = IdColumn(rows)
        if self._ids is not None:
            ids, id_notes = self._ids.finish()
            notes += id_notes
        split, split_names = self._split(keys)
        for array in (keys, split, *([] if targets is None else [targets.values])):
            array.flags.writeable = False
        groups = findings.group(keys)
        examples = Examples(
            keys=keys,
            targets=None if targets is None else targets.values,
            task=None if targets is None else targets.task,
            class_names=() if targets is None else targets.class_names,
            split=split,
            split_names=split_names,
            ids=ids,
            kind=self._roles.kind,
            packed_contents=self._contents.finish(),
            n_unique=groups.number,
            pixel_range=self._options.pixel_range,
        )

        def show(wanted: Sequence[int]) -> list[str]:
            return [self._contents.show(examples.packed_contents, row) for row in wanted]

        if self._options.split is not None:
            notes += shares_note(self._options.split)
        if examples.kind == "id":
            examples = replace(examples, ids=IdColumn(rows, cast("Packed", examples.packed_contents)))
        notes += findings.duplicates(groups)
        notes += findings.leaks(groups, examples, show)
        notes += findings.contradictions(groups, examples, show)
        notes += findings.gaps(examples)
        return replace(examples, notes=tuple(notes))

    def _split(self, keys: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
        if self._splits is not None:
            return self._splits.finish()
        if self._options.split is not None:
            names, shares = parse_split(self._options.split)
            return assign_splits(keys, shares, self._options.split_seed), names
        names = ordered(name for name, _ in self._rows_given)
        codes = [names.index(name) for name, _ in self._rows_given]
        return np.repeat(np.array(codes, np.uint8), [rows for _, rows in self._rows_given]), names
