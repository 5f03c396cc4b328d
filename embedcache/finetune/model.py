"""Backbone and head in one ``nn.Module``, frozen or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.utils.generic import ModelOutput

from embedcache.arguments import checks_arguments
from embedcache.backbone import FrozenModel, Inputs, load_backbone, text_inputs
from embedcache.errors import SpecError
from embedcache.heads import build_head, head_named
from embedcache.heads.modules import Dropout
from embedcache.spec import HeadSpec


def live_head(head: HeadSpec | str, options: Mapping[str, object] | None = None) -> HeadSpec:
    """Return a head that a live model can have. Raises ``SpecError`` for an unknown head or one of scikit-learn."""
    spec = head_named(head, None, options)
    if spec.engine != "torch":
        raise SpecError(f"the head {spec.kind} of scikit-learn cannot be fine-tuned: name a torch head such as linear")
    return spec


class ParameterCount(NamedTuple):
    """How many numbers a model has, and how many of them training may change."""

    total: int
    trainable: int
    frozen: int


@dataclass
class FeatureBasedOutput(ModelOutput):
    """``logits`` [B, C], ``features`` [B, D] ([B, L, D]; [B, T, D] for tokens), ``loss`` where labels were given."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    features: Tensor | None = None


def in_training(network: nn.Module) -> None:
    """Put a network in training mode, but for its batch normalisation, which keeps the statistics that it came with.

    By those of a batch, a row's features would depend on its neighbours. Of 16 rows they are also so far off that a
    pretrained network forgets more than it learns: the head that was trained on cached features starts from others.
    """
    network.train()
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


class FeatureBasedModel(nn.Module):
    """A Hugging Face backbone and a head.

    A frozen backbone stays in eval mode even after ``.train()`` (no dropout, no change of batch-norm statistics), runs
    without gradients, and has no trainable parameter. In an unfrozen one, the parameters that the features depend on
    are trainable; others, such as those of an unused pooler, are neither trained nor counted. Its batch normalisation
    goes by the statistics that the network came with (see ``in_training``).

    Args:
        backbone: what ``load_backbone`` gives, with one feature set. Unfreezing changes its network in place.
        head: a module ``forward(x)``, or ``forward(x, mask)`` for token-level features, -> logits [B, C].
        freeze_backbone: whether only the head is trained.

    Raises ``SpecError`` for a backbone with several feature sets.
    """

    def __init__(self, backbone: FrozenModel[Any], head: nn.Module, *, freeze_backbone: bool = True) -> None:
        super().__init__()
        if len(backbone.specs) != 1:
            raise SpecError(
                f"a live model reads one feature set, got {', '.join(spec.name for spec in backbone.specs)}: "
                "load the backbone with one of them"
            )
        self.extractor = backbone
        self.backbone: nn.Module = backbone.network
        self.freeze_backbone = freeze_backbone
        self.put_head(head)
        for parameter in self.backbone.parameters():
            parameter.requires_grad_(not freeze_backbone)
        if not freeze_backbone:
            self._refreeze_unused()
            backbone.no_longer_frozen(uuid4().hex)
        self.train()

    @classmethod
    @checks_arguments()
    def from_pretrained(
        cls,
        name: Path | str | None,
        num_classes: int,
        head: str = "linear",
        freeze_backbone: bool = True,
        *,
        pooling: str = "auto",
        device: str = "auto",
        seed: int = 0,
        max_length: int | None = None,
        content: str | None = None,
        pixel_range: Sequence[float] | None = None,
        **head_options: object,
    ) -> FeatureBasedModel:
        """Load a backbone by hub name or folder (None: the packaged all-MiniLM-L6-v2) and put a new head on it.

        Args:
            name: hub name or local folder.
            num_classes: C.
            head: ``linear``, ``mlp``, ``residual``, or with ``pooling="tokens"`` or several layers ``attention`` or
                ``attention-pooling``.
            freeze_backbone: whether only the head is trained.
            pooling: the feature set the head reads, in the written form of ``FeatureSpec``.
            seed: decides the head's first weights.
            content: ``text`` or ``image``, which a model that reads both, such as CLIP, must be told.
            head_options: settings of the head, such as ``hidden=[256]``.

        Raises ``BackboneError``, or ``SpecError`` and ``FeatureError`` for a head that cannot be or cannot read that.

        Example::

            model = FeatureBasedModel.from_pretrained("bert-base-uncased", num_classes=3)
            model.print_parameter_status()
        """
        if num_classes < 1:
            raise SpecError(f"num_classes is {num_classes}: expected at least 1")
        backbone = load_backbone(
            name, features=(pooling,), device=device, max_length=max_length, content=content, pixel_range=pixel_range
        )
        module = build_head(live_head(head, head_options), backbone.feature_sets[0], num_classes, seed=seed)
        return cls(backbone, module, freeze_backbone=freeze_backbone)

    def put_head(self, head: nn.Module) -> None:
        """Read the features with this head, on the backbone's device and in the model's mode."""
        self.head = head.to(self.extractor.device).train(self.training)
        if self.extractor.device.type != "cpu":  # a head is made with generators of the CPU
            for module in head.modules():
                if isinstance(module, Dropout):
                    module.generators = None

    def train(self, mode: bool = True) -> FeatureBasedModel:
        """Set the head's mode, and the backbone's only where it is not frozen."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        elif mode:
            in_training(self.backbone)
        return self

    def run(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Run backbone and head over what the network is given for B rows: logits [B, C], and the features."""
        with torch.set_grad_enabled(not self.freeze_backbone and torch.is_grad_enabled()):
            features, mask = self.extractor.features(inputs)
        return (self.head(features) if mask is None else self.head(features, mask)), features

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> FeatureBasedOutput:
        """Token ids [B, T], mask [B, T] (None: all are real) and labels [B] -> logits, features, cross-entropy."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        logits, features = self.run(text_inputs(input_ids, attention_mask))
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

    def _refreeze_unused(self) -> None:
        """Freeze the parameters that the features do not depend on, found by one small backward pass."""
        dummies = self.extractor.content.dummies(2, min(4, self.extractor.policy.max_length))
        self.backbone.eval()
        with torch.enable_grad():
            features, _ = self.extractor.features(dummies.to(self.extractor.device))
            features.sum().backward()  # type: ignore[no-untyped-call]
        for parameter in self.backbone.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None
