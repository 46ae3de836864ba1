"""Compile the Triton kernels as the backend launches them, without a GPU, and print the resources of each variant.

Run in its own process, since nothing is compiled under TRITON_INTERPRET=1:
``python tests/support/triton_aot.py ARCH [--all | --third]``.
ARCH is a compute capability times ten (90) or an AMD architecture (gfx942).
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch

if sys.argv[1].startswith("gfx"):
    torch.version.hip = "0"  # before the kernels are imported

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import kdkernels.backends.triton as backend
from kdkernels.backends.rows import FORWARD, STATE, STATS, HeadBatch, RowBatch, Stage
from kdkernels.divergences import JSD, REGISTRY, Divergence, LogitMSE, SkewKL, SkewReverseKL
from kdkernels.fused.call import Call
from kdkernels.fused.work import Form

VOCAB = 128256
RAGGED = 50257
"""A vocabulary that is not a multiple of a block."""
DTYPES = {  # student and teacher logits, dz
    "float32": (torch.float32, torch.float32, torch.float32),
    "float32 -> bfloat16": (torch.float32, torch.float32, torch.bfloat16),
    "float32 -> float16": (torch.float32, torch.float32, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16, torch.float16),
    "bfloat16 / float32": (torch.bfloat16, torch.float32, torch.bfloat16),
}
MODES = {"fused": (True, True), "statistics": (True, False), "gradient": (False, True)}


@dataclass
class Driver:
    """Replace Triton's driver. It names the GPU to compile for."""

    arch: str

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", self.arch, 64) if self.arch.startswith("gfx") else GPUTarget("cuda", int(self.arch), 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compiled(launch: Callable[[], None]) -> list[Any]:
    """Compile the kernels that ``launch`` would run, and return them."""
    kernels = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        kernels.append(run(self, *arguments, grid=grid, warmup=True, **keywords))
        return kernels[-1]

    JITFunction.run = compile_only
    try:
        launch()
    finally:
        JITFunction.run = run
    return kernels


def matrix(vocab: int, dtype: torch.dtype) -> Tensor:
    """Return one row ``[1, vocab]`` with a row stride."""
    return torch.empty(2, vocab, dtype=dtype)[:1]


def row_kernel(divergence: Divergence, dtypes: str, mode: str, features: bool, vocab: int = VOCAB) -> Callable[[], None]:
    """Return a function that launches the two-side kernel."""
    student, teacher, dz = DTYPES[dtypes]
    statistics, gradient = MODES[mode]
    scale, softcap = (2.0, 30.0) if features else (1.0, None)
    problem = Call(
        divergence=divergence, vocab=vocab, student=Form(scale, softcap, student), teacher=Form(scale, softcap, teacher),
        ce_weight=0.5 if features else 0.0, has_labels=features,
    )  # fmt: skip
    numbers = torch.empty(vocab)
    batch = RowBatch(
        student=matrix(vocab, student), teacher=matrix(vocab, teacher),
        student_bias=numbers if features else None, teacher_bias=numbers if features else None,
        labels=torch.zeros(1, dtype=torch.int64) if features else None, weight=numbers[:1] if features else None,
        state=torch.empty(len(STATE), 1), loss=numbers[:1] if statistics else None,
        stats=torch.empty(len(STATS), 1) if features and statistics else None, dz=matrix(vocab, dz) if gradient else None,
    )  # fmt: skip
    stages = (FORWARD if statistics else Stage(0)) | (Stage.GRADIENT if gradient else Stage(0))
    return lambda: backend.rows(problem, batch, stages)


