"""Measure in one process: the time of interleaved variants, the peak memory of one, the rates of the machine.

visits.py starts the processes and records their events.
"""

from __future__ import annotations

import gc
import math
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..support.memory import peak_bytes
from . import variants
from .cases import Case, Inputs, build
from .timing import milliseconds
from .variants import Step, Variant, prepare

WARMUP = 1

Event = dict[str, Any]
"""An event of a measuring process, as plain data, because it may come from another process.

``{"variant", "doing"}``    the step that begins; if the process dies, it is attributed to this variant
``{"variant", "row"}``      entries for the variant's row; ``skipped`` is the reason why it is not measured further
``{"samples"}``             after every round: milliseconds of this visit so far, by variant
``{"peak_extra_bytes"}``    the result of a memory request
"""

Emit = Callable[[Event], None]


@dataclass(frozen=True)
class Job:
    """One case and its measurements.

    Attributes:
        variants: names of variants, in the order of the table.
        samples: timed rounds; 0 measures only errors, on the case itself instead of a small version of it.
        memory: whether to measure peak memory.
        curve: name of the curve that has the case as a point; "" for a case of its own.
        visits: number of processes over which the rounds are distributed, one after another.
    """

    case: Case
    variants: tuple[str, ...]
    samples: int = 5
    memory: bool = True
    curve: str = ""
    visits: int = 1

    @classmethod
    def load(cls, saved: Mapping[str, Any]) -> Job:
        """Rebuild a job from its ``dataclasses.asdict``."""
        return cls(**{**saved, "case": Case(**saved["case"]), "variants": tuple(saved["variants"])})

    def samples_of(self, visit: int) -> int:
        """Return the number of timed rounds of a visit, counted from 1. Rounds are distributed as evenly as possible."""
        return len(range(visit - 1, self.samples, self.visits))

    def steps_of(self, visit: int) -> int:
        """Return the number of progress steps: memory first, then for each visit a check and the rounds."""
        rounds = WARMUP + self.samples_of(visit) if self.samples else 0
        return len(self.variants) * ((visit == 1) + 1 + rounds)


def quantile(samples: Sequence[float], q: float) -> float:
    """Return a quantile with linear interpolation."""
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


class Spread(NamedTuple):
    """The 20th percentile, the median and the 80th percentile of samples, and their number."""

    low: float
    mid: float
    high: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        low, mid, high = (quantile(samples, q) for q in (0.2, 0.5, 0.8))
        return cls(low, mid, high, len(samples))

    def overlaps(self, other: Spread) -> bool:
        """Return whether the samples do not show which of the two is smaller. One sample alone never shows it."""
        return min(self.samples, other.samples) < 2 or (self.low <= other.high and other.low <= self.high)


def time_interleaved(
    steps: Mapping[str, Step],
    inputs: Inputs,
    samples: int,
    warmup: int = WARMUP,
    begins: Callable[[str], None] = lambda variant: None,
    after_round: Callable[[dict[str, list[float]]], None] = lambda times: None,
    deadline: float = math.inf,
    seed: int = 0,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time the variants in rounds. Each round runs every variant once, in random order, so that drift affects all alike.

    Args:
        begins: called with each variant before it runs.
        after_round: called with the milliseconds so far.
        deadline: value of ``time.monotonic`` after which no round begins if there is at least one sample.
        seed: random seed of the orders.

    Returns:
        The milliseconds of all samples, by variant, and the reason for each variant that failed.
    """
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    failed: dict[str, str] = {}
    order = random.Random(seed)
    device = inputs.device
    for round_ in range(warmup + samples):
        if round_ > warmup and time.monotonic() > deadline:
            break
        gc.collect()
        for variant in order.sample(list(times), len(times)):
            begins(variant)
            inputs.clear_gradients()
            try:
                ms = _time(steps[variant], device)
            except Exception as error:  # any error is the result of this variant
                failed[variant] = first_line(error)
                del times[variant], error
                release(device)
                continue
            if round_ >= warmup:
                times[variant].append(round(ms, 4))
        after_round(times)
    inputs.clear_gradients()
    return times, failed


def release(device: torch.device) -> None:
    """Release memory that a finished or failed step left in torch's cache."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _time(step: Step, device: torch.device) -> float:
    prepare(step)
    return milliseconds(step, device)


def _repeat(step: Callable[[], Any], device: torch.device, samples: int) -> list[float]:
    timed = [milliseconds(step, device) for _ in range(samples + 2)]
    return [round(ms, 4) for ms in timed[2:]]


def rates(device: str, dtypes: Sequence[str], samples: int = 7) -> dict[str, Any]:
    """Measure the best rates of the machine: GB/s of a copy (bytes read and written), TFLOP/s of a large matrix product."""
    gpu = device != "cpu"
    at = torch.device(device)
    size = (1 << 30) if gpu else (256 << 20)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source).zero_()
    copied = _repeat(lambda: target.copy_(source), at, samples)
    result: dict[str, Any] = {"copy_bytes": 2 * size, "copy_ms": copied, "copy_gb_s": 2 * size / quantile(copied, 0.5) / 1e6, "matrix": {}}
    side = 8192 if gpu else 2048
    for dtype in dtypes:
        a, b = (torch.empty(side, side, device=device).normal_().to(getattr(torch, dtype)) for _ in range(2))
        c = torch.empty_like(a)
        ms = _repeat(lambda a=a, b=b, c=c: torch.mm(a, b, out=c), at, samples)  # type: ignore[misc]
        result["matrix"][dtype] = {"size": side, "ms": ms, "tflop_s": 2 * side**3 / quantile(ms, 0.5) / 1e9}
    return result


