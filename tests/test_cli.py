"""The cache commands: what they print and leave behind, and one line for everything that can be wrong."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tiny_models

from embedcache.cache import FeatureCache
from embedcache.cli import cli
from embedcache.cli import run as run_cli

CACHE_COMMANDS = ("extract", "info", "verify", "relabel", "merge", "env")
SAMPLE = Path(__file__).parent.parent / "data" / "sample.csv"


class Result(NamedTuple):
    """What one command gave. ``notes`` are the lines on stderr that start with "note: ", ``err`` all others."""

    code: int
    out: str
    err: list[str]
    notes: list[str]


Command = Callable[..., Result]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Result:
        capfd.readouterr()
        code = run_cli([str(each) for each in arguments])
        captured = capfd.readouterr()
        lines = captured.err.splitlines()
        notes = [line for line in lines if line.startswith("note: ")]
        return Result(code, captured.out, [line for line in lines if line not in notes], notes)

    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT."""
    return tiny_models.build("bert", tmp_path_factory.mktemp("cli") / "bert")


@pytest.fixture
def extract(command: Command, model: Path) -> Command:
    """Run ``extract`` with the tiny model."""
    return lambda *arguments: command("extract", "--model", model, *arguments)


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def refused(result: Result, said: str, code: int = 1) -> None:
    """One line on stderr beside the notes, nothing on stdout, the exit status."""
    (line,) = result.err
    assert line.startswith("error: ")
    assert said in line, line
    assert (result.code, result.out) == (code, "")


# What the commands do


def test_extract_info_verify(extract: Command, command: Command, tmp_path: Path) -> None:
    done = extract(SAMPLE, "-o", "c", "--split", "60/20/20", "--pooling", "mean", "--pooling", "cls@-2", "--tokens")
    assert (done.code, done.err) == (0, [])
    assert "60 rows (60 unique) in c: 60 extracted, 0 already there" in done.out
    assert "note: text column: 'text' (guessed)" in done.notes
    facts = json.loads(command("info", "c", "--json").out)
    assert [each["name"] for each in facts["feature_sets"]] == ["mean", "cls@-2", "tokens"]
    assert sum(each["rows"] for each in facts["splits"].values()) == facts["rows"] == 60
    shown = command("info", "c")
    assert (shown.code, shown.err) == (0, [])
    for part in ("positive", "neutral", "train", "cls@-2", "BertModel", "float32", facts["spec_hash"][:16]):
        assert part in shown.out
    sound = command("verify", "c")
    assert (sound.code, sound.out) == (0, "c is sound: every file is what was committed\n")
    before = files(tmp_path / "c")
    again = extract(SAMPLE, "-o", "c", "--split", "60/20/20", "--json")  # the cache decides what is left out
    assert (again.code, json.loads(again.out)["extracted"]) == (0, 0)
    other = ("--tokens", "--pooling", "cls@-2", "--pooling", "mean")  # the same sets in another order
    assert extract(SAMPLE, "-o", "c", "--split", "60/20/20", *other).code == 0
    assert files(tmp_path / "c") == before


def test_tokens_come_beside_the_default_pooling(extract: Command, command: Command) -> None:
    assert extract(SAMPLE, "-o", "c", "--tokens").code == 0
    sets = json.loads(command("info", "c", "--json").out)["feature_sets"]
    assert [each["kind"] for each in sets] == ["pooled", "tokens"]


def test_extract_with_the_real_model(command: Command, minilm_path: Path) -> None:
    done = command("extract", SAMPLE, "-o", "c", "--batch-size", "128", "--json")
    assert (done.code, done.err) == (0, [])
    assert json.loads(done.out)["extracted"] == 60
    cache = FeatureCache.open("c")
    x, y = cache.arrays()
    assert (x.shape, y.shape, cache.class_names) == ((60, 384), (60,), ("negative", "neutral", "positive"))
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)  # its own files say so


def test_dry_run_writes_nothing(extract: Command, tmp_path: Path) -> None:
    said = extract(SAMPLE, "-o", "c", "--dry-run", "--tokens", "--pooling", "mean")
    assert (said.code, said.err) == (0, [])
    for part in ("60 (60 unique)", "tokens a row", "rows x tokens", "padding", "tokens: ", "mean: ", "time "):
        assert part in said.out
    found = json.loads(extract(SAMPLE, "--dry-run", "--json").out)  # without a cache too
    assert (found["rows"], found["to_extract"], found["bytes"]) == (60, 60, {"mean": 60 * 22 * 4})
    assert list(tmp_path.iterdir()) == []


