"""audit: what is wrong with the rows of a cache."""

from __future__ import annotations

from typing import Any

import click

from embedcache.cli.options import json_option, print_json, say, untrusted_option


@click.command()
@click.argument("cache", type=click.Path())
@click.option(
    "--output-dir", "-o", type=click.Path(), metavar="DIR",
    help="Folder for findings.csv, a line a finding, report.html and audit.json. Default: nothing is written.",
)  # fmt: skip
@click.option(
    "--sweep", type=click.Path(), metavar="SWEEP",
    help="A sweep over CACHE, whose chosen head judges the labels.  [default: a linear head in five folds]",
)  # fmt: skip
@click.option("--feature", metavar="NAME", help="Feature set. Default: the first with one vector a row.")
@click.option(
    "--duplicates", type=float, default=0.85, show_default=True, metavar="X",
    help="Cosine of centred features from which on two rows are nearly the same.",
)  # fmt: skip
@click.option(
    "--neighbours", type=int, default=10, show_default=True, metavar="K",
    help="Nearest neighbours that have a part in judging a label.",
)  # fmt: skip
@click.option(
    "--label-next", type=int, default=20, show_default=True, metavar="N", help="Rows without label to suggest."
)
@click.option(
    "--map", type=click.Choice(["pca", "umap", "none"]), default="pca", show_default=True,
    help="How rows are laid out in two dimensions.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the folds and of UMAP.")
@click.option(
    "--rows", type=click.IntRange(min=0), default=5, show_default=True, metavar="N",
    help="Findings of each kind to print.",
)  # fmt: skip
@json_option
@untrusted_option
def audit(cache: str, output_dir: str | None, rows: int, as_json: bool, **options: Any) -> None:
    """Find what is wrong with the rows of CACHE: wrong labels, duplicates, leaks, outliers; and what to label next.

    Labels are judged out of fold by confident learning, neighbours are exact. Nothing in CACHE is changed. Time grows
    with the square of the number of rows: 100,000 of 384 numbers took 80 seconds of CPU time.
    """
    from pathlib import Path

    from embedcache.audit import audit_cache
    from embedcache.errors import MissingExtraError, warn
    from embedcache.report import report

    found = audit_cache(cache, output_dir=output_dir, **options)
    page = ""
    if output_dir is not None:
        try:
            report(output_dir, Path(output_dir) / "report.html")
            page = " and report.html"
        except MissingExtraError as error:  # what was found is kept and told
            warn([f"there is no page ({error}); then run: embedcache report {output_dir}"])
    if as_json:
        return print_json(found.to_json())
    say(found.to_text(rows))
    if output_dir is not None:
        say(f"\nkept in {output_dir}: findings.csv, audit.json{page}")


COMMANDS = (audit,)
