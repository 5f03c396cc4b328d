"""A sweep: what is not known yet is trained, kept as it comes, compared, and concluded."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from embedcache.arguments import checks_arguments
from embedcache.errors import Interrupted, SweepError, SweepSpecError, warn
from embedcache.fingerprint import hash_json
from embedcache.heads import build_head
from embedcache.journal import exists
from embedcache.spec import TrainSpec
from embedcache.sweep import conclusion, summary
from embedcache.sweep.comparison import Candidate, candidates, leaderboard, pick
from embedcache.sweep.configuration import Configuration
from embedcache.sweep.grid import ASK_ABOVE, Grid, parse, read_file
from embedcache.sweep.problem import Problem, Protocol
from embedcache.sweep.result import SweepResult
from embedcache.sweep.store import Outputs, Result, SweepFolder
from embedcache.sweep.table import to_text
from embedcache.sweep.training import Interruption, Job, Trained, batches, outputs_of, refuse_impossible, train_batch
from embedcache.train.ending import STILL_IMPROVING
from embedcache.train.metrics import METRICS, metrics_of, score
from embedcache.wording import counted

if TYPE_CHECKING:
    from embedcache.cache import FeatureCache

_SLOW_METRICS = frozenset({"roc_auc", "average_precision", "spearman"})
"""Left out of every fold's line, unless heads are compared by them: they sort every row for every class."""
_FLOPS = 3e10
"""What a modest core does in a second, for an estimate of days, not of seconds."""


@checks_arguments()
def sweep(
    cache: FeatureCache | Path | str,
    grid: Any = None,
    *,
    output_dir: Path | str | None = None,
    folds: int | None = None,
    repeats: int | None = None,
    metric: str | None = None,
    shots: int | None = None,
    draws: int | None = None,
    random: int | None = None,
    seed: int | None = None,
    features: Sequence[str] = (),
    seeds: Sequence[int] = (),
    choose: Literal["best", "simplest"] = "best",
    learning_curve: bool | None = None,
    test_all: bool | None = None,
    yes: bool = False,
    progress: bool = True,
    command: str | None = None,
) -> SweepResult:
    """Train many heads on a cache, compare them honestly, keep the best.

    Heads are chosen by their mean score over folds of train and validation; the test split is looked at once, with
    the chosen head trained on both. In ``output_dir`` everything is kept: run it again and nothing is trained twice,
    add configurations and only those are.

    Args:
        cache: an open cache or its folder.
        grid: a sweep file, its content, a list of heads (names, mappings, ``HeadSpec``, ``Configuration``), or None for
            the default; see ``embedcache.sweep.grid``.
        output_dir: the sweep's folder; None for one that lives as long as the result.
        folds: how many (default 5), 1 for the cache's own validation split; ``repeats`` of them with other folds.
        metric: what heads are compared by; accuracy, f1_macro (multi-label) or rmse when not given.
        shots, draws: instead of folds, learn from so many rows a class, so many times (default 10).
        random: draw so many configurations of the grid instead of trying all.
        seed: of folds, draws and the random search.
        features, seeds: feature sets and heads' seeds, instead of the file's.
        choose: ``best`` keeps the winner, ``simplest`` the simplest head that cannot be told from it.
        learning_curve: also train the chosen and the recommended head on shares of the rows.
        test_all: also look at the test split with every other head; they are marked.
        yes: run more than 10,000 configurations.

    Raises:
        SweepError: a grid, protocol or folder that cannot be run.
        SpecError: a head, setting or metric that cannot be.
        Interrupted: Ctrl-C; says what was kept.
    """
    from embedcache.cache import FeatureCache

    opened = cache if isinstance(cache, FeatureCache) else FeatureCache.open(cache)
    value = read_file(grid) if isinstance(grid, Path) or (isinstance(grid, str) and _is_file(grid)) else grid
    if choose not in ("best", "simplest"):
        raise SweepError(f"choose is {choose!r}: expected best or simplest")
    parsed = parse(value, opened.feature_sets, features=features, seeds=seeds)
    given = {
        "folds": folds, "repeats": repeats, "metric": metric, "shots": shots, "draws": draws, "random": random,
        "seed": seed, "learning_curve": learning_curve, "test_all": test_all,
    }  # fmt: skip
    options = {**parsed.protocol, **{name: each for name, each in given.items() if each is not None}}
    problem = Problem.of(opened, options.get("metric"), protocol(options))
    divided = problem.folds  # refuses what the rows do not allow before anything is made
    refuse_too_many(problem, parsed, options.get("random"), yes)
    configurations = parsed.configurations(options.get("random"), options.get("seed", 0))
    refuse_impossible(problem, configurations)
    path = Path(tempfile.mkdtemp(prefix="embedcache-sweep-") if output_dir is None else output_dir)
    with SweepFolder(path, problem.identity()) as folder:
        run = Run(problem, folder, progress, command, choose, options)
        jobs = [Job(each, fold, at) for each in configurations for at, fold in enumerate(divided)]
        run.train(jobs)
        try:
            run.conclude()
        except (Interruption, KeyboardInterrupt):
            raise Interrupted(
                f"interrupted: all {len(jobs):,} fits are kept in {path}, and the conclusion is missing: "
                "run the same command to draw it"
            ) from None
    result = SweepResult(path, temporary=output_dir is None)
    warn(result.notes)
    return result


