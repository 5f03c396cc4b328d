"""The comparison: every approach, fraction and seed, each once, each in a process of its own."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from embedcache.arguments import checks_arguments
from embedcache.compare.figures import APPROACHES, Approach, Facts, chosen, seconds_text
from embedcache.compare.measurements import EXTRACTION, Extraction, ExtractionJob, Folder, Job, Training, TrainingJob
from embedcache.compare.result import Comparison, assemble
from embedcache.compare.rows import checked_fractions, checked_rows, dataset_hash, write_rows
from embedcache.compare.worker import INTERRUPTED
from embedcache.errors import (
    BackboneError,
    EmbedcacheError,
    InputError,
    Interrupted,
    MissingExtraError,
    SpecError,
    TrainingError,
)
from embedcache.examples import Examples, load_examples
from embedcache.fingerprint import hash_json, sha256_file
from embedcache.journal import exists, explained
from embedcache.spec import HeadSpec, ModelSource
from embedcache.task import task_named
from embedcache.train.metrics import metric_named
from embedcache.version import __version__
from embedcache.wording import counted


@checks_arguments(load_examples)
def compare_training_approaches(
    inputs: Any = None,
    output_dir: Path | str | None = None,
    *,
    model: Path | str | None = None,
    head: HeadSpec | str = "linear",
    pooling: str = "auto",
    approaches: Sequence[str] | None = None,
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
    """Train on the same rows in several ways, and measure what each costs and how well it does.

    ``cached``: features once, then the head. ``frozen``: the frozen backbone inside every step. ``last-1``, ``last-2``
    and ``last-3``: the last blocks and the head, from cached hidden states. ``full``: full fine-tuning. ``lp-ft``:
    fine-tuning from the trained head (Kumar et al. 2022). Each measurement runs in a process of its own and is a line
    in ``output_dir``; killed, the same call goes on after the last of them.

    Args:
        inputs: as ``load_examples`` reads them, or ``Examples``; with train, validation and test rows, and labels.
        output_dir: the folder of results, made or gone on with; None keeps nothing.
        model: local folder or hub name; None for the packaged all-MiniLM-L6-v2.
        head: a ``HeadSpec`` for torch, or a kind with its defaults.
        pooling: the feature set it reads.
        approaches: which of them; None for all, without the last blocks where this model or head does not allow it.
        epochs: of every approach; of the last blocks ``TUNING.epochs`` at most, as their head is trained before.
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
        BackboneError: last blocks that were named and cannot be trained by themselves.
        Interrupted: Ctrl-C; what was measured stays.

    Example::

        found = compare_training_approaches("reviews.csv", "reviews.compare", split="80/10/10", max_rows=2000)
        print(found.to_markdown())
    """
    from embedcache.backbone import choose_device, model_name
    from embedcache.finetune.model import live_head

    ways = chosen(list(APPROACHES) if approaches is None else approaches)
    shares = checked_fractions(fractions)
    spec = live_head(head)
    _refuse_impossible(epochs, seeds)
    examples = inputs if isinstance(inputs, Examples) else load_examples(inputs, **options)
    examples = checked_rows(examples, max_rows, seeds[0])
    assert examples.task is not None
    task = task_named(examples.task)
    name = metric or task.headline_metric
    metric_named(name, task)
    source = ModelSource(model_name(model), device=choose_device(device), trust_remote_code=trust_remote_code)
    plan = Plan(examples, ways, shares, tuple(seeds), spec, name, epochs, source, pooling, named=approaches is not None)
    with ExitStack() as stack:
        where = stack.enter_context(tempfile.TemporaryDirectory()) if output_dir is None else output_dir
        folder = stack.enter_context(Folder(where))
        comparison = Work(plan, folder, progress=progress and sys.stderr.isatty()).run()
        if output_dir is None:
            return replace(comparison, folder=None)
        text = json.dumps(comparison.to_json(), indent=1, allow_nan=False, ensure_ascii=False)
        folder.write("comparison.json", f"{text}\n")
        folder.write("comparison.md", comparison.to_markdown())
        with suppress(MissingExtraError):  # the table is there; a picture is an extra
            comparison.plot(folder.path / "comparison.svg")
        return comparison


def _refuse_impossible(epochs: int, seeds: Sequence[int]) -> None:
    if epochs < 1:
        raise SpecError(f"epochs is {epochs}: expected at least 1")
    if not seeds or len(set(seeds)) != len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
        raise SpecError(f"seeds are {list(seeds)}: expected different whole numbers in [0, 2**32)")


@dataclass(frozen=True)
class Plan:
    """What is compared: the rows, the approaches, the fractions of the training rows, the seeds, and how to train.

    ``named`` says that the approaches were asked for by name: one that cannot be had is then an error.
    """

    examples: Examples
    approaches: Sequence[Approach]
    fractions: Sequence[float]
    seeds: Sequence[int]
    head: HeadSpec
    metric: str
    epochs: int
    source: ModelSource
    pooling: str
    named: bool = True

    def units(self) -> list[tuple[float, Approach, int]]:
        """Return what is measured once, in order."""
        return [
            (fraction, approach, seed)
            for seed in self.seeds for fraction in self.fractions for approach in self.approaches
        ]  # fmt: skip


class Work:
    """A plan and the folder in which its measurements are kept; ``run`` measures those that are not there yet."""

    def __init__(self, plan: Plan, folder: Folder, *, progress: bool = False) -> None:
        from embedcache.backbone import resolve_model, weight_files

        self.plan, self.folder, self.progress = plan, folder, progress
        self.machine = machine(plan.source.device)
        self.identity = {
            "version": __version__,
            "data": dataset_hash(plan.examples),
            "weights": {file.name: sha256_file(file) for file in weight_files(resolve_model(plan.source.model))},
            "pooling": plan.pooling,
            **self.machine,
        }
        self.left_out: dict[str, str] = {}

    def run(self) -> Comparison:
        """Measure what is not there yet, and put everything together."""
        extractions = self._extractions()
        plan, units = self.plan, self.plan.units()
        total = len(units) + len(extractions)
        runs, outputs = {}, {}
        for number, (fraction, approach, seed) in enumerate(units, len(extractions) + 1):
            key = self._key(fraction, approach, seed)
            run = self.folder.training(key) or self._train(key, fraction, approach, seed)
            test_outputs = self.folder.outputs(key)
            assert test_outputs is not None  # written before its line, and looked for when the line was
            unit = fraction, approach.name, seed
            runs[unit], outputs[unit] = run, test_outputs
            self._say(
                f"[{number}/{total}] {approach.title}, {counted(run.train_rows, 'row')}, seed {seed}: "
                f"{seconds_text(run.seconds)}, validation {plan.metric} {run.validation:.3f}"
            )
        targets = plan.examples.targets
        assert targets is not None
        test = plan.examples.split == plan.examples.split_names.index("test")
        return assemble(self._facts(extractions), extractions, runs, outputs, targets[test], self.folder.path)

    def extraction_key(self, blocks: int) -> str:
        """Return the hash of all that decides an extraction, with the states of so many last blocks."""
        return hash_json({**self.identity, "approach": EXTRACTION} | ({"blocks": blocks} if blocks else {}))

    def cache(self, blocks: int) -> Path:
        """Return where the features of such an extraction are."""
        return self.folder.cache_path(self.extraction_key(blocks))

    def _extractions(self) -> dict[int, Extraction]:
        """Extract what the approaches read, by the number of last blocks; leave out what cannot be had."""
        found, total = {}, len({approach.blocks for approach in self.plan.approaches} | {0}) + len(self.plan.units())
        for blocks in (0, *(approach.blocks for approach in self.plan.approaches if approach.blocks)):
            states = f" with the states of the last {counted(blocks, 'block')}" if blocks else ""
            try:
                found[blocks] = self._extraction(blocks)
            except (BackboneError, SpecError) as error:
                if self.plan.named or not blocks:
                    raise
                approaches = [approach for approach in self.plan.approaches if approach.blocks != blocks]
                self.plan = replace(self.plan, approaches=approaches)
                self.left_out[f"last-{blocks}"] = str(error)
                continue
            self._say(f"[{len(found)}/{total}] extraction{states}: {seconds_text(found[blocks].seconds)}")
        return found

    def _extraction(self, blocks: int) -> Extraction:
        key, cache = self.extraction_key(blocks), self.cache(blocks)
        known = self.folder.extraction(key)
        if known is not None and exists(cache / "manifest.json", InputError):
            return known
        plan = self.plan
        if blocks:
            refuse_uncut(plan, blocks)
        with tempfile.TemporaryDirectory() as scratch:
            rows = Path(scratch) / "rows"
            write_rows(plan.examples, rows)
            job = ExtractionJob(cache, rows, plan.source, plan.pooling, self.progress, blocks)
            result = self._measure(job)
            if isinstance(result, Extraction) and not result.extracted:  # whole already, but nobody knows what it took
                with explained(f"cannot remove {cache}", InputError):
                    shutil.rmtree(cache)
                result = self._measure(job)
            assert isinstance(result, Extraction)
        self.folder.add(key, result, approach=EXTRACTION, blocks=blocks)
        return result

    def _key(self, fraction: float, approach: Approach, seed: int) -> str:
        """Return the hash of all that decides a training."""
        plan = self.plan
        recipes = {"cached": approach.train_spec(plan.epochs, seed, plan.metric)}
        if approach.blocks or approach.name == "lp-ft":
            recipes["probe"] = APPROACHES["cached"].train_spec(plan.epochs, seed, plan.metric)
        return hash_json(
            {
                **self.identity, "approach": approach.name, "fraction": fraction, "seed": seed,
                "recipe": {name: asdict(recipe) for name, recipe in recipes.items()},
                "backbone_rate": approach.backbone_rate,
                "head": asdict(plan.head) | {"options": dict(plan.head.options)},
            }
        )  # fmt: skip

    def _train(self, key: str, fraction: float, approach: Approach, seed: int) -> Training:
        plan = self.plan
        job = TrainingJob(
            approach=approach.name,
            fraction=fraction,
            seed=seed,
            epochs=plan.epochs,
            metric=plan.metric,
            head=plan.head,
            cache=self.cache(approach.blocks),
            source=replace(plan.source, model=None),
            outputs=self.folder.output_path(key),
            progress=self.progress,
        )
        result = self._measure(job)
        assert isinstance(result, Training)
        self.folder.add(key, result, approach=approach.name, fraction=fraction, seed=seed, epochs=plan.epochs)
        return result

    def _measure(self, job: Job) -> Extraction | Training:
        try:
            return in_own_process(job)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted: what was measured is kept in {self.folder.path}; "
                "run the same command again to go on from there"
            ) from None

    def _facts(self, extractions: Mapping[int, Extraction]) -> Facts:
        plan, examples = self.plan, self.plan.examples
        assert examples.task is not None
        return Facts(
            rows=len(examples),
            unique=examples.n_unique,
            splits={name: rows for name, rows in examples.split_sizes().items() if rows},
            task=examples.task,
            outputs=len(examples.class_names),
            model=str(plan.source.model or "all-MiniLM-L6-v2"),
            pooling=plan.pooling,
            head=plan.head.kind,
            approaches=[approach.name for approach in plan.approaches],
            fractions=list(plan.fractions),
            seeds=list(plan.seeds),
            epochs=plan.epochs,
            metric=plan.metric,
            adjusted=any(extraction.adjusted for extraction in extractions.values()),
            left_out=self.left_out,
            **self.machine,
        )

    def _say(self, line: str) -> None:
        if self.progress:
            print(line, file=sys.stderr)


def refuse_uncut(plan: Plan, blocks: int) -> None:
    """Raise ``BackboneError`` or ``SpecError`` where the last blocks cannot be trained by themselves."""
    from embedcache.backbone import load_backbone
    from embedcache.finetune import TailModel, refuse_earlier_layer
    from embedcache.heads import build_head

    source = replace(plan.source, device="cpu")
    backbone = load_backbone(**source.arguments(), features=(plan.pooling,), content=plan.examples.kind)
    refuse_earlier_layer(backbone.feature_sets[0])
    head = build_head(plan.head, backbone.feature_sets[0], max(1, len(plan.examples.class_names)), seed=0)
    TailModel(backbone, head, blocks)


class Machine(TypedDict):
    """What kind of machine times are taken on; on another, everything is measured anew."""

    device: str
    threads: int
    torch: str


def machine(device: str) -> Machine:
    """Return what kind of machine this is."""
    import torch

    kind = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return {"device": kind, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}


def in_own_process(job: Job) -> Extraction | Training:
    """Do a job in a fresh interpreter, so that memory is its own and nothing is warm; return its result.

    Raises what the job raised, and ``TrainingError`` where the process was killed.
    """
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as scratch:  # which only this user can read or write
        file = Path(scratch) / "job"
        file.write_bytes(pickle.dumps(job))
        done = subprocess.run(
            [sys.executable, "-c", "from embedcache.compare.worker import main; main()", str(file), str(os.getpid())],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, stdout=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        if done.returncode == INTERRUPTED or done.returncode == -signal.SIGINT:
            raise KeyboardInterrupt
        if done.returncode:
            killed = done.returncode == -signal.SIGKILL
            why = "was killed: is there enough memory?" if killed else f"ended with status {done.returncode}"
            raise TrainingError(f"the process of {job.approach} {why}; what was measured before is kept")
        result: Extraction | Training | EmbedcacheError = pickle.loads(file.with_suffix(".result").read_bytes())
    if isinstance(result, EmbedcacheError):
        raise result
    return result