def test_parts_merged_are_the_whole(extract: Command, command: Command) -> None:
    assert extract(SAMPLE, "-o", "whole").code == 0
    for part in ("1/3", "2/3", "3/3"):
        assert extract(SAMPLE, "-o", f"p{part[0]}", "--part", part).code == 0
    merged = command("merge", "p1", "p2", "p3", "-o", "merged")
    assert (merged.code, merged.out, merged.err) == (0, "60 rows of 3 parts merged into merged\n", [])
    whole, joined = FeatureCache.open("whole"), FeatureCache.open("merged")
    assert joined.arrays()[0].tobytes() == whole.arrays()[0].tobytes()
    assert joined.ids() == whole.ids()


def test_relabel(extract: Command, command: Command, tmp_path: Path) -> None:
    lines = SAMPLE.read_text(encoding="utf-8").replace(",positive\n", ",good\n")
    (tmp_path / "new.csv").write_text(lines, encoding="utf-8")
    extract(SAMPLE, "-o", "c")
    done = command("relabel", "c", "new.csv")
    assert (done.code, done.out, done.err) == (0, "60 rows relabelled in c; no forward pass\n", [])
    assert FeatureCache.open("c").class_names == ("good", "negative", "neutral")
    (tmp_path / "more.csv").write_text("text,label\nnever seen,good\n")
    before = files(tmp_path / "c")
    refused(command("relabel", "c", "more.csv"), "1 of 1 rows are not in c (the first is row 0): extract them first")
    assert files(tmp_path / "c") == before


