"""The pass over the input: check every row, keep compact columns, read contents again on demand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from embedcache.errors import BadRowsError, InputError, SpecError
from embedcache.examples import findings
from embedcache.examples.columns import LabelUse, Roles, choose_columns
from embedcache.examples.content import CONTENTS, Content, Faults, is_missing, unicode_fault
from embedcache.examples.files import BadRow, Block, Source, open_file
from embedcache.examples.labels import KnownClasses, Labels, Targets, collector, count
from embedcache.examples.objects import is_table, open_object
from embedcache.examples.splits import SplitColumn, assign_splits, normal_name, ordered, parse_split
from embedcache.fingerprint import KEY_BYTES
from embedcache.spec import TASKS, Task

_SHOWN_BAD_ROWS = 10


class IdColumn(Sequence[str]):
    """The ids of N rows: strings packed into one buffer, or the running row number, which takes no room.

    ``data`` is u1 (UTF-8) and ``offsets`` i8 [N + 1]; both are None when the ids are the running row number.
    """

    def __init__(self, rows: int, data: NDArray[np.uint8] | None = None, offsets: NDArray[np.int64] | None = None) -> None:
        self._rows = rows
        self.data = data
        self.offsets = offsets

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[place] for place in range(*row.indices(self._rows))]
        if not -self._rows <= row < self._rows:
            raise IndexError(f"row {row} of {self._rows}")
        row = int(row) % self._rows
        if self.data is None or self.offsets is None:
            return str(row)
        return self.data[self.offsets[row] : self.offsets[row + 1]].tobytes().decode()


@dataclass(frozen=True)
class _Part:
    """The rows of one source: usable rows ``first`` to ``first + rows``; ``skipped`` are records that are no rows."""

    source: Source
    column: str
    first: int
    rows: int
    skipped: NDArray[np.int64]


@dataclass(frozen=True, eq=False, repr=False)
class Examples:
    """The usable rows of an input, N of them, without their contents.

    ``keys`` is u1 [N, 16], the row key of each content. ``targets`` is None without labels, else int64 [N] for
    classification (-1: no label), uint8 [N, C] for multilabel (255 throughout: no label) or float64 [N, R] for
    regression (NaN: no label). ``class_names`` are the classes, or the names of the regression targets. ``split`` is
    u1 [N], an index into ``split_names``. ``notes`` are one-line facts to print: what was guessed, leaks,
    contradicting labels, classes a split lacks. ``n_unique`` counts different contents.
    """

    keys: NDArray[np.uint8]
    targets: NDArray[Any] | None
    task: Task | None
    class_names: tuple[str, ...]
    split: NDArray[np.uint8]
    split_names: tuple[str, ...]
    ids: IdColumn
    notes: tuple[str, ...]
    n_unique: int
    kind: str
    _parts: tuple[_Part, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {rows:,}" for name, rows in self.split_sizes().items())
        return f"Examples({len(self):,} rows: {sizes}; task {self.task}, {count(len(self.class_names), 'class')})"

    def split_sizes(self) -> dict[str, int]:
        """Return how many rows each split has."""
        sizes = np.bincount(self.split, minlength=len(self.split_names))
        return dict(zip(self.split_names, sizes.tolist(), strict=True))

    def labelled(self) -> NDArray[np.bool_]:
        """Return which rows have a label, bool [N]."""
        return findings.labelled(self.task, self.targets, len(self))

    def contents(self, rows: NDArray[np.int64] | Sequence[int] | None = None) -> Iterator[bytes]:
        """Read the input again and yield the contents of ``rows`` (int64, strictly increasing; None for all).

        Memory stays flat. Raises ``ValueError`` for rows out of order or range, and ``InputError`` when a content is
        no longer the one that was seen first.
        """
        wanted = np.arange(len(self)) if rows is None else np.asarray(rows, np.int64)
        if wanted.ndim != 1 or (wanted[1:] <= wanted[:-1]).any():
            raise ValueError("rows must be a strictly increasing vector of row numbers")
        if len(wanted) and (wanted[0] < 0 or wanted[-1] >= len(self)):
            raise ValueError(f"rows must lie in [0, {len(self)}), got {wanted[0]} to {wanted[-1]}")
        return self._contents(wanted)

    def _contents(self, wanted: NDArray[np.int64]) -> Iterator[bytes]:
        content = CONTENTS[self.kind]
        for part in self._parts:
            mine = wanted[np.searchsorted(wanted, part.first) : np.searchsorted(wanted, part.first + part.rows)]
            done = 0
            records = 0
            row = part.first
            if not len(mine):
                continue
            for block in part.source.blocks((part.column,)):
                values = block.values[0]
                skipped = part.skipped[slice(*np.searchsorted(part.skipped, (records, records + len(values))))] - records
                records += len(values)
                if len(skipped):
                    gone = set(skipped.tolist())
                    values = [value for place, value in enumerate(values) if place not in gone]
                here = mine[done : np.searchsorted(mine, row + len(values))]
                if len(here) != len(values):
                    values = [values[place] for place in (here - row).tolist()]
                row += len(block.values[0]) - len(skipped)
                done += len(here)
                if not values:
                    continue
                contents, faults = content.encode(part.column, values)
                seen = np.frombuffer(_keys(contents), np.uint8).reshape(-1, KEY_BYTES)
                changed = (seen != self.keys[here]).any(axis=1)
                if faults or changed.any():
                    place = min([*faults, *np.flatnonzero(changed).tolist()])
                    raise InputError(
                        f"{part.source.name} changed while it was being used: row {here[place]} is not what it was; start again"
                    )
                yield from contents
                if done == len(mine):
                    break
            if done < len(mine):
                raise InputError(
                    f"{part.source.name} changed while it was being used: it had {part.rows} rows and now {row - part.first}; start again"
                )


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
    task: Task | None = None,
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
    ``SpecError`` for options that make no sense.

    >>> examples = load_examples([{"text": "fine", "label": "good"}, {"text": "poor", "label": "bad"}])
    >>> examples.class_names, examples.targets.tolist(), list(examples.contents())
    (('bad', 'good'), [1, 0], [b'fine', b'poor'])
    """
    _check_options(task, labels, on_bad_row, quarantine, split, split_seed, class_names, kind)
    given = _gather(inputs, {"train": train, "validation": validation, "test": test}, format, quoting)
    from_files = [name for name, _ in given if name is not None]
    if from_files and (split is not None or split_column is not None):
        other = "split" if split is not None else "split_column"
        raise SpecError(f"splits were given both as inputs ({', '.join(dict.fromkeys(from_files))}) and by {other}: choose one")
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
            writer = stack.enter_context(_Quarantine(Path(quarantine), sources))
        reading = _Pass(roles, content, label_rows, writer)
        for source in sources:
            reading.read(source)
    known = KnownClasses(
        None if class_names is None else tuple(class_names), extend_classes, _declared(sources, roles) if roles.labels else ()
    )
    return reading.finish(kind, known, [name for name, _ in given], split, split_seed)


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
            raise SpecError(f"{name} is {value!r}: expected one of {', '.join(str(choice) for choice in choices if choice)}")
    if on_bad_row == "skip" and quarantine is None:
        raise SpecError("on_bad_row is skip but there is no quarantine file: name the file that bad rows are set aside in")
    if class_names is not None and len(set(class_names)) != len(class_names):
        raise SpecError(f"class_names holds a name twice: {', '.join(class_names)}")
    if split is not None:
        parse_split(split)
    if not 0 <= split_seed < 2**64:
        raise SpecError(f"split_seed is {split_seed}: expected a whole number in [0, 2**64)")


