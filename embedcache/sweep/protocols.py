"""Protocols of published tables: what each fixes, as a value, and where that comes from.

=================  ===============================================================================================
``mteb``           MTEB's classification tasks: few-shot logistic regressions, scored on the whole test split
``clip``           CLIP's linear probe: logistic regression, its penalty chosen on validation
``dinov2``         DINOv2's logistic regression on frozen features, the same with penalties of its own
``dinov2-knn``     DINOv2's nearest neighbours, votes weighed by similarity
``dinov2-linear``  DINOv2's linear evaluation: SGD at 13 learning rates on the last blocks, with a mean and without
=================  ===============================================================================================

A figure is comparable with a published one when rows are drawn, heads trained and chosen, and scores taken as there.
What a protocol draws, it draws by the place of a row: the cache has to have the rows in the order of the data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from embedcache.errors import SpecError, SweepError, SweepSpecError
from embedcache.spec import FeatureSpec, feature_name, find_name
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
    published. Of what a call can ask for, it takes ``adjustable``. ``equal`` says which of equal heads is chosen.

    It measures one vector a row, or ``blocks`` of the last ones, each the class token with the mean of the patches
    behind it. ``augmented`` protocols train on the views of pictures that the cache has.
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
    equal: str = "the strongest penalty"
    blocks: int = 0
    augmented: bool = False

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

        Raises ``SweepError`` for a cache without labelled rows in train and test, of another task or content, or
        without the blocks that are measured; ``SweepSpecError`` for several feature sets to take it from.
        """
        if cache.task is not None and cache.task != CLASSIFICATION.name:
            raise SweepError(
                f"--protocol {self.name} is of classification, and {cache.path} is {cache.task}: "
                "sweep it without a protocol"
            )
        if self.blocks and cache.spec.content == "text":
            raise SweepError(
                f"--protocol {self.name} is of pictures, and {cache.path} is of texts: sweep it by --protocol mteb, or "
                "without a protocol"
            )
        for split in ("train", "test"):
            if cache.task is not None and not (split in cache.split_names and (cache.targets(split) >= 0).any()):
                raise SweepError(
                    f"--protocol {self.name} needs a {split} split, and {cache.path} has no labelled row in it: "
                    f"give it one with embedcache relabel {cache.path} INPUT"
                )
        sets = cache.plain_sets
        vectors = [
            name for name, feature in sets.items()
            if (_ends_with(name, self.blocks) if self.blocks else feature.kind == "pooled")
        ]  # fmt: skip
        names = list(features) or vectors
        if self.blocks and (not names or any(find_name(name, vectors, feature_name) is None for name in names)):
            raise SweepError(
                f"--protocol {self.name} reads class tokens and means of the last {self.blocks} blocks behind the last "
                f"norm, which are not in {', '.join(features or sets)}: make a cache of them with embedcache extract "
                f"INPUT --pooling norm:cls+mean@-{self.blocks}..-1"
            )
        if len(names) != 1:
            raise SweepSpecError(
                f"--protocol {self.name} measures one feature set, not {len(names)}: "
                f"name it by --feature, one of {', '.join(vectors)}"
            )
        return names

    def grid(self, cache: FeatureCache, feature: str) -> dict[str, object]:
        """Return the grid as a sweep file has it, without augmented views of pictures unless they are trained on."""
        extra = {"views": 0} if cache.views(cache.feature(feature)) and not self.augmented else {}
        return {"features": [feature], "heads": [{**head, **extra} for head in self.heads]}

    def is_kept(self, options: Mapping[str, object]) -> bool:
        """Whether ``best/`` keeps the head with these options, where nothing is chosen."""
        return all(options.get(name) == value for name, value in self.kept.items())

    def fixed(self, cache: FeatureCache, protocol: Protocol, configurations: Sequence[Configuration]) -> dict[str, str]:
        """Return what is fixed in words, made from the values that run."""
        first = configurations[0]
        views = len(cache.views(cache.feature(first.feature))) if self.augmented else 0
        kept = "".join(f"; best/ keeps {name}={value}" for name, value in self.kept.items())
        choice = (
            f"nothing is chosen{kept}"
            if protocol.to_test
            else f"highest {self.metric} on the validation rows, of equals {self.equal}; that head"
            f"{' is trained again on train and validation, and' if protocol.refit else ', as it is, is'} "
            "scored on the test split once"
        )
        scaled = "standardised" if first.train.standardize else "not standardised"
        trained = f", in training of the plain picture or {counted(views, 'view')}" if views else ""
        lines = {
            "protocol": f"{self.name}: {self.title}",
            "source": self.source,
            "rows": protocol.text(),
            "heads": _described(configurations, self.heads[0]),
            "features": f"{first.feature}, {scaled}{trained}; published figures are of {self.features}",
            "choice": choice,
            "figure": self.figure,
        }
        if protocol.shots != self.protocol.shots:
            lines["changed"] = f"--shots {protocol.shots}, not {self.protocol.shots}"
        return {**lines, "not as published": "; ".join(self.differs) or "nothing that is known"}


