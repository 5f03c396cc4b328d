"""Runs and sweeps, shown by the trackers that people already look at.

============  ======================================================================
``records``   a run's or a sweep's folder -> settings, curves, metrics and a page
``trackers``  those, as TensorBoard, MLflow, Weights & Biases and Trackio take them
============  ======================================================================

A tracker is told of each epoch, and of each head that a sweep keeps, as they come (``Reporting``), and of everything
else once it is on disk: nothing that a tracker does, or a network does to it, can cost a run. What failed can be sent
again from the folder (``track``), by the same way.
"""

from embedcache.tracking.trackers import TRACKERS, Reporting, refuse_missing, track

__all__ = ["TRACKERS", "Reporting", "refuse_missing", "track"]
