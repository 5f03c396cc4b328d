"""scikit-learn estimators: heads that fit on features, and a transformer from raw text to cached features.

``heads`` has ``HeadClassifier`` and ``HeadRegressor``, ``extractor`` has ``FeatureExtractor``. Names are found when
they are asked for, so that fitting a scikit-learn head loads neither torch nor a backbone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embedcache.estimator.extractor import FeatureExtractor
    from embedcache.estimator.heads import HeadClassifier, HeadRegressor

_WHERE = {"FeatureExtractor": "extractor", "HeadClassifier": "heads", "HeadRegressor": "heads"}

__all__ = ["FeatureExtractor", "HeadClassifier", "HeadRegressor"]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
