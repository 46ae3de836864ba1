"""The machine and the versions that results depend on. ``python -m kdkernels.bench.environment`` prints the machine's name."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import kdkernels

ROOT = Path(__file__).parent.parent.parent
"""The root of the repository, if the package runs from it."""


def cpu_model() -> str:
    """Return the CPU's name if the system reports it, else its architecture."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if names:
            return str(names[0]).strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: str) -> str:
    """Return a short name for the kind of machine, without its host name: ``cpu-2core-amd-epyc``, ``nvidia-h200``."""
    if device == "cpu":
        model = re.sub(r"\((r|tm)\)|cpu|processor|@.*", " ", cpu_model(), flags=re.IGNORECASE)
        name = f"cpu-{cores()}core-{model}"
    else:
        name = torch.cuda.get_device_name(device)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment(device: str) -> dict[str, Any]:
    """Return everything that the numbers depend on."""
    gpu = device != "cpu"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine(device),
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(device) if gpu else None,
        "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "kdkernels": kdkernels.__version__,
        "commit": _commit(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(*command: str) -> str | None:
    """Return the first line of a program's output, "" if it prints nothing; None if it cannot run."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0].strip() if lines else ""


def _commit() -> str | None:
    """Return the short commit, with ``+`` if the package or its kernels have changed since; None without a repository."""
    if not (ROOT / "csrc").exists():
        return None  # an installed package: a repository around it is another project's
    commit = _run("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
    changed = _run("git", "-C", str(ROOT), "status", "--porcelain", "--", "kdkernels", "csrc")
    return f"{commit}+" if commit and changed else commit


if __name__ == "__main__":
    print(machine("cuda" if torch.cuda.is_available() else "cpu"))
