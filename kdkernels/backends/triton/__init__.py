"""Row kernels in Triton: GPUs, or any CPU under Triton's interpreter (``TRITON_INTERPRET=1``, for tests)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...fused.call import Call
from .. import torch as torch_rows
from ..rows import HeadBatch, RowBatch, Stage, Transform
from .arithmetic import INTERPRETED as _INTERPRETED
from .divergences import functions_of
from .heads import head_rows_kernel, sample_rows_kernel, softmax_gradient_rows_kernel, softmax_rows_kernel
from .kernel import CAPPED, SCALED, kd_rows_kernel
from .launch import choose, choose_sample, choose_softmax

_NORMALIZERS = {"softmax": 0, "mean": 1, "none": 2}
_LOG2E = 1.0 / math.log(2.0)
_LARGEST = torch.finfo(torch.float32).max


DEVICE_TYPES = ("cuda",)


def unavailable(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Return the reason why the backend cannot run on this device with logits of these dtypes, or None."""
    if torch.float64 in dtypes:
        return "Triton passes scalars in float32: use the torch backend for float64"
    if _INTERPRETED:
        return None
    if device.type != "cuda":
        return f"it needs a GPU, and the tensors are on {device.type}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    capability = torch.cuda.get_device_capability(device)
    actual = f"but {device} has {'.'.join(map(str, capability))}"
    if torch.version.hip is not None:
        # Other GPUs may run the warps of a program on two L1 caches. Whether gradients can overwrite their logits there is untested.
        return None if capability[0] == 9 else f"on AMD GPUs it needs gfx9 (CDNA), {actual}"
    return None if capability >= (8, 0) else f"it needs compute capability 8.0, {actual}"


def _transforms(call: Call) -> tuple[int, int]:
    """Return the transforms that the two-side kernel applies to each side's logits as it reads them.

    A positive scale is not one of them: it is part of the factor that multiplies differences of logits, at no cost.
    """
    return _transform(call.student, call.student.scale > 0), _transform(call.teacher, call.teacher.scale > 0)


def state_scales(call: Call) -> tuple[float, float]:
    """Return the factors that convert logits stored in a state to logits."""
    student, teacher = _transforms(call)
    return 1.0 if student else call.student.scale, 1.0 if teacher else call.teacher.scale


def _transform(t: Transform, plain: bool) -> int:
    """Return the transform that a kernel applies to a logit as it reads it: none if ``plain`` and without softcap."""
    if t.softcap is not None:
        return int(CAPPED.value)
    return 0 if plain else int(SCALED.value)


def _factors(t: Transform, transform: int, *units: float) -> tuple[float, ...]:
    """Return the factors from a logit, as the kernel reads it, to each of ``units``. They are finite, so that 0 stays 0."""
    return tuple(min(unit if transform else unit * t.scale, _LARGEST) for unit in units)


def rows(call: Call, batch: RowBatch, stages: Stage) -> None:
    """Launch the two-side kernel once, with one program per row."""
    count, vocab = batch.student.shape
    if not count:
        return
    a, b = call.divergence.kernel_parameters
    functions = functions_of(call.divergence)
    transforms = _transforms(call)
    optional = (batch.student_bias, batch.teacher_bias, batch.labels, batch.stats)
    launch = choose(vocab, any(transforms) or any(t is not None for t in optional), functions.block_rows)
    unit = call.inv_temperature * (_LOG2E if call.divergence.normalizer == "softmax" else 1.0)
    with _on_device(batch.student):
        kd_rows_kernel[(count,)](
            batch.student, batch.teacher, batch.student_bias, batch.teacher_bias, batch.labels, batch.weight, batch.state, batch.loss,
            batch.stats, batch.dz,
            batch.student.stride(0), batch.teacher.stride(0), 0 if batch.dz is None else batch.dz.stride(0),
            batch.state.stride(0), 0 if batch.stats is None else batch.stats.stride(0), vocab,
            a, b,
            *_factors(call.student, transforms[0], unit), *_factors(call.teacher, transforms[1], unit),
            *_factors(call.student, transforms[0], _LOG2E, 1.0),
            call.value_scale, call.slope_scale, call.ce_weight,
            call.student.scale, call.student.softcap or 0.0, call.teacher.scale, call.teacher.softcap or 0.0,
            batch.dz_scale,
            TERMS=functions.terms, FINISH=functions.finish, SLOPE=functions.gradient, NUM_SUMS=call.divergence.num_sums,
            NORMALIZER=_NORMALIZERS[call.divergence.normalizer], COEFFICIENT=call.divergence.slope_sum,
            STUDENT_TRANSFORM=transforms[0], TEACHER_TRANSFORM=transforms[1], KD=call.kd_weight != 0,
            NORMALISERS=Stage.NORMALISERS in stages, SUMS=Stage.SUMS in stages, GRADIENT=Stage.GRADIENT in stages,
            R=launch.rows, W=launch.width, **launch.options,
        )  # fmt: skip


