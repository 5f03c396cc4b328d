"""The site of the documentation: names become links, tables are tables, and a dead link is seen."""

from __future__ import annotations

from pathlib import Path

import docs
import pytest


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, and the reference of one room."""
    folder: Path = tmp_path_factory.mktemp("site")
    docs.build(folder, modules=["embedcache.predict"])
    return folder


def test_pages_and_rooms_become_links(site: Path) -> None:
    front = (site / "index.html").read_text("utf-8")
    assert '<a href="architecture.html"><code>ARCHITECTURE.md</code></a>' in front
    assert '<a href="format.html"><code>embedcache/FORMAT.md</code></a>' in front
    assert '<a href="embedcache/predict.html">' not in front
    room = (site / "embedcache" / "predict.html").read_text("utf-8")
    assert "<table>" in room
    assert 'id="Predictor"' in room


def test_dead_links_are_seen(site: Path, tmp_path: Path) -> None:
    expected = {"embedcache.html"}  # which was not built here
    assert {line.split(": ")[1].split()[0].lstrip("./") for line in docs.dead(site)} == expected
    for name, text in {
        "a.html": '<a href="b.html#there">x</a><a href="b.html#gone">y</a><a href="https://example.org/no">z</a>',
        "b.html": '<p id="there"><a href="c.html">x</a><a href="#nowhere">y</a></p>',
    }.items():
        (tmp_path / name).write_text(text)
    assert list(docs.dead(tmp_path)) == [
        "a.html: b.html#gone: there is no such place", "b.html: c.html leads nowhere",
        "b.html: #nowhere: there is no such place",
    ]  # fmt: skip


def test_a_table_of_a_docstring_is_one_in_markdown() -> None:
    table = "A room.\n\n====  =====\nname  what\n====  =====\n`a`   of x\n`bb`  of y\n====  =====\n\nMore."
    assert (
        docs.tables(table) == "A room.\n\n\n| name | what |\n| --- | --- |\n| `a` | of x |\n| `bb` | of y |\n\n\nMore."
    )
    assert docs.tables("==  ==\na   b\n==  ==\n") == "\n|  |  |\n| --- | --- |\n| a | b |\n\n"
