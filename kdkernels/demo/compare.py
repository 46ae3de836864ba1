"""Fused against dense eager loss, forward and backward: each in a fresh process, so that neither inherits the other's memory.

``python -m kdkernels.demo.compare '{"loss": "dense", ...}'`` is that process.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import LMHead, distillation_loss, plan
from .settings import Settings

__all__ = ["LOSSES", "Measurement", "measure"]

LOSSES = ("fused", "dense")


@dataclass(frozen=True)
class Measurement:
    """Of one loss. ``seconds`` are the timed steps after a warm-up; ``error`` says why there are none.

    ``peak_bytes`` is what the loss needed on top of its inputs: on the CPU how far the process's peak resident memory rose, on
    CUDA that of the allocator. The gradients of the student's hidden states and head are part of it. None: cannot be told here.
    """

    loss: str
    backend: str | None = None
    value: float | None = None
    seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None
    error: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


def measure(loss: str, settings: Settings) -> Measurement:
    """Runs one of ``LOSSES`` in a fresh process. A process that dies, as of too little memory, is a result too."""
    arguments = {
        **asdict(settings.loss_shape),
        "loss": loss,
        "seed": settings.seed,
        "device": settings.device,
        "backend": settings.backend,
        "temperature": settings.temperature,
        "kd_weight": settings.kd_weight,
        "ce_weight": settings.ce_weight,
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(arguments)], capture_output=True, text=True, encoding="utf-8", check=False
    )
    if done.returncode < 0:
        return Measurement(loss, error=f"killed by signal {-done.returncode}, as happens when memory runs out")
    if done.returncode:
        return Measurement(loss, error=(done.stderr.strip().splitlines() or ["no message"])[-1])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Measurement(**{**result, "seconds": tuple(result["seconds"])})


def peak_bytes(device: torch.device) -> int | None:
    """Peak memory of this process so far: resident on the CPU, allocated by torch on CUDA."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: a process that was forked begins with its parent's.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _losses(a: dict[str, Any], student: LMHead, teacher: LMHead, labels: Tensor) -> dict[str, Callable[[], Tensor]]:
    t = a["temperature"]

    def fused() -> Tensor:
        return distillation_loss(
            student, teacher, labels=labels, temperature=t,
            kd_weight=a["kd_weight"], ce_weight=a["ce_weight"], backend=a["backend"],
        )  # fmt: skip

    def dense() -> Tensor:
        logits = student.hidden @ student.weight.T
        with torch.no_grad():
            target = F.log_softmax((teacher.hidden @ teacher.weight.T) / t, dim=-1)
        kl = F.kl_div(F.log_softmax(logits / t, dim=-1), target, log_target=True, reduction="batchmean")
        return a["kd_weight"] * t**2 * kl + a["ce_weight"] * F.cross_entropy(logits, labels)

    return {"fused": fused, "dense": dense}


def run(a: dict[str, Any]) -> Measurement:
    """The measurement itself, in this process."""
    torch.set_num_threads(a["threads"])
    device = torch.device(a["device"])
    generator = torch.Generator(device).manual_seed(a["seed"])

    def side(hidden: int, trained: bool) -> LMHead:
        # In place: a temporary here would raise the peak that the loss is measured from.
        h = torch.randn(a["rows"], hidden, generator=generator, device=device)
        w = torch.randn(a["vocab"], hidden, generator=generator, device=device).mul_(hidden**-0.5)
        return LMHead(h.requires_grad_(trained), w.requires_grad_(trained))

    student, teacher = side(a["student_hidden"], True), side(a["teacher_hidden"], False)
    labels = torch.randint(a["vocab"], (a["rows"],), generator=generator, device=device)
    step = _losses(a, student, teacher, labels)[a["loss"]]
    backend = plan(student, teacher, backend=a["backend"]).backend if a["loss"] == "fused" else None

    before = peak_bytes(device)
    seconds, value = [], 0.0
    for _ in range(a["samples"] + 1):  # the first one warms up
        student.hidden.grad = student.weight.grad = None
        _synchronize(device)
        started = time.perf_counter()
        loss = step()
        loss.backward()  # type: ignore[no-untyped-call]
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
        value = loss.item()
    after = peak_bytes(device)
    rise = None if before is None or after is None else after - before
    return Measurement(a["loss"], backend, value, tuple(seconds[1:]), rise)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    print(json.dumps(asdict(run(json.loads(sys.argv[1])))))
