"""Models with the backbone inside, frozen or not. The only room that trains a backbone.

============  ======================================================================
``model``     ``FeatureBasedModel``: backbone and head in one ``nn.Module``
``live``      training with the backbone inside every step, by the loop of ``train``
``tail``      the last blocks of a network alone
``states``    what enters these blocks: from a cache, or computed by the frozen ones
``tuning``    training those from a cache, and the run that comes of it
``pipeline``  heads by width and number of classes; texts in, predictions out
============  ======================================================================
"""

from embedcache.finetune.live import TunedModel, fine_tune, fit_live, into_standard_units, live_outputs, outputs_of
from embedcache.finetune.model import FeatureBasedModel, FeatureBasedOutput, ParameterCount
from embedcache.finetune.pipeline import (
    AttentionClassifier,
    ImageClassificationPipeline,
    LinearClassifier,
    MLPClassifier,
    ResidualClassifier,
    TextClassificationPipeline,
)
from embedcache.finetune.states import CachedStates, LiveStates, cached_states
from embedcache.finetune.tail import TailModel, refuse_untunable
from embedcache.finetune.tuning import (
    Tuned,
    evaluate_tuned,
    load_tail,
    parts_of,
    refuse_earlier_layer,
    states_for,
    tune,
)
from embedcache.spec import FINE_TUNING, TUNING

__all__ = [
    "FINE_TUNING",
    "TUNING",
    "AttentionClassifier",
    "CachedStates",
    "FeatureBasedModel",
    "FeatureBasedOutput",
    "ImageClassificationPipeline",
    "LinearClassifier",
    "LiveStates",
    "MLPClassifier",
    "ParameterCount",
    "ResidualClassifier",
    "TailModel",
    "TextClassificationPipeline",
    "Tuned",
    "TunedModel",
    "cached_states",
    "evaluate_tuned",
    "fine_tune",
    "fit_live",
    "into_standard_units",
    "live_outputs",
    "load_tail",
    "outputs_of",
    "parts_of",
    "refuse_earlier_layer",
    "refuse_untunable",
    "states_for",
    "tune",
]
