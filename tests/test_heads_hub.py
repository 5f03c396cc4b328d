"""Heads on a hub, against a server on this machine: sent as one commit, fetched to the byte, refused in one line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from hub_server import Hub, card_errors, serving
from huggingface_hub import ModelCard

import embedcache as ec
from embedcache.cli import run
from embedcache.cli.options import Input
from embedcache.errors import BundleError, SpecError
from embedcache.heads import TrainedHead
from embedcache.heads.folder import record
from embedcache.heads.record import base_model, model_card
from embedcache.shard import FeatureSet
from embedcache.spec import ExtractionSpec, HeadSpec

MEAN = FeatureSet("mean", "pooled", 5, 1, "float32")
METRICS = {
    "train": {"accuracy": 1.0},
    "test: all": {"accuracy": 0.75, "f1_macro": 0.5, "ece": 0.1, "rows": 12, "mcc": None},
}


def head(kind: str = "linear", **fields: Any) -> TrainedHead:
    generator = np.random.default_rng(7)
    state = {"output.weight": generator.normal(size=(3, 5)).astype(np.float32), "output.bias": np.zeros(3, np.float32)}
    spec = ExtractionSpec({"backbone": {"architecture": "Bert"}, "preprocessing": {"kind": "text"}})
    made = TrainedHead(
        HeadSpec(kind), "classification", ("a", "b: c", "🙂"), MEAN, state, extraction=spec, model="some/model",
        revision="0" * 40,
    )  # fmt: skip
    return replace(made, **fields)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for the real one, and that lets us in."""
    with serving() as there:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", there.endpoint)
        resolve = f"{there.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolve)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_TOKEN", there.token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield there


def same(one: TrainedHead, other: TrainedHead) -> bool:
    x = np.random.default_rng(3).normal(size=(11, 5)).astype(np.float32)
    return np.array_equal(one.logits(x), other.logits(x)) and one.class_names == other.class_names


def test_a_head_there_and_back(hub: Hub, tmp_path: Path) -> None:
    first = head()
    url = first.push_to_hub("me/head", metrics=METRICS, facts={"rows": 61}, private=True)
    assert url.startswith(f"{hub.endpoint}/me/head/commit/01")
    assert set(hub.commits["me/head"][-1]) == {
        ".gitattributes", "README.md", "config.json", "history.jsonl", "metrics.json", "model.safetensors",
    }  # fmt: skip
    assert same(TrainedHead.from_pretrained("me/head"), first)
    assert same(TrainedHead.from_pretrained("hf://me/head"), first)
    fetched = len(hub.fetched)
    second = head(state={name: array + 1 for name, array in first.state.items()})
    second.save_pretrained(tmp_path / "run")
    second.save_pretrained(tmp_path / "run")  # saved over, its arrays have a name with their hash
    record(tmp_path / "run", "test", {"accuracy": 0.5})
    assert run(["push", str(tmp_path / "run"), "hf://me/head"]) == 0
    files = hub.commits["me/head"][-1]
    local = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert {name: data for name, data in files.items() if name != ".gitattributes"} == local  # nothing of the first
    assert same(TrainedHead.from_pretrained("me/head"), second)
    assert same(TrainedHead.from_pretrained("me/head", revision=hub.sha("me/head", 1)), first)
    assert same(TrainedHead.from_pretrained(f"hf://me/head@{hub.sha('me/head', 1)}"), first)
    assert len(set(hub.fetched[fetched:])) == len(hub.fetched[fetched:])  # each once, the first not again


def test_without_a_network_what_was_fetched_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    head().push_to_hub("me/head")
    TrainedHead.from_pretrained("me/head")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert same(TrainedHead.from_pretrained("me/head"), head())
    with pytest.raises(BundleError, match="the head 'me/other' is not on this machine and the hub cannot be reached"):
        TrainedHead.from_pretrained("me/other")


def test_a_mistyped_folder_is_no_matter_of_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match=r"^there is no folder runs/bset, and the hub has no model 'runs/bset'"):
        TrainedHead.from_pretrained("runs/bset")
    (tmp_path / "runs").mkdir()
    for command in (
        ["predict", "runs/bset", "--text", "x"],
        ["evaluate", "runs/bset", "c"],
        ["export", "runs/bset", "--to", "onnx", "-o", "x"],
    ):
        assert run(command) == 1
        assert capsys.readouterr().err == (
            "error: there is no folder runs/bset: make one with embedcache train CACHE -o runs/bset, or write "
            "hf://runs/bset for a head on the hub\n"
        )
    with pytest.raises(BundleError, match=r"^the hub has no model 'runs/bset'"):
        TrainedHead.from_pretrained("hf://runs/bset")


