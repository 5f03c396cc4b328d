"""How far two correct computations may be apart: derived from the arithmetic, before any difference is looked at.

**Features.** Two implementations of one frozen model do the same arithmetic in another order. Each matrix product
adds up K numbers; accumulated in float32 (so do the kernels for bfloat16), its result carries a relative error of about
``sqrt(K) * u32``, where ``u32 = 2^-24`` is float32's unit roundoff: rounding errors are as good as independent and of
mean zero, so they grow with the root of their number (Higham & Mary 2019, "A new approach to probabilistic rounding
error analysis"). Between two products, about R = 4 more results are rounded to the compute type (the product itself,
an activation or a softmax, a residual sum, a normalisation), each with a relative error of up to its ``u``
(``2^-24``, ``2^-11``, ``2^-8`` for float32, float16, bfloat16). Together, each product is off by a relative

    local = sqrt(K * u32^2 + R * u^2)

with K the longest axis of any weight matrix. How much of that arrives at a feature is the model's *conditioning*,
which no formula knows and which is therefore measured: every weight is multiplied by ``1 + delta * noise`` with
standard normal noise and ``delta = 2^-10``, which puts a relative error of about ``delta`` on every product of every
layer, and

    kappa_d = rms over rows(change of component d) / delta, times how much worse the worst row is

is read off over three draws of noise, in float32 and at one batch shape, so that rounding itself plays no part in it.
It is a component's own, because components may differ by many powers of ten: all-MiniLM-L6-v2 has three that are
1e-8 and 1e-33 where the others are 0.1; only those that a ReLU makes, which are 0 in most rows, have at least the
kappa that is usual among them. A difference
between two computations, each with independent errors, then has a standard deviation of at most
``sqrt(2) * local * kappa_d``, and of n such values none exceeds, but with probability 0.001,

    tolerance_d = sqrt(2) * local * kappa_d * sqrt(2 * ln(2 * n / 0.001))

by the tail of the normal distribution. Features that are stored in float16 or bfloat16 are rounded once more on both
sides, which adds a unit in the last place of the component's largest value. Depth is in kappa; width in K; both are of
the model at hand.

**Training and predictions.** What differences of that size in the features do to losses, gradients, parameters, the
optimizer's state and logits is measured too, on the cached features: training is repeated with noise added, uniform
within the tolerance, three times with other noise, and the tolerance of each quantity is twice the largest change that
was seen (three draws stand for the worst; of the standardisation, mean / deviation and the logarithm of the scale).
Adam divides by the size of a gradient, so a parameter whose gradient is nearly zero may move by the whole learning rate
whichever way rounding points, and a ReLU switches: that is in it as well, where a bound from u alone would be wrong.
The head's own rounding, ``sqrt(D) * u32`` relative, is far below the noise.

**Labels** may differ only where the two largest logits (or a logit and its threshold) are closer than twice the
tolerance of logits.

Nothing here is fitted to the differences that the check then finds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from embedcache.dataset import evenly_spread
from embedcache.equivalence.bits import Array
from embedcache.equivalence.features import Recomputed
from embedcache.equivalence.rows import Subject
from embedcache.equivalence.standard import StandardModel
from embedcache.equivalence.training import TOLERATED, Record, differences_of, parts, train
from embedcache.features import InMemory
from embedcache.spec import plain_name
from embedcache.task import CLASSIFICATION, Flags, Task

UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
ROUNDINGS = 4
DELTA = 2.0**-10
MISSED = 1e-3
DRAWS = 3


def local_error(longest: int, compute_dtype: str) -> float:
    """Return the relative error of one matrix product over ``longest`` numbers and what is rounded after it."""
    return math.sqrt(longest * UNIT["float32"] ** 2 + ROUNDINGS * UNIT[compute_dtype] ** 2)


def longest_axis(network: nn.Module) -> int:
    """Return the longest axis of a weight matrix, embeddings aside: an upper bound of K. A convolution is a matrix of
    its filters' values.
    """
    return max(
        (
            max(parameter.shape[0], parameter[0].numel())
            for module in network.modules()
            if not isinstance(module, nn.Embedding)
            for parameter in module.parameters(recurse=False)
            if parameter.dim() >= 2
        ),
        default=1,
    )


def conditioning(network: nn.Module, features: Callable[[nn.Module], Mapping[str, Tensor]]) -> dict[str, Array]:
    """Return kappa of each feature set, float64 [...]: how much relative noise on every weight moves a row's features.

    ``features`` runs a network over some rows and gives [n, ...] by name; the network itself is left as it is.
    """
    exact = copy.deepcopy(network).float().eval()
    base = features(exact)
    generator = torch.Generator().manual_seed(0)
    changes: dict[str, list[Array]] = {name: [] for name in base}
    for _ in range(DRAWS):
        with torch.no_grad():
            for value, original in zip(exact.parameters(), network.parameters(), strict=True):
                noise = torch.randn(value.shape, generator=generator).to(value.device)
                value.copy_(original.float() * (1 + DELTA * noise))
        for name, moved in features(exact).items():
            changes[name].append((moved - base[name]).double().cpu().numpy() / DELTA)
    return {name: _kappa(np.stack(change), base[name].cpu().numpy()) for name, change in changes.items()}


def _kappa(change: Array, base: Array) -> Array:
    """Return kappa [...] from changes [draws, n, ...] of features [n, ...]."""
    component = np.sqrt(np.square(change).mean(axis=(0, 1)))
    share = np.divide(change, component, out=np.zeros_like(change), where=component > 0)
    row = np.sqrt(np.square(share).mean(axis=(0, *range(2, change.ndim))))
    kappa = np.asarray(component * row.max())
    # What comes out of a ReLU is 0 in most rows, where noise moves nothing: the rows at hand may hardly tell how it
    # moves where it is not. The usual component of that sort then stands for each that seems to be moved less.
    rectified = (base == 0).any(axis=0)
    moved = kappa[rectified & (kappa > 0)]
    return np.where(rectified, np.maximum(kappa, np.median(moved) if moved.size else 0.0), kappa)


def feature_tolerance(kappa: Array, longest: int, compute_dtype: str, values: int) -> Array:
    """Return how far apart any of so many values of a feature may be, float64 [...] as ``kappa``; see the module."""
    spread = math.sqrt(2) * local_error(longest, compute_dtype) * np.asarray(kappa)
    return np.asarray(spread * math.sqrt(2 * math.log(2 * max(values, 1) / MISSED)))


def storage_tolerance(largest: Array, tolerance: Array, dtype: str) -> Array:
    """Return what rounding both sides to the storage type adds: a unit in the last place of each component's largest.

    ``largest`` and ``tolerance`` are [...]; a component so small that both sides round it to zero adds nothing.
    """
    if dtype == "float32":
        return np.zeros_like(tolerance)
    digits, smallest = {"float16": (11, 2.0**-24), "bfloat16": (8, 2.0**-133)}[dtype]
    unit = np.maximum(largest * 2.0 ** (1 - digits), smallest)
    return np.where(largest + tolerance < smallest / 2, 0.0, unit)


def feature_tolerances(subject: Subject, standard: StandardModel, recomputed: Recomputed) -> dict[str, Array]:
    """Return how far apart the components of each feature set of a cache may be, float64 [...], storage included."""
    rows = subject.rows.features
    contents = subject.raw.contents(rows[evenly_spread(len(rows), 32)])
    network = standard.model
    kappa = conditioning(
        network, lambda moved: standard.with_network(moved).vectors(contents, subject.feature_specs)[0]
    )  # fmt: skip
    longest, compute = longest_axis(network), str(subject.cache.spec["compute_dtype"])
    tolerances = {}
    for name, report in recomputed.reports.items():
        computed = feature_tolerance(kappa[plain_name(name)[0]], longest, compute, report.total.values)
        tolerances[name] = computed + storage_tolerance(report.largest, computed, report.feature.dtype)
    return tolerances


def training_tolerances(subject: Subject, cached: Record, tolerance: Array) -> dict[str, float]:
    """Return the tolerance of each quantity of training, given the one [...] of the features that it reads."""
    plan, rows = subject.plan, subject.rows
    x, evaluation = (subject.cache.of_rows(part, plan.feature) for part in (rows.train, rows.evaluate))
    tolerances = dict.fromkeys(TOLERATED, 0.0)
    base = {**parts(cached, relative=True), "logits": {"row": cached.logits}}
    for draw in range(DRAWS):
        moved = train(plan, noisy(x, tolerance, draw), subject.cached_targets, noisy(evaluation, tolerance, draw + 100))
        moved_parts = {**parts(moved, relative=True), "logits": {"row": moved.logits}}
        for what, values in base.items():
            if what in TOLERATED or what == "standardisation":
                largest = differences_of(values, moved_parts[what])[0].largest
                tolerances[what] = max(tolerances.get(what, 0.0), 2 * largest)
    return tolerances


def noisy(x: InMemory, tolerance: Array, seed: int) -> InMemory:
    """Return features with uniform noise within the tolerance; where a ReLU left exactly 0, rounding leaves it too."""
    noise = np.random.Generator(np.random.PCG64(seed)).uniform(-1, 1, x.values.shape)
    return replace(x, values=np.where(x.values == 0, x.values, x.values + noise * tolerance).astype(np.float32))


def labels_may_differ(logits: Array, tolerance: float, task: Task) -> Flags:
    """Return for which rows (or, multi-label, rows and labels) rounding may decide the label."""
    if task is not CLASSIFICATION:
        return np.asarray(np.abs(logits) <= 2 * tolerance)
    ordered = np.sort(logits, axis=1)
    if ordered.shape[1] < 2:
        return np.zeros(len(logits), bool)
    return np.asarray(ordered[:, -1] - ordered[:, -2] <= 2 * tolerance)
