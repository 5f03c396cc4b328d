"""Training heads on features: one loop, stacked heads, solvers, metrics. No transformers, no HDF5.

==================  ===========================================================================================
``run``             one head, or many of one shape, on features in hand: picks the engine, calibrates, measures
``cached``          the same on the splits of a cache
``adding``          new classes for a head that needs no training
``data``            labelled rows, checked once; their moments and class weights
``parts``           the features of rows and of their views, one behind the other without a copy
``result``          what an engine made (``Fitted``), and the head with its record (``TrainingResult``)
``minibatch``       the engine of torch heads: what is trained on what
``loop``            the one loop: epochs, early stopping, history
``stack``           K heads and their optimizer
``batches``         where batches come from: memory, disk, ragged, live
``losses``          losses with their gradients, and the biases that training starts from
``convex``          the engine of linear heads: their optimum, by full batches
``sklearn_engine``  the engine of heads that scikit-learn fits
``metrics``         what heads are judged by
==================  ===========================================================================================

Names are found when they are asked for: a scikit-learn head is trained without importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embedcache.train.adding import add_classes
    from embedcache.train.cached import evaluate_on_cache, train_on_cache
    from embedcache.train.data import LabelledRows, labelled_rows_of
    from embedcache.train.minibatch import PassOptions
    from embedcache.train.result import Origin, TrainingResult
    from embedcache.train.run import train_head, train_stack

_WHERE = {
    "LabelledRows": "data",
    "PassOptions": "minibatch",
    "Origin": "result",
    "TrainingResult": "result",
    "add_classes": "adding",
    "evaluate_on_cache": "cached",
    "labelled_rows_of": "data",
    "train_head": "run",
    "train_on_cache": "cached",
    "train_stack": "run",
}

__all__ = [
    "LabelledRows", "Origin", "PassOptions", "TrainingResult", "add_classes", "evaluate_on_cache", "labelled_rows_of",
    "train_head", "train_on_cache", "train_stack",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
