"""Is training on the cache really the same as training with the backbone in the loop?

===============  =========================================================================
``check``        ``check_equivalence``: the whole check
``examination``  one check in progress: each comparison in turn
``rows``         the input matched with the cache, and which rows are looked at
``features``     features recomputed from raw rows, compared with what is stored
``live``         batches that the frozen backbone makes inside every step
``training``     a few steps with everything written down, and two records compared
``standard``     the same work as anyone would write it; ``plain``, its heads
``tolerance``    how far apart two correct computations may be, derived
``bits``         two arrays compared bit by bit
``causes``       what is behind a difference
``result``       the table, the findings, the verdict
===============  =========================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedcache.equivalence.check import check_equivalence
    from embedcache.equivalence.result import Comparison, EquivalenceResult

_WHERE = {"Comparison": "result", "EquivalenceResult": "result", "check_equivalence": "check"}

__all__ = ["Comparison", "EquivalenceResult", "check_equivalence"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
