"""Mixtures of experts whose bits do not depend on how a batch's tokens are spread over the experts.

transformers gathers the tokens of each expert and multiplies as many as there happen to be, and a kernel adds up
otherwise for another number of rows: a text's features would depend, by a few units in the last place, on the texts
beside it. Here an expert always multiplies blocks of the same number of rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 32
"""Rows of a block. Fewer waste less on experts that get few tokens, more are faster for those that get many."""
NAME = "embedcache_blocks"


def experts_option() -> dict[str, object]:
    """Return what ``from_pretrained`` takes to run experts in blocks; empty before transformers 5 had the choice."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        return {}
    import torch

    # Which blocks there are depends on the values: nothing that could be compiled.
    ALL_EXPERTS_FUNCTIONS.register(NAME, torch.compiler.disable(_in_blocks))  # type: ignore[no-untyped-call]
    return {"experts_implementation": NAME}


def _in_blocks(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Run experts: hidden [S, D], the k experts of each token [S, k] and their weights [S, k] -> [S, D].

    The module's attributes are those that ``use_experts_implementation`` of transformers gives it.
    """
    import torch

    tokens, k = chosen.shape
    flat = chosen.reshape(-1)
    outputs = hidden.new_zeros(tokens * k, hidden.shape[-1])
    for expert in flat.unique().tolist():  # type: ignore[no-untyped-call]
        for slots in (flat == expert).nonzero()[:, 0].split(ROWS):
            rows = hidden[slots // k]
            block = torch.cat([rows, rows[:1].expand(ROWS - len(rows), -1)])
            outputs[slots] = _expert(experts, expert, block)[: len(rows)].to(outputs.dtype)
    weighted = outputs * weights.reshape(-1, 1)
    return weighted.view(tokens, k, -1).sum(dim=1).to(hidden.dtype)


def _expert(experts: Any, expert: int, rows: Tensor) -> Tensor:
    first = _linear(experts, "gate_up_proj" if experts.has_gate else "up_proj", expert, rows)
    inner = experts._apply_gate(first) if experts.has_gate else experts.act_fn(first)
    out = _linear(experts, "down_proj", expert, inner)
    normed: Tensor = experts.post_expert_norm(out) if getattr(experts, "has_post_expert_norm", False) else out
    return normed


def _linear(experts: Any, name: str, expert: int, rows: Tensor) -> Tensor:
    import torch.nn.functional as F

    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return F.linear(rows, weight.T if experts.is_transposed else weight, bias)
