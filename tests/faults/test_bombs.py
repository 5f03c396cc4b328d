"""A file that would become gigabytes or days is refused in one line, before it is parsed."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import bombs
import numpy as np
import pytest
from small_caches import SETS, write

from embedcache.cache import FeatureCache, verify
from embedcache.errors import BadRowsError, EmbedcacheError, InputError, SpecError, SweepError
from embedcache.examples import load_examples
from embedcache.examples.formats import open_path
from embedcache.fingerprint import read_json, strict_json
from embedcache.heads import TrainedHead, folder
from embedcache.report import report
from embedcache.sweep import SweepResult, sweep
from embedcache.sweep.store import read_identity

READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "manifest": ("manifest.json", FeatureCache.open),
    "head": ("config.json", TrainedHead.from_pretrained),
    "metrics": ("metrics.json", lambda path: folder.record(path, "test", {})),
    "sweep": ("sweep.json", read_identity),
    "summary": ("summary.json", SweepResult),
    "report": ("summary.json", report),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("bomb", bombs.JSON)
def test_json_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str, bomb: str) -> None:
    name, read = READERS[reader]
    if name == "metrics.json":
        (tmp_path / "config.json").write_text("{}")
        monkeypatch.setattr(folder, "load", lambda path, kind: None)
        monkeypatch.setattr(folder, "is_ours", lambda path: True)
    (tmp_path / name).write_bytes(bombs.JSON[bomb])
    parse = json.loads
    monkeypatch.setattr(json, "loads", lambda text, **options: parse(text, **options) if len(text) < 9 else 1 / 0)
    with pytest.raises(EmbedcacheError, match=r"more than \d,000,000 values|nested too deeply") as caught:
        read(tmp_path)
    assert str(tmp_path) in str(caught.value)
    if name == "manifest.json":
        assert len(verify(tmp_path)) == 1


def test_json_that_is_no_bomb() -> None:
    deep = "[" * 99 + "]" * 99
    assert strict_json(deep) == parse_plainly(deep)
    for texts in (["[" * 500], [":-[ " * 500, "}" * 500, '"[\\' * 500], ["é\n[" * 200]):
        for ascii_only in (True, False):
            text = json.dumps({"texts": texts}, ensure_ascii=ascii_only)
            assert strict_json(text) == strict_json(text.encode()) == {"texts": texts}
    # 100,000 shards, as a manifest names them
    shard = {
        "name": "0-a.h5",
        "bytes": 1,
        "sha256": "0" * 64,
        "rows": 1,
        "provenance": dict.fromkeys(map(str, range(25))),
    }
    assert len(strict_json(json.dumps([shard] * 100_000), most=4_000_000)) == 100_000


def parse_plainly(text: str) -> object:
    return json.loads(text)


def test_only_plain_files_of_a_sane_size_are_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a plain file"):
        read_json("/dev/zero")
    (tmp_path / "large").write_bytes(b"[" + b" " * 1000 + b"]")
    with pytest.raises(ValueError, match="it has 1,002 bytes, 1,000 at most"):
        read_json(tmp_path / "large", largest=1000)
    assert read_json(tmp_path / "large") == []


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    folder, codes = tmp_path_factory.mktemp("bombs") / "c", (np.arange(60) % 7 == 0).astype(np.uint8)
    return FeatureCache.open(write(folder, 60, 60, SETS[:1], split=codes, split_names=("train", "validation")))


@pytest.mark.parametrize("bomb", bombs.YAML)
def test_yaml_bombs(tmp_path: Path, cache: FeatureCache, bomb: str) -> None:
    text, said = bombs.YAML[bomb]
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises((SweepError, SpecError), match=said) as caught:
        sweep(cache, tmp_path / "sweep.yaml", output_dir=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_text_bombs(tmp_path: Path) -> None:
    names = [*(f"{name}.gz" for name in bombs.TEXT if name != "blank lines.txt"), *bombs.PLAIN]  # that takes seconds
    assert bombs.refusals(tmp_path, names, 24 << 20) == (len(names), [])


def test_standard_input_without_end_or_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/zero", "rb") as zeros:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(zeros))
        with pytest.raises(InputError, match="<stdin>: a line is longer than"):
            open_path("-", None, "minimal")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="standard input is closed"):
        open_path("-", None, "minimal")


def test_a_large_cell_and_a_well_packed_file_are_read(tmp_path: Path) -> None:
    long = "x" * (15 << 20)
    (tmp_path / "a.csv").write_text(f'text\n"{long}"\nshort\n')
    assert len(load_examples(tmp_path / "a.csv", labels="none", text_column="text")) == 2
    rows = [f'"number {row}, of many that are nearly alike: "' for row in range(100_000)]
    with gzip.open(tmp_path / "b.csv.gz", "wt") as stream:
        stream.write("text\n" + "\n".join(rows) + "\n")
    assert len(load_examples(tmp_path / "b.csv.gz", labels="none", text_column="text")) == 100_000


def test_a_line_that_is_a_bomb_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "sound"}\n{"text": [' + b"[]," * 3_000_000 + b"0]}\n")
    with pytest.raises(BadRowsError, match="it has more than 2,000,000 values"):
        load_examples(tmp_path / "a.jsonl", labels="none", text_column="text")


def test_bad_rows_are_never_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "sound"}\n[]\n')
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "q.jsonl.partial").symlink_to(tmp_path / "precious")
    load_examples(tmp_path / "a.jsonl", labels="none", on_bad_row="skip", quarantine=tmp_path / "q.jsonl")
    assert (tmp_path / "precious").read_text() == "precious"
    assert "raw" in (tmp_path / "q.jsonl").read_text()
