"""embedcache: run a frozen backbone once, cache its features in HDF5, train heads on them."""

__version__ = "0.1.0"
