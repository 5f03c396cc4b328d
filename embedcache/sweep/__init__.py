"""A grid of heads over a cache: stacked training, honest selection, statistics.

==================  ==========================================================================
``run``             ``sweep``: what is missing is trained, kept, compared, concluded
``grid``            a file, values or flags -> configurations; ``ranges``, ``configuration``
``protocol``        how heads are compared, and what a file or a call asks for; ``cost``
``problem``         the rows and their division, and what makes two sweeps the same
``folds``           stratified folds by content, few-shot draws, subsets
``training``        configurations x folds -> heads, in as few passes as can be
``store``           the folder: results as they come
``comparison``      the leaderboard, by ``statistics``
``conclusion``      the chosen head, the test split, learning curves; ``findings``, ``notes``
``summary``         ``summary.json`` as typed values, by ``decoding``; ``table`` for a terminal
``result``          ``SweepResult``
==================
"""

from embedcache.sweep.configuration import Configuration
from embedcache.sweep.result import SweepResult
from embedcache.sweep.run import sweep

__all__ = ["Configuration", "SweepResult", "sweep"]
