"""What freezing costs and what it saves: four ways of training on the same rows, measured.

================  =========================================================================
``run``           ``compare_training_approaches``: every approach, fraction and seed, once
``approaches``    the four, with their recipes and where those come from
``rows``          which rows are compared on: checked, sampled, in nested fractions
``worker``        one measurement, in a process of its own
``memory``        what that process held at most
``store``         the folder of results, so that a killed comparison goes on
``result``        the table, the break-even, Markdown and JSON
``plot``          the picture
================  =========================================================================
"""

from embedcache.compare.approaches import APPROACHES, Approach
from embedcache.compare.result import Comparison, break_even
from embedcache.compare.run import compare_training_approaches

__all__ = ["APPROACHES", "Approach", "Comparison", "break_even", "compare_training_approaches"]
