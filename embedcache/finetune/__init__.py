"""Models with the backbone inside, frozen or not. The only room that trains a backbone.

============  ======================================================================
``model``     ``FeatureBasedModel``: backbone and head in one ``nn.Module``
``live``      training with the backbone inside every step, by the loop of ``train``
``pipeline``  heads by width and number of classes; texts in, predictions out
============  ======================================================================
"""

from embedcache.finetune.live import FINE_TUNING, TunedModel, fine_tune, live_outputs
from embedcache.finetune.model import FeatureBasedModel, FeatureBasedOutput, ParameterCount
from embedcache.finetune.pipeline import (
    AttentionClassifier,
    ImageClassificationPipeline,
    LinearClassifier,
    MLPClassifier,
    ResidualClassifier,
    TextClassificationPipeline,
)

__all__ = [
    "FINE_TUNING",
    "AttentionClassifier",
    "FeatureBasedModel",
    "FeatureBasedOutput",
    "ImageClassificationPipeline",
    "LinearClassifier",
    "MLPClassifier",
    "ParameterCount",
    "ResidualClassifier",
    "TextClassificationPipeline",
    "TunedModel",
    "fine_tune",
    "live_outputs",
]
