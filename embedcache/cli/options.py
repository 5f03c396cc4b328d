"""Options that several commands share."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from embedcache.spec import HeadSpec, TrainSpec, declared
from embedcache.wording import json_shown, page

if TYPE_CHECKING:
    from embedcache.dataset import Examples

Decorator = Callable[[Any], Any]
Function = TypeVar("Function", bound=Callable[..., object])


def several(*options: Decorator) -> Callable[[Function], Function]:
    """Join options into one decorator, kept in the order given."""

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def setting_option(name: str, *, more: str = "", default: Any = None) -> Decorator:
    """Return the option of a field of ``TrainSpec``, as the field declares itself.

    Not given it is None, so that a command knows what was asked for; with a ``default`` of the command's own it is
    that. ``more`` is what the command adds to the help.
    """
    setting = declared(TrainSpec)[name]
    flag = f"--{name.replace('_', '-')}"
    flags = [f"{flag}/--no-{flag[2:]}"] if setting.type is bool else [flag, *_SHORT.get(name, ())]
    shown = getattr(TrainSpec(), name) if default is None else default
    text = setting.described(shown).replace("  [", f" {more}  [", 1) if more else setting.described(shown)
    kind: Any = click.Choice(setting.choices) if setting.choices else setting.type
    if setting.type is bool:
        return click.option(*flags, name, default=default, help=text)
    return click.option(*flags, name, type=kind, metavar=setting.metavar or None, default=default, help=text)


_SHORT = {"learning_rate": ("--lr",)}

training_options = several(*map(setting_option, declared(TrainSpec)))


def head_options(*names: str, default: str | None = HeadSpec.kind, torch: str = "") -> Decorator:
    """Return the options of a ``HeadSpec``, or those of them in ``names``: ``kind``, ``engine``, ``options``.

    A command whose heads are torch's alone says in ``torch`` which of them.
    """
    about = declared(HeadSpec)
    # What is after the semicolon are scikit-learn's.
    which = f"{about['kind'].help.partition(';')[0]}. {torch}" if torch else about["kind"].help
    made = {
        "kind": click.option(
            "--head", "kind", default=default, show_default=default is not None, metavar=about["kind"].metavar,
            help=which,
        ),
        "engine": click.option(
            "--engine", type=click.Choice(about["engine"].choices), help=about["engine"].described(HeadSpec.engine)
        ),
        "options": click.option(
            "--head-option", "head_options", multiple=True, metavar=about["options"].metavar,
            help=f"{about['options'].help} As JSON: hidden=[256]. Repeat for more.",
        ),
    }  # fmt: skip
    return several(*(made[name] for name in names or made))


format_options = (
    click.option(
        "--input-format", "format", type=click.Choice(["csv", "tsv", "jsonl", "lines", "parquet"]),
        help="Format of the input. Default: by the file's ending; standard input is one text a line.",
    ),
    click.option(
        "--quoting", type=click.Choice(["minimal", "none"]), default="minimal", show_default=True,
        help="How CSV and TSV quote; none: a quote is a character like any other.",
    ),
)  # fmt: skip

input_options = several(
    click.option("--text-column", metavar="NAME", help="Column that holds the text. Guessed when not given."),
    *format_options,
    click.option(
        "--label-column", metavar="NAME[,NAME]",
        help="Column that holds the label; several, as a,b, for several regression targets.",
    ),
    click.option("--id-column", metavar="NAME", help="Column that holds a row's id. Default: the row's number."),
    click.option("--split-column", metavar="NAME", help="Column that holds the split: train, validation or test."),
    click.option("--train", type=click.Path(), multiple=True, metavar="FILE", help="A file of training rows."),
    click.option("--validation", type=click.Path(), multiple=True, metavar="FILE", help="A file of validation rows."),
    click.option("--test", type=click.Path(), multiple=True, metavar="FILE", help="A file of test rows."),
    click.option(
        "--split", metavar="80/10/10",
        help="Split by content: shares of train/validation[/test]. Rows keep their split when rows are added.",
    ),
    click.option("--split-seed", type=int, default=0, show_default=True, help="Seed of --split."),
    click.option(
        "--task", type=click.Choice(["classification", "multilabel", "regression"]),
        help="Kind of labels. Guessed from the labels when not given.",
    ),
    click.option(
        "--label-separator", metavar="TEXT", help="Separator of labels within a cell of a multi-label column: ';'."
    ),
    click.option("--no-labels", is_flag=True, help="The input has no labels."),
    click.option(
        "--on-bad-row", type=click.Choice(["stop", "skip"]), default="stop", show_default=True,
        help="At a row that cannot be used: stop, or write it to the quarantine file and go on.",
    ),
    click.option("--quarantine", type=click.Path(), metavar="FILE", help="File for skipped rows."),
)  # fmt: skip

trust_option = click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
accept_option = click.option(
    "--accept-numerics", is_flag=True,
    help="Accept rows from a machine whose features differ in the last bits; the cache records it.",
)  # fmt: skip
device_option = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda|mps", help="Where the backbone runs."
)


def head_settings(options: tuple[str, ...]) -> dict[str, object]:
    """Read ``--head-option NAME=VALUE``, values as JSON where they are. Raises ``SpecError`` for anything else."""
    from embedcache.errors import SpecError

    settings: dict[str, object] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise SpecError(f"--head-option {option!r}: expected NAME=VALUE, such as hidden=[256]")
        settings[name] = json_or_text(value)
    return settings


def json_or_text(text: str) -> object:
    """Return the JSON value that ``text`` is, else the text itself."""
    from embedcache.fingerprint import strict_json

    try:
        return strict_json(text)
    except ValueError:
        return text


def untrusted_option(function: Function) -> Function:
    """Add ``--untrusted`` to a command that reads CACHE or PARTS: a child process looks into them first."""

    @functools.wraps(function)
    def guarded(*arguments: Any, untrusted: bool, **options: Any) -> Any:
        if untrusted:
            from embedcache.cache.untrusted import examine
            from embedcache.errors import CorruptCacheError

            for cache in options["parts"] if "parts" in options else (options["cache"],):
                damage = [problem for problem in examine(cache) if not problem.endswith("so it is never read")]
                if damage:
                    raise CorruptCacheError(damage[0])
        return function(*arguments, **options)

    help_text = "CACHE is not trusted: a child process with limited memory and time examines it first."
    return click.option("--untrusted", is_flag=True, help=help_text)(guarded)  # type: ignore[return-value]


def read_examples(inputs: Iterable[str], quarantine_default: str | None = None, **options: Any) -> Examples:
    """Read the input as the shared options say."""
    from embedcache.examples import load_examples

    no_labels = options.pop("no_labels")
    for name in ("train", "validation", "test"):
        options[name] = list(options[name]) or None
    if options["on_bad_row"] == "skip" and options["quarantine"] is None:
        options["quarantine"] = quarantine_default
    return load_examples(list(inputs) or None, labels="none" if no_labels else "required", **options)


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print a text; what a stranger's file put into it cannot command the terminal.

    Line breaks stay: names that stand in a text of several lines are ``shown`` where it is made.
    """
    # Named, as click would take another encoding than ASCII where that is what the stream has.
    click.echo(page(text), file=sys.stderr if err else sys.stdout, nl=nl)


def print_json(value: object) -> None:
    """Print a JSON value, indented."""
    say_json(json.dumps(value, indent=2, ensure_ascii=False))


def say_json(text: str, *, nl: bool = True) -> None:
    """Print JSON, in escapes where stdout could not hold it."""
    click.echo(json_shown(text, getattr(sys.stdout, "encoding", None)), file=sys.stdout, nl=nl)
