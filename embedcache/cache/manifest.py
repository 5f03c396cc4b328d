"""The manifest: which files there are, what they hold, how they were made. Committed last, and the only truth."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from embedcache.cache.text import HASH, Text, entry_text, found, hash_of, parts, reads_as
from embedcache.decoding import FLAT, fields_to_json, from_json
from embedcache.errors import (
    CacheError,
    CacheNotFoundError,
    CorruptCacheError,
    NumericsMismatchError,
    SpecMismatchError,
)
from embedcache.fingerprint import KEY_BYTES, differences, hash_json, is_count, refuse_bombs, require, strict_json
from embedcache.journal import commit, explain, explained, url_of
from embedcache.memory import uncollected
from embedcache.numerics import Probe, difference
from embedcache.shard import FeatureSet, refuse_colliding
from embedcache.spec import ExtractionSpec, TaskName
from embedcache.task import CLASSIFICATION

NAME = "manifest.json"
FOLDERS = ("features", "examples")
FORMAT = "embedcache"
SET_ASIDE = "set_aside"
"""What a shard's provenance calls the keys, in hexadecimal, of rows that were left out of it or beside it."""
MAJOR, MINOR = 1, 1
LARGEST = 256 << 20
_MOST_VALUES = 4_000_000  # 100,000 shards have two

FILE_NAME = re.compile(r"[0-9]{6,9}-[0-9a-f]{16}\.h5")
_HASH = re.compile(r"[0-9a-f]{64}")
_KEY = re.compile(f"[0-9a-f]{{{2 * KEY_BYTES}}}")

# Each of these checks itself and trusts nothing, for it may have been read: types aside, which ``decoding`` looks at.


@dataclass(frozen=True)
class ShardFile:
    """A committed file: its name in its directory, its size and its hash. Raises ``ValueError`` for what none has."""

    name: str
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        named = FILE_NAME.fullmatch(self.name) and self.name[-19:-3] == self.sha256[:16]
        if not (named and _HASH.fullmatch(self.sha256) and is_count(self.bytes, 1)):
            require(FILE_NAME.fullmatch(self.name), f"file name {self.name!r}")
            require(_HASH.fullmatch(self.sha256), f"sha256 of {self.name}")
            require(False, f"the entry of {self.name}")


def file_of(number: int, data: bytes) -> ShardFile:
    """Return what a file of these bytes is called: ``NUMBER-<first 16 digits of its sha256>.h5``."""
    hashed = Hashed(number)
    hashed.add(data)
    return hashed.file()


class Hashed:
    """What a file is called whose bytes come piece by piece."""

    def __init__(self, number: int) -> None:
        self._number, self._digest, self._size = number, sha256(), 0

    def add(self, piece: bytes) -> bytes:
        """Take the next bytes into account, and return them."""
        self._digest.update(piece)
        self._size += len(piece)
        return piece

    def file(self) -> ShardFile:
        """Return the file that has the bytes until now."""
        digest = self._digest.hexdigest()
        return ShardFile(f"{self._number:06d}-{digest[:16]}.h5", self._size, digest)


@dataclass(frozen=True)
class Shard:
    """A committed feature shard and what ran it."""

    file: ShardFile = field(metadata=FLAT)
    rows: int
    provenance: Mapping[str, object]

    def __post_init__(self) -> None:
        # A row takes at least its key, so that no claim makes a reader reserve more memory than there are bytes on
        # disk.
        require(is_count(self.rows, 1) and self.rows * 16 <= self.file.bytes, "the rows of a shard")

    @property
    def set_aside(self) -> list[str]:
        """The keys, in hexadecimal, of rows that were left out: one for each row, duplicates among them."""
        told = self.provenance.get(SET_ASIDE)
        return [key for key in told if isinstance(key, str) and _KEY.fullmatch(key)] if isinstance(told, list) else []

    @cached_property
    def text(self) -> Text:
        """The entry's text; a writer needs it again with each shard that it adds."""
        file = {"name": self.file.name, "bytes": self.file.bytes, "sha256": self.file.sha256}
        return entry_text({**file, "rows": self.rows, "provenance": self.provenance})


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

    file: ShardFile = field(metadata=FLAT)
    rows: int
    task: TaskName | None
    class_names: tuple[str, ...]
    split_names: tuple[str, ...]
    targets: int
    has_ids: bool
    has_inputs: bool
    whole_rows: int | None
    whole_hash: str | None

    def __post_init__(self) -> None:
        require(is_count(self.rows, 0) and self.rows * 9 <= self.file.bytes, "the rows of the dataset")
        columns = len(self.class_names) if self.task not in (None, CLASSIFICATION.name) else 0
        require(self.targets == columns, "targets")
        require(self.whole_rows is None or is_count(self.whole_rows, self.rows), "whole_rows")
        hashed = self.whole_rows is not None and _HASH.fullmatch(self.whole_hash or "")
        require(self.whole_hash is None or hashed, "whole_hash")
        for names in (self.class_names, self.split_names):
            require(len(set(names)) == len(names), "a list of names")
            "".join(names).encode("utf-8")  # a lone surrogate cannot be printed


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
        require(is_count(self.generation), "generation")
        require(len({shard.file.name for shard in self.shards}) == len(self.shards), "a shard named twice")
        stored = {feature.name: feature.dtype for feature in self.feature_sets}
        for probe in (kind.probe for kind in self.numerics if kind.probe is not None):
            recorded = {name: outcome.dtype for name, outcome in probe.outcomes.items()}
            require(recorded == stored, "the feature sets of a probe")
        object.__setattr__(self, "spec_hash", hash_json(self.spec))

    @property
    def rows(self) -> int:
        """How many feature rows there are in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def set_aside(self) -> list[str]:
        """The keys, in hexadecimal, of rows that were left out of all shards."""
        return [key for shard in self.shards for key in shard.set_aside]

    def to_json(self) -> dict[str, object]:
        """Return the manifest as it stands on disk, with its own hash."""
        body = {**self._without_shards(), "shards": [fields_to_json(shard) for shard in self.shards]}
        return {**body, HASH: hash_json(body)}

    def _without_shards(self) -> dict[str, object]:
        version = f"{MAJOR}.{MINOR if self.numerics else 0}"
        body = {"format": FORMAT, "version": version, **fields_to_json(replace(self, shards=()))}
        del body["newer"]
        if not self.numerics:
            del body["numerics"]
        return body

    def data(self) -> bytes:
        """Return the bytes that stand on disk: what ``encoded`` makes of ``to_json``, from the shards' own texts."""
        body, entries = {**self._without_shards(), "shards": self.shards}, [shard.text for shard in self.shards]
        body[HASH] = hash_of(parts(body, entries))
        return "".join(part.shown for part in parts(body, entries)).encode("ascii")

    def files(self) -> list[tuple[str, ShardFile]]:
        """Return every committed file with its directory."""
        named = [("features", shard.file) for shard in self.shards]
        return named + ([("examples", self.examples.file)] if self.examples is not None else [])

    def refuse_other_spec(self, where: str, spec: Mapping[str, object], feature_sets: Sequence[FeatureSet]) -> None:
        """Raise ``SpecMismatchError`` unless features made by ``spec`` belong in this cache."""
        here, given = ([asdict(feature) for feature in sets] for sets in (self.feature_sets, feature_sets))
        differing = self.spec.differences(spec) or differences(here, given, "feature_sets")
        # Where one comes from elsewhere and the other from a model, nothing else is worth telling.
        differing = [each for each in differing if each[0] == "source"] or differing
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
        commit(directory / NAME, self.data())

    def with_shard(self, shard: Shard) -> Manifest:
        """Return the manifest with one more shard: the dataset no longer is all there is."""
        return replace(self, shards=(*self.shards, shard), complete=False)

    def with_set_aside(self, keys: Sequence[str]) -> Manifest:
        """Return the manifest with keys of rows that were left out behind its last shard, which tells of them."""
        if not keys or not self.shards:
            return self
        last = self.shards[-1]
        provenance = {**last.provenance, SET_ASIDE: [*last.set_aside, *keys]}
        return replace(self, shards=(*self.shards[:-1], replace(last, provenance=provenance)))


