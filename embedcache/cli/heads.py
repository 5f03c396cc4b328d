"""train, evaluate, predict."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

from embedcache.cli.options import device_option, json_option, print_json, table

TRAIN_OPTIONS = (
    "solver", "epochs", "batch_size", "optimizer", "learning_rate", "weight_decay", "schedule", "warmup", "clip",
    "patience", "metric", "label_smoothing", "class_weight", "l2", "seed",
)  # fmt: skip


@click.command()
@click.argument("cache", type=click.Path())
@click.option("--output-dir", "-o", type=click.Path(), required=True, metavar="RUN", help="The run folder to write.")
@click.option(
    "--head",
    "kind",
    default="linear",
    show_default=True,
    metavar="NAME",
    help="linear, mlp, residual, attention, or an sklearn head.",
)
@click.option("--engine", type=click.Choice(["torch", "sklearn"]), help="Default: whichever has the head, torch first.")
@click.option(
    "--head-option",
    "head_options",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of the head, as JSON: hidden=[256].",
)
@click.option("--feature", metavar="NAME", help="Feature set. Default: the cache's first.")
@click.option("--solver", type=click.Choice(["minibatch", "convex"]), help="convex: full batch, linear heads only.")
@click.option("--epochs", type=int, metavar="N")
@click.option("--batch-size", type=int, metavar="N")
@click.option("--optimizer", type=click.Choice(["adamw", "sgd"]))
@click.option("--learning-rate", "--lr", type=float, metavar="X")
@click.option("--weight-decay", type=float, metavar="X")
@click.option("--schedule", type=click.Choice(["constant", "linear", "cosine"]))
@click.option("--warmup", type=float, metavar="SHARE", help="Share of the steps.")
@click.option("--clip", type=float, metavar="NORM", help="Largest gradient norm; 0 for none.")
@click.option(
    "--patience", type=int, metavar="EPOCHS", help="Stop after so many epochs without a better metric; 0 never."
)
@click.option("--metric", metavar="NAME", help="What validation is judged by.")
@click.option("--label-smoothing", type=float, metavar="X")
@click.option("--class-weight", metavar="balanced|JSON", help='balanced, or {"class": weight}.')
@click.option("--l2", type=float, metavar="X", help="Strength of the convex solver's penalty (1/C in scikit-learn).")
@click.option("--seed", type=int, metavar="N")
@json_option
def train(
    cache: str,
    output_dir: str,
    kind: str,
    engine: str | None,
    head_options: tuple[str, ...],
    feature: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Train one head on CACHE and save it, with its metrics and a model card, in RUN."""
    from embedcache.cache import FeatureCache
    from embedcache.errors import SpecError
    from embedcache.heads import engine_of
    from embedcache.spec import HeadSpec, TrainSpec
    from embedcache.train import train_on_cache

    given = {name: value for name, value in options.items() if value is not None}
    if "class_weight" in given and given["class_weight"] != "balanced":
        given["class_weight"] = _json(given["class_weight"], "--class-weight")
    settings = {}
    for option in head_options:
        name, equals, value = option.partition("=")
        if not equals:
            raise SpecError(f"--head-option {option!r}: expected NAME=VALUE")
        settings[name] = _json(value, f"--head-option {name}", text=True)
    spec = HeadSpec(kind, engine or engine_of(kind), settings)
    opened = FeatureCache.open(cache)
    result = train_on_cache(opened, spec, TrainSpec(**given), feature=feature)
    for note in result.notes:
        click.echo(f"note: {note}", err=True)
    result.save(output_dir)
    if as_json:
        return print_json(result.metrics)
    click.echo(metrics_text(result.metrics))
    click.echo(f'saved in {output_dir}: try  embedcache predict {output_dir} --text "..."')


def _json(text: str, where: str, text_is_fine: bool = False, **options: Any) -> Any:
    from embedcache.errors import SpecError
    from embedcache.fingerprint import strict_json

    try:
        return strict_json(text)
    except ValueError as error:
        if text_is_fine or options.get("text"):
            return text
        raise SpecError(f"{where} {text!r} is not JSON: {error}") from None


def metrics_text(metrics: dict[str, Any]) -> str:
    """Lay out the scalar metrics, a column for each split."""
    splits = list(metrics)
    names = [name for name, value in metrics[splits[0]].items() if isinstance(value, (int, float)) or value is None]
    rows = [[name, *(_number(metrics[split].get(name)) for split in splits)] for name in names]
    return table(rows, ["metric", *splits])


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


@click.command()
@click.argument("run", type=click.Path())
@click.argument("cache", type=click.Path())
@click.option("--split", default="test", show_default=True, metavar="NAME", help="The split to measure on.")
@json_option
def evaluate(run: str, cache: str, split: str, as_json: bool) -> None:
    """Measure the head of RUN on a split of CACHE."""
    from embedcache.cache import FeatureCache
    from embedcache.heads import TrainedHead
    from embedcache.train import evaluate_on_cache

    head = TrainedHead.from_pretrained(run)
    measured = evaluate_on_cache(head, FeatureCache.open(cache), split)
    if as_json:
        return print_json({split: measured})
    click.echo(metrics_text({split: measured}))
    for part in ("per_class", "missing_classes"):
        if measured.get(part):
            click.echo("")
            click.echo(
                _per_class(measured["per_class"])
                if part == "per_class"
                else f"not in {split}: {', '.join(measured[part])}"
            )


