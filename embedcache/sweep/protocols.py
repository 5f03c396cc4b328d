"""Protocols of published tables: what each fixes, as a value, and where that comes from.

==============  ==================================================================================================
``mteb``        MTEB's classification tasks: few-shot logistic regressions, scored on the whole test split
``clip``        CLIP's linear probe: logistic regression, its penalty chosen on validation
``dinov2``      DINOv2's logistic regression on frozen features, the same with penalties of its own
``dinov2-knn``  DINOv2's nearest neighbours, votes weighed by similarity
==============  ==================================================================================================

A figure is comparable with a published one when rows are drawn, heads trained and chosen, and scores taken as there.
What a protocol draws, it draws by the place of a row: the cache has to have the rows in the order of the data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from embedcache.errors import SweepError, SweepSpecError
from embedcache.sweep.configuration import DEFAULTS, Asked, Configuration, Protocol
from embedcache.task import CLASSIFICATION
from embedcache.wording import counted, did_you_mean

if TYPE_CHECKING:
    from embedcache.cache import FeatureCache


@dataclass(frozen=True)
class Published:
    """A protocol by name.

    ``source`` is the paper and the code that it follows, ``features`` what its own figures are of, ``heads`` the
    entries of a grid, ``figure`` what the table prints, in words, ``beside`` the metrics that stand beside it.
    ``kept`` are the options of the head that ``best/`` keeps where nothing is chosen; ``differs`` is what is not as
    published. Of what a call can ask for, it takes ``adjustable``.
    """

    name: str
    title: str
    source: str
    features: str
    heads: tuple[Mapping[str, object], ...]
    protocol: Protocol
    figure: str
    metric: str = "accuracy"
    beside: tuple[str, ...] = ()
    kept: Mapping[str, object] = field(default_factory=dict)
    differs: tuple[str, ...] = ()
    adjustable: tuple[str, ...] = ()

    def asked(self, asked: Asked, **others: object) -> Protocol:
        """Return how rows are divided. Raises ``SweepSpecError`` for what a call asks for and the protocol fixes."""
        for name, value in {**others, **vars(asked)}.items():
            if value is not None and value is not False and value != [] and name not in self.adjustable:
                flag = {"grid": "--head or --config", "learning_curve": "--learning-curve", "test_all": "--test-all"}
                raise SweepSpecError(
                    f"--protocol {self.name} and {flag.get(name, f'--{name}')} contradict each other: the protocol "
                    "fixes what is trained on which rows, and how it is chosen and scored; leave one of them out"
                )
        if asked.shots is None:
            return self.protocol
        if asked.shots < 1:
            raise SweepSpecError(f"--shots {asked.shots}: expected at least 1")
        return replace(self.protocol, shots=asked.shots)

    def feature_of(self, cache: FeatureCache, features: Sequence[str]) -> list[str]:
        """Return the one feature set that is measured.

        Raises ``SweepError`` for a cache without labelled rows in train and test, of another task, or with several
        feature sets to take it from.
        """
        if cache.task is not None and cache.task != CLASSIFICATION.name:
            raise SweepError(
                f"--protocol {self.name} is of classification, and {cache.path} is {cache.task}: "
                "sweep it without a protocol"
            )
        for split in ("train", "test"):
            if cache.task is not None and not (split in cache.split_names and (cache.targets(split) >= 0).any()):
                raise SweepError(
                    f"--protocol {self.name} needs a {split} split, and {cache.path} has no labelled row in it: "
                    f"give it one with embedcache relabel {cache.path} INPUT"
                )
        vectors = [name for name, feature in cache.plain_sets.items() if feature.kind == "pooled"]
        names = list(features) or vectors
        if len(names) != 1:
            raise SweepSpecError(
                f"--protocol {self.name} measures one feature set, not {len(names)}: "
                f"name it by --feature, one of {', '.join(vectors)}"
            )
        return names

    def grid(self, cache: FeatureCache, feature: str) -> dict[str, object]:
        """Return the grid as a sweep file has it. Augmented views of pictures are left out."""
        extra = {"views": 0} if cache.views(cache.feature(feature)) else {}
        return {"features": [feature], "heads": [{**head, **extra} for head in self.heads]}

    def is_kept(self, options: Mapping[str, object]) -> bool:
        """Whether ``best/`` keeps the head with these options, where nothing is chosen."""
        return all(options.get(name) == value for name, value in self.kept.items())

    def fixed(self, protocol: Protocol, configurations: Sequence[Configuration]) -> dict[str, str]:
        """Return what is fixed in words, made from the values that run."""
        first = configurations[0]
        kept = "".join(f"; best/ keeps {name}={value}" for name, value in self.kept.items())
        choice = (
            f"nothing is chosen{kept}"
            if protocol.to_test
            else f"highest {self.metric} on the validation rows, of equals the strongest penalty; that head is trained "
            "again on train and validation, and scored on the test split once"
        )
        scaled = "standardised" if first.train.standardize else "not standardised"
        lines = {
            "protocol": f"{self.name}: {self.title}",
            "source": self.source,
            "rows": protocol.text(),
            "heads": _described(configurations),
            "features": f"{first.feature}, {scaled}; published figures are of {self.features}",
            "choice": choice,
            "figure": self.figure,
        }
        if protocol.shots != self.protocol.shots:
            lines["changed"] = f"--shots {protocol.shots}, not {self.protocol.shots}"
        return {**lines, "not as published": "; ".join(self.differs) or "nothing that is known"}


def _described(configurations: Sequence[Configuration]) -> str:
    """Return heads with the settings that are not at their defaults, and the ranges of those that differ."""
    settings = [configuration.flat() for configuration in configurations]
    options = configurations[0].head.options
    parts = []
    for name, value in settings[0].items():
        usual = all(of_head[name] == getattr(DEFAULTS, name, None) for of_head in settings)
        if name in ("head", "engine", "standardize") or (name not in options and usual):
            continue
        values = list(dict.fromkeys(of_head.get(name) for of_head in settings))
        numbers = sorted(number for number in values if isinstance(number, (int, float)))
        if len(values) == 1:
            parts.append(f"{name}={value}")
        elif len(numbers) > 5:
            parts.append(f"{name} in {counted(len(numbers), 'value')} from {numbers[0]:g} to {numbers[-1]:g}")
        else:
            parts.append(f"{name} in {', '.join(map(str, values))}")
    engine = "sklearn:" if settings[0]["engine"] == "sklearn" else ""
    return f"{engine}{settings[0]['head']}, {', '.join(parts)}"


_MTEB = Published(
    "mteb",
    "MTEB classification",
    "Muennighoff et al. 2023, as mteb 2 runs it (abstasks/classification.py: AbsTaskClassification)",
    "what a model gives as the embedding of a text",
    # LogisticRegression(max_iter=100) of scikit-learn, its defaults named, on embeddings as the model gives them.
    ({"head": "logistic-regression", "engine": "sklearn", "C": 1.0, "max_iter": 100, "tol": 1e-4, "dtype": "float32",
      "standardize": False},),
    Protocol(shots=8, draws=10, seed=42, stopping_share=0.0, to_test=True),
    "mean accuracy over the draws with its standard deviation, beside it f1 (macro and weighted) and ap of two classes",
    beside=("f1_macro", "f1_weighted"),
    differs=(
        "f1 leaves out a class that the test split lacks and was predicted",
        "tasks that MTEB draws more rows for need --shots 16 or 32; those with another main score have it beside",
    ),
    adjustable=("shots",),
)  # fmt: skip


def _probe(penalties: Sequence[float]) -> tuple[Mapping[str, object], ...]:
    """Return logistic regression on the features as they are, at each of the penalties on the sum of losses."""
    return ({"head": "linear", "solver": "convex", "l2": list(penalties), "standardize": False},)


_AT_THE_OPTIMUM = "every penalty is solved to its optimum, where the published solver stops after 1,000 iterations"
_TWINS = "a train row with the content of a validation row is left out while the penalty is chosen"

_CLIP = Published(
    "clip",
    "CLIP's linear probe",
    "Radford et al. 2021, appendix A.3: logistic regression by L-BFGS of scikit-learn",
    "the image encoder's output before its projection",
    _probe([10 ** (step / 8) for step in range(-48, 49)]),  # 96 logarithmic steps from 1e-6 to 1e6, 8 a decade
    Protocol(folds=1, held_out=0.1, stopping_share=0.0),
    "accuracy on the test split; beside it balanced_accuracy, the mean over classes, which some data sets have there",
    beside=("balanced_accuracy",),
    differs=(
        "the paper searches around a peak and tries 15 of the 97 penalties: here all are tried, and the best of them "
        "is at least as good on validation",
        _AT_THE_OPTIMUM,
        "the paper does not say which share of train it holds out where there is no validation split: a tenth here",
        _TWINS,
    ),
)

_DINOV2 = Published(
    "dinov2",
    "DINOv2's logistic regression",
    "Oquab et al. 2023, as its eval/log_regression.py runs it",
    "the class token of the last layer",
    _probe([10 ** (6 - step / 4) for step in range(45)]),  # C, which is 1 / l2, in 45 values from 1e-6 to 1e5
    Protocol(folds=1, held_out=0.1, stopping_share=0.0),
    "top-1 accuracy on the test split; beside it balanced_accuracy, the mean over classes",
    beside=("balanced_accuracy",),
    differs=(
        _AT_THE_OPTIMUM,
        _TWINS,
        "its nearest neighbours are the protocol dinov2-knn; its linear evaluation (SGD over learning rates, last "
        "blocks and average pooling) is none",
    ),
)

_DINOV2_KNN = Published(
    "dinov2-knn",
    "DINOv2's nearest neighbours",
    "Oquab et al. 2023, as its eval/knn.py runs it",
    "the class token of the last layer",
    ({"head": "knn", "engine": "sklearn", "n_neighbors": [10, 20, 100, 200], "weights": "softmax", "temperature": 0.07,
      "metric": "cosine", "standardize": False},),
    Protocol(folds=1, stopping_share=0.0, to_test=True),
    "top-1 accuracy on the test split for each number of neighbours, of which its code says that 20 usually is best",
    beside=("balanced_accuracy",),
    kept={"n_neighbors": 20},
    differs=("similarities are exact, in float64, where its are products in float32 under mixed precision",),
)  # fmt: skip

PUBLISHED: Mapping[str, Published] = {protocol.name: protocol for protocol in (_MTEB, _CLIP, _DINOV2, _DINOV2_KNN)}
"""Every protocol by its name."""


def published_named(name: str) -> Published:
    """Return a protocol. Raises ``SweepSpecError`` for an unknown one."""
    if name not in PUBLISHED:
        raise SweepSpecError(
            f"there is no protocol {name!r}{did_you_mean(name, PUBLISHED)}: expected {', '.join(PUBLISHED)}"
        )
    return PUBLISHED[name]
