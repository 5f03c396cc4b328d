"""check."""

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
    untrusted_option,
)


@click.command()
@click.argument("cache", type=click.Path())
@click.argument("inputs", nargs=-1, type=click.Path())
@click.option("--model", metavar="NAME|FOLDER", help="Where the backbone is now, if not where it was.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model.")
@head_options("kind", "options", default=None, torch="[default: mlp, or attention-pooling]")
@click.option("--feature", metavar="NAME", help="Feature set the head reads. Default: the first it can.")
@click.option(
    "--reference", type=click.Choice(["canonical", "standard", "both"]), default="both", show_default=True,
    help="canonical: the backbone at the cache's own shapes, bit for bit. standard: plain transformers and torch, "
    "within a derived tolerance.",
)  # fmt: skip
@click.option("--steps", type=int, metavar="N", help="Steps of training, the backbone run in each.  [default: 10]")
@click.option(
    "--rows", type=int, default=1536, show_default=True, metavar="N", help="Rows whose features are compared."
)
@click.option("--all", "everything", is_flag=True, help="Every row, and at least one epoch of steps: no sample.")
@setting_option("seed", default=0, more="And of the sample.")
@device_option
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
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
    reference: Any,
    steps: int | None,
    rows: int,
    everything: bool,
    seed: int,
    device: str,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Is training on CACHE the same as training end to end on INPUT, which it was made from?

    Compares features, a few steps of training by minibatches (of linear, its optimum too) and predictions; exit 0
    equal, 1 different. Without INPUT, the rows that the cache keeps (extract --keep-inputs) are used.
    """
    from embedcache.cache import FeatureCache
    from embedcache.equivalence import check_equivalence
    from embedcache.heads import head_named

    split = options.pop("split")
    options["split"], split = (split, None) if split is not None and "/" in split else (None, split)
    opened = FeatureCache.open(cache)
    named = inputs or any(options[name] for name in ("train", "validation", "test"))
    examples = read_examples(inputs, f"{cache}.quarantine.jsonl", **options) if named else None
    head = head_named(kind, None, _settings(head_options)) if kind is not None else None
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


def _settings(options: tuple[str, ...]) -> dict[str, Any]:
    from embedcache.errors import SpecError
    from embedcache.fingerprint import strict_json

    settings: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise SpecError(f"--head-option {option!r}: expected NAME=VALUE")
        try:
            settings[name] = strict_json(value)
        except ValueError:
            settings[name] = value
    return settings


for parameter in check.params:  # the option of the other commands, which names a split here too
    if parameter.name == "split" and isinstance(parameter, click.Option):
        parameter.metavar = "NAME|80/10/10"
        parameter.help = "The split predictions are compared on; or how the input is split.  [default: validation]"


COMMANDS = (check,)
