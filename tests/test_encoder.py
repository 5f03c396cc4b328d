"""A callable in the place of a model: extracted, resumed, extended, checked, predicted with; another one is told."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_caches
import torch

from embedcache import EmbedcacheWarning, Predictor, check_equivalence, cli, evaluate_on_cache, extract, train_on_cache
from embedcache.cache import FeatureCache
from embedcache.errors import BackboneError, EmbedcacheError

pytestmark = pytest.mark.filterwarnings("ignore::embedcache.errors.EmbedcacheWarning")
ROWS = [{"text": f"{'good' if row % 2 else 'bad'} film {row}é", "label": "np"[row % 2]} for row in range(61)]
SAID = {"model": "counts", "version": 2}
SPLIT = "60/20/20"


class Counting:
    """Counts letters of texts, and its own calls."""

    def __init__(self, factor: float = 1.0, fail_after: int | None = None) -> None:
        self.factor, self.fail_after, self.calls = factor, fail_after, [0] * 0

    def __call__(self, rows: list[str]) -> Any:
        if self.fail_after is not None and len(self.calls) >= self.fail_after:
            raise TimeoutError("the API\nis away")
        self.calls.append(len(rows))
        return [[self.factor * len(row), row.count("o"), sum(map(ord, row)) % 97, 1.5, row.count("g")] for row in rows]


def made(where: Path, encoder: Callable[[list[Any]], Any], rows: Any = ROWS, **options: Any) -> FeatureCache:
    given = {"encoder": encoder, "identity": SAID, "split": SPLIT, "progress": None, **options}
    return extract(rows, output_dir=where, **given)


def test_rows_are_computed_once_in_batches_of_one_size(tmp_path: Path) -> None:
    encoder = Counting()
    cache = made(tmp_path / "c", encoder, [*ROWS, ROWS[3]], rows_per_shard=17, positions=20)
    assert set(encoder.calls) == {16}
    assert cache.spec["source"] == {
        "kind": "encoder", "identity": SAID, "content": "text", "reads": "text", "rows": 16
    }  # fmt: skip
    assert np.array_equal(cache.features(), Counting()([row["text"] for row in [*ROWS, ROWS[3]]]))
    before, encoder.calls = small_caches.files(tmp_path / "c"), []
    made(tmp_path / "c", encoder, [*ROWS, ROWS[3]], positions=16)
    assert (encoder.calls, small_caches.files(tmp_path / "c")) == ([], before)
    made(tmp_path / "c", encoder, [*ROWS, {"text": "new", "label": "n"}], positions=16)
    assert len(encoder.calls) == 3  # built-in rows, seen and run, and one batch


def test_an_encoder_that_fails_is_gone_on_with(tmp_path: Path) -> None:
    made(tmp_path / "whole", Counting(), rows_per_shard=17)
    with pytest.raises(
        BackboneError, match=r"failed on a batch of 32 rows \(TimeoutError: the API is away\): what was"
    ):
        made(tmp_path / "c", Counting(fail_after=5), rows_per_shard=17)
    encoder = Counting()
    made(tmp_path / "c", encoder, rows_per_shard=17)
    assert len(encoder.calls) < 7
    assert small_caches.files(tmp_path / "c") == small_caches.files(tmp_path / "whole")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"identity": None}, "an encoder needs an identity: what it is"),
    ({"identity": {}}, r"identity is \{\}: expected names with values that JSON has"),
    ({"identity": {"weights": object()}}, "expected names with values that JSON has"),
    ({"identity": {**SAID, "version": 3}}, "source.identity.version: cache has 2, asked for 3"),
    ({"encoder": Counting(2.0)}, "other bits: values differ by up to .* in features"),
    (
        {"encoder": lambda rows: np.zeros((len(rows), 4))},
        "the encoder gives 4 numbers a row, expected 5: another model",
    ),
    ({"storage_dtype": "float16"}, "storage_dtype: cache has 'float32', asked for 'float16'"),
    ({"positions": 8}, "source.rows: cache has 32, asked for 8"),
    ({"max_length": 5}, "max_length is a setting of models, and an encoder is given"),
    ({"model": "x"}, "encoder is given, and a model too"),
    ({"reads": "image"}, "reads is 'image': expected text or bytes"),
    ({"encoder": None}, "identity and reads tell of an encoder, and none is given"),
    ({"encoder": 5}, "encoder is 5: expected"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_what_is_wrong_is_one_line_and_loses_nothing(case: int, tmp_path: Path) -> None:
    given, message = WRONG[case]
    made(tmp_path / "c", Counting())
    before = small_caches.files(tmp_path / "c")
    with pytest.raises(EmbedcacheError, match=message) as caught:
        made(tmp_path / "c", rows=[*ROWS, {"text": "new", "label": "n"}], **{"encoder": Counting(), **given})
    assert "\n" not in str(caught.value)
    assert small_caches.files(tmp_path / "c") == before


GIVEN = [
    (lambda rows: np.zeros((len(rows) - 1, 5)), r"the encoder gave \[31, 5\] for 32 rows: expected \[32, D\]"),
    (lambda rows: np.zeros(len(rows)), r"the encoder gave \[32\] for 32 rows"),
    (lambda rows: [["a"]] * len(rows), "the encoder gave what is no array of numbers"),
    (lambda rows: np.full((len(rows), 3), np.nan), "NaN or infinity for row 0"),
]


@pytest.mark.parametrize("case", range(len(GIVEN)))
def test_what_an_encoder_must_not_give(case: int, tmp_path: Path) -> None:
    encoder, message = GIVEN[case]
    with pytest.raises(EmbedcacheError, match=message):
        made(tmp_path / "c", encoder)


def test_a_head_predicts_with_its_encoder_and_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = made(tmp_path / "c", Counting())
    result = train_on_cache(cache, "linear", progress=False)
    result.save(tmp_path / "run")
    predictor = Predictor.load(tmp_path / "run", encoder=Counting())
    probabilities = result.head.probabilities(cache.features())
    for prediction, expected in zip(predictor([row["text"] for row in ROWS]), probabilities, strict=True):
        assert list(prediction.probabilities.values()) == expected.tolist()
    assert evaluate_on_cache(result.head, cache, "test")["rows"] == cache.split_sizes()["test"]
    with pytest.raises(EmbedcacheError, match=r"the encoder is not the one that the head was trained on .*counts"):
        Predictor.load(tmp_path / "run", encoder=Counting(3.0))
    with pytest.warns(EmbedcacheWarning, match="numerics, against what the head was trained on: other bits"):
        Predictor.load(tmp_path / "run", encoder=Counting(1 + 1e-6))
    assert cli.run(["predict", str(tmp_path / "run"), "--text", "good"]) == 1
    assert "pass it in Python: Predictor.load(RUN, encoder=...)" in capsys.readouterr().err


def test_a_check_runs_the_encoder_or_says_what_it_does_not_prove(tmp_path: Path) -> None:
    cache = made(tmp_path / "c", Counting(), keep_inputs=True)
    whole = check_equivalence(cache, encoder=Counting(), head="linear", progress=False)
    assert whole.equal
    assert {row.reference for row in whole.comparisons} == {"canonical"}
    assert any(row.what == "features features" for row in whole.comparisons)
    other = check_equivalence(cache, encoder=Counting(1.001), head="linear", progress=False)
    assert "features features: 61 of 61 rows differ" in other.reason
    alone = check_equivalence(cache, ROWS, head="linear", progress=False)
    assert alone.equal
    assert any("pass the encoder" in note.lower() for note in alone.notes)


def test_tensors_and_bytes(tmp_path: Path) -> None:
    weight = torch.ones(256, 3, requires_grad=True)

    def encode(rows: list[bytes]) -> torch.Tensor:
        return torch.stack([weight[list(row)].mean(dim=0) * len(row) for row in rows])

    cache = made(tmp_path / "c", encode, reads="bytes", storage_dtype="float16")
    assert np.array_equal(cache.features()[:, 0], [len(row["text"].encode()) for row in ROWS])
    assert cache.feature_sets["features"].dtype == "float16"


def test_pictures(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    files = []
    for row in range(17):
        file = io.BytesIO()
        pillow.new("RGB", (5, 7), (15 * row, 0, 255)).save(file, "PNG")
        files.append({"image": file.getvalue(), "label": row % 2})

    def encode(rows: list[Any]) -> np.ndarray:
        assert {(picture.mode, picture.size) for picture in rows if picture.width == 5} <= {("RGB", (5, 7))}
        return np.stack([np.asarray(picture).mean(axis=(0, 1)) for picture in rows])

    cache = made(tmp_path / "c", encode, files, split="80/20")
    assert np.allclose(cache.features()[:, 0], [15 * row for row in range(17)])
    assert cache.spec.content == "image"
    train_on_cache(cache, "linear", progress=False).save(tmp_path / "run")
    assert Predictor.load(tmp_path / "run", encoder=encode)([files[0]["image"]])[0].label in "01"
