"""Hostile manifests, signed: right hashes around impossible or dangerous values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forge
from forge import edit

from embedcache.cache.manifest import encoded
from embedcache.fingerprint import hash_json


def _shard(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda body: body["shards"][0].update(values)


def _examples(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda body: body["examples"].update(values)


def _set(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda body: body["feature_sets"][0].update(values)


def _top(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda body: body.update(values)


def _renamed(name: str) -> Callable[[dict[str, Any]], Any]:
    """A name with the hash that belongs to it, so that only its form can be refused."""
    return lambda body: body["shards"][0].update(name=name.replace("SHA", body["shards"][0]["sha256"][:16]))


def raw(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """An attack on the bytes of the manifest."""

    def attack(cache: Path) -> None:
        file = cache / "manifest.json"
        data = change(file.read_bytes())
        assert data != file.read_bytes()
        file.write_bytes(data)

    return attack


def _deep(cache: Path) -> None:
    (cache / "manifest.json").write_bytes(b'{"format": "embedcache", "spec": ' + b"[" * 200_000 + b"]" * 200_000 + b"}")


def _deep_for_python(cache: Path) -> None:
    """Not too deep for a parser in C, but for whatever walks over it in Python."""
    text = json.dumps(forge.body(cache) | {"spec": 0}, indent=1, sort_keys=True)
    nested = '{"a":' * 5_000 + "{}" + "}" * 5_000
    (cache / "manifest.json").write_text(text.replace('"spec": 0', f'"spec": {nested}'))


def _other_spec(cache: Path) -> None:
    body = forge.body(cache)
    body["spec"]["prompt"] = "x"
    body["manifest_hash"] = hash_json({name: value for name, value in body.items() if name != "manifest_hash"})
    (cache / "manifest.json").write_bytes(encoded(body))


def _other_case(cache: Path) -> None:
    """The same JSON value, so its hash is right; other bytes all the same."""
    edit(_examples(class_names=["a", "b", "\u00e9"]))(cache)
    raw(lambda data: data.replace(b"\\u00e9", b"\\u00E9"))(cache)


def _surrogates(cache: Path) -> None:
    forge.edit(_examples(class_names=["a", "b", "\ud800"]))(cache)


ATTACKS: dict[str, Callable[[Path], None]] = {
    # Names that lead elsewhere.
    "name_up": edit(_renamed("../../000000-SHA.h5")),
    "name_absolute": edit(_renamed("/etc/000000-SHA.h5")),
    "name_in_a_directory": edit(_renamed("x/000000-SHA.h5")),
    "name_with_a_null_byte": edit(_renamed("000000-SHA.h5\0")),
    "name_with_a_newline": edit(_renamed("000000-SHA.h5\n")),
    "name_with_arabic_digits": edit(_renamed("\u0660" * 6 + "-SHA.h5")),
    "name_of_the_manifest": edit(_renamed("../manifest.json")),
    "name_with_another_hash": edit(_renamed("000000-0123456789abcdef.h5")),
    "name_is_a_number": edit(_shard(name=0)),
    "name_is_a_list": edit(_shard(name=["000000"])),
    "dataset_name_up": edit(_examples(name="../../etc/passwd")),
    "shard_named_twice": edit(lambda body: body["shards"].append(body["shards"][0])),
    # Numbers.
    "rows_negative": edit(_shard(rows=-1)),
    "rows_zero": edit(_shard(rows=0)),
    "rows_huge": edit(_shard(rows=2**53)),
    "rows_beyond_memory": edit(_shard(rows=2**52)),
    "rows_more_than_bytes": edit(_shard(rows=10_000)),
    "rows_infinite": edit(_shard(rows=10**400)),
    "rows_fractional": edit(_shard(rows=7.0)),
    "rows_true": edit(_shard(rows=True)),
    "rows_text": edit(_shard(rows="7")),
    "rows_null": edit(_shard(rows=None)),
    "rows_one_less": edit(_shard(rows=6)),
    "rows_one_more": edit(_shard(rows=8)),
    "bytes_negative": edit(_shard(bytes=-1)),
    "bytes_huge": edit(_shard(bytes=2**52, rows=2**40)),
    "sha256_short": edit(_shard(sha256="0" * 63)),
    "sha256_upper_case": edit(lambda body: body["shards"][0].update(sha256=body["shards"][0]["sha256"].upper())),
    "generation_negative": edit(_top(generation=-1)),
    "dataset_rows_negative": edit(_examples(rows=-1)),
    "dataset_rows_huge": edit(_examples(rows=2**52)),
    "dataset_rows_one_more": edit(_examples(rows=24)),
    "dataset_targets_for_classes": edit(_examples(targets=2)),
    "dataset_targets_huge": edit(_examples(task="multilabel", targets=2**40)),
    "dataset_task_unknown": edit(_examples(task="world domination")),
    "dataset_task_is_a_list": edit(_examples(task=[])),
    "dataset_classes_missing": edit(_examples(class_names=["a"])),
    "dataset_classes_twice": edit(_examples(class_names=["a", "a", "b"])),
    "dataset_classes_numbers": edit(_examples(class_names=[1, 2, 3])),
    "dataset_classes_one_text": edit(_examples(class_names="abc")),
    "dataset_classes_not_printable": _surrogates,
    "dataset_splits_missing": edit(_examples(split_names=["train"])),
    "dataset_ids_that_are_not_there": edit(_examples(has_ids=True)),
    "dataset_ids_neither_true_nor_false": edit(_examples(has_ids=1)),
    "dataset_part_of_less": edit(_examples(whole_rows=5)),
    "dataset_part_without_numbers": edit(_examples(whole_rows=99)),
    "dataset_hash_of_no_whole": edit(_examples(whole_hash="0" * 64)),
    "set_dim_zero": edit(_set(dim=0)),
    "set_dim_huge": edit(_set(dim=2**31)),
    "set_dim_large": edit(_set(dim=2**31 - 1)),
    "set_dim_other": edit(_set(dim=7)),
    "set_dtype_object": edit(_set(dtype="object")),
    "set_dtype_other": edit(_set(dtype="float16")),
    "set_dtype_of_bfloat16": edit(_set(dtype="bfloat16")),
    "set_kind_other": edit(_set(kind="layers")),
    "set_name_up": edit(_set(name="../x")),
    "set_name_dot": edit(_set(name=".")),
    "set_name_of_the_keys": edit(_set(name="row_key")),
    "set_name_of_another": edit(_set(name="cls")),
    "set_more": edit(lambda body: body["feature_sets"].append({**body["feature_sets"][0], "name": "more"})),
    "set_fewer": edit(lambda body: body["feature_sets"].pop()),
    "set_none": edit(_top(feature_sets=[])),
    "set_is_text": edit(_top(feature_sets=["mean"])),
    # Shapes of the whole.
    "format_other": edit(_top(format="zarr")),
    "version_unknown": edit(_top(version="2.0")),
    "version_zero": edit(_top(version="0.9")),
    "version_a_number": edit(_top(version=1.0)),
    "version_arabic_digits": edit(_top(version="\u0661.\u0660")),
    "version_many_digits": edit(_top(version="1." + "0" * 5000)),
    "field_missing": edit(lambda body: body.pop("shards")),
    "shards_are_a_mapping": edit(_top(shards={})),
    "shards_are_numbers": edit(_top(shards=[1, 2])),
    "spec_is_a_list": edit(_top(spec=[])),
    "provenance_is_text": edit(_shard(provenance="me")),
    "complete_is_text": edit(_top(complete="yes")),
    "examples_are_text": edit(_top(examples="yes")),
    "spec_of_another_hash": _other_spec,
    # Bytes that JSON parsers read alike or differently.
    "key_twice": raw(lambda data: data.replace(b'{\n "complete"', b'{\n "complete": false,\n "complete"')),
    "key_twice_deep_down": raw(lambda data: data.replace(b'"device": "none"', b'"device": "x",\n"device": "none"', 1)),
    "spaces": raw(lambda data: data.replace(b"{\n", b"{ \n", 1)),
    "no_newline_at_the_end": raw(lambda data: data[:-1]),
    "more_at_the_end": raw(lambda data: data + b" "),
    "second_value": raw(lambda data: data + b"{}"),
    "order_of_keys": raw(lambda data: json.dumps(dict(reversed(json.loads(data).items())), indent=1).encode() + b"\n"),
    "byte_order_mark": raw(lambda data: b"\xef\xbb\xbf" + data),
    "utf_16": raw(lambda data: data.decode().encode("utf-16")),
    "not_ascii": raw(lambda data: data.replace(b'"none"', '"é"'.encode(), 1)),
    "escape_that_need_not_be": raw(lambda data: data.replace(b'"none"', b'"\\u006eone"', 1)),
    "escape_in_another_case": _other_case,
    "nan": raw(lambda data: data.replace(b'"prompt": null', b'"prompt": NaN')),
    "infinity": raw(lambda data: data.replace(b'"prompt": null', b'"prompt": -Infinity')),
    "infinity_in_digits": raw(lambda data: data.replace(b'"prompt": null', b'"prompt": 1e999')),
    "digits_without_end": raw(lambda data: data.replace(b'"prompt": null', b'"prompt": ' + b"9" * 100_000)),
    "null": raw(lambda data: b"null"),
    "a_list": raw(lambda data: b"[]"),
    "deep": _deep,
    "deep_for_python": _deep_for_python,
    "hash_missing": raw(lambda data: data.replace(b'"manifest_hash"', b'"manifest_hush"')),
}

# What is said, where one reason could hide another.
SAID = {
    "rows_more_than_bytes": "the rows of a shard is not what this format allows",
    "rows_beyond_memory": "the rows of a shard is not what this format allows",
    "dataset_rows_huge": "the rows of the dataset is not what this format allows",
    "name_with_arabic_digits": "file name",
    "name_with_another_hash": "the entry of",
    "shard_named_twice": "a shard named twice",
    "version_arabic_digits": "upgrade embedcache",
    "version_unknown": "upgrade embedcache",
    "spec_of_another_hash": "spec_hash",
    "key_twice": "the key 'complete' occurs twice",
    "key_twice_deep_down": "the key 'device' occurs twice",
    "nan": "NaN is not JSON",
    "infinity_in_digits": "1e999 is too large a number",
    "deep": "nested too deeply",
    "escape_in_another_case": "its own hash differs",
    "dataset_targets_huge": "targets is not what",
    "dataset_hash_of_no_whole": "whole_hash is not what",
    "dataset_classes_not_printable": "surrogates not allowed",
    "set_name_of_the_keys": "two feature sets would both be stored as row_key",
}

if __name__ == "__main__":
    forge.main(ATTACKS)
