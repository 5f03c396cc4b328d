"""The shell is told commands, options, values, and folders that are what an argument asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from embedcache import cli


def completed(*words: str) -> list[tuple[str, str]]:
    """What may stand in the place of the last word."""
    items = ShellComplete(cli.cli, {}, "embedcache", "_EMBEDCACHE_COMPLETE").get_completions(
        list(words[:-1]), words[-1]
    )
    return [(item.type, item.value) for item in items]


def test_commands_options_and_values_are_completed() -> None:
    assert ("plain", "train") in completed("tr")
    assert ("plain", "--report-to") in completed("train", "c", "--rep")
    assert completed("train", "c", "--solver", "con") == [("plain", "convex")]
    assert completed("predict", "r", "--format", "p") == [("plain", "parquet")]


def test_folders_are_those_that_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("c.cache/manifest.json", "run one/config.json", "s/sweep.json", "other/file", "deep/run2/config.json"):
        Path(name).parent.mkdir(parents=True)
        Path(name).touch()
    assert completed("train", "") == [("plain", "c.cache")]
    assert completed("evaluate", "") == [("plain", "run one")]
    assert completed("evaluate", "run one", "") == [("plain", "c.cache")]
    assert completed("evaluate", "deep/") == [("plain", "deep/run2")]
    assert completed("report", "") == [("plain", "s")]
    assert completed("export", "") == [("plain", "c.cache"), ("plain", "run one")]
    assert completed("train", "o") == [("dir", "o")], "the shell lists folders to walk into"
    assert completed("train", "no/where/") == [("dir", "no/where/")]


@pytest.mark.parametrize("shell", ["zsh", "fish"])  # bash asks the bash of the machine for its version
def test_the_script_is_for_this_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert "_EMBEDCACHE_COMPLETE" in out
    assert f"{shell}_complete" in out
    assert cli.run(["completion", "csh"]) == 2
