"""train, tune, add-classes, evaluate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from embedcache.cli.options import (
    device_option,
    head_options,
    json_option,
    print_json,
    report_option,
    reporting,
    say,
    setting_option,
    several,
    training_options,
    trust_option,
    untrusted_option,
)
from embedcache.spec import TUNING, TUNING_DECAY, TUNING_DROPOUT, TUNING_RATE
from embedcache.wording import counted, shown, table

if TYPE_CHECKING:
    from embedcache.predict import Prediction
    from embedcache.spec import HeadSpec

    Named = tuple[str, Prediction]


@click.command()
@click.argument("cache", type=click.Path())
@click.option("--output-dir", "-o", type=click.Path(), required=True, metavar="RUN", help="The run folder to write.")
@head_options()
@click.option("--feature", metavar="NAME", help="Feature set to train on. Default: the first that the head can read.")
@training_options
@click.option("--allow-unseen", is_flag=True, help="Train even if a class of another split has no training row.")
@click.option("--device", metavar="auto|cpu|cuda|mps", help="Where a torch head is trained. Default: cpu.")
@report_option
@json_option
@untrusted_option
def train(
    cache: str, output_dir: str, head: HeadSpec, feature: str | None, allow_unseen: bool, device: str | None,
    report_to: tuple[str, ...], as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Train one head on CACHE and save it in RUN, with metrics and a model card.

    A linear head is trained to its exact optimum (--solver, --l2). Other heads keep the epoch with the best metric on
    the validation split (or a tenth of the training rows); probabilities are calibrated there. The test split is not
    used: measure on it once, with embedcache evaluate. Ctrl-C saves the best head yet.
    """
    from embedcache.cache import FeatureCache
    from embedcache.errors import Interrupted
    from embedcache.heads.folder import RunFolder
    from embedcache.heads.record import predict_command
    from embedcache.spec import TrainSpec
    from embedcache.train import train_on_cache

    given = {name: value for name, value in options.items() if value not in (None, "auto")}
    if given.get("class_weight", "balanced") != "balanced":
        given["class_weight"] = _class_weight(given["class_weight"])
    _refuse_unused(head, given, device)
    opened = FeatureCache.open(cache)
    with reporting(output_dir, report_to) as report, RunFolder(output_dir) as folder:
        result = train_on_cache(
            opened, head, TrainSpec(**given), feature=feature, allow_unseen=allow_unseen, device=device or "cpu",
            observe=report,
        )  # fmt: skip
        result.save(folder)
        if report is not None:
            report.interrupted = result.interrupted
    if as_json:
        print_json(result.metrics)
    else:
        say(metrics_text(result.metrics))
        predicts = result.head.extraction.has_backbone
        trial = predict_command(result.head).replace("RUN", output_dir)
        say(f"saved in {output_dir}" + f": try  {trial}" * predicts)
    if result.interrupted:
        raise Interrupted(
            f"stopped after {counted(len(result.history), 'epoch')}: the best head so far is saved in {output_dir}"
        )


_TUNED = ("epochs", "batch_size", "learning_rate", "weight_decay", "warmup", "class_weight", "patience", "seed")


