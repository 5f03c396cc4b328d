"""Rows in: exactness, splits, labels, bad rows; every format; every refusal."""

from __future__ import annotations

import builtins
import contextlib
import csv
import doctest
import errno
import gzip
import importlib
import io
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedcache.errors import BadRowsError, InputError, InputNotFoundError, MissingExtraError, SpecError
from embedcache.examples import Examples, assign_splits, content, formats, labels, load, load_examples, parse_split
from embedcache.fingerprint import row_key

HARD = [
    "NA",
    "null",
    "None",
    "nan",
    "1",
    "01",
    "1.0",
    "true",
    "  leading and trailing  ",
    "two\nlines",
    "carriage\r\nreturn",
    "lone\rreturn",
    'quoted "words", and a comma',
    '"',
    "tab\tinside",
    "a\x00b",
    "👩‍👩‍👧 emoji",
    "שלום עולם",
    "\u202eabc",
    "\ufeffnot a byte order mark",
    "line\u2028separator\u0085next",
    "=1+1",
    "x" * 1_000_000,
]


def write_csv(path: Path, rows: Sequence[Sequence[str]], delimiter: str = ",", end: str = "\r\n") -> Path:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL).writerows(rows)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_tsv(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    return write_csv(path, rows, "\t", "\n")


def write_jsonl(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    header, *records = rows
    data = "".join(
        json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=False) + "\n" for row in records
    ).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_parquet(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    header, *records = rows
    parquet.write_table(pyarrow.table(dict(zip(header, zip(*records, strict=True), strict=True))), path)
    return path


WRITERS: list[tuple[str, Callable[[Path, Sequence[Sequence[str]]], Path]]] = [
    ("a.csv", write_csv),
    ("a.csv.gz", write_csv),
    ("a.tsv", write_tsv),
    ("a.TSV.GZ", lambda path, rows: write_tsv(path.with_name("a.tsv.gz"), rows).replace(path)),
    ("a.jsonl", write_jsonl),
    ("a.jsonl.gz", write_jsonl),
    ("a.parquet", write_parquet),
]


def put(path: Path, data: str | bytes) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def records(*rows: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"text": text, "label": label} for text, label in rows]


def said(examples: Examples, *words: str) -> bool:
    return any(all(word in note for word in words) for note in examples.notes)


def check_exact(examples: Examples, texts: Sequence[str]) -> None:
    contents = [text.encode() for text in texts]
    assert list(examples.contents()) == contents
    assert [key.tobytes() for key in examples.keys] == [row_key(content) for content in contents]
    assert list(examples.contents(np.arange(1, len(texts), 3))) == contents[1::3]


def test_the_example_in_the_documentation() -> None:
    result = doctest.testmod(load, globs={"load_examples": load_examples})
    assert (result.failed, result.attempted) == (0, 2)


# Exactness


@pytest.mark.parametrize(("name", "write"), WRITERS, ids=[name for name, _ in WRITERS])
def test_hard_texts_come_back_exactly(tmp_path: Path, name: str, write: Callable[..., Path]) -> None:
    path = write(tmp_path / name, [("text", "label"), *((text, str(row % 2)) for row, text in enumerate(HARD))])
    examples = load_examples(tmp_path / name)
    check_exact(examples, HARD)
    assert examples.targets is not None
    assert examples.targets.tolist() == [row % 2 for row in range(len(HARD))]
    assert path is not None


USABLE = st.text(min_size=1, max_size=30).filter(lambda text: not text.isspace())
ROWS = st.lists(st.tuples(USABLE, st.sampled_from(["a", "b", " b", "01", "1"])), min_size=1, max_size=11)


@pytest.mark.parametrize(("name", "write"), WRITERS, ids=[name for name, _ in WRITERS])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS)
def test_any_texts_come_back_exactly(
    tmp_path: Path, name: str, write: Callable[..., Path], rows: list[tuple[str, str]]
) -> None:
    write(tmp_path / name, [("text", "label"), *rows])
    examples = load_examples(tmp_path / name)
    check_exact(examples, [text for text, _ in rows])
    assert examples.targets is not None
    assert [examples.class_names[code] for code in examples.targets] == [label for _, label in rows]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, block=st.sampled_from([1, 2, 3, 5, 4096]), data=st.data())
def test_block_size_changes_nothing(
    tmp_path: Path, rows: list[tuple[str, str]], block: int, data: st.DataObject
) -> None:
    write_csv(tmp_path / "a.csv", [("text", "label"), *rows])
    whole = load_examples(tmp_path / "a.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "BLOCK_ROWS", block)
        patch.setattr(formats, "BLOCK_BYTES", 7 * block)
        cut = load_examples(tmp_path / "a.csv")
        wanted = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1))))
        assert list(cut.contents(wanted)) == [rows[row][0].encode() for row in wanted]
    assert np.array_equal(whole.keys, cut.keys)
    assert whole.class_names == cut.class_names
    assert np.array_equal(whole.targets, cut.targets)  # type: ignore[arg-type]


def test_nul_survives_a_csv_module_that_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_CSV_REFUSES_NUL", True)
    write_csv(tmp_path / "a.csv", [("text", "label"), ("a\0b", "\0"), ("c", "d")])
    examples = load_examples(tmp_path / "a.csv")
    check_exact(examples, ["a\0b", "c"])
    assert examples.class_names == ("\0", "d")


def test_byte_order_mark_and_line_ends(tmp_path: Path) -> None:
    for end in ("\n", "\r\n", "\r"):
        path = put(tmp_path / "a.csv", "\ufefftext,label" + end + "\ufeffone,x" + end + end + "two,y")
        check_exact(load_examples(path, text_column="text"), ["\ufeffone", "two"])
    path = put(tmp_path / "a.jsonl", '\ufeff{"text": "one", "label": 1}\r\n\r\n{"text": "two", "label": 2}')
    check_exact(load_examples(path), ["one", "two"])
    path = put(tmp_path / "a.txt", '\ufeff one \r\n"two"\nthree')
    check_exact(load_examples(path, labels="none"), [" one ", '"two"', "three"])


def test_quotes_as_ordinary_characters(tmp_path: Path) -> None:
    path = put(tmp_path / "a.tsv", 'text\tlabel\n"Hello", she said\t1\n"\t0\n')
    check_exact(load_examples(path, quoting="none"), ['"Hello", she said', '"'])
    with pytest.raises(BadRowsError, match=r"a\.tsv:2: text after a closing quote.*--quoting none"):
        load_examples(path)


