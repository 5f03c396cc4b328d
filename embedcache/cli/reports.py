"""report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from embedcache.cli.options import say, say_json

if TYPE_CHECKING:
    from embedcache.report import Form


@click.command()
@click.argument("sweep", type=click.Path())
@click.option(
    "--output", "-o", type=click.Path(dir_okay=False), metavar="FILE",
    help="File to write. Default: SWEEP/report.html, or stdout for Markdown and JSON.",
)  # fmt: skip
@click.option(
    "--format", "form", type=click.Choice(["html", "markdown", "json"]),
    help="Default: by the ending of --output, else HTML.",
)  # fmt: skip
def report(sweep: str, output: str | None, form: Form | None) -> None:
    """Write the results of SWEEP as one page that needs no network: leaderboard, plots, errors."""
    from pathlib import Path

    from embedcache.report import report as write

    endings: dict[str, Form] = {".md": "markdown", ".json": "json"}
    form = form or (endings.get(Path(output).suffix.lower(), "html") if output is not None else "html")
    if output is None and form != "html":
        text = write(sweep, form=form)
        return say_json(text, nl=False) if form == "json" else say(text, nl=False)
    where = output if output is not None else str(Path(sweep) / "report.html")
    write(sweep, where, form)
    say(f"written to {where}")


COMMANDS = (report,)
