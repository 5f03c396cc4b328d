"""One check in progress: each comparison in turn, and what has been found so far."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from embedcache.backbone import Backbone, features_of, probe_of, resolve_model
from embedcache.cache import FeatureCache
from embedcache.equivalence import causes
from embedcache.equivalence.bits import difference
from embedcache.equivalence.features import gathered, recompute, stored
from embedcache.equivalence.live import LiveBatches, backbone_state, live_parts
from embedcache.equivalence.plain import PLAIN
from embedcache.equivalence.result import Comparison, EquivalenceResult, judged, judged_by_component
from embedcache.equivalence.rows import RawRows, Sample
from embedcache.equivalence.standard import StandardModel, logits_of, train_standard
from embedcache.equivalence.tolerance import (
    conditioning,
    feature_tolerance,
    labels_may_differ,
    longest_axis,
    noisy,
    rows_for_conditioning,
    storage_tolerance,
    training_tolerances,
)
from embedcache.equivalence.training import Record, cached_batches, compare, differences_of, train
from embedcache.errors import FeatureError, TrainingError, quiet
from embedcache.features import features_of as checked_features
from embedcache.fingerprint import differences
from embedcache.shard import FeatureSet, rounded
from embedcache.spec import FeatureSpec, HeadSpec, TrainSpec
from embedcache.task import task_named
from embedcache.train import train_head
from embedcache.train.data import LabelledRows
from embedcache.train.metrics import score
from embedcache.wording import counted

Array = npt.NDArray[Any]

STEPS = 10
BATCH_SIZE = 32
ENVIRONMENT = ("device", "cpu_capability", "torch", "transformers")
"""What bits may depend on, beside everything that the spec says."""


class Examination:
    """What a check has found so far."""

    def __init__(
        self, cache: FeatureCache, raw: RawRows, rows: Sample, backbone: Backbone, head: HeadSpec,
        feature: FeatureSet, seed: int, steps: int | None, everything: bool, progress: bool,
    ) -> None:  # fmt: skip
        self.cache, self.raw, self.rows, self.backbone = cache, raw, rows, backbone
        self.head, self.feature, self.progress = head, feature, progress
        self.comparisons: list[Comparison] = []
        self.findings: list[str] = list(raw.findings)
        self.notes: list[str] = list(raw.notes)
        self.costs: dict[str, Any] = {}
        self.environment_differs: list[tuple[str, Any, Any]] = []
        self.tolerances: dict[str, Array] | None = None
        self.training_tolerances: dict[str, float] = {}
        size = min(BATCH_SIZE, len(rows.train))
        per_epoch = -(-len(rows.train) // size)
        self.steps = steps or (max(STEPS, per_epoch) if everything else STEPS)
        self.spec = TrainSpec(epochs=-(-self.steps // per_epoch), batch_size=size, patience=0, seed=seed)
        self.total = self.spec.epochs * per_epoch
        self.task = cache.task or "classification"
        self.ids = cache.ids()
        self.sets = {each.name: each for each in backbone.feature_sets}

    def identity(self, given: bool) -> None:
        """Compare the backbone's identity with the spec that the cache recorded."""
        here = dict(self.backbone.identity)
        if not given and "storage_dtype" in self.cache.spec:  # loaded without rounding, which is then done here
            here["storage_dtype"] = self.cache.spec["storage_dtype"]
        recorded = dict(self.cache.spec)
        if isinstance(recorded.get("features"), Mapping) and isinstance(here.get("features"), Mapping):
            here["features"] = {name: each for name, each in here["features"].items() if name in recorded["features"]}
        self.identity_differs = bool(differences(recorded, here))
        self.findings += causes.of_identity(recorded, here)

    def environment(self) -> None:
        """Note in which way this machine is not the one that made the cache; its probe says what it computes."""
        self.numerics = self.cache.numerics_of(probe_of(self.backbone))
        here = self.backbone.provenance
        for made in self.cache.provenance():
            for name in ENVIRONMENT:
                entry = (name, made.get(name), here.get(name))
                if entry[1] != entry[2] and entry not in self.environment_differs:
                    self.environment_differs.append(entry)

    def same_shape(self) -> bool:
        """Say so where the model gives features of another shape, which nothing can be compared with."""
        for name, each in self.cache.feature_sets.items():
            here = self.sets.get(name)
            if here is None:
                self.findings.append(
                    f"features {name}: this backbone does not make them (it makes {', '.join(self.sets)})"
                )
            elif (here.kind, here.row_shape) != (each.kind, each.row_shape):
                self.findings.append(
                    f"features {name}: {list(each.row_shape)} in the cache, {list(here.row_shape)} here: another model"
                )
        return all(
            name in self.sets and (self.sets[name].kind, self.sets[name].row_shape) == (each.kind, each.row_shape)
            for name, each in self.cache.feature_sets.items()
        )

    def standard_model(
        self, wanted: bool, model: str | None, revision: str | None, trust_remote_code: bool
    ) -> StandardModel | None:
        """Load the model as transformers does, where the standard reference or a tolerance needs it."""
        if not wanted and not self.environment_differs:
            return None
        made = self.cache.provenance()[-1] if self.cache.provenance() else {}
        asked = model if model is not None else getattr(self.backbone, "name", None) or made.get("model")
        if "preprocessing" not in self.cache.spec or asked is None:
            self.notes.append("no standard reference: the backbone is no model that transformers loads")
            return None
        folder = resolve_model(asked, revision)
        where = str(getattr(self.backbone, "device", "cpu"))
        return StandardModel(folder, self.cache.spec, where, trust_remote_code=trust_remote_code)

    def features(self, again: Callable[[Sequence[bytes]], Mapping[str, Any]]) -> None:
        """Recompute the features of the sample, twice of a few rows, and compare them with the cache."""
        wanted = np.union1d(self.rows.train, self.rows.evaluate)
        before = backbone_state(self.backbone)
        few = self.raw.contents(self.rows.features[:16])
        first = features_of(self.backbone, few, self.feature.name)
        self.recomputed = recompute(
            self.cache, self.backbone, self.raw.stream, self.rows.features, wanted, self.feature,
            self._bar("features", len(self.rows.features)),
        )  # fmt: skip
        self._steady(first, features_of(self.backbone, few, self.feature.name), before)
        self.again = again

    def _steady(self, first: Any, second: Any, before: Mapping[str, torch.Tensor]) -> None:
        a, b = (each[0] if isinstance(each, tuple) else each for each in (first, second))
        found = difference(a, b)
        live = live_parts(self.backbone)
        after = backbone_state(self.backbone)
        drifted = [name for name, value in before.items() if not torch.equal(value, after[name])]
        named = f": {', '.join(live[:3])} {'is' if len(live) == 1 else 'are'} in training mode" if live else ""
        if drifted:
            self.findings.append(
                f"the backbone changes while it runs: its buffers {', '.join(drifted[:3])} were updated (batch "
                f"normalisation is live{named}), so features depend on what ran before"
            )
        elif not found.same:
            self.findings.append(
                f"the backbone gives other features each time: {found.values - found.identical:,} of {found.values:,} "
                f"values of the same {len(self.rows.features[:16])} rows differ from one run to the next, "
                f"as with dropout left on{named}"
            )
        elif live:
            self.findings.append(f"the backbone is not in eval mode{named}: dropout or batch normalisation is live")

    def measure_tolerances(self, standard: StandardModel | None) -> None:
        """Derive how far apart features may be, where bits need not agree; and add the comparison of features."""
        if standard is not None:
            wanted = [FeatureSpec.parse(name) for name in self.cache.feature_sets]
            rows = self.rows.features[rows_for_conditioning(len(self.rows.features))]
            texts = [each.decode("utf-8") for each in self.raw.contents(rows)]
            network = standard.model

            def run(other: nn.Module) -> dict[str, torch.Tensor]:
                standard.model = other
                found, mask = standard(texts, wanted)
                return {
                    each.name: found[each.name][mask] if each.pooling == "tokens" else found[each.name]
                    for each in wanted
                }

            kappa = conditioning(network, run)
            standard.model = network
            longest, compute = longest_axis(network), self.cache.spec["compute_dtype"]
            self.tolerances = {}
            for name, report in self.recomputed.reports.items():
                computed = feature_tolerance(kappa[name], longest, compute, report.total.values)
                rounding = storage_tolerance(report.largest, computed, report.feature.dtype)
                self.tolerances[name] = computed + rounding
        allowed = self.tolerances if self.environment_differs else None
        if self.environment_differs:
            said = ", ".join(f"{name} {there} there, {now} here" for name, there, now in self.environment_differs)
            held = "the tolerance instead of to every bit" if allowed is not None else "every bit all the same"
            self.notes.append(
                f"the cache was made in another environment ({said}), where kernels may add up in another order: "
                f"the canonical reference is held to {held}"
            )
        for name, report in self.recomputed.reports.items():
            what = f"features {name}"
            if allowed is None:
                row = judged("canonical", what, report.total, report.where)
            else:
                within = causes.within(report, allowed[name])
                row = judged_by_component("canonical", what, report.total, report.where, allowed[name], within)
            self.comparisons.append(row)
        self.findings += causes.of_features(self.recomputed, self.ids, allowed, self.again)

    def cached_side(self) -> None:
        """Train on cached tensors."""
        train_rows, evaluation = self.rows.train, self.rows.evaluate
        self.x = stored(self.cache, train_rows, self.feature)
        self.x_evaluate = stored(self.cache, evaluation, self.feature)
        self.y = self.cache.targets()[train_rows]
        self.y_evaluate = self.cache.targets()[evaluation]
        self.cached = self._train(self.x, self.y, "cached")
        self.cached.logits = _logits(self.cached, self.x_evaluate)
        if self.tolerances is not None:
            tolerance = self.tolerances[self.feature.name]

            def again(draw: int) -> Record:
                x = noisy(self.x, tolerance, draw)
                record = self._train(x, self.y, "tolerance")
                record.logits = _logits(record, noisy(self.x_evaluate, tolerance, draw + 100))
                return record

            self.training_tolerances = training_tolerances(self.cached, again, lambda record: record.logits)

    def canonical(self) -> None:
        """Train with the backbone inside every step, at canonical shapes."""
        contents = self.raw.contents(self.rows.train)
        x, x_evaluate = (
            gathered(self.recomputed.wanted, rows, self.feature) for rows in (self.rows.train, self.rows.evaluate)
        )
        live = LiveBatches(contents, self.backbone, self.feature, self.spec.batch_size, self.spec.order_seed)
        record = train_live(
            self._labelled(x, self.raw.targets[self.rows.train]), live, self.head, self.spec, self.steps,
            progress=self.progress, title="canonical",
        )  # fmt: skip
        record.logits = _logits(record, x_evaluate)
        tolerances = self.training_tolerances if self.environment_differs and self.tolerances is not None else None
        self._compare("canonical", record, tolerances)
        if self.head.kind == "linear" and tolerances is None:
            self._optimum(x)

    def _optimum(self, x: Array) -> None:
        """Compare the linear heads that training on the cache gives, and on live features ``x``: their optima."""
        solved = []
        for features, y in ((self.x, self.y), (x, self.raw.targets[self.rows.train])):
            try:
                with quiet():
                    done = train_head(
                        features, y, task=self.task, class_names=self.cache.class_names, feature=self.feature,
                        progress=False, intervals=False,
                    )  # fmt: skip
            except (TrainingError, FeatureError) as error:
                self.notes.append(f"the optimum is not compared: {error}")
                return
            solved.append(done.head.state)
        found, where = differences_of(*solved)
        self.comparisons.append(judged("canonical", "optimum", found, where))

    def standard(self, model: StandardModel) -> None:
        """Train as anyone would, and compare features, training and predictions within the tolerance."""
        assert self.tolerances is not None
        spec = FeatureSpec.parse(self.feature.name)
        train_rows, evaluation = self.rows.train, self.rows.evaluate
        texts, others = (
            [each.decode("utf-8") for each in self.raw.contents(rows)] for rows in (train_rows, evaluation)
        )
        wanted = [FeatureSpec.parse(name) for name in self.cache.feature_sets]
        x, x_evaluate = model.features(texts, wanted), model.features(others, wanted)
        agree = True
        for name, each in self.cache.feature_sets.items():
            agree &= self._standard_features(each, [(train_rows, x[name]), (evaluation, x_evaluate[name])])
        if self.head.kind not in PLAIN:
            self.notes.append(f"no standard training: there is no plain twin of the head {self.head.kind}")
            return
        mine, judged_x = _stored_as(x[spec.name], self.feature), _stored_as(x_evaluate[spec.name], self.feature)
        y = self.raw.targets[train_rows]
        record, module = train_standard(
            model, texts, y, mine, spec, self.head, self.spec, self.task, self.cached, self.total, self.feature.dtype
        )  # fmt: skip
        record.logits = logits_of(module, judged_x, y, self.task)
        self._compare("standard", record, self.training_tolerances, agree)

    def _standard_features(self, each: FeatureSet, pairs: Sequence[tuple[npt.NDArray[np.int64], Any]]) -> bool:
        assert self.tolerances is not None
        rows = np.concatenate([rows for rows, _ in pairs])
        theirs = [_stored_as(x, each) for _, x in pairs]
        ours = [stored(self.cache, rows, each) for rows, _ in pairs]
        if each.kind == "tokens":
            counts = [np.concatenate([np.diff(x[1]) for x in side]) for side in (ours, theirs)]
            if not np.array_equal(counts[0], counts[1]):
                at = int(np.flatnonzero(counts[0] != counts[1])[0])
                self.findings.append(
                    f"standard reference, features {each.name}: row {self.ids[int(rows[at])]} has "
                    f"{counted(counts[1][at], 'token')}, and {counts[0][at]} in the cache"
                )
                return False
            owner = np.repeat(rows, counts[0])
            a, b = (np.concatenate([x[0] for x in side]) for side in (ours, theirs))
        else:
            owner, (a, b) = rows, (np.concatenate(side) for side in (ours, theirs))
        found = difference(a, b, each.dtype)
        where = "" if found.where is None else (
            f"row {self.ids[int(owner[found.where[0]])]} [{', '.join(map(str, found.where[1:]))}]"
        )  # fmt: skip
        tolerance = self.tolerances[each.name]
        apart = np.abs(a.astype(np.float64) - b).max(axis=0)
        within = bool((apart <= tolerance).all())
        row = judged_by_component("standard", f"features {each.name}", found, where, tolerance, within)
        self.comparisons.append(row)
        if row.verdict == "different":
            beyond = int((apart > tolerance).sum())
            self.findings.append(
                f"standard reference, features {each.name}: off by up to {found.largest:.2g} at {where}, and by "
                f"more than rounding explains in {beyond} of {apart.size} components: weights, tokens, pooling or layer"
            )
        return row.verdict != "different"

    def _compare(
        self, reference: str, record: Record, tolerances: Mapping[str, float] | None, features_agree: bool | None = None
    ) -> None:
        given = ("initial head", "batch order") if reference == "standard" else ()
        rows = compare(reference, self.cached, record, tolerances, given)
        tolerance = None if tolerances is None else tolerances["logits"]
        found = difference(self.cached.logits, record.logits)
        where = self._place(found.where)
        rows.append(judged(reference, "logits", found, where, tolerance))
        labels = [_labels(self.cached, each) for each in (self.cached.logits, record.logits)]
        said = difference(labels[0], labels[1])
        wrong = labels[0] != labels[1]
        if tolerance is not None and self.task != "regression":
            close = labels_may_differ(self.cached.logits, tolerance, self.task)
            allowed = None if (wrong & ~close).any() else math.inf
            row = judged(reference, "labels", said, self._place(said.where), allowed)
            rows.append(replace(row, tolerance=None, rule="but for close calls"))
        elif self.task != "regression":
            rows.append(judged(reference, "labels", said, self._place(said.where)))
        self.comparisons += rows
        if features_agree is None:
            features_agree = not any(
                each.reference == "canonical" and each.what.startswith("features") and each.verdict == "different"
                for each in self.comparisons
            )
        self.findings += causes.of_training(rows, reference, features_agree)

    def storage_costs(self) -> None:
        """Say what rounding to a smaller type costs: in features, in logits, in labels and in the metric."""
        if self.feature.dtype == "float32" or self.sets[self.feature.name].dtype != "float32":
            return
        for name, report in self.recomputed.reports.items():
            self.comparisons.append(
                Comparison(
                    "unrounded", f"features {name} ({report.feature.dtype})", report.rounding, report.rounding_where,
                    None, "cost", "-",
                )
            )  # fmt: skip
        exact = replace(self.feature, dtype="float32")
        x, x_evaluate = (
            gathered(self.recomputed.wanted, rows, exact) for rows in (self.rows.train, self.rows.evaluate)
        )
        record = self._train(x, self.y, "unrounded")
        record.logits = _logits(record, x_evaluate)
        found = difference(self.cached.logits, record.logits)
        self.comparisons.append(Comparison("unrounded", "logits", found, self._place(found.where), None, "cost", "-"))
        if self.task != "regression":
            same = (_labels(self.cached, self.cached.logits) == _labels(record, record.logits)).mean()
            self.costs["label agreement"] = f"{same:.2%}"
        self.costs["largest difference of a logit"] = f"{found.largest:.2e}"
        names = [task_named(self.task).default_metric, *(["accuracy"] if self.task == "classification" else [])]
        for metric in dict.fromkeys(names):
            values = []
            for each, features in ((self.cached, self.x_evaluate), (record, x_evaluate)):
                assert each.head is not None
                values.append(score(metric, self.task, self.y_evaluate, each.head.probabilities(features)))
            self.costs[metric] = (
                f"{values[0]:.4f} stored as {self.feature.dtype}, {values[1]:.4f} as float32 "
                f"({values[0] - values[1]:+.4f})"
            )

    def _train(self, x: Any, y: Array, title: str) -> Record:
        rows = self._labelled(x, y)
        return train(
            rows, cached_batches(rows.x, self.spec), self.head, self.spec, self.steps,
            progress=self.progress and title == "cached", title=title,
        )  # fmt: skip

    def _labelled(self, x: Any, y: Array) -> LabelledRows:
        features = checked_features(x, self.feature, finite=False)
        return LabelledRows(features, y, task_named(self.task), tuple(self.cache.class_names))

    def _place(self, where: tuple[int, ...] | None) -> str:
        if where is None:
            return ""
        return f"row {self.ids[int(self.rows.evaluate[where[0]])]}"

    def _bar(self, title: str, rows: int) -> Callable[[int, int], None]:
        from tqdm import tqdm

        bar = tqdm(total=rows, desc=title, unit="row", disable=None if self.progress and sys.stderr.isatty() else True)
        return lambda count, _: (bar.update(count), None)[1]

    def result(self, begun: float) -> EquivalenceResult:
        """Put everything together."""
        everything = len(self.rows.features) == len(self.cache)
        share = "all" if everything else f"{len(self.rows.features):,} of {len(self.cache):,}"
        sampled = {
            "features": f"{share} rows",
            "training": f"{counted(self.steps, 'minibatch step')} of {self.spec.batch_size} "
            f"on {counted(len(self.rows.train), 'row')}",
            "predictions": f"{counted(len(self.rows.evaluate), 'row')} of {self.rows.split}",
            "head": f"{self.head.kind} on {self.feature.name}",
        }
        if not everything:
            missed = 1 - len(self.rows.features) / len(self.cache)
            self.notes.append(
                f"a fault in one row alone is missed with probability {missed:.0%}: --all looks at every row"
            )
        return EquivalenceResult(
            tuple(self.comparisons), tuple(dict.fromkeys(self.findings)), tuple(self.notes), sampled, self.costs,
            tuple(self.environment_differs), time.perf_counter() - begun, self.numerics,
        )  # fmt: skip


def train_live(*arguments: Any, **options: Any) -> Record:
    """Train with the backbone in the loop; the same as ``train``, under a name of its own for whoever plants faults."""
    return train(*arguments, **options)


def _logits(record: Record, x: Any) -> Array:
    assert record.head is not None
    return np.asarray(record.head.logits(x), np.float32)


def _labels(record: Record, logits: Array) -> Array:
    assert record.head is not None
    if record.head.task == "classification":
        return np.asarray(logits.argmax(axis=1))
    return np.asarray(logits >= 0)


def _stored_as(x: Any, feature: FeatureSet) -> Any:
    return (rounded(x[0], feature.dtype), x[1]) if isinstance(x, tuple) else rounded(x, feature.dtype)
