"""Small benchmark cases, and records of real and invented results. The shapes are too small for the numbers to mean anything."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("benchmarks", reason="run from the root of the repository: python -m pytest")
pytest.importorskip("matplotlib", reason="the figures need the extra [bench]")

from rich.console import Console

from kdkernels.bench import measure, processes, run, visits
from kdkernels.bench.cases import Case
from kdkernels.bench.measure import Job

HEADS, LOGITS = Case(32, 256, 8, 16), Case(32, 256)
QUIET = Console(quiet=True)


def small_jobs() -> list[Job]:
    names = ("floor", "eager", "torch", "torch/bfloat16", "trl")
    cases = [Case(32, 256, *sizes, "bfloat16", d) for sizes in ((8, 16), (0, 0)) for d in ("forward_kl", "jsd")]
    jobs = [Job(case, names[: 5 if case.has_heads else 3], samples=2) for case in cases]
    jobs += [Job(Case(n, 512, 8, 16), ("floor", "eager", "torch", "torch@budget=1"), 2, True, "tokens") for n in (64, 128)]
    jobs += [Job(Case(64, v, dtype="bfloat16"), ("floor", "rows:torch"), 2, False, "row kernels") for v in (256, 512)]
    jobs += [Job(Case(16, 256, 8, 8, "bfloat16", gap=g), ("eager", "torch"), 0, False, "gap") for g in (1.0, 0.1)]
    return [*jobs, Job(Case(256, 256, 8, 16), ("floor", "torch@rows=64", "torch@rows=128"), 2, False, "rows per chunk")]


def fake_peak(variant: str, case: Case, *_: Any) -> int:
    if variant == "trl":
        raise processes.OutOfProcessError("ModuleNotFoundError: No module named 'trl'")
    return ((3 if variant == "eager" else 1) << 20) + 4 * case.n * case.v


def fake_case(case: Case, *, mib: int | None = None, skipped: Sequence[str] = (), **samples_ms: list[float]) -> dict[str, Any]:
    """Return a complete case with these samples by variant, all with the same peak memory, and with skipped variants."""
    measured = visits.new(Job(case, (*skipped, *samples_ms), 3))
    for row in measured["results"]:
        if row["variant"] in skipped:
            row["skipped"] = "RuntimeError: no compiler was found on this machine"
            continue
        row.update(samples_ms=samples_ms[row["variant"]], gradient_error=None if row["variant"] == "floor" else 1e-7)
        if mib is not None and row["variant"] != "floor":
            row["peak_extra_bytes"] = mib << 20
    return {**measured, "complete": True, "visits_done": 1}


def fake_record(*cases: dict[str, Any], load: float = 0.5, cores: int = 2) -> dict[str, Any]:
    """Return the record of a complete run of these cases."""
    where = {"machine": "cpu-2core-x", "cpu": "CPU X", "cores": cores, "gpu": None, "torch": "2.13.0", "date": "2026-11-28"}
    return {
        "status": "complete", "environment": {**where, "load_average": [load, load, load]}, "cases": list(cases), "jobs": [], "peers": {},
        "settings": {"temperature": 2.0}, "seconds": 1.0, "rates": {"copy_gb_s": 10.0, "matrix": {}},
    }  # fmt: skip


def measure_small(out: Path) -> None:
    """Run the small jobs in this process and write their results. Peak memory is invented, since each would need a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "ask", processes.answer)
        patch.setattr(visits, "peak_extra_bytes", fake_peak)
        patch.setattr(os, "getloadavg", lambda: (0.1, 0.1, 0.1))
        patch.setattr(
            measure, "rates", lambda device, dtypes: {"copy_gb_s": 10.0, "matrix": {d: {"size": 8, "tflop_s": 1.0} for d in dtypes}}
        )
        record = run.begin(small_jobs(), "cpu", {"suite": "smoke", "temperature": 2.0}, out)
        run.run(record, out, QUIET)
