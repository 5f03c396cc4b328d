"""Engines: whoever computes and whoever is lost, the files are those of one process; bad rows and workers are named."""

from __future__ import annotations

import json
import pickle
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from crews import Crew, Mortal
from fakes import CountingBackbone
from hypothesis import given
from hypothesis import strategies as st

from embedcache.backbone import load_backbone
from embedcache.batching import ShapePolicy, plan
from embedcache.cache import CacheWriter, FeatureCache, merge, read_spec
from embedcache.cli import run as cli_run
from embedcache.errors import (
    BackboneError,
    BadRowsError,
    EmbedcacheWarning,
    FeatureError,
    InputError,
    NumericsMismatchError,
    SpecError,
    WorkerRefusedError,
    quiet,
)
from embedcache.examples import Examples, load_examples
from embedcache.extract import (
    Bar,
    Elsewhere,
    Window,
    crew,
    elsewhere,
    engine_for,
    extract,
    load_for,
    part_of,
    run,
    work,
    worker,
)
from embedcache.extract.actors import Actors
from embedcache.extract.crew import Given
from embedcache.extract.progress import Watch
from embedcache.extract.units import Unit, units_of
from embedcache.fingerprint import row_key
from embedcache.spec import BackboneSettings, ModelSource


class Probed(CountingBackbone):
    """One that has built-in rows; ``nudge`` is what it computes besides."""

    def __init__(self, nudge: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.probe_rows, self.nudge = (b"a row", b"another row of other length"), nudge

    def vector(self, content: bytes) -> np.ndarray:
        return super().vector(content) + np.float32(self.nudge)


def words(count: int) -> list[str]:
    return [f"text {number} " + "x" * (number * 7 % 41) for number in range(count)]


def rows(texts: list[str]) -> list[dict[str, str]]:
    return [{"text": text, "label": "ab"[len(text) % 2]} for text in texts]


def files(path: Path) -> dict[str, bytes]:
    return {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*") if each.is_file()}


def by_key(cache: FeatureCache) -> dict[bytes, bytes]:
    return {key.tobytes(): row.tobytes() for key, row in zip(cache.keys(), cache.features(), strict=True)}


# The same bytes


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("shard", [7, 61])
def test_an_executor_makes_the_files_of_one_process(tmp_path: Path, tokens: bool, shard: int) -> None:
    """Of one window, too, which is cut for the workers and put together again."""
    texts = words(61) + words(5)
    extract(rows(texts), output_dir=tmp_path / "here", backbone=CountingBackbone(tokens=tokens), rows_per_shard=shard)
    driver = CountingBackbone(tokens=tokens)
    with ThreadPoolExecutor(3) as pool:
        extract(rows(texts), output_dir=tmp_path / "c", backbone=driver, rows_per_shard=shard, executor=pool)
        assert files(tmp_path / "c") == files(tmp_path / "here")
        before = driver.forward_calls
        extract(rows(texts), output_dir=tmp_path / "c", backbone=driver, executor=pool)
    assert driver.forward_calls == before


@pytest.mark.parametrize("model", [None, "relative"])
def test_the_cache_tells_which_model_was_asked_for_and_not_where_a_worker_found_it(
    tmp_path: Path, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, model: str | None
) -> None:
    """The default model's name, or a path as it was given: another machine, or a run that goes on, looks for that."""
    (tmp_path / "relative").symlink_to(tiny("bert"))
    monkeypatch.chdir(tmp_path)
    extract(rows(words(13)), output_dir="here", model=model, device="cpu", positions=64)
    with ThreadPoolExecutor(1) as pool:
        extract(rows(words(13)), output_dir="there", model=model, device="cpu", positions=64, executor=pool)
    assert files(tmp_path / "there") == files(tmp_path / "here")


@pytest.mark.parametrize("seed", range(7))
def test_workers_lost_at_random_change_no_byte(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    examples = load_examples(rows(words(89)))
    run(examples, CountingBackbone(tokens=True), tmp_path / "here", rows_per_shard=11)
    losses: Counter[int] = Counter()

    def dies(window: Window | None) -> bool:  # twice over the same rows at most: a third time they would be at fault
        place = -1 if window is None else int(window.rows[0])
        losses[place] += (dead := losses[place] < 2 and chance.random() < 0.3)
        return dead

    crew = Crew(3, dies)
    run(examples, CountingBackbone(tokens=True), tmp_path / "there", engine=Elsewhere(crew), rows_per_shard=11)
    assert files(tmp_path / "there") == files(tmp_path / "here")
    assert len(crew.started) > 3
    assert not crew.there


def test_a_lost_worker_costs_its_units_and_no_more(tmp_path: Path) -> None:
    deaths = iter([False, False, False, True, *[False] * 99])
    crew, driver = Crew(2, lambda window: next(deaths)), CountingBackbone()
    run(load_examples(rows(words(48))), driver, tmp_path / "c", engine=Elsewhere(crew), rows_per_shard=6)
    assert len(crew.started) == 3
    assert sum(worker.done for worker in crew.started) == 3 + 8
    assert len(driver.rows_seen) == 48


@given(sizes=st.lists(st.integers(0, 29), min_size=1, max_size=31), data=st.data())
def test_a_window_cut_anyhow_is_put_together_again(sizes: list[int], data: st.DataObject) -> None:
    backbone = CountingBackbone(tokens=True)
    contents = [b"%03d" % number + b"x" * size for number, size in enumerate(sizes)]
    window = Window(np.arange(len(sizes)) * 3 + 1, contents)
    whole = work(backbone, window)
    parts = [Unit.all_of(window)]
    for _ in range(data.draw(st.integers(0, 3))):
        unit = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        part_of = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(unit.places), max_size=len(unit.places))))
        parts += unit.cut([np.flatnonzero(part_of == part) for part in np.unique(part_of)])
    assert sorted(place for unit in parts for place in unit.places.tolist()) == list(range(len(sizes)))
    for unit in data.draw(st.permutations(parts)):
        assert not unit.whole.finished
        unit.whole.put(unit.places, work(backbone, unit.window))
    assert parts[0].whole.finished
    again = parts[0].whole.computed()
    assert (again.rows.tolist(), again.costs.extracted, again.costs.shards) == (window.rows.tolist(), len(sizes), 1)
    for name, stored in whole.features.items():
        assert [part.tobytes() for part in stored.arrays] == [part.tobytes() for part in again.features[name].arrays]


