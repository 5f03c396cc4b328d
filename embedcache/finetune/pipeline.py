"""Texts and labels in, predictions out: the tutorial's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedcache.arguments import checks_arguments
from embedcache.backbone import features_of
from embedcache.errors import InputError
from embedcache.finetune.live import FINE_TUNING, FineTuned, fine_tune
from embedcache.finetune.model import FeatureBasedModel, live_head
from embedcache.spec import TrainSpec
from embedcache.train import TrainingResult, train_head

Labels = npt.NDArray[np.int64]


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
        self.result: TrainingResult | FineTuned | None = None
        self._spec = live_head(head, given)
        self._seed = seed
        self._data: tuple[Any, Labels, Any, Labels | None] | None = None

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
        train = self._inputs(train_texts, "train_texts"), self._labels(train_labels, len(train_texts))
        if eval_texts is None or eval_labels is None:
            self._data = (*train, None, None)
        else:
            self._data = (
                *train, self._inputs(eval_texts, "eval_texts"), self._labels(eval_labels, len(eval_texts))
            )  # fmt: skip

    def train(self, num_epochs: int = 5, learning_rate: float = 1e-3, **settings: Any) -> TrainingResult | FineTuned:
        """Train on the prepared data; ``settings`` are those of ``TrainSpec``. Raises ``TrainingError``."""
        if self._data is None:
            raise InputError("there is nothing to train on: call prepare_data first")
        x, y, x_eval, y_eval = self._data
        names = tuple(str(number) for number in range(self.num_classes))
        given = {"epochs": num_epochs, "learning_rate": learning_rate, "seed": self._seed, **settings}
        if self.model.freeze_backbone:
            done = train_head(
                x, y, x_eval, y_eval, self._spec, TrainSpec(**given), task="classification", class_names=names,
                feature=self.model.extractor.feature_sets[0], intervals=False,
            )  # fmt: skip
            self.model.head = done.head.module.to(self.model.extractor.device)
            self.model.eval()
            self.result = done
        else:
            self.result = fine_tune(
                self.model, x, y, x_eval, y_eval, replace(FINE_TUNING, **given), class_names=names,
                new_head=self.result is None,
            )  # fmt: skip
        return self.result

    def predict(self, texts: Sequence[str]) -> tuple[Labels, npt.NDArray[np.float64]]:
        """Return the predicted classes int64 [N] and their probabilities float64 [N, C]."""
        if self.result is None:
            raise InputError("there is no head yet: call prepare_data and train first")
        inputs = self._inputs(texts, "texts")
        if isinstance(self.result, FineTuned):
            probabilities = self.result.outputs(inputs)
        else:
            probabilities = self.result.head.probabilities(inputs)
        return probabilities.argmax(axis=1), probabilities

    def _inputs(self, texts: Sequence[str], name: str) -> Any:
        if isinstance(texts, str) or not len(texts):
            raise InputError(f"{name}: expected a list of texts, got {'one text' if len(texts) else 'none'}")
        for at, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{name}: text {at} is {text!r}: expected a text that is not empty")
        contents = [text.encode("utf-8") for text in texts]
        extractor = self.model.extractor
        return features_of(extractor, contents, extractor.feature_sets[0].name) if self._frozen else contents

    @property
    def _frozen(self) -> bool:
        return self.model.freeze_backbone

    def _labels(self, labels: Sequence[int], count: int) -> Labels:
        array = np.asarray(labels)
        if array.shape != (count,) or array.dtype.kind not in "iu":
            raise InputError(
                f"expected {count} whole-number labels, one for each text, got {array.dtype} {list(array.shape)}"
            )
        if array.min() < 0 or array.max() >= self.num_classes:
            raise InputError(f"labels run from {array.min()} to {array.max()}: expected 0 to {self.num_classes - 1}")
        return array.astype(np.int64)
