"""Every command that writes is killed, given errors and met by links; ``commands`` says how, and does it at length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import commands


def test_every_command_that_writes() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # Some calls and links; `make faults` has them all.
    arguments = [sys.executable, commands.__file__, "kills=3,power_cuts=3,io_errors=3,links=10", "0"]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {name: each["problems"] for name, each in report.items()} == {name: [] for name in commands.FAULTS}
    assert all(each["tried"] >= 3 for each in report.values())


def test_planted_faults_are_found() -> None:
    """Writers that go through links, raise the system's own errors, or do not wait for the disk."""

    def careless(folder: Path) -> None:
        with open(folder / "out", "w") as file:
            file.write("new, and longer than a block" * 10_000)

    def unsynced(folder: Path) -> None:
        descriptor = os.open(folder / ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(descriptor, b"new")
        os.close(descriptor)
        os.replace(folder / ".new", folder / "out")

    def of(work: Callable[[Path], None]) -> commands.Writing:
        return commands.Writing(
            work.__name__, lambda folder: None, work, lambda folder: commands.file_state("out", folder)
        )

    for work, kind, said in (
        (careless, "io_errors", "OSError: "),
        (careless, "links", "it was written through"),
        (unsynced, "power_cuts", "it was done, and is gone"),
    ):
        tried, problems = commands.KINDS[kind](of(work), 10, 0)
        assert tried
        assert any(said in problem for problem in problems), (kind, problems)
