"""Where and how a backbone runs: device, threads, ``torch.compile``, and what that means for canonical batches."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from embedcache.errors import BackboneError, DeviceMemoryError, SpecError

if TYPE_CHECKING:
    import torch


POSITIONS = {"cpu": 1024, "cuda": 32768, "mps": 8192}
"""Positions a batch, by device: on 2 CPU cores 1,024 is as fast as more and wastes least on dummy rows."""

IMAGES = {"cpu": 32, "cuda": 128, "mps": 32}
"""Images a batch, by device; on a CPU half as many where that leaves nothing over, see ``images_a_batch``."""
WHOLE = 32
"""Kernels take so many numbers at a time, and compute what is left over in another way: where a layer's values of a
whole batch are not a multiple of it, features may depend on a picture's place (seen in SwiftFormer and Kosmos-2 of 3, 5
and 7 pictures; in SigLIP's pooler, 37 wide, of 16)."""


def images_a_batch(device: str, values: int) -> int:
    """Return how many images are a batch, where nobody has said; each layer gives a multiple of ``values`` of each.

    On a CPU 16 where nothing is left over: what a layer of a convolutional network writes is then still in the cache
    for the next (with two passes side by side and 32 MB of it, ResNet-50 took 47 ms in the place of 61 for a picture),
    other networks are as fast as with 32, and fewer dummies are computed for few pictures.
    """
    kind = device.split(":")[0]
    half = kind == "cpu" and IMAGES[kind] // 2 * values % WHOLE == 0
    return IMAGES[kind] // 2 if half else IMAGES[kind]


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


def choose_devices(asked: str) -> list[str]:
    """Return the devices that ``all`` or a list such as ``cuda:0,cuda:2`` names: ``all`` is every GPU there is.

    Raises ``BackboneError`` for one that is not there, and ``SpecError`` for an empty list.
    """
    import torch

    if asked == "all":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return [f"cuda:{number}" for number in range(count)] or [choose_device()]
    names = [name.strip() for name in asked.split(",") if name.strip()]
    if not names:
        raise SpecError(f"devices is {asked!r}: expected all, or names such as cuda:0,cuda:1")
    return [choose_device(name) for name in names]


def needs_spare_row(device: str) -> bool:
    """Whether each batch must hold a dummy row.

    Where a batch has no padding at all, transformers drops its attention mask (or, in a decoder, lets the kernel make
    a causal one), and on an accelerator another kernel with other rounding then runs. One dummy row, whose mask is
    never full, keeps every batch on the same kernel. On CPU both ways give the same bits, in encoders and decoders,
    float32 and bfloat16 (tests hold us to it), and a row in 32 is saved.
    """
    return device.split(":")[0] != "cpu"


# What did not pay, on 2 cores with AVX-512 and without AMX, in CPU time per pass of MiniLM at 16, 28, 64 and 160
# tokens (November 2026): weights packed by oneDNN with bias and GELU fused are 1.12 to 1.18 times as fast in float32,
# 1.05 to 1.13 times in bfloat16, but give other bits than the plain network that is fine-tuned, and --compile does as
# much (1.13 to 1.20, 1.08 to 1.17). Packed bfloat16 without the fusion gives the same bits here, for 1.03 times.
# Weights packed by MKL are no faster. Attention as two batched products and a softmax is 0.86 to 1.06 times as fast
# as the fused kernel in float32, 0.99 to 1.10 times in bfloat16: of a pass of 28 tokens that kernel has a tenth.
MOST_PASSES = 8
"""Passes run side by side in one process at most: past that, Python's lock between kernels would be waited for."""


def side_by_side(device: str, batches: int, threads_each: int = 1) -> int:
    """Return how many of ``batches`` passes run at a time: on CPU as many as torch has threads for.

    Only how many: each pass has the ``threads_each`` that its shape policy says, however many threads are free,
    because their number decides how a kernel adds up. Several passes with few threads are faster than one pass after
    the other with all of them anyway: no kernel waits for the slowest of its threads.
    """
    if device.split(":")[0] != "cpu":
        return 1
    import torch

    return max(min(torch.get_num_threads() // threads_each, batches), 1)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run with ``count`` torch threads, or with as many as torch likes when None. Raises ``SpecError`` below 1.

    The number is the calling thread's own: what another thread sets meanwhile does not reach this one.
    """
    if count is not None and count < 1:
        raise SpecError(f"threads is {count}: expected at least 1")
    import torch

    before = torch.get_num_threads()
    if count is None or count == before:  # setting it, even to what it is, drops the kernels that oneDNN has prepared
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def has_own_memory(device: str) -> bool:
    """Whether the device says when its memory is full; a system that runs out ends programs without a word."""
    return device.split(":")[0] != "cpu"


@contextmanager
def device_memory(what: str, instead: str) -> Iterator[None]:
    """Turn a device's want of memory into ``DeviceMemoryError``: for ``what`` it is needed, what to do ``instead``."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        free = re.search(r"[\d.]+ [KMG]iB is free", str(error))
        there = f" ({free[0]})" if free else ""
        raise DeviceMemoryError(
            f"the device has not enough memory{there} for {what}: {instead}, free memory that other programs hold "
            "there, or use another device"
        ) from None


# A network run through `torch.compile`.


class Compiled:
    """A network run through ``torch.compile``: one compilation for all canonical shapes, always the same one.

    What inductor makes of a network, and with it the bits, may depend on the first shape it sees. So ``warm_up``,
    passes through this object at shapes that the canonical ones alone decide, comes first. Inductor writes the number
    of threads into its kernels too, so on CPU a pass always has one, and passes run side by side.

    Raises ``BackboneError`` when the network cannot be compiled.
    """

    def __init__(self, network: torch.nn.Module, warm_up: Callable[[Compiled], Iterable[object]]) -> None:
        import torch

        try:
            with warnings.catch_warnings(), torch.inference_mode():
                warnings.simplefilter("ignore")
                self._run = torch.compile(network, dynamic=True)
                for _ in warm_up(self):
                    pass
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the compiler's own errors, the C++ compiler's, and what a model trips over
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            if "CxxCompiler" in f"{type(error).__name__} {error}":
                reason = f"there is no working C++ compiler (install g++, or name one in CXX) [{reason[:120]}]"
            raise BackboneError(
                f"the model cannot be compiled here: {reason[:300]}; or extract without compiling"
            ) from error

    def __call__(self, **inputs: Any) -> Any:
        import torch
        import torch._dynamo.config as dynamo
        import torch._inductor.config as inductor

        on_cpu = next(iter(inputs.values())).device.type == "cpu"
        # Freezing packs the weights once. Patched around each call, because it is read while tracing, and is nobody
        # else's business. Dynamo counts all models of a class together, and would fall back to eager past its limit.
        with (
            inductor.patch(freezing=True),
            dynamo.patch(recompile_limit=1024, fail_on_recompile_limit_hit=True),
            threads(1 if on_cpu and torch.get_num_threads() > 1 else None),
        ):
            return self._run(**inputs)

    @staticmethod
    def may_run_side_by_side() -> bool:
        """Whether the compiler's settings are each thread's own, as they are in newer versions of torch."""
        import torch._inductor.config as inductor

        entry = getattr(inductor, "_config", {}).get("freezing")
        return isinstance(getattr(entry, "user_override", None), ContextVar)
