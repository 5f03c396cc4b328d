"""A few of each kind of damaged and fuzzed file; ``make faults`` has tens of thousands."""

from __future__ import annotations

from pathlib import Path

import fuzzing
import pytest
import run as at_length

from embedcache.decoding import from_json
from embedcache.errors import SweepError
from embedcache.sweep.summary import Summary


@pytest.mark.parametrize("kind", fuzzing.FAULTS)
def test_damaged_and_fuzzed_files(kind: str) -> None:
    tried, problems = fuzzing.FAULTS[kind](12, 1)
    assert (tried, problems) == (12, [])


def test_a_hostile_offset_in_hdf5_is_one_line() -> None:
    assert fuzzing.fuzzed_shards(30, 1) == (30, [])


@pytest.mark.parametrize("broken", [None, {}, {"task": 1}])
def test_a_damaged_summary_is_said_to_be(broken: object) -> None:
    with pytest.raises(ValueError, match=r"expected a mapping|lacks format"):
        from_json(Summary, broken)
    assert issubclass(SweepError, ValueError)


def test_planted_faults_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing.FeatureCache, "open", lambda path: object())
    tried, problems = fuzzing.flips_in_caches(3, 0)
    assert (tried, len(problems)) == (3, 3)
    assert "not noticed" in problems[0]


def test_every_kind_is_run_at_length(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert {*fuzzing.FAULTS, "readers beside a writer"} <= at_length.kinds().keys()
    monkeypatch.setattr("sys.argv", ["run.py", "--scale", "0.0001", "--only", "cut, swapped"])
    assert at_length.main() == 0
    said = capsys.readouterr().out
    assert "| files cut, swapped, left out |       3 |        0 |" in said
    assert Path(at_length.__file__).name == "run.py"
