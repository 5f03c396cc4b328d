"""Options that several commands share."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import click

from embedcache.spec import SPLITS, HeadSpec, TrainSpec, declared
from embedcache.wording import json_shown, page

if TYPE_CHECKING:
    from embedcache.dataset import Examples
    from embedcache.tracking import Reporting

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


def gathered(
    options: Sequence[Decorator], name: str, made: Callable[[dict[str, Any]], object]
) -> Callable[[Function], Function]:
    """Join options into a decorator that hands their values to the command as one, ``made`` of them by name."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def command(**given: Any) -> object:
            return function(**{name: made({option: given.pop(option) for option in names})}, **given)

        before = len(getattr(command, "__click_params__", ()))
        several(*options)(command)
        names = [option.name for option in command.__click_params__[before:]]  # type: ignore[attr-defined]
        return cast("Function", command)

    return decorate


def head_options(*names: str, default: str | None = HeadSpec.kind, torch: str = "") -> Callable[[Function], Function]:
    """Add the options of a ``HeadSpec``, or those of them in ``names``: ``kind``, ``engine``, ``options``.

    The command gets a ``HeadSpec`` as ``head``, None where none was asked for and there is no default. One whose heads
    are torch's alone says in ``torch`` which of them.
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
            "--head-option", "settings", multiple=True, metavar=about["options"].metavar,
            help=f"{about['options'].help} As JSON: hidden=[256]. Repeat for more.",
        ),
    }  # fmt: skip

    def head(given: dict[str, Any]) -> HeadSpec | None:
        from embedcache.heads import head_named

        if given["kind"] is None:
            return None
        options = named_values(
            "--head-option", given.get("settings", ()), "NAME=VALUE, such as hidden=[256]",
            lambda value: json_or(value, value),
        )  # fmt: skip
        return head_named(given["kind"], given.get("engine"), options)

    return gathered([made[name] for name in names or made], "head", head)


@dataclass(frozen=True)
class Input:
    """What a command reads: files, and how its options say they are read."""

    files: Sequence[str]
    options: dict[str, Any]

    @property
    def named(self) -> list[str]:
        """All files, those of a split too."""
        return [*self.files, *(file for split in SPLITS for file in self.options.get(split, ()))]

    def quarantine(self, default: str) -> str | None:
        """Return the file that bad rows go to, ``default`` where none is named; None where they are not skipped."""
        from embedcache.journal import url_of

        if self.options["on_bad_row"] != "skip":
            return None
        here = default if url_of(default) is None else default.rpartition("/")[2]
        return self.options["quarantine"] or here

    def examples(
        self,
        quarantine: str,
        labels: Literal["required", "none"] = "required",
        kind: str | None = None,
        pixel_range: tuple[float, float] | None = None,
    ) -> Examples:
        """Read the rows; those that cannot be used go to ``quarantine`` unless the options name another file.

        It is named after what is read or written; where that is a URL it is in the working directory.
        ``kind`` is the kind of content, guessed for None; ``pixel_range`` as in ``load_examples``.
        """
        from embedcache.examples import load_examples

        if not self.named:
            raise click.UsageError("say what to read: INPUT, or --train, --validation and --test")
        options: dict[str, Any] = {
            name: list(value) or None if name in SPLITS else value for name, value in self.options.items()
        }
        options["quarantine"] = self.quarantine(quarantine)
        if options.pop("no_labels", False):
            labels = "none"
        return load_examples(list(self.files) or None, labels=labels, kind=kind, pixel_range=pixel_range, **options)


def _input_options(*options: Decorator) -> Callable[[Function], Function]:
    inputs = click.argument("inputs", nargs=-1, type=click.Path(allow_dash=True))
    return gathered([inputs, *options], "given", lambda values: Input(values.pop("inputs"), values))


_content_columns = (
    click.option("--text-column", metavar="NAME", help="Column that holds the text. Guessed when not given."),
    click.option(
        "--image-column", metavar="NAME", help="Column that holds pictures: paths, or bytes. Guessed when not given."
    ),
    click.option("--allow-outside", is_flag=True, help="Read pictures that a file names outside of its own folder."),
)
_id_column = click.option(
    "--id-column", metavar="NAME", help="Column that holds a row's id. Default: the row's number."
)
_format = click.option(
    "--input-format", "format", type=click.Choice(["csv", "tsv", "jsonl", "lines", "parquet", "tar"]),
    help="Format of the input. Default: by the file's ending; standard input is one text a line.",
)  # fmt: skip
_quoting = click.option(
    "--quoting", type=click.Choice(["minimal", "none"]), default="minimal", show_default=True,
    help="How CSV and TSV quote; none: a quote is a character like any other.",
)  # fmt: skip
_on_bad_row = click.option(
    "--on-bad-row", type=click.Choice(["stop", "skip"]), default="stop", show_default=True,
    help="At a row that cannot be used: stop, or write it to the quarantine file and go on.",
)  # fmt: skip
_quarantine = click.option("--quarantine", type=click.Path(), metavar="FILE", help="File for skipped rows.")

text_options = _input_options(*_content_columns, _id_column, _format, _quoting, _on_bad_row, _quarantine)
"""INPUT of rows without labels, and how it is read: as ``given``, an ``Input``."""

input_options = _input_options(
    *_content_columns, _format, _quoting,
    click.option(
        "--label-column", metavar="NAME[,NAME]",
        help="Column that holds the label; several, as a,b, for several regression targets.",
    ),
    _id_column,
    click.option("--split-column", metavar="NAME", help="Column that holds the split: train, validation or test."),
    *(
        click.option(f"--{split}", type=click.Path(), multiple=True, metavar="FILE", help=f"A file of {rows} rows.")
        for split, rows in zip(SPLITS, ("training", "validation", "test"), strict=True)
    ),
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
    _on_bad_row, _quarantine,
)  # fmt: skip
"""INPUT, its columns and its splits: as ``given``, an ``Input``."""

trust_option = click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
accept_option = click.option(
    "--accept-numerics", is_flag=True,
    help="Accept rows from a machine whose features differ in the last bits; the cache records it.",
)  # fmt: skip
device_option = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda|mps", help="Where the backbone runs."
)


report_option = click.option(
    "--report-to", multiple=True, type=click.Choice(["tensorboard", "mlflow", "wandb", "trackio"]), metavar="NAME",
    help="Report to tensorboard, mlflow, wandb or trackio; repeat for more.",
)  # fmt: skip


@contextmanager
def reporting(folder: str, trackers: Sequence[str]) -> Iterator[Reporting | None]:
    """Refuse trackers that are not installed, yield what tells them of the block's training, and send what it saved."""
    if not trackers:
        yield None
        return
    from embedcache.tracking import Reporting

    with Reporting(folder, trackers) as report:
        yield report
    if report.took:
        say(f"reported to {', '.join(report.took)}", err=True)


pixel_range_option = click.option(
    "--pixel-range", type=float, nargs=2, metavar="LOW HIGH",
    help="Values of floating-point and 32-bit integer pixels that are black and white: what is between is scaled "
    "linearly, what is beyond is clipped.  [default: such images are refused]",
)  # fmt: skip


def named_values(flag: str, written: Sequence[str], expected: str, read: Callable[[str], object]) -> dict[str, object]:
    """Read ``NAME=VALUE`` of an option that may be repeated. Raises ``SpecError`` for anything else."""
    from embedcache.errors import SpecError

    pairs = [text.partition("=") for text in written]
    for name, equals, value in pairs:
        if not equals or not value:
            raise SpecError(f"{flag} {name + equals!r}: expected {expected}")
    return {name: read(value) for name, _, value in pairs}


def json_or(text: str, otherwise: object) -> object:
    """Return the JSON value that ``text`` is, else something else."""
    from embedcache.fingerprint import strict_json

    try:
        return strict_json(text)
    except ValueError:
        return otherwise


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