def _is_file(text: str) -> bool:
    return text.endswith((".yaml", ".yml", ".json"))


def protocol(options: dict[str, Any]) -> Protocol:
    """Return the protocol that options ask for. Raises ``SweepSpecError`` for options that contradict each other."""
    named = {name: options[name] for name in ("folds", "repeats", "shots", "draws", "seed") if name in options}
    if "shots" in named and ("folds" in named or "repeats" in named):
        raise SweepSpecError("--shots and --folds contradict each other: few-shot draws are scored on all other rows")
    if "draws" in named and "shots" not in named:
        raise SweepSpecError("--draws needs --shots: how many rows of each class a draw has")
    return Protocol(**named)


def refuse_too_many(problem: Problem, grid: Grid, random: int | None, yes: bool) -> None:
    """Raise ``SweepError`` with count and estimate for a grid that nobody means to run by accident."""
    count = len(grid) if random is None else min(len(grid), random)
    if count <= ASK_ABOVE or yes:
        return
    fits = count * len(problem.folds)
    seconds = fits * float(np.mean([cost(problem, each) for each in grid.sample()]))
    raise SweepError(
        f"{counted(count, 'configuration')} on {counted(len(problem.folds), 'fold')} are "
        f"{counted(fits, 'head')}, {duration(seconds)}: "
        "draw some with --random 50, name fewer values, or pass --yes to train them all"
    )


def cost(problem: Problem, configuration: Configuration) -> float:
    """Return roughly how many seconds one fold of a configuration takes on two cores."""
    feature = problem.cache.feature(configuration.feature)
    rows, outputs = len(problem), len(problem.class_names)
    if configuration.head.engine == "sklearn":
        return 1.0
    if configuration.train.solver == "convex":
        return 4 * 60 * rows * feature.dim * outputs / _FLOPS
    size = sum(each.numel() for each in build_head(configuration.head, feature, outputs).parameters())
    vectors = {"pooled": 1, "layers": feature.layers, "tokens": 32}[feature.kind]
    return 6 * rows * size * vectors * _epochs(configuration.train, rows) / _FLOPS


