"""Find losses that became slower: small shapes, every available backend, each round next to a round of the floor.

``make bench``, or ``python -m pytest benchmarks`` with any option of pytest-benchmark. Times vary from day to day, so ratios to the floor
are compared with ``baseline.json`` (see conftest.py). ``--update-baseline`` writes them instead.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kdkernels.bench import variants
from kdkernels.bench.cases import Case, build
from kdkernels.bench.timing import elapsed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Large enough that matrix products (or memory traffic) and not launches take the time, small enough for a second per test.
SHAPE = (2048, 32000, 1024, 1024) if DEVICE == "cuda" else (512, 8000, 128, 256)
CASES = [
    Case(*SHAPE, dtype, divergence)
    for dtype in ("float32", "bfloat16")
    for divergence in ("forward_kl", "reverse_kl", "jsd", "total_variation")
    if not (dtype == "bfloat16" and divergence in ("reverse_kl", "total_variation"))
]
CASES += [Case(SHAPE[0], 32000, dtype="float32", divergence=divergence) for divergence in ("forward_kl", "jsd")]
CASES += [Case(*SHAPE, masked=0.5, frozen_head=True)]


def names(case: Case) -> list[str]:
    ours = variants.backends_for(DEVICE, case.torch_dtype)
    narrow = [f"{ours[0]}/bfloat16"] if case.dtype == "bfloat16" else []
    return [*ours, *narrow]


@pytest.mark.parametrize(("case", "name"), [pytest.param(case, name, id=f"{case}: {name}") for case in CASES for name in names(case)])
def test_speed(benchmark: Any, case: Case, name: str) -> None:
    benchmark.group, benchmark.name = str(case), name
    variants.check(name, case, DEVICE)
    inputs = build(case, DEVICE)
    floor, step = (variants.build(variant, case, inputs) for variant in ("floor", name))

    def seconds(run: variants.Step) -> float:
        with elapsed(torch.device(DEVICE)) as timed:
            run()
        return timed.seconds

    floors: list[float] = []

    def before_a_round() -> None:
        inputs.clear_gradients()
        floors.append(seconds(floor))

    benchmark.pedantic(lambda: seconds(step), setup=before_a_round, rounds=11, warmup_rounds=2)
    benchmark.extra_info["floor_seconds"] = min(floors)
