"""The report: what it shows comes from the summary, nothing from data is markup, and a browser agrees."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import small_summaries
from hypothesis import given
from hypothesis import strategies as st
from small_summaries import EVERY, HOSTILE, IMAGES, full, many_classes, multilabel, regression

from embedcache import cli
from embedcache.decoding import from_json
from embedcache.errors import SweepError
from embedcache.report import charts, report
from embedcache.report import to_html as page_of
from embedcache.report import to_markdown as markdown_of
from embedcache.report.page import plain, source_hash
from embedcache.sweep.result import to_text
from embedcache.sweep.summary import Summary

Run = Callable[..., tuple[int, str, str]]


def to_html(summary: Any) -> str:
    return page_of(from_json(Summary, summary))


def to_markdown(summary: Any) -> str:
    return markdown_of(from_json(Summary, summary))


class Page(HTMLParser):
    """What a page is made of: tags with attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.inside: list[str] = []
        self.sources: dict[str, str] = {"script": "", "style": ""}
        self.comments = 0
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag in self.sources:
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.sources[self.inside[-1]] += data
        else:
            self.text += data

    def handle_comment(self, data: str) -> None:
        self.comments += 1

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


TAGS = {
    "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p",
    "div", "span", "b", "em", "table", "thead", "tbody", "tr", "th", "td", "button",
    "figure", "figcaption", "svg", "line", "text", "circle", "path", "rect", "polyline", "img", "code",
    "script",
}  # fmt: skip


