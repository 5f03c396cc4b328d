"""sweep and report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from embedcache.cli.options import (
    json_option,
    json_or,
    named_values,
    print_json,
    report_option,
    reporting,
    say,
    say_json,
    untrusted_option,
)

if TYPE_CHECKING:
    from embedcache.report import Form


@click.command()
@click.argument("cache", type=click.Path())
@click.option(
    "--output-dir",
    "-o",
    type=click.Path(),
    required=True,
    metavar="SWEEP",
    help="Folder for the results; one that exists is continued.",
)
@click.option("--config", type=click.Path(), metavar="FILE", help="YAML file with the heads and the values to try.")
@click.option(
    "--head", "heads", multiple=True, metavar="NAME", help="Head to try; repeat for more. Default: a grid of heads."
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE[,VALUE]",
    help="Values to try for a setting or an option of --head.",
)
@click.option(
    "--feature",
    "features",
    multiple=True,
    metavar="NAME",
    help="Feature set to try; repeat for more. Default: all but states@, which embedcache tune reads.",
)
@click.option("--seeds", metavar="N[,N]", help="Seeds of the heads; scores are averaged over them.")
@click.option(
    "--folds",
    type=int,
    metavar="N",
    help="Folds over the train and validation rows; 1 uses the split as it is.  [default: 5]",
)
@click.option("--repeats", type=int, metavar="N", help="Repetitions of the folds, each divided anew.  [default: 1]")
@click.option("--metric", metavar="NAME", help="Metric to compare by: accuracy, f1_macro, log_loss, rmse, ...")
@click.option("--random", type=int, metavar="N", help="Try N configurations drawn at random instead of all.")
@click.option("--seed", type=int, metavar="N", help="Seed of folds, --draws and --random.  [default: 0]")
@click.option("--shots", type=int, metavar="K", help="Few-shot: train on K rows of each class instead of folds.")
@click.option("--draws", type=int, metavar="N", help="Draws of --shots, each of other rows.  [default: 10]")
@click.option("--learning-curve", is_flag=True, default=None, help="Also train the best head on shares of the rows.")
@click.option(
    "--choose", type=click.Choice(["best", "simplest"]), default="best", show_default=True,
    help="Keep the best head, or the simplest of those that the data cannot tell from it.",
)  # fmt: skip
@click.option("--test-all", is_flag=True, default=None, help="Use the test split for every head; the table marks them.")
@click.option(
    "--rows", type=click.IntRange(min=0), default=12, show_default=True, metavar="N", help="Rows of the table to print."
)
@click.option("--yes", is_flag=True, help="Run more than 10,000 configurations.")
@click.option(
    "--minutes", type=float, metavar="N",
    help="Stop training in time to be done after N minutes; what was left out is named.",
)  # fmt: skip
@click.option(
    "--protocol", type=click.Choice(["mteb", "clip", "dinov2", "dinov2-knn", "dinov2-linear"]),
    help="Measure as published tables do: heads, rows, choice and metric are fixed, and printed.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print what would be trained and about how long it takes; write nothing.")
@report_option
@json_option
@untrusted_option
def sweep(
    cache: str, output_dir: str, config: str | None, heads: tuple[str, ...], settings: tuple[str, ...],
    seeds: str | None, rows: int, as_json: bool, dry_run: bool, report_to: tuple[str, ...], **options: Any,
) -> None:  # fmt: skip
    """Train many heads on CACHE, compare them honestly, keep the best in SWEEP/best.

    Heads are compared on folds of the train and validation rows; the test split is used once, for the chosen head.
    Run it again and nothing is trained twice: an interrupted sweep continues, and new heads cost only themselves.
    """
    import shlex
    import sys
    from pathlib import Path

    from embedcache.errors import Interrupted
    from embedcache.sweep import SweepResult, planned
    from embedcache.sweep import sweep as run
    from embedcache.sweep.configuration import ASKED, Asked

    if config is not None and heads:
        raise click.UsageError("--config and --head contradict each other: name the heads in the file, or by flags")
    if settings and not heads:
        raise click.UsageError("--set goes with --head: which head is it for?")
    grid: Any = Path(config) if config is not None else (_heads(heads, settings) if heads else None)
    if dry_run:
        asked = Asked(**{name: options[name] for name in ASKED if name in options})
        which = {name: options[name] for name in ("features", "yes", "protocol")}
        return say(planned(cache, grid, output_dir=output_dir, seeds=_numbers(seeds), asked=asked, **which).to_text())
    try:
        with reporting(output_dir, report_to) as report:
            result = run(
                cache, grid, output_dir=output_dir, seeds=_numbers(seeds), observe=report,
                command=shlex.join(["embedcache", *sys.argv[1:]]), **options,
            )  # fmt: skip
    except Interrupted:
        if not as_json and (Path(output_dir) / "summary.json").is_file():
            say(SweepResult(output_dir).to_text(rows))  # of what is finished
        raise
    if as_json:
        return print_json(result.summary)
    say(result.to_text(rows))
    head = "chosen head" if result.chooses else "head that the protocol keeps"
    say(f"kept in {output_dir}; the {head} in {output_dir}/best")


def _heads(names: tuple[str, ...], settings: tuple[str, ...]) -> list[object]:
    """Turn flags into the heads of a file; a setting goes to every head."""
    if not settings:
        return list(names)
    given = named_values(
        "--set", settings, "NAME=VALUE or NAME=VALUE,VALUE", lambda values: json_or(f"[{values}]", values.split(","))
    )
    return [{"head": name, **given} for name in names]


def _numbers(text: str | None) -> list[int]:
    if text is None:
        return []
    from embedcache.errors import SpecError

    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise SpecError(f"--seeds {text!r}: expected whole numbers such as 0,1,2") from None


@click.command()
@click.argument("folder", type=click.Path(), metavar="SWEEP|AUDIT")
@click.option(
    "--output", "-o", type=click.Path(dir_okay=False), metavar="FILE",
    help="File to write. Default: report.html in the folder, or stdout for Markdown and JSON.",
)  # fmt: skip
@click.option(
    "--audit", type=click.Path(), metavar="AUDIT", help="Add what audit CACHE -o AUDIT found to the page of SWEEP."
)
@click.option(
    "--format", "form", type=click.Choice(["html", "markdown", "json"]),
    help="Default: by the ending of --output, else HTML.",
)  # fmt: skip
def report(folder: str, output: str | None, audit: str | None, form: Form | None) -> None:
    """Write the results of SWEEP, or what an AUDIT found, as one page that needs no network."""
    from pathlib import Path

    from embedcache.report import report as write

    endings: dict[str, Form] = {".md": "markdown", ".json": "json"}
    form = form or (endings.get(Path(output).suffix.lower(), "html") if output is not None else "html")
    if output is None and form != "html":
        text = write(folder, form=form, audit=audit)
        return say_json(text, nl=False) if form == "json" else say(text, nl=False)
    where = output if output is not None else str(Path(folder) / "report.html")
    write(folder, where, form, audit)
    say(f"written to {where}")


COMMANDS = (sweep, report)