def test_the_field_limit_of_others_is_left_alone(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [("text", "label"), ("x" * 200_000, "1"), ("y", "0")])
    before = csv.field_size_limit(777)
    try:
        load_examples(tmp_path / "a.csv")
        assert csv.field_size_limit() == 777
        failures: list[BaseException] = []

        def read() -> None:
            try:
                for _ in range(10):
                    assert len(load_examples(tmp_path / "a.csv")) == 2
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert csv.field_size_limit() == 777
    finally:
        csv.field_size_limit(before)


# Objects


def test_dicts_frames_and_datasets_agree() -> None:
    pandas = pytest.importorskip("pandas")
    datasets = pytest.importorskip("datasets")
    rows = records(("one", "good"), ("NA", "bad"), ("👍 three", "good"))
    expected = load_examples(rows)
    for table in (pandas.DataFrame(rows, index=[7, 7, 7]), datasets.Dataset.from_list(rows), tuple(rows)):
        examples = load_examples(table)
        check_exact(examples, ["one", "NA", "👍 three"])
        assert examples.class_names == expected.class_names == ("bad", "good")
        assert np.array_equal(examples.targets, expected.targets)  # type: ignore[arg-type]
        assert examples.task == "classification"


def test_class_label_names_and_order_are_kept() -> None:
    datasets = pytest.importorskip("datasets")
    names = ["World", "Sports", "Business"]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    rows = {"text": ["a", "b", "c"], "label": [2, 0, -1]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    examples = load_examples(dataset, labels="optional")
    assert examples.class_names == tuple(names)
    assert examples.targets is not None
    assert examples.targets.tolist() == [2, 0, -1]
    assert said(examples, "train has no row of 1 class: 'Sports'")
    with pytest.raises(BadRowsError, match="input, row 2: the label 'label' is missing"):
        load_examples(dataset)
    both = datasets.DatasetDict({"train": dataset.select([0, 1]), "dev": dataset.select([0])})
    examples = load_examples(both)
    assert examples.split_names == ("train", "validation")
    assert examples.split.tolist() == [0, 0, 1]
    assert examples.class_names == tuple(names)


def test_class_label_lists() -> None:
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["b", "a", "c"])
    features = datasets.Features({"text": datasets.Value("string"), "labels": datasets.Sequence(label)})
    dataset = datasets.Dataset.from_dict({"text": ["x", "y"], "labels": [[0, 2], []]}, features=features)
    examples = load_examples(dataset)
    assert (examples.task, examples.class_names) == ("multilabel", ("b", "a", "c"))
    assert examples.targets is not None
    assert examples.targets.tolist() == [[1, 0, 1], [0, 0, 0]]


