"""The PTX of the Triton kernels, executed on a CPU by tests/ptx, for every available version of Triton.

Each version runs in another process: nothing is compiled under TRITON_INTERPRET=1, and a process can load only one version.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

OLDER = "3.6.0"
"""A second version, which `make test` installs into a folder of its own."""


def executed(*arguments: str, version: str | None = None) -> list[dict[str, Any]]:
    """Run ``python -m ptx`` with a version of Triton (None: the installed one) and return its output lines."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    if version is not None:
        folder = Path(sys.prefix) / f"triton-{version}"
        if not folder.is_dir():
            pytest.skip(f"{folder} is missing: run `make {folder.relative_to(folder.parent.parent)}`")
        environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, "-W", "ignore", "-m", "ptx", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert lines, run.stderr[-2000:]
    assert version is None or lines[0]["triton"] == version
    failed = [f"{line['case']}: {line['failed']}" for line in lines if "failed" in line]
    assert not failed, "\n".join(failed)
    assert run.returncode == 0, run.stderr[-2000:]
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["0/3", "1/3", "2/3"])
def test_compiled_kernels_are_correct_in_every_order_of_warps(shard: str) -> None:
    assert len(executed("--shard", shard)) > 25


@pytest.mark.slow
@pytest.mark.parametrize(("version", "arch", "shard"), [(OLDER, "90", "1/9"), (None, "80", "2/12"), (OLDER, "80", "3/24")])
def test_compiled_kernels_are_correct_for_other_targets(version: str | None, arch: str, shard: str) -> None:
    assert len(executed("--arch", arch, "--shard", shard, version=version)) > 3


@pytest.mark.slow
def test_removed_barriers_are_detected() -> None:
    """Remove the barriers written in the sources. ``make ptx`` also removes those that Triton inserts, some of which are redundant."""
    lines = executed("--mutate")
    assert {line["kernel"] for line in lines if line["noticed"]} >= {"kd_rows_kernel", "head_rows_kernel"}