def test_bad_rows(extract: Command, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("text,label\ngood film,x\n,y\nbad plot,\nslow,y\n")
    refused(extract("bad.csv", "-o", "c"), "2 bad rows: bad.csv:3: 'text' is empty; bad.csv:4: the label")
    assert not (tmp_path / "c").exists()
    done = extract("bad.csv", "-o", "c", "--on-bad-row", "skip")
    assert (done.code, done.err) == (0, [])
    assert "note: 2 bad rows set aside in c.quarantine.jsonl" in done.notes
    aside = [json.loads(line) for line in (tmp_path / "c.quarantine.jsonl").read_text().splitlines()]
    assert len(aside) == 2
    assert FeatureCache.open("c").n_rows == 2


def test_env(command: Command) -> None:
    facts = json.loads(command("env", "--json").out)
    assert {"embedcache", "python", "torch", "transformers", "h5py", "threads", "cuda"} <= set(facts)
    shown = command("env")
    assert (shown.code, shown.err) == (0, [])
    assert facts["torch"] in shown.out


def test_one_class_only(extract: Command, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("text,label\na good film,x\na bad film,x\n")
    done = extract("one.csv", "-o", "c")  # features can be had; a head cannot be trained on them, which train says
    assert (done.code, done.err) == (0, [])
    assert "note: there is only one class: 'x'" in done.notes


# What can be wrong


def test_a_missing_and_an_empty_file(extract: Command, tmp_path: Path) -> None:
    refused(extract("nowhere.csv", "-o", "c"), "nowhere.csv: no such file")
    (tmp_path / "empty.csv").touch()
    refused(extract("empty.csv", "-o", "c"), "empty.csv: the file is empty")
    (tmp_path / "header.csv").write_text("text,label\n")
    refused(extract("header.csv", "-o", "c"), "header.csv: there is a header but no rows")
    refused(extract(tmp_path, "-o", "c"), "is a directory without pictures: expected a file")
    assert not (tmp_path / "c").exists()


def test_a_wrong_column(extract: Command) -> None:
    for flag in ("--text-column", "--label-column", "--id-column", "--split-column"):
        refused(
            extract(SAMPLE, "-o", "c", flag, "texts"), "no column 'texts' (did you mean text?): it has 'text', 'label'"
        )


def test_a_model_without_weights_and_a_hub_name_offline(command: Command, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    refused(command("extract", SAMPLE, "-o", "c", "--model", "bare"), "bare has no weights: expected model.safetensors")
    asked = command("extract", SAMPLE, "-o", "c", "--model", "someone/something")
    refused(asked, "'someone/something' is not on this machine and the hub cannot be reached (HF_HUB_OFFLINE is set)")
    refused(command("extract", SAMPLE, "-o", "c", "--model", "./none"), "./none is not a model folder")
    assert not (tmp_path / "c").exists()


def test_an_output_that_cannot_be_written(extract: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(extract(SAMPLE, "-o", "file/c"), "file/c: ")
    refused(extract(SAMPLE, "-o", "file"), "file is a file: choose a new or an empty directory")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    refused(extract(SAMPLE, "-o", "other"), "other exists and is not a feature cache")
    assert files(tmp_path / "other") == {"mine.txt": b"mine"}
    if os.geteuid():  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o555)
        refused(extract(SAMPLE, "-o", "locked/c"), "locked/c: ")


def test_a_full_disk_loses_nothing(extract: Command, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import embedcache.shard

    whole = ("--shard-rows", "13", "--keep-inputs")
    assert extract(SAMPLE, "-o", "whole", *whole).code == 0
    written, write = [0], os.write

    def full(descriptor: int, data: bytes) -> int:
        if written[0] > 9000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written[0] += len(data)
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(embedcache.shard.os, "write", full)
        refused(extract(SAMPLE, "-o", "c", *whole), "the disk is full: free some space and run the same command again")
    assert written[0] > 9000
    kept = len(list(Path("c/features").glob("*.h5")))
    assert 0 < kept < 5
    refused(command("info", "c"), "rows of an extraction that was not finished: run the same extract command again")
    resumed = json.loads(extract(SAMPLE, "-o", "c", *whole, "--json").out)
    assert 0 < resumed["reused"] <= 13 * kept  # the last one may be in its place and not in the manifest
    assert files(Path("c")) == files(Path("whole"))


def test_a_cache_of_another_spec(extract: Command, tmp_path: Path) -> None:
    assert extract(SAMPLE, "-o", "c", "--max-length", "16").code == 0
    before = files(tmp_path / "c")
    refused(extract(SAMPLE, "-o", "c", "--max-length", "17"), "preprocessing.max_length: cache has 16, asked for 17")
    refused(extract(SAMPLE, "-o", "c", "--prompt", "say "), "preprocessing.prompt: cache has '', asked for 'say '")
    refused(extract(SAMPLE, "-o", "c", "--dtype", "bfloat16"), "compute_dtype: cache has 'float32', asked for 'bfloat")
    refused(extract(SAMPLE, "-o", "c", "--pooling", "cls"), "features.cls: cache has nothing, asked for")
    assert files(tmp_path / "c") == before


def test_a_truncated_shard(extract: Command, command: Command) -> None:
    extract(SAMPLE, "-o", "c")
    (shard,) = Path("c/features").glob("*.h5")
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    said = f"{shard} has {len(data) - 100:,} bytes, {len(data):,} were committed"
    refused(command("info", "c"), said)
    refused(extract(SAMPLE, "-o", "c"), said)
    found = command("verify", "c")
    assert found.code == 1
    assert said in found.out
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    found = command("verify", "c")
    assert found.code == 1
    assert "its sha256 differs" in found.out
    shard.write_bytes(data)
    assert command("verify", "c").code == 0


@pytest.mark.parametrize("name", ["info", "verify", "relabel", "merge"])
def test_no_cache(command: Command, name: str, tmp_path: Path) -> None:
    extra = {"relabel": [SAMPLE], "merge": ["-o", "out"]}.get(name, [])
    refused(command(name, "nowhere", *extra), "nowhere is not a feature cache")
    refused(command(name, tmp_path, *extra), "is not a feature cache")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["extrct", "x"], "There is no command 'extrct' (did you mean extract?); see embedcache --help"),
        (["zzz"], "There is no command 'zzz'"),
        (["extract", "--pool", "x"], "No such option '--pool'"),
        (["extract", "x", "-o"], "requires an argument"),
        (["extract", "x", "--dtype", "int8"], "'int8' is not one of 'float32', 'bfloat16', 'float16'"),
        (["extract", "x", "--max-length", "many"], "'many' is not a valid integer"),
        (["extract", "x"], "say where the cache goes: -o CACHE; see embedcache extract --help"),
        (["extract", "-o", "c"], "say what to read: INPUT, or --train, --validation and --test"),
        (["relabel", "c"], "say what to read"),
        (["merge", "-o", "c"], "Missing argument 'PARTS...'"),
        (["info"], "Missing argument 'CACHE'"),
        (["extract", SAMPLE, "-o", "c", "--part", "9/8"], "part is '9/8': expected I/N with 1 <= I <= N"),
        (["extract", SAMPLE, "-o", "c", "--pooling", "men"], "unknown pooling 'men': expected one of cls, mean"),
        (["extract", SAMPLE, "-o", "c", "--batch-size", "0"], "positions is 0: expected at least 1"),
        (["extract", SAMPLE, "-o", "c", "--threads", "0"], "threads is 0: expected at least 1"),
        (["extract", SAMPLE, "-o", "c", "--shard-rows", "0"], "rows per shard is 0: expected at least 1"),
        (["extract", SAMPLE, "-o", "c", "--max-length", "1"], "max_length is 1: expected at least 3"),
    ],
)
def test_wrong_flags(command: Command, model: Path, arguments: list[str | Path], said: str, tmp_path: Path) -> None:
    if SAMPLE in arguments:
        arguments = [*arguments, "--model", model]
    refused(command(*arguments), said, code=2)
    assert not list(tmp_path.glob("c/features/*"))


# The program


def program(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "embedcache", *map(str, arguments)], capture_output=True, text=True, check=False,
        env={**os.environ, **environment}, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("name", [None, *cli.commands])
def test_help(command: Command, name: str | None) -> None:
    said = command(*([name] if name else []), "--help")
    assert (said.code, said.err) == (0, [])
    assert said.out.startswith("Usage: embedcache")
    assert "\x1b" not in said.out
    if name is None:
        assert all(f"\n  {each}" in said.out for each in cli.commands)
        shown = {line.split()[0]: line for line in said.out.split("Commands:\n")[1].splitlines()}
        assert not [name for name in CACHE_COMMANDS if shown[name].endswith("...")]  # what they do is said whole


def test_help_costs_little() -> None:
    """What it costs is what it imports: of other people's packages, click alone."""
    code = """
import sys
before, sys.argv = set(sys.modules), ["embedcache", "--help"]
from embedcache.__main__ import main
try:
    main()
except SystemExit:
    packages = {name.partition(".")[0] for name in set(sys.modules) - before}
    print(*sorted(packages - sys.stdlib_module_names))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "click embedcache"


def test_no_color_and_no_terminal(model: Path, tmp_path: Path) -> None:
    """No escape codes and no progress bar where nobody looks; one status for the shell."""
    done = program("extract", SAMPLE, "-o", tmp_path / "c", "--model", model, NO_COLOR="1")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stderr
    assert all(line.startswith("note: ") for line in done.stderr.splitlines())
    wrong = program("info", tmp_path / "none", NO_COLOR="1")
    assert (wrong.returncode, wrong.stdout, len(wrong.stderr.splitlines())) == (1, "", 1)
    assert program("--version").stdout.startswith("embedcache, version ")


@pytest.mark.parametrize("interrupted", [True, False])
def test_ctrl_c_before_and_after_the_work(
    interrupted: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line while the program starts; nothing at all while it closes down."""
    from embedcache import __main__, cli

    def work() -> int:
        if interrupted:
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(cli, "run", work)
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        with pytest.raises(SystemExit) as stop:
            __main__.main()
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (stop.value.code, heard) == (interrupted, [])
    assert capsys.readouterr().err == "interrupted\n" * interrupted


def test_ctrl_c_in_the_middle_of_an_extraction(command: Command, model: Path, tmp_path: Path) -> None:
    """Exit status 1 and a line on how to go on; what is resumed equals the uninterrupted, byte for byte."""
    source = tmp_path / "in.csv"
    words = tiny_models.WORDS
    texts = [f"{words[at % 23]} {words[at % 19]} {words[at // 7 % 17]} {at}" for at in range(2500)]
    source.write_text("text,label\n" + "".join(f"{text},{at % 2}\n" for at, text in enumerate(texts)))
    arguments = [source, "--model", model, "--shard-rows", "101", "--threads", "1", "--batch-size", "64"]
    child = subprocess.Popen(
        [sys.executable, "-m", "embedcache", "extract", *map(str, arguments), "-o", str(tmp_path / "c")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list(tmp_path.glob("c/features/*.h5"))) < 3:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (1, "")
    said = [line for line in err.splitlines() if line and not line.startswith("note: ")]
    assert len(said) == 1, err
    assert "new rows are committed in" in said[0]
    assert "run the same command again to go on from there" in said[0]
    with contextlib.suppress(OSError):
        assert not list((tmp_path / "c").rglob("*.tmp"))
    for name in ("c", "whole"):
        done = command("extract", *arguments, "-o", tmp_path / name, "--json")
        assert done.code == 0, done.err
        assert (json.loads(done.out)["reused"] >= 200) == (name == "c")
    assert files(tmp_path / "c") == files(tmp_path / "whole")
