"""What a message tells somebody to type is something that the command has."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock

import click
import numpy as np
import pytest
import small_caches
from tiny_models import build

import embedcache
from embedcache import HeadSpec, sweep, train_head
from embedcache.backbone import load_backbone
from embedcache.cli import cli, run
from embedcache.errors import BackboneError, FeatureError, InputError, Interrupted

PACKAGE = Path(embedcache.__file__).parent
READERS = frozenset({"extract", "relabel", "check", "compare", "predict"})
MODEL = frozenset({"extract", "check", "compare", "predict"})

# Which commands may print the messages of a room, or of one file in it.
SAID_BY = {
    "errors.py": READERS,
    "examples": READERS,
    "backbone": MODEL,
    "extract": frozenset({"extract"}),
    "cache": frozenset({"extract", "relabel", "merge"}),
    "train/adding.py": frozenset({"add-classes"}),
    "train/cached.py": frozenset({"train", "tune"}),
    "finetune": frozenset({"tune", "check"}),
    "train": frozenset({"train", "sweep", "check", "compare"}),
    "sweep": frozenset({"sweep"}),
    "equivalence": frozenset({"check"}),
    "compare": frozenset({"compare"}),
    "predict": frozenset({"predict"}),
    "importing": frozenset({"import"}),
    "export": frozenset({"export"}),
    "audit": frozenset({"audit"}),
    "tracking": frozenset({"train", "tune", "sweep"}),
}
# Flags about labels and splits, which predict does not read, and those that only a command which has them can run into.
ONLY_WHERE_THERE = {
    "--label-column", "--label-separator", "--task", "--split", "--split-column", "--pooling", "--pass-threads",
    "--compile", "--accept-numerics",
}  # fmt: skip

_FLAG = re.compile(
    r"(?:(?P<command>[a-z]+)(?: [A-Z.]+)* )?(?<![\w-])(?P<flag>--[a-z][a-z-]*[a-z])(?![\w-])"
    r"(?:[ =](?P<value>[\w.-]+))?"
)


def options_of(name: str) -> dict[str, click.Parameter]:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, name
    found = {text: each for each in command.params for text in (*each.opts, *each.secondary_opts)}
    return found | {"--help": command.params[0]}


OPTIONS = {name: options_of(name) for name in cli.list_commands(click.Context(cli))}


def said_by(file: str) -> frozenset[str]:
    """The commands that print the messages of a file."""
    if file.startswith("cli/"):
        module = import_module(f"embedcache.{file.removesuffix('.py').replace('/', '.')}")
        return frozenset(each.name for each in getattr(module, "COMMANDS", cli.commands.values()))
    return SAID_BY.get(file) or SAID_BY.get(file.split("/")[0]) or frozenset()


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every string but docstrings, those that stand side by side in one f-string joined."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    parts: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts.update(map(id, node.values))
            yield (
                node.lineno,
                "".join(str(each.value) if isinstance(each, ast.Constant) else "{}" for each in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs | parts:
            yield node.lineno, node.value


def faults(file: str, source: str) -> list[str]:
    """Every flag in the messages of a file that a command which prints them does not have, or not with that value."""
    found = []
    for line, text in texts(ast.parse(source)):
        for match in _FLAG.finditer(text):
            flag, named = match["flag"], match["command"] if match["command"] in OPTIONS else None
            commands = frozenset({named}) if named else said_by(file)
            having = {name for name in commands if flag in OPTIONS[name]}
            # A module of commands knows which of them it speaks for.
            some = flag in ONLY_WHERE_THERE or (file.startswith("cli/") and file != "cli/__init__.py")
            enough = having if some else having == commands and having
            if not enough:
                lacking = ", ".join(sorted(commands - having)) or "no command that is known to print it"
                found.append(f"{file}:{line}: {flag} is not an option of {lacking}: {text!r}")
            for name in having:
                kind = OPTIONS[name][flag].type
                if isinstance(kind, click.Choice) and match["value"] and match["value"].strip(".") not in kind.choices:
                    found.append(f"{file}:{line}: {name} {flag} does not take {match['value']!r}: {text!r}")
    return found


def test_every_flag_in_a_message_is_one_of_the_command() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    found = [each for file in files for each in faults(str(file.relative_to(PACKAGE)), file.read_text("utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "message", "fault"),
    [
        ("examples/files.py", "name it with --format", "--format is not an option of"),
        ("examples/files.py", "pass --quoting never", "--quoting does not take 'never'"),
        ("examples/files.py", "pass --dtype float32", "--dtype is not an option of check, compare, predict, relabel"),
        ("train/loop.py", "or --clip 1", "--clip is not an option of check, compare, sweep"),
        ("train/loop.py", "use extract --token", "--token is not an option of extract"),
        ("journal.py", "with --shard-rows", "--shard-rows is not an option of no command that is known"),
        ("cli/heads.py", "say --tasks", "--tasks is not an option of"),
    ],
)
def test_a_wrong_flag_would_be_seen(file: str, message: str, fault: str) -> None:
    assert fault in "\n".join(faults(file, f'raise Error(f"{{name}}: {message}")'))


def test_the_format_and_the_quoting_of_an_input_can_be_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows").write_text('text\tlabel\n"one" two\ta\nthree\tb\n')
    base = ["extract", str(tmp_path / "rows"), "--dry-run", "--json", "--model", str(build("bert", tmp_path / "model"))]
    assert run(base) == 1
    assert "--input-format" in capsys.readouterr().err
    assert run([*base, "--input-format", "tsv"]) == 1
    assert "--quoting none" in capsys.readouterr().err
    assert run([*base, "--input-format", "tsv", "--quoting", "none"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 2


def lfs(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 90868376\n"
    (folder / "model.safetensors").write_text(pointer)


def other_sizes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 7}))


def own_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own"}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('this ran')")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lfs, r"model\.safetensors is a git-lfs pointer, .*: run git lfs pull"),
        (other_sizes, r"1 tensor .*word_embeddings\.weight is \[\d+, \d+\], expected \[\d+, \d+\]"),
        (own_code, r"it brings Python code of its own.*--trust-remote-code"),
    ],
)
def test_a_model_that_cannot_be_loaded_says_what_helps(
    tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    folder = build("bert", tmp_path / "model")
    change(folder)
    with pytest.raises(BackboneError, match=message):
        load_backbone(str(folder))


HEADS = [
    "linear", "mlp", *(HeadSpec(kind, "sklearn") for kind in ("knn", "lda", "logistic-regression", "ridge")),
]  # fmt: skip


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head if isinstance(head, str) else head.kind)
@pytest.mark.parametrize(("size", "dtype"), [(1e38, "f4"), (1e200, "f8"), (1e-40, "f4"), (1e-300, "f8")])
def test_features_out_of_all_proportion_cost_one_line_and_no_warning(
    head: HeadSpec | str, size: float, dtype: str
) -> None:
    """numpy's warnings are errors here: one that comes before ours takes its place."""
    x = (np.random.default_rng(7).normal(size=(41, 5)) * size).astype(dtype)
    expects = pytest.raises(FeatureError, match=r"row \d+ holds a value beyond 1e\+30") if size > 1 else nullcontext()
    with expects:
        train_head(x, np.arange(41) % 2, head=head, class_names=("a", "b"), progress=False)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_targets_out_of_all_proportion_cost_one_line_and_no_warning(head: str) -> None:
    x = np.random.default_rng(7).normal(size=(41, 5)).astype(np.float32)
    with pytest.raises(InputError, match=r"row 3 has a target beyond 1e\+100"):
        train_head(x, np.arange(41) * 4e99, head=head, task="regression", class_names=("t",), progress=False)


