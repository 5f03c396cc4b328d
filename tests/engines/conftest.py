"""What these programs share: every process finds the tests' modules, and a folder in which workers sign."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
# Inherited by workers, which import the backbone of these tests; set before any of them starts.
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (HERE.parents[1], HERE.parent, HERE)))


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    """The folder in which processes that run the backbone leave their numbers."""
    folder = tmp_path / "signed"
    folder.mkdir()
    return folder
