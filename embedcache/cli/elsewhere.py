"""import, export, push, pull: features and heads from and to other tools and places."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from embedcache.cli.options import json_option, named_values, print_json, say, trust_option
from embedcache.wording import counted, shown

if TYPE_CHECKING:
    from embedcache.cache.fetch import Moves


@click.command("import", short_help="Put features that another tool made into CACHE.")
@click.argument("features", type=click.Path(), metavar="FEATURES")
@click.option("--output-dir", "-o", type=click.Path(), required=True, metavar="CACHE", help="Cache to make or extend.")
@click.option(
    "--ids", multiple=True, type=click.Path(), metavar="FILE",
    help="A table (CSV, TSV, JSONL, Parquet) with the rows' ids, labels and splits, in the order of the features. "
    "Default: the table beside or within FEATURES, else the rows' numbers. Repeat for a table in several files.",
)  # fmt: skip
@click.option(
    "--identity", "identities", multiple=True, metavar="NAME=VALUE",
    help="What made the features, such as model=ViT-B-32: what has the same identity may go into one cache. Repeat for "
    "more.  [default: the hash of the files, with which no others can join]",
)  # fmt: skip
@click.option("--array", metavar="NAME", help="Which array of several, which column, or which folder: text_emb.")
@click.option("--feature", default="features", show_default=True, metavar="NAME", help="Name of the feature set.")
@click.option(
    "--store", "storage_dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type to store features in. Default: float16 where FEATURES have it, else float32.",
)  # fmt: skip
@click.option("--id-column", metavar="NAME", help="Column that holds the ids. Guessed when not given.")
@click.option(
    "--label-column", metavar="NAME[,NAME]",
    help="Column that holds the label; several, as a,b, for several regression targets.",
)  # fmt: skip
@click.option("--split-column", metavar="NAME", help="Column that holds the split: train, validation or test.")
@click.option("--split", metavar="80/10/10", help="Split by id: shares of train/validation[/test].")
@click.option("--split-seed", type=int, default=0, show_default=True, help="Seed of --split.")
@click.option(
    "--task", type=click.Choice(["classification", "multilabel", "regression"]),
    help="Kind of labels. Guessed from the labels when not given.",
)  # fmt: skip
@click.option("--label-separator", metavar="TEXT", help="Separator of labels within a cell: ';'.")
@click.option("--no-labels", is_flag=True, help="Leave labels out.")
@click.option("--shard-rows", type=int, metavar="N", help="Rows in a shard. Default: 16,384, or what fits in 64 MB.")
@json_option
def import_(
    features: str, output_dir: str, ids: tuple[str, ...], identities: tuple[str, ...], array: str | None, feature: str,
    storage_dtype: str | None, shard_rows: int | None, no_labels: bool, as_json: bool, **reading: Any,
) -> None:  # fmt: skip
    """Put features that another tool made into CACHE.

    FEATURES is a .npy or .npz file, Parquet (a column of lists, or one column a dimension: x0, x1, ...), HDF5, or a
    folder of such files, also as clip-retrieval writes it (img_emb/, metadata/). They are read block by block.

    Run it again and only new rows are added; the others are compared with what CACHE holds. A row's id stands for its
    content, which nobody has: relabel finds rows by it.
    """
    from pathlib import Path

    from embedcache.importing import open_arrays, rows_of, run

    identity = named_values("--identity", identities, "NAME=VALUE, such as model=ViT-B-32", str) if identities else None
    arrays = open_arrays(features, array)
    examples = rows_of(
        arrays, [Path(file) for file in ids] or None, labels="none" if no_labels else "optional", **reading
    )
    report = run(
        arrays, examples, output_dir, identity=identity, feature=feature, storage_dtype=storage_dtype,
        rows_per_shard=shard_rows,
    )  # fmt: skip
    if as_json:
        return print_json(report.to_json())
    say(report.to_text(output_dir))


FEATURES = ("parquet", "npy")
HEADS = ("onnx", "torch-export", "sentence-transformers", "transformers")


@click.command("export", short_help="Write a cache or a head for other tools.")
@click.argument("source", type=click.Path(), metavar="CACHE|RUN")
@click.option(
    "--to", type=click.Choice([*FEATURES, *HEADS]), required=True,
    help="Of CACHE, parquet: one file with ids, splits, labels and features; npy: a folder with an array for each set, "
    "and rows.jsonl. Of RUN, onnx and torch-export: any torch head or linear one, with its backbone; "
    "sentence-transformers: a linear or MLP head; transformers: a linear one on cls or pooler, for pipeline().",
)  # fmt: skip
@click.option("--output", "-o", type=click.Path(), required=True, metavar="FILE|FOLDER", help="What to write.")
@click.option(
    "--feature", "features", multiple=True, metavar="NAME",
    help="Feature set of CACHE to write. Repeat for more.  [default: all, but those of tokens and views]",
)  # fmt: skip
@click.option("--head-only", is_flag=True, help="Of RUN, the head without its backbone: from features.")
@click.option(
    "--try-on", "inputs", multiple=True, type=click.Path(), metavar="INPUT",
    help="Rows that the exported model is tried on. Default: built-in ones.",
)  # fmt: skip
@click.option("--text-column", metavar="NAME", help="Column of --try-on that holds the text.")
@click.option("--cache", type=click.Path(), metavar="CACHE", help="Try it on the rows or features of this cache.")
@click.option("--model", metavar="NAME|FOLDER", help="The head's backbone, if it is no longer where it was.")
@trust_option
@json_option
def export(
    source: str, to: Any, output: str, features: tuple[str, ...], head_only: bool, inputs: tuple[str, ...],
    cache: str | None, model: str | None, text_column: str | None, trust_remote_code: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write CACHE or the head of RUN for other tools.

    A head is not exported before the other tool was run: where a probability differs by more than 1e-5, or a label at
    all, nothing is written. Features go out block by block, and import reads them back.
    """
    from embedcache.export import export_features, export_head

    if to in FEATURES:
        of_heads = {"--head-only": head_only, "--try-on": inputs, "--cache": cache, "--model": model}
        if wrong := next((flag for flag, value in of_heads.items() if value), None):
            raise click.UsageError(f"{wrong} is about heads, and --to {to} writes the features of a cache")
        exported: Any = export_features(source, output, to=to, features=features)
    else:
        if features:
            raise click.UsageError(f"--feature is about caches, and --to {to} writes the head of a run")
        reading = {} if text_column is None else {"text_column": text_column}
        exported = export_head(
            source, output, to=to, head_only=head_only, inputs=list(inputs) or None, cache=cache, model=model,
            trust_remote_code=trust_remote_code, **reading,
        )  # fmt: skip
    if as_json:
        return print_json(exported.to_json())
    say(exported.to_text())


