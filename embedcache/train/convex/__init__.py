"""Linear heads by full-batch convex optimisation: one optimum, a whole path of penalties, folds side by side.

The objective is ``sum_i w_i loss_i + l2 / 2 ||W||^2`` with the bias unpenalised: that of scikit-learn's
``LogisticRegression`` with ``C = 1 / l2``, and of its ``Ridge`` with ``alpha = l2`` (for squared errors, halved). Of
two classes the penalty is on the difference of their rows, as scikit-learn has it.

=============  =================================================================================================
``design``     rows, targets and weights, checked
``curvature``  what makes it fast: an approximate inverse Hessian, from one eigendecomposition for every penalty
``descent``    losses and gradients of K problems, and limited-memory BFGS for them in lock-step
``solver``     ``solve``, ``path``, ``path_folds`` and ``walk_folds``; squared errors in closed form
=============  =================================================================================================
"""

from __future__ import annotations

from embedcache.train.convex.design import NEVER, Solution
from embedcache.train.convex.solver import path, path_folds, solve, walk_folds

__all__ = ["NEVER", "Solution", "path", "path_folds", "solve", "walk_folds"]