def head_rows(call: Call, batch: HeadBatch, stages: Stage) -> None:
    """Launch one kernel for statistics and gradient and one for draws. Top-k uses ``torch.topk``, which we do not beat."""
    count, vocab = batch.logits.shape
    if not count:
        return
    if batch.top_ids is not None:
        torch_rows.head_rows(call, batch, stages)
        return
    t, transform = call.student, _transform(call.student, call.student.scale == 1.0)
    launch = choose(vocab, features=True)
    num_ids = 0 if batch.ids is None else batch.ids.shape[1]
    log2_factor = call.inv_temperature * _LOG2E
    with _on_device(batch.logits):
        head_rows_kernel[(count,)](
            batch.logits, batch.bias, batch.top, batch.log_sum, batch.entropy, batch.ids, batch.logprobs,
            batch.d_lse, batch.d_entropy, batch.d_logprobs, batch.dz,
            batch.logits.stride(0), 0 if batch.dz is None else batch.dz.stride(0), vocab, num_ids,
            call.inv_temperature, log2_factor, t.scale, t.softcap or 0.0, t.scale * call.inv_temperature * batch.dz_scale,
            TRANSFORM=transform, NORMALISERS=Stage.NORMALISERS in stages, SUMS=Stage.SUMS in stages, GRADIENT=Stage.GRADIENT in stages,
            R=launch.rows, W=launch.width, IDS_BLOCK=min(64, 1 << max(0, num_ids - 1).bit_length()), **launch.options,
        )  # fmt: skip
        if batch.draws is not None and Stage.SUMS in stages:
            launch = choose_sample(vocab)
            sample_rows_kernel[(count * batch.draws.shape[1],)](
                batch.logits, batch.bias, batch.top, batch.log_sum, batch.seed, batch.draws,
                batch.logits.stride(0), vocab, batch.draws.shape[1], batch.first_row,
                log2_factor, t.scale, t.softcap or 0.0,
                call.inv_temperature, t.scale, t.softcap or 0.0,
                TRANSFORM=transform, BLOCK=launch.block, **launch.options,
            )  # fmt: skip


def softmax_rows(x: Tensor, out: Tensor, temperature: float, logarithm: bool) -> None:
    """Write ``softmax(x / T)`` or its logarithm to ``out``, with one program per row."""
    count, vocab = x.shape
    launch = choose_softmax(vocab, 1)
    with _on_device(x):
        softmax_rows_kernel[(count,)](
            x, out, x.stride(0), out.stride(0), vocab, 1.0 / temperature, _LOG2E / temperature,
            LOGARITHM=logarithm, ONE_READ=vocab <= launch.block, R=launch.rows, W=launch.width, **launch.options,
        )  # fmt: skip


def softmax_gradient_rows(y: Tensor, dy: Tensor, out: Tensor, temperature: float, logarithm: bool) -> None:
    """Write the gradient by x to ``out``, from the softmax's result y and its gradient dy."""
    count, vocab = y.shape
    launch = choose_softmax(vocab, 2)
    with _on_device(y):
        softmax_gradient_rows_kernel[(count,)](
            y, dy, out, y.stride(0), dy.stride(0), out.stride(0), vocab, 1.0 / temperature,
            LOGARITHM=logarithm, ONE_READ=vocab <= launch.block, R=launch.rows, W=launch.width, **launch.options,
        )  # fmt: skip


def _on_device(tensor: Tensor) -> torch.cuda.device:
    """Make the tensor's device current, because Triton launches on the current device. Does nothing for a CPU tensor."""
    return torch.cuda.device(tensor.device.index if tensor.is_cuda else -1)
