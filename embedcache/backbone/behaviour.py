"""Whether a model does what features rely on: the same each time, whatever a row is padded with or stands beside.

Some architectures read padding although there is a mask (a Fourier transform or a convolution along the text, means
over segments of it), some let the rows of a batch compete, and some draw random numbers in every pass. No config says
so: it is measured when a model is loaded, with five passes of a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from embedcache.backbone.device import threads
from embedcache.backbone.loading import quiet
from embedcache.backbone.model import Outputs
from embedcache.backbone.text import Texts
from embedcache.errors import BackboneError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TOKENS, PADDING = 5, 3
"""A short row, and how far it is padded: what ``ShapePolicy`` does to it with its usual step."""
BESIDE = 7
"""Rows beside a short row, once with some tokens and once with others: nothing of the short row may change."""
ROUNDING = {"float32": 2e-4, "float16": 0.02, "bfloat16": 0.08}
"""How far rounding may move a token's vector at another shape, relative to the vector's length. It moves it far less,
and reading padding far more: ``tests/test_every_architecture.py`` tries every architecture."""
ROUNDING_ELSEWHERE = 5e-3
"""The same for float32 on accelerators, which may multiply in fewer bits."""

SEEN = 1e-4
"""How far the first token's vector moves at least, relative to its length, when a model that reads both ways is given
other words behind it; in one that reads from left to right it does not move at all."""


def refuse_misbehaviour(
    run: Callable[[Tensor, Tensor], Outputs], network: torch.nn.Module, texts: Texts, *, longest: int
) -> None:
    """Run a short row twice alone, padded, and beside other rows: the passes must agree, or ``BackboneError``.

    ``run`` takes token ids and mask, int64 [B, T], and gives the network's outputs; ``longest`` is the longest row that
    is read.
    """
    import torch

    name, kind, parameter = texts.name, type(network).__name__, next(network.parameters())
    tokens = min(max(TOKENS, _chunk(network.config) + 1), longest)
    wide = min(tokens + PADDING, longest)
    row = _row(texts, [texts.pad], wide).to(parameter.device)
    beside = torch.stack([row, row.flip(0)])
    beside[0, tokens:] = texts.pad
    mask = torch.ones_like(beside)
    mask[0, tokens:] = 0

    def vectors(ids: Tensor, mask: Tensor) -> Tensor:
        hidden: Tensor = run(ids, mask).last_hidden_state
        return hidden[0, :tokens].float()

    on_cpu = parameter.device.type == "cpu"
    try:
        with torch.inference_mode(), quiet(), threads(1 if on_cpu else None):
            once, again = (vectors(row[None, :tokens], mask[1:, :tokens]) for _ in range(2))
            padded = vectors(beside, mask)
            crowd = torch.cat([mask[:1], mask[1:].expand(BESIDE, -1)])
            one, other = (
                vectors(torch.cat([beside[:1], others.expand(BESIDE, wide)]), crowd)
                for others in (row[None], row[:1, None])
            )
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, LookupError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackboneError(f"{name}: {kind} cannot run on a row of {tokens} tokens: {reason[:200]}") from error
    allowed = ROUNDING.get(str(parameter.dtype).removeprefix("torch."), ROUNDING["bfloat16"])
    allowed = allowed if on_cpu else max(allowed, ROUNDING_ELSEWHERE)
    if (apart := _apart(once, again)) > (0 if on_cpu else allowed):
        raise BackboneError(
            f"{name}: {kind} gives other features of the same text in each pass (by {apart:.1e} of their size): "
            "it is random, so nothing of it can be cached; use another model"
        )
    if (apart := _apart(once, padded)) > allowed:
        raise BackboneError(
            f"{name}: {kind} reads padding, or the other rows of a batch, although there is a mask (features move by "
            f"{apart:.1e} of their size): they would depend on how texts are batched; use another model"
        )
    if on_cpu and _apart(one, other) > 0:  # elsewhere some kernels differ from run to run by as much
        raise BackboneError(
            f"{name}: {kind} adds up otherwise when other texts stand beside one in a batch (a mixture of experts that "
            "gathers tokens): its features would not have the same bits in every run; use another model"
        )


def reads_from_left_to_right(network: torch.nn.Module, texts: Texts) -> bool:
    """Whether a model's first token sees no later one, so that only the last has seen the whole text.

    Measured, because neither the class that a model was saved as nor its config's ``is_decoder`` tells. False for a
    model that does not run.
    """
    import torch

    parameter = next(network.parameters())
    row = _row(texts, [], 2 * TOKENS - 1).to(parameter.device)
    # Other words, not the same ones in another order: attention that is nearly even would hardly tell.
    ids = torch.stack([row[:TOKENS], torch.cat([row[:1], row[TOKENS:]])])
    try:
        with torch.inference_mode(), quiet():
            first: Tensor = network(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0].float()
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, LookupError):
        return False
    return _apart(first[:1], first[1:]) < SEEN


def _row(texts: Texts, more: Sequence[int], tokens: int) -> Tensor:
    """Return tokens from all over the vocabulary, int64 [T]: no special one and none of ``more`` if it has others."""
    import torch

    vocabulary = np.arange(texts.known_tokens)
    ordinary = np.setdiff1d(vocabulary, [*texts.tokenizer.all_special_ids, *more])
    known = ordinary if ordinary.size else vocabulary
    return torch.from_numpy(known[np.linspace(0, len(known) - 1, tokens).astype(np.int64)])


def _chunk(config: object) -> int:
    """Return how long a row may be before attention in chunks (Reformer's, which is random) begins; 0 without."""
    lengths = [getattr(config, name, None) for name in ("lsh_attn_chunk_length", "local_attn_chunk_length")]
    return max((length for length in lengths if isinstance(length, int)), default=0)


def _apart(one: Tensor, other: Tensor) -> float:
    """Return how far two vectors [T, D] of a token are apart at most, relative to their length.

    What is not finite is left for extraction to report, with its row.
    """
    if not (one.isfinite().all() and other.isfinite().all()):
        return 0.0
    return float(((one - other).norm(dim=-1) / one.norm(dim=-1).clamp(min=1e-12)).max())
