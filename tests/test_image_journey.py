"""The whole way of pictures: a folder -> features -> head -> report -> labels of other files."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tiny_pictures
from PIL import Image

import embedcache as ec
from embedcache.cli import run
from embedcache.errors import BackboneError, InputError
from embedcache.pictures import canonical, decode, size_of
from embedcache.report import report

CLASSES = ("cat", "dog", "emu")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pictures.build("vit", tmp_path_factory.mktemp("model") / "vit")


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of splits and classes: pictures whose brightness tells their class."""
    root = tmp_path_factory.mktemp("data") / "pets"
    for number in range(48):
        split, name = ("train", "test")[number % 4 == 3], CLASSES[number % 3]
        dark = np.asarray(decode(tiny_pictures.picture(number))).astype(int) // 4 + 80 * (number % 3)
        path = root / split / name / f"{number}.{'jpg' if number % 5 > 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(dark.astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def run_folder(vit: Path, pets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache ``c`` of the pictures with their contents, and a head ``r`` that was trained on it."""
    root = tmp_path_factory.mktemp("run")
    command("extract", pets, "-o", root / "c", "--model", vit, "--device", "cpu", "--keep-inputs")
    command("train", root / "c", "-o", root / "r", "--device", "cpu")
    return root


def command(*words: object, code: int = 0) -> str:
    """Run a command, and return what it prints, to stdout and then to stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert run([str(word) for word in words]) == code, out.getvalue() + err.getvalue()
    return out.getvalue() + err.getvalue()


def test_a_folder_is_extracted_trained_and_predicted(run_folder: Path, pets: Path) -> None:
    again = command("extract", pets, "-o", run_folder / "c", "--model", "unused", "--device", "cpu", code=1)
    assert "unused" in again
    cache = ec.FeatureCache.open(run_folder / "c")
    assert cache.class_names == CLASSES
    assert cache.ids()[0] == "pets/train/cat/0.png"
    lines = command("predict", run_folder / "r", pets / "test").splitlines()
    predicted = [line.split(",")[:2] for line in lines if line.startswith("test/")]
    assert len(predicted) == 12
    assert sum(name.split("/")[1] == label for name, label in predicted) > 8


def test_probabilities_are_averaged_over_views_where_a_head_has_them(
    vit: Path, pets: Path, run_folder: Path, tmp_path: Path
) -> None:
    """The commands give what Python gives; without views they refuse. What is said of a run is for pictures."""
    cache, head = tmp_path / "c", tmp_path / "r"
    command("extract", pets, "-o", cache, "--model", vit, "--device", "cpu", "--views", 2)
    said = command("train", cache, "-o", head, "--device", "cpu")
    assert f"try  embedcache predict {head} picture.jpg" in said
    card = (head / "README.md").read_text("utf-8")
    assert "embedcache predict RUN picture.jpg" in card
    assert "--text" not in card
    picture = pets / "test" / "cat" / "3.jpg"
    written = [command("predict", head, picture, "--device", "cpu", *more) for more in ((), ("--average-views",))]
    plain, averaged = (probabilities_of(line) for line in written)
    predictor = ec.Predictor.load(head, device="cpu", average_views=True)
    assert averaged == pytest.approx(list(predictor([picture])[0].probabilities.values()), abs=1e-5)
    assert plain != pytest.approx(averaged, abs=1e-4)
    told = command("evaluate", head, cache, "--json")
    assert told != command("evaluate", head, cache, "--json", "--average-views")
    refused = command("predict", run_folder / "r", picture, "--average-views", "--device", "cpu", code=2)
    assert "no views to average over: train it on one made by extract --views N" in refused


def probabilities_of(table: str) -> list[float]:
    """Return the probabilities of the one row of a table that ``predict`` wrote."""
    (row,) = (line for line in table.splitlines() if line.split(",")[0].endswith(".jpg"))
    return [float(cell) for cell in row.split(",")[4:]]  # behind id, label, confidence, margin


def test_files_are_predicted_by_their_names(run_folder: Path, pets: Path, tmp_path: Path) -> None:
    files = sorted(pets.glob("test/*/*"))[:3]
    command("predict", run_folder / "r", *files, "-o", tmp_path / "p.jsonl")
    read = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["id"] for row in read] == list(map(str, files))
    table = tmp_path / "new.csv"
    table.write_text("scan\n" + "".join(f"{file}\n" for file in files))
    assert "lies outside of the folder" in command("predict", run_folder / "r", table, code=1)
    out = command("predict", run_folder / "r", table, "--image-column", "scan", "--allow-outside")
    assert [line.split(",")[1] for line in out.splitlines()[-3:]] == [row["label"] for row in read]


def test_a_head_on_pictures_takes_no_texts(run_folder: Path, tmp_path: Path) -> None:
    assert "--text" in command("predict", run_folder / "r", "--text", "a film", code=2)
    texts = tmp_path / "a.csv"
    texts.write_text("text\na film\n")
    assert "a film is not there" in command("predict", run_folder / "r", texts, "--image-column", "text", code=1)
    predictor = ec.Predictor.load(run_folder / "r", device="cpu")
    with pytest.raises(InputError, match="the head reads rows of the kind image, and these are text"):
        list(predictor.stream_examples(ec.load_examples(texts, labels="none")))


def test_a_predictor_takes_paths_pixels_and_bytes(run_folder: Path, pets: Path) -> None:
    predictor = ec.Predictor.load(run_folder / "r", device="cpu")
    file = sorted(pets.glob("test/*/*.png"))[0]
    pixels = np.asarray(Image.open(file))
    given: list[Any] = [str(file), file, file.read_bytes(), pixels, Image.open(file)]
    labels = {(prediction.label, prediction.confidence) for prediction in predictor(given)}
    assert len(labels) == 1
    for wrong, reason in (
        (str(file), "got one path: expected a list of images"),
        ([file, "none.png"], "row 1: none.png is not there"),
        ([pixels.astype(float)], "row 0: 'image' is an array of float64"),
    ):
        with pytest.raises(InputError, match=reason):
            predictor(wrong)  # type: ignore[arg-type]


def test_a_second_extraction_computes_only_what_is_new(vit: Path, pets: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(pets, tmp_path / "pets"))
    first = ec.extract(data, output_dir=tmp_path / "c", model=vit, device="cpu")
    before = {key.tobytes() for key in first.stored_keys()}
    shutil.copy(data / "train/cat/0.png", data / "train/cat/copy.png")
    (data / "train/cat/new.png").write_bytes(tiny_pictures.picture(99))
    again = ec.extract(data, output_dir=tmp_path / "c", model=vit, device="cpu")
    assert (first.n_rows, again.n_rows) == (48, 50)
    assert len(again.stored_keys()) == len(before) + 1
    table = tmp_path / "labels.csv"
    files = sorted(data.glob("*/*/*"))
    table.write_text("image,label\n" + "".join(f"{file},{file.stem[-1]}\n" for file in files))
    command("relabel", tmp_path / "c", table, "--allow-outside")
    assert len(ec.FeatureCache.open(tmp_path / "c").class_names) > 3


def test_thumbnails_of_mistakes(run_folder: Path, tmp_path: Path) -> None:
    cache = ec.FeatureCache.open(run_folder / "c")
    grid = ["majority"]
    mistakes = ec.sweep(cache, grid, output_dir=tmp_path / "s", folds=2, progress=False).summary["mistakes"]["shown"]
    assert mistakes
    for mistake in mistakes:
        small = base64.b64decode(mistake["image"].removeprefix("data:image/png;base64,"))
        assert max(size_of(small)) <= 96
        assert mistake["text"] is None
    assert 'src="data:image/png;base64,' in report(tmp_path / "s", tmp_path / "page.html")


def test_features_for_scikit_learn(vit: Path, pets: Path, tmp_path: Path) -> None:
    files = sorted(pets.glob("test/*/*"))
    extractor = ec.FeatureExtractor(vit, cache_dir=tmp_path, device="cpu").fit(files)
    features = extractor.transform(list(map(str, files)))
    assert features.shape == (12, 22)
    pixels = [np.asarray(decode(file.read_bytes())) for file in files]
    np.testing.assert_array_equal(
        extractor.transform(pixels), extractor.transform([canonical(each) for each in pixels])
    )
    same = np.stack([pixels[0], pixels[0][::-1]])
    assert extractor.transform(same).shape == (2, 22)
    np.testing.assert_array_equal(extractor.transform([Image.open(files[0])]), extractor.transform(same[:1]))
    for wrong, reason in (
        ([], "there are no images"),
        (str(files[0]), "X is one path: expected a list"),
        ([*files, "none.png"], r"X\[12\] is 'none.png': none.png is not there"),
    ):
        with pytest.raises(InputError, match=reason):
            extractor.transform(wrong)


def test_a_pipeline_of_pictures(vit: Path, pets: Path) -> None:
    files = sorted(pets.glob("train/*/*"))
    labels = [CLASSES.index(file.parent.name) for file in files]
    pipeline = ec.ImageClassificationPipeline(vit, num_classes=3, device="cpu")
    pipeline.prepare_data(files[::2], labels[::2], files[1::2], labels[1::2])
    pipeline.train(num_epochs=20, learning_rate=0.05)
    classes, probabilities = pipeline.predict(files)
    assert probabilities.shape == (36, 3)
    assert (classes == labels).mean() > 0.6
    with pytest.raises(InputError, match=r"images: image 1 is .none.png.: none.png is not there"):
        pipeline.predict([files[0], "none.png"])


def test_models_are_given_what_they_read(vit: Path, pets: Path, tmp_path: Path) -> None:
    texts = tmp_path / "a.csv"
    texts.write_text("text,label\na,x\nb,y\n")
    cache = tmp_path / "c"
    assert "reads images, not texts" in command("extract", texts, "-o", cache, "--model", vit, code=1)
    bert = tiny_models.build("bert", tmp_path / "bert")
    assert "reads texts, not images" in command("extract", pets, "-o", cache, "--model", bert, code=1)
    assert not cache.exists()


def test_an_interrupted_extraction_goes_on(
    vit: Path, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One picture cannot be read any more when its turn comes: what was committed stays, and its bits are the same."""
    data = Path(shutil.copytree(pets, tmp_path / "pets"))
    whole = ec.extract(data, output_dir=tmp_path / "whole", model=vit, device="cpu", rows_per_shard=7)
    examples = ec.load_examples(data)
    last = sorted(data.glob("train/emu/*"))[-1]
    moved = last.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=f"{last.name}: cannot be read any more"):
        ec.extract(examples, output_dir=tmp_path / "c", model=vit, device="cpu", rows_per_shard=7)
    moved.rename(last)
    cache = ec.extract(data, output_dir=tmp_path / "c", model=vit, device="cpu", rows_per_shard=7)
    np.testing.assert_array_equal(cache.features(), whole.features())


