"""What a machine computes is known: a probe that differs is told from an equal one, and nothing is mixed unasked."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fakes import CountingBackbone
from tiny_models import TEXTS

import embedcache as ec
import embedcache.backbone.compute as backbone_probe
import embedcache.backbone.text as backbone_text
from embedcache.backbone import FrozenModel, LoadedBackbone, load_backbone, probe_of
from embedcache.cache import FeatureCache
from embedcache.cli import cli as main
from embedcache.decoding import from_json
from embedcache.errors import CorruptCacheError, NumericsMismatchError
from embedcache.numerics import MOST_VALUES, Difference, Outcome, Probe, difference

ROWS = [{"text": text, "label": "ab"[at % 2]} for at, text in enumerate(TEXTS)]
FEATURES = ("mean", "tokens", "cls@all")


@pytest.fixture(scope="session")
def folder(tiny: Callable[[str], Path]) -> Path:
    return tiny("bert")


def load(folder: Path, **settings: Any) -> LoadedBackbone:
    return load_backbone(str(folder), features=FEATURES, device="cpu", **settings)


def probe(folder: Path, **settings: Any) -> Probe:
    found = probe_of(load(folder, **settings))
    assert found is not None
    return found


def other_versions(monkeypatch: pytest.MonkeyPatch, version: str = "0.0.1") -> None:
    versions = {"tokenizers": version, "transformers": "5"}
    monkeypatch.setattr(FrozenModel, "probe_versions", property(lambda self: versions))


def nudge(backbone: LoadedBackbone, ulps: int = 1 << 10) -> LoadedBackbone:
    """Change one weight a little, as no file of the model would show it."""
    with torch.no_grad():
        weight = next(each for name, each in backbone.network.named_parameters() if name.endswith("dense.weight"))
        weight.view(torch.int32)[3, 5] += ulps
    return backbone


# The value.


def test_a_probe_is_the_same_every_time_and_survives_json(folder: Path) -> None:
    first, second = probe(folder), probe(folder)
    assert first == second
    assert first.hash == second.hash
    assert difference(first, second) == Difference("same")
    again = from_json(Probe, json.loads(json.dumps(first.to_json())))
    assert again == first
    assert difference(first, again).same_bits
    lengths = load(folder).prepare(backbone_text.ROWS).lengths
    assert len(set(load(folder).policy.canonical(lengths).tolist())) == len(lengths) >= 3  # several canonical lengths


def test_each_change_is_told_from_equality_and_from_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = probe(folder)
    found = {
        "weight": difference(recorded, probe_of(nudge(load(folder)))),
        "prompt": difference(recorded, probe(folder, prompt="a film: ")),
    }
    with monkeypatch.context() as patch:
        other_versions(patch)
        found["versions"] = difference(recorded, probe(folder))
    found["none"] = difference(recorded, None)
    assert {name: each.status for name, each in found.items()} == {
        "weight": "features", "prompt": "inputs", "versions": "versions", "none": "unknown",
    }  # fmt: skip
    assert [name for name, each in found.items() if each.same_bits] == ["versions"]
    assert 0 < found["weight"].largest < 0.1
    assert "tokenizers 0.0.1 instead of" in found["versions"].to_text()
    assert f"up to {found['weight'].largest:.2g}" in found["weight"].to_text()
    assert found["none"].to_json()["same_bits"] is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_kernels_are_told_by_their_bits(short_minilm: Path, dtype: str) -> None:
    """Two threads a pass, without oneDNN, eager for sdpa: at least one of them computes other bits on every CPU."""

    def of(**settings: Any) -> Probe:
        found = probe_of(load_backbone(str(short_minilm), compute_dtype=dtype, device="cpu", **settings))
        assert found is not None
        return found

    recorded = of()
    assert difference(recorded, of()).status == "same"
    found = {"threads": difference(recorded, of(pass_threads=2)), "eager": difference(recorded, of(attention="eager"))}
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags warns of what it cannot set here
    try:
        found["without oneDNN"] = difference(recorded, of())
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert {each.status for each in found.values()} <= {"same", "features"}
    told = [name for name, each in found.items() if not each.same_bits]
    assert "eager" in told
    assert all(0 < found[name].relative < 0.2 for name in told)


def test_what_two_threads_change_is_seen(folder: Path) -> None:
    """A planted fault, because not every CPU's kernels depend on the number of threads at these shapes."""

    def of(count: int) -> Probe:
        backbone = load(folder, pass_threads=count)

        def scale(module: Any, inputs: Any, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state * (1 + 1e-6 * torch.get_num_threads())
            return output

        backbone.network.register_forward_hook(scale)
        found = probe_of(backbone)
        assert found is not None
        return found

    assert difference(of(1), of(1)).status == "same"
    assert difference(of(1), of(2)).status == "features"


def test_a_difference_that_the_kept_values_miss_is_told_by_the_hash() -> None:
    values = np.linspace(-1, 1, 2 * MOST_VALUES + 3, dtype=np.float32)
    other = values.copy()
    other[1] += 0.5  # every third is kept
    one, two = (Probe((), {}, {"mean": Outcome.of(each, "float32")}) for each in (values, other))
    assert one.outcomes["mean"].step == 3
    assert difference(one, two).status == "features"
    signed = Probe((), {}, {"mean": Outcome.of(np.zeros(3, np.float32), "float32")})
    negative = Probe((), {}, {"mean": Outcome.of(-np.zeros(3, np.float32), "float32")})
    assert difference(signed, negative).status == "features"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_stored_in_fewer_bits_is_compared_so(dtype: str) -> None:
    values = np.random.default_rng(1).normal(size=37).astype(np.float32)
    stored, exact = (Probe((), {}, {"mean": Outcome.of(values, each)}) for each in (dtype, "float32"))
    assert from_json(Probe, stored.to_json()) == stored
    assert difference(stored, exact).status == "same"
    assert difference(stored, Probe((), {}, {"mean": Outcome.of(values * 1.01, "float32")})).status == "features"


# In a cache.


def test_a_cache_records_its_probe(folder: Path, tmp_path: Path) -> None:
    backbone = load(folder)
    cache = ec.extract(ROWS[:5], output_dir=tmp_path / "c", backbone=backbone)
    assert cache.manifest["version"] == "1.1"
    assert cache.probe == probe(folder)
    assert [each["probe"] for each in cache.numerics()] == [cache.probe.hash]
    cache = ec.extract(ROWS, output_dir=tmp_path / "c", backbone=backbone)
    assert len(cache.numerics()) == 1
    assert {shard["provenance"]["probe"] for shard in cache.manifest["shards"]} == {cache.probe.hash}
    shown = CliRunner().invoke(main, ["info", str(tmp_path / "c")]).output
    assert f"numerics: probe {cache.probe.hash[:16]}" in shown
    assert json.loads(CliRunner().invoke(main, ["info", str(tmp_path / "c"), "--json"]).output)["numerics"]


def test_other_bits_are_refused_with_how_far_off_and_recorded_when_accepted(folder: Path, tmp_path: Path) -> None:
    where = tmp_path / "c"
    first = ec.extract(ROWS[:5], output_dir=where, backbone=load(folder))
    before = {path: path.read_bytes() for path in where.rglob("*") if path.is_file()}
    with pytest.raises(NumericsMismatchError, match=r"other bits: values differ by up to .*--accept-numerics"):
        ec.extract(ROWS, output_dir=where, backbone=nudge(load(folder)))
    assert {path: path.read_bytes() for path in where.rglob("*") if path.is_file()} == before
    ec.extract(ROWS[3:5], output_dir=where, backbone=nudge(load(folder)))  # no new row, so nothing is mixed
    cache = ec.extract(ROWS, output_dir=where, backbone=nudge(load(folder)), accept_numerics=True)
    kinds = cache.numerics()
    assert [(each["accepted"], each["status"]) for each in kinds] == [(False, "same"), (True, "features")]
    assert [shard["provenance"]["probe"] for shard in cache.manifest["shards"]] == [each["probe"] for each in kinds]
    assert cache.probe == first.probe
    more = [*ROWS, {"text": "one more", "label": "a"}]  # what was accepted once needs no flag again
    assert len(ec.extract(more, output_dir=where, backbone=nudge(load(folder))).numerics()) == 2
    assert ", accepted" in CliRunner().invoke(main, ["info", str(where)]).output


def test_other_versions_of_the_same_bits_are_recorded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ec.extract(ROWS[:5], output_dir=tmp_path / "c", backbone=load(folder))
    other_versions(monkeypatch)
    cache = ec.extract(ROWS, output_dir=tmp_path / "c", backbone=load(folder))
    assert [(each["accepted"], each["status"]) for each in cache.numerics()] == [(False, "same"), (False, "versions")]
    assert "the same bits as the first" in CliRunner().invoke(main, ["info", str(tmp_path / "c")]).output


def test_accepted_bits_need_no_flag_again_whichever_versions_prepare_the_rows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "c"
    ec.extract(ROWS[:4], output_dir=where, backbone=load(folder))
    ec.extract(ROWS[:6], output_dir=where, backbone=nudge(load(folder)), accept_numerics=True)
    other_versions(monkeypatch)
    cache = ec.extract(ROWS, output_dir=where, backbone=nudge(load(folder)))
    assert [each["accepted"] for each in cache.numerics()] == [False, True, True]


def test_a_cache_without_a_probe_is_extended_only_where_that_is_accepted(folder: Path, tmp_path: Path) -> None:
    where, backbone = tmp_path / "c", load(folder)
    silent = load(folder)
    silent.probe_rows = ()
    cache = ec.extract(ROWS[:5], output_dir=where, backbone=silent)
    assert (cache.manifest["version"], cache.probe) == ("1.0", None)
    assert "no probe" in CliRunner().invoke(main, ["info", str(where)]).output
    with pytest.raises(NumericsMismatchError, match="says nothing of what its machine computes"):
        ec.extract(ROWS, output_dir=where, backbone=backbone)
    mixed = ec.extract(ROWS, output_dir=where, backbone=backbone, accept_numerics=True)
    assert [(each["probe"], each["accepted"]) for each in mixed.numerics()] == [
        (None, False),
        (probe(folder).hash, True),
    ]
    assert (mixed.probe, mixed.numerics_of(probe(folder)).status) == (None, "unknown")
    assert "rows without a probe" in CliRunner().invoke(main, ["info", str(where)]).output
    clean = ec.extract(ROWS, output_dir=tmp_path / "clean", backbone=backbone)
    for parts in ([clean.path, where], [where, clean.path]):
        with pytest.raises(NumericsMismatchError):
            ec.merge(parts, tmp_path / "merged")
    bare = ec.extract(ROWS[:3], output_dir=tmp_path / "bare", backbone=silent)
    with pytest.raises(NumericsMismatchError):
        ec.merge([bare.path], clean.path)


def test_rows_of_several_kinds_are_never_called_the_same(folder: Path, tmp_path: Path) -> None:
    ec.extract(ROWS[:5], output_dir=tmp_path / "c", backbone=load(folder))
    cache = ec.extract(ROWS, output_dir=tmp_path / "c", backbone=nudge(load(folder)), accept_numerics=True)
    assert cache.numerics_of(probe(folder)).status == "features"
    assert cache.common_probe is None
    clean = ec.extract(ROWS, output_dir=tmp_path / "clean", backbone=load(folder))
    with pytest.raises(NumericsMismatchError):  # what was accepted there was not accepted here
        ec.merge([clean.path, cache.path], tmp_path / "merged")


def test_rows_that_a_tokenizer_does_not_take_are_left_out(folder: Path) -> None:
    backbone = load(folder)
    prepare = backbone.prepare

    def particular(contents: Any) -> Any:
        if any(len(content) < 20 for content in contents):
            raise Exception("WordLevel error: Missing [UNK]")
        return prepare(contents)

    backbone.prepare = particular  # type: ignore[method-assign]
    found = probe_of(backbone)
    assert found is not None
    assert len(found.inputs) == 2
    backbone.probe_rows = backbone.probe_rows[:1]
    assert probe_of(backbone) is None


def test_a_backbone_of_ones_own_needs_none(tmp_path: Path) -> None:
    for count in (3, 7):
        cache = ec.extract(ROWS[:count], output_dir=tmp_path / "c", backbone=CountingBackbone())
    assert (cache.manifest["version"], cache.numerics()) == ("1.0", [])


def test_parts_of_other_numerics_are_merged_only_where_that_is_accepted(folder: Path, tmp_path: Path) -> None:
    one = ec.extract(ROWS, output_dir=tmp_path / "1", backbone=load(folder), part="1/2").path
    two = ec.extract(ROWS, output_dir=tmp_path / "2", backbone=nudge(load(folder)), part="2/2").path
    same = ec.extract(ROWS, output_dir=tmp_path / "3", backbone=load(folder), part="2/2").path
    silent = load(folder)
    silent.probe_rows = ()
    none = ec.extract(ROWS, output_dir=tmp_path / "4", backbone=silent, part="2/2").path
    assert len(ec.merge([one, same], tmp_path / "same").numerics()) == 1
    for other, reason in ((two, "values differ by up to"), (none, "says nothing")):
        with pytest.raises(NumericsMismatchError, match=reason):
            ec.merge([one, other], tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
    found = CliRunner().invoke(main, ["merge", str(one), str(two), "-o", str(tmp_path / "both"), "--accept-numerics"])
    assert found.exit_code == 0, found.output
    merged = FeatureCache.open(tmp_path / "both")
    assert [each["accepted"] for each in merged.numerics()] == [False, True]


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["numerics"][0]["probe"].pop("inputs"),
        lambda body: body["numerics"][0]["probe"]["outcomes"].pop("mean"),
        lambda body: body["numerics"][0]["probe"]["outcomes"]["mean"].update(values="!!"),
        lambda body: body["numerics"][0]["probe"]["outcomes"]["mean"].update(size=7),
        lambda body: body["numerics"][0]["probe"]["outcomes"]["mean"].update(step=0),
        lambda body: body["numerics"][0]["probe"].update(versions={"tokenizers": 1}),
        lambda body: body["numerics"][0].update(accepted=1),
        lambda body: body.update(numerics={}),
    ],
)
def test_a_hostile_probe_is_refused(folder: Path, tmp_path: Path, change: Callable[[Any], Any]) -> None:
    from embedcache.cache import manifest
    from embedcache.fingerprint import hash_json

    cache = ec.extract(ROWS[:2], output_dir=tmp_path / "c", backbone=load(folder))
    body = {name: value for name, value in cache.manifest.items() if name != "manifest_hash"}
    body = json.loads(json.dumps(body))
    change(body)
    (tmp_path / "c" / "manifest.json").write_bytes(manifest.encoded({**body, "manifest_hash": hash_json(body)}))
    with pytest.raises(CorruptCacheError, match="is damaged"):
        FeatureCache.open(tmp_path / "c")


