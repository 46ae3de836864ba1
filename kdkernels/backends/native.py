"""Row kernels in C++ for the CPU, and what the CUDA ones share with them: the only importer of the extension ``kdkernels._C``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Problem, RowBatch, Transform

try:
    from .. import _C

    _MISSING = None
except ImportError as error:
    _MISSING = f"the compiled extension kdkernels._C is not there ({error}): reinstall where a C++17 compiler is found"

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_NORMALIZERS = {"softmax": 0, "mean": 1, "none": 2}


def unavailable(device_type: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why it cannot run there, or None."""
    if device_type != "cpu":
        return f"it runs on the CPU, and the tensors are on {device_type}"
    return _MISSING


def contents() -> dict[str, list[str]]:
    """What the compiled extension holds: the CPU instruction sets that this processor runs, best first, and its CUDA targets.

    Empty without the extension.
    """
    return {} if _MISSING else {"cpu instruction sets": _C.cpu_isas(), "cuda targets": _C.cuda_targets()}


def missing() -> str | None:
    """Why the compiled extension is not there, or None."""
    return _MISSING


def rows(problem: Problem, batch: RowBatch, statistics: bool) -> None:
    """Runs a batch on ``torch.get_num_threads()`` threads, without the GIL."""
    _C.cpu_rows(_arguments(problem, batch, statistics, "cpu"), torch.get_num_threads())


def cuda_rows(problem: Problem, batch: RowBatch, statistics: bool) -> None:
    """Launches a batch on the current stream of its own device, and does not wait for it."""
    arguments = _arguments(problem, batch, statistics, "cuda")
    with torch.cuda.device(batch.student.device):
        _C.cuda_rows(arguments, torch.cuda.current_stream(batch.student.device).cuda_stream)


def _arguments(problem: Problem, batch: RowBatch, statistics: bool, device_type: str) -> _C.RowArguments:
    a, b = problem.divergence.kernel_parameters
    count, vocab = batch.student.shape
    dtype = problem.compute_dtype

    def address(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return _address(name, tensor, shape, dtype, device_type)

    def side(logits: Tensor, bias: Tensor | None, transform: Transform) -> _C.Side:
        side = _C.Side()
        side.logits = address("logits", logits, (count, vocab), logits.dtype)
        side.stride, side.dtype = logits.stride(0), _DTYPES[logits.dtype]
        side.bias = address("bias", bias, (vocab,), dtype)
        side.scale, side.softcap = transform.scale, transform.softcap or 0.0
        return side

    args = _C.RowArguments()
    args.student = side(batch.student, batch.student_bias, problem.student)
    args.teacher = side(batch.teacher, batch.teacher_bias, problem.teacher)
    args.rows, args.vocab = count, vocab
    args.divergence, args.a, args.b = problem.divergence.id, a, b
    args.normalizer = _NORMALIZERS[problem.divergence.normalizer]
    args.temperature = problem.temperature
    args.value_scale, args.slope_scale, args.ce_weight = problem.value_scale, problem.slope_scale, problem.ce_weight
    args.dz_scale = batch.dz_scale
    args.double_precision = dtype == torch.float64
    args.statistics = statistics
    args.labels = address("labels", batch.labels, (count,), torch.int64)
    args.weight = address("weight", batch.weight, (count,), dtype)
    args.state, args.state_stride = address("state", batch.state, (4, count), dtype), batch.state.stride(0)
    args.loss = address("loss", batch.loss, (count,), dtype)
    if batch.stats is not None:
        args.stats, args.stats_stride = address("stats", batch.stats, (5, count), torch.float32), batch.stats.stride(0)
    if batch.dz is not None:
        args.dz, args.dz_stride = address("dz", batch.dz, (count, vocab), batch.dz.dtype), batch.dz.stride(0)
        args.dz_dtype = _DTYPES[batch.dz.dtype]
    return args


def _address(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device_type: str) -> int:
    """Of the first element; 0 for None. The one place that answers for what the compiled code will touch."""
    if tensor is None:
        return 0
    if (
        tensor.device.type != device_type
        or tensor.dtype != dtype
        or tensor.dtype not in (*_DTYPES, torch.int64)
        or tuple(tensor.shape) != shape
    ):
        raise ValueError(
            f"{name} must be {dtype} of shape {list(shape)} on {device_type}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must have unit stride in its last dimension, got strides {tensor.stride()}")
    return tensor.data_ptr()
