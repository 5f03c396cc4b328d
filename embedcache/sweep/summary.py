"""``summary.json``: everything a sweep found, in one file; with ``results.jsonl`` it is all that a report reads.

The fields of these types are the keys of the file, in their order. It is strict JSON: no NaN, and null for a number
that does not exist. *score* always means the sweep's metric, in its own direction (``metric.greater_is_better``).
Splits have the names that the cache has; *development rows* are all rows of train and validation, in the order of
the cache. Keys of version 1 stay; new ones may be added.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from embedcache.decoding import from_json
from embedcache.errors import SweepError
from embedcache.fingerprint import read_json
from embedcache.journal import explained

FORMAT, VERSION = "embedcache-sweep", 1
SUMMARY = "summary.json"
Interval = tuple[float, float]


@dataclass(frozen=True)
class Metric:
    """What heads are compared by."""

    name: str
    greater_is_better: bool


@dataclass(frozen=True)
class FeatureSetFacts:
    """A feature set of the cache; ``kind`` is "pooled", "layers" or "tokens"."""

    name: str
    kind: str
    dim: int
    layers: int


@dataclass(frozen=True)
class DataFacts:
    """What was swept over.

    ``name`` is that of the cache's folder, ``rows`` counts by split, ``classes`` by class and split (None unless it is
    a classification). ``unique_rows`` counts different contents among the ``development_rows``.
    """

    name: str
    model: str | None
    rows: Mapping[str, int]
    development_rows: int
    unique_rows: int
    feature_sets: tuple[FeatureSetFacts, ...]
    classes: Mapping[str, Mapping[str, int]] | None


@dataclass(frozen=True)
class ProtocolFacts:
    """How heads were compared; ``text`` is one sentence for people.

    ``kind`` is "folds", "split", "shots", or "test" where a published protocol scores heads on the test split.
    """

    kind: str
    folds: int | None
    repeats: int | None
    shots: int | None
    draws: int | None
    seed: int
    stopping_share: float
    alpha: float
    text: str


@dataclass(frozen=True)
class HeadFacts:
    """The head of a row."""

    kind: str
    engine: str
    options: Mapping[str, object]


@dataclass(frozen=True)
class Difference:
    """A score less the winner's, paired on the same rows; the winner's own is 0 and (0, 0)."""

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class TestScore:
    """What was measured on the test split."""

    __test__ = False  # not a test of pytest's

    score: float
    interval: Interval | None
    rows: int


@dataclass(frozen=True)
class LeaderboardRow:
    """One candidate: a configuration whatever its seed, for seeds are repetitions and nobody may choose the lucky one.

    ``score`` is the mean over folds of the mean over seeds, ``sd`` the standard deviation over folds (None for one),
    ``fold_scores`` the means over seeds.

    ``pooling``, ``layers`` ("all", "-1" or "1+3") and ``normalize`` are the parts of ``feature``; the name itself,
    None and False where it does not parse. ``train`` has the fields of ``TrainSpec`` that this kind of head reads,
    except the seed. ``varied`` has the settings that differ within the sweep, head options too.

    ``interval`` is at 1 - alpha; ``interval_method`` says how: "nadeau-bengio" (corrected resampled t), "bootstrap"
    (over rows) or "wilson" (all or no rows right). ``p`` is of the paired test against the winner (``test_method``:
    "mcnemar-exact" or "paired-bootstrap"), ``p_adjusted`` with Holm's correction, ``p_folds`` by the corrected
    resampled t over folds, for comparison; all None for the winner. Not ``distinguishable`` means that the data cannot
    tell it from the winner.

    ``parameters`` counts the numbers in the trained head (for kNN the rows it keeps), ``seconds`` the training of all
    folds and seeds (a head's share of the stack it was trained in), ``epochs`` is their mean.
    """

    rank: int
    id: str
    label: str
    feature: str
    pooling: str
    layers: str | None
    normalize: bool
    head: HeadFacts
    train: Mapping[str, object]
    varied: Mapping[str, object]
    seeds: tuple[int, ...]
    score: float
    sd: float | None
    interval: Interval | None
    interval_method: str
    fold_scores: tuple[float, ...]
    difference: Difference
    p: float | None
    p_adjusted: float | None
    p_folds: float | None
    test_method: str | None
    distinguishable: bool
    parameters: int
    seconds: float
    epochs: float | None
    looked_at_test: bool = False
    test: TestScore | None = None


@dataclass(frozen=True)
class Failure:
    """A configuration that could not be trained; it is not in the leaderboard."""

    id: str
    label: str
    error: str


@dataclass(frozen=True)
class Choice:
    """A row of the leaderboard that was chosen or is recommended, and why."""

    id: str
    label: str
    why: str


@dataclass(frozen=True)
class Confusion:
    """Counts of rows [C, C], truth down and prediction across; ``normalized`` has each true row sum to 1."""

    labels: tuple[str, ...]
    matrix: tuple[tuple[int, ...], ...]
    normalized: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        size = len(self.labels)
        for square in (self.matrix, self.normalized):
            if len(square) != size or any(len(line) != size for line in square):
                raise ValueError(f"not a square of {size} classes")


@dataclass(frozen=True)
class Bin:
    """One bin of a calibration curve."""

    low: float
    high: float
    confidence: float | None
    accuracy: float | None
    rows: int


@dataclass(frozen=True)
class Calibration:
    """The expected calibration error and its bins.

    Confidence is that of the predicted class; for multilabel the probability of a label, and accuracy how often it
    holds.
    """

    ece: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Measured:
    """Everything that is measured on some rows.

    ``metrics`` has scalars of every metric, and more. ``per_class`` has {class, rows, precision, recall, f1} each, for
    regression {target, rows, mae, rmse, r2}. ``confusion`` is for classification alone, ``calibration`` not for
    regression, and ``points`` for regression alone: (true, predicted) of at most 2,000 rows by target.
    """

    metrics: Mapping[str, object]
    confusion: Confusion | None
    per_class: tuple[Mapping[str, object], ...]
    calibration: Calibration | None
    points: Mapping[str, tuple[Interval, ...]] | None

    def __post_init__(self) -> None:
        if len({tuple(row) for row in self.per_class}) > 1:
            raise ValueError("rows by class with different columns")


@dataclass(frozen=True)
class _ChosenOnTest:
    id: str
    label: str
    split: str
    rows: int
    score: float
    interval: Interval | None
    interval_method: str
    trained_on: int


@dataclass(frozen=True)
class TestResult(Measured, _ChosenOnTest):
    """The chosen head on the test split, trained on the development rows (``trained_on`` counts them)."""

    __test__ = False


@dataclass(frozen=True)
class Mistake:
    """A wrong row: ``row`` is its number in the cache, ``id`` its id.

    ``true`` and ``predicted`` are names, lists of names (multilabel) or numbers by target (regression).
    ``probability`` is that of the predicted class, or of the most wrongly decided label; ``error`` the largest absolute
    error over targets in units of that target's spread (regression). ``text`` (at most 2,000 characters) or ``image``
    (a data: URI of a picture of at most 96 x 96) is the row's content where the cache kept its inputs.
    """

    row: int
    id: object
    true: object
    predicted: object
    probability: float | None
    error: float | None
    text: str | None
    image: str | None


@dataclass(frozen=True)
class Mistakes:
    """The most confident of ``rows`` mistakes; on the test split, else out of fold on the development rows."""

    split: str
    rows: int
    shown: tuple[Mistake, ...]


@dataclass(frozen=True)
class CurvePoint:
    """A head trained on ``rows`` rows of each fold."""

    rows: int
    score: float
    sd: float | None
    interval: Interval | None
    scores: tuple[float, ...]


@dataclass(frozen=True)
class LearningCurve:
    """A head trained on ever more rows."""

    id: str
    label: str
    points: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class FewShot:
    """The chosen head on the test split, once for each draw."""

    shots: int
    draws: int
    scores: tuple[float, ...]
    score: float
    sd: float | None


@dataclass(frozen=True)
class Figure:
    """What a published table prints of a head: ``score`` on ``rows`` of the test split.

    ``scores`` are those of the draws, ``score`` their mean and ``sd`` their standard deviation (None for one);
    ``beside`` has the means of other metrics.
    """

    label: str
    score: float
    sd: float | None
    scores: tuple[float, ...]
    interval: Interval | None
    rows: int
    beside: Mapping[str, float | None]


@dataclass(frozen=True)
class PublishedFacts:
    """The protocol of a published table: its name, what it fixed in words, and its figures, none before the end."""

    name: str
    fixed: Mapping[str, str]
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Ran:
    """What was run: versions by package, hashes, times in ISO 8601 UTC; ``state`` hashes what was concluded from."""

    command: str | None
    versions: Mapping[str, str]
    cache_spec: str
    dataset: str
    sweep: str
    configurations: int
    fits: int
    started: str
    finished: str
    seconds: float
    machine: Mapping[str, object]
    state: str | None = field(default=None, metadata={"omitted": True})


@dataclass(frozen=True)
class Summary:
    """What a sweep found.

    Not ``complete`` while the sweep runs and after it was interrupted: what follows is then a part. ``class_names``
    are those of the targets for regression. ``baseline`` is the best score of a majority head among those tried.
    ``leaderboard`` is best first. ``chosen`` is the winner, or the simplest of those not distinguishable from it where
    that was asked for, and best/ holds it; ``recommended`` is that simplest. ``notes`` are for people.
    ``published`` is there where the protocol of a published table was named.
    """

    format: str
    version: int
    complete: bool
    task: str
    class_names: tuple[str, ...]
    metric: Metric
    baseline: float | None
    data: DataFacts
    protocol: ProtocolFacts
    leaderboard: tuple[LeaderboardRow, ...]
    failures: tuple[Failure, ...]
    chosen: Choice | None
    recommended: Choice | None
    test: TestResult | None
    mistakes: Mistakes | None
    learning_curve: tuple[LearningCurve, ...]
    few_shot: FewShot | None
    ran: Ran
    notes: tuple[str, ...]
    published: PublishedFacts | None = field(default=None, metadata={"omitted": True})

    @property
    def kept_as(self) -> str:
        """What the head in ``best/`` is: ``chosen``, or ``kept`` where heads are scored on test and none is chosen."""
        return "kept" if self.protocol.kind == "test" else "chosen"

    @property
    def group(self) -> list[LeaderboardRow]:
        """The rows that the data cannot tell from the winner, the winner too."""
        return [row for row in self.leaderboard if not row.distinguishable]


def defined(rows: Sequence[LeaderboardRow]) -> list[LeaderboardRow]:
    """Return the rows whose score exists: a metric may not be defined on some fold."""
    return [row for row in rows if math.isfinite(row.score)]


def read_summary(folder: Path) -> tuple[Summary, dict[str, object]]:
    """Read and check a folder's ``summary.json``; return it also as it is in the file.

    Raises ``SweepError`` saying what is missing or damaged, and how to get it.
    """
    path = folder / SUMMARY
    with explained(f"cannot read {folder}", SweepError):
        if not path.is_file():
            if not folder.is_dir():
                raise SweepError(f"{folder} is not there: make a sweep with embedcache sweep CACHE -o {folder}")
            if (folder / "sweep.json").is_file():
                raise SweepError(f"{folder} has no results yet: run the same sweep command again to go on")
            raise SweepError(f"{folder} is not a sweep's folder: make one with embedcache sweep CACHE -o SWEEP")
    try:
        value = read_json(path, largest=256 << 20, most=8_000_000)
    except (ValueError, OSError) as error:
        raise SweepError(f"{path} is damaged ({str(error)[:120]}): run the same sweep command again") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise SweepError(f"{path} is not the summary of a sweep: run the sweep command again")
    if value.get("version") != VERSION:
        raise SweepError(
            f"{path} has version {value.get('version')}, this embedcache reads {VERSION}: upgrade embedcache"
        )
    try:
        return from_json(Summary, value), value
    except ValueError as error:
        raise SweepError(f"{path} is damaged ({error}): run the same sweep command again") from None


def dumps(value: object) -> str:
    """Return JSON values as a file of the folder holds them."""
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
