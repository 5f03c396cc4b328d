"""A cache -> files that other tools read: features, ids, labels, splits, in the order of the dataset; streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from embedcache.arguments import checks_arguments
from embedcache.cache import FeatureCache
from embedcache.errors import FeatureError, InputError, MissingExtraError, SpecError
from embedcache.features import Rows
from embedcache.journal import commit, explained, replacing
from embedcache.shard import STORED, Array, FeatureSet
from embedcache.task import CLASSIFICATION, REGRESSION, task_named
from embedcache.wording import counted, shown

Target = Literal["parquet", "npy"]
TARGETS: tuple[Target, ...] = ("parquet", "npy")
BLOCK_BYTES = 32 << 20
SPEC, TABLE = "spec.json", "rows.jsonl"


@dataclass(frozen=True)
class Exported:
    """What was written: ``files`` of ``rows`` rows, with these feature sets."""

    rows: int
    sets: tuple[str, ...]
    files: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """Return it as JSON values."""
        return {"rows": self.rows, "feature_sets": list(self.sets), "files": list(self.files)}

    def to_text(self) -> str:
        """Say it in one line."""
        return shown(f"{counted(self.rows, 'row')} of {', '.join(self.sets)} in {', '.join(self.files)}")


@checks_arguments()
def export_features(
    cache: FeatureCache | Path | str, output: Path | str, *, to: Target, features: Sequence[str] = ()
) -> Exported:
    """Write the rows of a cache for other tools.

    ``parquet`` is one file with the columns ``id``, ``split``, ``label`` (a class, a list of classes, or one column for
    each regression target) and a list of numbers for each feature set; ``npy`` a folder with ``NAME.npy`` for each set
    and the rest in ``rows.jsonl``. ``features`` names sets, none all but those of views and tokens. Texts that the
    cache keeps come along as ``text``. float16 stays float16, bfloat16 becomes float32.

    Raises ``FeatureError`` for a set that the target cannot hold.

    Example::

        export_features("reviews.cache", "reviews.parquet", to="parquet")
    """
    if to not in TARGETS:
        raise SpecError(f"to is {to!r}: expected one of {', '.join(TARGETS)}")
    opened = cache if isinstance(cache, FeatureCache) else FeatureCache.open(cache)
    sets = [opened.feature(name) for name in features] or [
        feature for feature in opened.plain_sets.values() if feature.kind in _HELD[to]
    ]
    for feature in sets:
        if feature.kind not in _HELD[to]:
            other = "use --to npy" if feature.kind == "layers" else "name others with --feature"
            raise FeatureError(f"{feature.name} is a {feature.kind} set, which --to {to} does not hold: {other}")
    if not sets:
        raise FeatureError(f"{opened.path} has no set that --to {to} holds: it has {', '.join(opened.plain_sets)}")
    return (_to_parquet if to == "parquet" else _to_npy)(opened, Path(output), sets)


_HELD: dict[str, tuple[str, ...]] = {"parquet": ("pooled",), "npy": ("pooled", "layers")}


def _blocks(cache: FeatureCache, sets: Sequence[FeatureSet]) -> Iterator[Rows]:
    row_bytes = sum(int(np.prod(feature.row_shape)) * 4 for feature in sets)
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, len(cache), step):
        yield np.arange(start, min(start + step, len(cache)))


def _type(feature: FeatureSet) -> np.dtype[Any]:
    return STORED["float32" if feature.dtype == "bfloat16" else feature.dtype]


def _values(cache: FeatureCache, places: Rows, feature: FeatureSet) -> Array:
    return np.ascontiguousarray(cache.take(places, feature.name), _type(feature))


class _Columns:
    """What a cache knows of its rows but their features, column by column, as Python values."""

    def __init__(self, cache: FeatureCache) -> None:
        self._cache, self._ids = cache, cache.ids()
        self._targets = None if cache.task is None else cache.targets()
        texts = cache.inputs() if cache.spec.content in (None, "text") else None
        self._texts = texts
        names = ["id", "split", *self._label_names(), *(["text"] if texts is not None else [])]
        if len(set(names)) < len(names):
            raise InputError(f"two columns would have one name ({', '.join(names)}): rename the target by relabel")

    def _label_names(self) -> list[str]:
        if self._targets is None:
            return []
        several = self._cache.task == REGRESSION.name and len(self._cache.class_names) > 1
        return list(self._cache.class_names) if several else ["label"]

    def of(self, rows: Rows) -> dict[str, list[Any]]:
        """Return the columns of some rows that follow one another."""
        cache, first, last = self._cache, int(rows[0]), int(rows[-1]) + 1
        names = cache.split_names
        columns: dict[str, list[Any]] = {
            "id": self._ids[first:last], "split": [names[code] for code in cache.split_codes()[rows].tolist()]
        }  # fmt: skip
        if self._targets is not None:
            columns |= self._labels(self._targets[rows])
        if self._texts is not None:
            columns["text"] = [content.decode("utf-8") for content in self._texts.select(rows)]
        return columns

    def _labels(self, targets: Array) -> dict[str, list[Any]]:
        task, names = task_named(self._cache.task or CLASSIFICATION), self._cache.class_names
        known = task.labelled(targets)
        if task is REGRESSION:
            return {
                name: [float(value) if there else None for value, there in zip(column, known, strict=True)]
                for name, column in zip(self._label_names(), targets.T, strict=True)
            }
        named = [task.named(target, names) if there else None for target, there in zip(targets, known, strict=True)]
        return {"label": [list(name) if isinstance(name, tuple) else name for name in named]}


def _to_npy(cache: FeatureCache, folder: Path, sets: Sequence[FeatureSet]) -> Exported:
    with explained(f"cannot write {folder}", InputError):
        if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / SPEC).is_file())):
            raise InputError(f"{folder} is there, and is not a folder that export wrote: choose another")
        folder.mkdir(parents=True, exist_ok=True)
    commit(folder / SPEC, (json.dumps(cache.spec, indent=1, sort_keys=True) + "\n").encode(), InputError)
    files = []
    for feature in sets:
        path = folder / f"{feature.name}.npy"
        with replacing(path, InputError) as file:
            header = {"descr": _type(feature).str, "fortran_order": False, "shape": (len(cache), *feature.row_shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for rows in _blocks(cache, [feature]):
                file.write(_values(cache, cache.places()[rows], feature).data)
        files.append(str(path))
    columns = _Columns(cache)
    with replacing(folder / TABLE, InputError) as file:
        for rows in _blocks(cache, sets):
            of_rows = columns.of(rows)
            for values in zip(*of_rows.values(), strict=True):
                file.write((json.dumps(dict(zip(of_rows, values, strict=True))) + "\n").encode())
    return Exported(len(cache), tuple(feature.name for feature in sets), (*files, str(folder / TABLE)))


def _to_parquet(cache: FeatureCache, path: Path, sets: Sequence[FeatureSet]) -> Exported:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtraError("writing Parquet", "pyarrow", "parquet") from None
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file, such as {path / 'features.parquet'}")
    columns, places = _Columns(cache), cache.places()
    fields = [("id", arrow.string()), ("split", arrow.string())]
    if cache.task is not None:
        kind = {"classification": arrow.string(), "regression": arrow.float64()}.get(
            cache.task, arrow.list_(arrow.string())
        )
        fields += [(name, kind) for name in columns.of(np.arange(1)) if name not in ("id", "split", "text")]
    if "text" in columns.of(np.arange(1)):
        fields.append(("text", arrow.string()))
    lists = [(feature.name, arrow.list_(arrow.from_numpy_dtype(_type(feature)), feature.dim)) for feature in sets]
    if twice := {name for name, _ in fields} & {name for name, _ in lists}:
        raise InputError(f"two columns would be called {twice.pop()!r}: choose other sets with --feature, or --to npy")
    schema = arrow.schema([*fields, *lists], metadata={"embedcache.spec": json.dumps(cache.spec, sort_keys=True)})
    with replacing(path, InputError) as file, parquet.ParquetWriter(file, schema) as writer:
        for rows in _blocks(cache, sets):
            arrays = [arrow.array(cells, schema.field(name).type) for name, cells in columns.of(rows).items()]
            for feature in sets:
                values = arrow.array(_values(cache, places[rows], feature).reshape(-1))
                arrays.append(arrow.FixedSizeListArray.from_arrays(values, feature.dim))
            writer.write_table(arrow.Table.from_arrays(arrays, schema=schema))
    return Exported(len(cache), tuple(feature.name for feature in sets), (str(path),))
