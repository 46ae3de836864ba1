"""Row kernels in Triton: NVIDIA GPUs, or any CPU under Triton's interpreter (``TRITON_INTERPRET=1``, for tests)."""

from __future__ import annotations

import os

import torch

from ...problem import Problem, RowBatch
from .divergences import FUNCTIONS
from .kernel import kd_rows_kernel
from .launch import choose

_NORMALIZERS = {"softmax": 0, "mean": 1, "none": 2}
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # as it was when the kernels were decorated


def unavailable(device_type: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why it cannot run there, or None."""
    if torch.float64 in dtypes:
        return "float64 is for the torch backend: Triton passes scalars in float32"
    if _INTERPRETED:
        return None
    if device_type != "cuda":
        return f"it needs a GPU, and the tensors are on {device_type}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is not None:
        return "only NVIDIA GPUs have been tried"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"it needs compute capability 8.0, and the GPU has {'.'.join(map(str, torch.cuda.get_device_capability()))}"
    return None


def rows(problem: Problem, batch: RowBatch, statistics: bool) -> None:
    """One launch: a program per row."""
    count, vocab = batch.student.shape
    if not count:
        return
    a, b = problem.divergence.kernel_parameters
    launch = choose(vocab)
    absent = batch.state  # any pointer: never read
    with _on_device(batch):
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
            a, b, 1.0 / problem.temperature, problem.value_scale, problem.slope_scale, problem.ce_weight,
            problem.student.scale, problem.student.softcap or 0.0, problem.teacher.scale, problem.teacher.softcap or 0.0,
            batch.dz_scale,
            DIVERGENCE=FUNCTIONS[problem.divergence.name],
            NORMALIZER=_NORMALIZERS[problem.divergence.normalizer],
            SLOPE_SUM=problem.divergence.slope_sum,
            STUDENT_BIAS=batch.student_bias is not None, TEACHER_BIAS=batch.teacher_bias is not None,
            STUDENT_SOFTCAP=problem.student.softcap is not None, TEACHER_SOFTCAP=problem.teacher.softcap is not None,
            CE=batch.labels is not None, WEIGHT=batch.weight is not None,
            STATISTICS=statistics, STATS=batch.stats is not None, GRADIENT=batch.dz is not None,
            BLOCK=launch.block, **launch.options,
        )  # fmt: skip


def _on_device(batch: RowBatch) -> torch.cuda.device:
    """Triton launches on the current device: make it the tensors' own. Does nothing for a CPU tensor."""
    return torch.cuda.device(batch.student.device.index if batch.student.is_cuda else -1)
