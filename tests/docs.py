"""``python tests/docs.py DIR``: README, the other pages and all docstrings as a site that needs no server.

Pages become links where another page names them, and so do modules. At the end every link within the site is followed;
one that leads nowhere is an error.
"""

from __future__ import annotations

import argparse
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pdoc
import pdoc.docstrings
import pdoc.render
from markupsafe import Markup
from pdoc.render_helpers import to_html

import embedcache

REPO = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index", "ARCHITECTURE.md": "architecture", "embedcache/FORMAT.md": "format",
    "BENCHMARKS.md": "benchmarks", "CONTRIBUTING.md": "contributing", "SECURITY.md": "security",
    "CHANGELOG.md": "changelog",
}  # fmt: skip
"""Files of the repository, and the names of their pages."""
LEFT_OUT = ("__main__", "cli")

PAGE = """{% extends "frame.html.jinja2" %}
{% block title %}{{ title }}{% endblock %}
{% block nav %}
<h2>embedcache</h2>
<ul>{% for name, page in pages.items() %}<li><a href="{{ page }}.html">{{ name }}</a></li>{% endfor %}</ul>
<h2>Reference</h2>
<ul><li><a href="embedcache.html">embedcache</a></li></ul>
{% if contents %}<h2>Contents</h2>{{ contents }}{% endif %}
{% endblock %}
{% block content %}
<main class="pdoc"><section class="module-info"><div class="docstring">{{ body }}</div></section></main>
{% endblock %}"""


def rooms() -> list[str]:
    """Return the package and its rooms, as modules."""
    names = sorted(module.name for module in pkgutil.iter_modules(embedcache.__path__))
    return ["embedcache", *(f"embedcache.{name}" for name in names if name not in LEFT_OUT)]


def build(site: Path, pages: Mapping[str, str] = PAGES, modules: Sequence[str] = ()) -> None:
    """Write the site, with all rooms where no modules are given. An import that fails fails here."""
    convert = pdoc.docstrings.convert

    def converted(docstring: str, docformat: str, source_file: Path | None) -> str:
        return convert(tables(docstring), docformat, source_file)

    pdoc.docstrings.convert = converted
    for name in embedcache.__all__:  # which are found when they are asked for, and pdoc does not ask
        setattr(embedcache, name, getattr(embedcache, name))
    pdoc.render.configure(docformat="google", show_source=False, footer_text="embedcache")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of annotations that only a type checker imports
        pdoc.pdoc(*modules or rooms(), output_directory=site)
    for page in site.rglob("*.html"):
        unlink(page)
    template = pdoc.render.env.from_string(PAGE)
    for file, page in pages.items():
        made = to_html((REPO / file).read_text("utf-8"))
        body = re.sub(r"<code>([\w./-]+)</code>", linked(site, pages), made)
        names = {Path(name).stem.capitalize(): other for name, other in pages.items()}
        text = template.render(
            title=f"embedcache: {Path(file).stem.capitalize()}", pages=names, body=Markup(body),
            contents=Markup(getattr(made, "toc_html", None) or ""),
        )  # fmt: skip
        (site / f"{page}.html").write_text(text, "utf-8")


def unlink(page: Path) -> None:
    """Take away the links to members that pdoc names and does not show: what a class inherits from elsewhere."""
    text, places = page.read_text("utf-8"), _Links(page).places
    page.write_text(re.sub(r' href="#([^"]+)"', lambda found: found[0] if found[1] in places else "", text), "utf-8")


def linked(site: Path, pages: Mapping[str, str]) -> Callable[[re.Match[str]], str]:
    """Return what makes a link of a code span that names a page of the site, or a module or room of the package."""

    def link(found: re.Match[str]) -> str:
        name = found[1]
        module = f"{name.rstrip('/').removesuffix('.py')}.html"
        if name in pages:
            return f'<a href="{pages[name]}.html">{found[0]}</a>'
        if name.startswith("embedcache/") and (site / module).is_file():
            return f'<a href="{module}">{found[0]}</a>'
        return found[0]

    return link


_TABLE = re.compile(
    r"^(?P<line>=+(?: +=+)+)\n(?P<first>(?:.+\n)+?)(?P=line)(?:\n(?P<second>(?:.+\n)+?)(?P=line))?$\n?", re.MULTILINE
)
"""Rows between two lines, or a header and rows between three."""


def tables(docstring: str) -> str:
    """Turn a docstring's tables of reStructuredText into Markdown's."""

    def table(found: re.Match[str]) -> str:
        starts = [match.start() for match in re.finditer("=+", found["line"])]
        columns = list(zip(starts, [*starts[1:], None], strict=True))
        lines = (found["first"] + found["second"] if found["second"] else "\n" + found["first"]).splitlines()
        cells = [[line[start:end].strip() for start, end in columns] for line in lines]
        cells.insert(1, ["---"] * len(columns))
        return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in cells) + "\n"

    return _TABLE.sub(table, docstring)


class _Links(HTMLParser):
    """The links and the places of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.places |= {value for name in ("id", "name") if (value := values.get(name))}
        self.links += [value for name in ("href", "src") if (value := values.get(name))]


def dead(site: Path) -> Iterator[str]:
    """Yield every link within a site that leads to no file, or to no place in it. The web is not asked."""
    pages = {page.resolve(): _Links(page) for page in sorted(site.rglob("*.html"))}
    for page, read in pages.items():
        for link in read.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            place = unquote(parts.fragment)
            if not target.is_file():
                yield f"{page.relative_to(site.resolve())}: {link} leads nowhere"
            elif place and target in pages and place not in pages[target].places:
                yield f"{page.relative_to(site.resolve())}: {link}: there is no such place"


def main() -> None:
    """Build the site and follow its links."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("site", type=Path, help="the folder to write")
    site = parser.parse_args().site
    build(site)
    if found := list(dead(site)):
        sys.exit("\n".join(found))
    print(f"{site / 'index.html'}: {len(list(site.rglob('*.html')))} pages, no dead links")


if __name__ == "__main__":
    main()
