"""Every entry point with every kind of wrong argument: taken, or one line of ours; never somebody else's exception."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from fakes import CountingBackbone

import embedcache as ec
from embedcache.arguments import checks_arguments
from embedcache.backbone import load_backbone
from embedcache.errors import EmbedcacheError, SpecError
from embedcache.examples import load_examples
from embedcache.spec import HeadSpec, TrainSpec

WRONG: dict[str, Any] = {
    "an object": object(),
    "a fraction": 3.5,
    "a negative number": -1,
    "zero": 0,
    "NaN": float("nan"),
    "a name that is none": "no such thing",
    "an empty text": "",
    "bytes": b"bytes",
    "a path": Path("no/such/path"),
    "a mixed list": ["x", 1, None],
    "an empty list": [],
    "a mapping": {"x": object()},
    "a function": len,
    "True": True,
}
X = np.random.default_rng(0).standard_normal((41, 5)).astype(np.float32)
Y = np.arange(41) % 2
ROWS = [{"text": f"text {row}", "label": "ab"[row % 2]} for row in range(41)]


class Place:
    """What the entry points are given: made once, never changed by a wrong call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.backbone = CountingBackbone()
        self.cache = ec.extract(ROWS, output_dir=folder / "cache", backbone=self.backbone, split="60/20/20")
        self.examples = load_examples(ROWS, split="60/20/20")  # relabel changes the cache to these: nothing
        result = ec.train_on_cache(self.cache, progress=False)
        self.head = result.head
        result.save(folder / "run")
        centroids = ec.train_on_cache(self.cache, "nearest-centroid", progress=False).head
        self.centroids = replace(centroids, class_names=("a", "another"))
        self._numbers = itertools.count()

    @property
    def new(self) -> Path:
        return self.folder / f"new{next(self._numbers)}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("arguments"))


Given = Callable[[Place], dict[str, Any]]


def fit(estimator: Any) -> Callable[..., Any]:
    def call(**parameters: Any) -> Any:
        return estimator(**parameters).fit(X, Y)

    call.__signature__ = inspect.signature(estimator)  # type: ignore[attr-defined]
    return call


ENTRIES: dict[str, tuple[Callable[[Place], Callable[..., Any]], Given]] = {
    "load_examples": (lambda place: load_examples, lambda place: {"inputs": ROWS}),
    "extract": (
        lambda place: ec.extract,
        lambda place: {"inputs": ROWS, "output_dir": place.new, "backbone": place.backbone},
    ),
    "FeatureCache.open": (lambda place: ec.FeatureCache.open, lambda place: {"path": place.cache.path}),
    **{
        f"FeatureCache.{name}": (lambda place, name=name: getattr(place.cache, name), lambda place: {})  # type: ignore[misc]
        for name in ("rows", "targets", "keys", "ids", "inputs", "arrays", "features", "feature", "places")
    },
    "FeatureCache.torch_dataset": (lambda place: place.cache.torch_dataset, lambda place: {}),
    "merge": (lambda place: ec.merge, lambda place: {"parts": [place.cache.path], "output_dir": place.new}),
    "relabel": (lambda place: ec.relabel, lambda place: {"path": place.cache.path, "examples": place.examples}),
    "train_head": (lambda place: ec.train_head, lambda place: {"x": X, "y": Y, "class_names": ["a", "b"]}),
    "train_on_cache": (lambda place: ec.train_on_cache, lambda place: {"cache": place.cache.path}),
    "add_classes": (lambda place: ec.add_classes, lambda place: {"head": place.centroids, "cache": place.cache.path}),
    "evaluate_on_cache": (
        lambda place: ec.evaluate_on_cache,
        lambda place: {"head": place.head, "cache": place.cache.path, "intervals": False},
    ),
    "Predictor": (lambda place: ec.Predictor, lambda place: {"head": place.head, "backbone": place.backbone}),
    "Predictor.__call__": (
        lambda place: ec.Predictor(place.head, place.backbone).__call__,
        lambda place: {"rows": ["a text"]},
    ),
    "TrainedHead.from_pretrained": (
        lambda place: ec.TrainedHead.from_pretrained,
        lambda place: {"directory": place.folder / "run"},
    ),
    "TrainedHead.probabilities": (lambda place: place.head.probabilities, lambda place: {"x": X}),
    "HeadSpec": (lambda place: HeadSpec, lambda place: {}),
    "TrainSpec": (lambda place: TrainSpec, lambda place: {}),
    "TrainSpec.of": (lambda place: TrainSpec.of, lambda place: {"settings": {"epochs": 2}}),
    "HeadClassifier": (lambda place: fit(ec.HeadClassifier), lambda place: {}),
    "HeadRegressor": (lambda place: fit(ec.HeadRegressor), lambda place: {}),
    "LinearClassifier": (lambda place: ec.LinearClassifier, lambda place: {"input_dim": 5, "num_classes": 3}),
    "MLPClassifier": (
        lambda place: ec.MLPClassifier,
        lambda place: {"input_dim": 5, "hidden_dim": 3, "num_classes": 2},
    ),
    "ResidualClassifier": (lambda place: ec.ResidualClassifier, lambda place: {"input_dim": 5, "num_classes": 3}),
    "AttentionClassifier": (lambda place: ec.AttentionClassifier, lambda place: {"input_dim": 8, "num_classes": 3}),
}
# These work for seconds where all is right: something else is wrong as well, which is found after the rest.
HEAVY: dict[str, tuple[Callable[[Place], Callable[..., Any]], Given]] = {
    "sweep": (lambda place: ec.sweep, lambda place: {"cache": place.cache, "grid": "majority", "metric": "none"}),
    "load_backbone": (lambda place: load_backbone, lambda place: {"name": "/nowhere"}),
    "Predictor.load": (lambda place: ec.Predictor.load, lambda place: {"run": place.folder / "run"}),
    "check_equivalence": (
        lambda place: ec.check_equivalence,
        lambda place: {"cache": place.cache, "inputs": ROWS, "model": "/nowhere"},
    ),
    "compare_training_approaches": (
        lambda place: ec.compare_training_approaches,
        lambda place: {"inputs": ROWS, "model": "/nowhere", "split": "60/20/20"},
    ),
    "FeatureBasedModel.from_pretrained": (
        lambda place: ec.FeatureBasedModel.from_pretrained,
        lambda place: {"name": "/nowhere", "num_classes": 2},
    ),
    "TextClassificationPipeline": (
        lambda place: ec.TextClassificationPipeline,
        lambda place: {"model_name": "/nowhere", "num_classes": 2},
    ),
    "register_head": (lambda place: ec.register_head, lambda place: {"kind": "linear", "head": object}),
}


