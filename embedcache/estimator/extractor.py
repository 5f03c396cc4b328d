"""scikit-learn estimators: heads that fit on features, and a transformer from raw text to cached features."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from embedcache.backbone import LoadedBackbone, contents_hash, load_backbone, model_name, probe_of, resolve_model
from embedcache.cache import FeatureCache
from embedcache.errors import (
    BackboneMismatchError,
    CacheLockedError,
    FeatureError,
    InputError,
    quiet,
    warn,
)
from embedcache.examples import Content, Examples, content_of, examples_of
from embedcache.extract import run
from embedcache.fingerprint import canonical_json, hash_json
from embedcache.numerics import Probe, difference
from embedcache.spec import BackboneSettings, ExtractionSpec, ModelSource, checked_range, differences_text
from embedcache.wording import counted, shortened

LOCK_PATIENCE = 600.0
"""Seconds that a transform waits for another process that extracts into the same cache."""


class FeatureExtractor(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Turns raw texts or pictures into features; each row is computed once, however often a pipeline is fitted.

    A picture is a path, a file's bytes, a PIL image, or an array of uint8, such as one of a stack [N, H, W, 3].


    Args:
        model: local folder or hub name; None for the packaged all-MiniLM-L6-v2.
        pooling: one feature set, such as ``"auto"``, ``"mean"`` or ``"cls@-2"``.
        cache_dir: where features are kept; None for ``embedcache`` in the user's cache directory.
        max_length, compute_dtype, device, content, pixel_range: as in ``load_backbone``.

    There is one cache folder for each content of a backbone, each setting, and each kind of machine, told by its probe.
    Several processes may use it at once: one extracts while the others wait. Fitting stores the backbone's identity,
    which is made of content hashes, in ``identity_``. A model whose files have changed since then is refused until it
    is fitted again, also after unpickling. ``probe_`` is what the machine computed then: on a machine that computes
    other bits, an ``EmbedcacheWarning`` says how far off they are.

    Example::

        make_pipeline(FeatureExtractor(), LogisticRegression()).fit(texts, labels)
    """

    def __init__(
        self,
        model: Path | str | None = None,
        pooling: str = "auto",
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        max_length: int | None = None,
        compute_dtype: str = "float32",
        device: str = "auto",
        content: str | None = None,
        pixel_range: tuple[float, float] | None = None,
    ) -> None:
        self.model = model
        self.pooling = pooling
        self.cache_dir = cache_dir
        self.max_length = max_length
        self.compute_dtype = compute_dtype
        self.device = device
        self.content = content
        self.pixel_range = pixel_range

    def fit(self, X: Any, y: Any = None) -> FeatureExtractor:
        """Load the backbone. Nothing is learned from the rows."""
        backbone = self._backbone()
        feature = backbone.feature_sets[0]
        if feature.kind != "pooled":
            raise FeatureError(f"{feature.name} is not one vector a row: choose a pooling such as mean or cls")
        self.n_features_out_ = feature.dim
        self.identity_ = ExtractionSpec(backbone.identity)
        self.probe_ = _probe_of(backbone)
        return self

    def transform(self, X: Any) -> npt.NDArray[np.float32]:
        """Return features, float32 [N, D], computing only the rows that were never seen. ``X`` holds N rows.

        Raises ``BackboneMismatchError`` when the model is not the one this was fitted with.
        """
        check_is_fitted(self, "identity_")
        examples = _examples(X, self.identity_)
        backbone = self._fitted_backbone()
        warn(difference(self.probe_, _probe_of(backbone)).notes("what FeatureExtractor was fitted on"))
        path = self._folder(backbone)
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            places = _places(path, examples.keys)
            if places is not None:
                return np.array(places[0].take(places[1]))
            try:
                with quiet():
                    run(examples, backbone, path)
            except CacheLockedError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def get_feature_names_out(self, input_features: Any = None) -> npt.NDArray[np.object_]:
        """Return ``feature0`` ... ``feature{D-1}``."""
        check_is_fitted(self)
        return np.array([f"feature{number}" for number in range(self.n_features_out_)], dtype=object)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        tags.requires_fit = True
        return tags

    def _backbone(self, shapes: object = None) -> LoadedBackbone:
        source = ModelSource(model_name(self.model), device=self.device)
        asked = BackboneSettings(
            (self.pooling,), max_length=self.max_length, compute_dtype=self.compute_dtype, content=self.content,
            pixel_range=None if self.pixel_range is None else checked_range(self.pixel_range),
        )  # fmt: skip
        return _loaded(source, asked, None if shapes is None else canonical_json(shapes))

    def _fitted_backbone(self) -> LoadedBackbone:
        backbone = self._backbone()
        shapes = self.identity_.get("shapes")
        if backbone.identity.get("shapes") != shapes:  # fitted on another kind of device
            backbone = self._backbone(shapes)
        if differences := self.identity_.differences(backbone.identity):
            shown = differences_text(differences, "fitted with", "this is")
            raise BackboneMismatchError(
                f"FeatureExtractor was fitted with another model than {backbone.provenance.get('model')} is now "
                f"({shown}): what was fitted on its features would be wrong; bring that model back, or fit again"
            )
        return backbone

    def _folder(self, backbone: LoadedBackbone) -> Path:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        root = Path(self.cache_dir) if self.cache_dir is not None else Path(home) / "embedcache" / "features"
        probe = _probe_of(backbone)
        return root / hash_json([backbone.identity, None if probe is None else probe.bits])[:16]