def test_bad_pictures_are_set_aside_on_the_way(vit: Path, pets: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(pets, tmp_path / "pets"))
    (data / "train/cat/broken.png").write_bytes(b"no picture")
    assert "train/cat/broken.png is not a picture" in command("extract", data, "-o", tmp_path / "c", code=1)
    command("extract", data, "-o", tmp_path / "c", "--model", vit, "--device", "cpu", "--on-bad-row", "skip")
    assert ec.FeatureCache.open(tmp_path / "c").n_rows == 48
    assert "broken.png" in (tmp_path / "c.quarantine.jsonl").read_text()


def test_a_model_of_both_is_told_which(pets: Path, tmp_path: Path) -> None:
    clip = tiny_pictures.build("clip", tmp_path / "clip")
    files = sorted(pets.glob("test/*/*"))
    extractor = ec.FeatureExtractor(clip, cache_dir=tmp_path / "f", device="cpu", content="image").fit(files)
    assert extractor.transform(files).shape == (12, 22)
    pipeline = ec.ImageClassificationPipeline(clip, num_classes=2, device="cpu")
    pipeline.prepare_data(files[:4], [0, 1, 0, 1])
    with pytest.raises(BackboneError, match="reads images, not texts"):
        ec.TextClassificationPipeline(tiny_pictures.build("vit", tmp_path / "vit"), num_classes=2, device="cpu")
