"""The record of a case: memory is measured first, then the times, visit by visit. On a CPU, each visit is a process.

Times that depend on fresh memory from the system, or on its address, vary between processes and over minutes, but not between rounds. The
spread over the rounds of one process would be too narrow to include another run. On a GPU, where torch keeps the memory, one visit in the
process of the run is enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import processes
from .cases import Case
from .measure import Event, Job, has_memory
from .peers import PEERS

Measured = dict[str, Any]
"""The record of a case: ``case``, ``curve``, sizes, whether peak ``memory`` is measured, ``visits`` planned and ``visits_done``,
``complete``, and in ``results`` a row per variant: ``samples_ms`` with the ``visit`` that each was taken in, ``gradient_error``,
``peak_extra_bytes``, ``skipped`` with the reason.
"""

Progress = Callable[[str], None]
"""Called with the name of each step of the job before it begins."""


def new(job: Job) -> Measured:
    """Return the record of a case before anything has been measured."""
    case = job.case
    return {
        "case": asdict(case), "curve": job.curve, "flop": case.flop, "floor_bytes": case.floor_bytes, "input_bytes": case.input_bytes,
        "memory": job.memory,
        "visits": job.visits, "visits_done": 0, "complete": False, "results": [{"variant": name} for name in job.variants],
    }  # fmt: skip


def without_unfinished(measured: Measured) -> Measured | None:
    """Return the part of an interrupted record from which a run can continue: its complete visits; None without any."""
    if measured["complete"]:
        return measured
    done = measured["visits_done"]
    for row in measured["results"]:
        _keep_samples(row, done)
    return measured if done else None


def _keep_samples(row: dict[str, Any], visits: int) -> None:
    """Remove all samples except those of the first ``visits`` visits."""
    samples = [(ms, visit) for ms, visit in zip(row.pop("samples_ms", []), row.pop("visit", []), strict=True) if visit <= visits]
    if samples:
        row["samples_ms"], row["visit"] = map(list, zip(*samples, strict=True))


def visit(
    measured: Measured,
    job: Job,
    number: int,
    device: str,
    progress: Progress = lambda doing: None,
    save: Callable[[], None] = lambda: None,
    seconds_left: float = math.inf,
) -> None:
    """Run a case's next visit, and add its results to the record. A variant that cannot run has a row with the reason.

    Args:
        number: number of the visit, from 1. The first visit also measures memory.
        save: called after every round.
        seconds_left: time after which no round begins if there is at least one sample.
    """
    rows: dict[str, dict[str, Any]] = {row["variant"]: row for row in measured["results"]}
    if number == 1:
        _first_look(rows, job, device, progress)
    turn = ""

    def emit(event: Event) -> None:
        nonlocal turn
        if "doing" in event:
            turn = event["variant"]
            progress(f"{event['doing']} {turn}")
        if "row" in event:
            rows[event["variant"]].update(event["row"])
        for name, samples in event.get("samples", {}).items():
            _keep_samples(rows[name], number - 1)
            rows[name]["samples_ms"] = rows[name].get("samples_ms", []) + samples
            rows[name]["visit"] = rows[name].get("visit", []) + [number] * len(samples)
        if "samples" in event:
            save()

    ask = processes.ask if device == "cpu" else processes.answer
    request = {"task": "visit", "job": asdict(job), "number": number, "device": device, "seconds_left": seconds_left}
    while names := [name for name, row in rows.items() if "skipped" not in row]:
        turn = ""
        try:
            ask({**request, "names": names}, emit)
            break
        except processes.OutOfProcessError as error:  # run the others again, without the variant whose turn it was
            for name in [turn] if turn else names:
                rows[name]["skipped"] = str(error)
            for row in rows.values():
                _keep_samples(row, number - 1)
    for row in rows.values():
        if "skipped" in row:
            _keep_samples(row, 0)
    measured["visits_done"] = number
    measured["complete"] = number == job.visits
    save()


def _first_look(rows: dict[str, dict[str, Any]], job: Job, device: str, progress: Progress) -> None:
    """Find the variants to skip and those that fail, and on a CPU measure the memory of the others."""
    for name, row in rows.items():
        if (reason := _too_large(name, job.case, device)) is not None:
            row["skipped"] = reason
        elif name in PEERS and (note := PEERS[name].note):
            row["note"] = note
    for name, row in rows.items():
        progress(f"memory of {name}")
        if "skipped" in row or not (job.memory and has_memory(name) if device == "cpu" else _is_news(name, job.case)):
            continue
        try:
            peak = peak_extra_bytes(name, job.case, device)
            _survived.add(_kind(name, job.case))
            if job.memory:
                row["peak_extra_bytes"] = peak
        except processes.OutOfProcessError as error:
            row["skipped"] = str(error)


_survived: set[tuple[str, str, str, bool]] = set()


def _kind(variant: str, case: Case) -> tuple[str, str, str, bool]:
    return variant, case.divergence, case.dtype, case.masked > 0


def _is_news(variant: str, case: Case) -> bool:
    """Return whether another library runs a case of this kind for the first time.

    On a GPU, it then runs in a separate process first, because it may crash or corrupt the CUDA context.
    """
    return variant in PEERS and _kind(variant, case) not in _survived


def peak_extra_bytes(variant: str, case: Case, device: str = "cpu") -> int | None:
    """Run ``measure.peak_extra_bytes`` in a fresh process.

    Raises:
        OutOfProcessError: the process failed or was killed, for example because memory ran out.
    """
    event: Event = {}
    processes.ask({"task": "memory", "variant": variant, "case": asdict(case), "device": device}, event.update)
    peak: int | None = event["peak_extra_bytes"]
    return peak


DENSE_BYTES_PER_LOGIT = {"floor": 2, "eager": 7, "compile": 7, "liger_kl": 4}
"""Number of ``[N, V]`` tensors (eager: of 4 bytes) that a variant holds at once, to decide whether to skip it."""


def _too_large(variant: str, case: Case, device: str) -> str | None:
    """Return the reason to skip a variant that does not fit in memory, or None. Only for a CPU, where running out of memory kills the
    process."""
    kind = variant.partition("/")[0]
    if device != "cpu" or kind not in DENSE_BYTES_PER_LOGIT:
        return None
    itemsize = case.torch_dtype.itemsize if variant == "floor" else 4
    needed = DENSE_BYTES_PER_LOGIT[kind] * itemsize * case.valid * case.v
    free = _available_bytes()
    if needed < 0.8 * free:
        return None
    return f"it needs about {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free"


def _available_bytes() -> float:
    info = Path("/proc/meminfo")
    if not info.exists():
        return math.inf
    return 1024 * int(next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable:")).split()[1])
