"""Heads: linear, MLP, residual, attention; scikit-learn's; saved and loaded without pickle.

=================  =======================================================================================
``modules``        layers, each working on one head or on K stacked ones, and heads on one vector a row
``attention``      heads on several vectors a row
``sklearn_kinds``  heads that scikit-learn fits
``neighbours``     the nearest training rows, exactly, and their votes
``registry``       which kinds there are on both engines, and how one is built
``sklearn_io``     what a fitted estimator gives for features, and the estimator as a file, without pickle
``record``         what is known of a trained head: the value that a bundle holds, and the model card
``bundle``         what a bundle's folder holds, read and checked
``folder``         the folder written, by one process at a time
``hub``            a run's folder sent to a hub, and fetched from one
``trained``        a trained head that runs: logits, probabilities, decisions
=================  =======================================================================================

Each imports only from those above it.

Importing this loads neither torch nor scikit-learn.
"""

from embedcache.heads.hub import push_head
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
    "push_head",
    "register_head",
    "stack_key",
]