def parameters(function: Callable[..., Any]) -> list[str]:
    many = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [each.name for each in inspect.signature(function).parameters.values() if each.kind not in many]


def fault(function: Callable[..., Any], given: dict[str, Any]) -> str | None:
    """What is wrong with how a call goes: an exception that is not ours, or of more than a line."""
    try:
        function(**given)
    except EmbedcacheError as error:
        return None if len(str(error).splitlines()) == 1 else f"{type(error).__name__} of several lines: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


# Some values are right for some parameters, and then train, warn or draw.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", [*ENTRIES, *HEAVY])
def test_wrong_arguments_are_one_line_of_ours(
    entry: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    find, given = (ENTRIES | HEAVY)[entry]
    function = find(place)
    if entry in ENTRIES:
        function(**given(place))
    found = []
    for name in parameters(function):
        if name in ("progress", "verbose", "batches"):  # two that would draw bars, and one for subclasses of ours
            continue
        for what, value in WRONG.items():
            said = fault(function, given(place) | {name: value})
            found += [f"{name}={what}: {said}"] if said else []
    if hasattr(function, "__wrapped__"):
        said = fault(function, given(place) | {"no_such_argument": 1})
        found += [f"an argument there is not: {said}"] if said else []
    assert not found, "\n".join(found)


def test_what_is_said_of_a_wrong_argument() -> None:
    @checks_arguments()
    def function(
        rows: Sequence[str], count: int = 3, *, share: float | None = None, kind: Literal["a", "b"] = "a",
        on: bool = True, where: Path | str = "", more: Any = None, **options: Any,
    ) -> str:  # fmt: skip
        return "done"

    for given, words in (
        ({"rows": "abc"}, "rows is 'abc': expected a list of texts"),
        ({"rows": ["x", 3]}, r"rows is \['x', 3\]: expected a list of texts"),
        ({"count": 2.5}, "count is 2.5: expected a whole number"),
        ({"count": True}, "count is True: expected a whole number"),
        ({"share": "half"}, "share is 'half': expected a number or None"),
        ({"kind": "c"}, "kind is 'c': expected a or b"),
        ({"on": 1}, "on is 1: expected True or False"),
        ({"where": 3}, "where is 3: expected a path or a text"),
        ({"count": "x" * 99}, r"count is 'x{30,}\.\.\.: expected"),
        ({"count": "a\nb"}, r"count is 'a\\nb': expected"),
    ):
        with pytest.raises(SpecError, match=words):
            function(**({"rows": []} | given))
    with pytest.raises(SpecError, match="missing a required argument: 'rows'"):
        function()  # type: ignore[call-arg]
    assert function(("x",), np.int64(3), share=np.float32(1), kind="b", on=np.True_, where=Path(), more=object(), any=1)
    assert function(np.array(["x"])) == "done"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ec.extract(ROWS, output_dir="x", max_lenght=3), "'max_lenght' (did you mean max_length?)"),
        (lambda: ec.extract(ROWS, output_dir="x", text_colum="t"), "'text_colum' (did you mean text_column?)"),
        (lambda: load_examples(ROWS, lables="none"), "'lables' (did you mean labels?)"),
        (lambda: ec.extract(ROWS), "extract missing a required argument: 'output_dir'"),
        (lambda: TrainSpec(epoch=3), "there is no setting 'epoch' (did you mean epochs?)"),
    ],
)
def test_a_misspelt_argument_is_answered_with_the_right_one(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(SpecError, match=re.escape(words)):
        call()