@click.command()
@click.argument("cache", type=click.Path())
@click.option("--output-dir", "-o", type=click.Path(), required=True, metavar="RUN", help="The run folder to write.")
@click.option(
    "--blocks", type=int, default=2, show_default=True, metavar="K",
    help="How many blocks are trained, from the last one on. CACHE must have their states, extract --states -K, or "
    "those of more blocks, of which the others then run, frozen, in every step.",
)  # fmt: skip
@head_options("kind", "options", torch="A torch head that reads the pooled features.")
@click.option("--feature", metavar="NAME", help="Feature set that the head reads. Default: the first pooled one.")
@click.option(
    "--backbone-learning-rate",
    type=float,
    default=TUNING_RATE,
    show_default=True,
    metavar="RATE",
    help="Learning rate of the last block.",
)
@click.option(
    "--layer-decay",
    type=float,
    default=TUNING_DECAY,
    show_default=True,
    metavar="FACTOR",
    help="What each block before has of that rate.",
)
@click.option(
    "--dropout/--no-dropout",
    default=TUNING_DROPOUT,
    show_default=True,
    help="Whether the blocks drop what their configuration says.",
)
@click.option("--new-head", is_flag=True, help="Start from a new head, not from one trained on the cached features.")
@several(
    *(
        setting_option(name, default=getattr(TUNING, name), more="The head's." * (name == "learning_rate"))
        for name in _TUNED
    )
)
@click.option("--allow-unseen", is_flag=True, help="Train even if a class of another split has no training row.")
@click.option("--model", metavar="NAME|FOLDER", help="The backbone, if it is no longer where it was.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model.")
@device_option
@trust_option
@report_option
@json_option
@untrusted_option
def tune(
    cache: str, output_dir: str, head: HeadSpec, report_to: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Train the last blocks of the backbone with a head, from the hidden states in CACHE, and save both in RUN.

    What comes before these states stays frozen and is not run: the steps are, to the bit, those of training with it in
    the loop (embedcache check CACHE --blocks K proves it). RUN holds the head, and the whole backbone as a folder that
    transformers loads. Ctrl-C saves the best yet.
    """
    from dataclasses import replace

    from embedcache.errors import Interrupted
    from embedcache.finetune import tune as tune_blocks
    from embedcache.heads.folder import RunFolder
    from embedcache.heads.record import predict_command

    chosen = {name: options.pop(name) for name in _TUNED}
    if chosen["class_weight"] not in (None, "balanced"):
        chosen["class_weight"] = _class_weight(chosen["class_weight"])
    spec = replace(TUNING, **chosen)
    given = {name: value for name, value in options.items() if value is not None}
    with reporting(output_dir, report_to) as report, RunFolder(output_dir) as folder:
        result = tune_blocks(cache, head=head, spec=spec, observe=report, **given)
        saved = result.save(folder)
        if report is not None:
            report.interrupted = result.interrupted
    if as_json:
        print_json(result.metrics)
    else:
        say(metrics_text(result.metrics))
        say(f"saved in {output_dir}: try  {predict_command(saved).replace('RUN', output_dir)}")
    if result.interrupted:
        raise Interrupted(
            f"stopped after {counted(len(result.history), 'epoch')}: the best so far is saved in {output_dir}"
        )


def _refuse_unused(head: HeadSpec, given: Mapping[str, Any], device: str | None) -> None:
    """Raise ``SpecError`` for a setting that would change nothing: silence would look like an experiment."""
    from embedcache.errors import SpecError
    from embedcache.spec import MINIBATCH_SETTINGS, TrainSpec

    named = next((name for name in MINIBATCH_SETTINGS if name in given), None)
    solver = given.get("solver", "minibatch" if named else TrainSpec().solver_for(head))
    if head.engine == "sklearn":
        from embedcache.heads.sklearn_kinds import KINDS

        penalised = head.kind in KINDS and KINDS[head.kind].linear and head.kind != "nearest-centroid"
        unused: Sequence[str] = (*MINIBATCH_SETTINGS, "solver", *(() if penalised else ("l2",)))
        what, instead = f"the scikit-learn head {head.kind}", "its own settings are given by --head-option"
    elif solver == "convex":
        unused, what, instead = MINIBATCH_SETTINGS, "the convex solver", "its one setting is --l2"
    else:
        unused, what, instead = ("l2",), "training by minibatches", "use --weight-decay, or --solver convex"
        if named and head.kind == "linear" and "solver" not in given:
            what = f"training by minibatches, which --{named.replace('_', '-')} asks for"
        if "momentum" in given and given.get("optimizer", "adamw") == "adamw":
            unused, what, instead = ("momentum",), "adamw", "use --optimizer sgd"
    wrong = next((name for name in unused if name in given), "device" if device and head.engine == "sklearn" else None)
    if wrong is not None:
        raise SpecError(f"--{wrong.replace('_', '-')} means nothing to {what}: {instead}")


def _class_weight(text: str) -> object:
    from embedcache.errors import SpecError
    from embedcache.fingerprint import strict_json

    try:
        return strict_json(text)
    except ValueError as error:
        raise SpecError(f"--class-weight {text!r} is not JSON: {error}") from None


def metrics_text(metrics: Mapping[str, Any]) -> str:
    """Lay out the scalar metrics, a column for each split."""
    splits = list(metrics)
    first = metrics[splits[0]]
    names = [name for name, value in first.items() if isinstance(value, (int, float)) or value is None]
    rows = [[name, *(_number(metrics[split].get(name)) for split in splits)] for name in names]
    return "\n".join(table(["metric", *splits], rows))


def _number(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


@click.command("add-classes")
@click.argument("run", type=click.Path())
@click.argument("cache", type=click.Path())
@click.option("--output-dir", "-o", type=click.Path(), required=True, metavar="RUN", help="The run folder to write.")
@json_option
@untrusted_option
def add_classes(run: str, cache: str, output_dir: str, as_json: bool) -> None:
    """Add the classes of CACHE that the head of RUN lacks, from their training rows alone, without training.

    The heads nearest-centroid and knn can: what they hold of their own classes keeps every bit, and so do the
    standardisation and the temperature. CACHE must hold features made as those that the head was trained on.
    """
    from embedcache.cache import FeatureCache
    from embedcache.heads import TrainedHead
    from embedcache.heads.folder import RunFolder
    from embedcache.heads.record import predict_command
    from embedcache.train import add_classes as add

    head, opened = TrainedHead.from_pretrained(run), FeatureCache.open(cache)
    with RunFolder(output_dir) as folder:
        longer = add(head, opened)
        new = longer.class_names[len(head.class_names) :]
        rows = {name: longer.training["added_classes"][name] for name in new}  # type: ignore[index]
        text = ", ".join(f"{shown(name)} ({counted(number, 'row')})" for name, number in rows.items())
        longer.save_pretrained(folder, facts={"added classes": text})
    if as_json:
        return print_json({"added": rows, "classes": list(longer.class_names)})
    say(f"added {text}: {len(longer.class_names):,} classes now")
    trial = predict_command(longer).replace("RUN", output_dir) if longer.extraction.has_backbone else ""
    known = {*opened.class_names} <= {*longer.class_names}
    for split in ("validation", "test"):
        if known and split in opened.split_names and (opened.targets(split) >= 0).any():
            trial = f"embedcache evaluate {output_dir} {cache}" + f" --split {split}" * (split != "test")
    say(f"saved in {output_dir}" + (f": try  {trial}" if trial else ""))


@click.command()
@click.argument("run", type=click.Path())
@click.argument("cache", type=click.Path())
@click.option("--split", default="test", show_default=True, metavar="NAME", help="Split to measure on.")
@click.option("--average-views", is_flag=True, help="Average probabilities over each picture and its views in CACHE.")
@click.option("--record", is_flag=True, help="Add the metrics to RUN and its model card.")
@json_option
@untrusted_option
def evaluate(run: str, cache: str, split: str, average_views: bool, record: bool, as_json: bool) -> None:
    """Measure the head of RUN on a split of CACHE, with 95 % intervals.

    CACHE must hold features made as those the head was trained on; it may be another data set.
    """
    from pathlib import Path

    from embedcache.cache import FeatureCache
    from embedcache.heads import TrainedHead
    from embedcache.numerics import difference
    from embedcache.train import evaluate_on_cache

    head, opened = TrainedHead.from_pretrained(run), FeatureCache.open(cache)
    split = opened.split(split)
    if "blocks" in head.training:
        from embedcache.errors import SpecError
        from embedcache.finetune import evaluate_tuned

        if average_views:
            raise SpecError(f"{run} was tuned on texts, which have no views: leave out --average-views")
        measured = evaluate_tuned(head, opened, split)
    else:
        measured = evaluate_on_cache(head, opened, split, average_views=average_views)
    numerics = difference(head.probe, opened.common_probe and opened.common_probe.only(head.feature.name))
    if record:
        from embedcache.heads.folder import record as add

        add(Path(run), split, measured)
    if as_json:
        return print_json({split: measured, "numerics": numerics.to_json()})
    if numerics.status == "same":  # any other is a note already
        say("numerics: the same bits as what the head was trained on", err=True)
    say(metrics_text({split: measured}))
    for name, (low, high) in measured.get("intervals", {}).items():
        say(f"{name}: {_number(low)} to {_number(high)} (95 % interval)")
    for part in ("per_class", "per_target"):
        if rows := measured.get(part):
            cells = [[value if isinstance(value, str) else _number(value) for value in row.values()] for row in rows]
            say("\n".join(["", *table(list(rows[0]), cells)]))
    if missing := measured.get("missing_classes"):
        say(f"\nnot in {split}: {', '.join(map(shown, missing))}")


COMMANDS = (train, tune, add_classes, evaluate)
