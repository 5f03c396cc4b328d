"""A network run through ``torch.compile``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from embedcache.backbone.device import threads
from embedcache.errors import BackboneError

if TYPE_CHECKING:
    import torch


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
