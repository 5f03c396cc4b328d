"""Heads: linear, MLP, residual, attention; scikit-learn's; saved and loaded without pickle.

==================  ==============================================================
``registry``        which kinds there are, and how one is built
``layers``          the layers, each working on one head or on K stacked ones
``modules``         heads on one vector a row
``attention``       heads on several vectors a row
``sklearn_kinds``   heads that scikit-learn fits
``trained``         a trained head: logits, probabilities, decisions
``bundle``          what its folder holds, read and checked; ``card``, the model card
``folder``          the folder written, by one process at a time
==================  ==============================================================

Importing this loads neither torch nor scikit-learn.
"""

from embedcache.heads.registry import (
    STACKED_OPTIONS,
    build_head,
    engine_of,
    head_named,
    kinds,
    register_head,
    stack_key,
)
from embedcache.heads.trained import TrainedHead

__all__ = [
    "STACKED_OPTIONS",
    "TrainedHead",
    "build_head",
    "engine_of",
    "head_named",
    "kinds",
    "register_head",
    "stack_key",
]
