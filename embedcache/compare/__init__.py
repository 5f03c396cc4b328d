"""What freezing costs and what it saves: four ways of training on the same rows, measured.

================  =========================================================================
``run``           ``compare_training_approaches``: every approach, fraction and seed, once
``approaches``    the four, with their recipes and where those come from
``rows``          which rows are compared on: checked, sampled, in nested fractions
``measurements``  jobs and what they took, as values that travel between processes
``worker``        one measurement, in a process of its own
``memory``        what that process held at most
``store``         the folder of results, so that a killed comparison goes on
``assembly``      measurements put together: means, charges, paired differences
``figures``       the rows of the table, the facts, the break-even
``result``        the whole as text, Markdown and JSON
``plot``          the picture
================  =========================================================================
"""

from embedcache.compare.figures import APPROACHES, Approach, break_even
from embedcache.compare.result import Comparison
from embedcache.compare.run import compare_training_approaches

__all__ = ["APPROACHES", "Approach", "Comparison", "break_even", "compare_training_approaches"]
