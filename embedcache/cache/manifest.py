"""The manifest: which files there are, what they hold, how they were made. Committed last, and the only truth."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from embedcache.errors import CacheNotFoundError, CorruptCacheError, SpecMismatchError
from embedcache.fingerprint import differences, hash_json, strict_json
from embedcache.shard import FILE_NAME, STORED, FeatureSet, ShardFile, commit
from embedcache.spec import TASKS

NAME = "manifest.json"
FORMAT = "embedcache"
MAJOR, MINOR = 1, 0
_LARGEST = 64 << 20


@dataclass(frozen=True)
class Shard:
    """A committed feature shard and what ran it."""

    file: ShardFile
    rows: int
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class Dataset:
    """The current generation of the dataset: the file that says which feature row, label and split each row has."""

    file: ShardFile
    rows: int
    task: str | None
    class_names: tuple[str, ...]
    split_names: tuple[str, ...]
    targets: int
    """Columns of the targets: 0 for one class a row, else classes or regression targets."""
    has_ids: bool
    has_inputs: bool
    part: bool
    """Whether this is a part of a larger dataset, whose row numbers it keeps."""


@dataclass(frozen=True)
class Manifest:
    """Everything the manifest says."""

    spec: Mapping[str, Any]
    feature_sets: tuple[FeatureSet, ...]
    shards: tuple[Shard, ...] = ()
    examples: Dataset | None = None
    complete: bool = False
    generation: int = 0
    """How many dataset generations there have been; numbers the next examples file."""
    spec_hash: str = field(default="")

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec_hash", hash_json(self.spec))

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as it stands on disk, with its own hash."""
        body: dict[str, Any] = {
            "format": FORMAT,
            "version": f"{MAJOR}.{MINOR}",
            "spec": dict(self.spec),
            "spec_hash": self.spec_hash,
            "feature_sets": [asdict(each) for each in self.feature_sets],
            "shards": [{**asdict(each.file), "rows": each.rows, "provenance": dict(each.provenance)} for each in self.shards],
            "examples": None,
            "complete": self.complete,
            "generation": self.generation,
        }
        if self.examples is not None:
            body["examples"] = {
                **asdict(self.examples.file),
                **{name: value for name, value in vars(self.examples).items() if name != "file"},
            }
            body["examples"]["class_names"] = list(self.examples.class_names)
            body["examples"]["split_names"] = list(self.examples.split_names)
        return {**body, "manifest_hash": hash_json(body)}

    def files(self) -> list[tuple[str, ShardFile]]:
        """Return every committed file with its directory."""
        named = [("features", shard.file) for shard in self.shards]
        return named + ([("examples", self.examples.file)] if self.examples is not None else [])

    def refuse_other_spec(self, where: str, spec: Mapping[str, Any], feature_sets: Sequence[FeatureSet]) -> None:
        """Raise ``SpecMismatchError`` unless features made by ``spec`` belong in this cache."""
        found = differences(self.spec, spec)
        found += differences([asdict(each) for each in self.feature_sets], [asdict(each) for each in feature_sets], "feature_sets") if not found else []
        if found:
            raise SpecMismatchError(where, found)

    def write(self, directory: Path) -> None:
        """Commit the manifest."""
        commit(directory / NAME, (json.dumps(self.to_json(), indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode("ascii"))

    def with_shard(self, shard: Shard) -> Manifest:
        """Return the manifest with one more shard: the dataset no longer is all there is."""
        return replace(self, shards=(*self.shards, shard), complete=False)


def read(directory: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        CacheNotFoundError: there is none.
        CorruptCacheError: it is damaged, hostile, or of a format this version cannot read.
    """
    path = directory / NAME
    try:
        if path.stat().st_size > _LARGEST:
            raise CorruptCacheError(f"{path} has {path.stat().st_size:,} bytes, which no manifest has: restore it from a copy")
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        what = "it is empty of a manifest" if directory.is_dir() else "there is no such directory"
        raise CacheNotFoundError(f"{directory} is no feature cache ({what}): make one with embedcache extract INPUT -o {directory}") from None
    try:
        return parse(strict_json(data))
    except CorruptCacheError as error:
        raise CorruptCacheError(f"{path}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CorruptCacheError(f"{path} is damaged ({reason}): restore it from a copy, or extract again") from None


def parse(body: Any) -> Manifest:
    """Turn a manifest's JSON into a value, trusting nothing in it."""
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CorruptCacheError("not an embedcache manifest")
    version = re.fullmatch(r"(\d{1,4})\.(\d{1,4})", str(body.get("version")))
    if version is None or int(version[1]) != MAJOR:
        raise CorruptCacheError(
            f"this cache has format {body.get('version')}, and this version of embedcache reads {MAJOR}.x: upgrade embedcache"
        )
    claimed = body.get("manifest_hash")
    if claimed != hash_json({key: value for key, value in body.items() if key != "manifest_hash"}):
        raise CorruptCacheError("it was changed after it was written (its own hash differs): restore it from a copy")
    sets = tuple(FeatureSet(**_only(each, "name", "kind", "dim", "layers", "dtype")) for each in body["feature_sets"])
    for each in sets:
        _require(isinstance(each.name, str) and re.fullmatch(r"[A-Za-z0-9@:+._-]{1,100}", each.name), f"feature set name {each.name!r}")
        _require(each.kind in ("pooled", "layers", "tokens") and each.dtype in STORED, f"feature set {each.name}")
        _require(_count(each.dim, 1) and _count(each.layers, 1), f"the shape of feature set {each.name}")
    _require(len({each.name for each in sets}) == len(sets) > 0, "feature sets")
    shards = tuple(Shard(_file(each), each["rows"], _mapping(each["provenance"])) for each in body["shards"])
    _require(all(_count(each.rows, 1) for each in shards), "the rows of a shard")
    _require(len({each.file.name for each in shards}) == len(shards), "shard names")
    _require(isinstance(body["complete"], bool) and _count(body["generation"], 0), "complete or generation")
    manifest = Manifest(_mapping(body["spec"]), sets, shards, _dataset(body["examples"]), body["complete"], body["generation"])
    _require(manifest.spec_hash == body["spec_hash"], "spec_hash")
    return manifest


def _dataset(body: Any) -> Dataset | None:
    if body is None:
        return None
    found = Dataset(
        _file(body), body["rows"], body["task"], _names(body["class_names"]), _names(body["split_names"]), body["targets"],
        body["has_ids"], body["has_inputs"], body["part"],
    )  # fmt: skip
    _require(_count(found.rows, 0) and _count(found.targets, 0), "the sizes of the dataset")
    _require(found.task is None or found.task in TASKS, f"task {found.task!r}")
    _require(all(isinstance(flag, bool) for flag in (found.has_ids, found.has_inputs, found.part)), "the dataset's flags")
    return found


def _file(body: Any) -> ShardFile:
    file = ShardFile(body["name"], body["bytes"], body["sha256"])
    _require(isinstance(file.name, str) and FILE_NAME.fullmatch(file.name), f"file name {file.name!r}")
    _require(isinstance(file.sha256, str) and re.fullmatch(r"[0-9a-f]{64}", file.sha256), f"sha256 of {file.name}")
    _require(file.name[7:23] == file.sha256[:16] and _count(file.bytes, 1), f"the entry of {file.name}")
    return file


def _only(body: Any, *names: str) -> dict[str, Any]:
    _require(isinstance(body, dict) and set(body) == set(names), f"an entry with {sorted(body) if isinstance(body, dict) else body!r}")
    return dict(body)


def _mapping(body: Any) -> dict[str, Any]:
    _require(isinstance(body, dict), "a field that is no mapping")
    return dict(body)


def _names(body: Any) -> tuple[str, ...]:
    _require(isinstance(body, list) and all(isinstance(name, str) for name in body) and len(set(body)) == len(body), "a list of names")
    return tuple(body)


def _count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**53


def _require(holds: object, what: str) -> None:
    if not holds:
        raise ValueError(f"{what} is not what this format allows")
