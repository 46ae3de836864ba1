"""Small cases of the benchmarks, and results of them. Tiny shapes: no number here means anything."""

from __future__ import annotations

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


def made_up_peak(variant: str, case: Case, *_: Any) -> int:
    if variant == "trl":
        raise processes.OutOfProcessError("ModuleNotFoundError: No module named 'trl'")
    return ((3 if variant == "eager" else 1) << 20) + 4 * case.n * case.v


def measure_small(out: Path) -> None:
    """Results of a real run; only peak memory is made up, and all in this process, as every one would take another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "ask", processes.answer)
        patch.setattr(visits, "peak_extra_bytes", made_up_peak)
        patch.setattr(
            measure, "rates", lambda device, dtypes: {"copy_gb_s": 10.0, "matrix": {d: {"size": 8, "tflop_s": 1.0} for d in dtypes}}
        )
        record = run.begin(small_jobs(), "cpu", {"suite": "smoke", "temperature": 2.0}, out)
        run.run(record, out, QUIET)
