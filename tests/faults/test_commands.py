"""Every command that writes is killed, given errors and met by links; ``commands`` says how, and does it at length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import commands


def test_every_command_that_writes() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # All links, and some calls; `make faults` has them all.
    arguments = [sys.executable, commands.__file__, "kills=3,io_errors=3,links=1000", "0"]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {name: each["problems"] for name, each in report.items()} == {name: [] for name in commands.FAULTS}
    assert all(each["tried"] >= 3 for each in report.values())


def test_planted_faults_are_found(tmp_path: Path) -> None:
    """A writer as it was before: through links, in place, and with the system's own errors."""

    def careless(folder: Path) -> None:
        with open(folder / "out", "w") as file:
            file.write("new, and longer than a block" * 10_000)

    writing = commands.Writing(
        "careless", lambda folder: None, careless, lambda folder: commands.file_state("out", folder), own=False
    )
    for kind, said in (("io_errors", "OSError: "), ("links", "it was written through")):
        tried, problems = commands.KINDS[kind](writing, 10, 0)
        assert tried
        assert any(said in problem for problem in problems), (kind, problems)
