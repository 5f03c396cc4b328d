"""Predictions as a file: CSV, JSON lines or Parquet, one row after the other with flat memory."""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, Literal, get_args

from embedcache.errors import InputError, MissingExtraError, SpecError
from embedcache.heads import TrainedHead
from embedcache.journal import replacing, url_of
from embedcache.predict.nearest import Neighbour
from embedcache.predict.predictor import Prediction
from embedcache.task import CLASSIFICATION, MULTILABEL, REGRESSION, Named, task_named
from embedcache.wording import cell, json_shown

Format = Literal["csv", "jsonl", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)
_ENDINGS: dict[str, Format] = {
    ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".pq": "parquet"
}  # fmt: skip
_GROUP_ROWS = 4096
"""Rows of a row group of Parquet: what is held before it is written."""


def format_of(output: Path | str | None, form: Format | None = None) -> Format:
    """Return the format that was asked for, or by the ending of a file; standard output, None, has CSV.

    Raises ``SpecError`` for an ending that says nothing, for a URL, and for Parquet on standard output.
    """
    if output is None:
        if form == "parquet":
            raise SpecError("Parquet is no text for standard output: name a file with --output")
        return form or "csv"
    if (url := url_of(output)) is not None:
        raise SpecError(f"{url} is a URL, and predictions are written to a file of this machine: name one, and copy it")
    known = form or _ENDINGS.get(Path(output).suffix.lower())
    if known is None:
        raise SpecError(
            f"{output}: the ending says no format: expected .csv, .jsonl or .parquet, or one named by --format"
        )
    return known


class PredictionTable(ABC):
    """Writes predictions of ``head``, each with at most ``nearest`` training rows, to an open file.

    The columns are id, label, confidence, margin and the probability of each class (of a regression the value of each
    target), and then those of the training rows.
    """

    def __init__(self, head: TrainedHead, nearest: int = 0) -> None:
        self._task, self._nearest = task_named(head.task), nearest
        ours = ["id", *([] if self._task is REGRESSION else ["label", "confidence", "margin"])]
        taken = {*ours, "nearest", *self._near_columns()}
        prefix = "probability of " if taken & set(head.class_names) else ""
        self._ours, self._outputs = ours, [prefix + name for name in head.class_names]

    def _near_columns(self) -> list[str]:
        return [f"nearest {place} {what}" for place in range(1, self._nearest + 1) for what in _NEAR]

    @abstractmethod
    def write(self, name: str, prediction: Prediction) -> None:
        """Add a row by its id."""


_NEAR = ("id", "similarity", "label", "text")


class CSVTable(PredictionTable):
    """A table whose cells no spreadsheet runs as formulas; see ``wording.cell``."""

    def __init__(self, file: IO[str], head: TrainedHead, nearest: int = 0) -> None:
        super().__init__(head, nearest)
        self._writer = csv.writer(file, lineterminator="\n")
        self._writer.writerow(map(cell, [*self._ours, *self._outputs, *self._near_columns()]))
        # Labels are joined by a semicolon, unless a class has one in its name.
        self._as_json = any(";" in name for name in head.class_names)

    def write(self, name: str, prediction: Prediction) -> None:
        """Add a row by its id."""
        cells = [cell(name)]
        if self._task is not REGRESSION:
            cells += [self._label(prediction.label), _figure(prediction.confidence), _figure(prediction.margin)]
        cells += map(_figure, prediction.probabilities.values())
        for near in prediction.nearest:
            label = "" if near.label is None else self._label(near.label)
            cells += [cell(near.id), f"{near.similarity:.6f}", label, cell(near.text or "")]
        missing = len(_NEAR) * (self._nearest - len(prediction.nearest))
        self._writer.writerow([*cells, *[""] * missing])

    def _label(self, label: Named) -> str:
        if isinstance(label, str):
            return cell(label)
        values = [value if isinstance(value, str) else _figure(value) for value in label]
        return cell(json.dumps(values) if self._as_json else ";".join(values))


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


class JSONTable(PredictionTable):
    """One JSON object a line."""

    def __init__(self, file: IO[str], head: TrainedHead, nearest: int = 0) -> None:
        super().__init__(head, nearest)
        self._file, self._encoding = file, getattr(file, "encoding", None)

    def write(self, name: str, prediction: Prediction) -> None:
        """Add a row by its id."""
        line = json.dumps(
            json_of(name, prediction, regression=self._task is REGRESSION, explained=self._nearest > 0),
            ensure_ascii=False,
        )
        self._file.write(json_shown(line, self._encoding) + "\n")


