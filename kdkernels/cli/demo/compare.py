"""Compare the fused loss with a dense eager loss, forward and backward. Each runs in fresh processes, to measure its memory separately.

Such a process runs ``python -m kdkernels.cli.demo.compare '{"loss": "dense", ...}'``.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import LMHead, distillation_loss, plan
from ...bench.timing import elapsed
from ...support.memory import peak_bytes
from .settings import LossShape, Settings

__all__ = ["LOSSES", "Measurement", "measure"]

LOSSES = ("fused", "dense")


@dataclass(frozen=True)
class Job:
    """The request to a fresh process."""

    loss: str  # of LOSSES
    shape: LossShape
    seed: int
    device: str
    backend: str
    temperature: float
    kd_weight: float
    ce_weight: float
    threads: int


@dataclass(frozen=True)
class Sample:
    """One step in a fresh process, after a warm-up step.

    ``peak_bytes`` is the memory of the loss beyond its inputs: the rise of the process's peak resident memory on the CPU, of the
    allocator's peak on CUDA. It includes the gradients of the student's hidden states and head. None if it cannot be measured.
    """

    backend: str | None  # None for dense
    value: float
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Measurement:
    """Medians over the processes of one loss. If a process failed, only ``error`` is set, to the reason of the last one."""

    backend: str | None = None
    value: float | None = None
    seconds: tuple[float, ...] = ()
    median_seconds: float | None = None
    peak_bytes: int | None = None
    error: str | None = None


def measure(settings: Settings, on_process: Callable[[], None]) -> dict[str, Measurement]:
    """Measure every loss of ``LOSSES``, alternating between them, so that a temporary load of the machine affects all of them.

    A process that dies, for example because memory runs out, is also a result. ``on_process`` is called after each process.
    """
    outcomes: dict[str, list[Sample | str]] = {loss: [] for loss in LOSSES}
    for _ in range(settings.loss_shape.samples):
        for loss, samples in outcomes.items():
            job = Job(
                loss, settings.loss_shape, settings.seed, settings.device, settings.backend, settings.temperature,
                settings.kd_weight, settings.ce_weight, torch.get_num_threads(),
            )  # fmt: skip
            samples.append(_in_fresh_process(job))
            on_process()
    return {loss: _summary(samples) for loss, samples in outcomes.items()}


def _in_fresh_process(job: Job) -> Sample | str:
    """Return the sample, or the error in one line."""
    command = [sys.executable, "-m", __name__, json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}, as happens when memory runs out"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}, no message"])[-1]
    return Sample(**json.loads(done.stdout.splitlines()[-1]))


def _summary(outcomes: list[Sample | str]) -> Measurement:
    samples = [outcome for outcome in outcomes if isinstance(outcome, Sample)]
    errors = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if errors:
        return Measurement(error=errors[-1])
    seconds = tuple(sample.seconds for sample in samples)
    peaks = [sample.peak_bytes for sample in samples if sample.peak_bytes is not None]
    peak = int(statistics.median(peaks)) if peaks else None
    return Measurement(samples[0].backend, samples[0].value, seconds, statistics.median(seconds), peak)


def run(job: Job) -> Sample:
    """Measure one loss in this process."""
    torch.set_num_threads(job.threads)
    device, shape = torch.device(job.device), job.shape
    generator = torch.Generator(device).manual_seed(job.seed)

    def side(hidden: int, trained: bool) -> LMHead:
        # In place: a temporary would raise the peak memory before the measurement.
        h = torch.randn(shape.rows, hidden, generator=generator, device=device)
        w = torch.randn(shape.vocab, hidden, generator=generator, device=device).mul_(hidden**-0.5)
        return LMHead(h.requires_grad_(trained), w.requires_grad_(trained))

    student, teacher = side(shape.student_hidden, True), side(shape.teacher_hidden, False)
    labels = torch.randint(shape.vocab, (shape.rows,), generator=generator, device=device)
    loss_of = {"fused": _fused, "dense": _dense}[job.loss]
    backend = plan(student, teacher, backend=job.backend).backend if job.loss == "fused" else None

    before = peak_bytes(device)
    seconds = value = 0.0
    for _ in ("warm-up", "timed"):
        student.hidden.grad = student.weight.grad = None
        with elapsed(device) as timed:
            loss = loss_of(job, student, teacher, labels)
            loss.backward()  # type: ignore[no-untyped-call]
        seconds, value = timed.seconds, loss.item()
    after = peak_bytes(device)
    return Sample(backend, value, seconds, None if before is None or after is None else after - before)


def _fused(job: Job, student: LMHead, teacher: LMHead, labels: Tensor) -> Tensor:
    return distillation_loss(
        student, teacher, labels=labels, temperature=job.temperature,
        kd_weight=job.kd_weight, ce_weight=job.ce_weight, backend=job.backend,
    )  # fmt: skip


def _dense(job: Job, student: LMHead, teacher: LMHead, labels: Tensor) -> Tensor:
    """Compute the same loss in plain torch, as training code writes it."""
    t = job.temperature
    logits = student.hidden @ student.weight.T  # [N, V]
    with torch.no_grad():
        target = F.log_softmax((teacher.hidden @ teacher.weight.T) / t, dim=-1)  # [N, V]
    kl = F.kl_div(F.log_softmax(logits / t, dim=-1), target, log_target=True, reduction="batchmean")
    return job.kd_weight * t**2 * kl + job.ce_weight * F.cross_entropy(logits, labels)


def _job(arguments: dict[str, Any]) -> Job:
    return Job(**{**arguments, "shape": LossShape(**arguments["shape"])})


if __name__ == "__main__":
    print(json.dumps(asdict(run(_job(json.loads(sys.argv[1]))))))