def _per_class(rows: Any) -> str:
    items = rows if isinstance(rows, list) else [{"class": name, **values} for name, values in rows.items()]
    header = list(items[0])
    return table(
        [[str(row[key]) if isinstance(row[key], str) else _number(row[key]) for key in header] for row in items], header
    )


@click.command()
@click.argument("run", type=click.Path())
@click.argument("inputs", nargs=-1, type=click.Path(allow_dash=True))
@click.option("--text", "texts", multiple=True, metavar="TEXT", help="A text to predict; repeat for more.")
@click.option(
    "--output", "-o", type=click.Path(dir_okay=False), metavar="FILE", help="Write here instead of to stdout."
)
@click.option(
    "--format", "form", type=click.Choice(["csv", "jsonl"]), help="Default: by the ending of --output, else CSV."
)
@click.option("--text-column", metavar="NAME", help="Column that holds the text. Guessed when not given.")
@click.option("--id-column", metavar="NAME", help="Column that holds a row's name. Default: its number.")
@click.option("--on-bad-row", type=click.Choice(["stop", "skip"]), default="stop", show_default=True)
@click.option("--quarantine", type=click.Path(), metavar="FILE", help="Where skipped rows go.")
@click.option("--model", metavar="NAME|FOLDER", help="Where the head's backbone is now, if not where it was.")
@device_option
def predict(
    run: str,
    inputs: tuple[str, ...],
    texts: tuple[str, ...],
    output: str | None,
    form: str | None,
    model: str | None,
    device: str,
    **options: Any,
) -> None:
    """Predict with the head of RUN: --text "...", a file (CSV, TSV, JSONL, Parquet), or - for one text a line."""
    if bool(inputs) == bool(texts):
        raise click.UsageError('say what to predict: --text "...", a file, or - for standard input')
    from embedcache.predict import Predictor

    predictor = Predictor.load(run, model=model, device=device)
    if texts and output is None and form is None:
        for text, prediction in zip(texts, predictor(texts), strict=True):
            click.echo(_line(text, prediction))
        return
    if texts:
        rows: Iterable[tuple[str, Any]] = zip(map(str, range(len(texts))), predictor.stream(texts), strict=True)
        total = len(texts)
    else:
        from embedcache.examples import load_examples

        if options["on_bad_row"] == "skip" and options["quarantine"] is None:
            options["quarantine"] = f"{run}.quarantine.jsonl"
        examples = load_examples(list(inputs), labels="none", **options)
        for note in examples.notes:
            click.echo(f"note: {note}", err=True)
        rows, total = predictor.stream_examples(examples), len(examples)
    form = form or ("jsonl" if output and output.endswith((".jsonl", ".json")) else "csv")
    with _destination(output) as file:
        _write(file, form, _progress(rows, total), predictor.head)


def _line(text: str, prediction: Any) -> str:
    label = prediction.label if isinstance(prediction.label, str) else ", ".join(map(str, prediction.label)) or "(none)"
    confidence = "" if prediction.confidence is None else f"  {prediction.confidence:.3f}"
    detail = "  ".join(f"{name} {value:.3f}" for name, value in prediction.probabilities.items())
    return f"{label}{confidence}  {text!r}  [{detail}]"


@contextmanager
def _destination(output: str | None) -> Iterator[IO[str]]:
    """Open stdout, or a file that only takes its place when it is whole."""
    if output is None:
        yield sys.stdout
        return
    import os

    partial = f"{output}.partial"
    try:
        with open(partial, "w", encoding="utf-8", newline="") as file:
            yield file
        os.replace(partial, output)
    except BaseException:
        if os.path.exists(partial):
            os.unlink(partial)
        raise


def _progress(rows: Iterable[tuple[str, Any]], total: int) -> Iterable[tuple[str, Any]]:
    from tqdm import tqdm

    shown: Iterable[tuple[str, Any]] = tqdm(
        rows, total=total, unit="row", desc="predict", disable=not sys.stderr.isatty()
    )
    return shown


def _write(file: IO[str], form: str, rows: Iterable[tuple[str, Any]], head: Any) -> None:
    import csv

    regression = head.task == "regression"
    writer = csv.writer(file, lineterminator="\n")
    if form == "csv":
        writer.writerow(["id", *([] if regression else ["label", "confidence"]), *head.class_names])
    for name, prediction in rows:
        values = prediction.probabilities
        label = prediction.label if isinstance(prediction.label, str) else list(prediction.label)
        if form == "jsonl":
            record: dict[str, Any] = {"id": name}
            record |= (
                {"values": dict(values)}
                if regression
                else {"label": label, "confidence": prediction.confidence, "probabilities": dict(values)}
            )
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            continue
        cells = (
            []
            if regression
            else [
                label if isinstance(label, str) else ";".join(label),
                "" if prediction.confidence is None else f"{prediction.confidence:.6g}",
            ]
        )
        writer.writerow([name, *cells, *(f"{value:.6g}" for value in values.values())])


COMMANDS = (train, evaluate, predict)
