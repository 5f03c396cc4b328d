"""A short way in: heads by width and number of classes, and a pipeline from texts and labels to predictions.

The heads are those of the registry: what is built here can also be trained on a cache.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from embedcache.arguments import checks_arguments
from embedcache.backbone import compute_features
from embedcache.dataset import Contents
from embedcache.errors import FeatureError, InputError, SpecError
from embedcache.examples import examples_of
from embedcache.features import InMemory
from embedcache.finetune.live import TunedModel, fine_tune
from embedcache.finetune.model import FeatureBasedModel, live_head
from embedcache.heads import TrainedHead
from embedcache.heads.attention import SelfAttention
from embedcache.heads.modules import MLP, Linear, ResidualMLP
from embedcache.shard import FeatureSet, Kind
from embedcache.spec import FINE_TUNING, ExtractionSpec, TrainSpec
from embedcache.task import Floats
from embedcache.train import TrainingResult, train_head
from embedcache.wording import shortened

# The heads by width and number of classes, for models put together by hand.


class LinearClassifier(Linear):
    """One matrix: features [B, D] -> logits [B, C].

    Example::

        head = LinearClassifier(384, num_classes=3)
    """

    @checks_arguments()
    def __init__(self, input_dim: int, num_classes: int, *, seed: int = 0) -> None:
        super().__init__(_features(input_dim), _classes(num_classes))
        self.initialize(seed)


class MLPClassifier(MLP):
    """One hidden layer with dropout: features [B, D] -> logits [B, C]; ``MLP`` has more of them."""

    @checks_arguments()
    def __init__(
        self, input_dim: int, hidden_dim: int, num_classes: int, dropout: float = 0.1, *, seed: int = 0
    ) -> None:
        super().__init__(_features(input_dim), _classes(num_classes), hidden=(hidden_dim,), dropout=dropout)
        self.initialize(seed)


class ResidualClassifier(ResidualMLP):
    """Pre-norm residual blocks of width ``hidden_dim``: features [B, D] -> logits [B, C]."""

    @checks_arguments()
    def __init__(
        self,
        input_dim: int,
        num_classes: int,
        hidden_dim: int = 256,
        num_blocks: int = 2,
        dropout: float = 0.1,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(
            _features(input_dim), _classes(num_classes), width=hidden_dim, depth=num_blocks, dropout=dropout
        )
        self.initialize(seed)


class AttentionClassifier(SelfAttention):
    """Self-attention over tokens, then their mean: [B, T, D] and mask [B, T] -> logits [B, C].

    The mask is 1 or True for real tokens and 0 or False for padding, as tokenizers return it; None for no padding.
    ``num_heads`` must divide the width of the attention, which is at most 256; None takes the largest of 8, 4, 2 and 1
    that does.
    """

    @checks_arguments()
    def __init__(
        self, input_dim: int, num_classes: int, num_heads: int | None = None, dropout: float = 0.1, *, seed: int = 0
    ) -> None:
        super().__init__(_features(input_dim, "tokens"), _classes(num_classes), heads=num_heads, dropout=dropout)
        self.initialize(seed)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, T, D], mask [B, T] -> [B, C]. Raises ``FeatureError`` for one vector a row, or a mask that misfits."""
        if x.dim() != 3:
            raise FeatureError(
                f"attention reads a sequence a row, [B, T, {self.dim}], and got {list(x.shape)}: "
                "give it the features of tokens, or use MLPClassifier"
            )
        if mask is not None and mask.shape != x.shape[:2]:
            raise FeatureError(f"the mask is {list(mask.shape)}: expected {list(x.shape[:2])}, one value a token")
        return super().forward(x, None if mask is None else mask.bool())


def _features(input_dim: int, kind: Kind = "pooled") -> FeatureSet:
    return FeatureSet("features", kind, input_dim, 1, "float32")


def _classes(num_classes: int) -> int:
    if not isinstance(num_classes, int) or num_classes < 1:
        raise SpecError(f"num_classes is {num_classes!r}: expected a whole number of at least 1")
    return num_classes


