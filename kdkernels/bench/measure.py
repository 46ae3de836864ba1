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
"""An event of a measuring process: plain data, since it may come from another process.

``{"variant", "doing"}``    what begins now; if the process dies of it, that is what this variant does
``{"variant", "row"}``      what the variant's row gains; in ``skipped`` the reason why it goes no further
``{"samples"}``             after every round: milliseconds of this visit so far, by variant
``{"peak_extra_bytes"}``    what was asked for
"""

Tell = Callable[[Event], None]


@dataclass(frozen=True)
class Job:
    """One case, and everything that is measured of it.

    Attributes:
        variants: in the order of the table.
        samples: timed rounds; 0 measures errors only, on the case itself and not on a small relative.
        memory: whether peak memory is measured.
        curve: the curve that the case is a point of, by name; "" if it stands for itself.
        visits: processes that the rounds are spread over, one after another.
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
        """Timed rounds of a visit, counted from 1: as even as can be."""
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
    """The 20th percentile, the median and the 80th percentile of samples, and how many there are."""

    low: float
    mid: float
    high: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        low, mid, high = (quantile(samples, q) for q in (0.2, 0.5, 0.8))
        return cls(low, mid, high, len(samples))

    def overlaps(self, other: Spread) -> bool:
        """Return True if the samples do not show which of the two is smaller; one sample alone never does."""
        return min(self.samples, other.samples) < 2 or (self.low <= other.high and other.low <= self.high)


def time_interleaved(
    steps: Mapping[str, Step],
    inputs: Inputs,
    samples: int,
    warmup: int = WARMUP,
    begins: Callable[[str], None] = lambda variant: None,
    after_round: Callable[[dict[str, list[float]]], None] = lambda taken: None,
    deadline: float = math.inf,
    seed: int = 0,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Each round runs every variant once, in an order of its own: what drifts drifts for all alike.

    Args:
        begins: gets the variant whose turn it is.
        after_round: gets the milliseconds so far.
        deadline: of ``time.monotonic``; past it no further round begins once there is a sample.
        seed: of the orders.

    Returns:
        Milliseconds of every sample, by variant; and of those that failed, as for want of memory, why.
    """
    taken: dict[str, list[float]] = {variant: [] for variant in steps}
    failed: dict[str, str] = {}
    order = random.Random(seed)
    device = inputs.device
    for round_ in range(warmup + samples):
        if round_ > warmup and time.monotonic() > deadline:
            break
        gc.collect()
        for variant in order.sample(list(taken), len(taken)):
            begins(variant)
            inputs.clear_gradients()
            try:
                ms = _time(steps[variant], device)
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
    found: dict[str, Any] = {"copy_bytes": 2 * size, "copy_ms": copied, "copy_gb_s": 2 * size / quantile(copied, 0.5) / 1e6, "matrix": {}}
    side = 8192 if gpu else 2048
    for dtype in dtypes:
        a, b = (torch.empty(side, side, device=device).normal_().to(getattr(torch, dtype)) for _ in range(2))
        c = torch.empty_like(a)
        ms = _repeat(lambda a=a, b=b, c=c: torch.mm(a, b, out=c), at, samples)  # type: ignore[misc]
        found["matrix"][dtype] = {"size": side, "ms": ms, "tflop_s": 2 * side**3 / quantile(ms, 0.5) / 1e9}
    return found


def visit(job: Job, names: Sequence[str], number: int, device: str, tell: Tell, seconds_left: float = math.inf) -> None:
    """Checks variants, then times them in turn, the first rounds to warm up.

    Args:
        names: variants that there still is something to measure of.
        number: of the visit, from 1.
        tell: called with each ``Event``.
        seconds_left: after them no further round begins once there is a sample.
    """
    case, deadline = job.case, time.monotonic() + seconds_left
    try:
        inputs = build(case, device)
    except Exception as error:  # too large for any variant
        for name in names:
            tell({"variant": name, "row": {"skipped": first_line(error)}})
        del error
        release(torch.device(device))
        return
    steps: dict[str, Step] = {}
    for name in names:
        tell({"variant": name, "doing": "checking"})
        try:
            row = _checked(name, job, device)
            step = variants.build(name, case, inputs)
            if Variant.parse(name).is_ours and not name.startswith("rows:") and case.operation == "distillation":
                row["plan"] = variants.held(name, case, inputs)
            if device != "cpu" and job.memory and has_memory(name):
                row["peak_extra_bytes"] = _peak_of(lambda step=step: step, inputs, device)  # type: ignore[misc]
            steps[name] = step
        except Exception as error:  # whatever a compiler, a driver or a peer comes up with is this row's result
            row = {"skipped": first_line(error)}
            del error
            release(inputs.device)
        tell({"variant": name, "row": row})
    if not job.samples:
        return
    _, failed = time_interleaved(
        steps, inputs, job.samples_of(number), WARMUP, lambda name: tell({"variant": name, "doing": "timing"}),
        lambda taken: tell({"samples": {name: ms for name, ms in taken.items() if ms}}), deadline, number,
    )  # fmt: skip
    for name, reason in failed.items():
        tell({"variant": name, "row": {"skipped": reason}})
    steps.clear()
    del inputs
    release(torch.device(device))


def _checked(variant: str, job: Job, device: str) -> dict[str, Any]:
    """The errors of a variant. Raises: it does not compute the case."""
    if job.samples:
        return {"gradient_error": variants.check(variant, job.case, device)}
    return {f"{what.replace(' ', '_')}_error": error for what, error in variants.errors(variant, job.case, device).items()}


NO_MEMORY = {
    "floor": "it is not a loss",
    "compile": "the compiler's own memory cannot be told from the loss's",
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
    assert peak is not None, "a system that can reset its peak can say it"
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
    """Return how far one forward and backward pass raises the peak memory of this fresh process above its inputs.

    The gradients of the student's tensors count, as a result of the loss; for the floor, the buffers that it writes to count. Code that
    loads on first use does not: a tiny case of the same variant runs first. None where the system does not report it: on a CPU, Linux does.
    """
    tiny = replace(case, n=32, v=256)
    tiny_inputs = build(tiny, device)
    variants.build(variant, tiny, tiny_inputs)()
    del tiny_inputs
    inputs = build(case, device)
    return _peak_of(lambda: variants.build(variant, case, inputs), inputs, device)
