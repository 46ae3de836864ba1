"""How a case is measured: time of interleaved variants in one process, peak memory of each variant in a process of its own.

``python -m kdkernels.bench.measure '{"variant": ..., "case": ...}'`` is that process.
"""

from __future__ import annotations

import gc
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..memory import peak_bytes
from . import variants
from .cases import Case, Inputs, build
from .peers import PEERS
from .variants import Step, Variant

Progress = Callable[[str, int], None]
"""What goes on now, and how many steps of the job are done with it."""


@dataclass(frozen=True)
class Job:
    """One case, and everything that is measured of it.

    Attributes:
        variants: in the order of the table.
        samples: timed rounds; 0 measures errors only, on the case itself and not on a small relative.
        memory: whether peak memory is measured.
        curve: the curve that the case is a point of, by name; "" if it stands for itself.
    """

    case: Case
    variants: tuple[str, ...]
    samples: int = 5
    memory: bool = True
    curve: str = ""

    @property
    def steps(self) -> int:
        """That progress counts."""
        return len(self.variants) * (2 + (self.samples + WARMUP if self.samples else 0))


WARMUP = 1

NO_MEMORY = {
    "floor": "it is no loss",
    "compile": "the compiler's own memory cannot be told from the loss's",
    "rows": "row kernels alone are no loss",
}
"""Variants whose peak memory would mislead, with the reason."""

DENSE_BYTES_PER_LOGIT = {"floor": 2, "eager": 7, "compile": 7, "liger_kl": 4}
"""How many [N, V] tensors (eager: of 4 bytes) these hold at once: enough to decide what not to try."""


def quantile(samples: Sequence[float], q: float) -> float:
    """With linear interpolation."""
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def time_interleaved(
    steps: Mapping[str, Step],
    inputs: Inputs,
    samples: int,
    warmup: int = WARMUP,
    progress: Progress = lambda doing, done: None,
    after_round: Callable[[dict[str, list[float]]], None] = lambda taken: None,
    deadline: float = math.inf,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Each round runs every variant once, in an order of its own: what drifts drifts for all alike.

    Args:
        after_round: gets the milliseconds so far.
        deadline: of ``time.monotonic``; past it no further round begins once there is a sample.

    Returns:
        Milliseconds of every sample, by variant; and of those that failed, as for want of memory, why.
    """
    taken: dict[str, list[float]] = {variant: [] for variant in steps}
    failed: dict[str, str] = {}
    order = random.Random(0)
    device = inputs.device
    for round_ in range(warmup + samples):
        if round_ > warmup and time.monotonic() > deadline:
            break
        gc.collect()
        for variant in order.sample(list(taken), len(taken)):
            progress(f"timing {variant}", 1)
            inputs.clear_gradients()
            try:
                ms = _time_cuda(steps[variant], device) if device.type == "cuda" else _time_cpu(steps[variant])
            except Exception as error:  # whatever it is, it is what this variant does with this case
                failed[variant] = first_line(error)
                del taken[variant], error
                release(device)
                continue
            if round_ >= warmup:
                taken[variant].append(round(ms, 4))
        after_round(taken)
    inputs.clear_gradients()
    return taken, failed


def release(device: torch.device) -> None:
    """Gives back what a step that is over, or has failed, left in torch's cache."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _time_cpu(step: Step) -> float:
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def _time_cuda(step: Step, device: torch.device) -> float:
    # Twice the L2, so that a step does not start with the last one's data at hand.
    torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device).zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _repeat(step: Callable[[], Any], device: torch.device, samples: int) -> list[float]:
    timed = [(_time_cuda(step, device) if device.type == "cuda" else _time_cpu(step)) for _ in range(samples + 2)]
    return [round(ms, 4) for ms in timed[2:]]


