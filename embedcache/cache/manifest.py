"""The manifest: which files there are, what they hold, how they were made. Committed last, and the only truth."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from embedcache.errors import (
    CacheError,
    CacheNotFoundError,
    CorruptCacheError,
    NumericsMismatchError,
    SpecMismatchError,
)
from embedcache.fingerprint import differences, hash_json, is_count, require, strict_json
from embedcache.journal import commit, explain, explained
from embedcache.numerics import Probe, difference
from embedcache.shard import FILE_NAME, FeatureSet, ShardFile, refuse_colliding
from embedcache.spec import TASKS, ExtractionSpec, TaskName
from embedcache.task import CLASSIFICATION

NAME = "manifest.json"
FOLDERS = ("features", "examples")
FORMAT = "embedcache"
MAJOR, MINOR = 1, 1
_LARGEST = 256 << 20
_MOST_VALUES = 4_000_000  # 100,000 shards have two

Fields = dict[str, Any]
"""A JSON object of a manifest whose fields are still to be checked."""


@dataclass(frozen=True)
class Shard:
    """A committed feature shard and what ran it."""

    file: ShardFile
    rows: int
    provenance: Mapping[str, object]


@dataclass(frozen=True)
class Numerics:
    """One kind of machine that computed rows of a cache; ``accepted`` when they differ from the first and may.

    ``probe`` is None for rows of which it was not recorded.
    """

    probe: Probe | None
    accepted: bool = False


@dataclass(frozen=True)
class DatasetEntry:
    """The current generation of the dataset: the file that says which feature row, label and split each row has.

    ``targets`` counts the columns of the targets: 0 for one class a row, else classes or regression targets.
    ``whole_rows`` is None, or for a part of a larger dataset, whose row numbers it keeps, how many rows that has, and
    ``whole_hash`` what tells that dataset from others.
    """

    file: ShardFile
    rows: int
    task: TaskName | None
    class_names: tuple[str, ...]
    split_names: tuple[str, ...]
    targets: int
    has_ids: bool
    has_inputs: bool
    whole_rows: int | None
    whole_hash: str | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything the manifest says.

    ``generation`` counts the datasets there have been and numbers the next examples file. ``numerics`` are the kinds
    of machine that computed the rows; there are none in format 1.0. ``newer`` is set when a newer minor version of the
    format wrote it: readable, but not to be written over.
    """

    spec: ExtractionSpec
    feature_sets: tuple[FeatureSet, ...]
    shards: tuple[Shard, ...] = ()
    examples: DatasetEntry | None = None
    complete: bool = False
    generation: int = 0
    numerics: tuple[Numerics, ...] = ()
    newer: str | None = None
    spec_hash: str = field(default="")

    def __post_init__(self) -> None:
        refuse_colliding(self.feature_sets)
        object.__setattr__(self, "spec_hash", hash_json(self.spec))

    @property
    def rows(self) -> int:
        """How many feature rows there are in all shards."""
        return sum(shard.rows for shard in self.shards)

    def to_json(self) -> dict[str, object]:
        """Return the manifest as it stands on disk, with its own hash."""
        body: dict[str, object] = {
            "format": FORMAT,
            "version": f"{MAJOR}.{MINOR if self.numerics else 0}",
            "spec": self.spec,
            "spec_hash": self.spec_hash,
            "feature_sets": [asdict(feature) for feature in self.feature_sets],
            "shards": [
                {**asdict(shard.file), "rows": shard.rows, "provenance": dict(shard.provenance)}
                for shard in self.shards
            ],
            "examples": None,
            "complete": self.complete,
            "generation": self.generation,
        }
        if self.examples is not None:
            facts = {name: value for name, value in vars(self.examples).items() if name != "file"}
            lists = {name: list(facts[name]) for name in ("class_names", "split_names")}
            body["examples"] = {**asdict(self.examples.file), **facts, **lists}
        if self.numerics:
            body["numerics"] = [
                {"probe": None if kind.probe is None else kind.probe.to_json(), "accepted": kind.accepted}
                for kind in self.numerics
            ]
        return {**body, "manifest_hash": hash_json(body)}

    def files(self) -> list[tuple[str, ShardFile]]:
        """Return every committed file with its directory."""
        named = [("features", shard.file) for shard in self.shards]
        return named + ([("examples", self.examples.file)] if self.examples is not None else [])

    def refuse_other_spec(self, where: str, spec: Mapping[str, object], feature_sets: Sequence[FeatureSet]) -> None:
        """Raise ``SpecMismatchError`` unless features made by ``spec`` belong in this cache."""
        here, given = ([asdict(feature) for feature in sets] for sets in (self.feature_sets, feature_sets))
        differing = self.spec.differences(spec) or differences(here, given, "feature_sets")
        if differing:
            raise SpecMismatchError(where, differing)

    @property
    def probe(self) -> Probe | None:
        """What the machine that made the cache computes, None where that was not recorded."""
        return self.numerics[0].probe if self.numerics else None

    @property
    def kinds(self) -> tuple[Numerics, ...]:
        """Every kind of machine that computed rows; one without a probe where that was not recorded."""
        return self.numerics or ((Numerics(None),) if self.shards else ())

    @property
    def common_probe(self) -> Probe | None:
        """The probe of all rows, None where some have other bits, or none."""
        alike = all(difference(self.probe, kind.probe).same_bits for kind in self.kinds)
        return self.probe if alike else None

    def with_kinds(self, where: str, added: Iterable[Numerics], accepted: bool) -> Manifest:
        """Return the manifest for rows that machines of these kinds add.

        Raises ``NumericsMismatchError`` where their bits are those of no rows there, and that is not ``accepted``.
        """
        kinds = list(self.kinds) if self.shards else []
        for kind in added:
            if any(known.probe == kind.probe for known in kinds):
                continue
            from_known = [difference(known.probe, kind.probe) for known in kinds]
            if from_known and not accepted and not any(known.same_bits for known in from_known):
                first = from_known[0]
                raise NumericsMismatchError(where, first.to_text(), known=first.status != "unknown")
            kinds.append(Numerics(kind.probe, bool(from_known) and not from_known[0].same_bits))
        recorded = any(kind.probe is not None for kind in kinds)
        return replace(self, numerics=tuple(kinds) if recorded else ())

    def write(self, directory: Path) -> None:
        """Commit the manifest."""
        commit(directory / NAME, encoded(self.to_json()))

    def with_shard(self, shard: Shard) -> Manifest:
        """Return the manifest with one more shard: the dataset no longer is all there is."""
        return replace(self, shards=(*self.shards, shard), complete=False)


