"""``python -m ptx.report VERSION...``, from the tests folder: runs every case and writes results.json.

For the installed Triton and those of the versions, in ``triton-VERSION`` beside the virtual environment's own folders: every case for
sm_90, a sample for sm_80, and each barrier removed in turn.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
RUNS = (("--all",), ("--arch", "80"), ("--mutate", "--all"))


def lines(version: str | None, arguments: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the lines that ``python -m ptx`` prints, failing cases included."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    if version is not None:
        environment["PYTHONPATH"] = str(Path(sys.prefix) / f"triton-{version}")
    command = [sys.executable, "-W", "ignore", "-m", "ptx", *arguments]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=HERE.parent)
    return [json.loads(line) for line in run.stdout.splitlines()]


def summary(executed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each version, target and kind of case: how many, and the largest share of the allowed error for each result."""
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = collections.defaultdict(list)
    for line in executed:
        groups[line["triton"], line["arch"], line["case"].split("(")[0]].append(line)
    rows = []
    for (version, arch, kind), cases in groups.items():
        worst: dict[str, float] = {}
        for line in cases:
            for name, share in line.get("errors", {}).items():
                worst[name] = max(share, worst.get(name, 0.0))
        failed = [f"{line['case']}: {line['failed']}" for line in cases if "failed" in line]
        rows.append({"triton": version, "arch": arch, "kind": kind, "cases": len(cases), "failed": failed, "worst": worst})
    return rows


def barriers(mutated: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each version and kernel: how many barriers were removed, and the source of those that nothing missed."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = collections.defaultdict(list)
    for line in mutated:
        groups[line["triton"], line["kernel"]].append(line)
    return [
        {
            "triton": version,
            "kernel": kernel,
            "removed": len(removed),
            "written": sum(line["written"] for line in removed),
            "unnoticed": sorted({line["source"] for line in removed if not line["noticed"]}),
        }
        for (version, kernel), removed in groups.items()
    ]


def main() -> int:
    executed: list[dict[str, Any]] = []
    mutated: list[dict[str, Any]] = []
    for version in (None, *sys.argv[1:]):
        for arguments in RUNS:
            (mutated if "--mutate" in arguments else executed).extend(lines(version, arguments))
    results = {"executed": summary(executed), "barriers": barriers(mutated)}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for row in (*results["executed"], *results["barriers"]):
        print(row)
    return int(any("failed" in line for line in executed + mutated))


if __name__ == "__main__":
    sys.exit(main())