@pytest.mark.parametrize(("positions", "longest", "spare"), [(64, 64, 0), (64, 64, 1), (61, 1, 0)])
def test_units_are_whole_batches_of_a_window(positions: int, longest: int, spare: int) -> None:
    """Or whole windows, where there are enough; cut or not, the same batches are computed."""
    backbone = CountingBackbone()
    backbone.policy = ShapePolicy(positions=positions, step=1, max_length=longest, spare=spare)
    window = Window(np.arange(640), [b"x" * (1 + number * 37 % longest) for number in range(640)])
    assert [len(unit.places) for unit in units_of(window, backbone, 2, 8)] == [640]
    cut = units_of(window, backbone, 2, 1)
    assert 6 <= len(cut) <= 8
    assert sorted(place for unit in cut for place in unit.places.tolist()) == list(range(640))
    lengths = np.array([len(content) for content in window.contents])
    computed = [plan(lengths[unit.places], backbone.policy).computed for unit in cut]
    assert sum(computed) == plan(lengths, backbone.policy).computed
    assert max(computed) <= 2 * min(computed)


class Slow(Executor):
    """Gives everything at once, except what is of row 0, until everybody has nothing to do but to wait for that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: list[Callable[[], None]] = []
        self.handed: set[int] = set()
        real = elsewhere.wait

        def waits(futures: Any, **options: Any) -> Any:
            if not any(future.done() for future in futures):
                self.held.pop()()
            return real(futures, **options)

        monkeypatch.setattr(elsewhere, "wait", waits)

    def submit(self, function: Any, /, *arguments: Any, **_: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def give() -> None:
            future.set_result(function(*arguments))

        window = arguments[1] if function is worker.compute else None
        if window is not None:
            self.handed |= set(window.rows.tolist())
        if window is not None and 0 in window.rows:
            self.held.append(give)
        else:
            give()
        return future


@pytest.mark.parametrize("fitting", [3, 5, 99])
def test_no_more_is_held_than_the_bound_while_the_first_window_is_slow(
    monkeypatch: pytest.MonkeyPatch, fitting: int
) -> None:
    """Counted in rows that were handed out and not given back; of windows, the last is cut where few fit."""
    texts, backbone = [b"%03d" % number + b"x" * 9 for number in range(240)], CountingBackbone()
    monkeypatch.setattr(elsewhere, "HELD_BYTES", fitting * 6 * (12 + 5 * 4) + 7)
    windows = [Window(np.arange(start, start + 6), texts[start : start + 6]) for start in range(0, 240, 6)]
    pool, back, most = Slow(monkeypatch), [], 0
    engine = Elsewhere(Given(pool, 7))
    engine.prove(backbone)
    for computed in engine.map(backbone, iter(windows), Watch(Bar(), 240)):
        most = max(most, len(pool.handed) - len(back))
        back += computed.rows.tolist()
    assert back == list(range(240))
    assert most == 6 * min(fitting, 2 * 7)


# Rows that no worker survives


def poison(window: Window | None) -> bool:
    return window is not None and any(b"number 23" in content for content in window.contents)


def poisoned() -> list[str]:
    texts = [f"number {number} " + "y" * (number % 5) for number in range(61)]
    return [*texts, texts[23]]


def test_a_row_that_no_worker_survives_ends_the_run_by_name(tmp_path: Path) -> None:
    examples, crew = load_examples(rows(poisoned())), Crew(2, poison)
    with pytest.raises(BadRowsError, match=r"^1 bad row: row 23: every worker that computes it is lost\. .*--on-bad-r"):
        run(examples, CountingBackbone(), tmp_path / "c", engine=Elsewhere(crew), rows_per_shard=16)
    assert not crew.there
    assert len(crew.started) <= 2 + 3 + 4 + 3
    backbone = CountingBackbone()
    run(examples, backbone, tmp_path / "c", rows_per_shard=16)
    assert len(backbone.rows_seen) == 61 - 16  # what was before its window is committed, and nothing of that
    run(examples, CountingBackbone(), tmp_path / "here", rows_per_shard=16)
    assert files(tmp_path / "c") == files(tmp_path / "here")


def test_such_a_row_is_set_aside_and_the_rest_goes_on(tmp_path: Path) -> None:
    texts, aside = poisoned(), tmp_path / "aside.jsonl"
    examples, backbone = load_examples(rows(texts)), CountingBackbone()
    with pytest.warns(EmbedcacheWarning, match=r"1 row set aside in .*aside.jsonl: workers do not survive them"):
        report = run(
            examples, backbone, tmp_path / "c", engine=Elsewhere(Crew(2, poison)), rows_per_shard=16, quarantine=aside
        )
    assert report.extracted == 60
    (line,) = map(json.loads, aside.read_text().splitlines())
    assert (line["file"], line["raw"]) == ("row 23", texts[23])
    cache = FeatureCache.open(tmp_path / "c")
    without = extract(rows(texts[:23] + texts[24:61]), output_dir=tmp_path / "without", backbone=CountingBackbone())
    assert by_key(cache) == by_key(without)
    assert (cache.ids(), cache.targets().tolist()) == (without.ids(), without.targets().tolist())
    load_examples(rows(texts), on_bad_row="skip", quarantine=aside)  # it is known to be ours


class Killed(BaseException):
    """What ends a run at a commit, with nothing of it done."""


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Kill runs at their shard of that number, counted from 0 in each; None lets them live."""
    append, left = CacheWriter.append, [0]

    def set_up(number: int | None) -> None:
        left[0] = -1 if number is None else number

        def dies(self: CacheWriter, *arguments: Any) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise Killed
            append(self, *arguments)

        monkeypatch.setattr(CacheWriter, "append", append if number is None else dies)

    return set_up


