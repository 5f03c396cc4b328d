"""check and compare: the commands that measure."""

from __future__ import annotations

from typing import Any, Literal

import click

from embedcache.cli.options import (
    device_option,
    head_options,
    head_settings,
    input_options,
    json_option,
    print_json,
    read_examples,
    say,
    setting_option,
    trust_option,
    untrusted_option,
)


@click.command()
@click.argument("cache", type=click.Path())
@click.argument("inputs", nargs=-1, type=click.Path())
@click.option("--model", metavar="NAME|FOLDER", help="The backbone, if it is no longer where it was.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model.")
@head_options("kind", "options", default=None, torch="[default: mlp, or attention-pooling]")
@click.option("--feature", metavar="NAME", help="Feature set to train on. Default: the first that the head can read.")
@click.option(
    "--reference", type=click.Choice(["canonical", "standard", "both"]), default="both", show_default=True,
    help="canonical: the backbone at the cache's own batch shapes, bit for bit. standard: plain transformers and "
    "torch, within a derived tolerance.",
)  # fmt: skip
@click.option(
    "--steps",
    type=int,
    metavar="N",
    help="Training steps to compare, each with the backbone in the loop.  [default: 10]",
)
@click.option(
    "--rows", type=int, default=1536, show_default=True, metavar="N", help="Rows whose features are compared."
)
@click.option(
    "--all", "everything", is_flag=True, help="Compare every row, and train at least one epoch, instead of a sample."
)
@setting_option("seed", default=0, more="Also of the sample of rows.")
@device_option
@trust_option
@input_options
@json_option
@untrusted_option
def check(
    cache: str,
    inputs: tuple[str, ...],
    kind: str | None,
    head_options: tuple[str, ...],
    as_json: bool,
    model: str | None,
    revision: str | None,
    feature: str | None,
    reference: Literal["canonical", "standard", "both"],
    steps: int | None,
    rows: int,
    everything: bool,
    seed: int,
    device: str,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Check that training on CACHE equals training end to end on INPUT, from which CACHE was made.

    Compares features, some steps of minibatch training (of a linear head its optimum too) and predictions. Exit status
    0: equal, 1: different. Without INPUT, the rows stored in the cache (extract --keep-inputs) are used.
    """
    from embedcache.cache import FeatureCache
    from embedcache.equivalence import check_equivalence
    from embedcache.heads import head_named

    split = options.pop("split")
    options["split"], split = (split, None) if split is not None and "/" in split else (None, split)
    opened = FeatureCache.open(cache)
    named = inputs or any(options[name] for name in ("train", "validation", "test"))
    examples = read_examples(inputs, f"{cache}.quarantine.jsonl", **options) if named else None
    head = head_named(kind, None, head_settings(head_options)) if kind is not None else None
    result = check_equivalence(
        opened, examples, model=model, revision=revision, head=head, feature=feature, reference=reference,
        steps=steps, rows=rows, split=split, everything=everything, seed=seed, device=device,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if as_json:
        print_json(result.to_json())
    else:
        say(result.to_text())
    if not result.equal:
        say(f"error: {result.reason}", err=True)
        raise click.exceptions.Exit(1)


for parameter in check.params:  # the option of the other commands, which names a split here too
    if parameter.name == "split" and isinstance(parameter, click.Option):
        parameter.metavar = "NAME|80/10/10"
        parameter.help = "Split on which predictions are compared; or how to split the input.  [default: validation]"


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
    say(found.to_text())
    say(f"\nsaved in {where}: comparison.md, comparison.json and, with matplotlib, comparison.svg")


def _stem(file: str) -> str:
    from pathlib import Path

    return Path(file).name.split(".")[0] or "input"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise click.UsageError(f"--fractions: {text!r} is no number: expected some such as 0.01,0.1,1") from None


COMMANDS = (check, compare)
