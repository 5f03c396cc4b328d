"""Identity is content: canonical JSON, hashes, and a difference that names every field."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache import fingerprint
from embedcache.fingerprint import (
    ABSENT,
    canonical_json,
    differences,
    hash_json,
    row_key,
    sha256_bytes,
    sha256_file,
    strict_json,
)

LEAF = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=5)
)
VALUE = st.recursive(
    LEAF, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3))
)


def test_canonical_json_by_hand() -> None:
    assert canonical_json({"b": [1, 2.5, None], "a": "é\n"}) == '{"a":"\\u00e9\\n","b":[1,2.5,null]}'
    assert canonical_json({"b": 1, "a": 2}) == canonical_json({"a": 2, "b": 1})
    assert hash_json({}) == hashlib.sha256(b"{}").hexdigest()
    assert hash_json({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            canonical_json([wrong])


@given(VALUE)
def test_canonical_json_comes_back(value: Any) -> None:
    text = canonical_json(value)
    assert text.isascii()
    assert canonical_json(strict_json(text)) == text
    assert strict_json(text) == value


@given(st.dictionaries(st.text(max_size=3), VALUE, max_size=4), st.randoms())
def test_the_order_of_keys_is_no_content(value: dict[str, Any], rng: Any) -> None:
    items = list(value.items())
    rng.shuffle(items)
    assert hash_json(dict(items)) == hash_json(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 1}', "the key 'a' occurs twice"),
        ('[{"x": {"b": 0, "c": 1, "b": 2}}]', "the key 'b' occurs twice"),
        ("NaN", "NaN is not JSON"),
        ('{"a": [-Infinity]}', "-Infinity is not JSON"),
        ("1e999", "1e999 is too large a number"),
        ("[-1e400]", "too large"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("", "Expecting value"),
        ("{}{}", "Extra data"),
    ],
)
def test_json_that_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        strict_json(text)


def test_json_that_is_not_refused() -> None:
    text = '{"a": {"a": 1e308, "b": "NaN"}, "b": [{"a": 1}, {"a": 1}]}'
    assert strict_json(text) == json.loads(text)


def test_hashes_by_hand(tmp_path: Path) -> None:
    assert sha256_bytes(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_file(tmp_path / "f") == sha256_bytes(b"abc")
    # blake2b-128 of nothing and of "abc", as any other implementation gives them
    assert row_key(b"").hex() == "cae66941d9efbd404e4d88758ea67670"
    assert row_key(b"abc").hex() == "cf4ab791c62b8d2b2109c90275287816"
    assert len(row_key(bytes(1 << 20))) == fingerprint.KEY_BYTES == 16


@given(st.binary(max_size=100), st.integers(1, 30))
def test_a_file_is_hashed_in_blocks_as_a_whole(data: bytes, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint, "_BLOCK", block)
        assert fingerprint._digest(io.BytesIO(data)) == sha256_bytes(data)


def test_the_same_file_elsewhere_has_the_same_hash(tmp_path: Path) -> None:
    import os

    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"weights")
    os.utime(tmp_path / "b", (1, 1))
    assert sha256_file(tmp_path / "a") == sha256_file(str(tmp_path / "b"))
    (tmp_path / "b").write_bytes(b"weightt")
    assert sha256_file(tmp_path / "a") != sha256_file(tmp_path / "b")


def test_differences_by_hand() -> None:
    old = {"a": {"x": 1, "y": [1, 2]}, "b": None, "c": "same", "d": 1}
    new = {"a": {"x": 2, "y": [2, 1]}, "c": "same", "d": 1.0, "e": {"z": 0}}
    assert differences(old, new) == [
        ("a.x", 1, 2),
        ("a.y", [1, 2], [2, 1]),
        ("b", None, ABSENT),
        ("d", 1, 1.0),
        ("e", ABSENT, {"z": 0}),
    ]
    assert differences([1], [2], "feature_sets") == [("feature_sets", [1], [2])]
    assert repr(ABSENT) == "nothing"
    assert differences({"a": True}, {"a": 1}) == [("a", True, 1)]
    assert differences({"a": {}}, {"a": []}) == [("a", {}, [])]


@given(VALUE, VALUE)
def test_there_is_a_difference_exactly_where_the_hash_differs(old: Any, new: Any) -> None:
    """A spec with another hash must never pass as the same, and one with the same hash never as another."""
    assert bool(differences(old, new)) == (hash_json(old) != hash_json(new))
    assert differences(old, old) == []


@given(st.dictionaries(st.text(max_size=2), VALUE, max_size=3))
def test_a_field_that_is_gone_is_a_difference(value: dict[str, Any]) -> None:
    for name in value:
        less = {key: each for key, each in value.items() if key != name}
        assert differences(value, less) == [(name, value[name], ABSENT)]
        assert differences(less, value) == [(name, ABSENT, value[name])]


def test_row_keys_of_examples_are_these() -> None:
    from embedcache.examples import load_examples

    texts = ["a", "é🎉", " leading", "NA", "1\n2"]
    examples = load_examples([{"text": text, "label": at % 2} for at, text in enumerate(texts)])
    wanted = [list(row_key(text.encode("utf-8"))) for text in texts]
    assert np.array_equal(examples.keys, np.array(wanted, np.uint8))
