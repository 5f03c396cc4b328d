"""embedcache: run a frozen backbone once, cache its features in HDF5, train heads on them.

::

    import embedcache as ec

    cache = ec.extract("reviews.csv", output_dir="reviews.cache", split="80/10/10")
    X, y = cache.arrays("train")
    results = ec.sweep(cache)
    ec.Predictor.load("runs/best")(["Excellent movie!"])
    ec.check_equivalence(cache, "reviews.csv").raise_if_different()

Names are found when they are first asked for, so importing this package loads none of the heavy libraries.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from embedcache.version import __version__

if TYPE_CHECKING:
    from embedcache.audit import audit_cache
    from embedcache.cache import FeatureCache, merge, pull, push, relabel
    from embedcache.compare import compare_training_approaches
    from embedcache.equivalence import check_equivalence, check_tuning
    from embedcache.errors import EmbedcacheWarning
    from embedcache.estimator import FeatureExtractor, HeadClassifier, HeadRegressor
    from embedcache.examples import load_examples
    from embedcache.export import export_features, export_head
    from embedcache.extract import extract
    from embedcache.finetune import (
        AttentionClassifier,
        FeatureBasedModel,
        ImageClassificationPipeline,
        LinearClassifier,
        MLPClassifier,
        ResidualClassifier,
        TextClassificationPipeline,
        tune,
    )
    from embedcache.heads import TrainedHead, push_head, register_head
    from embedcache.importing import import_features
    from embedcache.predict import Predictor
    from embedcache.spec import HeadSpec, TrainSpec
    from embedcache.sweep import sweep
    from embedcache.tracking import track
    from embedcache.train import add_classes, evaluate_on_cache, train_head, train_on_cache

_WHERE = {
    "AttentionClassifier": "finetune",
    "EmbedcacheWarning": "errors",
    "FeatureBasedModel": "finetune",
    "FeatureCache": "cache",
    "FeatureExtractor": "estimator",
    "HeadClassifier": "estimator",
    "HeadRegressor": "estimator",
    "HeadSpec": "spec",
    "ImageClassificationPipeline": "finetune",
    "LinearClassifier": "finetune",
    "MLPClassifier": "finetune",
    "Predictor": "predict",
    "ResidualClassifier": "finetune",
    "TextClassificationPipeline": "finetune",
    "TrainSpec": "spec",
    "TrainedHead": "heads",
    "add_classes": "train",
    "audit_cache": "audit",
    "check_equivalence": "equivalence",
    "check_tuning": "equivalence",
    "compare_training_approaches": "compare",
    "evaluate_on_cache": "train",
    "export_features": "export",
    "export_head": "export",
    "extract": "extract",
    "import_features": "importing",
    "load_examples": "examples",
    "merge": "cache",
    "pull": "cache",
    "push": "cache",
    "push_head": "heads",
    "register_head": "heads",
    "relabel": "cache",
    "sweep": "sweep",
    "track": "tracking",
    "train_head": "train",
    "train_on_cache": "train",
    "tune": "finetune",
}

__all__ = [
    "AttentionClassifier",
    "EmbedcacheWarning",
    "FeatureBasedModel",
    "FeatureCache",
    "FeatureExtractor",
    "HeadClassifier",
    "HeadRegressor",
    "HeadSpec",
    "ImageClassificationPipeline",
    "LinearClassifier",
    "MLPClassifier",
    "Predictor",
    "ResidualClassifier",
    "TextClassificationPipeline",
    "TrainSpec",
    "TrainedHead",
    "__version__",
    "add_classes",
    "audit_cache",
    "check_equivalence",
    "check_tuning",
    "compare_training_approaches",
    "evaluate_on_cache",
    "export_features",
    "export_head",
    "extract",
    "import_features",
    "load_examples",
    "merge",
    "pull",
    "push",
    "push_head",
    "register_head",
    "relabel",
    "sweep",
    "track",
    "train_head",
    "train_on_cache",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The package, in which ``extract`` and ``sweep`` stay the functions when the modules of that name are loaded."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _WHERE and isinstance(value, ModuleType):
            return  # the import system, which sets a loaded module on its parent
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
