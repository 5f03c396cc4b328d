"""The models of a check: the backbone that made a cache, and the same model as transformers loads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from embedcache.backbone import Backbone, compute_features, load_again, resolve_model
from embedcache.cache import FeatureCache
from embedcache.equivalence.bits import Array
from embedcache.equivalence.standard_model import StandardModel
from embedcache.errors import BackboneError
from embedcache.spec import ExtractionSpec, ModelSource


def load_live(cache: FeatureCache, source: ModelSource, features: Sequence[str] = ()) -> Backbone:
    """Load the backbone that a cache was made with, set up as its spec says, storing nothing in fewer bits.

    Raises ``BackboneError`` when it is not there any more.
    """
    settings = ExtractionSpec.from_json(cache.spec).settings
    if settings is None:
        raise BackboneError(
            f"{cache.path} was made by a backbone of one's own, which no name leads to: pass it as backbone=..."
        )
    settings = replace(settings, features=tuple(features) or tuple(cache.feature_sets), storage_dtype=None)
    return load_again(settings, source, made_with(cache), f"{cache.path} was made with")


def made_with(cache: FeatureCache) -> ModelSource:
    """Return where the model of a cache was, as its last extraction recorded it."""
    made = cache.provenance()[-1] if cache.provenance() else {}
    return ModelSource(made.get("model"), made.get("revision"))


def other_poolings(
    cache: FeatureCache, source: ModelSource, backbone: Backbone, contents: Sequence[bytes]
) -> Mapping[str, Array]:
    """Return what every pooling of a cache's model makes of some rows, to find the one that was used."""
    poolings = [name for name in getattr(backbone, "poolings", ()) if name != "tokens"]
    if not ExtractionSpec.from_json(cache.spec).has_backbone or not poolings:
        return {}
    names = [*poolings, *(f"l2:{name}" for name in poolings)]
    try:
        other = load_live(cache, source, names)
    except BackboneError:  # the model was passed in, and is nowhere else
        return {}
    return {name: np.asarray(compute_features(other, contents, name)) for name in names}


def load_standard(cache: FeatureCache, source: ModelSource, backbone: Backbone) -> StandardModel | None:
    """Load the model as transformers does; None where the backbone is not a model that transformers loads."""
    name = source.model if source.model is not None else getattr(backbone, "name", None) or made_with(cache).model
    if name is None or not ExtractionSpec.from_json(cache.spec).has_backbone:
        return None
    device = str(getattr(backbone, "device", "cpu"))
    folder = resolve_model(name, source.revision)
    return StandardModel(folder, cache.spec, device, trust_remote_code=source.trust_remote_code)
