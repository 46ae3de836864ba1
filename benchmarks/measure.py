"""How a case is measured: time of interleaved variants in one process, peak memory of each variant in a process of its own.

``python -m benchmarks.measure '{"variant": ..., "case": ...}'`` is that process.
"""

from __future__ import annotations

import gc
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from .cases import Case, Inputs, build
from .results import ROOT
from .variants import Step
from .variants import build as build_step

Progress = Callable[[str], None]


def quantile(samples: Sequence[float], q: float) -> float:
    """With linear interpolation."""
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def time_interleaved(
    steps: Mapping[str, Step], inputs: Inputs, samples: int, warmup: int = 1, progress: Progress = lambda variant: None
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Each round runs every variant once, in an order of its own: what drifts drifts for all alike.

    Returns:
        Milliseconds of every sample, by variant; and of those that failed, as for want of memory, why.
    """
    taken: dict[str, list[float]] = {variant: [] for variant in steps}
    failed: dict[str, str] = {}
    order = random.Random(0)
    device = inputs.device
    for round_ in range(warmup + samples):
        gc.collect()
        for variant in order.sample(list(taken), len(taken)):
            progress(variant)
            inputs.clear_gradients()
            try:
                ms = _time_cuda(steps[variant], device) if device.type == "cuda" else _time_cpu(steps[variant])
            except Exception as error:  # whatever it is, it is what this variant does with this case
                failed[variant] = first_line(error)
                del taken[variant]
                continue
            if round_ >= warmup:
                taken[variant].append(round(ms, 4))
    return taken, failed


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


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


class OutOfProcessError(RuntimeError):
    """The measuring process failed; the message is its last line."""


def peak_extra_bytes(variant: str, case: Case, device: str = "cpu", **options: Any) -> int:
    """How far one forward and backward pass raises the peak memory of a fresh process above what held the inputs.

    The gradients of the student's tensors count: they are part of what a loss leaves. So do, for the floor, the buffers that it
    writes to. Code that loads on first use does not: a tiny case of the same variant has run before.

    Args:
        options: keywords for ``distillation_loss``, of our own variants.

    Raises:
        OutOfProcessError: it failed, or was killed, as happens when memory runs out.
    """
    request = {"variant": variant, "case": asdict(case), "device": device, "threads": torch.get_num_threads(), "options": options}
    command = [sys.executable, "-m", __name__ if __name__ != "__main__" else "benchmarks.measure", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, cwd=ROOT)
    if done.returncode < 0:
        raise OutOfProcessError(f"killed by signal {-done.returncode}")
    if done.returncode:
        raise OutOfProcessError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return int(json.loads(done.stdout.splitlines()[-1])["peak_extra_bytes"])


def _reset_peak(device: str) -> None:
    """From here on the peak is what comes; so far it may lie above what is held, of some import's temporaries."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()


def _peak_bytes(device: str) -> int:
    """Peak memory of this process: resident on the CPU, allocated by torch on CUDA."""
    if device != "cpu":
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated())
    # Not ru_maxrss: a forked process begins with its parent's.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])


def _measure_here(variant: str, case: Case, device: str, threads: int, options: dict[str, Any]) -> dict[str, int]:
    torch.set_num_threads(threads)
    tiny = replace(case, n=32, v=256)
    tiny_inputs = build(tiny, device)
    build_step(variant, tiny, tiny_inputs, **options)()
    del tiny_inputs
    inputs = build(case, device)
    gc.collect()
    _reset_peak(device)
    before = _peak_bytes(device)
    build_step(variant, case, inputs, **options)()
    return {"peak_extra_bytes": _peak_bytes(device) - before}


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    print(json.dumps(_measure_here(**{**request, "case": Case(**request["case"])})))