def _gather(inputs: Any, named: Mapping[str, Any], format: str | None, quoting: str) -> list[tuple[str | None, Source]]:
    given: list[tuple[str | None, Any]] = []
    splits = {name: value for name, value in named.items() if value is not None}
    if isinstance(inputs, Mapping):
        if not inputs:
            raise InputError("the input is an empty mapping: expected split names and their rows")
        for name, value in inputs.items():
            if not isinstance(value, (str, os.PathLike)) and not is_table(value) and not isinstance(value, Sequence):
                raise InputError(f"the input maps {name!r} to a {type(value).__name__}: expected the rows of a split")
            if isinstance(value, Sequence) and value and isinstance(value[0], (str, int, float)) and not isinstance(value, str):
                if not all(isinstance(item, str) and Path(item).suffix for item in value[:3]):
                    raise InputError(f"the input maps {name!r} to cells, not rows: pass a list of dicts or a DataFrame")
            given.append((normal_name(str(name)), value))
        if splits:
            raise SpecError(f"the input maps splits already: drop {', '.join(splits)}")
    elif inputs is not None:
        if "train" in splits:
            raise SpecError("both inputs and train were given: pass the training rows once")
        given.append(("train" if splits else None, inputs))
    given += splits.items()
    if not given:
        raise InputError("there is no input: pass a file, a list of dicts, a DataFrame or a Dataset")
    return [(name, source) for name, value in given for source in _sources(name, value, format, quoting)]