def test_a_part_that_the_hubs_client_has_is_not_kept_for_a_head(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    head().push_to_hub("me/head")
    huggingface_hub.hf_hub_download("me/head", "config.json", endpoint=hub.endpoint)
    with monkeypatch.context() as cut:
        cut.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(BundleError, match=r"me/head.*model\.safetensors is missing.*fetched in part\? connect"):
            TrainedHead.from_pretrained("me/head")
    assert same(TrainedHead.from_pretrained("me/head"), head())


def test_a_run_whose_backbone_was_trained_takes_it_along(hub: Hub, tmp_path: Path) -> None:
    name = "backbone-" + hashlib.sha256(b"x").hexdigest()[:16]
    head(model=f"./{name}", revision=None).save_pretrained(tmp_path / "run")
    (tmp_path / "run" / name).mkdir()
    (tmp_path / "run" / name / "config.json").write_text("{}")
    ec.push_head(tmp_path / "run", "me/tuned")
    again = TrainedHead.from_pretrained("me/tuned")
    assert Path(again.model or "", "config.json").read_text() == "{}"
    with pytest.raises(BundleError, match="send the run's folder with push_head"):
        again.push_to_hub("me/other")


def test_what_the_hub_refuses(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commits["me/bert"] = [{"config.json": b'{"architectures": ["BertModel"]}'}]
    with pytest.raises(BundleError, match="me/bert holds another model than a head: choose another repository"):
        head().push_to_hub("me/bert")
    assert len(hub.commits["me/bert"]) == 1
    hub.commits["me/weights"] = [{".gitattributes": b"", "README.md": b"mine", "model.safetensors": b"precious"}]
    with pytest.raises(BundleError, match=r"me/weights holds model\.safetensors and no head: choose another"):
        head().push_to_hub("me/weights")
    assert len(hub.commits["me/weights"]) == 1
    with pytest.raises(BundleError, match=r"is not what a head's config must be|not the config of an embedcache head"):
        TrainedHead.from_pretrained("me/bert")
    with pytest.raises(BundleError, match=r"the hub has no model 'me/none' .or it is private"):
        TrainedHead.from_pretrained("me/none")
    with pytest.raises(BundleError, match="no revision 'v9' of it"):
        TrainedHead.from_pretrained("me/bert", revision="v9")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(BundleError, match=r"^cannot send .*run to me/head: .*401.*\(hf auth login stores a token\)$"):
        head().push_to_hub("me/head")


def test_what_cannot_be_sent_or_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a run folder"):
        ec.push_head(tmp_path, "me/head")
    head().save_pretrained(tmp_path / "run")
    with pytest.raises(SpecError, match="gs://me/head is not the name of a head on the hub: expected hf://user/name"):
        ec.push_head(tmp_path / "run", "gs://me/head")
    with pytest.raises(SpecError, match="is a local folder, and a revision is of a repository"):
        TrainedHead.from_pretrained(tmp_path / "run", revision="main")
    for missing in ("./runs/best", tmp_path / "none"):
        with pytest.raises(BundleError, match=r"is not a run folder .it is not there"):
            TrainedHead.from_pretrained(missing)


# The card.


def test_the_card_has_what_the_hub_reads() -> None:
    text = model_card(head(), METRICS, {})
    card = ModelCard(text)
    assert (card.data.pipeline_tag, card.data.base_model) == ("text-classification", "some/model")
    assert card.data.to_dict()["library_name"] == "embedcache"
    results = [(each.dataset_split, each.metric_type, each.metric_value) for each in card.data.eval_results]
    assert results == [("test: all", "accuracy", 0.75), ("test: all", "f1", 0.5)]
    assert card_errors(text) == []
    assert not ModelCard(model_card(head(), {}, {})).data.eval_results


@pytest.mark.parametrize(
    ("content", "task", "tag"),
    [
        ({"preprocessing": {"kind": "text"}}, "multilabel", "text-classification"),
        ({"preprocessing": {"kind": "image"}}, "regression", "image-classification"),
        ({}, "classification", "tabular-classification"),
        ({}, "regression", "tabular-regression"),
    ],
)
def test_the_task_follows_the_content(content: dict[str, Any], task: Any, tag: str) -> None:
    text = model_card(head(extraction=ExtractionSpec(content), task=task), METRICS, {})
    assert ModelCard(text).data.pipeline_tag == tag
    assert card_errors(text) == []


def test_only_what_is_on_the_hub_is_a_base_model() -> None:
    assert base_model(head(model="all-MiniLM-L6-v2", revision=None)) == "sentence-transformers/all-MiniLM-L6-v2"
    for model, revision in (("some/model", None), ("/home/me/model", "main"), ("./backbone-0", "main"), (None, None),
                            ("a b", "main"), ("x: y", "main")):  # fmt: skip
        assert base_model(head(model=model, revision=revision)) is None


@pytest.mark.parametrize(
    ("card", "error"),
    [
        ("no metadata", "no metadata"), ("---\na: [\n---\n", "not YAML"),
        ("---\npipeline_tag: guessing\n---\n", "pipeline_tag"), ("---\nbase_model: /home/me\n---\n", "base_model"),
        ('---\nmodel-index: [{"name": "x", "results": []}]\n---\n', "no name or results"),
        ('---\nmodel-index: [{"name": "x", "results": [{"task": {"type": "text-classification"}, "dataset": '
         '{"name": "x"}, "metrics": [{"type": "f1", "value": 1}]}]}]\n---\n', "a data set without"),
        ('---\nmodel-index: [{"name": "x", "results": [{"task": {"type": "text-classification"}, "dataset": '
         '{"name": "x", "type": "y"}}]}]\n---\n', "a metric has no"),
    ],
)  # fmt: skip
def test_a_wrong_card_is_seen(card: str, error: str) -> None:
    assert error in "".join(card_errors(card))


def test_rows_set_aside_lie_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text('text\nfine\n""\n')
    options = {"text_column": "text", "on_bad_row": "skip", "quarantine": None}
    assert len(Input(["rows.csv"], options).examples("hf://me/head.quarantine.jsonl", labels="none")) == 1
    assert Path("head.quarantine.jsonl").is_file()