Labels = npt.NDArray[np.int64]
Rows = Sequence[object]


@dataclass(frozen=True, eq=False)
class _Labelled:
    """Contents and their labels, with their features where the backbone is frozen."""

    contents: Contents
    labels: Labels
    features: InMemory | None


class _ClassificationPipeline:
    """What the pipelines share; ``_kind`` is what their rows are.

    A frozen backbone is run once, by ``_prepare``. With ``freeze_backbone=False``, ``train`` trains the backbone too.

    """

    _kind: str

    @checks_arguments(FeatureBasedModel.from_pretrained)
    def __init__(
        self,
        model_name: Path | str | None = None,
        num_classes: int = 3,
        *,
        head: str = "linear",
        freeze_backbone: bool = True,
        seed: int = 0,
        head_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        given = dict(head_options or {})
        self.model = FeatureBasedModel.from_pretrained(
            model_name, num_classes, head, freeze_backbone, seed=seed, content=self._kind, **options, **given
        )
        self.num_classes = num_classes
        self.result: TrainingResult[TrainedHead] | TrainingResult[TunedModel] | None = None
        self._spec = live_head(head, given)
        self._seed = seed
        self._train: _Labelled | None = None
        self._eval: _Labelled | None = None

    def _prepare(
        self, train: Rows, train_labels: Sequence[int], evaluated: Rows | None, eval_labels: Sequence[int] | None
    ) -> None:
        noun = f"{self._kind}s"
        if (evaluated is None) != (eval_labels is None):
            raise InputError(f"give both eval_{noun} and eval_labels, or neither")
        self._train = self._labelled(train, train_labels, f"train_{noun}")
        self._eval = None
        if evaluated is not None and eval_labels is not None:
            self._eval = self._labelled(evaluated, eval_labels, f"eval_{noun}")

    def train(
        self, num_epochs: int = 5, learning_rate: float = 1e-3, **settings: Any
    ) -> TrainingResult[TrainedHead] | TrainingResult[TunedModel]:
        """Train on the prepared data; ``settings`` are those of ``TrainSpec``. Raises ``TrainingError``."""
        train, judged = self._train, self._eval
        x_eval, y_eval = (judged.features, judged.labels) if judged else (None, None)
        if train is None:
            raise InputError("there is nothing to train on: call prepare_data first")
        names = tuple(str(number) for number in range(self.num_classes))
        given = {"epochs": num_epochs, "learning_rate": learning_rate, "seed": self._seed, **settings}
        if self.model.freeze_backbone:
            trained = train_head(
                train.features, train.labels, x_eval, y_eval, self._spec,
                TrainSpec.of(given),
                task="classification", class_names=names, feature=self.model.extractor.feature_sets[0],
                intervals=False,
            )  # fmt: skip
            self.model.head = trained.head.module.to(self.model.extractor.device)
            self.model.eval()
            self.result = trained
            return trained
        tuned = fine_tune(
            self.model, train.contents, train.labels, judged.contents if judged else None, y_eval,
            replace(FINE_TUNING, **given), class_names=names, new_head=self.result is None,
        )  # fmt: skip
        self.result = tuned
        return tuned

    def _predict(self, rows: Rows) -> tuple[Labels, Floats]:
        """Return the predicted classes int64 [N] and their probabilities float64 [N, C]."""
        if self.result is None:
            raise InputError("there is no head yet: call prepare_data and train first")
        contents, head = self._contents(rows, f"{self._kind}s"), self.result.head
        if isinstance(head, TunedModel):
            probabilities = head.probabilities(contents)
        else:
            probabilities = head.probabilities(self._features(contents))
        return probabilities.argmax(axis=1), probabilities

    def _labelled(self, rows: Rows, labels: Sequence[int], name: str) -> _Labelled:
        contents = self._contents(rows, name)
        checked = self._labels(labels, len(rows))
        return _Labelled(contents, checked, self._features(contents) if self.model.freeze_backbone else None)

    def _features(self, contents: Contents) -> InMemory:
        extractor = self.model.extractor
        return compute_features(extractor, contents, extractor.feature_sets[0].name)

    def _contents(self, rows: Rows, name: str) -> Contents:
        if isinstance(rows, (str, os.PathLike)) or not len(rows):
            given = f"one {self._kind}" if isinstance(rows, os.PathLike) or len(rows) else "none"
            raise InputError(f"{name}: expected a list of {self._kind}s, got {given}")

        def called(row: int) -> str:
            return f"{name}: {self._kind} {row} is {shortened(rows[row])}"

        pixel_range = ExtractionSpec(self.model.extractor.identity).pixel_range
        return examples_of(rows, self._kind, called, pixel_range).packed_contents

    def _labels(self, labels: Sequence[int], count: int) -> Labels:
        array = np.asarray(labels)
        if array.shape != (count,) or array.dtype.kind not in "iu":
            raise InputError(
                f"expected {count} whole-number labels, one for each {self._kind}, "
                f"got {array.dtype} {list(array.shape)}"
            )
        if array.min() < 0 or array.max() >= self.num_classes:
            raise InputError(f"labels run from {array.min()} to {array.max()}: expected 0 to {self.num_classes - 1}")
        return array.astype(np.int64)


class TextClassificationPipeline(_ClassificationPipeline):
    """Trains a head on texts with labels, and predicts the classes of other texts.

    A frozen backbone is run once, by ``prepare_data``. With ``freeze_backbone=False``, ``train`` trains the backbone
    too.

    Args:
        model_name: hub name or local folder; None for the packaged all-MiniLM-L6-v2.
        num_classes: C; labels are 0 to C - 1.
        head: kind of head; ``head_options`` are its settings.
        options: further arguments of ``FeatureBasedModel.from_pretrained``: ``pooling``, ``device``, ``max_length``.

    Example::

        pipeline = TextClassificationPipeline(num_classes=2)
        pipeline.prepare_data(["a fine film", "a dull film"], [1, 0])
        pipeline.train(num_epochs=10)
        classes, probabilities = pipeline.predict(["very fine"])
    """

    _kind = "text"

    def prepare_data(
        self,
        train_texts: Sequence[str],
        train_labels: Sequence[int],
        eval_texts: Sequence[str] | None = None,
        eval_labels: Sequence[int] | None = None,
    ) -> None:
        """Check texts and labels, and run a frozen backbone over them, once. Raises ``InputError``."""
        self._prepare(train_texts, train_labels, eval_texts, eval_labels)

    def predict(self, texts: Sequence[str]) -> tuple[Labels, Floats]:
        """Return the predicted classes int64 [N] and their probabilities float64 [N, C]."""
        return self._predict(texts)


class ImageClassificationPipeline(_ClassificationPipeline):
    """Trains a head on pictures with labels, and predicts the classes of other pictures.

    A picture is a path, a file's bytes, a PIL image, or an array of uint8. The rest is as in
    ``TextClassificationPipeline``; the model is one of pictures, and has to be named.

    Example::

        pipeline = ImageClassificationPipeline("microsoft/resnet-50", num_classes=2)
        pipeline.prepare_data(["cat.jpg", "dog.jpg"], [0, 1])
        pipeline.train(num_epochs=10)
        classes, probabilities = pipeline.predict(["another.jpg"])
    """

    _kind = "image"

    def prepare_data(
        self,
        train_images: Sequence[object],
        train_labels: Sequence[int],
        eval_images: Sequence[object] | None = None,
        eval_labels: Sequence[int] | None = None,
    ) -> None:
        """Check pictures and labels, and run a frozen backbone over them, once. Raises ``InputError``."""
        self._prepare(train_images, train_labels, eval_images, eval_labels)

    def predict(self, images: Sequence[object]) -> tuple[Labels, Floats]:
        """Return the predicted classes int64 [N] and their probabilities float64 [N, C]."""
        return self._predict(images)