def test_rows_are_set_aside_alike_however_often_a_run_is_killed(
    tmp_path: Path, killed: Callable[[int | None], None]
) -> None:
    """At an end of a window, at the start of one, a whole window, the last row of all."""
    texts = [f"number {number:02d}" for number in range(41)]
    bad = {texts[number].encode() for number in (3, 4, 8, 9, 10, 11, 22, 40)}

    def go(path: Path) -> Crew:
        crew = Crew(2, lambda window: window is not None and not bad.isdisjoint(window.contents))
        with pytest.warns(EmbedcacheWarning, match="8 rows set aside"):
            run(
                load_examples(rows(texts), on_bad_row="skip", quarantine=path.with_suffix(".aside")),
                CountingBackbone(), path, engine=Elsewhere(crew), rows_per_shard=4,
                quarantine=path.with_suffix(".aside"),
            )  # fmt: skip
        return crew

    go(tmp_path / "whole")
    aside = (tmp_path / "whole.aside").read_bytes()
    assert [json.loads(line)["file"] for line in aside.splitlines()] == [
        f"row {number}" for number in (3, 4, 8, 9, 10, 11, 22, 40)
    ]
    for at in (0, 1, 2, 4, 8):
        path = tmp_path / str(at)
        for number in (at, (8 - at) // 2):
            killed(number)
            with pytest.raises(Killed):
                go(path)
        killed(None)
        go(path)
        assert files(path) == files(tmp_path / "whole"), f"killed at shard {at}"
        assert path.with_suffix(".aside").read_bytes() == aside
    cache = FeatureCache.open(tmp_path / "whole")
    assert cache.provenance() == [{"device": "fake"}]
    # Again: no row is tried that is known to be bad. Without a quarantine they are, by workers with more memory, say.
    assert go(tmp_path / "whole").started == []
    assert files(path) == files(tmp_path / "whole")
    run(load_examples(rows(texts)), backbone := CountingBackbone(), tmp_path / "whole")
    assert sorted(set(backbone.rows_seen)) == sorted(bad)
    with pytest.warns(EmbedcacheWarning) as told:
        run(load_examples(rows([*texts, "x"])), CountingBackbone(), path, quarantine=tmp_path / "aside")
    assert "8 rows" not in str(told)


def set_aside(path: Path) -> list[list[str] | None]:
    """The keys that each shard tells of."""
    return [shard["provenance"].get("set_aside") for shard in FeatureCache.open(path).manifest["shards"]]


def test_rows_set_aside_behind_the_last_shard_are_recorded_though_the_dataset_stays(tmp_path: Path) -> None:
    texts = [f"number {number}" for number in range(11)]

    def go(texts: list[str]) -> Crew:
        crew = Crew(1, poison)
        run(load_examples(rows(texts)), CountingBackbone(), tmp_path / "c", engine=Elsewhere(crew), rows_per_shard=4,
            quarantine=tmp_path / "aside")  # fmt: skip
        return crew

    go(texts)
    before = files(tmp_path / "c")
    for started in (1 + 3, 0):
        with pytest.warns(EmbedcacheWarning, match="1 row set aside"):
            assert len(go([*texts, "number 23", "number 23"]).started) == started
    after = files(tmp_path / "c")
    assert {name for name in after if before.get(name) != after[name]} == {"manifest.json"}
    assert set_aside(tmp_path / "c") == [None, None, [row_key(b"number 23").hex()] * 2]
    assert FeatureCache.open(tmp_path / "c").verify() == []


def test_merged_parts_leave_out_what_one_process_leaves_out(tmp_path: Path) -> None:
    texts = [f"number {number}" for number in range(10, 34)]
    texts[3:3] = [texts[13], texts[13], texts[5]]  # a row that no worker survives three times, a good one twice
    examples = load_examples(rows(texts))

    def go(examples: Examples, name: str) -> Crew:
        crew = Crew(2, poison)
        run(examples, CountingBackbone(), tmp_path / name, engine=Elsewhere(crew), rows_per_shard=4,
            quarantine=tmp_path / f"{name}.aside")  # fmt: skip
        return crew

    with quiet():
        go(examples, "whole")
        for part in (1, 2, 3):
            go(part_of(examples, part, 3), f"p{part}")
        with pytest.raises(InputError, match="have 16 of the 27 rows of their dataset, and left out 3: a part"):
            merge([tmp_path / "p1", tmp_path / "p3"], tmp_path / "c")
        merge([tmp_path / "p3", tmp_path / "p1", tmp_path / "p2"], tmp_path / "other order")
        merge([tmp_path / f"p{part}" for part in (1, 2, 3)], tmp_path / "c")
        assert files(tmp_path / "c") == files(tmp_path / "whole")
        assert go(examples, "c").started == []
        assert files(tmp_path / "c") == files(tmp_path / "whole")
        examples = load_examples(rows([*texts, texts[3]]))  # a duplicate more of what is known not to be survived
        for part in (1, 2, 3):
            assert go(part_of(examples, part, 3), f"p{part}").started == []
        merge([tmp_path / f"p{part}" for part in (1, 2, 3)], tmp_path / "extended")


def test_bad_cells_are_set_aside_alike_however_often_a_run_is_killed(
    tmp_path: Path, killed: Callable[[int | None], None]
) -> None:
    given = rows(words(31))
    for number in (0, 6, 7, 20, 30):
        given[number] = {"text": "", "label": ""}

    def go(path: Path) -> None:
        with pytest.warns(EmbedcacheWarning, match="5 bad rows set aside"):
            extract(
                given, output_dir=path, backbone=CountingBackbone(), rows_per_shard=5, on_bad_row="skip",
                quarantine=path.with_suffix(".aside"),
            )  # fmt: skip

    go(tmp_path / "whole")
    for at in range(6):
        killed(at)
        with pytest.raises(Killed):
            go(tmp_path / str(at))
        killed(None)
        go(tmp_path / str(at))
        assert files(tmp_path / str(at)) == files(tmp_path / "whole")
        assert (tmp_path / f"{at}.aside").read_bytes() == (tmp_path / "whole.aside").read_bytes()


def test_two_such_rows_are_found_side_by_side(tmp_path: Path) -> None:
    texts = [f"number {number}" for number in range(32)]
    bad = {texts[5].encode(), texts[6].encode()}
    crew = Crew(1, lambda window: window is not None and not bad.isdisjoint(window.contents))
    with pytest.warns(EmbedcacheWarning, match="2 rows set aside"):
        report = run(
            load_examples(rows(texts)), CountingBackbone(), tmp_path / "c", engine=Elsewhere(crew),
            quarantine=tmp_path / "aside",
        )  # fmt: skip
    assert report.extracted == 30


def test_workers_that_are_lost_whatever_they_do_end_the_run(tmp_path: Path) -> None:
    examples = load_examples(rows(words(4000)))
    for dies, words_said in (
        (lambda window: window is not None, "40 workers were lost, one after the other"),
        (lambda window: window is None, "was lost 3 times while it loaded the backbone"),
    ):
        crew = Crew(2, dies)
        with pytest.raises(BackboneError, match=words_said):
            run(examples, CountingBackbone(), tmp_path / "c", engine=Elsewhere(crew))
        assert not crew.there


# Workers that are refused


def test_a_worker_that_computes_otherwise_gets_no_work(tmp_path: Path) -> None:
    examples, driver, other = load_examples(rows(words(48))), Probed(), Probed(0.001)
    run(examples, Probed(), tmp_path / "here", rows_per_shard=6)
    crew = Crew(2, backbones={1: other})
    crew.start(1)
    calls = {}
    crew.there[1].dies = lambda window: calls.setdefault("first", driver.forward_calls) and False
    with pytest.warns(EmbedcacheWarning, match=r"the worker \S+:\d+ computes otherwise than the first .*: it gets no"):
        report = run(examples, driver, tmp_path / "c", engine=Elsewhere(crew), rows_per_shard=6)
    assert "gets no work" in report.notes[0]
    assert set(other.rows_seen) <= set(other.probe_rows)
    assert files(tmp_path / "c") == files(tmp_path / "here")


def test_of_two_kinds_the_one_that_the_cache_knows_works(tmp_path: Path) -> None:
    texts = words(24)
    run(load_examples(rows(texts[:12])), Probed(), tmp_path / "c")
    crew = Crew(2, backbones={0: Probed(0.001), 1: Probed()})
    with pytest.warns(EmbedcacheWarning, match="computes otherwise"):
        run(load_examples(rows(texts)), Probed(), tmp_path / "c", engine=Elsewhere(crew))
    alone = Crew(1, backbones={0: Probed(0.001)})
    with pytest.raises(NumericsMismatchError, match="--accept-numerics"):
        run(load_examples(rows(words(36))), Probed(), tmp_path / "c", engine=Elsewhere(alone))
    assert not alone.there


def test_a_worker_with_other_files_or_versions_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples, driver = load_examples(rows(words(5))), CountingBackbone()
    driver.provenance = {"device": "fake", "model": "fake-7"}
    crew = Crew(1, backbones={0: CountingBackbone(name="other")})
    with pytest.raises(WorkerRefusedError, match=r"the worker \S+ has other files of fake-7 than this machine"):
        run(examples, driver, tmp_path / "c", engine=Elsewhere(crew))
    monkeypatch.setattr(worker, "__version__", "0.0.7")
    with pytest.raises(WorkerRefusedError, match=r"has embedcache 0\.0\.7, expected \d"):
        run(examples, CountingBackbone(), tmp_path / "c", engine=Elsewhere(Crew(1)))


def test_what_a_worker_raises_is_told_and_what_was_before_is_kept(tmp_path: Path) -> None:
    class Fails(CountingBackbone):
        def vector(self, content: bytes) -> np.ndarray:
            if content.startswith(b"text 31 "):
                raise FeatureError("row 31 is not a row")
            return super().vector(content)

    examples = load_examples(rows(words(48)))
    with pytest.raises(FeatureError, match="row 31 is not a row"):
        run(examples, Fails(), tmp_path / "c", engine=Elsewhere(Crew(2)), rows_per_shard=6)
    backbone = CountingBackbone()
    run(examples, backbone, tmp_path / "c", rows_per_shard=6)
    assert len(backbone.rows_seen) == 48 - 30


# Workers that do not start


class Never(Crew):
    """One of whose workers some never start."""

    def __init__(self, size: int, starts: int, **options: Any) -> None:
        super().__init__(size, **options)
        self.starts = starts

    def start(self, number: int) -> Executor:
        executor = super().start(number)
        if number >= self.starts:
            executor.submit = lambda *_: Future()  # type: ignore[method-assign]
        return executor


def test_workers_without_room_are_told_of_and_gone_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all of them must be seen, as the first is not of the cache's kind."""
    texts = words(24)
    run(load_examples(rows(texts[:12])), Probed(), tmp_path / "c")
    for name, seconds in (("TELL_SECONDS", 0.05), ("GRACE_SECONDS", 0.3), ("START_SECONDS", 30.0)):
        monkeypatch.setattr(elsewhere, name, seconds)
    crew = Never(3, 1, backbones={0: Probed(0.001)})
    with pytest.warns(EmbedcacheWarning, match="1 of 3 workers started: there is no room"):
        run(load_examples(rows(texts)), Probed(), tmp_path / "c", engine=Elsewhere(crew), accept_numerics=True)
    assert len(FeatureCache.open(tmp_path / "c")) == 24
    monkeypatch.setattr(elsewhere, "START_SECONDS", 0.3)
    with (
        pytest.warns(EmbedcacheWarning, match="0 of 2 workers started: there is no room"),
        pytest.raises(BackboneError, match=r"^no worker has started in 0 minutes: there is no room$"),
    ):
        run(load_examples(rows(words(36))), Probed(), tmp_path / "c", engine=Elsewhere(Never(2, 0)))


class Connected:
    """The module ``ray`` in a process that is connected to a cluster of two nodes."""

    def __init__(self) -> None:
        self.util = self

    def is_initialized(self) -> bool:
        return True

    def get_node_ip_address(self) -> str:
        return "10.0.0.7"

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(gcs_address="10.0.0.7:6379")

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 4.0}}] * 2

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 8.0}

    def available_resources(self) -> dict[str, float]:
        return {"CPU": 3.0}