def encoded(body: Mapping[str, object]) -> bytes:
    """Return the one form in which a manifest stands on disk."""
    return "".join(part.shown for part in parts(body)).encode("ascii")


def read(directory: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        CacheNotFoundError: there is none.
        CorruptCacheError: it is damaged, hostile, or of a format this version cannot read.
        CacheError: it cannot be read.
    """
    if (url := url_of(directory)) is not None:
        raise CacheError(f"{url} is not a local folder, which this needs: embedcache pull {url} FOLDER makes one")
    path = directory / NAME
    try:
        for linked in (path, *(directory / folder for folder in FOLDERS)):
            if linked.is_symlink():
                raise CorruptCacheError(f"{linked} is a link: a cache must not depend on what lies elsewhere; copy it")
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise CorruptCacheError(f"{path} is not a plain file: restore it from a copy")
        if status.st_size > LARGEST:
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
    return parsed(data, str(path))


def parsed(data: bytes, where: str) -> Manifest:
    """Turn a manifest's bytes into a value. Raises ``CorruptCacheError``, which begins with ``where`` they stand."""
    try:
        with uncollected():
            return parse(data)
    except CorruptCacheError as error:
        raise CorruptCacheError(f"{where}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CorruptCacheError(f"{where} is damaged ({reason}): restore it from a copy, or extract again") from None


def parse(data: bytes) -> Manifest:
    """Turn a manifest's bytes into a value, trusting nothing in them.

    Raises ``CorruptCacheError`` where it can say what happened, else ``ValueError`` or one of its kin.
    """
    refuse_bombs(data, _MOST_VALUES)
    text = data.decode("ascii")
    by_form = found(text)
    body = strict_json(text if by_form is None else by_form.rest, most=_MOST_VALUES, shared=True)
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CorruptCacheError("not an embedcache manifest: choose the directory of a cache")
    written = body.get("version")
    version = re.fullmatch(r"([0-9]{1,4})\.([0-9]{1,4})", written) if isinstance(written, str) else None
    if version is None or int(version[1]) != MAJOR:
        raise CorruptCacheError(
            f"this cache has format {written}, and this version of embedcache reads {MAJOR}.x: upgrade embedcache"
        )
    # Comparing the bytes too leaves no room for a change that JSON does not see, such as the case of an escape.
    alike, own = reads_as(data if by_form is None else by_form.rest.encode("ascii"), parts(body))
    if by_form is not None:
        own = by_form.hash(body)
    if body.get(HASH) != own or not alike:
        raise CorruptCacheError("it was changed after it was written (its own hash differs): restore it from a copy")
    for name in ("spec_hash", "shards", "examples", "complete", "generation"):
        body[name]  # what a new manifest need not say, one on disk must
    manifest = from_json(Manifest, {**body, "newer": written if int(version[2]) > MINOR else None})
    require(manifest.spec_hash == body["spec_hash"], "spec_hash")
    if by_form is None:
        return manifest
    shards = (
        Shard(ShardFile(name, size, digest), rows, provenance)
        for size, name, provenance, rows, digest in by_form.shards
    )
    return replace(manifest, shards=tuple(shards))