def test_several_inputs_are_one_after_the_other(tmp_path: Path) -> None:
    first = write_csv(tmp_path / "a.csv", [("text", "label"), ("one", "x"), ("two", "y")])
    second = write_jsonl(tmp_path / "b.jsonl", [("label", "text"), ("x", "three")])
    examples = load_examples([first, str(second), records(("four", "y"))])
    check_exact(examples, ["one", "two", "three", "four"])
    assert list(examples.contents([1, 3])) == [b"two", b"four"]
    assert examples.ids[-1] == "3"


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    examples = load_examples("-", labels="none")
    check_exact(examples, ["one", "two"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "three"}\n')))
    check_exact(load_examples("-", labels="none", format="jsonl"), ["three"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(InputError, match="standard input is empty"):
        load_examples("-", labels="none")
    with pytest.raises(InputError, match="standard input is empty"):
        load_examples("-", labels="none", format="parquet")


@pytest.mark.parametrize(("name", "write"), WRITERS, ids=[name for name, _ in WRITERS])
def test_standard_input_in_every_format(
    tmp_path: Path, name: str, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / name, [("text", "label"), ("one", "x"), ("two", "y"), ("three", "x")]).read_bytes()
    name = name.lower()
    data = gzip.decompress(data) if name.endswith(".gz") else data
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    examples = load_examples("-", format=name.removesuffix(".gz").split(".")[-1])
    check_exact(examples, ["one", "two", "three"])
    assert examples.class_names == ("x", "y")


class Lengths(content.Content):
    """A kind of content that is no text: whole numbers, four bytes each."""

    noun = "length"
    column_names = frozenset(["length", "width"])
    column_kind: content.Kind = "number"

    def encode(self, column: str, values: Sequence[object]) -> tuple[list[bytes], dict[int, str]]:
        faults = {row: f"{column!r} is not a length" for row, value in enumerate(values) if not isinstance(value, int)}
        return [value.to_bytes(4, "little") if isinstance(value, int) else b"" for value in values], faults

    def show(self, content: bytes) -> str:
        return f"{int.from_bytes(content, 'little')} mm"


def test_another_kind_of_content_is_one_more_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(content.CONTENTS, "length", Lengths())
    rows = [{"id": "a", "width": 7, "label": "x"}, {"id": "b", "width": 11, "label": "y"}]
    examples = load_examples([*rows, {"id": "c", "width": 7, "label": "y"}], kind="length")
    assert (examples.kind, list(examples.contents())) == ("length", [b"\x07\0\0\0", b"\x0b\0\0\0", b"\x07\0\0\0"])
    assert said(examples, "length column: 'width' (guessed)")
    assert said(examples, "different labels, for example 7 mm (x and y)")
    for wrong, message in (
        ({"name": "a", "label": "x"}, "cannot tell which column is the length: name it with --length-column"),
        ({"length": "a", "label": "x"}, "input, row 1: 'length' is not a length"),
    ):
        with pytest.raises(InputError, match=message):
            load_examples([{"length": 1, "label": "y"}, wrong] if "length" in wrong else [wrong], kind="length")
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"length": pandas.to_datetime(["2020-01-01"]), "label": ["x"]})
    with pytest.raises(InputError, match=r"the column 'length' is of type datetime64.*, expected length"):
        load_examples(frame, kind="length")


def test_a_missing_pyarrow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'embedcache\[parquet\]'"):
        load_examples(put(tmp_path / "a.parquet", b"PAR1"))


# Columns


@pytest.mark.parametrize(
    ("row", "text", "label"),
    [
        ({"Review": "a", "Sentiment": 1}, "Review", "Sentiment"),
        ({"id": "r1", "headline": "a b", "label": "x"}, "headline", "label"),
        ({"title": "t", "text": "a", "category": "x"}, "text", "category"),
        ({"text": "a", "label": 1, "score": 2}, "text", "label"),
        ({"sentence": "a", "verdict": "x"}, "sentence", "verdict"),
    ],
)
def test_columns_are_guessed_and_said(row: dict[str, Any], text: str, label: str) -> None:
    examples = load_examples([row])
    assert said(examples, f"text column: {text!r} (guessed)")
    assert said(examples, f"label column: {label!r} (guessed)")
    assert list(examples.contents()) == [row[text].encode()]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"question": "a", "sentence": "b", "label": 1},
            {},
            "'question' and 'sentence' could each be the text column",
        ),
        ({"one": "a", "two": "b", "label": 1}, {}, "cannot tell which column is the text.*'one', 'two', 'label'"),
        ({"text": "a", "rating": 1, "topic": 2}, {}, "'rating' and 'topic' could each be the label column"),
        ({"text": "a", "p": 1, "q": 2}, {}, "cannot tell which column is the label.*'text', 'p', 'q'"),
        (
            {"text": "a", "label": 1},
            {"text_column": "Txet"},
            r"no column 'Txet' \(did you mean text\?\): it has 'text', 'label'",
        ),
        ({"text": "a", "label": 1}, {"label_column": "zzz"}, "no column 'zzz': it has 'text', 'label'$"),
        ({"text": "a", "label": 1}, {"label_column": "text", "text_column": "text"}, "'text' has two roles"),
        ({"text": "a", "label": 1}, {"label_column": []}, "label_column is an empty list"),
        ({"text": "a", "label": 1}, {"split_column": "fold"}, "no column 'fold'"),
    ],
)
def test_unclear_columns_are_refused_with_a_list(row: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_examples([row], **options)


def test_a_file_split_at_other_signs_is_explained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'text;label' \(one column with ';' in its name"):
        load_examples(put(tmp_path / "a.csv", "text;label\na;1\n"), text_column="text")


def test_numbers_are_no_text(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": [1, 2], "label": ["a", "b"]})
    with pytest.raises(InputError, match="the column 'text' is of type int64, expected text"):
        load_examples(frame)
    frame.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: the column 'text' is of type int64, expected text"):
        load_examples(tmp_path / "a.parquet")
    with pytest.raises(BadRowsError, match="input, row 1: 'text' holds 5 of type int, expected text"):
        load_examples(records(("fine", 1), (5, 0)))


# Labels


@pytest.mark.parametrize(
    ("cells", "names", "targets"),
    [
        (["10", "9", "-1"], ("-1", "9", "10"), [2, 1, 0]),
        (["10", "1", "02"], ("02", "1", "10"), [2, 1, 0]),
        (["b", "NA", "B"], ("B", "NA", "b"), [2, 1, 0]),
        ([" a", "a", "a "], (" a", "a", "a "), [0, 1, 2]),
        ([10, 9, 9], ("9", "10"), [1, 0, 0]),
        ([True, False, True], ("false", "true"), [1, 0, 1]),
        ([1.0, 0.0, 1.0], ("0", "1"), [1, 0, 1]),
        ([1, True, "1"], ("1", "true"), [0, 1, 0]),
        ([np.int64(3), np.int64(2), 3], ("2", "3"), [1, 0, 1]),
    ],
)
def test_classes(cells: list[Any], names: tuple[str, ...], targets: list[int]) -> None:
    examples = load_examples(records(*((f"row {row}", cell) for row, cell in enumerate(cells))))
    assert examples.task == "classification"
    assert examples.class_names == names
    assert examples.targets is not None
    assert examples.targets.tolist() == targets
    assert examples.targets.dtype == np.int64
    assert not examples.targets.flags.writeable


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=13))
def test_whole_numbers_are_ordered_by_value_however_written(values: list[int]) -> None:
    as_text = load_examples(records(*((f"t{row}", str(value)) for row, value in enumerate(values))))
    as_number = load_examples(records(*((f"t{row}", value) for row, value in enumerate(values))))
    assert as_text.class_names == as_number.class_names == tuple(map(str, sorted(set(values))))
    assert np.array_equal(as_text.targets, as_number.targets)  # type: ignore[arg-type]


def test_known_classes_fix_the_order() -> None:
    rows = records(("a", "x"), ("b", "y"))
    examples = load_examples(rows, class_names=["y", "z", "x"])
    assert examples.class_names == ("y", "z", "x")
    assert examples.targets is not None
    assert examples.targets.tolist() == [2, 0]
    with pytest.raises(InputError, match="1 label in 'label' not among the known classes: 'y'; known are 'x'"):
        load_examples(rows, class_names=["x"])
    examples = load_examples(rows, class_names=["x"], extend_classes=True)
    assert examples.class_names == ("x", "y")
    assert said(examples, "1 new class added: 'y'")


def test_a_bad_row_creates_no_class(tmp_path: Path) -> None:
    rows = [{"text": " ", "label": "ghost"}, {"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    examples = load_examples(rows, on_bad_row="skip", quarantine=tmp_path / "q.jsonl")
    assert examples.class_names == ("x", "y")


def test_sets_of_classes() -> None:
    expected = [[0, 1, 1], [1, 0, 0], [0, 0, 0]]
    lists = [{"text": "a", "labels": ["c", "b", "c"]}, {"text": "b", "labels": ["a"]}, {"text": "c", "labels": []}]
    cells = [{"text": "a", "labels": "c | b"}, {"text": "b", "labels": "a"}, {"text": "c", "labels": ""}]
    flags = [
        {"text": "a", "a": 0, "b": 1, "c": 1},
        {"text": "b", "a": 1, "b": 0, "c": 0},
        {"text": "c", "a": 0, "b": 0, "c": 0},
    ]
    for examples in (
        load_examples(lists),
        load_examples(cells, label_separator="|"),
        load_examples(flags, label_column="a,b,c"),
        load_examples(flags, label_column=["a", "b", "c"], task="multilabel"),
    ):
        assert (examples.task, examples.class_names) == ("multilabel", ("a", "b", "c"))
        assert examples.targets is not None
        assert examples.targets.dtype == np.uint8
        assert examples.targets.tolist() == expected
    examples = load_examples([*lists, {"text": "d"}], labels="optional")
    assert examples.targets is not None
    assert examples.targets[3].tolist() == [255, 255, 255]
    assert examples.labelled().tolist() == [True, True, True, False]
    with pytest.raises(InputError, match="--label-separator"):
        load_examples(cells, task="multilabel")
    with pytest.raises(BadRowsError, match="row 1: the label 'labels' is 5, expected a list"):
        load_examples([lists[0], {"text": "b", "labels": 5}])
    with pytest.raises(BadRowsError, match="row 3: the label 'labels' is missing"):
        load_examples([*lists, {"text": "d"}])
    with pytest.raises(BadRowsError, match="the label 'b' is 2, expected 0 or 1"):
        load_examples([{**flags[0], "b": 2}], label_column="a,b,c", task="multilabel")


def carried(cells: list[Any], folder: Path) -> dict[str, Any]:
    """Return rows with these labels in everything that can carry them; CSV only what has no lists."""
    datasets = pytest.importorskip("datasets")
    pandas = pytest.importorskip("pandas")
    rows = [{"text": f"text {row}", "label": label} for row, label in enumerate(cells)]
    frame = pandas.DataFrame(rows)
    dataset = datasets.Dataset.from_list(rows)
    frame.to_parquet(folder / "pandas.parquet")
    dataset.to_parquet(folder / "datasets.parquet")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = {"records": rows, "DataFrame": frame, "Dataset": dataset}
    found |= {name: folder / name for name in ("pandas.parquet", "datasets.parquet", "rows.jsonl")}
    if not any(isinstance(label, list) for label in cells):
        frame.to_csv(folder / "pandas.csv", index=False)
        found["pandas.csv"] = folder / "pandas.csv"
    return found


@pytest.mark.parametrize(
    ("cells", "task", "names", "targets"),
    [
        (["b", "a", "b"], "classification", ("a", "b"), [1, 0, 1]),
        ([10, 9, 9], "classification", ("9", "10"), [1, 0, 0]),
        ([1.0, 0.0, 2.0], "classification", ("0", "1", "2"), [1, 0, 2]),
        ([True, False, True], "classification", ("false", "true"), [1, 0, 1]),
        (["1.0", "1.10", "1.1"], "classification", ("1.0", "1.1", "1.10"), [0, 2, 1]),
        ([["b", "a"], ["a"], []], "multilabel", ("a", "b"), [[1, 1], [1, 0], [0, 0]]),
        ([[3, 1], [1], [3]], "multilabel", ("1", "3"), [[1, 1], [1, 0], [0, 1]]),
        ([[1], [0], [1]], "multilabel", ("0", "1"), [[0, 1], [1, 0], [0, 1]]),
        ([[0, 1, 1], [1, 0, 0], [0, 0, 0]], "multilabel", ("0", "1", "2"), [[0, 1, 1], [1, 0, 0], [0, 0, 0]]),
        ([[0, 1], [1, 0], [1, 0]], "multilabel", ("0", "1"), [[0, 1], [1, 0], [1, 0]]),
        ([[1, 1], [0, 0], [1, 0]], "multilabel", ("0", "1"), [[1, 1], [0, 0], [1, 0]]),
        ([[True, False, True]] * 3, "multilabel", ("0", "1", "2"), [[1, 0, 1]] * 3),
        ([[1.0, 0.0, 0.0]] * 3, "multilabel", ("0", "1", "2"), [[1, 0, 0]] * 3),
    ],
)
def test_labels_have_the_same_names_whatever_carries_them(
    cells: list[Any], task: str, names: tuple[str, ...], targets: list[Any], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"task": "classification"} if "1.10" in cells else {}
    for carrier, rows in carried(cells, tmp_path).items():
        examples = load_examples(rows, **options)
        assert examples.targets is not None
        assert (examples.task, examples.class_names, examples.targets.tolist()) == (task, names, targets), carrier


def test_class_names_of_a_dataset_are_those_of_its_parquet_file(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["World", "Business", "Arts"])
    lists = datasets.Sequence(label)
    for feature, cells, names, targets in (
        (label, [2, 0, -1], label.names, [2, 0, -1]),
        (lists, [[2, 0], [], None], label.names, [[1, 0, 1], [0, 0, 0], [255] * 3]),
        (lists, [[0, 1, 1], [1, 0, 0], None], label.names, [[0, 1, 1], [1, 0, 0], [255] * 3]),
        (datasets.Sequence(datasets.ClassLabel(names=["no", "yes"])), [[0, 1, 1], None], "012", [[0, 1, 1], [255] * 3]),
        (datasets.Sequence(datasets.ClassLabel(names=["b", "a"])), [[0, 1], [0, 0]], "ba", [[0, 1], [0, 0]]),
        (datasets.Sequence(datasets.ClassLabel(names=["b", "a"])), [[1, 0], [0, 1]], "ba", [[1, 1], [1, 1]]),
    ):
        texts = [f"text {row}" for row in range(len(cells))]
        features = datasets.Features({"text": datasets.Value("string"), "label": feature})
        dataset = datasets.Dataset.from_dict({"text": texts, "label": cells}, features=features)
        dataset.to_parquet(tmp_path / "rows.parquet")
        for rows in (dataset, tmp_path / "rows.parquet"):
            examples = load_examples(rows, labels="optional")
            assert examples.targets is not None
            assert (examples.class_names, examples.targets.tolist()) == (tuple(names), targets)


def test_class_names_in_a_parquet_file_may_be_anything(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    table = arrow.table({"text": ["a", "b"], "label": [0, 7]})

    def stored(metadata: str) -> Path:
        parquet.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "rows.parquet")
        return tmp_path / "rows.parquet"

    def declared(names: Any) -> str:
        return json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}})

    with pytest.raises(InputError, match=r"'label' has the class 7, expected 0 to 1, or -1"):
        load_examples(stored(declared(["x", "y"])))
    for metadata in ("{", "[]", "[" * 5_000, "{}", '{"info": {"features": 1}}', declared(3), declared(["x", "x"])):
        with pytest.raises(InputError, match="what datasets wrote about its columns cannot be read"):
            load_examples(stored(metadata))