def test_of_a_ray_the_one_that_is_connected_is_used_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", Connected())
    for address in ("auto", "10.0.0.7:6379", "127.0.0.1:6379"):
        engine = engine_for(ray=address)
        assert engine is not None
        assert engine.crew.size == 2
        engine.close()  # leaves it connected
    node = SimpleNamespace(is_head=lambda: True)
    with monkeypatch.context() as started_here:
        started_here.setitem(sys.modules, "ray._private.worker", SimpleNamespace(_global_node=node))
        assert engine_for(ray="local") is not None
    node.is_head = lambda: False
    monkeypatch.setitem(sys.modules, "ray._private.worker", SimpleNamespace(_global_node=node))
    for address in ("10.0.0.8:6379", "10.0.0.7:6380", "local", "ray://10.0.0.7:10001"):
        told = f"^this process is connected to the Ray at 10.0.0.7:6379, and cannot be to the one at {address} too: "
        with pytest.raises(BackboneError, match=told):
            engine_for(ray=address)


@pytest.mark.parametrize(
    ("workers", "placed", "told"),
    [
        (3, 3, ""),
        (
            3,
            1,
            "1 have begun, and others begin, or wait for what else runs on the Ray cluster (3 of 8 CPUs are free): ",
        ),
        (9, 2, "2 have begun, and the Ray cluster has room for 8, as each takes 1 CPU: ask for fewer (--workers N), "),
    ],
)
def test_what_workers_of_a_ray_wait_for(monkeypatch: pytest.MonkeyPatch, workers: int, placed: int, told: str) -> None:
    monkeypatch.setitem(sys.modules, "ray", Connected())
    actors = Actors("auto", workers)
    for number in range(workers):
        future: Future[str] = Future()
        if number < placed:
            future.set_result("a node")
        actors._actors[number] = SimpleNamespace(placed=future)  # type: ignore[assignment]
    assert actors.waits().startswith(told)
    assert bool(actors.waits()) == bool(told)


