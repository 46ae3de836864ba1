"""Row kernels in Triton: NVIDIA GPUs, or any CPU under Triton's interpreter (``TRITON_INTERPRET=1``, for tests)."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ...problem import HeadBatch, Problem, RowBatch
from .. import torch as torch_rows
from .divergences import FUNCTIONS
from .heads import head_rows_kernel, sample_rows_kernel, softmax_gradient_rows_kernel, softmax_rows_kernel
from .kernel import kd_rows_kernel
from .launch import choose, choose_sample, choose_softmax

_NORMALIZERS = {"softmax": 0, "mean": 1, "none": 2}
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # as it was when the kernels were decorated


def unavailable(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why it cannot run there, or None."""
    if torch.float64 in dtypes:
        return "float64 is for the torch backend: Triton passes scalars in float32"
    if _INTERPRETED:
        return None
    if device.type != "cuda":
        return f"it needs a GPU, and the tensors are on {device.type}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is not None:
        return "only NVIDIA GPUs have been tried"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"it needs compute capability 8.0, and {device} has {'.'.join(map(str, capability))}"


def rows(problem: Problem, batch: RowBatch, statistics: bool) -> None:
    """One launch: a program per row."""
    count, vocab = batch.student.shape
    if not count:
        return
    a, b = problem.divergence.kernel_parameters
    launch = choose(vocab)
    absent = batch.state  # any pointer: never read
    with _on_device(batch.student):
        kd_rows_kernel[(count,)](
            batch.student, batch.teacher,
            absent if batch.student_bias is None else batch.student_bias,
            absent if batch.teacher_bias is None else batch.teacher_bias,
            absent if batch.labels is None else batch.labels,
            absent if batch.weight is None else batch.weight,
            batch.state,
            absent if batch.loss is None else batch.loss,
            absent if batch.stats is None else batch.stats,
            absent if batch.dz is None else batch.dz,
            batch.student.stride(0), batch.teacher.stride(0), 0 if batch.dz is None else batch.dz.stride(0),
            batch.state.stride(0), 0 if batch.stats is None else batch.stats.stride(0), vocab,
            a, b, problem.inv_temperature, problem.value_scale, problem.slope_scale, problem.ce_weight,
            problem.student.scale, problem.student.softcap or 0.0, problem.teacher.scale, problem.teacher.softcap or 0.0,
            batch.dz_scale,
            DIVERGENCE=FUNCTIONS[problem.divergence.name],
            NORMALIZER=_NORMALIZERS[problem.divergence.normalizer],
            SLOPE_SUM=problem.divergence.slope_sum, SLOPE_JUMPS=problem.divergence.slope_jumps,
            STUDENT_BIAS=batch.student_bias is not None, TEACHER_BIAS=batch.teacher_bias is not None,
            STUDENT_SOFTCAP=problem.student.softcap is not None, TEACHER_SOFTCAP=problem.teacher.softcap is not None,
            CE=batch.labels is not None, WEIGHT=batch.weight is not None,
            STATISTICS=statistics, STATS=batch.stats is not None, GRADIENT=batch.dz is not None,
            BLOCK=launch.block, **launch.options,
        )  # fmt: skip


def head_rows(problem: Problem, batch: HeadBatch, statistics: bool) -> None:
    """A launch for statistics and gradient, another for draws. The largest are torch's: its selection has no rival to beat here."""
    count, vocab = batch.logits.shape
    if not count:
        return
    if batch.top_ids is not None:
        torch_rows.head_rows(problem, batch, statistics)
        return
    launch = choose(vocab)
    absent = batch.top  # any pointer: never read
    num_ids = 0 if batch.ids is None else batch.ids.shape[1]
    t = problem.student
    with _on_device(batch.logits):
        head_rows_kernel[(count,)](
            batch.logits,
            *(absent if x is None else x for x in (batch.bias, batch.top, batch.log_sum, batch.entropy, batch.ids, batch.logprobs)),
            *(absent if x is None else x for x in (batch.d_lse, batch.d_entropy, batch.d_logprobs, batch.dz)),
            batch.logits.stride(0), 0 if batch.dz is None else batch.dz.stride(0), vocab, num_ids,
            problem.inv_temperature, t.scale, t.softcap or 0.0, batch.dz_scale,
            BIAS=batch.bias is not None, SOFTCAP=t.softcap is not None,
            STATISTICS=statistics, ENTROPY=batch.entropy is not None, IDS=batch.ids is not None,
            D_LSE=batch.d_lse is not None, D_ENTROPY=batch.d_entropy is not None, D_LOGPROBS=batch.d_logprobs is not None,
            GRADIENT=batch.dz is not None,
            BLOCK=launch.block, IDS_BLOCK=min(64, 1 << max(0, num_ids - 1).bit_length()), **launch.options,
        )  # fmt: skip
        if batch.draws is not None:
            launch = choose_sample(vocab)
            exact = batch.logits.new_empty(3, dtype=torch.float64)
            for slot, number in zip(exact, (problem.inv_temperature, t.scale, t.softcap or 0.0), strict=True):
                slot.fill_(number)  # on the device: a copy from the host would wait, and no CUDA graph could record it
            sample_rows_kernel[(count * batch.draws.shape[1],)](
                batch.logits, absent if batch.bias is None else batch.bias, batch.top, batch.log_sum, batch.seed, exact, batch.draws,
                batch.logits.stride(0), vocab, batch.draws.shape[1], batch.first_row,
                problem.inv_temperature, t.scale, t.softcap or 0.0,
                BIAS=batch.bias is not None, SOFTCAP=t.softcap is not None, BLOCK=launch.block, **launch.options,
            )  # fmt: skip


def softmax_rows(x: Tensor, out: Tensor, temperature: float, logarithm: bool) -> None:
    """``softmax(x / T)`` or its logarithm, a program per row."""
    count, vocab = x.shape
    launch = choose_softmax(vocab, 1)
    with _on_device(x):
        softmax_rows_kernel[(count,)](
            x, out, x.stride(0), out.stride(0), vocab, 1.0 / temperature,
            LOGARITHM=logarithm, ONE_READ=vocab <= launch.block, BLOCK=launch.block, **launch.options,
        )  # fmt: skip


def softmax_gradient_rows(y: Tensor, dy: Tensor, out: Tensor, temperature: float, logarithm: bool) -> None:
    """The gradient by x, from ``softmax_rows``' result and the gradient by it."""
    count, vocab = y.shape
    launch = choose_softmax(vocab, 2)
    with _on_device(y):
        softmax_gradient_rows_kernel[(count,)](
            y, dy, out, y.stride(0), dy.stride(0), out.stride(0), vocab, 1.0 / temperature,
            LOGARITHM=logarithm, ONE_READ=vocab <= launch.block, BLOCK=launch.block, **launch.options,
        )  # fmt: skip


def _on_device(tensor: Tensor) -> torch.cuda.device:
    """Triton launches on the current device: make it the tensors' own. Does nothing for a CPU tensor."""
    return torch.cuda.device(tensor.device.index if tensor.is_cuda else -1)
