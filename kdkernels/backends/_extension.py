"""The only importer of the compiled extension ``kdkernels._C``: builds its argument records and checks every tensor passed to it."""

from __future__ import annotations

import warnings
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .rows import STATE, HeadBatch, RowBatch, Stage, Transform

if TYPE_CHECKING:
    from ..fused.call import Call

INTERFACE = 4
"""Version of the compiled extension's interface. Increment it when the arguments or their meaning change."""


def shadowed(package: Path) -> Path | None:
    """Return the folder of an installed kdkernels that has the compiled extension, if ``package`` is another copy without it.

    Python prefers ``kdkernels/`` in the current folder, such as a clone after ``pip install .``, to the installed package.
    """
    folders = (Path(str(copy.locate_file("kdkernels"))).resolve() for copy in distributions(name="kdkernels"))
    return next((folder for folder in folders if folder != package and any(folder.glob("_C.*"))), None)


_MISSING: str | None = None
try:
    from .. import _C as _C

    if getattr(_C, "interface", 1) != INTERFACE:
        _MISSING = "the compiled extension kdkernels._C was built from other sources: run pip install again"
except ImportError as error:
    _MISSING = f"the compiled extension kdkernels._C cannot be imported ({error}): reinstall kdkernels with a C++17 compiler on PATH"
    if (_installed := shadowed(_package := Path(__file__).resolve().parents[1])) is not None:
        _MISSING = f"{_package}, without the compiled extension, is imported instead of {_installed}"
        warnings.warn(f"{_MISSING}: start Python in another folder, or run pip install -e . in this one", stacklevel=2)

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_POINTED = {*_DTYPES, torch.int64, torch.int32}
_NORMALIZERS = {"softmax": 0, "mean": 1, "none": 2}


def contents() -> dict[str, list[str]]:
    """Return the compiled CPU instruction sets that this processor supports, best first, and the compiled CUDA targets.

    Returns an empty dict without the extension.
    """
    return {} if _MISSING else {"cpu instruction sets": _C.cpu_isas(), "cuda targets": _C.cuda_targets()}


def missing() -> str | None:
    """Return the reason why the compiled extension cannot be used, or None."""
    return _MISSING


def row_arguments(call: Call, batch: RowBatch, stages: Stage, device_type: str) -> _C.RowArguments:
    """Return the argument record of a call with two sides."""
    a, b = call.divergence.kernel_parameters
    count, vocab = batch.student.shape
    dtype = call.compute_dtype

    def address(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return address_of(name, tensor, shape, dtype, device_type)

    args = _C.RowArguments()
    args.student = _side(batch.student, batch.student_bias, call.student, dtype, device_type)
    args.teacher = _side(batch.teacher, batch.teacher_bias, call.teacher, dtype, device_type)
    args.rows, args.vocab = count, vocab
    args.divergence, args.a, args.b = call.divergence.id, a, b
    args.normalizer = _NORMALIZERS[call.divergence.normalizer]
    args.inv_temperature = call.inv_temperature
    args.value_scale, args.slope_scale, args.ce_weight = call.value_scale, call.slope_scale, call.ce_weight
    args.dz_scale = batch.dz_scale
    args.double_precision = dtype == torch.float64
    args.stages = int(stages)
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


def head_arguments(call: Call, batch: HeadBatch, stages: Stage, device_type: str) -> _C.HeadArguments:
    count, vocab = batch.logits.shape
    dtype = call.compute_dtype
    num_ids = 0 if batch.ids is None else batch.ids.shape[1]

    def address(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        if tensor is not None and len(shape) > 1 and name != "dz" and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
        return address_of(name, tensor, shape, dtype, device_type)

    args = _C.HeadArguments()
    args.side = _side(batch.logits, batch.bias, call.student, dtype, device_type)
    args.rows, args.vocab = count, vocab
    args.inv_temperature, args.dz_scale = call.inv_temperature, batch.dz_scale
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
        else:  # pass the device pointer: reading the value would synchronise
            args.seed_at = address("seed", batch.seed.view(1), (1,), torch.int64)
    return args


def softmax_arguments(
    x: Tensor, dy: Tensor | None, out: Tensor, temperature: float, logarithm: bool, device_type: str
) -> _C.SoftmaxArguments:
    """Return the argument record of a softmax or, with ``dy``, of its gradient."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    args = _C.SoftmaxArguments()
    args.x = _side(x, None, Transform(), dtype, device_type)
    if dy is not None:
        args.dy, args.backward = _side(dy, None, Transform(), dtype, device_type), True
    args.out, args.out_stride = address_of("out", out, tuple(x.shape), out.dtype, device_type), out.stride(0)
    args.out_dtype = _DTYPES[out.dtype]
    args.rows, args.vocab = x.shape
    args.inv_temperature, args.logarithm, args.double_precision = 1.0 / temperature, logarithm, dtype == torch.float64
    return args


def _side(logits: Tensor, bias: Tensor | None, transform: Transform, dtype: torch.dtype, device_type: str) -> _C.Side:
    side = _C.Side()
    side.logits = address_of("logits", logits, tuple(logits.shape), logits.dtype, device_type)
    side.stride, side.dtype = logits.stride(0), _DTYPES[logits.dtype]
    side.bias = address_of("bias", bias, tuple(logits.shape[1:]), dtype, device_type)
    side.scale, side.softcap = transform.scale, transform.softcap or 0.0
    return side


def address_of(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device_type: str) -> int:
    """Return the data pointer (0 for None) after checking device, dtype, shape and strides. Every pointer given to C++ comes from here."""
    if tensor is None:
        return 0
    if tensor.device.type != device_type or tensor.dtype != dtype or tensor.dtype not in _POINTED or tensor.shape != shape:
        raise ValueError(
            f"{name} must be {dtype} of shape {list(shape)} on {device_type}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must have unit stride in its last dimension, got strides {tensor.stride()}")
    return tensor.data_ptr()
