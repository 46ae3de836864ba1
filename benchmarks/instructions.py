"""Count the instructions of the row kernels per column pair on sm_90, from machine code: ``python -m benchmarks.instructions 3.6.0``.

Write results/instructions.json for the CUDA kernels of ``kdkernels._C`` and for the Triton kernels, compiled by the installed Triton and by
the versions given (in the folders ``triton-VERSION`` of the virtual environment, which ``make ptx`` makes). A sweep is a loop over a row.
Instructions outside sweeps, and of the incomplete last block, are not counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before the kernels are decorated

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kdkernels import divergences
from kdkernels.backends import triton as triton_backend
from kdkernels.backends.rows import FORWARD, STATE, RowBatch, Stage
from kdkernels.divergences import Divergence
from kdkernels.fused.call import Call

from . import sass
from .record_launches import AbsentDriver

RESULTS = Path(__file__).parent / "results" / "instructions.json"
VOCABS = (128256, 50257)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CUDA_TYPES = {"float32": "f", "bfloat16": "13__nv_bfloat16"}
_TWO_READ_COLUMNS = 8  # kTwoReadColumns of csrc/cuda/two_read.h


@dataclass(frozen=True)
class Count:
    """Instructions of one kernel per column pair, by sweep, and by pipe over all sweeps."""

    kernel: str
    divergence: str
    dtype: str
    vocab: int | None
    """None: the code is the same for every vocabulary."""
    sweeps: list[float]
    pipes: dict[str, float]
    registers: int
    spilled_bytes: int
    local_bytes: int

    @property
    def total(self) -> float:
        return sum(self.sweeps)


def count(label: dict[str, Any], sweeps: Sequence[tuple[Sequence[sass.Instruction], float]], usage: dict[str, int]) -> Count:
    """Return the count of a kernel. Each sweep is the instructions of one turn and the column pairs of a lane in it."""
    pipes: dict[str, float] = {}
    for path, pairs in sweeps:
        for pipe, number in sass.pipes(path).items():
            pipes[pipe] = pipes.get(pipe, 0.0) + number / pairs
    return Count(
        **label,
        sweeps=[round(len(path) / pairs, 1) for path, pairs in sweeps],
        pipes={pipe: round(number, 1) for pipe, number in sorted(pipes.items())},
        registers=usage["REG"],
        spilled_bytes=usage["STACK"],
        local_bytes=usage["LOCAL"],
    )


# ---- Triton


def cuobjdump() -> Path:
    """Return the disassembler in the Triton package."""
    return next(Path(triton.__file__).parent.rglob("cuobjdump"))


@contextmanager
def compiled_only(arch: int = 90) -> Iterator[list[Any]]:
    """Make launches compile without running. Yield the list of their kernels."""
    kernels: list[Any] = []
    run, active = JITFunction.run, driver._active

    def compiling(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        kernels.append(run(self, *arguments, grid=grid, warmup=True, **keywords))
        return kernels[-1]

    JITFunction.run = compiling
    driver.set_active(AbsentDriver(arch))
    try:
        yield kernels
    finally:
        JITFunction.run = run
        driver.set_active(active)


def triton_cubin(divergence: Divergence, dtype: str, vocab: int) -> bytes:
    """Compile the row kernel of a training step: rows padded to 64 bytes, bfloat16 gradients over the student's logits."""
    itemsize = DTYPES[dtype].itemsize
    width = -(-vocab * itemsize // 64) * 64 // itemsize
    student, teacher = (torch.empty(16, width, dtype=DTYPES[dtype])[:, :vocab] for _ in range(2))
    storage = torch.empty(0, dtype=torch.bfloat16).set_(student.untyped_storage())
    dz = storage.as_strided((16, vocab), (width * itemsize // 2, 1))
    state, loss = torch.empty(len(STATE), 16), torch.empty(16)
    batch = RowBatch(student, teacher, None, None, None, None, state, loss=loss, dz=dz)
    with compiled_only() as kernels:
        triton_backend.rows(Call(divergence, vocab, temperature=2.0), batch, FORWARD | Stage.GRADIENT)
    cubin: bytes = kernels[-1].asm["cubin"]
    return cubin


def triton_count(divergence: Divergence, dtype: str, vocab: int) -> Count:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(triton_cubin(divergence, dtype, vocab))
        file.flush()
        (code,) = sass.disassemble(Path(file.name), cuobjdump()).values()
        (usage,) = sass.resources(Path(file.name), cuobjdump()).values()
    sweeps = []
    for loop in sass.loops(code):
        loaded = sum(instruction.loaded_bytes for instruction in loop if instruction.name == "LDG")
        if loaded:
            sweeps.append((loop, loaded / DTYPES[dtype].itemsize / 2))
    label = {"kernel": f"triton {triton.__version__}", "divergence": divergence.name, "dtype": dtype, "vocab": vocab}
    return count(label, sweeps, usage)


# ---- CUDA


def cuda_function(kernel: str, divergence: Divergence, dtype: str) -> str:
    """Return the mangled name of a kernel without optional features."""
    struct = type(divergence).__name__
    lean = "Lb0E" if kernel == "one_read" else ""
    return f"_ZN2kd13{kernel}_rowsI{lean}{_CUDA_TYPES[dtype]}NS_{len(struct)}{struct}EEEvNS_4RowsE"


def cuda_counts(cases: Sequence[tuple[str, Divergence, str]]) -> list[Count]:
    """Return the counts of kernels (one_read or two_read) of the built extension."""
    from kdkernels import _C

    library = Path(_C.__file__)
    names = [cuda_function(*case) for case in cases]
    code = sass.disassemble(library, cuobjdump(), names, "sm_90a")
    usage = sass.resources(library, cuobjdump(), "sm_90a")
    return [_cuda_count(case, code[name], usage[name]) for case, name in zip(cases, names, strict=True)]


def _cuda_count(case: tuple[str, Divergence, str], code: Sequence[sass.Instruction], usage: dict[str, int]) -> Count:
    kernel, divergence, dtype = case
    size = DTYPES[dtype].itemsize
    columns = 16 // size if kernel == "one_read" else _TWO_READ_COLUMNS
    load = "LDS" if kernel == "one_read" else "LDG"

    def turn(**more: Any) -> sass.Turn:
        return sass.Turn(load, 2 * columns * size, **more)

    sweeping = [loop for loop in sass.loops(code) if sass.shortest(loop, turn())]
    last = sass.shortest(sweeping[-1], turn(transcendental=2 * columns if divergence.normalizer == "softmax" else 0, stores=True))
    assert last is not None
    middle = sweeping[1:-1]
    if kernel == "two_read" and divergence.slope_sum is not None:
        middle = []  # the last sweep sums the value
    # The middle sweep branches around columns beyond the row. The path of whole vectors has as many exponentials as the last sweep.
    needed = sass.pipes(last)["XU"] if kernel == "two_read" else 0
    first = sweeping[:-1][:1] if divergence.normalizer != "none" else []
    paths = [*(sass.shortest(loop, turn()) for loop in first), *(sass.shortest(loop, turn(transcendental=needed)) for loop in middle), last]
    sweeps = [(path, float(columns)) for path in paths if path is not None]
    return count({"kernel": f"cuda {kernel}", "divergence": divergence.name, "dtype": dtype, "vocab": None}, sweeps, usage)


# ---- all kernels


def every_divergence() -> list[Divergence]:
    return [cls() for cls in divergences.REGISTRY.values()]


def triton_counts() -> list[Count]:
    return [triton_count(d, dtype, vocab) for d in every_divergence() for dtype in DTYPES for vocab in VOCABS]


def all_cuda_counts() -> list[Count]:
    kernels = ("one_read", "two_read")
    return cuda_counts(
        [(k, d, t) for k in kernels for d in every_divergence() for t in DTYPES if not (k == "one_read" and d.normalizer != "softmax")]
    )


def stale(recorded: Sequence[dict[str, Any]]) -> list[str]:
    """Recount some kernels. Return those that differ by more than 2 % from counts recorded with the same version of Triton."""
    from kdkernels import _C

    counts = [
        triton_count(divergences.ForwardKL(), "float32", 128256),
        triton_count(divergences.ReverseKL(), "bfloat16", 50257),
        triton_count(divergences.JSD(), "bfloat16", 128256),
    ]
    if "90a" in _C.cuda_targets():
        counts += cuda_counts([("one_read", divergences.JSD(), "bfloat16"), ("two_read", divergences.ForwardKL(), "bfloat16")])
    by_kernel = {(c["kernel"], c["divergence"], c["dtype"], c["vocab"]): c for c in recorded}
    lines = []
    for c in counts:
        key = (c.kernel, c.divergence, c.dtype, c.vocab)
        if key in by_kernel and abs(sum(by_kernel[key]["sweeps"]) - c.total) > 0.02 * c.total:
            lines.append(f"{key}: {by_kernel[key]['sweeps']} recorded, {c.sweeps} counted")
    return lines


def main() -> int:
    """Count all kernels and write the results. ``--triton`` prints this process's Triton kernels; ``--check`` recounts a few."""
    if sys.argv[1:] == ["--check"]:
        lines = stale(json.loads(RESULTS.read_text()))
        print("\n".join(lines))
        return int(bool(lines))
    if sys.argv[1:] == ["--triton"]:
        print(json.dumps([asdict(c) for c in triton_counts()]))
        return 0
    counts = [asdict(c) for c in triton_counts()]
    for version in sys.argv[1:]:
        environment = {**os.environ, "PYTHONPATH": str(Path(sys.prefix) / f"triton-{version}")}
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.instructions", "--triton"]
        counts += json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True).stdout)
    counts += [asdict(c) for c in all_cuda_counts()]
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(c) for c in counts) + "\n]\n")
    for c in counts:
        print(c["kernel"], c["divergence"], c["dtype"], c["vocab"], round(sum(c["sweeps"]), 1), c["sweeps"], c["registers"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
