"""The convex solver as an engine of training: checked rows in, a fitted head out."""

from __future__ import annotations

import numpy as np

from embedcache.errors import SpecError
from embedcache.spec import HeadSpec, TrainSpec
from embedcache.train.convex.solver import solve
from embedcache.train.data import LabelledRows, class_weights
from embedcache.train.result import Fitted


def fit_convex(rows: LabelledRows, head: HeadSpec, spec: TrainSpec) -> Fitted:
    """Return a linear head at the optimum; of ``spec`` it reads ``l2``, ``class_weight`` and ``standardize``.

    Raises ``SpecError`` for another head, ``FeatureError`` for features with several vectors a row, and what ``solve``
    raises.
    """
    if head.kind != "linear":
        raise SpecError(f"the convex solver is for linear heads, not {head.kind}: use the solver minibatch")
    x = rows.matrix("the convex solver")
    weights = class_weights([spec], rows.y, rows.task, rows.class_names)
    solution = solve(
        x, rows.y, task=rows.task, outputs=rows.outputs, l2=spec.l2, sample_weight=rows.weight,
        class_weight=None if weights is None else weights[0], standardize=spec.standardize,
        # Who gives float64 gets its digits: a head is as far from the optimum as the root of the gap, here 1e-10.
        tolerance=1e-20 if x.dtype == np.float64 else 1e-9,
    )  # fmt: skip
    notes: tuple[str, ...] = ()
    if not solution.converged:
        notes = (f"the solver stopped after {solution.iterations} iterations, short of the optimum",)
    entry = {
        "epoch": solution.iterations,
        "train_loss": solution.loss / len(rows),
        "gradient_norm": solution.gradient_norm,
    }
    return Fitted({"output.weight": solution.weight, "output.bias": solution.bias}, history=[entry], notes=notes)