def _loaded(source: ModelSource, asked: BackboneSettings, policy: str | None) -> LoadedBackbone:
    """Load a backbone once for each content of its folder: pipelines clone their steps at every fit."""
    local = source.model is None or Path(source.model).expanduser().is_dir()
    folder = resolve_model(source.model) if local else _from_hub(str(source.model))
    return _of_contents(contents_hash(folder), source, asked, policy)


@lru_cache(maxsize=8)
def _from_hub(name: str) -> Path:
    return resolve_model(name)  # asks the hub, which one question a process is enough for


@lru_cache(maxsize=2)
def _of_contents(folder_hash: str, source: ModelSource, asked: BackboneSettings, policy: str | None) -> LoadedBackbone:
    shapes = json.loads(policy) if policy is not None else None  # as text, to be a key of this cache
    return load_backbone(**source.arguments(), **replace(asked, shapes=shapes).arguments())


@lru_cache(maxsize=2)
def _probe_of(backbone: LoadedBackbone) -> Probe | None:
    return probe_of(backbone)


def _column(X: Any, content: Content) -> list[object]:
    """Return the values of one column: of a list, an array [N] or [N, 1], a stack of pictures, or a table."""
    if isinstance(X, (str, os.PathLike)):
        raise InputError(f"X is one {content.one}: expected a list of {content.one}s")
    dimensions = getattr(X, "ndim", 1)
    if dimensions > 1 and dimensions not in content.stacked:
        if X.shape[1] != 1:
            raise InputError(f"X has {counted(X.shape[1], 'column')}: expected one, of {content.noun}s")
        X = X.iloc[:, 0] if hasattr(X, "iloc") else np.asarray(X).ravel()
    return list(X)


def _examples(X: Any, extraction: ExtractionSpec) -> Examples:
    """Return rows of X as an input, checked as their kind of content is."""
    kind, pixel_range = extraction.content or "text", extraction.pixel_range
    content = content_of(kind, pixel_range)
    values = _column(X, content)
    if not values:
        raise InputError(f"there are no {content.noun}s: expected at least one")
    return examples_of(values, kind, lambda row: f"X[{row}] is {shortened(values[row])}", pixel_range)


def _places(path: Path, keys: npt.NDArray[np.uint8]) -> tuple[FeatureCache, npt.NDArray[np.int64]] | None:
    """Return the open cache and where each key is, or None while a key is missing."""
    from embedcache.errors import CacheNotFoundError, IncompleteCacheError

    try:
        cache = FeatureCache.open(path)
    except (CacheNotFoundError, IncompleteCacheError):
        return None
    places = cache.lookup(keys)
    return None if (places < 0).any() else (cache, places)


__all__ = ["FeatureExtractor"]
