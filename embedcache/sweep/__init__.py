"""A grid of heads over a cache: stacked training, honest selection, statistics.

=================  ======================================================================
``run``            ``sweep``: what is missing is trained, kept, compared, concluded
``configuration``  one configuration, and how heads are compared
``grid``           a file, values or flags -> configurations
``cost``           how long a head takes, and from which size of a sweep on it is asked about
``protocols``      what protocols of published tables fix
``plan``           what is trained, in which order, for about how long; a budget of minutes
``problem``        the rows and their division into folds; what makes two sweeps the same
``jobs``           configurations x folds, and what of them is trained in one go
``stacks``         torch heads, stacked fold by fold, the stacks side by side
``training``       jobs -> heads, by stacks, the convex solver or scikit-learn
``store``          the folder: results as they come
``comparison``     the leaderboard
``statistics``     intervals and tests of differences
``conclusion``     the chosen head, the test split, learning curves
``findings``       the mistakes, and notes for people
``summary``        ``summary.json`` as typed values
``result``         ``SweepResult``, and the table for a terminal
=================  ======================================================================
"""

from embedcache.sweep.configuration import Configuration
from embedcache.sweep.plan import planned
from embedcache.sweep.result import SweepResult
from embedcache.sweep.run import sweep

__all__ = ["Configuration", "SweepResult", "planned", "sweep"]