def _sources(name: str | None, value: Any, format: str | None, quoting: str) -> Iterator[Source]:
    label = name or "input"
    if isinstance(value, (str, os.PathLike)):
        yield open_file(os.fspath(value), format, quoting)
    elif is_table(value):
        yield open_object(value, label)
    elif isinstance(value, Sequence):
        for number, item in enumerate(value):
            if isinstance(item, (str, os.PathLike)):
                yield open_file(os.fspath(item), format, quoting)
            elif is_table(item):
                yield open_object(item, f"{label} {number}")
            else:
                raise InputError(f"{label}: item {number} is a {type(item).__name__}, expected a path, a table or a list of dicts")
    else:
        raise InputError(
            f"{label}: got a {type(value).__name__}, expected a path, a list of dicts, a DataFrame or a Dataset (read more than once)"
        )


def _label_collector(
    sources: Sequence[Source], roles: Roles, task: Task | None, separator: str | None, labels: LabelUse
) -> Labels | None:
    if not roles.labels:
        return None
    sample = [value for source in sources if roles.labels[0] in source.columns for value in source.sample[roles.labels[0]]]
    return collector(roles.labels, sample, task, separator, labels == "required")


def _declared(sources: Sequence[Source], roles: Roles) -> tuple[str, ...]:
    if len(roles.labels) != 1:
        return ()
    found = {source.class_names(roles.labels[0]) for source in sources if roles.labels[0] in source.columns}
    return (found.pop() or ()) if len(found) == 1 else ()


class _Quarantine:
    """The file that bad rows are set aside in: written beside its place, put there when the pass is over."""

    def __init__(self, path: Path, sources: Sequence[Source]) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        for source in sources:
            used = getattr(source, "path", None)
            if used is not None and path.exists() and os.path.samefile(used, path):
                raise SpecError(f"the quarantine file {path} is an input file: name another one")
        if path.exists() and not self._is_ours():
            raise SpecError(f"the quarantine file {path} exists and was not written by embedcache: name another one")

    def _is_ours(self) -> bool:
        try:
            with open(self.path, "rb") as file:
                line = file.readline(1 << 24)
            return not line or list(json.loads(line)) == ["file", "line", "reason", "raw"]
        except (OSError, ValueError):
            return False

    def __enter__(self) -> _Quarantine:
        try:
            self._file = open(self._partial, "w", encoding="ascii")  # noqa: SIM115 - closed in __exit__
        except OSError as error:
            raise InputError(f"the quarantine file {self.path} cannot be written: {error.strerror}") from None
        return self

    def add(self, name: str, row: BadRow) -> None:
        """Write one row. ASCII only, so that bytes that are not UTF-8 come back by ``surrogateescape``."""
        record = {"file": name, "line": row.line, "reason": row.reason, "raw": row.raw}
        self._write(json.dumps(record, default=repr) + "\n")

    def _write(self, text: str) -> None:
        try:
            self._file.write(text)
        except OSError as error:
            raise InputError(f"the quarantine file {self.path} cannot be written: {error.strerror}") from None

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if error is not None:
            self._file.close()
            self._partial.unlink(missing_ok=True)
            return
        try:
            self._file.close()
            if self._partial.stat().st_size or self.path.exists():
                os.replace(self._partial, self.path)
            else:
                self._partial.unlink()
        except OSError as problem:
            raise InputError(f"the quarantine file {self.path} cannot be written: {problem.strerror}") from None


