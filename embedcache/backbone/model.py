"""A frozen network and what is made of its hidden states. Nothing here knows what a row is: ``Content`` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from embedcache import pooling
from embedcache.backbone.compute import Numbers, PassFeatures, Prepared
from embedcache.backbone.device import Compiled, device_memory, side_by_side, threads
from embedcache.backbone.views import NO_VIEWS, Views
from embedcache.batching import Batch, ShapePolicy
from embedcache.errors import BackboneError, DeviceMemoryError, FeatureError, PoolingUnavailableError, warn
from embedcache.shard import Array, FeatureSet, Kind
from embedcache.spec import POOLINGS, BackboneSettings, FeatureSpec, ModelSource, view_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor

P = TypeVar("P", bound=Prepared)

_SMALLER = "make a new cache with smaller batches (extract --batch-size)"


@dataclass(frozen=True)
class Inputs:
    """What one pass is given: B rows laid out at a canonical shape.

    ``arguments`` are the network's own, by name. ``mask`` int64 [B, T] is 1 where a hidden state belongs to a row and
    0 where it is padding; None where all belong, as an image's patches do. The first ``skip`` hidden states are an
    image's class and register tokens: ``cls`` reads the first of them, every other pooling what stands behind them.
    """

    arguments: Mapping[str, Tensor]
    mask: Tensor | None = None
    skip: int = 0

    def to(self, device: torch.device) -> Inputs:
        """Return the same on a device."""
        moved = {name: _moved(tensor, device) for name, tensor in self.arguments.items()}
        return Inputs(moved, None if self.mask is None else _moved(self.mask, device), self.skip)


@dataclass(frozen=True)
class Running:
    """A pass that was started: feature sets as they will be on the CPU, there once ``done`` has happened.

    ``lost`` has how many values of a set became infinite in float16, int64 [].
    """

    sets: Mapping[str, tuple[Tensor, ...]]
    lost: Mapping[str, Tensor]
    done: torch.cuda.Event | None


class Content(Protocol[P]):
    """One kind of content: how rows become what a network is given. ``Texts`` is one, ``Pictures`` is another."""

    @property
    def given(self) -> str:
        """What the network is given, in words for messages: token ids and a mask."""
        ...

    @property
    def poolings(self) -> Sequence[str]:
        """The poolings that make sense of it, if the network has what they read."""
        ...

    @property
    def prepared_bytes(self) -> int:
        """How many bytes a prepared row takes, where that is more than its content does; else 0."""
        ...

    @property
    def probe_rows(self) -> Sequence[bytes]:
        """Built-in rows of several lengths, to know what a machine computes."""
        ...

    def versions(self) -> dict[str, str]:
        """Return the versions of the libraries that prepare rows."""
        ...

    def prepare(self, contents: Sequence[bytes]) -> P:
        """Decode rows."""
        ...

    def lay_out(self, prepared: P, batch: Batch) -> Inputs:
        """Lay rows out at a canonical shape, on the CPU, with dummy rows behind them."""
        ...

    def dummies(self, rows: int, length: int) -> Inputs:
        """Lay out rows without meaning, the last of them as short as a row can be."""
        ...


class Outputs(Protocol):
    """What a Hugging Face network gives; hidden states are [B, T, D], or [B, D, H, W] where there is no attention."""

    last_hidden_state: Tensor
    hidden_states: Sequence[Tensor]
    pooler_output: Tensor


@dataclass(frozen=True)
class Recipe:
    """How ``load_backbone`` makes the same backbone in another process."""

    source: ModelSource
    settings: BackboneSettings


class FrozenModel(Generic[P]):
    """A frozen Hugging Face network with the members of ``Backbone``. Made by ``load_backbone``.

    ``network`` is the plain module, also where passes are compiled; ``specs`` are the feature sets as asked for;
    ``identity`` is all of a cache's spec but the feature sets, which are added here. ``pooler`` says whether the
    network's own pooler has trained weights; ``projection`` is what makes CLIP's projected vector of the pooled one,
    ``last_norm`` the norm that the last layer goes through.
    ``pass_sets`` are the feature sets of one pass; with ``views`` of each row, ``feature_sets`` has theirs behind them.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        content: Content[P],
        specs: Sequence[FeatureSpec],
        policy: ShapePolicy,
        identity: Mapping[str, object],
        *,
        provenance: Mapping[str, object],
        pooler: bool = False,
        projection: torch.nn.Module | None = None,
        last_norm: torch.nn.Module | None = None,
        views: Views = NO_VIEWS,
    ) -> None:
        self.last_norm = last_norm
        self.network, self.content, self.policy, self.projection = network, content, policy, projection
        self.probe_rows: Sequence[bytes] = content.probe_rows
        self.prepared_bytes = content.prepared_bytes
        self.specs, self.provenance = tuple(specs), dict(provenance)
        self.name = str(self.provenance.get("model", type(network).__name__))
        self.device = next(network.parameters()).device
        self.recipe: Recipe | None = None
        self.views = views.number
        self._storage = str(identity["storage_dtype"])
        self._hidden = any(spec.layers != (-1,) for spec in specs)
        self._run: Callable[..., Outputs] = network
        self.blocks = 0
        """How many blocks the network has, where hidden states are read; else 0."""
        self.poolings, self.pass_sets = self._measured(pooler)
        of_views = [replace(spec, view=view) for view in range(1, self.views + 1) for spec in specs]
        self.feature_sets = (
            *self.pass_sets,
            *(replace(feature, name=view_name(feature.name, view))
              for view in range(1, self.views + 1) for feature in self.pass_sets),
        )  # fmt: skip
        features = {spec.name: spec.to_json() for spec in specs}
        features |= {spec.name: {**spec.to_json(), **views.to_json()} for spec in of_views}
        self.identity = {**identity, "features": features}

    @property
    def probe_versions(self) -> dict[str, str]:
        """Versions of what prepares rows."""
        return self.content.versions()

    def _measured(self, pooler: bool) -> tuple[tuple[str, ...], tuple[FeatureSet, ...]]:
        """Run the network once on dummies, and read poolings, widths and layers off what comes out."""
        import torch

        kind = type(self.network).__name__
        try:
            with torch.inference_mode():
                inputs = self.content.dummies(2, min(4, self.policy.max_length))
                outputs = self.outputs(inputs)
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, LookupError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BackboneError(
                f"{self.name}: {kind} cannot run on {self.content.given} in {self.network.dtype}: {reason[:200]}"
            ) from error
        if getattr(outputs, "last_hidden_state", None) is None:
            raise BackboneError(f"{self.name}: {kind} gives no hidden states, so there is nothing to pool")
        if self._hidden:
            self.blocks = max(0, len(outputs.hidden_states or ()) - 1)
        pooler = pooler and getattr(outputs, "pooler_output", None) is not None
        there = {"pooler": pooler, "projected": pooler and self.projection is not None}
        poolings = tuple(name for name in POOLINGS if name in self.content.poolings and there.get(name, True))
        for spec in self.specs:
            if spec.pooling not in poolings:
                raise PoolingUnavailableError(
                    f"{self.name} does not give the pooling {spec.name!r}: expected one of {', '.join(poolings)}"
                )
            if spec.final_norm and self.last_norm is None:
                raise PoolingUnavailableError(
                    f"{spec.name}: norm: is for networks of pictures that end in a layer norm, and {self.name} does "
                    "not: leave norm: out"
                )
        with torch.inference_mode():
            return poolings, tuple(self._feature_set(spec, outputs, inputs) for spec in self.specs)

    def _feature_set(self, spec: FeatureSpec, outputs: Outputs, inputs: Inputs) -> FeatureSet:
        depth = len(outputs.hidden_states or ()) if self._hidden else 0
        for layer in spec.layers or ():
            if spec.pooling == "states" and layer < -depth:
                raise PoolingUnavailableError(
                    f"{spec.name} would be what enters the last {-layer - 1} blocks, and {self.name} has {depth - 1}: "
                    "expected fewer than that"
                )
            if layer != -1 and not -depth <= layer < depth:
                raise PoolingUnavailableError(
                    f"{spec.name}: {self.name} has hidden states {-depth}..{depth - 1}, "
                    f"and layer {layer} is none of them"
                )
        both = 2 if spec.pooling == "cls+mean" else 1
        if spec.pooling in ("pooler", "projected"):
            widths = {self._vectors(spec, outputs, inputs).shape[-1]}
        else:
            widths = {both * hidden_of(outputs, layer).shape[-1] for layer in _layers(spec, outputs)}
        if len(widths) > 1:
            raise PoolingUnavailableError(
                f"{spec.name}: these layers of {self.name} have different widths "
                f"({', '.join(map(str, sorted(widths)))}): ask for a feature set of each"
            )
        if spec.final_norm and (width := hidden_of(outputs, -1).shape[-1] * both) not in widths:
            raise PoolingUnavailableError(
                f"{spec.name}: these layers of {self.name} have {widths.pop() // both} numbers a vector, and its last "
                f"norm takes {width // both}: leave norm: out"
            )
        kind: Kind = "tokens" if spec.token_level else "layers" if spec.multi_layer else "pooled"
        layers = len(_layers(spec, outputs)) if spec.multi_layer else 1
        return FeatureSet(spec.name, kind, int(widths.pop()), layers, self._storage)

    def compile(self) -> None:
        """Run passes through ``torch.compile`` from now on. Raises ``BackboneError`` when it cannot be compiled."""
        self._run = Compiled(self.network, self._warm_up)

    def _warm_up(self, compiled: Callable[..., Outputs]) -> Iterator[Outputs]:
        """Run the shapes that decide what is compiled: an ordinary one, and one of a single row if there is any.

        The compiler treats a size of 1 apart, and takes two sizes that are equal at first to be equal forever.
        """
        shapes = [(self.policy.rows(length), length) for length in self.policy.lengths()]
        several = [shape for shape in shapes if 1 not in shape]
        ordinary = sorted(several, key=lambda shape: (shape[0] == shape[1], abs(shape[1] - 32)))
        single = [shape for shape in shapes if 1 in shape]
        for shape in ordinary[:1] + single[:1]:
            yield self._outputs(compiled, self.content.dummies(*shape))

    def no_longer_frozen(self, mark: str) -> None:
        """Say in the identity that the weights are changed: no cache may take such features for those of the files."""
        network = self.identity["backbone"]
        assert isinstance(network, Mapping)
        self.identity = {**self.identity, "backbone": {**network, "unfrozen": mark}}

    def prepare(self, contents: Sequence[bytes]) -> P:
        """Decode rows, as their kind of content is."""
        return self.content.prepare(contents)

    def prepare_views(self, contents: Sequence[bytes], views: Numbers) -> P:
        """Prepare one view of each row, by its number [n]; 0 is the row itself. For content that has views."""
        prepared: P = self.content.prepare_views(contents, views)  # type: ignore[attr-defined]  # pictures have it
        return prepared

    def lay_out(self, prepared: P, batch: Batch) -> Inputs:
        """Lay rows out at a canonical shape, on the device."""
        return self.content.lay_out(prepared, batch).to(self.device)

    def forward(self, prepared: P, batch: Batch) -> Running:
        """Start one canonical pass, pool it and cut it to the real rows.

        On a GPU nothing is waited for: kernels and the copy back are queued, so that the next pass is laid out
        meanwhile. Raises ``DeviceMemoryError``.
        """
        import torch

        with (
            torch.inference_mode(), threads(self.policy.pass_threads if self.device.type == "cpu" else None),
            device_memory(f"a batch of {batch.rows} rows of length {batch.length}", _SMALLER),
        ):  # fmt: skip
            inputs = self.lay_out(prepared, batch)
            return self._started(self._outputs(self._run, inputs), inputs, len(batch.indices))

    def _started(self, outputs: Outputs, inputs: Inputs, real: int) -> Running:
        import torch

        lost: dict[str, Tensor] = {}
        sets = {spec.name: self._pooled(spec, outputs, inputs, real, lost) for spec in self.specs}
        if self.device.type != "cuda":
            return Running(sets, lost, None)
        sets, lost = (
            {name: tuple(part.to("cpu", non_blocking=True) for part in parts) for name, parts in sets.items()},
            {name: count.to("cpu", non_blocking=True) for name, count in lost.items()},
        )
        done: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's stubs lack it
        done.record(torch.cuda.current_stream(self.device))
        return Running(sets, lost, done)

    def fit_memory(self, *, shrink: bool) -> None:
        """See whether the device holds what a run does: two passes of the longest rows under way.

        Where it does not, batches get half as many positions until it does, before anything is recorded; a policy that
        must stay as it is raises ``DeviceMemoryError``, and so does one row that does not fit.
        """
        import torch

        longest, before = self.policy.lengths()[-1], self.policy.positions
        while True:
            rows = self.policy.rows(longest)
            what = f"two batches of {rows} rows of length {longest}, a canonical shape of {self.name}"
            try:
                with torch.inference_mode(), device_memory(what, _SMALLER):
                    inputs = [self.content.dummies(rows, longest).to(self.device) for _ in range(2)]
                    running = [self._started(self._outputs(self.network, some), some, rows) for some in inputs]
                    for started in running:
                        self.fetch(started)
                break
            except DeviceMemoryError:
                if not shrink or rows - self.policy.spare <= 1:
                    raise
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.policy = replace(self.policy, positions=max(1, self.policy.positions // 2))
        if self.policy.positions < before:
            self.identity = {**self.identity, "shapes": self.policy.to_json()}
            warn(
                [
                    f"batches have {self.policy.positions:,} positions, as {before:,} do not fit in the device's "
                    "memory; a cache records it as part of its identity"
                ]
            )

    def side_by_side(self, batches: int) -> int:
        """Return how many of ``batches`` passes run at a time."""
        if isinstance(self._run, Compiled) and not Compiled.may_run_side_by_side():
            return 1
        return side_by_side(self.device.type, batches, self.policy.pass_threads)

    def outputs(self, inputs: Inputs) -> Outputs:
        """Run the plain network as it stands: its mode, its gradients."""
        return self._outputs(self.network, inputs)

    def features(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """Run the plain network and make the first feature set, in float32.

        Returns [B, D] or [B, L, D], or for tokens [B, T, D] with the mask [B, T], True = real.
        """
        outputs, spec = self.outputs(inputs), self.specs[0]
        if not spec.token_level:
            return self._vectors(spec, outputs, inputs), None
        hidden = self._each(spec, outputs, inputs)
        values = hidden.float()
        return (pooling.normalize(values) if spec.normalize else values), _mask(inputs.mask, hidden).bool()

    def _pooled(
        self, spec: FeatureSpec, outputs: Outputs, inputs: Inputs, real: int, lost: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """Make a feature set of one pass, cut to its first ``real`` rows and in the storage type.

        Returns its vectors, and of a token-level set also how many each row has.
        """
        if not spec.token_level:
            return (self._stored(self._vectors(spec, outputs, inputs)[:real], spec, lost),)
        hidden = self._each(spec, outputs, inputs)[:real]
        kept = _mask(inputs.mask, hidden)[:real].bool()
        values = hidden[kept].float()
        values = pooling.normalize(values) if spec.normalize else values
        return self._stored(values, spec, lost), kept.sum(dim=1)

    def _vectors(self, spec: FeatureSpec, outputs: Outputs, inputs: Inputs) -> Tensor:
        """Pool a pass: float32 [B, D], or [B, L, D] of several layers."""
        import torch

        if spec.pooling in ("pooler", "projected"):
            pooled = outputs.pooler_output.flatten(1)  # convolutional networks give [B, D, 1, 1]
            vectors = (self.projection(pooled) if self.projection and spec.pooling == "projected" else pooled).float()
        else:
            layers = [
                _pooled_layer(spec.pooling, self._hidden_of(spec, outputs, layer), inputs)
                for layer in _layers(spec, outputs)
            ]
            vectors = torch.stack(layers, dim=1) if spec.multi_layer else layers[0]
        return pooling.normalize(vectors) if spec.normalize else vectors

    def _hidden_of(self, spec: FeatureSpec, outputs: Outputs, layer: int) -> Tensor:
        """Return a layer's hidden states [B, T, D], behind the last norm where that is asked for."""
        hidden = hidden_of(outputs, layer)
        # Some versions of transformers have the normed state as the last hidden state too.
        if not spec.final_norm or self.last_norm is None or hidden is outputs.last_hidden_state:
            return hidden
        normed: Tensor = self.last_norm(hidden)
        return normed

    def _each(self, spec: FeatureSpec, outputs: Outputs, inputs: Inputs) -> Tensor:
        """Return the vectors of a token-level set, [B, T, D]: all of them, or without class and register tokens."""
        hidden = self._hidden_of(spec, outputs, _layers(spec, outputs)[0])
        return hidden[:, 0 if spec.pooling == "states" else inputs.skip :]

    def _stored(self, vectors: Tensor, spec: FeatureSpec, lost: dict[str, Tensor]) -> Tensor:
        if self._storage == "float16":
            half = vectors.half()
            # Rounded to infinity without being infinite: what was infinite already is the caller's to report.
            lost[spec.name] = (half.isinf() & vectors.isfinite()).sum()
            return half
        return vectors.bfloat16() if self._storage == "bfloat16" else vectors

    def fetch(self, running: Running) -> PassFeatures:
        """Wait for a pass and return its features as numpy; bfloat16 comes as its bits, uint16.

        Raises ``FeatureError`` for values beyond float16, where that is how they are stored.
        """
        if running.done is not None:
            running.done.synchronize()
        for name, count in running.lost.items():
            if overflow := int(count):
                raise FeatureError(
                    f"{overflow} values of {name} in one batch are beyond float16's largest, 65,504: "
                    "store as float32 or bfloat16 (extract --store float32)"
                )
        arrays = {name: tuple(map(_numpy, tensors)) for name, tensors in running.sets.items()}
        return {name: parts if len(parts) > 1 else parts[0] for name, parts in arrays.items()}

    def _outputs(self, network: Callable[..., Outputs], inputs: Inputs) -> Outputs:
        options = {"output_hidden_states": True} if self._hidden else {}
        return network(**inputs.to(self.device).arguments, **options)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. From page-locked memory a copy to a GPU is queued behind the passes before it."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _layers(spec: FeatureSpec, outputs: Outputs) -> tuple[int, ...]:
    return spec.layers if spec.layers is not None else tuple(range(len(outputs.hidden_states)))


def hidden_of(outputs: Outputs, layer: int) -> Tensor:
    """Return a layer's hidden states [B, T, D], those of a feature map row by row.

    -1 is what the network gives at its end, after its last norm.
    """
    tensor = outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]
    return tensor.flatten(2).transpose(1, 2) if tensor.ndim == 4 else tensor


def _pooled_layer(name: str, hidden: Tensor, inputs: Inputs) -> Tensor:
    """Pool one layer [B, T, D] -> float32 [B, D], or [B, 2 D] of the class token and the mean."""
    import torch

    if name == "cls" and inputs.skip:
        return hidden[:, 0].float()
    row = hidden[:, inputs.skip :]
    if name == "cls+mean":
        return torch.cat([hidden[:, 0].float(), pooling.mean(row, _mask(inputs.mask, row))], dim=-1)
    return pooling.MASKED[name](row, _mask(inputs.mask, row))


def _mask(mask: Tensor | None, hidden: Tensor) -> Tensor:
    import torch

    return torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device) if mask is None else mask


def _numpy(tensor: Tensor) -> Array:
    import torch

    tensor = tensor.cpu()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
