"""Backbone + trained head: contents of rows -> labels and probabilities."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arguments import checks_arguments
from embedcache.backbone import Backbone, Encoder, compute_features, compute_sets, load_again, probe_of, views_of
from embedcache.cache import FeatureCache
from embedcache.errors import BackboneMismatchError, InputError, SpecError, warn
from embedcache.examples import Content, Examples, content_of
from embedcache.features import InMemory
from embedcache.heads import TrainedHead
from embedcache.numerics import difference
from embedcache.predict.nearest import NearestRows, Neighbour
from embedcache.shard import Array
from embedcache.spec import ExtractionSpec, ModelSource, differences_text, plain_name
from embedcache.task import Named, task_named
from embedcache.wording import shortened


@dataclass(frozen=True)
class Prediction:
    """What a head predicts of one row.

    ``label`` is the class (a tuple of classes for multilabel, a tuple of numbers for regression). ``probabilities``
    maps each class to its probability, or each target to its value for regression. ``confidence`` is the
    probability of ``label``, ``margin`` how much more probable it is than the next class, or how far the closest
    probability of a multilabel head is from its threshold; None where there is no such thing. ``nearest`` are the
    training rows nearest to it, the nearest first, where the predictor has a cache to explain it with.
    """

    label: Named
    confidence: float | None
    probabilities: Mapping[str, float]
    margin: float | None = None
    nearest: tuple[Neighbour, ...] = ()


class Predictor:
    """A trained head and the backbone that its features come from.

    ``kind`` is what it reads, ``text`` or ``image``, and ``pixel_range`` what its cache recorded of pictures whose
    pixels have no range of their own. ``numerics`` says whether this machine computes the features that
    the head was trained on to the bit, or how far off they are at most: the probe of the head's cache is run here,
    which takes a few forward passes. With ``average_views``, probabilities are the mean over the plain picture and its
    views, made as those that the head was trained on. ``nearest`` finds training rows to explain each prediction with.

    Example::

        predictor = Predictor.load("runs/best")
        predictor(["Excellent movie!"])[0].label
    """

    @checks_arguments()
    def __init__(
        self, head: TrainedHead, backbone: Backbone, *, average_views: bool = False, nearest: NearestRows | None = None
    ) -> None:
        if average_views and not views_of(backbone):
            raise SpecError("average_views is given, and the backbone makes no views: load it with views")
        self.average_views = average_views
        self.nearest = nearest
        self.head = head
        self.backbone = backbone
        extraction = ExtractionSpec(backbone.identity)
        self.kind, self.pixel_range = extraction.content or "text", extraction.pixel_range
        refuse_other_backbone(head, backbone)
        here = probe_of(backbone) if head.probe is not None else None
        self.numerics = difference(head.probe, here and here.only(head.feature.name))
        warn(self.numerics.notes("what the head was trained on"))

    @classmethod
    @checks_arguments()
    def load(
        cls, run: Path | str, *, model: Path | str | None = None, device: str = "auto", trust_remote_code: bool = False,
        average_views: bool = False, encoder: Callable[[list[Any]], Any] | None = None, explain: int | None = None,
        cache: FeatureCache | Path | str | None = None,
    ) -> Predictor:  # fmt: skip
        """Load a run folder and the backbone it names; ``model`` says where the same backbone is now.

        A head on the features of an encoder of one's own (``extract(..., encoder=...)``) needs that ``encoder`` here.
        ``explain`` is how many of the training rows in ``cache`` each prediction is to name; see ``NearestRows``.

        Raises:
            BundleError: the folder is not a run, or a damaged one.
            BackboneMismatchError: that backbone, its settings or the cache are not those the head was trained on.
        """
        head = TrainedHead.from_pretrained(run)
        if (explain is None) != (cache is None):
            raise SpecError("explain and cache go together: how many training rows to show, and the cache they are in")
        nearest = None if explain is None or cache is None else NearestRows(cache, head, explain)
        if encoder is not None:
            return cls(head, encoder_of(head, encoder), nearest=nearest)
        source = ModelSource(model, device=device, trust_remote_code=trust_remote_code)
        backbone = backbone_of(head, source, views=average_views)
        return cls(head, backbone, average_views=average_views, nearest=nearest)

    def __call__(self, rows: Iterable[object]) -> list[Prediction]:
        """Predict texts, or pictures (paths, files' bytes, PIL images, arrays of uint8), in order.

        Raises ``InputError`` for one that cannot be used.
        """
        if isinstance(rows, (str, os.PathLike)) or not isinstance(rows, Iterable):
            given = shortened(rows) if not isinstance(rows, (str, os.PathLike)) else f"one {self._content.one}"
            raise InputError(f"got {given}: expected a list of {self._content.noun}s")
        return list(self.stream(rows))

    def stream(self, rows: Iterable[object]) -> Iterator[Prediction]:
        """Predict rows one after the other with flat memory."""
        content, waiting = self._content, iter(rows)
        number = 0
        while block := list(islice(waiting, content.window)):
            yield from self.contents(content.encode_all(block, partial(_row_name, number)))
            number += len(block)

    @property
    def _content(self) -> Content:
        return content_of(self.kind, self.pixel_range)

    def contents(self, contents: Sequence[bytes]) -> list[Prediction]:
        """Predict rows by their canonical content, as ``Examples.contents`` gives it; equal rows are computed once."""
        if not contents:
            return []
        places = {content: place for place, content in enumerate(dict.fromkeys(contents))}
        x, values = self._computed(list(places))
        near = [()] * len(places) if self.nearest is None else self.nearest.of(x)
        made = [self._prediction(*row) for row in zip(values, near, strict=True)]
        return [made[places[content]] for content in contents]

    def stream_examples(self, examples: Examples) -> Iterator[tuple[str, Prediction]]:
        """Predict every row of an input and yield ``(id, prediction)``, in order, with flat memory."""
        if examples.kind != self.kind:
            raise InputError(f"the head reads rows of the kind {self.kind}, and these are {examples.kind}")
        contents = examples.contents()
        row = 0
        while block := list(islice(contents, self._content.window)):
            for prediction in self.contents(block):
                yield examples.ids[row], prediction
                row += 1

    def _computed(self, contents: Sequence[bytes]) -> tuple[InMemory, Array]:
        """Return the plain features of N rows, and their probabilities [N, C]."""
        if not self.average_views:
            x = self.features(contents)
            return x, self.head.probabilities(x)
        names = [feature.name for feature in self.backbone.feature_sets]
        of_head = [name for name in names if plain_name(name)[0] == self.head.feature.name]
        sets = compute_sets(self.backbone, contents, of_head)
        of_each = [self.head.probabilities(replace(x, feature=self.head.feature)) for x in sets.values()]
        return sets[self.head.feature.name], np.asarray(np.mean(of_each, axis=0))

    def features(self, contents: Sequence[bytes]) -> InMemory:
        """Return what the cache would hold for these rows; ``values`` [N, D] or [N, L, D], or of all their tokens."""
        return compute_features(self.backbone, contents, self.head.feature.name)

    def _prediction(self, values: Array, nearest: tuple[Neighbour, ...]) -> Prediction:
        names, thresholds = self.head.class_names, np.asarray(self.head.thresholds)
        by_name = {name: float(value) for name, value in zip(names, values, strict=True)}
        task = task_named(self.head.task)
        label = task.named(task.decide(values, thresholds), names)
        margin = task.margin(values, thresholds)
        return Prediction(label, by_name[label] if isinstance(label, str) else None, by_name, margin, nearest)


def _row_name(first: int, row: int) -> str:
    return f"row {first + row}"


def backbone_of(head: TrainedHead, source: ModelSource, *, views: bool = False) -> Backbone:
    """Load the backbone a head was trained on, with the settings it was trained with; with its ``views``, or without.

    Raises ``SpecError`` where there were no views.
    """
    spec = head.extraction
    if spec.origin is not None:
        needs = (
            "pass it in Python: Predictor.load(RUN, encoder=...)"
            if spec.origin.kind == "encoder"
            else "make features of the rows where these came from, and give them to TrainedHead.from_pretrained(RUN)"
        )
        raise BackboneMismatchError(
            f"this head reads features of {spec.origin.to_text()}, which no name leads to: {needs}"
        )
    if not spec.has_backbone:
        raise BackboneMismatchError("this head was trained on features without a backbone: give it features, not texts")
    if spec.settings is None:
        raise BackboneMismatchError("this head was trained on features of another sort of backbone than texts have")
    settings = replace(spec.settings, features=(head.feature.name,))
    if views and not settings.views:
        raise SpecError("the head's cache has no views to average over: train it on one made by extract --views N")
    settings = settings if views else replace(settings, views=None, augment=None)
    return load_again(settings, source, ModelSource(head.model, head.revision), "the head was trained on")


MOST_APART = 0.05
"""How far off an encoder's built-in rows may be, in units of their own size, before it is taken to be another one."""


def encoder_of(head: TrainedHead, function: Callable[[list[Any]], Any]) -> Encoder:
    """Return the encoder that a head's features come from, as it says. Raises ``BackboneMismatchError``.

    Its identity is what its user wrote, so its built-in rows are compared too: another model is refused, other last
    bits are a note.
    """
    origin = head.extraction.origin
    if origin is None or origin.kind != "encoder":
        raise BackboneMismatchError("encoder is given, and this head was not trained on the features of one")
    encoder = Encoder(function, origin, head.feature.dtype, head.feature.dim)
    apart = difference(head.probe, probe_of(encoder))
    if not apart.same_bits and apart.status != "unknown" and apart.relative > MOST_APART:
        raise BackboneMismatchError(
            f"the encoder is not the one that the head was trained on ({origin.to_text()}): {apart.to_text()}"
        )
    return encoder


def refuse_other_backbone(head: TrainedHead, backbone: Backbone) -> None:
    """Raise ``BackboneMismatchError`` with a readable difference unless these are the head's own features."""
    if differences := head.extraction.differences_for(head.feature.name, ExtractionSpec(backbone.identity)):
        raise BackboneMismatchError(
            f"the head was trained on the features of another backbone "
            f"({differences_text(differences, 'trained on', 'this is')}): "
            "its answers would be meaningless; give the same model with --model, or train a head on this one"
        )