def test_lists_that_could_be_vectors_or_not_are_refused() -> None:
    def rows(*cells: Any) -> list[dict[str, Any]]:
        return [{"text": f"text {row}", "labels": label} for row, label in enumerate(cells)]

    for cells, options, words in (
        ([[0, 1, 1], []], {}, "nothing but 0 and 1 and are from 0 to 3 long: expected vectors"),
        ([[0, 1, 1], [1, 0]], {}, "from 2 to 3 long"),
        ([[0, 1, 1], [1, 0, 0]], {"class_names": ["a", "b"]}, "are 3 long, and 2 classes are known"),
        ([[0.3, 0.7], [1.0, 0.0]], {}, "the label list 'labels' holds the fraction 0.3"),
        (["[0, 1, 1]", "[1, 0, 0]"], {}, "holds lists written as text, such as"),
        (["['a' 'b']", "[]"], {}, "holds lists written as text, such as"),
    ):
        with pytest.raises(InputError, match=words):
            load_examples(rows(*cells), **options)
    examples = load_examples(rows([0, 1], [1, 1]), class_names=["a", "b"])
    assert (examples.class_names, said(examples, "are vectors of 0 and 1")) == (("a", "b"), True)
    assert load_examples(rows("[a]", "[0, 1]")).class_names == ("[0, 1]", "[a]")
    assert load_examples(rows("True", "False"), class_names=["True", "False"]).class_names == ("True", "False")
    written = load_examples(rows("0|1|1", "1|0|0"), label_separator="|")
    assert written.targets is not None
    assert (written.class_names, written.targets.tolist()) == (("0", "1", "2"), [[0, 1, 1], [1, 0, 0]])
    with pytest.raises(InputError, match="vectors"):
        load_examples(rows("0|1|1", ""), label_separator="|")
    assert load_examples(rows({"1", "0"}, {"0"})).class_names == ("0", "1")


