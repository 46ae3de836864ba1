"""Compare a run of test_regression.py with ``baseline.json``: ``{machine: {case: {variant: time / floor}}}``."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from kdkernels.bench.environment import machine

BASELINE = Path(__file__).parent / "baseline.json"
SLOWER = 1.3
"""A ratio above this many times its baseline is a regression. Two runs of one commit differ by less."""

Ratios = dict[str, dict[str, float]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-baseline", action="store_true", help="write this run's ratios into benchmarks/baseline.json")


def ratios(benchmarks: list[Any]) -> Ratios:
    """Return the minimum time of each variant over the minimum time of its floor. Disturbances only increase a time."""
    by_case: Ratios = defaultdict(dict)
    for b in benchmarks:
        if "floor_seconds" in b.extra_info and not b.has_error:
            by_case[b.group][b.name] = round(b.stats.min / b.extra_info["floor_seconds"], 3)
    return dict(by_case)


def regressions(current: Ratios, baseline: Ratios) -> list[str]:
    """Return the cases that are slower than their baseline allows. Cases without a baseline are left out."""
    return [
        f"{case}: {name} takes {ratio:.2f} x the floor, and took {before:.2f}"
        for case, case_ratios in current.items()
        for name, ratio in case_ratios.items()
        if (before := baseline.get(case, {}).get(name)) is not None and ratio > SLOWER * before
    ]


def pytest_sessionfinish(session: pytest.Session) -> None:
    benchmarks = getattr(getattr(session.config, "_benchmarksession", None), "benchmarks", [])
    current = ratios(benchmarks)
    if not current:
        return
    import torch

    machine_name = machine("cuda" if torch.cuda.is_available() else "cpu")
    baseline: dict[str, Ratios] = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.exists() else {}
    if session.config.getoption("--update-baseline"):
        baseline[machine_name] = {**baseline.get(machine_name, {}), **current}
        BASELINE.write_text(json.dumps(baseline, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    assert reporter is not None
    reporter.section(f"against the baseline of {machine_name}")
    if machine_name not in baseline:
        reporter.line("there is no baseline: --update-baseline writes it")
        return
    if slower := regressions(current, baseline[machine_name]):
        for line in slower:
            reporter.line(line, red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    else:
        count = sum(map(len, current.values()))
        reporter.line(f"none of {count} is slower than {SLOWER} times its baseline")
