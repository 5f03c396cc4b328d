"""Poolings against numbers computed by hand, and the property that padding counts for nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embedcache import pooling

B, T, D = 2, 3, 5
# Row 0 has two real tokens on the left, row 1 two on the right; what is masked is huge, so that counting it shows.
HIDDEN = torch.tensor(
    [
        [[1.0, 2, 3, 4, 5], [3, 2, 1, 0, -1], [1e9, 1e9, 1e9, 1e9, 1e9]],
        [[1e9, 1e9, 1e9, 1e9, 1e9], [-1, -2, -3, -4, -5], [-3, -2, -1, 0, 1]],
    ]
)
MASK = torch.tensor([[1, 1, 0], [0, 1, 1]])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cls", [[1, 2, 3, 4, 5], [-1, -2, -3, -4, -5]]),
        ("last", [[3, 2, 1, 0, -1], [-3, -2, -1, 0, 1]]),
        ("mean", [[2, 2, 2, 2, 2], [-2, -2, -2, -2, -2]]),
        ("max", [[3, 2, 3, 4, 5], [-1, -2, -1, 0, 1]]),
    ],
)
@pytest.mark.parametrize("mask", [MASK, MASK.bool()], ids=["int", "bool"])
def test_by_hand(name: str, expected: list[list[float]], mask: torch.Tensor) -> None:
    features = pooling.MASKED[name](HIDDEN, mask)
    assert features.dtype == torch.float32
    assert features.tolist() == expected


def test_normalize_by_hand() -> None:
    scaled = pooling.normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0], [-5.0, 12.0]]))
    torch.testing.assert_close(scaled, torch.tensor([[0.6, 0.8], [0.0, 0.0], [-5 / 13, 12 / 13]]))


def test_low_precision_is_summed_in_float32() -> None:
    # In bfloat16, 256 + 1 is 256: a running sum of ones would stop there.
    ones = torch.ones(1, 509, 2, dtype=torch.bfloat16)
    assert pooling.mean(ones, torch.ones(1, 509)).tolist() == [[1.0, 1.0]]


@given(
    seed=st.integers(0, 2**16),
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=7),
    extra=st.integers(0, 13),
    name=st.sampled_from(sorted(pooling.MASKED)),
)
def test_padding_counts_for_nothing(seed: int, lengths: list[int], extra: int, name: str) -> None:
    """Each row alone, without padding, gives the row of the padded batch; what stands in the padding is no matter."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + extra
    hidden = torch.randn(len(lengths), width, 5, generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    batch = pooling.MASKED[name](hidden, mask)
    for noise in (1e6, float("inf"), float("nan")):
        noisy = torch.where(mask.bool().unsqueeze(-1), hidden, torch.full_like(hidden, noise))
        assert torch.equal(pooling.MASKED[name](noisy, mask), batch)
    for row, length in enumerate(lengths):
        alone = pooling.MASKED[name](hidden[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(alone[0], batch[row], rtol=1e-6, atol=1e-6)


@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(2, 37),
    width=st.integers(1, 41),
    name=st.sampled_from(sorted(pooling.MASKED)),
)
def test_neighbours_count_for_nothing(seed: int, rows: int, width: int, name: str) -> None:
    """At a fixed shape, a row's features have the same bits in any company and at any place."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, 7, generator=generator)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]).long()
    order = torch.randperm(rows, generator=generator)
    features = pooling.MASKED[name](hidden, mask)
    assert torch.equal(pooling.MASKED[name](hidden[order], mask[order]), features[order])
    others = torch.randn(rows, width, 7, generator=generator)
    others[0] = hidden[0]
    assert torch.equal(pooling.MASKED[name](others, mask)[0], features[0])
    assert torch.equal(pooling.normalize(features[order]), pooling.normalize(features)[order])
