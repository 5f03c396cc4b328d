"""Is training on the cache really the same as training with the backbone in the loop?

=====================  ===================================================================
``check``              ``check_equivalence``: the whole check, from opened inputs to a result
``rows``               the input matched with the cache, and which rows are looked at
``subject``            what a check works on, and how both sides train
``loading``            the backbone that made the cache, and the model of the standard reference
``identity``           is it the same backbone, in the same environment, and does it hold still
``features``           features recomputed from raw rows, compared with what is stored
``training``           a few steps with everything written down, and two records compared
``references``         features, training and predictions of each reference, compared with the cache's
``live``               batches that the frozen backbone makes inside every step
``standard_model``     features as anyone would compute them with transformers
``standard_heads``     our heads once more, in plain torch
``standard_training``  training as anyone would write it in torch
``tolerance``          how far apart two correct computations may be, derived
``bits``               two arrays compared bit by bit
``causes``             what is behind a difference
``result``             the table, the findings, the verdict
=====================  ===================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embedcache.equivalence.check import check_equivalence
    from embedcache.equivalence.result import Comparison, EquivalenceResult

_WHERE = {"Comparison": "result", "EquivalenceResult": "result", "check_equivalence": "check"}

__all__ = ["Comparison", "EquivalenceResult", "check_equivalence"]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
