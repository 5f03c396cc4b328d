"""What freezing costs and what it saves: cached, frozen, last-blocks and full training on the same rows, measured.

================  ====================================================================================
``run``           ``compare_training_approaches``: every approach, fraction and seed, once
``rows``          which rows are compared on: checked, sampled, in nested fractions
``worker``        one measurement, in a process of its own
``measurements``  jobs and what they took, as values; the memory they held; the folder that keeps them
``figures``       the approaches with their recipes; the rows of the table, the facts, the break-even
``result``        measurements put together, as text, Markdown and JSON
``plot``          the picture
================  ====================================================================================
"""

from embedcache.compare.figures import APPROACHES, Approach, break_even
from embedcache.compare.result import Comparison
from embedcache.compare.run import compare_training_approaches

__all__ = ["APPROACHES", "Approach", "Comparison", "break_even", "compare_training_approaches"]