def encoded(body: Mapping[str, object]) -> bytes:
    """Return the one form in which a manifest stands on disk."""
    return (json.dumps(body, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")


def read(directory: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        CacheNotFoundError: there is none.
        CorruptCacheError: it is damaged, hostile, or of a format this version cannot read.
        CacheError: it cannot be read.
    """
    path = directory / NAME
    try:
        for linked in (path, *(directory / folder for folder in FOLDERS)):
            if linked.is_symlink():
                raise CorruptCacheError(f"{linked} is a link: a cache must not depend on what lies elsewhere; copy it")
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise CorruptCacheError(f"{path} is not a plain file: restore it from a copy")
        if status.st_size > _LARGEST:
            raise CorruptCacheError(f"{path} has {status.st_size:,} bytes, which no manifest has: restore it")
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        with explained(f"cannot read {directory}"):
            what = f"it has no {NAME}" if directory.is_dir() else "there is no such directory"
        make = f"make one with embedcache extract INPUT -o {directory}"
        raise CacheNotFoundError(f"{directory} is not a feature cache ({what}): {make}") from None
    except CacheError:
        raise
    except OSError as error:
        raise CacheError(f"cannot read {path}: {explain(error)}") from error
    try:
        return parse(data)
    except CorruptCacheError as error:
        raise CorruptCacheError(f"{path}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CorruptCacheError(f"{path} is damaged ({reason}): restore it from a copy, or extract again") from None


def parse(data: bytes) -> Manifest:
    """Turn a manifest's bytes into a value, trusting nothing in them.

    Raises ``CorruptCacheError`` where it can say what happened, else ``ValueError`` or one of its kin.
    """
    body = strict_json(data.decode("ascii"), most=_MOST_VALUES)
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CorruptCacheError("not an embedcache manifest: choose the directory of a cache")
    written = body.get("version")
    version = re.fullmatch(r"([0-9]{1,4})\.([0-9]{1,4})", written) if isinstance(written, str) else None
    if version is None or int(version[1]) != MAJOR:
        raise CorruptCacheError(
            f"this cache has format {written}, and this version of embedcache reads {MAJOR}.x: upgrade embedcache"
        )
    claimed = body.get("manifest_hash")
    own = hash_json({key: value for key, value in body.items() if key != "manifest_hash"})
    # Comparing the bytes too leaves no room for a change that JSON does not see, such as the case of an escape.
    if claimed != own or encoded(body) != data:
        raise CorruptCacheError("it was changed after it was written (its own hash differs): restore it from a copy")
    sets = tuple(map(_feature_set, _list(body["feature_sets"])))
    shards = tuple(map(_shard, _list(body["shards"])))
    require(len({shard.file.name for shard in shards}) == len(shards), "a shard named twice")
    require(is_count(body["generation"], 0), "generation")
    manifest = Manifest(
        spec=ExtractionSpec(_mapping(body["spec"])),
        feature_sets=sets,
        shards=shards,
        examples=None if body["examples"] is None else _dataset(_mapping(body["examples"])),
        complete=_flag(body, "complete"),
        generation=body["generation"],
        numerics=tuple(_numerics(_mapping(kind), sets) for kind in _list(body["numerics"]))
        if "numerics" in body
        else (),
        newer=written if int(version[2]) > MINOR else None,
    )
    require(manifest.spec_hash == body["spec_hash"], "spec_hash")
    return manifest


def _feature_set(body: object) -> FeatureSet:
    fields = _mapping(body)
    return FeatureSet(**{name: fields[name] for name in ("name", "kind", "dim", "layers", "dtype")})


def _shard(body: object) -> Shard:
    fields = _mapping(body)
    shard = Shard(_file(fields), fields["rows"], _mapping(fields["provenance"]))
    # A row takes at least its key, so that no claim makes a reader reserve more memory than there are bytes on disk.
    require(is_count(shard.rows, 1) and shard.rows * 16 <= shard.file.bytes, "the rows of a shard")
    return shard


def _numerics(fields: Fields, sets: Sequence[FeatureSet]) -> Numerics:
    accepted = _flag(fields, "accepted")
    if fields["probe"] is None:
        return Numerics(None, accepted)
    probe = Probe.from_json(fields["probe"])
    stored = {feature.name: feature.dtype for feature in sets}
    recorded = {name: outcome.dtype for name, outcome in probe.outcomes.items()}
    require(recorded == stored, "the feature sets of a probe")
    return Numerics(probe, accepted)


def _dataset(fields: Fields) -> DatasetEntry:
    names = ("rows", "task", "targets", "whole_rows", "whole_hash")
    entry = DatasetEntry(
        file=_file(fields),
        class_names=_names(fields["class_names"]),
        split_names=_names(fields["split_names"]),
        has_ids=_flag(fields, "has_ids"),
        has_inputs=_flag(fields, "has_inputs"),
        **{name: fields[name] for name in names},
    )
    require(is_count(entry.rows, 0) and entry.rows * 9 <= entry.file.bytes, "the rows of the dataset")
    require(entry.task is None or entry.task in TASKS, f"task {entry.task!r}")
    columns = len(entry.class_names) if entry.task not in (None, CLASSIFICATION.name) else 0
    require(is_count(entry.targets, 0) and entry.targets == columns, "targets")
    require(entry.whole_rows is None or is_count(entry.whole_rows, entry.rows), "whole_rows")
    hashed = isinstance(entry.whole_hash, str) and re.fullmatch(r"[0-9a-f]{64}", entry.whole_hash)
    require(entry.whole_hash is None or (entry.whole_rows is not None and hashed), "whole_hash")
    return entry


def _file(fields: Fields) -> ShardFile:
    file = ShardFile(fields["name"], fields["bytes"], fields["sha256"])
    require(isinstance(file.name, str) and FILE_NAME.fullmatch(file.name), f"file name {file.name!r}")
    require(isinstance(file.sha256, str) and re.fullmatch(r"[0-9a-f]{64}", file.sha256), f"sha256 of {file.name}")
    agree = file.name.endswith(f"-{file.sha256[:16]}.h5") and is_count(file.bytes, 1)
    require(agree, f"the entry of {file.name}")
    return file


def _flag(fields: Fields, name: str) -> bool:
    require(isinstance(fields[name], bool), name)
    return bool(fields[name])


def _list(value: object) -> list[object]:
    require(isinstance(value, list), "a field that is not a list")
    return cast("list[object]", value)


def _mapping(value: object) -> Fields:
    require(isinstance(value, dict), "a field that is not a mapping")
    return cast("Fields", value)


def _names(value: object) -> tuple[str, ...]:
    names = _list(value)
    strings = [name for name in names if isinstance(name, str)]
    require(len(set(strings)) == len(names), "a list of names")
    "".join(strings).encode("utf-8")  # a lone surrogate cannot be printed
    return tuple(strings)
