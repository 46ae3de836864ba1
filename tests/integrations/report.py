"""Run the tests of one integration and write their output and the package versions to ``results/NAME.txt``."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def versions(name: str) -> str:
    """Return the versions of the framework (named in the first line of its requirements), transformers and torch."""
    pinned = (HERE / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    framework = re.match(r"# (\S+)", pinned)
    assert framework, f"the first line of {name}.txt is '# DISTRIBUTION'"
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in (framework[1], "transformers", "torch"))


def main(name: str) -> int:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-rs", "--no-header", "-W", "ignore", f"tests/integrations/test_{name}.py"]
    run = subprocess.run(command, cwd=HERE.parents[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(run.stdout)
    lines = [line for line in run.stdout.splitlines() if line and not line.startswith("{")]
    header = f"{versions(name)}; Python {platform.python_version()}, {platform.machine()}, CPU"
    (HERE / "results" / f"{name}.txt").write_text("\n".join([header, *lines[-20:]]) + "\n", encoding="utf-8")
    return run.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
