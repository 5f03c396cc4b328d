"""How much memory a process held at most, above what Python and its libraries take."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from embedcache.compare.measurements import Memory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Watches from where it is made; ``read`` says what was held at most since.

    On Linux by ``VmHWM`` of the process: ``ru_maxrss`` would count what the parent held when it started this one,
    because the kernel carries the peak over ``exec``. Elsewhere by ``ru_maxrss``.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._cuda = device if device.startswith("cuda") else None
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")  # forget the peak of the imports
        self.baseline = _status("VmRSS") or _most()
        if self._cuda is not None:
            import torch

            torch.cuda.reset_peak_memory_stats(self._cuda)

    def read(self) -> Memory:
        """Return what was held until now."""
        device = None
        if self._cuda is not None:
            import torch

            device = int(torch.cuda.max_memory_allocated(self._cuda))
        return Memory(baseline=self.baseline, device=device, peak=max(_status("VmHWM") or _most(), self.baseline))


def _status(name: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _most() -> int:
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
