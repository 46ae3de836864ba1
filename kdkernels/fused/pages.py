"""Host memory that is cheap to touch. Linux clears a fresh buffer page by page when it is first written to; with 4 KiB pages that
takes longer than several sweeps over it (measured: 55 ms against 19 ms for 262 MB), and where a virtual machine has handed the pages
back to its host, many times as long. So large buffers get huge pages, and memory is kept from one call to the next, as torch's
allocator does on a GPU: scratch by its name, results once nothing refers to them any more."""

from __future__ import annotations

import math
import mmap
import sys
import threading
import weakref
from collections import deque
from contextlib import suppress

import torch
from torch import Tensor

from ..backends.selection import traits

_HUGE = 2 << 20
_ADVICE: int = getattr(mmap, "MADV_HUGEPAGE", -1) if sys.platform == "linux" else -1

KEPT_BYTES = 256 << 20
"""Of memory that stays between calls: for each name of scratch and thread, and for all results together. What is larger is freed."""

_free: deque[mmap.mmap] = deque()  # of results that are gone, oldest first


def recycled(tensor: Tensor) -> Tensor:
    """For a fresh CPU tensor, not written to yet: one like it in memory that an earlier result has left; undefined, too.

    Small tensors, and those of other devices and other systems than Linux, are returned as they are.
    """
    if _ADVICE < 0 or not traits(tensor.device).recycled_pages or tensor.nbytes < 2 * _HUGE:
        return tensor
    memory = _take(-(-tensor.nbytes // _HUGE) * _HUGE)
    view = memoryview(memory)
    # The storage holds the view for as long as anything uses the memory, wherever the tensor has got to by then.
    weakref.finalize(view, _give_back, memory).atexit = False
    return torch.frombuffer(view, dtype=tensor.dtype, count=math.prod(tensor.shape)).view(tensor.shape)


def _take(nbytes: int) -> mmap.mmap:
    # No lock: a finalizer may run at any point, on any thread, and operations on a deque are atomic.
    for memory in tuple(_free):
        if len(memory) == nbytes:
            try:
                _free.remove(memory)
            except ValueError:  # another thread was quicker
                continue
            return memory
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(_ADVICE)
    return memory


def _give_back(memory: mmap.mmap) -> None:
    if len(memory) <= KEPT_BYTES:
        _free.append(memory)
        with suppress(IndexError):  # another thread was quicker
            while sum(map(len, tuple(_free))) > KEPT_BYTES:
                _free.popleft()


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}


_SCRATCH = _Scratch()


def scratch(name: str, nbytes: int) -> Tensor:
    """``[nbytes]`` uint8 on the CPU, undefined; this thread's next call with the same name gets the same memory."""
    kept = _SCRATCH.buffers.get(name)
    if kept is None or kept.numel() < nbytes:
        with torch.inference_mode(False):  # an inference tensor could not be written to by a later call in training
            kept = recycled(torch.empty(nbytes, dtype=torch.uint8))
        if nbytes <= KEPT_BYTES:
            _SCRATCH.buffers[name] = kept
    return kept[:nbytes]
