"""Timing of a run, with one clock for all benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Elapsed", "elapsed", "milliseconds"]

CPU = torch.device("cpu")


@dataclass
class Elapsed:
    """Seconds of a block, once it has ended."""

    seconds: float = 0.0


@contextmanager
def elapsed(device: torch.device = CPU) -> Iterator[Elapsed]:
    """Time a block by the wall clock, from an idle device to an idle device."""
    result = Elapsed()
    _synchronize(device)
    start = time.perf_counter()
    yield result
    _synchronize(device)
    result.seconds = time.perf_counter() - start


def milliseconds(step: Callable[[], Any], device: torch.device) -> float:
    """Run ``step`` once and return its time; on CUDA that of its kernels alone, with a cold L2 cache."""
    if device.type != "cuda":
        with elapsed() as result:
            step()
        return 1e3 * result.seconds
    # Writing twice the size of L2 evicts the data of the previous step. It also keeps the GPU busy for half a millisecond, until the host
    # has launched the first kernel of this step, so that the host's time is not counted.
    flushed = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)
    for _ in range(16):
        flushed.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
