"""Is training on the cache really the same as training with the backbone in the loop?

================  =============================================================================================
``check``         ``check_equivalence``: the whole check, reference by reference
``rows``          the input matched with the cache, which rows are looked at, and how both sides train
``identity``      the models of a check: is it the same backbone, in the same environment, and does it hold still
``features``      features recomputed from raw rows, compared with what is stored; batches made inside every step
``training``      a few steps with everything written down, and two records compared
``standard``      features with transformers and training in plain torch, as anyone would write them
``alone``         what a cache proves by itself, where what made its features is not at hand
``logits``        logits and labels of both sides, and what rounding features for storage costs them
``tuning``        ``check_tuning``: the last blocks, trained from cached states and with the frozen ones in the loop
``plain_blocks``  the same with the whole network in every step, in plain torch
``pictures``      the same of images, and the ways in which their preparation goes wrong
``tolerance``     how far apart two correct computations may be, derived
``bits``          two arrays compared bit by bit
``result``        the table, what is behind a difference, the verdict
================  =============================================================================================
"""

from embedcache.equivalence.check import check_equivalence
from embedcache.equivalence.result import Comparison, EquivalenceResult
from embedcache.equivalence.tuning import check_tuning

__all__ = ["Comparison", "EquivalenceResult", "check_equivalence", "check_tuning"]