def assert_harmless(page: Page) -> None:
    """One script, one style, nothing that runs or loads, and no tag that the template or the charts do not write."""
    assert (page.count("script"), page.count("style"), page.comments) == (1, 1, 0)
    assert {tag for tag, _ in page.tags} <= TAGS
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, attributes)
            assert name not in ("href", "srcset", "style", "action", "xlink:href", "background"), (tag, attributes)
            assert name != "src" or re.fullmatch(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*", value or "")


def sweep(folder: Path, summary: Any) -> Path:
    folder.mkdir()
    text = summary if isinstance(summary, str) else json.dumps(summary)
    (folder / "summary.json").write_text(text, "utf-8")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process: exit status, stdout, stderr."""

    def command(*arguments: Any) -> tuple[int, str, str]:
        status = cli.run([str(each) for each in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return command


def test_every_section_with_the_summarys_own_numbers() -> None:
    page = Page(to_html(full()))
    for said in (
        "44 heads on bbc-news.cache", "0.9007", "0.8703 to 0.9277, 401 rows", "9 of 44", "0.2318", "0.9137", "-0.0038",
        "99,845", "1,925", "Leaderboard", "What made the difference", "Pooling and layer", "Learning curve",
        "Few shots", "0.6557", "0.0431", "The chosen head on test", "0.0432", "balanced_accuracy", "0.8991",
        "Confusion", "By class", "science and technology", "The most confident mistakes", "7 of 41 mistakes",
        "(0.997)", "article-11", "2 could not be trained", "the covariance is singular", "How to read this",
        "What was run", "--folds 5 --shots 8", "013d020b4760b793b4ce6635faade45c2698372bacb2e33862fcda535f75a238",
        "numpy 2.4.6", "Rows by class", "251", "the largest tried (0.01)", "seen on test",
    ):  # fmt: skip
        assert said in page.text, said
    assert page.count("svg") == 44 + 4 + 1 + 1 + 1 + 1 + 1  # bars, settings and cost, layers, curve, shots, calibration
    assert "not finished" not in page.text


def test_changing_a_number_changes_the_page() -> None:
    made = full()
    made["leaderboard"][2]["score"] = 0.123457
    made["test"]["per_class"][3]["recall"] = 0.456789
    text = Page(to_html(made)).text
    assert "0.1235" in text
    assert "0.4568" in text


def test_sections_without_findings_are_not_there() -> None:
    page = Page(to_html(small_summaries.one_head()))
    assert "not finished" in page.text
    assert "1 head on" in page.text
    for said in ("Confusion", "Learning curve", "Few shots", "mistakes", "Pooling and layer", "None", "could not be"):
        assert said not in page.text, said


@pytest.mark.parametrize("name", EVERY)
def test_every_kind_of_summary_is_harmless_in_every_form(name: str, tmp_path: Path) -> None:
    made = EVERY[name]()
    folder = sweep(tmp_path / "sweep", made)
    html = report(folder)
    assert_harmless(Page(html))
    assert "nan" not in re.findall(r"[\"\s>](nan|inf|undefined)[\"\s<]", html)
    assert json.loads(report(folder, form="json")) == made
    assert report(folder, form="markdown").startswith("# ")


def test_the_check_for_harm_can_fail() -> None:
    for bad in ("<script>1</script>", "<img src=x>", "<p onclick=a>", "<a href=x>", "<!-- -->", "<iframe>"):
        with pytest.raises(AssertionError):
            assert_harmless(Page(to_html(full()) + bad))


def test_hostile_texts_stay_texts() -> None:
    page = Page(to_html(small_summaries.hostile()))
    for each in HOSTILE[:7]:
        assert each in page.text, each
    assert not any(image in dict(attributes).values() for _, attributes in page.tags for image in IMAGES)


@given(st.text(), st.text())
def test_any_text_stays_text(label: str, text: str) -> None:
    made = small_summaries.one_head()
    made["leaderboard"][0]["label"] = label
    made["mistakes"] = full()["mistakes"]
    made["mistakes"]["shown"][0]["text"] = text
    assert_harmless(Page(to_html(made)))


def test_the_policy_allows_only_the_pages_own_style_and_script() -> None:
    page = Page(to_html(full()))
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in ("style", "script"):
        assert f"{name}-src '{source_hash(page.sources[name])}'" in policy


@given(st.text())
def test_markdown_has_no_cell_broken_by_data(value: str) -> None:
    assert "\n" not in plain(value)
    assert not re.search(r"(?<!\\)(?:\\\\)*[|<`]", plain(value))


def test_markdown_tables_keep_their_columns() -> None:
    lines = to_markdown(small_summaries.hostile()).splitlines()
    table = [line for line in lines if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table}
    assert widths <= {3, 6, 9}, widths
    assert "14 more are in" in to_markdown(full())


def test_lower_is_better_colours_the_lowest(tmp_path: Path) -> None:
    made = small_summaries.regression()
    page = to_html(made)
    opacities = dict(re.findall(r'fill-opacity="([\d.]+)"[^>]*><title>[^<]*: ([\d.]+)</title>', page))
    assert opacities["1.000"] == "0.411"


def test_many_classes_become_a_list() -> None:
    page = Page(to_html(many_classes(200)))
    assert "Most often confused" in page.text
    assert "truth down" not in page.text
    assert len(to_html(many_classes(200))) < 400_000


def test_a_score_that_does_not_exist() -> None:
    made = full()
    for row in made["leaderboard"][3:]:
        row["score"] = row["interval"] = None
    made["few_shot"]["scores"][1] = made["few_shot"]["sd"] = None
    assert_harmless(Page(to_html(made)))
    assert " - " in to_markdown(made)


def test_ticks_are_round_and_within() -> None:
    assert charts.ticks(0, 1) == [0, 0.5, 1] or len(charts.ticks(0, 1)) <= 6
    assert charts.ticks(0.7, 0.7) == [0.7]
    assert all(0.513 <= each <= 0.887 for each in charts.ticks(0.513, 0.887))
    scores = [0.2, *[0.9 + at / 1000 for at in range(20)]]
    low, high = charts.without_outliers(scores, [score + aside for score in scores for aside in (-0.03, 0.03)])
    assert 0.8 < low < 0.88, "neither the outlier nor, cut off, the intervals of the others"
    assert high > 0.94
    assert charts.without_outliers([0.2, 0.9], [0.1, 0.95]) == (0.1, 0.95)
    assert charts.short("a" * 30 + "z") == "aaaaaaaaaaaaa…aaaaaaaz"


def test_command_line(run: Run, tmp_path: Path) -> None:
    folder = sweep(tmp_path / "sweep", full())
    status, out, err = run("report", folder)
    assert (status, err) == (0, "")
    assert str(folder / "report.html") in out
    assert (folder / "report.html").read_text("utf-8").startswith("<!doctype html>")
    assert run("report", folder, "-o", tmp_path / "a.md")[0] == 0
    assert (tmp_path / "a.md").read_text("utf-8").startswith("# 44 heads")
    status, out, _ = run("report", folder, "--format", "json")
    assert json.loads(out) == full()
    assert sorted(each.name for each in folder.iterdir()) == ["report.html", "summary.json"]


def spoiled(**changes: Any) -> dict[str, Any]:
    return {**full(), **changes}


@pytest.mark.parametrize(
    ("summary", "said"),
    [
        ("{", "is damaged"),
        ('{"format": NaN}', "is damaged"),
        ("[]", "is not the summary of a sweep"),
        ({"format": "other"}, "is not the summary of a sweep"),
        (spoiled(version=2), "version 2"),
        ({"format": "embedcache-sweep", "version": 1}, "the whole lacks complete"),
        (spoiled(leaderboard=[]), "no head that could be trained"),
        (spoiled(leaderboard={}), "leaderboard is of type dict: expected a list"),
        (spoiled(leaderboard=[{"id": 1}]), "leaderboard[0] lacks rank"),
    ],
)
def test_damaged_summaries(run: Run, tmp_path: Path, summary: Any, said: str) -> None:
    folder = sweep(tmp_path / "sweep", summary)
    status, out, err = run("report", folder)
    assert (status, out, err.count("\n")) == (1, "", 1), err
    assert said in err
    assert not (folder / "report.html").exists()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a summary; of a list only the first and the last entry."""
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list({number: value[number] for number in (0, len(value) - 1) if value}.items())
    else:
        return
    for name, child in children:
        yield (*path, name)
        yield from places(child, (*path, name))


@pytest.mark.parametrize("made", [full, regression, multilabel], ids=lambda made: made.__name__)
def test_a_summary_that_lacks_anything_is_shown_or_refused(made: Any) -> None:
    """Every value left out, and every value of another type, as a flipped bit may leave them."""
    whole = made()
    whole["leaderboard"] = whole["leaderboard"][:3]
    for name, points in (whole["test"].get("points") or {}).items():  # as many as are drawn would take half the time
        whole["test"]["points"][name] = points[:3]
    tried = refused = 0
    for path in places(whole):
        for damage in ("left out", "a word", 7, None, {}):
            summary = copy.deepcopy(whole)
            parent = functools.reduce(lambda value, name: value[name], path[:-1], summary)
            if damage != "left out":
                parent[path[-1]] = damage
            elif isinstance(parent, dict):
                del parent[path[-1]]
            tried += 1
            try:
                read = from_json(Summary, summary)
            except ValueError:
                refused += 1
                continue
            try:
                page_of(read), markdown_of(read), to_text(read)
            except Exception as error:
                raise AssertionError(f"{path}, {damage}: {error!r}") from error
    assert 0 < refused < tried


def test_folders_that_are_no_sweep(run: Run, tmp_path: Path) -> None:
    assert "is not there" in run("report", tmp_path / "nowhere")[2]
    assert "is not a sweep's folder" in run("report", tmp_path)[2]
    (tmp_path / "sweep.json").write_text("{}")
    assert "has no results yet" in run("report", tmp_path)[2]


def test_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sweep(tmp_path / "sweep", full())
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "missing" / "a.html", tmp_path / "file" / "a.html", folder):
        with pytest.raises(SweepError, match="cannot write"):
            report(folder, where)

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "old.html").write_text("old")
    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(SweepError, match="the disk is full"):
        report(folder, tmp_path / "old.html")
    assert (tmp_path / "old.html").read_text() == "old"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "old.html", "sweep"]


