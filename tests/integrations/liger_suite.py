"""Run Liger-Kernel's own tests of the losses in ``kdkernels.compat.liger``: ``python tests/integrations/liger_suite.py CHECKOUT``.

Their files are copied to a temporary folder. Only the imports of the tested names are changed, to ``kdkernels.compat.liger``; everything
else comes from the checkout. The results and the commit are written to ``results/liger_suite.txt``. Cases of more than 1e12 floating-point
operations are skipped and counted.
"""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CHUNKED, PLAIN = "kdkernels.compat.liger.chunked_loss", "kdkernels.compat.liger"
FILES = (
    "chunked_loss/test_jsd_loss.py",
    "transformers/test_jsd.py",
    "transformers/test_fused_linear_jsd.py",
    "transformers/test_kl_div.py",
    "transformers/test_fused_linear_cross_entropy.py",
)
FOLDERS = ("src/liger_kernel", "test/__init__.py", "test/conftest.py", "test/utils.py", "test/chunked_loss", "test/transformers")
SKIP = """
def pytest_collection_modifyitems(items):
    import math
    import pytest
    for item in items:
        sizes = getattr(getattr(item, "callspec", None), "params", {})
        known = [sizes[name] for name in "BTHV" if name in sizes]
        if len(known) > 2 and 18 * math.prod(known) > 1e12:
            item.add_marker(pytest.mark.skip(reason="more than 1e12 floating-point operations"))
"""


def redirected(source: str) -> tuple[str, list[str]]:
    """Return the source with its imports of provided names redirected to kdkernels, and these names."""
    lines, names = source.splitlines(keepends=True), []
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ImportFrom) or node.module is None or not node.module.startswith("liger_kernel."):
            continue
        target = CHUNKED if node.module.startswith("liger_kernel.chunked_loss") else PLAIN
        provided = set(importlib.import_module(target).__all__)
        if all(alias.name in provided for alias in node.names):
            lines[node.lineno - 1] = lines[node.lineno - 1].replace(node.module, target, 1)
            names += [alias.name for alias in node.names]
    return "".join(lines), names


def main(checkout: Path) -> int:
    git = ["git", "-C", str(checkout)]
    commit = subprocess.run([*git, "log", "-1", "--format=%H %cs"], check=True, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        files_of_commit = subprocess.run(
            [*git, "ls-tree", "-r", "--name-only", "HEAD", *FOLDERS], check=True, capture_output=True, text=True
        )
        for name in files_of_commit.stdout.splitlines():
            if name.endswith(".py"):
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                (copy / name).write_bytes(subprocess.run([*git, "show", f"HEAD:{name}"], check=True, capture_output=True).stdout)
        names: list[str] = []
        for name in FILES:
            file = copy / "test" / name
            source, of_file = redirected(file.read_text(encoding="utf-8"))
            file.write_text(source, encoding="utf-8")
            names += of_file
        (copy / "conftest.py").write_text(SKIP, encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(copy / "src"), str(copy)]), "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-rsf", "--no-header", "-p", "no:cacheprovider", "-W", "ignore", "--tb=line"]
        files = [f"test/{name}" for name in FILES]
        run = subprocess.run([*command, *files], cwd=copy, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(run.stdout)
    lines = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "SKIPPED", "ERROR", "E ")) or " passed" in line]
    report = [f"linkedin/Liger-Kernel {commit}", f"provided here: {', '.join(sorted(set(names)))}", *files, *lines]
    (Path(__file__).parent / "results" / "liger_suite.txt").write_text("\n".join(report) + "\n", encoding="utf-8")
    return run.returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