def test_numbers() -> None:
    rows = records(("a", "0.5"), ("b", "-1e3"), ("c", "2"))
    examples = load_examples(rows)
    assert (examples.task, examples.class_names) == ("regression", ("label",))
    assert said(examples, "task: regression (guessed")
    assert examples.targets is not None
    assert examples.targets.dtype == np.float64
    assert examples.targets.tolist() == [[0.5], [-1000.0], [2.0]]
    two = [{"text": "a", "valence": 1, "arousal": 2.5}, {"text": "b", "valence": 3, "arousal": "4"}]
    examples = load_examples(two, label_column="valence, arousal")
    assert (examples.task, examples.class_names) == ("regression", ("valence", "arousal"))
    assert examples.targets is not None
    assert examples.targets.tolist() == [[1, 2.5], [3, 4]]
    examples = load_examples(records(("a", 1), ("b", None)), task="regression", labels="optional")
    assert examples.labelled().tolist() == [True, False]
    for cell in ("nan", "inf", "-Infinity", float("nan"), float("inf"), "1e999", 10**400, "x", "1_000", True, [1.0]):
        with pytest.raises(BadRowsError, match="input, row 1: the target 'label' is"):
            load_examples(records(("a", 1), ("b", cell)), task="regression")


def test_many_different_fractions_become_numbers_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "MAX_CLASSES", 50)
    values = [row / 7 for row in range(9_000)]
    examples = load_examples(records(*((f"t{row}", value) for row, value in enumerate(values))))
    assert examples.task == "regression"
    assert examples.targets is not None
    assert examples.targets[:, 0].tolist() == values
    with pytest.raises(InputError, match=r"more than 50 different values.*--task regression"):
        load_examples(records(*((f"t{row}", row) for row in range(60))))


def test_doubtful_guesses_are_said() -> None:
    assert said(
        load_examples(records(*((f"t{row}", row) for row in range(60)))), "--task regression if they are quantities"
    )
    assert said(load_examples(records(("a", 1.0), ("b", 0.0))), "in floating point")
    assert said(load_examples(records(("a", "0.5"), ("b", "1.5"), ("c", "unknown"))), "2 of the 3 different labels")
    assert said(load_examples(records(("a", "x"), ("b", "x"))), "only one class: 'x'")


def test_labels_may_be_absent_or_unwanted() -> None:
    examples = load_examples([{"text": "a"}], labels="optional")
    assert (examples.targets, examples.task, examples.class_names) == (None, None, ())
    examples = load_examples(records(("a", "x")), labels="none")
    assert examples.targets is None
    examples = load_examples(train=records(("a", "x"), ("b", "y")), test=[{"text": "c"}], labels="optional")
    assert examples.targets is not None
    assert examples.targets.tolist() == [0, 1, -1]
    assert said(examples, "test has no column 'label'")
    assert said(examples, "no row of test has a label")


# Splits


def test_splits_from_inputs(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "test.csv", [("text", "label"), ("c", "x")])
    examples = load_examples(records(("a", "x")), validation=[records(("b", "y"))], test=path)
    assert examples.split_names == ("train", "validation", "test")
    assert examples.split.tolist() == [0, 1, 2]
    assert examples.split_sizes() == {"train": 1, "validation": 1, "test": 1}
    assert said(examples, "validation has no row of 1 class: 'x'")
    assert load_examples(records(("a", "x"))).split_names == ("train",)


def test_splits_from_a_column() -> None:
    names = ["test", "TRAIN", "dev", "extra", "val", "valid"]
    rows = [{"text": f"t{row}", "label": 1, "part": name} for row, name in enumerate(names)]
    examples = load_examples(rows, split_column="part")
    assert examples.split_names == ("train", "validation", "test", "extra")
    assert examples.split.tolist() == [2, 0, 1, 3, 1, 1]
    usual = [{"text": "a", "label": 1, "split": "dev"}, {"text": "b", "label": 2, "split": "train"}]
    examples = load_examples(usual)
    assert examples.split_names == ("train", "validation")
    assert said(examples, "split column: 'split' (guessed)")
    with pytest.raises(BadRowsError, match="the split 'part' is missing"):
        load_examples([*rows, {"text": "x", "label": 1, "part": ""}], split_column="part")


GOLDEN_SPLIT = [2, 2, 1, 1, 0, 2, 1, 1, 1, 0, 2, 1, 1, 1, 2, 1, 2, 0, 1, 2]
TEN_THOUSAND = np.frombuffer(b"".join(row_key(b"%d" % row) for row in range(10_000)), np.uint8).reshape(-1, 16)


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
@pytest.mark.parametrize("text", ["80/10/10", "50/50", "1/1/1", "0.7/0.3", "98/1/1"])
def test_split_proportions(text: str, seed: int) -> None:
    _, shares = parse_split(text)
    sizes = np.bincount(assign_splits(TEN_THOUSAND, shares, seed), minlength=len(shares))
    for size, share in zip(sizes, shares, strict=True):
        spread = (10_000 * float(share) * (1 - float(share))) ** 0.5
        assert abs(size - 10_000 * share) < 4 * spread


def test_split_seeds_are_independent() -> None:
    halves = (Fraction(1, 2), Fraction(1, 2))
    agree = (assign_splits(TEN_THOUSAND, halves, 0) == assign_splits(TEN_THOUSAND, halves, 1)).mean()
    assert abs(agree - 0.5) < 0.02


