"""PTX of the Triton kernels, executed on a CPU (see the folder ``ptx``), for every available version of Triton.

Processes of their own, since under TRITON_INTERPRET=1 there is nothing to compile, and since two versions do not fit into one.
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
"""Besides the version that is installed; `make test` puts it into a folder of its own."""


def executed(*arguments: str, version: str | None = None) -> list[dict[str, Any]]:
    """The lines that ``python -m ptx`` prints, with Triton of a version (None: as installed)."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    if version is not None:
        folder = Path(sys.prefix) / f"triton-{version}"
        if not folder.is_dir():
            pytest.skip(f"there is no {folder}: `make {folder.relative_to(folder.parent.parent)}` makes it")
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
def test_compiled_kernels_are_right_in_every_order_of_warps(shard: str) -> None:
    assert len(executed("--shard", shard)) > 25


@pytest.mark.slow
@pytest.mark.parametrize(("version", "arch", "shard"), [(OLDER, "90", "1/9"), (None, "80", "2/12"), (OLDER, "80", "3/24")])
def test_compiled_kernels_are_right_for_other_targets(version: str | None, arch: str, shard: str) -> None:
    assert len(executed("--arch", arch, "--shard", shard, version=version)) > 3


@pytest.mark.slow
def test_removed_barriers_are_noticed() -> None:
    """Those that the sources ask for; ``make ptx`` removes Triton's too, of which some follow another barrier and order nothing."""
    lines = executed("--mutate")
    assert {line["kernel"] for line in lines if line["noticed"]} >= {"kd_rows_kernel", "head_rows_kernel"}
