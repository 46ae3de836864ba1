"""The backend "cuda": row kernels in CUDA C++, in the compiled extension. See csrc/cuda and docs/kernels.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from . import _extension
from . import torch as torch_rows
from .rows import HeadBatch, RowBatch, Stage

if TYPE_CHECKING:
    from ..fused.call import Call

DEVICE_TYPES = ("cuda",)
_Arguments = TypeVar("_Arguments")


def unavailable(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Return the reason why the backend cannot run on this device with logits of these dtypes, or None."""
    if (reason := _extension.missing()) is not None:
        return reason
    targets = _extension.contents()["cuda targets"]
    if not targets:
        return "the extension was built without CUDA: reinstall with KDKERNELS_CUDA=1 and nvcc on PATH"
    if device.type != "cuda":
        return f"it needs a GPU, and the tensors are on {device.type}"
    if torch.float64 in dtypes:
        return "the CUDA kernels compute in float32: use the torch backend for float64"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if not covers(targets, capability):
        return (
            f"the extension was built for {', '.join(targets)}, and {device} has capability {'.'.join(map(str, capability))}: "
            f"reinstall with KDKERNELS_CUDA_ARCHS={''.join(map(str, capability))}"
        )
    return None


def covers(targets: Sequence[str], capability: tuple[int, int]) -> bool:
    """Return whether a GPU can run one of the targets: machine code for its major version (``"90a"``: only 9.0), or the newest PTX."""
    generations = [(divmod(int(t.rstrip("af")), 10), t[-1].isdigit()) for t in targets]
    runs = any((of == capability) if not plain else (of[0] == capability[0] and of[1] <= capability[1]) for of, plain in generations)
    return runs or capability >= max(of for of, _ in generations)


def state_scales(call: Call) -> tuple[float, float]:
    """Return 1 for both sides: states hold logits."""
    return 1.0, 1.0


def rows(call: Call, batch: RowBatch, stages: Stage) -> None:
    """Launch a batch on the current stream of its device, without synchronising.

    The one-read kernel runs NORMALISERS and SUMS in one call, with or without GRADIENT. The two-read kernel runs any stages.
    """
    _launch(_extension._C.cuda_rows, _extension.row_arguments(call, batch, stages, "cuda"), batch.student)


def head_rows(call: Call, batch: HeadBatch, stages: Stage) -> None:
    """Launch a batch of one side. A top-k larger than shared memory can hold (4096) uses torch's sort."""
    if batch.top_ids is not None and batch.top_ids.shape[1] > _extension._C.cuda_most_top:
        torch_rows.head_rows(call, batch, stages)
        return
    _launch(_extension._C.cuda_head_rows, _extension.head_arguments(call, batch, stages, "cuda"), batch.logits)


def softmax_rows(x: Tensor, out: Tensor, temperature: float, logarithm: bool) -> None:
    """Write ``softmax(x / T)`` or its logarithm to ``out``."""
    _launch(_extension._C.cuda_softmax_rows, _extension.softmax_arguments(x, None, out, temperature, logarithm, "cuda"), x)


def softmax_gradient_rows(y: Tensor, dy: Tensor, out: Tensor, temperature: float, logarithm: bool) -> None:
    """Write the gradient by x to ``out``, from the softmax's result y and its gradient dy."""
    _launch(_extension._C.cuda_softmax_rows, _extension.softmax_arguments(y, dy, out, temperature, logarithm, "cuda"), y)


def _launch(kernel: Callable[[_Arguments, int], None], arguments: _Arguments, where: Tensor) -> None:
    with torch.cuda.device(where.device):
        kernel(arguments, torch.cuda.current_stream(where.device).cuda_stream)