def test_split_is_the_same_for_ever() -> None:
    # A change of these would move rows between splits in everybody's data.
    assert assign_splits(TEN_THOUSAND[:20], parse_split("50/30/20")[1], 0).tolist() == GOLDEN_SPLIT


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=20), st.integers(0, 2**64 - 1))
def test_split_equals_splitmix64_written_plainly(content: bytes, seed: int) -> None:
    mask = 2**64 - 1
    x = (int.from_bytes(row_key(content)[:8], "little") + (seed + 1) * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    share = Fraction(x ^ (x >> 31), 2**64)
    expected = 0 if share < Fraction(1, 2) else 1 if share < Fraction(4, 5) else 2
    key = np.frombuffer(row_key(content), np.uint8)[None]
    assert assign_splits(key, parse_split("50/30/20")[1], seed).tolist() == [expected]


@settings(max_examples=60, deadline=None)
@given(
    first=st.lists(USABLE, min_size=1, max_size=17),
    more=st.lists(USABLE, max_size=17),
    seed=st.integers(0, 2**64 - 1),
    order=st.randoms(use_true_random=False),
)
def test_added_rows_move_nobody_and_duplicates_stay_together(
    first: list[str], more: list[str], seed: int, order: Any
) -> None:
    options: dict[str, Any] = {"split": "60/20/20", "split_seed": seed}
    before = load_examples(records(*((text, 1) for text in first)), **options)
    mixed = [*first, *more, *first]
    order.shuffle(mixed)
    after = load_examples(records(*((text, 1) for text in mixed)), **options)
    side = dict(zip(mixed, after.split.tolist(), strict=True))
    assert [side[text] for text in mixed] == after.split.tolist()
    assert [side[text] for text in first] == before.split.tolist()


@pytest.mark.parametrize("text", ["", "80", "80/0", "80/20/", "a/b", "80/10/5/5", "-1/2", "nan/1", "1e3/1", "80 20"])
def test_split_nonsense_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="split"):
        load_examples(records(("a", 1)), split=text)


def test_split_parts_need_not_sum_to_a_hundred() -> None:
    assert parse_split("3/1") == (("train", "test"), (Fraction(3, 4), Fraction(1, 4)))
    assert parse_split(" 0.5 / .25/ .25")[1] == (Fraction(1, 2), Fraction(1, 4), Fraction(1, 4))


# Findings


def test_leaks_are_reported_and_kept() -> None:
    train = records(
        *((f"only {row}", "x") for row in range(5)), ("shared\n1", "x"), ("shared 2", "y"), ("shared 2", "y")
    )
    test = records(("shared 2", "y"), ("shared\n1", "x"), ("new", "x"))
    examples = load_examples(train=train, test=test)
    assert len(examples) == 11
    assert said(examples, "2 different contents occur in both train and test, for example 'shared\\n1', 'shared 2'")
    assert said(examples, "3 rows of 11 repeat another: 8 different contents")
    assert examples.n_unique == 8
    clean = load_examples(train=train[:5], test=test)
    assert not said(clean, "occur")


@pytest.mark.parametrize(
    ("cells", "options", "shown"),
    [
        (["x", "y", "y"], {}, "(x and y)"),
        ([["p"], ["p", "q"], []], {}, "(p and p+q and none)"),
        ([0.5, 0.25, 0.5], {}, "(0.5 and 0.25)"),
    ],
)
def test_contradicting_labels_are_reported(cells: list[Any], options: dict[str, Any], shown: str) -> None:
    same = "z" * 50
    examples = load_examples(records(*((same, cell) for cell in cells), ("other", cells[0])), **options)
    assert said(examples, "1 content occurs with different labels, for example '" + "z" * 37 + "'... " + shown)
    assert not said(load_examples(records((same, cells[0]), (same, cells[0]), ("b", cells[1]))), "different labels")


def test_an_unlabelled_copy_contradicts_nothing() -> None:
    assert not said(load_examples(records(("a", "x"), ("a", None), ("b", "y")), labels="optional"), "different labels")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from("xy"), st.sampled_from(["train", "test"])), min_size=1)
)
def test_findings_equal_a_plain_count(rows: list[tuple[str, str, str]]) -> None:
    examples = load_examples([{"text": t, "label": c, "split": s} for t, c, s in rows])
    leaking = {t for t, _, s in rows if s == "train"} & {t for t, _, s in rows if s == "test"}
    clashing = {t for t, c, _ in rows if c == "x"} & {t for t, c, _ in rows if c == "y"}
    assert said(examples, f"{len(leaking)} different", "in both train and test") == bool(leaking)
    assert said(examples, f"{len(clashing)} content", "different labels") == bool(clashing)
    assert examples.n_unique == len({t for t, _, _ in rows})


# Ids


def test_ids() -> None:
    rows = [{"key": key, "text": f"t{row}", "label": 1} for row, key in enumerate(["a", "é😀", 7, "a"])]
    examples = load_examples(rows, id_column="key")
    assert list(examples.ids) == ["a", "é😀", "7", "a"]
    assert examples.ids[1:3] == ["é😀", "7"]
    assert said(examples, "1 id in 'key' given to a row before")
    plain = load_examples(rows).ids
    assert plain.given is None
    assert list(plain) == ["0", "1", "2", "3"]
    with pytest.raises(IndexError):
        plain[4]
    with pytest.raises(BadRowsError, match="the id 'key' is missing"):
        load_examples([{**rows[0], "key": None}], id_column="key")


# Bad rows

BAD_CSV = (
    b"text,label\n"
    b"fine,a\n"
    b",a\n"
    b"  \t ,a\n"
    b'"two\nlines",\n'
    b"caf\xe9,a\n"
    b"too,many,fields\n"
    b"few\n"
    b'"closed" early,a\n'
    b"good,b\n"
    b"text,\xff\n"
)
BAD_CSV_ROWS = [
    (3, "'text' is empty"),
    (4, "'text' is blank"),
    (5, "the label 'label' is missing"),
    (7, "undecodable byte 0xe9 at character 4 of 'text', expected UTF-8"),
    (8, "3 fields, expected 2 (text, label)"),
    (9, "1 field, expected 2 (text, label)"),
    (10, 'text after a closing quote: write a quote inside a quoted cell twice (""), or pass --quoting none'),
    (12, "undecodable byte 0xff at character 1 of 'label', expected UTF-8"),
]


