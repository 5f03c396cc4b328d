"""The facts of a trained head as a value, and the model card made from them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

from embedcache.fingerprint import is_number
from embedcache.numerics import Probe
from embedcache.shard import FeatureSet
from embedcache.spec import ExtractionSpec, HeadSpec, TaskName
from embedcache.task import REGRESSION, Array, task_named
from embedcache.version import __version__
from embedcache.wording import markdown_table

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator


class Calibration(TypedDict, total=False):
    """How a head is calibrated: a temperature for a classification, a threshold for each label of multi-label."""

    temperature: float
    thresholds: Sequence[float]


@dataclass(frozen=True, eq=False)
class HeadRecord:
    """The fields of a trained head. ``TrainedHead`` documents each, and adds the methods that run the head."""

    spec: HeadSpec
    task: TaskName
    class_names: tuple[str, ...]
    feature: FeatureSet
    state: Mapping[str, Array] = field(default_factory=dict)
    estimator: BaseEstimator | None = None
    extraction: ExtractionSpec = field(default_factory=ExtractionSpec)
    model: str | None = None
    revision: str | None = None
    probe: Probe | None = None
    calibration: Calibration = field(default_factory=Calibration)
    training: Mapping[str, object] = field(default_factory=dict)

    @property
    def linear(self) -> bool:
        """Whether it is one matrix: ``output.weight`` [C, D] and ``output.bias`` [C]."""
        return bool(self.state) and not self.votes and (self.spec.engine == "sklearn" or self.spec.kind == "linear")

    @property
    def votes(self) -> bool:
        """Whether it is training rows, of which the nearest vote; see ``neighbours``."""
        return bool(self.state) and (self.spec.engine, self.spec.kind) == ("sklearn", "knn")

    @property
    def parameters(self) -> int:
        """How many numbers it keeps, standardisation aside; 0 for an estimator that is not linear."""
        return sum(int(value.size) for name, value in self.state.items() if not name.endswith((".mean", ".scale")))

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The probability of each label at which a multi-label head assigns it."""
        return tuple(self.calibration.get("thresholds", (0.5,) * len(self.class_names)))


# The model card of a head bundle.


_MOST = 20
"""Classes that are listed; nobody reads a hundred rows of a card."""


def model_card(head: HeadRecord, metrics: Mapping[str, object], facts: Mapping[str, object]) -> str:
    """Return the card as Markdown: what it is, what it was trained on, how good it is, how to use it.

    Whatever comes from data, class names above all, is escaped: it can neither break a table nor become a link.
    """
    origin = head.extraction.origin
    known = head.model or _mapping(head.extraction.get("backbone")).get("architecture")
    backbone = (origin.to_text() if origin is not None else known) or "unknown"
    kind = plain(head.spec.kind)
    options = ", ".join(f"{name}={json.dumps(value)}" for name, value in head.spec.options.items()) or "defaults"
    names = [plain(name) for name in head.class_names]
    shown = ", ".join(names[:_MOST]) + (" ..." if len(names) > _MOST else "")
    lines = [
        *_metadata(head, metrics, f"{head.spec.kind} head on {backbone}"),
        "",
        f"# {kind} head on {plain(backbone)}",
        "",
        f"A {kind} head ({head.spec.engine}; {plain(options)}) on the features of a frozen backbone.",
        "",
        "| | |",
        "|---|---|",
        f"| task | {head.task} |",
        f"| {task_named(head.task).outputs_are} | {len(names)}: {shown} |",
        f"| backbone | {plain(backbone)}{f' @ {plain(head.revision)}' if head.revision else ''}, frozen |",
        f"| features | {plain(head.feature.name)} ({head.feature.kind}, {head.feature.dim} wide) |",
        f"| parameters | {_parameters(head)} |" if head.state else "| parameters | a scikit-learn estimator |",
    ]
    if head.calibration:
        lines.append(f"| calibration | {plain(_calibration(head))} |")
    lines += [f"| {plain(name)} | {plain(value)} |" for name, value in facts.items()]
    settings = [f"{name} {json.dumps(value)}" for name, value in head.training.items() if value is not None]
    lines += ["", "## Training", "", f"{plain(', '.join(settings) or 'unknown')}."]
    splits = {plain(split): values for split, values in metrics.items() if isinstance(values, Mapping)}
    if splits:
        lines += ["", "## Metrics", "", *_metrics(splits)]
    lines += ["", "## Use", "", "```python", *_use(head), "```", ""]
    if head.extraction.has_backbone:
        lines += ["```", predict_command(head), "```", ""]
    lines += [
        "The head is only good for the features of the very backbone, preparation and settings in `config.json`;",
        "loading checks that.",
        "",
        f"Written by embedcache {__version__}.",
        "",
    ]
    return "\n".join(lines)


def _parameters(head: HeadRecord) -> str:
    return "the training rows" if head.votes else f"{head.parameters:,}"


_METRICS = {
    "accuracy": ("accuracy", "Accuracy"),
    "subset_accuracy": ("accuracy", "Accuracy of whole rows"),
    "f1_macro": ("f1", "F1, mean over classes"),
    "roc_auc": ("roc_auc", "ROC AUC"),
    "mcc": ("matthews_correlation", "Matthews correlation"),
    "mae": ("mae", "Mean absolute error"),
    "rmse": ("rmse", "Root of the mean squared error"),
    "r2": ("r_squared", "R squared"),
    "spearman": ("spearmanr", "Spearman correlation"),
}
"""What the hub calls those of our metrics that it knows, and how they are shown there."""


