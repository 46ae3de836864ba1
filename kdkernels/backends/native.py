"""Row kernels in C++ for the CPU, and what the CUDA ones share with them: the only importer of the extension ``kdkernels._C``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..fused.call import Call
from .rows import STATE, HeadBatch, RowBatch, Stage, Transform

INTERFACE = 3
"""Number of the compiled extension that this file calls: another one whenever the arguments or their meaning change."""

_MISSING: str | None = None
try:
    from .. import _C

    if getattr(_C, "interface", 1) != INTERFACE:
        _MISSING = "the compiled extension kdkernels._C was built from other sources: run pip install again"
except ImportError as error:
    _MISSING = f"the compiled extension kdkernels._C is not there ({error}): reinstall where a C++17 compiler is found"

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_Arguments = TypeVar("_Arguments")
_NORMALIZERS = {"softmax": 0, "mean": 1, "none": 2}


def unavailable(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why it cannot run there, or None."""
    if device.type != "cpu":
        return f"it runs on the CPU, and the tensors are on {device.type}"
    return _MISSING


def contents() -> dict[str, list[str]]:
    """What the compiled extension holds: the CPU instruction sets that this processor runs, best first, and its CUDA targets.

    Empty without the extension.
    """
    return {} if _MISSING else {"cpu instruction sets": _C.cpu_isas(), "cuda targets": _C.cuda_targets()}


def missing() -> str | None:
    """Why the compiled extension is not there, or None."""
    return _MISSING


def state_scales(problem: Call) -> tuple[float, float]:
    """What the logits in a state are multiplied by to be logits: nothing."""
    return 1.0, 1.0


def rows(problem: Call, batch: RowBatch, stages: Stage) -> None:
    """Runs a batch on ``torch.get_num_threads()`` threads, without the GIL."""
    _C.cpu_rows(_arguments(problem, batch, stages, "cpu"), torch.get_num_threads())


def cuda_rows(problem: Call, batch: RowBatch, stages: Stage) -> None:
    """Launches a batch on the current stream of its own device, and does not wait for it."""
    _launch(_C.cuda_rows, _arguments(problem, batch, stages, "cuda"), batch.student)


def cuda_head_rows(problem: Call, batch: HeadBatch, stages: Stage) -> None:
    """As ``cuda_rows``, of one side."""
    _launch(_C.cuda_head_rows, _head_arguments(problem, batch, stages, "cuda"), batch.logits)


def cuda_most_top() -> int:
    """How many of the largest ``cuda_head_rows`` finds at most."""
    return _C.cuda_most_top


def cuda_softmax_rows(x: Tensor, out: Tensor, temperature: float, logarithm: bool) -> None:
    """``softmax(x / T)`` or its logarithm."""
    _launch(_C.cuda_softmax_rows, _softmax_arguments(x, None, out, temperature, logarithm, "cuda"), x)


def cuda_softmax_gradient_rows(y: Tensor, dy: Tensor, out: Tensor, temperature: float, logarithm: bool) -> None:
    """The gradient by x, from ``cuda_softmax_rows``' result and the gradient by it."""
    _launch(_C.cuda_softmax_rows, _softmax_arguments(y, dy, out, temperature, logarithm, "cuda"), y)


def _launch(kernel: Callable[[_Arguments, int], None], arguments: _Arguments, where: Tensor) -> None:
    with torch.cuda.device(where.device):
        kernel(arguments, torch.cuda.current_stream(where.device).cuda_stream)


