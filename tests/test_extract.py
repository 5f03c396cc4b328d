"""Extraction: only new rows cost anything, and nothing about the run can change a bit of the cache."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from fakes import CountingBackbone
from hypothesis import given
from hypothesis import strategies as st

from embedcache.backbone import LoadedBackbone, load_backbone
from embedcache.cache import FeatureCache, merge, relabel
from embedcache.errors import FeatureError, IncompleteCacheError, Interrupted, SpecError, SpecMismatchError
from embedcache.examples import load_examples
from embedcache.extract import Computed, Proof, Window, extract, forecast, parse_part, run, work
from embedcache.extract import windows as cutting


def rows(texts: list[str], labels: list[str] | None = None) -> list[dict[str, str]]:
    return [
        {"text": text, "label": (labels or ["a", "b"])[at % 2] if labels is None else labels[at]}
        for at, text in enumerate(texts)
    ]


def words(count: int, start: int = 0) -> list[str]:
    return [f"{'word ' * (at % 7)}number {at}" for at in range(start, start + count)]


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def by_key(cache: FeatureCache) -> dict[bytes, bytes]:
    features, _ = cache.arrays()
    return {bytes(key): row.tobytes() for key, row in zip(cache.keys(), features, strict=True)}


def test_second_extraction_makes_no_forward_call(tmp_path: Path) -> None:
    backbone = CountingBackbone()
    extract(rows(words(50)), output_dir=tmp_path / "c", backbone=backbone)
    assert backbone.forward_calls > 0
    before = files(tmp_path / "c")
    again = CountingBackbone()
    extract(rows(words(50)), output_dir=tmp_path / "c", backbone=again)
    assert again.forward_calls == 0
    assert files(tmp_path / "c") == before


def test_only_new_rows_are_computed(tmp_path: Path) -> None:
    extract(rows(words(50)), output_dir=tmp_path / "c", backbone=CountingBackbone())
    backbone = CountingBackbone()
    cache = extract(rows(words(53)), output_dir=tmp_path / "c", backbone=backbone)
    assert sorted(backbone.rows_seen) == sorted(text.encode() for text in words(3, 50))
    assert cache.n_rows == 53


def test_duplicates_are_computed_once(tmp_path: Path) -> None:
    backbone = CountingBackbone()
    cache = extract(rows(words(7) * 11), output_dir=tmp_path / "c", backbone=backbone)
    assert len(backbone.rows_seen) == 7
    assert cache.n_rows == 77
    features, _ = cache.arrays()
    assert np.array_equal(features[:7], features[70:])


def test_changed_labels_cost_no_forward_call(tmp_path: Path) -> None:
    extract(rows(words(20)), output_dir=tmp_path / "c", backbone=CountingBackbone())
    backbone = CountingBackbone()
    labels = ["new" if at % 3 else "old" for at in range(20)]
    cache = extract(rows(words(20), labels), output_dir=tmp_path / "c", backbone=backbone)
    assert backbone.forward_calls == 0
    assert cache.class_names == ("new", "old")
    again = relabel(tmp_path / "c", load_examples(rows(words(20))))
    assert again.class_names == ("a", "b")


@given(order=st.permutations(list(range(23))), per_shard=st.integers(1, 25), tokens=st.booleans())
def test_order_and_shard_size_change_no_bit(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], per_shard: int, tokens: bool
) -> None:
    folder = tmp_path_factory.mktemp("order")
    texts = words(23)
    one = extract(rows(texts), output_dir=folder / "a", backbone=CountingBackbone(tokens=tokens))
    shuffled = [texts[at] for at in order]
    other = extract(
        rows(shuffled), output_dir=folder / "b", backbone=CountingBackbone(tokens=tokens), rows_per_shard=per_shard
    )
    assert by_key(one) == by_key(other)
    assert len(other.manifest["shards"]) == -(-23 // per_shard)
    if tokens:
        ragged, shuffled_ragged = one.ragged(None, "tokens"), other.ragged(None, "tokens")
        for place, at in enumerate(order):
            mine = shuffled_ragged.values[shuffled_ragged.offsets[place] : shuffled_ragged.offsets[place + 1]]
            assert np.array_equal(mine, ragged.values[ragged.offsets[at] : ragged.offsets[at + 1]])


def test_eight_merged_parts_hold_the_same_rows(tmp_path: Path) -> None:
    texts = words(61) + words(5)
    whole = extract(rows(texts), output_dir=tmp_path / "whole", backbone=CountingBackbone())
    calls = []
    for part in range(1, 9):
        backbone = CountingBackbone()
        extract(rows(texts), output_dir=tmp_path / f"p{part}", backbone=backbone, part=f"{part}/8")
        calls += backbone.rows_seen
    merged = merge([tmp_path / f"p{part}" for part in range(1, 9)], tmp_path / "merged")
    assert len(calls) == 61
    assert np.array_equal(merged.arrays()[0], whole.arrays()[0])
    assert np.array_equal(merged.arrays()[1], whole.arrays()[1])
    assert np.array_equal(merged.keys(), whole.keys())


# Real transformers: nothing about a run changes a bit


SETS = ("mean", "cls@-2", "mean@all", "tokens")
REAL: dict[tuple[str, str], LoadedBackbone] = {}
WHOLE: dict[tuple[str, str], dict[bytes, bytes]] = {}


@pytest.fixture(scope="session")
def transformer(tiny: Callable[[str], Path], short_minilm: Path) -> Callable[[str, str], LoadedBackbone]:
    """Give a transformer, loaded once: a tiny one by its kind, or the real ``minilm``, cut short."""

    def load(kind: str, dtype: str) -> LoadedBackbone:
        if (kind, dtype) not in REAL:
            folder = short_minilm if kind == "minilm" else tiny(kind)
            REAL[kind, dtype] = load_backbone(
                str(folder), features=SETS, compute_dtype=dtype, device="cpu", positions=96
            )
        return REAL[kind, dtype]

    return load


def bits(cache: FeatureCache) -> dict[bytes, bytes]:
    """Key -> all features of the row."""
    found: dict[bytes, bytes] = {}
    ragged = cache.ragged(None, "tokens")
    for row, key in enumerate(cache.keys()):
        values = ragged.values[ragged.offsets[row] : ragged.offsets[row + 1]].tobytes()
        found[bytes(key)] = values
    for name in SETS[:-1]:
        features = cache.features(None, name)
        for row, key in enumerate(cache.keys()):
            found[bytes(key)] += features[row].tobytes()
    return found


def sentences(count: int) -> list[str]:
    """Different texts of many lengths, in words that every model knows."""
    generator = np.random.default_rng(count)
    lengths = generator.integers(1, 24, count)
    return [f"{' '.join(generator.choice(tiny_models.WORDS, length))} {at}" for at, length in enumerate(lengths)]


@pytest.mark.parametrize(("kind", "dtype"), [("bert", "float32"), ("gpt2", "bfloat16")])
@given(data=st.data())
def test_a_row_is_computed_alike_in_every_run(
    tmp_path_factory: pytest.TempPathFactory,
    transformer: Callable[[str, str], LoadedBackbone],
    kind: str,
    dtype: str,
    data: st.DataObject,
) -> None:
    """Permuted, a subset, in two sittings, in other shards, with other threads: bit for bit the same features."""
    backbone, folder, texts = transformer(kind, dtype), tmp_path_factory.mktemp("run"), sentences(31)
    if (kind, dtype) not in WHOLE:
        WHOLE[kind, dtype] = bits(extract(rows(texts), output_dir=folder / "whole", backbone=backbone, threads=1))
    whole = WHOLE[kind, dtype]
    order = data.draw(st.permutations(texts))
    count = data.draw(st.integers(1, len(texts)))
    first = data.draw(st.integers(1, count))
    for upto in (first, count):
        cache = extract(
            rows(list(order[:upto])), output_dir=folder / "c", backbone=backbone,
            rows_per_shard=data.draw(st.integers(1, 32)), threads=data.draw(st.sampled_from([1, 2])),
        )  # fmt: skip
        assert cache.n_rows == upto
    found = bits(cache)
    assert len(found) == count
    assert all(whole[key] == values for key, values in found.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_real_model_computes_a_row_alike_in_every_run(
    tmp_path: Path, transformer: Callable[[str, str], LoadedBackbone], dtype: str
) -> None:
    backbone, texts = transformer("minilm", dtype), sentences(41)
    whole = bits(extract(rows(texts), output_dir=tmp_path / "whole", backbone=backbone, threads=1))
    turned = texts[::-1]
    extract(rows(turned[:9]), output_dir=tmp_path / "c", backbone=backbone, rows_per_shard=4, threads=2)
    found = bits(extract(rows(turned[:29]), output_dir=tmp_path / "c", backbone=backbone, rows_per_shard=7, threads=2))
    assert len(found) == 29
    assert all(whole[key] == values for key, values in found.items())


class Stops:
    """Progress that presses Ctrl-C once more than ``rows`` rows are done."""

    def __init__(self, rows: int) -> None:
        self.left = rows

    def expect(self, tokens: int) -> None:
        pass

    def advance(self, rows: int, tokens: int) -> None:
        self.left -= rows
        if self.left < 0:
            raise KeyboardInterrupt

    def close(self) -> None:
        pass


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["bert", "minilm"])
def test_resumed_after_every_shard(
    tmp_path: Path, transformer: Callable[[str, str], LoadedBackbone], kind: str, dtype: str
) -> None:
    """As many sittings as there are shards, with threads that change: the same files, byte for byte."""
    backbone, data = transformer(kind, dtype), rows(sentences(37))
    extract(data, output_dir=tmp_path / "whole", backbone=backbone, rows_per_shard=8)
    sittings, complete = 0, False
    while not complete and sittings < 9:
        sittings += 1
        try:
            extract(
                data, output_dir=tmp_path / "c", backbone=backbone, rows_per_shard=8, threads=1 + sittings % 2,
                progress=Stops(8),
            )  # fmt: skip
            complete = True
        except Interrupted:
            pass
    assert (complete, sittings) == (True, 5)
    assert files(tmp_path / "c") == files(tmp_path / "whole")


def test_a_backbone_that_looks_at_its_neighbours_is_found(tmp_path: Path) -> None:
    """What these tests would see: features that depend on the batch a row is in."""

    class Neighbourly(CountingBackbone):
        def forward(self, prepared: Any, batch: Any) -> dict[str, Any]:
            out = super().forward(prepared, batch)
            return {"mean": out["mean"] + len(batch.indices)}

    one = extract(rows(words(23)), output_dir=tmp_path / "a", backbone=Neighbourly())
    other = extract(rows(words(11)), output_dir=tmp_path / "b", backbone=Neighbourly())
    assert any(by_key(one)[key] != value for key, value in by_key(other).items())


# A backbone of one's own, whose features become values once they are fetched

FETCHED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "a set less": (
        lambda out: {"mean": out["mean"]},
        r"gave the feature sets \['mean'\], expected \['mean', 'tokens'\]",
    ),
    "a set more": (lambda out: {**out, "more": out["mean"]}, r"gave the feature sets \['mean', 'more', 'tokens'\]"),
    "another width": (
        lambda out: {**out, "mean": out["mean"][:, 1:]},
        r"mean: got float32 \[\d+, 4\], expected .*N, 5",
    ),
    "complex numbers": (lambda out: {**out, "mean": out["mean"] * 1j}, "mean: got complex64"),
    "no counts": (lambda out: {**out, "tokens": out["tokens"][0]}, "tokens: the backbone gave one array, expected a"),
    "a count less": (
        lambda out: {**out, "tokens": (out["tokens"][0], out["tokens"][1][1:])},
        "offsets must be int64 and rise from 0 to",
    ),
    "a vector less": (
        lambda out: {**out, "tokens": (out["tokens"][0][1:], out["tokens"][1])},
        "offsets must be int64 and rise from 0 to",
    ),
    "other counts": (
        lambda out: {**out, "tokens": (out["tokens"][0][1:], out["tokens"][1] - (np.arange(len(out["mean"])) == 0))},
        "gave [0-9]+ vectors for [0-9]+ tokens",
    ),
}


@pytest.mark.parametrize("wrong", FETCHED)
def test_a_pass_that_does_not_fit_the_feature_sets_is_refused(tmp_path: Path, wrong: str) -> None:
    change, message = FETCHED[wrong]
    backbone = CountingBackbone(tokens=True)
    fetch = backbone.fetch
    backbone.fetch = lambda running: change(fetch(running))  # type: ignore[method-assign]
    with pytest.raises(FeatureError, match=message):
        extract(rows(words(23)), output_dir=tmp_path / "c", backbone=backbone)


def test_a_pass_may_give_lists_and_wider_numbers(tmp_path: Path) -> None:
    plain, wider = CountingBackbone(tokens=True), CountingBackbone(tokens=True)
    wider.fetch = lambda out: {  # type: ignore[method-assign]
        "mean": out["mean"].astype(np.float64),
        "tokens": [out["tokens"][0].tolist(), out["tokens"][1].astype(np.int32)],
    }
    extract(rows(words(23)), output_dir=tmp_path / "plain", backbone=plain)
    extract(rows(words(23)), output_dir=tmp_path / "wider", backbone=wider)
    assert files(tmp_path / "wider") == files(tmp_path / "plain")


# Who does the work


class Elsewhere:
    """An engine of other machines: windows go there and come back as bytes, the later ones sooner."""

    def __init__(self, backbone: Callable[[], Any], ahead: int) -> None:
        self.backbone, self.ahead, self.closed = backbone, ahead, False

    notes = ()

    def prove(self, backbone: Any, recorded: Any) -> Proof:
        return Proof(None, backbone.provenance)

    def close(self) -> None:
        pass

    def _there(self, window: bytes, wait: float) -> bytes:
        time.sleep(wait)
        return pickle.dumps(work(self.backbone(), pickle.loads(window)))

    def map(self, backbone: Any, windows: Iterator[Window], watch: Any) -> Iterator[Computed]:
        running: deque[Future[bytes]] = deque()
        try:
            with ThreadPoolExecutor(self.ahead) as pool:
                for number, window in enumerate(windows):
                    running.append(pool.submit(self._there, pickle.dumps(window), 0.02 * (number % self.ahead == 0)))
                    if len(running) == self.ahead:
                        yield pickle.loads(running.popleft().result())
                while running:
                    yield pickle.loads(running.popleft().result())
        finally:
            self.closed = True


@pytest.mark.parametrize("tokens", [False, True])
def test_whoever_does_the_work_the_files_are_the_same(tmp_path: Path, tokens: bool) -> None:
    examples = load_examples(rows(words(41) + words(3)))
    here = run(examples, CountingBackbone(tokens=tokens), tmp_path / "here", rows_per_shard=6)
    driver, others = CountingBackbone(tokens=tokens), [CountingBackbone(tokens=tokens) for _ in range(9)]
    engine = Elsewhere(iter(others).__next__, 3)
    there = run(examples, driver, tmp_path / "there", engine=engine, rows_per_shard=6)
    assert files(tmp_path / "there") == files(tmp_path / "here")
    assert (driver.forward_calls, sum(len(each.rows_seen) for each in others)) == (0, 41)
    assert replace(there, seconds=0) == replace(here, seconds=0)


def test_an_engine_that_fails_keeps_what_came_before(tmp_path: Path) -> None:
    examples = load_examples(rows(words(40)))
    workers = [CountingBackbone(), CountingBackbone(), Breaks(0, RuntimeError("a machine is gone"))]
    engine = Elsewhere(iter(workers).__next__, 1)
    with pytest.raises(RuntimeError, match="a machine is gone"):
        run(examples, CountingBackbone(), tmp_path / "c", engine=engine, rows_per_shard=6)
    assert engine.closed
    backbone = CountingBackbone()
    run(examples, backbone, tmp_path / "c", rows_per_shard=6)
    assert len(backbone.rows_seen) == 40 - 12


@given(sizes=st.lists(st.integers(1, 17), min_size=1, max_size=29), data=st.data())
def test_where_a_window_ends_depends_on_the_rows_from_its_start_on(sizes: list[int], data: st.DataObject) -> None:
    """Whatever was committed before: a run that goes on cuts the rest as the first one would have."""
    texts = [f"{at:02d}".ljust(2 + size, "x") for at, size in enumerate(sizes)]
    examples, todo = load_examples([{"text": text} for text in texts], labels="none"), np.arange(len(texts))
    backbone = CountingBackbone(tokens=data.draw(st.booleans()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "CONTENT_BYTES", 41)
        patch.setattr(cutting, "RAGGED_BYTES", 31 * 3 * 4)
        whole = [window.rows.tolist() for window in cutting.windows(examples, todo, backbone, 5)]
        assert [row for rows_of_window in whole for row in rows_of_window] == todo.tolist()
        done = data.draw(st.integers(0, len(whole) - 1))
        rest = todo[sum(map(len, whole[:done])) :]
        assert [window.rows.tolist() for window in cutting.windows(examples, rest, backbone, 5)] == whole[done:]


# Interruptions


class Breaks(CountingBackbone):
    """Raises at its n-th forward pass."""

    def __init__(self, at: int, error: BaseException, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.at, self.error = at, error

    def forward(self, prepared: object, batch: object) -> dict[str, object]:
        if self.forward_calls == self.at:
            raise self.error
        return super().forward(prepared, batch)  # type: ignore[arg-type]


@pytest.mark.parametrize("at", [0, 1, 3, 7, 11])
def test_interrupted_and_resumed_is_byte_identical(tmp_path: Path, at: int) -> None:
    texts = words(40)
    extract(rows(texts), output_dir=tmp_path / "whole", backbone=CountingBackbone(), rows_per_shard=6)
    with pytest.raises(Interrupted, match=r"of 40 new rows are committed .* run the same command again"):
        extract(rows(texts), output_dir=tmp_path / "c", backbone=Breaks(at, KeyboardInterrupt()), rows_per_shard=6)
    with pytest.raises(IncompleteCacheError):
        FeatureCache.open(tmp_path / "c")
    backbone = CountingBackbone()
    extract(rows(texts), output_dir=tmp_path / "c", backbone=backbone, rows_per_shard=6)
    assert files(tmp_path / "c") == files(tmp_path / "whole")
    if at >= 7:
        assert len(backbone.rows_seen) < 40


def test_a_failing_backbone_loses_nothing_committed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the GPU fell off"):
        extract(
            rows(words(40)),
            output_dir=tmp_path / "c",
            backbone=Breaks(9, RuntimeError("the GPU fell off")),
            rows_per_shard=6,
        )
    backbone = CountingBackbone()
    extract(rows(words(40)), output_dir=tmp_path / "c", backbone=backbone, rows_per_shard=6)
    assert 0 < len(backbone.rows_seen) < 40


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_non_finite_features_are_refused_with_the_row(tmp_path: Path, wrong: float) -> None:
    class Broken(CountingBackbone):
        def vector(self, content: bytes) -> np.ndarray:
            vector = super().vector(content)
            if content.endswith(b"number 17"):
                vector[2] = wrong
            return vector

    with pytest.raises(FeatureError, match=r"row 17 in the set mean"):
        extract(rows(words(30)), output_dir=tmp_path / "c", backbone=Broken())


def test_another_spec_is_refused_with_a_difference(tmp_path: Path) -> None:
    extract(rows(words(5)), output_dir=tmp_path / "c", backbone=CountingBackbone(name="one"))
    before = files(tmp_path / "c")
    with pytest.raises(SpecMismatchError, match=r"backbone\.weights: cache has 'one', asked for 'two'"):
        extract(rows(words(5)), output_dir=tmp_path / "c", backbone=CountingBackbone(name="two"))
    assert files(tmp_path / "c") == before


def test_one_extraction_opens_its_input_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, opened, real = tmp_path / "in.csv", [], builtins.open
    source.write_text("text,label\n" + "".join(f"{text},{number % 2}\n" for number, text in enumerate(words(30))))

    def counted(file: Any, *args: Any, **options: Any) -> Any:
        opened.append(str(file))
        return real(file, *args, **options)

    monkeypatch.setattr("builtins.open", counted)
    backbone = CountingBackbone()
    extract(str(source), output_dir=tmp_path / "c", backbone=backbone, keep_inputs=True, split="80/20", part="1/2")
    assert opened.count(str(source)) == 1


def test_input_changed_after_it_was_read_does_not_matter(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("text,label\n" + "".join(f"{text},{number % 2}\n" for number, text in enumerate(words(30))))
    examples = load_examples([str(source)])
    source.write_text(source.read_text().replace("number 17", "number 71"))
    run(examples, CountingBackbone(), tmp_path / "c")
    run(load_examples(rows(words(30))), CountingBackbone(), tmp_path / "expected")
    assert np.array_equal(
        FeatureCache.open(tmp_path / "c").features(), FeatureCache.open(tmp_path / "expected").features()
    )


def test_forecast_writes_nothing_and_counts_right(tmp_path: Path) -> None:
    examples = load_examples(rows(words(40) + words(3)))
    backbone = CountingBackbone(tokens=True)
    said = forecast(examples, backbone, tmp_path / "c", rows_per_shard=6)
    assert not (tmp_path / "c").exists()
    assert (said.rows, said.unique, said.to_extract, said.shards) == (43, 40, 40, 7)
    assert said.tokens == sum(len(text) for text in words(40))
    assert said.bytes == {"mean": 40 * 5 * 4, "tokens": said.tokens * 3 * 4}
    assert sum(each["rows"] for each in said.histogram) == 40
    assert said.computed == sum(each["rows"] * each["length"] * each["batches"] for each in said.shapes)
    run(load_examples(rows(words(30))), backbone, tmp_path / "c")
    again = forecast(examples, backbone, tmp_path / "c")
    assert (again.to_extract, again.already_there) == (10, 30)
    json.dumps(again.to_json())
    assert "positions for" in again.to_text()


@pytest.mark.parametrize("text", ["0/8", "9/8", "1", "a/b", "-1/8", "1/0"])
def test_nonsense_parts_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match="expected I/N"):
        parse_part(text)


CHILD = """
import sys
sys.path.insert(0, {tests!r})
from fakes import CountingBackbone
from embedcache.cli import run as cli_run
from embedcache.extract import extract
from embedcache.errors import Interrupted
try:
    print("started", flush=True)
    extract([{{"text": f"number {{at}}", "label": "ab"[at % 2]}} for at in range(400)],
            output_dir={out!r}, backbone=CountingBackbone(slow=0.02), rows_per_shard=20)
