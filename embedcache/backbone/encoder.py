"""A callable of one's own as a backbone: timm, open_clip, an API, anything that makes vectors of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from embedcache import pictures
from embedcache.backbone.compute import Numbers, PassFeatures
from embedcache.backbone.pictures import Pictures
from embedcache.backbone.text import Texts
from embedcache.batching import VECTOR, Batch, ShapePolicy
from embedcache.errors import BackboneError, EmbedcacheError, SpecError
from embedcache.fingerprint import sha256_bytes
from embedcache.shard import Array, FeatureSet
from embedcache.spec import CONTENTS, DTYPES, READS, Origin, checked_identity
from embedcache.wording import counted

Function = Callable[[list[Any]], Any]
"""A list of n texts, pictures (PIL, RGB) or contents (bytes) -> an array [n, D]."""
FEATURES = "features"
ROWS = 32


@dataclass(frozen=True)
class Contents:
    """Rows of an encoder, which prepares them itself; each costs 1."""

    contents: Sequence[bytes]

    truncated = 0

    @property
    def lengths(self) -> Numbers:
        """[n] ones."""
        return np.ones(len(self.contents), np.int64)

    def digests(self) -> list[str]:
        """Return a hash of each row."""
        return [sha256_bytes(content) for content in self.contents]


class Encoder:
    """A callable as a ``Backbone``. It always gets ``origin.rows`` rows, the last one repeated where there are fewer.

    ``width`` is that of its vectors, None to find out by a call on ``row``. It is trusted to do the same to a row
    whatever its neighbours are, and decides itself on how many threads. Built-in rows are run where the cache is made
    and again by whoever adds rows or predicts: that tells when it is no longer the one that its identity says.
    """

    pass_threads = None  # its own affair

    def __init__(
        self, function: Function, origin: Origin, storage_dtype: str = "float32", width: int | None = None,
        row: bytes | None = None,
    ) -> None:  # fmt: skip
        if not callable(function):
            raise SpecError(f"encoder is {function!r}: expected a callable, list of rows -> array [n, D]")
        if storage_dtype not in DTYPES:
            raise SpecError(f"storage_dtype is {storage_dtype!r}: expected one of {', '.join(DTYPES)}")
        self._function, self._origin, self._dtype, self._width, self._row = function, origin, storage_dtype, width, row
        self.policy = ShapePolicy(positions=origin.rows or ROWS, step=1, max_length=1)
        self.provenance: Mapping[str, object] = {"encoder": getattr(function, "__qualname__", type(function).__name__)}

    @classmethod
    def made(
        cls, function: Function, identity: object, content: str, *, reads: str | None = None, rows: int | None = None,
        storage_dtype: str | None = None, width: int | None = None, row: bytes | None = None,
    ) -> Encoder:  # fmt: skip
        """Return an encoder of rows of a kind; see ``extract``. Raises ``SpecError`` for what cannot be."""
        if content not in CONTENTS:
            raise SpecError(f"an encoder reads rows of the kinds {', '.join(CONTENTS)}, and these are {content}")
        reads = reads or content
        if reads not in (content, "bytes"):
            raise SpecError(f"reads is {reads!r}: expected {content} or bytes for rows of the kind {content}; of all, "
                            f"one of {', '.join(READS)}")  # fmt: skip
        rows = ROWS if rows is None else rows
        if rows < 1:
            raise SpecError(f"positions is {rows}: expected at least 1 row in a batch")
        rows = rows // VECTOR * VECTOR or rows
        origin = Origin("encoder", checked_identity(identity), content, reads, rows)
        return cls(function, origin, storage_dtype or "float32", width, row)

    @property
    def feature_sets(self) -> tuple[FeatureSet, ...]:
        """The one set that it gives."""
        return (FeatureSet(FEATURES, "pooled", self.width, 1, self._dtype),)

    @property
    def identity(self) -> Mapping[str, object]:
        """What the user says of it, what it is given and how many rows at a time, and what is stored."""
        return {
            "source": self._origin.to_json(), "storage_dtype": self._dtype, "features": {FEATURES: {"dim": self.width}}
        }  # fmt: skip

    @property
    def width(self) -> int:
        """How many numbers a vector has. Calls the encoder where that is not known."""
        if self._width is None:
            self._width = int(self._call(self._built_in if self._row is None else [self._row]).shape[1])
        return self._width

    @property
    def _built_in(self) -> Sequence[bytes]:
        return Pictures.probe_rows if self._origin.content == "image" else Texts.probe_rows

    @cached_property
    def probe_rows(self) -> Sequence[bytes]:
        """Built-in rows; none where the encoder cannot read them, as one of proteins cannot."""
        try:
            self._call(self._built_in[:1])
        except BackboneError as error:
            if error.__cause__ is None:  # it can read them, and gives what it must not
                raise
            return ()
        return self._built_in

    probe_versions: Mapping[str, str] = {}

    def prepare(self, contents: Sequence[bytes]) -> Contents:
        """Keep the contents."""
        return Contents(contents)

    def side_by_side(self, batches: int) -> int:
        """One call at a time: nothing says that it may be called from several threads."""
        return 1

    def forward(self, prepared: Contents, batch: Batch) -> Array:
        """Call it on a batch."""
        return self._call([prepared.contents[row] for row in batch.indices])

    def fetch(self, running: Array) -> PassFeatures:
        """Return what a call gave."""
        return {FEATURES: running}

    def _call(self, contents: Sequence[bytes]) -> Array:
        """Return vectors of at most a batch of rows, float32 [n, D]."""
        some, rows = contents[: self.policy.rows(1)], self.policy.rows(1)
        given = [self._given(content) for content in some]
        given += [given[-1]] * (rows - len(given))
        try:
            values = self._function(given)
        except EmbedcacheError:
            raise
        except Exception as error:
            told = " ".join(f"{type(error).__name__}: {error}".split())
            raise BackboneError(
                f"the encoder failed on a batch of {counted(rows, 'row')} ({told}): what was committed is kept, "
                "and the same call goes on from there"
            ) from error
        for method in ("detach", "cpu"):  # torch's tensors
            values = getattr(values, method, lambda values=values: values)()
        try:
            array = np.asarray(values, np.float32)
        except (TypeError, ValueError) as error:
            raise BackboneError(f"the encoder gave what is no array of numbers ({error}): expected [n, D]") from None
        if array.ndim != 2 or len(array) != rows or not array.shape[1]:
            raise BackboneError(f"the encoder gave {list(array.shape)} for {rows} rows: expected [{rows}, D]")
        if self._width is not None and array.shape[1] != self._width:
            raise BackboneError(
                f"the encoder gives {array.shape[1]} numbers a row, expected {self._width}: another model"
            )
        return array[: len(some)]

    def _given(self, content: bytes) -> object:
        if self._origin.reads == "text":
            return content.decode("utf-8")
        return pictures.decode(content) if self._origin.reads == "image" else content
