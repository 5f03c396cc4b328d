"""A grid of heads over a cache: stacked training, honest selection, statistics.

==================  ==========================================================================
``run``             ``sweep``: what is not known yet is trained, kept, compared, concluded
``grid``            a file, values or flags -> configurations; ``ranges``, ``configuration``
``problem``         the rows, the protocol, and what makes two sweeps the same
``folds``           stratified folds by content, few-shot draws, subsets
``training``        configurations x folds -> heads, in as few passes as can be
``store``           the folder: results as they come
``comparison``      the leaderboard, by ``statistics``
``conclusion``      the chosen head, the test split, learning curves
``summary``         ``summary.json``; ``table`` lays it out for a terminal
``result``          ``SweepResult``
==================  ==========================================================================
"""

from embedcache.sweep.configuration import Configuration
from embedcache.sweep.result import SweepResult
from embedcache.sweep.run import sweep

__all__ = ["Configuration", "SweepResult", "sweep"]
