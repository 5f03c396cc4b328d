"""Pictures as rows: the same keys whatever they come from, files that are not copied, bad ones that are bad rows."""

from __future__ import annotations

import csv
import io
import json
import sys
import tarfile
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from embedcache.dataset import Examples, InFiles, Packed
from embedcache.errors import BadRowsError, InputError, MissingExtraError, SpecError
from embedcache.examples import CONTENTS, content, load_examples
from embedcache.fingerprint import row_key
from embedcache.pictures import canonical

CLASSES = ("cat", "dog")
RNG = np.random.default_rng(11)
PIXELS = [RNG.integers(0, 256, (5, 7, 3), np.uint8) for _ in range(6)]


def saved(pixels: Any, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


FILES = [saved(pixels, "JPEG" if number % 2 else "PNG") for number, pixels in enumerate(PIXELS)]
NAMES = [f"{CLASSES[number // 3]}/{number}.{'jpg' if number % 2 else 'png'}" for number in range(6)]
KEYS = np.array([list(row_key(file)) for file in FILES], np.uint8)


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``pets/cat/0.png`` and so on: three pictures of each class."""
    for name, file in zip(NAMES, FILES, strict=True):
        put(tmp_path / "pets" / name, file)
    return tmp_path / "pets"


def table(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    if path.suffix == ".jsonl":
        return put(path, "".join(json.dumps(row) + "\n" for row in rows))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return put(path, text.getvalue())


def rows(column: str, values: Sequence[object]) -> list[dict[str, object]]:
    return [{column: value, "label": CLASSES[number // 3]} for number, value in enumerate(values)]


def tar(path: Path, members: Sequence[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def check(examples: Examples) -> Examples:
    """The six pictures, their classes and nothing else."""
    assert examples.kind == "image"
    np.testing.assert_array_equal(examples.keys, KEYS)
    assert list(examples.contents()) == FILES
    assert list(examples.contents([1, 4])) == [FILES[1], FILES[4]]
    assert examples.targets is not None
    assert (examples.class_names, examples.targets.tolist()) == (CLASSES, [0, 0, 0, 1, 1, 1])
    return examples


# The same pictures from everywhere.


def test_a_folder(folder: Path) -> None:
    examples = check(load_examples(folder))
    assert not [note for note in examples.notes if "column" in note]  # a folder's columns are ours: nothing is guessed
    check(load_examples(folder, kind="image"))
    check(load_examples([str(folder)], image_column="image", label_column="label"))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
@pytest.mark.parametrize("column", ["image", "img", "file_name", "path"])
def test_a_table_of_paths_relative_to_itself(folder: Path, name: str, column: str) -> None:
    check(load_examples(table(folder / name, rows(column, NAMES))))
    check(load_examples(table(folder.parent / name, rows(column, [f"pets/{name}" for name in NAMES]))))


def test_a_column_of_another_name_must_be_named(folder: Path) -> None:
    path = table(folder / "a.csv", rows("scan", NAMES))
    assert load_examples(path).kind == "text"
    check(load_examples(path, image_column="scan"))
    check(load_examples(path, kind="image"))
    texts = load_examples(table(folder / "b.csv", rows("path", ["a text"] * 6)))
    assert texts.kind == "text"
    assert load_examples(table(folder / "c.csv", rows("path", NAMES)), text_column="path").kind == "text"


def test_a_table_of_captions_and_pictures_is_read_as_text_unless_told(folder: Path) -> None:
    both = [{"image": file, "text": f"caption {number}", "label": "x"} for number, file in enumerate(FILES)]
    assert load_examples(both).kind == "text"
    assert load_examples(both, image_column="image").kind == "image"
    assert load_examples(both, kind="image").kind == "image"
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": [b"not declared to be text"], "label": ["x"]}), folder / "b.parquet")
    with pytest.raises(InputError, match="the column 'text' is of type binary, expected text"):
        load_examples(folder / "b.parquet")


def test_objects(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(load_examples(rows("image", FILES)))
    check(load_examples(rows("image", [folder / name for name in NAMES]), kind="image"))
    check(load_examples(rows("image", [{"bytes": file, "path": None} for file in FILES])))
    check(load_examples(rows("image", [{"bytes": None, "path": str(folder / name)} for name in NAMES])))
    monkeypatch.chdir(folder)
    examples = load_examples(rows("image", NAMES))
    monkeypatch.chdir(folder.parent)
    check(examples)


def test_pixels(folder: Path) -> None:
    del folder
    expected = [canonical(pixels) for pixels in PIXELS]
    for values in (PIXELS, [Image.fromarray(pixels) for pixels in PIXELS]):
        examples = load_examples(rows("image", values))
        assert examples.kind == "image"
        assert list(examples.contents()) == expected
        assert [key.tobytes() for key in examples.keys] == list(map(row_key, expected))


def test_a_frame(folder: Path) -> None:
    pandas = pytest.importorskip("pandas")
    check(load_examples(pandas.DataFrame(rows("image", FILES))))
    check(load_examples(pandas.DataFrame(rows("image", [str(folder / name) for name in NAMES]))))
    assert load_examples(pandas.DataFrame(rows("photo", [Image.fromarray(p) for p in PIXELS]))).kind == "image"


@pytest.mark.parametrize("values", ["paths", "bytes", "structs"])
def test_parquet(folder: Path, values: str) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    given: dict[str, list[Any]] = {
        "paths": NAMES,
        "bytes": FILES,
        "structs": [{"bytes": file, "path": name} for file, name in zip(FILES, NAMES, strict=True)],
    }
    path = folder / "a.parquet"
    parquet.write_table(arrow.table({"image": given[values], "label": [name[:3] for name in NAMES]}), path)
    check(load_examples(path))
    check(load_examples(path, image_column="image"))
    column = parquet.read_table(path).rename_columns(["anything", "label"])
    parquet.write_table(column, path)
    assert (load_examples(path).kind == "image") is (values != "paths")


def test_a_dataset(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    for values in ([str(folder / name) for name in NAMES], [{"bytes": file, "path": None} for file in FILES]):
        columns = {"image": values, "label": [0, 0, 0, 1, 1, 1]}
        check(load_examples(datasets.Dataset.from_dict(columns, features=features)))
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
    check(load_examples(path))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_file_as_webdataset_writes_it(tmp_path: Path, mode: str) -> None:
    for ending, label in (
        ("cls", lambda number: CLASSES[number // 3].encode()),
        ("txt", lambda number: CLASSES[number // 3].encode() + b"\n"),
        ("json", lambda number: json.dumps({"label": CLASSES[number // 3], "width": 7}).encode()),
    ):
        members = []
        for number, name in enumerate(NAMES):
            members += [(f"set/{number:03}.{name[-3:]}", FILES[number]), (f"set/{number:03}.{ending}", label(number))]
        path = tar(tmp_path / ("a.tar.gz" if "gz" in mode else "a.tar"), members, mode)
        examples = check(load_examples(path, id_column="__key__"))
        assert examples.ids[1] == "set/001"


def test_an_imagefolder_with_a_table(folder: Path) -> None:
    """As the library datasets reads it: the table says which pictures there are."""
    listed = [{"file_name": name, "label": CLASSES[number // 3]} for number, name in enumerate(NAMES)]
    for name in ("metadata.csv", "metadata.jsonl"):
        path = table(folder / name, [{**row, "text": "a caption"} for row in listed])
        check(load_examples(folder))
        path.unlink()


def test_a_split_of_tables(tmp_path: Path) -> None:
    for split, places in (("train", (0, 1, 3)), ("test", (2, 4, 5))):
        for place in places:
            put(tmp_path / split / f"{place}.png", FILES[place])
        table(
            tmp_path / split / "metadata.csv",
            [{"file_name": f"{place}.png", "label": CLASSES[place // 3]} for place in places],
        )
    examples = load_examples(tmp_path)
    assert examples.split_sizes() == {"train": 3, "test": 3}
    assert list(examples.contents()) == [FILES[place] for place in (0, 1, 3, 2, 4, 5)]


# Folders.


def test_folders_of_splits(tmp_path: Path) -> None:
    for split, name, file in (("val", "dog/deep/er/1.png", 0), ("train", "cat/2.PNG", 2), ("train", "dog/3.jpeg", 1)):
        put(tmp_path / split / name, FILES[file])
    examples = load_examples(tmp_path)
    assert examples.split_names == ("train", "validation")
    assert examples.split.tolist() == [0, 0, 1]
    assert examples.class_names == CLASSES
    assert examples.targets is not None
    assert examples.targets.tolist() == [0, 1, 1]
    assert list(examples.contents()) == [FILES[2], FILES[1], FILES[0]]
    assert load_examples(tmp_path, split="50/50", split_seed=1).split_names == ("train", "test")
    alone = load_examples(train=tmp_path / "train", test=tmp_path / "val")
    assert alone.split_sizes() == {"train": 2, "test": 1}


def test_class_folders_are_names(tmp_path: Path) -> None:
    """Numbers would be sorted by value, and fractions would be a regression (vision#2831)."""
    for number, name in enumerate(("1", "10", "2", "0.5")):
        put(tmp_path / name / "a.png", FILES[number])
    examples = load_examples(tmp_path)
    assert (examples.task, examples.class_names) == ("classification", ("0.5", "1", "10", "2"))
    for number, name in enumerate(("0.25", "0.5")):
        put(tmp_path / "fractions" / name / "a.png", FILES[number])
    examples = load_examples(tmp_path / "fractions")
    assert (examples.task, examples.class_names) == ("classification", ("0.25", "0.5"))


def test_what_is_no_class_and_no_picture(folder: Path) -> None:
    for name in (".ipynb_checkpoints/0.png", "cat/.hidden.png", "__MACOSX/0.png", "cat/Thumbs.db", ".git/x.jpg"):
        put(folder / name, FILES[0])
    put(folder / "cat/notes.txt", "a note")
    put(folder / "cat/0.HEIC", b"")
    (folder / "cow/deep").mkdir(parents=True)
    examples = check(load_examples(folder))
    assert f"{folder}: the folder 'cow' holds no picture: it is not a class" in examples.notes
    (left_out,) = [note for note in examples.notes if "left out" in note]
    assert "2 files left out" in left_out
    assert ".txt 1" in left_out
    assert ".heic 1" in left_out


def test_a_folder_without_classes(folder: Path) -> None:
    examples = load_examples(folder / "cat", labels="none")
    assert (examples.task, list(examples.contents())) == (None, FILES[:3])
    with pytest.raises(InputError, match="cannot tell which column is the label"):
        load_examples(folder / "cat")
    put(folder / "loose.png", FILES[0])
    with pytest.raises(BadRowsError, match="picture 6: the label 'label' is missing"):
        load_examples(folder)


def test_a_folder_that_leads_into_itself(folder: Path) -> None:
    (folder / "cat" / "again").symlink_to(folder)
    examples = load_examples(folder)
    assert len(examples) < 30
    (folder / "dog" / "link.png").symlink_to(folder / NAMES[0])
    assert load_examples(folder).n_unique == 6


@pytest.mark.parametrize("names", [(), ("a.txt",), (".a.png",)])
def test_a_folder_without_pictures(tmp_path: Path, names: Sequence[str]) -> None:
    for name in names:
        put(tmp_path / "x" / name, FILES[0])
    (tmp_path / "x").mkdir(exist_ok=True)
    with pytest.raises(InputError, match="x: is a directory without pictures: expected a file, or a folder"):
        load_examples(tmp_path / "x")


# Pictures in files are not copied.


def test_files_stay_where_they_are(folder: Path) -> None:
    examples = load_examples(folder)
    held = examples.packed_contents
    assert isinstance(held, InFiles)
    assert [held.path(row) for row in (0, 5)] == [str(folder / NAMES[0]), str(folder / NAMES[5])]
    assert held[-1] == FILES[5]
    some = held.select(np.array([1, 3]))
    assert (list(some), some.lengths().tolist()) == ([FILES[1], FILES[3]], [len(FILES[1]), len(FILES[3])])
    put(folder / NAMES[1], saved(PIXELS[0] // 2))
    assert list(examples.contents([0, 2])) == [FILES[0], FILES[2]]
    with pytest.raises(InputError, match=r"1\.jpg: its bytes changed since the input was read: read the input again"):
        list(examples.contents())
    (folder / NAMES[1]).unlink()
    with pytest.raises(InputError, match=r"1\.jpg: cannot be read any more: No such file"):
        list(examples.select(np.array([1, 2])).contents())


def test_paths_and_bytes_in_one_column(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "MOST_HELD", 10)
    mixed = [FILES[0], folder / NAMES[1], PIXELS[2], str(folder / NAMES[3]), FILES[4], {"bytes": FILES[5], "path": "x"}]
    examples = load_examples(rows("image", mixed), kind="image")
    expected = [*FILES[:2], canonical(PIXELS[2]), *FILES[3:]]
    assert list(examples.contents()) == expected
    assert [key.tobytes() for key in examples.keys] == list(map(row_key, expected))


def test_memory_over_many_paths_stays_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(tmp_path / "a.png", FILES[0])
    monkeypatch.setattr(content, "_file", lambda path: file.read_bytes() + path.encode()[-12:])
    monkeypatch.setattr(content.pictures, "decode", lambda content, _: None)

    def peak(number: int) -> int:
        path = put(tmp_path / "a.csv", "image,label\n" + "".join(f"{row:08}.png,{row % 2}\n" for row in range(number)))
        tracemalloc.start()
        try:
            assert load_examples(path).n_unique == number
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert (peak(20_000) - peak(5_000)) / 15_000 < 320, "bytes a row: its path, its key and transients"


# While pictures are read, a bar counts them.


class Drawn:
    """Stands for tqdm, and keeps what it was told."""

    made: ClassVar[list[Drawn]] = []

    def __init__(self, **options: object) -> None:
        self.options, self.counted = options, 0
        self.made.append(self)

    def __enter__(self) -> Drawn:
        return self

    def __exit__(self, *_: object) -> None:
        self.counted *= 1000  # it was closed

    def update(self, count: int) -> None:
        self.counted += count


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_counts_the_pictures_that_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    paths = [{"image": str(folder / name)} for name in NAMES]
    given = put(tmp_path / "rows.csv", "image\n" + "".join(f"{row['image']}\n" for row in paths))
    monkeypatch.setattr("tqdm.auto.tqdm", Drawn)
    monkeypatch.setattr(Drawn, "made", [])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    load_examples(folder)
    load_examples(paths[:3], labels="none", allow_outside=True)
    load_examples(given, labels="none", allow_outside=True)
    load_examples([{"text": "a"}], labels="none")
    shown = [(bar.options["total"], bar.counted) for bar in Drawn.made]
    count = len(NAMES)
    assert shown == ([(count, 1000 * count), (3, 3000), (None, 1000 * count)] if terminal else [])
    assert all((bar.options["unit"], bar.options["delay"]) == (" pictures", 1) for bar in Drawn.made)


# Bad pictures are bad rows.

BAD = [
    (FILES[0][:60], r"is truncated|is a broken picture"),
    (b"", "is empty"),
    (b"a text", "is not a picture in a format that is read"),
]


@pytest.mark.parametrize(("data", "reason"), BAD)
def test_a_bad_file_is_a_bad_row(folder: Path, data: bytes, reason: str) -> None:
    put(folder / "dog/3.jpg", data)
    with pytest.raises(BadRowsError, match=rf"1 bad row: .*pets, picture 3: dog/3\.jpg ({reason})") as caught:
        load_examples(folder)
    assert "\n" not in str(caught.value)
    quarantine = folder.parent / "q.jsonl"
    examples = load_examples(folder, on_bad_row="skip", quarantine=quarantine)
    assert list(examples.contents()) == [*FILES[:3], *FILES[4:]]
    (line,) = map(json.loads, quarantine.read_text().splitlines())
    assert line["raw"] == {"image": "dog/3.jpg", "label": "dog", "file_name": "pets/dog/3.jpg"}


def test_bad_cells_are_bad_rows(folder: Path) -> None:
    good = folder / NAMES[0]
    (folder / "pipe.png").symlink_to("/dev/zero")
    for cell, reason in (
        ("nothing.png", r"a\.jsonl:2: nothing.png is not there \(looked for .*pets/nothing.png\)"),
        (None, "'image' is missing"),
        ("", "'image' is missing"),
        (7, "'image' is of type int: expected an image file's bytes"),
        ("https://example.org/a.png", "is an address: download the pictures"),
        ("pipe.png", r"pipe.png is not a regular file"),
        ("cat", r"cat is not a regular file"),
        ("a\0.png", "cannot be read"),
    ):
        path = table(folder / "a.jsonl", [{"image": str(good), "label": "x"}, {"image": cell, "label": "y"}])
        with pytest.raises(BadRowsError, match=reason):
            load_examples(path, image_column="image")


def test_a_bad_picture_in_memory(tmp_path: Path) -> None:
    with pytest.raises(BadRowsError, match=r"input, row 1: 'image' (is truncated|is a broken picture)"):
        load_examples(rows("image", [FILES[0], FILES[1][:200]]))
    with pytest.raises(BadRowsError, match=r"'image' is an array of float32"):
        load_examples(rows("image", [FILES[0], PIXELS[0].astype(np.float32)]), kind="image")
    quarantine = tmp_path / "q.jsonl"
    load_examples(rows("image", [*FILES[:5], b"x" * 5000]), on_bad_row="skip", quarantine=quarantine)
    assert json.loads(quarantine.read_text())["raw"]["image"] == "5,000 bytes"


def test_a_path_outside_of_the_table_s_folder(folder: Path) -> None:
    outside = put(folder.parent / "other" / "a.png", FILES[0])
    inside = folder / NAMES[1]
    for cell in (str(outside), "../other/a.png", "cat/../../other/a.png"):
        path = table(folder / "a.csv", [{"image": str(inside), "label": "x"}, {"image": cell, "label": "y"}])
        with pytest.raises(BadRowsError, match=r"lies outside of the folder .*pets: .*--allow-outside"):
            load_examples(path)
        examples = load_examples(path, allow_outside=True)
        assert list(examples.contents()) == [FILES[1], FILES[0]]
    link = folder.parent / "link"
    link.symlink_to(folder)
    path = table(link / "a.csv", [{"image": str(inside), "label": "x"}, {"image": NAMES[0], "label": "y"}])
    assert len(load_examples(path)) == 2


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.txt", b"x")], "no picture among its first 1 row"),
        ([], "no picture"),
        ([("a.png", FILES[0]), ("a.cls", b"x"), ("b.cls", b"y")], "row 1: 'image' is missing"),
        ([("a.png", FILES[0]), ("a.json", b"[1]")], "row 0: a.json: expected a JSON object"),
        ([("a.png", FILES[0]), ("a.cls", b"\xff")], "row 0: a.cls: .*utf-8"),
    ],
)
def test_bad_tar_files(tmp_path: Path, members: Sequence[tuple[str, bytes]], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        load_examples(tar(tmp_path / "a.tar", members), labels="none")


def test_a_broken_tar_file(tmp_path: Path) -> None:
    whole = tar(tmp_path / "a.tar", [(f"{number}.png", FILES[number]) for number in range(6)]).read_bytes()
    for data in (whole[:700], b"not a tar file" * 100, whole[:2000]):
        with pytest.raises(InputError, match="cannot be read as a tar file"):
            load_examples(put(tmp_path / "b.tar", data), labels="none")


def test_files_among_the_inputs(folder: Path) -> None:
    files = [folder / name for name in NAMES]
    examples = load_examples(files, labels="none")
    np.testing.assert_array_equal(examples.keys, KEYS)
    assert [examples.ids[row] for row in range(6)] == list(map(str, files))
    alone = load_examples(str(files[2]), labels="none")
    assert (alone.ids[0], list(alone.contents())) == (str(files[2]), [FILES[2]])
    more = load_examples([files[0], folder / "dog"], labels="none")
    assert [more.ids[row] for row in range(4)] == [str(files[0]), "dog/3.jpg", "dog/4.png", "dog/5.jpg"]
    with pytest.raises(BadRowsError, match=r"none\.png, picture 0: .*none\.png is not there"):
        load_examples(folder / "none.png", labels="none")


def test_each_file_is_read_and_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    monkeypatch.setattr(content.pictures, "decode", lambda content, _: decoded.append(content))
    load_examples(folder)
    load_examples(rows("image", FILES))
    assert sorted(decoded) == sorted(FILES * 2)


def test_rows_keep_their_order_on_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content.os, "sched_getaffinity", lambda process: range(7))
    files = [saved(RNG.integers(0, 256, (3 + number % 5, 2 + number % 7, 3), np.uint8)) for number in range(101)]
    for number, file in enumerate(files):
        put(tmp_path / "x" / "ab"[number % 2] / f"{number:03}.png", b"" if number == 50 else file)
    examples = load_examples(tmp_path / "x", on_bad_row="skip", quarantine=tmp_path / "q.jsonl")
    assert list(examples.contents()) == [file for part in (0, 1) for file in files[part::2] if file is not files[50]]
    same = Image.open(io.BytesIO(files[1]))  # read by several threads at once
    assert load_examples(rows("image", [same] * 6)).n_unique == 1


def test_a_missing_pillow_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    content.pictures._openers.cache_clear()
    with pytest.raises(MissingExtraError, match=r"reading pictures needs .*pip install 'embedcache\[vision\]'"):
        load_examples(folder)


# Options.


def test_options_that_contradict_each_other(folder: Path) -> None:
    for options, reason in (
        ({"text_column": "a", "image_column": "b"}, "text_column and image_column were given: a row has one content"),
        ({"kind": "text", "image_column": "b"}, "image_column was given, and kind is 'text'"),
        ({"kind": "sound"}, "kind is 'sound': expected one of text, image"),
    ):
        with pytest.raises(SpecError, match=reason):
            load_examples(folder, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the column 'image' is of type picture, expected text"):
        load_examples(folder, text_column="image")


def test_notes_name_the_pictures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    put(folder / "dog" / "6.png", FILES[0])
    examples = load_examples("pets")
    assert any("'pets/cat/0.png' (cat and dog)" in note for note in examples.notes), examples.notes
    examples = load_examples([{"image": FILES[0], "label": "x"}, {"image": FILES[0], "label": "y"}])
    assert any("a picture of 7 x 5 pixels (x and y)" in note for note in examples.notes)


def test_encode_reads_what_it_is_given(folder: Path) -> None:
    given = [str(folder / NAMES[0]), folder / NAMES[1], FILES[2], PIXELS[3], "none.png"]
    contents, faults = CONTENTS["image"].encode("image", given)
    assert contents == [*FILES[:3], canonical(PIXELS[3]), b""]
    assert [*faults] == [4]


def test_a_planted_fault_is_found(folder: Path) -> None:
    """Files read without a look at their bytes would give other features than their keys say."""

    class Careless(InFiles):
        def _content(self, row: int, held: bytes) -> bytes:
            return Path(held.decode()).read_bytes()

    held = Packed.of([bytes(folder / NAMES[0])])
    put(folder / NAMES[0], FILES[1])
    arguments: Any = (held, np.ones(1, np.bool_), KEYS[:1])

    def read(contents: InFiles) -> Iterator[bytes]:
        yield from contents

    assert list(read(Careless(*arguments))) == [FILES[1]]
    with pytest.raises(InputError, match="its bytes changed"):
        list(read(InFiles(*arguments)))