def visit(job: Job, names: Sequence[str], number: int, device: str, emit: Emit, seconds_left: float = math.inf) -> None:
    """Check variants, then time them in interleaved rounds, after warm-up rounds.

    Args:
        names: the variants to measure.
        number: number of the visit, from 1.
        emit: called with each ``Event``.
        seconds_left: time after which no round begins if there is at least one sample.
    """
    case, deadline = job.case, time.monotonic() + seconds_left
    try:
        inputs = build(case, device)
    except Exception as error:  # too large for any variant
        for name in names:
            emit({"variant": name, "row": {"skipped": first_line(error)}})
        del error
        release(torch.device(device))
        return
    steps: dict[str, Step] = {}
    for name in names:
        emit({"variant": name, "doing": "checking"})
        try:
            row = _checked(name, job, device)
            step = variants.build(name, case, inputs)
            if Variant.parse(name).is_ours and not name.startswith("rows:") and case.operation == "distillation":
                row["plan"] = variants.held(name, case, inputs)
            if device != "cpu" and job.memory and has_memory(name):
                row["peak_extra_bytes"] = _peak_of(lambda step=step: step, inputs, device)  # type: ignore[misc]
            steps[name] = step
        except Exception as error:  # any error of a compiler, driver or peer is the result of this row
            row = {"skipped": first_line(error)}
            del error
            release(inputs.device)
        emit({"variant": name, "row": row})
    if not job.samples:
        return
    _, failed = time_interleaved(
        steps, inputs, job.samples_of(number), WARMUP, lambda name: emit({"variant": name, "doing": "timing"}),
        lambda times: emit({"samples": {name: ms for name, ms in times.items() if ms}}), deadline, number,
    )  # fmt: skip
    for name, reason in failed.items():
        emit({"variant": name, "row": {"skipped": reason}})
    steps.clear()
    del inputs
    release(torch.device(device))


def _checked(variant: str, job: Job, device: str) -> dict[str, Any]:
    """Return the errors of a variant. Raises an exception if it does not compute the case."""
    if job.samples:
        return {"gradient_error": variants.check(variant, job.case, device)}
    return {f"{what.replace(' ', '_')}_error": error for what, error in variants.errors(variant, job.case, device).items()}


NO_MEMORY = {
    "floor": "it is not a loss",
    "compile": "the compiler's own memory cannot be separated from the loss's",
    "rows": "row kernels alone are not a loss",
}
"""Variants whose peak memory would mislead, with the reason."""


def no_memory(variant: str) -> str | None:
    """Return why the peak memory of a variant is not measured; None if it is."""
    return NO_MEMORY.get(re.split("[:/@]", variant)[0])


def has_memory(variant: str) -> bool:
    return no_memory(variant) is None


def _reset_peak(device: str) -> None:
    """Reset the peak: temporaries of imports may have raised it above the memory in use."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()


def _peak_bytes(device: str) -> int:
    if device != "cpu":
        torch.cuda.synchronize()
    peak = peak_bytes(torch.device(device))
    assert peak is not None, "a system that can reset its peak can report it"
    return peak


def _peak_of(make: Callable[[], Step], inputs: Inputs, device: str) -> int | None:
    """Return how much building a step and running it once adds to the peak."""
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        step = make()
        prepare(step)
        step()
        return None
    inputs.clear_gradients()
    gc.collect()
    _reset_peak(device)
    before = _peak_bytes(device)
    step = make()
    prepare(step)
    step()
    return _peak_bytes(device) - before


def peak_extra_bytes(variant: str, case: Case, device: str) -> int | None:
    """Return the increase of this fresh process's peak memory by one forward and backward pass, beyond the inputs.

    It includes the gradients of the student's tensors; for the floor, the buffers that it writes to. It excludes code that is loaded at the
    first use: a tiny case of the same variant runs first. None if the system does not report it; on a CPU, only Linux does.
    """
    tiny = replace(case, n=32, v=256)
    tiny_inputs = build(tiny, device)
    variants.build(variant, tiny, tiny_inputs)()
    del tiny_inputs
    inputs = build(case, device)
    return _peak_of(lambda: variants.build(variant, case, inputs), inputs, device)
