"""The comparison: every approach, fraction and seed, each once, each in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from embedcache import errors
from embedcache.arguments import checks_arguments
from embedcache.compare.approaches import Approach, chosen
from embedcache.compare.result import Comparison, assemble, seconds_text
from embedcache.compare.rows import checked_fractions, checked_rows, dataset_hash, write_rows
from embedcache.compare.store import Folder, Result
from embedcache.compare.worker import INTERRUPTED
from embedcache.errors import InputError, Interrupted, MissingExtraError, SpecError, TrainingError
from embedcache.examples import Examples, load_examples
from embedcache.fingerprint import hash_json, sha256_file
from embedcache.heads import head_named
from embedcache.journal import exists, explained
from embedcache.spec import HeadSpec, TaskName
from embedcache.train.metrics import metric_named
from embedcache.version import __version__
from embedcache.wording import counted

METRIC: dict[TaskName, str] = {"classification": "accuracy", "multilabel": "f1_macro", "regression": "rmse"}
"""What approaches are judged by when nobody says."""

Runner = Callable[[Mapping[str, Any]], dict[str, Any]]


@checks_arguments(load_examples)
def compare_training_approaches(
    inputs: Any = None,
    output_dir: Path | str | None = None,
    *,
    model: Path | str | None = None,
    head: HeadSpec | str = "linear",
    pooling: str = "auto",
    approaches: Sequence[str] = ("cached", "frozen", "full", "lp-ft"),
    epochs: int = 5,
    fractions: Sequence[float] = (1.0,),
    max_rows: int | None = None,
    seeds: Sequence[int] = (0,),
    metric: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: bool = True,
    **options: Any,
) -> Comparison:
    """Train on the same rows in up to four ways, and measure what each costs and how well it does.

    ``cached``: features once, then the head. ``frozen``: the frozen backbone inside every step. ``full``: full
    fine-tuning. ``lp-ft``: fine-tuning from the trained head (Kumar et al. 2022). Each measurement runs in a process
    of its own and is a line in ``output_dir``; killed, the same call goes on after the last of them.

    Args:
        inputs: as ``load_examples`` reads them, or ``Examples``; with train, validation and test rows, and labels.
        output_dir: the folder of results, made or gone on with; None keeps nothing.
        model: local folder or hub name; None for the packaged all-MiniLM-L6-v2.
        head: a ``HeadSpec`` for torch, or a kind with its defaults.
        pooling: the feature set it reads.
        approaches: which of the four.
        epochs: of every approach.
        fractions: shares of the training rows, for a data-efficiency curve.
        max_rows: at most so many rows in all, drawn by content from the first seed.
        seeds: initial weights, order, dropout and the rows of a fraction; results are means over them.
        metric: what decides the best epoch and is shown; None for accuracy, macro F1 or the root mean squared error.
        device: where the backbone runs.
        trust_remote_code: run Python that comes with the model.
        options: columns and splits, as in ``load_examples``.

    Raises:
        InputError: no labels, a split that is missing, too few rows.
        TrainingError: one class only; a measurement that was killed.
        SpecError: an unknown approach or metric, an impossible number.
        Interrupted: Ctrl-C; what was measured stays.

    Example::

        found = compare_training_approaches("reviews.csv", "reviews.compare", split="80/10/10", max_rows=2000)
        print(found.to_markdown())
    """
    wanted = chosen(approaches)
    shares = checked_fractions(fractions)
    spec = head_named(head)
    _check(spec, epochs, seeds)
    examples = inputs if isinstance(inputs, Examples) else load_examples(inputs, **options)
    examples = checked_rows(examples, max_rows, seeds[0])
    assert examples.task is not None
    name = metric or METRIC[examples.task]
    metric_named(name, examples.task)
    with ExitStack() as stack:
        where = stack.enter_context(tempfile.TemporaryDirectory()) if output_dir is None else output_dir
        folder = stack.enter_context(Folder(where))
        work = _Work(
            folder, examples, wanted, shares, tuple(seeds), spec, name, epochs, model, pooling, device,
            trust_remote_code,
        )  # fmt: skip
        found = work.run(progress)
        if output_dir is None:
            return Comparison(found.facts, found.extraction, found.rows, found.break_even)
        folder.write_json("comparison.json", found.to_json())
        folder.write("comparison.md", found.to_markdown())
        with suppress(MissingExtraError):  # the table is there; a picture is an extra
            found.plot(folder.path / "comparison.svg")
        return found


def _check(spec: HeadSpec, epochs: int, seeds: Sequence[int]) -> None:
    from embedcache.heads.registry import head_class

    if spec.engine != "torch":
        raise SpecError(f"the head {spec.kind} of scikit-learn cannot be fine-tuned: name a torch head such as linear")
    head_class(spec.kind)
    if epochs < 1:
        raise SpecError(f"epochs is {epochs}: expected at least 1")
    if not seeds or len(set(seeds)) != len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
        raise SpecError(f"seeds are {list(seeds)}: expected different whole numbers in [0, 2**32)")


class _Work:
    """What is to be measured, and where it is kept."""

    def __init__(
        self,
        folder: Folder,
        examples: Examples,
        approaches: Sequence[Approach],
        fractions: Sequence[float],
        seeds: Sequence[int],
        head: HeadSpec,
        metric: str,
        epochs: int,
        model: Path | str | None,
        pooling: str,
        device: str,
        trust_remote_code: bool = False,
    ) -> None:
        from embedcache.backbone import choose_device, model_name, resolve_model, weight_files

        self.folder, self.examples, self.approaches = folder, examples, approaches
        self.fractions, self.seeds, self.head, self.metric, self.epochs = fractions, seeds, head, metric, epochs
        self.model, self.pooling, self.device = model_name(model), pooling, choose_device(device)
        self.trust_remote_code = trust_remote_code
        weights = weight_files(resolve_model(self.model))
        self.machine = machine(self.device)
        self.identity = {
            "version": __version__,
            "data": dataset_hash(examples),
            "weights": {each.name: sha256_file(each) for each in weights},
            "pooling": pooling,
            **self.machine,
        }
        self.key = hash_json({**self.identity, "approach": "extraction"})
        self.cache = folder.cache_path(self.key)

    def run(self, progress: bool) -> Comparison:
        """Measure what is not there yet."""
        units = [
            (fraction, approach, seed)
            for seed in self.seeds
            for fraction in self.fractions
            for approach in self.approaches
        ]
        shown = progress and sys.stderr.isatty()
        say = _say if shown else _silent
        total = len(units) + 1
        extraction = self._extraction(shown)
        say(f"[1/{total}] extraction: {seconds_text(extraction['seconds'])}")
        runs, outputs = {}, {}
        for number, (fraction, approach, seed) in enumerate(units, 2):
            done = self._training(approach, fraction, seed, shown)
            runs[fraction, approach.name, seed] = done
            said = self.folder.outputs(done["key"])
            assert said is not None  # written before its line, and looked for when the line was
            outputs[fraction, approach.name, seed] = said
            say(
                f"[{number}/{total}] {approach.title}, {counted(done['train_rows'], 'row')}, seed {seed}: "
                f"{seconds_text(done['seconds'])}, validation {self.metric} {done['validation']:.3f}"
            )
        assert self.examples.targets is not None
        test = self.examples.split == self.examples.split_names.index("test")
        return assemble(
            self._facts(extraction), extraction, runs, outputs, self.examples.targets[test], self.folder.path
        )

    def _extraction(self, shown: bool) -> Result:
        found = self.folder.get(self.key)
        if found is not None and exists(self.cache / "manifest.json", InputError):
            return found
        job = {
            "approach": "extraction", "cache": str(self.cache), "task": self.examples.task,
            "class_names": list(self.examples.class_names), "model": self.model, "pooling": self.pooling,
            "device": self.device, "trust_remote_code": self.trust_remote_code, "progress": shown,
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            rows = Path(scratch) / "rows.jsonl"
            write_rows(self.examples, rows)
            result = self._measure({**job, "rows": str(rows)})
            if not result["extracted"]:  # whole already, but nobody knows what it took
                with explained(f"cannot remove {self.cache}", InputError):
                    shutil.rmtree(self.cache)
                result = self._measure({**job, "rows": str(rows)})
        return self.folder.add({"key": self.key, "approach": "extraction", **result})

    def _training(self, approach: Approach, fraction: float, seed: int, shown: bool) -> Result:
        recipe = {"cached": approach.train_spec(self.epochs, seed, self.metric)}
        if approach.name == "lp-ft":
            recipe = {"probe": chosen(["cached"])[0].train_spec(self.epochs, seed, self.metric), **recipe}
        body = {
            **self.identity, "approach": approach.name, "fraction": fraction, "seed": seed,
            "recipe": {name: asdict(each) for name, each in recipe.items()}, "backbone_rate": approach.backbone_rate,
            "head": asdict(self.head) | {"options": dict(self.head.options)},
        }  # fmt: skip
        key = hash_json(body)
        found = self.folder.get(key)
        if found is not None:
            return found
        result = self._measure(
            {
                "approach": approach.name, "fraction": fraction, "seed": seed, "epochs": self.epochs,
                "metric": self.metric, "head": self.head.kind, "head_options": dict(self.head.options),
                "cache": str(self.cache), "device": self.device, "outputs": str(self.folder.output_path(key)),
                "trust_remote_code": self.trust_remote_code, "progress": shown,
            }
        )  # fmt: skip
        return self.folder.add(
            {"key": key, "approach": approach.name, "fraction": fraction, "seed": seed, "epochs": self.epochs, **result}
        )

    def _measure(self, job: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return in_own_process(job)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted: what was measured is kept in {self.folder.path}; "
                "run the same command again to go on from there"
            ) from None

    def _facts(self, extraction: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "rows": len(self.examples),
            "unique": self.examples.n_unique,
            "splits": {name: rows for name, rows in self.examples.split_sizes().items() if rows},
            "task": self.examples.task,
            "outputs": len(self.examples.class_names),
            "model": self.model or "all-MiniLM-L6-v2",
            "pooling": self.pooling,
            "head": self.head.kind,
            "approaches": [each.name for each in self.approaches],
            "fractions": list(self.fractions),
            "seeds": list(self.seeds),
            "epochs": self.epochs,
            "metric": self.metric,
            "adjusted": extraction["extracted"] < extraction["unique"],
            **self.machine,
        }


def machine(device: str) -> dict[str, Any]:
    """Return what kind of machine times are taken on; on another, everything is measured anew."""
    import torch

    kind = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return {"device": kind, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}


def in_own_process(job: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job in a fresh interpreter, so that memory is its own and nothing is warm.

    Raises what the job raised, and ``TrainingError`` where the process was killed.
    """
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "job.json"
        file.write_text(json.dumps({**job, "parent": os.getpid()}), "utf-8")
        done = subprocess.run(
            [sys.executable, "-c", "from embedcache.compare.worker import main; main()", str(file)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, stdout=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        if done.returncode == INTERRUPTED or done.returncode == -signal.SIGINT:
            raise KeyboardInterrupt
        if done.returncode:
            killed = done.returncode == -signal.SIGKILL
            why = "was killed: is there enough memory?" if killed else f"ended with status {done.returncode}"
            raise TrainingError(f"the process of {job['approach']} {why}; what was measured before is kept")
        result: dict[str, Any] = json.loads(file.with_suffix(".result").read_text("utf-8"))
    if "error" in result:
        kind = getattr(errors, result["error"], TrainingError)
        try:
            raise kind(result["message"])
        except TypeError:  # an error that is made of more than its message
            raise TrainingError(result["message"]) from None
    return result


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _silent(text: str) -> None:
    return None