# What travels to workers


class Heavy(CountingBackbone):
    def __init__(self) -> None:
        super().__init__()
        self.weights = bytes(1 << 20)


class Apart(Executor):
    """Workers of a pool, each with a memory of its own, in turn; one ``forgets`` what it had at a call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, forgets: int | None = None) -> None:
        self.sizes: list[int] = []
        self.held: list[Any] = [None] * 3
        self.calls, self.forgets, self.patch = 0, forgets, monkeypatch

    def submit(self, function: Any, /, *arguments: Any, **_: Any) -> Future[Any]:
        future: Future[Any] = Future()
        number, self.calls = self.calls % 3, self.calls + 1
        data = pickle.dumps((function, arguments))
        self.sizes.append(len(data))
        self.patch.setattr(worker, "_held", self.held[number] if self.calls != self.forgets else None)
        function, arguments = pickle.loads(data)
        future.set_result(function(*arguments))
        self.held[number] = worker._held
        return future


@pytest.mark.parametrize("forgets", [None, 7])
def test_a_backbone_travels_once_to_each_worker_and_is_let_go_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgets: int | None
) -> None:
    """One that is no recipe, which may be large. A worker that lost it gets it again."""
    extract(rows(words(96)), output_dir=tmp_path / "here", backbone=Heavy(), rows_per_shard=6)
    pool = Apart(monkeypatch, forgets)
    extract(
        rows(words(96)), output_dir=tmp_path / "c", backbone=Heavy(), rows_per_shard=6, executor=pool, workers=3,
    )  # fmt: skip
    assert files(tmp_path / "c") == files(tmp_path / "here")
    large = [size for size in pool.sizes if size > 1 << 20]
    assert 3 <= len(large) <= 3 + (0 if forgets is None else 2 * 3)  # all that it was handed comes back
    assert sum(pool.sizes) - sum(large) < 2000 * len(pool.sizes)
    assert pool.held == [None] * 3


def test_a_worker_that_nobody_tells_lets_go_of_the_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Elsewhere(Given(ThreadPoolExecutor(1)))
    monkeypatch.setattr(crew, "IDLE_SECONDS", 0.2)
    engine.prove(CountingBackbone())
    assert worker._held is not None
    for _ in range(500):
        if worker._held is None:
            return
        time.sleep(0.02)
    pytest.fail("the backbone is still held")


# Executors of others


def test_an_executor_that_breaks_says_what_to_do_and_is_gone_on_from(tmp_path: Path) -> None:
    texts, deaths = words(48), iter([False] * 4 + [True] * 99)
    extract(rows(texts), output_dir=tmp_path / "here", backbone=CountingBackbone(), rows_per_shard=6)
    options: dict[str, Any] = {"output_dir": tmp_path / "c", "rows_per_shard": 6, "workers": 2}
    broken = Mortal(lambda window: next(deaths))
    with pytest.raises(BackboneError, match=r"lost a worker and takes no more work \(gone\): make a new one"):
        extract(rows(texts), backbone=CountingBackbone(), executor=broken, **options)
    with pytest.raises(BackboneError, match=r"takes no work \(gone\)|takes no more work"):
        extract(rows(texts), backbone=CountingBackbone(), executor=broken, **options)
    with ThreadPoolExecutor(2) as pool:
        extract(rows(texts), backbone=CountingBackbone(), executor=pool, **options)
    assert files(tmp_path / "c") == files(tmp_path / "here")


def test_an_executor_that_was_shut_down_says_so_before_a_model_is_loaded(tmp_path: Path) -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with pytest.raises(
        BackboneError, match=r"^the executor takes no work \(cannot schedule new futures .*: make a new"
    ):
        extract(rows(words(3)), output_dir=tmp_path / "c", executor=pool)


def test_dask_says_which_unit_is_the_death_of_workers(tmp_path: Path) -> None:
    class KilledWorker(Exception):
        pass

    class Dask(Mortal):
        def submit(self, function: Any, /, *arguments: Any, **_: Any) -> Any:
            future = super().submit(function, *arguments)
            if function is worker.compute and poison(arguments[1]):
                future = type(future)()
                future.set_exception(KilledWorker("attempted 4 times"))
            return future

    with pytest.raises(BadRowsError, match="row 23"):
        extract(
            rows(poisoned()), output_dir=tmp_path / "c", backbone=CountingBackbone(), executor=Dask(lambda _: False)
        )


def test_dask_blames_all_that_waits_and_a_row_is_left_out_only_for_what_it_does_alone(tmp_path: Path) -> None:
    class KilledWorker(Exception):
        pass

    class Dask(ThreadPoolExecutor):
        """One worker; when it is lost, so is all that it was handed."""

        waiting: list[Future[Any]] = []  # noqa: RUF012

        def submit(self, function: Any, /, *arguments: Any, **_: Any) -> Any:
            future: Future[Any] = Future()
            self.waiting.append(future)

            def run() -> None:
                if function is worker.compute and texts[16].encode() in list(arguments[1].contents):
                    blamed, self.waiting[:] = self.waiting[:], []
                    for each in blamed:
                        each.set_exception(KilledWorker("attempted 4 times"))
                elif future in self.waiting:
                    self.waiting.remove(future)
                    future.set_result(function(*arguments))

            super().submit(lambda: (time.sleep(0.01), run()))
            return future

    texts, aside = words(61), tmp_path / "aside.jsonl"
    options: dict[str, Any] = {"rows_per_shard": 16, "quarantine": aside}
    with Dask(1) as pool, pytest.warns(EmbedcacheWarning, match="1 row set aside"):
        run(load_examples(rows(texts)), CountingBackbone(), tmp_path / "c", engine=Elsewhere(Given(pool, 2)), **options)
    (line,) = map(json.loads, aside.read_text().splitlines())
    assert line["file"] == "row 16"


def test_an_executor_of_an_encoder(tmp_path: Path) -> None:
    """An API, say, which answers several at a time."""
    options: dict[str, Any] = {
        "encoder": lambda texts: np.array([[len(text), 1.0] for text in texts]), "identity": {"model": "m"},
        "positions": 3,
    }  # fmt: skip
    extract(rows(words(31)), output_dir=tmp_path / "here", **options)
    with ThreadPoolExecutor(5) as pool:
        extract(rows(words(31)), output_dir=tmp_path / "c", executor=pool, **options)
    assert files(tmp_path / "c") == files(tmp_path / "here")


def test_what_cannot_be_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import multiprocessing

    with pytest.raises(SpecError, match=r"would fork this process.*get_context"):
        engine_for(ProcessPoolExecutor(1, multiprocessing.get_context("fork")))
    for options in ({"workers": 0}, {"executor": ThreadPoolExecutor(1), "workers": 0}):
        with pytest.raises(SpecError, match="workers is 0: expected at least 1"):
            extract(rows(words(3)), output_dir=tmp_path / "c", **options)
    assert cli_run(["extract", "nowhere.csv", "-o", str(tmp_path / "c"), "--workers", "0"]) == 1
    assert not (tmp_path / "c").exists()
    assert Given(ThreadPoolExecutor(7)).size == 7


# A device that only the workers have


def test_shapes_are_those_of_the_workers_device(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crew = Crew(1)
    crew.kind = "cuda"
    real = load_backbone

    def on_cuda(model: Any, *, device: str, **options: Any) -> Any:
        assert device == "cuda"
        return real(model, device="cpu", **{"positions": 96, **options})

    monkeypatch.setattr(worker, "load_backbone", on_cuda)
    engine = Elsewhere(crew)
    backbone = load_for(tmp_path / "c", ModelSource(tiny("bert")), BackboneSettings(("mean",)), engine)
    assert (engine.device, backbone.device.type, backbone.policy.positions) == ("cuda", "cpu", 96)
    run(load_examples(rows(words(31))), backbone, tmp_path / "c", engine=engine)
    recorded = read_spec(tmp_path / "c")
    assert recorded is not None
    assert recorded[0]["shapes"]["positions"] == 96
