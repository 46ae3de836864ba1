"""The memory of devices, and its use by this process."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["available_bytes", "peak_bytes", "total_bytes"]

GROUP = Path("/sys/fs/cgroup")


@lru_cache(maxsize=64)
def total_bytes(device: torch.device) -> int | None:
    """Return the memory of a GPU in bytes; None for any other device, and if torch sees no GPU (fake tensors)."""
    if device.type != "cuda":
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def peak_bytes(device: torch.device) -> int | None:
    """Return this process's peak memory so far: resident on the CPU, allocated by torch on CUDA; None if the system does not report it."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss, which a forked process inherits from its parent.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int | None:
    """Return the memory that this process can still use without swapping, within its container's limit; None without psutil."""
    try:
        import psutil
    except ImportError:
        return None
    free = int(psutil.virtual_memory().available)
    limit = _left_in_container()
    return free if limit is None else min(free, limit)


def _left_in_container() -> int | None:
    """Return the limit of the control group minus the memory of its processes; None without a limit."""
    try:
        limit = int((GROUP / "memory.max").read_text())  # "max" without one
        held = next(int(line.split()[1]) for line in (GROUP / "memory.stat").read_text().splitlines() if line.startswith("anon "))
    except (OSError, ValueError, StopIteration):
        return None
    return max(limit - held, 0)