def _epochs(spec: TrainSpec, rows: int) -> int:
    return spec.epochs_of(-(-rows // spec.batch_size))


def duration(seconds: float) -> str:
    """Say a rough time."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"about {seconds / size:,.0f} {unit}"
    return f"about {max(seconds, 1):.0f} s"


@dataclass
class Run:
    """One sweep going on in a folder."""

    problem: Problem
    folder: SweepFolder
    progress: bool
    command: str | None
    choose: str
    options: dict[str, Any]

    def __post_init__(self) -> None:
        self.begun = time.perf_counter()
        self.started = _now()
        self.fits = 0
        self.show = self.progress and sys.stderr.isatty()

    def train(self, jobs: Iterable[Job]) -> None:
        """Train the jobs that have no result yet, keeping each batch as it is done.

        Raises ``Interrupted`` on Ctrl-C.
        """
        wanted = list(jobs)
        missing = self._missing(wanted)
        work = batches(self.problem, missing)
        done, begun = 0, time.perf_counter()
        for at, batch in enumerate(work):
            rate = (time.perf_counter() - begun) / max(1, done)
            left = f", {duration(rate * (len(missing) - done))} left" if done else ""
            title = f"{done}/{counted(len(missing), 'head')}{left}; {batch.title}"
            waiting: list[Trained] = []
            try:
                for trained in train_batch(self.problem, batch, progress=self.show, title=title):
                    waiting.append(trained)
                    # What comes one by one is kept one by one; a stack or a path comes whole.
                    if batch.how == "sklearn":
                        self._keep(waiting)
                        done, waiting = done + 1, []
                self._keep(waiting)
            except (Interruption, KeyboardInterrupt):
                self._stop(len(wanted) - len(self._missing(wanted)), len(wanted))
            done += len(waiting)
            if self.show and at + 1 < len(work):
                self._show_table()

    def _stop(self, kept: int, wanted: int) -> None:
        rows, failures = self._table()
        if rows:
            self.folder.write("summary.json", self._summary(rows, failures, complete=False))
        raise Interrupted(f"{kept:,} of {wanted:,} fits are kept in {self.folder.path}: run the same command to go on")

    def _missing(self, jobs: Sequence[Job]) -> list[Job]:
        scored = {at: int(fold.score.sum()) for at, fold in enumerate(self.problem.folds)}
        done: dict[str, set[int]] = {}
        out, seen = [], set()
        for job in jobs:
            name = job.configuration.id
            key = name, job.number, job.curve
            if key in seen:
                continue
            seen.add(key)
            if job.curve is not None:
                if key not in self.folder.results:
                    out.append(job)
                continue
            if name not in done:
                done[name] = self.folder.done(name, scored, len(self.problem.class_names))
            if job.number not in done[name]:
                out.append(job)
        return out

    def _keep(self, trained: Sequence[Trained]) -> None:
        """Score heads on the rows of their folds, and keep what came of it."""
        results: list[Result] = []
        outputs: dict[str, dict[int, Outputs]] = {}
        loaded: dict[tuple[str, int], Any] = {}
        for each in trained:
            job = each.job
            rows = np.flatnonzero(job.fold.score)
            said = None
            if each.head is not None:
                key = job.configuration.feature, job.number
                if key not in loaded:
                    loaded = {key: self.problem.features(job.configuration.feature, self.problem.rows[rows])}
                said = outputs_of(each.head, loaded[key])
            results.append(self._result(each, rows, said))
            if said is not None and job.curve is None:
                outputs.setdefault(job.configuration.id, {})[job.number] = said
        self.folder.add(results, outputs)
        self.fits += len(results)

    def _result(self, each: Trained, rows: Any, said: Outputs | None) -> Result:
        problem, job = self.problem, each.job
        metrics: dict[str, float | None] = {}
        error = each.error
        if said is not None and not np.isfinite(said).all():
            error = "it diverged, and what it says is not finite: use a lower learning rate"
        elif said is not None:
            names = [name for name in metrics_of(problem.task) if name not in _SLOW_METRICS or name == problem.metric]
            for name in names:
                value = score(name, problem.task, problem.y[rows], said)
                metrics[name] = float(value) if np.isfinite(value) else None
        body = job.configuration.to_json()
        return Result(
            id=job.configuration.id, candidate=job.configuration.candidate, fold=job.number, repeat=job.fold.repeat,
            train_rows=int((job.fold.train | job.fold.stopping).sum()), eval_rows=len(rows),
            score=metrics.get(problem.metric), metrics=metrics, feature=body["feature"], head=body["head"],
            train=body["train"], parameters=each.parameters, seconds=each.seconds, epochs=each.epochs, curve=job.curve,
            error=error,
        )  # fmt: skip

    def _candidates(self) -> list[Candidate]:
        """Return every candidate that the folder has whole, of this grid or of earlier ones."""
        known: dict[str, Configuration] = {}
        for result in self.folder.results.values():
            if result.id not in known and result.curve is None:
                made = Configuration.from_json({"feature": result.feature, "head": result.head, "train": result.train})
                known[result.id] = made
        return candidates(self.folder, list(known.values()), len(self.problem.folds))

    def _table(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        return leaderboard(self.problem, self.folder, self._candidates())

    def _show_table(self) -> None:
        rows, failures = self._table()
        if rows:
            body = self._summary(rows, failures, complete=False)
            print(f"\n{to_text(body, 5)}\n", file=sys.stderr)

    def conclude(self) -> None:
        """Choose, look at the test split, write the summary and ``best/``; nothing where nothing has changed.

        Raises ``SweepError`` when no head could be trained.
        """
        asked = {name: bool(self.options.get(name)) for name in ("learning_curve", "test_all")}
        keys = sorted([name, fold] for name, fold, curve in self.folder.results if curve is None)
        state = hash_json({"results": keys, "choose": self.choose, "asked": asked})
        if self._concluded(state):
            return
        found = {each.id: each for each in self._candidates()}
        rows, failures = leaderboard(self.problem, self.folder, list(found.values()))
        if not rows:
            first = failures[0]["error"] if failures else "there is none"
            raise SweepError(f"none of {counted(len(failures), 'head')} could be trained; the first: {first}")
        simple = pick(rows, self.problem.greater_is_better)
        chosen = simple if self.choose == "simplest" else 0
        named = [found[rows[at]["id"]] for at in dict.fromkeys((chosen, simple))]
        curve: list[dict[str, Any]] = []
        if self.options.get("learning_curve"):
            baseline = [each for each in found.values() if each.first.head.kind == "majority" and each not in named]
            named += [each for each in baseline if each.error() is None][:1]
            self.train(conclusion.curve_jobs(self.problem, named))
            curve = conclusion.curves(self.problem, self.folder, named)
        try:
            final = conclusion.finish(self.problem, self.folder, found[rows[chosen]["id"]])
            tested = conclusion.read_tested(self.folder)
            if final.test is not None:
                tested[final.test["id"]] = {name: final.test[name] for name in ("score", "interval", "rows")}
            if self.options.get("test_all"):
                extra = conclusion.test_all(self.problem, [found[row["id"]] for row in rows], tested)
                tested |= {
                    name: {key: value[key] for key in ("score", "interval", "rows")} for name, value in extra.items()
                }
        except (Interruption, KeyboardInterrupt):
            self._stop(len(rows), len(rows))
            raise
        for row in rows:
            if row["id"] in tested:
                row["looked_at_test"], row["test"] = True, tested[row["id"]]
        if tested:
            self.folder.write(conclusion.TESTED, summary.strict(tested))
        conclusion.save_best(self.problem, self.folder, final, rows[chosen])
        body = self._summary(rows, failures, complete=True)
        body |= self._decision(rows, chosen, simple)
        body |= {
            "test": final.test, "mistakes": final.mistakes, "learning_curve": curve, "few_shot": final.few_shot,
        }  # fmt: skip
        body["ran"]["state"] = state
        body["notes"] += _notes(self.problem, rows)
        if final.trained.improving:
            body["notes"].append(f"{rows[chosen]['label']}: {STILL_IMPROVING}")
        self.folder.write("summary.json", summary.strict(body))

    def _concluded(self, state: str) -> bool:
        try:
            before = SweepResult(self.folder.path).summary
        except SweepError:
            return False
        whole = exists(self.folder.path / "best" / "config.json", SweepError)
        return bool(before.get("complete")) and before["ran"].get("state") == state and whole

    def _decision(self, rows: Sequence[dict[str, Any]], chosen: int, simple: int) -> dict[str, Any]:
        group = sum(not row["distinguishable"] for row in rows)
        among = f"simplest of the {group} heads that cannot be told from the winner"
        why = f"best mean {self.problem.metric} over folds" if chosen == 0 and self.choose == "best" else among
        said = among if group > 1 else "the winner, and every other head can be told from it"
        return {
            "chosen": {"id": rows[chosen]["id"], "label": rows[chosen]["label"], "why": why},
            "recommended": {"id": rows[simple]["id"], "label": rows[simple]["label"], "why": said},
        }

    def _summary(self, rows: list[dict[str, Any]], failures: list[dict[str, Any]], *, complete: bool) -> dict[str, Any]:
        problem = self.problem
        majority = [row["score"] for row in rows if row["head"]["kind"] == "majority"]
        better = max if problem.greater_is_better else min
        return {
            "format": "embedcache-sweep", "version": 1, "complete": complete, "task": problem.task,
            "class_names": list(problem.class_names),
            "metric": {"name": problem.metric, "greater_is_better": METRICS[problem.metric].greater_is_better},
            "baseline": better(majority) if majority else None,
            "data": summary.data_facts(problem), "protocol": summary.protocol_facts(problem),
            "leaderboard": rows, "failures": failures, "chosen": None, "recommended": None, "test": None,
            "mistakes": None, "learning_curve": [], "few_shot": None,
            "ran": {
                "command": self.command, "versions": summary.versions(), "cache_spec": problem.cache.spec_hash,
                "dataset": problem.dataset_hash, "sweep": self.folder.hash,
                "configurations": len({result.id for result in self.folder.results.values()}),
                "fits": len(self.folder.results), "started": self.started, "finished": _now(),
                "seconds": time.perf_counter() - self.begun, "machine": summary.machine(),
            },
            "notes": list(self.folder.notes),
        }  # fmt: skip


def _notes(problem: Problem, rows: Sequence[dict[str, Any]]) -> list[str]:
    notes = []
    duplicates = len(problem) - problem.strata.groups
    if duplicates:
        what = "row of train and validation has" if duplicates == 1 else "rows of train and validation have"
        notes.append(f"{duplicates:,} {what} the content of another, and its fold")
    if not len(problem.test_rows):
        notes.append(
            "the cache has no labelled test split: nothing here was measured on rows that no choice was made by"
        )
    notes += _edges(rows)
    if any(row["head"]["kind"] == "majority" and not row["distinguishable"] for row in rows) and len(rows) > 1:
        notes.append("these rows cannot tell the best head from one that always says the same: more rows are needed")
    if problem.task == "classification" and (unseen := sorted({*problem.test_y.tolist()} - {*problem.y.tolist()})):
        names = ", ".join(problem.class_names[at] for at in unseen[:5])
        notes.append(f"the test split has classes that no other row has, so no head can know them: {names}")
    looked = sum(row["looked_at_test"] for row in rows)
    if looked > 1:
        notes.append(
            f"the test split has been looked at with {counted(looked, 'head')}: "
            "the best of their scores there is flattered"
        )
    if problem.protocol.shots is None and problem.protocol.folds == 1:
        notes.append("one split only: its rows decide everything, and the spread over training sets is not seen")
    return notes


def _edges(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Say which settings of the winner lie at the end of what was tried: the best may lie beyond."""
    best = rows[0]
    alike = [
        row for row in rows
        if row["head"]["kind"] == best["head"]["kind"] and row["head"]["engine"] == best["head"]["engine"]
        and row["train"].get("solver") == best["train"].get("solver")
    ]  # fmt: skip
    notes = []
    for name, value in best["varied"].items():
        tried = sorted({row["varied"][name] for row in alike if isinstance(row["varied"].get(name), (int, float))})
        if isinstance(value, (int, float)) and len(tried) >= 3 and value in (tried[0], tried[-1]) and value != 0:
            end = "largest" if value == tried[-1] else "smallest"
            notes.append(f"the winner's {name} is the {end} tried ({value:g}): the best may lie beyond")
    return notes


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
