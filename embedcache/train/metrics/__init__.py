"""What heads are judged by: the definitions of scikit-learn, computed on numpy alone.

scikit-learn is the oracle of the tests, not an import: loading it takes as long as training a head. Every metric here
is prepared once for some predictions and can then be computed for any weights of the rows, which makes folds (weights
0 and 1) and the bootstrap (how often a row was drawn) one multiplication each.

Conventions. Rows without label (-1, 255, NaN) do not count. Averages over classes are over the classes that the split
has; those it has not are named in ``missing_classes``. What is not defined, such as ROC-AUC with one class only, is
NaN from ``score`` and None from ``measure``; so is everything about outputs that hold NaN or infinity, from ``score``,
where a head that diverged must never look like the best. A label is on where its probability is *at least* the
threshold.
"""

from embedcache.train.metrics.formulas import BINS
from embedcache.train.metrics.measuring import (
    METRICS,
    Metric,
    interval,
    measure,
    metric_named,
    metrics_of,
    percentile_interval,
    reliability,
    resampled_scores,
    score,
    scores,
    wilson,
)

__all__ = [
    "BINS",
    "METRICS",
    "Metric",
    "interval",
    "measure",
    "metric_named",
    "metrics_of",
    "percentile_interval",
    "reliability",
    "resampled_scores",
    "score",
    "scores",
    "wilson",
]
