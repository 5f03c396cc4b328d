"""The manifest: its exact bytes, what comes back from them, and that FORMAT.md speaks of all of it."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import small_caches
from hypothesis import given
from hypothesis import strategies as st

import embedcache
from embedcache.cache import manifest
from embedcache.cache.manifest import DatasetEntry, Manifest, Shard, ShardFile, file_of
from embedcache.cache.text import found, parts, reads_as
from embedcache.errors import CorruptCacheError, SpecError, SpecMismatchError
from embedcache.fingerprint import hash_json, strict_json
from embedcache.shard import STORED, FeatureSet
from embedcache.spec import ExtractionSpec

SHA = "0123456789abcdef" * 4
SET = FeatureSet("mean", "pooled", 5, 1, "float32")
WHOLE = Manifest(
    ExtractionSpec({"b": 1, "a": "é"}),
    (SET,),
    (Shard(ShardFile("000000-0123456789abcdef.h5", 1924, SHA), 7, {"device": "cpu"}),),
    DatasetEntry(
        ShardFile("000002-0123456789abcdef.h5", 999, SHA),
        11, "classification", ("x", "y"), ("train",), 0, False, True, None, None,
    ),
    True,
    3,
)  # fmt: skip

# Written by hand, but for the two hashes, which are those of {"a":"\u00e9","b":1} and of all the rest.
TEXT = """{
 "complete": true,
 "examples": {
  "bytes": 999,
  "class_names": [
   "x",
   "y"
  ],
  "has_ids": false,
  "has_inputs": true,
  "name": "000002-0123456789abcdef.h5",
  "rows": 11,
  "sha256": "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
  "split_names": [
   "train"
  ],
  "targets": 0,
  "task": "classification",
  "whole_hash": null,
  "whole_rows": null
 },
 "feature_sets": [
  {
   "dim": 5,
   "dtype": "float32",
   "kind": "pooled",
   "layers": 1,
   "name": "mean"
  }
 ],
 "format": "embedcache",
 "generation": 3,
 "manifest_hash": "HASH",
 "shards": [
  {
   "bytes": 1924,
   "name": "000000-0123456789abcdef.h5",
   "provenance": {
    "device": "cpu"
   },
   "rows": 7,
   "sha256": "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
  }
 ],
 "spec": {
  "a": "\\u00e9",
  "b": 1
 },
 "spec_hash": "SPEC",
 "version": "1.0"
}
"""


def test_the_exact_bytes() -> None:
    import hashlib

    text = TEXT.replace("SPEC", hashlib.sha256(b'{"a":"\\u00e9","b":1}').hexdigest())
    rest = json.dumps({k: v for k, v in json.loads(text).items() if k != "manifest_hash"}, sort_keys=True)
    own = hashlib.sha256(re.sub(r"(?<=[^a-z]) ", "", rest).encode()).hexdigest()
    assert manifest.encoded(WHOLE.to_json()).decode() == text.replace("HASH", own)
    assert manifest.parse(text.replace("HASH", own).encode()) == WHOLE


@given(
    spec=st.dictionaries(st.text(max_size=3), st.one_of(st.none(), st.text(max_size=5), st.integers(), st.booleans())),
    rows=st.lists(st.integers(1, 120), max_size=3),
    names=st.lists(st.text(max_size=4), unique=True, max_size=3),
    part=st.one_of(st.none(), st.integers(11, 20)),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    task=st.sampled_from([None, "classification", "multilabel", "regression"]),
)
def test_what_is_written_is_read(
    spec: dict[str, Any],
    rows: list[int],
    names: list[str],
    part: int | None,
    flags: tuple[bool, bool, bool],
    task: str | None,
) -> None:
    shards = tuple(
        Shard(ShardFile(f"{at:06d}-{SHA[:16]}.h5", 16 * count, SHA), count, {"at": at}) for at, count in enumerate(rows)
    )
    columns = len(names) if task in ("multilabel", "regression") else 0
    examples = DatasetEntry(
        ShardFile(f"000000-{SHA[:16]}.h5", 99, SHA), 11, task, tuple(names), ("train",), columns, *flags[:2], part,
        SHA if part and flags[2] else None,
    )  # fmt: skip
    made = Manifest(spec, small_caches.SETS, shards, examples, flags[2], 5)
    assert manifest.parse(manifest.encoded(made.to_json())) == made
    assert made.rows == sum(rows)


def test_a_file_is_named_after_its_hash() -> None:
    import hashlib

    file = file_of(7, b"data")
    digest = hashlib.sha256(b"data").hexdigest()
    assert (file.name, file.bytes, file.sha256) == (f"000007-{digest[:16]}.h5", 4, digest)


def test_another_major_version_is_refused_and_says_what_to_do() -> None:
    for version in ("2.0", "0.9", "11.0"):
        body = WHOLE.to_json() | {"version": version}
        with pytest.raises(CorruptCacheError, match=rf"has format {version}.* reads 1\.x: upgrade embedcache"):
            manifest.parse(manifest.encoded(body))


def test_another_spec_is_refused() -> None:
    WHOLE.refuse_other_spec("c", {"a": "é", "b": 1}, (SET,))
    with pytest.raises(SpecMismatchError, match="b: cache has 1, asked for 2"):
        WHOLE.refuse_other_spec("c", {"a": "é", "b": 2}, (SET,))
    with pytest.raises(SpecMismatchError, match="feature_sets"):
        WHOLE.refuse_other_spec("c", {"a": "é", "b": 1}, (SET, small_caches.SETS[1]))
    with pytest.raises(SpecError, match="stored as mean"):
        Manifest({}, (SET, SET))


def test_one_more_shard_is_no_longer_complete() -> None:
    more = WHOLE.with_shard(Shard(ShardFile("000001-0123456789abcdef.h5", 1924, SHA), 5, {}))
    assert (more.rows, more.complete, WHOLE.rows, WHOLE.complete) == (12, False, 7, True)


def test_the_specification_speaks_of_every_field_array_and_type() -> None:
    text = (Path(embedcache.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
    names = {*WHOLE.to_json(), *(field.name for field in fields(DatasetEntry) if field.name != "file")}
    names |= {*(field.name for field in fields(FeatureSet)), *(field.name for field in fields(ShardFile))}
    names |= {"row_key", "row", "split", "target", "id.values", "id.offsets", "input.values", "number", *STORED}
    assert {name for name in names if not re.search(rf"[`{{ ]{re.escape(name)}[`,}}]", text)} == set()
    assert f"format {manifest.MAJOR}.{manifest.MINOR}" in text


# The text, which is put together entry by entry.


AWKWARD: list[dict[str, Any]] = [
    {}, {"a": None}, {"a": 1}, {"a": True}, {"a": 1.0}, {"a": "1"}, {"b": "ü\n\"", "a": "x"},
    {"a": {"b": [1, {}]}, "c": []}, {"a": "x", "b": "ü\n\""},
]  # fmt: skip


def test_the_text_is_what_json_gives() -> None:
    """Also where neighbours are equal but not alike, as 1 and True are, and where entries have other keys."""
    entries: list[Any] = [
        {"name": f"ü{number}", "bytes": 7, "sha256": "5", "rows": 3, "provenance": ran}
        for ran in (*AWKWARD, *reversed(AWKWARD))
        for number in range(2)
    ]
    entries += [{**entries[0], "more": [1]}, {**entries[0], "rows": 2.0}, {**entries[0], "rows": True}, 3, [], {"a": 1}]
    for body in ({"a": 1, "shards": entries, "zeta": {"shards": entries[:2]}}, {"format": "x", "shards": []},
                 {"shards": entries[:1]}, {"manifest_hash": "x", "shards": entries[:3]},
                 {"shards": {"a": 1}}):  # fmt: skip
        expected = json.dumps(body, indent=1, sort_keys=True) + "\n"
        assert manifest.encoded(body).decode() == expected
        alike, own = reads_as(expected.encode(), parts(body))
        assert alike
        assert own == hash_json({name: value for name, value in body.items() if name != "manifest_hash"})
        for wrong in (
            expected + " ",
            expected[:-1],
            expected.replace("\n ", "\n  ", 1),
            expected.replace('": ', '" :', 1),
        ):
            assert not reads_as(wrong.encode(), parts(body))[0]


def test_a_manifest_is_written_from_the_texts_of_its_shards() -> None:
    grown = WHOLE
    for number, ran in enumerate(AWKWARD):
        grown = grown.with_shard(manifest.Shard(manifest.file_of(100 + number, b"x" * 99), 3, ran))
        assert grown.data() == manifest.encoded(grown.to_json())
        assert manifest.parse(grown.data()) == grown


def test_equal_objects_of_texts_are_one_where_they_may_be() -> None:
    text = '[{"a": "x"}, {"a": "x"}, {"a": 1}, {"a": true}, {"a": "y"}, {"a": "x"}]'
    once, twice, number, true, *_ = strict_json(text, shared=True)
    assert once is twice
    assert (number["a"], true["a"]) == (1, True)
    assert true["a"] is True
    assert strict_json(text, shared=True) == strict_json(text) == json.loads(text)
    with pytest.raises(ValueError, match="the key 'b' occurs twice"):
        strict_json('{"a": 1, "b": 2, "b": 2}')


RAN = {"device": "cpu", "torch": "2.13.0"}
ODD = {"a": '] \n } é"', "deep": {"list": [1, {"x": None}], "shards": []}, "": 1.5}


@pytest.mark.parametrize("provenances", [[{}], [RAN, RAN, {}, ODD, RAN], [ODD, {"shards": []}]])
def test_entries_read_by_their_form_are_those_of_the_json(provenances: list[Any], monkeypatch: Any) -> None:
    shards = tuple(Shard(file_of(number, b"x" * 500), 7, ran) for number, ran in enumerate(provenances))
    data = Manifest(ExtractionSpec({"shards": [], "b": "\n ]"}), (SET,), shards, None, False, 0).data()
    by_form = found(data.decode())
    assert by_form is not None
    assert len(by_form.shards) == len(shards)
    read = manifest.parse(data)
    monkeypatch.setattr(manifest, "found", lambda text: None)
    assert read == manifest.parse(data)
    assert read.data() == data


@given(st.data())
def test_a_manifest_with_any_byte_changed_is_refused_by_form_and_by_json(data: st.DataObject) -> None:
    shards = tuple(Shard(file_of(number, b"x" * 500), 7, ran) for number, ran in enumerate([RAN, ODD, {}]))
    whole = bytearray(Manifest(ExtractionSpec({"b": 1}), (SET,), shards, None, False, 0).data())
    start = whole.index(b'"shards"') - 5
    place = data.draw(st.integers(start, len(whole) - 1))
    changed = data.draw(
        st.sampled_from([b"", b" ", b"\n", b"0", b"}", b'"', b",", b"\\u0041", bytes([whole[place]]) * 2])
    )
    if changed == whole[place : place + 1]:
        return
    whole[place : place + 1] = changed
    with pytest.raises((ValueError, CorruptCacheError, KeyError, TypeError, AttributeError)):
        manifest.parse(bytes(whole))
