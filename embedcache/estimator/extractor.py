"""scikit-learn estimators: heads that fit on features, and a transformer from raw text to cached features."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from embedcache.backbone import TextBackbone, contents_hash, load_backbone, model_name, probe_of, resolve_model
from embedcache.cache import FeatureCache
from embedcache.errors import BackboneMismatchError, CacheLockedError, FeatureError, InputError, quiet, warn
from embedcache.examples import load_examples
from embedcache.extract import run
from embedcache.fingerprint import canonical_json, hash_json
from embedcache.numerics import Probe, difference
from embedcache.spec import ExtractionSpec, differences_text
from embedcache.wording import counted

LOCK_PATIENCE = 600.0
"""Seconds that a transform waits for another process that extracts into the same cache."""


class FeatureExtractor(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Raw texts in, features out, each text computed once however often a pipeline is fitted.

    Args:
        model: local folder or hub name; None for the packaged all-MiniLM-L6-v2.
        pooling: one feature set, such as ``"auto"``, ``"mean"`` or ``"cls@-2"``.
        cache_dir: where features are kept; None for ``embedcache`` in the user's cache directory.
        max_length, compute_dtype, device: as in ``load_backbone``.

    The cache is a folder for each content of a backbone, each setting, and each kind of machine, by what its probe
    gives; several processes may use it at once: one extracts while the others wait. Fitting keeps the backbone's
    identity, content hashes, in ``identity_``; a model whose files were changed since, in this process or before a
    pickle was read, is refused until it is fitted again. ``probe_`` is what the machine computed then: where another
    one gives other bits, an ``EmbedcacheWarning`` says how far off they are.

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
    ) -> None:
        self.model = model
        self.pooling = pooling
        self.cache_dir = cache_dir
        self.max_length = max_length
        self.compute_dtype = compute_dtype
        self.device = device

    def fit(self, X: Any, y: Any = None) -> FeatureExtractor:
        """Load the backbone. Nothing is learned from the texts."""
        backbone = self._backbone()
        feature = backbone.feature_sets[0]
        if feature.kind != "pooled":
            raise FeatureError(f"{feature.name} is not one vector a text: choose a pooling such as mean or cls")
        self.n_features_out_ = feature.dim
        self.identity_ = dict(backbone.identity)
        self.probe_ = _probe_of(backbone)
        return self

    def transform(self, X: Any) -> npt.NDArray[np.float32]:
        """Return features, float32 [N, D], computing only the texts that were never seen. ``X`` holds N strings.

        Raises ``BackboneMismatchError`` when the model is not the one this was fitted with.
        """
        check_is_fitted(self, "identity_")
        texts = _texts(X)
        if not texts:
            raise InputError("there are no texts: expected at least one")
        backbone = self._fitted_backbone()
        warn(difference(self.probe_, _probe_of(backbone)).notes("what FeatureExtractor was fitted on"))
        path = self._folder(backbone)
        with quiet():  # that texts repeat is what they are kept for
            examples = load_examples([{"text": text} for text in texts], text_column="text", labels="none")
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
        return np.array([f"feature{at}" for at in range(self.n_features_out_)], dtype=object)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        tags.requires_fit = True
        return tags

    def _backbone(self, shapes: Any = None) -> TextBackbone:
        policy = canonical_json(shapes) if shapes is not None else None
        return _loaded(model_name(self.model), self.pooling, self.max_length, self.compute_dtype, self.device, policy)

    def _fitted_backbone(self) -> TextBackbone:
        backbone = self._backbone()
        shapes = self.identity_.get("shapes")
        if backbone.identity.get("shapes") != shapes:  # fitted on another kind of device
            backbone = self._backbone(shapes)
        fitted, here = (ExtractionSpec.from_json(identity) for identity in (self.identity_, backbone.identity))
        if found := fitted.differences(here):
            shown = differences_text(found, "fitted with", "this is")
            raise BackboneMismatchError(
                f"FeatureExtractor was fitted with another model than {backbone.provenance.get('model')} is now "
                f"({shown}): what was fitted on its features would be wrong; bring that model back, or fit again"
            )
        return backbone

    def _folder(self, backbone: TextBackbone) -> Path:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        root = Path(self.cache_dir) if self.cache_dir is not None else Path(home) / "embedcache" / "features"
        probe = _probe_of(backbone)
        return root / hash_json([backbone.identity, None if probe is None else probe.bits])[:16]


def _loaded(
    model: str | None, pooling: str, max_length: int | None, dtype: str, device: str, policy: str | None
) -> TextBackbone:
    """Load a backbone once for each content of its folder: pipelines clone their steps at every fit."""
    local = model is None or Path(model).expanduser().is_dir()
    folder = resolve_model(model) if local else _from_hub(str(model))
    return _of_contents(contents_hash(folder), model, pooling, max_length, dtype, device, policy)


@lru_cache(maxsize=8)
def _from_hub(name: str) -> Path:
    return resolve_model(name)  # asks the hub, which one question a process is enough for


@lru_cache(maxsize=2)
def _of_contents(
    contents: str, model: str | None, pooling: str, max_length: int | None, dtype: str, device: str, policy: str | None
) -> TextBackbone:
    return load_backbone(
        model, features=(pooling,), max_length=max_length, compute_dtype=dtype, device=device,
        policy=json.loads(policy) if policy is not None else None,
    )  # fmt: skip


@lru_cache(maxsize=2)
def _probe_of(backbone: TextBackbone) -> Probe | None:
    return probe_of(backbone)


def _texts(X: Any) -> list[str]:
    if isinstance(X, str):
        raise InputError("X is one string: expected a list of strings")
    if getattr(X, "ndim", 1) > 1 and X.shape[1] != 1:
        raise InputError(f"X has {counted(X.shape[1], 'column')}: expected one, of texts")
    values = X.iloc[:, 0] if getattr(X, "ndim", 1) == 2 and hasattr(X, "iloc") and X.shape[1] == 1 else X
    values = values.ravel() if isinstance(values, np.ndarray) and values.ndim == 2 and values.shape[1] == 1 else values
    texts: Sequence[Any] = list(values)
    wrong = next((at for at, text in enumerate(texts) if not isinstance(text, str) or not text.strip()), None)
    if wrong is not None:
        raise InputError(f"X[{wrong}] is {texts[wrong]!r}: expected a text that is not empty")
    return [str(text) for text in texts]


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
