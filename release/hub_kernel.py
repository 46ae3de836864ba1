"""Lay the losses out as a kernel for the package ``kernels`` of Hugging Face, in a folder that its hub can hold.

    python release/hub_kernel.py --out dist/hub-kernel      # or: make hub-kernel

    import kernels
    kd = kernels.get_local_kernel(Path("dist/hub-kernel"))

The kernel has the variant ``torch-universal``: Python and Triton sources, without compiled code. Without ``_C`` the backends "cuda" and
"native" are not available, so that a GPU uses Triton and a CPU uses plain torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = (
    "__init__", "_version", "losses", "primitives", "divergences", "reference", "backends", "fused", "sides",
    "support/__init__", "support/errors", "support/memory", "support/ratios",
)  # fmt: skip
"""Modules and packages of the losses and primitives: they need torch and Triton alone."""


def build(out: Path) -> Path:
    """Write the kernel and return the folder of its variant.

    Raises:
        SystemExit: ``out`` exists.
    """
    if out.exists():
        raise SystemExit(f"{out} exists: remove it, or name another folder with --out")
    variant = out / "build" / "torch-universal"
    package = variant / "kdkernels"
    package.mkdir(parents=True)
    for part in PARTS:
        source = ROOT / "kdkernels" / part
        if source.is_dir():
            shutil.copytree(source, package / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (package / part).parent.mkdir(exist_ok=True)
            shutil.copy(source.with_suffix(".py"), (package / part).parent)
    content = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    metadata = {
        # The name under which the package is imported, and the namespace of its ops: versions can be loaded side by side.
        "id": f"kdkernels_{content.hexdigest()[:16]}",
        "name": "kdkernels",
        "version": 1,
        "license": "Apache-2.0",
        "backend": {"type": "cuda"},
        "python-depends": [],
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
    return variant


def main() -> None:
    parser = argparse.ArgumentParser(description="Lay the losses out as a kernel for the package kernels.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "hub-kernel", help="folder for the kernel; it must not exist")
    print(build(parser.parse_args().out))


if __name__ == "__main__":
    main()
