"""What a notebook shows of caches, heads, sweeps and comparisons: whole, harmless, and legible on black and white."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_caches

from embedcache import notebook
from embedcache.cache import FeatureCache
from embedcache.compare import Comparison
from embedcache.notebook import Table, panel
from embedcache.shard import FeatureSet
from embedcache.sweep import sweep
from embedcache.train import train_on_cache

EVIL = "<script>alert(1)</script>\n\"'&\u202e"
SETS = (FeatureSet("mean", "pooled", 5, 1, "float32"), FeatureSet("mean@1+2", "layers", 5, 2, "float32"))


class Page(HTMLParser):
    """The texts of a piece of HTML, whose tags must be ours, closed, and without anything but a style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("div", "strong", "span", "table", "tbody", "tr", "th", "td"), tag
        for name, value in attrs:
            assert name == "style"
            assert not re.search(r"url|#[0-9a-f]{3}|(?<![-\w])color:|background:(?!none)", value or ""), value
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        assert data.isprintable(), repr(data)
        self.texts.append(data)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: Any) -> FeatureCache:
    split = (np.arange(97) % 5 == 0).astype(np.uint8)
    names = ("a", EVIL, "b")
    path = small_caches.write(
        tmp_path_factory.mktemp("notebook") / "c", 97, 97, SETS, class_names=names, split=split,
        split_names=("train", "validation"),
    )  # fmt: skip
    return FeatureCache.open(path)


def test_a_cache_shows_its_splits_classes_and_sets(cache: FeatureCache) -> None:
    texts = Page(cache._repr_html_()).texts
    assert [name for name in cache.feature_sets if name in texts] == list(cache.feature_sets)
    start = texts.index("train")
    counts = np.bincount(cache.targets("train"), minlength=3).tolist()
    assert texts[start + 1 : start + 5] == [str(cache.split_sizes()["train"]), *map(str, counts)]
    assert any("<script>" in text for text in texts), "the name is shown, as a text"


@pytest.mark.parametrize("head", ["linear", "mlp", "majority"])
def test_a_result_shows_its_metrics_by_split(head: str, cache: FeatureCache) -> None:
    result = train_on_cache(cache, head, {"epochs": 2} if head == "mlp" else None, feature="mean", progress=False)
    texts = Page(result._repr_html_()).texts  # type: ignore[attr-defined]
    place = texts.index("accuracy")
    assert texts[place + 1] == f"{result.metrics['train']['accuracy']:.4f}"  # type: ignore[index]
    assert any(text.startswith("2 epochs in ") for text in texts) == (head == "mlp")
    assert "mean [5]" in Page(result.head._repr_html_()).texts


def test_a_sweep_shows_its_leaderboard(cache: FeatureCache, tmp_path: Path) -> None:
    result = sweep(cache, ["majority", "linear"], output_dir=tmp_path / "s", folds=2, features=["mean"], progress=False)
    page = result._repr_html_()
    texts = Page(page).texts
    for row in result.leaderboard:
        assert texts[texts.index(row.label, texts.index("seconds")) + 1] == f"{row.score:.4f}"
    assert len(re.findall("font-weight:600", page)) == 8 + 8, "the header, and the chosen head"


def test_a_comparison_is_its_table_and_sentences() -> None:
    found = SimpleNamespace(
        header=lambda: ["approach", EVIL], cells=lambda: [["cached", "1.00"]], sentences=lambda: [EVIL], notes=["so"]
    )
    texts = Page(Comparison._repr_html_(found)).texts  # type: ignore[arg-type]
    evil = texts[texts.index("approach") + 1]
    assert [text for text in texts if text != " "] == ["Comparison", "approach", evil, "cached", "1.00", evil, "so"]


def test_a_piece_without_escapes_would_be_seen() -> None:
    assert Page(panel("t", {"a": EVIL, "b": None}, [Table([EVIL], [[EVIL]])], [EVIL], more=EVIL)).texts.count("b") == 0
    with pytest.raises(AssertionError):
        Page(f"<div>{EVIL}</div>")
    with pytest.raises(AssertionError):
        Page('<div style="color:#fff">white on white</div>')


def test_bars_are_drawn_on_terminals_and_in_notebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", None)
    assert not notebook.shows_bars()
    for kernel, seen in ((None, False), (object(), True)):
        shell = SimpleNamespace(kernel=kernel) if kernel else SimpleNamespace()
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda shell=shell: shell))  # type: ignore[arg-type]
        assert notebook.shows_bars() is seen
