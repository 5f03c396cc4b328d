"""predict."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import click

from embedcache.cli.options import Input, device_option, json_option, print_json, say, text_options, trust_option
from embedcache.wording import page, shown

if TYPE_CHECKING:
    from embedcache.predict import Prediction, PredictionTable, Predictor

    Named = tuple[str, Prediction]

_OURS = ("config.json", "history.jsonl", "manifest.json", "metrics.json")
"""Files of a run or a cache whose endings are those of tables."""


@click.command()
@click.argument("run", type=click.Path())
@click.option("--text", "texts", multiple=True, metavar="TEXT", help="A text to predict. Repeat for more.")
@click.option("--output", "-o", type=click.Path(dir_okay=False), metavar="FILE", help="File to write. Default: stdout.")
@click.option(
    "--format", "form", type=click.Choice(["csv", "jsonl", "parquet"]),
    help="Default: by the ending of FILE (.csv, .jsonl, .parquet); CSV on stdout.",
)  # fmt: skip
@click.option(
    "--explain", type=click.IntRange(min=1), metavar="K",
    help="Name the K training rows in --cache that are nearest, with their similarity, label and kept text.",
)  # fmt: skip
@click.option("--cache", type=click.Path(), metavar="CACHE", help="For --explain: the cache that RUN was trained on.")
@text_options
@click.option("--model", metavar="NAME|FOLDER", help="The head's backbone, if it is no longer where it was.")
@click.option("--average-views", is_flag=True, help="Average over each picture and views of it, for a head on views.")
@trust_option
@device_option
@json_option
def predict(
    run: str, given: Input, texts: tuple[str, ...], output: str | None, form: Any, as_json: bool, explain: int | None,
    cache: str | None, **options: Any,
) -> None:  # fmt: skip
    """Predict with the head of RUN: --text "...", files (CSV, TSV, JSONL, Parquet, tar), or - for standard input; for a
    head on images also image files and folders.

    The backbone must be the one the head was trained on, with the same settings; any other is refused. The columns are
    id, label, confidence, margin (the lead over the next class, or the closest label's distance from its threshold) and
    the probability of each class (for regression, the value of each target). In CSV, a cell that a spreadsheet would
    run as a formula (it starts with =, +, -, @, a tab or a line break and is not a number) gets a ' in front; a cell
    that starts with ' and then one of those gets one more. FILE takes its place when it is whole. --json is one object
    with the predictions and the comparison of this machine's probe with the recorded one.

    --explain K compares features by the cosine of their angle, 1 for the same content.
    """
    if bool(given.files) == bool(texts):
        raise click.UsageError('say what to predict: --text "...", a file, or - for standard input')
    if (explain is None) != (cache is None):
        needs = "--explain K needs --cache CACHE" if cache is None else "--cache CACHE is for --explain K"
        raise click.UsageError(f"{needs}: how many training rows to name, and the cache they are in")
    if as_json and (output is not None or form is not None):
        raise click.UsageError("--json goes to stdout, all at once: leave out --output and --format, or --json")
    from embedcache.predict import Predictor, format_of, json_of, refuse_without_pyarrow

    if output is not None:
        _refuse_what_is_read(output, given.named, [run, *([] if cache is None else [cache])])
    sentences = texts and output is None and form is None and not as_json
    form = format_of(output, form)
    refuse_without_pyarrow(form)
    predictor = Predictor.load(run, explain=explain, cache=cache, **options)
    if texts and predictor.kind != "text":
        raise click.UsageError(f"the head reads {predictor.kind}s: name files or folders of them in place of --text")
    if sentences:
        for text, prediction in zip(texts, predictor(texts), strict=True):
            say(_line(text, prediction))
            for near in prediction.nearest:
                kept = "" if near.text is None else f"  {near.text!r}"
                label = "" if near.label is None else f"  {_label(near.label)}"
                say(f"    {near.similarity:.3f}{label}  id {shown(near.id)}{kept}")
        return
    if texts:
        rows: Iterable[Named] = zip(map(str, range(len(texts))), predictor.stream(texts), strict=True)
        total = len(texts)
    else:
        examples = given.examples(
            f"{output or run}.quarantine.jsonl", labels="none", kind=predictor.kind, pixel_range=predictor.pixel_range
        )
        rows, total = predictor.stream_examples(examples), len(examples)
    if as_json:
        kinds = {"regression": predictor.head.task == "regression", "explained": explain is not None}
        predictions = [json_of(name, prediction, **kinds) for name, prediction in _progress(rows, total)]
        return print_json({"numerics": predictor.numerics.to_json(), "predictions": predictions})
    with _destination(output, form, predictor) as table:
        for name, prediction in _progress(rows, total):
            table.write(name, prediction)


_SHOWN = 5


def _refuse_what_is_read(output: str, files: Sequence[str], folders: Sequence[str]) -> None:
    """Raise ``click.UsageError`` where the output would replace an input, or a file of the run or the cache."""
    from pathlib import Path

    target = Path(output).resolve()
    read = {Path(file).resolve() for file in files if file != "-"}
    if target in read or any(target == Path(folder).resolve() / name for folder in folders for name in _OURS):
        raise click.UsageError(f"--output {output} is read for this: name another file")


def _line(text: str, prediction: Prediction) -> str:
    values = prediction.probabilities
    confidence = "" if prediction.confidence is None else f"  {prediction.confidence:.3f}"
    best = sorted(values, key=lambda name: -values[name])[:_SHOWN] if len(values) > _SHOWN else list(values)
    detail = "  ".join(f"{shown(name)} {values[name]:.3f}" for name in best)
    more = "  ..." if len(best) < len(values) else ""
    return f"{_label(prediction.label)}{confidence}  {text!r}  [{detail}{more}]"


def _label(label: str | tuple[str, ...] | tuple[float, ...]) -> str:
    given = [label] if isinstance(label, str) else list(label)
    return ", ".join(shown(value) if isinstance(value, str) else f"{value:.4g}" for value in given) or "(none)"


class _Terminal:
    """A terminal, which would obey what a file keeps as it is."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self.encoding = stream, getattr(stream, "encoding", None)

    def write(self, text: str) -> int:
        return self._stream.write(page(text))


@contextmanager
def _destination(output: str | None, form: Any, predictor: Predictor) -> Iterator[PredictionTable]:
    """Open stdout, or a file that only takes its place when it is whole."""
    from embedcache.predict import table_in, text_table

    nearest = predictor.nearest.number if predictor.nearest is not None else 0
    if output is not None:
        with table_in(output, form, predictor.head, nearest) as table:
            yield table
        return
    stream: Any = _Terminal(sys.stdout) if sys.stdout.isatty() else sys.stdout
    yield text_table(form, stream, predictor.head, nearest)
    sys.stdout.flush()


def _progress(rows: Iterable[Named], total: int) -> Iterable[Named]:
    from tqdm.auto import tqdm

    shown_rows: Iterable[Named] = tqdm(rows, total=total, unit="row", desc="predict", disable=not sys.stderr.isatty())
    return shown_rows


COMMANDS = (predict,)