class _Ids:
    """Collects a column of ids."""

    def __init__(self, column: str) -> None:
        self._column = column
        self._data = bytearray()
        self._lengths = bytearray()
        self._digests = bytearray()

    def parse(self, values: Sequence[Any]) -> tuple[list[bytes], Faults]:
        """Return the ids as UTF-8 and the faults of one block."""
        ids: list[bytes] = []
        faults: Faults = {}
        for position, value in enumerate(values):
            if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
                value = str(int(value))
            if is_missing(value) or value == "":
                faults[position] = f"the id {self._column!r} is missing"
            elif not isinstance(value, str):
                faults[position] = f"the id {self._column!r} is of type {type(value).__name__}, expected a string or an integer"
            elif fault := unicode_fault(self._column, value):
                faults[position] = fault
            ids.append(b"" if position in faults else value.encode())
        return ids, faults

    def append(self, ids: Sequence[bytes]) -> None:
        """Add the ids of usable rows."""
        self._data += b"".join(ids)
        self._lengths += np.array(list(map(len, ids)), np.int64).tobytes()
        self._digests += b"".join([blake2b(id, digest_size=8).digest() for id in ids])

    def finish(self) -> tuple[IdColumn, list[str]]:
        """Return the column, and a note when ids repeat."""
        lengths = np.frombuffer(self._lengths, np.int64)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        repeated = len(lengths) - len(np.unique(np.frombuffer(self._digests, np.uint64)))
        notes = [f"{count(repeated, 'row')} with an id in {self._column!r} that another row has too"] if repeated else []
        return IdColumn(len(lengths), np.frombuffer(self._data, np.uint8), offsets), notes


class _Pass:
    """The state of the pass over all sources."""

    def __init__(self, roles: Roles, content: Content, labels: Labels | None, quarantine: _Quarantine | None) -> None:
        self._roles = roles
        self._content = content
        self._labels = labels
        self._quarantine = quarantine
        self._ids = _Ids(roles.id) if roles.id is not None else None
        self._splits = SplitColumn(roles.split) if roles.split is not None else None
        self._keys = bytearray()
        self._parts: list[_Part] = []
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
        self._parts.append(_Part(source, roles.content, first, self._rows - first, np.array(skipped, np.int64)))

    @property
    def _rows(self) -> int:
        return len(self._keys) // KEY_BYTES

    def _take(self, cells: Mapping[str, list[Any]], label_cells: list[list[Any]]) -> Faults:
        contents, faults = self._content.encode(self._roles.content, cells[self._roles.content])
        parsed: list[tuple[Callable[[Any], None], Sequence[Any]]] = [(self._append_keys, contents)]
        for column, values in ((self._ids, self._roles.id), (self._splits, self._roles.split)):
            if column is not None and values is not None:
                result, found = column.parse(cells[values])
                parsed.append((column.append, result))
                faults = {**found, **faults}
        if self._labels is not None:
            labels, found = self._labels.parse(label_cells)
            parsed.append((self._labels.append, labels))
            faults = {**found, **faults}
        if faults:
            keep = [place for place in range(len(contents)) if place not in faults]
            parsed = [(append, [values[place] for place in keep]) for append, values in parsed]
        if len(faults) < len(contents):
            for append, values in parsed:
                append(values)
        return faults

    def _append_keys(self, contents: list[bytes]) -> None:
        self._keys += _keys(contents)

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
            notes.append(f"{count(self._n_bad, 'bad row')} set aside in {self._quarantine.path}")
        rows = self._rows
        if not rows:
            raise InputError(f"no usable row is left: all {self._n_bad} are bad, the first at {': '.join(self._bad[0])}")
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
            _parts=tuple(self._parts),
        )

        def show(wanted: Sequence[int]) -> list[str]:
            return [self._content.show(content) for content in examples.contents(wanted)]

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


def _keys(contents: Sequence[bytes]) -> bytes:
    # ``fingerprint.row_key`` of each, without a Python call a row: half of the cost of a pass. A test holds them equal.
    return b"".join([blake2b(content, digest_size=KEY_BYTES).digest() for content in contents])
