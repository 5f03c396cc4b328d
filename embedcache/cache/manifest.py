"""The manifest: which files there are, what they hold, how they were made. Committed last, and the only truth."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

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
from embedcache.spec import TASKS, TaskName

NAME = "manifest.json"
FOLDERS = ("features", "examples")
FORMAT = "embedcache"
MAJOR, MINOR = 1, 1
_LARGEST = 256 << 20
_MOST_VALUES = 4_000_000  # 100,000 shards have two


@dataclass(frozen=True)
class Shard:
    """A committed feature shard and what ran it."""

    file: ShardFile
    rows: int
    provenance: Mapping[str, Any]


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

    spec: Mapping[str, Any]
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

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as it stands on disk, with its own hash."""
        body: dict[str, Any] = {
            "format": FORMAT,
            "version": f"{MAJOR}.{MINOR if self.numerics else 0}",
            "spec": dict(self.spec),
            "spec_hash": self.spec_hash,
            "feature_sets": [asdict(each) for each in self.feature_sets],
            "shards": [
                {**asdict(each.file), "rows": each.rows, "provenance": dict(each.provenance)} for each in self.shards
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
                {"probe": None if each.probe is None else each.probe.to_json(), "accepted": each.accepted}
                for each in self.numerics
            ]
        return {**body, "manifest_hash": hash_json(body)}

    def files(self) -> list[tuple[str, ShardFile]]:
        """Return every committed file with its directory."""
        named = [("features", shard.file) for shard in self.shards]
        return named + ([("examples", self.examples.file)] if self.examples is not None else [])

    def refuse_other_spec(self, where: str, spec: Mapping[str, Any], feature_sets: Sequence[FeatureSet]) -> None:
        """Raise ``SpecMismatchError`` unless features made by ``spec`` belong in this cache."""
        mine, theirs = ([asdict(each) for each in sets] for sets in (self.feature_sets, feature_sets))
        found = differences(self.spec, spec) or differences(mine, theirs, "feature_sets")
        if found:
            raise SpecMismatchError(where, found)

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
        alike = all(difference(self.probe, each.probe).same_bits for each in self.kinds)
        return self.probe if alike else None

    def with_kinds(self, where: str, kinds: Iterable[Numerics], accepted: bool) -> Manifest:
        """Return the manifest for rows that machines of these kinds add.

        Raises ``NumericsMismatchError`` where their bits are those of no rows there, and that is not ``accepted``.
        """
        made = list(self.kinds) if self.shards else []
        for each in kinds:
            if any(known.probe == each.probe for known in made):
                continue
            found = [difference(known.probe, each.probe) for known in made]
            if found and not accepted and not any(one.same_bits for one in found):
                raise NumericsMismatchError(where, found[0].to_text(), known=found[0].status != "unknown")
            made.append(Numerics(each.probe, bool(found) and not found[0].same_bits))
        return replace(self, numerics=tuple(made) if any(each.probe is not None for each in made) else ())

    def write(self, directory: Path) -> None:
        """Commit the manifest."""
        commit(directory / NAME, encoded(self.to_json()))

    def with_shard(self, shard: Shard) -> Manifest:
        """Return the manifest with one more shard: the dataset no longer is all there is."""
        return replace(self, shards=(*self.shards, shard), complete=False)


def encoded(body: Mapping[str, Any]) -> bytes:
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
            raise CorruptCacheError(f"{path} is no plain file: restore it from a copy")
        if status.st_size > _LARGEST:
            raise CorruptCacheError(f"{path} has {status.st_size:,} bytes, which no manifest has: restore it")
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        with explained(f"cannot read {directory}"):
            what = f"it has no {NAME}" if directory.is_dir() else "there is no such directory"
        make = f"make one with embedcache extract INPUT -o {directory}"
        raise CacheNotFoundError(f"{directory} is no feature cache ({what}): {make}") from None
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
    said = body.get("version")
    version = re.fullmatch(r"([0-9]{1,4})\.([0-9]{1,4})", said) if isinstance(said, str) else None
    if version is None or int(version[1]) != MAJOR:
        raise CorruptCacheError(
            f"this cache has format {said}, and this version of embedcache reads {MAJOR}.x: upgrade embedcache"
        )
    claimed = body.get("manifest_hash")
    own = hash_json({key: value for key, value in body.items() if key != "manifest_hash"})
    # Comparing the bytes too leaves no room for a change that JSON does not see, such as the case of an escape.
    if claimed != own or encoded(body) != data:
        raise CorruptCacheError("it was changed after it was written (its own hash differs): restore it from a copy")
    sets = tuple(FeatureSet(**_only(each, "name", "kind", "dim", "layers", "dtype")) for each in body["feature_sets"])
    shards = tuple(Shard(_file(each), each["rows"], _mapping(each["provenance"])) for each in body["shards"])
    # A row takes at least its key, so that no claim makes a reader reserve more memory than there are bytes on disk.
    require(all(is_count(each.rows, 1) and each.rows * 16 <= each.file.bytes for each in shards), "the rows of a shard")
    require(len({each.file.name for each in shards}) == len(shards), "a shard named twice")
    require(isinstance(body["complete"], bool) and is_count(body["generation"], 0), "complete or generation")
    manifest = Manifest(
        spec=_mapping(body["spec"]),
        feature_sets=sets,
        shards=shards,
        examples=_dataset(body["examples"]),
        complete=body["complete"],
        generation=body["generation"],
        numerics=tuple(_numerics(each, sets) for each in _list(body["numerics"])) if "numerics" in body else (),
        newer=said if int(version[2]) > MINOR else None,
    )
    require(manifest.spec_hash == body["spec_hash"], "spec_hash")
    return manifest


def _numerics(body: Any, sets: Sequence[FeatureSet]) -> Numerics:
    require(isinstance(body["accepted"], bool), "accepted")
    if body["probe"] is None:
        return Numerics(None, body["accepted"])
    probe = Probe.from_json(body["probe"])
    stored = {each.name: each.dtype for each in sets}
    require({name: each.dtype for name, each in probe.outcomes.items()} == stored, "the feature sets of a probe")
    return Numerics(probe, body["accepted"])


def _list(body: Any) -> list[Any]:
    require(isinstance(body, list), "a field that is no list")
    return list(body)


def _dataset(body: Any) -> DatasetEntry | None:
    if body is None:
        return None
    names = ("rows", "task", "targets", "has_ids", "has_inputs", "whole_rows", "whole_hash")
    found = DatasetEntry(
        file=_file(body),
        class_names=_names(body["class_names"]),
        split_names=_names(body["split_names"]),
        **{name: body[name] for name in names},
    )
    require(is_count(found.rows, 0) and found.rows * 9 <= found.file.bytes, "the rows of the dataset")
    columns = len(found.class_names) if found.task in ("multilabel", "regression") else 0
    require(is_count(found.targets, 0) and found.targets == columns, "targets")
    require(found.whole_rows is None or is_count(found.whole_rows, found.rows), "whole_rows")
    hashed = isinstance(found.whole_hash, str) and re.fullmatch(r"[0-9a-f]{64}", found.whole_hash)
    require(found.whole_hash is None or (found.whole_rows is not None and hashed), "whole_hash")
    require(found.task is None or found.task in TASKS, f"task {found.task!r}")
    require(isinstance(found.has_ids, bool) and isinstance(found.has_inputs, bool), "has_ids or has_inputs")
    return found


def _file(body: Any) -> ShardFile:
    file = ShardFile(body["name"], body["bytes"], body["sha256"])
    require(isinstance(file.name, str) and FILE_NAME.fullmatch(file.name), f"file name {file.name!r}")
    require(isinstance(file.sha256, str) and re.fullmatch(r"[0-9a-f]{64}", file.sha256), f"sha256 of {file.name}")
    agree = file.name.endswith(f"-{file.sha256[:16]}.h5") and is_count(file.bytes, 1)
    require(agree, f"the entry of {file.name}")
    return file


def _only(body: Any, *names: str) -> dict[str, Any]:
    require(isinstance(body, dict), "a feature set that is no mapping")
    return {name: body[name] for name in names}


def _mapping(body: Any) -> dict[str, Any]:
    require(isinstance(body, dict), "a field that is no mapping")
    return dict(body)


def _names(body: Any) -> tuple[str, ...]:
    strings = isinstance(body, list) and all(isinstance(name, str) for name in body)
    require(strings and len(set(body)) == len(body), "a list of names")
    "".join(body).encode("utf-8")  # a lone surrogate cannot be printed
    return tuple(body)