# ---- in a browser ----

DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium")
needs_browser = pytest.mark.skipif(not (DRIVER and BROWSER), reason="needs chromium and chromedriver")


class Browser:
    """The few WebDriver calls that these tests need, by plain HTTP."""

    def __init__(self, port: int, profile: Path) -> None:
        self.base = f"http://127.0.0.1:{port}"
        switches = [
            "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", f"--user-data-dir={profile}",
        ]  # fmt: skip
        options = {"binary": BROWSER, "args": switches}
        wanted = {
            "browserName": "chrome", "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }  # fmt: skip
        made = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"/session/{made['sessionId']}"

    def call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as answer:
            return json.load(answer)["value"]

    def open(self, path: Path) -> None:
        self.call("POST", f"{self.session}/url", {"url": "about:blank"})
        self.logs("browser"), self.logs("performance")
        self.call("POST", f"{self.session}/url", {"url": path.as_uri()})

    def run(self, script: str) -> Any:
        return self.call("POST", f"{self.session}/execute/sync", {"script": script, "args": []})

    def logs(self, kind: str) -> list[Any]:
        found: list[Any] = self.call("POST", f"{self.session}/se/log", {"type": kind})
        return found

    def requests(self) -> list[str]:
        events = [json.loads(each["message"])["message"] for each in self.logs("performance")]
        sent = [each["params"] for each in events if each["method"] == "Network.requestWillBeSent"]
        # The browser's own first tab may still be loading its own parts.
        ours = [each["request"]["url"] for each in sent if not each["documentURL"].startswith("chrome:")]
        return [url for url in ours if not url.startswith("data:")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        [str(DRIVER), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        opened = Browser(port, tmp_path_factory.mktemp("profile"))
        yield opened
        opened.call("DELETE", opened.session)
    finally:
        driver.terminate()
        driver.wait(10)


def opened(browser: Browser, path: Path, summary: Any) -> None:
    path.write_bytes(to_html(summary).encode("utf-8", "backslashreplace"))
    browser.open(path)


@needs_browser
@pytest.mark.parametrize("name", EVERY)
def test_a_page_opens_quietly(browser: Browser, tmp_path: Path, name: str) -> None:
    opened(browser, tmp_path / "page.html", EVERY[name]())
    assert browser.logs("browser") == []
    assert browser.requests() == [(tmp_path / "page.html").as_uri()]
    assert browser.run("return document.querySelectorAll('script').length") == 1
    # The page itself never scrolls sideways; wide tables do so in their own box.
    assert browser.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


@needs_browser
def test_headings_sort(browser: Browser, tmp_path: Path) -> None:
    opened(browser, tmp_path / "page.html", full())
    column = "return [...document.querySelector('.board tbody').rows].map(row => row.cells[{}].dataset.sort)"
    state = "return [...document.querySelectorAll('.board th')].map(cell => cell.getAttribute('aria-sort'))"
    for at, key in ((2, "score"), (6, "parameters"), (7, "seconds")):
        expected = sorted(row[key] for row in full()["leaderboard"])
        for way, values in (("ascending", expected), ("descending", expected[::-1])):
            browser.run(f"document.querySelectorAll('.board th button')[{at}].click()")
            assert [float(each) for each in browser.run(column.format(at))] == values
            assert browser.run(state) == [way if each == at else None for each in range(9)]


@needs_browser
def test_the_policy_stops_what_is_not_ours(browser: Browser, tmp_path: Path) -> None:
    page = to_html(copy.deepcopy(full()))
    bad = page.replace(
        "</main>", "<script>document.title = 'taken'</script><img src='http://127.0.0.1:9/a.png'></main>"
    )
    (tmp_path / "bad.html").write_text(bad, "utf-8")
    browser.open(tmp_path / "bad.html")
    assert browser.run("return document.title") != "taken"
    assert len(browser.logs("browser")) >= 2
