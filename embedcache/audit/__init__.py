"""The data doctor: what is wrong with the rows of a cache, as far as their features tell.

=================  ==========================================================================
``run``            ``audit_cache``: every step, and the summary
``neighbours``     vectors in a file; their nearest neighbours and all pairs that are alike
``duplicates``     pairs -> rows that repeat another, and leaks across splits
``outliers``       rows far from all classes
``probabilities``  what heads say of rows they did not learn from: a sweep's, or a quick one's
``labels``         confident learning: labels that are probably wrong
``selection``      rows to label next
``layout``         all rows in two dimensions
``findings``       numbers -> findings in words
``result``         ``Finding``, ``Summary``, ``Audit``; the files of an audit's folder
=================  ==========================================================================
"""

from embedcache.audit.result import Audit, Finding
from embedcache.audit.run import audit_cache

__all__ = ["Audit", "Finding", "audit_cache"]
