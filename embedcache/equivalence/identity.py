"""The models of a check: the backbone that made a cache, and whether the one at hand is the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from embedcache.backbone import Backbone, compute_features, load_again, resolve_model
from embedcache.cache import FeatureCache
from embedcache.equivalence.bits import Array, difference
from embedcache.equivalence.pictures import StandardPictures
from embedcache.equivalence.standard import StandardModel
from embedcache.errors import BackboneError
from embedcache.spec import ExtractionSpec, ModelSource

FIELDS = (
    ("backbone.weights", "weights: the model's weight files are not those that the cache was made with"),
    ("backbone.architecture", "architecture: this is another kind of model"),
    ("backbone.config", "configuration: the model's config.json says something else"),
    ("backbone.code", "code: the model's own Python files have changed"),
    ("preprocessing.files", "tokenizer: its files are not those that the cache was made with"),
    ("preprocessing.lower_case", "lower-casing: texts are now lower-cased, or no longer"),
    ("preprocessing.max_length", "maximum length: texts are cut at another length"),
    ("preprocessing.truncation_side", "truncation: longer texts are cut at the other end"),
    ("preprocessing.prompt", "prompt: another text is put before each row"),
    ("preprocessing.decoding", "decoding: images are decoded by another rule"),
    ("preprocessing.pixel_range", "range of pixels: floating-point and 32-bit pixels are scaled otherwise"),
    ("preprocessing.processor", "processor: images are resized, cropped or normalised with other settings"),
    ("preprocessing.resize", "resizing: images are brought to the network's size in another way"),
    ("preprocessing.memory_format", "memory format: pixels lie in memory in another order, for other kernels"),
    ("preprocessing", "preprocessing: rows are prepared another way"),
    ("source", "source: the features come from elsewhere"),
    ("features", "pooling: the feature set is made another way"),
    ("compute_dtype", "compute type: the model computes in another precision"),
    ("storage_dtype", "storage type: features are stored in another precision"),
    ("attention", "attention: another attention kernel"),
    ("execution", "execution: compiled in one of them and eager in the other"),
    ("shapes", "shapes: batches have other canonical shapes"),
)
"""What each field of a spec is responsible for; the first that fits counts."""

ENVIRONMENT = ("device", "cpu_capability", "torch", "transformers")
"""What bits may depend on, beside everything that the spec says."""


def identity_findings(cache: FeatureCache, backbone: Backbone, given: bool) -> tuple[str, ...]:
    """Return in what the backbone is not the one of the cache's spec, a finding for each cause.

    ``given`` says that the caller passed it in. One that the check loads rounds nothing: that is done afterwards.
    """
    here = ExtractionSpec(backbone.identity)
    if not given and "storage_dtype" in cache.spec:
        here["storage_dtype"] = cache.spec["storage_dtype"]
    if here.features and cache.spec.features:
        here = here.only(cache.spec.features)
    fields: dict[str, list[str]] = {}
    for name, old, new in cache.spec.differences(here):
        cause = next((text for prefix, text in FIELDS if name == prefix or name.startswith(prefix + ".")), "spec")
        fields.setdefault(cause, []).append(f"{name}: {_short(old)} in the cache, {_short(new)} here")
    return tuple(f"{cause} ({'; '.join(differing[:3])})" for cause, differing in fields.items())


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text[:12] + "..." if len(text) == 64 else text[:60]


Differences = tuple[tuple[str, object, object], ...]
"""Fields, each with its value where the cache was made and its value here."""


def environment_differences(cache: FeatureCache, backbone: Backbone) -> Differences:
    """Return in what this machine is not the one that made the cache."""
    here = backbone.provenance
    changes: list[tuple[str, object, object]] = []
    for made in cache.provenance():
        for name in ENVIRONMENT:
            entry = (name, made.get(name), here.get(name))
            if entry[1] != entry[2] and entry not in changes:
                changes.append(entry)
    return tuple(changes)


def shape_findings(cache: FeatureCache, backbone: Backbone) -> tuple[str, ...]:
    """Return which feature sets the backbone gives in another shape or not at all: nothing can be compared then."""
    sets = {feature.name: feature for feature in backbone.feature_sets}
    findings = []
    for name, feature in cache.feature_sets.items():
        here = sets.get(name)
        if here is None:
            findings.append(f"features {name}: this backbone does not make them (it makes {', '.join(sets)})")
        elif (here.kind, here.row_shape) != (feature.kind, feature.row_shape):
            findings.append(
                f"features {name}: {list(feature.row_shape)} in the cache, {list(here.row_shape)} here: another model"
            )
    return tuple(findings)


@dataclass(frozen=True)
class Snapshot:
    """What a backbone gives for a few rows, and what its network remembers: its buffers, such as running means."""

    features: Array
    rows: int
    buffers: Mapping[str, torch.Tensor]


def snapshot(backbone: Backbone, contents: Sequence[bytes], feature: str) -> Snapshot:
    """Look at the buffers, then run a few rows."""
    network = _network(backbone)
    named = () if network is None else network.named_buffers()
    buffers = {name: buffer.detach().clone() for name, buffer in named}
    return Snapshot(compute_features(backbone, contents, feature).values, len(contents), buffers)


def steadiness_findings(backbone: Backbone, before: Snapshot, after: Snapshot) -> tuple[str, ...]:
    """Return what a backbone does that a frozen one does not: remember, draw at random, or be in training mode."""
    live = live_modules(backbone)
    named = f": {', '.join(live[:3])} {'is' if len(live) == 1 else 'are'} in training mode" if live else ""
    drifted = [name for name, value in before.buffers.items() if not torch.equal(value, after.buffers[name])]
    if drifted:
        return (
            f"the backbone changes while it runs: its buffers {', '.join(drifted[:3])} were updated (batch "
            f"normalisation is live{named}), so features depend on what ran before",
        )
    gap = difference(before.features, after.features)
    if not gap.same:
        return (
            f"the backbone gives other features each time: {gap.values - gap.identical:,} of {gap.values:,} "
            f"values of the same {before.rows} rows differ from one run to the next, as with dropout left on{named}",
        )
    if live:
        return (f"the backbone is not in eval mode{named}: dropout or batch normalisation is live",)
    return ()


def live_modules(backbone: Backbone) -> list[str]:
    """Return the modules in training mode that compute something else in it: dropout, batch normalisation."""
    network = _network(backbone)
    return [] if network is None else [
        f"{name} ({type(module).__name__})"
        for name, module in network.named_modules()
        if module.training and any(word in type(module).__name__ for word in ("Dropout", "BatchNorm", "InstanceNorm"))
        and getattr(module, "p", 1) != 0
    ]  # fmt: skip


def _network(backbone: Backbone) -> torch.nn.Module | None:
    """Return the network of a backbone; one of somebody's own need not have any."""
    network = getattr(backbone, "network", None)
    return network if isinstance(network, torch.nn.Module) else None


