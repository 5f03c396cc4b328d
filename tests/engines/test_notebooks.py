"""The notebooks in pipelines/ run from top to bottom, and what is stored in them is theirs and not a machine's.

``python tests/engines/test_notebooks.py`` runs them and stores what they show.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

PIPELINES = Path(__file__).resolve().parents[2] / "pipelines"
NOTEBOOKS = sorted(PIPELINES.glob("*.ipynb"))
MACHINE = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users|private|var|opt|usr)/|[A-Z]:\\\\")


def executed(path: Path) -> Any:
    """A notebook as it is after running, without progress bars, times and versions of the kernel."""
    book = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(PIPELINES)}}
    NotebookClient(book, timeout=600, coalesce_streams=True, resources=where).execute()
    book.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for cell in book.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return book


def shown(book: Any) -> list[str]:
    """Every text that the code cells of a notebook show."""
    texts = []
    for cell in book.cells:
        for output in cell.get("outputs", ()):
            texts += [output["text"]] if "text" in output else []
            texts += [str(data) for data in output.get("data", {}).values()]
    return texts


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_is_stored(path: Path) -> None:
    stored = nbformat.read(path, as_version=4)
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "it was not run from the top"
    assert not (found := [text for text in shown(stored) if MACHINE.search(text)]), found
    again = executed(path)
    now = [len(cell.get("outputs", ())) for cell in again.cells]
    assert now == [len(cell.get("outputs", ())) for cell in stored.cells], "cells show something else: run it again"


def test_a_path_of_a_machine_would_be_seen() -> None:
    assert MACHINE.search("in /tmp/x/y.cache")
    assert MACHINE.search("'/home/me/tour'")
    assert not MACHINE.search("rows/s, ../data/sample.csv, and/or")


if __name__ == "__main__":
    for notebook in NOTEBOOKS:
        nbformat.write(executed(notebook), notebook)