def _arguments(problem: Call, batch: RowBatch, stages: Stage, device_type: str) -> _C.RowArguments:
    a, b = problem.divergence.kernel_parameters
    count, vocab = batch.student.shape
    dtype = problem.compute_dtype

    def address(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return _address(name, tensor, shape, dtype, device_type)

    args = _C.RowArguments()
    args.student = _side(batch.student, batch.student_bias, problem.student, dtype, device_type)
    args.teacher = _side(batch.teacher, batch.teacher_bias, problem.teacher, dtype, device_type)
    args.rows, args.vocab = count, vocab
    args.divergence, args.a, args.b = problem.divergence.id, a, b
    args.normalizer = _NORMALIZERS[problem.divergence.normalizer]
    args.inv_temperature = problem.inv_temperature
    args.value_scale, args.slope_scale, args.ce_weight = problem.value_scale, problem.slope_scale, problem.ce_weight
    args.dz_scale = batch.dz_scale
    args.double_precision = dtype == torch.float64
    args.stages, args.statistics = int(stages), Stage.NORMALISERS in stages
    args.labels = address("labels", batch.labels, (count,), torch.int64)
    args.weight = address("weight", batch.weight, (count,), dtype)
    args.state, args.state_stride = address("state", batch.state, (len(STATE), count), dtype), batch.state.stride(0)
    args.loss = address("loss", batch.loss, (count,), dtype)
    if batch.stats is not None:
        args.stats, args.stats_stride = address("stats", batch.stats, (5, count), torch.float32), batch.stats.stride(0)
    if batch.dz is not None and Stage.GRADIENT in stages:
        args.dz, args.dz_stride = address("dz", batch.dz, (count, vocab), batch.dz.dtype), batch.dz.stride(0)
        args.dz_dtype = _DTYPES[batch.dz.dtype]
    return args


def head_rows(problem: Call, batch: HeadBatch, stages: Stage) -> None:
    """Runs a batch of one side; threads as ``rows``."""
    _C.cpu_head_rows(_head_arguments(problem, batch, stages, "cpu"), torch.get_num_threads())


def softmax_rows(x: Tensor, out: Tensor, temperature: float, logarithm: bool) -> None:
    """``softmax(x / T)`` or its logarithm."""
    _C.cpu_softmax_rows(_softmax_arguments(x, None, out, temperature, logarithm, "cpu"), torch.get_num_threads())


def softmax_gradient_rows(y: Tensor, dy: Tensor, out: Tensor, temperature: float, logarithm: bool) -> None:
    """The gradient by x, from ``softmax_rows``' result and the gradient by it."""
    _C.cpu_softmax_rows(_softmax_arguments(y, dy, out, temperature, logarithm, "cpu"), torch.get_num_threads())


def has_product(dtype: torch.dtype, result: torch.dtype) -> bool:
    """Whether ``product`` multiplies such operands into such a result: bfloat16 into float32, on a processor that can."""
    return _MISSING is None and dtype == torch.bfloat16 and result == torch.float32 and _C.cpu_has_product()


def product(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out[C, V] = hidden[C, D] @ weight[V, D].T``, D even: exact products of the bfloat16 operands, summed in float32."""
    (count, depth), vocab = hidden.shape, weight.shape[0]
    _C.cpu_product(
        _address("hidden", hidden, (count, depth), torch.bfloat16, "cpu"),
        _address("weight", weight, (vocab, depth), torch.bfloat16, "cpu"),
        _address("out", out, (count, vocab), torch.float32, "cpu"),
        count, vocab, depth, hidden.stride(0), weight.stride(0), out.stride(0), torch.get_num_threads(),
    )  # fmt: skip


def _head_arguments(problem: Call, batch: HeadBatch, stages: Stage, device_type: str) -> _C.HeadArguments:
    count, vocab = batch.logits.shape
    dtype = problem.compute_dtype
    num_ids = 0 if batch.ids is None else batch.ids.shape[1]

    def address(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        if tensor is not None and len(shape) > 1 and name != "dz" and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
        return _address(name, tensor, shape, dtype, device_type)

    args = _C.HeadArguments()
    args.side = _side(batch.logits, batch.bias, problem.student, dtype, device_type)
    args.rows, args.vocab = count, vocab
    args.inv_temperature, args.dz_scale = problem.inv_temperature, batch.dz_scale
    args.double_precision, args.statistics = dtype == torch.float64, Stage.NORMALISERS in stages
    args.top = address("top", batch.top, (count,), dtype)
    args.log_sum = address("log_sum", batch.log_sum, (count,), dtype)
    args.entropy = address("entropy", batch.entropy, (count,), dtype)
    args.ids, args.num_ids = address("ids", batch.ids, (count, num_ids), torch.int64), num_ids
    args.logprobs = address("logprobs", batch.logprobs, (count, num_ids), dtype)
    args.d_lse = address("d_lse", batch.d_lse, (count,), dtype)
    args.d_entropy = address("d_entropy", batch.d_entropy, (count,), dtype)
    args.d_logprobs = address("d_logprobs", batch.d_logprobs, (count, num_ids), dtype)
    if batch.dz is not None and Stage.GRADIENT in stages:
        args.dz, args.dz_stride = address("dz", batch.dz, (count, vocab), batch.dz.dtype), batch.dz.stride(0)
        args.dz_dtype = _DTYPES[batch.dz.dtype]
    if batch.top_ids is not None:
        shape = (count, batch.top_ids.shape[1])
        args.num_top, args.top_ids = shape[1], address("top_ids", batch.top_ids, shape, torch.int32)
        args.top_logprobs = address("top_logprobs", batch.top_logprobs, shape, dtype)
    if batch.draws is not None and batch.seed is not None:
        shape = (count, batch.draws.shape[1])
        args.num_draws, args.draws = shape[1], address("draws", batch.draws, shape, torch.int32)
        args.first_row = batch.first_row
        if device_type == "cpu":
            args.seed = int(batch.seed) % 2**64
        else:  # read there: nothing waits for it
            args.seed_at = address("seed", batch.seed.view(1), (1,), torch.int64)
    return args


def _softmax_arguments(
    x: Tensor, dy: Tensor | None, out: Tensor, temperature: float, logarithm: bool, device_type: str
) -> _C.SoftmaxArguments:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    args = _C.SoftmaxArguments()
    args.x = _side(x, None, Transform(), dtype, device_type)
    if dy is not None:
        args.dy, args.backward = _side(dy, None, Transform(), dtype, device_type), True
    args.out, args.out_stride = _address("out", out, tuple(x.shape), out.dtype, device_type), out.stride(0)
    args.out_dtype = _DTYPES[out.dtype]
    args.rows, args.vocab = x.shape
    args.inv_temperature, args.logarithm, args.double_precision = 1.0 / temperature, logarithm, dtype == torch.float64
    return args


def _side(logits: Tensor, bias: Tensor | None, transform: Transform, dtype: torch.dtype, device_type: str) -> _C.Side:
    side = _C.Side()
    side.logits = _address("logits", logits, tuple(logits.shape), logits.dtype, device_type)
    side.stride, side.dtype = logits.stride(0), _DTYPES[logits.dtype]
    side.bias = _address("bias", bias, tuple(logits.shape[1:]), dtype, device_type)
    side.scale, side.softcap = transform.scale, transform.softcap or 0.0
    return side


def _address(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device_type: str) -> int:
    """Of the first element; 0 for None. The one place that answers for what the compiled code will touch."""
    if tensor is None:
        return 0
    if (
        tensor.device.type != device_type
        or tensor.dtype != dtype
        or tensor.dtype not in (*_DTYPES, torch.int64, torch.int32)
        or tuple(tensor.shape) != shape
    ):
        raise ValueError(
            f"{name} must be {dtype} of shape {list(shape)} on {device_type}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must have unit stride in its last dimension, got strides {tensor.stride()}")
    return tensor.data_ptr()
