"""Finished runs and sweeps, sent to the trackers that people already look at.

============  ======================================================================
``records``   a run's or a sweep's folder -> settings, curves, metrics and a page
``trackers``  those, as TensorBoard, MLflow, Weights & Biases and Trackio take them
============  ======================================================================

A tracker is told when everything is on disk: heads train in seconds, a sweep's table is known at its end, and nothing
that a tracker does, or a network does to it, can then cost a run. What failed can be sent again from the folder.
"""

from embedcache.tracking.trackers import TRACKERS, refuse_missing, track

__all__ = ["TRACKERS", "refuse_missing", "track"]
