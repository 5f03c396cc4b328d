"""The page: one file, no network, nothing from data that could become markup."""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from embedcache.errors import MissingExtraError
from embedcache.report.sections import page_values
from embedcache.sweep.summary import Summary

if TYPE_CHECKING:
    from jinja2 import Template

_HERE = Path(__file__).parent


def source_hash(text: str) -> str:
    """Return what a content security policy calls an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def to_html(summary: Summary) -> str:
    """Return a summary as one self-contained HTML page.

    All values go through jinja2's escaping; only charts, whose texts are escaped where they are drawn, and the page's
    own style and script go in as they are, and the policy in its head allows nothing but these two.

    Raises ``MissingExtraError`` without jinja2.
    """
    try:
        from markupsafe import Markup

        template = _template()
    except ImportError:
        raise MissingExtraError("the report's page", "jinja2", "report") from None
    style, script = ((_HERE / name).read_text("utf-8") for name in ("style.css", "sort.js"))
    # Neither file of our own holds anything from data.
    return template.render(
        **page_values(summary),
        style=Markup(style),
        script=Markup(script),
        style_hash=Markup(source_hash(style)),
        script_hash=Markup(source_hash(script)),
    )


@functools.cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(_HERE)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True).get_template(
        "page.html.j2"
    )
