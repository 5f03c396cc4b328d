"""What a user may get wrong costs one line of ours, wherever it is said; what can be taken is taken."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

from embedcache import (
    FeatureBasedModel,
    FeatureExtractor,
    HeadClassifier,
    Predictor,
    check_equivalence,
    extract,
    load_examples,
    train_on_cache,
)
from embedcache.backbone import model_name
from embedcache.errors import EmbedcacheError, TrainingError
from embedcache.train.sklearn_engine import _fit

ROWS = [{"text": f"text number {at}", "label": "çé"[at % 2]} for at in range(31)]
X = np.random.default_rng(0).normal(size=(31, 5)).astype(np.float32)
ALONE = [0] * 15 + [1] * 15 + [2]


def fitted(head: str = "linear", y: Any = ALONE, **settings: Any) -> Any:
    return HeadClassifier(head, **settings).fit(X, y)


MISTAKES: list[tuple[Callable[[], Any], str]] = [
    (lambda: load_examples(ROWS, text_column=0), "text_column is 0: expected a text or None"),  # type: ignore[arg-type]
    (lambda: load_examples(ROWS, label_column=1), "label_column is 1: expected a text, a list of texts"),  # type: ignore[arg-type]
    (lambda: load_examples(ROWS, label_column=["label", 1]), r"label_column is \['label', 1\]"),  # type: ignore[list-item]
    (lambda: load_examples(ROWS, id_column=2), "id_column is 2: expected"),  # type: ignore[arg-type]
    (lambda: load_examples(ROWS, split_column=b"a"), "split_column is b'a': expected"),  # type: ignore[arg-type]
    (lambda: load_examples(ROWS, split=0.8), "split is 0.8: expected a text"),  # type: ignore[arg-type]
    (lambda: load_examples(ROWS, split="80/20", split_seed="1"), "split_seed is '1': expected a whole"),  # type: ignore[arg-type]
    (lambda: load_examples(ROWS, label_separator=1), "label_separator is 1: expected"),  # type: ignore[arg-type]
    (lambda: load_examples(ROWS, class_names="çé"), "class_names is 'çé': expected a list of texts"),
    (lambda: load_examples(ROWS, class_names=[0, 1]), r"class_names is \[0, 1\]: expected a list of texts"),  # type: ignore[list-item]
    (lambda: load_examples(ROWS, task=["classification"]), r"task is \['classification'\]"),  # type: ignore[arg-type]
    (lambda: model_name(5), "the model is 5 of type int: expected a hub name or a folder"),  # type: ignore[arg-type]
    (lambda: model_name(b"x"), "the model is b'x' of type bytes"),  # type: ignore[arg-type]
    (lambda: extract(ROWS, model=Path("/no/such"), output_dir="unused"), "/no/such is not a model folder"),
    (lambda: fitted(early_stopping=True), "rows of each class, and '2' has a single one"),
    (lambda: fitted(y=[0, 1] * 15 + [0], early_stopping=True, validation_fraction=0.01), "validation_fraction 0.01"),
    (lambda: fitted(early_stopping=True, y=[0, 1] * 15 + [0], validation_fraction=2.0), "validation_fraction 2.0"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(MISTAKES)))
def test_a_mistake_is_one_line_of_ours(case: int) -> None:
    mistake, message = MISTAKES[case]
    with pytest.raises(EmbedcacheError, match=message) as caught:
        mistake()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("reason", "words"),
    [("The least populated class in y has\nonly 1 member", "a class has a single row"), ("no\nsuch", "^no such$")],
)
def test_what_scikit_learn_cannot_fit_is_one_line_of_ours(reason: str, words: str) -> None:
    class Estimator:
        def fit(self, x: Any, y: Any) -> None:
            raise ValueError(reason)

    with pytest.raises(TrainingError, match=words):
        _fit(Estimator(), X, np.array(ALONE), None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("bert", tmp_path_factory.mktemp("model") / "bert")


def test_a_model_may_be_a_path(model: Path, tmp_path: Path) -> None:
    cache = extract(ROWS, model=model, output_dir=tmp_path / "cache", split="60/20/20")
    texts = [row["text"] for row in ROWS]
    extractor = FeatureExtractor(model=model, cache_dir=tmp_path / "features").fit(texts)
    by_row = {text: row for text, row in zip(texts, extractor.transform(texts), strict=True)}
    assert all(
        np.array_equal(by_row[ROWS[int(at)]["text"]], row)
        for at, row in zip(cache.ids(), cache.features(), strict=True)
    )
    assert FeatureBasedModel.from_pretrained(model, 2).head is not None
    train_on_cache(tmp_path / "cache").save(tmp_path / "run")
    assert Predictor.load(tmp_path / "run", model=model)(["one"])[0].label in "çé"
    assert check_equivalence(tmp_path / "cache", ROWS, model=model, split=None, steps=1, progress=False).equal


COMMANDS = (
    "info ç→.cache", "info ç→.cache --json", "evaluate run ç→.cache", "evaluate run ç→.cache --json",
    "predict run --text ç→", "predict run rows.jsonl --id-column id",
    "predict run rows.jsonl --id-column id --format jsonl", "predict run rows.jsonl --id-column id --json",
)  # fmt: skip


def test_stdout_that_is_not_utf8(model: Path, tmp_path: Path) -> None:
    """In ASCII and Latin-1 nothing ends in a traceback, and JSON means the same."""
    cache = extract(ROWS, model=model, output_dir=tmp_path / "ç→.cache", split="60/20/20")
    train_on_cache(cache).save(tmp_path / "run")
    rows = [json.dumps({"id": f"→{at}", **row}) for at, row in enumerate(ROWS[:3])]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    encodings, count = ("utf-8", "ascii", "latin-1"), len(COMMANDS)
    code = (
        "import json, sys; from embedcache import cli\n"
        "for encoding in json.loads(sys.argv[2]):\n"
        "    for line in json.loads(sys.argv[1]):\n"
        "        for stream in (sys.stdin, sys.stdout, sys.stderr):\n"
        "            stream.reconfigure(encoding=encoding, errors='strict')\n"
        "        assert cli.run(line.split()) == 0, (encoding, line)\n"
        "        sys.stdout.flush(); sys.stdout.buffer.write(b'@@'); sys.stdout.flush()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(COMMANDS), json.dumps(encodings)], capture_output=True, cwd=tmp_path,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode("latin-1")[-2000:]
    pieces = done.stdout.split(b"@@")[:-1]
    printed = {
        encoding: [each.decode(encoding) for each in pieces[at * count : (at + 1) * count]]
        for at, encoding in enumerate(encodings)
    }
    for encoding, texts in printed.items():
        assert len(texts) == len(COMMANDS)
        for command, text, whole in zip(COMMANDS, texts, printed["utf-8"], strict=True):
            if "json" in command.partition("rows.jsonl")[2] or "--json" in command:
                lines = (text, whole) if "--json" in command else (text.replace("\n", ","), whole.replace("\n", ","))
                ours, theirs = (json.loads(each if "--json" in command else f"[{each[:-1]}]") for each in lines)
                assert ours == theirs, (encoding, command)
            else:
                escaped = whole.encode(encoding, "backslashreplace").decode(encoding)
                assert text == escaped, (encoding, command)