def test_bad_csv_rows_stop_the_run_with_line_and_reason(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", BAD_CSV)
    with pytest.raises(BadRowsError) as caught:
        load_examples(path)
    assert list(caught.value.rows) == [(f"{path}:{line}", reason) for line, reason in BAD_CSV_ROWS]
    assert caught.value.total == len(BAD_CSV_ROWS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("block", [1, 3, 4096])
def test_bad_csv_rows_go_to_the_quarantine(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "BLOCK_ROWS", block)
    path = put(tmp_path / "a.csv", BAD_CSV)
    quarantine = tmp_path / "bad.jsonl"
    for _ in range(2):  # a second run replaces the file of the first
        examples = load_examples(path, on_bad_row="skip", quarantine=quarantine)
        check_exact(examples, ["fine", "good"])
        assert list(examples.contents([1])) == [b"good"]
        assert said(examples, f"8 bad rows set aside in {quarantine}")
        aside = [json.loads(line) for line in quarantine.read_text().splitlines()]
        assert [(row["line"], row["reason"]) for row in aside] == BAD_CSV_ROWS
        assert {row["file"] for row in aside} == {path}
        assert aside[3]["raw"][0].encode("utf-8", "surrogateescape") == b"caf\xe9"
        assert aside[6]["raw"] == '"closed" early,a\n'
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.csv", "bad.jsonl"]
    put(tmp_path / "a.csv", "text,label\nfine,a\n")
    load_examples(path, on_bad_row="skip", quarantine=quarantine)
    assert quarantine.read_text() == ""


def test_bad_jsonl_rows(tmp_path: Path) -> None:
    bad = [
        (b'{"text": "a", "label": 1', "invalid JSON: Expecting"),
        (b"[1]", "a JSON list, expected an object"),
        (b'{"text": "a", "text": "b", "label": 1}', "the key 'text' occurs twice"),
        (b'{"text": "a", "label": NaN}', "NaN is not JSON"),
        (b'{"text": "\xff", "label": 1}', "undecodable byte 0xff at byte 11"),
        (b'{"text": "\\ud800", "label": 1}', "lone surrogate U+D800 at character 1 of 'text'"),
        (b'{"text": 5, "label": 1}', "'text' holds 5 of type int, expected text"),
        (b'{"text": null, "label": 1}', "'text' is missing"),
        (b'{"label": 1}', "'text' is missing"),
        (b'{"text": "a"}', "the label 'label' is missing"),
        (b'{"text": "a", "label": {}}', "the label 'label' is {} of type dict"),
        (b'{"text": "a", "label": 1} x', "something follows the object"),
        (b"[" * 200_000, "nested too deeply"),
        (b"nonsense", "nothing readable at character 1"),
    ]
    path = put(tmp_path / "a.jsonl", b'{"text": "good", "label": 0}\n' + b"\n".join(line for line, _ in bad) + b"\n")
    with pytest.raises(BadRowsError) as caught:
        load_examples(path)
    assert caught.value.total == len(bad)
    assert len(caught.value.rows) == 10
    load = load_examples(path, on_bad_row="skip", quarantine=tmp_path / "q")
    check_exact(load, ["good"])
    for line, (expected, row) in enumerate(zip(bad, (tmp_path / "q").read_text().splitlines(), strict=True), 2):
        assert json.loads(row)["line"] == line
        assert expected[1] in json.loads(row)["reason"]


def test_bad_rows_of_objects() -> None:
    pandas = pytest.importorskip("pandas")
    texts = ["a", None, "\ud800", "d"]
    frame = pandas.DataFrame({"text": texts, "label": ["x", "y", "y", pandas.NA]}, dtype=object)
    with pytest.raises(BadRowsError) as caught:
        load_examples(frame)
    assert list(caught.value.rows) == [
        ("input, row 1", "'text' is missing"),
        ("input, row 2", "lone surrogate U+D800 at character 1 of 'text'"),
        ("input, row 3", "the label 'label' is missing"),
    ]
    with pytest.raises(BadRowsError, match="input, row 1: a list, expected a dict"):
        load_examples([{"text": "a", "label": 1}, ["b", 2]])


def test_parquet_with_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data = pyarrow.array([b"fine", b"caf\xe9", None], pyarrow.binary())
    buffers = data.buffers()
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, buffers, data.null_count)
    parquet.write_table(pyarrow.table({"text": text, "label": [1, 2, 3]}), tmp_path / "a.parquet")
    with pytest.raises(BadRowsError) as caught:
        load_examples(tmp_path / "a.parquet")
    assert [reason for _, reason in caught.value.rows] == [
        "undecodable byte 0xe9 at character 4 of 'text', expected UTF-8",
        "'text' is missing",
    ]


def test_the_first_ten_and_the_total_across_files(tmp_path: Path) -> None:
    first = write_csv(tmp_path / "a.csv", [("text", "label"), *[("", "x")] * 8, ("ok", "x")])
    second = write_csv(tmp_path / "b.csv", [("text", "label"), *[("", "x")] * 5_000])
    with pytest.raises(BadRowsError, match="first 10 of 5008") as caught:
        load_examples([first, second])
    assert [where for where, _ in caught.value.rows][7:] == [f"{first}:9", f"{second}:2", f"{second}:3"]


def test_an_unclosed_quote_names_the_line_where_it_opens(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", 'text,label\nok,1\n"open,2\nmore,3\n')
    with pytest.raises(BadRowsError, match=r"a\.csv:3: a quote is opened and not closed"):
        load_examples(path)


# Bad input, one line each


def refuse(message: str, inputs: Any, error: type[Exception] = InputError, **options: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        load_examples(inputs, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"", "the file is empty"),
        ("a.csv", b"\n\n", "blank lines only"),
        ("a.csv", b"text,label\n", "a header but no rows"),
        ("a.csv", b"text,label,text\na,1,b\n", "the column 'text' occurs more than once"),
        ("a.csv", b"t\xe9xt,label\na,1\n", ":1: the header is not UTF-8"),
        ("a.csv", b'"text"x,label\na,1\n', ":1: cannot read the header"),
        ("a.csv", b"\x1f\x8b\x08\x00", "this is a gzip file: add .gz"),
        ("a.csv", "text,label\na,1\n".encode("utf-16"), "UTF-16 text: save it as UTF-8"),
        ("a.csv", b"PK\x03\x04", "a zip or spreadsheet file"),
        ("a.csv.gz", b"not gzip at all", "broken gzip file"),
        ("a.csv.gz", gzip.compress(b"text,label\n" + b"row,1\n" * 9_000, mtime=0)[:-9], "broken gzip file"),
        ("a.csv.gz", gzip.compress(b"", mtime=0), "the file is empty"),
        ("a.jsonl", b"\n \n", "blank lines only"),
        ("a.jsonl", b"[\n1,\n", "a.jsonl:1: invalid JSON: .*expected one JSON object a line"),
        ("a.xlsx", b"PK", "cannot tell the format from the name"),
        ("a", b"text,label\na,1\n", "cannot tell the format.*--input-format"),
        ("a.json", b"[]", "a JSON array must be rewritten"),
        ("a.parquet", b"PAR1 but not really", "cannot be read as Parquet"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    refuse(message, put(tmp_path / name, data))


def test_refusals(tmp_path: Path) -> None:
    refuse("no such file", tmp_path / "none.csv", InputNotFoundError)
    refuse("is a directory", tmp_path)
    refuse("is not a regular file", "/dev/zero")
    refuse("there is no input", None)
    refuse("no rows", [])
    refuse("expected a dict", [["a", 1]])
    refuse("got a generator", (row for row in records(("a", 1))))
    refuse("got a int", 5)
    refuse("to cells, expected rows", {"text": ["a", "b"], "label": [1, 2]})
    refuse("an empty mapping", {})
    rows = records(("a", "x"))
    refuse("choose one", {"train": rows}, SpecError, split="80/20")
    refuse("drop test", {"train": rows}, SpecError, test=rows)
    refuse("both inputs and train", rows, SpecError, train=rows)
    refuse("task is 'guess': expected classification, multilabel, regression or None", rows, SpecError, task="guess")
    refuse("on_bad_row is skip but", rows, SpecError, on_bad_row="skip")
    refuse("class_names holds a name twice", rows, SpecError, class_names=["x", "x"])
    refuse("split_seed is -1", rows, SpecError, split="80/20", split_seed=-1)
    refuse("unknown format 'xml'", tmp_path / "a", SpecError, format="xml")
    refuse("label_separator is empty", rows, SpecError, label_separator="")
    refuse("does not go with task regression", rows, SpecError, label_separator="|", task="regression")
    refuse("one label column", [{"text": "a", "p": 1, "q": 2}], SpecError, label_column="p,q", task="classification")
    refuse("the targets are label, expected score", records(("a", 0.5)), class_names=["score"], task="regression")
    refuse("no usable row is left: all 1 are bad", records(("", 1)), on_bad_row="skip", quarantine=tmp_path / "q")


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "a.csv", "text,label\na,1\n")

    def refuse_to_open(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse_to_open)
    with pytest.raises(InputError, match=r"a\.csv: cannot be read: Permission denied"):
        load_examples(path)


def test_the_quarantine_never_overwrites_other_files(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", "text,label\n,1\nb,2\n")
    refuse("is an input file", path, SpecError, on_bad_row="skip", quarantine=path)
    other = put(tmp_path / "notes.txt", "my notes")
    refuse("was not written by embedcache", path, SpecError, on_bad_row="skip", quarantine=other)
    assert (tmp_path / "notes.txt").read_text() == "my notes"
    refuse("cannot write .*: No such file", path, on_bad_row="skip", quarantine=tmp_path / "no" / "q.jsonl")
    with contextlib.suppress(InputError):
        load_examples(path, on_bad_row="skip", quarantine=tmp_path / "q", class_names=["x"])
    assert not list(tmp_path.glob(".q.*"))


# Read once


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are opened, once for each time."""
    opened: list[str] = []
    real = builtins.open

    def counted(file: Any, *args: Any, **options: Any) -> Any:
        opened.append(str(file))
        return real(file, *args, **options)

    monkeypatch.setattr("builtins.open", counted)
    return opened


@pytest.mark.parametrize(("name", "write"), WRITERS, ids=[name for name, _ in WRITERS])
def test_a_file_is_opened_once(tmp_path: Path, name: str, write: Callable[..., Path], opens: list[str]) -> None:
    write(tmp_path / name, [("text", "label"), *((f"row {row % 7}", str(row % 3)) for row in range(11))])
    opens.clear()
    examples = load_examples(tmp_path / name, split="80/20")
    assert len(list(examples.contents())) == 11
    assert list(examples.contents([2, 9])) == [b"row 2", b"row 2"]
    assert said(examples, "with different labels"), "which shows contents"
    assert opens == [str(tmp_path / name)]


def test_of_many_files_not_all_are_open_at_once(
    tmp_path: Path, opens: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_MOST_OPEN", 3)
    files = [
        write_csv(tmp_path / f"{number}.csv", [("text", "label"), (f"row {number}", str(number % 2))])
        for number in range(5)
    ]
    opens.clear()
    check_exact(load_examples(files), [f"row {number}" for number in range(5)])
    assert [opens.count(str(file)) for file in files] == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("most", [0, 1, 11, 40, 1_000])
def test_contents_beyond_a_size_are_held_in_a_file(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "MOST_HELD", most)
    monkeypatch.setattr("embedcache.examples.inputs.BLOCK_ROWS", 3)
    texts = [f"row {row} é" for row in range(17)]
    examples = load_examples(records(*((text, 1) for text in texts)))
    check_exact(examples, texts)
    part = examples.select(np.array([2, 3, 13]))
    check_exact(part, [texts[2], texts[3], texts[13]])
    assert list(part.packed_contents) == [texts[row].encode() for row in (2, 3, 13)]
    assert part.packed_contents.lengths().tolist() == [8, 8, 9]


def test_a_full_temporary_folder_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(content, "MOST_HELD", 0)
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    refuse("cannot hold the contents of the input in .*TMPDIR.*: the disk is full", records(("a", 1)))


def test_a_file_that_changes_or_goes_after_it_was_read_changes_nothing(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [("text", "label"), ("one", "x"), ("two", "y")])
    examples = load_examples(path)
    path.write_bytes(path.read_bytes().replace(b"one", b"two"))
    check_exact(examples, ["one", "two"])
    path.unlink()
    check_exact(examples, ["one", "two"])


def test_rows_must_increase_and_exist() -> None:
    examples = load_examples(records(("a", 1), ("b", 2), ("c", 3)))
    assert list(examples.contents(np.array([], np.int64))) == []
    for rows in ([1, 1], [2, 0], [-1], [3], [[0]]):
        with pytest.raises(ValueError, match="rows must"):
            examples.contents(rows)  # type: ignore[arg-type]


def test_memory_stays_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    def peak(rows: int) -> int:
        path = tmp_path / f"{rows}.csv"
        with open(path, "w") as file:
            file.write("text,label\n")
            file.writelines(f"this is row number {row} of the file,{row % 3}\n" for row in range(rows))
        tracemalloc.start()
        try:
            examples = load_examples(path)
            assert sum(1 for _ in examples.contents()) == rows
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(5_000), peak(20_000)
    assert (many - few) / 15_000 < 160, "bytes a row, transients and the text of 37 bytes included"
    monkeypatch.setattr(content, "MOST_HELD", 1 << 16)
    few, many = peak(5_000), peak(20_000)
    assert (many - few) / 15_000 < 120, "the same without the texts, which are in a file"


@pytest.fixture(autouse=True)
def _nothing_left_open() -> Iterator[None]:
    yield
    assert csv.field_size_limit() == 131_072
