"""The memory that a process has taken."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

__all__ = ["peak_bytes"]


def peak_bytes(device: torch.device) -> int | None:
    """Peak memory of this process so far: resident on the CPU, allocated by torch on CUDA. None: the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: a process that was forked begins with its parent's.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
