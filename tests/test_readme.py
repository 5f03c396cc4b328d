"""The README's commands and Python blocks do what it says, in its order, in a fresh folder."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from embedcache.cli import cli

REPO = Path(__file__).resolve().parents[1]
README = (REPO / "README.md").read_text("utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(README) if kind == language]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout: only what the README's own lines read."""
    made = tmp_path_factory.mktemp("readme")
    (made / "data").mkdir()
    shutil.copy(REPO / "data" / "sample.csv", made / "data")
    return made


def run(script: str) -> str:
    """Run the lines of a shell script and return what they print; ``embedcache`` runs here, its libraries loaded."""
    said = ""
    for line in script.replace("\\\n", "").splitlines():
        program, *arguments = shlex.split(line, comments=True) or [""]
        if program == "embedcache":
            done = CliRunner().invoke(cli, arguments)
            assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception}"
            said += done.stdout
        else:
            subprocess.run(["bash", "-euc", line], check=True)
    return said


def test_the_commands_run(folder: Path, minilm_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    said = run("\n".join(blocks("bash")))
    assert "60 extracted" in said
    assert re.search(r"^(negative|neutral|positive)\b", said, re.MULTILINE)
    assert (folder / "report.html").exists()


@pytest.mark.filterwarnings("error::UserWarning", "ignore::embedcache.EmbedcacheWarning")
def test_the_python_blocks_run(
    folder: Path, minilm_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    exec("\n".join(blocks("python")), {"__name__": "__main__"})
    assert "trainable 1,155" in capsys.readouterr().out


def test_a_command_that_fails_would_be_seen() -> None:
    with pytest.raises(AssertionError, match="not a feature cache"):
        run("embedcache info nothing.cache")


def test_every_command_is_in_the_table() -> None:
    table = README.split("## Commands")[1].split("### Features")[0]
    for name in cli.commands:
        assert f"`{name} " in table or f"`{name}`" in table, f"{name} is not in the README's table"


PAGES = ("ARCHITECTURE.md", "BENCHMARKS.md", "CHANGELOG.md", "CONTRIBUTING.md", "README.md", "SECURITY.md")


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_a_page_names_is_there(page: str) -> None:
    text = (REPO / page).read_text("utf-8")
    for path in set(re.findall(r"`((?:embedcache|pipelines|data|tests)/[\w./-]+|[A-Z]+\.md)`", text)):
        assert (REPO / path).exists(), path


def test_every_section_that_the_benchmarks_name_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--list"])
    monkeypatch.syspath_prepend(REPO / "pipelines")
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(REPO / "pipelines" / "benchmark.py"), run_name="__main__")
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    table = (REPO / "BENCHMARKS.md").read_text("utf-8").split("## Speed and memory")[1].split("\n## ")[0]
    named = set(re.findall(r"\| `(\w+)` \|$", table, re.MULTILINE))
    assert named
    assert named <= listed
