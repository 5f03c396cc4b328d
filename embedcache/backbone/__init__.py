"""A Hugging Face model, frozen and in eval mode: rows -> features.

``load_backbone`` gives an object with the members of ``Backbone``; anything that has them can be cached, images
included. Nothing here is guessed from a model's name: widths, layers and the longest input are read off the loaded
model, and everything that could change a feature is hashed into ``identity``.

``folder`` finds a model's folder, ``loading`` makes a network of it, ``model`` makes features of its hidden states and
knows no kind of content. ``text`` prepares texts for it; ``load`` puts the two together. ``compute`` runs any backbone
over rows at canonical shapes, ``processes`` does so in other processes where there are many cores, and ``probe`` over
a few built-in rows, to know what this machine computes.
"""

from __future__ import annotations

from embedcache.backbone.compute import FeatureArrays, compute_features, run_plan
from embedcache.backbone.device import POSITIONS, choose_device, needs_spare_row, side_by_side, threads
from embedcache.backbone.folder import (
    DEFAULT_MODEL,
    model_name,
    resolve_model,
    weight_files,
)
from embedcache.backbone.folder_state import contents_hash
from embedcache.backbone.load import TextBackbone, load_again, load_backbone
from embedcache.backbone.model import FrozenModel, Inputs
from embedcache.backbone.probe import probe_of
from embedcache.backbone.processes import Workers, workers
from embedcache.backbone.protocol import Backbone, Prepared, vectors_of
from embedcache.backbone.sentence_transformers import SentenceTransformerSettings
from embedcache.backbone.text import Tokens, text_inputs

__all__ = [
    "DEFAULT_MODEL",
    "POSITIONS",
    "Backbone",
    "FeatureArrays",
    "FrozenModel",
    "Inputs",
    "Prepared",
    "SentenceTransformerSettings",
    "TextBackbone",
    "Tokens",
    "Workers",
    "choose_device",
    "compute_features",
    "contents_hash",
    "load_again",
    "load_backbone",
    "model_name",
    "needs_spare_row",
    "probe_of",
    "resolve_model",
    "run_plan",
    "side_by_side",
    "text_inputs",
    "threads",
    "vectors_of",
    "weight_files",
    "workers",
]
