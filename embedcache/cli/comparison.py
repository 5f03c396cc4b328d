"""compare."""

from __future__ import annotations

from typing import Any

import click

from embedcache.cli.options import (
    device_option,
    head_options,
    input_options,
    json_option,
    print_json,
    read_examples,
    say,
    setting_option,
    table,
    trust_option,
)


@click.command()
@click.argument("inputs", nargs=-1, type=click.Path())
@click.option(
    "--output-dir", "-o", type=click.Path(), metavar="DIR",
    help="Folder for the results; one that exists is continued. Default: INPUT's name with .compare, in this folder.",
)  # fmt: skip
@click.option("--model", metavar="NAME|FOLDER", help="Hugging Face model. Default: the packaged all-MiniLM-L6-v2.")
@click.option(
    "--pooling", default="auto", show_default=True, metavar="POOLING[@LAYERS]", help="Pooling that the head reads."
)
@head_options("kind", torch="One that reads one vector a row.")
@setting_option("epochs", default=5, more="For every approach.")
@click.option(
    "--fractions",
    default="1",
    show_default=True,
    metavar="X,X",
    help="Shares of the training rows to train on, such as 0.01,0.1,1.",
)
@click.option(
    "--approaches", default="cached,frozen,full,lp-ft", show_default=True, metavar="NAME,NAME",
    help="Which to compare: cached features, frozen end to end, full fine-tuning, LP-FT.",
)  # fmt: skip
@click.option("--max-rows", type=int, metavar="N", help="Use at most N rows, drawn by content.")
@click.option("--metric", metavar="NAME", help="Metric to compare by. Default: accuracy, f1_macro or rmse.")
@setting_option("seed", default=0, more="The first of --seeds.")
@click.option("--seeds", type=int, default=1, show_default=True, metavar="N", help="How many seeds to average over.")
@device_option
@trust_option
@input_options
@json_option
def compare(
    inputs: tuple[str, ...],
    output_dir: str | None,
    model: str | None,
    pooling: str,
    kind: str,
    epochs: int,
    fractions: str,
    approaches: str,
    max_rows: int | None,
    metric: str | None,
    seed: int,
    seeds: int,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare cached features with frozen, full and LP-FT training on INPUT: time, memory, metric, break-even.

    INPUT needs labels, and train, validation and test rows (--split 80/10/10). Run it again to continue after a stop.
    """
    files = [*inputs, *(file for name in ("train", "validation", "test") for file in options[name])]
    if not files:
        raise click.UsageError("say what to read: INPUT, or --train, --validation and --test")
    where = output_dir or f"{_stem(files[0])}.compare"
    shares = [_number(part) for part in fractions.split(",") if part.strip()]
    names = [part.strip() for part in approaches.split(",") if part.strip()]
    if seeds < 1:
        raise click.UsageError(f"--seeds is {seeds}: expected at least 1")
    from embedcache.compare import compare_training_approaches

    examples = read_examples(inputs, f"{where}.quarantine.jsonl", **options)
    found = compare_training_approaches(
        examples, where, model=model, head=kind, pooling=pooling, approaches=names, epochs=epochs, fractions=shares,
        max_rows=max_rows, seeds=range(seed, seed + seeds), metric=metric, device=device,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if as_json:
        return print_json(found.to_json())
    say(found.to_text(table))
    say(f"\nsaved in {where}: comparison.md, comparison.json and, with matplotlib, comparison.svg")


def _stem(file: str) -> str:
    from pathlib import Path

    return Path(file).name.split(".")[0] or "input"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise click.UsageError(f"--fractions: {text!r} is no number: expected some such as 0.01,0.1,1") from None


COMMANDS = (compare,)
