"""Row kernels in C++ for the CPU: the only importer of the compiled extension ``kdkernels._C``."""

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

    Empty without the extension; an extension built by another version may know less.
    """
    offered = {} if _MISSING else vars(_C)
    questions = {"cpu instruction sets": "cpu_isas", "cuda targets": "cuda_targets"}
    return {what: offered[name]() for what, name in questions.items() if name in offered}


def rows(problem: Problem, batch: RowBatch, statistics: bool) -> None:
    """Runs a batch on ``torch.get_num_threads()`` threads, without the GIL."""
    a, b = problem.divergence.kernel_parameters
    count, vocab = batch.student.shape
    dtype = problem.compute_dtype
    args = _C.RowArguments()
    args.student = _side(batch.student, batch.student_bias, problem.student, dtype)
    args.teacher = _side(batch.teacher, batch.teacher_bias, problem.teacher, dtype)
    args.rows, args.vocab = count, vocab
    args.divergence, args.a, args.b = problem.divergence.id, a, b
    args.normalizer = _NORMALIZERS[problem.divergence.normalizer]
    args.slope_sum_known = problem.divergence.slope_sum is not None
    args.slope_sum = problem.divergence.slope_sum or 0.0
    args.temperature = problem.temperature
    args.value_scale, args.slope_scale, args.ce_weight = problem.value_scale, problem.slope_scale, problem.ce_weight
    args.dz_scale = batch.dz_scale
    args.double_precision = dtype == torch.float64
    args.statistics = statistics
    args.labels = _address("labels", batch.labels, (count,), torch.int64)
    args.weight = _address("weight", batch.weight, (count,), dtype)
    args.state, args.state_stride = _address("state", batch.state, (4, count), dtype), batch.state.stride(0)
    args.loss = _address("loss", batch.loss, (count,), dtype)
    if batch.stats is not None:
        args.stats, args.stats_stride = _address("stats", batch.stats, (5, count), torch.float32), batch.stats.stride(0)
    if batch.dz is not None:
        args.dz, args.dz_stride = _address("dz", batch.dz, (count, vocab), batch.dz.dtype), batch.dz.stride(0)
        args.dz_dtype = _DTYPES[batch.dz.dtype]
    _C.cpu_rows(args, torch.get_num_threads())


def _side(logits: Tensor, bias: Tensor | None, transform: Transform, dtype: torch.dtype) -> _C.Side:
    side = _C.Side()
    side.logits = _address("logits", logits, tuple(logits.shape), logits.dtype)
    side.stride, side.dtype = logits.stride(0), _DTYPES[logits.dtype]
    side.bias = _address("bias", bias, tuple(logits.shape[1:]), dtype)
    side.scale, side.softcap = transform.scale, transform.softcap or 0.0
    return side


def _address(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Of the first element; 0 for None. The one place that answers for what the compiled code will touch."""
    if tensor is None:
        return 0
    if tensor.device.type != "cpu" or tensor.dtype != dtype or tensor.dtype not in (*_DTYPES, torch.int64) or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} must be {dtype} of shape {list(shape)} on the CPU, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must have unit stride in its last dimension, got strides {tensor.stride()}")
    return tensor.data_ptr()