except Interrupted as stop:
    print(stop)
    sys.exit(stop.exit_code)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_signals_in_the_middle_lose_nothing(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "c"
    script = CHILD.format(tests=str(Path(__file__).parent), out=str(out))
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ})
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and len(list(out.glob("features/*.h5"))) < 2:
        time.sleep(0.01)
    child.send_signal(number)
    said, _ = child.communicate(timeout=30)
    if number == signal.SIGINT:
        assert child.returncode == 1
        assert "run the same command again" in said
    texts = [{"text": f"number {at}", "label": "ab"[at % 2]} for at in range(400)]
    backbone = CountingBackbone()
    extract(texts, output_dir=out, backbone=backbone, rows_per_shard=20)
    assert 0 < len(backbone.rows_seen) <= 380  # a shard may be in its place and not yet in the manifest
    extract(texts, output_dir=tmp_path / "whole", backbone=CountingBackbone(), rows_per_shard=20)
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize(("dtype", "supported"), [("bfloat16", False), ("bfloat16", True), ("float32", False)])
def test_a_half_type_without_instructions_is_told_of(
    dtype: str, supported: bool, tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    cache = extract(
        [{"text": "one", "label": "a"}], model=str(bert), output_dir=tmp_path / "c", device="cpu", compute_dtype=dtype
    )
    told = [note for note in cache.notes if "no instructions for bfloat16, which takes several times as long" in note]
    assert bool(told) == (dtype == "bfloat16" and not supported)
