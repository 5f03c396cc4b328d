"""The last blocks of a network as a model of their own, which reads the hidden states that enter them.

The network runs as it is, with its first blocks replaced by one that gives the states at hand: masks, positions and
whatever else its authors compute between embeddings and blocks stay theirs. Where the states of padding do not matter,
which is tried before anything is trained, the last blocks give the very bits that they give behind the first ones. A
block is whatever the network has a list of: a layer of a transformer, a stage of a ResNet or ConvNeXt.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from embedcache.backbone import FrozenModel, Inputs, text_inputs
from embedcache.errors import BackboneError, SpecError
from embedcache.finetune.model import FeatureBasedModel, in_training
from embedcache.spec import FeatureSpec, states_set
from embedcache.wording import counted

STATES = "states"
"""The name by which hidden states [B, T, D] are given, as ``Inputs.arguments`` has them."""


class _Given(nn.Module):
    """Stands in the place of a block, and gives the states at hand, in the form that the block has.

    What else is asked of it, such as the kind of attention, the block itself answers.
    """

    def __init__(self, block: nn.Module, in_tuple: int) -> None:
        super().__init__()
        self._block, self._in_tuple = (block,), in_tuple  # in a tuple, so that it is no module of this one
        self.states: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, *_: object, **__: object) -> object:
        assert self.states is not None
        return (self.states, *[None] * (self._in_tuple - 1)) if self._in_tuple else self.states


class TailModel(FeatureBasedModel):
    """The last ``blocks`` blocks of a backbone, its pooling and a head; everything before is frozen.

    What comes before the states that it is given is not run. Where these enter more blocks than are trained, those
    between run as the trained ones do, at the shape of the batch and of bfloat16 by autocast, but in eval mode and
    without gradients: their last bits are not those of states that an extraction takes behind them.

    Cuts the backbone's network in place; ``whole`` puts it together again. Embeddings run on padding, for the masks
    that hang on their shape, or on one picture; what they give is thrown away.

    Args:
        backbone: what ``load_backbone`` gives, with the one feature set that the head reads.
        head: as of ``FeatureBasedModel``.
        blocks: how many are trained.
        given: how many last blocks the states enter that it is given, ``blocks`` or more; None for ``blocks``.
        bfloat16: whether the blocks compute in bfloat16; the weights that are trained stay in float32 (autocast).
        dropout: whether the blocks drop in training what their configuration says; the head's dropout is its own.

    Raises ``BackboneError`` for a network that cannot be cut: one without a list of blocks, whose blocks share weights
    or hand on more than their states, or whose states of padding change what real tokens become.
    """

    def __init__(
        self, backbone: FrozenModel[Any], head: nn.Module, blocks: int, *, given: int | None = None,
        bfloat16: bool = False, dropout: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(backbone, head)
        states_set(blocks)
        self.blocks, self._bfloat16, self._dropout = blocks, False, dropout
        network, content = backbone.identity["backbone"], backbone.content
        if isinstance(network, Mapping) and "adapter" in network:  # transformers would save the adapter alone
            raise self._cannot("it has an adapter: merge it (peft's merge_and_unload, then save_pretrained)")
        self._picture: Inputs | None = None
        if content.given == "pixels":
            self._picture = content.dummies(1, 1).to(backbone.device)
            inputs = content.samples()[0].to(backbone.device)  # type: ignore[attr-defined]  # pictures have them
        else:
            inputs = content.dummies(4, min(12, backbone.policy.max_length)).to(backbone.device)
        with torch.no_grad():
            cut = max(blocks, given or 0)
            asked = f"blocks is {blocks}" if cut == blocks else f"the states enter the last {cut} blocks"
            found, states, forms = _cut_at(backbone, inputs, cut, asked)
            if inputs.mask is not None and states.shape[:-1] != inputs.mask.shape:
                raise self._cannot("its hidden states are not one vector for each token")
            expected, _ = backbone.features(inputs)
            self._list = (found,)  # in a tuple, so that its blocks are not registered twice
            self._first = [_Given(block, form) for block, form in zip(found, forms, strict=False)]
            self._frozen = list(found[: len(self._first)])
            before = self._before(inputs)
            self._put(self._first)
            self._map = _map_of(states)
            vectors = states.flatten(2).transpose(1, 2) if states.ndim == 4 else states
            laid = Inputs({STATES: vectors if inputs.mask is None else vectors * inputs.mask[..., None]}, inputs.mask)
            here, _ = self._features(laid)
        if inputs.mask is not None and expected.ndim == 3:
            expected, here = (values[inputs.mask.bool()] for values in (expected, here))
        if not torch.equal(expected, here):
            raise self._cannot("its last blocks give other numbers when they are run by themselves")
        self.freeze_backbone = False
        self._thaw(laid, before)
        backbone.no_longer_frozen(uuid4().hex)
        self._bfloat16 = bfloat16
        self.train()

    def train(self, mode: bool = True) -> TailModel:
        """Set the mode of the head and of the last blocks; everything else stays in eval mode."""
        nn.Module.train(self, False)
        self.head.train(mode)
        for block in self._trained if mode else ():
            if self._dropout:
                in_training(block)
        self.training = mode
        return self

    @property
    def place(self) -> str:
        """Where the list of blocks is in the network, such as ``encoder.layer``."""
        places: dict[int, str] = {id(module): name for name, module in self.backbone.named_modules()}
        return places[id(self._list[0])]

    @property
    def _trained(self) -> list[nn.Module]:
        return list(self._list[0])[-self.blocks :] if hasattr(self, "_list") else []

    def run(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Run the last blocks and the head over hidden states: logits [B, C], and the features."""
        with torch.autocast(self.extractor.device.type, torch.bfloat16, enabled=self._bfloat16):
            features, mask = self._features(inputs)
        return (self.head(features) if mask is None else self.head(features, mask)), features

    def _features(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        states, mask = inputs.arguments[STATES], inputs.mask
        if self._map is not None:
            sides, layout = self._map
            states = states.transpose(1, 2).reshape(len(states), -1, *sides).contiguous(memory_format=layout)
        for first in self._first:
            first.states = states
        try:
            if mask is not None:
                return self.extractor.features(text_inputs(torch.zeros_like(mask), mask))
            assert self._picture is not None
            return self.extractor.features(self._picture)
        finally:
            for first in self._first:
                first.states = None

    def _put(self, first: list[Any]) -> None:
        for place, block in enumerate(first):
            self._list[0][place] = block

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """Give the network with all of its blocks, the trained ones among them; it is cut again afterwards."""
        self._put(self._frozen)
        try:
            yield self.backbone
        finally:
            self._put(self._first)

    def _before(self, inputs: Inputs) -> set[int]:
        """Return the parameters that what enters the trained blocks depends on, by their ids: they stay as they are."""
        network = self.backbone.requires_grad_(True)
        with torch.enable_grad():
            states = network(**inputs.arguments, output_hidden_states=True).hidden_states[-self.blocks - 1]
            states.sum().backward()
        return {id(parameter) for parameter in _clear_gradients(network)}

    def _thaw(self, inputs: Inputs, before: set[int]) -> None:
        """Make the parameters trainable that the features depend on and what enters the trained blocks does not."""
        with torch.enable_grad():
            self._features(inputs)[0].sum().backward()  # type: ignore[no-untyped-call]
        used = {id(parameter) for parameter in _clear_gradients(self.backbone)} - before
        if not used:
            raise self._cannot("they share their weights with the blocks before them")
        for block in self._frozen:
            block.requires_grad_(False)
        for parameter in self.backbone.requires_grad_(False).parameters():
            parameter.requires_grad_(id(parameter) in used)

    def depths(self) -> list[tuple[int, list[nn.Parameter]]]:
        """Return what is trained of the backbone, by depth: 0 for what stands behind the blocks and the last of them.

        Each with the trainable parameters there; 1 is the block before the last.
        """
        by_block: dict[int, int] = {}
        for depth, block in enumerate(reversed(self._trained)):
            by_block |= {id(parameter): depth for parameter in block.parameters()}
        groups: dict[int, list[nn.Parameter]] = {}
        for parameter in self.backbone.parameters():
            if parameter.requires_grad:
                groups.setdefault(by_block.get(id(parameter), 0), []).append(parameter)
        return sorted(groups.items())

    def _cannot(self, reason: str) -> BackboneError:
        what = f"the last {counted(self.blocks, 'block')} of {self.extractor.name}"
        return BackboneError(f"{what} cannot be trained by themselves: {reason}")


def refuse_untunable(backbone: FrozenModel[Any], blocks: int) -> None:
    """Try whether ``tune`` could train the last blocks of a backbone from its states, before these are computed.

    The backbone is put together again; one that is refused is of no more use. Raises ``BackboneError`` and
    ``SpecError`` as ``TailModel`` does, and ``SpecError`` for states that would be computed so that no training can
    go on from them.
    """
    refuse_computed(
        "the states would be", str(backbone.identity["compute_dtype"]), backbone.identity["execution"] == "compiled"
    )
    trial = copy.copy(backbone)
    trial.specs = (FeatureSpec("mean"),)
    tail = TailModel(trial, nn.Identity(), blocks)
    tail._put(tail._frozen)
    backbone.network.requires_grad_(False).eval()


def refuse_computed(what: str, dtype: str, compiled: bool) -> None:
    """Raise ``SpecError`` for features that are computed as the blocks behind them cannot be trained."""
    if dtype not in ("float32", "bfloat16"):
        raise SpecError(
            f"{what} computed in {dtype}, in which gradients are lost: make the cache with extract "
            "--dtype bfloat16 or float32; extract --store float16 keeps the states small all the same"
        )
    if compiled:
        raise SpecError(
            f"{what} computed by torch.compile, which does not train: make the cache with extract --no-compile"
        )


def _clear_gradients(network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that have a gradient, and take it away."""
    found = [parameter for parameter in network.parameters() if parameter.grad is not None]
    for parameter in found:
        parameter.grad = None
    return found


def _cut_at(
    backbone: FrozenModel[Any], inputs: Inputs, blocks: int, asked: str
) -> tuple[nn.ModuleList, Tensor, list[int]]:
    """Find the list of a network's blocks; also the states that enter the last ones, and how the first give theirs.

    A form is 0 for a tensor, else the length of a tuple that has nothing but the states.
    """
    network = backbone.network
    kind = type(network).__name__
    entered: dict[int, Tensor] = {}
    given: dict[int, Any] = {}
    calls: list[int] = []

    def before(block: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        states = arguments[0] if arguments else named.get("hidden_states")
        calls.append(id(block))
        if isinstance(states, Tensor):
            entered[id(block)] = states

    def after(block: nn.Module, _: object, output: Any) -> None:
        given[id(block)] = output

    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList) and len(module) > blocks]
    hooks = [
        hook for each in lists for block in each
        for hook in (block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after))
    ]  # fmt: skip
    try:
        outputs = network(**inputs.arguments, output_hidden_states=True)
    finally:
        for hook in hooks:
            hook.remove()
    hidden = getattr(outputs, "hidden_states", None) or ()
    for each in lists:
        names = [id(block) for block in each]
        if len(hidden) != len(each) + 1 or [name for name in calls if name in set(names)] != names:
            continue
        states = entered.get(names[-blocks])
        if states is None or not torch.equal(states, hidden[-blocks - 1]):
            continue
        forms = [_form(given[name]) for name in names[:-blocks]]
        if None in forms:
            raise BackboneError(
                f"the last {counted(blocks, 'block')} of {backbone.name} cannot be trained by themselves: "
                f"the blocks of {kind} hand on more than their states"
            )
        return each, states, [form for form in forms if form is not None]
    depth = len(hidden) - 1
    if 0 < depth <= blocks:
        raise SpecError(f"{asked}, and {backbone.name} has {depth}: expected fewer than that")
    raise BackboneError(
        f"the last {counted(blocks, 'block')} of {backbone.name} cannot be trained by themselves: "
        f"{kind} has no list of blocks of which each reads what the one before it gives"
    )


def _map_of(states: Tensor) -> tuple[tuple[int, int], torch.memory_format] | None:
    """Return height and width of feature maps [B, D, H, W], and how they lie in memory; None for vectors [B, T, D]."""
    if states.ndim != 4:
        return None
    last = states.is_contiguous(memory_format=torch.channels_last)
    return (states.shape[2], states.shape[3]), torch.channels_last if last else torch.contiguous_format


def _form(output: object) -> int | None:
    if isinstance(output, Tensor):
        return 0
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor) and not any(
        part is not None for part in output[1:]
    ):  # fmt: skip
        return len(output)
    return None