def json_of(
    name: str, prediction: Prediction, *, regression: bool = False, explained: bool = False
) -> dict[str, object]:
    """Return a prediction as JSON values."""
    values = dict(prediction.probabilities)
    if regression:
        record: dict[str, object] = {"id": name, "values": values}
    else:
        record = {
            "id": name, "label": _json_label(prediction.label), "confidence": prediction.confidence,
            "margin": prediction.margin, "probabilities": values,
        }  # fmt: skip
    if explained:
        record["nearest"] = [
            {"id": near.id, "similarity": near.similarity, "label": _json_label(near.label), "text": near.text}
            for near in prediction.nearest
        ]
    return record


def _json_label(label: Named | None) -> object:
    return list(label) if isinstance(label, tuple) else label


class ParquetTable(PredictionTable):
    """A Parquet file of small row groups; several labels are a list of strings, training rows a list of structs.

    Raises ``MissingExtraError`` without pyarrow.
    """

    def __init__(self, file: IO[bytes], head: TrainedHead, nearest: int = 0) -> None:
        super().__init__(head, nearest)
        arrow, parquet = _pyarrow()
        number, text = arrow.float64(), arrow.string()
        labels = {CLASSIFICATION: text, MULTILABEL: arrow.list_(text)}
        label = labels.get(self._task, arrow.list_(number))
        fields = [(name, {"id": text, "label": label}.get(name, number)) for name in self._ours]
        fields += [(_valid(name), number) for name in self._outputs]
        if nearest:
            near = arrow.struct([("id", text), ("similarity", number), ("label", label), ("text", text)])
            fields.append(("nearest", arrow.list_(near)))
        self._schema = arrow.schema(fields)
        self._columns: list[list[Any]] = [[] for _ in fields]
        self._arrow, self._writer = arrow, parquet.ParquetWriter(file, self._schema)

    def write(self, name: str, prediction: Prediction) -> None:
        """Add a row by its id."""
        row: list[Any] = [name]
        if self._task is not REGRESSION:
            row += [_valid(prediction.label), prediction.confidence, prediction.margin]
        row += prediction.probabilities.values()
        if self._nearest:
            row.append([_struct(near) for near in prediction.nearest])
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)
        if len(self._columns[0]) == _GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        """Write the last row group and the footer."""
        if self._columns[0]:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        arrays = [
            self._arrow.array(values, field.type) for values, field in zip(self._columns, self._schema, strict=True)
        ]
        self._writer.write_table(self._arrow.Table.from_arrays(arrays, schema=self._schema))
        self._columns = [[] for _ in self._columns]


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("writing Parquet", "pyarrow", "parquet") from None
    return pyarrow, pyarrow.parquet


def _struct(near: Neighbour) -> dict[str, Any]:
    return {"id": near.id, "similarity": near.similarity, "label": _valid(near.label), "text": near.text}


def _valid(label: Any) -> Any:
    """Return a name, or names, as UTF-8 can hold them: a class may come from a stranger's file."""
    if isinstance(label, str):
        return label.encode("utf-8", "backslashreplace").decode()
    return list(map(_valid, label)) if isinstance(label, Sequence) else label


def refuse_without_pyarrow(form: Format) -> None:
    """Raise ``MissingExtraError`` for a format that needs pyarrow where it is not installed: before the work."""
    if form == "parquet":
        _pyarrow()


def text_table(form: Format, file: IO[str], head: TrainedHead, nearest: int = 0) -> PredictionTable:
    """Return the table of a format of texts on an open stream."""
    return (JSONTable if form == "jsonl" else CSVTable)(file, head, nearest)


@contextmanager
def table_in(path: Path | str, form: Format, head: TrainedHead, nearest: int = 0) -> Iterator[PredictionTable]:
    """Open a table in a file that only takes its place once the block is done. Raises ``InputError``."""
    with replacing(Path(path), InputError) as raw:
        if form == "parquet":
            table = ParquetTable(raw, head, nearest)
            yield table
            table.close()
            return
        file = TextIOWrapper(raw, "utf-8", "backslashreplace", newline="")
        yield text_table(form, file, head, nearest)
        file.flush()
        file.detach()
