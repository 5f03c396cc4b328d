"""FeatureCache: manifest, shards, row index, splits, arrays and batches. ``FORMAT.md`` specifies the files.

==============  =========================================================================================
``text``        the one form of a manifest, to the byte
``manifest``    which files there are and what they hold; committed last
``files``       a file checked against the manifest, once per process; damaged files, found and set aside
``gather``      row key -> place in the cache; rows out of many shards, mapped or copied
``writer``      one writer at a time: shards, then the dataset
``reader``      splits, targets, ids, features as arrays
``torch_data``  the same as a torch ``Dataset``
``join``        relabel and merge
``remote``      a cache behind a URL: its manifest, which files are there, their bytes
``fetch``       a local copy of it, which is what is read
``push``        a finished cache, put behind a URL
``untrusted``   a stranger's cache, looked into by a limited child process
==============  =========================================================================================
"""

from embedcache.cache.fetch import local_folder, pull
from embedcache.cache.files import verify
from embedcache.cache.join import merge, relabel
from embedcache.cache.manifest import SET_ASIDE
from embedcache.cache.push import push
from embedcache.cache.reader import FeatureCache
from embedcache.cache.writer import CacheWriter, known_rows, read_spec

__all__ = [
    "SET_ASIDE",
    "CacheWriter",
    "FeatureCache",
    "known_rows",
    "local_folder",
    "merge",
    "pull",
    "push",
    "read_spec",
    "relabel",
    "verify",
]
