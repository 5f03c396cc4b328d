"""Texts and labels in, predictions out: the tutorial's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedcache.arguments import checks_arguments
from embedcache.backbone import compute_features
from embedcache.errors import InputError
from embedcache.finetune.live import FINE_TUNING, TunedModel, fine_tune
from embedcache.finetune.model import FeatureBasedModel, live_head
from embedcache.heads import TrainedHead
from embedcache.spec import TrainSpec
from embedcache.task import Array, Floats
from embedcache.train import TrainingResult, train_head

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Labelled:
    """Contents and their labels; with features where the backbone is frozen."""

    contents: list[bytes]
    labels: Labels
    features: Array | tuple[Array, Array] | None


class TextClassificationPipeline:
    """Texts and labels in, a trained head and predictions out.

    With a frozen backbone, ``prepare_data`` runs it once and ``train`` never again. With ``freeze_backbone=False``,
    ``train`` tunes all of it.

    Args:
        model_name: hub name or local folder; None for the packaged all-MiniLM-L6-v2.
        num_classes: C; labels are 0 to C - 1.
        head: kind of head; ``head_options`` are its settings.
        options: what else ``FeatureBasedModel.from_pretrained`` takes: ``pooling``, ``device``, ``max_length``.

    Example::

        pipeline = TextClassificationPipeline(num_classes=2)
        pipeline.prepare_data(["a fine film", "a dull film"], [1, 0])
        pipeline.train(num_epochs=10)
        classes, probabilities = pipeline.predict(["very fine"])
    """

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
            model_name, num_classes, head, freeze_backbone, seed=seed, **options, **given
        )
        self.num_classes = num_classes
        self.result: TrainingResult[TrainedHead] | TrainingResult[TunedModel] | None = None
        self._spec = live_head(head, given)
        self._seed = seed
        self._train: _Labelled | None = None
        self._eval: _Labelled | None = None

    def prepare_data(
        self,
        train_texts: Sequence[str],
        train_labels: Sequence[int],
        eval_texts: Sequence[str] | None = None,
        eval_labels: Sequence[int] | None = None,
    ) -> None:
        """Check texts and labels, and run a frozen backbone over them, once. Raises ``InputError``."""
        if (eval_texts is None) != (eval_labels is None):
            raise InputError("give both eval_texts and eval_labels, or neither")
        self._train = self._labelled(train_texts, train_labels, "train_texts")
        self._eval = None
        if eval_texts is not None and eval_labels is not None:
            self._eval = self._labelled(eval_texts, eval_labels, "eval_texts")

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
            done = train_head(
                train.features, train.labels, x_eval, y_eval, self._spec,
                TrainSpec.of(given),
                task="classification", class_names=names, feature=self.model.extractor.feature_sets[0],
                intervals=False,
            )  # fmt: skip
            self.model.head = done.head.module.to(self.model.extractor.device)
            self.model.eval()
            self.result = done
            return done
        tuned = fine_tune(
            self.model, train.contents, train.labels, judged.contents if judged else None, y_eval,
            replace(FINE_TUNING, **given), class_names=names, new_head=self.result is None,
        )  # fmt: skip
        self.result = tuned
        return tuned

    def predict(self, texts: Sequence[str]) -> tuple[Labels, Floats]:
        """Return the predicted classes int64 [N] and their probabilities float64 [N, C]."""
        if self.result is None:
            raise InputError("there is no head yet: call prepare_data and train first")
        contents, head = self._contents(texts, "texts"), self.result.head
        if isinstance(head, TunedModel):
            probabilities = head.probabilities(contents)
        else:
            probabilities = head.probabilities(self._features(contents))
        return probabilities.argmax(axis=1), probabilities

    def _labelled(self, texts: Sequence[str], labels: Sequence[int], name: str) -> _Labelled:
        contents = self._contents(texts, name)
        checked = self._labels(labels, len(texts))
        return _Labelled(contents, checked, self._features(contents) if self.model.freeze_backbone else None)

    def _features(self, contents: Sequence[bytes]) -> Array | tuple[Array, Array]:
        extractor = self.model.extractor
        return compute_features(extractor, contents, extractor.feature_sets[0].name)

    def _contents(self, texts: Sequence[str], name: str) -> list[bytes]:
        if isinstance(texts, str) or not len(texts):
            raise InputError(f"{name}: expected a list of texts, got {'one text' if len(texts) else 'none'}")
        for number, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{name}: text {number} is {text!r}: expected a text that is not empty")
        return [text.encode("utf-8") for text in texts]

    def _labels(self, labels: Sequence[int], count: int) -> Labels:
        array = np.asarray(labels)
        if array.shape != (count,) or array.dtype.kind not in "iu":
            raise InputError(
                f"expected {count} whole-number labels, one for each text, got {array.dtype} {list(array.shape)}"
            )
        if array.min() < 0 or array.max() >= self.num_classes:
            raise InputError(f"labels run from {array.min()} to {array.max()}: expected 0 to {self.num_classes - 1}")
        return array.astype(np.int64)
