"""Host memory that is cheap to touch. Linux clears a fresh buffer page by page when it is first written to; with 4 KiB pages that
takes longer than several sweeps over it (measured: 55 ms against 19 ms for 262 MB). So large buffers get huge pages, and scratch is
kept from one call to the next, as torch's allocator does on a GPU."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from typing import TypeVar

import torch
from torch import Tensor

_HUGE = 2 << 20
_ADVICE: int = getattr(mmap, "MADV_HUGEPAGE", -1)  # of Linux alone
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" and _ADVICE >= 0 else None

T = TypeVar("T", bound=Tensor | None)


def advise(tensor: T) -> T:
    """Asks for huge pages under a fresh CPU tensor and returns it. Advice only: where it can't be had, nothing changes."""
    if _LIBC is None or tensor is None or tensor.device.type != "cpu" or tensor.nbytes < 2 * _HUGE:
        return tensor
    # Whole huge pages only: what else lies on the edges is somebody else's.
    start = -(-tensor.data_ptr() // _HUGE) * _HUGE
    stop = (tensor.data_ptr() + tensor.nbytes) // _HUGE * _HUGE
    _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), ctypes.c_int(_ADVICE))
    return tensor


KEPT_BYTES = 256 << 20
"""Of scratch that stays with a thread between calls, per name; larger scratch is freed with its call."""


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}


_SCRATCH = _Scratch()


def scratch(name: str, nbytes: int) -> Tensor:
    """``[nbytes]`` uint8 on the CPU, undefined; this thread's next call with the same name gets the same memory."""
    kept = _SCRATCH.buffers.get(name)
    if kept is None or kept.numel() < nbytes:
        with torch.inference_mode(False):  # an inference tensor could not be written to by a later call in training
            kept = advise(torch.empty(nbytes, dtype=torch.uint8))
        if nbytes <= KEPT_BYTES:
            _SCRATCH.buffers[name] = kept
    return kept[:nbytes]
