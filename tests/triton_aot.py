"""Compiles the Triton kernel ahead of time and prints what each variant takes: no GPU needed.

A process of its own, since under TRITON_INTERPRET=1 there is nothing to compile: ``python tests/triton_aot.py ARCH [--all]``.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kdkernels.backends.triton import _NORMALIZERS, heads
from kdkernels.backends.triton.divergences import FUNCTIONS
from kdkernels.backends.triton.kernel import kd_rows_kernel
from kdkernels.backends.triton.launch import Launch, choose, choose_sample, choose_softmax
from kdkernels.divergences import REGISTRY, Divergence, LogitMSE

VOCAB = 128256
DTYPES = {  # student and teacher logits, dz
    "float32": ("fp32", "fp32", "fp32"),
    "float32 -> bfloat16": ("fp32", "fp32", "bf16"),
    "float32 -> float16": ("fp32", "fp32", "fp16"),
    "bfloat16": ("bf16", "bf16", "bf16"),
    "float16": ("fp16", "fp16", "fp16"),
    "bfloat16 / float32": ("bf16", "fp32", "bf16"),
}
MODES = {"fused": (True, True), "statistics": (True, False), "gradient": (False, True)}


def compile_variant(arch: int, divergence: Divergence, dtypes: str, mode: str, features: bool) -> bytes:
    """The cubin of one specialisation."""
    student, teacher, dz = DTYPES[dtypes]
    statistics, gradient = MODES[mode]
    launch = choose(VOCAB)
    constants = {
        "DIVERGENCE": FUNCTIONS[divergence.name],
        "NORMALIZER": _NORMALIZERS[divergence.normalizer],
        "SLOPE_SUM": divergence.slope_sum,
        "SLOPE_JUMPS": divergence.slope_jumps,
        "STATISTICS": statistics,
        "GRADIENT": gradient,
        "STATS": features and statistics,
        "BLOCK": launch.block,
    }
    for name in ("STUDENT_BIAS", "TEACHER_BIAS", "STUDENT_SOFTCAP", "TEACHER_SOFTCAP", "CE", "WEIGHT"):
        constants[name] = features
    pointers = {"student": student, "teacher": teacher, "dz": dz, "labels": "i64"}
    pointers |= dict.fromkeys(("student_bias", "teacher_bias", "weight", "state", "loss", "stats"), "fp32")
    return compile_kernel(kd_rows_kernel, constants, pointers, launch, arch)


def compile_kernel(kernel: Any, constants: dict[str, Any], pointers: dict[str, str], launch: Launch, arch: int) -> bytes:
    """The cubin of a kernel: what is neither a constant nor a pointer is a size or a float."""
    names = kernel.arg_names
    signature, attributes = {}, {}
    for position, name in enumerate(names):
        integer = name in ("vocab", "num_ids", "num_draws", "first_row") or name.endswith("_stride")
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = "*" + pointers[name]
        else:
            signature[name] = "i32" if integer else "fp32"
        if name in pointers or name == "vocab" or name.endswith("_stride"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    indexed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, indexed, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options).asm["cubin"]


def one_sided(arch: int) -> Iterator[tuple[str, Launch, bytes]]:
    """The kernels of one side, with and without features, and softmax where a row fits in registers and where it does not."""
    of_rows = dict.fromkeys(("bias", "top", "log_sum", "entropy", "logprobs", "d_lse", "d_entropy", "d_logprobs"), "fp32")
    for features, (logits, dz) in ((False, ("bf16", "bf16")), (True, ("fp32", "bf16"))):
        launch = choose(VOCAB)
        constants: dict[str, Any] = {"BIAS": features, "SOFTCAP": features}
        more = dict.fromkeys(("ENTROPY", "D_LSE", "D_ENTROPY"), features) | dict.fromkeys(
            ("STATISTICS", "IDS", "D_LOGPROBS", "GRADIENT"), True
        )
        pointers = {**of_rows, "logits": logits, "dz": dz, "ids": "i64"}
        blocks = {"BLOCK": launch.block, "IDS_BLOCK": 64 if features else 1}
        label = f"{logits} {dz}{' features' if features else ''}"
        yield f"head {label}", launch, compile_kernel(heads.head_rows_kernel, constants | more | blocks, pointers, launch, arch)
        launch = choose_sample(VOCAB)
        pointers = {"logits": logits, "bias": "fp32", "top": "fp32", "log_sum": "fp32", "seed": "i64", "numbers": "fp64", "draws": "i32"}
        yield (
            f"sample {label}",
            launch,
            compile_kernel(heads.sample_rows_kernel, {**constants, "BLOCK": launch.block}, pointers, launch, arch),
        )
    for (vocab, dtype), logarithm in itertools.product(((16384, "bf16"), (32000, "fp32"), (VOCAB, "bf16")), (False, True)):
        for kernel, inputs in ((heads.softmax_rows_kernel, ("x",)), (heads.softmax_gradient_rows_kernel, ("y", "dy"))):
            launch = choose_softmax(vocab, len(inputs))
            constants = {"LOGARITHM": logarithm, "ONE_READ": vocab <= launch.block, "BLOCK": launch.block}
            pointers = dict.fromkeys((*inputs, "out"), dtype)
            label = f"{kernel.__name__} {vocab} {dtype}{' log' if logarithm else ''}"
            yield label, launch, compile_kernel(kernel, constants, pointers, launch, arch)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, bytes of stack (where spills go), local and shared memory."""
    tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", out)}


def variants(everything: bool) -> Iterator[tuple[Divergence, str, str, bool]]:
    """By default every divergence fused, with and without features, on 32- and 16-bit rows, and each other dtype and mode once
    or twice: what spills is decided by the divergence and the features, hardly by the conversion of a load or store."""
    divergences = [cls() for cls in REGISTRY.values()] + [LogitMSE(centered=True)]
    if everything:
        yield from itertools.product(divergences, DTYPES, MODES, (False, True))
        return
    yield from itertools.product(divergences, ("float32 -> bfloat16", "bfloat16"), ("fused",), (False, True))
    for i, (dtypes, mode) in enumerate(itertools.product(DTYPES, MODES)):
        yield divergences[i % len(divergences)], dtypes, mode, i % 2 == 0


if __name__ == "__main__":
    for divergence, dtypes, mode, features in variants("--all" in sys.argv):
        cubin = compile_variant(int(sys.argv[1]), divergence, dtypes, mode, features)
        label = f"{divergence} {dtypes} {mode}{' features' if features else ''}"
        print(json.dumps({"variant": label, "threads": 32 * choose(VOCAB).num_warps, **resources(cubin)}), flush=True)
    for label, launch, cubin in one_sided(int(sys.argv[1])):
        print(json.dumps({"variant": label, "threads": 32 * launch.num_warps, **resources(cubin)}), flush=True)
