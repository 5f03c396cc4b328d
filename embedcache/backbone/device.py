"""Where a backbone runs, with how many threads, and what that means for canonical batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from embedcache.errors import BackboneError, SpecError

POSITIONS = {"cpu": 1024, "cuda": 32768, "mps": 8192}
"""Positions a batch, by device: on 2 CPU cores 1,024 is as fast as more and wastes least on dummy rows."""


def choose_device(device: str = "auto") -> str:
    """Return ``cuda``, ``mps`` or ``cpu``; ``auto`` takes the first there is. Raises ``BackboneError`` when absent."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, available in there.items() if available)
    kind, _, number = device.partition(":")
    if not there.get(kind, False):
        expected = ", ".join(name for name in there if there[name])
        raise BackboneError(f"device {device!r} is not available here: expected one of {expected}")
    if number and not (number.isdecimal() and (kind != "cuda" or int(number) < torch.cuda.device_count())):
        raise BackboneError(
            f"device {device!r} is not available here: there are {torch.cuda.device_count()} of its kind"
        )
    return device


def needs_spare_row(device: str) -> bool:
    """Whether each batch must hold a dummy row.

    Where a batch has no padding at all, transformers drops its attention mask (or, in a decoder, lets the kernel make
    a causal one), and on an accelerator another kernel with other rounding then runs. One dummy row, whose mask is
    never full, keeps every batch on the same kernel. On CPU both ways give the same bits, in encoders and decoders,
    float32 and bfloat16 (tests hold us to it), and a row in 32 is saved.
    """
    return device.split(":")[0] != "cpu"


# What did not pay, on 2 cores with AVX-512 and without AMX, in CPU time per pass of MiniLM in float32 (November 2026):
# weights packed by oneDNN with bias and GELU fused are 1.17 times as fast (bfloat16 1.08), but give other bits than the
# plain network that is fine-tuned, and --compile does as much; weights packed by MKL are no faster.
MOST_PASSES = 8
"""Passes run side by side at most: past that, Python's lock between kernels would be waited for."""


def side_by_side(device: str, batches: int, *, single: bool = False) -> tuple[int, int]:
    """Return how many of ``batches`` passes run at a time, and with how many threads each.

    On CPU several passes with few threads are faster than one pass after the other with all of them: no kernel waits
    for the slowest of its threads, which matters most where other programs want the cores too. At a fixed shape
    neither number changes a bit. ``single`` is for passes that must have one thread.
    """
    if device.split(":")[0] != "cpu":
        return 1, 1
    import torch

    there = torch.get_num_threads()
    passes = min(there, batches, MOST_PASSES)
    return max(passes, 1), 1 if single else max(there // max(passes, 1), 1)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run with ``count`` torch threads, or with as many as torch likes when None. Raises ``SpecError`` below 1."""
    if count is None:
        yield
        return
    if count < 1:
        raise SpecError(f"threads is {count}: expected at least 1")
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
