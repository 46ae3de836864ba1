"""The environment that ``kdkernels env`` shows and ``kdkernels demo`` records."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from typing import Any

import torch

from .. import __version__
from ..backends import _extension, selection
from ..bench.environment import cpu_model

__all__ = ["VARIABLES", "environment"]

PACKAGES = ("torch", "triton", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "matplotlib", "typer", "rich")
VARIABLES = {
    "TRITON_INTERPRET": "1 runs the triton backend in Triton's interpreter: on the CPU, slow, for checks",
    "KDKERNELS_CUDA": "read when building: auto, 0 (leave the CUDA kernels out), 1 (an error without nvcc)",
    "KDKERNELS_CUDA_ARCHS": 'read when building: CUDA targets such as "80;90a"; default: 80, 86, 89, 90a, 100, 120, those that nvcc knows',
}
"""All environment variables that kdkernels reads, with a description."""
_FOLDERS = re.compile(r"(?<!\w)(?:[A-Za-z]:)?[/\\](?:[^\s:'\"()/\\]+[/\\])*(?=[^\s/\\])")


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cuda_devices() -> list[str]:
    devices = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        devices.append(f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return devices


def _backends(device_type: str) -> dict[str, str]:
    """Return the backend that "auto" selects for float32 logits on this device, and the status of every backend."""
    dtypes = (torch.float32, torch.float32)
    status = {"auto": selection.select("auto", device_type, dtypes)}
    for name in selection.NAMES:
        reason = selection.unavailable(name, device_type, dtypes)
        status[name] = "available" if reason is None else f"not available: {_without_folders(reason)}"
    return status


def _without_folders(text: str) -> str:
    """Shorten absolute paths to file names. Import errors may contain paths, which do not belong in a bug report."""
    return _FOLDERS.sub("", text)


def environment() -> dict[str, Any]:
    """Return versions, platform, devices, backends and environment variables for a bug report, without paths or secrets."""
    cuda = _cuda_devices()
    return {
        "versions": {
            "kdkernels": __version__,
            "python": platform.python_version(),
            **{package: _version_of(package) for package in PACKAGES},
            "cuda (of torch)": torch.version.cuda or "none",
        },
        "platform": {
            "system": platform.platform(),
            "processor": cpu_model(),
            "cpus": os.cpu_count(),
            "torch threads": torch.get_num_threads(),
        },
        "devices": {"cpu": "always", **{f"cuda:{i}": name for i, name in enumerate(cuda)}},
        "compiled extension": {what: " ".join(names) or "none" for what, names in _extension.contents().items()} or {"_C": "not there"},
        "backends": {device_type: _backends(device_type) for device_type in ("cpu", *(["cuda"] if cuda else []))},
        "environment variables": {name: os.environ.get(name, "not set") for name in VARIABLES},
    }
