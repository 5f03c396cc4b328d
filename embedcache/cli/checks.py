"""check and compare: the commands that measure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from embedcache.cli.options import (
    Input,
    device_option,
    head_options,
    input_options,
    json_option,
    pixel_range_option,
    print_json,
    say,
    setting_option,
    trust_option,
    untrusted_option,
)
from embedcache.spec import TUNING, TUNING_DROPOUT

if TYPE_CHECKING:
    from embedcache.spec import HeadSpec


@click.command()
@click.argument("cache", type=click.Path())
@click.option("--model", metavar="NAME|FOLDER", help="The backbone, if it is no longer where it was.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model.")
@head_options("kind", "options", default=None, torch="[default: mlp, or attention-pooling]")
@click.option("--feature", metavar="NAME", help="Feature set to train on. Default: the first that the head can read.")
@click.option(
    "--reference", type=click.Choice(["canonical", "standard", "both"]), default="both", show_default=True,
    help="canonical: the backbone at the cache's own batch shapes, bit for bit. standard: plain transformers and "
    "torch, within a derived tolerance.",
)  # fmt: skip
@setting_option("optimizer", default="adamw")
@click.option(
    "--steps",
    type=int,
    metavar="N",
    help="Training steps to compare, each with the backbone in the loop.  [default: 10]",
)
@click.option(
    "--rows", type=int, metavar="N", help="Rows whose features are compared; not with --blocks.  [default: 1536]"
)
@click.option(
    "--all", "everything", is_flag=True, help="Compare every row, and train at least one epoch, instead of a sample."
)
@click.option(
    "--blocks", type=int, metavar="K",
    help="Check training of the last K blocks from their states in CACHE instead, as embedcache tune does it; the head "
    "is then linear by default.",
)  # fmt: skip
@click.option(
    "--dropout/--no-dropout", default=None,
    help=f"With --blocks: as in embedcache tune.  [default: {'dropout' if TUNING_DROPOUT else 'no-dropout'}]",
)  # fmt: skip
@click.option("--new-head", is_flag=True, default=None, help="With --blocks: as in embedcache tune.")
@setting_option("seed", default=0, more="Also of the sample of rows.")
@device_option
@trust_option
@input_options
@json_option
@untrusted_option
def check(cache: str, given: Input, head: HeadSpec | None, as_json: bool, **options: Any) -> None:
    """Check that training on CACHE equals training end to end on INPUT, from which CACHE was made.

    Compares features, some steps of minibatch training (of a linear head its optimum too) and predictions. Exit status
    0: equal, 1: different. Without INPUT, the rows stored in the cache (extract --keep-inputs) are used.
    """
    from embedcache.cache import FeatureCache
    from embedcache.equivalence import check_equivalence, check_tuning
    from embedcache.errors import CacheNotFoundError

    if options["blocks"] is not None and options["optimizer"] != "adamw":
        raise click.UsageError("--optimizer sgd and --blocks contradict each other: tune trains blocks by adamw")
    tuning = {name: value for name in ("dropout", "new_head") if (value := options.pop(name)) is not None}
    if options["rows"] is None:
        del options["rows"]
    elif options["blocks"] is not None:
        raise click.UsageError("--rows and --blocks contradict each other: of blocks, the rows that train are compared")
    if tuning and options["blocks"] is None:
        raise click.UsageError("--dropout and --new-head are of training the last blocks: give --blocks K too")
    try:
        opened, split = FeatureCache.open(cache), given.options["split"]
    except CacheNotFoundError:
        _refuse_run(cache)
        raise
    if split is not None and "/" not in split:
        given.options["split"], options["split"] = None, split
    examples = None
    if given.named:
        kind = "id" if opened.spec.content == "id" else None
        examples = given.examples(f"{cache}.quarantine.jsonl", kind=kind, pixel_range=opened.spec.pixel_range)
    if (blocks := options.pop("blocks")) is not None:
        options = {name: value for name, value in options.items() if name != "optimizer"}
        result = check_tuning(opened, examples, head=head, blocks=blocks, **tuning, **options)
    else:
        result = check_equivalence(opened, examples, head=head, **options)
    if as_json:
        print_json(result.to_json())
    else:
        say(result.to_text())
    if not result.equal:
        say(f"error: {result.reason}", err=True)
        raise click.exceptions.Exit(1)


def _refuse_run(folder: str) -> None:
    """Raise ``UsageError`` where a run stands in the place of its cache, with the command that proves its training."""
    from pathlib import Path

    from embedcache.errors import BundleError
    from embedcache.heads import TrainedHead

    if not (Path(folder) / "config.json").is_file():
        return
    try:
        head = TrainedHead.from_pretrained(folder)
    except BundleError:
        return
    made, proof = head.training, f"embedcache check CACHE INPUT --feature {head.feature.name}"
    if head.spec.engine == "torch":
        proof += f" --head {head.spec.kind}"
    if "blocks" in made:
        proof += f" --blocks {made['blocks']}" + " --dropout" * bool(made.get("dropout"))
        proof += " --new-head" * bool(made.get("new_head"))
    raise click.UsageError(
        f"{folder} is a run, not a cache: such training is proved, with the cache that it was trained on, by {proof}"
    )


for parameter in check.params:  # the option of the other commands, which names a split here too
    if parameter.name == "split" and isinstance(parameter, click.Option):
        parameter.metavar = "NAME|80/10/10"
        parameter.help = "Split on which predictions are compared; or how to split the input.  [default: validation]"


@click.command()
@click.option(
    "--output-dir", "-o", type=click.Path(), metavar="DIR",
    help="Folder for the results; one that exists is continued. Default: INPUT's name with .compare, in this folder.",
)  # fmt: skip
@click.option("--model", metavar="NAME|FOLDER", help="Hugging Face model. Default: the packaged all-MiniLM-L6-v2.")
@click.option(
    "--pooling", default="auto", show_default=True, metavar="POOLING[@LAYERS]", help="Pooling that the head reads."
)
@head_options("kind", torch="One that reads one vector a row.")
@setting_option("epochs", default=5, more=f"For every approach, of the last blocks {TUNING.epochs} at most.")
@click.option(
    "--fractions",
    default="1",
    show_default=True,
    metavar="X,X",
    help="Shares of the training rows to train on, such as 0.01,0.1,1.",
)
@click.option(
    "--approaches", metavar="NAME,NAME",
    help="Which to compare: cached features, frozen end to end, last-1 to last-3 (the last blocks from cached states), "
    "full fine-tuning, lp-ft. Default: all that the model allows.",
)  # fmt: skip
@pixel_range_option
@click.option("--max-rows", type=int, metavar="N", help="Use at most N rows, drawn by content.")
@click.option("--metric", metavar="NAME", help="Metric to compare by. Default: accuracy, f1_macro or rmse.")
@setting_option("seed", default=0, more="The first of --seeds.")
@click.option("--seeds", type=int, default=1, show_default=True, metavar="N", help="How many seeds to average over.")
@device_option
@trust_option
@input_options
@json_option
def compare(
    given: Input, output_dir: str | None, fractions: str, approaches: str | None, seed: int, seeds: int, as_json: bool,
    pixel_range: tuple[float, float] | None, **options: Any,
) -> None:  # fmt: skip
    """Compare cached features, frozen, last-blocks, full and LP-FT training on INPUT: time, memory, disk, metric.

    INPUT needs labels, and train, validation and test rows (--split 80/10/10). Run it again to continue after a stop.
    """
    where = output_dir or f"{_stem(given.named)}.compare"
    shares = [_number(part) for part in fractions.split(",") if part.strip()]
    names = None if approaches is None else [part.strip() for part in approaches.split(",") if part.strip()]
    if seeds < 1:
        raise click.UsageError(f"--seeds is {seeds}: expected at least 1")
    from embedcache.compare import compare_training_approaches

    comparison = compare_training_approaches(
        given.examples(f"{where}.quarantine.jsonl", pixel_range=pixel_range), where, approaches=names, fractions=shares,
        seeds=range(seed, seed + seeds), **options,
    )  # fmt: skip
    if as_json:
        return print_json(comparison.to_json())
    say(comparison.to_text())
    say(f"\nsaved in {where}: comparison.md, comparison.json and, with matplotlib, comparison.svg")


def _stem(files: list[str]) -> str:
    from pathlib import Path

    return (Path(files[0]).name.split(".")[0] if files else "") or "input"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise click.UsageError(f"--fractions: {text!r} is not a number: expected some such as 0.01,0.1,1") from None


COMMANDS = (check, compare)
