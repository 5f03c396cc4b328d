"""Is training on the cache really the same as training with the backbone in the loop?

=============  ===============================================================================================
``check``      ``check_equivalence``: the whole check, reference by reference
``rows``       the input matched with the cache, which rows are looked at, and how both sides train
``identity``   the models of a check: is it the same backbone, in the same environment, and does it hold still
``features``   features recomputed from raw rows, compared with what is stored; batches made inside every step
``training``   a few steps with everything written down, and two records compared
``standard``   features with transformers and training in plain torch, as anyone would write them
``tolerance``  how far apart two correct computations may be, derived
``bits``       two arrays compared bit by bit
``result``     the table, what is behind a difference, the verdict
=============  ===============================================================================================
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