def _metadata(head: HeadRecord, metrics: Mapping[str, object], name: str) -> Iterator[str]:
    """Yield the lines of the card that the hub reads: YAML, every text from data of which is written as JSON."""
    form = "regression" if head.task == REGRESSION.name else "classification"
    tag = {"text": "text-classification", "image": "image-classification"}.get(
        head.extraction.content or "", f"tabular-{form}"
    )
    yield from ("---", "library_name: embedcache", f"pipeline_tag: {tag}")
    if (base := base_model(head)) is not None:
        yield f"base_model: {base}"
    yield f"tags: [embedcache, frozen-backbone, {head.task}]"
    results = []
    for split, values in metrics.items():
        known = [
            {"type": kind, "value": value, "name": shown}
            for metric, (kind, shown) in _METRICS.items()
            if split != "train" and is_number(value := _mapping(values).get(metric))
        ]
        if known:  # which data set it was is not recorded; its name and type may not be absent
            dataset = {"name": "the cached rows", "type": "unknown", "split": _on_one_line(split)}
            results.append({"task": {"type": tag}, "dataset": dataset, "metrics": known})
    if results:
        index = [{"name": _on_one_line(name), "results": results}]
        yield f"model-index: {json.dumps(index, ensure_ascii=False)}"
    yield "---"


def base_model(head: HeadRecord) -> str | None:
    """Return the backbone's name on the hub, None for one that is a folder, or trained with the head."""
    if head.model == "all-MiniLM-L6-v2":  # the packaged one
        return "sentence-transformers/all-MiniLM-L6-v2"
    # Only what is from the hub has a revision: a folder may be called like somebody's model.
    named = head.revision is not None and re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", head.model or "", re.ASCII)
    return head.model if named else None


def _calibration(head: HeadRecord) -> str:
    if "temperature" in head.calibration:
        return f"temperature {head.calibration['temperature']:.4g}"
    return "thresholds " + ", ".join(f"{threshold:.3g}" for threshold in head.thresholds[:_MOST])


def predict_command(head: HeadRecord) -> str:
    """Return a command that predicts with a head that has a backbone, saved in the folder ``RUN``."""
    if head.extraction.content == "image":
        return "embedcache predict RUN picture.jpg"
    return 'embedcache predict RUN --text "..."'


def _use(head: HeadRecord) -> list[str]:
    if head.extraction.has_backbone:
        row = "picture.jpg" if head.extraction.content == "image" else "a text"
        return ["from embedcache import Predictor", "", f'Predictor.load("RUN")(["{row}"])']
    if (origin := head.extraction.origin) is not None and origin.kind == "encoder":
        return ["from embedcache import Predictor", "", f'Predictor.load("RUN", encoder=...)([{origin.content}])']
    return ["from embedcache import TrainedHead", "", 'TrainedHead.from_pretrained("RUN").predict(features)']


def _metrics(splits: Mapping[str, Mapping[str, object]]) -> Iterator[str]:
    names = dict.fromkeys(
        name for values in splits.values() for name, value in values.items() if is_number(value) or value is None
    )
    cells = [[plain(name), *(_number(values.get(name)) for values in splits.values())] for name in names]
    yield from markdown_table(["metric", *splits], cells, range(1, len(splits) + 1))
    for split, values in splits.items():
        for name, bounds in _mapping(values.get("intervals")).items():
            low, high = (_number(bound) for bound in _list(bounds))
            chosen = "; these rows chose the epoch and the calibration too" if split == "validation" else ""
            yield f"\n{split} {plain(name)}: {low} to {high} (95 % interval, over rows{chosen})."
        if missing := _list(values.get("missing_classes")):
            yield f"\nNot in {split}: {', '.join(plain(name) for name in missing[:_MOST])}."
    last, values = list(splits.items())[-1]
    for what in ("per_class", "per_target"):
        rows = [_mapping(row) for row in _list(values.get(what))]
        if rows:
            yield from _table(f"By {what[4:]}, on {last}:", rows)


def _table(title: str, rows: Sequence[Mapping[str, object]]) -> Iterator[str]:
    columns = list(rows[0])
    yield f"\n{title}\n"
    cells = [[plain(row[columns[0]]), *(_number(row[name]) for name in columns[1:])] for row in rows[:_MOST]]
    yield from markdown_table(columns, cells, range(1, len(columns)))
    if len(rows) > _MOST:
        yield f"\n{len(rows) - _MOST} more are in `metrics.json`."


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> Sequence[object]:
    return value if isinstance(value, (list, tuple)) else ()


def _number(value: object) -> str:
    if not is_number(value):
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _on_one_line(value: object) -> str:
    return " ".join("".join(sign if sign.isprintable() or sign.isspace() else "\ufffd" for sign in str(value)).split())


def plain(value: object) -> str:
    """Return a text from data on one line, harmless in Markdown: no table, link, HTML, formula or mention in it."""
    text = _on_one_line(value)
    for mark in "\\|<>`[]*_~$&#!@":
        text = text.replace(mark, "\\" + mark)
    return text.replace("://", ":\\//").replace("www.", "www\\.")