# Whoever uses it.


def test_a_head_knows_and_predict_evaluate_and_check_say(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"{a} {b}", "label": "ab"[at % 2]} for at, (a, b) in enumerate(pairwise(TEXTS))] * 8
    settings: dict[str, Any] = {"output_dir": tmp_path / "c", "model": str(folder), "split": "50/50", "device": "cpu"}
    for at, row in enumerate(rows):
        row["text"] += f" {'good ' * (at % 7)}"
    cache = ec.extract(rows, pooling="mean", max_length=31, keep_inputs=True, **settings)
    run = tmp_path / "run"
    result = ec.train_on_cache(cache, "linear", progress=False)
    result.save(run)
    head = result.head
    assert head.probe == cache.probe
    assert ec.TrainedHead.from_pretrained(run).probe == cache.probe
    runner = CliRunner()

    def json_of(*arguments: str) -> Any:
        found = runner.invoke(main, [*arguments, "--json"])
        assert found.exit_code in (0, 1), found.output
        assert found.stdout, found.exception
        return json.loads(found.stdout)["numerics"]

    commands = (
        ("predict", str(run), "--text", "good", "--device", "cpu"),
        ("check", str(cache.path), "--device", "cpu", "--reference", "canonical", "--rows", "8"),
    )
    for command in commands:
        assert json_of(*command)["status"] == "same"
    assert json_of("evaluate", str(run), str(cache.path), "--split", "test")["status"] == "same"
    assert ec.Predictor.load(run, device="cpu").numerics.same_bits
    probed = backbone_probe.probe_of

    def nudged(backbone: Any) -> Any:
        return probed(nudge(backbone))

    monkeypatch.setattr("embedcache.predict.predictor.probe_of", nudged)
    monkeypatch.setattr("embedcache.equivalence.check.probe_of", nudged)
    for command in commands:
        assert json_of(*command)["largest"] > 0
    with pytest.warns(ec.EmbedcacheWarning, match="trained on: other bits: values differ by up to"):
        assert not ec.Predictor.load(run, device="cpu").numerics.same_bits
    assert "numerics: other bits" in runner.invoke(main, [*commands[1]]).output
    monkeypatch.setattr(import_module("embedcache.extract.here"), "probe_of", nudged)
    shutil.rmtree(cache.path)
    ec.extract(rows, pooling="mean", max_length=31, **settings)
    assert json_of("evaluate", str(run), str(cache.path), "--split", "test")["status"] == "features"
    with pytest.warns(ec.EmbedcacheWarning, match="against what the head was trained on: other bits"):
        ec.evaluate_on_cache(head, FeatureCache.open(cache.path))


def test_a_fitted_extractor_says_when_a_machine_computes_otherwise(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedcache.estimator import extractor

    fitted = ec.FeatureExtractor(str(folder), "mean", cache_dir=tmp_path, device="cpu").fit(TEXTS)
    fitted.transform(TEXTS[:2])
    again = pickle.loads(pickle.dumps(fitted))
    extractor._probe_of.cache_clear()
    nudged = probe_of(nudge(load_backbone(str(folder), features=["mean"], device="cpu")))
    monkeypatch.setattr(extractor, "probe_of", lambda _: nudged)
    with pytest.warns(ec.EmbedcacheWarning, match="fitted on: other bits: values differ by up to"):
        again.transform(TEXTS[:2])
    assert len(list(tmp_path.iterdir())) == 2  # a folder for each kind of machine
    extractor._probe_of.cache_clear()