def head_kernels(logits: torch.dtype, features: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield launches of the one-side kernels."""
    problem = Call(divergence=REGISTRY["forward_kl"](), vocab=VOCAB, student=Form(2.0, 30.0, logits) if features else Form(dtype=logits))
    numbers = torch.empty(VOCAB)
    number, ids = numbers[:1], 100 if features else 1
    batch = HeadBatch(
        matrix(VOCAB, logits), numbers if features else None, number, number,
        entropy=number if features else None, d_entropy=number if features else None, d_lse=number if features else None,
        ids=torch.zeros(1, ids, dtype=torch.int64), logprobs=torch.empty(1, ids), d_logprobs=torch.empty(1, ids),
        dz=matrix(VOCAB, torch.bfloat16),
    )  # fmt: skip
    yield "head", lambda: backend.head_rows(problem, batch, FORWARD | Stage.GRADIENT)
    draws, seed = torch.zeros(1, 2, dtype=torch.int32), torch.zeros((), dtype=torch.int64)
    drawing = HeadBatch(batch.logits, batch.bias, number, number, draws=draws, seed=seed)
    yield "sample", lambda: backend.head_rows(problem, drawing, FORWARD)
    yield (
        "backward",
        lambda: backend.head_rows(problem, replace(batch, ids=None, logprobs=None, d_logprobs=None, d_lse=number), Stage.GRADIENT),
    )


def softmax_kernels() -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield launches of softmax for rows that fit in registers and rows that do not."""
    rows = (16384, torch.bfloat16), (32000, torch.float32), (VOCAB, torch.bfloat16)
    for (vocab, dtype), log in itertools.product(rows, (False, True)):
        x = matrix(vocab, dtype)
        label = f"{vocab} {dtype}{' log' if log else ''}"
        yield f"softmax {label}", lambda x=x, log=log: backend.softmax_rows(x, x, 2.0, log)
        yield f"softmax gradient {label}", lambda x=x, log=log: backend.softmax_gradient_rows(x, x, x, 2.0, log)


def row_variants(everything: bool) -> Iterator[tuple[Divergence, str, str, bool]]:
    """Yield divergence, dtypes, mode and features: every combination, or a selection.

    The selection has every divergence fused, with and without features, on 32- and 16-bit rows, and every other dtype and mode once or
    twice. Spills depend on the divergence and the features, hardly on the conversion of a load or store.
    """
    divergences = [cls() for cls in REGISTRY.values()] + [LogitMSE(centered=True)]
    if everything:
        yield from itertools.product(divergences, DTYPES, MODES, (False, True))
        return
    yield from itertools.product(divergences, ("float32 -> bfloat16", "bfloat16"), ("fused",), (False, True))
    for i, (dtypes, mode) in enumerate(itertools.product(DTYPES, MODES)):
        yield divergences[i % len(divergences)], dtypes, mode, i % 2 == 0


def launches(everything: bool) -> Iterator[tuple[str, bool, Callable[[], None]]]:
    """Yield a label, whether the launch has features, and the launch."""
    for divergence, dtypes, mode, features in row_variants(everything):
        label = f"{divergence} {dtypes} {mode}{' features' if features else ''}"
        yield label, features, row_kernel(divergence, dtypes, mode, features)
    for name in ("jsd", "skew_kl", "skew_reverse_kl"):  # the masked end of a row needs the most registers
        label = f"{name} bfloat16 fused V={RAGGED}"
        yield label, False, row_kernel(REGISTRY[name](), "bfloat16", "fused", False, RAGGED)
    for i, divergence in enumerate((JSD(0.999), SkewKL(0.99), JSD(0.001), SkewReverseKL(0.99))):
        features = i % 2 == 1
        yield f"{divergence} bfloat16 fused", features, row_kernel(divergence, "bfloat16", "fused", features, RAGGED)
    for features, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        for label, launch in head_kernels(dtype, features):
            yield f"{label} {dtype}", features, launch
    for label, launch in softmax_kernels():
        yield label, False, launch


def resources(kernel: Any) -> dict[str, int]:
    """Return registers per thread, and bytes of stack (spills), local and shared memory."""
    if "cubin" not in kernel.asm:
        return amd_resources(kernel.asm["amdgcn"])
    tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        out = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", out)}


def amd_resources(assembly: str) -> dict[str, int]:
    """Return the resources in the metadata of AMD's assembly. STACK counts spilled vector registers."""
    fields = {
        "REG": "vgpr_count", "STACK": "vgpr_spill_count", "LOCAL": "private_segment_fixed_size", "SHARED": "group_segment_fixed_size",
    }  # fmt: skip
    metadata = dict(re.findall(r"\.(\w+):\s+(\d+)$", assembly, re.MULTILINE))
    return {name: int(metadata[field]) for name, field in fields.items()}


if __name__ == "__main__":
    driver.set_active(Driver(sys.argv[1]))
    for label, features, launch in itertools.islice(launches("--all" in sys.argv), 0, None, 3 if "--third" in sys.argv else 1):
        for kernel in compiled(launch):
            threads = kernel.metadata.num_warps * kernel.metadata.target.warp_size
            report = {"variant": label, "kernel": kernel.metadata.name, "features": features, "threads": threads, **resources(kernel)}
            print(json.dumps(report), flush=True)