@click.command(short_help="Copy a cache to s3://..., a run to hf://...")
@click.argument("source", type=click.Path(), metavar="CACHE|RUN")
@click.argument("url")
@click.option(
    "--read-back/--no-read-back", default=True, show_default=True,
    help="Read what arrived and hash it again; else its size alone is compared.",
)  # fmt: skip
def push(source: str, url: str, read_back: bool) -> None:
    """Copy CACHE, which is finished, to URL: s3://bucket/name, hf://datasets/user/name, or what else fsspec knows.
    Or the head of RUN to a model repository: hf://user/name.

    Every command that reads a cache then takes URL in its place. Files go first, the manifest last, and only what is
    missing. URL may hold an earlier state of CACHE; another cache there is never overwritten. Run it again to go on
    after a stop. For keys and endpoints see the package of the protocol: s3fs, gcsfs, huggingface_hub.
    """
    from pathlib import Path

    if (Path(source) / "config.json").is_file():
        from embedcache.heads import push_head

        return say(f"sent as {push_head(source, url)}: predict, evaluate and export take {url} in place of RUN")
    from embedcache.cache import push as push_cache

    say(_moves_text(push_cache(source, url, read_back=read_back), f"sent to {shown(url)}"))


@click.command(short_help="Copy a cache from a URL into a folder.")
@click.argument("url")
@click.argument("folder", type=click.Path())
def pull(url: str, folder: str) -> None:
    """Copy the cache at URL into FOLDER, where it can be extended, relabelled and merged.

    Reading needs no pull: info, train, sweep, evaluate, check, export and merge take URL themselves and keep a copy of
    their own. FOLDER may hold an earlier state of the cache. Run it again to go on after a stop.
    """
    from embedcache.cache import pull as pull_cache

    say(_moves_text(pull_cache(url, folder), f"copied into {shown(folder)}"))


def _moves_text(moves: Moves, where: str) -> str:
    others = "; the others were there" * (moves.files < moves.total)
    return f"{moves.files:,} of {counted(moves.total, 'file')} {where}, {moves.bytes / 1e6:,.1f} MB{others}"


COMMANDS = (import_, export, push, pull)