def _ends_with(name: str, blocks: int) -> bool:
    """Whether a feature set ends with class tokens and means of the last blocks, behind the final norm."""
    try:
        spec = FeatureSpec.parse(name)
    except SpecError:  # features that were made elsewhere have names of their own
        return False
    last = tuple(range(-blocks, 0))
    wanted = spec.pooling == "cls+mean" and spec.final_norm and not spec.normalize
    return wanted and (spec.layers or last)[-blocks:] == last


def _described(configurations: Sequence[Configuration], written: Mapping[str, object]) -> str:
    """Return heads with the settings that are written or not at their defaults, and the ranges of those that differ."""
    settings = [configuration.flat() for configuration in configurations]
    options = configurations[0].head.options
    parts = []
    for name, value in settings[0].items():
        usual = all(of_head[name] == getattr(DEFAULTS, name, None) for of_head in settings)
        if name in ("head", "engine", "standardize", "shuffle_seed"):
            continue
        if name not in options and name not in written and usual:
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
        "its nearest neighbours are the protocol dinov2-knn, its linear evaluation (SGD over learning rates, last "
        "blocks and average pooling) is dinov2-linear",
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

_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
_BATCH = 128 * 8  # rows on 8 GPUs, to which rates are scaled from 256

_DINOV2_LINEAR = Published(
    "dinov2-linear",
    "DINOv2's linear evaluation",
    "Oquab et al. 2023, as its eval/linear.py runs it",
    "the class tokens of the last block and of the last four, with and without the mean of the last block's patches",
    # SGD without weight decay, a cosine to 0 over 10 "epochs" of 1,250 steps, however many rows there are.
    ({"head": "layer-concat", "layers": [1, 4], "mean": ["none", "last"], "optimizer": "sgd", "momentum": 0.9,
      "learning_rate": [rate * _BATCH / 256 for rate in _RATES], "weight_decay": 0.0, "schedule": "cosine",
      "warmup": 0.0, "clip": 0.0, "batch_size": _BATCH, "epochs": 1, "min_steps": 12_500, "patience": 0,
      "standardize": False},),
    Protocol(folds=1, held_out=0.1, stopping_share=0.0, refit=False),
    "top-1 accuracy of the chosen head on the test split; beside it balanced_accuracy, the mean over classes",
    beside=("balanced_accuracy",),
    differs=(
        "its figure of ImageNet is the best head's on the rows that it is chosen by: here the test split has others",
        "it crops and flips each picture anew in every epoch: here it is one of the cache's views or the plain picture "
        "(extract --views), and where there are none the plain one",
        "epochs are whole, so that there may be more than 12,500 steps, and the last batch of each is smaller",
        "a train row with the content of a validation row is left out",
    ),
    equal="that with fewest inputs and then the lowest learning rate",
    blocks=4,
    augmented=True,
)  # fmt: skip

PUBLISHED: Mapping[str, Published] = {
    protocol.name: protocol for protocol in (_MTEB, _CLIP, _DINOV2, _DINOV2_KNN, _DINOV2_LINEAR)
}
"""Every protocol by its name."""


def published_named(name: str) -> Published:
    """Return a protocol. Raises ``SweepSpecError`` for an unknown one."""
    if name not in PUBLISHED:
        raise SweepSpecError(
            f"there is no protocol {name!r}{did_you_mean(name, PUBLISHED)}: expected {', '.join(PUBLISHED)}"
        )
    return PUBLISHED[name]
