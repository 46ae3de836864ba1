"""Recycle large host buffers, in huge pages.

Linux clears a new buffer page by page when it is first written. With 4 KiB pages, that takes longer than several passes over the
buffer (measured: 55 ms and 19 ms for 262 MB), and much longer on a virtual machine that returned the pages to its host. Large buffers
therefore get huge pages and are reused by later calls, as torch's allocator does on a GPU: scratch buffers by name, results after the
last reference to them is gone.
"""

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
"""Limit of the memory kept between calls: for each scratch name of each thread, and for all results together. More is freed."""

_free: deque[mmap.mmap] = deque()  # memory of deleted results, oldest first


def recycled(tensor: Tensor) -> Tensor:
    """Replace a new, uninitialised CPU tensor by an uninitialised one in recycled memory.

    Small tensors, tensors on other devices, and all tensors on systems other than Linux are returned unchanged.
    """
    if tensor.nbytes < 2 * _HUGE or _ADVICE < 0 or not traits(tensor.device).recycled_pages:
        return tensor
    memory = _take(-(-tensor.nbytes // _HUGE) * _HUGE)
    view = memoryview(memory)
    # The tensor's storage keeps the view alive until nothing uses the memory.
    weakref.finalize(view, _give_back, memory).atexit = False
    return torch.frombuffer(view, dtype=tensor.dtype, count=math.prod(tensor.shape)).view(tensor.shape)


def _take(nbytes: int) -> mmap.mmap:
    # No lock: finalizers can run at any point and on any thread, and deque operations are atomic.
    for memory in tuple(_free):
        if len(memory) == nbytes:
            try:
                _free.remove(memory)
            except ValueError:  # another thread took it
                continue
            return memory
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(_ADVICE)
    return memory


def _give_back(memory: mmap.mmap) -> None:
    if len(memory) <= KEPT_BYTES:
        _free.append(memory)
        with suppress(IndexError):  # another thread took it
            while sum(map(len, tuple(_free))) > KEPT_BYTES:
                _free.popleft()


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}


_SCRATCH = _Scratch()


def scratch(name: str, nbytes: int) -> Tensor:
    """Return ``[nbytes]`` uninitialised uint8 on the CPU. This thread's next call with the same name returns the same memory."""
    buffer = _SCRATCH.buffers.get(name)
    if buffer is None or buffer.numel() < nbytes:
        with torch.inference_mode(False):  # training could not write to an inference tensor later
            buffer = recycled(torch.empty(nbytes, dtype=torch.uint8))
        if nbytes <= KEPT_BYTES:
            _SCRATCH.buffers[name] = buffer
    return buffer[:nbytes]
