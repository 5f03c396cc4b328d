"""A Hugging Face model, frozen and in eval mode: rows -> features.

``load_backbone`` gives an object with the members of ``Backbone``; anything that has them can be cached, images
included. Nothing here is guessed from a model's name: widths, layers and the longest input are read off the loaded
model, and everything that could change a feature is hashed into ``identity``.

``folder`` reads a model's folder, ``network`` makes a network of it, ``model`` makes features of its hidden states and
knows no kind of content. ``text`` prepares texts for it; ``load`` puts the two together and proves that the model
behaves. ``compute`` runs any backbone over rows at canonical shapes, and over a few built-in rows, to know what this
machine computes; ``replicas`` does so on several GPUs.
``encoder`` is a callable of one's own as a backbone.
"""

from __future__ import annotations

from embedcache.backbone.compute import (
    Backbone,
    Prepared,
    Readable,
    StoredSets,
    compute_features,
    compute_sets,
    compute_views,
    kept_for,
    probe_of,
    rows_at_once,
    run_plan,
    vectors_of,
    views_of,
)
from embedcache.backbone.device import (
    MOST_PASSES,
    POSITIONS,
    choose_device,
    choose_devices,
    needs_spare_row,
    side_by_side,
    threads,
)
from embedcache.backbone.encoder import Encoder
from embedcache.backbone.folder import (
    DEFAULT_MODEL,
    SentenceTransformerSettings,
    contents_hash,
    model_name,
    resolve_model,
    weight_files,
)
from embedcache.backbone.load import LoadedBackbone, load_again, load_backbone
from embedcache.backbone.model import FrozenModel, Inputs, Recipe
from embedcache.backbone.replicas import Replicas, replicas_of
from embedcache.backbone.text import Tokens, text_inputs

__all__ = [
    "DEFAULT_MODEL",
    "MOST_PASSES",
    "POSITIONS",
    "Backbone",
    "Encoder",
    "FrozenModel",
    "Inputs",
    "LoadedBackbone",
    "Prepared",
    "Readable",
    "Recipe",
    "Replicas",
    "SentenceTransformerSettings",
    "StoredSets",
    "Tokens",
    "choose_device",
    "choose_devices",
    "compute_features",
    "compute_sets",
    "compute_views",
    "contents_hash",
    "kept_for",
    "load_again",
    "load_backbone",
    "model_name",
    "needs_spare_row",
    "probe_of",
    "replicas_of",
    "resolve_model",
    "rows_at_once",
    "run_plan",
    "side_by_side",
    "text_inputs",
    "threads",
    "vectors_of",
    "views_of",
    "weight_files",
]