def rates(device: str, dtypes: Sequence[str], samples: int = 7) -> dict[str, Any]:
    """What the machine does at best in this run: GB/s of a copy (bytes read and written), TFLOP/s of a large matrix product."""
    gpu = device != "cpu"
    at = torch.device(device)
    size = (1 << 30) if gpu else (256 << 20)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source).zero_()
    copied = _repeat(lambda: target.copy_(source), at, samples)
    found: dict[str, Any] = {"copy_bytes": 2 * size, "copy_ms": copied, "copy_gb_s": 2 * size / quantile(copied, 0.5) / 1e6, "matrix": {}}
    side = 8192 if gpu else 2048
    for dtype in dtypes:
        a, b = (torch.empty(side, side, device=device).normal_().to(getattr(torch, dtype)) for _ in range(2))
        c = torch.empty_like(a)
        ms = _repeat(lambda a=a, b=b, c=c: torch.mm(a, b, out=c), at, samples)  # type: ignore[misc]
        found["matrix"][dtype] = {"size": side, "ms": ms, "tflop_s": 2 * side**3 / quantile(ms, 0.5) / 1e9}
    return found


# --- one job


def measure(
    job: Job,
    device: str,
    progress: Progress = lambda doing, done: None,
    save: Callable[[dict[str, Any]], None] = lambda measured: None,
    deadline: float = math.inf,
) -> dict[str, Any]:
    """Everything about one case. A variant that cannot run keeps its row, with the reason.

    On a GPU another library runs each kind of case in a process of its own first: one that dies there, or poisons its CUDA context, takes
    nothing with it. On a CPU that process measures its memory, too, as it does for everyone.

    Args:
        save: gets what there is after every round, with ``"complete": False``.
    """
    case = job.case
    rows: dict[str, dict[str, Any]] = {name: {"variant": name} for name in job.variants}
    sizes = {"flop": case.flop, "floor_bytes": case.floor_bytes, "input_bytes": case.input_bytes}
    measured: dict[str, Any] = {"case": asdict(case), "curve": job.curve, **sizes, "complete": False, "results": list(rows.values())}
    for name, row in rows.items():
        if (reason := _too_large(name, case, device)) is not None:
            row["skipped"] = reason
        elif name in PEERS and (note := PEERS[name].note):
            row["note"] = note
    for name, row in rows.items():
        progress(f"memory of {name}", 1)
        if "skipped" not in row and (job.memory and _has_memory(name) if device == "cpu" else _is_news(name, case)):
            _measure_alone(name, job, device, row)
    inputs = build(case, device)
    steps: dict[str, Step] = {}
    for name, row in rows.items():
        progress(f"checking {name}", 1)
        if "skipped" in row:
            progress(f"checking {name}", job.steps // len(rows) - 2)
            continue
        try:
            if job.samples:
                row["gradient_error"] = variants.check(name, case, device)
            else:
                row |= {k.replace(" ", "_") + "_error": v for k, v in variants.errors(name, case, device).items()}
            steps[name] = variants.build(name, case, inputs)
            if Variant.parse(name).is_ours and not name.startswith("rows:") and case.operation == "distillation":
                row["plan"] = variants.held(name, case, inputs)
            if device != "cpu" and job.memory and "peak_extra_bytes" not in row and _has_memory(name):
                row["peak_extra_bytes"] = _peak_of(lambda step=steps[name]: step, inputs, device)  # type: ignore[misc]
        except Exception as error:  # whatever a compiler, a driver or a peer comes up with is this row's result
            steps.pop(name, None)
            row["skipped"] = first_line(error)
            progress(f"checking {name}", job.steps // len(rows) - 2)
            del error
            release(inputs.device)
    if job.samples:

        def keep(taken: dict[str, list[float]]) -> None:
            for name, samples in taken.items():
                if samples:
                    rows[name]["samples_ms"] = samples
            save(measured)

        _, failed = time_interleaved(steps, inputs, job.samples, WARMUP, progress, keep, deadline)
        for name, reason in failed.items():
            rows[name]["skipped"] = reason
            rows[name].pop("samples_ms", None)
    steps.clear()
    del inputs
    release(torch.device(device))
    measured["complete"] = True
    return measured


def _has_memory(variant: str) -> bool:
    return variant.partition(":")[0] not in NO_MEMORY


def _too_large(variant: str, case: Case, device: str) -> str | None:
    """On a CPU, where what does not fit is not refused but kills the process: whether not to try."""
    if device != "cpu" or variant not in DENSE_BYTES_PER_LOGIT:
        return None
    itemsize = case.torch_dtype.itemsize if variant == "floor" else 4
    needed = DENSE_BYTES_PER_LOGIT[variant] * itemsize * case.valid * case.v
    free = _available_bytes()
    if needed < 0.8 * free:
        return None
    return f"it needs about {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free"


def _available_bytes() -> float:
    info = Path("/proc/meminfo")
    if not info.exists():
        return math.inf
    return 1024 * int(next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable:")).split()[1])


_survived: set[tuple[str, str, str, bool]] = set()


def _is_news(variant: str, case: Case) -> bool:
    """Whether another library has not yet been through a case of this kind."""
    return variant in PEERS and (variant, case.divergence, case.dtype, case.masked > 0) not in _survived


def _measure_alone(variant: str, job: Job, device: str, row: dict[str, Any]) -> None:
    """Peak memory in a fresh process. If even the process dies, the variant is not tried in this one."""
    try:
        row["peak_extra_bytes"] = peak_extra_bytes(variant, job.case, device)
        _survived.add((variant, job.case.divergence, job.case.dtype, job.case.masked > 0))
    except OutOfProcessError as error:
        row["skipped"] = str(error)
    if not job.memory:
        row.pop("peak_extra_bytes", None)


class OutOfProcessError(RuntimeError):
    """The measuring process failed; the message is its last line."""


def peak_extra_bytes(variant: str, case: Case, device: str = "cpu") -> int | None:
    """How far one forward and backward pass raises the peak memory of a fresh process above what held the inputs.

    The gradients of the student's tensors count: they are part of what a loss leaves. So do, for the floor, the buffers that it
    writes to. Code that loads on first use does not: a tiny case of the same variant has run before. None where the system does not
    tell: on a CPU, Linux does.

    Raises:
        OutOfProcessError: it failed, or was killed, as happens when memory runs out.
    """
    request = {"variant": variant, "case": asdict(case), "device": device, "threads": torch.get_num_threads()}
    command = [sys.executable, "-m", "kdkernels.bench.measure", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode < 0:
        raise OutOfProcessError(
            f"its process was killed by signal {-done.returncode}" + (", memory being short" if done.returncode == -9 else "")
        )
    if done.returncode:
        raise OutOfProcessError((done.stderr.strip().splitlines() or ["no message"])[-1][:300])
    peak: int | None = json.loads(done.stdout.splitlines()[-1])["peak_extra_bytes"]
    return peak


def _reset_peak(device: str) -> None:
    """From here on the peak is what comes; so far it may lie above what is held, of some import's temporaries."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()


def _peak_bytes(device: str) -> int:
    if device != "cpu":
        torch.cuda.synchronize()
    peak = peak_bytes(torch.device(device))
    assert peak is not None, "a system that can reset its peak can say it"
    return peak


def _peak_of(make: Callable[[], Step], inputs: Inputs, device: str) -> int | None:
    """What building a step and running it once adds to the peak."""
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        make()()
        return None
    inputs.clear_gradients()
    gc.collect()
    _reset_peak(device)
    before = _peak_bytes(device)
    make()()
    return _peak_bytes(device) - before


def _measure_here(variant: str, case: Case, device: str, threads: int) -> dict[str, int | None]:
    torch.set_num_threads(threads)
    tiny = replace(case, n=32, v=256)
    tiny_inputs = build(tiny, device)
    variants.build(variant, tiny, tiny_inputs)()
    del tiny_inputs
    inputs = build(case, device)
    return {"peak_extra_bytes": _peak_of(lambda: variants.build(variant, case, inputs), inputs, device)}


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    print(json.dumps(_measure_here(**{**request, "case": Case(**request["case"])})))
