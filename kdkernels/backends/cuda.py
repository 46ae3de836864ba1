"""Row kernels in CUDA C++, of the same compiled extension as the CPU's: see csrc/cuda and docs/kernels.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..fused.call import Call
from . import native
from . import torch as torch_rows
from .rows import HeadBatch, Stage


def unavailable(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why it cannot run there, or None."""
    if (reason := native.missing()) is not None:
        return reason
    targets = native.contents()["cuda targets"]
    if not targets:
        return "the extension was built without CUDA: reinstall where nvcc is found, with KDKERNELS_CUDA=1"
    if device.type != "cuda":
        return f"it needs a GPU, and the tensors are on {device.type}"
    if torch.float64 in dtypes:
        return "float64 is for the torch backend: the CUDA kernels compute in float32"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if not covers(targets, capability):
        return (
            f"the extension was built for {', '.join(targets)}, and {device} has capability {'.'.join(map(str, capability))}: "
            "reinstall with KDKERNELS_CUDA_ARCHS naming it"
        )
    return None


def covers(targets: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a GPU runs one of the targets: machine code of its own generation (``"90a"``: of that very one), or the newest's PTX."""
    generations = [(divmod(int(t.rstrip("af")), 10), t[-1].isdigit()) for t in targets]
    runs = any((of == capability) if not plain else (of[0] == capability[0] and of[1] <= capability[1]) for of, plain in generations)
    return runs or capability >= max(of for of, _ in generations)


rows = native.cuda_rows
softmax_rows = native.cuda_softmax_rows
softmax_gradient_rows = native.cuda_softmax_gradient_rows


def head_rows(problem: Call, batch: HeadBatch, stages: Stage) -> None:
    """Launches a batch of one side. More of the largest than shared memory has room for (4096) are found by torch's sort."""
    if batch.top_ids is not None and batch.top_ids.shape[1] > native.cuda_most_top():
        torch_rows.head_rows(problem, batch, stages)
    else:
        native.cuda_head_rows(problem, batch, stages)
