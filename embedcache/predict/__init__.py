"""Backbone + trained head: contents of rows -> labels and probabilities.

=============  =====================================================================
``predictor``  ``Predictor``: loads both, refuses another backbone, streams rows
``nearest``    the training rows that lie nearest to a row, from the cache
``tables``     predictions as CSV, JSON lines and Parquet, row by row
=============  =====================================================================
"""

from embedcache.predict.nearest import NearestRows, Neighbour
from embedcache.predict.predictor import Prediction, Predictor, backbone_of, encoder_of, refuse_other_backbone
from embedcache.predict.tables import (
    FORMATS,
    PredictionTable,
    format_of,
    json_of,
    refuse_without_pyarrow,
    table_in,
    text_table,
)

__all__ = [
    "FORMATS",
    "NearestRows",
    "Neighbour",
    "Prediction",
    "PredictionTable",
    "Predictor",
    "backbone_of",
    "encoder_of",
    "format_of",
    "json_of",
    "refuse_other_backbone",
    "refuse_without_pyarrow",
    "table_in",
    "text_table",
]
