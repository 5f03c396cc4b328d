"""Classes that are added to a head: what training on all of them would give, from the rows of the new ones alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from planted import Planted, planted_rows

import embedcache as ec
from embedcache.cache import FeatureCache
from embedcache.cli import cli
from embedcache.errors import BackboneMismatchError, EmbedcacheWarning, InputError, SpecError
from embedcache.extract import extract
from embedcache.heads import TrainedHead
from embedcache.spec import HeadSpec, TrainSpec
from embedcache.train import add_classes, evaluate_on_cache, train_on_cache

ROWS = planted_rows(240, test=60)
KINDS = [("nearest-centroid", {}), ("nearest-centroid", {"metric": "cosine"}), ("knn", {"weights": "softmax"})]
pytestmark = pytest.mark.filterwarnings("ignore:left as they are, as the head has them already")


def cached(folder: Path, labels: str, rows: Any = ROWS, **options: Any) -> FeatureCache:
    """A cache of the rows of some classes, which appear in this order."""
    chosen = [row for label in labels for row in rows if row["label"] == label]
    return extract(chosen, output_dir=folder / f"{labels}{len(options)}.cache", backbone=Planted(**options))


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FeatureCache]:
    folder = tmp_path_factory.mktemp("caches")
    return {labels: cached(folder, labels) for labels in ("xy", "xyz", "zyx", "z", "x")}


def trained(cache: FeatureCache, kind: str, options: Any, standardize: bool) -> TrainedHead:
    spec = TrainSpec(standardize=standardize)
    return train_on_cache(cache, HeadSpec(kind, "sklearn", options), spec, progress=False).head


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_it_is_training_on_all_classes_to_the_bit(kind: str, options: Any, caches: dict[str, FeatureCache]) -> None:
    """Without standardisation, which is that of the first classes; the order of the cache's classes is no matter."""
    head, whole = (trained(caches[labels], kind, options, False) for labels in ("xy", "xyz"))
    for other in ("xyz", "zyx", "z"):
        longer = add_classes(head, caches[other])
        assert longer.class_names == whole.class_names == ("x", "y", "z")
        assert {name: array.dtype for name, array in longer.state.items()} == {
            name: array.dtype for name, array in whole.state.items()
        }
        for name, array in whole.state.items():
            np.testing.assert_array_equal(longer.state[name], array)
        assert longer.training["added_classes"] == {"z": 54}
        assert longer.calibration == head.calibration
    plain = replace(longer, calibration=whole.calibration)
    metrics = [evaluate_on_cache(plain, caches[other], intervals=False) for other in ("xyz", "zyx")]
    assert metrics[0]["accuracy"] == metrics[1]["accuracy"] > 0.7
    assert metrics[0]["accuracy"] == evaluate_on_cache(whole, caches["xyz"], intervals=False)["accuracy"]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_what_is_there_keeps_every_bit_and_the_standardisation_is_the_first(
    kind: str, options: Any, caches: dict[str, FeatureCache], tmp_path: Path
) -> None:
    head = trained(caches["xy"], kind, options, True)
    longer = add_classes(head, caches["xyz"])
    for name, array in head.state.items():
        assert longer.state[name][: len(array)].tobytes() == array.tobytes()
    longer.save_pretrained(tmp_path / "run")
    again = TrainedHead.from_pretrained(tmp_path / "run")
    x, y = caches["xyz"].arrays("test")
    np.testing.assert_array_equal(again.logits(x), longer.logits(x))
    assert (again.predict(x) == y).mean() > 0.7
    if kind == "nearest-centroid" and not options:
        own, names = caches["z"].arrays("train")
        z = (own - head.state["output.mean"]) * head.state["output.scale"]
        assert not names.any()
        np.testing.assert_allclose(longer.state["output.weight"][2], z.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(longer.state["output.bias"][2], -0.5 * np.square(z.mean(axis=0)).sum(), rtol=1e-5)


def test_what_cannot_be_added_is_one_line(caches: dict[str, FeatureCache], tmp_path: Path) -> None:
    head = trained(caches["xy"], "nearest-centroid", {}, True)
    with pytest.raises(InputError, match="has no class to add: the head knows all its classes"):
        add_classes(head, caches["xy"])
    no_train = [row | {"split": "test" if row["label"] == "z" else row["split"]} for row in ROWS]
    with pytest.raises(InputError, match="no class to add: none of 'z' has a training row"):
        add_classes(head, cached(tmp_path, "xyz", no_train))
    with pytest.raises(BackboneMismatchError, match="other features"):
        add_classes(head, cached(tmp_path, "z", noise=0.5))
    with pytest.raises(SpecError, match="the head linear learns all classes together: add them to nearest-centroid"):
        add_classes(train_on_cache(caches["xy"], progress=False).head, caches["z"])
    with pytest.raises(SpecError, match="for multilabel: classes are added to a classification"):
        add_classes(replace(head, spec=HeadSpec("knn", "sklearn"), task="multilabel"), caches["z"])
    with pytest.raises(SpecError, match="saved by a former version: train it again"):
        add_classes(replace(head, spec=HeadSpec("knn", "sklearn"), state={}), caches["z"])
    with pytest.warns(EmbedcacheWarning, match="left as they are, as the head has them already: 'x', 'y'"):
        ec.add_classes(head, caches["zyx"])


def test_the_command(caches: dict[str, FeatureCache], tmp_path: Path) -> None:
    run, longer = str(tmp_path / "run"), str(tmp_path / "run2")
    trained(caches["xy"], "nearest-centroid", {}, True).save_pretrained(run)
    said = CliRunner().invoke(cli, ["add-classes", run, str(caches["z"].path), "-o", longer])
    assert "added z (54 rows): 3 classes now" in said.output
    assert "z (54 rows)" in (tmp_path / "run2" / "README.md").read_text()
    measured = CliRunner().invoke(cli, ["evaluate", longer, str(caches["zyx"].path), "--json"])
    assert json.loads(measured.stdout)["test"]["accuracy"] > 0.7
    others = (
        [row | {"label": "z", "split": "train"} for row in ROWS[:5]],
        [{"text": "x of w", "label": "w", "split": "test"}],
    )
    for rows, trial in (
        (others[0], ""),
        (others[0] + others[1], ""),  # evaluate does not know the class w
        ([*others[0], others[0][0] | {"split": "test"}], "evaluate RUN CACHE"),
        ([*others[0], others[0][0] | {"split": "validation"}], "evaluate RUN CACHE --split validation"),
    ):
        more, place = tmp_path / f"more{trial}{len(rows)}", tmp_path / f"of{trial}{len(rows)}"
        extract(rows, output_dir=more, backbone=Planted())
        said = CliRunner().invoke(cli, ["add-classes", run, str(more), "-o", str(place)])
        told = said.output.splitlines()[-1].replace(str(place), "RUN").replace(str(more), "CACHE")
        assert told == "saved in RUN" + (f": try  embedcache {trial}" if trial else "")
        if trial:
            words = [{"RUN": str(place), "CACHE": str(more)}.get(word, word) for word in trial.split()]
            assert CliRunner().invoke(cli, words).exit_code == 0
    said = CliRunner().invoke(cli, ["add-classes", longer, str(caches["z"].path), "-o", str(tmp_path / "run3")])
    assert isinstance(said.exception, InputError)
    assert not (tmp_path / "run3").exists()
