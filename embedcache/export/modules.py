"""What is exported, as torch modules: a head with its calibration, alone or behind its backbone and pooling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from embedcache.backbone import FrozenModel, Inputs, text_inputs
from embedcache.task import CLASSIFICATION, task_named

if TYPE_CHECKING:
    from embedcache.heads import TrainedHead
    from embedcache.shard import Array


class Outputs(nn.Module):
    """A head: features -> (logits, outputs), float32 [B, C] each.

    Logits are calibrated, so that the softmax of a classification's, or the sigmoid of a multi-label's, are the
    probabilities that ``TrainedHead`` gives; these are the outputs, and of a regression the values.
    """

    def __init__(self, head: TrainedHead) -> None:
        super().__init__()
        self.head = head.module.eval()
        self.task = task_named(head.task)
        self.temperature = float(head.calibration.get("temperature", 1.0))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[B, D], [B, L, D], or of tokens [B, T, D] with their mask [B, T] -> (logits, outputs)."""
        logits = self.head(features, mask) / self.temperature
        if not self.task.has_probabilities:
            return logits, logits
        return logits, logits.softmax(dim=-1) if self.task is CLASSIFICATION else logits.sigmoid()


class Whole(nn.Module):
    """Backbone, pooling, storage type and head: token ids and mask, or pixels -> (logits, outputs)."""

    def __init__(self, backbone: FrozenModel[Any], head: TrainedHead) -> None:
        super().__init__()
        self.network, self.outputs = backbone.network, Outputs(head)
        self._backbone, self._stored, self._skip = [backbone], head.feature.dtype, _skip(backbone)

    def forward(self, first: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``input_ids`` and ``attention_mask``, int64 [B, T], or ``pixel_values`` float32 [B, 3, H, W]."""
        if attention_mask is None:
            inputs = Inputs({"pixel_values": first}, skip=self._skip)
        else:
            inputs = text_inputs(first, attention_mask)
        features, mask = self._backbone[0].features(inputs)
        if self._stored != "float32":
            features = features.to(getattr(torch, self._stored)).float()
        outputs: tuple[Tensor, Tensor] = self.outputs(features, mask)
        return outputs


def _skip(backbone: FrozenModel[Any]) -> int:
    return int(getattr(backbone.content, "skip", 0))


def folded(head: TrainedHead) -> list[tuple[Array, Array]]:
    """Return the matrices of a linear or MLP head, [O, I] and [O] each, standardisation and temperature within.

    Computed in float64 and rounded once.
    """
    names = ["output"]
    if not head.linear:
        count = sum(name.startswith("hidden.") and name.endswith(".weight") for name in head.state)
        names = [*(f"hidden.{layer}" for layer in range(count)), "output"]
    pairs = []
    for name in names:
        weight, bias = (np.asarray(head.state[f"{name}.{part}"], np.float64) for part in ("weight", "bias"))
        if f"{name}.mean" in head.state:
            weight = weight * np.asarray(head.state[f"{name}.scale"], np.float64)
            bias = bias - weight @ np.asarray(head.state[f"{name}.mean"], np.float64)
        if name == "output":
            temperature = float(head.calibration.get("temperature", 1.0))
            weight, bias = weight / temperature, bias / temperature
        pairs.append((weight, bias))
    return [(weight.astype(np.float32), bias.astype(np.float32)) for weight, bias in pairs]
