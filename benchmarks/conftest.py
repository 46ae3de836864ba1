"""Compares a run of test_regression.py with ``baseline.json``: ``{machine: {case: {variant: times its floor}}}``."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from kdkernels.bench.environment import machine

BASELINE = Path(__file__).parent / "baseline.json"
SLOWER = 1.3
"""Times its baseline at which a ratio is a regression: more than what two runs of one commit differ by."""

Ratios = dict[str, dict[str, float]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-baseline", action="store_true", help="write this run's ratios into benchmarks/baseline.json")


def ratios(benchmarks: list[Any]) -> Ratios:
    """The fastest round of each variant over the fastest of the floor beside it: what disturbs a round only ever adds to it."""
    found: Ratios = defaultdict(dict)
    for b in benchmarks:
        if "floor_seconds" in b.extra_info and not b.has_error:
            found[b.group][b.name] = round(b.stats.min / b.extra_info["floor_seconds"], 3)
    return dict(found)


def regressions(now: Ratios, baseline: Ratios) -> list[str]:
    """Return the cases that are slower than their baseline allows. Cases without a baseline are left out."""
    return [
        f"{case}: {name} takes {ratio:.2f} x the floor, and took {before:.2f}"
        for case, found in now.items()
        for name, ratio in found.items()
        if (before := baseline.get(case, {}).get(name)) is not None and ratio > SLOWER * before
    ]


def pytest_sessionfinish(session: pytest.Session) -> None:
    benchmarks = getattr(getattr(session.config, "_benchmarksession", None), "benchmarks", [])
    now = ratios(benchmarks)
    if not now:
        return
    import torch

    where = machine("cuda" if torch.cuda.is_available() else "cpu")
    known: dict[str, Ratios] = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.exists() else {}
    if session.config.getoption("--update-baseline"):
        known[where] = {**known.get(where, {}), **now}
        BASELINE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    assert reporter is not None
    reporter.section(f"against the baseline of {where}")
    if where not in known:
        reporter.line("there is none yet: --update-baseline writes it")
        return
    if slower := regressions(now, known[where]):
        for line in slower:
            reporter.line(line, red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    else:
        count = sum(map(len, now.values()))
        reporter.line(f"none of {count} is slower than {SLOWER} times its baseline")
