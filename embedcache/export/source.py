"""The run that is exported, and the rows on which the export is tried."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.backbone import FrozenModel, resolve_model
from embedcache.backbone.text import Texts
from embedcache.cache import FeatureCache
from embedcache.errors import BackboneMismatchError, SpecError
from embedcache.examples import Examples
from embedcache.heads import TrainedHead
from embedcache.predict import Predictor, backbone_of
from embedcache.shard import Array
from embedcache.spec import BackboneSettings, ModelSource

ROWS = 200
"""Rows of a cache that an export is tried on where none are given, or drawn features."""
TEXTS = 48
"""Built-in texts, the longest of them some 300 tokens."""
_FEATURES_SEED = 0


@dataclass(frozen=True)
class Source:
    """A run to be exported: its head, and what the export is tried on.

    ``examples`` are rows for the whole, and ``cache`` has features for the head alone; built-in ones without.
    """

    run: Path
    head: TrainedHead
    source: ModelSource
    examples: Examples | None = None
    cache: FeatureCache | None = None

    @cached_property
    def predictor(self) -> Predictor:
        """The head with its backbone. Raises ``BackboneMismatchError`` where no name leads to it."""
        if not self.head.extraction.has_backbone:
            raise BackboneMismatchError(
                f"{self.run} reads features that no model of a name made: export the head alone, with --head-only"
            )
        backbone = backbone_of(self.head, self.source)
        if self.settings.compute_dtype != "float32":
            raise SpecError(
                f"{self.run} was trained on features computed in {self.settings.compute_dtype}, which no other tool "
                "computes to 1e-5: export the head alone (--head-only), or extract in float32"
            )
        return Predictor(self.head, backbone)

    @property
    def backbone(self) -> FrozenModel[Any]:
        """The backbone."""
        backbone = self.predictor.backbone
        assert isinstance(backbone, FrozenModel)
        return backbone

    @property
    def texts(self) -> Texts:
        """How texts become token ids."""
        content = self.backbone.content
        assert isinstance(content, Texts)
        return content

    @property
    def settings(self) -> BackboneSettings:
        """How the backbone makes the features."""
        settings = self.head.extraction.settings
        assert settings is not None
        return settings

    @property
    def is_text(self) -> bool:
        """Whether rows are texts."""
        return self.head.extraction.content != "image"

    def backbone_folder(self) -> Path:
        """Return the folder of the backbone's model."""
        named = self.source.or_else(self.head.model, self.head.revision)
        return resolve_model(named.model, named.revision)

    @cached_property
    def rows(self) -> list[bytes]:
        """Contents of the rows that the whole is tried on."""
        if self.examples is not None:
            return list(self.examples.contents())
        kept = None if self.cache is None else self.cache.inputs()
        if kept is not None:
            return [kept[row] for row in range(min(len(kept), ROWS))]
        return _texts(self.backbone.probe_rows) if self.is_text else _pictures(self.backbone.probe_rows)

    @cached_property
    def expected(self) -> Array:
        """What the head gives of ``rows``, float64 [n, C]."""
        return self.head.probabilities(self.predictor.features(self.rows))

    @cached_property
    def features(self) -> Array:
        """Features that the head alone is tried on, float32 [n, D] or [n, L, D]; [n, T, D] of a token-level set."""
        feature = self.head.feature
        if feature.kind == "tokens":
            raise SpecError("a head on tokens is exported with its backbone: leave out --head-only")
        if self.cache is not None:
            return np.array(self.cache.take(self.cache.places()[:ROWS], feature.name))
        draw = np.random.Generator(np.random.PCG64(_FEATURES_SEED)).normal(size=(ROWS, *feature.row_shape))
        mean, scale = (
            next((v for n, v in self.head.state.items() if n.endswith(e)), None) for e in (".mean", ".scale")
        )
        if mean is not None and scale is not None:  # such as it was trained on
            draw = draw / np.where(scale == 0, 1.0, scale) + mean
        return draw.astype(np.float32)


def _texts(rows: Any) -> list[bytes]:
    """Return texts of all lengths, beginnings of the built-in ones, repeated until they are long enough."""
    whole = [" ".join([row.decode("utf-8")] * 100)[:1200] for row in rows]
    lengths = np.geomspace(1, 1200, TEXTS).astype(int).tolist()
    texts = [whole[number % len(whole)][:length].strip() for number, length in enumerate(lengths)]
    return [text.encode() for text in texts if text]


def _pictures(rows: Any) -> list[bytes]:
    """Return the built-in pictures, and coloured noise of several sizes as PNG files."""
    from PIL import Image

    draw, files = np.random.Generator(np.random.PCG64(0)), list(rows)
    for number in range(16):
        size = (8 + 3 * number, 5 + 2 * number, 3)
        pixels = draw.integers(0, 256, (2, 2, 3)).repeat(size[0] // 2, 0).repeat(size[1] // 2, 1)
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    return files