# The models of a check: the backbone that made a cache, and the same model as transformers loads it.


def load_live(cache: FeatureCache, source: ModelSource, features: Sequence[str] = ()) -> Backbone:
    """Load the backbone that a cache was made with, set up as its spec says, storing nothing in fewer bits.

    Raises ``BackboneError`` when it is not there any more.
    """
    settings = cache.spec.settings
    if settings is None:
        raise BackboneError(
            f"{cache.path} was made by a backbone of one's own, which no name leads to: pass it as backbone=..."
        )
    settings = replace(settings, features=tuple(features) or tuple(cache.plain_sets), storage_dtype=None)
    settings = replace(settings, views=None, augment=None) if features else settings
    return load_again(settings, source, made_with(cache), f"{cache.path} was made with")


def made_with(cache: FeatureCache) -> ModelSource:
    """Return where the model of a cache was, as its last extraction recorded it."""
    made = cache.provenance()[-1] if cache.provenance() else {}
    return ModelSource(made.get("model"), made.get("revision"))


def other_poolings(
    cache: FeatureCache, source: ModelSource, backbone: Backbone, contents: Sequence[bytes]
) -> Mapping[str, Array]:
    """Return what every pooling of a cache's model makes of some rows, to find the one that was used."""
    poolings = [name for name in getattr(backbone, "poolings", ()) if name not in ("tokens", "states")]
    if not cache.spec.has_backbone or not poolings:
        return {}
    names = [*poolings, *(f"l2:{name}" for name in poolings)]
    try:
        every_pooling = load_live(cache, source, names)
    except BackboneError:  # the model was passed in, and is nowhere else
        return {}
    return {name: compute_features(every_pooling, contents, name).values for name in names}


def load_standard(cache: FeatureCache, source: ModelSource, backbone: Backbone) -> StandardModel | None:
    """Load the model as transformers does; None where the backbone is not a model that transformers loads."""
    name = source.model if source.model is not None else getattr(backbone, "name", None) or made_with(cache).model
    if name is None or not cache.spec.has_backbone:
        return None
    device = str(getattr(backbone, "device", "cpu"))
    folder = resolve_model(name, source.revision)
    kind = StandardPictures if ExtractionSpec(cache.spec).content == "image" else StandardModel
    return kind(folder, cache.spec, device, trust_remote_code=source.trust_remote_code)
