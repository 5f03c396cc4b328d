"""The live model: backbone and head in one ``nn.Module``, frozen or not. The only place that unfreezes a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from embedcache.backbone import TextBackbone, features_of, load_backbone
from embedcache.errors import InputError, SpecError
from embedcache.heads import build_head
from embedcache.spec import HeadSpec, TrainSpec
from embedcache.train import TrainingResult, train_head


class ParameterCount(NamedTuple):
    """How many numbers a model has, and how many of them training may change."""

    total: int
    trainable: int
    frozen: int


@dataclass
class FeatureBasedOutput(ModelOutput):
    """``logits`` [B, C], ``features`` [B, D] (or [B, L, D]; [B, T, D] for tokens), ``loss`` scalar where labels were given."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    features: Tensor | None = None


class FeatureBasedModel(nn.Module):
    """A Hugging Face backbone and a head.

    Frozen means frozen: the backbone stays in eval mode even after ``.train()`` (no dropout, no drift of batch-norm
    statistics), runs without gradients, and none of its parameters is trainable.
    """

    def __init__(self, backbone: TextBackbone, head: nn.Module, *, freeze_backbone: bool = True) -> None:
        super().__init__()
        if len(backbone.specs) != 1:
            raise SpecError(
                f"a live model reads one feature set, got {', '.join(spec.name for spec in backbone.specs)}"
            )
        self.extractor = backbone
        self.backbone: nn.Module = backbone.network
        self.head = head
        self.freeze_backbone = freeze_backbone
        for parameter in self.backbone.parameters():
            parameter.requires_grad_(not freeze_backbone)
        self.train()

    @classmethod
    def from_pretrained(
        cls,
        name: str | None,
        num_classes: int,
        head: str = "linear",
        freeze_backbone: bool = True,
        *,
        pooling: str = "auto",
        device: str = "auto",
        seed: int = 0,
        max_length: int | None = None,
        **head_options: Any,
    ) -> FeatureBasedModel:
        """Load a backbone by hub name or folder (None: the packaged all-MiniLM-L6-v2) and put a new head on it.

        ``head`` is ``linear``, ``mlp``, ``residual`` or ``attention`` (with ``pooling="tokens"`` or several layers).
        """
        backbone = load_backbone(name, features=(pooling,), device=device, max_length=max_length)
        feature = backbone.feature_sets[0]
        module = build_head(HeadSpec(head, "torch", head_options), feature, num_classes, seed=seed)
        return cls(backbone, module.to(backbone.device), freeze_backbone=freeze_backbone)

    def train(self, mode: bool = True) -> FeatureBasedModel:
        """Set the head's mode, and the backbone's only where it is not frozen."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the backbone: token ids and mask [B, T] -> features and, for tokens, their mask."""
        with torch.set_grad_enabled(not self.freeze_backbone and torch.is_grad_enabled()):
            return self.extractor.features(input_ids, attention_mask)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> FeatureBasedOutput:
        """Token ids [B, T], mask [B, T] and labels [B] -> logits [B, C], features, and the cross-entropy loss."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        features, mask = self.features(input_ids, attention_mask)
        logits = self.head(features) if mask is None else self.head(features, mask)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return FeatureBasedOutput(loss=loss, logits=logits, features=features)

    def count_trainable_params(self) -> ParameterCount:
        """Return how many parameters there are in all, how many are trainable and how many are frozen."""
        total = sum(parameter.numel() for parameter in self.parameters())
        trainable = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        return ParameterCount(total, trainable, total - trainable)

    def print_parameter_status(self) -> None:
        """Print the three counts."""
        count = self.count_trainable_params()
        print(f"parameters: {count.total:,}")
        print(f"  trainable {count.trainable:,} ({count.trainable / count.total:.2%})")
        print(f"  frozen    {count.frozen:,} ({count.frozen / count.total:.2%})")


class TextClassificationPipeline:
    """Texts and labels in, a trained head and predictions out: the tutorial's names over cached features.

    ``prepare_data`` runs the backbone once; ``train`` never runs it again.
    """

    def __init__(
        self,
        model_name: str | None = None,
        num_classes: int = 3,
        *,
        head: str = "linear",
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.model = FeatureBasedModel.from_pretrained(model_name, num_classes, head, seed=seed, **options)
        self.num_classes = num_classes
        self._spec = HeadSpec(head, "torch", {})
        self._seed = seed
        self._data: tuple[Any, ...] | None = None
        self.result: TrainingResult | None = None

    def prepare_data(
        self,
        train_texts: Sequence[str],
        train_labels: Sequence[int],
        eval_texts: Sequence[str] | None = None,
        eval_labels: Sequence[int] | None = None,
    ) -> None:
        """Run the backbone over the texts, once."""
        if (eval_texts is None) != (eval_labels is None):
            raise InputError("give both eval_texts and eval_labels, or neither")
        train = self._features(train_texts), self._labels(train_labels, len(train_texts))
        if eval_texts is None or eval_labels is None:
            self._data = (*train, None, None)
        else:
            self._data = (*train, self._features(eval_texts), self._labels(eval_labels, len(eval_texts)))

    def train(self, num_epochs: int = 5, learning_rate: float = 1e-3, **settings: Any) -> TrainingResult:
        """Train the head on the prepared features."""
        if self._data is None:
            raise InputError("there is nothing to train on: call prepare_data first")
        x, y, x_eval, y_eval = self._data
        spec = TrainSpec(epochs=num_epochs, learning_rate=learning_rate, seed=self._seed, **settings)
        names = tuple(str(number) for number in range(self.num_classes))
        self.result = train_head(x, y, x_eval, y_eval, self._spec, spec, task="classification", class_names=names)
        return self.result

    def predict(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Return the predicted classes [N] and the probabilities [N, C]."""
        if self.result is None:
            raise InputError("there is no head yet: call prepare_data and train first")
        probabilities = np.asarray(self.result.head.probabilities(self._features(texts)), np.float64)
        return probabilities.argmax(axis=1), probabilities

    def _features(self, texts: Sequence[str]) -> Any:
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise InputError("expected texts that are not empty")
        extractor = self.model.extractor
        return features_of(extractor, [text.encode("utf-8") for text in texts], extractor.feature_sets[0].name)

    def _labels(self, labels: Sequence[int], count: int) -> npt.NDArray[np.int64]:
        array = np.asarray(labels)
        if array.shape != (count,) or array.dtype.kind not in "iu":
            raise InputError(
                f"expected {count} whole-number labels, one for each text, got {array.dtype} {array.shape}"
            )
        if array.min() < 0 or array.max() >= self.num_classes:
            raise InputError(f"labels run from {array.min()} to {array.max()}: expected 0 to {self.num_classes - 1}")
        return array.astype(np.int64)