@pytest.mark.parametrize(
    "wrong",
    [
        "--set learning_rate=fast", "--set l2=[]", "--set seed=1", "--set lerning_rate=1", "--set batch_size=1.5",
        "--set standardize=maybe", "--set solver=magic", "--set nothing", "--random 0", "--draws 3",
        "--shots 2 --folds 2", "--set dropout=2",
    ],
)  # fmt: skip
def test_a_wrong_setting_of_a_sweep_is_a_matter_of_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    cache = small_caches.write(tmp_path / "c")
    head = "mlp" if "dropout" in wrong else "linear"
    assert run(["sweep", str(cache), "-o", str(tmp_path / "s"), "--head", head, *wrong.split()]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_interrupted_conclusion_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = small_caches.write(tmp_path / "c", sets=small_caches.SETS[:1])
    with monkeypatch.context() as patch:
        patch.setattr(import_module("embedcache.sweep.run").Run, "conclude", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(Interrupted, match=r"all 2 fits are kept in .*run the same command"):
            sweep(cache, ["majority"], folds=2, output_dir=tmp_path / "s", progress=False)
    assert sweep(cache, ["majority"], folds=2, output_dir=tmp_path / "s", progress=False).summary["complete"]


def test_an_interrupted_command_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedcache.cache.merge", Mock(side_effect=KeyboardInterrupt))
    assert run(["merge", str(small_caches.write(tmp_path / "c")), "-o", str(tmp_path / "d")]) == 1
    said = "interrupted: what was finished is kept; run the same command again to go on"
    assert capsys.readouterr().err.strip() == said
